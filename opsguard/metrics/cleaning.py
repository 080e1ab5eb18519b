"""From collectors' families to text that no scraper chokes on.

What would break the scrape is cleaned; what cannot be cleaned is refused, and the reason given.
`prometheus_client` does the encoding itself.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from prometheus_client import Metric
from prometheus_client import generate_latest as _text
from prometheus_client.metrics_core import METRIC_TYPES
from prometheus_client.openmetrics import exposition as _openmetrics
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar, Sample, Timestamp

from opsguard.metrics.families import clean
from opsguard.metrics.negotiation import Form

__all__ = ["EOF", "UNSAFE", "Only", "claims", "encoded", "exposed_name", "joined"]

UNSAFE = re.compile(r"[\x00\ud800-\udfff]")
EOF = b"# EOF\n"
_LEGAL = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")

# The sample names that a family of each type lays claim to, its own name aside.
_SUFFIXES: Mapping[str, tuple[str, ...]] = {
    "counter": ("_total",),
    "summary": ("_sum", "_count"),
    "histogram": ("_bucket", "_sum", "_count"),
    "gaugehistogram": ("_bucket", "_gsum", "_gcount"),
    "info": ("_info",),
}
# A part of one of these says something else than the whole: all or nothing.
_COMPOUND = frozenset({"summary", "histogram", "gaugehistogram"})


def claims(name: str, kind: str) -> set[str]:
    """Return the names that a family may expose, in either format."""
    base = name.removesuffix("_total") if kind == "counter" else name
    return {name, base, *(base + suffix for suffix in _SUFFIXES.get(kind, ()))}


def exposed_name(name: str, utf8_names: bool) -> str:
    if not name:
        raise ValueError("a metric or label has an empty name")
    if _LEGAL.fullmatch(name):
        return name
    name = UNSAFE.sub("\ufffd", name)
    return name if utf8_names else _openmetrics.escape_metric_name(name, _openmetrics.UNDERSCORES)


def _moment(timestamp: float | Timestamp | None) -> float | Timestamp | None:
    if timestamp is None or isinstance(timestamp, Timestamp):
        return timestamp
    if not math.isfinite(seconds := float(timestamp)):
        raise ValueError("a timestamp is not a moment")
    return seconds


def _exemplar(sample: Sample, kind: str) -> Exemplar | None:
    """Return the exemplar if OpenMetrics allows it here, else None: the sample stands alone."""
    exemplar = sample.exemplar
    allowed = {"counter": "_total", "histogram": "_bucket", "gaugehistogram": "_bucket"}
    if exemplar is None or not sample.name.endswith(allowed.get(kind, "\n")):
        return None
    labels = {name: clean(value) for name, value in exemplar.labels.items()}
    names_legal = all(_LEGAL.fullmatch(name) and ":" not in name for name in labels)
    if not names_legal or sum(map(len, (*labels, *labels.values()))) > 128:
        return None
    try:
        return Exemplar(labels, float(exemplar.value), _moment(exemplar.timestamp))
    except (TypeError, ValueError, OverflowError):
        return None


def _label_name(name: str, utf8_names: bool) -> str:
    name = exposed_name(name, utf8_names)
    name = name if utf8_names else name.replace(":", "_")
    if name.startswith("__"):  # a second __name__ would refuse the whole scrape
        raise ValueError("label names that begin with __ are Prometheus's own")
    return name


def _sample(sample: Sample, kind: str, form: Form) -> Sample:
    """Return the sample as it may be encoded.

    :raises Exception: of whatever kind, if it cannot be.
    """
    labels = {
        _label_name(name, form.utf8_names): clean(value)
        for name, value in (sample.labels or {}).items()
    }
    if len(labels) != len(sample.labels or {}):
        raise ValueError("two labels have one name once escaped")
    return Sample(
        exposed_name(sample.name, form.utf8_names),
        labels,
        float(sample.value),
        _moment(sample.timestamp),
        _exemplar(sample, kind) if form.openmetrics else None,
    )


def joined(parts: Sequence[Metric], form: Form) -> tuple[Metric, BaseException | None]:
    """Join the metrics of one collector that have one name, and make them safe to encode.

    Returns the family and the first reason why a sample was left out, if one was: its
    value is no number, its labels are not encodable, or cleaning made it equal to another.
    Native histograms, which neither format knows, are passed over.

    :raises Exception: if the family as a whole cannot be encoded.
    """
    first = parts[0]
    kind = first.type if first.type in METRIC_TYPES else "unknown"
    name = exposed_name(first.name, form.utf8_names)
    family = Metric(name, clean(first.documentation), kind)
    if first.unit and name.endswith("_" + first.unit):
        family.unit = first.unit
    seen: set[object] = set()
    fault: BaseException | None = None
    for part in parts:
        for sample in part.samples:
            try:
                if sample.native_histogram is not None:
                    continue
                safe = _sample(sample, kind, form)
                key = safe.name, frozenset(safe.labels.items())
                if key in seen:
                    raise ValueError(f"{name} has two samples with the same labels")
            except Exception as error:
                if kind in _COMPOUND:
                    raise
                fault = fault or error
                continue
            seen.add(key)
            family.samples.append(safe)
    if form.openmetrics and kind == "histogram":
        _drop_lone_count(family)
    return family, fault


def _drop_lone_count(family: Metric) -> None:
    """OpenMetrics allows a histogram no count without a sum, which prometheus_client exposes where
    a bound is negative. The bucket of +Inf says the same.
    """
    total, count = f"{family.name}_sum", f"{family.name}_count"
    summed = {frozenset(one.labels.items()) for one in family.samples if one.name == total}
    family.samples = [
        one
        for one in family.samples
        if one.name != count or frozenset(one.labels.items()) in summed
    ]


class Only:
    """A registry of one metric: the encoders of prometheus_client ask for no more."""

    def __init__(self, metric: Metric) -> None:
        self._metric = metric

    def collect(self) -> Iterable[Metric]:
        return (self._metric,)


_openmetrics_text: Callable[[Collector, str], bytes] = _openmetrics.generate_latest


def encoded(family: Metric, form: Form) -> bytes:
    # The names are escaped already, so "allow-utf-8" lets them through unchanged; the
    # OpenMetrics encoder's own escaping would turn the colon of a name into "_".
    encoder = _openmetrics_text if form.openmetrics else _text
    return encoder(Only(family), _openmetrics.ALLOWUTF8).removesuffix(EOF)
