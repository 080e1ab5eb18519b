"""Stores that need a server of their own: skipped where it, or its driver, is missing.

PostgreSQL does not run for root, so a test does not start it: `OPSGUARD_TEST_POSTGRES` names an
empty database (`postgresql+psycopg://user@127.0.0.1:5432/name`). `OPSGUARD_TEST_MONGODB` names a
MongoDB (`mongodb://127.0.0.1:27017`). memcached and valkey-server are started if they are on the
PATH. Sentinels and clusters are made of the Redis that all tests use.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

import pytest
import redis

from opsguard.keys.manager import open_store as open_keys
from opsguard.keys.stores import Store as KeyStore
from opsguard.limiter import Charge, parse_rates
from opsguard.limiter.storages import remote_store
from opsguard.limiter.stores import RemoteStore, StoreDown, Strategy, Verdict
from tests.ports import free_port
from tests.redis_server import RedisServer, running
from tests.stalls import STALL
from tests.test_keys_stores import BARE, FULL, PEPPER, race_for_the_first_key

PATIENT = 5.0
WAYS = ("threads", "loop")
T = TypeVar("T")


@pytest.fixture
def postgres() -> Iterator[str]:
    """The URL of a PostgreSQL database without our tables."""
    url = os.environ.get("OPSGUARD_TEST_POSTGRES", "")
    if not url:
        pytest.skip("needs a PostgreSQL: OPSGUARD_TEST_POSTGRES is not set")
    sa = pytest.importorskip("sqlalchemy")
    engine = sa.create_engine(url)

    def clear() -> None:
        with engine.begin() as connection:
            for table in ("opsguard_keys", "opsguard_keys_meta"):
                connection.execute(sa.text(f"DROP TABLE IF EXISTS {table}"))
        engine.dispose()

    clear()
    yield url
    clear()


def test_keys_in_postgresql(postgres: str) -> None:
    store: KeyStore = open_keys(postgres, PEPPER)
    assert store.find(FULL.digest) is None
    store.add(FULL)
    store.add(BARE, retire=(FULL.key_id, 50.0))
    assert [record.key_id for record in store.all()] == ["full", "bare"]
    found = store.find(FULL.digest)
    assert found is not None
    assert (found.digest, found.expires, found.scopes) == (FULL.digest, 50.0, ("a", "b"))
    assert store.revoke("bare", 60.0)
    assert not store.revoke("nobody", 60.0)
    store.touch("bare", 70.0)
    bare = store.get("bare")
    assert bare is not None
    assert (bare.revoked, bare.last_used) == (60.0, 70.0)
    store.close()


def test_processes_race_for_the_first_key_in_postgresql(postgres: str) -> None:
    race_for_the_first_key(postgres, workers=6)


@contextmanager
def asked(store: RemoteStore, way: str) -> Iterator[Callable[[Sequence[Charge]], Verdict]]:
    """`take`, by a thread or on an event loop that lives until the end."""
    if way == "threads":
        yield store.take
        store.close()
        return
    with asyncio.Runner() as runner:

        async def take(charges: Sequence[Charge]) -> Verdict:
            return await store.atake(charges)

        yield lambda charges: runner.run(take(charges))
        runner.run(store.aclose())


def until(take: Callable[[], T]) -> T:
    """What it says once it says something."""
    deadline = time.monotonic() + 15
    while True:
        try:
            return take()
        except StoreDown:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def reached(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "it does not come about"
        time.sleep(0.02)


def charges(strategy: Strategy, *keys: str) -> list[Charge]:
    (rate,) = parse_rates("3/hour")
    return [Charge(key, rate, strategy, 1) for key in keys or ("a-client",)]


# One Redis or Valkey, as services have it ---------------------------------------------------------


READS = ["+time", "+get", "+pttl", "+zcount", "+zrangebyscore"]
WRITES = ["+set", "+pexpire", "+zadd", "+zrem", "+zremrangebyscore"]
ALLOWED = ["+evalsha", "+eval", *READS, *WRITES]
"""What the docs ask for in an ACL."""


@pytest.fixture(params=["redis", "valkey"])
def one(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[RedisServer]:
    """A server with users that may do no more than the docs say, and a socket."""
    binary = shutil.which("valkey-server") if request.param == "valkey" else None
    if request.param == "valkey" and binary is None:
        pytest.skip("needs valkey-server on the PATH")
    with running(tmp_path, "--unixsocket", str(tmp_path / "socket"), binary=binary) as server:
        with server.client() as client:
            rules = [">s3cret@/x", "~opsguard:*", *ALLOWED]
            client.execute_command("ACL", "SETUSER", "limits", "on", *rules)
            client.execute_command("ACL", "SETUSER", "other", "on", *rules, "+select")
        yield server


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("strategy", ["fixed", "sliding", "gcra", "concurrency"])
def test_every_strategy_with_the_rights_of_the_docs(
    one: RedisServer, strategy: Strategy, way: str
) -> None:
    url = f"valkey://limits:s3cret%40%2Fx@127.0.0.1:{one.port}"
    with asked(remote_store(url, timeout=PATIENT), way) as take:
        found = [take(charges(strategy, "a", "b")).allowed for _ in range(4)]
        assert found == [True, True, True, False]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("place", ["127.0.0.1:{port}/2", "socket"])
def test_databases_count_apart(one: RedisServer, way: str, place: str, tmp_path: Path) -> None:
    """That needs the right to SELECT; a socket has the number in an option."""
    who = "other:s3cret%40%2Fx"
    url = f"redis://{who}@127.0.0.1:{one.port}/2"
    if place == "socket":
        url = f"unix://{who}@{tmp_path / 'socket'}?db=2"
    with asked(remote_store(url, timeout=PATIENT), way) as take:
        assert take(charges("gcra")).remaining == 2
    with one.client(db=2) as client:
        assert client.keys() == [b"opsguard:g:a-client"]
    with one.client(db=0) as client:
        assert client.keys() == []


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("redis://limits:wrong-one@127.0.0.1:{port}", "WRONGPASS|invalid username-password"),
        ("redis://limits:s3cret%40%2Fx@127.0.0.1:{port}/2", "no permissions|NOPERM"),
        ("redis://127.0.0.1:{port}/99", "out of range"),
    ],
    ids=["password", "no-select", "no-such-database"],
)
def test_who_may_not_is_told_that_the_store_is_down(
    one: RedisServer, url: str, says: str, way: str
) -> None:
    with (
        asked(remote_store(url.format(port=one.port), timeout=PATIENT), way) as take,
        pytest.raises(StoreDown, match=says) as told,
    ):
        take(charges("gcra"))
    assert "wrong-one" not in str(told.value)


# A cluster ----------------------------------------------------------------------------------------


def together(client: redis.Redis) -> bool:
    """Whether this node knows who has all of the slots."""
    info = client.execute_command("CLUSTER", "INFO")
    return b"cluster_state:ok" in info and b"cluster_slots_ok:16384" in info


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[RedisServer]]:
    """Three servers that share the slots."""
    with ExitStack() as stack:
        servers = [
            stack.enter_context(
                running(tmp_path_factory.mktemp("node"), "--cluster-enabled", "yes")
            )
            for _ in range(3)
        ]
        clients = [stack.enter_context(server.client()) for server in servers]
        for index, client in enumerate(clients):
            slots = range(index * 16384 // 3, (index + 1) * 16384 // 3)
            client.execute_command("CLUSTER", "ADDSLOTS", *slots)
            client.execute_command("CLUSTER", "SET-CONFIG-EPOCH", index + 1)
            clients[0].execute_command("CLUSTER", "MEET", "127.0.0.1", servers[index].port)
        for client in clients:
            reached(partial(together, client))
        yield servers


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("strategy", ["fixed", "sliding"])
def test_limits_in_a_cluster(cluster: list[RedisServer], strategy: Strategy, way: str) -> None:
    hosts = ",".join(f"127.0.0.1:{server.port}" for server in cluster)
    with asked(remote_store(f"redis+cluster://{hosts}", timeout=PATIENT), way) as take:
        for client in range(20):  # on all of the servers
            keys = (f"{way}-{strategy}-{client}", f"{way}-{strategy}-{client}-too")
            found = [take(charges(strategy, *keys)).allowed for _ in range(4)]
            assert found == [True, True, True, False]


@pytest.mark.parametrize("way", WAYS)
def test_a_node_of_a_cluster_is_no_redis_and_says_what_to_do(
    cluster: list[RedisServer], way: str
) -> None:
    """Whether one bucket is on this very node is chance."""
    store = remote_store(f"redis://127.0.0.1:{cluster[0].port}", timeout=PATIENT)
    answers: list[str] = []
    with asked(store, way) as take:
        for keys in ("ab", "c", "d", "e", "f", "g", "h"):
            try:
                answers.append(str(take(charges("gcra", *keys)).allowed))
            except StoreDown as error:
                answers.append(str(error))
    said = [answer for answer in answers if answer != "True"]
    assert "CrossSlot" in answers[0]
    assert any("Moved" in answer for answer in said)
    assert all("set limiter.store to a redis+cluster:// URL" in answer for answer in said)


@pytest.mark.parametrize("way", WAYS)
def test_a_cluster_that_was_silent_is_back_by_itself(cluster: list[RedisServer], way: str) -> None:
    url = f"redis+cluster://127.0.0.1:{cluster[1].port}"
    with asked(remote_store(url, timeout=0.5), way) as take:
        until(lambda: take(charges("fixed", way)))
        for server in cluster:
            server.freeze()
        begun = time.monotonic()
        try:
            with pytest.raises(StoreDown):
                take(charges("fixed", way))
        finally:
            took = time.monotonic() - begun
            for server in cluster:
                server.thaw()
        # A thread asks one after the other, each for half of the time.
        assert took < (0.5 + 0.3 if way == "loop" else 4 * 0.25 + 0.5)
        assert until(lambda: take(charges("fixed", way))).allowed


# Sentinels ----------------------------------------------------------------------------------------


class Watched:
    """A primary, its replica, and a sentinel that watches them."""

    def __init__(self, primary: RedisServer, replica: RedisServer, sentinel: RedisServer) -> None:
        self.primary, self.replica, self.sentinel = primary, replica, sentinel
        self.url = f"redis+sentinel://:pw@127.0.0.1:{sentinel.port}/main?sentinel_password="

    def known(self) -> int:
        """The port of who is the primary now, as the sentinel has it."""
        with self.sentinel.client() as client:
            return int(client.execute_command("SENTINEL", "GET-MASTER-ADDR-BY-NAME", "main")[1])


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Watched]:
    """The servers have a password, the sentinel has none: so it mostly is."""
    secret = ("--requirepass", "pw", "--masterauth", "pw", "--repl-diskless-sync-delay", "0")
    with ExitStack() as stack:
        folders = [tmp_path / name for name in ("primary", "replica", "sentinel")]
        for folder in folders:
            folder.mkdir()
        primary = stack.enter_context(running(folders[0], *secret))
        following = ("--replicaof", "127.0.0.1", str(primary.port))
        replica = stack.enter_context(running(folders[1], *secret, *following))
        with replica.client(password="pw") as client:
            reached(lambda: client.info("replication")["master_link_status"] == "up")
        conf = folders[2] / "sentinel.conf"
        conf.write_text(
            f"sentinel monitor main 127.0.0.1 {primary.port} 1\n"
            "sentinel auth-pass main pw\n"
            "sentinel down-after-milliseconds main 300\n"
            "sentinel failover-timeout main 1000\n"
        )
        sentinel = stack.enter_context(running(folders[2], sentinel=conf))
        with sentinel.client() as client:
            reached(lambda: client.info("sentinel")["master0"]["slaves"] == 1)
        yield Watched(primary, replica, sentinel)


@pytest.mark.parametrize("way", WAYS)
def test_limits_by_sentinel_through_a_failover(watched: Watched, way: str) -> None:
    with asked(remote_store(watched.url, timeout=1.0), way) as take:
        for strategy in ("fixed", "sliding"):
            # What remains is that of the primary, not that of a replica a moment ago.
            verdicts = [take(charges(strategy)) for _ in range(4)]
            assert [verdict.allowed for verdict in verdicts] == [True, True, True, False]
            assert [verdict.remaining for verdict in verdicts] == [2, 1, 0, 0]
        watched.primary.kill()
        with pytest.raises(StoreDown):
            take(charges("fixed", "another"))

        assert until(lambda: take(charges("fixed", "another"))).allowed
        assert watched.known() == watched.replica.port


@pytest.mark.parametrize("way", WAYS)
def test_a_sentinel_that_is_gone_or_silent_is_down_in_time(watched: Watched, way: str) -> None:
    with asked(remote_store(watched.url, timeout=2.0), way) as take:
        watched.sentinel.freeze()
        for stop in (lambda: None, watched.sentinel.kill):
            stop()
            begun = time.monotonic()
            with pytest.raises(StoreDown):
                take(charges("fixed"))
            assert time.monotonic() - begun < 2.0 + STALL


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("redis+sentinel://h:1", "needs the service after the hosts"),
        ("redis+sentinel://h/main", "needs host:port"),
        ("redis+cluster://h:1,h", "needs host:port"),
        ("redis+cluster://h:1?sll=true", "'sll'"),
        ("redis+cluster://h:1?ssl_cert_reqs=none", r"TLS is rediss\+"),
        ("rediss+cluster://h:1?ssl_cert_reqs=NONE", "NONE"),
        ("rediss+nonsense://h:1", "no storage that the limits package knows"),
    ],
)
def test_what_cannot_work_is_an_error_at_start(url: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        remote_store(url, timeout=1.0)


# Others -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_limits_in_mongodb(way: str) -> None:
    url = os.environ.get("OPSGUARD_TEST_MONGODB", "")
    if not url:
        pytest.skip("needs a MongoDB: OPSGUARD_TEST_MONGODB is not set")
    pytest.importorskip("pymongo" if way == "threads" else "motor")
    with asked(remote_store(url, timeout=PATIENT), way) as take:
        for strategy in ("fixed", "sliding"):
            keys = f"{time.time()}-{way}-{strategy}"
            found = [take(charges(strategy, keys)).allowed for _ in range(4)]
            assert found == [True, True, True, False]


@pytest.mark.parametrize("way", WAYS)
def test_a_mongodb_that_is_gone_is_a_store_that_is_down(way: str) -> None:
    pytest.importorskip("pymongo" if way == "threads" else "motor")
    with asked(remote_store(f"mongodb://127.0.0.1:{free_port()}", timeout=0.1), way) as take:
        begun = time.monotonic()
        with pytest.raises(StoreDown):
            take(charges("fixed"))
        # Its driver looks for a server every half second, and not before.
        assert time.monotonic() - begun < 0.5 + STALL


def test_a_mongodb_url_that_cannot_be_read_is_an_error_at_start() -> None:
    pytest.importorskip("pymongo")
    with pytest.raises(ValueError, match="cannot be used"):
        remote_store("mongodb://127.0.0.1/?tlsCAFile=/nowhere.pem", timeout=0.1)


@pytest.fixture
def memcached() -> Iterator[str]:
    binary = shutil.which("memcached")
    if binary is None:
        pytest.skip("needs memcached on the PATH")
    port = free_port()
    user = ["-u", "nobody"] if os.getuid() == 0 else []
    server = subprocess.Popen([binary, "-l", "127.0.0.1", "-p", str(port), *user])
    deadline = time.monotonic() + 10
    try:
        while True:
            with socket.socket() as probe:
                if not probe.connect_ex(("127.0.0.1", port)):
                    break
            assert time.monotonic() < deadline, "memcached does not come up"
            time.sleep(0.01)
        yield f"memcached://127.0.0.1:{port}"
    finally:
        server.kill()
        server.wait()


def test_limits_in_memcached(memcached: str) -> None:
    pytest.importorskip("pymemcache", reason="needs pymemcache")
    store = remote_store(memcached, timeout=1.0)
    (rate,) = parse_rates("3/hour")
    assert "fixed" in store.strategies
    verdicts = [store.take([Charge("a-client", rate, "fixed", 1)]) for _ in range(4)]
    assert [verdict.allowed for verdict in verdicts] == [True, True, True, False]
    assert 0 < verdicts[3].retry_after <= 3600
    assert store.take([Charge("another", rate, "fixed", 1)]).allowed
    store.close()


def test_limits_in_memcached_without_a_thread(memcached: str) -> None:
    pytest.importorskip("memcachio", reason="needs memcachio, the async driver of `limits`")
    with asked(remote_store(memcached, timeout=1.0), "loop") as take:
        found = [take(charges("fixed")).allowed for _ in range(4)]
        assert found == [True, True, True, False]
