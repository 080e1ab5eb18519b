"""The store that the workers of a machine share, seen by one of them."""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from opsguard.accelerator import shared
from opsguard.clock import elapsed
from opsguard.limiter import Charge, LocalStore, memory, parse_rates, workers
from opsguard.limiter.layout import HEADER, MAGIC, Geometry, Header, Salt, pack, unpack
from opsguard.limiter.making import open_store
from opsguard.limiter.rates import Strategy
from opsguard.limiter.workers import FILE, WorkersStore
from opsguard.marks import Marks
from opsguard.settings import Settings
from tests.limits import Bench, Manual, Request
from tests.stalls import STALL

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


def opened(several: bool = False, folder: Path | None = None, **options: Any) -> Any:
    return open_store(
        Settings.load({"limiter": options}, environ={}).limiter,
        full=lambda: None,
        report=lambda site, error: None,
        clock=elapsed,
        folder=lambda: folder,
        several=several,
    )


def test_auto_means_workers_where_several_belong_together(tmp_path: Path) -> None:
    assert isinstance(opened(), LocalStore)
    assert isinstance(opened(several=True), WorkersStore)
    assert isinstance(opened(several=True, store="local"), LocalStore)
    assert isinstance(opened(store="workers"), WorkersStore)
    assert opened(several=True, redis_url="redis://127.0.0.1:1/0").blocking


def test_where_the_platform_lacks_it_auto_is_local(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert isinstance(opened(several=True), LocalStore)
    with pytest.raises(ValueError, match="needs Linux"):
        opened(store="workers")


def test_making_a_store_opens_nothing(tmp_path: Path) -> None:
    store = opened(store="workers", folder=tmp_path)
    store.gate(charge().rate, "fixed")
    assert not list(tmp_path.iterdir())
    assert store.take([charge()]).allowed
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
    assert (tmp_path / FILE).stat().st_mode & 0o777 == 0o600
    store.close()


def test_the_first_decision_waits_for_others_who_are_joining(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever gave up after a moment would admit by himself while the others share a limit."""
    monkeypatch.setattr(workers, "_JOINING", 1.3 + 2 * STALL)
    file = os.open(tmp_path / FILE, os.O_RDWR | os.O_CREAT, 0o600)
    one = made(clock=elapsed, patience=1.0)
    with ThreadPoolExecutor(2) as threads:
        with memory._beginning(file):
            waiting = [threads.submit(one.take, [charge()]) for _ in range(2)]
            time.sleep(1.3)
            assert not any(verdict.done() for verdict in waiting)
        assert [verdict.result().stood_in for verdict in waiting] == [False, False]
    assert not one.reports


def test_who_waited_in_vain_to_join_waits_no_second_time(made: Made, tmp_path: Path) -> None:
    file = os.open(tmp_path / FILE, os.O_RDWR | os.O_CREAT, 0o600)
    one = made(clock=elapsed)
    with memory._beginning(file):
        assert one.take([charge()]).stood_in
        took = []
        for _ in range(3):
            time.sleep(0.15)  # until it is tried again
            began = elapsed()
            assert one.take([charge()]).stood_in
            took.append(elapsed() - began)
        assert min(took) < 0.5  # of the others, the machine may have thought of other work
    time.sleep(0.15)
    assert not one.take([charge()]).stood_in


def test_requests_to_two_workers_are_limited_as_one(made: Made) -> None:
    benches = [Bench(store=made(), default="4/minute", strategy="fixed") for _ in range(2)]
    found = []
    for turn in range(6):
        limiter = benches[turn % 2].limiter
        decision = limiter.route(Request(), Marks())
        assert decision is not None
        found.append((decision.allowed, decision.remaining))
    assert found == [(True, 3), (True, 2), (True, 1), (True, 0), (False, 0), (False, 0)]
    refused = benches[0].counts["default", "refused"] + benches[1].counts["default", "refused"]
    assert refused == 2


@pytest.mark.parametrize(
    ("on_error", "admitted"), [("local", 2), ("allow", 5), ("deny", 0)], ids=str
)
@pytest.mark.parametrize("rates", ["2/minute", "2/minute; 100/hour"])
def test_who_decides_while_the_table_cannot_be_had(
    rates: str, on_error: str, admitted: int
) -> None:
    reports: list[BaseException] = []
    store = WorkersStore(
        lambda: None, LocalStore(), report=lambda site, error: reports.append(error)
    )
    bench = Bench(store=store, policies={"/a": rates}, on_store_error=on_error)
    assert bench.admitted(Request("/a"), 5) == admitted
    assert len(reports) == 5


def test_a_full_disk_is_no_error_of_a_request(tmp_path: Path) -> None:
    """Nor a signal: the table in the file is written with pwrite."""
    store = Worker(tmp_path, None)
    assert store.take([charge()]).allowed
    assert store._table is not None
    seat: Any = store._table.memory
    full = os.open("/dev/full", os.O_RDWR)
    os.dup2(full, seat._seat.file)
    os.close(full)
    assert store.take([charge()], "allow").allowed
    assert not store.take([charge()], "deny").allowed
    assert len(store.reports) == 2
    store.clock.now += 2.0
    assert store.take([charge()]).allowed
    store.close()


def test_a_file_of_another_version_is_replaced(made: Made, tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(MAGIC + (99).to_bytes(4, "little") + bytes(5000))
    one, other = made(), made()
    assert one.take([charge(rate="2/minute")]).allowed
    assert other.take([charge(rate="2/minute")]).allowed
    assert not one.take([charge(rate="2/minute")]).allowed


def test_a_table_of_another_boot_is_replaced(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock began anew, so what stands there means nothing."""
    one = made()
    assert one.take([charge(rate="1/minute")]).allowed
    one.close()
    monkeypatch.setattr(memory, "_here", lambda: (bytes(16), 7))
    assert made().take([charge(rate="1/minute")]).allowed


def test_the_reader_of_headers_takes_its_own_only() -> None:
    header = Header(bytes(16), 1, Salt(bytes(16), bytes(16)), Geometry(64), -1)
    packed = pack(header)
    assert len(packed) == HEADER
    assert pack(unpack(packed) or header) == packed
    for at in range(HEADER):
        assert unpack(packed[:at] + bytes([packed[at] ^ 1]) + packed[at + 1 :]) is None
        assert unpack(packed[:at]) is None


def test_a_store_that_is_dropped_leaves_its_seat(made: Made) -> None:
    clock = Manual(6000.0)
    one = made(clock=clock)
    flying = charge(how="concurrency", rate="3/minute")
    assert one.take([flying]).allowed
    dropped = Worker(one._folder() or Path(), one._native, clock=clock)
    dropped.gate(flying.rate, "fixed")
    assert dropped.take([flying._replace(cost=2)]).allowed
    assert not one.take([flying]).allowed
    del dropped
    gc.collect()
    clock.now += 0.02
    assert one.take([flying._replace(cost=2)]).allowed
