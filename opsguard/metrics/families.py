"""Families: a metric with its label names, and its series in the store.

A family knows how many label sets it may have. The one after the last goes, with all that follow,
to one series whose label values are all ``<overflow>``, is counted, and is said once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from prometheus_client.core import Metric

from opsguard.metrics import text
from opsguard.metrics.definitions import Definition
from opsguard.metrics.exemplars import check_exemplar
from opsguard.metrics.merge import OVERFLOW, Merged
from opsguard.metrics.store import Store, StoreFull
from opsguard.metrics.text import Exemplar, Numbers, clean, cleaned

__all__ = ["OVERFLOW", "Family", "clean"]


class Family:
    """One metric: `kind` is counter, gauge, histogram, summary or unknown; `buckets` are a
    histogram's upper bounds without +Inf; `mode` says what a gauge shows of several workers.

    `at(labels)` gives the index of a series' first cell in `store.cells`; see `Definition.width`
    for its cells. Thread-safe.
    """

    __slots__ = (
        "_id",
        "_idle",
        "_overflowed",
        "_series",
        "buckets",
        "definition",
        "exemplars",
        "functions",
        "help",
        "kind",
        "labels",
        "limit",
        "name",
        "on_overflow",
        "store",
        "width",
    )

    def __init__(
        self,
        store: Store,
        name: str,
        help: str,
        kind: str,
        labels: tuple[str, ...] = (),
        *,
        buckets: tuple[float, ...] = (),
        mode: str = "sum",
        unit: str = "",
        limit: int = 2000,
        on_overflow: Callable[[str], None] | None = None,
    ) -> None:
        self.store = store
        self.name = name
        self.help = help
        self.kind = kind
        self.labels = labels
        self.buckets = buckets
        self.limit = limit
        self.on_overflow = on_overflow
        self.definition = Definition(name, kind, labels, buckets, mode, help, unit)
        self.width = self.definition.width
        self.exemplars: dict[tuple[tuple[str, ...], int], Exemplar] = {}
        self.functions: dict[tuple[str, ...], Callable[[], float]] = {}
        self._series: dict[tuple[str, ...], int] = {}
        self._idle: dict[tuple[str, ...], int] = {}
        self._id: int | None = None
        self._overflowed = False

    def __len__(self) -> int:
        return len(self._series)

    def __contains__(self, values: tuple[str, ...]) -> bool:
        """Whether these label values have a series of their own."""
        return cleaned(values) in self._series

    def indexes(self) -> list[int]:
        """The first cells of its series."""
        return list(self._series.values())

    def at(self, values: tuple[str, ...]) -> int:
        """The index of the first cell of the series with these label values."""
        found = self._series.get(values)
        return self._find(cleaned(values)) if found is None else found

    def forget(self, values: tuple[str, ...]) -> None:
        """Stop exposing what this worker has of a series. Its cells stay taken, as an index handed
        out must stay harmless, and wait for the same label values: who clears and sets the same
        ones again and again needs no more room.
        """
        values = cleaned(values)
        with self.store.lock:
            at = self._series.pop(values, None)
            if at is not None:
                self._idle[values] = at
                self._thin_out()
            self.functions.pop(values, None)
            for place in range(self.width):
                self.exemplars.pop((values, place), None)
            if at is not None:
                self.store.drop((at,))

    def forget_all(self) -> None:
        with self.store.lock:
            self._idle |= self._series
            self._thin_out()
            cells = set(self._series.values())
            self._series = {}
            self.functions = {}
            self.exemplars = {}
            if cells:
                self.store.drop(cells)

    def _thin_out(self) -> None:
        while len(self._idle) > self.limit:
            del self._idle[next(iter(self._idle))]

    def silence(self) -> None:
        """Do not say when the limit is reached: that is left to its maker."""
        self._overflowed = True

    def keep_exemplar(
        self,
        values: tuple[str, ...],
        place: int,
        labels: Mapping[str, str],
        value: float,
        now: float,
    ) -> None:
        """Remember the last exemplar of a cell. Only a series of its own has one, so that they are
        as bounded as the series.

        Raises ValueError for labels that no exemplar may have, see `check_exemplar`.
        """
        texts = check_exemplar(labels)
        values = cleaned(values)
        at = self._series.get(values)
        if at is not None:
            kept = self.exemplars[values, place] = Exemplar(texts, value, now)
            self.store.keep_exemplar(at + place, kept)

    def expose(self, openmetrics: bool, merged: Merged | None = None) -> tuple[str, str]:
        """(family name, its finished text block) in the Prometheus text or OpenMetrics format: the
        numbers of this worker, or those of all.
        """
        return text.expose(self.definition, self.numbers(merged), openmetrics)

    def collect(self, merged: Merged | None = None) -> Metric:
        """The family as prometheus_client knows it, for registries and push gateways."""
        return text.collect(self.definition, self.numbers(merged))

    def numbers(self, merged: Merged | None = None) -> Numbers:
        """What there is of it, in this worker or in all of them. A function of a gauge is asked
        here; what it says stands for all workers, as it is asked in none of the others.
        """
        said = {values: float(function()) for values, function in list(self.functions.items())}
        for values, value in said.items():
            self.store.cells[self.at(values)] = value
        if merged is None:
            return Numbers(self.store.cells, dict(self._series), self.exemplars)
        found = merged.numbers(self.definition)
        live = (str(self.store.number),) if found.told_apart else ()
        for values, value in said.items():
            at = found.series.get((*values, *live))
            if at is not None:  # else it was made after the reading
                merged.cells[at] = value
        newest = merged.exemplars.get(self.definition, {})
        return found._replace(exemplars={**self.exemplars, **newest})

    def _find(self, values: tuple[str, ...]) -> int:
        with self.store.lock:
            warned = self._overflowed
            found = self._series.get(values)
            if found is None:
                found = self._add(values)
            warn = self._overflowed and not warned
        self.store.tell()
        if warn:  # not under the lock: a log handler may count, and wait for it
            logging.getLogger("opsguard").warning(
                "metric %s has reached its %d label sets; further ones are counted together as %s",
                self.name,
                self.limit,
                OVERFLOW,
            )
        return found

    def _add(self, values: tuple[str, ...]) -> int:
        if len(self._series) >= self.limit and self.labels:
            return self._overflow()
        try:
            return self._place(values)
        except StoreFull:
            return self._overflow()

    def _overflow(self) -> int:
        values = (OVERFLOW,) * len(self.labels)
        if self.on_overflow is not None:
            self.on_overflow(self.name)
        self._overflowed = True
        try:
            return self._series[values] if values in self._series else self._place(values)
        except StoreFull:
            return self.store.spare

    def _place(self, values: tuple[str, ...]) -> int:
        at = self._idle.pop(values, None)
        if at is None:
            at = self._make(values)
        else:
            self.store.cells[at : at + self.width] = memoryview(bytes(8 * self.width)).cast("d")
            self.store.revive((at,))
        self._series[values] = at
        return at

    def _make(self, values: tuple[str, ...]) -> int:
        if self._id is None:
            self._id = self.store.family(self.definition.record())
        return self.store.series(self._id, values, self.width)
