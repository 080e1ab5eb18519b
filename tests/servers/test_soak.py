"""A long run of mixed traffic: every request counted once, and nothing that grows.

`SOAK_REQUESTS` in the environment sets how long; the default takes about a minute a server.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from opsguard.testing import Request
from tests.servers.client import encode
from tests.servers.processes import Pool, Running, until

pytestmark = [pytest.mark.servers, pytest.mark.full]

REQUESTS = int(os.environ.get("SOAK_REQUESTS", "20000"))
CLIENTS = 8
WARM = 2000
GROWTH = 8 << 20
"""Bytes that a worker may be larger at the end: 400 a request would be a leak."""

MIXED: tuple[tuple[str, str, int | None], ...] = (
    ("GET", "/plain", 200),
    ("GET", "/items/7", 200),
    ("GET", "/nowhere", 404),
    ("GET", "/boom", 500),
    ("GET", "/stream", 200),
    ("GET", "/endless", None),
)
"""Method, path and status; None: the client leaves in the middle of the answer."""


def one_client(running: Running, seed: int, requests: int) -> Counter[tuple[str, str, int | None]]:
    """What one client did, on connections that it leaves as clients do."""
    choose = random.Random(seed)
    done: Counter[tuple[str, str, int | None]] = Counter()
    for _ in range(requests):
        kind = choose.choice(MIXED)
        method, path, status = kind
        with running.client() as client:
            if status is None:
                client.send(encode(Request(path, method)))
                client.answer(method, enough=1)
            else:
                answer = client.ask(Request(path, method))
                assert answer.status == status
        done[kind] += 1
    return done


def traffic(running: Running, requests: int, seed: int) -> Counter[tuple[str, str, int | None]]:
    with ThreadPoolExecutor(CLIENTS) as threads:
        each = requests // CLIENTS
        found = threads.map(lambda n: one_client(running, seed + n, each), range(CLIENTS))
        total: Counter[tuple[str, str, int | None]] = Counter()
        for one in found:
            total += one
    return total


def workers(running: Running) -> list[psutil.Process]:
    """The processes that serve: the children of a master, else the server itself."""
    master = psutil.Process(running.process.pid)
    return master.children(recursive=True) or [master]


@pytest.mark.parametrize(
    ("server", "app"),
    [("uvicorn-httptools", "fastapi"), ("gunicorn-gthread", "flask"), ("gunicorn-sync", "django")],
)
def test_a_long_run_counts_each_request_once_and_grows_by_nothing(
    server: str, app: str, pool: Pool
) -> None:
    running = pool.get(server, app)
    traffic(running, WARM, seed=1)
    mark, before = running.still()
    served = workers(running)
    sizes = {one.pid: one.memory_info().rss for one in served}
    files = {one.pid: one.num_fds() for one in served}
    threads = {one.pid: one.num_threads() for one in served}

    done = traffic(running, REQUESTS, seed=100)
    expected = sum(done.values())
    until(lambda: len(running.access(mark)) >= expected, seconds=30)
    assert len(running.access(mark)) == expected
    assert len({line["request_id"] for line in running.access(mark)}) == expected
    since = running.since(before)
    counted = sum(value for (name, _), value in since.items() if name == "http_requests_total")
    assert counted == expected
    in_progress = [
        value for (name, _), value in running.samples().items() if name.endswith("_in_progress")
    ]
    assert not any(in_progress)
    assert [one.pid for one in workers(running)] == list(sizes)
    for one in served:
        assert one.memory_info().rss - sizes[one.pid] < GROWTH
        assert one.num_fds() <= files[one.pid] + CLIENTS
        assert one.num_threads() <= threads[one.pid] + 1
