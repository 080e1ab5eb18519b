"""What the servers serve: one app of the contract, chosen by the environment of the process.

``CONTRACT_APP`` names it, ``CONTRACT_SETTINGS`` has the settings of its OpsGuard as JSON, and what
happens in it that no answer tells is written to the file ``CONTRACT_EVENTS``. With
``CONTRACT_WORKERS`` it tells of its workers.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from wsgiref.validate import validator

from opsguard import Exchange, OpsGuard, Response
from tests.contract.apps.shop import Boom, Shop, declare
from tests.contract.harness import MODULES, maker


class Told(list[str]):
    """A list whose items are told to the test, in another process."""

    def __init__(self, file: Path, kind: str) -> None:
        super().__init__()
        self._file = file
        self._kind = kind

    def append(self, item: str) -> None:
        super().append(item)
        with self._file.open("a") as file:
            file.write(f"{self._kind}: {item}\n")


def events(kind: str) -> Told:
    return Told(Path(os.environ["CONTRACT_EVENTS"]), kind)


def guarded(name: str, ops: OpsGuard) -> Any:
    """The app of this name, guarded."""
    shop = Shop(ops)
    shop.calls = events("call")
    shop.after_ids = events("after")
    return _make(name, shop, ops)


def bare(name: str) -> Any:
    """The app of this name as it is without us."""
    return _make(name, Shop(None), None)


def _make(name: str, shop: Shop, ops: OpsGuard | None) -> Any:
    if name in MODULES:
        return maker(name)(shop, ops)
    return OTHERS[name](shop, ops)


def validated(shop: Shop, ops: OpsGuard | None) -> Any:
    """The raw WSGI app, with a judge on either side of our edge."""
    import opsguard_wsgi
    from tests.contract.apps.asgi import template_of

    app = maker("wsgi")(shop, None)
    if ops is None:
        return app

    def endpoint(environ: Any) -> str | None:
        return template_of(environ["PATH_INFO"])

    return validator(opsguard_wsgi.install(validator(app), ops, endpoint=endpoint))


def django_sync_under_asgi(shop: Shop, ops: OpsGuard | None) -> Any:
    from django.core.handlers.asgi import ASGIHandler

    maker("django")(shop, ops)
    return ASGIHandler()


def django_async_under_wsgi(shop: Shop, ops: OpsGuard | None) -> Any:
    from django.core.handlers.wsgi import WSGIHandler

    maker("django-async")(shop, ops)
    return WSGIHandler()


def django_guarded_outside(shop: Shop, ops: OpsGuard | None) -> Any:
    """Guarded by the middleware and by `install` around it, which sees more than Django shows."""
    from opsguard_django import install

    app = maker("django-async")(shop, ops)
    return app if ops is None else install(app)


def django_guarded_outside_wsgi(shop: Shop, ops: OpsGuard | None) -> Any:
    from opsguard_django import install

    app = maker("django")(shop, ops)
    return app if ops is None else install(app)


def blocking(shop: Shop, ops: OpsGuard) -> Any:
    """Beside the contract's own paths one that takes every thread of the loop's executor."""
    import opsguard_asgi
    from tests.contract.apps.asgi import answer, start

    release = threading.Event()
    shop_app = maker("asgi")(shop, None)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope.get("path") == "/block":
            loop = asyncio.get_running_loop()
            waits = [loop.run_in_executor(None, release.wait, 60) for _ in range(64)]
            await start(send, 200)
            await send({"type": "http.response.body", "body": b"blocked", "more_body": True})
            await asyncio.gather(*waits)
            await send({"type": "http.response.body"})
        elif scope.get("path") == "/release":
            release.set()
            await answer(send, 200, b"released")
        else:
            await shop_app(scope, receive, send)

    return opsguard_asgi.install(app, ops)


LATE = [("Content-Type", "text/plain"), ("Content-Length", "5")]


def late_wsgi(shop: Shop, ops: OpsGuard) -> Any:
    """It announces an answer whose body fails before its first byte."""
    import opsguard_wsgi

    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", list(LATE))
        return late_body()

    return opsguard_wsgi.install(app, ops, endpoint=lambda environ: "/late")


class Streamed:
    """A body that is no list, and tells when it is closed."""

    def __init__(self, parts: list[bytes], told: Told) -> None:
        self.parts = parts
        self.told = told

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.parts)

    def close(self) -> None:
        self.told.append("stream")


def refused_wsgi(shop: Shop, ops: OpsGuard) -> Any:
    """It starts answers with a header that no server takes: one in a list, one in a stream."""
    import opsguard_wsgi

    told = events("closed")

    def app(environ: Any, start_response: Any) -> Any:
        bad = [*LATE, ("X-Bad", "a\nX-Evil: 1")]
        start_response("200 OK", bad if environ["PATH_INFO"] != "/plain" else list(LATE))
        body = [b"hello"]
        return Streamed(body, told) if environ["PATH_INFO"] == "/stream" else body

    return opsguard_wsgi.install(app, ops, endpoint=lambda environ: environ["PATH_INFO"])


def late_flask(shop: Shop, ops: OpsGuard) -> Any:
    """The same in Flask."""
    from flask import Flask, Response

    import opsguard_flask

    app = Flask("late")
    opsguard_flask.install(app, ops)

    @app.get("/late")
    def late() -> Response:
        return Response(late_body(), headers=LATE)

    return app


def late_body() -> Iterator[bytes]:
    raise Boom("late")
    yield b"never"


def living(shop: Shop, ops: OpsGuard) -> Any:
    """A FastAPI app that tells of its lifespan, in a log line and beside it."""
    from fastapi import FastAPI

    from opsguard_fastapi import install

    told = events("lifespan")

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        told.append("started")
        ops.logger("shop").info("opened")
        yield
        told.append("stopped")
        ops.logger("shop").info("closed")

    app = FastAPI(title="shop", lifespan=lifespan)
    install(app, ops)

    @app.get("/plain")
    async def plain() -> str:
        return "hello"

    return app


OTHERS: dict[str, Callable[[Shop, Any], Any]] = {
    "wsgi-validated": validated,
    "django-under-asgi": django_sync_under_asgi,
    "django-async-under-wsgi": django_async_under_wsgi,
    "django-async-outside": django_guarded_outside,
    "django-outside": django_guarded_outside_wsgi,
    "asgi-blocking": blocking,
    "fastapi-living": living,
    "wsgi-late": late_wsgi,
    "flask-late": late_flask,
    "wsgi-refused": refused_wsgi,
}


def tell_of_workers(ops: OpsGuard) -> None:
    """/where says who serves and where it meets the others, /debug changes a log level."""

    def tell(exchange: Exchange) -> Response | None:
        if exchange.path == "/debug":
            ops.set_log_level("DEBUG", "shop")
        elif exchange.path != "/where":
            return None
        time.sleep(0.02)  # busy, so that the next request goes to another worker
        told = {
            "pid": os.getpid(),
            "folder": str(ops.place.directory(time.time())),
            "level": logging.getLogger("shop").level,
        }
        body = json.dumps(told).encode()
        return Response(200, (("Content-Length", str(len(body))),), body)

    ops.at_edge(tell)


def _from_environment() -> Any:
    ops = OpsGuard("contract", **json.loads(os.environ["CONTRACT_SETTINGS"]))
    declare(ops)
    if "CONTRACT_WORKERS" in os.environ:
        tell_of_workers(ops)
    return guarded(os.environ["CONTRACT_APP"], ops)


# Servers look for it by this name; whoever imports the module for anything else wants no app.
if "CONTRACT_APP" in os.environ:
    app = _from_environment()
