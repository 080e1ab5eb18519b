"""The app called as a server would call it, its answer thrown away (or, to check it, kept)."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Sequence
from itertools import cycle as endlessly
from itertools import islice
from typing import Any

from benchmarks.apps import Served
from benchmarks.drivers.request import environ, scope

Answer = tuple[int, dict[str, str], bytes]


def new_loop() -> asyncio.AbstractEventLoop:
    """uvloop's event loop where there is one."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


def serve(
    served: Served, paths: Sequence[str], loop: asyncio.AbstractEventLoop
) -> Callable[[int], None]:
    """A function that serves a number of requests, going round the paths."""
    if served.protocol == "wsgi":
        return _serve_wsgi(served.app, paths)
    return _serve_asgi(served.app, paths, loop)


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
    app: Any, paths: Sequence[str], loop: asyncio.AbstractEventLoop
) -> Callable[[int], None]:
    turns = endlessly(paths)

    async def send(message: Any) -> None:
        pass

    async def several(requests: int) -> None:
        for path in islice(turns, requests):
            await app(scope(path), _receiver(loop), send)

    return lambda requests: loop.run_until_complete(several(requests))


def _serve_wsgi(app: Any, paths: Sequence[str]) -> Callable[[int], None]:
    turns = endlessly(paths)

    def write(data: bytes) -> None:
        pass

    def start_response(status: str, headers: Any, exc_info: Any = None) -> Any:
        return write

    def several(requests: int) -> None:
        for path in islice(turns, requests):
            body = app(environ(path, sys.stderr), start_response)
            for _ in body:
                pass
            close = getattr(body, "close", None)
            if close is not None:
                close()

    return several


def fetch(
    served: Served, path: str, loop: asyncio.AbstractEventLoop, *, encoding: str | None = None
) -> Answer:
    """One answer of the app: status, headers in lower case, body.

    ``encoding`` replaces the request's Accept-Encoding.
    """
    if served.protocol == "wsgi":
        return _fetch_wsgi(served.app, path, encoding)
    return loop.run_until_complete(_fetch_asgi(served.app, path, encoding, loop))


async def _fetch_asgi(
    app: Any, path: str, encoding: str | None, loop: asyncio.AbstractEventLoop
) -> Answer:
    asked = scope(path)
    if encoding is not None:
        others = [pair for pair in asked["headers"] if pair[0] != b"accept-encoding"]
        asked["headers"] = [*others, (b"accept-encoding", encoding.encode("ascii"))]
    messages: list[Any] = []

    async def send(message: Any) -> None:
        messages.append(message)

    await app(asked, _receiver(loop), send)
    start, *rest = messages
    headers = {
        name.decode("latin-1").lower(): value.decode("latin-1") for name, value in start["headers"]
    }
    return start["status"], headers, b"".join(one.get("body", b"") for one in rest)


def _fetch_wsgi(app: Any, path: str, encoding: str | None) -> Answer:
    asked = environ(path, sys.stderr)
    if encoding is not None:
        asked["HTTP_ACCEPT_ENCODING"] = encoding
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
