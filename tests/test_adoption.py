"""Users' own metrics of prometheus_client in our store: same objects, same numbers, one page."""

from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import prometheus_client
import pytest
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Enum,
    Gauge,
    Histogram,
    Info,
    Summary,
    generate_latest,
    values,
)
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.values import MutexValue

from opsguard import OpsGuard
from opsguard.metrics import Metrics, adoption
from opsguard.metrics.cells import Cell, LatestCell, LockedCell, Shared, take
from opsguard.metrics.exposition import Exposition
from opsguard.metrics.shapes import plain_values, shape_of
from opsguard.metrics.store import Store
from opsguard.testing import Request, call_wsgi, release_metrics
from opsguard_wsgi import install

OPENMETRICS = "application/openmetrics-text"


class Failed:
    def __init__(self) -> None:
        self.seen: list[tuple[str, BaseException | None]] = []

    def __call__(self, site: str, error: BaseException | None = None) -> None:
        self.seen.append((site, error))


class World:
    """A registry of users, an OpsGuard's metrics, and their page."""

    def __init__(self, *, gil: bool | None = None, limit: int = 2000) -> None:
        self.failed = Failed()
        self.users = CollectorRegistry()
        self.metrics = Metrics(
            Store(lambda: None, self.failed, gil=gil), limit=limit, failed=self.failed
        )

    def adopt(self) -> None:
        adoption.adopt(self.metrics, self.failed, (self.users,))

    def page(self, accept: str = "", metrics: Metrics | None = None) -> str:
        metrics = metrics or self.metrics
        exposition = Exposition(
            (metrics, adoption.Beside((metrics,)), self.users),
            failures=self.failed,
            covered=adoption.covers,
        )
        return exposition.render("GET", accept, "").body.decode()

    def samples(self, accept: str = "") -> dict[str, float]:
        lines = [line for line in self.page(accept).splitlines() if not line.startswith("#")]
        pairs = [line.split(" # ")[0].rsplit(" ", 1) for line in lines]
        return {name: float(value) for name, value in pairs if not name.startswith("opsguard_")}


@pytest.fixture(params=[True, False], ids=["gil", "no-gil"])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    made = World(gil=request.param)
    yield made
    adoption.release()
    assert made.failed.seen == []


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "this should have come true by now"
        time.sleep(0)


def cell_type(world: World) -> type[Cell]:
    return Cell if world.metrics.store.gil else LockedCell


# --- what is adopted


def test_what_was_counted_before_stays_and_goes_on(world: World) -> None:
    """The four kinds keep their numbers at adoption, and count in the store afterwards."""
    orders = Counter("orders", "", registry=world.users)
    depth = Gauge("depth", "", ["queue"], registry=world.users)
    price = Histogram("price", "", ["plan"], buckets=(1, 10), registry=world.users)
    size = Summary("size", "", registry=world.users)
    orders.inc(2)
    depth.labels("mail").set(5)
    price.labels("pro").observe(7)
    size.observe(3)
    world.adopt()
    assert type(orders._value) is cell_type(world)
    orders.inc()
    depth.labels("mail").dec()
    depth.labels("print").inc(2.5)
    price.labels("pro").observe(0.5)
    price.labels("free").observe(11)
    size.observe(4)
    assert world.samples() == {
        "orders_total": 3,
        'depth{queue="mail"}': 4,
        'depth{queue="print"}': 2.5,
        'price_bucket{plan="pro",le="1.0"}': 1,
        'price_bucket{plan="pro",le="10.0"}': 2,
        'price_bucket{plan="pro",le="+Inf"}': 2,
        'price_count{plan="pro"}': 2,
        'price_sum{plan="pro"}': 7.5,
        'price_bucket{plan="free",le="1.0"}': 0,
        'price_bucket{plan="free",le="10.0"}': 0,
        'price_bucket{plan="free",le="+Inf"}': 1,
        'price_count{plan="free"}': 1,
        'price_sum{plan="free"}': 11,
        "size_count": 2,
        "size_sum": 7,
    }


def test_metrics_made_later_are_adopted_when_they_are_registered(world: World) -> None:
    """A module that is imported after install makes metrics like any other."""
    world.adopt()
    late = Counter("late", "", ["kind"], registry=world.users)
    late.labels("a").inc()
    late.labels(kind="a").inc()
    assert type(late.labels("a")._value) is cell_type(world)
    assert world.samples() == {'late_total{kind="a"}': 2}


def test_the_metric_itself_says_the_same(world: World) -> None:
    """`collect()`, `get_sample_value` and `generate_latest` of the registry read our cells."""
    world.adopt()
    price = Histogram("price", "", ["plan"], buckets=(1, 10), registry=world.users)
    price.labels("pro").observe(7)
    assert world.users.get_sample_value("price_sum", {"plan": "pro"}) == 7
    assert world.users.get_sample_value("price_bucket", {"plan": "pro", "le": "10.0"}) == 1
    assert 'price_count{plan="pro"} 1.0' in generate_latest(world.users).decode()


def test_both_forms_are_sound(world: World) -> None:
    """OpenMetrics' own strict parser reads the page: types, units, summaries, exemplars."""
    world.adopt()
    Counter("paid", "", unit="euros", namespace="shop", subsystem="till", registry=world.users).inc(
        2, exemplar={"trace_id": "abc"}
    )
    Gauge("disk", "", unit="bytes", registry=world.users).set(1)
    Summary("size", "", ["kind"], registry=world.users).labels("a").observe(2)
    price = Histogram("price", "", buckets=(1, 10), registry=world.users)
    price.observe(7, exemplar={"trace_id": "def"})
    families = {family.name: family for family in openmetrics(world.page(OPENMETRICS))}
    paid = families["shop_till_paid_euros"]
    assert (paid.type, paid.unit, paid.samples[0].exemplar.labels) == (
        "counter",
        "euros",
        {"trace_id": "abc"},
    )
    assert families["disk_bytes"].unit == "bytes"
    assert families["size"].type == "summary"
    exemplar = {s.labels.get("le"): s.exemplar for s in families["price"].samples}["10.0"]
    assert (exemplar.labels, exemplar.value) == ({"trace_id": "def"}, 7)
    assert price._buckets[1].get_exemplar().labels == {"trace_id": "def"}
    assert "# TYPE size summary\n" in world.page()


def test_the_buckets_of_a_histogram_keep_their_names(world: World) -> None:
    """A bound is a label value: spelled in another way it is another series."""
    bounds = (1e-7, 0.005, 0.1, 1, 1e3, 999_999, 1e6, 1_234_567.5, 2.5e9, 1e15, 1e16, 1e22)
    Histogram("upload_bytes", "", buckets=bounds, registry=world.users).observe(5e5)

    def names(page: str) -> list[str]:
        return [line.rsplit(" ", 1)[0] for line in page.splitlines() if "_bucket{" in line]

    before = names(generate_latest(world.users).decode())
    world.adopt()
    assert 'upload_bytes_bucket{le="1e+06"}' in before
    assert names(world.page()) == names(world.page(OPENMETRICS)) == before
    assert names(generate_latest(world.users).decode()) == before


def test_an_exemplar_from_before_is_kept(world: World) -> None:
    """What was said before adoption is not lost with it."""
    orders = Counter("orders", "", registry=world.users)
    orders.inc(1, exemplar={"trace_id": "early"})
    world.adopt()
    assert '# {trace_id="early"} 1.0' in world.page(OPENMETRICS)


def test_an_exemplar_with_a_name_that_openmetrics_does_not_know_is_left_out(world: World) -> None:
    """prometheus_client takes any name, so it raises nothing; one on the page would cost it all."""
    orders = Counter("orders", "", registry=world.users)
    orders.inc(1, exemplar={"trace-id": "early"})
    world.adopt()
    orders.inc(1, exemplar={"trace-id": "later"})
    prices = Histogram("price", "", buckets=(1, 10), registry=world.users)
    prices.observe(7, exemplar={"a.b": "def", "trace_id": "abc"})
    families = {family.name: family for family in openmetrics(world.page(OPENMETRICS))}
    assert [(s.value, s.exemplar) for s in families["orders"].samples] == [(2.0, None)]
    assert [s.exemplar for s in families["price"].samples] == [None] * 5
    assert world.failed.seen == []


def test_created_is_not_shown(world: World) -> None:
    """Ours have no `_created`; so neither have metrics that we expose, whatever is switched."""
    prometheus_client.enable_created_metrics()
    world.adopt()
    Counter("orders", "", registry=world.users).inc()
    Summary("size", "", registry=world.users)
    assert "_created" not in world.page() + world.page(OPENMETRICS)
    assert world.users.get_sample_value("orders_created") is not None


def test_reset_takes_a_counter_to_zero(world: World) -> None:
    """`Counter.reset()` does what it says; Prometheus takes it for a restart."""
    world.adopt()
    orders = Counter("orders", "", registry=world.users)
    orders.inc(3)
    orders.reset()
    orders.inc()
    assert world.samples() == {"orders_total": 1}


@pytest.mark.parametrize(
    "mode",
    ["all", "liveall", "sum", "livesum", "max", "livemax", "min", "mostrecent", "livemostrecent"],
)
def test_a_gauge_of_a_worker_alone_is_as_ever(world: World, mode: Any) -> None:
    """One worker shows the number it has set, under the labels it was given, whatever the mode."""
    depth = Gauge("depth", "", ["queue"], multiprocess_mode=mode, registry=world.users)
    depth.labels("mail").set(3)
    world.adopt()
    assert depth.labels("mail")._value.get() == 3
    depth.labels("mail").set(4)
    assert depth.labels("mail")._value.get() == 4
    assert world.samples() == {'depth{queue="mail"}': 4}


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("all", "live"),
        ("liveall", "live"),
        ("sum", "sum"),
        ("livesum", "sum"),
        ("max", "max"),
        ("livemax", "max"),
        ("min", "min"),
        ("livemin", "min"),
        ("mostrecent", "latest"),
        ("livemostrecent", "latest"),
    ],
)
def test_the_mode_of_a_gauge_becomes_ours(theirs: Any, ours: str) -> None:
    """The same meaning in our words; a dead worker's gauges never count."""
    shape = shape_of(Gauge("depth", "", multiprocess_mode=theirs, registry=None))
    assert shape is not None
    assert shape.mode == ours


def test_the_moment_of_setting_is_noted_where_it_counts(world: World) -> None:
    """`mostrecent`: the value in one cell, the time it was set in the next."""
    family = world.metrics.family("depth", "", "gauge", ())
    family.width = 2  # as a family of mode `latest` is
    depth = Gauge("depth", "", registry=None)
    depth.set(3)
    before = time.time()
    take(depth._value, family, (), at := family.at(()), 0, own=True)
    cells = world.metrics.store.cells
    assert (type(depth._value), cells[at]) == (LatestCell, 3)
    assert before <= cells[at + 1] <= time.time()
    depth._value.set(5.0, timestamp=17.0)
    assert (depth._value.get(), cells[at], cells[at + 1]) == (5, 5, 17)


def test_helpers_of_prometheus_client_work(world: World) -> None:
    """Timers, counted exceptions and gauges in progress come down to the same few calls."""
    world.adopt()
    faults = Counter("faults", "", registry=world.users)
    busy = Gauge("busy", "", registry=world.users)
    spent = Summary("spent", "", registry=world.users)
    with suppress(LookupError), faults.count_exceptions(), busy.track_inprogress():
        assert busy._value.get() == 1
        raise LookupError
    with spent.time():
        pass
    busy.set_to_current_time()
    seen = world.samples()
    assert (seen["faults_total"], seen["spent_count"]) == (1, 1)
    assert seen["busy"] > 1_700_000_000


# --- what is left as it is


def test_another_registry_is_left_alone(world: World) -> None:
    """A metric of the same name in another registry, or in none, counts for itself."""
    world.adopt()
    ours = Counter("orders", "", ["plan"], registry=world.users)
    other = Counter("orders", "", ["plan"], registry=CollectorRegistry())
    nowhere = Counter("orders", "", ["plan"], registry=None)
    ours.labels("pro").inc()
    other.labels("pro").inc(10)
    nowhere.labels("pro").inc(100)
    assert world.samples() == {'orders_total{plan="pro"}': 1}
    assert other.labels("pro")._value.get() == 10
    assert type(nowhere.labels("pro")._value) is MutexValue


class Odd(Counter):
    """A user's subclass that says something else than its value."""

    def _child_samples(self) -> Any:
        return [sample._replace(value=42.0) for sample in super()._child_samples()]


@pytest.mark.parametrize(
    ("make", "sample"),
    [
        pytest.param(
            lambda r: Info("built", "", registry=r).info({"by": "me"}),
            ('built_info{by="me"}', 1),
            id="info",
        ),
        pytest.param(
            lambda r: Enum("state", "", states=["a", "b"], registry=r).state("b"),
            ('state{state="b"}', 1),
            id="enum",
        ),
        pytest.param(
            lambda r: Gauge("asked", "", registry=r).set_function(lambda: 7),
            ("asked", 7),
            id="function",
        ),
        pytest.param(
            lambda r: Gauge("asked", "", ["a"], registry=r).labels("b").set_function(lambda: 7),
            ('asked{a="b"}', 7),
            id="function-of-a-child",
        ),
        pytest.param(lambda r: Odd("odd", "", registry=r).inc(), ("odd_total", 42), id="subclass"),
        pytest.param(
            lambda r: Histogram("h", "", buckets=(-1, 1), registry=r).observe(0),
            ('h_bucket{le="1.0"}', 1),
            id="negative-bounds-have-no-sum",
        ),
        pytest.param(
            lambda r: Gauge("g", "", ["worker"], registry=r).labels("me").set(3),
            ('g{worker="me"}', 3),
            id="the-label-that-tells-workers-apart",
        ),
    ],
)
@pytest.mark.parametrize("when", ["before", "after"])
def test_what_cannot_be_added_up_is_that_of_the_worker(
    world: World,
    make: Callable[[CollectorRegistry], None],
    sample: tuple[str, float],
    when: str,
) -> None:
    """What is no number in a value is on the page as ever, from the worker that answers."""
    if when == "before":
        make(world.users)
    world.adopt()
    if when == "after":
        make(world.users)
    name, value = sample
    assert world.samples()[name] == value
    assert world.metrics.lent() == frozenset()


def test_with_files_of_its_own_prometheus_client_keeps_them(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PROMETHEUS_MULTIPROC_DIR, or a value class of the app's: hands off."""

    class Elsewhere(MutexValue):
        pass

    monkeypatch.setattr(values, "ValueClass", Elsewhere)
    orders = Counter("orders", "", registry=world.users)
    world.adopt()
    assert adoption.current() is None
    assert type(orders._value) is Elsewhere
    assert world.samples()["orders_total"] == 0


@pytest.mark.parametrize(
    ("kind", "attribute"),
    [
        (Counter, "_value"),
        (Gauge, "_value"),
        (Gauge, "_multiprocess_mode"),
        (Summary, "_sum"),
        (Summary, "_count"),
        (Histogram, "_buckets"),
        (Histogram, "_upper_bounds"),
        (Counter, "_labelnames"),
        (Counter, "_name"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_an_attribute_that_is_gone_costs_one_warning(
    world: World, caplog: pytest.LogCaptureFixture, kind: Any, attribute: str
) -> None:
    """Another version of prometheus_client: the metric stays as it is, and that is said once."""
    metric = kind("strange", "", registry=world.users)
    delattr(metric, attribute)
    world.adopt()
    adoption.current().take(metric)  # type: ignore[union-attr]
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert f"keeps {kind.__name__} " in caplog.text
    assert attribute in caplog.text
    assert world.metrics.lent() == frozenset()


def test_prometheus_client_is_as_we_know_it() -> None:
    """The private parts that adoption stands on, in the version that is installed."""
    world = World()
    made = [kind("m", "", ["a"], registry=None) for kind in (Counter, Gauge, Histogram, Summary)]
    for metric in made:
        child = metric.labels("x")
        assert isinstance(metric._metrics, dict)
        assert type(metric._lock) is type(threading.Lock())
        assert (metric._name, metric._labelnames, metric._unit) == ("m", ("a",), "")
        for value in plain_values(metric._type, child):
            assert vars(value).keys() == {"_value", "_exemplar", "_lock"}
    assert made[1]._multiprocess_mode == "all"
    assert values.ValueClass is MutexValue
    assert {"register", "unregister"}.isdisjoint(vars(world.users))


# --- children that go, metrics that go


def test_removed_label_sets_leave_the_page(world: World) -> None:
    """remove, remove_by_labels and clear take series off; whoever holds one counts for itself."""
    world.adopt()
    orders = Counter("orders", "", ["plan", "country"], registry=world.users)
    held = orders.labels("pro", "de")
    for plan, country in (("pro", "de"), ("pro", "fr"), ("free", "de"), ("free", "it")):
        orders.labels(plan, country).inc()
    orders.remove("pro", "de")
    orders.remove("never", "was")
    held.inc(5)
    assert held._value.get() == 6
    orders.remove_by_labels({"plan": "free"})
    assert world.samples() == {'orders_total{plan="pro",country="fr"}': 1}
    orders.labels("pro", "de").inc()  # anew, from zero
    assert world.samples()['orders_total{plan="pro",country="de"}'] == 1
    orders.clear()
    assert world.samples() == {}
    orders.labels("pro", "fr").inc()
    assert world.samples() == {'orders_total{plan="pro",country="fr"}': 1}


def test_clearing_and_setting_again_and_again_needs_no_more_room(world: World) -> None:
    """The usual way to show a list that changes: the store does not grow with each round."""
    world.adopt()
    depth = Gauge("depth", "", ["queue"], registry=world.users)
    price = Histogram("price", "", ["plan"], buckets=(1,), registry=world.users)
    used = []
    for number in range(20):
        depth.clear()
        price.clear()
        for queue in "abc":
            assert depth.labels(queue)._value.get() == 0
            depth.labels(queue).set(number)
        price.labels("pro").observe(2)
        used.append(len(world.metrics.store.read()))
    assert used[0] == used[-1] > 0
    assert world.samples()['depth{queue="c"}'] == 19
    assert world.samples()['price_count{plan="pro"}'] == 1


def test_unregistered_metrics_leave_with_their_numbers(world: World) -> None:
    """Unregister and make a new one of the same name, of another kind: it begins from zero."""
    world.adopt()
    orders = Counter("orders", "", ["plan"], registry=world.users)
    orders.labels("pro").inc(4)
    world.users.unregister(orders)
    assert world.samples() == {}
    assert orders.labels("pro")._value.get() == 4
    orders.labels("free").inc()
    again = Histogram("orders_total", "", buckets=(1,), registry=world.users)
    again.observe(1)
    assert world.samples()["orders_total_count"] == 1
    with pytest.raises(KeyError):
        world.users.unregister(orders)


def test_a_function_given_later_takes_the_gauge_back(world: World) -> None:
    """`set_function` on an adopted gauge: from then on the worker that answers is asked."""
    world.adopt()
    depth = Gauge("depth", "", ["queue"], registry=world.users)
    depth.labels("mail").set(4)
    depth.labels("print").set_function(lambda: 9)
    depth.labels("fax").set(1)
    assert world.samples() == {
        'depth{queue="mail"}': 4,
        'depth{queue="print"}': 9,
        'depth{queue="fax"}': 1,
    }
    assert not adoption.covers(depth)


def test_release_leaves_everything_as_it_was(world: World) -> None:
    """Numbers, types, attributes and the registry's methods are back."""
    orders = Counter("orders", "", ["plan"], registry=world.users)
    depth = Gauge("depth", "", registry=world.users)
    before = {name: set(vars(thing)) for name, thing in (("r", world.users), ("o", orders))}
    world.adopt()
    orders.labels("pro").inc(3)
    depth.set(2)
    adoption.release()
    assert {name: set(vars(thing)) for name, thing in (("r", world.users), ("o", orders))} == before
    assert (type(orders._metrics), type(depth._value)) == (dict, MutexValue)
    orders.labels("pro").inc()
    assert "set_function" not in vars(depth)
    seen = world.samples()
    assert (seen['orders_total{plan="pro"}'], seen["depth"]) == (4, 2)
    assert 'orders_created{plan="pro"}' in seen  # prometheus_client exposes it again
    adoption.release()
    Counter("late", "", registry=world.users)
    assert world.metrics.lent() == frozenset()


def test_a_hook_that_somebody_wrapped_is_left_and_does_nothing(world: World) -> None:
    """Another library that wraps `register` too keeps its wrapper when we let go."""
    world.adopt()
    inner = world.users.register
    seen: list[Any] = []
    world.users.register = lambda c: (seen.append(c), inner(c))  # type: ignore[method-assign]
    adoption.release()
    orders = Counter("orders", "", registry=world.users)
    assert seen == [orders]
    assert type(orders._value) is MutexValue


# --- whose name it is


def test_a_name_of_ours_wins_with_one_warning(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    """Ours is shown, whichever came first; the user's goes on counting for itself."""
    ours = world.metrics.counter("orders_total", "ours")
    ours.inc(1)
    theirs = Counter("orders", "theirs", registry=world.users)
    later = Gauge("depth", "theirs", registry=world.users)
    world.adopt()
    theirs.inc(50)
    later.set(60)
    world.metrics.gauge("depth", "ours").set(2)
    assert world.samples() == {"orders_total": 1, "depth": 2}
    assert (theirs._value.get(), later._value.get()) == (50, 60)
    assert [record.getMessage().split()[0] for record in caplog.records] == [
        "Counter",
        "Gauge",
    ]


def test_the_first_that_asks_has_them(world: World) -> None:
    """A second OpsGuard shows the same numbers on its page, from the first one's store."""
    world.adopt()
    second = Metrics(Store(lambda: None, world.failed), failed=world.failed)
    adoption.adopt(second, world.failed, (world.users,))
    orders = Counter("orders", "", registry=world.users)
    orders.inc(2)
    world.metrics.counter("of_the_first_total").inc()
    assert second.lent() == frozenset()
    assert "orders_total 2.0\n" in world.page(metrics=second)
    assert "of_the_first_total" not in world.page(metrics=second)
    assert "orders_total 2.0\n" in world.page()


def test_ours_as_a_collector_has_nothing_twice(world: World) -> None:
    """`registry.register(ops.metrics)` beside adopted metrics gives each name once."""
    world.adopt()
    world.users.register(world.metrics)
    Counter("orders", "", registry=world.users).inc()
    assert generate_latest(world.users).decode().count("\norders_total ") == 1
    assert world.page().count("\norders_total ") == 1


# --- bounds, threads, forks


def test_label_sets_beyond_the_limit_are_counted_together(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As with ours; each metric object still knows its own number."""
    world = World(limit=2)
    world.adopt()
    orders = Counter("orders", "", ["who"], registry=world.users)
    depth = Gauge("depth", "", ["who"], registry=world.users)
    for number, who in enumerate("abcd", 1):
        orders.labels(who).inc(number)
        depth.labels(who).set(99)
        depth.labels(who).set(number)
    assert type(orders.labels("d")._value) is Shared
    assert orders.labels("d")._value.get() == 4
    assert caplog.records == []  # a lock of the metric was held
    assert world.samples() == {
        'orders_total{who="a"}': 1,
        'orders_total{who="b"}': 2,
        'orders_total{who="<overflow>"}': 7,
        'depth{who="a"}': 1,
        'depth{who="b"}': 2,
        'depth{who="<overflow>"}': 7,
    }
    assert len(caplog.records) == 2
    assert 'opsguard_series_overflow_total{metric="orders_total"} 2.0' in world.page()
    world.page()
    assert len(caplog.records) == 2
    adoption.release()
    assert orders.labels("d")._value.get() == 4


def test_label_values_that_would_break_a_scrape(world: World) -> None:
    """A lone surrogate and NUL are cleaned, quotes and newlines escaped."""
    world.adopt()
    orders = Counter("orders", "", ["who"], registry=world.users)
    for who in ("a\0", "\ud800", 'say "hi"\n', "x" * 5000):
        orders.labels(who).inc()
    list(openmetrics(world.page(OPENMETRICS)))
    assert len(world.samples()) == 4


def test_numbers_like_any_other(world: World) -> None:
    """Ints, floats and what adds to a float; NaN and infinity; a negative count is refused."""
    fractions = pytest.importorskip("fractions")
    world.adopt()
    orders = Counter("orders", "", registry=world.users)
    depth = Gauge("depth", "", registry=world.users)
    orders.inc(fractions.Fraction(1, 2))
    orders.inc(2**53)
    with pytest.raises(ValueError, match="non-negative"):
        orders.inc(-1)
    with pytest.raises(TypeError):
        orders.inc("1")  # type: ignore[arg-type]
    depth.set(math.nan)
    assert math.isnan(world.samples()["depth"])
    depth.set(-math.inf)
    assert world.samples()["depth"] == -math.inf


@pytest.mark.usefixtures("eager_switching")
def test_threads_lose_nothing_when_metrics_are_adopted(world: World) -> None:
    """Four threads count on one counter when it is adopted, fifty times over: the sum is exact."""
    for _ in range(50):
        orders = Counter("orders", "", registry=world.users)
        stop = threading.Event()
        counted: list[int] = []

        def count(orders: Counter, stop: threading.Event, counted: list[int]) -> None:
            done = 0
            while not stop.is_set():
                orders.inc()
                done += 1
            counted.append(done)

        work = orders, stop, counted
        threads = [threading.Thread(target=count, args=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        until(lambda orders=orders: orders._value.get() > 100)
        world.adopt()
        seen = orders._value.get()
        until(lambda orders=orders, seen=seen: orders._value.get() > seen + 100)
        stop.set()
        for thread in threads:
            thread.join(30)
        assert orders._value.get() == sum(counted)
        adoption.release()
        world.users.unregister(orders)


def test_a_call_that_was_under_way_ends_in_the_cell(world: World) -> None:
    """An `inc` of the plain value waits for its lock while the value is taken, then adds to the
    cell, together with what others have added meanwhile.
    """
    orders = Counter("orders", "", registry=world.users)
    value, plain_inc, plain_set = orders._value, orders._value.inc, orders._value.set
    world.adopt()
    with value._lock:
        seen = value._value  # the first half of `self._value += 1`
        orders.inc(10)
        value._value = seen + 1
    plain_inc(100)
    assert value.get() == 111
    plain_set(5)
    assert value.get() == 5


def test_children_made_in_many_threads_are_all_adopted(world: World) -> None:
    """Sixteen threads look up the same hundred label sets: one cell each, every count there."""
    world.adopt()
    orders = Counter("orders", "", ["who"], registry=world.users)
    together = threading.Barrier(16)

    def work() -> None:
        together.wait(10)
        for number in range(100):
            orders.labels(str(number)).inc()

    threads = [threading.Thread(target=work) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert set(world.samples().values()) == {16.0}
    assert len(world.samples()) == 100


def run(script: str, *arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))} | environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
def test_a_forked_child_counts_from_zero_in_a_file_of_its_own(tmp_path: Path) -> None:
    """Nothing is counted twice when the workers' files are added up; children made before and after
    the fork both count, and a lock of the metric that was held does not hang the scrape.
    """
    script = """
        import os, sys, json
        from pathlib import Path
        from prometheus_client import Counter, Gauge, REGISTRY
        from opsguard.metrics import Metrics, adoption
        from opsguard.metrics.exposition import Exposition
        from opsguard.metrics.layout import SERIES, read_records
        from opsguard.metrics.store import Store

        failed = lambda site, error: print(site, error)
        metrics = Metrics(Store(lambda: Path(sys.argv[1]), failed), failed=failed)
        orders = Counter("orders", "", ["plan"])
        orders.labels("pro").inc(5)
        adoption.adopt(metrics, failed)
        plain = Counter("plain", "")
        plain.inc(1)
        exposition = Exposition((metrics, REGISTRY), failures=failed, covered=adoption.covers)

        def cells():
            data = metrics.store.path.read_bytes()
            found = [r for r in read_records(data) if r.kind == SERIES]
            return sorted([r.key[1:], r.cells[0]] for r in found)

        orders._lock.acquire()
        child = os.fork()
        if child == 0:
            page = exposition.render("GET", "", "").body.decode()
            assert 'orders_total{plan="pro"} ' in page, page
            orders._lock.release()
            orders.labels("pro").inc(2)
            orders.labels("free").inc(3)
            plain.inc(4)
            print(json.dumps(cells()), flush=True)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        orders._lock.release()
        print(json.dumps(cells()))
    """
    child, parent = map(json.loads, run(script, str(tmp_path)).splitlines())
    assert child == [[[], 4], [["free"], 3], [["pro"], 2]]
    assert parent == [[[], 1], [["pro"], 5]]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
def test_what_a_gauge_was_set_to_is_so_in_a_forked_worker() -> None:
    """A version set at import is the version in each worker; sums are the parent's."""
    script = """
        import os
        from prometheus_client import Counter, Gauge, REGISTRY
        from opsguard.metrics import Metrics, adoption
        from opsguard.metrics.store import Store

        failed = lambda site, error: print(site, error)
        metrics = Metrics(Store(lambda: None, failed), failed=failed)
        adoption.adopt(metrics, failed)
        built = Gauge("built", "", ["version"])
        highest = Gauge("highest", "", multiprocess_mode="max")
        last = Gauge("last", "", multiprocess_mode="mostrecent")
        busy = Gauge("busy", "", multiprocess_mode="livesum")
        orders = Counter("orders", "")
        built.labels("1.2").set(1)
        for metric in (highest, last, busy):
            metric.set(4)
        orders.inc(3)
        for generation in "ab":
            child = os.fork()
            if child:
                assert os.waitpid(child, 0)[1] == 0
                break
            seen = built.labels("1.2"), highest, last, busy, orders
            print([metric._value.get() for metric in seen], flush=True)
        os._exit(0)
    """
    assert run(script).splitlines() == ["[1.0, 4.0, 4.0, 0.0, 0.0]"] * 2


def test_multiprocess_mode_of_prometheus_client_is_left_alone(tmp_path: Path) -> None:
    """With PROMETHEUS_MULTIPROC_DIR its files hold the numbers, and nothing of it is touched."""
    script = """
        from prometheus_client import Counter, REGISTRY
        from opsguard import OpsGuard
        from opsguard.metrics import adoption
        from opsguard_wsgi import install

        install(lambda environ, start_response: [], OpsGuard(service="shop"))
        orders = Counter("orders", "")
        orders.inc()
        print(adoption.current(), type(orders._value).__name__, "register" in vars(REGISTRY))
    """
    said = run(script, PROMETHEUS_MULTIPROC_DIR=str(tmp_path))
    assert said.splitlines()[-1] == "None MmapedValue False"


def test_multiprocess_mode_of_prometheus_client_is_on_the_page_as_sums(tmp_path: Path) -> None:
    """Each scrape would tell of another worker else, and its counters would go up and down."""
    script = """
        import os
        from prometheus_client import Counter, Gauge, Histogram, Info
        from opsguard import OpsGuard
        from opsguard.testing import Request, call_wsgi
        from opsguard_wsgi import install

        app = install(lambda environ, start_response: [], OpsGuard(service="shop"))
        orders = Counter("orders", "", ["plan"])
        times = Histogram("times", "", buckets=(1, 2))
        Info("build", "").info({"version": "1"})
        orders.labels("pro").inc(2)
        if os.fork() == 0:
            orders.labels("pro").inc(3)
            times.observe(1.5)
            os._exit(0)
        os.wait()
        page = call_wsgi(app, Request("/metrics")).body.decode()
        wanted = ("orders_", "times_count", "build_info")
        print(*[line for line in page.splitlines() if line.startswith(wanted)], sep="\\n")
    """
    said = run(script, PROMETHEUS_MULTIPROC_DIR=str(tmp_path))
    lines = ['orders_total{plan="pro"} 5.0', "times_count 1.0", 'build_info{version="1"} 1.0']
    assert sorted(said.splitlines()[-3:]) == sorted(lines)


def test_files_of_prometheus_client_that_cannot_be_read_leave_what_a_worker_knows(
    tmp_path: Path,
) -> None:
    """A file of zero bytes, which breaks its own collector, breaks no page of ours."""
    script = """
        from pathlib import Path
        from prometheus_client import Counter
        from opsguard import OpsGuard
        from opsguard.testing import Request, call_wsgi
        from opsguard_wsgi import install
        import os

        app = install(lambda environ, start_response: [], OpsGuard(service="shop"))
        Counter("orders", "").inc(2)
        Path(os.environ["PROMETHEUS_MULTIPROC_DIR"], "counter_1.db").touch()
        page = call_wsgi(app, Request("/metrics")).body.decode()
        print("orders_total 2.0" in page, 'internal_errors_total{site="collector:Files"}' in
              call_wsgi(app, Request("/metrics")).body.decode())
    """
    said = run(script, PROMETHEUS_MULTIPROC_DIR=str(tmp_path))
    assert said.splitlines()[-1] == "True True"


# --- installed


def test_install_adopts_the_default_registry() -> None:
    """One line in the app: its own metrics are on the page, before and after install, once."""

    def app(environ: Any, start_response: Any) -> list[bytes]:
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [b""]

    early = Counter("adoption_early", "", ["plan"])
    late: Counter | None = None
    try:
        early.labels("pro").inc()
        importing = OpsGuard(service="shop")
        assert adoption.current() is None
        guarded = install(app, importing)
        late = Counter("adoption_late", "")
        early.labels("pro").inc()
        late.inc()
        for ops in (guarded, install(app, OpsGuard(service="other"))):
            page = call_wsgi(ops, Request("/metrics")).body.decode()
            assert page.count('\nadoption_early_total{plan="pro"} 2.0\n') == 1
            assert page.count("\nadoption_late_total 1.0\n") == 1
        with importing.override(service="inner"):
            page = call_wsgi(guarded, Request("/metrics")).body.decode()
            assert page.count("\nadoption_late_total 1.0\n") == 1
    finally:
        for metric in filter(None, (early, late)):
            prometheus_client.REGISTRY.unregister(metric)


@pytest.mark.parametrize("setting", ["enabled", "adopt"])
def test_what_is_off_adopts_nothing(setting: str) -> None:
    """`metrics.enabled` and `metrics.adopt` leave everything of prometheus_client as it is."""
    install(lambda environ, start_response: [], OpsGuard("shop", metrics={setting: False}))
    assert adoption.current() is None


def test_hundreds_of_installs_adopt_once() -> None:
    """An app factory in a test suite: the registry is hooked once, and let go of at the end."""
    register = prometheus_client.REGISTRY.register
    for _ in range(300):
        install(lambda environ, start_response: [], OpsGuard("shop"))
    hooked = vars(prometheus_client.REGISTRY)["register"]
    assert hooked.__self__._register == register
    release_metrics()
    assert "register" not in vars(prometheus_client.REGISTRY)
