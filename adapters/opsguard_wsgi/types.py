"""WSGI in types, and how it reads and writes headers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from opsguard.exchange import Exchange
from opsguard.ports import Port, Protocol

if TYPE_CHECKING:
    from wsgiref.types import StartResponse
    from wsgiref.types import WSGIApplication as WSGIApp
    from wsgiref.types import WSGIEnvironment as Environ
else:
    Environ = dict[str, Any]
    StartResponse = WSGIApp = Callable[..., Any]

__all__ = [
    "KEY",
    "PROTOCOL",
    "ROOT",
    "Body",
    "Environ",
    "Label",
    "Pair",
    "StartResponse",
    "WSGIApp",
    "open_exchange",
    "text",
]

Body = Iterable[bytes]
Label = Callable[[Environ], str | None]
"""Gives the route template of an environ, such as ``"/items/{id}"``, or None."""
Pair = tuple[str, str]

KEY = "opsguard.exchange"
"""The environ's key of the exchange: what finds it there is inside an edge already."""
ROOT = "opsguard.root"
"""The environ's key of SCRIPT_NAME as it was at the edge: what was added since are mounts."""


class WsgiExchange(Exchange):
    """An exchange whose `source` is the environ."""

    __slots__ = ()

    def header(self, name: str) -> str:
        return "" if self.source is None else str(self.source.get(_key(name), ""))


def _key(name: str) -> str:
    key = name.upper().replace("-", "_")
    return key if key in ("CONTENT_LENGTH", "CONTENT_TYPE") else f"HTTP_{key}"


def _names(headers: Iterable[Pair]) -> Iterable[str]:
    return [name.lower() for name, _ in headers]


PROTOCOL: Protocol[str] = Protocol(
    exchange=WsgiExchange, incoming=_key, name=str, value=str, fold=str.lower, names=_names
)


def open_exchange(port: Port[str], environ: Environ) -> Exchange:
    """Open the exchange of a request and leave it in the environ."""
    routed = text(environ.get("PATH_INFO") or "")
    root = environ.get("SCRIPT_NAME") or ""
    exchange: Exchange = port.open(
        environ["REQUEST_METHOD"],
        text(root) + routed if root else routed,
        routed,
        environ.get("REMOTE_ADDR") or None,
        port.gather(environ),
        environ,
    )
    environ[KEY] = exchange
    environ[ROOT] = root
    return exchange


def text(path: str) -> str:
    """A path of the environ, bytes in latin-1's clothes (PEP 3333), as the text it stands for."""
    return path if path.isascii() else path.encode("latin-1", "replace").decode("utf-8", "replace")
