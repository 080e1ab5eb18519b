"""ASGI in types, and how it reads and writes headers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

from opsguard.exchange import Exchange
from opsguard.plan import Port, Protocol

__all__ = [
    "KEY",
    "PROTOCOL",
    "ASGIApp",
    "Label",
    "Message",
    "Pair",
    "Receive",
    "Scope",
    "Send",
    "add_headers",
    "open_exchange",
]

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]
Label = Callable[[Scope], str | None]
"""Gives the route template of a scope, such as ``"/items/{id}"``, or None where there is none."""
Pair = tuple[bytes, bytes]

KEY = "opsguard.exchange"
"""The scope's key of the exchange: what finds it there is inside an edge already."""


class AsgiExchange(Exchange):
    """An exchange whose `source` is the scope."""

    __slots__ = ()

    def header(self, name: str) -> str:
        if self.source is None:
            return ""
        encoded = name.encode("latin-1")
        return b", ".join([v for k, v in self.source["headers"] if k == encoded]).decode("latin-1")


def _name(name: str) -> bytes:
    return name.lower().encode("latin-1")


def _header(name: str) -> Callable[[str], Pair]:
    encoded = _name(name)
    return lambda value: (encoded, value.encode("latin-1"))


PROTOCOL: Protocol[Pair] = Protocol(
    exchange=AsgiExchange, incoming=_name, outgoing=_name, header=_header
)


def open_exchange(port: Port[Pair], method: str, scope: Scope) -> Exchange:
    """Open the exchange of an http or websocket scope and leave it in the scope."""
    wanted = port.wanted
    headers = None
    for name, value in scope["headers"]:
        if name in wanted:
            headers = _collect(headers, wanted[name], value)
    path = routed = scope["path"]
    root = scope.get("root_path")
    if root and path.startswith(root):
        routed = path[len(root) :]
    client = scope.get("client")
    exchange = port.open(method, path, routed, client[0] if client else None, headers, scope)
    scope[KEY] = exchange
    return exchange


def _collect(headers: dict[str, str] | None, name: str, value: bytes) -> dict[str, str]:
    """A header that came twice is joined as RFC 9110, section 5.3 has it, so no id can match."""
    text = value.decode("latin-1")
    if headers is None:
        return {name: text}
    headers[name] = f"{headers[name]}, {text}" if name in headers else text
    return headers


def add_headers(
    headers: Iterable[Pair], ours: list[Pair], names: frozenset[str | bytes]
) -> list[Pair]:
    """The app's headers with ours behind them; one that the app sets itself is left to it.

    A new list: the app may keep its own for the next answer.
    """
    theirs = list(headers)
    for name, _ in theirs:
        if name in names:
            ours = [pair for pair in ours if pair[0] != name]
    return theirs + ours
