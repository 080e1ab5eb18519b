"""Views for ASGI: the same, async."""

from __future__ import annotations

from django.http import HttpRequest, HttpResponse, JsonResponse
from django.urls import path

from benchmarks.apps.django_site.models import Fortune
from benchmarks.apps.django_site.sync_urls import rendered


async def greet(request: HttpRequest) -> HttpResponse:
    return JsonResponse({"message": "Hello, World!"})


async def page(request: HttpRequest) -> HttpResponse:
    return rendered(request, [fortune async for fortune in Fortune.objects.all()])


urlpatterns = [path("json", greet), path("fortunes", page)]
