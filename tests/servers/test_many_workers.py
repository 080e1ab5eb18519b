"""Several workers on real servers: one truth, whoever is asked and whoever is killed."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from opsguard.testing import Request
from tests.contract.harness import Samples
from tests.servers.client import encode
from tests.servers.processes import SERVERS, Running, requests, running, until

pytestmark = pytest.mark.servers

WORKERS = 4
MANY = ("--workers", str(WORKERS))
RESPAWN = ("--respawn-failed-workers",)
"""Without it granian stops when a worker is killed; with it when two are within 5.5 seconds."""
CLIENTS = 6
SOAK = int(os.environ.get("SOAK_REQUESTS", "200000"))

CASES = [
    pytest.param("gunicorn-sync", "flask", MANY, id="gunicorn sync flask"),
    pytest.param("uvicorn-httptools", "fastapi", MANY, id="uvicorn fastapi"),
    pytest.param("granian-asgi", "asgi", (*MANY, *RESPAWN), id="granian asgi"),
    pytest.param("gunicorn-gthread", "django", (*MANY, "--preload"), id="gunicorn preload django"),
    *(
        pytest.param(server, app, extra, id=name, marks=pytest.mark.full)
        for server, app, extra, name in (
            ("gunicorn-sync", "flask", (*MANY, "--preload"), "gunicorn sync preload flask"),
            ("gunicorn-gthread", "wsgi", MANY, "gunicorn gthread wsgi"),
            ("gunicorn-uvicorn", "fastapi", MANY, "gunicorn uvicorn fastapi"),
            ("gunicorn-uvicorn", "fastapi", (*MANY, "--preload"), "gunicorn uvicorn preload"),
            ("gunicorn-asgi", "asgi", MANY, "gunicorn asgi"),
            ("granian-wsgi", "flask", (*MANY, *RESPAWN), "granian flask"),
            ("gunicorn-sync", "django", MANY, "gunicorn sync django"),
            ("uvicorn-h11", "django-async", MANY, "uvicorn django"),
            ("granian-wsgi", "django", (*MANY, *RESPAWN), "granian django"),
            ("gunicorn-uvicorn", "django-async", MANY, "gunicorn uvicorn django"),
        )
    ),
]


@contextmanager
def served(
    server: str, app: str, folder: Path, *extra: str, settings: dict[str, Any] | None = None
) -> Iterator[Running]:
    with running(SERVERS[server], app, folder, *extra, settings=settings) as found:
        assert until(lambda: len(workers(found)) >= WORKERS, seconds=30)
        yield found


def workers(found: Running) -> list[psutil.Process]:
    """The processes that serve: the children of the master, helpers of `multiprocessing` aside."""
    serving = []
    for one in psutil.Process(found.process.pid).children(recursive=True):
        with suppress(psutil.Error):
            if one.status() != psutil.STATUS_ZOMBIE and "resource_tracker" not in str(
                one.cmdline()
            ):
                serving.append(one)
    return serving


def files(folder: Path) -> list[Path]:
    """What lies in the group's directories."""
    return [file for file in folder.glob("opsguard-*/**/*") if file.is_file()]


def ask_many(found: Running, path: str, times: int) -> Counter[int | None]:
    """Statuses of requests, each on a connection of its own, so that all workers get some."""

    def several(count: int) -> Counter[int | None]:
        return Counter(found.get(path).status for _ in range(count))

    with ThreadPoolExecutor(CLIENTS) as threads:
        each = [times // CLIENTS + (n < times % CLIENTS) for n in range(CLIENTS)]
        return sum(threads.map(several, each), Counter())


def counted(samples: Samples, endpoint: str) -> float:
    return sum(
        value
        for (name, labels), value in samples.items()
        if name == "http_requests_total" and ("endpoint", endpoint) in labels
    )


@pytest.mark.parametrize(("server", "app", "extra"), CASES)
def test_every_worker_tells_the_sum_of_all(
    server: str, app: str, extra: tuple[str, ...], tmp_path: Path
) -> None:
    with served(server, app, tmp_path, *extra) as found:
        assert ask_many(found, "/plain", 120) == {200: 120}
        assert ask_many(found, "/boom", 30) == {500: 30}
        until(lambda: counted(found.samples(), "/plain") == 120)
        for _ in range(3 * WORKERS):
            samples = found.samples()
            assert counted(samples, "/plain") == 120
            assert counted(samples, "/boom") == 30
            buckets = [
                value
                for (name, labels), value in samples.items()
                if name == "http_request_duration_seconds_count"
                and ("endpoint", "/plain") in labels
            ]
            assert sum(buckets) == 120


@pytest.mark.parametrize(("server", "app", "extra"), CASES)
def test_a_killed_worker_loses_nothing_that_was_counted(
    server: str, app: str, extra: tuple[str, ...], tmp_path: Path
) -> None:
    """Killed with -9 between rounds of traffic: the sums stay exact, round after round, and no
    counter ever goes backwards.
    """
    choose = random.Random(7)
    with served(server, app, tmp_path, *extra) as found:
        expected = 0
        for _ in range(1 if server.startswith("granian") else 4):
            assert ask_many(found, "/plain", 60) == {200: 60}
            expected += 60
            until(lambda wanted=expected: counted(found.samples(), "/plain") == wanted)
            victim = choose.choice(workers(found))
            victim.kill()
            victim.wait()
            until(lambda: len(workers(found)) >= WORKERS, seconds=30)
            for _ in range(WORKERS):
                assert counted(found.samples(), "/plain") == expected
        assert ask_many(found, "/plain", 60) == {200: 60}
        until(lambda: counted(found.samples(), "/plain") == expected + 60)
        assert counted(found.samples(), "/plain") == expected + 60


@pytest.mark.parametrize(("server", "app", "extra"), CASES[:2])
def test_kills_in_the_middle_of_traffic(
    server: str, app: str, extra: tuple[str, ...], tmp_path: Path
) -> None:
    """What a client has seen the end of is counted; what a kill interrupted may be, once.

    Between the last byte and the count there are microseconds, in which a kill can fall: of each
    request that was being served then the count may be missing, and of no other.
    """
    done: Counter[str] = Counter()
    lock, stop = threading.Lock(), threading.Event()

    def client() -> None:
        while not stop.is_set():
            try:
                answer = found.get("/plain")
                outcome = "whole" if answer.complete and answer.status == 200 else "cut"
            except OSError:
                outcome = "cut"
            with lock:
                done[outcome] += 1

    with served(server, app, tmp_path, *extra) as found:
        threads = [threading.Thread(target=client) for _ in range(CLIENTS)]
        for thread in threads:
            thread.start()
        kills = 5
        before = 0.0
        try:
            for kill in range(kills):
                assert until(lambda wanted=30 * (kill + 1): done["whole"] >= wanted, seconds=30)
                with suppress(IndexError, psutil.NoSuchProcess):
                    random.choice(workers(found)).kill()
                now = before
                with suppress(OSError, AssertionError):  # the one that was asked is killed
                    now = counted(found.samples(), "/plain")
                assert now >= before, "a counter went backwards"
                before = now
            assert until(lambda: done["whole"] >= 30 * (kills + 1), seconds=30)
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        until(lambda: len(workers(found)) >= WORKERS, seconds=30)
        until(lambda: counted(found.samples(), "/plain") >= done["whole"])
        total = counted(found.samples(), "/plain")
        assert done["whole"] - kills * CLIENTS <= total <= done["whole"] + done["cut"]


@pytest.mark.parametrize(
    ("server", "app"), [("gunicorn-gthread", "flask"), ("uvicorn-httptools", "fastapi")]
)
def test_what_a_killed_worker_was_serving_is_told_once(
    server: str, app: str, tmp_path: Path
) -> None:
    """By the worker that comes after it: nobody has to ask for `/metrics`."""
    with served(server, app, tmp_path, *MANY) as found:
        with found.client() as client:
            client.send(encode(Request("/endless", headers=(("X-Request-ID", "the-lost-one"),))))
            client.answer("GET", enough=1)
            for one in workers(found):
                one.kill()
            until(lambda: len(workers(found)) >= WORKERS, seconds=30)

        def told() -> list[dict[str, Any]]:
            return [
                line
                for line in found.lines()
                if line.get("interrupted_request_id") == "the-lost-one"
            ]

        (line,) = until(told)
        assert line["method"] == "GET"
        assert line["endpoint"] == "/endless"
        assert line["level"] == "WARNING"
        for _ in range(2 * WORKERS):
            found.samples()
        time.sleep(0.2)
        assert len(told()) == 1


@pytest.mark.parametrize(("server", "app", "extra"), [CASES[0], CASES[3], CASES[1]])
def test_a_gauge_of_a_dead_worker_is_gone(
    server: str, app: str, extra: tuple[str, ...], tmp_path: Path
) -> None:
    with served(server, app, tmp_path, *extra) as found, found.client() as client:
        client.send(encode(Request("/endless")))
        client.answer("GET", enough=1)

        def going() -> float:
            return sum(
                value
                for (name, labels), value in found.samples().items()
                if name == "http_requests_in_progress" and ("endpoint", "/endless") in labels
            )

        assert until(going) == 1
        for one in workers(found):
            one.kill()
        until(lambda: len(workers(found)) >= WORKERS, seconds=30)
        assert until(lambda: going() == 0)


def test_recycled_workers_leave_no_files(tmp_path: Path) -> None:
    extra = (*MANY, "--max-requests", "40", "--max-requests-jitter", "10")
    with served("gunicorn-sync", "flask", tmp_path, *extra) as found:
        first = {one.pid for one in workers(found)}
        asked = 0
        while asked < 600 or first & {one.pid for one in workers(found)}:
            assert ask_many(found, "/plain", 100) == {200: 100}
            asked += 100
        assert until(lambda: counted(found.samples(), "/plain") == asked)
        until(lambda: len(files(tmp_path)) <= WORKERS + 8)
        assert len(files(tmp_path)) <= WORKERS + 8


@pytest.mark.full
def test_a_long_run_with_recycling_is_exact_and_flat(tmp_path: Path) -> None:
    """`SOAK_REQUESTS` requests through four workers that are replaced every thousand, while nobody
    asks for `/metrics`: each new worker adds up what those before it left.
    """
    extra = (*MANY, "--max-requests", "1000", "--max-requests-jitter", "200")
    with served("gunicorn-gthread", "flask", tmp_path, *extra) as found:
        master = psutil.Process(found.process.pid)
        assert ask_many(found, "/plain", 2000) == {200: 2000}
        began = time.perf_counter()
        found.samples()
        fresh = time.perf_counter() - began
        size = master.memory_info().rss
        expected = 2000
        while expected < SOAK:
            assert ask_many(found, "/plain", 5000) == {200: 5000}
            expected += 5000
            assert len(files(tmp_path)) <= 2 * WORKERS + 8
        assert until(lambda: counted(found.samples(), "/plain") == expected)
        began = time.perf_counter()
        found.samples()
        assert time.perf_counter() - began < 5 * fresh + 0.2
        assert master.memory_info().rss - size < 8 << 20
        for one in workers(found):
            assert one.memory_info().rss < 200 << 20


LIMITED = [
    pytest.param("gunicorn-sync", "flask", MANY, id="gunicorn sync flask"),
    pytest.param("uvicorn-httptools", "fastapi", MANY, id="uvicorn fastapi"),
    *(
        pytest.param(server, app, extra, id=f"{server} {app}", marks=pytest.mark.full)
        for server, app, extra in (
            ("gunicorn-gthread", "django", (*MANY, "--preload")),
            ("gunicorn-uvicorn", "fastapi", MANY),
            ("granian-asgi", "asgi", MANY),
            ("granian-wsgi", "wsgi", MANY),
        )
    ),
]


@pytest.mark.parametrize("strategy", ["fixed", "gcra", "sliding"])
@pytest.mark.parametrize(("server", "app", "extra"), LIMITED)
def test_one_limit_holds_across_the_workers(
    server: str, app: str, extra: tuple[str, ...], strategy: str, tmp_path: Path
) -> None:
    """Nothing is configured but the limit: the store is found by itself, and admits no more."""
    limit = {"limiter": {"policies": {"/plain": {"rate": "37/day", "strategy": strategy}}}}
    with served(server, app, tmp_path, *extra, settings=limit) as found:
        assert ask_many(found, "/plain", 150) == {200: 37, 429: 113}


def test_a_killed_worker_frees_its_slots(tmp_path: Path) -> None:
    limit = {"limiter": {"policies": {"/endless": {"rate": "2/hour", "strategy": "concurrency"}}}}
    with served("gunicorn-gthread", "flask", tmp_path, *MANY, settings=limit) as found:
        clients = [found.client() for _ in range(2)]
        for client in clients:
            client.send(encode(Request("/endless")))
            assert client.answer("GET", enough=1).status == 200
        assert found.get("/endless").status == 429
        for one in workers(found):
            one.send_signal(signal.SIGKILL)
        until(lambda: len(workers(found)) >= WORKERS, seconds=30)

        def admitted() -> bool:
            with found.client() as again:
                again.send(encode(Request("/endless")))
                return again.answer("GET", enough=1).status == 200

        assert until(admitted)
        for client in clients:
            client.close()


@pytest.mark.parametrize("harm", ["truncate", "empty", "random", "remove", "directory"])
def test_whatever_happens_to_the_files_the_service_goes_on(harm: str, tmp_path: Path) -> None:
    """Somebody damages every file of the group under running workers: no signal, no 5xx, and the
    scrape answers.
    """
    limit = {"limiter": {"policies": {"/ids": "100000/day"}}}
    with served("gunicorn-sync", "flask", tmp_path, *MANY, settings=limit) as found:
        assert ask_many(found, "/plain", 40) == {200: 40}
        assert ask_many(found, "/ids", 10) == {200: 10}
        pids = {one.pid for one in workers(found)}
        for file in files(tmp_path):
            with suppress(FileNotFoundError):  # a new one, which has its name by now
                damage(file, harm)
        assert ask_many(found, "/plain", 40) == {200: 40}
        assert ask_many(found, "/ids", 40) == {200: 40}
        for _ in range(4 * WORKERS):  # each worker looks at its file now
            found.samples()
        assert ask_many(found, "/plain", 40) == {200: 40}
        assert until(lambda: requests(found.samples()) > 0)
        alive = {one.pid for one in psutil.Process(found.process.pid).children(recursive=True)}
        assert pids <= alive


def damage(file: Path, harm: str) -> None:
    if harm == "truncate":
        os.truncate(file, file.stat().st_size // 2)
    elif harm == "empty":
        os.truncate(file, 0)
    elif harm == "random":
        file.write_bytes(random.Random(3).randbytes(8192))
    else:
        file.unlink(missing_ok=True)
        if harm == "directory":
            file.mkdir()


def test_a_restart_begins_at_zero(tmp_path: Path) -> None:
    for _ in range(2):
        with served("gunicorn-sync", "flask", tmp_path, *MANY) as found:
            assert ask_many(found, "/plain", 40) == {200: 40}
            assert until(lambda: counted(found.samples(), "/plain") == 40)
