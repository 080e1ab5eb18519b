"""One metric of `prometheus_client` whose numbers live in a family of ours, from begin to end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from opsguard.metrics.cells import give_back, take
from opsguard.metrics.families import OVERFLOW, Family
from opsguard.metrics.shapes import Shape, Unreachable, called, parts, plain_values

if TYPE_CHECKING:
    from opsguard.metrics.adoption import Adoption

__all__ = ["PATIENCE", "TAKEN", "Loan"]

PATIENCE = 1.0
"""Seconds to wait for a lock of `prometheus_client`."""
TAKEN = "{} of prometheus_client is not shown: one of opsguard's metrics has its name"
_FULL = "metric {} has reached its {} label sets; further ones are counted together as {}"


class Loan:
    """One metric whose numbers live in a family of ours."""

    def __init__(self, metric: Any, shape: Shape, adoption: Adoption) -> None:
        self.metric = metric
        self._shape = shape
        self.adoption = adoption
        self._family: Family | None = None

    def begin(self) -> None:
        """Take the values over. Raises DeclarationError if the name is taken, Unreachable."""
        with _held(self.metric):
            present = self._present()
            for child in present.values():
                plain_values(self._shape.kind, child)  # all of them, or none is touched
            self._family = self.adoption.metrics.lend(*self._shape, recall=self._recalled)
            for label_values, child in present.items():
                self.bind(label_values, child)
            if self._shape.labels:
                self.metric._metrics = _Children(self, present)
                self.metric.clear = self._clear

    def bind(self, label_values: tuple[str, ...], child: Any) -> None:
        """Put the values of one child into cells."""
        family = self._family
        if family is None:
            return
        found = plain_values(self._shape.kind, child)
        at = family.at(label_values)
        own = label_values in family
        if not own:
            label_values = (OVERFLOW,) * len(family.labels)
            self.adoption.say_later(_FULL.format(family.name, family.limit, OVERFLOW))
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
        if family is not None and self._shape.mode != "sum":
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
            self.adoption.metrics.take_back(family.name)

    def _present(self) -> dict[tuple[str, ...], Any]:
        return dict(self.metric._metrics) if self._shape.labels else {(): self.metric}

    def _return(self, child: Any) -> None:
        for value in parts(self._shape.kind, child):
            give_back(value)
        vars(child).pop("set_function", None)

    def _clear(self) -> None:
        metric, family = self.metric, self._family
        if family is None:
            type(metric).clear(metric)
            return
        with metric._lock:
            dropped, metric._metrics = self._present(), _Children(self, {})
            for child in dropped.values():
                self._return(child)
            family.forget_all()

    def _recalled(self) -> None:
        self.adoption.leave(self.metric)
        self.adoption.say(TAKEN.format(called(self.metric)))

    def _function_set(self, child: Any, function: Callable[[], float]) -> None:
        # A function cannot be asked in another process: the worker that answers asks its own.
        self.adoption.leave(self.metric)
        type(child).set_function(child, function)


class _Children(dict[tuple[str, ...], Any]):
    """The children of a metric by their label values. `prometheus_client` changes it under the
    metric's lock, in the ways that are overridden here.
    """

    __slots__ = ("_loan",)

    def __init__(self, loan: Loan, children: dict[tuple[str, ...], Any]) -> None:
        super().__init__(children)
        self._loan = loan

    def __setitem__(self, label_values: tuple[str, ...], child: Any) -> None:
        try:
            self._loan.bind(label_values, child)
        except Exception as error:
            self._loan.adoption.failed("adoption", error)
        super().__setitem__(label_values, child)

    def __delitem__(self, label_values: tuple[str, ...]) -> None:
        self.pop(label_values)

    def pop(self, label_values: tuple[str, ...], *default: Any) -> Any:
        there = label_values in self
        child = super().pop(label_values, *default)
        if there:
            try:
                self._loan.unbind(label_values, child)
            except Exception as error:
                self._loan.adoption.failed("adoption", error)
        return child


@contextmanager
def _held(metric: Any) -> Iterator[None]:
    """Hold the lock of a metric with labels; never for ever, as a fork may have left it held."""
    lock = metric._lock if metric._labelnames else None
    if lock is not None and not lock.acquire(timeout=PATIENCE):
        raise Unreachable("its lock is held")
    try:
        yield
    finally:
        if lock is not None:
            lock.release()
