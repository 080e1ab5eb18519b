"""Metrics: numbers in shared memory, instruments over them, HTTP metrics, the scrape."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import ParamSpec, TypeVar

from prometheus_client.core import Metric

from opsguard.exceptions import DeclarationError
from opsguard.metrics.definitions import Definition
from opsguard.metrics.families import Family
from opsguard.metrics.gathering import Gathering
from opsguard.metrics.http import UNMATCHED, HttpMetrics, RouteSeries
from opsguard.metrics.instruments import (
    DURATION_BUCKETS,
    Counter,
    Gauge,
    Histogram,
    check_buckets,
    check_mode,
    check_names,
)
from opsguard.metrics.merge import Merged
from opsguard.metrics.retired import Death, Interrupted
from opsguard.metrics.store import Store
from opsguard.metrics.text import collect, expose

__all__ = [
    "UNMATCHED",
    "Counter",
    "Death",
    "Gauge",
    "Histogram",
    "HttpMetrics",
    "Interrupted",
    "Metrics",
    "RouteSeries",
]

Kind = TypeVar("Kind", Counter, Gauge, Histogram)
T = TypeVar("T")
P = ParamSpec("P")


class Metrics:
    """`ops.metrics`: makes instruments, and knows every family for the scrape.

    Instruments may be declared at any time; declaring the same one again gives the first, so a
    module may be reloaded. Thread-safe. `limit` is the most label sets a family may have.
    Also a Collector of prometheus_client: ``registry.register(ops.metrics)`` works.

    What it tells is of all workers that share the store's directory. `manager` gives the pid of the
    process that starts them, which is no worker even if it has a file there.
    """

    def __init__(
        self,
        store: Store,
        *,
        limit: int = 2000,
        failed: Callable[[str, BaseException | None], None],
        manager: Callable[[], int] = lambda: 0,
    ) -> None:
        self.store = store
        self._limit = limit
        self._failed = failed
        self.died: Callable[[Death], None] = _nothing
        """Hears of each worker that was found dead without having closed its file."""
        self._gathering = Gathering(
            store,
            failed=failed,
            died=lambda death: self.died(death),
            limit=limit,
            manager=manager,
        )
        self._families: dict[str, Family] = {}
        self._instruments: dict[str, Counter | Gauge | Histogram] = {}
        self._lent: dict[str, Callable[[], None]] = {}
        self._overflow = self.family(
            "opsguard_series_overflow_total",
            "Label sets beyond the limit, counted together under <overflow>.",
            "counter",
            ("metric",),
        )
        self._overflow.on_overflow = None  # it would count itself for ever

    def counter(self, name: str, help: str = "", labels: Sequence[str] = ()) -> Counter:
        """A counter, exposed under exactly this name: as a counter if it ends in ``_total``, else
        untyped, since the formats know no counter of another name.

        Raises DeclarationError for a bad name, or if the name is taken by something else.
        """
        kind = "counter" if name.endswith("_total") else "unknown"
        return self._instrument(Counter, name, help, kind, tuple(labels))

    def gauge(
        self, name: str, help: str = "", labels: Sequence[str] = (), mode: str = "sum"
    ) -> Gauge:
        """A gauge. `mode` says what it shows of several workers: their "sum", "max" or "min", the
        "latest" that was set, or "live": each living worker's own, with the label `worker`.

        Raises DeclarationError like `counter`.
        """
        check_mode(name, mode, labels)
        return self._instrument(Gauge, name, help, "gauge", tuple(labels), mode=mode)

    def histogram(
        self,
        name: str,
        help: str = "",
        labels: Sequence[str] = (),
        buckets: Sequence[float] = DURATION_BUCKETS,
    ) -> Histogram:
        """A histogram with these upper bounds; +Inf is implied. Raises DeclarationError."""
        bounds = check_buckets(name, buckets)
        return self._instrument(Histogram, name, help, "histogram", tuple(labels), bounds)

    def family(
        self,
        name: str,
        help: str,
        kind: str,
        labels: tuple[str, ...],
        buckets: tuple[float, ...] = (),
        mode: str = "sum",
        unit: str = "",
    ) -> Family:
        """A family of our own. A counter renamed to a name without ``_total`` becomes unknown."""
        self._make_room(name)
        if kind == "counter" and not name.endswith("_total"):
            kind = "unknown"
        with self.store.lock:
            if name in self._families:
                raise DeclarationError(f"the metric {name} is declared twice")
            made = Family(
                self.store,
                name,
                help,
                kind,
                labels,
                buckets=buckets,
                mode=mode,
                unit=unit,
                limit=self._limit,
                on_overflow=self._count_overflow,
            )
            self._families[name] = made
        return made

    def lend(
        self,
        name: str,
        help: str,
        kind: str,
        labels: tuple[str, ...],
        buckets: tuple[float, ...] = (),
        mode: str = "sum",
        unit: str = "",
        *,
        recall: Callable[[], None],
    ) -> Family:
        """A family for a metric that is not ours: on the page, and not in `collect`, as a registry
        has it already. When an instrument of ours wants the name, `recall` is called, which has
        to `take_back` it; no lock is held then. `kind` may be ``summary``, `mode` is a gauge's.

        Raises DeclarationError for a name that is taken.
        """
        with self.store.lock:
            if name in self._families:
                raise DeclarationError(f"the metric {name} is declared twice")
            made = self.family(name, help, kind, labels, buckets, mode, unit)
            made.silence()
            self._lent[name] = recall
        return made

    def take_back(self, name: str) -> None:
        """End a loan: the family is on the page no more. Idempotent."""
        with self.store.lock:
            if self._lent.pop(name, None) is not None:
                self._families.pop(name).forget_all()

    def lent(self) -> frozenset[str]:
        """The names of the families that are lent."""
        return frozenset(self._lent)

    def _make_room(self, name: str) -> None:
        recall = self._lent.get(name)
        if recall is not None:
            recall()

    def set_limit(self, limit: int) -> None:
        """The most label sets from now on, for the families there are and those to come."""
        self._limit = self._gathering.limit = limit
        for family in list(self._families.values()):
            family.limit = limit

    def tidy(self, directory: Path | None = None) -> None:
        """Add up what dead workers left, and say what they were serving. Never raises or waits.

        `directory` is where, for who has counted nothing yet and so has no file there.
        """
        self._gathering.tidy(directory)

    def leave(self, leaving: bool = True) -> None:
        """The process says that it ends, or that it goes on after all; see `Store.leave`."""
        self.store.leave(leaving)

    def workers(self) -> list[tuple[int, int]]:
        """(number, pid) of each living worker, this one among them, as the last page saw them."""
        return self._gathering.workers()

    def expose(self, openmetrics: bool) -> Iterator[tuple[str, str]]:
        """(family name, finished text) of every family that has a series. A family that fails (a
        gauge's function raised) is left out and counted; so are all while the other workers cannot
        be read, as a part of the sums would be wrong.
        """
        return self._each(
            lambda family, merged: family.expose(openmetrics, merged),
            lambda definition, merged: expose(definition, merged.numbers(definition), openmetrics),
        )

    def collect(self) -> Iterable[Metric]:
        """The families as prometheus_client knows them, those that `expose` has; without those that
        are lent.
        """
        return list(
            self._each(
                lambda family, merged: family.collect(merged),
                lambda definition, merged: collect(definition, merged.numbers(definition)),
                without=self.lent(),
            )
        )

    def _each(
        self,
        known: Callable[[Family, Merged | None], T],
        unknown: Callable[[Definition, Merged], T],
        without: frozenset[str] = frozenset(),
    ) -> Iterator[T]:
        """What one of the two makes of every family: of ours, and of those that only other workers
        have.
        """
        families = dict(self._families)
        for family in families.values():
            if not family.labels:  # there from the start, with 0
                self._guarded(family.name, family.at, ())
        try:
            merged = self._gathering.merged()
        except Exception as error:  # no number is a gap; our own alone would be a fall
            self._failed("collector:workers", error)
            return
        for family in families.values():
            if family.name in without:
                continue
            if len(family) or (merged is not None and merged.places.get(family.definition)):
                made = self._guarded(family.name, known, family, merged)
                if made is not None:
                    yield made
        if merged is not None:
            for definition in merged.strangers(families):
                found = self._guarded(definition.name, unknown, definition, merged)
                if found is not None:
                    yield found

    def _guarded(self, name: str, make: Callable[P, T], *args: P.args, **no: P.kwargs) -> T | None:
        try:
            return make(*args, **no)
        except Exception as error:
            self._failed(f"collector:{name}", error)
            return None

    def _instrument(
        self,
        type_: type[Kind],
        name: str,
        help: str,
        kind: str,
        labels: tuple[str, ...],
        buckets: tuple[float, ...] = (),
        mode: str = "sum",
    ) -> Kind:
        check_names(name, labels)
        self._make_room(name)
        with self.store.lock:
            found = self._instruments.get(name)
            if found is None:
                made = type_(self.family(name, help, kind, labels, buckets, mode))
                self._instruments[name] = made
                return made
        if isinstance(found, type_) and found.shape == (labels, buckets, mode):
            return found
        raise DeclarationError(f"the metric {name} is declared twice, and differently")

    def _count_overflow(self, name: str) -> None:
        at = self._overflow.at((name,))
        with self.store.exclusive:
            self.store.cells[at] += 1.0


def _nothing(death: Death) -> None:
    return None
