"""Who has how many slots of a bucket in flight, so that those of a dead worker can be freed.

A record for each worker and bucket, which only that worker writes, under the bucket's lock. It
counts slots by when they were taken, in sevenths of the rate's period: eight counts that move up as
time goes by. So a slot that nobody returns is free again after the period, or up to a seventh of it
later, and no slot needs a name. What is returned is taken off the oldest first.
"""

from __future__ import annotations

from typing import Final

from opsguard.limiter.layout import FLIGHT, SET, SLOT
from opsguard.limiter.memory import Memory
from opsguard.limiter.rates import Rate
from opsguard.limiter.stores import StoreDown

__all__ = ["Flights", "until"]

SLICES: Final = 7
"""Parts of a period."""
_MOST: Final = (1 << 32) - 1
_NONE: Final = (0,) * (SLICES + 1)

Counts = tuple[int, ...]


class Flights:
    """The records of one table, as this process sees and writes them."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._geometry = memory.header.geometry
        self._told = False

    def change(self, bucket: bytes, rate: Rate, now: float, more: int) -> int:
        """Add slots of this worker, or take some off; by how many its number has changed.

        :raises StoreDown: if the worker holds slots of too many buckets to note another.
        """
        index = _slice(now, rate)
        at, counts = self._find(self._memory.seat, bucket, index, now)
        if at is None:
            if more <= 0:
                return 0
            raise StoreDown("a worker has slots of too many buckets in flight")
        changed = _added(counts, more) if more > 0 else _removed(counts, -more)
        difference = sum(changed) - sum(counts)
        if difference:
            self._tell()
            self._memory.write(at, FLIGHT.pack(bucket, index, *changed, until(now, rate)))
        return difference

    def held(self, seat: int, bucket: bytes, rate: Rate, now: float) -> int:
        """What the worker that sits there has in flight; nothing if it is dead."""
        if not self._memory.lives(seat):
            return 0
        return sum(self._find(seat, bucket, _slice(now, rate), now)[1])

    def _find(self, seat: int, bucket: bytes, index: int, now: float) -> tuple[int | None, Counts]:
        """Where the record is or may be written, and what it says now."""
        begin = self._geometry.flights_at(seat, bucket)
        records = self._memory.read(begin, SET)
        free = None
        for at in range(0, SET, SLOT):
            name, then, *found, expiry = FLIGHT.unpack_from(records, at)
            if name == bucket:
                return begin + at, _moved(tuple(found), index - then)
            if free is None and not (any(found) and expiry > now):
                free = begin + at
        return free, _NONE

    def _tell(self) -> None:
        """Whoever sits here next has records to clear."""
        if not self._told:
            at = self._geometry.seat_at(self._memory.seat) + 8
            self._memory.write(at, (1).to_bytes(8, "little"))
            self._told = True


def until(now: float, rate: Rate) -> float:
    """When a slot that is taken now is free again, at the latest."""
    return now + rate.period * (SLICES + 1) / SLICES


def _slice(now: float, rate: Rate) -> int:
    return int(now * SLICES / rate.period)


def _moved(counts: Counts, slices: int) -> Counts:
    """The counts so many slices later; a time that is none leaves nothing."""
    if slices == 0:
        return counts
    if not 0 < slices <= SLICES:
        return _NONE
    return counts[slices:] + _NONE[:slices]


def _added(counts: Counts, more: int) -> Counts:
    return (*counts[:-1], min(counts[-1] + more, _MOST))


def _removed(counts: Counts, fewer: int) -> Counts:
    left = []
    for count in counts:
        gone = min(count, fewer)
        fewer -= gone
        left.append(count - gone)
    return tuple(left)
