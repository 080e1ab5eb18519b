"""ASGI in types, and how it reads and writes headers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, MutableMapping
from dataclasses import replace
from operator import itemgetter
from typing import Any

from opsguard.exchange import Exchange, Socket
from opsguard.http import below
from opsguard.ports import Port, Protocol

__all__ = [
    "KEY",
    "PROTOCOL",
    "SOCKET_PROTOCOL",
    "ASGIApp",
    "Label",
    "Message",
    "Receive",
    "Scope",
    "Send",
    "collect",
    "open_exchange",
]

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]
Label = Callable[[Scope], str | None]
"""Gives the route template of a scope, such as ``"/items/{id}"``, or None where there is none."""

KEY = "opsguard.exchange"
"""The scope's key of the exchange: what finds it there is inside an edge already."""


class AsgiExchange(Exchange):
    """An exchange whose `source` is the scope."""

    __slots__ = ()

    def header(self, name: str) -> str:
        return _header(self.source, name)


class AsgiSocket(Socket):
    """A websocket whose `source` is the scope."""

    __slots__ = ()

    def header(self, name: str) -> str:
        return _header(self.source, name)


def _header(scope: Scope | None, name: str) -> str:
    wanted = name.encode("latin-1")
    pairs = () if scope is None else scope["headers"]
    return b", ".join([value for key, value in pairs if key == wanted]).decode("latin-1")


def _name(name: str) -> bytes:
    return name.lower().encode("latin-1")


_name_of = itemgetter(0)


def _names(headers: Iterable[tuple[bytes, bytes]]) -> Iterable[bytes]:
    # ASGI asks for names in lower case; Django's handler and many an app give their own.
    try:
        return list(map(bytes.lower, map(_name_of, headers)))
    except TypeError:
        return [_folded(name) for name, _ in headers]


def _folded(name: bytes | str) -> bytes:
    """Some servers take names in text too, though ASGI asks for bytes."""
    return name.lower() if isinstance(name, bytes) else _name(name)


PROTOCOL: Protocol[bytes] = Protocol(
    exchange=AsgiExchange,
    incoming=_name,
    name=_name,
    value=str.encode,
    fold=_folded,
    names=_names,
)
SOCKET_PROTOCOL: Protocol[bytes] = replace(PROTOCOL, exchange=AsgiSocket)


def open_exchange(port: Port[bytes], method: str, scope: Scope) -> Any:
    """Open the exchange of an http or websocket scope and leave it in the scope."""
    wanted, headers = port.wanted, None
    # Most requests have none of them: one look through all names in C, and no more.
    if not wanted.keys().isdisjoint(map(_name_of, scope["headers"])):
        headers = collect(wanted, scope["headers"])
    path = scope["path"]
    routed = below(path, scope.get("root_path"))
    client = scope.get("client")
    peer = client[0] or None if client else None
    exchange = port.open(method, path, routed, peer, headers, scope)
    # HTTP/2 has no Transfer-Encoding: what names no length there may have a body all the same.
    if not exchange.uploads and method != "GET":
        version = scope.get("http_version")
        exchange.uploads = isinstance(version, str) and version >= "2"
    scope[KEY] = exchange
    return exchange


def collect(wanted: Mapping[bytes, str], pairs: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    """The wanted headers. One that came twice is joined (RFC 9110, section 5.3): no id matches."""
    headers: dict[str, str] = {}
    for key, value in pairs:
        if key in wanted:
            name, text = wanted[key], value.decode("latin-1")
            headers[name] = f"{headers[name]}, {text}" if name in headers else text
    return headers
