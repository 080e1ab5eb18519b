"""Leases: who decides, what they may overshoot, and what they spare."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opsguard.clock import elapsed
from opsguard.limiter import leases as module
from opsguard.limiter.breaker import Breaker
from opsguard.limiter.fallback import FallbackStore
from opsguard.limiter.leases import LeaseStore
from opsguard.limiter.local import LocalStore
from opsguard.limiter.rates import Rate
from opsguard.limiter.redis import RedisStore
from opsguard.limiter.stores import Charge, OnStoreError, Strategy, Verdict
from tests.limits import Bench, Request
from tests.redis_server import RedisServer, running

THOUSAND = Rate(1000, 60, "1000 per 1 minute")


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Exact:
    """An exact store that all workers share, in memory; counts who asks it for what."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.inner = LocalStore(clock=clock)
        self.strategies: frozenset[Strategy] = self.inner.strategies
        self.down = False
        self.decided: list[Sequence[Charge]] = []
        self.reserved: list[Sequence[Charge]] = []
        self.given: list[Charge] = []
        self.grants: list[tuple[float, int]] = []
        self.closed = 0

    def take(self, charges: Sequence[Charge], on_error: OnStoreError = "local") -> Verdict:
        self.decided.append(charges)
        return self._grant(charges)

    async def atake(self, charges: Sequence[Charge], on_error: OnStoreError = "local") -> Verdict:
        return self.take(charges, on_error)

    def take_with(
        self, charge: Charge, more: int, on_error: OnStoreError = "local"
    ) -> tuple[Verdict, int]:
        verdict = self.reserve([charge._replace(cost=charge.cost + more)])
        if verdict is None or not verdict.allowed:
            return self.take([charge], on_error), 0
        return verdict, more

    def reserve(self, charges: Sequence[Charge]) -> Verdict | None:
        if self.down:
            return None
        self.reserved.append(charges)
        return self._grant(charges)

    def _grant(self, charges: Sequence[Charge]) -> Verdict:
        verdict = self.inner.take(charges)
        if verdict.allowed:
            self.grants += [(self.inner.clock(), charge.cost) for charge in charges]
        return verdict

    async def areserve(self, charges: Sequence[Charge]) -> Verdict | None:
        await asyncio.sleep(0)
        return self.reserve(charges)

    def give_back(self, charges: Sequence[Charge]) -> None:
        self.given += charges
        self.inner.give_back(charges)

    async def agive_back(self, charges: Sequence[Charge]) -> None:
        self.give_back(charges)

    def close(self) -> None:
        self.closed += 1

    async def aclose(self) -> None:
        self.closed += 1


class Stage:
    """One worker with its background under control."""

    def __init__(self, *, lease: int = 50, workers: int = 2, keys: int = 100) -> None:
        self.clock = Clock()
        self.exact = Exact(self.clock)
        self.jobs: deque[Callable[[], None]] = deque()
        self.store = LeaseStore(
            self.exact,
            lease=lease,
            workers=workers,
            clock=self.clock,
            keys=keys,
            background=self.jobs.append,
        )

    def work(self) -> None:
        while self.jobs:
            self.jobs.popleft()()
            self.clock.now += 0.06  # a lease has lasted for more than a moment

    def take(self, key: str = "k", strategy: Strategy = "fixed", cost: int = 1) -> Verdict:
        return self.store.take([Charge(key, THOUSAND, strategy, cost)])

    def warm(self, key: str = "k", requests: int = 200) -> None:
        """As much traffic as makes the lease a whole one."""
        for _ in range(requests):
            self.take(key)
            self.work()
        self.exact.decided.clear()


@pytest.fixture
def stage() -> Stage:
    return Stage()


def test_a_client_that_comes_once_is_not_leased(stage: Stage) -> None:
    stage.take()

    assert not stage.jobs
    assert len(stage.exact.decided) == 1


def test_a_lease_is_taken_in_the_background_and_spares_the_store(stage: Stage) -> None:
    stage.take()
    stage.take()
    assert stage.exact.reserved == []  # no request has waited for it
    stage.work()
    assert stage.exact.reserved == [(Charge("k", THOUSAND, "fixed", 4),)]

    verdict = stage.take()

    assert len(stage.exact.decided) == 2
    assert verdict.remaining == 997
    assert 0 < verdict.reset <= 60


def test_tokens_at_hand_are_spent_without_a_flow_until_it_is_time_to_renew(stage: Stage) -> None:
    assert stage.store.at_hand("k", 1) is None  # nothing is leased yet
    for _ in range(2):
        stage.take()
    stage.work()
    first = stage.store.at_hand("k", 1)
    assert first is not None
    verdict = stage.take()
    assert first == (True, None, verdict.remaining + 1, verdict.reset, 0.0)
    while stage.store.at_hand("k", 1) is not None:
        pass
    asked = len(stage.exact.reserved)
    stage.take()  # has the tokens that are left, and renews
    assert len(stage.exact.decided) == 2
    stage.work()
    assert len(stage.exact.reserved) == asked + 1
    assert stage.store.at_hand("k", 1) is not None
    assert stage.store.at_hand("k", 1000) is None
    stage.clock.now += 3600.0
    assert stage.store.at_hand("k", 1) is None


def test_a_stage_decides_by_tokens_as_it_does_by_its_flow(stage: Stage) -> None:
    bench = Bench(store=stage.store, policies={"/x": "1000/minute"})
    request = Request(path="/x")
    edge = bench.limiter.edge_stage(request)
    assert edge is not None
    assert edge.at_hand is not None
    assert edge.at_hand(request) is None
    for _ in range(2):
        edge.decide(request)
    stage.work()
    by_flow, by_tokens = edge.decide(request), edge.at_hand(request)
    assert by_flow is not None
    assert by_tokens is not None
    assert by_tokens.charges == by_flow.charges
    assert by_tokens.remaining == by_flow.remaining - 1
    assert bench.counts["/x", "allowed"] == 4


@given(
    tokens=st.integers(0, 60),
    size=st.integers(1, 50),
    due=st.sampled_from([-1.0, 30.0]),
    brief=st.booleans(),
    left=st.sampled_from([-1.0, 30.0, 60.0]),
    cost=st.integers(1, 20),
    held=st.booleans(),
)
def test_tokens_are_taken_alike_in_c_and_in_python(
    tokens: int, size: int, due: float, brief: bool, left: float, cost: int, held: bool
) -> None:
    jobs: list[Callable[[], None]] = []
    exact = Exact(elapsed)
    store = LeaseStore(exact, lease=50, workers=2, clock=elapsed, background=jobs.append)
    policy = {"rate": "1000/minute", "cost": cost}
    bench = Bench(store=store, policies={"/x": policy})  # type: ignore[arg-type]
    edge, request = bench.limiter.edge_stage(Request(path="/x")), Request(path="/x")
    assert edge is not None
    assert edge.at_hand is not None
    for _ in range(2):
        edge.decide(request)
    ((key, lease),) = store.leases.items()

    def set_up() -> None:
        lease.tokens, lease.size, lease.remaining = tokens, size, 100
        lease.due_at, lease.brief = elapsed() + due, brief
        lease.until = lease.reset_at = elapsed() + left

    set_up()
    expected, after = store.at_hand(key, cost), lease.tokens
    set_up()
    if held:  # somebody is in the middle of it, in Python: he is waited for
        store.lock.acquire()
        threading.Timer(0.002, store.lock.release).start()
    found = edge.at_hand(request)
    assert lease.tokens == after
    assert (found is None) == (expected is None)
    if found is not None and expected is not None:
        assert found.remaining == expected[2]


def test_leases_grow_to_their_size_while_they_are_used_up(stage: Stage) -> None:
    stage.warm()

    sizes = [charges[0].cost for charges in stage.exact.reserved]
    assert sizes[:4] == [4, 8, 15, 30]
    assert all(35 <= size <= 50 for size in sizes[4:])
    for _ in range(100):
        stage.take()
        stage.work()
    assert stage.exact.decided == []


def test_a_request_that_has_to_ask_brings_tokens_along(stage: Stage) -> None:
    """Where the background does not come in time: one call of the store for a whole lease."""
    stage.warm()
    stage.exact.reserved.clear()
    answers = [stage.take().remaining for _ in range(150)]

    assert answers == list(range(answers[0], answers[0] - 150, -1))
    assert stage.exact.decided == []
    assert 3 <= len(stage.exact.reserved) <= 4
    assert len(stage.jobs) <= 2  # then it is known that nobody would come in time
    stage.work()  # what came in the meantime is not asked for again
    assert len(stage.exact.reserved) <= 5
    assert stage.store.leases["k"].tokens <= 50


def test_nobody_holds_more_tokens_than_a_lease(stage: Stage) -> None:
    """A request does not ask for tokens while the background does."""
    stage.warm()
    stage.exact.reserved.clear()
    reserve = stage.exact.reserve

    def slow(charges: Sequence[Charge]) -> Verdict | None:
        stage.exact.reserve = reserve  # type: ignore[method-assign]
        found = [stage.take() for _ in range(60)]  # while the answer is on its way
        assert all(one.allowed for one in found)
        return reserve(charges)

    while not stage.jobs:
        stage.take()
    stage.exact.reserve = slow  # type: ignore[method-assign]
    stage.work()
    assert stage.exact.decided
    assert stage.store.leases["k"].tokens <= 50


def test_what_the_store_refuses_to_bring_along_is_decided_exactly(stage: Stage) -> None:
    stage.warm()
    stage.exact.inner.take([Charge("k", THOUSAND, "fixed", 600)])  # by other workers
    while stage.take().remaining > 150:
        pass
    assert len({stage.take().allowed for _ in range(300)}) == 2
    assert sum(cost for _, cost in stage.exact.grants) + 600 == 1000


def test_a_lease_that_expires_unused_shrinks(stage: Stage) -> None:
    stage.warm()
    reserved = stage.exact.reserved[-1][0].cost
    for _ in range(2):  # the tokens have expired with their window
        stage.clock.now += 60
        stage.take()
        stage.take()
        stage.exact.reserved.clear()
        stage.work()

    assert len(stage.exact.decided) == 4
    assert stage.exact.reserved[0][0].cost < reserved


def test_near_exhaustion_it_is_exact(stage: Stage) -> None:
    stage.warm(requests=850)

    admitted = 0
    while stage.take().allowed:
        stage.work()
        admitted += 1

    assert 850 + admitted == 1000
    before = len(stage.exact.reserved)
    for _ in range(5):
        assert not stage.take().allowed
        stage.work()
    assert len(stage.exact.reserved) == before


def test_several_charges_are_spent_together_or_not_at_all(stage: Stage) -> None:
    both = [Charge("a", THOUSAND, "fixed", 1), Charge("b", THOUSAND, "gcra", 1)]
    for _ in range(3):
        stage.store.take(both)
    stage.work()
    stage.exact.decided.clear()

    for _ in range(3):
        stage.store.take(both)
    assert stage.exact.decided == []
    stage.store.take([Charge("a", THOUSAND, "fixed", 1), Charge("new", THOUSAND, "fixed", 1)])
    assert len(stage.exact.decided) == 1
    assert stage.store.leases["a"].tokens == 1  # not spent by the exact decision


def test_one_bucket_twice_does_not_overdraw(stage: Stage) -> None:
    stage.take()
    stage.take()
    stage.work()
    stage.exact.decided.clear()

    stage.store.take([Charge("k", THOUSAND, "fixed", 3)] * 2)

    assert len(stage.exact.decided) == 1
    assert stage.store.leases["k"].tokens == 4


def test_concurrency_is_never_leased(stage: Stage) -> None:
    for _ in range(5):
        stage.take(strategy="concurrency")

    assert len(stage.exact.decided) == 5
    assert not stage.jobs
    stage.store.give_back([Charge("k", THOUSAND, "concurrency", 1)])
    assert len(stage.exact.given) == 1


def test_what_is_given_back_becomes_a_token_again(stage: Stage) -> None:
    stage.warm()
    tokens = stage.store.leases["k"].tokens
    stage.take()

    stage.store.give_back([Charge("k", THOUSAND, "fixed", 1)])
    assert stage.store.leases["k"].tokens == tokens
    assert stage.exact.given == []

    stage.store.give_back([Charge("k", THOUSAND, "fixed", 50)])
    asyncio.run(stage.store.agive_back([Charge("unknown", THOUSAND, "fixed", 1)]))
    assert [charge.cost for charge in stage.exact.given] == [50, 1]


def test_a_store_that_is_down_is_not_asked_for_leases(stage: Stage) -> None:
    stage.exact.down = True
    for _ in range(5):
        stage.take()

    assert not stage.jobs


def test_a_renewal_that_fails_is_tried_again_later(stage: Stage) -> None:
    stage.take()
    stage.take()
    stage.exact.down = True
    stage.work()
    stage.exact.down = False
    stage.take()
    stage.take()
    stage.work()

    assert len(stage.exact.reserved) == 1


def test_the_number_of_leases_is_bounded() -> None:
    stage = Stage(keys=3)
    for number in range(10):
        stage.take(f"k{number}")
        stage.take(f"k{number}")
    stage.work()

    assert list(stage.store.leases) == ["k7", "k8", "k9"]


def test_on_a_loop_leases_are_tasks() -> None:
    stage = Stage()
    charges = [Charge("k", THOUSAND, "fixed", 1)]

    async def main() -> None:
        for _ in range(300):
            await stage.store.atake(charges)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        await stage.store.aclose()

    asyncio.run(main())

    assert not stage.jobs
    assert len(stage.exact.decided) < 10
    assert stage.exact.closed == 1


def test_a_cancelled_renewal_lets_another_try() -> None:
    stage = Stage()
    charges = [Charge("k", THOUSAND, "fixed", 1)]

    async def main() -> None:
        await stage.store.atake(charges)
        await stage.store.atake(charges)
        [task] = stage.store._tasks
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(main())
    assert stage.exact.reserved == []
    stage.take()
    stage.take()
    stage.work()

    assert len(stage.exact.reserved) == 1


# The background thread ----------------------------------------------------------------------------


def lease_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "opsguard-leases"]


def wait_for(what: Callable[[], object]) -> None:
    deadline = time.monotonic() + 5
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_the_thread_starts_at_first_use_and_ends_by_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_IDLE", 0.05)
    clock = Clock()
    exact = Exact(clock)
    store = LeaseStore(exact, lease=10, workers=1, clock=clock)
    assert lease_threads() == []
    for _ in range(2):  # it can start again
        reserved = len(exact.reserved)
        clock.now += 60
        while len(exact.reserved) == reserved:
            store.take([Charge("k", THOUSAND, "fixed", 1)])
            time.sleep(0.001)
        wait_for(lambda: not lease_threads())
    store.close()


def test_no_thread_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    clock = Clock()
    store = LeaseStore(Exact(clock), lease=10, workers=1, clock=clock)

    assert all(store.take([Charge("k", THOUSAND, "fixed", 1)]).allowed for _ in range(20))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
def test_a_forked_child_has_no_tokens_of_its_parent(stage: Stage) -> None:
    stage.warm()
    assert stage.store.leases
    child = os.fork()
    if child == 0:
        os._exit(1 if stage.store.leases else 0)
    _, status = os.waitpid(child, 0)

    assert status == 0
    assert stage.store.leases["k"].tokens > 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.usefixtures("eager_switching")
@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
def test_a_child_forked_under_load_does_not_hang() -> None:
    store = LeaseStore(Exact(elapsed), lease=50, workers=2, clock=elapsed)
    done = threading.Event()

    def hammer() -> None:
        while not done.is_set():
            store.take([Charge("k", Rate(1_000_000, 60, ""), "fixed", 1)])

    threads = [threading.Thread(target=hammer) for _ in range(4)]
    for one in threads:
        one.start()
    try:
        for _ in range(20):
            child = os.fork()
            if child == 0:
                os._exit(0 if store.at_hand("k", 1) is None else 1)
            deadline = time.monotonic() + 30
            while (found := os.waitpid(child, os.WNOHANG)) == (0, 0):
                if time.monotonic() > deadline:
                    os.kill(child, signal.SIGKILL)
                    pytest.fail("the child hangs")
                time.sleep(0.001)
            assert found[1] == 0
    finally:
        done.set()
        for one in threads:
            one.join()


# Who never comes back -----------------------------------------------------------------------------


def test_a_renewal_that_is_lost_is_made_up_for(stage: Stage) -> None:
    """As when the loop that was to make it is gone."""
    stage.warm()
    for lose in (stage.jobs.clear, lambda: stage.store._order(Charge("k", THOUSAND, "fixed", 1))):
        while not stage.jobs:
            stage.take()
        lose()
        stage.jobs.clear()
        while stage.store.leases["k"].tokens:
            stage.take()
        stage.clock.now += 5.1
        stage.exact.reserved.clear()
        stage.take()
        stage.work()
        assert stage.exact.reserved


def test_no_order_is_for_nothing(stage: Stage) -> None:
    stage.warm()
    for cost in (60, 1, 50, 49, 60, 7, 1, 60):
        for _ in range(3):
            stage.take(cost=cost)
            stage.work()
    assert all(charge.cost > 0 for charges in stage.exact.reserved for charge in charges)
    assert 0 <= stage.store.leases["k"].tokens <= 50


def test_what_is_given_back_while_more_is_on_its_way_is_not_too_much(stage: Stage) -> None:
    stage.warm()
    charge = Charge("k", THOUSAND, "fixed", 1)
    while stage.store.leases["k"].tokens:
        stage.take()
    order = stage.store._order(charge)
    stage.store.give_back([charge] * 30)
    assert order is not None
    came = stage.exact.reserve([order])
    stage.store._renewed(order, came, stage.clock.now, threads=True)
    assert stage.store.leases["k"].tokens <= 50


# The bound ----------------------------------------------------------------------------------------

steps = st.lists(
    st.tuples(
        st.integers(0, 2),  # the worker
        st.integers(1, 40),  # requests
        st.sampled_from([0.0, 0.0, 0.5, 3.0, 11.0]),  # seconds that pass before
        st.booleans(),  # whether the backgrounds have their turn
    ),
    max_size=60,
)


@pytest.mark.parametrize("strategy", ["fixed", "sliding", "gcra"])
@given(steps=steps, lease=st.integers(1, 12), amount=st.integers(5, 120))
def test_workers_overshoot_by_what_they_held_at_most(
    strategy: Strategy, steps: list[tuple[int, int, float, bool]], lease: int, amount: int
) -> None:
    period, workers = 10, 3
    clock = Clock()
    exact = Exact(clock)
    jobs: deque[Callable[[], None]] = deque()
    stores = [
        LeaseStore(exact, lease=lease, workers=workers, clock=clock, background=jobs.append)
        for _ in range(workers)
    ]
    charge = Charge("k", Rate(amount, period, "x"), strategy, 1)
    admitted: list[float] = []
    windows: dict[float, int] = {}
    first = clock.now + (steps[0][2] if steps else 0.0)  # where the store's windows begin
    for worker, requests, passed, background in steps:
        clock.now += passed
        for _ in range(requests):
            if stores[worker].take([charge]).allowed:
                admitted.append(clock.now)
                window = (clock.now - first) // period
                windows[window] = windows.get(window, 0) + 1
        while background and jobs:
            jobs.popleft()()
        assert all(0 <= held.tokens <= lease for s in stores for held in s.leases.values())

    for begin in admitted:
        stretch = sum(begin <= moment < begin + period for moment in admitted)
        granted = sum(cost for at, cost in exact.grants if begin <= at < begin + period)
        assert stretch <= granted + workers * lease
        assert granted <= 2 * amount
    if strategy == "fixed":
        assert all(number <= amount for number in windows.values())


# On a real Redis ----------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    with running(tmp_path) as server:
        yield server


def leased(server: RedisServer, lease: int) -> LeaseStore:
    guarded = FallbackStore(
        RedisStore(server.url, timeout=2.0),
        LocalStore(),
        breaker=Breaker(clock=elapsed),
        report=lambda site, error, then="": None,
    )
    return LeaseStore(guarded, lease=lease, workers=4, clock=elapsed)


def test_four_workers_on_one_redis_admit_the_amount(server: RedisServer) -> None:
    stores = [leased(server, 10) for _ in range(4)]
    charges = [Charge("k", Rate(500, 3600, "500 per 1 hour"), "fixed", 1)]
    admitted = 0
    for _ in range(400):
        for store in stores:
            admitted += store.take(charges).allowed

    # Never more; what is left over lies in leases that others could not use.
    assert 500 - 4 * 10 <= admitted <= 500
    for store in stores:
        store.close()


def test_with_a_lease_most_requests_do_no_io(server: RedisServer) -> None:
    store = leased(server, 50)
    charges = [Charge("k", Rate(1_000_000, 3600, "many"), "gcra", 1)]

    async def main() -> None:
        for _ in range(2000):
            await store.atake(charges)
            await asyncio.sleep(0)
        await store.aclose()

    with server.client() as client:
        asyncio.run(main())
        calls = client.info("commandstats")["cmdstat_evalsha"]["calls"]

    assert calls < 2000 / 10
