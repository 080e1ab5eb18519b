"""Decisions on the shared table: the same pure algorithms as everywhere, on states in slots.

All sets that a decision touches are locked, in ascending order, before anything is read, the clock
included, and until all is written. So decisions have one order, the same for all processes, and
times ascend in it: what the algorithms admit one after the other in one process, they admit here.

Windows begin at whole multiples of the period on the machine's clock, for everybody.

**A full set.** A bucket that has expired gives way, then the least used of those that had used less
than half when they were last charged, and have nothing in flight. If there is none, the newcomer
shares one of 1,024 buckets of its rate with others. Both are told to `on_full`.

**What may be in a slot.** Anything, as the bytes are others' to write. No state makes a decision
fail; none is worth more than an empty bucket, nor keeps anybody out for longer than a full one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import floor
from struct import Struct
from typing import Any, Final, NamedTuple

from opsguard.clock import Clock
from opsguard.limiter.algorithms import ALGORITHMS, Outcome
from opsguard.limiter.flights import Flights, until
from opsguard.limiter.layout import AHEAD, EMPTY, SEATS, SET, SHARED, SLOT, SLOTS
from opsguard.limiter.memory import Memory
from opsguard.limiter.rates import Rate, Strategy
from opsguard.limiter.stores import Charge, StoreDown, Verdict

__all__ = ["KINDS", "Quota", "Table"]

KINDS: Final[dict[Strategy, int]] = {"fixed": 1, "sliding": 2, "gcra": 3, "concurrency": 4}
_COUNTS: Final = Struct("=qII16x")
_ARRIVAL: Final = Struct("=d24x")
_FLYING: Final = Struct("=d24s")
_BITS: Final = 30
_LOW: Final = (1 << _BITS) - 1
_HALF: Final = 500  # thousandths
_TRIES: Final = 3
_IMPATIENT: Final = 0.001  # seconds
_AGAIN: Final = 0.01  # seconds between two counts of what is in flight
_SHARED: Final = SHARED * SLOTS

Record = tuple[bytes, float, int, int]
"""A state as it lies in a slot: 32 bytes, when it expires, its used share, the number ahead."""


class Quota:
    """One rate by one strategy on one table: how its states are read and written."""

    def __init__(self, rate: Rate, strategy: Strategy, quota: bytes) -> None:
        self.rate, self.strategy, self.name = rate, strategy, quota
        self.kind = KINDS[strategy]
        self.algorithm = ALGORITHMS[strategy](rate)
        self.period = float(rate.period)

    def load(self, slot: bytes, now: float) -> Any:
        """The state in a slot; `slot` is 64 bytes of this bucket."""
        if self.strategy == "gcra":
            (arrival,) = _ARRIVAL.unpack_from(slot, AHEAD.size)
            whole = now + self.algorithm.span
            return arrival if arrival <= whole else whole
        if self.strategy == "concurrency":
            _, _, _, total, expiry = AHEAD.unpack_from(slot)
            counted, seats = _FLYING.unpack_from(slot, AHEAD.size)
            return (total, counted, seats) if now < expiry else _GROUNDED
        window, count, before = _COUNTS.unpack_from(slot, AHEAD.size)
        late = self.window(now) - window
        if self.strategy == "fixed":
            return count if late == 0 else 0
        count, before = count & _LOW, before & _LOW
        if late == 0:
            return before << _BITS | count
        return count << _BITS if late == 1 else 0

    def window(self, now: float) -> int:
        return floor(now / self.period)

    def passed(self, now: float) -> float:
        """Seconds of the window."""
        return min(max(now - self.window(now) * self.period, 0.0), self.period)

    def record(self, state: Any, now: float) -> Record:
        """How a state lies in its slot."""
        if self.strategy == "concurrency":
            total, counted, seats = state
            expiry = until(now, self.rate) if total else now
            share = max(_HALF, min(total * 1000 // self.rate.amount, 1000)) if total else 0
            return _FLYING.pack(counted, seats), expiry, share, total
        used = self.algorithm.used(state, self.passed(now), now)
        share = min(int(used * 1000.0), 1000)
        if self.strategy == "gcra":
            return _ARRIVAL.pack(state), state, share, 0
        window = self.window(now)
        if self.strategy == "fixed":
            return _COUNTS.pack(window, state, 0), (window + 1) * self.period, share, 0
        packed = _COUNTS.pack(window, state & _LOW, state >> _BITS)
        return packed, (window + 2) * self.period, share, 0


_NOBODY: Final = bytes(SEATS // 8)
_GROUNDED: Final = (0, 0.0, _NOBODY)


class _Place(NamedTuple):
    """A slot, and whose it is to be."""

    at: int
    bucket: bytes
    quota: Quota


class _More(Exception):
    """Another set is needed, and must be locked in order."""

    def __init__(self, index: int) -> None:
        self.index = index


class Table:
    """Decisions by the table in `memory`. For one thread at a time; not after a fork.

    :raises StoreDown, OSError: from every method, if the memory does; nothing is taken then, or
        less is left than could be.
    """

    def __init__(
        self, memory: Memory, clock: Clock, on_full: Callable[[], None], patience: float
    ) -> None:
        self.memory = memory
        self._patience = patience
        self._in_vain: dict[int, int] = {}
        self._geometry = memory.header.geometry
        self._salt = memory.header.salt
        self._clock = clock
        self._on_full = on_full
        self._flights = Flights(memory)
        self._quotas: dict[tuple[Strategy, int, int, int], Quota] = {}

    def quota(self, rate: Rate, strategy: Strategy) -> Quota:
        name = (strategy, rate.amount, rate.period, rate.burst)
        found = self._quotas.get(name)
        if found is None:
            text = f"{strategy} {rate.amount} {rate.period} {rate.burst}"
            found = self._quotas[name] = Quota(rate, strategy, self._salt.quota(text))
        return found

    def take(self, charges: Sequence[Charge]) -> Verdict:
        if not charges:
            raise ValueError("there must be at least one charge")
        outcomes = self._locked(charges, self._decide)
        refused: tuple[float, int, float, int] | None = None
        tightest: tuple[int, float, int] | None = None
        for index, (allowed, _, left, reset, wait) in enumerate(outcomes):
            if not allowed:
                refused = max(refused or (0.0, 0, 0.0, 0), (wait, max(left, 0), reset, index))
            elif tightest is None or left < tightest[0]:
                tightest = (left, reset, index)
        if refused is not None:
            wait, left, reset, index = refused
            return Verdict(False, left, reset, wait, index)
        assert tightest is not None  # there is a charge, and none was refused
        return Verdict(True, tightest[0], tightest[1], 0.0, tightest[2])

    def take_one(self, key: str, rate: Rate, strategy: Strategy, cost: int) -> Outcome:
        """The outcome for one bucket."""
        charge = Charge(key, rate, strategy, cost)
        allowed, state, left, reset, wait = self._locked((charge,), self._decide)[0]
        return allowed, state, max(left, 0), reset, wait

    def give_back(self, charges: Sequence[Charge]) -> None:
        self._locked(charges, self._return)

    def _locked(
        self,
        charges: Sequence[Charge],
        do: Callable[[Sequence[tuple[Quota, bytes, int]], _View], list[Outcome]],
    ) -> list[Outcome]:
        asked = []
        for key, rate, strategy, cost in charges:
            quota = self.quota(rate, strategy)
            asked.append((quota, self._salt.bucket(quota.name, key), cost))
        wanted = {self._geometry.index(bucket) for _, bucket, _ in asked}
        while True:
            sets = sorted(wanted)
            self._lock(sets)
            try:
                return do(asked, _View(self.memory, sets, self._clock()))
            except _More as more:
                wanted.add(more.index)
            finally:
                self.memory.unlock(sets)

    def _lock(self, sets: Sequence[int]) -> None:
        """Lock them, with little patience where several have waited in vain, one after the other:
        there is a stopped worker then, and no use in waiting for it each time.
        """
        first, in_vain = sets[0], self._in_vain
        impatient = bool(in_vain) and in_vain.get(first, 0) >= _TRIES
        try:
            self.memory.lock(sets, _IMPATIENT if impatient else self._patience)
        except StoreDown:
            in_vain[first] = in_vain.get(first, 0) + 1
            raise
        if in_vain:
            in_vain.pop(first, None)

    def hope(self) -> None:
        """Wait once more, now and then, for what several waited for in vain."""
        for first, times in self._in_vain.items():
            self._in_vain[first] = min(times, _TRIES - 1)

    def _decide(self, asked: Sequence[tuple[Quota, bytes, int]], view: _View) -> list[Outcome]:
        now = view.now
        states: dict[_Place, Any] = {}
        outcomes: list[Outcome] = []
        for quota, bucket, cost in asked:
            place, found = self._place(quota, bucket, view)
            # The same bucket twice: the second charge comes on top of the first.
            state = states.get(place, found)
            if quota.strategy == "concurrency":
                outcome = self._fly(place, state, now, cost, states)
            else:
                outcome = quota.algorithm.decide(state, quota.passed(now), now, cost)
            if outcome[0]:
                states[place] = outcome[1]
            outcomes.append(outcome)
        if all(outcome[0] for outcome in outcomes):
            self._depart(asked, view)
            for place, state in states.items():
                view.put(place, state)
        return outcomes

    def _fly(
        self, place: _Place, state: Any, now: float, cost: int, states: dict[_Place, Any]
    ) -> Outcome:
        """As `algorithms.concurrency` decides, with the dead left out before anybody is refused."""
        quota = place.quota
        amount, period = quota.rate.amount, quota.period
        total, counted, seats = state
        due = not 0.0 <= now - counted < _AGAIN
        # What this very decision has taken there is noted nowhere yet.
        if total + cost > amount >= cost and due and place not in states:
            total, seats = self._count(place, seats, now)
        if total + cost > amount:
            return False, state, amount - total, period if total else 0.0, 1.0
        ours = self.memory.seat
        mine = bytearray(seats)
        mine[ours // 8] |= 1 << ours % 8
        return True, (total + cost, counted, bytes(mine)), amount - total - cost, period, 0.0

    def _count(self, place: _Place, seats: bytes, now: float) -> tuple[int, bytes]:
        """What is truly in flight, and by whom; written down, so that others need not count."""
        total, holding = 0, bytearray(SEATS // 8)
        for seat in range(SEATS):
            if not seats[seat // 8] >> seat % 8 & 1:
                continue
            held = self._flights.held(seat, place.bucket, place.quota.rate, now)
            if held:
                total += held
                holding[seat // 8] |= 1 << seat % 8
        found = bytes(holding)
        self._write(place, (total, now, found), now)
        return total, found

    def _depart(self, asked: Sequence[tuple[Quota, bytes, int]], view: _View) -> None:
        """Note slots with this worker, before the buckets are charged."""
        noted: list[tuple[bytes, Rate, int]] = []
        try:
            for quota, bucket, cost in asked:
                if quota.strategy == "concurrency":
                    bucket = self._place(quota, bucket, view)[0].bucket
                    self._flights.change(bucket, quota.rate, view.now, cost)
                    noted.append((bucket, quota.rate, cost))
        except BaseException:
            for bucket, rate, cost in noted:
                self._flights.change(bucket, rate, view.now, -cost)
            raise

    def _return(self, asked: Sequence[tuple[Quota, bytes, int]], view: _View) -> list[Outcome]:
        now = view.now
        for quota, bucket, cost in asked:
            found = view.find(self._geometry.index(bucket), bucket)
            if found is None:
                bucket = self._sharing(quota, bucket)
                found = view.find(self._geometry.shared(bucket), bucket)
            if found is None:
                continue
            place = _Place(found, bucket, quota)
            state = quota.load(view.slot(found), now)
            if quota.strategy != "concurrency":
                view.put(place, quota.algorithm.give_back(state, now, cost))
                continue
            total, counted, seats = state
            given = -self._flights.change(bucket, quota.rate, now, -cost)
            view.put(place, (max(total - given, 0), counted, seats))
        return []

    def _place(self, quota: Quota, bucket: bytes, view: _View) -> tuple[_Place, Any]:
        """The slot of a bucket, or of the one that it has to share, and its state."""
        index = self._geometry.index(bucket)
        at = view.find(index, bucket)
        if at is None:
            shared = self._sharing(quota, bucket)
            # Who had to share goes on with what he used there, as long as others keep him out.
            at = view.room(index, bucket, self._on_full)
            if at is None:
                bucket, index = shared, self._geometry.shared(shared)
                at = view.find(index, bucket)
                if at is None:
                    at = view.room(index, bucket, _nothing, always=True)
        assert at is not None  # the last search always finds one
        place = _Place(at, bucket, quota)
        return place, quota.load(view.slot(at), view.now)

    def _sharing(self, quota: Quota, bucket: bytes) -> bytes:
        """The bucket that this one shares with others."""
        number = int.from_bytes(bucket[8:12], "little") % _SHARED
        return self._salt.bucket(quota.name, f"shared:{number}")

    def _write(self, place: _Place, state: Any, now: float) -> None:
        self.memory.write(place.at, _slot(place, state, now))


class _View:
    """The locked sets, as they are while a decision is made, and its time."""

    def __init__(self, memory: Memory, sets: Sequence[int], now: float) -> None:
        self.now = now
        self._memory = memory
        self._at = memory.header.geometry.set_at
        self._sets = {index: bytearray(memory.read(self._at(index), SET)) for index in sets}
        self._begins = {self._at(index): found for index, found in self._sets.items()}

    def find(self, index: int, bucket: bytes) -> int | None:
        """Where the bucket's slot is, if it has one."""
        found = self._set(index)
        for at in range(0, SET, SLOT):
            if found[at : at + 16] == bucket:
                return self._at(index) + at
        return None

    def slot(self, at: int) -> bytes:
        begin = (at - self._at(0)) // SET * SET + self._at(0)
        found = self._begins[begin]
        return bytes(found[at - begin : at - begin + SLOT])

    def room(
        self, index: int, bucket: bytes, on_full: Callable[[], None], *, always: bool = False
    ) -> int | None:
        """A slot for a new bucket, kept for it and empty; None: there is none to be had. With
        `always` the one that expires first goes if no other can.
        """
        found = self._set(index)
        best, least, soonest = None, _HALF, (float("inf"), 0)
        for at in range(0, SET, SLOT):
            _, _, share, _, expiry = AHEAD.unpack_from(found, at)
            if not expiry > self.now:
                best = at
                break
            if share < least:
                best, least = at, share
            soonest = min(soonest, (expiry, at))
        else:
            on_full()
        if best is None and always:
            best = soonest[1]
        if best is None:
            return None
        # Zeros are an empty state of every strategy. No other charge of this decision may have it.
        found[best : best + SLOT] = EMPTY
        AHEAD.pack_into(found, best, bucket, 0, 1000, 0, float("inf"))
        return self._at(index) + best

    def put(self, place: _Place, state: Any) -> None:
        self._memory.write(place.at, _slot(place, state, self.now))

    def _set(self, index: int) -> bytearray:
        found = self._sets.get(index)
        if found is None:
            raise _More(index)
        return found


def _slot(place: _Place, state: Any, now: float) -> bytes:
    packed, expiry, share, number = place.quota.record(state, now)
    return AHEAD.pack(place.bucket, place.quota.kind, share, number, expiry) + packed


def _nothing() -> None:
    return None
