"""The edge of an ASGI app: what passes between server and app, told to the exchange.

It never calls `receive` itself and never buffers: messages go on as they come, and what they say
is noted on the way.
"""

from __future__ import annotations

from asyncio import CancelledError
from collections.abc import Awaitable
from contextlib import suppress
from pathlib import Path

from opsguard.accelerator import speed
from opsguard.context import leave
from opsguard.exceptions import Refused
from opsguard.exchange import Exchange, asettled
from opsguard.http import Pending, Response
from opsguard.ports import Port
from opsguard_asgi.lifespan import lifespan_of
from opsguard_asgi.types import (
    KEY,
    SOCKET_PROTOCOL,
    ASGIApp,
    Label,
    Message,
    Receive,
    Scope,
    Send,
    collect,
    open_exchange,
)
from opsguard_asgi.websocket import refuse_websocket, websocket_of
from opsguard_asgi.work import off_loop

__all__ = ["instead_of", "refuse", "send_response", "serve"]

_DISCONNECTS = frozenset({"ClientDisconnect", "ClientDisconnected"})
"""What frameworks raise when the client has left; by name, as none of them is imported here."""


def serve(
    app: ASGIApp,
    port: Port[bytes],
    *,
    endpoint: Label | None = None,
    label: Label | None = None,
) -> ASGIApp:
    """`app` behind an edge.

    `endpoint` names the route before the app runs; `label` names it when the answer starts, if it
    was not entered by then.
    """
    sockets = port.plan.runtime.port(SOCKET_PROTOCOL)
    others = {
        "websocket": websocket_of(app, sockets, endpoint, label),
        "lifespan": lifespan_of(app, port),
    }

    async def http(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or KEY in scope:
            other = app if KEY in scope else others.get(scope["type"], app)
            await other(scope, receive, send)
            return
        try:
            exchange = open_exchange(port, scope["method"], scope)
        except Exception as fault:
            port.plan.failures.report("open", fault)
            await app(scope, receive, send)
            return
        head = port.head

        def respond(message: Message) -> Awaitable[None]:
            kind = message["type"]
            if kind == "http.response.start":
                if exchange.endpoint is None and label is not None:
                    exchange.name_by(label, scope)
                headers = head(exchange, message["status"], message.get("headers", ()))
                return send({**message, "headers": headers})
            if kind == "http.response.body":
                if "body" in message:
                    exchange.sent += len(message["body"])
                if message.get("more_body"):
                    return send(message)
                return _last(exchange, send, message)
            if kind == "http.response.pathsend":
                exchange.sent += _size_of(message)
                return _last(exchange, send, message)
            return send(message)

        try:
            if endpoint is not None:
                exchange.enter_by(endpoint, scope)
            if exchange.work is not None or exchange.reply is not None:
                await instead(exchange, scope, receive, respond)
            else:
                heard = _observed(exchange, receive) if exchange.uploads else receive
                await app(scope, heard, respond)
        except BaseException as error:
            if not await _failed(exchange, error, send, respond):
                raise
        finally:
            if not exchange.closed:
                exchange.close()
            if not alone(send):
                leave(exchange)
            exchange.outer = None  # what a framework keeps of this one keeps no other

    async def instead(exchange: Exchange, scope: Scope, receive: Receive, respond: Send) -> None:
        """Send an answer of ours, unless it turns out that the app is to answer."""
        if exchange.work is not None:
            exchange.reply = await off_loop(exchange.work, exchange)
        reply = await exchange.atold(endpoint, scope)
        if reply is not None:
            await send_response(reply, respond)
            return
        heard = _observed(exchange, receive) if exchange.uploads else receive
        await app(scope, heard, respond)

    if port.door is None:
        http.app = app  # type: ignore[attr-defined]  # as of any middleware, for whoever looks
        return http
    twin: ASGIApp = speed.Edge(
        app=app,
        port=port,
        http=http,
        key=KEY,
        endpoint=endpoint,
        label=label,
        reply=instead,
        failed=_failed,
        observed=_observed,
        collect=collect,
        alone=alone,
    )
    return twin


async def send_response(response: Response, send: Send) -> None:
    """Send an answer of ours."""
    headers = [(n.lower().encode("latin-1"), v.encode("latin-1")) for n, v in response.headers]
    await send({"type": "http.response.start", "status": response.status, "headers": headers})
    await send({"type": "http.response.body", "body": response.body})


async def refuse(response: Response, scope: Scope, send: Send) -> None:
    """Send an answer of ours instead of what the route would do."""
    if scope["type"] == "websocket":
        await refuse_websocket(send)
    else:
        await send_response(response, send)


async def _last(exchange: Exchange, send: Send, message: Message) -> None:
    try:
        await send(message)
    except OSError:
        exchange.left = True
        raise
    finally:
        # Cancelled here is complete too: frameworks that watch for a disconnect cancel the sender
        # as soon as the server has taken the last byte and says so.
        exchange.finish()


def alone(send: Send) -> bool:
    """Whether the server runs each request in a task of its own: the context ends with that, and
    nobody has to clear it. uvicorn does, and is known by what its `send` belongs to.
    """
    module: object = type(getattr(send, "__self__", None)).__module__  # what a class says it is
    return isinstance(module, str) and module.startswith("uvicorn.protocols.http.")


def _size_of(message: Message) -> int:
    """Bytes of the file that the server sends by itself; 0 for what is none, which is for the
    server to say.
    """
    try:
        return Path(message["path"]).stat().st_size
    except (OSError, LookupError, TypeError, ValueError):
        return 0


async def instead_of(
    reply: Response | Pending, handle: ASGIApp, scope: Scope, receive: Receive, send: Send
) -> None:
    """What a route sends instead of going on, unless it turns out that it is to go on."""
    found = await asettled(reply)
    if found is None:
        await handle(scope, receive, send)
    else:
        await refuse(found, scope, send)


async def _failed(exchange: Exchange, error: BaseException, send: Send, respond: Send) -> bool:
    """The app raised: note it, and answer if nothing was sent yet. It goes on to the server, unless
    it is a refusal of ours (True) that a handler's wrapper raised.
    """
    if isinstance(error, Refused) and not exchange.status:
        await send_response(error.response, respond)
        return True
    gone = isinstance(error, CancelledError) or type(error).__name__ in _DISCONNECTS
    if not exchange.ended and (gone or (exchange.status and _is_of(send, error))):
        exchange.left = True
    if gone or exchange.left:  # after the last byte nobody waits for more, and there is none
        return False
    exchange.fail(error)
    if not exchange.status and isinstance(error, Exception):
        with suppress(OSError):  # nobody is there to read it
            await send_response(exchange.plan.failure(exchange, error), respond)
    return False


def _is_of(send: Send, error: BaseException) -> bool:
    """Whether `error` is the server's word for "nobody is there to send to", not the app's own
    OSError: then the server's `send` is among the frames it came through. One that is not written
    in Python has no frames, and is believed.
    """
    if not isinstance(error, OSError):
        return False
    code = getattr(getattr(send, "__func__", send), "__code__", None)
    trace = error.__traceback__
    while trace is not None and code is not None:
        if trace.tb_frame.f_code is code:
            return True
        trace = trace.tb_next
    return code is None


def _observed(exchange: Exchange, receive: Receive) -> Receive:
    """`receive` of a request with a body: bytes without a declared length are counted."""
    counting = not exchange.received

    async def observe() -> Message:
        message = await receive()
        if message["type"] == "http.disconnect":
            exchange.left = not exchange.ended
        elif counting:
            exchange.received += len(message.get("body", b""))
        return message

    return observe
