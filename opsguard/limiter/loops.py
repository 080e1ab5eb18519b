"""What belongs to one event loop: made in it at first use, closed before it closes.

A client for asyncio must not be used on another loop than its own, and there may be many: a test
client runs each request on a new one.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Generic, TypeVar
from weakref import WeakKeyDictionary

__all__ = ["PerLoop"]

T = TypeVar("T")


class PerLoop(Generic[T]):
    """One `T` for each running event loop. Thread-safe.

    `make` is called on the loop; `close` ends the thing, on the loop too. A loop that is closed
    without `shutdown_asyncgens()` (all runners call it) leaves its thing to the garbage collector.
    """

    def __init__(self, make: Callable[[], T], close: Callable[[T], Awaitable[None]]) -> None:
        self._make = make
        self._close = close
        self._lock = threading.Lock()
        self._things: WeakKeyDictionary[
            asyncio.AbstractEventLoop, tuple[T, AsyncGenerator[None, None]]
        ] = WeakKeyDictionary()
        self._inherited: list[object] = []

    async def get(self) -> T:
        """That of the running loop. Never suspends."""
        found = self._things.get(asyncio.get_running_loop())
        return found[0] if found is not None else await self._open()

    async def aclose(self) -> None:
        """Close that of the running loop, if there is one; the next `get` makes another."""
        found = self._things.get(asyncio.get_running_loop())
        if found is not None:
            await found[1].aclose()

    def after_fork(self) -> None:
        """In the child: forget all, and close nothing.

        A loop's selector is shared with the parent. To close a connection here would take it out
        of the parent's selector, so the copies stay alive, unused.
        """
        self._inherited.append(self._things)
        self._lock = threading.Lock()
        self._things = WeakKeyDictionary()

    async def _open(self) -> T:
        loop = asyncio.get_running_loop()
        thing = self._make()
        watch = self._watch(loop, thing)
        await anext(watch)  # from now on the loop knows it, and closes it before itself
        with self._lock:
            for other in [other for other in self._things if other.is_closed()]:
                del self._things[other]
            self._things[loop] = (thing, watch)
        return thing

    async def _watch(self, loop: asyncio.AbstractEventLoop, thing: T) -> AsyncGenerator[None, None]:
        try:
            yield
        finally:
            with self._lock:
                self._things.pop(loop, None)
            await self._close(thing)
