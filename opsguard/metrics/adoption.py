"""Users' own metrics of `prometheus_client`, kept in our store: right across workers.

A counter, gauge, histogram or summary that is registered in an adopted registry becomes a family of
:class:`opsguard.metrics.Metrics`. The metric object stays what it was: its values are cells of the
store from then on (`cells`), with what they had counted, and its own `collect()` reads them. So
nothing in the app changes, and `/metrics` can add up the workers.

How it is done: the registry tells of metrics that come and go, as `register` and `unregister` are
shadowed on that one object; the dict in which a metric with labels keeps its children tells of
children. A value alone cannot: `values.ValueClass`, which makes them, is told neither the registry
nor the bounds of a histogram, and two registries may have metrics of one name that must not share
their numbers. All of this is private to `prometheus_client` (see `shapes`): a metric that is kept
in another way than we know is left as it is, and that is said once.

Adoption is process-wide and belongs to the first that asks for it. In a process where
`prometheus_client` keeps its own files (``PROMETHEUS_MULTIPROC_DIR``) nothing is adopted.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence

from prometheus_client import REGISTRY, CollectorRegistry, values
from prometheus_client.registry import Collector
from prometheus_client.values import MutexValue

from opsguard.exceptions import DeclarationError
from opsguard.metrics import Metrics
from opsguard.metrics.crew import collectors_of
from opsguard.metrics.loans import PATIENCE, TAKEN, Loan
from opsguard.metrics.shapes import Asked, Shape, Unreachable, called, shape_of

__all__ = ["Adoption", "Beside", "adopt", "covers", "current", "release"]

_CURRENT: dict[str, Adoption] = {}
_FORKS_WATCHED: list[bool] = []

_UNKNOWN = (
    "prometheus_client keeps {} in another way than known ({}): "
    "/metrics shows the numbers of the worker that answers"
)


class Adoption:
    """The metrics that are adopted, and their way back. Made by :func:`adopt`; thread-safe; a
    forked child inherits it, and counts from zero.
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
        self._loans: dict[int, Loan] = {}
        self._watched: list[_Watched] = []
        self._before: memoryview[float] | None = None

    def watch(self, registry: CollectorRegistry) -> None:
        """Adopt what is registered there, now and later."""
        if any(watched.registry is registry for watched in self._watched):
            return
        self._watched.append(_Watched(registry, self))
        for collector in collectors_of(registry, PATIENCE):
            self.take(collector)

    def take(self, collector: Collector) -> None:
        """Adopt one metric, if it is one that can be. Never raises."""
        try:
            shape = shape_of(collector)
            if shape is not None:
                self._lend(collector, shape)
        except DeclarationError:
            self.say(TAKEN.format(called(collector)))
        except (AttributeError, Unreachable) as error:
            self.say(_UNKNOWN.format(called(collector), error))
        except Exception as error:
            self.failed("adoption", error)

    def _lend(self, collector: Collector, shape: Shape) -> None:
        loan = Loan(collector, shape, self)
        if self._loans.setdefault(id(collector), loan) is not loan:
            return
        try:
            loan.begin()
        except BaseException as error:
            del self._loans[id(collector)]
            loan.end()
            if not isinstance(error, Asked):
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
