"""What the build runs to learn which way the C of the request path mostly goes.

`hatch_build` compiles that C twice: first so that it counts how often each branch is taken while
this program serves its requests, then with these counts, by which the compiler lays the usual
request out in one piece and puts the rest aside. On a page of some size most of what a request
costs is fetching code and not running it, which this makes cheaper by a quarter.

It needs what opsguard needs and nothing else, so raw ASGI and raw WSGI stand for all adapters: the
core below them is the same.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from opsguard import OpsGuard
from opsguard.accelerator import speed
from opsguard_asgi import install as install_asgi
from opsguard_wsgi import install as install_wsgi

ROUNDS = 400
HEADERS = (
    ("host", "shop.example.com"),
    ("user-agent", "Mozilla/5.0 (X11; Linux x86_64; rv:145.0) Gecko/20100101 Firefox/145.0"),
    ("accept", "text/html,application/xhtml+xml,application/json;q=0.9,*/*;q=0.8"),
    ("accept-encoding", "gzip, deflate, br, zstd"),
    ("x-forwarded-for", "203.0.113.7"),
    ("x-forwarded-proto", "https"),
)
SENT = (("content-type", "text/html; charset=utf-8"), ("content-length", "4"))
USUAL = (("GET", "/orders", ()), ("GET", "/items/7", ()), ("POST", "/orders", ()))
UNUSUAL = (
    ("GET", "/stream", ()),
    ("HEAD", "/orders", ()),
    ("GET", "/orders", (("x-request-id", "a-client's-own"),)),
    ("GET", "/orders", (("authorization", "Bearer token"),)),
    ("GET", "/no-such-page", ()),
    ("GET", "/fails", ()),
)
ROUTES = {"/orders": "/orders", "/items/7": "/items/{id}", "/stream": "/stream", "/fails": "/fails"}


def status_of(path: str) -> int:
    if path == "/fails":
        raise ValueError(path)
    return 200 if path in ROUTES else 404


async def asgi_app(scope: Any, receive: Any, send: Any) -> None:
    if scope["method"] == "POST":
        await receive()
    headers = [(name.encode(), value.encode()) for name, value in SENT]
    status = status_of(scope["path"])
    await send({"type": "http.response.start", "status": status, "headers": headers})
    if scope["path"] == "/stream":
        for _ in range(3):
            await send({"type": "http.response.body", "body": b"part", "more_body": True})
    await send({"type": "http.response.body", "body": b"page"})


def wsgi_app(environ: Any, start_response: Any) -> Iterable[bytes]:
    if environ["REQUEST_METHOD"] == "POST":
        environ["wsgi.input"].read(2)
    status = status_of(environ["PATH_INFO"])
    start_response(f"{status} Status", list(SENT))
    return [b"page"] if environ["PATH_INFO"] != "/stream" else iter([b"part"] * 3)


class Server:
    """Asks as a server does: `send` is a method, and all objects are new for each request."""

    def __init__(self) -> None:
        self.asked = self.answered = 0

    async def receive(self) -> dict[str, object]:
        return {"type": "http.request", "body": b"{}", "more_body": False}

    async def send(self, message: dict[str, Any]) -> None:
        self.answered += message["type"] == "http.response.start"

    def asgi(self, app: Any, method: str, path: str, more: Iterable[tuple[str, str]]) -> None:
        body = (("content-length", "2"),) if method == "POST" else ()
        headers = [(n.encode(), v.encode()) for n, v in (*HEADERS, *body, *more)]
        scope = {
            "type": "http",
            "method": method.lower().upper(),
            "path": path.encode().decode(),
            "raw_path": path.encode(),
            "root_path": "",
            "query_string": b"",
            "headers": headers,
            "client": ("198.51.100.4", 40000),
        }
        for _ in app(scope, self.receive, self.send).__await__():
            pass

    def wsgi(self, app: Any, method: str, path: str, more: Iterable[tuple[str, str]]) -> None:
        environ: dict[str, Any] = {
            "REQUEST_METHOD": method.lower().upper(),
            "PATH_INFO": path.encode().decode("latin-1"),
            "SCRIPT_NAME": "",
            "REMOTE_ADDR": "198.51.100.4",
            "wsgi.input": self,
        }
        environ |= {f"HTTP_{n.upper().replace('-', '_')}": v for n, v in (*HEADERS, *more)}
        if method == "POST":
            environ["CONTENT_LENGTH"] = "2"
        body = app(environ, self.start_response)
        for _ in body:
            pass
        if hasattr(body, "close"):
            body.close()

    def read(self, size: int) -> bytes:
        return b"{}"[:size]

    def start_response(self, status: str, headers: Any, exc_info: Any = None) -> Any:
        self.answered += 1
        return [].append


def endpoint(request: Any) -> str | None:
    """The route's template, of a scope or an environ."""
    return ROUTES.get(request.get("path") or request.get("PATH_INFO"))


def requests() -> Iterator[tuple[str, str, Iterable[tuple[str, str]]]]:
    """Mostly the usual ones."""
    for number in range(ROUNDS):
        yield from USUAL
        if number % 20 == 0:
            yield from UNUSUAL


def serve(server: Server, ask: Callable[..., None], app: Any) -> None:
    for request in requests():
        server.asked += 1
        with contextlib.suppress(ValueError):  # the app's own, as its server would see it
            ask(app, *request)


def ops() -> OpsGuard:
    logging = {"format": "json", "file": os.devnull}
    return OpsGuard(service="training", environment="production", logging=logging)


def main() -> None:
    if speed is None:
        raise SystemExit("the module that is to be trained was not taken")
    server = Server()
    serve(server, server.asgi, install_asgi(asgi_app, ops(), endpoint=endpoint))
    serve(server, server.wsgi, install_wsgi(wsgi_app, ops(), endpoint=endpoint))
    if server.answered != server.asked:
        raise SystemExit(f"{server.answered} answers to {server.asked} requests")


if __name__ == "__main__":
    main()
