"""The store in Redis or Valkey: one script, one round trip, exact for any number of workers.

Connections are the `redis` package's (extra `redis`); the pools are ours, and small, because a
limiter needs three things of them that matter more than features: a hard limit on time, no retry
that nobody asked for, and that a connection whose reply has not been read to its end never serves
again. Whoever gives up (a timeout, a cancelled task, a broken reply) closes its connection.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections import deque
from collections.abc import Generator, Sequence
from itertools import count
from typing import Any, Final, TypeVar

from redis.exceptions import (
    AskError,
    ClusterCrossSlotError,
    MovedError,
    NoScriptError,
    RedisError,
    ResponseError,
)

from opsguard.clock import Clock, elapsed
from opsguard.forks import in_child
from opsguard.limiter.connections import Server
from opsguard.limiter.loops import PerLoop
from opsguard.limiter.script import DIGEST, LONGEST, TAKE
from opsguard.limiter.stores import Charge, StoreDown, Strategy, Verdict

__all__ = ["RedisStore"]

_LETTERS: Final[dict[Strategy, str]] = {
    "fixed": "f",
    "sliding": "s",
    "gcra": "g",
    "concurrency": "c",
}
Command = tuple[str | int, ...]
T = TypeVar("T")


class RedisStore:
    """Quotas in one Redis or Valkey server, 5 or later. Thread-safe and fork-safe.

    `url` is `redis://`, `rediss://` (TLS) or `unix://`, as the `redis` package reads it. `timeout`
    is the most that one decision may take, in seconds, connecting included; only looking up the
    server's name in a synchronous app cannot be cut short. `connections` are kept at most for each
    event loop, and idle at most for the threads. Nothing connects before the first decision, and a
    forked child makes connections of its own.

    The script reads several keys, so all must be on one server. For a single shard of a Redis
    Cluster give a prefix with a hash tag, such as `{opsguard}:`, and the address of that shard.

    The files that the options of a `rediss://` URL name are read here, and again when they change.

    :raises ValueError: for a URL that cannot be read, an option that there is not, or certificates
        that cannot be used.
    """

    blocking = True
    strategies: frozenset[Strategy] = frozenset(_LETTERS)

    def __init__(
        self,
        url: str,
        *,
        timeout: float = 0.025,
        prefix: str = "opsguard:",
        connections: int = 16,
        clock: Clock = elapsed,
    ) -> None:
        self._server = Server(url, timeout=timeout, clock=clock)
        self._timeout = timeout
        self._prefixes = {strategy: f"{prefix}{_LETTERS[strategy]}:" for strategy in _LETTERS}
        self._connections = connections
        self._clock = clock
        self._idle: deque[Any] = deque()
        self._lanes = PerLoop(lambda: _Lane(connections, timeout), _Lane.close)
        self._slots = _Slots()
        in_child(self, RedisStore._after_fork)

    def __repr__(self) -> str:
        return f"<RedisStore at {self._server.place}>"

    def take(self, charges: Sequence[Charge]) -> Verdict:
        """Decide. Blocks for one round trip, at most `timeout`.

        :raises StoreDown: if there was no usable answer in time. What the server took before it
            failed to say so stays taken; a concurrency slot is free again after its period.
        """
        return self._run(self._taking(charges))

    async def atake(self, charges: Sequence[Charge]) -> Verdict:
        """`take` on an event loop. A cancelled call may have been counted."""
        return await self._arun(self._taking(charges))

    def give_back(self, charges: Sequence[Charge]) -> None:
        """Return charges that this process took.

        :raises StoreDown: see `take`.
        """
        self._run(self._giving(charges))

    async def agive_back(self, charges: Sequence[Charge]) -> None:
        await self._arun(self._giving(charges))

    def forget(self, charges: Sequence[Charge]) -> None:
        """Give up the concurrency slots of a request that has ended, without a word to the server,
        which is known to be down. They are free again after their period. No I/O.
        """
        self._slots.release(charges)

    def close(self) -> None:
        """Close the idle connections of the threads; a later decision makes new ones."""
        idle, self._idle = self._idle, deque()
        for connection in idle:
            connection.disconnect()

    async def aclose(self) -> None:
        """Close those of the running event loop, and those of the threads."""
        await self._lanes.aclose()
        self.close()

    # The flows ------------------------------------------------------------------------------------
    # Each yields commands and is sent their replies; an error reply is thrown into it.

    def _taking(self, charges: Sequence[Charge]) -> Generator[Command, Any, Verdict]:
        slots = self._slots.new(charges)
        reply = yield from self._script("take", charges, slots)
        allowed, index, remaining, reset, wait = map(int, reply)
        if not 0 <= index < len(charges):
            raise ValueError(f"no charge has the index {index}")
        if allowed:
            self._slots.hold(charges, slots)
        return Verdict(bool(allowed), max(0, remaining), max(0, reset) / 1e6, wait / 1e6, index)

    def _giving(self, charges: Sequence[Charge]) -> Generator[Command, Any, None]:
        slots = self._slots.release(charges)
        ours = [(c, slot) for c, slot in zip(charges, slots, strict=True) if slot is not None]
        if ours:
            yield from self._script("give", [c for c, _ in ours], [slot for _, slot in ours])

    def _script(
        self, verb: str, charges: Sequence[Charge], slots: Sequence[str]
    ) -> Generator[Command, Any, Any]:
        arguments: list[str | int] = [len(charges)]
        arguments += [self._prefixes[charge.strategy] + charge.key for charge in charges]
        arguments.append(verb)
        for (_, rate, strategy, cost), slot in zip(charges, slots, strict=True):
            period = min(rate.period, LONGEST) * 1_000_000
            burst = rate.burst or rate.amount
            arguments += (_LETTERS[strategy], rate.amount, period, cost, burst, slot)
        try:
            return (yield ("EVALSHA", DIGEST, *arguments))
        except NoScriptError:  # a new or flushed server: teach it, in the same round trip
            return (yield ("EVAL", TAKE, *arguments))

    # Driven by threads ----------------------------------------------------------------------------

    def _run(self, flow: Generator[Command, Any, T]) -> T:
        until = self._clock() + self._timeout
        connection = None
        try:
            connection = self._connection()
            connection.deadline.until = until
            command = next(flow)
            while True:
                connection.send_command(*command)
                try:
                    reply = connection.read_response()
                except ResponseError as error:
                    command = flow.throw(error)
                else:
                    command = flow.send(reply)
        except StopIteration as done:
            self._keep(connection)
            result: T = done.value
            return result
        except BaseException as error:
            if connection is not None:
                connection.disconnect()
            if isinstance(error, Exception):
                raise StoreDown(_reason(error)) from error
            raise

    def _connection(self) -> Any:
        """An idle connection, or a new one; it connects when the first command is sent."""
        try:
            connection = self._idle.pop()
        except IndexError:
            return self._server.connection()
        try:
            unasked = connection.can_read()
        except RedisError:
            unasked = True
        if unasked:  # the server's farewell, mostly: it has closed the connection meanwhile
            connection.disconnect()
        return connection

    def _keep(self, connection: Any) -> None:
        if len(self._idle) < self._connections:
            self._idle.append(connection)
        else:
            connection.disconnect()

    # Driven by an event loop ----------------------------------------------------------------------

    async def _arun(self, flow: Generator[Command, Any, T]) -> T:
        try:
            async with asyncio.timeout(self._timeout):
                return await self._converse(flow)
        except Exception as error:
            raise StoreDown(_reason(error)) from error

    async def _converse(self, flow: Generator[Command, Any, T]) -> T:
        lane = await self._lanes.get()
        async with lane.room:
            connection = lane.idle.pop() if lane.idle else self._server.aconnection()
            try:
                if connection.is_connected and await _unasked(connection):
                    await connection.disconnect(nowait=True)
                command = next(flow)
                while True:
                    await connection.send_command(*command)
                    try:
                        reply = await connection.read_response()
                    except ResponseError as error:
                        command = flow.throw(error)
                    else:
                        command = flow.send(reply)
            except StopIteration as done:
                await lane.keep(connection)
                result: T = done.value
                return result
            except BaseException:
                await connection.disconnect(nowait=True)
                raise

    def _after_fork(self) -> None:
        # Sockets are shared with the parent: what either reads, the other misses. Dropping the
        # copies closes them in the child only.
        self._idle = deque()
        self._lanes.after_fork()
        self._slots = _Slots()


class _Lane:
    """The connections of one event loop."""

    def __init__(self, connections: int, timeout: float) -> None:
        self._timeout = timeout
        self.room = asyncio.Semaphore(connections)
        self.idle: list[Any] = []
        self._closed = False

    async def keep(self, connection: Any) -> None:
        """For the next who asks; once closed, for nobody."""
        self.idle.append(connection)
        if self._closed:
            await self.close()

    async def close(self) -> None:
        """Waits for the last words of TLS, from each for as long as an answer may take."""
        self._closed = True
        while self.idle:
            await _hang_up(self.idle.pop(), self._timeout)


async def _hang_up(connection: Any, within: float) -> None:
    """Close it, at the latest after so many seconds."""
    writer = getattr(connection, "_writer", None)
    try:
        async with asyncio.timeout(within):
            await connection.disconnect()
    except Exception:
        if writer is not None:
            writer.transport.abort()
            await asyncio.sleep(0)  # in the loop's next turn it is closed


class _Slots:
    """Which concurrency slots this process holds, so that it returns its own and no others.

    Were a slot returned that a dead worker left behind, the worker's slot would seem to live on
    for as long as there is traffic. A slot is as wide as what one request costs in that bucket, and
    only a request of the same cost may return it: the script returns so many of its members.
    Thread-safe.
    """

    def __init__(self) -> None:
        self._process = os.urandom(8).hex()
        self._numbers = count()
        self._held: dict[tuple[str, int], list[str]] = {}
        self._lock = threading.Lock()

    def new(self, charges: Sequence[Charge]) -> list[str]:
        """For each charge a slot of its bucket; empty for those that need none."""
        slots = {key: f"{self._process}:{next(self._numbers)}" for key in _widths(charges)}
        return [slots.get(charge.key, "") for charge in charges]

    def hold(self, charges: Sequence[Charge], slots: Sequence[str]) -> None:
        named = {charge.key: slot for charge, slot in zip(charges, slots, strict=True)}
        with self._lock:
            for key, width in _widths(charges).items():
                self._held.setdefault((key, width), []).append(named[key])

    def release(self, charges: Sequence[Charge]) -> list[str | None]:
        """For each charge the oldest slot of its bucket that is as wide; None if there is none
        (it was taken elsewhere), and empty for those that need none.
        """
        with self._lock:
            slots = {key: self._oldest(key, width) for key, width in _widths(charges).items()}
        return [slots.get(charge.key, "") for charge in charges]

    def _oldest(self, key: str, width: int) -> str | None:
        held = self._held.get((key, width))
        if not held:
            return None
        slot = held.pop(0)
        if not held:
            del self._held[key, width]
        return slot


def _widths(charges: Sequence[Charge]) -> dict[str, int]:
    """What a request takes of each bucket of concurrency, of which it may name one twice."""
    widths: dict[str, int] = {}
    for charge in charges:
        if charge.strategy == "concurrency":
            widths[charge.key] = widths.get(charge.key, 0) + charge.cost
    return widths


async def _unasked(connection: Any) -> bool:
    """Whether there is something to read though nothing was asked: the server's farewell, mostly.

    Before release 8 of the `redis` package the question had another name.
    """
    ask = getattr(connection, "can_read", None) or connection.can_read_destructive
    try:
        return bool(await ask())
    except RedisError:
        return True


def _reason(error: BaseException) -> str:
    if isinstance(error, (MovedError, AskError, ClusterCrossSlotError)):
        return (
            f"{type(error).__name__}: {error}: this server is a node of a cluster, where the keys "
            "of a decision are on several servers: set limiter.store to a redis+cluster:// URL"
        )
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
