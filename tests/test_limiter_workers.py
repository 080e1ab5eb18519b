"""The store that the workers of a machine share, seen by one of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from opsguard.accelerator import shared
from opsguard.limiter import Charge, LocalStore, parse_rates
from opsguard.limiter.rates import Strategy
from opsguard.limiter.workers import FILE, WorkersStore
from tests.limits import Manual

STRATEGIES: tuple[Strategy, ...] = ("fixed", "sliding", "gcra", "concurrency")
MEMORIES = [
    pytest.param(None, id="file"),
    pytest.param(
        shared,
        id="segment",
        marks=pytest.mark.skipif(shared is None, reason="opsguard._shared was not built"),
    ),
]

Made = Callable[..., "Worker"]


class Worker(WorkersStore):
    """A store as one worker has it, that notes what it reports."""

    def __init__(self, folder: Path, native: Any, **changes: Any) -> None:
        self.reports: list[BaseException] = []
        self.full: list[int] = []
        clock = changes.pop("clock", None) or Manual(6000.0)
        super().__init__(
            lambda: folder,
            LocalStore(clock=clock),
            report=lambda site, error: self.reports.append(error),
            on_full=lambda: self.full.append(1),
            clock=clock,
            native=native,
            **changes,
        )
        self.clock = clock


@pytest.fixture(params=MEMORIES)
def made(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Made]:
    """Makes the stores of workers that share a folder."""
    stores: list[Worker] = []

    def make(**changes: Any) -> Worker:
        stores.append(Worker(tmp_path, request.param, **changes))
        return stores[-1]

    yield make
    for store in stores:
        store.close()


def charge(
    key: str = "a", rate: str = "3/minute", how: Strategy = "fixed", cost: int = 1
) -> Charge:
    return Charge(key, parse_rates(rate)[0], how, cost)


@pytest.mark.parametrize("how", STRATEGIES)
def test_two_workers_have_one_limit(made: Made, how: Strategy) -> None:
    one, other = made(), made()
    verdicts = [store.take([charge(how=how)]) for store in (one, other, one, other, one)]
    assert [found.allowed for found in verdicts] == [True, True, True, False, False]
    assert [found.remaining for found in verdicts] == [2, 1, 0, 0, 0]
    assert all(found.retry_after > 0 for found in verdicts[3:])
    assert not one.reports + other.reports


@pytest.mark.parametrize("how", STRATEGIES)
def test_what_is_given_back_by_one_can_be_taken_by_the_other(made: Made, how: Strategy) -> None:
    one, other = made(), made()
    for _ in range(10):
        assert one.take([charge(how=how, cost=3)]).remaining == 0
        assert not other.take([charge(how=how)]).allowed
        one.give_back([charge(how=how, cost=3)])
        one, other = other, one
    one.give_back([charge("never seen", how=how)])


def test_of_several_charges_all_are_taken_or_none(made: Made) -> None:
    store = made()
    wide, narrow = charge("w", "100/minute"), charge("n", "1/minute", "gcra")
    flying = charge("f", "100/minute", "concurrency")
    assert store.take([wide, narrow, flying]).charge == 1
    refused = store.take([wide, flying, narrow])
    assert (refused.allowed, refused.charge) == (False, 2)
    assert store.take([wide]).remaining == 98
    assert store.take([flying]).remaining == 98


@pytest.mark.parametrize("how", STRATEGIES)
def test_a_bucket_named_twice_is_charged_twice(made: Made, how: Strategy) -> None:
    store = made()
    assert store.take([charge(how=how), charge(how=how)]).remaining == 1
    assert not store.take([charge(how=how), charge(how=how)]).allowed
    assert store.take([charge(how=how)]).allowed
    assert not store.take([charge(how=how)]).allowed


@pytest.mark.parametrize("how", STRATEGIES)
def test_a_gate_and_a_take_charge_the_same_bucket(made: Made, how: Strategy) -> None:
    store, other = made(), made()
    take = store.gate(charge().rate, how)
    assert take("a", 1)[:3:2] == (True, 2)
    assert other.take([charge(how=how)]).remaining == 1
    assert take("a", 1)[:3:2] == (True, 0)
    allowed, _, left, reset, wait = take("a", 1)
    assert (allowed, left) == (False, 0)
    assert reset > 0
    assert wait > 0


def test_a_slot_that_nobody_returns_is_free_again_after_the_period(made: Made) -> None:
    clock = Manual(6000.0)
    one, other = made(clock=clock), made(clock=clock)
    flying = charge(how="concurrency", rate="2/minute")
    assert one.take([flying]).allowed
    clock.now += 30.0
    assert other.take([flying]).allowed
    clock.now += 29.0
    assert not one.take([flying]).allowed
    clock.now += 1.0 + 60.0 / 7.0
    assert one.take([flying]).allowed
    assert not one.take([flying]).allowed
    clock.now += 31.0
    assert one.take([flying]).allowed


def test_the_slots_of_a_worker_that_is_gone_are_free(made: Made) -> None:
    clock = Manual(6000.0)
    one, other = made(clock=clock), made(clock=clock)
    flying = charge(how="concurrency", rate="3/minute")
    assert one.take([flying]).allowed
    assert other.take([flying._replace(cost=2)]).allowed
    assert not one.take([flying]).allowed
    other.close()
    clock.now += 0.02
    assert one.take([flying._replace(cost=2)]).allowed
    other.give_back([flying])  # of a seat that it has left
    assert not one.take([flying]).allowed


def test_a_seat_that_is_taken_again_has_nothing_in_flight(made: Made) -> None:
    clock = Manual(6000.0)
    one, other = made(clock=clock), made(clock=clock)
    flying = charge(how="concurrency", rate="3/minute")
    assert one.take([charge()]).allowed
    assert other.take([flying._replace(cost=3)]).allowed
    other.close()
    again = made(clock=clock)
    assert again.take([flying._replace(cost=3)]).allowed
    assert not one.take([flying]).allowed
    again.give_back([flying._replace(cost=3)])
    assert one.take([flying._replace(cost=3)]).allowed


def test_rates_with_the_same_key_have_buckets_of_their_own(made: Made) -> None:
    store = made()
    assert store.take([charge(rate="1/minute")]).allowed
    assert not store.take([charge(rate="1/minute")]).allowed
    assert store.take([charge(rate="2/minute")]).remaining == 1
    assert store.take([charge(rate="1/minute", how="gcra")]).allowed


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda path: path.unlink(), id="deleted"),
        pytest.param(lambda path: os.truncate(path, 0), id="zero bytes"),
        pytest.param(lambda path: os.truncate(path, 100), id="cut short"),
        pytest.param(lambda path: path.write_bytes(os.urandom(1 << 20)), id="random"),
    ],
)
def test_whatever_becomes_of_the_file_both_go_on_in_one_table(
    made: Made, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    clock = Manual(6000.0)
    one, other = made(clock=clock), made(clock=clock)
    for store in (one, other):
        store.take([charge()])
    damage(tmp_path / FILE)
    for store in (one, other):
        store.take([charge()])
    clock.now += 1.5
    for _ in range(3):
        for store in (one, other):
            store.take([charge()])
    assert not one.take([charge()]).allowed
    assert not other.take([charge()]).allowed


def test_without_a_folder_the_policy_decides(tmp_path: Path) -> None:
    reports: list[BaseException] = []
    store = WorkersStore(
        lambda: None, LocalStore(), report=lambda site, error: reports.append(error)
    )
    assert [store.take([charge()]).allowed for _ in range(4)] == [True, True, True, False]
    assert not store.take([charge()], "deny").allowed
    assert store.take([charge()], "allow").allowed
    take = store.gate(charge().rate, "fixed", "deny")
    assert not take("b", 1)[0]
    store.give_back([charge(cost=3)])
    assert store.take([charge()]).allowed
    assert reports
