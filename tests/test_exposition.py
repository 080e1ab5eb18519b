"""The /metrics answer: forms, precedence, isolation, one rendering for many callers."""

from __future__ import annotations

import gzip
import math
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from types import FrameType
from typing import Any

import pytest
from prometheus_client import (
    REGISTRY,
    CollectorRegistry,
    Counter,
    Enum,
    Gauge,
    Histogram,
    Info,
    Metric,
    Summary,
)
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeHistogramMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    UnknownMetricFamily,
)
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families as text
from prometheus_client.samples import Exemplar, NativeHistogram, Sample, Timestamp

from opsguard.http import Response
from opsguard.metrics.exposition import Exposition, negotiate
from opsguard.metrics.process import ProcessCollector

OPENMETRICS = "application/openmetrics-text"
TEXT = "text/plain; version=0.0.4; charset=utf-8"
TEXT_1 = "text/plain; version=1.0.0; charset=utf-8; escaping="
OPENMETRICS_1 = "application/openmetrics-text; version=1.0.0; charset=utf-8"
FORMS = pytest.mark.parametrize("accept", ["", OPENMETRICS], ids=["text", "openmetrics"])


class Failed:
    """Remembers what was reported as left out."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, BaseException | None]] = []

    def __call__(self, site: str, error: BaseException | None) -> None:
        self.seen.append((site, error))

    @property
    def sites(self) -> list[str]:
        return [site for site, _ in self.seen]


class Fixed:
    """A collector that gives what it was given."""

    def __init__(self, *metrics: Any) -> None:
        self.metrics = metrics

    def collect(self) -> Iterable[Metric]:
        return self.metrics


class Raising:
    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily("before", "", value=1)
        raise LookupError("broken")


class Leaving:
    def collect(self) -> Iterable[Metric]:
        raise SystemExit(3)


class Hanging:
    """Hangs until it is released, then gives one family."""

    def __init__(self) -> None:
        self.calls = 0
        self.released = threading.Event()

    def collect(self) -> Iterable[Metric]:
        self.calls += 1
        self.released.wait(30)
        return [GaugeMetricFamily("late", "", value=1)]


class Written:
    """A source that hands over finished text."""

    def __init__(self, *blocks: tuple[str, str]) -> None:
        self.blocks = blocks

    def expose(self, openmetrics: bool) -> Iterable[tuple[str, str]]:
        return self.blocks


def registry(*collectors: Any) -> CollectorRegistry:
    made = CollectorRegistry()
    for collector in collectors:
        made.register(collector)
    return made


def metric(name: str, kind: str, *samples: Sample, unit: str = "") -> Metric:
    made = Metric("m", "help", "gauge")
    # Afterwards, as a collector may do: the constructor would refuse what is wrong.
    made.name, made.type, made.unit, made.samples = name, kind, unit, list(samples)
    return made


def body(response: Response) -> str:
    return response.body.decode()


def scrape(*sources: Any, accept: str = "", failed: Failed | None = None) -> str:
    """Render once; without `failed`, nothing may be left out."""
    failures = failed or Failed()
    response = Exposition(sources, failures=failures).render("GET", accept, "")
    assert response.status == 200
    if failed is None:
        assert failures.seen == []
    return body(response)


def samples(page: str, accept: str) -> dict[str, float]:
    parse = openmetrics if OPENMETRICS in accept else text
    return {
        sample.name + "".join(f"|{key}={sample.labels[key]}" for key in sorted(sample.labels)): (
            sample.value
        )
        for family in parse(page)
        for sample in family.samples
    }


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "this should have come true by now"
        time.sleep(0.001)


def helpers() -> int:
    return sum(thread.name == "opsguard-collector" for thread in threading.enumerate())


@pytest.fixture
def hanging() -> Iterator[Hanging]:
    collector = Hanging()
    yield collector
    collector.released.set()
    until(lambda: helpers() == 0)


# --- forms

PROMETHEUS_3 = (
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,"
    "application/openmetrics-text;version=0.0.1;q=0.5,"
    "text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,"
    "text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
)
PROMETHEUS_2 = (
    "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,"
    "text/plain;version=0.0.4;q=0.5,*/*;q=0.1"
)


@pytest.mark.parametrize(
    ("accept", "content_type"),
    [
        pytest.param("", TEXT, id="no-header"),
        pytest.param("*/*", TEXT, id="anything"),
        pytest.param("text/html,*/*;q=0.8", TEXT, id="browser"),
        pytest.param("application/json", TEXT, id="nothing-we-have"),
        pytest.param(OPENMETRICS, OPENMETRICS_1, id="openmetrics"),
        pytest.param(f"  {OPENMETRICS.upper()} ", OPENMETRICS_1, id="case-and-space"),
        pytest.param(PROMETHEUS_2, f"{OPENMETRICS_1}; escaping=underscores", id="prometheus-2"),
        pytest.param(PROMETHEUS_3, f"{OPENMETRICS_1}; escaping=allow-utf-8", id="prometheus-3"),
        pytest.param(f"{OPENMETRICS};q=0.1, text/plain;q=0.9", TEXT, id="weights-decide"),
        pytest.param(f"*/*;q=0.9, {OPENMETRICS};q=0.1", TEXT, id="wildcard-weighs-more"),
        pytest.param(f"*/*, {OPENMETRICS}", OPENMETRICS_1, id="named-before-wildcard"),
        pytest.param(f"text/plain, {OPENMETRICS}", TEXT, id="first-of-equals"),
        pytest.param(f"{OPENMETRICS};q=0", TEXT, id="refused"),
        pytest.param(f"{OPENMETRICS};q=0.0005", TEXT, id="malformed-weight"),
        pytest.param(f"{OPENMETRICS};q=nan", TEXT, id="weight-nan"),
        pytest.param(f"{OPENMETRICS};version=0.0.1", TEXT, id="old-openmetrics"),
        pytest.param(f"{OPENMETRICS};version=2.0.0", TEXT, id="new-openmetrics"),
        pytest.param('text/plain;version="1.0.0"', f"{TEXT_1}underscores", id="quoted-version"),
        pytest.param(
            "text/plain;version=1.0.0;escaping=allow-utf-8", f"{TEXT_1}allow-utf-8", id="text-1"
        ),
        pytest.param(
            "text/plain;version=1.0.0;escaping=values", f"{TEXT_1}underscores", id="other-escaping"
        ),
        pytest.param(";;==,,;q", TEXT, id="rubbish"),
        pytest.param("," * 65_536, TEXT, id="64-KiB-of-commas"),
    ],
)
def test_the_form_follows_accept(accept: str, content_type: str) -> None:
    """The form with the highest weight is chosen, text 0.0.4 if nothing else fits."""
    assert negotiate(accept).content_type == content_type


@pytest.mark.parametrize(
    ("accept_encoding", "compressed"),
    [
        pytest.param("", False, id="no-header"),
        pytest.param("gzip", True, id="gzip"),
        pytest.param("deflate, GZIP;q=0.5", True, id="among-others"),
        pytest.param("*", True, id="anything"),
        pytest.param("gzip;q=0", False, id="refused"),
        pytest.param("gzip;q=0, *", False, id="refused-by-name"),
        pytest.param("identity;q=1, gzip;q=0.5", False, id="identity-preferred"),
        pytest.param("br, deflate", False, id="others-only"),
        pytest.param("gzip;q=high", False, id="malformed-weight"),
    ],
)
def test_gzip_where_it_is_accepted(accept_encoding: str, compressed: bool) -> None:
    """The body is compressed only for clients that take gzip at least as gladly as plain."""
    response = Exposition([ProcessCollector()], failures=Failed()).render(
        "GET", "", accept_encoding
    )
    headers = dict(response.headers)
    assert (headers.get("Content-Encoding") == "gzip") is compressed
    plain = gzip.decompress(response.body) if compressed else response.body
    assert b"process_cpu_seconds_total" in plain
    assert headers["Vary"] == "Accept, Accept-Encoding"


@pytest.mark.parametrize("accept_encoding", ["", "gzip"], ids=["plain", "gzip"])
@FORMS
def test_head_has_the_headers_of_get(accept: str, accept_encoding: str) -> None:
    """HEAD differs from GET by its empty body only."""
    exposition = Exposition([Fixed(GaugeMetricFamily("a", "", value=1))], failures=Failed())
    get = exposition.render("GET", accept, accept_encoding)
    head = exposition.render("HEAD", accept, accept_encoding)
    assert (head.status, head.headers, head.body) == (200, get.headers, b"")
    assert dict(get.headers)["Content-Length"] == str(len(get.body)) != "0"


@pytest.mark.parametrize("method", ["POST", "OPTIONS", "get", "", "\u2028", "X" * 8192])
def test_other_methods_are_refused(method: str) -> None:
    """Anything but GET and HEAD is 405, names the two, and reads no source."""
    exposition = Exposition([Raising()], failures=(failed := Failed()))
    response = exposition.render(method, "", "")
    assert response.status == 405
    assert dict(response.headers) == {
        "Allow": "GET, HEAD",
        "Content-Type": "text/plain; charset=utf-8",
        "Content-Length": "0",
    }
    assert failed.seen == []


# --- what comes out


def every_kind() -> CollectorRegistry:
    made = CollectorRegistry(target_info={"env": "test"})
    Counter("orders", "Orders", ["plan"], registry=made).labels('p"r\\o\n').inc(3)
    Gauge("depth", "Depth", registry=made).set(-2.5)
    Histogram("wait_seconds", "Wait", registry=made, buckets=(0.1, 1)).observe(0.5, {"id": "1"})
    Summary("size_bytes", "Size", registry=made).observe(7)
    Info("build", "Build", registry=made).info({"version": "1"})
    Enum("mode", "Mode", states=["on", "off"], registry=made).state("off")
    made.register(Fixed(UnknownMetricFamily("odd", "Odd", value=math.inf)))
    made.register(
        Fixed(GaugeHistogramMetricFamily("held", "", buckets=[("1", 1), ("+Inf", 2)], gsum_value=3))
    )
    return made


@pytest.mark.parametrize(
    "accept", ["", OPENMETRICS, PROMETHEUS_2, PROMETHEUS_3], ids=["text", "om", "prom2", "prom3"]
)
def test_every_type_survives(accept: str) -> None:
    """Each type of metric can be read back from each form, with its labels and its value."""
    values = samples(scrape(every_kind(), accept=accept), accept)
    expected = {
        'orders_total|plan=p"r\\o\n': 3,
        "depth": -2.5,
        "wait_seconds_bucket|le=0.1": 0,
        "wait_seconds_bucket|le=1.0": 1,
        "wait_seconds_count": 1,
        "wait_seconds_sum": 0.5,
        "size_bytes_sum": 7,
        "build_info|version=1": 1,
        "mode|mode=off": 1,
        "odd": math.inf,
        "held_gcount": 2,
        "target_info|env=test": 1,
    }
    assert values.items() >= expected.items()


def test_exemplars_in_openmetrics_only() -> None:
    """An exemplar follows its bucket in OpenMetrics; text has no place for it."""
    assert '# {id="1"} 0.5' in scrape(every_kind(), accept=OPENMETRICS)
    assert '{id="1"}' not in scrape(every_kind())


def test_units_in_openmetrics_only() -> None:
    """A unit that is the end of the name is stated in OpenMetrics; text has no place for it."""
    waited = Gauge("wait", "", unit="seconds", registry=(users := CollectorRegistry()))
    waited.set(1)
    assert "\n# UNIT wait_seconds seconds\n" in scrape(users, accept=OPENMETRICS)
    assert "UNIT" not in scrape(users)


def test_openmetrics_ends_once() -> None:
    """`# EOF` is the last line of OpenMetrics, nowhere else, and no line of text."""
    page = scrape(every_kind(), accept=OPENMETRICS)
    assert page.endswith("\n# EOF\n")
    assert page.count("# EOF") == 1
    assert "# EOF" not in scrape(every_kind())


@FORMS
def test_an_untyped_family_keeps_its_name(accept: str) -> None:
    """A metric of unknown type goes out under exactly the name it has, in both formats."""
    page = scrape(Fixed(UnknownMetricFamily("api_calls", "Calls", value=4)), accept=accept)
    kind = "unknown" if accept else "untyped"
    assert f"# TYPE api_calls {kind}\napi_calls 4.0\n" in page


@FORMS
def test_a_finished_text_is_taken_as_it_is(accept: str) -> None:
    """What `expose` returns for the format is in the answer byte for byte."""

    class Ours(Fixed):
        def expose(self, openmetrics: bool) -> Iterable[tuple[str, str]]:
            name = "seen" if openmetrics else "seen_total"
            yield name, f'# HELP {name} Seen\n# TYPE {name} counter\nseen_total{{a="b"}} 5.0\n'

    page = scrape(Ours(GaugeMetricFamily("unused", "", value=1)), accept=accept)
    assert samples(page, accept) == {"seen_total|a=b": 5}
    # A member of a registry may have the fast path too.
    assert scrape(registry(Ours()), accept=accept) == page


def test_promtool_accepts_the_text() -> None:
    """promtool reads our text and objects only to the `_created` gauges of prometheus_client."""
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool (Debian package prometheus) is not on the PATH")
    users = registry(Fixed(GaugeMetricFamily("temperature_celsius", "x\ny\\", value=1)))
    Counter("orders", "Orders", ["plan"], registry=users).labels('p"r\\o\n\0\ud800').inc(3)
    page = scrape(ProcessCollector(), users, REGISTRY)
    checked = subprocess.run(
        [promtool, "check", "metrics"], input=page, capture_output=True, text=True, check=False
    )
    complaints = (checked.stdout + checked.stderr).splitlines()
    assert checked.returncode in (0, 3), complaints  # 3: read, but the linter has advice
    assert [line for line in complaints if "_created" not in line] == []


# --- precedence


@FORMS
@pytest.mark.parametrize(
    ("first", "second"),
    [
        pytest.param("gauge", "gauge", id="same-family"),
        pytest.param("counter", "gauge_total", id="counter-and-gauge-called-total"),
        pytest.param("histogram", "gauge_count", id="histogram-and-gauge-called-count"),
        pytest.param("written", "counter", id="text-and-counter"),
        pytest.param("written", "gauge_total", id="text-and-gauge-called-total"),
    ],
)
def test_the_first_source_wins(accept: str, first: str, second: str) -> None:
    """Of two families that would expose one name the first is kept, silently."""
    name = "x" if accept else "x_total"
    sources = {
        "gauge": Fixed(GaugeMetricFamily("x", "", value=1)),
        "counter": Fixed(CounterMetricFamily("x", "", value=1)),
        "histogram": Fixed(HistogramMetricFamily("x", "", buckets=[("+Inf", 1)], sum_value=1)),
        "gauge_total": Fixed(GaugeMetricFamily("x_total", "", value=2)),
        "gauge_count": Fixed(GaugeMetricFamily("x_count", "", value=2)),
        "written": Written((name, f"# TYPE {name} counter\nx_total 1.0\n")),
    }
    other = Fixed(GaugeMetricFamily("other", "", value=1))
    alone = scrape(sources[first], other, accept=accept)
    assert scrape(sources[first], registry(sources[second]), other, accept=accept) == alone
    swapped = scrape(sources[second], sources[first], other, accept=accept)
    assert swapped == scrape(sources[second], other, accept=accept)


@FORMS
def test_process_metrics_are_not_doubled(accept: str) -> None:
    """The default registry's process, gc and platform collectors add nothing to ours."""
    page = scrape(ProcessCollector(), REGISTRY, accept=accept)
    kinds = [line for line in page.splitlines() if line.startswith("# TYPE")]
    assert len(kinds) == len(set(kinds))
    assert sum(" python_info " in line for line in kinds) == 1


@FORMS
def test_a_family_in_parts_is_joined(accept: str) -> None:
    """A collector that yields one name several times gets one family with all its samples."""
    parts = [metric("m", "gauge", Sample("m", {"n": str(n)}, n)) for n in range(3)]
    page = scrape(registry(Fixed(*parts)), accept=accept)
    assert page.count("# TYPE m gauge") == 1
    assert samples(page, accept) == {"m|n=0": 0, "m|n=1": 1, "m|n=2": 2}
    assert [len(part.samples) for part in parts] == [1, 1, 1]  # theirs are left alone


def test_one_registry_given_twice_is_read_once() -> None:
    """A source that stands in the list twice counts once."""
    calls = Hanging()
    calls.released.set()
    users = registry(calls)
    assert scrape(users, registry(calls), users).count("# TYPE late") == 1
    assert calls.calls == 1


# --- bad input


@FORMS
@pytest.mark.parametrize(
    ("value", "shown"),
    [
        pytest.param("a\0b", "a\ufffdb", id="nul"),
        pytest.param("x" * 10_240, "x" * 1023 + "…", id="10-KiB"),
        pytest.param('"\\\n', '"\\\n', id="quotes"),
        pytest.param("\r\x1b[31m\u2028é", "\r\x1b[31m\u2028é", id="control"),
        pytest.param(7, "7", id="number"),
        pytest.param(None, "None", id="none"),
    ],
)
def test_label_values_are_cleaned(accept: str, value: Any, shown: str) -> None:
    """A label value that would break the scrape is changed as little as possible."""
    bad = metric("m", "gauge", Sample("m", {"v": value}, 1.0))
    assert samples(scrape(registry(Fixed(bad)), accept=accept), accept) == {f"m|v={shown}": 1}


@FORMS
@pytest.mark.parametrize("place", ["label", "name", "help", "written"])
def test_surrogates_never_reach_the_wire(accept: str, place: str) -> None:
    """A lone surrogate, wherever it is, is replaced; the series stays."""
    bad = metric("m", "gauge", Sample("m", {"v": "a\ud800b"}, 1.0))
    if place == "name":
        bad = metric("m\udfff", "gauge", Sample("m\udfff", {}, 1.0))
    if place == "help":
        bad.documentation = "\ud800"
    source = Written(("m", '# TYPE m gauge\nm{a="\ud800"} 1.0\n')) if place == "written" else bad
    page = scrape(
        source if place == "written" else registry(Fixed(bad)), accept=accept, failed=Failed()
    )
    assert list(samples(page, accept).values()) == [1]


GOOD = Sample("m", {"v": "good"}, 1.0)


@FORMS
@pytest.mark.parametrize(
    "bad",
    [
        pytest.param(Sample("m", {"v": "x"}, None), id="value-none"),  # type: ignore[arg-type]
        pytest.param(Sample("m", {"v": "x"}, "a"), id="value-text"),  # type: ignore[arg-type]
        pytest.param(Sample("m", {"v": "x"}, 10**400), id="value-huge"),
        pytest.param(Sample("m", {"v": "x"}, 1, math.nan), id="timestamp-nan"),
        pytest.param(Sample("m", {"__name__": "x"}, 1), id="label-is-the-name"),
        pytest.param(Sample("m", {"0:": "x"}, 1), id="label-becomes-reserved"),
        pytest.param(Sample("m", {"": "x"}, 1), id="label-without-name"),
        pytest.param(Sample("m", {"a.b": "x", "a_b": "y"}, 1), id="labels-become-one"),
        pytest.param(Sample("", {}, 1), id="sample-without-name"),
        pytest.param(Sample("m", {"v": "good"}, 2), id="second-with-these-labels"),
        pytest.param(("m", {}, 1), id="no-sample"),
        pytest.param(None, id="nothing"),
    ],
)
def test_a_bad_sample_costs_itself(accept: str, bad: Any) -> None:
    """A sample that cannot be encoded is left out and counted; the others stay."""
    failed = Failed()
    users = registry(Fixed(metric("m", "gauge", GOOD, bad)))
    page = scrape(users, accept=accept, failed=failed)
    assert samples(page, accept) == {"m|v=good": 1}
    assert failed.sites == ["collector:Fixed"]


@FORMS
@pytest.mark.parametrize(
    "bad",
    [
        pytest.param(
            metric(
                "h",
                "histogram",
                Sample("h_bucket", {"le": "1"}, None),  # type: ignore[arg-type]
                Sample("h_bucket", {"le": "+Inf"}, 1),
            ),
            id="part-of-a-histogram",
        ),
        pytest.param(metric("", "gauge", Sample("", {}, 1)), id="no-name"),
        pytest.param(metric(None, "gauge"), id="name-none"),  # type: ignore[arg-type]
        pytest.param(metric("k", []), id="type-unhashable"),  # type: ignore[arg-type]
        pytest.param("a string", id="no-metric"),
        pytest.param(None, id="nothing"),
    ],
)
def test_a_bad_family_costs_itself(accept: str, bad: Any) -> None:
    """A family that cannot be encoded is left out whole and counted; the others stay."""
    failed = Failed()
    page = scrape(registry(Fixed(metric("m", "gauge", GOOD), bad)), accept=accept, failed=failed)
    assert samples(page, accept) == {"m|v=good": 1}
    assert failed.sites == ["collector:Fixed"]


@FORMS
@pytest.mark.parametrize(
    ("family", "shown"),
    [
        pytest.param(metric("m", "gauge", GOOD, unit="seconds"), "# TYPE m gauge", id="unit"),
        pytest.param(metric("m", "teapot", GOOD), "# TYPE m un", id="type"),
        pytest.param(metric("a:b", "gauge", Sample("a:b", {}, 1)), "\na:b 1.0", id="colon"),
        pytest.param(metric("a.b", "gauge", Sample("a.b", {}, 1)), "\na_b 1.0", id="dot"),
        pytest.param(
            metric("m", "gauge", Sample("m", {"a.b": "c"}, 1)), '{a_b="c"}', id="label-name"
        ),
        pytest.param(
            metric("m", "gauge", Sample("m", {}, 1, Timestamp(1, 0))), "m 1.0 1", id="timestamp"
        ),
        pytest.param(
            metric("m", "gauge", Sample("m", {}, 1, None, Exemplar({}, 1))),
            "m 1.0\n",
            id="exemplar",
        ),
        pytest.param(
            metric("m", "counter", Sample("m_total", {}, 1, None, Exemplar({"a": "b" * 200}, 1))),
            "m_total 1.0\n",
            id="exemplar-too-long",
        ),
        pytest.param(
            metric("m", "counter", Sample("m_total", {}, 1, None, Exemplar({"a:b": "c"}, 1))),
            "m_total 1.0\n",
            id="exemplar-label-name",
        ),
        pytest.param(
            metric("m", "counter", Sample("m_total", {}, 1, None, Exemplar({}, None))),  # type: ignore[arg-type]
            "m_total 1.0\n",
            id="exemplar-without-value",
        ),
        pytest.param(
            metric(
                "m",
                "histogram",
                Sample("m", {}, 0, None, None, NativeHistogram(1, 1, 0, 0.1, 0)),
                Sample("m_bucket", {"le": "+Inf"}, 1),
            ),
            'm_bucket{le="+Inf"} 1.0\n',
            id="native-histogram",
        ),
    ],
)
def test_what_a_form_cannot_say_is_dropped(accept: str, family: Metric, shown: str) -> None:
    """Units, types, names and exemplars that would break the parser do not get out."""
    page = scrape(registry(Fixed(family)), accept=accept)
    assert shown in page
    assert len(samples(page, accept)) == 1


def test_a_count_without_a_sum_is_dropped_where_strict_readers_refuse_it() -> None:
    """So prometheus_client exposes a histogram with a negative bound."""
    users = CollectorRegistry()
    drift = Histogram("drift", "", ["host"], buckets=(-1, 1), registry=users)
    drift.labels("a").observe(0)
    Histogram("wait", "", buckets=(1,), registry=users).observe(3)
    page = scrape(users, accept=OPENMETRICS)
    found = samples(page, OPENMETRICS)
    assert (found["drift_bucket|host=a|le=1.0"], found["wait_count"]) == (1, 1)
    assert "drift_count" not in page
    assert 'drift_count{host="a"} 1.0' in scrape(users)


def test_such_a_count_is_dropped_where_others_of_its_family_have_a_sum() -> None:
    drift = Histogram("drift", "", ["host"], buckets=(-1, 1), registry=None)
    drift.labels("a").observe(0)
    plain = Histogram("drift", "", ["host"], buckets=(1,), registry=None)
    plain.labels("b").observe(0)

    class Both:
        def collect(self) -> Iterator[Metric]:
            yield from drift.collect()
            yield from plain.collect()

    page = scrape(registry(Both()), accept=OPENMETRICS)
    assert samples(page, OPENMETRICS)["drift_count|host=b"] == 1
    assert 'drift_count{host="a"}' not in page


def test_names_beyond_ascii_when_asked_for() -> None:
    """With escaping=allow-utf-8 the names stay, quoted."""
    accept = f"{OPENMETRICS};version=1.0.0;escaping=allow-utf-8"
    family = metric("a.b", "gauge", Sample("a.b", {"c é": "d"}, 1))
    page = scrape(registry(Fixed(family)), accept=accept)
    assert '{"a.b","c é"="d"} 1.0\n' in page
    assert samples(page, accept) == {"a.b|c é=d": 1}


# --- collectors that fail


@FORMS
@pytest.mark.parametrize("inside", [registry, lambda *c: c[0]], ids=["in-a-registry", "by-itself"])
def test_a_collector_that_raises_costs_its_own(accept: str, inside: Callable[..., Any]) -> None:
    """An exception of a collector is counted; the other collectors' families are there."""
    good, failed = Fixed(metric("m", "gauge", GOOD)), Failed()
    page = scrape(inside(Raising()), registry(good), accept=accept, failed=failed)
    assert samples(page, accept) == {"m|v=good": 1}
    assert [(site, type(error)) for site, error in failed.seen] == [
        ("collector:Raising", LookupError)
    ]


def test_a_collector_that_leaves_stops_nothing() -> None:
    """SystemExit of a user's collector is an error like another."""
    failed = Failed()
    page = scrape(registry(Leaving(), Fixed(metric("m", "gauge", GOOD))), failed=failed)
    assert samples(page, "") == {"m|v=good": 1}
    assert failed.sites == ["collector:Leaving"]


def test_a_gauge_function_that_raises_costs_its_gauge() -> None:
    """`set_function` is users' code as well."""
    failed = Failed()
    users = CollectorRegistry()
    Gauge("broken", "", registry=users).set_function(lambda: 1 / 0)
    Gauge("whole", "", registry=users).set(1)
    assert samples(scrape(users, failed=failed), "") == {"whole": 1}
    assert failed.sites == ["collector:Gauge"]


def test_a_collector_that_hangs_costs_its_own(hanging: Hanging) -> None:
    """It is waited for once, by one thread, then passed over until it returns."""
    failed = Failed()
    good = Fixed(metric("m", "gauge", GOOD))
    users = registry(hanging, good)
    exposition = Exposition([users], failures=failed, budget=0.5)

    for scrapes in (1, 2, 3):
        assert samples(body(exposition.render("GET", "", "")), "") == {"m|v=good": 1}
        until(lambda: helpers() == 1)
        assert hanging.calls == 1
        assert failed.sites == ["collector:Hanging"] * scrapes
    assert all(isinstance(error, TimeoutError) for _, error in failed.seen)

    hanging.released.set()
    until(lambda: helpers() == 0)
    assert samples(body(exposition.render("GET", "", "")), "") == {"m|v=good": 1, "late": 1}
    assert hanging.calls == 2


def test_collectors_that_hang_do_not_use_up_the_time_of_others() -> None:
    """Five that hang stand before one that works: it is still read within the budget."""
    stuck = [Hanging() for _ in range(5)]
    users = registry(*stuck, Fixed(metric("m", "gauge", GOOD)))
    exposition = Exposition([users], failures=(failed := Failed()), budget=1.0)
    try:
        assert samples(body(exposition.render("GET", "", "")), "") == {"m|v=good": 1}
        assert failed.sites == ["collector:Hanging"] * 5
        until(lambda: helpers() == 5)
    finally:
        for collector in stuck:
            collector.released.set()
        until(lambda: helpers() == 0)


def test_slow_is_not_hanging() -> None:
    """A collector may take its time: others are read meanwhile and nothing is left out."""

    class Second(Fixed):
        called = threading.Event()

        def collect(self) -> Iterable[Metric]:
            self.called.set()
            return super().collect()

    class First:
        def collect(self) -> Iterable[Metric]:
            assert Second.called.wait(10)
            return [GaugeMetricFamily("first", "", value=1)]

    page = scrape(registry(First(), Second(GaugeMetricFamily("second", "", value=2))))
    assert samples(page, "") == {"first": 1, "second": 2}


def test_the_budget_is_measured_by_the_clock_given(hanging: Hanging) -> None:
    """A clock that leaps ends the waiting, whatever the budget."""
    leaps = iter(range(0, 1_000_000, 100))
    failed = Failed()
    exposition = Exposition(
        [registry(hanging)], failures=failed, clock=lambda: float(next(leaps)), budget=60
    )
    assert body(exposition.render("GET", "", "")) == ""
    assert failed.sites == ["collector:Hanging"]
    until(lambda: hanging.calls == helpers())  # begun after all, or given up before it began


def test_without_threads_the_scrape_still_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """If no thread can be started, users' families are left out and counted."""

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    failed = Failed()
    own = Fixed(GaugeMetricFamily("own", "", value=1))
    page = scrape(own, registry(Fixed(metric("m", "gauge", GOOD))), failed=failed)
    assert samples(page, "") == {"own": 1}
    assert [type(error) for _, error in failed.seen] == [RuntimeError]


# --- registries


def test_the_private_names_of_a_registry_are_still_there() -> None:
    """What we read of prometheus_client's CollectorRegistry exists in this version."""
    users = registry(collector := Fixed())
    assert list(users._collector_to_names) == [collector]
    with users._lock:
        assert users._lock.locked()
    assert not users._target_info


def test_a_registry_without_the_private_names_is_one_collector() -> None:
    """Should they go, a registry is read as a whole, through its public method."""

    class Plain(CollectorRegistry):
        def __getattribute__(self, name: str) -> Any:
            caller = sys._getframe(1).f_globals["__name__"]
            if name == "_collector_to_names" and caller == "opsguard.metrics.crew":
                raise AttributeError(name)
            return super().__getattribute__(name)

    users, failed = Plain(), Failed()
    users.register(Fixed(metric("m", "gauge", GOOD)))
    assert samples(scrape(users), "") == {"m|v=good": 1}
    users.register(Raising())
    assert scrape(users, failed=failed) == ""
    assert failed.sites == ["collector:Plain"]


def test_a_locked_registry_is_read_without_the_lock() -> None:
    """A lock that is never released (a fork left it so) does not cost the users' metrics."""
    users = registry(Fixed(metric("m", "gauge", GOOD)))
    exposition = Exposition([users], failures=Failed(), budget=0.5)
    with users._lock:
        assert samples(body(exposition.render("GET", "", "")), "") == {"m|v=good": 1}


# --- many callers


class Counting:
    """Exposes how often it was asked, and can be held in the middle of an answer."""

    def __init__(self) -> None:
        self.calls = 0
        self.entered = threading.Event()
        self.released = threading.Event()

    def collect(self) -> Iterable[Metric]:
        self.calls += 1
        answer = self.calls
        self.entered.set()
        assert self.released.wait(30)
        return [GaugeMetricFamily("calls", "", value=answer)]


def waiting_in(name: str) -> int:
    """Return how many threads have a frame of a function of this name."""

    def has(frame: FrameType | None) -> bool:
        while frame is not None:
            if frame.f_code.co_name == name:
                return True
            frame = frame.f_back
        return False

    return sum(has(frame) for frame in sys._current_frames().values())


def test_many_callers_share_one_rendering() -> None:
    """15 who come while one is rendered share one more, begun after all of them came."""
    source = Counting()
    exposition = Exposition([source], failures=(failed := Failed()), budget=10)
    answers: list[str] = []

    def call() -> None:
        answers.append(body(exposition.render("GET", "", "")))

    threads = [threading.Thread(target=call) for _ in range(16)]
    threads[0].start()
    assert source.entered.wait(10)
    for thread in threads[1:]:
        thread.start()
    until(lambda: waiting_in("_shared") == 16)
    source.released.set()
    for thread in threads:
        thread.join(10)
    assert source.calls == 2
    assert sorted(samples(answer, "")["calls"] for answer in answers) == [1] + [2] * 15
    assert failed.seen == []


def test_nobody_is_given_an_old_answer() -> None:
    """16 threads count and scrape in turn: each sees at least what it counted itself."""
    count = Counter("seen", "", registry=(users := CollectorRegistry()))
    exposition = Exposition([users], failures=(failed := Failed()), budget=10)
    together = threading.Barrier(16)
    stale: list[tuple[float, float]] = []

    def call(accept: str) -> None:
        together.wait(10)
        for _ in range(5):
            count.inc()
            before = count._value.get()
            after = samples(body(exposition.render("GET", accept, "")), accept)["seen_total"]
            if after < before:
                stale.append((before, after))

    threads = [
        threading.Thread(target=call, args=(("", OPENMETRICS)[index % 2],)) for index in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert stale == []
    assert failed.seen == []


@FORMS
def test_a_rendering_that_is_stuck_does_not_hold_the_others(accept: str) -> None:
    """They are given an empty exposition, and the fault is counted."""
    source = Counting()
    exposition = Exposition([source], failures=(failed := Failed()), budget=0.02)
    first = threading.Thread(target=exposition.render, args=("GET", "", ""))
    first.start()
    assert source.entered.wait(10)
    try:
        for _ in range(2):
            response = exposition.render("GET", accept, "")
            assert (response.status, body(response)) == (200, "# EOF\n" if accept else "")
        assert failed.sites == ["exposition"] * 2
    finally:
        source.released.set()
        first.join(10)
    assert samples(body(exposition.render("GET", accept, "")), accept) == {"calls": 2}


def test_who_shares_a_rendering_that_gets_stuck_is_let_go() -> None:
    """Waiting has an end for those, too, whose rendering began and never came to its own."""

    class Gated:
        entered, gates = 0, (threading.Event(), threading.Event())

        def collect(self) -> Iterable[Metric]:
            gate = self.gates[self.entered]
            self.entered += 1
            assert gate.wait(30)
            return [GaugeMetricFamily("calls", "", value=self.entered)]

    source = Gated()
    exposition = Exposition([source], failures=(failed := Failed()), budget=0.5)
    answers: list[str] = []

    def call() -> None:
        answers.append(body(exposition.render("GET", "", "")))

    threads = [threading.Thread(target=call) for _ in range(3)]
    threads[0].start()
    until(lambda: source.entered == 1)
    for thread in threads[1:]:  # one of these leads the next rendering, the other waits for it
        thread.start()
    until(lambda: waiting_in("_shared") == 3)
    source.gates[0].set()
    until(lambda: source.entered == 2)
    until(lambda: len(answers) == 2)
    assert sorted(answers)[0] == ""
    assert [(site, type(error)) for site, error in failed.seen] == [("exposition", TimeoutError)]
    source.gates[1].set()
    for thread in threads:
        thread.join(10)
    assert len(answers) == 3


def test_a_fault_of_ours_gives_an_empty_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even an error that nobody foresaw is a 200, and the next scrape starts afresh."""
    exposition = Exposition([Fixed(metric("m", "gauge", GOOD))], failures=(failed := Failed()))
    with monkeypatch.context() as patch:
        patch.setattr(Exposition, "_blocks", lambda *_: 1 / 0)
        response = exposition.render("GET", "", "gzip")
        assert (response.status, gzip.decompress(response.body)) == (200, b"")
    assert [(site, type(error)) for site, error in failed.seen] == [
        ("exposition", ZeroDivisionError)
    ]
    assert samples(body(exposition.render("GET", "", "")), "") == {"m|v=good": 1}


def test_construction_starts_and_reads_nothing() -> None:
    """Before the first call no source is read and no thread runs."""
    users = registry(source := Counting())
    threads = threading.active_count()
    Exposition([source, users], failures=Failed())
    assert (source.calls, threading.active_count()) == (0, threads)


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="no fork on this platform")
def test_a_fork_in_the_middle_of_a_scrape() -> None:
    """A child forked while its parent renders, locks held, can be scraped like any other."""
    script = """
        import os, sys, threading, warnings
        from prometheus_client import CollectorRegistry, Gauge
        from prometheus_client.metrics_core import GaugeMetricFamily
        from opsguard.metrics.exposition import Exposition
        warnings.simplefilter("ignore")  # forking with threads is what this is about
        parent, entered = os.getpid(), threading.Event()

        class Held:
            def collect(self):
                if os.getpid() == parent:
                    entered.set()
                    threading.Event().wait()
                return [GaugeMetricFamily("held", "", value=1)]

        users = CollectorRegistry()
        Gauge("users", "", registry=users).set(2)
        exposition = Exposition([Held(), users], failures=print, budget=0.5)
        threading.Thread(
            target=exposition.render, args=("GET", "", ""), daemon=True
        ).start()
        entered.wait()
        users._lock.acquire()
        child = os.fork()
        if child == 0:
            body = exposition.render("GET", "", "").body.decode()
            print(*(line for line in body.splitlines() if line[0] != "#"), flush=True)
            os._exit(0)
        os._exit(os.waitpid(child, 0)[1])
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        env=dict(__import__("os").environ, PYTHONPATH=":".join(filter(None, sys.path))),
    )
    assert (done.stdout, done.returncode) == ("held 1.0 users 2.0\n", 0), done.stderr
