"""`ops.metrics.counter`, `gauge`, `histogram`: the API of prometheus_client over the store.

An instrument without label names is its own only series; with label names `labels(...)` gives one.
All are safe in threads: under the GIL an addition is one step, without it it is done under the
store's lock (see `store`). After a fork the child counts from zero in its own file.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from itertools import pairwise
from typing import Any, Generic, ParamSpec, TypeVar

from opsguard.accelerator import limits
from opsguard.clock import Clock, elapsed, wall
from opsguard.exceptions import DeclarationError
from opsguard.metrics.definitions import LABEL, MODES, MOST_BUCKETS, NAME
from opsguard.metrics.families import Family, clean

__all__ = ["Counter", "Gauge", "Histogram"]

P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S", bound="_Series")

DURATION_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
"""Seconds; the defaults of prometheus_client."""


class _Series:
    """One label set of a family; `at` is its first cell."""

    __slots__ = ("_at", "_family", "_store", "_values")

    def __init__(self, family: Family, values: tuple[str, ...]) -> None:
        self._family = family
        self._store = family.store
        self._values = values
        self._at = family.at(values)

    def _keep_exemplar(self, place: int, value: float, exemplar: Mapping[str, str]) -> None:
        self._family.keep_exemplar(self._values, place, exemplar, value, wall())


class CounterSeries(_Series):
    """A number that only grows."""

    __slots__ = ()

    def inc(self, amount: float = 1.0, exemplar: Mapping[str, str] | None = None) -> None:
        """Add `amount`, at least 0. Raises ValueError for a negative amount or NaN; and, after it
        has added, for an exemplar that OpenMetrics does not allow: a label's name is letters,
        digits and _, all names and values together are at most 128 characters.
        """
        amount = float(amount)
        if not amount >= 0.0:
            raise ValueError("a counter only grows: the amount must be at least 0")
        with self._store.exclusive:
            self._store.cells[self._at] += amount
        if exemplar is not None:
            self._keep_exemplar(0, amount, exemplar)

    @property
    def one(self) -> Callable[[], None]:
        """The function that adds 1, for whoever does that on each request."""
        if limits is None:
            return self.inc
        tally: Callable[[], None] = limits.Tally(self._store, self._at)
        return tally

    @contextmanager
    def count_exceptions(
        self, exception: type[BaseException] | tuple[type[BaseException], ...] = Exception
    ) -> Generator[None]:
        """Add 1 for each exception of this type that leaves the block; it goes on."""
        try:
            yield
        except exception:
            self.inc()
            raise


class GaugeSeries(_Series):
    """A number that goes up and down. One of mode `latest` notes when it was set or changed."""

    __slots__ = ("_dated",)

    def __init__(self, family: Family, values: tuple[str, ...]) -> None:
        super().__init__(family, values)
        self._dated = family.definition.mode == "latest"

    def set(self, value: float) -> None:
        self._store.cells[self._at] = float(value)
        if self._dated:
            self._store.cells[self._at + 1] = wall()

    def inc(self, amount: float = 1.0) -> None:
        amount = float(amount)
        with self._store.exclusive:
            self._store.cells[self._at] += amount
        if self._dated:
            self._store.cells[self._at + 1] = wall()

    def dec(self, amount: float = 1.0) -> None:
        self.inc(-amount)

    def set_to_current_time(self) -> None:
        """Seconds since the epoch."""
        self.set(wall())

    def set_function(self, function: Callable[[], float]) -> None:
        """Ask `function` at each scrape. One that raises costs this metric that scrape."""
        self._family.functions[self._values] = function

    @contextmanager
    def track_inprogress(self) -> Generator[None]:
        self.inc()
        try:
            yield
        finally:
            self.dec()

    def time(self) -> Timer:
        """Set to the seconds that the block or the decorated function took."""
        return Timer(self.set)


class HistogramSeries(_Series):
    """Counts of observed values by upper bound, and their sum."""

    __slots__ = ("_bounds", "_total")

    def __init__(self, family: Family, values: tuple[str, ...]) -> None:
        super().__init__(family, values)
        self._bounds = family.buckets
        self._total = self._at + len(family.buckets) + 1

    def observe(self, amount: float, exemplar: Mapping[str, str] | None = None) -> None:
        """Count `amount` in its bucket. Raises ValueError for an exemplar as `CounterSeries.inc`
        does, after it has counted.
        """
        amount = float(amount)
        place = bisect_left(self._bounds, amount) if amount == amount else len(self._bounds)
        at, store = self._at + place, self._store
        if store.gil:  # no call from here on: each line is one step
            cells = store.cells
            cells[at] += 1.0
            cells[self._total] += amount
        else:
            with store.lock:
                store.cells[at] += 1.0
                store.cells[self._total] += amount
        if exemplar is not None:
            self._keep_exemplar(place, amount, exemplar)

    def time(self) -> Timer:
        """Observe the seconds that the block or the decorated function took."""
        return Timer(self.observe)


class Timer:
    """A context manager, and a decorator of plain functions, that hands over elapsed seconds."""

    __slots__ = ("_clock", "_record", "_started")

    def __init__(self, record: Callable[[float], None], clock: Clock = elapsed) -> None:
        self._record = record
        self._clock = clock
        self._started = 0.0

    def __enter__(self) -> Timer:
        self._started = self._clock()
        return self

    def __exit__(self, *_: object) -> None:
        self._record(max(0.0, self._clock() - self._started))

    def __call__(self, function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def timed(*args: P.args, **kwargs: P.kwargs) -> R:
            with Timer(self._record, self._clock):
                return function(*args, **kwargs)

        return timed


class _Instrument(Generic[S]):
    """What counters, gauges and histograms share: label names, series, removal."""

    _series_type: type[S]
    _made: dict[tuple[str, ...], S]

    def __init__(self, family: Family) -> None:
        self._family = family
        self._made = {}  # read without a lock; what is taken out leaves by a new dict

    @property
    def shape(self) -> tuple[tuple[str, ...], tuple[float, ...], str]:
        """Label names, bucket bounds, mode."""
        return self._family.labels, self._family.buckets, self._family.definition.mode

    def labels(self, *values: object, **named: object) -> S:
        """The series with these label values, by position or by name, each turned into text.

        Raises ValueError if they do not fit the label names.
        """
        given = values if not named else self._ordered(values, named)
        # As text: 1, 1.0 and True are equal as keys, and read differently.
        key = tuple([value if type(value) is str else clean(value) for value in given])
        found = self._made.get(key)
        return self._make(key) if found is None else found

    def remove(self, *values: object) -> None:
        """Forget one series. Raises nothing if it never was. Thread-safe: who has the series
        already counts for nobody, who asks for it again gets one from zero.
        """
        texts = tuple([clean(value) for value in values])
        with self._family.store.lock:  # one at a time, else one puts back what another took out
            self._family.forget(texts)
            made = self._made.copy()  # other threads add to it
            self._made = {key: one for key, one in made.items() if one._values != texts}

    def clear(self) -> None:
        """Forget all series. Thread-safe, as `remove` is."""
        with self._family.store.lock:
            self._family.forget_all()
            self._made = {}

    def _ordered(self, values: tuple[object, ...], named: dict[str, object]) -> tuple[object, ...]:
        names = self._family.labels
        if values or len(named) != len(names) or not all(name in named for name in names):
            raise ValueError(f"{self._family.name} has the labels {names}, not {tuple(named)}")
        return tuple([named[name] for name in names])

    def _make(self, key: tuple[str, ...]) -> S:
        if len(key) != len(self._family.labels):
            raise ValueError(
                f"{self._family.name} has the labels {self._family.labels}, got {len(key)} values"
            )
        # Remembered with those it was made beside: a `clear` in between has left them all behind.
        made = self._made
        series = self._series_type(self._family, tuple([clean(value) for value in key]))
        if len(made) < self._family.limit:
            made[key] = series
        return series

    @property
    def _only(self) -> S:
        return self.labels()


class Counter(_Instrument[CounterSeries]):
    """A count of events. Exposed under exactly the name it was given."""

    _series_type = CounterSeries

    def inc(self, amount: float = 1.0, exemplar: Mapping[str, str] | None = None) -> None:
        self._only.inc(amount, exemplar)

    def count_exceptions(
        self, exception: type[BaseException] | tuple[type[BaseException], ...] = Exception
    ) -> Any:
        return self._only.count_exceptions(exception)


class Gauge(_Instrument[GaugeSeries]):
    """A value that goes up and down."""

    _series_type = GaugeSeries

    def set(self, value: float) -> None:
        self._only.set(value)

    def inc(self, amount: float = 1.0) -> None:
        self._only.inc(amount)

    def dec(self, amount: float = 1.0) -> None:
        self._only.dec(amount)

    def set_to_current_time(self) -> None:
        self._only.set_to_current_time()

    def set_function(self, function: Callable[[], float]) -> None:
        self._only.set_function(function)

    def track_inprogress(self) -> Any:
        return self._only.track_inprogress()

    def time(self) -> Timer:
        return self._only.time()


class Histogram(_Instrument[HistogramSeries]):
    """The distribution of a value, by default of seconds."""

    _series_type = HistogramSeries

    def observe(self, amount: float, exemplar: Mapping[str, str] | None = None) -> None:
        self._only.observe(amount, exemplar)

    def time(self) -> Timer:
        return self._only.time()


def check_names(name: str, labels: Sequence[str]) -> None:
    """Raises DeclarationError for a name or label name that Prometheus would refuse."""
    if not NAME.fullmatch(name):
        raise DeclarationError(f"{name!r} is not a metric name: letters, digits, _ and : only")
    for label in labels:
        if not LABEL.fullmatch(label) or label == "le":
            raise DeclarationError(f"{label!r} is not a label name for {name}")
    if len(set(labels)) != len(labels):
        raise DeclarationError(f"{name} names a label twice: {tuple(labels)}")


def check_mode(name: str, mode: str, labels: Sequence[str]) -> None:
    """Raises DeclarationError for what is no mode of a gauge, or clashes with its label."""
    if mode not in MODES:
        raise DeclarationError(f"{mode!r} is not a mode for {name}: {', '.join(MODES)}")
    if mode == "live" and "worker" in labels:
        raise DeclarationError(f"{name} gets the label worker by its mode; it has one already")


def check_buckets(name: str, buckets: Sequence[float]) -> tuple[float, ...]:
    """The upper bounds without +Inf. Raises DeclarationError if they do not grow."""
    try:
        bounds = tuple([float(bound) for bound in buckets if bound != float("inf")])
    except (TypeError, ValueError):
        bounds = ()
    if not bounds or any(
        low >= high or low != low for low, high in pairwise((*bounds, float("inf")))
    ):
        raise DeclarationError(f"the buckets of {name} must grow: {tuple(buckets)}")
    if len(bounds) > MOST_BUCKETS:
        raise DeclarationError(f"{name} has {len(bounds)} buckets; {MOST_BUCKETS} are the most")
    return bounds
