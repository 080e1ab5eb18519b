"""Type-checked, never run: installing on a raw WSGI app."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, assert_type
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from opsguard import OpsGuard
from opsguard_wsgi import Guarded, install

ops = OpsGuard(service="checkout")


def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    start_response("200 OK", [])
    return [b""]


def endpoint(environ: dict[str, Any]) -> str | None:
    return "/items/{item_id}" if environ["PATH_INFO"].startswith("/items/") else None


guarded = assert_type(install(app, ops, endpoint=endpoint), Guarded)
served: WSGIApplication = guarded
install(app)  # type: ignore[call-arg]
install(app, ops, endpoint=lambda environ: 3)  # type: ignore[arg-type,return-value]
