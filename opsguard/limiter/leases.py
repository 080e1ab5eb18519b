"""Leases: a worker takes tokens from the store ahead of time and decides by itself while they last.

Exactness is traded for speed: most requests do no I/O at all. The tokens are taken in the
background. Only in threads, where a lease lasts but a moment, the request that finds it used up
brings the next one along: whoever waits for the GIL in the background would come too late.

What it costs, for K workers with leases of N: in any interval they admit at most what the strategy
admits in it, plus the tokens that they held when it began, K·N. For the fixed window it is nothing:
its tokens end with their window. Tokens are counted in the store when they are taken, so a worker
that dies, or leaves some unused, makes the limit stricter until they would have come back, never
looser. To keep that small, leases start small, grow while they are used up, and shrink when they
are not; and a bucket with less than `workers`·N left is decided exactly, by the store.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from functools import partial
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Final, Protocol

from opsguard.accelerator import limits
from opsguard.clock import Clock
from opsguard.forks import in_child
from opsguard.limiter.algorithms import Outcome
from opsguard.limiter.stores import Charge, OnStoreError, Strategy, Verdict

__all__ = ["LeaseStore", "Reserving"]

_FIRST: Final = 4
"""Tokens of a bucket's first lease."""
_WARM: Final = 2
"""Exact decisions about a bucket before it is leased: most clients come once."""
_LOW: Final = 8
"""A lease is renewed when this part of it is left."""
_LOST: Final = 5.0
"""Seconds after which nobody comes back who went for tokens: his loop is gone, say."""
_MOMENT: Final = 0.05
"""Seconds, ten times as long as a thread holds the GIL while others wait for it."""
_IDLE: Final = 5.0
"""Seconds without work after which the thread ends."""


class Reserving(Protocol):
    """What leases need of a store; :class:`opsguard.limiter.fallback.FallbackStore` has it."""

    @property
    def strategies(self) -> frozenset[Strategy]: ...
    @property
    def down(self) -> bool: ...
    def take(self, charges: Sequence[Charge], on_error: OnStoreError = "local") -> Verdict: ...
    async def atake(
        self, charges: Sequence[Charge], on_error: OnStoreError = "local"
    ) -> Verdict: ...
    def take_with(
        self, charge: Charge, more: int, on_error: OnStoreError = "local"
    ) -> tuple[Verdict, int]: ...
    def reserve(self, charges: Sequence[Charge]) -> Verdict | None: ...
    async def areserve(self, charges: Sequence[Charge]) -> Verdict | None: ...
    def give_back(self, charges: Sequence[Charge]) -> None: ...
    async def agive_back(self, charges: Sequence[Charge]) -> None: ...
    def close(self) -> None: ...
    async def aclose(self) -> None: ...


if TYPE_CHECKING or limits is None:

    class _Tokens:
        """Where the tokens are; the accelerator has a type like this."""

        __slots__ = ("brief", "due_at", "remaining", "reset_at", "size", "tokens", "until")

        brief: bool
        due_at: float
        remaining: int
        reset_at: float
        size: int
        tokens: int
        until: float

else:
    _Tokens = limits.Lease


class _Lease(_Tokens):
    """The tokens of one bucket, and what is known of the bucket itself.

    In C a request takes a token without the store's lock, if nobody holds it: see `_limits.c`. So
    whoever changes more than one field holds it.
    """

    __slots__ = ("asked_until", "decided", "ordered", "renewed_at")

    def __init__(self) -> None:
        self.tokens = 0
        self.until = 0.0
        """When the tokens expire."""
        self.size = _FIRST
        self.decided = 0
        """Exact decisions so far, as long as they matter."""
        self.due_at = float("-inf")
        """From when on more tokens may be asked for in the background: not while somebody does, but
        for one who never comes back."""
        self.renewed_at = float("-inf")
        self.brief = False
        """The last tokens lasted but a moment, in threads: see above."""
        self.asked_until = float("-inf")
        """Somebody is asking for more, until then at the latest."""
        self.ordered = 0
        """So many."""
        self.remaining = 0
        self.reset_at = 0.0


class LeaseStore:
    """`store` with leases of up to `lease` tokens. Same verbs; nothing here raises either.

    `workers` is how many share the store; it decides when a bucket is too low to be leased.
    `clock` is monotonic. `keys` bounds the leases held; the oldest goes first. Concurrency is never
    leased. Thread-safe; a forked child starts without tokens, which stay the parent's.

    `background` runs a job off the request; by default a daemon thread, started at first use and
    ended when idle. On an event loop it is a task of that loop.
    """

    blocking = True

    def __init__(
        self,
        store: Reserving,
        *,
        lease: int,
        workers: int,
        clock: Clock,
        keys: int = 10_000,
        background: Callable[[Callable[[], None]], None] | None = None,
    ) -> None:
        self.strategies = store.strategies
        self._store = store
        self._lease = lease
        self._low = workers * lease
        self.clock = clock
        self._keys = keys
        self._worker = _Worker()
        self._background = background or self._submit
        self._tasks: set[asyncio.Task[None]] = set()
        self.leases: dict[str, _Lease] = {}
        """By the bucket's key; for the accelerator, as `lock`."""
        self.lock = threading.Lock()
        in_child(self, LeaseStore._after_fork)

    def at_hand(self, key: str, cost: int) -> Outcome | None:
        """Take from the tokens of one bucket. CPU only, also in an event loop. None, and nothing is
        taken: there are too few, or it is time to renew them, which is for `take` and its twin.
        """
        now = self.clock()
        with self.lock:
            lease = self.leases.get(key)
            if lease is None or lease.until <= now:
                return None
            tokens = lease.tokens - cost
            low = not lease.brief and tokens * _LOW <= lease.size and now >= lease.due_at
            if tokens < 0 or low:
                return None
            lease.tokens = tokens
            return True, None, lease.remaining + tokens, max(lease.reset_at - now, 0.0), 0.0

    def take(self, charges: Sequence[Charge], on_error: OnStoreError = "local") -> Verdict:
        """Decide: by tokens, without I/O, if there are enough, else exactly."""
        verdict, wanting = self._spend(charges)
        if verdict is None:
            verdict = self._take_with_more(charges, on_error)
        if verdict is None:
            verdict = self._store.take(charges, on_error)
            wanting = self._learn(charges, verdict)
        for charge in wanting:
            self._background(partial(self._renew, charge))
        return verdict

    async def atake(self, charges: Sequence[Charge], on_error: OnStoreError = "local") -> Verdict:
        verdict, wanting = self._spend(charges)
        if verdict is None:
            verdict = await self._store.atake(charges, on_error)
            wanting = self._learn(charges, verdict)
        for charge in wanting:
            task = asyncio.create_task(self._arenew(charge))
            self._tasks.add(task)  # a loop holds its tasks weakly
            task.add_done_callback(self._tasks.discard)
        return verdict

    def give_back(self, charges: Sequence[Charge]) -> None:
        """Return charges: to the tokens while there is a lease, else to the store."""
        if rest := self._keep(charges):
            self._store.give_back(rest)

    async def agive_back(self, charges: Sequence[Charge]) -> None:
        if rest := self._keep(charges):
            await self._store.agive_back(rest)

    def close(self) -> None:
        """Close the store's connections. Tokens that are left stay counted in it."""
        self._store.close()

    async def aclose(self) -> None:
        await self._store.aclose()

    # Deciding -------------------------------------------------------------------------------------

    def _spend(self, charges: Sequence[Charge]) -> tuple[Verdict | None, Sequence[Charge]]:
        """The verdict, if tokens suffice for all charges, and whose tokens are running low."""
        now = self.clock()
        tightest, left, reset_at = 0, -1, 0.0
        wanting: tuple[Charge, ...] = ()
        leases = self.leases
        with self.lock:
            for index, charge in enumerate(charges):
                lease = leases.get(charge.key)
                if lease is None or lease.tokens < charge.cost or lease.until <= now:
                    for spent in charges[:index]:
                        leases[spent.key].tokens += spent.cost
                    return None, ()
                lease.tokens -= charge.cost
                remaining = lease.remaining + lease.tokens
                if left < 0 or remaining < left:
                    tightest, left, reset_at = index, remaining, lease.reset_at
            for charge in charges:
                lease = leases[charge.key]
                background = now >= lease.due_at and (len(charges) > 1 or not lease.brief)
                if background and lease.tokens * _LOW <= lease.size:
                    lease.due_at = now + _LOST
                    wanting = (*wanting, charge)
        reset = reset_at - now
        return Verdict(True, left, reset if reset > 0.0 else 0.0, 0.0, tightest), wanting

    def _take_with_more(self, charges: Sequence[Charge], on_error: OnStoreError) -> Verdict | None:
        """Decide about a bucket whose lease is used up, and renew it by the same call; None for any
        other.
        """
        charge = charges[0]
        with self.lock:
            lease = self.leases.get(charge.key)
            if len(charges) > 1 or lease is None or lease.until <= self.clock():
                return None
            if lease.remaining < self._low + self._lease or lease.decided < _WARM:
                return None
        order, asked_at = self._order(charge), self.clock()
        if order is None:
            return None
        came: Verdict | None = None
        try:
            verdict, more = self._store.take_with(charge, order.cost, on_error)
            came = verdict if more else None
        finally:
            self._renewed(order, came, asked_at, threads=True)
        return verdict._replace(remaining=verdict.remaining + more)

    def _learn(self, charges: Sequence[Charge], verdict: Verdict) -> Sequence[Charge]:
        """Which buckets to lease, after an exact decision about them."""
        # The verdict tells of the tightest bucket; the others have at least as much left.
        if not verdict.allowed or verdict.remaining < self._low or self._store.down:
            return ()
        wanting, now = [], self.clock()
        with self.lock:
            for charge in charges:
                if charge.strategy == "concurrency":
                    continue
                lease = self.leases.get(charge.key)
                if lease is None:
                    if len(self.leases) >= self._keys:
                        del self.leases[next(iter(self.leases))]
                    lease = self.leases[charge.key] = _Lease()
                lease.decided += 1
                if now >= lease.due_at and lease.decided >= _WARM:
                    lease.due_at = now + _LOST
                    wanting.append(charge)
        return wanting

    def _keep(self, charges: Sequence[Charge]) -> list[Charge]:
        """Add to the tokens what fits there; the rest is the store's."""
        now = self.clock()
        rest = []
        with self.lock:
            for charge in charges:
                lease = self.leases.get(charge.key)
                if (
                    lease is not None
                    and lease.until > now
                    and lease.tokens + lease.ordered + charge.cost <= self._lease
                ):
                    lease.tokens += charge.cost
                else:
                    rest.append(charge)
        return rest

    def _submit(self, job: Callable[[], None]) -> None:
        self._worker.submit(job)

    # Renewing -------------------------------------------------------------------------------------

    def _renew(self, charge: Charge) -> None:
        order, asked_at = self._order(charge), self.clock()
        if order is not None:
            verdict = self._store.reserve((order,))
            self._renewed(order, verdict, asked_at, threads=True)

    async def _arenew(self, charge: Charge) -> None:
        order, asked_at = self._order(charge), self.clock()
        if order is None:
            return
        verdict = None
        try:
            verdict = await self._store.areserve((order,))
        finally:  # a task may be cancelled, with its loop; another may try then
            self._renewed(order, verdict, asked_at, threads=False)

    def _order(self, charge: Charge) -> Charge | None:
        """What to take so that the lease is whole; None if somebody else has seen to it. Who
        gets an order is the one who asks, until it is `_renewed`.
        """
        now = self.clock()
        with self.lock:
            lease = self.leases.get(charge.key)
            if lease is None or now < lease.asked_until:
                return None
            lease.due_at = float("-inf")
            if lease.until <= now:
                # Expired: with more than half unused it was too much.
                if lease.tokens * 2 > lease.size:
                    lease.size = max(1, lease.size // 2)
                lease.tokens = 0
            elif lease.tokens * _LOW > lease.size and lease.tokens >= charge.cost:
                return None
            else:
                lease.size = min(self._lease, lease.size * 2)
            lease.size = min(self._lease, lease.size)
            missing = lease.size - lease.tokens
            if missing <= 0:
                return None
            lease.ordered, lease.asked_until = missing, now + _LOST
            return charge._replace(cost=missing)

    def _renewed(
        self,
        order: Charge,
        verdict: Verdict | None,
        asked_at: float,
        *,
        threads: bool,
    ) -> None:
        with self.lock:
            lease = self.leases.get(order.key)
            if lease is None:
                return  # dropped meanwhile: the tokens are lost, which errs on the strict side
            if verdict is None or not verdict.allowed or verdict.remaining < self._low:
                lease.decided = 0
            if verdict is not None and verdict.allowed:
                until = asked_at + min(verdict.reset, order.rate.period)
                if order.strategy == "fixed" and until > lease.until + order.rate.period / 2:
                    lease.tokens = 0  # those of the window before
                lease.tokens = min(lease.tokens + order.cost, self._lease)
                lease.until = until
                lease.remaining = verdict.remaining
                lease.reset_at = asked_at + verdict.reset
            lease.brief = threads and asked_at - lease.renewed_at < _MOMENT
            lease.due_at = lease.asked_until = float("-inf")
            lease.ordered, lease.renewed_at = 0, asked_at

    def _after_fork(self) -> None:
        # Both stay the same objects: the accelerator has them. A thread that the child does not
        # have may hold the lock, or be about to.
        self.leases.clear()
        self.lock._at_fork_reinit()  # type: ignore[attr-defined]
        self._worker = _Worker()


class _Worker:
    """A thread for jobs, started by the first one, ended when there has been none for a while."""

    def __init__(self) -> None:
        self._jobs: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._lock = threading.Lock()
        self._running = False

    def submit(self, job: Callable[[], None]) -> None:
        """Have `job` done soon. Never waits, never raises."""
        with self._lock:
            self._jobs.put(job)
            if self._running:
                return
            self._running = True
        try:
            threading.Thread(target=self._work, name="opsguard-leases", daemon=True).start()
        except RuntimeError:  # the interpreter is ending, or there are too many threads
            self._running = False

    def _work(self) -> None:
        while True:
            try:
                job = self._jobs.get(timeout=_IDLE)
            except Empty:
                with self._lock:
                    if self._jobs.empty():
                        self._running = False
                        return
            else:
                job()
