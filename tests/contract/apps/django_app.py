"""The contract's app in Django: one project, its views sync or async.

A process has one Django. What differs from app to app (the shop, whether it is guarded) is set
before the handler is made.
"""

from __future__ import annotations

import asyncio
import contextvars
import functools
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import django
from django.conf import settings
from django.core.handlers.asgi import ASGIHandler
from django.core.handlers.wsgi import WSGIHandler
from django.http import (
    FileResponse,
    HttpRequest,
    HttpResponse,
    HttpResponseRedirect,
    StreamingHttpResponse,
)
from django.urls import include, path, re_path
from django.views import View
from django.views.decorators.http import require_http_methods

from opsguard import OpsGuard
from tests.contract.apps.shop import FILE, Boom, Shop

MIDDLEWARE = "opsguard_django.OpsGuardMiddleware"
current_shop: Shop


def configure() -> None:
    if settings.configured:
        return
    settings.configure(
        ROOT_URLCONF=__name__,
        ALLOWED_HOSTS=["*"],
        SECRET_KEY="contract",
        INSTALLED_APPS=["opsguard_django"],
        MIDDLEWARE=[],
        OPSGUARD={},
        LOGGING_CONFIG=None,
        USE_TZ=True,
        APPEND_SLASH=False,
    )
    django.setup()


def _use(shop: Shop, ops: OpsGuard | None, views: str) -> None:
    global current_shop
    configure()
    from opsguard_django.project import project_ops

    current_shop = shop
    project_ops.cache_clear()
    settings.OPSGUARD = ops
    settings.MIDDLEWARE = ([MIDDLEWARE] if ops is not None else []) + [
        f"{__name__}.{views}_inner_middleware"
    ]
    settings.ROOT_URLCONF = f"{__name__}_{views}_urls"


def make(shop: Shop, ops: OpsGuard | None) -> Any:
    """The WSGI app with sync views, guarded if there is an OpsGuard."""
    _use(shop, ops, "sync")
    return WSGIHandler()


def make_async(shop: Shop, ops: OpsGuard | None) -> Any:
    """The ASGI app with async views."""
    _use(shop, ops, "async")
    return ASGIHandler()


def text(body: str | bytes, status: int = 200, **headers: str) -> HttpResponse:
    return HttpResponse(body, status=status, content_type="text/plain", headers=headers or None)


def _watch(request: HttpRequest) -> None:
    if request.path.startswith("/refused"):
        current_shop.calls.append("a view middleware of /refused ran")


class _Handled(Exception):
    """An exception that the app answers for."""


class sync_inner_middleware:
    def __init__(self, get_response: Callable[[HttpRequest], HttpResponse]) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponse:
        return self.get_response(request)

    def process_view(self, request: HttpRequest, *_: Any) -> None:
        _watch(request)

    def process_exception(self, request: HttpRequest, error: Exception) -> HttpResponse | None:
        return text("handled", 409) if isinstance(error, _Handled) else None


class async_inner_middleware(sync_inner_middleware):
    sync_capable = False
    async_capable = True

    def __init__(self, get_response: Any) -> None:
        from asgiref.sync import markcoroutinefunction

        super().__init__(get_response)
        markcoroutinefunction(self)


def wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


def plain(request: HttpRequest) -> HttpResponse:
    return text("hello")


def create(request: HttpRequest) -> HttpResponse:
    return text(f"made {len(request.body)}", 201)


def item(request: HttpRequest, id: int) -> HttpResponse:
    return text(f"item {id}")


def empty(request: HttpRequest) -> HttpResponse:
    return HttpResponse(status=204)


def moved(request: HttpRequest) -> HttpResponse:
    return HttpResponseRedirect("/plain")


def bad(request: HttpRequest) -> HttpResponse:
    return text("bad", 400)


def broken(request: HttpRequest) -> HttpResponse:
    return text("broken", 500)


def boom(request: HttpRequest) -> HttpResponse:
    raise Boom("boom")


def handled(request: HttpRequest) -> HttpResponse:
    raise _Handled


def upload(request: HttpRequest) -> HttpResponse:
    return text(str(len(request.body)))


@wrapped
def decorated(request: HttpRequest) -> HttpResponse:
    return text("wrapped")


class Views:
    def method(self, request: HttpRequest) -> HttpResponse:
        return text("method")


class ClassView(View):
    def get(self, request: HttpRequest) -> HttpResponse:
        return text("class")


def stream(request: HttpRequest) -> StreamingHttpResponse:
    return StreamingHttpResponse(b"0123456789" for _ in range(1000))


def midway(request: HttpRequest) -> StreamingHttpResponse:
    def fail() -> Iterator[bytes]:
        yield b"abc"
        yield b"def"
        raise Boom("midway")

    return StreamingHttpResponse(fail())


def endless(request: HttpRequest) -> StreamingHttpResponse:
    def ticks() -> Iterator[bytes]:
        while True:
            yield b"tick"
            time.sleep(0.005)

    return StreamingHttpResponse(ticks())


def background(request: HttpRequest) -> HttpResponse:
    response = text("soon")
    response._resource_closers.append(current_shop.after)
    return response


def ids(request: HttpRequest) -> HttpResponse:
    return text(current_shop.ids())


def thread(request: HttpRequest) -> HttpResponse:
    found: list[str] = []
    context = contextvars.copy_context()
    worker = threading.Thread(target=lambda: found.append(context.run(current_shop.ids)))
    worker.start()
    worker.join()
    return text(found[0])


def wait(request: HttpRequest) -> HttpResponse:
    current_shop.ops.bind(tenant_id=current_shop.ids())
    time.sleep(0.01)
    return text(current_shop.ids())


def within(request: HttpRequest) -> HttpResponse:
    current_shop.within()
    return text(current_shop.ids())


def bound(request: HttpRequest) -> HttpResponse:
    current_shop.ops.bind(tenant_id="t-1")
    return text("bound")


def own_id(request: HttpRequest) -> HttpResponse:
    return text("own", **{"X-Request-ID": "mine"})


def file(request: HttpRequest) -> FileResponse:
    return FileResponse(FILE.open("rb"), content_type="text/plain")


def health(request: HttpRequest) -> HttpResponse:
    return text("ok")


def refused(request: HttpRequest, id: str) -> HttpResponse:
    current_shop.calls.append("the handler of /refused ran")
    return text("ran")


def user(request: HttpRequest, name: str) -> HttpResponse:
    return text(f"user {name}")


def thing(request: HttpRequest, tenant: str, thing: str) -> HttpResponse:
    return text(f"{tenant} {thing}")


# The async twins, for what an async view does differently; Django runs the sync ones in a thread.


def _async(view: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(view)
    async def twin(request: HttpRequest, **kwargs: Any) -> Any:
        return view(request, **kwargs)

    return twin


class AsyncViews:
    async def method(self, request: HttpRequest) -> HttpResponse:
        return text("method")


class AsyncClassView(View):
    async def get(self, request: HttpRequest) -> HttpResponse:
        return text("class")


async def async_stream(request: HttpRequest) -> StreamingHttpResponse:
    async def parts() -> AsyncIterator[bytes]:
        for _ in range(1000):
            yield b"0123456789"

    return StreamingHttpResponse(parts())


async def async_midway(request: HttpRequest) -> StreamingHttpResponse:
    async def fail() -> AsyncIterator[bytes]:
        yield b"abc"
        yield b"def"
        raise Boom("midway")

    return StreamingHttpResponse(fail())


async def async_endless(request: HttpRequest) -> StreamingHttpResponse:
    async def ticks() -> AsyncIterator[bytes]:
        while True:
            yield b"tick"
            await asyncio.sleep(0.01)

    return StreamingHttpResponse(ticks())


async def async_wait(request: HttpRequest) -> HttpResponse:
    current_shop.ops.bind(tenant_id=current_shop.ids())
    await asyncio.sleep(0.01)
    return text(current_shop.ids())


async def async_within(request: HttpRequest) -> HttpResponse:
    await current_shop.within()
    return text(current_shop.ids())


async def async_file(request: HttpRequest) -> FileResponse:
    async def parts() -> AsyncIterator[bytes]:
        yield FILE.read_bytes()

    response = FileResponse(content_type="text/plain")
    response.streaming_content = parts()
    response.headers["Content-Length"] = str(FILE.stat().st_size)
    return response


def _urls(asynchronous: bool) -> list[Any]:
    def view(sync: Callable[..., Any], twin: Callable[..., Any] | None = None) -> Any:
        return (twin or _async(sync)) if asynchronous else sync

    only_get = require_http_methods(["GET", "HEAD"])
    only_post = require_http_methods(["POST"])
    things = [path("things/<str:thing>", view(thing))]
    users = [re_path(r"^users/(?P<name>[a-z]+)$", view(user))]
    return [
        path("plain", only_get(view(plain))),
        path("items", only_post(view(create))),
        path("items/<int:id>", view(item)),
        path("empty", view(empty)),
        path("moved", view(moved)),
        path("bad", view(bad)),
        path("broken", view(broken)),
        path("boom", view(boom)),
        path("handled", view(handled)),
        path("upload", view(upload)),
        path("decorated", view(decorated)),
        path("method", AsyncViews().method if asynchronous else Views().method),
        path("class", AsyncClassView.as_view() if asynchronous else ClassView.as_view()),
        path("stream", view(stream, async_stream)),
        path("midway", view(midway, async_midway)),
        path("endless", view(endless, async_endless)),
        path("background", view(background)),
        path("ids", view(ids)),
        path("thread", thread),
        path("wait", view(wait, async_wait)),
        path("within", view(within, async_within)),
        path("bound", view(bound)),
        path("own-id", view(own_id)),
        path("file", view(file, async_file)),
        path("health", view(health)),
        path("refused/<int:id>", view(refused)),
        path("api/v1/", include(users)),
        path("tenants/<slug:tenant>/", include(things)),
    ]
