"""Websockets: ids, their two metrics, one access line each."""

from __future__ import annotations

from asyncio import CancelledError
from collections.abc import Awaitable

from opsguard.context import leave
from opsguard.exceptions import Refused
from opsguard.exchange import Socket
from opsguard.ports import Port
from opsguard_asgi.types import (
    ASGIApp,
    Label,
    Message,
    Receive,
    Scope,
    Send,
    open_exchange,
)

__all__ = ["refuse_websocket", "websocket_of"]

_ACCEPTED, _REFUSED = 101, 403
_DISCONNECTS = frozenset({"WebSocketDisconnect", "ClientDisconnected"})


def websocket_of(
    app: ASGIApp, port: Port[bytes], endpoint: Label | None, label: Label | None
) -> ASGIApp:
    """`app` for websocket scopes. A refusal of ours closes: HTTP 403 before the handshake."""

    async def websocket(scope: Scope, receive: Receive, send: Send) -> None:
        exchange: Socket = open_exchange(port, "WEBSOCKET", scope)
        exchange.opened = closed = False

        def respond(message: Message) -> Awaitable[None]:
            nonlocal closed
            kind = message["type"]
            closed = closed or kind == "websocket.close"
            if kind == "websocket.send":
                exchange.sent += _size_of(message)
                return send(message)
            if exchange.status:
                return send(message)
            if label is not None and exchange.endpoint is None:
                exchange.name_by(label, scope)
            return send(_handshake(exchange, port, message))

        try:
            if endpoint is not None:
                exchange.enter_by(endpoint, scope)
            if exchange.reply is not None and await exchange.atold(endpoint, scope) is not None:
                await refuse_websocket(respond)
            else:
                await app(scope, receive, respond)
        except BaseException as error:
            if isinstance(error, Refused) and not closed:  # by a handler's wrapper
                await refuse_websocket(respond)
                return
            if isinstance(error, CancelledError) or type(error).__name__ in _DISCONNECTS:
                exchange.left = True
            else:
                exchange.fail(error)
            raise
        finally:
            exchange.plan.close_socket(exchange)
            leave(exchange)

    return websocket


def _size_of(message: Message) -> int:
    """Bytes of a message's content; text goes out in UTF-8."""
    data = message.get("bytes")
    text: str = message.get("text") or ""
    return len(text.encode("utf-8", "replace")) if data is None else len(data)


async def refuse_websocket(send: Send) -> None:
    """Close; before the handshake the server answers 403. 1008 is "policy violation", RFC 6455."""
    await send({"type": "websocket.close", "code": 1008})


def _handshake(exchange: Socket, port: Port[bytes], message: Message) -> Message:
    """The first message of the app: it accepts, closes, or answers in HTTP."""
    kind = message["type"]
    if kind == "websocket.accept":
        headers = port.head(exchange, _ACCEPTED, message.get("headers", ()))
        exchange.plan.socket_opened(exchange)
    elif kind == "websocket.http.response.start":
        headers = port.head(exchange, message["status"], message.get("headers", ()))
    else:
        exchange.status = _REFUSED
        return message
    return {**message, "headers": headers}
