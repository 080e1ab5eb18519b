"""What the contract's apps have in common: plain answers by method and path, and what they saw."""

from __future__ import annotations

import tempfile
import threading
from pathlib import Path
from typing import Any

from opsguard import Exchange, OpsGuard, Response
from opsguard.context import current

FILE = Path(tempfile.gettempdir()) / "opsguard-contract-file.txt"
CALLED_BY_REFUSED = "the handler of /refused ran"


class Boom(Exception):
    """What the apps raise."""


class Ended(BaseException):
    """What a server raises in a request that takes too long, as gevent does."""


class NoOps:
    """Stands for the OpsGuard of the bare app."""

    def bind(self, **fields: object) -> None:
        return None


class Shop:
    """The state of one app under test."""

    def __init__(self, ops: OpsGuard | None) -> None:
        self.ops: Any = ops or NoOps()
        self.calls: list[str] = []
        self.after_done = threading.Event()
        self.after_ids: list[str] = []
        self.within: Any = None
        """What the handler of /within does; under ASGI it is awaited."""
        if not FILE.exists() or FILE.read_bytes() != b"file" * 1000:
            FILE.write_bytes(b"file" * 1000)

    def ids(self) -> str:
        """Request id and correlation id as the handler knows them."""
        exchange = current.get()
        return "-" if exchange is None else f"{exchange.request_id} {exchange.correlation_id}"

    def after(self) -> None:
        """The background work."""
        self.after_ids.append(self.ids())
        self.ops.bind(job="after")
        self.after_done.set()

    def handle(self, method: str, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of a plain answer."""
        text = {"Content-Type": "text/plain"}
        if path == "/items" and method == "POST":
            return 201, text, b"made %d" % len(body)
        if path == "/upload" and method == "POST":
            return 200, text, b"%d" % len(body)
        if path.startswith("/refused"):
            self.calls.append(CALLED_BY_REFUSED)
            return 200, text, b"ran"
        if method not in ("GET", "HEAD"):
            return 405, text, b"no"
        if path == "/boom":
            raise Boom("boom")
        if path == "/ids":
            return 200, text, self.ids().encode()
        if path == "/bound":
            self.ops.bind(tenant_id="t-1")
            return 200, text, b"bound"
        return self.plain(path, text)

    def plain(self, path: str, text: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
        parts = path.split("/")
        if path.startswith("/items/"):
            return 200, text, f"item {parts[2]}".encode()
        if path.startswith("/api/v1/users/"):
            return 200, text, f"user {parts[4]}".encode()
        if path.startswith("/tenants/") and len(parts) == 5:
            return 200, text, f"{parts[2]} {parts[4]}".encode()
        known = {
            "/plain": (200, text, b"hello"),
            "/empty": (204, {}, b""),
            "/moved": (302, {"Location": "/plain", **text}, b""),
            "/bad": (400, text, b"bad"),
            "/broken": (500, text, b"broken"),
            "/decorated": (200, text, b"wrapped"),
            "/method": (200, text, b"method"),
            "/class": (200, text, b"class"),
            "/own-id": (200, {"X-Request-ID": "mine", **text}, b"own"),
            "/handled": (409, text, b"handled"),
            "/health": (200, text, b"ok"),
        }
        return known.get(path, (404, text, b"not here"))


NO = Response(418, (("Content-Type", "text/plain"), ("Content-Length", "2")), b"no")


def declare(ops: OpsGuard) -> None:
    """The two refusals of the contract, and a check that a server puts an end to."""

    def refuse_at_edge(exchange: Exchange) -> Response | None:
        if exchange.path == "/edge-ended":
            raise Ended
        return NO if exchange.path.endswith("/edge-refused") else None

    def refuse_at_route(exchange: Exchange) -> Response | None:
        return NO if exchange.endpoint == "/refused/{id}" else None

    ops.at_edge(refuse_at_edge)
    ops.at_route(refuse_at_route)
