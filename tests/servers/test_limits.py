"""Limits on real servers with a real Redis: frozen, killed, started again, shared by workers."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from opsguard.testing import Answer, Request
from tests.redis_server import RedisServer
from tests.redis_server import running as redis_running
from tests.servers.processes import SERVERS, Running, running, until

pytestmark = pytest.mark.servers

CASES = [
    pytest.param("uvicorn-httptools", "fastapi", id="uvicorn fastapi"),
    pytest.param("gunicorn-gthread", "flask", id="gunicorn flask"),
    pytest.param("uvicorn-httptools", "asgi", id="uvicorn asgi", marks=pytest.mark.full),
    pytest.param("gunicorn-gthread", "wsgi", id="gunicorn wsgi", marks=pytest.mark.full),
    pytest.param("gunicorn-gthread", "django", id="gunicorn django", marks=pytest.mark.full),
    pytest.param("uvicorn-httptools", "django-async", id="uvicorn django", marks=pytest.mark.full),
]
LIMIT = 40
PATIENCE = 0.025
"""Seconds that a request may wait for a store."""
NOISE = 0.1
"""Seconds that this machine may take for everything else, at worst, on one request."""


@pytest.fixture
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with redis_running(tmp_path_factory.mktemp("redis")) as server:
        yield server


def limiter(redis: RedisServer, **more: Any) -> dict[str, Any]:
    policies = {"/plain": {"rate": f"{LIMIT}/hour", "strategy": "gcra"}, "*": "100000/hour"}
    return {"limiter": {"store": redis.url, "policies": policies, **more}}


@dataclass
class Timed:
    """Answers to some requests, one after the other on one connection, and how long each took."""

    answers: list[Answer]
    seconds: list[float]

    @property
    def statuses(self) -> set[int | None]:
        return {answer.status for answer in self.answers}

    @property
    def median(self) -> float:
        return sorted(self.seconds)[len(self.seconds) // 2]

    @property
    def longest(self) -> float:
        """But for two that a busy machine may have held up; five are to wait for a store."""
        return sorted(self.seconds)[-3]


def ask(server: Running, path: str, times: int) -> Timed:
    answers, seconds = [], []
    with server.client() as client:
        for _ in range(times):
            began = time.perf_counter()
            answers.append(client.ask(Request(path)))
            seconds.append(time.perf_counter() - began)
    return Timed(answers, seconds)


@pytest.mark.parametrize(("server", "app"), CASES)
def test_a_redis_that_is_frozen_or_killed_is_nobodys_error(
    server: str, app: str, redis: RedisServer, tmp_path: Path
) -> None:
    """Never a 5xx, no wait beyond the time limit, none at all once the breaker is open, and shared
    counting again within five seconds of its return.
    """
    with running(SERVERS[server], app, tmp_path, settings=limiter(redis)) as served:
        assert ask(served, "/ids", 5).statuses == {200}
        redis.freeze()
        black = ask(served, "/ids", 30)
        assert black.statuses == {200}
        assert black.longest < PATIENCE + NOISE
        assert black.median < PATIENCE
        redis.thaw()
        back(served, redis)
        redis.kill()
        dead = ask(served, "/ids", 30)
        assert dead.statuses == {200}
        assert dead.longest < PATIENCE + NOISE
        assert ask(served, "/plain", LIMIT + 1).statuses == {200, 429}  # it goes on by itself
        redis.start()
        back(served, redis)
        assert not [line for line in served.access() if line["status_code"] >= 500]


def back(served: Running, redis: RedisServer) -> None:
    """Requests are counted in Redis again."""

    def counted() -> bool:
        with redis.client() as client:
            before = client.info("commandstats").get("cmdstat_evalsha", {}).get("calls", 0)
            assert ask(served, "/ids", 3).statuses == {200}
            after = client.info("commandstats").get("cmdstat_evalsha", {}).get("calls", 0)
        return bool(after > before)

    began = time.monotonic()
    assert until(counted, seconds=6.0)
    assert time.monotonic() - began < 5.5


@pytest.mark.parametrize(
    ("server", "app", "workers"),
    [
        pytest.param("uvicorn-httptools", "fastapi", ("--workers", "2"), id="uvicorn fastapi"),
        pytest.param("gunicorn-gthread", "flask", ("--workers", "3"), id="gunicorn flask"),
        pytest.param(
            *("gunicorn-sync", "django", ("--workers", "3")),
            id="gunicorn django",
            marks=pytest.mark.full,
        ),
    ],
)
def test_workers_on_one_redis_admit_exactly_the_limit(
    server: str, app: str, workers: tuple[str, ...], redis: RedisServer, tmp_path: Path
) -> None:
    settings = limiter(redis, timeout=5)
    with running(SERVERS[server], app, tmp_path, *workers, settings=settings) as served:

        def one(number: int) -> tuple[int | None, list[str]]:
            answer = served.get("/plain")
            return answer.status, answer.header("x-ratelimit-remaining")

        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(one, range(2 * LIMIT)))
        statuses = Counter(status for status, _ in found)
        assert statuses == {200: LIMIT, 429: LIMIT}
        # No two of the admitted were told the same rest: it was one count for all of them.
        rests = sorted(int(rest[0]) for status, rest in found if status == 200)
        assert rests == list(range(LIMIT))


@pytest.mark.parametrize(("server", "app"), CASES)
def test_a_client_that_leaves_gives_its_slot_back(
    server: str, app: str, redis: RedisServer, tmp_path: Path
) -> None:
    slot = {"rate": "1/hour", "strategy": "concurrency"}
    settings = {"limiter": {"store": redis.url, "timeout": 1, "policies": {"/endless": slot}}}
    with running(SERVERS[server], app, tmp_path, settings=settings) as served:
        for _ in range(2):
            with served.client() as client:
                client.send(b"GET /endless HTTP/1.1\r\nHost: testserver\r\n\r\n")
                assert client.answer(enough=4).status == 200
                assert served.get("/endless").status == 429
            until(lambda: len([x for x in served.access() if x["status_code"] == 499]) > 0)
            free = until(lambda: not slots(redis))
            assert free


def slots(redis: RedisServer) -> int:
    """How many are taken, as Redis has it."""
    with redis.client() as client:
        keys: list[bytes] = list(client.scan_iter())
        return sum(client.zcard(key) for key in keys if client.type(key) == b"zset")
