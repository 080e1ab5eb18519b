"""Users' own metrics of `prometheus_client`, kept in our store: right across workers.

A counter, gauge, histogram or summary that is registered in an adopted registry becomes a family of
:class:`opsguard.metrics.Metrics`. The metric object stays what it was: its values are cells of the
store from then on (`cells`), with what they had counted, and its own `collect()` reads them. So
nothing in the app changes, and `/metrics` can add up the workers.

How it is done: the registry tells of metrics that come and go, as `register` and `unregister` are
shadowed on that one object; the dict in which a metric with labels keeps its children tells of
children. A value alone cannot: `values.ValueClass`, which makes them, is told neither the registry
nor the bounds of a histogram, and two registries may have metrics of one name that must not share
their numbers.

All of this is private to `prometheus_client`, so each attribute is asked for before a metric is
touched. A metric where one is missing is left as it is, and that is said once.

Adoption is process-wide and belongs to the first that asks for it. In a process where
`prometheus_client` keeps its own files (``PROMETHEUS_MULTIPROC_DIR``) nothing is adopted.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from inspect import signature
from typing import Any, NamedTuple

from prometheus_client import (
    REGISTRY,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Summary,
    values,
)
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.registry import Collector
from prometheus_client.values import MutexValue

from opsguard.exceptions import DeclarationError
from opsguard.metrics import Metrics
from opsguard.metrics.cells import give_back, is_plain, take
from opsguard.metrics.crew import collectors_of
from opsguard.metrics.families import OVERFLOW, Family
from opsguard.metrics.instruments import check_buckets, check_names

__all__ = ["Adoption", "Beside", "adopt", "covers", "current", "release"]

_KINDS: dict[type[MetricWrapperBase], str] = {
    Counter: "counter",
    Gauge: "gauge",
    Histogram: "histogram",
    Summary: "summary",
}
_MODES = {"all": "live", "mostrecent": "latest"}
"""prometheus_client's word for a gauge's mode (without "live" before it): ours."""
_METHODS = ("collect", "clear", "_metric_init", "_samples", "_multi_samples", "_child_samples")
"""What a subclass must not have changed: its samples would not be those of its values."""
_PATIENCE = 1.0
_GAUGES_HAVE_MODES = "mode" in signature(Metrics.family).parameters
_CURRENT: dict[str, Adoption] = {}
_FORKS_WATCHED: list[bool] = []

_TAKEN = "{} of prometheus_client has the name of one of opsguard's metrics, which is shown"
_FULL = "metric {} has reached its {} label sets; further ones are counted together as {}"
_UNKNOWN = (
    "prometheus_client keeps {} in another way than known ({}): "
    "/metrics shows the numbers of the worker that answers"
)


class _Unreachable(Exception):
    """The numbers of a metric are not where we look for them."""


class _Function(Exception):
    """A gauge asks a function, so there is no number to keep."""


class _Shape(NamedTuple):
    """A metric in the words of a family."""

    name: str
    help: str
    kind: str
    labels: tuple[str, ...]
    buckets: tuple[float, ...]
    mode: str
    """Of a gauge."""


class Adoption:
    """The metrics that are adopted, and their way back. Made by :func:`adopt`; thread-safe; a
    forked child inherits it, and its cells begin with zero.
    """

    def __init__(
        self,
        metrics: Metrics,
        failed: Callable[[str, BaseException | None], None],
        log: logging.Logger,
    ) -> None:
        self.metrics = metrics
        self.failed = failed
        self._log = log
        self._said: set[str] = set()
        self._unsaid: list[str] = []
        self._loans: dict[int, _Loan] = {}
        self._watched: list[_Watched] = []
        self._before: memoryview[float] | None = None

    def watch(self, registry: CollectorRegistry) -> None:
        """Adopt what is registered there, now and later."""
        if any(watched.registry is registry for watched in self._watched):
            return
        self._watched.append(_Watched(registry, self))
        for collector in collectors_of(registry, _PATIENCE):
            self.take(collector)

    def take(self, collector: Collector) -> None:
        """Adopt one metric, if it is one that can be. Never raises."""
        try:
            shape = _shape(collector)
            if shape is not None:
                self._lend(collector, shape)
        except DeclarationError:
            self.say(_TAKEN.format(_called(collector)))
        except (AttributeError, _Unreachable) as error:
            self.say(_UNKNOWN.format(_called(collector), error))
        except Exception as error:
            self.failed("adoption", error)

    def _lend(self, collector: Collector, shape: _Shape) -> None:
        loan = _Loan(collector, shape, self)
        if self._loans.setdefault(id(collector), loan) is not loan:
            return
        try:
            loan.begin()
        except BaseException as error:
            del self._loans[id(collector)]
            loan.end()
            if not isinstance(error, _Function):
                raise

    def covers(self, collector: Collector) -> bool:
        """Whether a family of ours speaks for this collector."""
        loan = self._loans.get(id(collector))
        return loan is not None and loan.metric is collector

    def leave(self, collector: Collector) -> None:
        """Give one metric its numbers back. Never raises; idempotent."""
        loan = self._loans.pop(id(collector), None)
        if loan is not None:
            try:
                loan.end()
            except Exception as error:
                self.failed("adoption", error)

    def end(self) -> None:
        """Give all back, and leave the registries as they were."""
        for watched in self._watched:
            watched.end()
        for loan in list(self._loans.values()):
            self.leave(loan.metric)

    def before_fork(self) -> None:
        """Hold on to the numbers as they are: the child gets cells with zeros."""
        self._before = self.metrics.store.cells

    def after_fork_in_parent(self) -> None:
        self._before = None

    def after_fork_in_child(self) -> None:
        """What a gauge was set to before the fork is so in the child as well, as ever in Python: a
        version, a flag. A gauge that is a sum, like a counter, stays with the parent that counted.
        """
        before, self._before = self._before, None
        cells = self.metrics.store.cells
        if before is None or before is cells:
            return
        for loan in list(self._loans.values()):
            for first, count in loan.inherited():
                cells[first : first + count] = before[first : first + count]

    def expose(self, openmetrics: bool) -> Iterator[tuple[str, str]]:
        """The families that are lent: (name, finished text)."""
        names = self.metrics.lent()
        for name, text in self.metrics.expose(openmetrics):
            if name in names or f"{name}_total" in names:
                yield name, text

    def say(self, message: str) -> None:
        """Warn once."""
        if message not in self._said:
            self._said.add(message)
            self._log.warning("%s", message)

    def say_later(self, message: str) -> None:
        """Warn once, at the next scrape: a lock of a metric is held now, which a log handler that
        counts lines may want.
        """
        if message not in self._said and message not in self._unsaid:
            self._unsaid.append(message)

    def say_now(self) -> None:
        """Say what was put off."""
        unsaid, self._unsaid = self._unsaid, []
        for message in unsaid:
            self.say(message)


class Beside:
    """The adopted metrics on the page of an OpsGuard: a source of the exposition. `known` are the
    other sources of the page, of which one may have them already.
    """

    def __init__(self, known: Sequence[Metrics]) -> None:
        self._known = tuple(known)

    def expose(self, openmetrics: bool) -> Iterable[tuple[str, str]]:
        adoption = current()
        if adoption is None:
            return ()
        adoption.say_now()
        if any(metrics is adoption.metrics for metrics in self._known):
            return ()
        return adoption.expose(openmetrics)


class _Watched:
    """A registry that tells of what comes and goes."""

    def __init__(self, registry: CollectorRegistry, adoption: Adoption) -> None:
        self.registry = registry
        self._adoption: Adoption | None = adoption
        self._register = registry.register
        self._unregister = registry.unregister
        self._hooks: dict[str, object] = {"register": self.register, "unregister": self.unregister}
        for name, hook in self._hooks.items():
            setattr(registry, name, hook)

    def register(self, collector: Collector) -> None:
        self._register(collector)
        if self._adoption is not None:
            self._adoption.take(collector)

    def unregister(self, collector: Collector) -> None:
        self._unregister(collector)
        if self._adoption is not None:
            self._adoption.leave(collector)

    def end(self) -> None:
        """Stop. A hook that somebody else has wrapped meanwhile stays, and does nothing more."""
        self._adoption = None
        for name, hook in self._hooks.items():
            if vars(self.registry).get(name) is hook:
                delattr(self.registry, name)


class _Loan:
    """One metric whose numbers live in a family of ours."""

    def __init__(self, metric: Any, shape: _Shape, adoption: Adoption) -> None:
        self.metric = metric
        self._shape = shape
        self._adoption = adoption
        self._family: Family | None = None

    def begin(self) -> None:
        """Take the values over. Raises DeclarationError if the name is taken, _Unreachable."""
        with _held(self.metric):
            present = self._present()
            for child in present.values():
                _values(self._shape.kind, child)  # all of them, or none is touched
            name, help, kind, labels, buckets, mode = self._shape
            options: dict[str, Any] = {"mode": mode} if mode and _GAUGES_HAVE_MODES else {}
            self._family = self._adoption.metrics.lend(
                name, help, kind, labels, buckets, recall=self._recalled, **options
            )
            self._family.unit = self.metric._unit
            for label_values, child in present.items():
                self.bind(label_values, child)
            if labels:
                self.metric._metrics = _Children(self, present)
                self.metric.clear = self._clear

    def bind(self, label_values: tuple[str, ...], child: Any) -> None:
        """Put the values of one child into cells."""
        family = self._family
        if family is None:
            return
        found = _values(self._shape.kind, child)
        at = family.at(label_values)
        own = label_values in family
        if not own:
            label_values = (OVERFLOW,) * len(family.labels)
            self._adoption.say_later(_FULL.format(family.name, family.limit, OVERFLOW))
        for place, value in enumerate(found):
            take(value, family, label_values, at, place, own=own)
        if self._shape.kind == "gauge":
            child.set_function = partial(self._function_set, child)

    def unbind(self, label_values: tuple[str, ...], child: Any) -> None:
        """The metric has dropped this child; whoever holds it goes on counting to itself."""
        if self._family is not None:
            self._return(child)
            self._family.forget(label_values)

    def inherited(self) -> Iterator[tuple[int, int]]:
        """(first, number) of the cells that a forked child goes on with."""
        family = self._family
        if family is not None and self._shape.mode not in ("", "sum"):
            for at in family.indexes():
                yield at, family.width

    def end(self) -> None:
        """Give the values back, with their numbers."""
        family, self._family = self._family, None
        if family is None:
            return
        try:
            with _held(self.metric):
                for child in self._present().values():
                    self._return(child)
                if family.labels:
                    self.metric._metrics = self._present()
                    vars(self.metric).pop("clear", None)
        finally:
            self._adoption.metrics.take_back(family.name)

    def _present(self) -> dict[tuple[str, ...], Any]:
        return dict(self.metric._metrics) if self._shape.labels else {(): self.metric}

    def _return(self, child: Any) -> None:
        for value in _parts(self._shape.kind, child):
            give_back(value)
        vars(child).pop("set_function", None)

    def _clear(self) -> None:
        metric, family = self.metric, self._family
        if family is None:
            type(metric).clear(metric)
            return
        with _held(metric):
            dropped, metric._metrics = self._present(), _Children(self, {})
            for child in dropped.values():
                self._return(child)
            family.forget_all()

    def _recalled(self) -> None:
        self._adoption.leave(self.metric)
        self._adoption.say(_TAKEN.format(_called(self.metric)))

    def _function_set(self, child: Any, function: Callable[[], float]) -> None:
        # A function cannot be asked in another process: the worker that answers asks its own.
        self._adoption.leave(self.metric)
        type(child).set_function(child, function)


class _Children(dict[tuple[str, ...], Any]):
    """The children of a metric by their label values. `prometheus_client` changes it under the
    metric's lock, in the ways that are overridden here.
    """

    __slots__ = ("_loan",)

    def __init__(self, loan: _Loan, children: dict[tuple[str, ...], Any]) -> None:
        super().__init__(children)
        self._loan = loan

    def __setitem__(self, label_values: tuple[str, ...], child: Any) -> None:
        try:
            self._loan.bind(label_values, child)
        except Exception as error:
            self._loan._adoption.failed("adoption", error)
        super().__setitem__(label_values, child)

    def __delitem__(self, label_values: tuple[str, ...]) -> None:
        self.pop(label_values)

    def pop(self, label_values: tuple[str, ...], *default: Any) -> Any:
        there = label_values in self
        child = super().pop(label_values, *default)
        if there:
            self._loan.unbind(label_values, child)
        return child


def adopt(
    metrics: Metrics,
    failed: Callable[[str, BaseException | None], None],
    registries: Sequence[CollectorRegistry] = (REGISTRY,),
) -> None:
    """Keep the numbers of what is registered there, now and later, in the store of `metrics`.

    Only the first call in a process does something, until :func:`release`. `failed(site, error)`
    hears of faults of ours.
    """
    if values.ValueClass is not MutexValue:  # PROMETHEUS_MULTIPROC_DIR, or a class of the app's
        return
    made = Adoption(metrics, failed, logging.getLogger("opsguard"))
    if _CURRENT.setdefault("adoption", made) is made:
        _watch_forks()
        for registry in registries:
            made.watch(registry)


def current() -> Adoption | None:
    """The adoption of this process."""
    return _CURRENT.get("adoption")


def release() -> None:
    """Undo :func:`adopt`: metrics keep their numbers, registries are as they were. For tests."""
    adoption = _CURRENT.pop("adoption", None)
    if adoption is not None:
        adoption.end()


def covers(collector: Collector) -> bool:
    """Whether a family of ours speaks for this collector."""
    adoption = _CURRENT.get("adoption")
    return adoption is not None and adoption.covers(collector)


def _shape(collector: Any) -> _Shape | None:
    """The family that a collector would be, or None for one that is left as it is.

    Raises AttributeError if prometheus_client keeps it in another way than we know.
    """
    base: Any = next((one for one in _KINDS if isinstance(collector, one)), None)
    if base is None or any(getattr(type(collector), n) is not getattr(base, n) for n in _METHODS):
        return None
    metric: Any = collector
    kind, labels = _KINDS[base], tuple(metric._labelnames)
    name = f"{metric._name}_total" if kind == "counter" else metric._name
    buckets: tuple[float, ...] = ()
    mode = ""
    try:
        check_names(name, labels)
        if kind == "histogram":
            buckets = check_buckets(name, metric._upper_bounds)
    except DeclarationError:  # UTF-8 names, bounds that are there twice
        return None
    if kind == "gauge":
        mode = metric._multiprocess_mode.removeprefix("live")
        mode = _MODES.get(mode or "all", mode)
        if mode == "live" and "worker" in labels:  # the label that will tell the workers apart
            return None
    if buckets and buckets[0] < 0:  # such a histogram has no sum
        return None
    return _Shape(name, metric._documentation, kind, labels, buckets, mode)


def _watch_forks() -> None:
    """Once in a process: what is registered there cannot be taken back."""
    if _FORKS_WATCHED or not hasattr(os, "register_at_fork"):
        return
    _FORKS_WATCHED.append(True)

    def tell(step: Callable[[Adoption], None]) -> Callable[[], None]:
        def hook() -> None:
            adoption = current()
            if adoption is not None:
                step(adoption)

        return hook

    os.register_at_fork(
        before=tell(Adoption.before_fork),
        after_in_parent=tell(Adoption.after_fork_in_parent),
        after_in_child=tell(Adoption.after_fork_in_child),
    )


def _called(collector: Any) -> str:
    return f"{type(collector).__name__} {getattr(collector, '_name', '?')}"


def _parts(kind: str, child: Any) -> list[Any]:
    """The values of a child, in the order of a family's cells."""
    if kind == "histogram":
        return [*child._buckets, child._sum]
    return [child._count, child._sum] if kind == "summary" else [child._value]


def _values(kind: str, child: Any) -> list[Any]:
    if "_child_samples" in vars(child):  # set_function: there is no value
        raise _Function
    found = _parts(kind, child)
    for value in found:
        if not is_plain(value):
            raise _Unreachable(f"a value is a {type(value).__name__}")
    return found


@contextmanager
def _held(metric: Any) -> Iterator[None]:
    """Hold the lock of a metric with labels; never for ever, as a fork may have left it held."""
    lock = metric._lock if metric._labelnames else None
    if lock is not None and not lock.acquire(timeout=_PATIENCE):
        raise _Unreachable("its lock is held")
    try:
        yield
    finally:
        if lock is not None:
            lock.release()
