"""Metrics of `prometheus_client` in the words of a family: what can be kept in a store, and where a
metric has its numbers.

All of this is private to `prometheus_client`, so everything is asked for before a metric is
touched; what is missing is an AttributeError.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from prometheus_client import Counter, Gauge, Histogram, Summary
from prometheus_client.metrics import MetricWrapperBase

from opsguard.exceptions import DeclarationError
from opsguard.metrics.cells import is_plain
from opsguard.metrics.families import clean
from opsguard.metrics.instruments import check_buckets, check_names

__all__ = ["Asked", "Shape", "Unreachable", "called", "parts", "plain_values", "shape_of"]

_KINDS: dict[type[MetricWrapperBase], str] = {
    Counter: "counter",
    Gauge: "gauge",
    Histogram: "histogram",
    Summary: "summary",
}
_MODES = {"all": "live", "sum": "sum", "max": "max", "min": "min", "mostrecent": "latest"}
"""prometheus_client's word for a gauge's mode (without "live" before it): ours."""
WORKER_LABEL = "worker"
"""What tells the workers apart, so a metric that has a label of this name cannot be told apart."""
_METHODS = ("collect", "clear", "_metric_init", "_samples", "_multi_samples", "_child_samples")
"""What a subclass must not have changed: its samples would not be those of its values."""


class Unreachable(Exception):
    """The numbers of a metric are not where we look for them."""


class Asked(Exception):
    """A gauge asks a function, so there is no number to keep."""


class Shape(NamedTuple):
    """A metric in the words of a family."""

    name: str
    help: str
    kind: str
    labels: tuple[str, ...]
    buckets: tuple[float, ...]
    mode: str
    """Of a gauge; anything else is a sum."""
    unit: str


def shape_of(collector: Any) -> Shape | None:
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
    mode = "sum"
    try:
        check_names(name, labels)
        if kind == "histogram":
            buckets = check_buckets(name, metric._upper_bounds)
    except DeclarationError:  # UTF-8 names, bounds that are there twice
        return None
    if kind == "gauge":
        mode = _MODES.get(metric._multiprocess_mode.removeprefix("live"), "")
        if not mode or (mode == "live" and WORKER_LABEL in labels):
            return None
    if buckets and buckets[0] < 0:  # such a histogram has no sum
        return None
    return Shape(name, clean(metric._documentation), kind, labels, buckets, mode, metric._unit)


def called(collector: Any) -> str:
    """A collector by its kind and name, for messages."""
    return f"{type(collector).__name__} {getattr(collector, '_name', '?')}"


def parts(kind: str, child: Any) -> list[Any]:
    """The values of a child, in the order of a family's cells."""
    if kind == "histogram":
        return [*child._buckets, child._sum]
    return [child._count, child._sum] if kind == "summary" else [child._value]


def plain_values(kind: str, child: Any) -> list[Any]:
    """The same, if all are as prometheus_client made them. Raises Asked, Unreachable."""
    # What set_function leaves. (Not by vars(): an object that was asked for its dict is slower.)
    if child._child_samples.__func__ is not type(child)._child_samples:
        raise Asked
    found = parts(kind, child)
    for value in found:
        if not is_plain(value):
            raise Unreachable(f"a value is a {type(value).__name__}")
    return found
