"""Lifespan: the app's own; we only listen for start and stop."""

from __future__ import annotations

from opsguard.ports import Port
from opsguard_asgi.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["lifespan_of"]


def lifespan_of(app: ASGIApp, port: Port[bytes]) -> ASGIApp:
    """`app` for the lifespan scope; one that does not know it raises as it would without us."""
    runtime = port.plan.runtime

    async def lifespan(scope: Scope, receive: Receive, send: Send) -> None:
        async def listen() -> Message:
            message = await receive()
            if message["type"] == "lifespan.startup":
                runtime.start()
            elif message["type"] == "lifespan.shutdown":
                runtime.stop()
            return message

        await app(scope, listen, send)

    return lifespan
