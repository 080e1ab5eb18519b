"""The app with keys and limits in Django, its views sync or async."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Callable
from types import ModuleType
from typing import Any

from django.conf import settings
from django.core.handlers.asgi import ASGIHandler
from django.core.handlers.wsgi import WSGIHandler
from django.http import HttpRequest, HttpResponse, StreamingHttpResponse
from django.urls import include, path
from django.views import View

from tests.contract.apps.admitted import Desk, plain_paths, same
from tests.contract.apps.admitted_raw import ticks
from tests.contract.apps.django_app import MIDDLEWARE, configure, text


def make(desk: Desk, late: bool = False) -> Any:
    _use(desk, asynchronous=False)
    return WSGIHandler()


def make_async(desk: Desk, late: bool = False) -> Any:
    _use(desk, asynchronous=True)
    return ASGIHandler()


def _use(desk: Desk, asynchronous: bool) -> None:
    configure()
    from opsguard_django.project import project_ops

    project_ops.cache_clear()
    settings.OPSGUARD = desk.ops
    settings.MIDDLEWARE = [MIDDLEWARE]
    urls: Any = ModuleType("urls")
    urls.urlpatterns = _urls(desk, asynchronous)
    settings.ROOT_URLCONF = urls


def _twin(view: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(view)
    async def twin(*args: Any, **kwargs: Any) -> Any:
        return view(*args, **kwargs)

    return twin


def _urls(desk: Desk, asynchronous: bool) -> list[Any]:
    ops, marks = desk.ops, desk.decorators
    kind: Callable[[Any], Any] = _twin if asynchronous else same

    def plain(where: str) -> Any:
        def view(request: HttpRequest, **kwargs: str) -> HttpResponse:
            return text(desk.plainly(where))

        return marks.get(where, same)(kind(view))

    class Views:
        @marks["/method"]
        @kind
        def method(self, request: HttpRequest) -> HttpResponse:
            return text(desk.ran("/method"))

    @ops.limit("2/minute")
    class ClassView(View):
        @kind
        def get(self, request: HttpRequest) -> HttpResponse:
            return text(desk.ran("/class"))

    class MethodView(View):
        @ops.limit("2/minute")
        @kind
        def get(self, request: HttpRequest) -> HttpResponse:
            return text(desk.ran("/class-method"))

        @kind
        def post(self, request: HttpRequest) -> HttpResponse:
            return text(desk.ran("/class-method"))

    def sync(request: HttpRequest) -> HttpResponse:
        return text(desk.ran("/sync"))

    def stream(request: HttpRequest) -> StreamingHttpResponse:
        async def parts() -> AsyncIterator[bytes]:
            for _ in range(3):
                yield b"part"

        return StreamingHttpResponse(parts() if asynchronous else iter([b"part"] * 3))

    def endless(request: HttpRequest) -> StreamingHttpResponse:
        desk.entered.set()

        async def aticks() -> AsyncIterator[bytes]:
            while not desk.leave.is_set():
                yield b"tick"
                await asyncio.sleep(0.01)

        return StreamingHttpResponse(aticks() if asynchronous else ticks(desk))

    def background(request: HttpRequest) -> Any:
        response: Any = text("soon")
        response._resource_closers.append(desk.after)
        return response

    things = [path("things/<str:id>", plain("/api/v1/things/{id}"))]
    return [
        *[path(where[1:], plain(where)) for where in plain_paths(desk)],
        path("sync", marks["/sync"](sync)),
        path("method", Views().method),
        path("class", ClassView.as_view()),
        path("class-method", MethodView.as_view()),
        path("upload", plain("/upload")),
        path("slot/stream", marks["/slot/stream"](kind(stream))),
        path("slot/endless", marks["/slot/endless"](kind(endless))),
        path("who/background", kind(background)),
        path("api/v1/", include(things)),
    ]
