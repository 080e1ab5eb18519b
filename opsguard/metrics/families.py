"""Families: a metric with its label names, its series in the store, and its text.

A family knows how many label sets it may have. The one after the last goes, with all that follow,
to one series whose label values are all ``<overflow>``, is counted, and is said once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from itertools import accumulate
from math import isfinite

from prometheus_client.core import Metric

from opsguard.metrics.store import Store, StoreFull

__all__ = ["OVERFLOW", "Family", "clean"]

OVERFLOW = "<overflow>"
_LONGEST = 1024
_Exemplar = tuple[dict[str, str], float, float]  # labels, value, seconds since the epoch


class Family:
    """One metric: `kind` is counter, gauge, histogram, summary or unknown; `buckets` are a
    histogram's upper bounds without +Inf.

    `at(labels)` gives the index of a series' first cell in `store.cells`. Cells of a histogram:
    one for each bucket (not cumulative), one for +Inf, the sum; of a summary: the count, the sum.
    Thread-safe.
    """

    __slots__ = (
        "_form",
        "_id",
        "_idle",
        "_overflowed",
        "_series",
        "buckets",
        "exemplars",
        "functions",
        "help",
        "kind",
        "labels",
        "limit",
        "name",
        "on_overflow",
        "store",
        "unit",
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
        self.unit = ""
        self.on_overflow = on_overflow
        self.width = len(buckets) + 2 if kind in ("histogram", "summary") else 1
        self.exemplars: dict[tuple[tuple[str, ...], int], _Exemplar] = {}
        self.functions: dict[tuple[str, ...], Callable[[], float]] = {}
        self._series: dict[tuple[str, ...], int] = {}
        self._idle: dict[tuple[str, ...], int] = {}
        self._form = ",".join([f'{label}="%s"' for label in labels])
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
        """Stop exposing a series. Its cells stay taken, as an index handed out must stay harmless,
        and wait for the same label values: who clears and sets the same ones again and again needs
        no more room.
        """
        values = cleaned(values)
        with self.store.lock:
            if values in self._series:
                self._idle[values] = self._series.pop(values)
                self._thin_out()
            self.functions.pop(values, None)
            for place in range(self.width):
                self.exemplars.pop((values, place), None)

    def forget_all(self) -> None:
        with self.store.lock:
            self._idle |= self._series
            self._thin_out()
            self._series = {}
            self.functions = {}
            self.exemplars = {}

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
        """
        values = cleaned(values)
        if values in self._series:
            texts = {name: clean(text) for name, text in labels.items()}
            self.exemplars[values, place] = (texts, value, now)

    def expose(self, openmetrics: bool) -> tuple[str, str]:
        """(family name, its finished text block) in the Prometheus text or OpenMetrics format."""
        name, kind = self.name, self.kind
        if kind == "counter" and openmetrics:
            name = name.removesuffix("_total")
        if kind == "unknown" and not openmetrics:
            kind = "untyped"
        text = self.help.replace("\\", "\\\\").replace("\n", "\\n")
        if openmetrics:
            text = text.replace('"', '\\"')
        lines = [f"# HELP {name} {text}\n# TYPE {name} {kind}\n"]
        if openmetrics and self.unit and name.endswith(f"_{self.unit}"):
            lines.append(f"# UNIT {name} {self.unit}\n")
        lines += self._histograms(openmetrics) if self.width > 1 else self._values(openmetrics)
        return name, "".join(lines)

    def collect(self) -> Metric:
        """The family as prometheus_client knows it, for registries and push gateways."""
        self._ask()
        cells = self.store.cells
        name = self.name.removesuffix("_total") if self.kind == "counter" else self.name
        metric = Metric(name, self.help, self.kind)
        for values, at in list(self._series.items()):
            labels = dict(zip(self.labels, values, strict=True))
            if self.width == 1:
                metric.add_sample(self.name, labels, cells[at])
                continue
            bounds = self._bounds()
            counts = list(accumulate(cells[at : at + self.width - 1]))
            for bound, count in zip(bounds, counts, strict=False):
                metric.add_sample(f"{self.name}_bucket", {**labels, "le": bound}, count)
            metric.add_sample(f"{self.name}_count", labels, counts[-1])
            metric.add_sample(f"{self.name}_sum", labels, cells[at + self.width - 1])
        return metric

    def _find(self, values: tuple[str, ...]) -> int:
        with self.store.lock:
            warned = self._overflowed
            found = self._series.get(values)
            if found is None:
                found = self._add(values)
            warn = self._overflowed and not warned
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
        self._series[values] = at
        return at

    def _make(self, values: tuple[str, ...]) -> int:
        if self._id is None:
            self._id = self.store.family(
                {
                    "name": self.name,
                    "type": self.kind,
                    "help": self.help,
                    "labels": self.labels,
                    "buckets": self.buckets,
                }
            )
        return self.store.series(self._id, values, self.width)

    def _values(self, openmetrics: bool) -> Iterator[str]:
        self._ask()
        cells = self.store.cells
        for values, at in list(self._series.items()):
            pairs = self._pairs(values)
            braces = f"{{{pairs}}}" if pairs else ""
            exemplar = self._exemplar(values, 0) if openmetrics and self.kind == "counter" else ""
            yield f"{self.name}{braces} {number(cells[at])}{exemplar}\n"

    def _ask(self) -> None:
        """Set the cells that a function stands for."""
        for values, function in list(self.functions.items()):
            self.store.cells[self.at(values)] = float(function())

    def _histograms(self, openmetrics: bool) -> Iterator[str]:
        """Thousands of series are usual here: one replacement and one formatting for each."""
        cells, width, name = self.store.cells, self.width, self.name
        bounds = self._bounds()
        buckets = "".join([f'{name}_bucket{{\0le="{bound}"}} %d\n' for bound in bounds])
        totals = f"{name}_count\1 %d\n{name}_sum\1 %s\n"
        for values, at in list(self._series.items()):
            pairs = self._pairs(values).replace("%", "%%")
            inside, braces = (f"{pairs},", f"{{{pairs}}}") if pairs else ("", "")
            counts = tuple(accumulate(map(int, cells[at : at + width - 1])))
            if openmetrics and self.exemplars:
                yield from self._bucket_lines(values, bounds, counts)
            else:
                yield buckets.replace("\0", inside) % counts[: len(bounds)]
            yield totals.replace("\1", braces) % (counts[-1], number(cells[at + width - 1]))

    def _bounds(self) -> list[str]:
        """The values of `le`; a summary has none."""
        if self.kind == "summary":
            return []
        return [number(bound) for bound in self.buckets] + ["+Inf"]

    def _bucket_lines(
        self, values: tuple[str, ...], bounds: list[str], counts: tuple[int, ...]
    ) -> Iterator[str]:
        pairs = "".join([f"{pair}," for pair in (self._pairs(values),) if pair])
        for place, (bound, count) in enumerate(zip(bounds, counts, strict=True)):
            exemplar = self._exemplar(values, place)
            yield f'{self.name}_bucket{{{pairs}le="{bound}"}} {count}{exemplar}\n'

    def _exemplar(self, values: tuple[str, ...], place: int) -> str:
        found = self.exemplars.get((values, place))
        if found is None:
            return ""
        labels, value, when = found
        pairs = ",".join([f'{name}="{escape(text)}"' for name, text in labels.items()])
        return f" # {{{pairs}}} {number(value)} {when:.3f}"

    def _pairs(self, values: tuple[str, ...]) -> str:
        text = "".join(values)
        if '"' in text or "\\" in text or "\n" in text:
            values = tuple([escape(value) for value in values])
        return self._form % values


def clean(value: object) -> str:
    """`value` as a label value that no scrape can break on: text, at most 1,024 characters, no NUL,
    nothing that UTF-8 cannot encode.
    """
    try:
        text = value if type(value) is str else str(value)
    except Exception:  # a label value's own __str__
        return "<unprintable>"
    if len(text) > _LONGEST:
        text = text[: _LONGEST - 1] + "…"
    if text.isascii() and text.isprintable():
        return text
    text = text.encode("utf-8", "replace").decode("utf-8")
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}")


def cleaned(values: tuple[str, ...]) -> tuple[str, ...]:
    """The label values cleaned: the same tuple where all are clean, as families share it then."""
    made = tuple([clean(value) for value in values])
    return values if made == values else made


def escape(text: str) -> str:
    """A label value between its quotes, in both formats."""
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def number(value: float) -> str:
    """A sample value in both formats."""
    if isfinite(value):
        return repr(float(value))
    return "NaN" if value != value else "+Inf" if value > 0 else "-Inf"
