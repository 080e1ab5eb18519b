"""The app with keys and limits in raw ASGI and WSGI: its handlers are found by a table.

Nobody can tell our edge which function that is, so the decorated function decides itself.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import opsguard_asgi
import opsguard_wsgi
from tests.contract.apps.admitted import ODD, OPEN, Desk, plain_paths, same

THING = re.compile(r"/api/v1/things/[^/]+")
CLASSES = ("/class", "/class-method")


def route_of(desk: Desk, path: str) -> str | None:
    if THING.fullmatch(path):
        return "/api/v1/things/{id}"
    known = path in desk.decorators or path in OPEN or path in CLASSES or path == "/ws"
    return path if known or path.startswith("/who") else None


def make_asgi(desk: Desk, late: bool = False, endpoint: bool = True) -> Any:
    table: dict[str, Callable[..., Any]] = {}
    label = (lambda scope: route_of(desk, routed(scope))) if endpoint else None

    async def app(scope: Any, receive: Any, send: Any) -> None:
        path = route_of(desk, routed(scope))
        if scope["type"] == "websocket":
            await websocket(scope, receive, send)
        elif scope["type"] == "http":
            handler: Any = table.get(path or "", missing)
            await handler(scope, receive, send)

    async def websocket(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        desk.calls.append("/ws")
        await send({"type": "websocket.accept"})
        while (await receive())["type"] != "websocket.disconnect":
            pass

    async def missing(scope: Any, receive: Any, send: Any) -> None:
        await answer(send, b"not here", 404)

    def declare(path: str) -> None:
        async def plain(scope: Any, receive: Any, send: Any) -> None:
            await answer(send, desk.plainly(path).encode())

        async def stream(scope: Any, receive: Any, send: Any) -> None:
            await start(send)
            for _ in range(3):
                await send({"type": "http.response.body", "body": b"part", "more_body": True})
            await send({"type": "http.response.body"})

        async def endless(scope: Any, receive: Any, send: Any) -> None:
            await start(send)
            desk.entered.set()
            gone = asyncio.ensure_future(disconnected(receive))
            while not gone.done() and not desk.leave.is_set():
                await send({"type": "http.response.body", "body": b"tick", "more_body": True})
                await asyncio.sleep(0.01)
            gone.cancel()
            await send({"type": "http.response.body"})

        async def background(scope: Any, receive: Any, send: Any) -> None:
            await answer(send, b"soon")
            await asyncio.sleep(0)
            desk.after()

        kinds = {
            "/slot/stream": stream,
            "/slot/endless": endless,
            "/who/background": background,
        }
        table[path] = desk.decorators.get(path, same)(kinds.get(path, plain))

    for path in (*plain_paths(desk), *ODD):
        declare(path)

    class View:
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            await answer(send, desk.ran("/class").encode())

        @desk.ops.limit("2/minute")
        async def get(self, scope: Any, receive: Any, send: Any) -> None:
            await answer(send, desk.ran("/class-method").encode())

    table["/class"] = desk.ops.limit("2/minute")(View().__call__)
    table["/class-method"] = View().get
    return opsguard_asgi.install(app, desk.ops, endpoint=label)


def routed(scope: Any) -> str:
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


async def disconnected(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def start(send: Any, status: int = 200, length: int | None = None) -> None:
    headers = [(b"content-type", b"text/plain")]
    if length is not None:
        headers.append((b"content-length", b"%d" % length))
    await send({"type": "http.response.start", "status": status, "headers": headers})


async def answer(send: Any, body: bytes, status: int = 200) -> None:
    await start(send, status, len(body))
    await send({"type": "http.response.body", "body": body})


TEXT = ("Content-Type", "text/plain")


def make_wsgi(desk: Desk, late: bool = False, endpoint: bool = True) -> Any:
    table: dict[str, Callable[..., Any]] = {}
    label = (lambda environ: route_of(desk, environ["PATH_INFO"])) if endpoint else None

    def app(environ: Any, start_response: Any) -> Any:
        path = route_of(desk, environ["PATH_INFO"])
        handler: Any = table.get(path or "", missing)
        return handler(environ, start_response)

    def whole(start_response: Any, body: bytes, status: str = "200 OK") -> list[bytes]:
        start_response(status, [TEXT, ("Content-Length", str(len(body)))])
        return [body]

    def missing(environ: Any, start_response: Any) -> list[bytes]:
        return whole(start_response, b"not here", "404 Not Found")

    def declare(path: str) -> None:
        def plain(environ: Any, start_response: Any) -> list[bytes]:
            return whole(start_response, desk.plainly(path).encode())

        def stream(environ: Any, start_response: Any) -> Iterator[bytes]:
            start_response("200 OK", [TEXT])
            return iter([b"part"] * 3)

        def endless(environ: Any, start_response: Any) -> Iterator[bytes]:
            start_response("200 OK", [TEXT])
            desk.entered.set()
            return ticks(desk)

        def background(environ: Any, start_response: Any) -> Any:
            start_response("200 OK", [TEXT])
            return Later(desk)

        kinds: dict[str, Callable[..., Any]] = {
            "/slot/stream": stream,
            "/slot/endless": endless,
            "/who/background": background,
        }
        table[path] = desk.decorators.get(path, same)(kinds.get(path, plain))

    for path in (*plain_paths(desk), *ODD):
        declare(path)

    class View:
        def __call__(self, environ: Any, start_response: Any) -> list[bytes]:
            return whole(start_response, desk.ran("/class").encode())

        @desk.ops.limit("2/minute")
        def get(self, environ: Any, start_response: Any) -> list[bytes]:
            return whole(start_response, desk.ran("/class-method").encode())

    table["/class"] = desk.ops.limit("2/minute")(View().__call__)
    table["/class-method"] = View().get
    return opsguard_wsgi.install(app, desk.ops, endpoint=label)


def ticks(desk: Desk) -> Iterator[bytes]:
    while not desk.leave.is_set():
        yield b"tick"
        time.sleep(0.005)


class Later:
    """An iterable with work to do when it is closed."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk

    def __iter__(self) -> Iterator[bytes]:
        return iter([b"soon"])

    def close(self) -> None:
        self.desk.after()
