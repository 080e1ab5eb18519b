"""Several workers under each server: they find each other, and what one is told all know."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.servers.processes import SERVERS, Running, running, until

pytestmark = pytest.mark.servers

WORKERS = 4
FAST = {
    ("gunicorn-sync", "wsgi", "--preload"),
    ("gunicorn-gthread", "flask"),
    ("gunicorn-uvicorn", "fastapi"),
    ("uvicorn-httptools", "fastapi"),
    ("granian-asgi", "django-async"),
    ("granian-wsgi", "django"),
}
ASKED = [
    *[
        (server, app, *preload)
        for server in ("gunicorn-sync", "gunicorn-gthread")
        for app in ("wsgi", "flask", "django")
        for preload in ((), ("--preload",))
    ],
    *[
        (server, app, *preload)
        for server in ("gunicorn-uvicorn", "gunicorn-asgi")
        for app in ("asgi", "fastapi", "django-async")
        for preload in ((), ("--preload",))
    ],
    *[
        (server, app)
        for server in ("uvicorn-httptools", "uvicorn-h11", "granian-asgi")
        for app in ("asgi", "fastapi", "django-async")
    ],
    *[("granian-wsgi", app) for app in ("wsgi", "flask", "django")],
]
CASES = [
    pytest.param(
        server,
        app,
        tuple(arguments),
        id=" ".join((server, app, *arguments)),
        marks=[] if (server, app, *arguments) in FAST else [pytest.mark.full],
    )
    for server, app, *arguments in ASKED
]


@contextmanager
def serving(
    server: str, app: str, folder: Path, *arguments: str, durability: str = "batch"
) -> Iterator[Running]:
    extra = ("--workers", str(WORKERS), *arguments)
    told = {"CONTRACT_WORKERS": "1"}
    settings = {"logging": {"durability": durability}}
    with running(SERVERS[server], app, folder, *extra, environ=told, settings=settings) as served:
        yield served


def ask(served: Running, path: str = "/where") -> dict[str, Any]:
    answer = served.get(path)
    assert answer.status == 200, answer
    told: dict[str, Any] = json.loads(answer.body)
    return told


def all_workers(served: Running) -> dict[int, dict[str, Any]]:
    """What each worker tells, by its pid."""
    found: dict[int, dict[str, Any]] = {}

    def everybody() -> bool:
        with ThreadPoolExecutor(2 * WORKERS) as pool:
            for told in pool.map(lambda _: ask(served), range(4 * WORKERS)):
                found[told["pid"]] = told
        return len(found) == WORKERS

    assert until(everybody, seconds=30), found
    return found


def levels(served: Running) -> set[int]:
    """The log levels that there are among all workers."""
    return {told["level"] for told in all_workers(served).values()}


@pytest.mark.parametrize(("server", "app", "arguments"), CASES)
def test_all_workers_meet_in_one_folder_and_after_a_restart_in_another(
    server: str, app: str, arguments: tuple[str, ...], tmp_path: Path
) -> None:
    """It is named by the process that was started, whoever that one's parent is."""
    folders = []
    for _ in range(2):
        with serving(server, app, tmp_path, *arguments) as served:
            (folder,) = {told["folder"] for told in all_workers(served).values()}
            assert Path(folder).name.split("-")[0] == str(served.process.pid)
            folders.append(folder)
    assert len(set(folders)) == 2


@pytest.mark.parametrize(
    ("server", "app", "arguments"),
    [
        pytest.param("uvicorn-httptools", "asgi", (), id="uvicorn"),
        pytest.param("uvicorn-httptools", "asgi", ("--reload",), id="uvicorn --reload"),
        pytest.param("gunicorn-gthread", "wsgi", (), id="gunicorn", marks=pytest.mark.full),
        pytest.param(
            *("gunicorn-gthread", "wsgi", ("--preload", "--reload")),
            id="gunicorn --reload",
            marks=pytest.mark.full,
        ),
        pytest.param("granian-asgi", "asgi", (), id="granian", marks=pytest.mark.full),
    ],
)
def test_a_worker_on_its_own_meets_where_the_server_started(
    server: str, app: str, arguments: tuple[str, ...], tmp_path: Path
) -> None:
    told = {"CONTRACT_WORKERS": "1"}
    with running(SERVERS[server], app, tmp_path, *arguments, environ=told) as served:
        assert Path(ask(served)["folder"]).name.split("-")[0] == str(served.process.pid)


@pytest.mark.parametrize(("server", "app", "arguments"), CASES)
def test_a_log_level_told_to_one_worker_reaches_all(
    server: str, app: str, arguments: tuple[str, ...], tmp_path: Path
) -> None:
    # Where each line is written at once, nobody looks after lines.
    durability = "line" if app in ("wsgi", "fastapi") else "batch"
    with serving(server, app, tmp_path, *arguments, durability=durability) as served:
        before = all_workers(served)
        assert {told["level"] for told in before.values()} == {0}
        assert ask(served, "/debug")["level"] == 10
        # A second later, as test_workers_board.py says; a busy machine may need some more.
        assert until(lambda: levels(served) == {10}, seconds=30)
        assert all_workers(served).keys() == before.keys()


@pytest.mark.parametrize(
    "server", [pytest.param("uvicorn-httptools", marks=[pytest.mark.full]), "granian-asgi"]
)
def test_workers_that_idle_in_an_event_loop_hear_of_it_as_well(server: str, tmp_path: Path) -> None:
    """Nobody asks them anything in the meantime: each answers once, with the new level."""
    with serving(server, "fastapi", tmp_path) as served:
        all_workers(served)
        time.sleep(2.0)  # whoever looked after lines has gone to sleep
        ask(served, "/debug")
        time.sleep(5.0)  # a second would do, but for a busy machine
        with ThreadPoolExecutor(2 * WORKERS) as pool:
            first = list(pool.map(lambda _: ask(served), range(2 * WORKERS)))
        assert {told["level"] for told in first} == {10}
