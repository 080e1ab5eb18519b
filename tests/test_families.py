"""Families: their text is what prometheus_client reads, their size has a limit, their labels are
harmless.
"""

from __future__ import annotations

import logging
import math
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families as text
from prometheus_client.samples import Sample

from opsguard.exceptions import DeclarationError
from opsguard.exchange import Exchange
from opsguard.metrics import Metrics
from opsguard.metrics.exposition import Exposition
from opsguard.metrics.families import OVERFLOW, Family, clean
from opsguard.metrics.http import HttpMetrics
from opsguard.metrics.layout import SPARE_CELLS
from opsguard.metrics.store import Store
from opsguard.metrics.text import escape
from opsguard.metrics.text import number as written_number
from opsguard.settings import Metrics as Options

FORMS = pytest.mark.parametrize("form", [False, True], ids=["text", "openmetrics"])
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


class Failed:
    def __init__(self) -> None:
        self.sites: list[str] = []

    def __call__(self, site: str, error: BaseException | None) -> None:
        self.sites.append(site)


def made(limit: int = 2_000, **options: Any) -> Metrics:
    failed = Failed()
    return Metrics(Store(lambda: None, failed, **options), limit=limit, failed=failed)


def page(metrics: Metrics, form: bool) -> str:
    texts = "".join([block for _, block in metrics.expose(form)])
    return f"{texts}# EOF\n" if form else texts


def parsed(metrics: Metrics, form: bool) -> list[Any]:
    """The families as the form's own reader gives them."""
    return list((openmetrics if form else text)(page(metrics, form)))


def samples(metrics: Metrics, form: bool = False) -> Samples:
    return {key(s): s.value for family in parsed(metrics, form) for s in family.samples}


def key(sample: Sample) -> tuple[str, tuple[tuple[str, str], ...]]:
    return sample.name, tuple(sorted(sample.labels.items()))


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    """What the logger `opsguard` warns of."""

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    said: list[str] = []
    logger, kept = logging.getLogger("opsguard"), Kept(logging.WARNING)
    logger.addHandler(kept)
    yield said
    logger.removeHandler(kept)


# --- the text


@FORMS
def test_every_type_is_read_back_with_its_name_help_labels_and_numbers(form: bool) -> None:
    metrics = made()
    metrics.counter("orders_total", "Orders placed.", ("plan",)).labels("pro").inc(3)
    metrics.gauge("temperature", 'Degrees\n"C" \\ F', ("room",)).labels('a"b\\c\nd').set(-1.5)
    histogram = metrics.histogram("wait_seconds", "Waits.", ("queue",), (0.1, 1, 10))
    for value in (0.05, 0.1, 0.5, 100):
        histogram.labels("q").observe(value)
    found = {family.name: family for family in parsed(metrics, form)}
    assert {name: (f.type, f.documentation) for name, f in found.items()} == {
        "orders": ("counter", "Orders placed."),
        "temperature": ("gauge", 'Degrees\n"C" \\ F'),
        "wait_seconds": ("histogram", "Waits."),
    }
    assert samples(metrics, form) == {
        ("orders_total", (("plan", "pro"),)): 3.0,
        ("temperature", (("room", 'a"b\\c\nd'),)): -1.5,
        ("wait_seconds_bucket", (("le", "0.1"), ("queue", "q"))): 2.0,
        ("wait_seconds_bucket", (("le", "1.0"), ("queue", "q"))): 3.0,
        ("wait_seconds_bucket", (("le", "10.0"), ("queue", "q"))): 3.0,
        ("wait_seconds_bucket", (("le", "+Inf"), ("queue", "q"))): 4.0,
        ("wait_seconds_count", (("queue", "q"),)): 4.0,
        ("wait_seconds_sum", (("queue", "q"),)): 100.65,
    }


@FORMS
def test_series_without_labels_are_read_back(form: bool) -> None:
    metrics = made()
    metrics.counter("a_total").inc()
    metrics.gauge("b").set(2)
    metrics.histogram("c", buckets=(1,)).observe(0.5)
    assert samples(metrics, form) == {
        ("a_total", ()): 1.0,
        ("b", ()): 2.0,
        ("c_bucket", (("le", "1.0"),)): 1.0,
        ("c_bucket", (("le", "+Inf"),)): 1.0,
        ("c_count", ()): 1.0,
        ("c_sum", ()): 0.5,
    }


@FORMS
def test_a_counter_without_total_is_exposed_untyped_under_exactly_its_name(form: bool) -> None:
    metrics = made()
    metrics.counter("orders", "Orders.").inc(2)
    (family,) = parsed(metrics, form)
    assert (family.name, family.type) == ("orders", "unknown")
    assert [(s.name, s.value) for s in family.samples] == [("orders", 2.0)]
    assert f"# TYPE orders {'unknown' if form else 'untyped'}\n" in page(metrics, form)


@FORMS
@pytest.mark.parametrize("value", [math.inf, -math.inf, 1e300, 5e-324, -0.0, 2**63])
def test_extreme_values_are_read_back(value: float, form: bool) -> None:
    metrics = made()
    metrics.gauge("g").set(value)
    assert samples(metrics, form) == {("g", ()): float(value)}


@FORMS
def test_nan_is_read_back(form: bool) -> None:
    metrics = made()
    metrics.gauge("g").set(math.nan)
    assert math.isnan(samples(metrics, form)["g", ()])


def test_an_observed_nan_falls_in_the_last_bucket() -> None:
    metrics = made()
    metrics.histogram("h", buckets=(1,)).observe(math.nan)
    found = samples(metrics)
    assert found["h_bucket", (("le", "1.0"),)] == 0.0
    assert found["h_count", ()] == 1.0
    assert math.isnan(found["h_sum", ()])


def test_numbers_are_written_as_both_formats_have_them() -> None:
    written = [written_number(value) for value in (1, 0.1, math.inf, -math.inf, math.nan)]
    assert written == ["1.0", "0.1", "+Inf", "-Inf", "NaN"]


@FORMS
def test_great_bounds_are_spelled_as_prometheus_client_does(form: bool) -> None:
    """On the page as in a registry."""
    metrics = made()
    metrics.histogram("h", buckets=(1e5, 1e6, 2.5e7)).observe(1)
    registry = CollectorRegistry()
    registry.register(metrics)
    for written in (page(metrics, form), generate_latest(registry).decode()):
        found = re.findall(r'^h_bucket\{le="(.*)"\}', written, re.MULTILINE)
        assert found == ["100000.0", "1e+06", "2.5e+07", "+Inf"]


@FORMS
@pytest.mark.parametrize("bound", [-1.0, -math.inf], ids=str)
def test_a_histogram_with_a_negative_bound_has_buckets_alone(bound: float, form: bool) -> None:
    """Its sum may fall, and OpenMetrics allows no count without one: with either, a strict reader
    would refuse the page.
    """
    metrics = made()
    drift = metrics.histogram("drift_seconds", "", ("host",), (bound, 0, 1))
    drift.labels("a").observe(-0.5)
    drift.labels("a").observe(3, {"trace_id": "abc"})
    registry = CollectorRegistry()
    registry.register(metrics)
    collected = openmetrics(generate_openmetrics(registry).decode())
    expected = {
        ("drift_seconds_bucket", (("host", "a"), ("le", le))): count
        for le, count in ((written_number(bound), 0.0), ("0.0", 1.0), ("1.0", 1.0), ("+Inf", 2.0))
    }
    assert samples(metrics, form) == expected
    assert {key(s): s.value for family in collected for s in family.samples} == expected


def test_families_without_series_are_left_out() -> None:
    metrics = made()
    metrics.counter("a_total", "", ("x",))
    assert page(metrics, False) == ""
    assert list(metrics.collect()) == []


def test_a_family_whose_function_raises_costs_only_itself_and_is_counted() -> None:
    def broken() -> float:
        raise LookupError("no value")

    metrics = made()
    metrics.gauge("broken").set_function(broken)
    metrics.gauge("sound").set(1)
    assert samples(metrics) == {("sound", ()): 1.0}
    assert metrics._failed.sites == ["collector:broken"]  # type: ignore[attr-defined]


# --- as a collector of prometheus_client


@FORMS
def test_metrics_register_in_a_registry_of_prometheus_client(form: bool) -> None:
    metrics = made()
    metrics.counter("orders_total", "Orders.", ("plan",)).labels("pro").inc(3)
    metrics.counter("plain").inc()
    metrics.gauge("g").set(1.5)
    metrics.gauge("asked").set_function(lambda: 42.0)
    metrics.histogram("h", "", ("x",), (1,)).labels("y").observe(2)
    registry = CollectorRegistry()
    registry.register(metrics)
    page = (generate_openmetrics if form else generate_latest)(registry).decode()
    read = (openmetrics if form else text)(page)
    assert {key(s): s.value for family in read for s in family.samples} == {
        ("orders_total", (("plan", "pro"),)): 3.0,
        ("plain", ()): 1.0,
        ("g", ()): 1.5,
        ("asked", ()): 42.0,
        ("h_bucket", (("le", "1.0"), ("x", "y"))): 0.0,
        ("h_bucket", (("le", "+Inf"), ("x", "y"))): 1.0,
        ("h_count", (("x", "y"),)): 1.0,
        ("h_sum", (("x", "y"),)): 2.0,
    }


def test_in_a_registry_too_a_function_that_raises_costs_only_its_family() -> None:
    def broken() -> float:
        raise LookupError("no value")

    metrics = made()
    metrics.gauge("broken").set_function(broken)
    metrics.gauge("sound").set(1)
    registry = CollectorRegistry()
    registry.register(metrics)
    assert "sound 1.0" in generate_latest(registry).decode()


# --- the limit


def test_label_sets_beyond_the_limit_are_one_series_counted_and_said_once(
    warnings: list[str],
) -> None:
    metrics = made(limit=3)
    counter = metrics.counter("c_total", "", ("v",))
    for number in range(10):
        counter.labels(str(number)).inc()
    found = samples(metrics)
    assert {labels: value for (name, labels), value in found.items() if name == "c_total"} == {
        (("v", "0"),): 1.0,
        (("v", "1"),): 1.0,
        (("v", "2"),): 1.0,
        (("v", OVERFLOW),): 7.0,
    }
    assert found["opsguard_series_overflow_total", (("metric", "c_total"),)] == 7.0
    assert len(warnings) == 1
    assert "c_total has reached its 3 label sets" in warnings[0]


def test_the_series_there_are_keep_counting_when_the_limit_is_reached() -> None:
    metrics = made(limit=1)
    counter = metrics.counter("c_total", "", ("v",))
    for value in ("a", "b", "a", "b", "a"):
        counter.labels(value).inc()
    found = samples(metrics)
    assert found["c_total", (("v", "a"),)] == 3.0
    assert found["c_total", (("v", OVERFLOW),)] == 2.0


def test_the_limit_holds_for_families_that_are_there_and_those_to_come() -> None:
    metrics = made()
    before = metrics.gauge("before", "", ("v",))
    metrics.set_limit(1)
    after = metrics.gauge("after", "", ("v",))
    for gauge in (before, after):
        for value in ("a", "b", "c"):
            gauge.labels(value).set(1)
    values = {labels for (name, labels) in samples(metrics) if name in ("before", "after")}
    assert values == {(("v", "a"),), (("v", OVERFLOW),)}


def test_many_families_may_overflow_under_a_small_limit() -> None:
    """The counter of overflows has a limit too, and must not count itself for ever."""
    metrics = made(limit=1)
    for family in ("a_total", "b_total", "c_total"):
        for value in ("x", "y"):
            metrics.counter(family, "", ("v",)).labels(value).inc()
    found = samples(metrics)
    for family in ("a_total", "b_total", "c_total"):
        assert found[family, (("v", "x"),)] == found[family, (("v", OVERFLOW),)] == 1.0


def test_an_instrument_without_labels_is_no_label_set() -> None:
    metrics = made(limit=0)
    metrics.counter("c_total").inc()
    assert samples(metrics) == {("c_total", ()): 1.0}


def test_a_full_store_takes_samples_and_shows_those_that_had_room() -> None:
    """No exception reaches who counts; what was there goes on."""
    metrics = made(limit=10_000)
    metrics.store._limit = 1 << 16
    counter = metrics.counter("c_total", "", ("v",))
    for number in range(3_000):
        counter.labels(str(number)).inc()
    other = metrics.histogram("late", "", ("v",))
    other.labels("a").observe(1)
    metrics.gauge("later").set(1)
    counter.labels("0").inc()
    found = samples(metrics)
    assert found["c_total", (("v", "0"),)] == 2.0
    assert ("c_total", (("v", "2999"),)) not in found
    assert ("late_count", (("v", "a"),)) not in found


def test_a_family_that_never_got_room_writes_to_the_spare_cells() -> None:
    store = Store(lambda: None, Failed(), limit=1 << 15)
    wide = Family(store, "wide", "", "histogram", buckets=tuple(map(float, range(500))))
    Family(store, "n", "", "gauge").at(())
    store.table(0, 400)
    at = wide.at(())
    assert at == store.spare
    store.cells[at + wide.width - 1] += 1.0
    assert len(wide) == 0


@pytest.mark.parametrize("series", [3, 0], ids=["with series", "without"])
def test_the_widest_family_fits_the_spare_cells(series: int) -> None:
    """A write to them stays within them, or it would change somebody's numbers."""
    metrics = made()
    widest = metrics.histogram("h", "", ("v",), tuple(map(float, range(500))))
    for number in range(series):
        widest.labels(str(number)).observe(1)
    assert metrics.family("probe", "", "gauge", ()).width == 1
    assert widest._family.width <= SPARE_CELLS


def test_no_lock_is_held_while_the_warning_is_logged() -> None:
    """A handler may wait for another thread that counts; held, both would wait for ever."""
    metrics = made(limit=1)
    counter = metrics.counter("c_total", "", ("v",))
    free: list[bool] = []

    class Counting(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            def other() -> None:
                free.append(metrics.store.lock.acquire(timeout=1))
                if free[-1]:
                    metrics.store.lock.release()

            thread = threading.Thread(target=other)
            thread.start()
            thread.join()

    handler = Counting(logging.WARNING)
    logging.getLogger("opsguard").addHandler(handler)
    try:
        counter.labels("a").inc()
        counter.labels("b").inc()
    finally:
        logging.getLogger("opsguard").removeHandler(handler)
    assert free == [True]


# --- label values


class Unprintable:
    def __str__(self) -> str:
        raise RuntimeError("no text for you")


ODD = [
    pytest.param("", "", id="empty"),
    pytest.param("é€😀", "é€😀", id="not ASCII"),
    pytest.param("a\0b", "a\N{REPLACEMENT CHARACTER}b", id="NUL"),
    pytest.param("a\ud800b", "a?b", id="lone surrogate"),
    pytest.param('q"\\', 'q"\\', id="quote and backslash"),
    pytest.param("a\nb\r\u2028c", "a\nb\r\u2028c", id="line ends"),
    pytest.param("x" * 10_240, "x" * 1_023 + "…", id="10 KB"),
    pytest.param("x" * 1_024, "x" * 1_024, id="just as long as may be"),
    pytest.param(404, "404", id="a number"),
    pytest.param(None, "None", id="None"),
    pytest.param(b"\xff", "b'\\xff'", id="bytes"),
    pytest.param(["a"], "['a']", id="unhashable"),
    pytest.param(Unprintable(), "<unprintable>", id="without text"),
]


@pytest.mark.parametrize(("value", "expected"), ODD)
def test_a_label_value_is_cleaned(value: object, expected: str) -> None:
    assert clean(value) == expected


@FORMS
@pytest.mark.parametrize(("value", "expected"), ODD)
def test_any_label_value_can_be_counted_and_scraped(
    value: object, expected: str, form: bool
) -> None:
    metrics = made()
    counter = metrics.counter("c_total", "", ("v",))
    counter.labels(value).inc()
    counter.labels(v=value).inc()
    assert samples(metrics, form) == {("c_total", (("v", expected),)): 2.0}
    page(metrics, form).encode()


@pytest.mark.parametrize(("value", "expected"), ODD)
def test_a_series_is_removed_by_the_value_it_was_made_with(value: object, expected: str) -> None:
    metrics = made()
    gauge = metrics.gauge("g", "", ("v",))
    gauge.labels(value).set(1)
    gauge.remove(value)
    assert samples(metrics) == {}


def test_escaping_is_for_quotes_backslashes_and_newlines_only() -> None:
    assert escape("plain é\r") == "plain é\r"
    assert escape('a"b\\c\nd') == 'a\\"b\\\\c\\nd'


@FORMS
def test_help_text_cannot_break_the_scrape(form: bool) -> None:
    metrics = made()
    metrics.gauge("g", 'line\nbreak \\ "quote" \0 \ud800').set(1)
    accept = "application/openmetrics-text" if form else ""
    answer = Exposition([metrics], failures=Failed()).render("GET", accept, "")
    (family,) = (openmetrics if form else text)(answer.body.decode())
    assert family.documentation.startswith('line\nbreak \\ "quote" ')


# --- taking off the page


def test_what_was_cleared_is_made_again_at_a_cost_that_grows_with_it_alone() -> None:
    """As exporters do at each refresh. What is counted is calls."""

    def calls(number: int) -> int:
        gauge = made().gauge("queue_length", "", ("queue",))

        def fill() -> None:
            for queue in range(number):
                gauge.labels(queue).set(queue)

        fill()
        gauge.clear()
        seen = 0

        def see(frame: object, event: str, argument: object) -> None:
            nonlocal seen
            seen += 1

        sys.setprofile(see)
        try:
            fill()
            gauge.clear()
            for queue in range(number):
                gauge.remove(queue)
        finally:
            sys.setprofile(None)
        return seen

    assert calls(400) < 2.5 * calls(200)


def test_a_family_that_is_cleared_leaves_others_on_the_page() -> None:
    """Their records lie between one another, and their label values may be of any length."""
    metrics = made()
    first, second = (metrics.counter(f"{name}_total", "", ("v",)) for name in "ab")
    values = ["", "x" * 7, "x" * 8, "é" * 100, "\n"]
    for value in values:
        first.labels(value).inc()
        second.labels(value).inc(2)
    first.clear()
    second.remove("x" * 8)
    first.labels("").inc(5)
    kept = [("b_total", (("v", value),)) for value in values if value != "x" * 8]
    assert samples(metrics) == {("a_total", (("v", ""),)): 5.0, **dict.fromkeys(kept, 2.0)}


# --- exemplars


def test_exemplars_are_in_openmetrics_only() -> None:
    metrics = made()
    metrics.counter("c_total").inc(2, {"trace_id": "abc"})
    metrics.histogram("h", buckets=(1, 2)).observe(1.5, {"trace_id": "def"})
    found = {
        (s.name, s.labels.get("le")): s.exemplar
        for family in parsed(metrics, True)
        for s in family.samples
        if s.exemplar
    }
    assert {where: (e.labels, e.value) for where, e in found.items()} == {
        ("c_total", None): ({"trace_id": "abc"}, 2.0),
        ("h_bucket", "2.0"): ({"trace_id": "def"}, 1.5),
    }
    assert all(exemplar.timestamp is not None for exemplar in found.values())
    assert "#  {" not in page(metrics, False)
    assert "trace_id" not in page(metrics, False)


def test_the_latest_exemplar_counts() -> None:
    metrics = made()
    counter = metrics.counter("c_total")
    counter.inc(1, {"trace_id": "old"})
    counter.inc()
    counter.inc(1, {"trace_id": "new"})
    assert 'trace_id="new"' in page(metrics, True)
    assert 'trace_id="old"' not in page(metrics, True)


def test_an_exemplar_of_a_counter_without_total_does_not_break_the_scrape() -> None:
    """OpenMetrics knows no exemplars on unknown metrics."""
    metrics = made()
    metrics.counter("orders").inc(1, {"trace_id": "abc"})
    assert samples(metrics, True) == {("orders", ()): 1.0}


def test_an_exemplar_goes_with_its_series() -> None:
    metrics = made()
    counter = metrics.counter("c_total", "", ("v",))
    counter.labels("a\0").inc(1, {"trace_id": "abc"})
    assert 'trace_id="abc"' in page(metrics, True)
    counter.remove("a\0")
    counter.labels("a\0").inc()
    assert 'trace_id="abc"' not in page(metrics, True)


def test_exemplars_of_series_without_room_are_bounded_too() -> None:
    metrics = made(limit=3)
    counter = metrics.counter("c_total", "", ("v",))
    for number in range(50):
        counter.labels(str(number)).inc(1, {"trace_id": str(number)})
    assert len(counter._family.exemplars) <= 4


def test_an_exemplar_with_odd_text_does_not_break_the_scrape() -> None:
    metrics = made()
    metrics.counter("c_total").inc(1, {"trace_id": "a\0\ud800"})
    page(metrics, True).encode()
    assert samples(metrics, True) == {("c_total", ()): 1.0}


# --- declaring


@pytest.mark.parametrize(
    "declare",
    [
        pytest.param(lambda m: m.counter("orders-total"), id="name with a dash"),
        pytest.param(lambda m: m.gauge(""), id="empty name"),
        pytest.param(lambda m: m.gauge("1a"), id="name with a digit in front"),
        pytest.param(lambda m: m.gauge("é"), id="name not ASCII"),
        pytest.param(lambda m: m.gauge("a\n"), id="name with a newline"),
        pytest.param(lambda m: m.gauge("a", "", ("b-c",)), id="label with a dash"),
        pytest.param(lambda m: m.gauge("a", "", ("__b",)), id="reserved label"),
        pytest.param(lambda m: m.gauge("a", "", ("b:c",)), id="label with a colon"),
        pytest.param(lambda m: m.gauge("a", "", ("b", "b")), id="label twice"),
        pytest.param(lambda m: m.histogram("a", "", ("le",)), id="label le"),
        pytest.param(lambda m: m.histogram("a", "", (), ()), id="no buckets"),
        pytest.param(lambda m: m.histogram("a", "", (), (2, 1)), id="buckets that fall"),
        pytest.param(lambda m: m.histogram("a", "", (), (1, 1)), id="buckets that stay"),
        pytest.param(lambda m: m.histogram("a", "", (), range(501)), id="501 buckets"),
        pytest.param(lambda m: m.histogram("a", "", (), ("x",)), id="buckets of text"),
        pytest.param(
            lambda m: m.histogram("a", "", (), (1, float("nan"))), id="a bucket that is no number"
        ),
    ],
)
def test_what_prometheus_would_refuse_is_refused_when_declared(
    declare: Callable[[Metrics], object],
) -> None:
    metrics = made()
    with pytest.raises(DeclarationError):
        declare(metrics)
    metrics.gauge("a")  # nothing is left of it


def test_declaring_the_same_again_gives_the_first() -> None:
    metrics = made()
    assert metrics.counter("a_total", "x", ("l",)) is metrics.counter("a_total", "y", ["l"])
    assert metrics.gauge("b") is metrics.gauge("b")
    assert metrics.histogram("c", buckets=(1, 2)) is metrics.histogram(
        "c", buckets=(1.0, 2.0, math.inf)
    )


@pytest.mark.parametrize(
    "declare",
    [
        pytest.param(lambda m: m.gauge("a_total", "", ("l",)), id="another type"),
        pytest.param(lambda m: m.counter("a_total"), id="no labels"),
        pytest.param(lambda m: m.counter("a_total", "", ("m",)), id="other labels"),
        pytest.param(lambda m: m.histogram("h", "", (), (1, 3)), id="other buckets"),
        pytest.param(lambda m: m.counter("opsguard_series_overflow_total"), id="a name of ours"),
        pytest.param(lambda m: m.family("a_total", "", "gauge", ()), id="a family of ours"),
    ],
)
def test_declaring_it_differently_is_an_error(declare: Callable[[Metrics], object]) -> None:
    metrics = made()
    metrics.counter("a_total", "", ("l",))
    metrics.histogram("h", "", (), (1, 2))
    with pytest.raises(DeclarationError, match="is declared twice"):
        declare(metrics)


def test_threads_that_declare_the_same_get_the_same() -> None:
    metrics = made()
    barrier = threading.Barrier(8)
    found: list[object] = []

    def declare() -> None:
        barrier.wait()
        found.append(metrics.counter("a_total"))

    threads = [threading.Thread(target=declare) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(instrument) for instrument in found}) == 1


# --- HTTP metrics: names and labels by settings


def http(**options: Any) -> tuple[Metrics, HttpMetrics]:
    metrics = made()
    return metrics, HttpMetrics(metrics, Options(**options))


def ended(method: str = "GET", endpoint: str = "/a", status: int = 200, **values: Any) -> Exchange:
    """A request that took 0.1 s to its first and last byte."""
    exchange = Exchange()
    given = {"ended": 0.1, "first_byte": 0.1, "received": 0, "sent": 0, "started": 0.0, **values}
    for name, value in given.items():
        setattr(exchange, name, value)
    exchange.method, exchange.endpoint, exchange.status = method, endpoint, status
    exchange.series = None
    exchange.request_id = "an-id"
    return exchange


def recorded(**options: Any) -> tuple[set[str], set[str]]:
    """Names of families and of labels after one failed upload and a websocket."""
    metrics, counted = http(**options)
    exchange = ended(status=500, received=10, sent=20)
    counted.begin_with()(exchange)
    counted.record_with()(exchange)
    counted.error("GET", "/a", "Boom")
    counted.socket_opened("/ws")
    counted.socket_closed("/ws")
    found = parsed(metrics, False)
    labels = {name for f in found for s in f.samples for name in s.labels} - {"le"}
    names = {s.name.removesuffix("_bucket") for f in found for s in f.samples}
    return {n for n in names if not n.endswith(("_count", "_sum"))}, labels


HTTP = {
    "http_requests_total",
    "http_request_duration_seconds",
    "http_request_first_byte_seconds",
    "http_requests_in_progress",
    "http_request_size_bytes",
    "http_response_size_bytes",
    "http_errors_total",
    "websocket_connections_total",
    "websocket_connections_in_progress",
}


def test_the_names_without_settings() -> None:
    assert recorded() == (HTTP, {"method", "endpoint", "status", "error_type"})


def test_a_prefix_stands_for_http() -> None:
    names, _ = recorded(prefix="shop")
    assert names == {name.replace("http", "shop", 1) for name in HTTP}


@pytest.mark.parametrize("name", sorted(HTTP))
def test_every_name_can_be_changed_to_exactly_another(name: str) -> None:
    names, _ = recorded(prefix="shop", names={name: "mine"})
    others = {other.replace("http", "shop", 1) for other in HTTP - {name}}
    assert names == others | {"mine"}


def test_every_label_name_can_be_changed() -> None:
    _, labels = recorded(
        labels={"method": "verb", "endpoint": "route", "status": "code", "error_type": "kind"}
    )
    assert labels == {"verb", "route", "code", "kind"}


@FORMS
def test_a_requests_counter_renamed_to_no_total_is_untyped_under_that_name(form: bool) -> None:
    metrics, counted = http(names={"http_requests_total": "http_requests"})
    counted.record_with()(ended())
    types = {family.name: family.type for family in parsed(metrics, form)}
    assert types["http_requests"] == "unknown"


def test_the_opentelemetry_schema_has_its_names_and_labels() -> None:
    metrics, counted = http(schema="otel")
    counted.record_with()(ended(endpoint="/items/{id}", status=404, received=5, sent=6))
    found = samples(metrics)
    route = (("http_request_method", "GET"), ("http_route", "/items/{id}"))
    by_status = (route[0], ("http_response_status_code", "404"), route[1])
    assert found["http_server_request_duration_seconds_count", by_status] == 1.0
    assert found["http_server_request_body_size_bytes_sum", route] == 5.0
    assert found["http_server_response_body_size_bytes_sum", route] == 6.0
    assert found["http_server_active_requests", route] == 0.0


def test_names_by_settings_win_over_the_schema() -> None:
    names, labels = recorded(
        schema="otel",
        names={"http_request_duration_seconds": "latency"},
        labels={"endpoint": "route"},
    )
    assert "latency" in names
    assert {"route", "http_request_method"} <= labels


@pytest.mark.parametrize("gil", [True, False], ids=["with a GIL", "without"])
def test_a_request_is_recorded_in_all_its_series(gil: bool) -> None:
    metrics = made(gil=gil)
    counted = HttpMetrics(metrics, Options(buckets=(0.1, 1.0)))
    begin = counted.begin_with()
    begin(ended("POST"))
    exchange = ended("POST", "/a", 201, ended=0.5, first_byte=0.05, received=150, sent=2_000)
    begin(exchange)
    counted.record_with()(exchange)
    found = samples(metrics)
    route = (("endpoint", "/a"), ("method", "POST"))
    assert found["http_requests_total", (*route, ("status", "201"))] == 1.0
    assert found["http_requests_in_progress", route] == 1.0
    for name, total, below in (
        ("http_request_duration_seconds", 0.5, {"0.1": 0, "1.0": 1}),
        ("http_request_first_byte_seconds", 0.05, {"0.1": 1, "1.0": 1}),
        ("http_request_size_bytes", 150, {"100.0": 0, "1000.0": 1}),
        ("http_response_size_bytes", 2_000, {"1000.0": 0, "10000.0": 1}),
    ):
        assert found[f"{name}_sum", route] == total
        assert found[f"{name}_count", route] == 1.0
        for bound, count in below.items():
            labels = tuple(sorted((*route, ("le", bound))))
            assert found[f"{name}_bucket", labels] == count


def test_unknown_methods_are_one_series() -> None:
    metrics, counted = http()
    begin, record = counted.begin_with(), counted.record_with()
    for method in ("BOGUS", "get", "", "X" * 8_192):
        exchange = ended(method, "/", 405)
        begin(exchange)
        record(exchange)
        record(ended(method, "/", 405))
        counted.error(method, "/", "Boom")
    errors = (("endpoint", "/"), ("error_type", "Boom"), ("method", "_OTHER"))
    assert samples(metrics)["http_errors_total", errors] == 4.0
    labels = (("endpoint", "/"), ("method", "_OTHER"), ("status", "405"))
    assert samples(metrics)["http_requests_total", labels] == 8.0


def test_routes_and_statuses_beyond_the_limits_are_not_kept() -> None:
    """Whatever templates and statuses an app makes, memory is bounded and no request is lost."""
    metrics = made(limit=3)
    counted = HttpMetrics(metrics, Options())
    record = counted.record_with()
    for number in range(10):
        record(ended("GET", f"/{number}"))
    for status in range(2_000):
        record(ended("GET", "/0", status))
    assert len(counted.routes) == 3
    assert len(counted.series("GET", "/0").outcomes) <= 1_000
    totals = {k: v for k, v in samples(metrics).items() if k[0] == "http_requests_total"}
    assert len(totals) == 4
    assert sum(totals.values()) == 2_010


def test_threads_that_meet_a_new_route_at_once_share_its_series() -> None:
    metrics, counted = http()
    record = counted.record_with()
    barrier = threading.Barrier(8)

    def serve() -> None:
        barrier.wait()
        for number in range(100):
            record(ended("GET", f"/{number}"))

    threads = [threading.Thread(target=serve) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    totals = [v for k, v in samples(metrics).items() if k[0] == "http_requests_total"]
    assert totals == [8.0] * 100


def names_of(found: Iterable[Any]) -> list[str]:
    return [family.name for family in found]


def test_families_are_exposed_in_the_order_of_their_declaration() -> None:
    metrics = made()
    for name in ("c", "a", "b"):
        metrics.gauge(name).set(1)
    assert names_of(parsed(metrics, False)) == ["c", "a", "b"]


def test_a_complaint_of_the_file_is_told_without_the_lock() -> None:
    """A log handler may count in a thread that waits for what the teller's handler holds."""
    reached: list[bool] = []

    def nowhere() -> Any:
        raise PermissionError("no")

    def complain(site: str, error: BaseException | None) -> None:
        def count() -> None:
            reached.append(store.lock.acquire(timeout=5.0))

        other = threading.Thread(target=count)
        other.start()
        other.join()

    store = Store(nowhere, complain)
    Family(store, "n", "", "counter", ("a",)).at(("x",))
    assert reached == [True]
