"""A family's numbers as text, in the Prometheus text format and in OpenMetrics."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from math import isfinite
from typing import NamedTuple

from prometheus_client.core import Metric
from prometheus_client.utils import floatToGoString

from opsguard.accelerator import speed
from opsguard.metrics.definitions import Definition

__all__ = ["Exemplar", "Numbers", "clean", "cleaned", "collect", "escape", "expose", "number"]

_LONGEST = 1024
_DISTRIBUTIONS = ("histogram", "summary")
_EXEMPLARY = ("counter", "histogram")
"""What OpenMetrics allows exemplars for."""
_AT_ONCE = 7_500
"""Numbers whose text is made in one step, during which all other threads wait: less than one ms,
for the 500 series of a histogram with a dozen buckets or the 14 of one with 500.
"""
_spelled: Callable[[float], str] = floatToGoString
"""A bound as the value of `le`, so a part of a series' name: as prometheus_client spells it, since
an adopted histogram goes on under the names it had.
"""


class Exemplar(NamedTuple):
    """One observation that stands for others; `when` in seconds since the epoch."""

    labels: Mapping[str, str]
    value: float
    when: float


class Numbers(NamedTuple):
    """What there is of one family: the first cell of each series, in `cells`; exemplars by series
    and place in it.
    """

    cells: Sequence[float] | memoryview
    series: Mapping[tuple[str, ...], int]
    exemplars: Mapping[tuple[tuple[str, ...], int], Exemplar]
    told_apart: bool = False
    """The series of a gauge of mode `live` end with the number of their worker."""

    def labels(self, family: Definition) -> tuple[str, ...]:
        """The names of the labels that these series have."""
        return family.exposed_labels if self.told_apart else family.labels


def expose(family: Definition, numbers: Numbers, openmetrics: bool) -> tuple[str, str]:
    """(family name, its finished text block)."""
    name, kind = family.name, family.kind
    if kind == "counter" and openmetrics:
        name = name.removesuffix("_total")
    if kind == "unknown" and not openmetrics:
        kind = "untyped"
    text = family.help.replace("\\", "\\\\").replace("\n", "\\n")
    if openmetrics:
        text = text.replace('"', '\\"')
    lines = [f"# HELP {name} {text}\n# TYPE {name} {kind}\n"]
    if openmetrics and family.unit and name.endswith(f"_{family.unit}"):
        lines.append(f"# UNIT {name} {family.unit}\n")
    return name, "".join([*lines, *_blocks(family, numbers, openmetrics)])


def collect(family: Definition, numbers: Numbers) -> Metric:
    """The family as prometheus_client knows it, for registries and push gateways."""
    cells, names = numbers.cells, numbers.labels(family)
    name = family.name.removesuffix("_total") if family.kind == "counter" else family.name
    metric = Metric(name, family.help, family.kind)
    last = len(family.buckets) + 1
    for values, at in numbers.series.items():
        labels = dict(zip(names, values, strict=True))
        if family.kind not in _DISTRIBUTIONS:
            metric.add_sample(family.name, labels, cells[at])
            continue
        counts = list(accumulate(cells[at : at + last]))
        for bound, count in zip(_bounds(family), counts, strict=False):
            metric.add_sample(f"{family.name}_bucket", {**labels, "le": bound}, count)
        if family.summed:
            metric.add_sample(f"{family.name}_count", labels, counts[-1])
            metric.add_sample(f"{family.name}_sum", labels, cells[at + last])
    return metric


def _bounds(family: Definition) -> list[str]:
    """The values of `le`; a summary has none."""
    if family.kind == "summary":
        return []
    return [_spelled(bound) for bound in family.buckets] + ["+Inf"]


def _blocks(family: Definition, numbers: Numbers, openmetrics: bool) -> Iterator[str]:
    """The lines of all series."""
    labels = numbers.labels(family)
    form = _form(family, labels)
    exemplars = numbers.exemplars if openmetrics and family.kind in _EXEMPLARY else {}
    if speed is None or exemplars:
        yield from _lines(form, family, numbers, exemplars)
        return
    lines_of = speed.lines_of
    cells, counts, summed = numbers.cells, _counts(family), family.summed
    series, step = list(numbers.series.items()), max(1, _AT_ONCE // form.count("%s"))
    for first in range(0, len(series), step):
        some = series[first : first + step]
        if (text := lines_of(form, labels, some, cells, counts, summed)) is not None:
            yield text
            continue
        for one in some:  # an unusual one is among them
            text = lines_of(form, labels, [one], cells, counts, summed)
            if text is None:
                yield from _lines(form, family, numbers._replace(series=dict([one])), exemplars)
            else:
                yield text


def _form(family: Definition, labels: tuple[str, ...]) -> str:
    """The lines of one series: %s for each number, and where its labels go a NUL, which no text of
    ours contains.
    """
    name, alone, first = family.name, "{\0}" if labels else "", "\0," if labels else ""
    if family.kind not in _DISTRIBUTIONS:
        return f"{name}{alone} %s\n"
    lines = [f'{name}_bucket{{{first}le="{bound}"}} %s\n' for bound in _bounds(family)]
    if family.summed:
        lines.append(f"{name}_count{alone} %s\n{name}_sum{alone} %s\n")
    return "".join(lines)


def _counts(family: Definition) -> int:
    """How many cells of a series count: each says how many more there are than in those before
    it.
    """
    return len(family.buckets) + 1 if family.kind in _DISTRIBUTIONS else 0


def _lines(
    form: str,
    family: Definition,
    numbers: Numbers,
    exemplars: Mapping[tuple[tuple[str, ...], int], Exemplar],
) -> Iterator[str]:
    """The text of each series; there may be thousands. In C `speed.lines_of` does the same for many
    at once, without exemplars.
    """
    cells, pairs_of = numbers.cells, _pairs(numbers.labels(family))
    counts, buckets, summed = _counts(family), bool(family.buckets), family.summed
    places = len(family.buckets) + 1
    for values, at in numbers.series.items():
        shown: list[object] = []
        if counts:
            counted = list(accumulate(map(int, cells[at : at + counts])))
            shown += counted if buckets else ()
            shown += (counted[-1], number(cells[at + counts])) if summed else ()
        else:
            shown.append(number(cells[at]))
        if exemplars:
            for place in range(places):
                shown[place] = f"{shown[place]}{_exemplar(exemplars.get((values, place)))}"
        yield (form % tuple(shown)).replace("\0", pairs_of(values))


def _exemplar(found: Exemplar | None) -> str:
    if found is None:
        return ""
    pairs = ",".join([f'{name}="{escape(text)}"' for name, text in found.labels.items()])
    return f" # {{{pairs}}} {number(found.value)} {found.when:.3f}"


def _pairs(labels: tuple[str, ...]) -> Callable[[tuple[str, ...]], str]:
    """What writes label values between the braces."""
    form = ",".join([f'{label}="%s"' for label in labels])

    def pairs(values: tuple[str, ...]) -> str:
        text = "".join(values)
        if '"' in text or "\\" in text or "\n" in text:
            values = tuple([escape(value) for value in values])
        return form % values

    return pairs


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
