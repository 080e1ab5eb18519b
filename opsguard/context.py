"""The current request: one context variable with one value.

Set at every open, cleared with ``set(None)`` at the end. Not reset by token: a token belongs to
the context it was made in, and WSGI iterables and ASGI background work may end in another one.
Everything that happens to a request changes the Exchange, never the variable, so copies of the
context (threads, tasks) see the same request.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opsguard.guard import Exchange

__all__ = ["current"]

current: ContextVar[Exchange | None] = ContextVar("opsguard_exchange", default=None)
"""The exchange being served in this task, thread or greenlet; None outside a request."""
