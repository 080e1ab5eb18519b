"""Where the workers of a group meet, who may, and what is cleared away."""

from __future__ import annotations

import dataclasses
import fcntl
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from opsguard.workers import place
from opsguard.workers.group import Process, manager
from opsguard.workers.place import Place, sweep
from opsguard.workers.seats import claim

NOW = 1_000_000.0
LONG_AGO = NOW - 61.0
AS_ROOT = pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")


@pytest.fixture
def run() -> str:
    """The name of this group's folder."""
    return manager().name


def made(
    services: Path, name: str, modified: float = LONG_AGO, files: tuple[str, ...] = ()
) -> Path:
    folder = services / name
    folder.mkdir()
    for file in files:
        (folder / file).touch()
    os.utime(folder, (modified, modified))
    return folder


def test_the_folder_is_below_base_user_and_service_and_names_the_run(
    tmp_path: Path, run: str
) -> None:
    meeting = Place(str(tmp_path), "checkout")
    folder = meeting.directory(NOW)
    assert folder == tmp_path / f"opsguard-{os.getuid()}" / "checkout" / run
    assert folder.is_dir()
    assert meeting.directory(NOW) == folder


def test_a_folder_is_found_where_it_is_and_ours(tmp_path: Path) -> None:
    meeting = Place(str(tmp_path), "checkout")
    assert meeting.found() is None
    assert not list(tmp_path.iterdir())
    folder = meeting.directory(NOW)
    assert meeting.found() == folder
    folder.rmdir()
    folder.touch()
    assert meeting.found() is None


def test_several_of_one_service_in_a_process_have_folders_of_their_own(
    tmp_path: Path, run: str
) -> None:
    """Numbered in the order in which they were made, also when one is gone: all workers that run
    the same code come to the same numbers, whenever their garbage is collected.
    """
    places = [Place(str(tmp_path), "checkout") for _ in range(3)]
    del places[1]
    places.append(Place(str(tmp_path), "checkout"))
    shop = tmp_path / f"opsguard-{os.getuid()}" / "checkout" / run
    assert [one.directory(NOW) for one in places] == [shop, shop / "2", shop / "3"]
    other = Place(str(tmp_path), "other").directory(NOW)
    assert other == shop.parent.parent / "other" / run


def test_a_place_keeps_its_folder_over_a_fork(tmp_path: Path) -> None:
    first, second = Place(str(tmp_path), "s"), Place(str(tmp_path), "s")
    found = [str(one.directory(NOW)) for one in (second, first)]
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:  # pragma: no cover
        os.write(writer, "\n".join(str(one.directory(NOW)) for one in (second, first)).encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        assert pipe.read().splitlines() == found


def test_no_folder_of_ours_is_open_to_others(tmp_path: Path) -> None:
    """Who may write in one could put a file in our place; who may read could read our numbers."""
    before = os.umask(0o022)
    try:
        folder = Place(str(tmp_path), "checkout").directory(NOW)
    finally:
        os.umask(before)
    modes = [path.stat().st_mode & 0o777 for path in (folder, folder.parent, folder.parent.parent)]
    assert modes == [0o700] * 3


@pytest.mark.parametrize(
    ("service", "folder"),
    [
        pytest.param("checkout-v2.1", "checkout-v2.1", id="plain"),
        pytest.param("my service/../x", "my_service_.._x", id="slashes and spaces"),
        pytest.param("..", "service", id="the parent"),
        pytest.param(".", "service", id="the folder itself"),
        pytest.param("", "service", id="empty"),
        pytest.param("ü\0\n", "_", id="control characters"),
        pytest.param("x" * 200, "x" * 64, id="long"),
    ],
)
def test_a_service_name_is_one_harmless_folder_name(
    service: str, folder: str, tmp_path: Path
) -> None:
    made = Place(str(tmp_path), service).directory(NOW)
    assert made.parent == tmp_path / f"opsguard-{os.getuid()}" / folder


@pytest.mark.parametrize("writable", [True, False])
def test_without_a_base_shared_memory_is_taken_else_the_temporary_folder(
    writable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: writable)
    base = place._default_base()
    assert base == (Path("/dev/shm") if writable else Path(tempfile.gettempdir()))


def as_a_link(at: Path, elsewhere: Path) -> None:
    elsewhere.mkdir()
    at.symlink_to(elsewhere)


def as_a_file(at: Path, elsewhere: Path) -> None:
    at.touch()


def as_a_dangling_link(at: Path, elsewhere: Path) -> None:
    at.symlink_to(elsewhere)


PLANTED = pytest.mark.parametrize(
    "plant", [as_a_link, as_a_file, as_a_dangling_link], ids=lambda plant: plant.__name__[5:]
)


@PLANTED
@pytest.mark.parametrize("level", ["user", "service", "run"])
def test_what_another_user_may_have_put_in_our_place_is_refused(
    level: str, plant: Callable[[Path, Path], None], tmp_path: Path, run: str
) -> None:
    user = tmp_path / f"opsguard-{os.getuid()}"
    at = {"user": user, "service": user / "s", "run": user / "s" / run}[level]
    at.parent.mkdir(parents=True, exist_ok=True)
    plant(at, tmp_path / "elsewhere")
    with pytest.raises(OSError):
        Place(str(tmp_path), "s").directory(NOW)


@AS_ROOT
def test_a_folder_that_somebody_else_owns_is_refused(tmp_path: Path) -> None:
    user = tmp_path / f"opsguard-{os.getuid()}"
    user.mkdir()
    os.chown(user, 65_534, 65_534)
    with pytest.raises(PermissionError, match="not a directory of ours"):
        Place(str(tmp_path), "s").directory(NOW)


def test_making_a_folder_sweeps_the_dead_ones_beside_it(tmp_path: Path) -> None:
    folder = Place(str(tmp_path), "s").directory(NOW)
    dead = made(folder.parent, "dead", files=("worker-1", "worker-2"))
    Place(str(tmp_path), "s").directory(NOW)
    assert not dead.exists()
    assert folder.exists()


def test_a_sweep_removes_dead_folders_only(tmp_path: Path, run: str) -> None:
    """Dead: without a locked file, and not touched for a minute. Our own is never looked at."""
    alive = made(tmp_path, "alive", files=("worker-1", "worker-2"))
    starting = made(tmp_path, "starting", NOW - 59.0, files=("worker-1",))
    mine = made(tmp_path, run, files=("worker-1",))
    made(tmp_path, "dead", files=("worker-1",))
    made(tmp_path, "dead and empty")
    with (alive / "worker-2").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        sweep(tmp_path, NOW)
        assert set(tmp_path.iterdir()) == {alive, starting, mine}
        assert len(list(alive.iterdir())) == 2
    sweep(tmp_path, NOW)
    assert set(tmp_path.iterdir()) == {starting, mine}


def child() -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)


def test_a_living_manager_keeps_its_folder_when_all_its_workers_are_dead(tmp_path: Path) -> None:
    """What they counted is in there, for those that it starts next."""
    with child() as manager:
        folder = made(tmp_path, Process.of(manager.pid).name, files=("retired",))
        sweep(tmp_path, NOW)
        assert folder.exists()
        manager.kill()
    sweep(tmp_path, NOW)
    assert not folder.exists()


def test_a_reused_pid_keeps_nothing(tmp_path: Path) -> None:
    """The pid lives, but started at another moment than the folder's name has it."""
    me = Process.of(os.getpid())
    before = made(tmp_path, dataclasses.replace(me, start=me.start - 1).name, files=("retired",))
    sweep(tmp_path, NOW)
    assert not before.exists()


def test_another_container_s_folder_has_an_hour(tmp_path: Path) -> None:
    """Its manager can't be seen from here; our own process of that pid is somebody else."""
    theirs = Process(os.getpid(), Process.of(os.getpid()).start, 1).name
    folder = made(tmp_path, theirs, NOW - 3599.0, files=("retired",))
    sweep(tmp_path, NOW)
    assert folder.exists()
    os.utime(folder, (NOW - 3601.0,) * 2)
    sweep(tmp_path, NOW)
    assert not folder.exists()


def test_an_orphaned_worker_keeps_the_folder_of_its_dead_manager(tmp_path: Path) -> None:
    """Held is held, whether all of a file is locked or a seat in it, and however deep."""
    folder = made(tmp_path, "1-1-1", LONG_AGO - 3600.0)
    second = folder / "1"
    second.mkdir()
    (folder / "worker-1").touch()
    seat = claim(second / "seats")
    os.utime(folder, (LONG_AGO - 3600.0,) * 2)
    sweep(tmp_path, NOW)
    assert (folder / "worker-1").exists()
    assert (second / "seats").exists()
    seat.leave()
    sweep(tmp_path, NOW)
    assert not folder.exists()


def test_a_pipe_in_the_way_stops_no_sweep(tmp_path: Path) -> None:
    folder = made(tmp_path, "dead")
    os.mkfifo(folder / "pipe")
    os.utime(folder, (LONG_AGO, LONG_AGO))
    sweep(tmp_path, NOW)
    assert not folder.exists()


def test_a_sweep_leaves_what_is_not_as_we_make_it(tmp_path: Path) -> None:
    stray = tmp_path / "stray"
    stray.touch()
    os.utime(stray, (LONG_AGO, LONG_AGO))
    nested = made(tmp_path, "nested")
    (nested / "folder").mkdir()
    os.utime(nested, (LONG_AGO, LONG_AGO))
    sweep(tmp_path, NOW)
    assert set(tmp_path.iterdir()) == {stray, nested}


def test_a_sweep_follows_no_link(tmp_path: Path) -> None:
    """What a link leads to is somebody's own, and is not removed through it."""
    services = tmp_path / "services"
    services.mkdir()
    precious = made(tmp_path, "precious", files=("file",))
    (services / "link").symlink_to(precious)
    sweep(services, NOW)
    assert (precious / "file").exists()


def test_a_sweep_of_a_folder_that_is_gone_does_nothing(tmp_path: Path) -> None:
    sweep(tmp_path / "missing", NOW)
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_survives_that_another_one_was_faster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = made(tmp_path, "dead", files=("worker-1",))
    held = place.is_held

    def late(path: Path) -> Any:
        answer = held(path)
        path.unlink()
        dead.rmdir()
        return answer

    monkeypatch.setattr(place, "is_held", late)
    sweep(tmp_path, NOW)
    assert list(tmp_path.iterdir()) == []
