"""Websockets: ids, their two metrics, one access line each."""

from __future__ import annotations

from collections.abc import Awaitable

from opsguard.context import current
from opsguard.exchange import Exchange
from opsguard.plan import Port
from opsguard_asgi.types import (
    ASGIApp,
    Label,
    Message,
    Pair,
    Receive,
    Scope,
    Send,
    add_headers,
    open_exchange,
)

__all__ = ["refuse_websocket", "websocket_of"]

_ACCEPTED, _REFUSED = 101, 403
_DISCONNECTS = frozenset({"WebSocketDisconnect", "ClientDisconnected"})


def websocket_of(
    app: ASGIApp, port: Port[Pair], endpoint: Label | None, label: Label | None
) -> ASGIApp:
    """`app` for websocket scopes. A refusal of ours closes before the handshake: HTTP 403."""
    named = endpoint or label

    async def websocket(scope: Scope, receive: Receive, send: Send) -> None:
        exchange = open_exchange(port, "WEBSOCKET", scope)
        exchange.websocket = True
        exchange.work = None

        def respond(message: Message) -> Awaitable[None]:
            kind = message["type"]
            if kind == "websocket.send":
                exchange.sent += len(message.get("bytes") or message.get("text") or b"")
                return send(message)
            if exchange.status:
                return send(message)
            if named is not None and exchange.endpoint is None:
                exchange.name_by(named, scope)
            return send(_handshake(exchange, port, message))

        error = None
        try:
            if endpoint is not None:
                exchange.enter_by(endpoint, scope)
            if exchange.reply is not None:
                await refuse_websocket(respond)
            else:
                await app(scope, receive, respond)
        except BaseException as raised:
            error = None if type(raised).__name__ in _DISCONNECTS else raised
            raise
        finally:
            exchange.plan.close_socket(exchange, error)
            current.set(None)

    return websocket


async def refuse_websocket(send: Send) -> None:
    """Close before the handshake: the server answers 403. 1008 is "policy violation", RFC 6455."""
    await send({"type": "websocket.close", "code": 1008})


def _handshake(exchange: Exchange, port: Port[Pair], message: Message) -> Message:
    """The first message of the app: it accepts, closes, or answers in HTTP."""
    kind = message["type"]
    if kind == "websocket.accept":
        ours = port.head(exchange, _ACCEPTED)
        exchange.plan.socket_opened(exchange)
    elif kind == "websocket.http.response.start":
        ours = port.head(exchange, message["status"])
    else:
        exchange.status = _REFUSED
        return message
    return {**message, "headers": add_headers(message.get("headers", ()), ours, port.own_headers)}
