"""Many files, one set of numbers: the sums of counters and histograms, gauges by their mode.

The merged cells are laid out once: for each source a list says which of its cells goes to which
merged one, so that a scrape adds whole columns without looking at a single series. The layout grows
with the sources; it is made anew when a worker comes or goes.

Which label sets have a place of their own, where there are more than the limit, must not depend on
who answers, nor on when it looked: else the one series of the rest would go up and down from scrape
to scrape. They are the first ones, in the order of the sources. So one that is to be folded into a
layout that has grown has it made anew.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from math import isfinite
from operator import add, itemgetter

from opsguard.metrics.definitions import Definition
from opsguard.metrics.layout import ZERO
from opsguard.metrics.sources import Series, Source
from opsguard.metrics.text import Exemplar, Numbers

__all__ = ["OVERFLOW", "Merge"]

OVERFLOW = "<overflow>"

Column = tuple[int, list[float]]
Exemplars = dict[tuple[tuple[str, ...], int], Exemplar]
_CHOICE: dict[str, Callable[[list[Column]], float]] = {
    "max": lambda found: max([cells[at] for at, cells in found]),
    "min": lambda found: min([cells[at] for at, cells in found]),
    "latest": lambda found: max([(cells[at + 1], cells[at]) for at, cells in found])[1],
}


class Merge:
    """The layout for these sources, which must be the same at each `add`, in an order that all
    workers share. `limit` is the most label sets of a family; what is beyond goes to one series of
    ``<overflow>``. Not thread-safe.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._begin()

    def _begin(self) -> None:
        self._width = 0
        self._folded = False  # whether a label set that was just laid out got no place of its own
        self._columns: dict[str, _Column] = {}
        self._places: dict[Definition, dict[tuple[str, ...], int]] = {}
        self._chosen: dict[int, tuple[str, list[tuple[str, int]]]] = {}
        """Merged cells that are no sums: the mode, and (source, cell) of each that has one."""

    def add(self, sources: Sequence[Source], *, several: bool) -> Merged:
        """Their numbers together, as they are in these readings. `several`: there are several
        workers, or were, so gauges of mode `live` tell them apart.
        """
        self._fit_all(sources)
        total = [0.0] * self._width
        read: dict[str, list[float]] = {}
        for source in sources:
            cells = read[source.name] = source.cells()
            column = self._columns[source.name]
            picked = column.pick(cells, self._width)
            if not isfinite(sum(picked)) and source.mend(cells):
                picked = column.pick(cells, self._width)
            total = list(map(add, total, picked))
            for at, first, width in column.extra:
                for place in range(width):
                    total[at + place] += cells[first + place]
        for at, (mode, found) in self._chosen.items():
            total[at] = _CHOICE[mode]([(cell, read[name]) for name, cell in found])
        # A copy: the next reading, in another thread, may lay out more while this one is written.
        places = {definition: found.copy() for definition, found in self._places.items()}
        return Merged(total, places, sources, _exemplars(sources), several)

    def _fit_all(self, sources: Sequence[Source]) -> None:
        grown, self._folded = bool(self._columns), False
        for source in sources:
            self._fit(source)
        if not (self._folded and grown):
            return
        self._begin()
        for source in sources:
            self._fit(source)

    def _fit(self, source: Source) -> None:
        """Lay out the series of a source that are new."""
        column = self._columns.setdefault(source.name, _Column())
        for series in source.index.series[column.seen :]:
            if series.definition.kind != "gauge" or _counts(source, series.definition.mode):
                self._lay(column, source, series)
        column.seen = len(source.index.series)

    def _lay(self, column: _Column, source: Source, series: Series) -> None:
        definition, values, first = series
        if definition.mode == "live":
            values = (*values, str(source.header.number))
        places = self._places.setdefault(definition, {})
        at = places.get(values)
        if at is None and definition.labels:
            rest = (OVERFLOW,) * len(definition.exposed_labels)
            if values != rest and len(places) - (rest in places) >= self._limit:
                self._folded = True
                values, at = rest, places.get(rest)
        width = 1 if definition.kind == "gauge" else definition.width
        if at is None:
            at = places[values] = self._width
            self._width += width
        if definition.mode in _CHOICE:
            self._chosen.setdefault(at, (definition.mode, []))[1].append((source.name, first))
        else:
            column.lay(at, first, width)


def _counts(source: Source, mode: str) -> bool:
    """Whether the gauges of this process do. What was set before a fork may be a part of a sum, or
    the greatest or latest of all; but a process that serves nothing is not the least busy worker.
    """
    return source.serves or (source.alive and mode not in ("min", "live"))


class _Column:
    """Which cells of one source go where."""

    __slots__ = ("_picks", "_take", "extra", "seen")

    def __init__(self) -> None:
        self.seen = 0
        """Series of the source that are laid out."""
        self.extra: list[tuple[int, int, int]] = []
        """What shares a merged cell with another series of the same source."""
        self._picks: list[int] = []
        self._take: Callable[[list[float]], tuple[float, ...]] | None = None

    def lay(self, at: int, first: int, width: int) -> None:
        self._stretch(at + width)
        if self._picks[at] != ZERO:
            self.extra.append((at, first, width))
            return
        self._picks[at : at + width] = range(first, first + width)
        self._take = None

    def pick(self, cells: list[float], width: int) -> tuple[float, ...]:
        """The cells of the source in the merged order."""
        self._stretch(width)
        if self._take is None:
            # Two more, as with fewer than two there is no tuple.
            self._take = itemgetter(*self._picks, ZERO, ZERO)
        return self._take(cells)

    def _stretch(self, width: int) -> None:
        missing = width - len(self._picks)
        if missing > 0:
            self._picks += [ZERO] * missing
            self._take = None


@dataclass(frozen=True, slots=True)
class Merged:
    """The numbers of all workers at one moment."""

    cells: list[float]
    places: dict[Definition, dict[tuple[str, ...], int]]
    sources: Sequence[Source]
    exemplars: dict[Definition, Exemplars]
    """The newest of each cell."""
    several: bool

    def numbers(self, definition: Definition) -> Numbers:
        """Those of one family."""
        exemplars = self.exemplars.get(definition, {})
        series, live = self.places.get(definition, {}), definition.mode == "live"
        if live and not self.several:
            series = {values[:-1]: at for values, at in series.items()}
        return Numbers(self.cells, series, exemplars, live and self.several)

    def strangers(self, known: Container[str]) -> Iterator[Definition]:
        """The families that this worker does not know by name. One that others define differently
        is as the worker that started last has it.
        """
        found: dict[str, Definition] = {}
        for source in sorted(self.sources, key=lambda source: source.header.started):
            for definition in source.index.definitions:
                if definition is not None and definition.name not in known:
                    found[definition.name] = definition
        return (definition for definition in found.values() if self.places.get(definition))


def _exemplars(sources: Sequence[Source]) -> dict[Definition, Exemplars]:
    found: dict[Definition, Exemplars] = {}
    for source in sources:
        for series, place, exemplar in source.index.exemplars(source.data):
            family = found.setdefault(series.definition, {})
            known = family.get((series.values, place))
            if known is None or known.when < exemplar.when:
                family[series.values, place] = exemplar
    return found
