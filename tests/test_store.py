"""Numbers in shared memory: none is lost, each process has its own, and no disk kills us."""

from __future__ import annotations

import ast
import errno
import fcntl
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from opsguard.metrics import store as module
from opsguard.metrics.inflight import PLACES, WIDTH
from opsguard.metrics.layout import (
    FAMILY,
    IN_FLIGHT,
    SERIES,
    SPARE,
    SPARE_CELLS,
    Record,
    read_header,
    read_records,
)
from opsguard.metrics.store import Store, StoreFull

FORKS = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
THREADS = 16
EACH = 2_000


class Complaints:
    """Remembers what the store complained of."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, BaseException | None]] = []

    def __call__(self, site: str, error: BaseException | None) -> None:
        self.seen.append((site, error))


def in_memory(**options: Any) -> Store:
    return Store(lambda: None, Complaints(), **options)


def in_file(folder: Path, **options: Any) -> Store:
    return Store(lambda: folder, Complaints(), **options)


def workers(folder: Path) -> list[Path]:
    """The files of workers, in the order of their numbers."""
    return sorted(folder.glob("worker-*"), key=lambda path: int(path.name.split("-")[1]))


def named(path: Path | None, number: int, pid: int) -> bool:
    """Whether the file is of the worker with this number and pid."""
    return path is not None and path.name.startswith(f"worker-{number}-{pid}-")


def one_series(store: Store, count: int = 1) -> int:
    at = store.series(store.family({"name": "n"}), ("a",), count)
    store.tell()
    return at


def hammer(work: Callable[[], None]) -> None:
    """Run `work` in 16 threads that start together."""
    barrier = threading.Barrier(THREADS)

    def run() -> None:
        barrier.wait()
        work()

    threads = [threading.Thread(target=run) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.mark.usefixtures("eager_switching")
@pytest.mark.parametrize("gil", [None, False], ids=["as this interpreter is", "with the lock"])
@pytest.mark.parametrize("place", ["memory", "file"])
def test_sixteen_threads_lose_no_increment(gil: bool | None, place: str, tmp_path: Path) -> None:
    store = in_memory(gil=gil) if place == "memory" else in_file(tmp_path, gil=gil)
    at = one_series(store)

    def work() -> None:
        for _ in range(EACH):
            with store.exclusive:
                store.cells[at] += 1.0

    hammer(work)
    assert store.cells[at] == THREADS * EACH


@pytest.mark.usefixtures("eager_switching")
def test_threads_that_add_series_at_once_get_cells_of_their_own() -> None:
    store = in_memory()
    family = store.family({"name": "n"})
    found: list[int] = []

    def work() -> None:
        found.extend([store.series(family, (str(number),), 3) for number in range(50)])

    hammer(work)
    taken = [cell for at in found for cell in range(at, at + 3)]
    assert len(found) == THREADS * 50
    assert len(set(taken)) == len(taken)
    assert len([r for r in read_records(store.read()) if r.kind == SERIES]) == len(found)


def test_without_a_gil_writers_hold_the_lock_and_with_one_nothing() -> None:
    locked = in_memory(gil=False)
    assert locked.exclusive is locked.lock
    assert in_memory(gil=True).exclusive is not locked.lock
    assert in_memory().gil is module.gil_enabled()


def test_a_new_store_has_opened_nothing(tmp_path: Path) -> None:
    asked: list[str] = []

    def place() -> Path:
        asked.append("place")
        return tmp_path

    store = Store(place, Complaints())
    assert store.read() == b""
    assert asked == []
    assert list(tmp_path.iterdir()) == []
    one_series(store)
    assert asked == ["place"]
    assert {path.name for path in tmp_path.iterdir()} == {"seats", store.path and store.path.name}
    assert named(store.path, 0, os.getpid())
    store.close()


@pytest.mark.parametrize("place", ["memory", "file"])
def test_what_is_written_is_read_back(place: str, tmp_path: Path) -> None:
    store = in_memory() if place == "memory" else in_file(tmp_path)
    definition = {"name": "ünï", "buckets": [0.5]}
    family = store.family(definition)
    at = store.series(family, ("a", "é\n\0\ud800"), 2)
    store.cells[at] = 1.5
    store.cells[at + 1] = float("inf")
    data = store.read() if store.path is None else store.path.read_bytes()
    assert list(read_records(data)) == [
        Record(SPARE, None, (0.0,) * SPARE_CELLS),
        Record(IN_FLIGHT, None, (0.0,) * PLACES * WIDTH),
        Record(FAMILY, definition, ()),
        Record(SERIES, [0, "a", "é\n\0\ud800"], (1.5, float("inf"))),
    ]
    store.close()


def test_the_file_is_for_its_owner_only_and_locked_while_it_lives(tmp_path: Path) -> None:
    store = in_file(tmp_path)
    one_series(store)
    assert store.path is not None
    assert store.path.stat().st_mode & 0o777 == 0o600
    with store.path.open("rb") as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)
    store.close()


def test_each_store_has_a_file_and_a_number_of_its_own(tmp_path: Path) -> None:
    """An earlier file of this pid is left alone: it holds what somebody counted."""
    left = tmp_path / f"worker-0-{os.getpid()}-0123456789abcdef"
    left.write_bytes(b"old")
    stores = [in_file(tmp_path) for _ in range(3)]
    for number, store in enumerate(stores):
        one_series(store)
        assert store.number == number
        assert named(store.path, number, os.getpid())
        assert store.path is not None
        header = read_header(store.path.read_bytes())
        assert header is not None
        assert (header.pid, header.number, header.flags) == (os.getpid(), number, 0)
    assert left.read_bytes() == b"old"
    stores[1].close()
    again = in_file(tmp_path)
    one_series(again)
    assert again.number == 1
    for store in (*stores, again):
        store.close()


def test_a_file_is_seen_only_once_it_is_whole_and_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename, seen = Path.rename, []

    def noted(self: Path, target: Path) -> Path:
        seen.append((workers(tmp_path), is_held(self), len(records(self.read_bytes()))))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", noted)
    store = in_file(tmp_path)
    one_series(store)
    assert seen == [([], True, 2)]
    store.close()


def test_close_says_so_lets_go_of_the_file_and_counting_goes_on(tmp_path: Path) -> None:
    store = in_file(tmp_path)
    at = one_series(store)
    (path,) = workers(tmp_path)
    store.close()
    store.close()
    assert not is_held(path)
    header = read_header(path.read_bytes())
    assert header is not None
    assert header.flags == 1
    store.cells[at] += 1.0
    assert store.cells[at] == 1.0


# --- no room, no right, no disk


def test_a_store_at_its_limit_says_so_and_keeps_what_it_has() -> None:
    store = in_memory(limit=1 << 16)
    at = one_series(store)
    with pytest.raises(StoreFull, match="at most 65536 bytes"):
        store.series(0, ("b",), 10_000)
    store.cells[at] = 2.0
    assert [r.cells for r in read_records(store.read()) if r.kind == SERIES] == [(2.0,)]


def test_a_file_grows_by_reserved_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cell handed out lies on bytes that the file system has committed to."""
    reserved = [0]
    fill = module._fill

    def noted(file: int, start: int, size: int) -> None:
        assert start <= reserved[0], "a hole"
        reserved[0] = max(reserved[0], start + size)
        fill(file, start, size)

    monkeypatch.setattr(module, "_fill", noted)
    store = in_file(tmp_path)
    family = store.family({})
    for number in range(300):
        at = store.series(family, (str(number),), 64)
        assert (at + 64) * 8 <= reserved[0]
    assert store.path is not None
    assert store.path.stat().st_blocks * 512 >= len(store.read())
    store.close()


def test_a_disk_that_fills_up_later_gives_no_new_cells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = in_file(tmp_path)
    at = one_series(store)
    monkeypatch.setattr(module, "_fill", full_disk)
    with pytest.raises(StoreFull, match="No space left"):
        store.series(0, ("b",), 10_000)
    store.cells[at] += 1.0
    assert store.path is not None
    (first, *_) = [r for r in read_records(store.path.read_bytes()) if r.kind == SERIES]
    assert first.cells == (1.0,)
    store.close()


def full_disk(file: int, start: int, size: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_without_fallocate_the_bytes_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "posix_fallocate")
    store = in_file(tmp_path)
    one_series(store)
    assert store.path is not None
    assert store.path.stat().st_blocks * 512 >= 1 << 16
    store.close()


def is_a_file(folder: Path) -> Path:
    path = folder / "taken"
    path.touch()
    return path


def is_missing(folder: Path) -> Path:
    return folder / "missing"


def is_refused(folder: Path) -> Path:
    raise PermissionError(f"{folder} is not a directory of ours")


@pytest.mark.parametrize(
    "place",
    [is_a_file, is_missing, is_refused],
    ids=lambda place: place.__name__.replace("_", " "),
)
def test_a_place_that_cannot_be_written_means_private_memory_and_one_complaint(
    place: Callable[[Path], Path], tmp_path: Path
) -> None:
    complaints = Complaints()
    store = Store(lambda: place(tmp_path), complaints)
    at = one_series(store)
    store.cells[at] += 1.0
    assert store.path is None
    assert [site for site, _ in complaints.seen] == [
        "metrics file (numbers are kept in private memory)"
    ]
    assert isinstance(complaints.seen[0][1], OSError)
    assert [r.cells for r in read_records(store.read()) if r.kind == SERIES] == [(1.0,)]


def test_a_disk_that_is_full_from_the_start_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_fill", full_disk)
    complaints = Complaints()
    store = Store(lambda: tmp_path, complaints)
    one_series(store)
    assert len(complaints.seen) == 1
    assert store.path is None
    assert [path.name for path in tmp_path.iterdir()] == ["seats"]


def test_a_complaint_may_itself_count() -> None:
    """Who hears of the failure counts it in this very store: that must neither start over nor
    spoil the records.
    """
    heard: list[str] = []

    def complain(site: str, error: BaseException | None) -> None:
        heard.append(site)
        if len(heard) < 20:  # would be endless
            store.series(store.family({"name": "errors"}), (site,), 1)

    def nowhere() -> Path:
        raise PermissionError("no")

    store = Store(nowhere, complain)
    at = one_series(store)
    store.cells[at] = 3.0
    assert len(heard) == 1
    series = {tuple(r.key[1:]): r.cells for r in records(store.read()) if r.kind == SERIES}
    assert series[("a",)] == (3.0,)
    assert len(series) == 2


def records(data: bytes) -> list[Any]:
    return list(read_records(data))


APP = textwrap.dedent(
    """
    import json, sys
    from opsguard import OpsGuard
    from opsguard.testing import Request, call_wsgi
    from opsguard_wsgi import install

    def app(environ, start_response):
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [b"served"]

    base, log = sys.argv[1:3]
    ops = OpsGuard("full", metrics={"directory": base}, logging={"file": log})
    app = install(app, ops, endpoint=lambda environ: environ["PATH_INFO"])
    answers = [call_wsgi(app, Request(f"/{number}")) for number in range(400)]
    assert {answer.body for answer in answers} == {b"served"}
    scraped = call_wsgi(app, Request("/metrics"))
    assert scraped.status == 200, scraped
    scrape = scraped.body.decode()
    internal = [line for line in scrape.splitlines() if line.startswith("opsguard_internal")]
    ops.runtime().sink.flush()
    print(json.dumps([scrape.count("http_requests_total{"), internal]))
    """
)


@dataclass
class Ran:
    """What became of 400 requests: routes in the scrape, our own faults in it, lines in the log."""

    counted: int
    faults: list[str]
    completed: int
    errors: list[str]


def run_app(base: Path, log: Path) -> Ran:
    done = subprocess.run(
        [sys.executable, "-c", APP, str(base), str(log)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, (done.returncode, done.stderr)
    counted, faults = json.loads(done.stdout)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    completed = len([line for line in lines if line["message"] == "request_completed"])
    errors = [line["message"] for line in lines if line["level"] == "ERROR"]
    return Ran(counted, faults, completed, errors)


def test_an_app_serves_and_counts_when_its_metrics_folder_is_unwritable(tmp_path: Path) -> None:
    """Numbers are in private memory, one error says so, and it is counted once."""
    ran = run_app(is_a_file(tmp_path) / "below", tmp_path / "log")
    assert (ran.counted, ran.completed) == (400, 400)
    assert [line.rpartition(" ")[2] for line in ran.faults] == ["1.0"]
    assert len(ran.errors) == 1
    assert "private memory" in ran.errors[0]


@contextmanager
def small_disk(at: Path, size: str) -> Iterator[Path]:
    at.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(at)],
        capture_output=True,
        check=False,
    )
    if done.returncode:
        pytest.skip("may not mount a small disk here")
    try:
        yield at
    finally:
        subprocess.run(["umount", "-l", str(at)], check=True)


@pytest.mark.skipif(not shutil.which("mount"), reason="needs mount")
@pytest.mark.parametrize("size", ["32k", "128k"], ids=["full from the start", "full later"])
def test_a_full_disk_never_kills_the_app(size: str, tmp_path: Path) -> None:
    """No SIGBUS: what has no room is kept in private memory, or counted as overflow."""
    with small_disk(tmp_path / "disk", size) as disk:
        ran = run_app(disk, tmp_path / "log")
    assert ran.completed == 400
    if size == "32k":
        assert ran.counted == 400
        assert len(ran.faults) == len(ran.errors) == 1
    else:
        assert 0 < ran.counted < 400
        assert ran.errors == []


# --- over a fork


def in_child(work: Callable[[], object]) -> Any:
    """What `work` returns in a forked child."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.write(writing, repr(work()).encode())
            code = 0
        except BaseException as error:
            os.write(writing, repr(error).encode())
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read()
    _, status = os.waitpid(pid, 0)
    assert status == 0, said
    return ast.literal_eval(said.decode())


@FORKS
@pytest.mark.parametrize("place", ["memory", "file"])
def test_a_child_starts_at_zero_under_the_same_index(place: str, tmp_path: Path) -> None:
    store = in_memory() if place == "memory" else in_file(tmp_path)
    at = one_series(store, 2)
    store.cells[at] = 5.0
    store.cells[store.spare] = 5.0

    def child() -> object:
        before = store.cells[at], store.cells[store.spare]
        store.cells[at] += 1.0
        later = store.series(0, ("b",), 1)
        store.cells[later] = 7.0
        own = records(store.read() if store.path is None else store.path.read_bytes())
        series = [(r.key, r.cells) for r in own if r.kind == SERIES]
        return before, series, None if store.path is None else store.path.name, os.getpid()

    before, series, name, pid = in_child(child)
    assert before == (0.0, 0.0)
    assert series == [([0, "a"], (1.0, 0.0)), ([0, "b"], (7.0,))]
    assert (name is None) == (place == "memory")
    assert name is None or named(Path(name), 1, pid)
    assert store.cells[at] == 5.0
    mine = records(store.read() if store.path is None else store.path.read_bytes())
    assert [r.cells for r in mine if r.kind == SERIES] == [(5.0, 0.0)]
    store.close()


@FORKS
@pytest.mark.parametrize("place", ["memory", "file"])
def test_a_child_drops_and_revives_what_it_has_from_its_parent(place: str, tmp_path: Path) -> None:
    store = in_memory() if place == "memory" else in_file(tmp_path)
    family = store.family({})
    firsts = [store.series(family, (label,), 2) for label in ("a", "bb" * 9, "c")]

    def child() -> object:
        later = store.series(family, ("d",), 1)
        seen = []
        for step, which in ((store.drop, [*firsts[1:], later]), (store.revive, firsts[2:])):
            step(which)
            seen.append([r.key for r in records(store.read()) if r.kind == SERIES])
        return seen

    kept = [0, "a"]
    assert in_child(child) == [[kept], [kept, [0, "c"]]]
    assert len([r for r in records(store.read()) if r.kind == SERIES]) == 3
    store.close()


@FORKS
def test_a_child_of_a_store_that_was_never_used_opens_its_own_later(tmp_path: Path) -> None:
    store = in_file(tmp_path)

    def child() -> object:
        one_series(store)
        return named(store.path, 0, os.getpid())

    assert in_child(child) is True
    assert store.path is None


@FORKS
def test_a_fork_while_another_thread_holds_the_lock_does_not_deadlock(tmp_path: Path) -> None:
    store = in_file(tmp_path, gil=False)
    at = one_series(store)
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with store.lock:
            held.set()
            done.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(30)

    def child() -> object:
        with store.exclusive:
            store.cells[at] += 1.0
        return store.series(0, ("b",), 1) > at

    try:
        assert in_child(child) is True
    finally:
        done.set()
        thread.join()
        store.close()


@FORKS
def test_a_child_that_gets_no_file_counts_in_private_memory_and_leaves_the_parents_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def complain(site: str, error: BaseException | None) -> None:
        complaints.append(site)
        store.series(store.family({"name": "errors"}), (site,), 1)  # as OpsGuard counts it

    complaints: list[str] = []
    store = Store(lambda: tmp_path, complain)
    at = one_series(store)
    store.cells[at] = 5.0
    assert store.path is not None
    before = store.path.read_bytes()
    monkeypatch.setattr(module, "_fill", full_disk)

    def child() -> object:
        first = store.cells[at]
        store.cells[at] += 1.0
        own = {tuple(r.key): r.cells for r in records(store.read()) if r.kind == SERIES}
        return first, own[(0, "a")], len(own), store.path, len(complaints)

    assert in_child(child) == (0.0, (1.0,), 2, None, 1)
    assert store.path.read_bytes() == before
    store.close()


@FORKS
def test_a_child_whose_disk_holds_less_than_the_parents_counts_in_private_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    complaints = Complaints()
    store = Store(lambda: tmp_path, complaints)
    store.family({})
    at = [store.series(0, (str(number),), 1_000) for number in range(20)][-1]
    fill = module._fill

    def little_room(file: int, start: int, size: int) -> None:
        if start:
            full_disk(file, start, size)
        fill(file, start, size)

    monkeypatch.setattr(module, "_fill", little_room)

    def child() -> object:
        store.cells[at] += 1.0
        own = [r for r in records(store.read()) if r.kind == SERIES]
        return len(complaints.seen), len(own), own[-1].cells[0], store.path

    assert in_child(child) == (1, 20, 1.0, None)
    store.close()


@FORKS
def test_the_parents_lock_ends_with_the_parent_though_its_child_lives(tmp_path: Path) -> None:
    """Else a dead run would look alive for as long as any grandchild of it."""
    code = textwrap.dedent(
        """
        import os, sys, time
        from pathlib import Path
        from opsguard.metrics.store import Store
        store = Store(lambda: Path(sys.argv[1]), print)
        store.series(store.family({}), ("a",), 1)
        if os.fork() == 0:
            print(os.getppid(), os.getpid(), flush=True)
            time.sleep(60)
        os.wait()
        """
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    parent, child = map(int, process.stdout.readline().split())
    try:
        of_parent, of_child = workers(tmp_path)
        assert named(of_parent, 0, parent)
        assert named(of_child, 1, child)
        assert is_held(of_parent)
        os.kill(parent, signal.SIGKILL)
        process.wait(10)
        assert not is_held(of_parent)
        assert is_held(of_child)
    finally:
        os.kill(child, signal.SIGKILL)
        process.stdout.close()


def is_held(path: Path) -> bool:
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_kill_9_leaves_every_increment_in_a_readable_file(tmp_path: Path) -> None:
    code = textwrap.dedent(
        """
        import sys, time
        from pathlib import Path
        from opsguard.metrics.store import Store
        store = Store(lambda: Path(sys.argv[1]), print)
        at = store.series(store.family({"name": "n"}), ("a",), 1)
        for _ in range(1000):
            store.cells[at] += 1.0
        print(store.path, flush=True)
        time.sleep(60)
        """
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    path = Path(process.stdout.readline().strip())
    process.kill()
    process.wait(10)
    process.stdout.close()
    assert [r.cells for r in records(path.read_bytes()) if r.kind == SERIES] == [(1000.0,)]


def test_a_spawned_process_has_a_file_of_its_own(tmp_path: Path) -> None:
    store = in_file(tmp_path)
    one_series(store)
    process = multiprocessing.get_context("spawn").Process(target=_spawned, args=(str(tmp_path),))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    mine, theirs = workers(tmp_path)
    assert named(mine, 0, os.getpid())
    assert named(theirs, 1, process.pid or 0)
    store.close()


def _spawned(folder: str) -> None:
    one_series(in_file(Path(folder)))


# --- reading what others wrote


def sound() -> bytes:
    store = in_memory()
    family = store.family({"name": "n"})
    store.cells[store.series(family, ("a",), 2)] = 1.0
    return store.read()


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"OPSGUARD", id="less than a header"),
        pytest.param(b"X" + sound()[1:], id="another magic"),
        pytest.param(sound()[:8] + b"\1\0\0\0" + sound()[12:], id="another version"),
        pytest.param(sound()[:12] + b"\0\0\0\0" + sound()[16:], id="another header size"),
    ],
)
def test_a_file_that_is_not_ours_has_no_records(data: bytes) -> None:
    assert records(data) == []


def test_a_file_cut_short_gives_the_records_before_the_cut() -> None:
    data = sound()
    whole = records(data)
    assert len(whole) == 4
    assert records(data[:-1]) == whole[:3]
    assert records(data[: len(data) - 64]) == whole[:2]


@pytest.mark.parametrize(
    ("offset", "value"),
    [
        pytest.param(0, 7, id="total size"),
        pytest.param(4, 3, id="key size"),
        pytest.param(8, 1 << 30, id="number of cells"),
    ],
)
def test_reading_stops_at_a_record_that_is_not_sane(offset: int, value: int) -> None:
    data = bytearray(sound())
    data[64 + offset : 68 + offset] = value.to_bytes(4, sys.byteorder)
    assert records(bytes(data)) == []


@pytest.mark.parametrize("key", [b"\xff\xff\xff\xff", b"[[[[", b"nul\0"], ids=repr)
def test_reading_stops_at_a_key_that_is_not_json(key: bytes) -> None:
    data = bytearray(sound())
    data[80:84] = key
    assert records(bytes(data)) == []


def test_a_record_is_invisible_until_it_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader in the middle of an append sees what was there before."""
    store = in_memory()
    one_series(store)
    seen: list[int] = []
    publish = store._publish

    def late(used: int) -> None:
        seen.append(len(records(store.read())))
        publish(used)

    monkeypatch.setattr(store, "_publish", late)
    store.series(0, ("b",), 1)
    assert seen == [4]
    assert len(records(store.read())) == 5
