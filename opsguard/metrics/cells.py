"""Values of prometheus_client whose number is a cell of our store.

A value is taken over by exchanging its class, never the object: whoever holds it goes on using it,
and an `inc` that another thread is in the middle of ends up in the cell. `MutexValue` adds to
`self._value` under `self._lock`; in the classes here `_value` is the cell.

Under the GIL an addition to a cell is one step (see `store`), so `inc` takes no lock; without it
`LockedCell` takes the store's. In a forked child the cells begin with zero, like all of ours.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from prometheus_client.samples import Exemplar
from prometheus_client.values import MutexValue

from opsguard.clock import wall
from opsguard.metrics.families import Family
from opsguard.metrics.store import Store

__all__ = ["Cell", "LockedCell", "Shared", "give_back", "is_plain", "take"]

_PARTS = ("_value", "_lock", "_exemplar")

if TYPE_CHECKING:

    class Plain:
        """`MutexValue` as far as we rely on it; its own methods have no types."""

        _value: Any  # a float, or a property that is one
        _exemplar: Exemplar | None
        _lock: threading.Lock

        def inc(self, amount: float) -> None: ...
        def set(self, value: float, timestamp: float | None = None) -> None: ...
        def set_exemplar(self, exemplar: Exemplar) -> None: ...
        def get(self) -> float: ...

else:
    Plain = MutexValue


class _Taken(Plain):
    """What all values in our store know: which cell of which series they are."""

    _family: Family
    _store: Store
    _values: tuple[str, ...]
    _place: int  # of the cell in its series
    _at: int  # of the cell in the store

    def set_exemplar(self, exemplar: Exemplar) -> None:
        super().set_exemplar(exemplar)
        when = float(exemplar.timestamp or 0.0)
        with suppress(ValueError):  # prometheus_client takes any name; the page does not
            self._family.keep_exemplar(
                self._values, self._place, exemplar.labels, exemplar.value, when
            )


class Cell(_Taken):
    """A value under the GIL."""

    _seen: float | None = None

    def inc(self, amount: float) -> None:
        amount = amount + 0.0  # a float from here on: no code of others between reading and writing
        self._store.cells[self._at] += amount

    def set(self, value: float, timestamp: float | None = None) -> None:
        self._store.cells[self._at] = value

    def get(self) -> float:
        return self._store.cells[self._at]

    # For calls of MutexValue's own methods that began before the class was exchanged. They come one
    # at a time, under `_lock`; meanwhile others add without it, so a difference is what is written.
    def _read(self) -> float:
        self._seen = seen = self.get()
        return seen

    def _write(self, value: float) -> None:
        seen, self._seen = self._seen, None
        self.set(value) if seen is None else self.inc(value - seen)

    _value = property(_read, _write)


class LockedCell(Cell):
    """A value without the GIL."""

    def inc(self, amount: float) -> None:
        amount = amount + 0.0
        store = self._store
        with store.lock:
            store.cells[self._at] += amount

    def set(self, value: float, timestamp: float | None = None) -> None:
        store = self._store
        with store.lock:
            store.cells[self._at] = value


class LatestCell(LockedCell):
    """A gauge of which the value set last counts: the moment of that is in the cell after it."""

    def set(self, value: float, timestamp: float | None = None) -> None:
        store = self._store
        with store.exclusive:
            store.cells[self._at] = value
            store.cells[self._at + 1] = wall() if timestamp is None else timestamp


class Shared(_Taken):
    """A value beyond the limit of label sets: it keeps its own number, and what it grows by goes to
    the cell it shares with the others.
    """

    def inc(self, amount: float) -> None:
        super().inc(amount)
        self._share(amount + 0.0)

    def set(self, value: float, timestamp: float | None = None) -> None:
        with self._lock:
            grown = value - self._value
            self._value = value
        self._share(grown)

    def _share(self, grown: float) -> None:
        store = self._store
        with store.exclusive:
            store.cells[self._at] += grown


def is_plain(value: object) -> bool:
    """Whether this is a value of prometheus_client as we know it, in memory and its own."""
    return type(value) is MutexValue and all(hasattr(value, part) for part in _PARTS)


def _cell(family: Family) -> type[Cell]:
    if family.kind == "gauge" and family.width > 1:
        return LatestCell
    return Cell if family.store.gil else LockedCell


def take(
    value: Any, family: Family, values: tuple[str, ...], at: int, place: int, *, own: bool
) -> None:
    """Let a plain value live in cell `place` of the series at `at`, with what it has counted.

    `own` is False if the series is one that several label sets share.
    """
    store = family.store
    with value._lock, store.lock:
        counted = value._value
        value._family, value._store, value._values = family, store, values
        value._place, value._at = place, at + place
        if own:
            del value._value
            value.__class__ = _cell(family)
        else:
            value.__class__ = Shared
        store.cells[at + place] += counted
        if own and counted and type(value) is LatestCell:
            store.cells[at + 1] = wall()  # when it was set is not known: before now
    if value._exemplar is not None:
        value.set_exemplar(value._exemplar)


def give_back(value: Any) -> None:
    """Make it plain again, with its number. What it knew stays, for an `inc` that is under way: it
    adds to a cell that nobody reads any more.
    """
    if not isinstance(value, _Taken):
        return
    with value._lock:
        counted = value.get() if isinstance(value, Cell) else value._value
        value.__class__ = MutexValue  # type: ignore[assignment]
        value._value = counted
