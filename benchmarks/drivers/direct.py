"""The app called as a server would call it, its answer thrown away (or, to check it, kept)."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Sequence
from itertools import cycle as endlessly
from itertools import islice
from typing import Any

from benchmarks.apps import Served
from benchmarks.drivers.request import HEADERS, Headers, environs, scopes, with_encoding

Answer = tuple[int, dict[str, str], bytes]


def new_loop() -> asyncio.AbstractEventLoop:
    """uvloop's event loop where there is one."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


def serve(
    served: Served,
    paths: Sequence[str],
    loop: asyncio.AbstractEventLoop,
    headers: Headers = HEADERS,
) -> Callable[[int], None]:
    """A function that serves a number of requests, going round the paths."""
    if served.protocol == "wsgi":
        return _serve_wsgi(served.app, paths, headers)
    return _serve_asgi(served.app, paths, loop, headers)


def _receiver(loop: asyncio.AbstractEventLoop) -> Callable[[], Any]:
    """``receive`` of a request without a body: the client then neither speaks nor leaves."""
    asked = False

    async def receive() -> dict[str, Any]:
        nonlocal asked
        if asked:
            await loop.create_future()
        asked = True
        return {"type": "http.request", "body": b"", "more_body": False}

    return receive


def _serve_asgi(
    app: Any, paths: Sequence[str], loop: asyncio.AbstractEventLoop, headers: Headers
) -> Callable[[int], None]:
    turns, scope = endlessly(paths), scopes(headers)

    async def send(message: Any) -> None:
        pass

    async def several(requests: int) -> None:
        for path in islice(turns, requests):
            await app(scope(path), _receiver(loop), send)

    return lambda requests: loop.run_until_complete(several(requests))


def _serve_wsgi(app: Any, paths: Sequence[str], headers: Headers) -> Callable[[int], None]:
    turns, environ = endlessly(paths), environs(sys.stderr, headers)

    def write(data: bytes) -> None:
        pass

    def start_response(status: str, headers: Any, exc_info: Any = None) -> Any:
        return write

    def several(requests: int) -> None:
        for path in islice(turns, requests):
            body = app(environ(path), start_response)
            for _ in body:
                pass
            close = getattr(body, "close", None)
            if close is not None:
                close()

    return several


def fetch(
    served: Served,
    path: str,
    loop: asyncio.AbstractEventLoop,
    *,
    encoding: str | None = None,
    headers: Headers = HEADERS,
) -> Answer:
    """One answer of the app: status, headers in lower case, body.

    ``encoding`` replaces the request's Accept-Encoding.
    """
    if encoding is not None:
        headers = with_encoding(headers, encoding)
    if served.protocol == "wsgi":
        return _fetch_wsgi(served.app, environs(sys.stderr, headers)(path))
    return loop.run_until_complete(_fetch_asgi(served.app, scopes(headers)(path), loop))


async def _fetch_asgi(app: Any, asked: dict[str, Any], loop: asyncio.AbstractEventLoop) -> Answer:
    messages: list[Any] = []

    async def send(message: Any) -> None:
        messages.append(message)

    await app(asked, _receiver(loop), send)
    start, *rest = messages
    headers = {
        name.decode("latin-1").lower(): value.decode("latin-1") for name, value in start["headers"]
    }
    return start["status"], headers, b"".join(one.get("body", b"") for one in rest)


def _fetch_wsgi(app: Any, asked: dict[str, Any]) -> Answer:
    started: list[Any] = []

    def start_response(status: str, headers: Any, exc_info: Any = None) -> Any:
        started[:] = [int(status.split()[0]), {name.lower(): value for name, value in headers}]
        return started.append

    body = app(asked, start_response)
    whole = b"".join(body)
    close = getattr(body, "close", None)
    if close is not None:
        close()
    return started[0], started[1], whole
