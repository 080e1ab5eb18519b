"""Where the metrics file goes, who may have it, and what is cleared away."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from opsguard.metrics import place
from opsguard.metrics.place import sweep, worker_directory

NOW = 1_000_000.0
LONG_AGO = NOW - 61.0
AS_ROOT = pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of this process's folder."""
    return place._run()


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
    folder = worker_directory(str(tmp_path), "checkout", NOW)
    assert folder == tmp_path / f"opsguard-{os.getuid()}" / "checkout" / run
    assert folder.is_dir()
    assert worker_directory(str(tmp_path), "checkout", NOW) == folder


def test_no_folder_of_ours_is_open_to_others(tmp_path: Path) -> None:
    """Who may write in one could put a file in our place; who may read could read our numbers."""
    before = os.umask(0o022)
    try:
        folder = worker_directory(str(tmp_path), "checkout", NOW)
    finally:
        os.umask(before)
    modes = [path.stat().st_mode & 0o777 for path in (folder, folder.parent, folder.parent.parent)]
    assert modes == [0o700] * 3


def test_a_run_is_named_by_pid_start_and_pid_namespace(run: str) -> None:
    if not Path("/proc/self/stat").exists():
        pytest.skip("needs Linux's /proc")
    pid, start, namespace = run.split("-")
    assert pid == str(os.getpid())
    assert int(start) > 0
    assert int(namespace) == Path("/proc/self/ns/pid").stat().st_ino


def test_where_there_is_no_proc_the_pid_has_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", missing)
    assert place._run() == str(os.getpid())


def test_another_process_has_another_folder(tmp_path: Path, run: str) -> None:
    code = "from opsguard.metrics import place; print(place._run())"
    other = subprocess.check_output([sys.executable, "-c", code], text=True).strip()
    assert other != run


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
    made = worker_directory(str(tmp_path), service, NOW)
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
        worker_directory(str(tmp_path), "s", NOW)


@AS_ROOT
def test_a_folder_that_somebody_else_owns_is_refused(tmp_path: Path) -> None:
    user = tmp_path / f"opsguard-{os.getuid()}"
    user.mkdir()
    os.chown(user, 65_534, 65_534)
    with pytest.raises(PermissionError, match="not a directory of ours"):
        worker_directory(str(tmp_path), "s", NOW)


def test_making_a_folder_sweeps_the_dead_ones_beside_it(tmp_path: Path) -> None:
    folder = worker_directory(str(tmp_path), "s", NOW)
    dead = made(folder.parent, "dead", files=("worker-1", "worker-2"))
    worker_directory(str(tmp_path), "s", NOW)
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
