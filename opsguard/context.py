"""The current request: one context variable with one value.

Set at every open, cleared with ``set(None)`` at the end. Not reset by token: a token belongs to
the context it was made in, and WSGI iterables and ASGI background work may end in another one.
Everything that happens to a request changes the Exchange, never the variable, so copies of the
context (threads, tasks) see the same request.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from opsguard.exchange import Exchange

__all__ = ["Signature", "current", "of_error", "sign"]

current: ContextVar[Exchange | None] = ContextVar("opsguard_exchange", default=None)
"""The exchange being served in this task, thread or greenlet; None outside a request."""

_SIGNATURE = "__opsguard_signature__"


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
