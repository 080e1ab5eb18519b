"""Stores by URI, and storages of the `limits` package behind the same verbs."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import limits.aio.storage
import limits.storage
import pytest

from opsguard.limiter import drivers
from opsguard.limiter import storages as module
from opsguard.limiter.rates import Rate
from opsguard.limiter.redis import RedisStore
from opsguard.limiter.storages import LimitsStore, remote_store
from opsguard.limiter.stores import Charge, StoreDown, Strategy, Verdict
from tests.redis_server import RedisServer, running
from tests.stalls import STALL

PATIENT = 5.0
TEN = Rate(10, 3600, "10 per 1 hour")

# Two storages of one's own, as a user may register them with `limits`: one with a moving window
# and no counter, one with neither.


class Moving(limits.storage.MemoryStorage):
    STORAGE_SCHEME = ["moving"]  # noqa: RUF012
    acquire_sliding_window_entry = property()  # type: ignore[assignment]

    def __getattribute__(self, name: str) -> Any:
        if name == "acquire_sliding_window_entry":
            raise AttributeError(name)
        return super().__getattribute__(name)


class Slow(limits.storage.MemoryStorage):
    """Answers, and takes its time."""

    STORAGE_SCHEME = ["slow"]  # noqa: RUF012

    def incr(self, key: str, expiry: float, amount: int = 1) -> int:
        time.sleep(0.05)
        return super().incr(key, expiry, amount)


class SlowOnALoop(limits.aio.storage.MemoryStorage):
    STORAGE_SCHEME = ["async+slow"]  # noqa: RUF012
    finished = 0

    async def incr(self, key: str, expiry: float, amount: int = 1) -> int:
        await asyncio.sleep(0.05)
        SlowOnALoop.finished += 1
        return await super().incr(key, expiry, amount)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A Redis Cluster of one node that has all slots."""
    with running(tmp_path_factory.mktemp("cluster"), "--cluster-enabled", "yes") as server:
        with server.client() as client:
            client.execute_command("CLUSTER", "ADDSLOTS", *range(16384))
            while b"cluster_state:ok" not in client.execute_command("CLUSTER", "INFO"):
                time.sleep(0.02)
        yield server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with running(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(params=["redis", "redis+cluster"])
def store(request: pytest.FixtureRequest) -> Iterator[LimitsStore]:
    fixture = "cluster" if request.param == "redis+cluster" else "server"
    server: RedisServer = request.getfixturevalue(fixture)
    with server.client() as client:
        client.flushall()
    store = LimitsStore(f"{request.param}://127.0.0.1:{server.port}", timeout=PATIENT)
    yield store
    store.close()


@pytest.fixture(params=["threads", "loop"])
def take(request: pytest.FixtureRequest, store: LimitsStore) -> Iterator[Any]:
    if request.param == "threads":
        yield store.take
        return
    with asyncio.Runner() as runner:
        yield lambda charges: runner.run(store.atake(charges))
        runner.run(store.aclose())


def charge(strategy: Strategy = "fixed", cost: int = 1, key: str = "k") -> Charge:
    return Charge(key, TEN, strategy, cost)


# Which store a URI names --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "uri",
    [
        "redis://localhost:6379/1",
        "rediss://localhost",
        "unix:///run/redis.sock",
        "redis+unix:///run/redis.sock",
        "valkey://localhost",
        "valkeys://localhost",
    ],
)
def test_redis_and_valkey_are_ours(uri: str) -> None:
    assert isinstance(remote_store(uri, timeout=0.025), RedisStore)


def test_others_are_those_of_limits() -> None:
    store = remote_store("redis+cluster://localhost:7000", timeout=0.025)

    assert isinstance(store, LimitsStore)
    assert store.strategies == {"fixed", "sliding"}


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("localhost:6379", "must be a URI"),
        ("memory://", "leave the store out"),
        ("async+redis://localhost", "without 'async+'"),
        ("postgres://localhost", "no storage that the limits package knows"),
    ],
)
def test_a_uri_that_names_no_store_is_an_error_that_says_so(uri: str, says: str) -> None:
    with pytest.raises(ValueError, match=says.replace("+", r"\+")):
        remote_store(uri, timeout=0.025)


@pytest.mark.parametrize(
    ("uri", "package"),
    [
        ("redis://localhost", "redis"),
        ("memcached://localhost:11211", "pymemcache"),
        ("mongodb://localhost:27017", "pymongo"),
        ("valkey+cluster://localhost:7000", "valkey"),
    ],
)
def test_a_driver_that_is_missing_is_an_error_at_start(
    monkeypatch: pytest.MonkeyPatch, uri: str, package: str
) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    monkeypatch.setattr(drivers, "find_spec", lambda name: None)

    with pytest.raises(ValueError, match=package):
        remote_store(uri, timeout=0.025)


def test_an_app_needs_the_driver_of_its_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"pymemcache": object()}
    monkeypatch.setattr(drivers, "find_spec", found.get)
    store = LimitsStore("memcached://localhost:11211")

    store.check_driver(asynchronous=False)
    with pytest.raises(ValueError, match="memcachio"):
        store.check_driver(asynchronous=True)
    with pytest.raises(StoreDown, match="needs the package memcachio in this app"):
        asyncio.run(store.atake([charge()]))


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("memcached", {"timeout", "connect_timeout"}),
        ("mongodb", {"serverSelectionTimeoutMS", "connectTimeoutMS", "socketTimeoutMS"}),
        ("redis", {"socket_timeout", "socket_connect_timeout"}),
    ],
)
def test_each_driver_is_told_the_time_limit(family: str, names: set[str]) -> None:
    options = drivers.driver_of(family).limit(0.0125)

    assert set(options) == names
    assert set(options.values()) in ({0.0125}, {12})


def test_its_repr_keeps_the_password() -> None:
    assert "secret" not in repr(LimitsStore("redis+cluster://u:secret@localhost:7000"))


# The verbs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["fixed", "sliding"])
def test_it_admits_the_amount_and_refuses_the_next(take: Any, strategy: Strategy) -> None:
    verdicts = [take([charge(strategy)]) for _ in range(11)]

    assert [v.allowed for v in verdicts] == [True] * 10 + [False]
    assert [v.remaining for v in verdicts] == [*range(9, -1, -1), 0]
    assert all(v.retry_after == 0.0 for v in verdicts[:10])
    assert 0 < verdicts[10].retry_after <= 3600


def test_of_several_charges_all_are_taken_or_none(take: Any) -> None:
    small = Charge("small", Rate(2, 3600, "2 per 1 hour"), "fixed", 1)
    several = [charge(), small, charge("sliding")]

    verdicts = [take(several) for _ in range(4)]

    assert [v.allowed for v in verdicts] == [True, True, False, False]
    assert {v.charge for v in verdicts} == {1}
    assert take([charge()]).remaining == 7
    assert take([charge("sliding")]).remaining == 7


def test_a_refused_cost_consumes_nothing(take: Any) -> None:
    take([charge(cost=8)])

    assert not take([charge(cost=5)]).allowed
    assert take([charge(cost=2)]).remaining == 0


def test_any_key_will_do(take: Any) -> None:
    for key in ("with blanks", "ünïcode", "x" * 200, "a/b"):
        assert take([charge(key=key)]).remaining == 9


def test_nothing_can_be_given_back(store: LimitsStore) -> None:
    store.take([charge()])
    store.give_back([charge()])
    asyncio.run(store.agive_back([charge()]))

    assert store.take([charge()]).remaining == 8


def test_loops_and_threads_share_the_quota(store: LimitsStore) -> None:
    async def ask() -> Verdict:
        try:
            return await store.atake([charge()])
        finally:
            await store.aclose()

    assert store.take([charge()]).remaining == 9
    assert [asyncio.run(ask()).remaining for _ in range(2)] == [8, 7]
    assert store.take([charge()]).remaining == 6


def test_a_storage_with_a_moving_window_slides_by_that() -> None:
    store = LimitsStore("moving://", timeout=PATIENT)

    assert [store.take([charge("sliding")]).allowed for _ in range(11)] == [True] * 10 + [False]


def test_a_storage_without_any_window_is_fixed_only() -> None:
    class Bare:
        pass

    assert module._limiters  # the rule for limiters is the rule for strategies
    limits.storage.SCHEMES["bare"] = Bare  # type: ignore[attr-defined]
    try:
        assert LimitsStore("bare://").strategies == {"fixed"}
    finally:
        del limits.storage.SCHEMES["bare"]  # type: ignore[attr-defined]


# Faults -------------------------------------------------------------------------------------------


def test_nothing_connects_before_the_first_decision() -> None:
    LimitsStore("redis+cluster://192.0.2.1:7000").close()


def test_a_server_that_is_gone_is_a_store_that_is_down(tmp_path: Path) -> None:
    with running(tmp_path) as server:
        store = LimitsStore(f"redis://127.0.0.1:{server.port}", timeout=PATIENT)
        assert store.take([charge()]).allowed
        server.kill()
        with pytest.raises(StoreDown):
            store.take([charge()])
        with pytest.raises(StoreDown):
            asyncio.run(store.atake([charge()]))
        server.start()
        assert store.take([charge()]).allowed
        store.close()


def test_a_server_that_says_nothing_is_down_in_time(tmp_path: Path) -> None:
    with running(tmp_path) as server:
        store = LimitsStore(f"redis://127.0.0.1:{server.port}", timeout=2.0)
        store.take([charge()])
        server.freeze()
        begun = time.monotonic()
        with pytest.raises(StoreDown):
            store.take([charge()])
        assert time.monotonic() - begun < 2.0 + STALL

        async def ask() -> None:
            try:
                await store.atake([charge()])
            finally:
                await store.aclose()

        begun = time.monotonic()
        with pytest.raises(StoreDown):
            asyncio.run(ask())
        assert time.monotonic() - begun < 2.0 + STALL
        server.thaw()
        store.close()


def test_a_storage_that_dawdles_is_down_in_time() -> None:
    store = LimitsStore("slow://", timeout=0.06)

    with pytest.raises(StoreDown, match="no answer in time"):
        store.take([charge()])


def test_on_a_loop_a_late_call_is_left_to_end_by_itself() -> None:
    store = LimitsStore("slow://", timeout=0.02)

    async def main() -> None:
        with pytest.raises(StoreDown):
            await store.atake([charge()])
        task = asyncio.create_task(store.atake([charge()]))
        await asyncio.sleep(0.005)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(0.15)

    SlowOnALoop.finished = 0
    asyncio.run(main())

    assert SlowOnALoop.finished == 2


def test_an_error_of_a_driver_that_nobody_waits_for_is_no_noise(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(*_: object) -> int:
        await asyncio.sleep(0.03)
        raise OSError("gone")

    monkeypatch.setattr(SlowOnALoop, "incr", fail)
    store = LimitsStore("slow://", timeout=0.01)

    async def main() -> None:
        with pytest.raises(StoreDown):
            await store.atake([charge()])
        await asyncio.sleep(0.1)

    asyncio.run(main())

    assert caplog.records == []


@pytest.mark.parametrize("ahead", [-3600.0, 3600.0], ids=["behind", "ahead"])
def test_a_clock_that_is_off_makes_no_odd_times(server: RedisServer, ahead: float) -> None:
    store = LimitsStore(
        f"redis://127.0.0.1:{server.port}", timeout=PATIENT, epoch=lambda: time.time() + ahead
    )
    minute = Rate(1, 60, "1 per 1 minute")
    charges: Sequence[Charge] = [Charge(f"clock {ahead}", minute, "fixed", 1)]

    verdicts = [store.take(charges), store.take(charges)]

    assert all(0 <= v.reset <= 60 for v in verdicts)
    assert 0 < verdicts[1].retry_after <= 60
    store.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
def test_a_forked_child_makes_a_client_of_its_own(store: LimitsStore) -> None:
    store.take([charge()])
    before = store._limiters
    child = os.fork()
    if child == 0:
        os._exit(0 if store._limiters is None else 1)
    _, status = os.waitpid(child, 0)

    assert status == 0
    assert store._limiters is before
