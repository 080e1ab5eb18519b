"""The current request: one context variable with one value.

Set at every open. At the end it is None, or the request that this one was served within: what the
open found, unless that was over already, as a server may leave the one before in the context. Not
reset by token: a token belongs to the context it was made in, and WSGI iterables and ASGI
background work may end in another one. Everything that happens to a request changes the Exchange,
never the variable, so copies of the context (threads, tasks) see the same request.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from opsguard.exchange import Exchange

__all__ = ["Signature", "Within", "current", "leave", "of_error", "sign"]

current: ContextVar[Exchange | None] = ContextVar("opsguard_exchange", default=None)
"""The exchange being served in this task, thread or greenlet; None outside a request."""

_SIGNATURE = "__opsguard_signature__"


def leave(exchange: Exchange) -> None:
    """The request is over, or its answer is in the hands of who asked for it: what it was served
    within is current again, if that goes on. May come more than once.
    """
    outer = exchange.outer
    if outer is not None and not outer.goes_on:
        # Forgotten: else each request that began before another's end would keep that alive.
        outer = exchange.outer = None
    current.set(outer)


class Within:
    """The body of a request that is served within another one, made while it is read. Each piece is
    made in that request's context, and who reads it, or closes it, keeps its own.
    """

    __slots__ = ("_exchange", "_parts")

    def __init__(self, exchange: Exchange, parts: Any) -> None:
        self._exchange = exchange
        self._parts = parts

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        token = current.set(self._exchange)
        try:
            part: bytes = next(self._parts)
            return part
        finally:
            current.reset(token)

    def close(self) -> None:
        token = current.set(self._exchange)
        try:
            self._parts.close()
        finally:
            current.reset(token)


class Signature(NamedTuple):
    """What the log lines of a request have in common."""

    request_id: str
    correlation_id: str
    fields: dict[str, object] | None


def sign(error: BaseException, exchange: Exchange) -> None:
    """Leave on `error` which exchange it left: a server logs it when the context is gone already,
    and that line needs the ids too. Not the exchange itself, which holds the error.
    """
    signature = Signature(exchange.request_id, exchange.correlation_id, exchange.fields)
    try:
        setattr(error, _SIGNATURE, signature)
    except Exception:  # an exception may refuse attributes
        return


def of_error(error: object) -> Signature | None:
    """What `error` was signed with, if it was."""
    return getattr(error, _SIGNATURE, None)
