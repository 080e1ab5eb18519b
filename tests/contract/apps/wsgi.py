"""The contract's app in raw WSGI."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from http import HTTPStatus
from typing import Any

import opsguard_wsgi
from opsguard import OpsGuard
from tests.contract.apps.asgi import template_of
from tests.contract.apps.shop import FILE, Boom, Shop


def make(shop: Shop, ops: OpsGuard | None) -> Any:
    """The app, guarded if there is an OpsGuard."""

    def app(environ: Any, start_response: Any) -> Any:
        path, method = environ["PATH_INFO"], environ["REQUEST_METHOD"]
        special = SPECIAL.get(path)
        if special is not None and method == "GET":
            return special(shop, environ, start_response)
        body = b""
        if method == "POST" and not path.startswith("/refused"):
            body = read_all(environ)
        status, headers, data = shop.handle(method, path, body)
        start(start_response, status, data, headers)
        return [data]

    def endpoint(environ: Any) -> str | None:
        return template_of(environ["PATH_INFO"])

    return app if ops is None else opsguard_wsgi.install(app, ops, endpoint=endpoint)


def read_all(environ: Any) -> bytes:
    length = environ.get("CONTENT_LENGTH")
    if length:
        return bytes(environ["wsgi.input"].read(int(length)))
    body = b""
    while chunk := environ["wsgi.input"].read(64):
        body += chunk
    return body


def start(start_response: Any, status: int, body: bytes, headers: dict[str, str]) -> None:
    pairs = list(headers.items())
    if status != 204:
        pairs.append(("Content-Length", str(len(body))))
    start_response(f"{status} {HTTPStatus(status).phrase}", pairs)


TEXT = [("Content-Type", "text/plain")]


def stream(shop: Shop, environ: Any, start_response: Any) -> Iterator[bytes]:
    start_response("200 OK", list(TEXT))
    return (b"0123456789" for _ in range(1000))


def midway(shop: Shop, environ: Any, start_response: Any) -> Iterator[bytes]:
    start_response("200 OK", list(TEXT))

    def parts() -> Iterator[bytes]:
        yield b"abc"
        yield b"def"
        raise Boom("midway")

    return parts()


def endless(shop: Shop, environ: Any, start_response: Any) -> Iterator[bytes]:
    start_response("200 OK", list(TEXT))

    def ticks() -> Iterator[bytes]:
        while True:
            yield b"tick"
            time.sleep(0.005)

    return ticks()


def thread(shop: Shop, environ: Any, start_response: Any) -> list[bytes]:
    import contextvars

    found: list[str] = []
    context = contextvars.copy_context()
    worker = threading.Thread(target=lambda: found.append(context.run(shop.ids)))
    worker.start()
    worker.join()
    body = found[0].encode()
    start(start_response, 200, body, {"Content-Type": "text/plain"})
    return [body]


def wait(shop: Shop, environ: Any, start_response: Any) -> list[bytes]:
    shop.ops.bind(tenant_id=shop.ids())
    time.sleep(0.01)
    body = shop.ids().encode()
    start(start_response, 200, body, {"Content-Type": "text/plain"})
    return [body]


def within(shop: Shop, environ: Any, start_response: Any) -> list[bytes]:
    shop.within()
    body = shop.ids().encode()
    start(start_response, 200, body, {"Content-Type": "text/plain"})
    return [body]


class Later:
    """An iterable with work to do when it is closed."""

    def __init__(self, shop: Shop) -> None:
        self.shop = shop

    def __iter__(self) -> Iterator[bytes]:
        return iter([b"soon"])

    def close(self) -> None:
        self.shop.after()


def background(shop: Shop, environ: Any, start_response: Any) -> Later:
    start_response("200 OK", [*TEXT, ("Content-Length", "4")])
    return Later(shop)


def lazy(shop: Shop, environ: Any, start_response: Any) -> Iterator[bytes]:
    start_response("200 OK", list(TEXT))
    yield b"lazy"


def write(shop: Shop, environ: Any, start_response: Any) -> list[bytes]:
    send = start_response("200 OK", list(TEXT))
    send(b"writ")
    return [b"ten"]


def restart(shop: Shop, environ: Any, start_response: Any) -> list[bytes]:
    start_response("200 OK", list(TEXT))
    try:
        raise Boom("before the first byte")
    except Boom:
        start_response("503 Service Unavailable", list(TEXT), sys.exc_info())
    return [b"restarted"]


def file(shop: Shop, environ: Any, start_response: Any) -> Any:
    start_response("200 OK", [*TEXT, ("Content-Length", str(FILE.stat().st_size))])
    opened = FILE.open("rb")
    wrapper = environ.get("wsgi.file_wrapper")
    return wrapper(opened) if wrapper else [opened.read()]


SPECIAL = {
    "/stream": stream,
    "/midway": midway,
    "/endless": endless,
    "/thread": thread,
    "/wait": wait,
    "/within": within,
    "/background": background,
    "/lazy": lazy,
    "/write": write,
    "/restart": restart,
    "/file": file,
}
