"""Whose API key a request came with, as a dependency::

    @app.get("/forecast")
    async def forecast(who: KeyIdentity) -> dict: ...           # 401 without a key
    async def weather(who: OptionalKeyIdentity) -> dict: ...    # None without one

A route that has one of them switches keys on when the app starts; without a pepper outside
development that is an error at start. Dependencies run after the body was read. `@ops.require_key`
refuses before, tells tiers and scopes, and shows in the description of the API; these are for the
handler that wants to know who calls.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from fastapi import Depends

from opsguard.context import current

if TYPE_CHECKING:
    from opsguard.keys import Identity

__all__ = ["KeyIdentity", "OptionalKeyIdentity", "identity", "require_identity"]


async def identity() -> Any:
    """The identity of the request's key, or None."""
    exchange = current.get()
    return None if exchange is None else exchange.identity


async def require_identity() -> Any:
    """The identity of the request's key. Without one the request is answered 401, as
    `@ops.require_key` does; outside a guarded app it is a RuntimeError.
    """
    exchange = current.get()
    if exchange is None:
        raise RuntimeError("no request is served here: was opsguard installed on this app?")
    return exchange.plan.identified(exchange)


if TYPE_CHECKING:
    KeyIdentity = Annotated[Identity, Depends(require_identity)]
    OptionalKeyIdentity = Annotated[Identity | None, Depends(identity)]
else:
    # FastAPI asks for the type at run time and makes nothing of it.
    KeyIdentity = Annotated[Any, Depends(require_identity)]
    OptionalKeyIdentity = Annotated[Any, Depends(identity)]
