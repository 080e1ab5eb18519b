"""Whatever a collector gives, the scrape is answered and can be read back."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Gauge, Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families as text
from prometheus_client.samples import Exemplar, Sample

from opsguard.metrics.exposition import Exposition, negotiate
from opsguard.metrics.families import clean

OPENMETRICS = "application/openmetrics-text"
FORMS = pytest.mark.parametrize("accept", ["", OPENMETRICS], ids=["text", "openmetrics"])

# Every code point there is, surrogates and NUL too.
anything = st.text(st.characters(exclude_categories=()), max_size=40)


class Fixed:
    def __init__(self, metrics: Iterable[Metric]) -> None:
        self.metrics = metrics

    def collect(self) -> Iterable[Metric]:
        return self.metrics


def ignore(site: str, error: BaseException | None) -> None:
    """Left out and counted: what these tests give may deserve it."""


def read(accept: str, *metrics: Metric) -> list[Metric]:
    """Render, check that it is text, and parse it as the form's own reader does."""
    users = CollectorRegistry()
    users.register(Fixed(metrics))
    response = Exposition([users], failures=ignore).render("GET", accept, "")
    assert response.status == 200
    page = response.body.decode()
    assert "\0" not in page
    return list((openmetrics if OPENMETRICS in accept else text)(page))


@FORMS
@given(values=st.lists(anything, min_size=1, max_size=5, unique_by=clean))
@example(values=["\ud800", "\0", '"', "\\", "\\n", "\n", "\r\n", "}", "{a=", "# EOF", " # {} 1"])
def test_label_values_round_trip(accept: str, values: list[str]) -> None:
    """Every label value comes back as `clean` made it, each on its own series."""
    gauge = Gauge("m", "", ["v"], registry=None)
    for number, value in enumerate(values):
        gauge.labels(value).set(number)
    (family,) = read(accept, *gauge.collect())
    assert {sample.labels["v"]: sample.value for sample in family.samples} == {
        clean(value): number for number, value in enumerate(values)
    }


@FORMS
@given(value=st.floats())
@example(value=1e22)
@example(value=123456789.0)
@example(value=-123456789.0)
@example(value=5e-324)
def test_values_round_trip(accept: str, value: float) -> None:
    """Every float comes back as it was, NaN and the infinities too."""
    gauge = Gauge("m", "", registry=None)
    gauge.set(value)
    (family,) = read(accept, *gauge.collect())
    (sample,) = family.samples
    assert sample.value == value or (math.isnan(value) and math.isnan(sample.value))


@FORMS
@given(documentation=anything.map(str.strip))
@example(documentation='a\nb\\n"c" # EOF')
def test_help_breaks_nothing(accept: str, documentation: str) -> None:
    """A help text stays on its line, whatever is in it."""
    gauge = Gauge("m", documentation, registry=None)
    (family,) = read(accept, *gauge.collect())
    assert [sample.name for sample in family.samples] == ["m"]


# Not negative and not NaN, which the reader refuses in counters though no scraper does.
numbers = st.one_of(st.integers(min_value=0), st.floats(min_value=0))
maybe: st.SearchStrategy[Any] = st.one_of(
    st.none(), numbers, st.just(10**400), anything, st.binary(max_size=4), st.just([])
)
exemplars = st.builds(Exemplar, st.dictionaries(anything, maybe, max_size=2), maybe, maybe)
kinds = st.sampled_from(["counter", "gauge", "unknown", "untyped", "teapot"])


@st.composite
def wild_metrics(draw: st.DrawFn) -> Metric:
    metric = Metric("m", "", "gauge")
    metric.name = draw(st.one_of(anything, st.sampled_from(["a", "a_total", "a.b", "a:b"])))
    metric.type = draw(kinds)
    metric.documentation = draw(maybe)
    metric.unit = draw(anything)
    suffix = "_total" if metric.type == "counter" else ""
    metric.samples = [
        Sample(
            metric.name + suffix,
            labels,
            draw(maybe),
            draw(st.one_of(maybe, st.just(math.nan))),
            draw(st.one_of(st.none(), exemplars)),
        )
        for labels in draw(st.lists(st.dictionaries(anything, maybe, max_size=3), max_size=3))
    ]
    return metric


@pytest.mark.parametrize(
    "accept",
    ["", OPENMETRICS, f"{OPENMETRICS};version=1.0.0;escaping=allow-utf-8"],
    ids=["text", "openmetrics", "openmetrics-utf-8"],
)
@given(metrics=st.lists(wild_metrics(), max_size=3))
def test_a_wild_collector_never_breaks_the_scrape(accept: str, metrics: list[Metric]) -> None:
    """Names, labels, values and times of any kind: the answer can be read, the rest is there."""
    good = Metric("good", "", "gauge")
    good.add_sample("good", {}, 1.0)
    # Names of ours, so that none of theirs can be first with "good".
    families = {family.name: family for family in read(accept, good, *metrics)}
    assert [sample.value for sample in families["good"].samples] == [1.0]


@given(accept=anything, accept_encoding=anything, method=st.sampled_from(["GET", "HEAD"]))
@example(accept="q=1;;q=0,=", accept_encoding=";q=", method="GET")
def test_any_header_is_answered(accept: str, accept_encoding: str, method: str) -> None:
    """No header makes anything but 200, with headers that can be sent."""
    response = Exposition([], failures=ignore).render(method, accept, accept_encoding)
    assert response.status == 200
    assert all((name + value).isprintable() and value.isascii() for name, value in response.headers)


@given(st.text(alphabet='aplictonenmrs-x/*;,=q.0123456789 "', max_size=60))
def test_negotiation_never_raises(accept: str) -> None:
    """Every Accept header leads to one of the forms we have."""
    assert negotiate(accept).content_type.split(";")[0] in ("text/plain", OPENMETRICS)
