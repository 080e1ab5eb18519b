"""Views for WSGI."""

from __future__ import annotations

from django.http import HttpRequest, HttpResponse, JsonResponse
from django.shortcuts import render
from django.urls import path

from benchmarks.apps.django_site.models import Fortune
from benchmarks.apps.fortunes import ADDED


def greet(request: HttpRequest) -> HttpResponse:
    return JsonResponse({"message": "Hello, World!"})


def rendered(request: HttpRequest, fortunes: list[Fortune]) -> HttpResponse:
    fortunes.append(Fortune(id=0, message=ADDED))
    fortunes.sort(key=lambda fortune: fortune.message)
    return render(request, "fortunes.html", {"fortunes": fortunes})


def page(request: HttpRequest) -> HttpResponse:
    return rendered(request, list(Fortune.objects.all()))


urlpatterns = [path("json", greet), path("fortunes", page)]
