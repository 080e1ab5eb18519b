"""The breaker's rules on a manual clock, and what stands in for a store that is down."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opsguard.limiter import breaker as rules
from opsguard.limiter.breaker import CLOSED, Breaker, Permit
from opsguard.limiter.fallback import FallbackStore
from opsguard.limiter.local import LocalStore
from opsguard.limiter.rates import Rate
from opsguard.limiter.stores import Charge, OnStoreError, StoreDown, Strategy, Verdict

TWO = Rate(2, 60, "2 per 1 minute")
ONE = [Charge("k", TWO, "fixed", 1)]
SLOT = [Charge("k", TWO, "concurrency", 1)]


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


# The rules ----------------------------------------------------------------------------------------


def test_it_opens_after_failures_in_a_row_and_not_before() -> None:
    clock = Clock()
    breaker = Breaker(clock=clock, threshold=3, delay=1.0)

    for _ in range(2):
        breaker.failed()
    breaker.succeeded()
    for _ in range(2):
        breaker.failed()
    assert breaker.ask() is Permit.ASK
    assert not breaker.open
    breaker.failed()

    assert breaker.ask() is Permit.WAIT
    assert breaker.open


def test_the_rules_alone() -> None:
    state = rules.failed(rules.failed(CLOSED, 10.0, delay=1.0), 10.0, delay=1.0)

    assert rules.ask(CLOSED, 10.0, threshold=2, delay=1.0) == (CLOSED, Permit.ASK)
    assert rules.ask(state, 10.5, threshold=2, delay=1.0) == (state, Permit.WAIT)
    half_open, permit = rules.ask(state, 11.0, threshold=2, delay=1.0)
    assert permit is Permit.PROBE
    assert rules.ask(half_open, 11.5, threshold=2, delay=1.0)[1] is Permit.WAIT


def test_one_probe_goes_each_delay_and_decides() -> None:
    clock = Clock()
    breaker = Breaker(clock=clock, threshold=1, delay=1.0)
    breaker.failed()
    clock.now += 1.0

    assert [breaker.ask() for _ in range(3)] == [Permit.PROBE, Permit.WAIT, Permit.WAIT]
    breaker.failed()
    clock.now += 0.9
    assert breaker.ask() is Permit.WAIT
    clock.now += 0.1
    assert breaker.ask() is Permit.PROBE
    breaker.succeeded()
    assert breaker.ask() is Permit.ASK
    assert not breaker.open


def test_a_probe_that_never_reports_back_is_replaced() -> None:
    clock = Clock()
    breaker = Breaker(clock=clock, threshold=1, delay=1.0)
    breaker.failed()
    clock.now += 1.0
    assert breaker.ask() is Permit.PROBE
    clock.now += 1.0

    assert breaker.ask() is Permit.PROBE


def test_of_many_threads_one_is_the_probe() -> None:
    clock = Clock()
    breaker = Breaker(clock=clock, threshold=1, delay=1.0)
    breaker.failed()
    clock.now += 1.0
    gate, permits = threading.Barrier(16), []

    def work() -> None:
        gate.wait()
        permits.append(breaker.ask())

    threads = [threading.Thread(target=work) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert permits.count(Permit.PROBE) == 1
    assert permits.count(Permit.WAIT) == 15


events = st.lists(
    st.tuples(st.sampled_from(["ask", "failed", "succeeded"]), st.floats(0, 3)), max_size=60
)


@given(events)
def test_while_it_is_open_probes_are_a_delay_apart(events: list[tuple[str, float]]) -> None:
    state, now, last_probe = CLOSED, 0.0, float("-inf")
    for event, passed in events:
        now += passed
        if event == "ask":
            state, permit = rules.ask(state, now, threshold=2, delay=1.0)
            assert (permit is Permit.ASK) == (state.failures < 2)
            if permit is Permit.PROBE:
                assert now - last_probe >= 1.0
                last_probe = now
        elif event == "failed":
            state = rules.failed(state, now, delay=1.0)
        else:
            state, last_probe = CLOSED, float("-inf")


# The stand-in -------------------------------------------------------------------------------------


class Remote:
    """A remote store that fails when told to. What is tested here is who is asked, and when."""

    blocking = True
    strategies: frozenset[Strategy] = frozenset(("fixed", "gcra", "concurrency"))

    def __init__(self) -> None:
        self.error: Exception | None = None
        self.asked: list[Sequence[Charge]] = []
        self.given: list[Sequence[Charge]] = []
        self.forgotten: list[Sequence[Charge]] = []
        self.answered = threading.Event()

    def take(self, charges: Sequence[Charge]) -> Verdict:
        self.asked.append(charges)
        self.answered.set()
        if self.error is not None:
            raise self.error
        return Verdict(True, 77, 1.0, 0.0, 0)

    async def atake(self, charges: Sequence[Charge]) -> Verdict:
        await asyncio.sleep(0)
        return self.take(charges)

    def give_back(self, charges: Sequence[Charge]) -> None:
        if self.error is not None:
            raise self.error
        self.given.append(charges)

    async def agive_back(self, charges: Sequence[Charge]) -> None:
        self.give_back(charges)

    def forget(self, charges: Sequence[Charge]) -> None:
        self.forgotten.append(charges)

    def close(self) -> None:
        self.give_back([])

    async def aclose(self) -> None:
        self.give_back([])


class Stage:
    """A guarded store with all its parts at hand, by either driver."""

    def __init__(self, *, asynchronous: bool) -> None:
        self.clock = Clock()
        self.remote = Remote()
        self.local = LocalStore(clock=self.clock)
        self.breaker = Breaker(clock=self.clock, threshold=2, delay=1.0)
        self.reports: list[tuple[str, BaseException]] = []
        self.then: list[str] = []
        self.store = FallbackStore(
            self.remote,
            self.local,
            breaker=self.breaker,
            report=self.report,
        )
        self._asynchronous = asynchronous

    def report(self, site: str, error: BaseException, *, then: str = "") -> None:
        self.reports.append((site, error))
        self.then.append(then)

    def take(self, charges: Sequence[Charge] = ONE, on_error: OnStoreError = "local") -> Verdict:
        if not self._asynchronous:
            return self.store.take(charges, on_error)

        async def main() -> Verdict:
            verdict = await self.store.atake(charges, on_error)
            await asyncio.sleep(0.01)  # a probe has its turn
            return verdict

        return asyncio.run(main())

    def give_back(self, charges: Sequence[Charge]) -> None:
        if self._asynchronous:
            asyncio.run(self.store.agive_back(charges))
        else:
            self.store.give_back(charges)

    def fail(self) -> None:
        self.remote.error = StoreDown("down")
        for _ in range(2):
            self.take([Charge("other", TWO, "gcra", 1)])
        assert self.store.down
        self.remote.asked.clear()


@pytest.fixture(params=[False, True], ids=["threads", "loop"])
def stage(request: pytest.FixtureRequest) -> Stage:
    return Stage(asynchronous=request.param)


def test_the_remote_store_decides_while_it_answers(stage: Stage) -> None:
    assert stage.take().remaining == 77
    assert stage.store.strategies == {"fixed", "gcra", "concurrency"}
    assert stage.reports == []


@pytest.mark.parametrize("error", [StoreDown("x"), RuntimeError("ours")], ids=["down", "fault"])
def test_local_decides_while_it_does_not(stage: Stage, error: Exception) -> None:
    stage.remote.error = error

    assert [stage.take().allowed for _ in range(3)] == [True, True, False]
    assert stage.reports[0] == ("limiter.store", error)


def test_allow_and_deny_are_one_answer_for_all(stage: Stage) -> None:
    stage.fail()

    assert all(stage.take(on_error="allow").allowed for _ in range(5))
    denied = stage.take(on_error="deny")
    assert not denied.allowed
    assert denied.retry_after > 0
    assert stage.take().remaining == 1  # neither has charged the local store


@pytest.mark.parametrize(
    ("on_error", "says"),
    [
        ("local", "this process decided the request by itself"),
        ("allow", "the request was let through"),
        ("deny", "the request was refused"),
    ],
)
def test_what_was_done_without_the_store_is_said(
    on_error: OnStoreError, says: str, stage: Stage
) -> None:
    assert not stage.take(on_error=on_error).stood_in
    stage.remote.error = StoreDown("down")
    assert stage.take(on_error=on_error).stood_in
    assert stage.then == [f"{says} (on_store_error is {on_error})"]
    stage.fail()
    stage.then.clear()
    assert stage.take(on_error=on_error).stood_in  # the breaker is open
    assert stage.then == []


def test_an_open_breaker_leaves_the_store_alone(stage: Stage) -> None:
    stage.fail()

    for _ in range(5):
        stage.take()

    assert stage.remote.asked == []
    assert stage.store.reserve(ONE) is None
    assert asyncio.run(stage.store.areserve(ONE)) is None


def test_the_probe_is_no_request_and_closes_the_breaker(stage: Stage) -> None:
    stage.fail()
    stage.remote.error = None
    stage.clock.now += 1.0
    stage.remote.answered.clear()

    assert stage.take().remaining == 1  # decided here meanwhile
    assert stage.remote.answered.wait(5)
    for _ in range(500):
        if not stage.store.down:
            break
        threading.Event().wait(0.01)

    assert not stage.store.down
    assert [charge.key for charges in stage.remote.asked for charge in charges] == [
        "opsguard-probe"
    ]
    assert stage.take().remaining == 77


def test_a_probe_that_fails_leaves_it_open(stage: Stage) -> None:
    stage.fail()
    stage.clock.now += 1.0
    reported = len(stage.reports)
    stage.take()
    for _ in range(500):
        if len(stage.reports) > reported:
            break
        threading.Event().wait(0.01)

    assert stage.store.down
    assert stage.breaker.ask() is Permit.WAIT


def test_no_thread_for_the_probe_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(asynchronous=False)
    stage.fail()
    stage.clock.now += 1.0

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)

    assert stage.take().allowed


def test_charges_go_back_to_who_took_them(stage: Stage) -> None:
    stage.take()
    stage.give_back(ONE)
    assert stage.remote.given == [ONE]

    stage.fail()
    stage.take()
    stage.give_back(ONE)
    assert stage.take().remaining == 1
    assert len(stage.remote.given) == 1


def test_a_slot_taken_here_is_returned_here_though_the_store_is_back(stage: Stage) -> None:
    stage.fail()
    stage.take(SLOT)
    stage.take(SLOT)
    assert not stage.take(SLOT).allowed
    stage.remote.error = None
    stage.breaker.succeeded()

    stage.give_back(SLOT)
    stage.give_back(SLOT)
    assert stage.remote.given == []
    assert stage.local.take([SLOT[0]._replace(cost=2)]).allowed
    stage.give_back(SLOT)
    assert stage.remote.given == [SLOT]


def test_a_slot_taken_there_is_forgotten_while_the_store_is_down(stage: Stage) -> None:
    stage.take(SLOT)
    stage.fail()

    stage.give_back(SLOT)

    assert stage.remote.forgotten == [SLOT]
    assert stage.remote.given == []


def test_a_slot_that_nobody_took_is_given_back_to_nobody(stage: Stage) -> None:
    stage.fail()
    stage.take(SLOT, "allow")

    stage.give_back(SLOT)

    assert (stage.remote.given, stage.remote.forgotten) == ([], [])
    assert stage.local.take([SLOT[0]._replace(cost=2)]).allowed


def test_failing_to_give_back_is_reported_and_no_more(stage: Stage) -> None:
    stage.remote.error = StoreDown("down")

    stage.give_back(ONE)

    assert [site for site, _ in stage.reports] == ["limiter.store"]


def test_a_fault_of_the_local_store_admits(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(charges: Sequence[Charge]) -> Verdict:
        raise ValueError("ours")

    stage.fail()
    monkeypatch.setattr(stage.local, "take", broken)
    monkeypatch.setattr(stage.local, "give_back", broken)
    stage.reports.clear()

    assert stage.take().allowed
    stage.give_back(ONE)
    assert [site for site, _ in stage.reports] == ["limiter.local", "limiter.local"]


def test_closing_never_raises(stage: Stage) -> None:
    stage.store.close()
    asyncio.run(stage.store.aclose())
    stage.remote.error = OSError("gone")

    stage.store.close()
    asyncio.run(stage.store.aclose())

    assert len(stage.reports) == 2


def test_a_store_without_the_fixed_window_is_probed_by_what_it_can_do() -> None:
    class Counter(Remote):
        strategies: frozenset[Strategy] = frozenset(("gcra",))

    remote = Counter()
    store = FallbackStore(
        remote,
        LocalStore(),
        breaker=Breaker(clock=(clock := Clock()), threshold=1),
        report=lambda site, error, then="": None,
    )
    remote.error = StoreDown("down")
    store.take(ONE)
    clock.now += 5
    remote.error = None
    remote.answered.clear()
    store.take(ONE)

    assert remote.answered.wait(5)
    assert remote.asked[-1][0].strategy == "gcra"


def test_a_child_has_locks_and_slots_of_its_own(stage: Stage) -> None:
    stage.fail()
    stage.take(SLOT)
    stage.breaker._lock.acquire()
    stage.breaker.after_fork()

    assert stage.take(SLOT).allowed
