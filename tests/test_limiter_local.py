"""The store in the process: exact, bounded, and unharmed by floods, threads and forks."""

from __future__ import annotations

import gc
import os
import threading
import time
import tracemalloc

import pytest

from opsguard.limiter import Charge, LocalStore, parse_rates
from opsguard.limiter.rates import Rate, Strategy
from tests.limits import Manual

STRATEGIES: tuple[Strategy, ...] = ("fixed", "sliding", "gcra", "concurrency")


def charge(
    key: str = "a", rate: str = "3/minute", how: Strategy = "fixed", cost: int = 1
) -> Charge:
    return Charge(key, parse_rates(rate)[0], how, cost)


@pytest.mark.parametrize("how", STRATEGIES)
def test_a_full_quota_is_admitted_and_no_more(how: Strategy) -> None:
    store = LocalStore(clock=Manual())
    verdicts = [store.take([charge(how=how)]) for _ in range(5)]
    assert [one.allowed for one in verdicts] == [True, True, True, False, False]
    assert [one.remaining for one in verdicts] == [2, 1, 0, 0, 0]
    assert all(one.retry_after == 0 for one in verdicts[:3])
    assert all(one.retry_after > 0 for one in verdicts[3:])


@pytest.mark.parametrize("how", ["fixed", "sliding", "gcra"])
def test_who_waits_as_long_as_told_is_admitted(how: Strategy) -> None:
    clock = Manual()
    store = LocalStore(clock=clock)
    while (verdict := store.take([charge(how=how)])).allowed:
        clock.now += 1.25
    clock.now += verdict.retry_after
    assert store.take([charge(how=how)]).allowed


def test_a_fixed_window_starts_afresh_for_everybody_at_once() -> None:
    clock = Manual()
    store = LocalStore(clock=clock)
    for _ in range(3):
        assert store.take([charge()]).allowed
    clock.now += 59.0
    refused = store.take([charge()])
    assert (refused.allowed, refused.retry_after, refused.reset) == (False, 1.0, 1.0)
    clock.now += 1.0
    assert store.take([charge()]).remaining == 2


def test_a_sliding_window_weighs_the_one_before() -> None:
    clock = Manual()
    store = LocalStore(clock=clock)
    rate = "10/minute"
    for _ in range(10):
        store.take([charge(rate=rate, how="sliding")])
    clock.now += 90.0  # half of the next window: five of the ten still count
    verdicts = [store.take([charge(rate=rate, how="sliding")]) for _ in range(6)]
    assert [one.allowed for one in verdicts] == [True] * 5 + [False]
    assert verdicts[-1].retry_after == pytest.approx(6.0)  # a tenth of the window for one of ten


def test_a_slot_is_free_when_it_is_returned_or_lost() -> None:
    clock = Manual()
    store = LocalStore(clock=clock)
    one = charge(rate="2/minute", how="concurrency")
    assert store.take([one]).allowed
    assert store.take([one]).allowed
    assert not store.take([one]).allowed
    store.give_back([one])
    assert store.take([one]).allowed
    clock.now += 61.0
    assert store.take([one._replace(cost=2)]).allowed


def test_of_several_charges_all_are_taken_or_none() -> None:
    store = LocalStore(clock=Manual())
    wide, narrow = charge("w", "100/minute"), charge("n", "1/minute", "gcra")
    assert store.take([wide, narrow]).charge == 1
    refused = store.take([wide, narrow])
    assert (refused.allowed, refused.charge) == (False, 1)
    assert store.take([wide]).remaining == 98


def test_a_bucket_named_twice_is_charged_twice() -> None:
    store = LocalStore(clock=Manual())
    assert store.take([charge(), charge()]).remaining == 1
    assert not store.take([charge(), charge()]).allowed
    assert store.take([charge()]).allowed


@pytest.mark.parametrize("how", STRATEGIES)
def test_a_cost_above_the_limit_is_refused_and_costs_nothing(how: Strategy) -> None:
    store = LocalStore(clock=Manual())
    refused = store.take([charge(how=how, cost=4)])
    assert not refused.allowed
    assert refused.retry_after > 0
    assert store.take([charge(how=how, cost=3)]).allowed


@pytest.mark.parametrize("how", STRATEGIES)
def test_what_is_given_back_can_be_taken_again(how: Strategy) -> None:
    store = LocalStore(clock=Manual())
    for _ in range(10):
        assert store.take([charge(how=how, cost=3)]).remaining == 0
        store.give_back([charge(how=how, cost=3)])
    store.give_back([charge("never seen", how=how)])


def test_what_was_taken_in_the_window_before_is_given_back_there() -> None:
    clock = Manual()
    store = LocalStore(clock=clock)
    store.take([charge(how="sliding", cost=3)])
    clock.now += 60.0
    assert not store.take([charge(how="sliding")]).allowed
    store.give_back([charge(how="sliding", cost=3)])
    assert store.take([charge(how="sliding", cost=3)]).allowed


@pytest.mark.parametrize("how", ["fixed", "sliding", "gcra"])
@pytest.mark.parametrize("jump", [3600.0, -3600.0], ids=["forwards", "backwards"])
def test_a_clock_that_jumps_keeps_nobody_out_for_long(how: Strategy, jump: float) -> None:
    """Not longer than two windows for the sliding one, which remembers the last; else one."""
    clock = Manual(10_000.0)
    store = LocalStore(clock=clock)
    while store.take([charge(how=how)]).allowed:
        pass
    clock.now += jump
    waited = 0.0
    while not (verdict := store.take([charge(how=how)])).allowed:
        assert 0 < verdict.retry_after <= 120
        clock.now += verdict.retry_after
        waited += verdict.retry_after
    assert waited <= (120 if how == "sliding" else 60)


def test_nothing_is_charged_without_a_charge() -> None:
    with pytest.raises(ValueError, match="at least one charge"):
        LocalStore().take([])
    with pytest.raises(ValueError, match="max_keys"):
        LocalStore(max_keys=0)


# -- full ---------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["fixed", "sliding", "gcra"])
def test_a_flood_of_keys_does_not_free_an_offender(how: Strategy) -> None:
    full: list[int] = []
    store = LocalStore(max_keys=100, clock=Manual(), on_full=lambda: full.append(1))
    take = store.gate(parse_rates("4/minute")[0], how)
    for name in ("offender", "half"):
        for _ in range(4 if name == "offender" else 2):
            assert take(name, 1)[0]
    for number in range(5000):
        take(f"flood-{number}", 1)
    assert not take("offender", 1)[0]
    assert [take("half", 1)[0] for _ in range(3)] == [True, True, False]
    assert len(store) <= 100
    assert len(full) == 5000 - 98


def test_keys_without_room_share_buckets_and_stay_limited() -> None:
    """A hundred offenders leave no room; then newcomers are limited together."""
    store = LocalStore(max_keys=100, clock=Manual())
    take = store.gate(parse_rates("1/minute")[0], "fixed")
    for number in range(100):
        assert take(f"offender-{number}", 1)[0]
    admitted = sum(take(f"flood-{number}", 1)[0] for number in range(20_000))
    assert 0 < admitted <= 1024
    assert len(store) <= 100 + 1024
    assert not take("offender-7", 1)[0]


def test_a_full_store_has_room_again_when_windows_end() -> None:
    clock = Manual()
    store = LocalStore(max_keys=10, clock=clock)
    take = store.gate(parse_rates("1/minute")[0], "fixed")
    other = store.gate(parse_rates("1/second")[0], "fixed")
    for number in range(10):
        assert take(f"{number}", 1)[0]
    clock.now += 121.0
    assert all(other(f"new-{number}", 1)[0] for number in range(10))
    assert len(store) == 10


def test_room_is_taken_from_the_largest_table() -> None:
    store = LocalStore(max_keys=10, clock=Manual())
    take = store.gate(parse_rates("10/minute")[0], "fixed")
    for number in range(10):
        take(f"{number}", 1)
    verdict = store.take(
        [charge("x", "9/minute"), charge("y", "8/minute"), charge("0", "10/minute")]
    )
    assert verdict.allowed
    assert len(store) == 10


def test_a_million_keys_cost_little_memory_and_no_long_pause() -> None:
    """Half a million here, for time; at the cap each costs as much."""
    store = LocalStore(max_keys=50_000)
    take = store.gate(parse_rates("10/second")[0], "sliding")
    clock = time.thread_time  # what other processes take of the core is not ours
    tracemalloc.start()
    for number in range(50_000):
        take(f"7:@/api/*:s10/1:a:203.0.{number >> 8}.{number & 255}", 1)
    gc.collect()
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert used / 50_000 <= 250

    def longest(attempt: int) -> float:
        worst = 0.0
        for number in range(200_000):
            before = clock()
            take(f"7:@/api/*:s10/1:a:2001:db8:{attempt}:{number:x}::/64", 1)
            worst = max(worst, clock() - before)
        return worst

    # A shared machine takes its time now and then; a pause of ours would be there each time.
    assert any(longest(attempt) < 0.01 for attempt in range(4))
    assert len(store) <= 50_000 + 1024


# -- threads and forks --------------------------------------------------------------------


@pytest.mark.usefixtures("eager_switching")
@pytest.mark.parametrize("how", STRATEGIES)
def test_threads_admit_exactly_the_limit(how: Strategy) -> None:
    """64 of them, by the quick way and by the general one; nothing moves the clock."""
    store = LocalStore(clock=Manual())
    rate = Rate(1000, 60, "1000 per 1 minute")
    take = store.gate(rate, how)
    admitted: list[int] = []
    start = threading.Barrier(64)

    def work(number: int) -> None:
        start.wait()
        if number % 2:
            admitted.append(sum(take("a", 1)[0] for _ in range(50)))
        else:
            admitted.append(sum(store.take([Charge("a", rate, how, 1)])[0] for _ in range(50)))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(admitted) == 1000


@pytest.mark.usefixtures("eager_switching")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_fork_while_other_threads_decide_does_not_hang_the_child() -> None:
    store = LocalStore()
    take = store.gate(parse_rates("1000000000/hour")[0], "sliding")
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            take("a", 1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(20):
            child = os.fork()
            if child == 0:
                os._exit(0 if take("a", 1)[0] else 1)
            _, status = os.waitpid(child, 0)
            assert status == 0
    finally:
        stop.set()
        for thread in threads:
            thread.join()
