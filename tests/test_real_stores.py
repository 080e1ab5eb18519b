"""Stores that need a server of their own: skipped where it, or its driver, is missing.

PostgreSQL does not run for root, so a test does not start it: `OPSGUARD_TEST_POSTGRES` names an
empty database (`postgresql+psycopg://user@127.0.0.1:5432/name`). memcached is started if it is on
the PATH.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator

import pytest

from opsguard.keys.manager import open_store as open_keys
from opsguard.keys.stores import Store as KeyStore
from opsguard.limiter import Charge, parse_rates
from opsguard.limiter.storages import remote_store
from tests.redis_server import free_port
from tests.test_keys_stores import BARE, FULL, PEPPER, race_for_the_first_key


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
    pytest.importorskip("emcache", reason="needs emcache, the async driver of `limits`")
    store = remote_store(memcached, timeout=1.0)
    (rate,) = parse_rates("3/hour")

    async def ask() -> list[bool]:
        charge = Charge("a-client", rate, "fixed", 1)
        found = [(await store.atake([charge])).allowed for _ in range(4)]
        await store.aclose()
        return found

    assert asyncio.run(ask()) == [True, True, True, False]
