"""The contract's app in raw ASGI."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import opsguard_asgi
from opsguard import OpsGuard
from tests.contract.apps.shop import FILE, Boom, Shop

TEMPLATES = [
    (re.compile(r"/items/\d+"), "/items/{id}"),
    (re.compile(r"/api/v1/users/[^/]+"), "/api/v1/users/{name}"),
    (re.compile(r"/tenants/[^/]+/things/[^/]+"), "/tenants/{tenant}/things/{thing}"),
    (re.compile(r"/refused/\d+"), "/refused/{id}"),
]


def template_of(path: str) -> str | None:
    for pattern, template in TEMPLATES:
        if pattern.fullmatch(path):
            return template
    return path if path in PATHS else None


def endpoint(scope: Any) -> str | None:
    root = scope.get("root_path", "")
    return template_of(scope["path"].removeprefix(root))


PATHS = {
    *("/plain", "/items", "/empty", "/moved", "/bad", "/broken", "/upload", "/decorated"),
    *("/method", "/class", "/boom", "/stream", "/midway", "/endless", "/background", "/ids"),
    *("/thread", "/bound", "/own-id", "/file", "/handled", "/health", "/wait", "/ws", "/lazy"),
    *("/write", "/restart", "/late", "/nothing-sent", "/within"),
}


def make(shop: Shop, ops: OpsGuard | None) -> Any:
    """The app, guarded if there is an OpsGuard."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await lifespan(receive, send)
        elif scope["type"] == "websocket":
            await websocket(shop, scope, receive, send)
        else:
            await http(shop, scope, receive, send)

    return app if ops is None else opsguard_asgi.install(app, ops, endpoint=endpoint)


async def lifespan(receive: Any, send: Any) -> None:
    for kind in ("startup", "shutdown"):
        await receive()
        await send({"type": f"lifespan.{kind}.complete"})


async def websocket(shop: Shop, scope: Any, receive: Any, send: Any) -> None:
    await receive()
    if scope["path"] != "/ws":
        await send({"type": "websocket.close", "code": 1000})
        return
    await send({"type": "websocket.accept"})
    while True:
        message = await receive()
        if message["type"] == "websocket.disconnect":
            return
        await send({"type": "websocket.send", "text": f"{shop.ids()} {message['text']}"})


async def body_of(receive: Any) -> bytes:
    body = b""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ConnectionResetError("the client left")
        body += message.get("body", b"")
        if not message.get("more_body", False):
            return body


async def http(shop: Shop, scope: Any, receive: Any, send: Any) -> None:
    path, method = scope["path"].removeprefix(scope.get("root_path", "")), scope["method"]
    if path == "/stream":
        await start(send, 200)
        for _ in range(1000):
            await send({"type": "http.response.body", "body": b"0123456789", "more_body": True})
        await send({"type": "http.response.body"})
        return
    if path == "/midway":
        await start(send, 200)
        await send({"type": "http.response.body", "body": b"abc", "more_body": True})
        await send({"type": "http.response.body", "body": b"def", "more_body": True})
        raise Boom("midway")
    if path == "/endless":
        await start(send, 200)
        gone = asyncio.ensure_future(receive_disconnect(receive))
        while not gone.done():
            await send({"type": "http.response.body", "body": b"tick", "more_body": True})
            await asyncio.sleep(0.01)
        return
    if path == "/thread":
        await answer(send, 200, (await asyncio.to_thread(shop.ids)).encode())
        return
    if path == "/wait":
        shop.ops.bind(tenant_id=shop.ids())
        await asyncio.sleep(0.01)
        await answer(send, 200, shop.ids().encode())
        return
    if path == "/within":
        await shop.within()
        await answer(send, 200, shop.ids().encode())
        return
    if path == "/background":
        await answer(send, 200, b"soon")
        await asyncio.sleep(0)
        shop.after()
        return
    if path == "/nothing-sent":
        return
    if path == "/file":
        await answer(send, 200, FILE.read_bytes())
        return
    body = await body_of(receive) if method == "POST" and not path.startswith("/refused") else b""
    status, headers, data = shop.handle(method, path, body)
    await answer(send, status, data, headers)


async def receive_disconnect(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def start(send: Any, status: int, headers: dict[str, str] | None = None) -> None:
    pairs = [(n.lower().encode(), v.encode()) for n, v in (headers or {}).items()]
    await send({"type": "http.response.start", "status": status, "headers": pairs})


async def answer(
    send: Any, status: int, body: bytes, headers: dict[str, str] | None = None
) -> None:
    length = {} if status == 204 else {"Content-Length": str(len(body))}
    await start(send, status, {**(headers or {}), **length})
    await send({"type": "http.response.body", "body": body})
