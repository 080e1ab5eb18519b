"""`ops.metrics` has the API of prometheus_client: where both can be asked, both give the same."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import prometheus_client
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families as text

from opsguard.metrics import Metrics
from opsguard.metrics.families import Family
from opsguard.metrics.instruments import CounterSeries, Timer
from opsguard.metrics.store import Store
from opsguard.testing import ManualClock

BUCKETS = (0.1, 1.0, 10.0)
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


class Boom(Exception):
    pass


class Ours:
    """Instruments of ours."""

    def __init__(self, gil: bool | None = None) -> None:
        self.metrics = Metrics(Store(lambda: None, ignore, gil=gil), failed=ignore)

    def counter(self, *labels: str) -> Any:
        return self.metrics.counter("c_total", "help", labels)

    def gauge(self, *labels: str) -> Any:
        return self.metrics.gauge("g", "help", labels)

    def histogram(self, *labels: str) -> Any:
        return self.metrics.histogram("h", "help", labels, BUCKETS)

    def samples(self) -> Samples:
        return parse("".join([block for _, block in self.metrics.expose(False)]))


class Theirs:
    """The same of prometheus_client."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

    def counter(self, *labels: str) -> Any:
        return prometheus_client.Counter("c_total", "help", labels, registry=self.registry)

    def gauge(self, *labels: str) -> Any:
        return prometheus_client.Gauge("g", "help", labels, registry=self.registry)

    def histogram(self, *labels: str) -> Any:
        return prometheus_client.Histogram(
            "h", "help", labels, registry=self.registry, buckets=BUCKETS
        )

    def samples(self) -> Samples:
        return parse(prometheus_client.generate_latest(self.registry).decode())


def ignore(site: str, error: BaseException | None) -> None:
    return None


def parse(page: str) -> Samples:
    """Samples by name and labels, creation times left out."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text(page)
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


Makers = Ours | Theirs
BOTH = pytest.mark.parametrize("make", [Ours, Theirs])


@BOTH
def test_counting(make: Callable[[], Makers]) -> None:
    these = make()
    counter = these.counter()
    counter.inc()
    counter.inc(2.5)
    counter.inc(0)
    assert these.samples() == {("c_total", ()): 3.5}


@BOTH
@pytest.mark.parametrize("amount", [-1, -0.001])
def test_a_counter_only_grows(make: Callable[[], Makers], amount: float) -> None:
    these = make()
    counter = these.counter()
    counter.inc(1)
    with pytest.raises(ValueError):
        counter.inc(amount)
    assert these.samples() == {("c_total", ()): 1.0}


def test_a_counter_refuses_nan() -> None:
    with pytest.raises(ValueError, match="only grows"):
        Ours().counter().inc(float("nan"))


@BOTH
def test_a_gauge_goes_up_down_and_anywhere(make: Callable[[], Makers]) -> None:
    these = make()
    gauge = these.gauge()
    gauge.inc()
    gauge.inc(2)
    gauge.dec()
    gauge.dec(0.5)
    assert these.samples() == {("g", ()): 1.5}
    gauge.set(-7)
    assert these.samples() == {("g", ()): -7.0}


@BOTH
def test_observing(make: Callable[[], Makers]) -> None:
    """A value on a bound is in the bucket of that bound."""
    these = make()
    histogram = these.histogram()
    for value in (0.05, 0.1, 0.5, 10, 11, -1):
        histogram.observe(value)
    assert these.samples() == {
        ("h_bucket", (("le", "0.1"),)): 3.0,
        ("h_bucket", (("le", "1.0"),)): 4.0,
        ("h_bucket", (("le", "10.0"),)): 5.0,
        ("h_bucket", (("le", "+Inf"),)): 6.0,
        ("h_count", ()): 6.0,
        ("h_sum", ()): 20.65,
    }


@BOTH
def test_labels_by_position_by_name_and_of_any_type_are_one_series(
    make: Callable[[], Makers],
) -> None:
    these = make()
    counter = these.counter("a", "b")
    counter.labels("1", "x").inc()
    counter.labels(1, "x").inc()
    counter.labels(a="1", b="x").inc()
    counter.labels(b="x", a=1).inc()
    assert these.samples() == {("c_total", (("a", "1"), ("b", "x"))): 4.0}


@BOTH
def test_values_that_are_equal_but_read_differently_are_series_of_their_own(
    make: Callable[[], Makers],
) -> None:
    these = make()
    counter = these.counter("a")
    for value in (1, True, 1.0, "1"):
        counter.labels(value).inc()
    assert these.samples() == {
        ("c_total", (("a", "1"),)): 2.0,
        ("c_total", (("a", "True"),)): 1.0,
        ("c_total", (("a", "1.0"),)): 1.0,
    }


@BOTH
def test_unhashable_label_values_are_text_too(make: Callable[[], Makers]) -> None:
    these = make()
    counter = these.counter("a")
    counter.labels(["x"]).inc()
    counter.labels(a=["x"]).inc()
    assert these.samples() == {("c_total", (("a", "['x']"),)): 2.0}


@BOTH
@pytest.mark.parametrize(
    "ask",
    [
        pytest.param(lambda c: c.labels("1"), id="too few"),
        pytest.param(lambda c: c.labels("1", "2", "3"), id="too many"),
        pytest.param(lambda c: c.labels(a="1"), id="a name missing"),
        pytest.param(lambda c: c.labels(a="1", c="2"), id="another name"),
        pytest.param(lambda c: c.labels(a="1", b="2", c="3"), id="a name more"),
        pytest.param(lambda c: c.labels("1", b="2"), id="position and name"),
        pytest.param(lambda c: c.labels(), id="none"),
        pytest.param(lambda c: c.inc(), id="no series chosen"),
    ],
)
def test_labels_that_do_not_fit_are_an_error(
    ask: Callable[[Any], object], make: Callable[[], Makers]
) -> None:
    with pytest.raises(ValueError):
        ask(make().counter("a", "b"))


@BOTH
def test_removed_series_are_gone_and_start_at_zero_when_they_come_back(
    make: Callable[[], Makers],
) -> None:
    these = make()
    gauge = these.gauge("a")
    for value in ("x", "y", 3):
        gauge.labels(value).set(5)
    gauge.remove("x")
    gauge.remove(3)
    assert these.samples() == {("g", (("a", "y"),)): 5.0}
    gauge.labels("x").inc()
    assert these.samples()["g", (("a", "x"),)] == 1.0


@BOTH
def test_clear_forgets_all_series(make: Callable[[], Makers]) -> None:
    these = make()
    gauge = these.gauge("a")
    gauge.labels("x").set(5)
    gauge.labels("y").set_function(lambda: 5.0)
    gauge.clear()
    assert these.samples() == {}


def test_removing_what_never_was_is_no_error() -> None:
    Ours().gauge("a").remove("x")


def test_a_series_held_on_to_is_harmless_after_its_removal() -> None:
    ours = Ours()
    gauge = ours.gauge("a")
    held = gauge.labels("x")
    gauge.remove("x")
    held.set(9)
    gauge.labels("x").inc()
    assert ours.samples() == {("g", (("a", "x"),)): 1.0}


@pytest.mark.parametrize(
    "take_out",
    [
        pytest.param(lambda counter: counter.clear(), id="clear"),
        pytest.param(lambda counter: counter.remove("x"), id="remove"),
    ],
)
def test_a_series_that_is_taken_out_while_it_is_made_is_not_kept(
    take_out: Callable[[Any], None],
) -> None:
    """Who has it counts for nobody; who asks for it later gets one that is on the page."""
    ours = Ours()
    counter = ours.counter("a")

    class Interrupted(CounterSeries):
        """Another thread has its turn between the making of a series and its being remembered."""

        __slots__ = ()

        def __init__(self, family: Family, values: tuple[str, ...]) -> None:
            super().__init__(family, values)
            other = threading.Thread(target=take_out, args=(counter,))
            other.start()
            other.join()

    counter._series_type = Interrupted
    counter.labels("x").inc()
    assert ours.samples() == {}
    counter._series_type = CounterSeries
    counter.labels("x").inc()
    counter.labels("x").inc()
    assert ours.samples() == {("c_total", (("a", "x"),)): 2.0}


def test_a_series_that_is_made_while_another_is_removed_disturbs_nobody() -> None:
    ours = Ours()
    counter = ours.counter("a")

    class Interrupted(tuple[str, ...]):
        """Another thread makes a series while this one is looked at."""

        def __ne__(self, other: object) -> bool:
            counter.labels("y").inc()
            return tuple.__ne__(self, other)

    counter.labels("x")._values = Interrupted("x")
    counter.labels("z").inc()
    counter.remove("x")
    counter.labels("y").inc()
    assert ours.samples() == {("c_total", (("a", "y"),)): 2.0, ("c_total", (("a", "z"),)): 1.0}


@pytest.mark.usefixtures("eager_switching")
@pytest.mark.parametrize("gil", [None, False], ids=["as this interpreter is", "with the lock"])
def test_series_are_made_removed_and_cleared_in_threads(gil: bool | None) -> None:
    """Nothing raises, and whatever is asked for afterwards is on the page."""
    ours = Ours(gil)
    counter = ours.counter("a")
    barrier, faults = threading.Barrier(6), []

    def work(step: Callable[[str], object]) -> None:
        barrier.wait()
        try:
            for number in range(600):
                step(str(number % 40))
        except Exception as error:
            faults.append(error)

    steps: list[Callable[[str], object]] = [
        *[lambda value: counter.labels(value).inc()] * 3,
        *[counter.remove] * 2,
        lambda value: counter.clear() if value == "7" else None,
    ]
    threads = [threading.Thread(target=work, args=(step,)) for step in steps]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    for number in range(40):
        counter.labels(number).inc()
    assert {dict(labels)["a"] for _, labels in ours.samples()} == set(map(str, range(40)))


@BOTH
def test_count_exceptions_counts_those_of_its_type_and_lets_all_through(
    make: Callable[[], Makers],
) -> None:
    these = make()
    counter = these.counter()
    with pytest.raises(Boom), counter.count_exceptions():
        raise Boom
    with pytest.raises(Boom), counter.count_exceptions((KeyError, Boom)):
        raise Boom
    with pytest.raises(Boom), counter.count_exceptions(KeyError):
        raise Boom

    @counter.count_exceptions()
    def fail() -> None:
        raise Boom

    for _ in range(2):
        with pytest.raises(Boom):
            fail()
    with counter.count_exceptions():
        pass
    assert these.samples() == {("c_total", ()): 4.0}


@BOTH
def test_track_inprogress_ends_with_the_block_however_it_ends(
    make: Callable[[], Makers],
) -> None:
    these = make()
    gauge = these.gauge("a").labels("x")
    inside = ("g", (("a", "x"),))
    with gauge.track_inprogress(), gauge.track_inprogress():
        assert these.samples()[inside] == 2.0
    with pytest.raises(Boom), gauge.track_inprogress():
        raise Boom

    @gauge.track_inprogress()
    def work() -> float:
        return these.samples()[inside]

    assert work() == work() == 1.0
    assert these.samples()[inside] == 0.0


@BOTH
def test_a_gauge_without_labels_tracks_too(make: Callable[[], Makers]) -> None:
    these = make()
    gauge = these.gauge()
    with gauge.track_inprogress():
        assert these.samples() == {("g", ()): 1.0}
    assert these.samples() == {("g", ()): 0.0}


@BOTH
def test_a_function_is_asked_at_each_scrape(make: Callable[[], Makers]) -> None:
    these = make()
    asked = iter([1.0, 2.0])
    these.gauge("a").labels("x").set_function(lambda: next(asked))
    assert these.samples() == {("g", (("a", "x"),)): 1.0}
    assert these.samples() == {("g", (("a", "x"),)): 2.0}


def test_a_function_that_raises_costs_its_own_metric_that_scrape_only() -> None:
    ours = Ours()
    answers: list[Any] = [LookupError("not yet"), 3]

    def ask() -> float:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return float(answer)

    ours.counter().inc()
    ours.gauge().set_function(ask)
    assert ours.samples() == {("c_total", ()): 1.0}
    assert ours.samples() == {("c_total", ()): 1.0, ("g", ()): 3.0}


@BOTH
def test_set_to_current_time_is_seconds_since_the_epoch(make: Callable[[], Makers]) -> None:
    these = make()
    these.gauge().set_to_current_time()
    assert these.samples()["g", ()] > 1.7e9


@BOTH
def test_time_is_a_context_manager_and_a_decorator(make: Callable[[], Makers]) -> None:
    these = make()
    gauge, histogram = these.gauge(), these.histogram()
    with gauge.time():
        pass

    @histogram.time()
    def double(number: int, *, twice: bool) -> int:
        """Doubles."""
        return number * 2 if twice else number

    assert double(2, twice=True) == 4
    assert double(2, twice=False) == 2
    assert (double.__name__, double.__doc__) == ("double", "Doubles.")
    with pytest.raises(Boom), histogram.time():
        raise Boom
    found = these.samples()
    assert 0 < found["g", ()] < 10
    assert found["h_count", ()] == 3.0


def test_a_timer_hands_over_elapsed_seconds_and_never_less_than_none() -> None:
    clock, seen = ManualClock(100.0), []
    with Timer(seen.append, clock):
        clock.advance(2.5)
    with Timer(seen.append, clock):
        clock.advance(-1)  # a virtual machine was moved
    assert seen == [2.5, 0.0]


def test_a_decorated_function_may_call_itself() -> None:
    """Each call has its own start: the outer one is as long as all of them together."""
    clock, seen = ManualClock(), []

    @Timer(seen.append, clock)
    def down(number: int) -> None:
        clock.advance(1)
        if number:
            down(number - 1)

    down(2)
    assert seen == [1.0, 2.0, 3.0]


@BOTH
def test_an_exemplar_of_more_than_128_characters_is_an_error(make: Callable[[], Makers]) -> None:
    these = make()
    counter, histogram = these.counter(), these.histogram()
    counter.inc(1, {"a": "x" * 127})
    histogram.observe(1, {"a": "x" * 127})
    with pytest.raises(ValueError, match="128"):
        counter.inc(1, {"a": "x" * 128})
    with pytest.raises(ValueError, match="128"):
        histogram.observe(1, {"a": "x" * 128})


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("trace-id", id="a dash"),
        pytest.param("", id="empty"),
        pytest.param("1st", id="a digit in front"),
        pytest.param("__name__", id="reserved"),
        pytest.param("spür", id="not ASCII"),
        pytest.param('a="b"} 1.0\nforged_total 99\n# ', id="lines of its own"),
    ],
)
def test_an_exemplar_with_a_label_name_that_is_none_is_an_error_and_not_on_the_page(
    name: str,
) -> None:
    """The event is counted all the same, and the page stays one that the strict reader reads."""
    ours = Ours()
    counter, histogram = ours.counter(), ours.histogram()
    with pytest.raises(ValueError, match="label name"):
        counter.inc(2, {name: "x"})
    with pytest.raises(ValueError, match="label name"):
        histogram.observe(1, {"trace_id": "a", name: "x"})
    page = "".join([block for _, block in ours.metrics.expose(True)]) + "# EOF\n"
    found = {sample.name: sample for family in openmetrics(page) for sample in family.samples}
    assert (found["c_total"].value, found["h_count"].value) == (2.0, 1.0)
    assert "forged_total" not in found
    assert "} 1.0 " not in page  # no exemplar


@BOTH
def test_numbers_of_any_type_are_taken(make: Callable[[], Makers]) -> None:
    these = make()
    gauge = these.gauge()
    gauge.set(Decimal("1.5"))
    gauge.inc(Fraction(1, 2))
    gauge.inc(True)
    assert these.samples() == {("g", ()): 3.0}


@BOTH
@pytest.mark.parametrize("amount", ["x", None, [1]], ids=repr)
def test_what_is_no_number_is_an_error_at_once(make: Callable[[], Makers], amount: object) -> None:
    these = make()
    gauge = these.gauge()
    gauge.set(1)
    with pytest.raises((TypeError, ValueError)):
        gauge.inc(amount)
    assert these.samples() == {("g", ()): 1.0}


@BOTH
def test_a_metric_without_labels_is_there_from_its_declaration(
    make: Callable[[], Makers],
) -> None:
    """Zero before the first event, so that `rate()` sees the first."""
    these = make()
    these.counter()
    these.gauge()
    these.histogram()
    found = these.samples()
    assert found["c_total", ()] == found["g", ()] == found["h_count", ()] == 0.0


def test_declaring_opens_nothing() -> None:
    asked: list[str] = []

    def place() -> None:
        asked.append("place")

    metrics = Metrics(Store(place, ignore), failed=ignore)
    metrics.counter("a_total")
    metrics.histogram("h", "", ("x",))
    assert asked == []


@pytest.mark.usefixtures("eager_switching")
@pytest.mark.parametrize("gil", [None, False], ids=["as this interpreter is", "with the lock"])
def test_sixteen_threads_lose_nothing(gil: bool | None) -> None:
    """Counters, gauges and histograms alike, on series that all of them meet for the first time."""
    ours = Ours(gil)
    counter, gauge, histogram = ours.counter("a"), ours.gauge(), ours.histogram()
    barrier = threading.Barrier(16)

    def work() -> None:
        barrier.wait()
        for number in range(300):
            counter.labels(number % 7).inc()
            gauge.inc(2)
            gauge.dec()
            histogram.observe(0.5)

    threads = [threading.Thread(target=work) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = ours.samples()
    assert sum([value for (name, _), value in found.items() if name == "c_total"]) == 4_800.0
    assert found["g", ()] == 4_800.0
    assert found["h_count", ()] == 4_800.0
    assert found["h_sum", ()] == 2_400.0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_counts_from_zero_through_the_instruments_it_inherited() -> None:
    ours = Ours()
    series = ours.counter("a").labels("x")
    series.inc(5)
    ours.gauge().set_function(lambda: 8.0)
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        series.inc()
        ours.counter("a").labels("y").inc(2)
        os.write(writing, repr(sorted(ours.samples().items())).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        said = pipe.read()
    os.waitpid(pid, 0)
    expected = {
        ("c_total", (("a", "x"),)): 1.0,
        ("c_total", (("a", "y"),)): 2.0,
        ("g", ()): 8.0,
    }
    assert said == repr(sorted(expected.items()))
    assert ours.samples()["c_total", (("a", "x"),)] == 5.0
