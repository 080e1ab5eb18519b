"""The shop on ASGI alone: ``uvicorn opsguard.demo.apps.asgi:app``."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, TypeAlias

from opsguard import OpsGuard
from opsguard.demo.shop import CATALOGUE, PAUSE, SLOW, read_order, receipt, template
from opsguard_asgi import install

__all__ = ["app", "make_app", "ops"]

ops = OpsGuard(service="shop", version="1.0")
log = ops.logger("shop")
orders = ops.metrics.counter("shop_orders_total", "Orders placed.", ("item_id",))

Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]


async def shop(scope: Message, receive: Receive, send: Send) -> None:
    if scope["type"] == "lifespan":
        await lifespan(receive, send)
        return
    method, handler = ROUTES.get(template(scope["path"]) or "", ("", None))
    if handler is None:
        await answer(send, 404, {"error": "not found"})
    elif method != scope["method"]:
        await answer(send, 405, {"error": "method not allowed"})
    else:
        await handler(scope, receive, send)


async def items(scope: Message, receive: Receive, send: Send) -> None:
    await answer(send, 200, list(CATALOGUE.values()))


async def item(scope: Message, receive: Receive, send: Send) -> None:
    found = CATALOGUE.get(scope["path"].removeprefix("/items/"))
    await answer(send, 200 if found else 404, found or {"error": "no such item"})


async def place(scope: Message, receive: Receive, send: Send) -> None:
    order = read_order(await body_of(receive))
    if order is None:
        await answer(send, 422, {"error": "not an order"})
        return
    ops.bind(item_id=order.item_id)  # on every further log line of this request
    log.info("order placed", quantity=order.quantity)
    orders.labels(item_id=order.item_id).inc()
    await answer(send, 201, {"item_id": order.item_id, "quantity": order.quantity})


async def upload(scope: Message, receive: Receive, send: Send) -> None:
    await answer(send, 201, {"bytes": len(await body_of(receive))})


async def slow(scope: Message, receive: Receive, send: Send) -> None:
    await asyncio.sleep(SLOW)
    log.info("report ready")
    await answer(send, 200, {"seconds": SLOW})


async def boom(scope: Message, receive: Receive, send: Send) -> None:
    raise RuntimeError("the till is on fire")


async def stream(scope: Message, receive: Receive, send: Send) -> None:
    left = asyncio.ensure_future(disconnected(receive))
    await start(send, 200, b"text/plain")
    try:
        for line in receipt():
            if left.done():
                return
            await send({"type": "http.response.body", "body": line, "more_body": True})
            await asyncio.sleep(PAUSE)
    finally:
        left.cancel()
    await send({"type": "http.response.body"})


async def health(scope: Message, receive: Receive, send: Send) -> None:
    await answer(send, 200, {"status": "ok"})


ROUTES = {
    "/items": ("GET", items),
    "/items/{item_id}": ("GET", item),
    "/orders": ("POST", place),
    "/uploads": ("POST", upload),
    "/slow": ("GET", slow),
    "/boom": ("GET", boom),
    "/stream": ("GET", stream),
    "/health": ("GET", health),
}


async def start(send: Send, status: int, content_type: bytes) -> None:
    headers = [(b"content-type", content_type)]
    await send({"type": "http.response.start", "status": status, "headers": headers})


async def answer(send: Send, status: int, content: object) -> None:
    await start(send, status, b"application/json")
    await send({"type": "http.response.body", "body": json.dumps(content).encode("ascii")})


async def body_of(receive: Receive) -> bytes:
    parts, more = [], True
    while more:
        message = await receive()
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    return b"".join(parts)


async def disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def lifespan(receive: Receive, send: Send) -> None:
    await receive()
    await send({"type": "lifespan.startup.complete"})
    await receive()
    await send({"type": "lifespan.shutdown.complete"})


def make_app() -> Callable[[Message, Receive, Send], Awaitable[None]]:
    return shop


# A raw app has no router to ask, so `endpoint` says which route a request is for.
app = install(make_app(), ops, endpoint=lambda scope: template(scope["path"]))
