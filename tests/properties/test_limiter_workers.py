"""The shared table against the algorithms themselves, and against bytes that are not ours."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opsguard.accelerator import shared
from opsguard.limiter import Charge, LocalStore
from opsguard.limiter.algorithms import ALGORITHMS, Outcome
from opsguard.limiter.layout import HEADER, SET
from opsguard.limiter.rates import Rate, Strategy
from opsguard.limiter.shared import KINDS
from opsguard.limiter.workers import FILE, WorkersStore
from tests.limits import Manual

needs_c = pytest.mark.skipif(shared is None, reason="opsguard._shared was not built")
RATES = st.builds(
    lambda amount, period, burst: Rate(amount, period, "", burst),
    st.integers(1, 12),
    st.integers(1, 20),
    st.integers(0, 20),
)
STEPS = st.lists(
    st.tuples(st.floats(0, 15, allow_nan=False), st.integers(1, 4), st.sampled_from("abü")),
    max_size=60,
)
HOW = st.sampled_from(["fixed", "sliding", "gcra"])
ANY = st.sampled_from(["fixed", "sliding", "gcra", "concurrency"])


class Model:
    """The pure algorithm with a dictionary, and windows at whole multiples of the period."""

    def __init__(self, rate: Rate, how: Strategy) -> None:
        self.period = float(rate.period)
        self.algorithm = ALGORITHMS[how](rate)
        self.states: dict[str, tuple[int, Any]] = {}

    def take(self, key: str, cost: int, now: float) -> Outcome:
        window = math.floor(now / self.period)
        then, state = self.states.get(key, (window, self.algorithm.empty))
        for _ in range(min(window - then, 2)):
            state = self.algorithm.carry(state)
        passed = min(max(now - window * self.period, 0.0), self.period)
        outcome = self.algorithm.decide(state, passed, now, cost)
        self.states[key] = window, outcome[1]
        return outcome


@contextmanager
def worker(clock: Manual, native: Any) -> Iterator[WorkersStore]:
    """A store with a table of its own, which has nothing to report."""

    def report(site: str, error: BaseException) -> None:
        if "too many buckets in flight" not in str(error):  # so a full set of records says
            raise AssertionError(site) from error

    with tempfile.TemporaryDirectory() as folder:
        store = WorkersStore(
            lambda: Path(folder), LocalStore(), report=report, clock=clock, native=native
        )
        yield store
        store.close()


def gate_of(store: WorkersStore, rate: Rate, how: Strategy) -> Callable[[str, int, float], Outcome]:
    """The C gate at the store's table, for times of our choice."""
    store.take([Charge("to be seated", rate, how, 1)])
    table = store._table
    assert table is not None
    memory: Any = table.memory
    gate = shared.Gate(KINDS[how], rate.amount, rate.period, rate.most, None)
    _, _, salt, geometry, _ = memory.header
    quota = table.quota(rate, how).name
    gate.bind(memory.segment, salt.salt, quota, geometry.sets, geometry.table)

    def take(key: str, cost: int, now: float) -> Outcome:
        memory.segment.look_at = math.inf  # never time for Python to look at the file
        outcome: Outcome = gate.at(key, cost, now)
        return outcome

    return take


def seen(outcome: Outcome) -> tuple[bool, int, float, float]:
    allowed, _, left, reset, wait = outcome
    return allowed, max(left, 0), reset, wait


@pytest.mark.parametrize("native", [None, pytest.param(shared, marks=needs_c)])
@given(RATES, HOW, STEPS)
@settings(deadline=None)
def test_the_table_decides_as_the_algorithm(
    native: Any, rate: Rate, how: Strategy, steps: list[tuple[float, int, str]]
) -> None:
    clock, model = Manual(), Model(rate, how)
    with worker(clock, native) as store:
        take = store.gate(rate, how)
        for pause, cost, key in steps:
            clock.now += pause
            assert seen(take(key, cost)) == seen(model.take(key, cost, clock.now))


@needs_c
@given(RATES, HOW, STEPS, st.data())
@settings(deadline=None)
def test_the_gate_in_c_decides_as_the_algorithm(
    rate: Rate, how: Strategy, steps: list[tuple[float, int, str]], data: st.DataObject
) -> None:
    """To the last bit, and on states that Python wrote as on its own."""
    clock, model = Manual(), Model(rate, how)
    with worker(clock, shared) as store:
        gate, slow = gate_of(store, rate, how), store.gate(rate, how)
        for pause, cost, key in steps:
            clock.now += pause
            there = data.draw(st.booleans())
            found = gate(key, cost, clock.now) if there else slow(key, cost)
            assert seen(found) == seen(model.take(key, cost, clock.now))


@pytest.mark.parametrize("native", [None, pytest.param(shared, marks=needs_c)])
@given(ANY, st.binary(min_size=SET, max_size=SET), st.integers(1, 4), st.booleans())
@settings(deadline=None)
def test_no_bytes_in_a_slot_make_a_decision_fail(
    native: Any, how: Strategy, noise: bytes, cost: int, named: bool
) -> None:
    """Nor keep anybody out for longer than a full bucket, nor admit more than an empty one."""
    rate, clock = Rate(3, 60, ""), Manual()
    with worker(clock, native) as store:
        charge = Charge("a", rate, how, 1)
        store.take([charge])
        table = store._table
        assert table is not None
        geometry = table.memory.header.geometry
        bucket = table._salt.bucket(table.quota(rate, how).name, "a")
        at = geometry.set_at(geometry.index(bucket))
        table.memory.write(at, bucket + noise[16:] if named else noise)
        seat = table.memory.seat
        table.memory.write(geometry.flights_at(seat, bucket), noise)
        verdicts = [store.take([charge._replace(cost=cost)]) for _ in range(5)]
        assert sum(cost for verdict in verdicts if verdict.allowed) <= 3
        for verdict in verdicts:
            assert verdict.remaining >= 0
            assert 0 <= verdict.reset <= 120
            assert 0 <= verdict.retry_after <= 120
        store.give_back([charge])
        if native is not None and how != "concurrency":
            table.memory.write(at, bucket + noise[16:] if named else noise)
            gate = gate_of(store, rate, how)
            table.memory.write(at, bucket + noise[16:] if named else noise)
            found = [gate("a", cost, clock.now) for _ in range(5)]
            assert sum(cost for outcome in found if outcome[0]) <= 3
            assert all(0 <= outcome[3] <= 120 and 0 <= outcome[4] <= 120 for outcome in found)


@pytest.mark.parametrize("native", [None, pytest.param(shared, marks=needs_c)])
@given(st.binary(max_size=2 * HEADER), st.integers(0, HEADER))
@settings(deadline=None)
def test_no_bytes_in_the_file_keep_a_worker_from_its_table(
    native: Any, noise: bytes, at: int
) -> None:
    clock, rate = Manual(6000.0), Rate(3, 60, "")
    with worker(clock, native) as store:
        charge = Charge("a", rate, "fixed", 1)
        store.take([charge])
        path = store._path
        assert path is not None
        store.close()
        file = os.open(path, os.O_RDWR)
        os.pwrite(file, noise, at)
        os.close(file)
        assert path.name == FILE
        for _ in range(4):
            store.take([charge])
        assert not store.take([charge]).allowed
