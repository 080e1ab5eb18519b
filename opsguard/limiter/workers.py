"""Quotas that all workers of a machine share: one limit, however many processes serve.

Exact for every strategy: what all of them admit together is what one process would have admitted,
as each decision is made alone on its buckets, at a time that was read then (see
:mod:`opsguard.limiter.shared`). A worker that dies loses nothing that was counted, and what it had
in flight is free again when somebody needs it.

**When the table fails** (a full disk, no seat, a lock that a stopped worker holds) the policy's
`on_store_error` decides, by itself and without an exception, and the failure is reported. The table
is looked for again a moment later. One that was deleted, overwritten or cut short is noticed within
a second; then limits start afresh, for all workers in the same table, and that is reported, too.

Times are those of ``CLOCK_MONOTONIC``, which all processes of a machine have in common, but for
containers with a time namespace of their own: those have a table each.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from opsguard.accelerator import shared
from opsguard.clock import Clock, elapsed
from opsguard.forks import in_child
from opsguard.limiter.algorithms import ALGORITHMS, Outcome
from opsguard.limiter.local import MAX_KEYS, Take
from opsguard.limiter.memory import PATIENCE, Memory, SegmentMemory, join
from opsguard.limiter.rates import OnStoreError, Rate, Strategy
from opsguard.limiter.shared import KINDS, Table
from opsguard.limiter.standin import StandIn
from opsguard.limiter.stores import Charge, Store, StoreDown, Verdict

__all__ = ["FILE", "WorkersStore"]

FILE: Final = "limits"
"""The name of the file in the folder of the group."""

_LOOK_EVERY: Final = 1.0  # seconds, between two looks at the file
_RETRY: Final = 0.1  # seconds until a table that could not be had is tried again
_JOINING: Final = 1.0  # seconds that others who are joining are waited for, the first time


class WorkersStore:
    """A store for the workers of one machine. Thread-safe, fork-safe; nothing here raises.

    `folder` says where the group of workers meets, when the first decision is made; None means
    that there is no such place, which is a failure. `local` answers while the table cannot.
    `max_keys` is the size of a new table, for about so many buckets (more if they fall evenly).
    `on_full` hears of each newcomer that finds its set full, `report` of failures. `clock` is the
    machine's. `native` is the module `opsguard._shared`, or None: the table is in the file then.

    A decision waits for other threads and for other workers `patience` seconds at most, whatever
    they do. Only to join the table it waits longer, up to a second and once: workers that start
    together on a busy machine queue for that, and who gave up would admit by himself meanwhile.
    A forked child takes a seat of its own; slots in flight stay the parent's.
    """

    blocking = False
    strategies: frozenset[Strategy] = frozenset(ALGORITHMS)

    def __init__(
        self,
        folder: Callable[[], Path | None],
        local: Store,
        *,
        report: Callable[[str, BaseException], None],
        max_keys: int = MAX_KEYS,
        clock: Clock = elapsed,
        on_full: Callable[[], None] | None = None,
        patience: float = PATIENCE,
        native: Any = shared,
    ) -> None:
        self._folder = folder
        self._max_keys = max_keys
        self._clock = clock
        self._on_full = on_full or _nothing
        self._report = report
        self._native = native
        self._patience = patience
        self._stand_in = StandIn(local, report)
        self._gates: list[tuple[Rate, Strategy, Any]] = []
        self._begin()
        in_child(self, WorkersStore._after_fork)

    def _begin(self) -> None:
        self._lock = threading.Lock()
        self._to_join = _JOINING
        self._table: Table | None = None
        self._path: Path | None = None
        self._look_at = float("-inf")
        self._down_until = float("-inf")

    def take(self, charges: Sequence[Charge], on_error: OnStoreError = "local") -> Verdict:
        """Decide. `on_error` says who does if the table cannot: `local` alone, or one answer."""
        try:
            verdict: Verdict = self._do(lambda table: table.take(charges))
            return verdict
        except Exception as error:
            self._failed(error)
        return self._stand_in.take(charges, on_error)

    def give_back(self, charges: Sequence[Charge]) -> None:
        """Return charges to whoever took them."""
        down = self._clock() < self._down_until
        ours = self._stand_in.give_back(charges, down=down)
        if not ours:
            return
        try:
            self._do(lambda table: table.give_back(ours))
        except Exception as error:
            self._failed(error)

    def gate(self, rate: Rate, strategy: Strategy, on_error: OnStoreError = "local") -> Take:
        """The quickest way to charge one bucket of this rate at a time."""
        gate = _Gate(self, rate, strategy, on_error)
        # The C one reads the clock itself, so it is for stores that have the same.
        if self._native is None or strategy == "concurrency" or self._clock is not elapsed:
            return gate.take
        kind, most = KINDS[strategy], rate.most
        quick: Take = self._native.Gate(kind, rate.amount, rate.period, most, gate.take)
        with self._lock:
            self._gates.append((rate, strategy, quick))
            if self._table is not None:
                self._open_gates(self._table)
        return quick

    def __del__(self) -> None:
        # A store that is dropped, as `ops.override` does, leaves no seat taken.
        table = getattr(self, "_table", None)
        if table is not None:
            table.memory.leave()

    def close(self) -> None:
        """Leave the table. The next decision takes a seat again."""
        with self._lock:
            self._leave()

    def take_one(
        self, key: str, rate: Rate, strategy: Strategy, cost: int, on_error: OnStoreError
    ) -> Outcome:
        """Charge one bucket."""
        try:
            outcome: Outcome = self._do(lambda table: table.take_one(key, rate, strategy, cost))
            return outcome
        except Exception as error:
            self._failed(error)
        verdict = self._stand_in.take((Charge(key, rate, strategy, cost),), on_error)
        return verdict.allowed, None, verdict.remaining, verdict.reset, verdict.retry_after

    def _do(self, what: Callable[[Table], Any]) -> Any:
        patience = self._patience if self._table is not None else self._to_join
        if not self._lock.acquire(timeout=patience):
            raise StoreDown("another thread of this worker waits for the table")
        try:
            return what(self._present())
        finally:
            self._lock.release()

    def _present(self) -> Table:
        """The table, once a second looked at whether it is still the one."""
        now = self._clock()
        if self._table is not None and 0.0 <= self._look_at - now <= _LOOK_EVERY:
            return self._table
        if now < self._down_until <= now + _RETRY:
            raise StoreDown("the table could not be had a moment ago")
        self._look_at = now + _LOOK_EVERY
        if self._table is not None and self._path is not None:
            if not self._table.memory.changed(self._path):
                self._table.hope()
                self._open_gates(self._table)
                return self._table
            self._leave()
            self._report("limiter.workers", StoreDown("the table of limits was replaced"))
        self._table = Table(self._joined(), self._clock, self._on_full, self._patience)
        self._open_gates(self._table)
        return self._table

    def _joined(self) -> Memory:
        try:
            folder = self._folder()
            if folder is None:
                raise StoreDown("there is no folder for what the workers share")
            self._path = folder / FILE
            memory = join(self._path, self._max_keys, self._native, self._to_join)
        except BaseException:
            self._to_join, self._down_until = self._patience, self._clock() + _RETRY
            raise
        self._to_join, self._down_until = _JOINING, float("-inf")
        return memory

    def _leave(self) -> None:
        table, self._table = self._table, None
        for _, _, gate in self._gates:
            gate.unbind()
        if table is not None:
            table.memory.leave()

    def _open_gates(self, table: Table) -> None:
        """Let the gates in C decide by this table, until it is to be looked at again."""
        memory = table.memory
        if not isinstance(memory, SegmentMemory):
            return
        memory.segment.look_at = self._look_at
        _, _, salt, geometry, _ = memory.header
        for rate, strategy, gate in self._gates:
            name = table.quota(rate, strategy).name
            gate.bind(memory.segment, salt.salt, name, geometry.sets, geometry.table)

    def _failed(self, error: Exception) -> None:
        self._report("limiter.workers", error)

    def _after_fork(self) -> None:
        """In the child: the seat, the locks and what is in flight are the parent's."""
        table = self._table
        self._begin()
        self._stand_in.after_fork()
        for _, _, gate in self._gates:
            gate.unbind()
        if table is not None:
            table.memory.leave()


class _Gate:
    """One rate's way to the table."""

    _strategy: Strategy
    _on_error: OnStoreError

    def __init__(
        self, store: WorkersStore, rate: Rate, strategy: Strategy, on_error: OnStoreError
    ) -> None:
        self._store = store
        self._rate, self._strategy, self._on_error = rate, strategy, on_error

    def take(self, key: str, cost: int) -> Outcome:
        return self._store.take_one(key, self._rate, self._strategy, cost, self._on_error)


def _nothing() -> None:
    return None
