"""RedisStore on a real server: what each strategy admits, all or none, exact for many workers."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import redis

from opsguard.limiter.loops import PerLoop
from opsguard.limiter.rates import Rate
from opsguard.limiter.redis import RedisStore
from opsguard.limiter.stores import Charge, StoreDown, Strategy
from tests.redis_server import RedisServer, running

PATIENT = 5.0
STRATEGIES: tuple[Strategy, ...] = ("fixed", "sliding", "gcra", "concurrency")
TEN = Rate(10, 3600, "10 per 1 hour")
HOUR = 3600


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with running(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def client(server: RedisServer) -> Iterator[redis.Redis]:
    with server.client(decode_responses=True) as client:
        client.flushall()
        yield client


@pytest.fixture
def store(server: RedisServer, client: redis.Redis) -> Iterator[RedisStore]:
    store = RedisStore(server.url, timeout=PATIENT)
    yield store
    store.close()


@pytest.fixture(params=["threads", "loop"])
def drive(request: pytest.FixtureRequest, store: RedisStore) -> Iterator[dict[str, Any]]:
    """The same verbs by either driver."""
    if request.param == "threads":
        yield {"take": store.take, "give_back": store.give_back, "pause": time.sleep}
        return
    with asyncio.Runner() as runner:
        yield {
            "take": lambda charges: runner.run(store.atake(charges)),
            "give_back": lambda charges: runner.run(store.agive_back(charges)),
            "pause": lambda seconds: runner.run(asyncio.sleep(seconds)),
        }


def charge(strategy: Strategy, cost: int = 1, key: str = "k", rate: Rate = TEN) -> Charge:
    return Charge(key, rate, strategy, cost)


def settled(client: redis.Redis, period: float) -> None:
    """Wait until a window aligned to the epoch has time left for what a test does in it."""
    while True:
        seconds, micros = client.time()
        if (seconds + micros / 1e6) % period < period * 0.7:
            return
        time.sleep(period / 20)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_it_admits_the_amount_and_refuses_the_next(
    drive: dict[str, Any], strategy: Strategy
) -> None:
    verdicts = [drive["take"]([charge(strategy)]) for _ in range(12)]

    assert [v.allowed for v in verdicts] == [True] * 10 + [False] * 2
    assert [v.remaining for v in verdicts] == [*range(9, -1, -1), 0, 0]
    assert all(v.retry_after == 0.0 for v in verdicts[:10])
    assert all(0 < v.retry_after <= 2 * HOUR for v in verdicts[10:])
    assert all(0 < v.reset <= 2 * HOUR for v in verdicts)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_is_given_back_can_be_taken_again(drive: dict[str, Any], strategy: Strategy) -> None:
    drive["take"]([charge(strategy, 10)])
    drive["give_back"]([charge(strategy, 10)])

    assert drive["take"]([charge(strategy, 10)]).allowed
    assert not drive["take"]([charge(strategy)]).allowed


@pytest.mark.parametrize("strategy", ["fixed", "sliding", "gcra"])
def test_to_give_back_too_much_makes_no_credit(store: RedisStore, strategy: Strategy) -> None:
    store.give_back([charge(strategy, 10)])
    store.take([charge(strategy, 1)])
    store.give_back([charge(strategy, 10)])

    assert store.take([charge(strategy, 10)]).allowed
    assert not store.take([charge(strategy, 1)]).allowed


def test_to_give_back_a_slot_that_was_not_taken_returns_no_others(store: RedisStore) -> None:
    store.give_back([charge("concurrency", 10)])
    store.take([charge("concurrency", 1)])
    store.give_back([charge("concurrency", 10)])

    assert not store.take([charge("concurrency", 10)]).allowed
    assert store.take([charge("concurrency", 9)]).allowed


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_cost_above_the_rate_is_refused_and_consumes_nothing(
    store: RedisStore, strategy: Strategy
) -> None:
    refused = store.take([charge(strategy, 11)])

    assert not refused.allowed
    assert 0 < refused.retry_after <= HOUR
    assert store.take([charge(strategy, 10)]).allowed


def test_of_several_charges_all_are_taken_or_none(store: RedisStore) -> None:
    small = Rate(2, HOUR, "2 per 1 hour")
    several = [charge(strategy) for strategy in STRATEGIES]
    several.insert(2, charge("fixed", key="small", rate=small))

    verdicts = [store.take(several) for _ in range(4)]

    assert [v.allowed for v in verdicts] == [True, True, False, False]
    assert {v.charge for v in verdicts} == {2}
    assert [v.remaining for v in verdicts] == [1, 0, 0, 0]
    for strategy in STRATEGIES:
        assert store.take([charge(strategy)]).remaining == 7


def test_the_longest_wait_decides_a_refusal(store: RedisStore) -> None:
    charges = [charge("gcra"), charge("fixed"), charge("concurrency")]
    for one in charges:
        store.take([one._replace(cost=10)])

    verdict = store.take(charges)

    assert verdict.charge == 1
    assert verdict.retry_after == pytest.approx(HOUR, abs=5)


def test_one_bucket_twice_in_a_decision_counts_twice(store: RedisStore) -> None:
    assert not store.take([charge("fixed", 6), charge("fixed", 6)]).allowed
    assert store.take([charge("fixed", 5), charge("fixed", 5)]).allowed
    assert not store.take([charge("fixed")]).allowed


def test_gcra_has_a_burst_of_its_own(store: RedisStore) -> None:
    rate = Rate(10, HOUR, "10 per 1 hour", burst=3)

    verdicts = [store.take([charge("gcra", rate=rate)]) for _ in range(4)]

    assert [v.allowed for v in verdicts] == [True, True, True, False]
    assert verdicts[-1].retry_after == pytest.approx(HOUR / 10, abs=5)


def test_in_the_last_millisecond_of_a_window_the_wait_is_short(
    store: RedisStore, client: redis.Redis
) -> None:
    """A refusal that falls into it must not name a whole window."""
    waits = []
    for _ in range(300):
        client.set("opsguard:f:k", 10, px=1)
        verdict = store.take([charge("fixed")])
        if not verdict.allowed:
            waits.append(verdict.retry_after)
        client.delete("opsguard:f:k")

    assert waits
    assert all(0 < wait <= 0.001 for wait in waits)


@pytest.mark.parametrize("strategy", ["fixed", "sliding", "gcra"])
def test_whoever_waits_as_long_as_told_is_admitted(
    store: RedisStore, client: redis.Redis, strategy: Strategy
) -> None:
    rate = Rate(3, 1, "3 per 1 second")
    for _ in range(8):
        verdict = store.take([charge(strategy, rate=rate)])
        if not verdict.allowed:
            time.sleep(verdict.retry_after + 0.001)
            assert store.take([charge(strategy, rate=rate)]).allowed


def test_the_sliding_window_admits_no_more_than_its_amount_over_a_border(
    store: RedisStore, client: redis.Redis
) -> None:
    rate = Rate(20, 1, "20 per 1 second")
    settled(client, 1.0)
    admitted = []
    end = time.monotonic() + 2.5
    while time.monotonic() < end:
        if store.take([charge("sliding", rate=rate)]).allowed:
            seconds, micros = client.time()
            admitted.append(seconds + micros / 1e6)

    windows: dict[int, int] = {}
    for moment in admitted:
        windows[int(moment)] = windows.get(int(moment), 0) + 1
    # The moment is read after the decision, so one or two may seem to lie behind the border.
    assert all(number <= 20 + 2 for number in windows.values())
    assert 20 <= len(admitted) <= 20 * 3.5


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_key_expires_by_itself(
    store: RedisStore, client: redis.Redis, strategy: Strategy
) -> None:
    store.take([charge(strategy)])

    [key] = client.keys()

    assert key == f"opsguard:{strategy[0]}:k"
    assert 0 < client.pttl(key) <= 2 * HOUR * 1000


def test_a_slot_of_a_dead_worker_frees_itself(server: RedisServer, store: RedisStore) -> None:
    rate = Rate(1, 1, "1 in flight")
    dead = RedisStore(server.url, timeout=PATIENT)
    assert dead.take([charge("concurrency", rate=rate)]).allowed
    dead.close()

    assert not store.take([charge("concurrency", rate=rate)]).allowed
    time.sleep(1.05)
    assert store.take([charge("concurrency", rate=rate)]).allowed


def test_a_process_returns_its_own_slots_only(server: RedisServer, store: RedisStore) -> None:
    other = RedisStore(server.url, timeout=PATIENT)
    other.take([charge("concurrency", 10)])

    store.give_back([charge("concurrency", 10)])

    assert not store.take([charge("concurrency")]).allowed
    other.give_back([charge("concurrency", 10)])
    assert store.take([charge("concurrency", 10)]).allowed
    other.close()


@pytest.mark.parametrize(
    "others",
    [
        pytest.param([charge("concurrency", 1)], id="another cost"),
        pytest.param([charge("concurrency", 4)], id="the same cost"),
        pytest.param([charge("concurrency", 4), charge("concurrency", 1)], id="the bucket twice"),
        pytest.param([charge("concurrency", 2), charge("fixed", 2)], id="beside another limit"),
    ],
)
@pytest.mark.parametrize("first", [0, 1], ids=["in turn", "the later one first"])
def test_requests_of_different_costs_leave_no_slot_behind(
    first: int, others: list[Charge], store: RedisStore, client: redis.Redis
) -> None:
    requests = [[charge("concurrency", 4)], others]
    for _ in range(3):
        assert all(store.take(request).allowed for request in requests)
        store.give_back(requests[first])
        store.give_back(requests[1 - first])
        assert client.zcard("opsguard:c:k") == 0


def test_a_forgotten_slot_is_not_mistaken_for_the_next_one(
    store: RedisStore, client: redis.Redis
) -> None:
    store.take([charge("concurrency")])
    store.forget([charge("concurrency"), charge("fixed")])
    store.take([charge("concurrency")])
    [first, _] = client.zrange("opsguard:c:k", 0, -1)

    store.give_back([charge("concurrency")])

    assert client.zrange("opsguard:c:k", 0, -1) == [first]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("jump", [-HOUR, HOUR], ids=["back", "forward"])
def test_a_clock_that_was_set_keeps_nobody_out_for_longer_than_a_window(
    store: RedisStore, client: redis.Redis, strategy: Strategy, jump: int
) -> None:
    """The stored times are moved the other way, which to the script is the same."""
    rate = Rate(10, 60, "10 per 1 minute")
    store.take([charge(strategy, 10, rate=rate)])
    key = f"opsguard:{strategy[0]}:k"
    if strategy == "fixed":
        client.pexpire(key, max(1, client.pttl(key) - jump * 1000))
    elif strategy == "sliding":
        window, current, previous = client.get(key).split()
        client.set(key, f"{int(window) - jump // 60} {current} {previous}", px=7_200_000)
    elif strategy == "gcra":
        level, at = client.get(key).split()
        client.set(key, f"{level} {int(at) - jump * 1_000_000}", px=7_200_000)
    else:
        for member, score in client.zrange(key, 0, -1, withscores=True):
            client.zadd(key, {member: score - jump * 1e6})
    time.sleep(0.005)

    verdict = store.take([charge(strategy, rate=rate)])

    assert verdict.allowed is (jump > 0)
    assert 0 <= verdict.retry_after <= 60 * 1.1
    assert 0 <= verdict.reset <= 120
    if jump < 0:  # mended although it was a refusal: the waiting has begun
        again = store.take([charge(strategy, rate=rate)])
        assert again.reset <= verdict.reset
        assert client.pttl(key) <= 121_000


def test_nonsense_in_a_key_counts_as_an_empty_bucket(
    store: RedisStore, client: redis.Redis
) -> None:
    for strategy in ("fixed", "sliding", "gcra"):
        client.set(f"opsguard:{strategy[0]}:k", "nonsense")

        assert store.take([charge(strategy)]).remaining == 9


def test_a_key_without_an_expiry_gets_one(store: RedisStore, client: redis.Redis) -> None:
    client.set("opsguard:f:k", 10)

    assert store.take([charge("fixed")]).allowed
    assert client.pttl("opsguard:f:k") > 0


def test_a_lost_script_is_taught_again(drive: dict[str, Any], client: redis.Redis) -> None:
    drive["take"]([charge("fixed")])
    client.script_flush()

    assert drive["take"]([charge("fixed")]).remaining == 8


def test_periods_beyond_its_clock_are_cut(store: RedisStore) -> None:
    ages = Rate(1_000_000_000, 31_104_000 * 1_000_000_000, "a lot")

    for strategy in STRATEGIES:
        assert store.take([charge(strategy, rate=ages)]).allowed


# Connections --------------------------------------------------------------------------------------


def test_nothing_connects_before_the_first_decision() -> None:
    store = RedisStore("redis://192.0.2.1:6379/0")

    assert store.blocking
    assert store.strategies == set(STRATEGIES)
    store.close()


def test_a_wrong_url_is_an_error_at_start() -> None:
    with pytest.raises(ValueError):
        RedisStore("http://127.0.0.1")


@pytest.mark.parametrize(
    "url", ["redis://u:secret@example.org/1", "unix://u:secret@/run/redis.sock"]
)
def test_its_repr_keeps_the_password(url: str) -> None:
    assert "secret" not in repr(RedisStore(url))


def test_each_loop_has_connections_of_its_own_and_closes_them(
    store: RedisStore, client: redis.Redis
) -> None:
    before = len(client.client_list())

    for number in range(3):
        verdict = asyncio.run(store.atake([charge("fixed")]))
        assert verdict.remaining == 9 - number

    deadline = time.monotonic() + 5
    while len(client.client_list()) > before:
        assert time.monotonic() < deadline, "connections were left behind"
        time.sleep(0.01)


def test_aclose_closes_and_the_store_can_go_on(store: RedisStore, client: redis.Redis) -> None:
    async def main() -> None:
        await store.aclose()
        await store.atake([charge("fixed")])
        await store.aclose()
        assert (await store.atake([charge("fixed")])).remaining == 8
        await store.aclose()

    store.take([charge("gcra")])
    asyncio.run(main())


def test_a_loop_opens_a_bounded_number_of_connections(
    server: RedisServer, client: redis.Redis
) -> None:
    store = RedisStore(server.url, timeout=PATIENT, connections=3)

    async def main() -> int:
        await asyncio.gather(*(store.atake([charge("gcra")]) for _ in range(50)))
        return len(client.client_list())

    assert asyncio.run(main()) <= 3 + 1


def test_threads_leave_a_bounded_number_idle(server: RedisServer, client: redis.Redis) -> None:
    store = RedisStore(server.url, timeout=PATIENT, connections=2)
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda _: store.take([charge("gcra")]), range(64)))

    deadline = time.monotonic() + 5
    while len(client.client_list()) > 2 + 1:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    store.close()


def test_a_connection_closed_by_the_server_is_replaced(
    drive: dict[str, Any], client: redis.Redis
) -> None:
    drive["take"]([charge("fixed")])
    client.client_kill_filter(_type="normal", skipme=True)
    drive["pause"](0.05)

    assert drive["take"]([charge("fixed")]).remaining == 8


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
def test_a_forked_child_makes_connections_of_its_own(store: RedisStore) -> None:
    store.take([charge("concurrency")])
    child = os.fork()
    if child == 0:
        code = 1
        try:
            own = all(store.take([charge("fixed", key="child")]) for _ in range(200))
            store.give_back([charge("concurrency")])  # is the parent's: the child has none
            code = 0 if own else 1
        finally:
            os._exit(code)
    verdicts = [store.take([charge("fixed", key="parent")]) for _ in range(10)]
    _, status = os.waitpid(child, 0)

    assert status == 0
    assert [v.remaining for v in verdicts] == list(range(9, -1, -1))
    assert store.take([charge("concurrency")]).remaining == 8


def test_what_belongs_to_a_loop_is_closed_with_it() -> None:
    closed: list[object] = []

    async def close(thing: object) -> None:
        closed.append(thing)

    things = PerLoop(object, close)

    async def main() -> object:
        first, second = await things.get(), await things.get()
        assert first is second
        return first

    thing = asyncio.run(main())
    other = asyncio.run(main())

    assert closed == [thing, other]


def test_a_loop_that_ended_badly_is_forgotten_by_the_next() -> None:
    async def close(thing: object) -> None:
        raise AssertionError("its loop is closed")

    things = PerLoop(object, close)
    bad = asyncio.new_event_loop()
    first = bad.run_until_complete(things.get())
    bad.close()  # no shutdown_asyncgens()
    reference = weakref.ref(bad)
    other = asyncio.new_event_loop()
    try:
        assert other.run_until_complete(things.get()) is not first
    finally:
        other.close()
    del bad
    gc.collect()

    assert reference() is None


def test_a_child_leaves_its_parents_loops_alone() -> None:
    closed: list[object] = []

    async def close(thing: object) -> None:
        closed.append(thing)

    things = PerLoop(object, close)

    async def main() -> None:
        before = await things.get()
        things.after_fork()
        assert await things.get() is not before
        await things.aclose()
        assert len(closed) == 1
        assert closed[0] is not before

    asyncio.run(main())


# Exactness ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["fixed", "gcra", "sliding"])
def test_64_threads_are_admitted_exactly(store: RedisStore, strategy: Strategy) -> None:
    day = Rate(300, 86_400, "300 per 1 day")
    gate = threading.Barrier(64)

    def work(_: int) -> int:
        gate.wait()
        return sum(store.take([charge(strategy, rate=day)]).allowed for _ in range(10))

    with ThreadPoolExecutor(64) as pool:
        assert sum(pool.map(work, range(64))) == 300


@pytest.mark.parametrize("strategy", ["fixed", "gcra", "sliding"])
def test_1000_tasks_are_admitted_exactly(store: RedisStore, strategy: Strategy) -> None:
    day = Rate(300, 86_400, "300 per 1 day")

    async def main() -> int:
        verdicts = await asyncio.gather(
            *(store.atake([charge(strategy, rate=day)]) for _ in range(1000))
        )
        return sum(v.allowed for v in verdicts)

    assert asyncio.run(main()) == 300


WORKER = """
import asyncio, sys
from concurrent.futures import ThreadPoolExecutor
from opsguard.limiter.loops import PerLoop
from opsguard.limiter.rates import Rate
from opsguard.limiter.redis import RedisStore
from opsguard.limiter.stores import Charge

store = RedisStore(sys.argv[1], timeout=60.0)
day = Rate(500, 86_400, "500 per 1 day")
kinds = ("fixed", "gcra", "sliding")

async def tasks(kind):
    charge = [Charge("all", day, kind, 1)]
    return sum(v.allowed for v in await asyncio.gather(*(store.atake(charge) for _ in range(100))))

def threads(kind):
    charge = [Charge("all", day, kind, 1)]
    with ThreadPoolExecutor(8) as pool:
        return sum(pool.map(lambda _: store.take(charge).allowed, range(100)))

sys.stdin.readline()
print(*(asyncio.run(tasks(kind)) + threads(kind) for kind in kinds))
"""


def test_8_processes_are_admitted_exactly(server: RedisServer, client: redis.Redis) -> None:
    """Each with tasks and threads; 1,600 requests for 500 places, per strategy."""
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, server.url],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(8)
    ]
    for worker in workers:  # all are up before any begins
        assert worker.stdin is not None
        worker.stdin.write("go\n")
        worker.stdin.flush()
    admitted = [0, 0, 0]
    for worker in workers:
        output, _ = worker.communicate(timeout=100)
        assert worker.returncode == 0
        for index, number in enumerate(output.split()):
            admitted[index] += int(number)

    fixed, gcra, sliding = admitted
    # A bucket of 500 a day gets one back every 173 seconds.
    assert (fixed, gcra) == (500, 500)
    assert sliding <= 500


def test_a_reply_that_makes_no_sense_is_a_store_that_is_down(server: RedisServer) -> None:
    class Odd(RedisStore):
        def _script(self, *_: object):  # type: ignore[no-untyped-def]
            return (yield ("ECHO", "nonsense"))

    with pytest.raises(StoreDown):
        Odd(server.url, timeout=PATIENT).take([charge("fixed")])
