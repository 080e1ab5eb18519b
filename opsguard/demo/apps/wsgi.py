"""The shop on WSGI alone: ``gunicorn opsguard.demo.apps.wsgi:app``."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator
from http import HTTPStatus
from typing import Any, TypeAlias

from opsguard import OpsGuard
from opsguard.demo.shop import CATALOGUE, PAUSE, SLOW, read_order, receipt, template
from opsguard_wsgi import install

__all__ = ["app", "make_app", "ops"]

ops = OpsGuard(service="shop", version="1.0")
log = ops.logger("shop")
orders = ops.metrics.counter("shop_orders_total", "Orders placed.", ("item_id",))

Environ: TypeAlias = dict[str, Any]
Start: TypeAlias = Callable[..., object]


def shop(environ: Environ, start_response: Start) -> Iterable[bytes]:
    method, handler = ROUTES.get(template(environ["PATH_INFO"]) or "", ("", None))
    if handler is None:
        return answer(start_response, 404, {"error": "not found"})
    if method != environ["REQUEST_METHOD"]:
        return answer(start_response, 405, {"error": "method not allowed"})
    return handler(environ, start_response)


def items(environ: Environ, start_response: Start) -> Iterable[bytes]:
    return answer(start_response, 200, list(CATALOGUE.values()))


def item(environ: Environ, start_response: Start) -> Iterable[bytes]:
    found = CATALOGUE.get(environ["PATH_INFO"].removeprefix("/items/"))
    return answer(start_response, 200 if found else 404, found or {"error": "no such item"})


def place(environ: Environ, start_response: Start) -> Iterable[bytes]:
    order = read_order(body_of(environ))
    if order is None:
        return answer(start_response, 422, {"error": "not an order"})
    ops.bind(item_id=order.item_id)  # on every further log line of this request
    log.info("order placed", quantity=order.quantity)
    orders.labels(item_id=order.item_id).inc()
    return answer(start_response, 201, {"item_id": order.item_id, "quantity": order.quantity})


def upload(environ: Environ, start_response: Start) -> Iterable[bytes]:
    return answer(start_response, 201, {"bytes": len(body_of(environ))})


def slow(environ: Environ, start_response: Start) -> Iterable[bytes]:
    time.sleep(SLOW)
    log.info("report ready")
    return answer(start_response, 200, {"seconds": SLOW})


def boom(environ: Environ, start_response: Start) -> Iterable[bytes]:
    raise RuntimeError("the till is on fire")


def stream(environ: Environ, start_response: Start) -> Iterator[bytes]:
    start_response("200 OK", [("Content-Type", "text/plain")])
    for line in receipt():
        yield line
        time.sleep(PAUSE)


def health(environ: Environ, start_response: Start) -> Iterable[bytes]:
    return answer(start_response, 200, {"status": "ok"})


ROUTES: dict[str, tuple[str, Callable[[Environ, Start], Iterable[bytes]]]] = {
    "/items": ("GET", items),
    "/items/{item_id}": ("GET", item),
    "/orders": ("POST", place),
    "/uploads": ("POST", upload),
    "/slow": ("GET", slow),
    "/boom": ("GET", boom),
    "/stream": ("GET", stream),
    "/health": ("GET", health),
}


def answer(start_response: Start, status: int, content: object) -> list[bytes]:
    body = json.dumps(content).encode("ascii")
    headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
    start_response(f"{status} {HTTPStatus(status).phrase}", headers)
    return [body]


def body_of(environ: Environ) -> bytes:
    length = environ.get("CONTENT_LENGTH")
    if length:
        body: bytes = environ["wsgi.input"].read(int(length))
        return body
    # Without a length the body is chunked or there is none; gunicorn says where it ends.
    return environ["wsgi.input"].read() if environ.get("wsgi.input_terminated") else b""


def make_app() -> Callable[[Environ, Start], Iterable[bytes]]:
    return shop


# A raw app has no router to ask, so `endpoint` says which route a request is for.
app = install(make_app(), ops, endpoint=lambda environ: template(environ["PATH_INFO"]))
