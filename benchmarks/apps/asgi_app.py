"""The raw ASGI app: the least a framework could cost."""

from __future__ import annotations

import json
from typing import Any

from benchmarks.apps.fortunes import Fortunes

FORTUNES = Fortunes()


def greet() -> tuple[bytes, bytes]:
    return b"application/json", json.dumps({"message": "Hello, World!"}).encode()


def page() -> tuple[bytes, bytes]:
    return b"text/html; charset=utf-8", FORTUNES.page().encode()


ROUTES = {"/json": greet, "/fortunes": page}


def endpoint(scope: Any) -> str | None:
    """The route template of a scope, as opsguard asks for it."""
    path = scope["path"]
    return path if path in ROUTES else None


async def app(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "lifespan":
        await lifespan(receive, send)
        return
    view = ROUTES.get(scope["path"])
    status, (kind, body) = (200, view()) if view else (404, (b"text/plain", b"no such page"))
    headers = [(b"content-type", kind), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def lifespan(receive: Any, send: Any) -> None:
    while True:
        message = await receive()
        await send({"type": message["type"] + ".complete"})
        if message["type"] == "lifespan.shutdown":
            return
