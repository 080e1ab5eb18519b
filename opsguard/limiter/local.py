"""Quotas in the memory of one process.

Buckets live in a table for each rate, in two dictionaries: those touched in this window, and those
last touched in the window before. When a window ends the older dictionary goes, and with it
every bucket that has expired: no timers, no threads, no search. A large one goes in small pieces,
some with each new bucket, so that no request pays for a hundred thousand others.

**When the store is full**, a new bucket takes the place of another of which less than half of the
quota is used, the least used of a few that are looked at. One that has used half or more is never
put out, so a flood of new keys cannot wipe out the record of somebody who is being refused. Who is
put out starts afresh when he comes again. If there is nobody to put out, new keys share 1,024
buckets by their hash: still limited, together. Both are told to `on_full`.

Windows are those of the table, not of the key: everybody's starts at the same moment.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from threading import Lock
from typing import TYPE_CHECKING, Any, Final

from opsguard.accelerator import limits
from opsguard.clock import Clock, elapsed
from opsguard.forks import in_each_child
from opsguard.limiter.algorithms import ALGORITHMS, Outcome
from opsguard.limiter.rates import OnStoreError, Rate, Strategy
from opsguard.limiter.stores import Charge, Verdict

__all__ = ["MAX_KEYS", "LocalStore", "Table", "Take"]

MAX_KEYS: Final = 100_000

_SHARED = 1024  # buckets of a table for the keys that find no room
_LOOKED_AT = 8  # buckets, to find one to put out
_PIECE = 16  # buckets of an old window that go with each new one
_SMALL = 512  # buckets of an old window that may go at once

Take = Callable[[str, int], Outcome]
"""(key, cost) to the outcome, of which the state is the store's own business."""


class LocalStore:
    """A store for one process, exact under threads, with at most `max_keys` buckets (and the
    shared ones, see above).

    One lock around all tables: a decision holds it for less than a microsecond and does nothing
    under it that waits, so threads and event loops may share it. A fork waits for a decision in
    progress; the child goes on with a copy of the counts, the lock being free in it. `clock` is
    monotonic; one that is set back prolongs a window by at most another.
    """

    blocking = False
    strategies: frozenset[Strategy] = frozenset(ALGORITHMS)

    def __init__(
        self,
        *,
        max_keys: int = MAX_KEYS,
        clock: Clock = elapsed,
        on_full: Callable[[], None] | None = None,
    ) -> None:
        if max_keys < 1:
            raise ValueError(f"max_keys must be at least 1, not {max_keys}")
        self.clock = clock
        self.lock = Lock()
        self.free = max_keys
        self.on_full = on_full or _nothing
        self._tables: dict[tuple[Strategy, int, int, int], Table] = {}
        self._candidates: Iterator[str] = iter(())
        self._candidates_of: Table | None = None
        _stores.add(self)

    def __len__(self) -> int:
        """How many buckets there are, those that have expired and not gone yet included."""
        return sum(len(table) for table in list(self._tables.values()))

    def gate(self, rate: Rate, strategy: Strategy, on_error: OnStoreError = "local") -> Take:
        """The quickest way to charge one bucket of this rate at a time. It cannot fail, so
        `on_error` makes no difference.
        """
        return self.table(rate, strategy).take

    def table(self, rate: Rate, strategy: Strategy) -> Table:
        """The buckets of this rate, for the accelerator."""
        with self.lock:
            return self._table(rate, strategy)

    def take(self, charges: Sequence[Charge], on_error: OnStoreError = "local") -> Verdict:
        """Take all of the charges or none. It cannot fail: see `gate`."""
        with self.lock:
            now = self.clock()
            states: dict[tuple[Table, str], Any] = {}
            tightest: tuple[int, float, float, int] | None = None
            refused: tuple[float, int, float, int] | None = None
            for index, (key, rate, strategy, cost) in enumerate(charges):
                table = self._table(rate, strategy)
                passed = table.at(now)
                place = (table, table.place(key, now))
                # The same bucket twice: the second charge comes on top of the first.
                state = states[place] if place in states else table.live[place[1]]
                allowed, state, left, reset, wait = table.decide(state, passed, now, cost)
                if not allowed:
                    if place not in states:
                        table.put(place[1], state)
                    refused = max(refused or (0.0, 0, 0.0, 0), (wait, max(left, 0), reset, index))
                    continue
                states[place] = state
                if tightest is None or left < tightest[0]:
                    tightest = (left, reset, 0.0, index)
            if refused is not None:
                wait, left, reset, index = refused
                return Verdict(False, left, reset, wait, index)
            for (table, key), state in states.items():
                table.put(key, state)
        if tightest is None:
            raise ValueError("there must be at least one charge")
        left, reset, _, index = tightest
        return Verdict(True, left, reset, 0.0, index)

    def give_back(self, charges: Sequence[Charge]) -> None:
        """Return charges. What was taken in a window that has ended since is returned to the one
        that counts now, as far as it was charged there.
        """
        with self.lock:
            now = self.clock()
            for key, rate, strategy, cost in charges:
                self._table(rate, strategy).give_back(key, now, cost)

    def make_room(self, now: float) -> bool:
        """Find a place for one more bucket, under the lock; False: there is none to be had."""
        for table in self._tables.values():
            table.at(now)
        if self.free > 0:
            return True
        self.on_full()
        best: tuple[float, str] | None = None
        for _ in range(_LOOKED_AT):
            key = next(self._candidates, None)
            if key is None:
                if best is not None:
                    break
                key = self._more_candidates()
            used = self._candidate_table().share(key, now)
            if used < (0.5 if best is None else best[0]):
                best = (used, key)
        if best is None:
            return False
        self._candidate_table().remove(best[1])
        return True

    def _more_candidates(self) -> str:
        """Look at all buckets of the largest table again, the longest untouched first. That takes
        as long as a list of them, and comes once for an eighth as many new keys.
        """
        largest = max(self._tables.values(), key=len)
        self._candidates_of = largest
        self._candidates = iter([*largest.before, *largest.live])
        return next(self._candidates)

    def _candidate_table(self) -> Table:
        assert self._candidates_of is not None  # who has a candidate has its table
        return self._candidates_of

    def _table(self, rate: Rate, strategy: Strategy) -> Table:
        name = (strategy, rate.amount, rate.period, rate.burst)
        table = self._tables.get(name)
        if table is None:
            table = self._tables[name] = Table(self, rate, strategy)
        return table


if TYPE_CHECKING or limits is None:

    class Window:
        """Where `live` and `start` are; the accelerator has a type of this name."""

        __slots__ = ("live", "start")

        live: dict[str, Any]
        start: float

else:
    Window = limits.Window


class Table(Window):
    """The buckets of one rate. All but `take` is called under the store's lock.

    In C the bucket of a request is charged without it, if it is in `live` and nobody holds the
    lock: see `_limits.c`. So whoever changes `live` or `start` holds it.
    """

    __slots__ = (
        *("_carry", "_clock", "_empty", "_give_back", "_lock", "_old", "_store", "_used"),
        *("before", "decide", "span"),
    )

    def __init__(self, store: LocalStore, rate: Rate, strategy: Strategy) -> None:
        algorithm = ALGORITHMS[strategy](rate)
        self.live: dict[str, Any] = {}
        self.before: dict[str, Any] = {}
        self.decide = algorithm.decide
        self._old: list[dict[str, Any]] = []
        self._store = store
        self._lock, self._clock = store.lock, store.clock
        self.start = float("-inf")
        self._empty, self.span = algorithm.empty, algorithm.span
        self._carry, self._give_back = algorithm.carry, algorithm.give_back
        self._used = algorithm.used

    def __len__(self) -> int:
        return len(self.live) + len(self.before)

    def take(self, key: str, cost: int) -> Outcome:
        """Charge one bucket. For all threads."""
        with self._lock:
            now = self._clock()
            passed = now - self.start
            if not 0.0 <= passed < self.span:
                passed = self.at(now)
            live = self.live
            state = live.get(key)
            if state is None:
                key = self.place(key, now)
                state = live[key]
            outcome = self.decide(state, passed, now, cost)
            if outcome[1] is not state:  # a refusal may mend it, after a jump of the clock
                live[key] = outcome[1]
        return outcome

    def at(self, now: float) -> float:
        """What has passed of the window; a new one begins when the last is over."""
        passed = now - self.start
        if 0.0 <= passed < self.span:
            return passed
        if not 0.0 <= passed < float("inf"):  # the first time, or the clock was set back
            self.start = now
            return 0.0
        windows = passed // self.span
        self._drop(self.before)
        if windows > 1.0:
            self._drop(self.live)
            self.before = {}
        else:
            self.before = self.live
        self.live = {}
        self.start += windows * self.span
        return min(max(now - self.start, 0.0), self.span)

    def place(self, key: str, now: float) -> str:
        """See that `key` has a bucket in `live`; the key of the bucket it is to use."""
        if key in self.live:
            return key
        state = self.before.pop(key, None)
        if state is not None:
            self.live[key] = self._carry(state)
            return key
        if self._old:
            self._sweep()
        store = self._store
        if store.free > 0 or store.make_room(now):
            store.free -= 1
            self.live[key] = self._empty
            return key
        shared = f"shared:{hash(key) % _SHARED}"
        if shared not in self.live:
            state = self.before.pop(shared, None)
            if state is None:
                store.free -= 1
            self.live[shared] = self._empty if state is None else self._carry(state)
        return shared

    def put(self, key: str, state: Any) -> None:
        if key not in self.live:  # put out by another charge of the same request
            self._store.free -= 1
        self.live[key] = state

    def give_back(self, key: str, now: float, cost: int) -> None:
        self.at(now)
        if key in self.before:
            self.live[key] = self._carry(self.before.pop(key))
        if key in self.live:
            self.live[key] = self._give_back(self.live[key], now, cost)

    def share(self, key: str, now: float) -> float:
        """The used share of the key's quota; 1 for a key that has no bucket here any more."""
        passed = self.at(now)
        if key in self.live:
            return self._used(self.live[key], passed, now)
        if key in self.before:
            return self._used(self._carry(self.before[key]), passed, now)
        return 1.0

    def remove(self, key: str) -> None:
        if self.live.pop(key, None) is None:
            self.before.pop(key, None)
        self._store.free += 1

    def _drop(self, buckets: dict[str, Any]) -> None:
        self._store.free += len(buckets)
        if len(buckets) > _SMALL:
            self._old.append(buckets)

    def _sweep(self) -> None:
        buckets = self._old[-1]
        for _ in range(min(_PIECE, len(buckets))):
            buckets.popitem()
        if not buckets:
            self._old.pop()


_stores: weakref.WeakSet[LocalStore] = weakref.WeakSet()
_held: list[Lock] = []


def _before_fork() -> None:
    # Counts must not be caught half-way, nor the lock in the hand of a thread that the child does
    # not have. Nobody waits under the lock, so a second means that this very thread holds it, below
    # a signal handler: then it will let it go, in the child as well.
    locks = [store.lock for store in list(_stores)]
    _held.extend(lock for lock in locks if lock.acquire(timeout=1.0))


def _after_fork() -> None:
    while _held:
        _held.pop().release()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork)
in_each_child(_after_fork)


def _nothing() -> None:
    return None
