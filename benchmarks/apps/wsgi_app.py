"""The raw WSGI app: the least a framework could cost."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from benchmarks.apps.fortunes import Fortunes

FORTUNES = Fortunes()


def greet() -> tuple[str, bytes]:
    return "application/json", json.dumps({"message": "Hello, World!"}).encode()


def page() -> tuple[str, bytes]:
    return "text/html; charset=utf-8", FORTUNES.page().encode()


ROUTES = {"/json": greet, "/fortunes": page}


def endpoint(environ: Any) -> str | None:
    """The route template of an environ, as opsguard asks for it."""
    path = environ["PATH_INFO"]
    return path if path in ROUTES else None


def app(environ: Any, start_response: Any) -> Iterable[bytes]:
    view = ROUTES.get(environ["PATH_INFO"])
    if view is None:
        start_response("404 Not Found", [("Content-Type", "text/plain")])
        return [b"no such page"]
    kind, body = view()
    start_response("200 OK", [("Content-Type", kind), ("Content-Length", str(len(body)))])
    return [body]
