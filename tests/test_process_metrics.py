"""The process's own numbers: right units, on any platform, never an exception."""

from __future__ import annotations

import gc
import importlib
import os
import platform
import shutil
import subprocess
import sys
import textwrap
import threading
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from opsguard.metrics.process import ProcessCollector

LINUX = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's /proc")

GENERATION = "{generation=0}"
PORTABLE = {
    "process_cpu_seconds_total",
    "process_cpu_percent",
    f"python_gc_objects_collected_total{GENERATION}",
    f"python_gc_objects_uncollectable_total{GENERATION}",
    f"python_gc_collections_total{GENERATION}",
}
MEMORY = {
    "process_resident_memory_bytes",
    "process_virtual_memory_bytes",
    "process_memory_bytes",
}
ALL = (
    PORTABLE
    | MEMORY
    | {
        "process_start_time_seconds",
        "process_open_fds",
        "process_max_fds",
        "process_threads",
    }
)


class Clock:
    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def numbers(collector: ProcessCollector) -> dict[str, float]:
    """Return sample values by name; generations other than 0 and python_info left aside."""
    return {
        sample.name + (GENERATION if sample.labels else ""): sample.value
        for family in collector.collect()
        for sample in family.samples
        if family.name != "python_info" and sample.labels.get("generation", "0") == "0"
    }


def elsewhere(tmp_path: Path, **settings: Any) -> ProcessCollector:
    """Return a collector on a machine without /proc."""
    return ProcessCollector(proc=str(tmp_path), **settings)


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let the modules named be absent, or be replaced."""

    def absent(**modules: types.SimpleNamespace | None) -> None:
        real = importlib.import_module

        def find(name: str, package: str | None = None) -> Any:
            if name in modules:
                if (module := modules[name]) is None:
                    raise ModuleNotFoundError(name)
                return module
            return real(name, package)

        monkeypatch.setattr(importlib, "import_module", find)

    return absent


@LINUX
def test_linux_tells_everything() -> None:
    """On Linux every family is there without psutil, in seconds, bytes and numbers."""
    values = numbers(ProcessCollector())
    files = len(list(Path("/proc/self/fd").iterdir()))
    threads = len(list(Path("/proc/self/task").iterdir()))
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    resident = int(status["VmRSS"].split()[0]) * 1024
    assert values.keys() == ALL
    assert values["process_resident_memory_bytes"] == pytest.approx(resident, rel=0.2)
    assert values["process_memory_bytes"] == values["process_resident_memory_bytes"]
    assert values["process_virtual_memory_bytes"] >= values["process_resident_memory_bytes"]
    assert values["process_open_fds"] == pytest.approx(files, abs=2)
    assert values["process_max_fds"] >= values["process_open_fds"]
    assert values["process_threads"] == pytest.approx(threads, abs=2)
    # Started before now; /proc counts from the boot in ticks, so it may be off by a second.
    assert -2 < time.time() - values["process_start_time_seconds"] < 86_400


@LINUX
def test_linux_and_psutil_agree() -> None:
    """The same numbers read by another library are the same."""
    psutil = pytest.importorskip("psutil")
    values, process = numbers(ProcessCollector()), psutil.Process()
    assert values["process_start_time_seconds"] == pytest.approx(process.create_time(), abs=1)
    assert values["process_virtual_memory_bytes"] == pytest.approx(
        process.memory_info().vms, rel=0.2
    )


def test_python_info_names_the_interpreter() -> None:
    """One gauge of value 1 carries the version in its labels."""
    (info,) = (f for f in ProcessCollector().collect() if f.name == "python_info")
    (sample,) = info.samples
    major, minor, patchlevel = platform.python_version_tuple()
    assert sample.value == 1
    assert sample.labels == {
        "version": platform.python_version(),
        "implementation": platform.python_implementation(),
        "major": major,
        "minor": minor,
        "patchlevel": patchlevel,
    }


@pytest.mark.skipif(not hasattr(gc, "get_stats"), reason="no statistics of this collector")
def test_garbage_collections_are_counted() -> None:
    """A collection is seen at the next scrape, and no gc callback is installed for it."""
    callbacks = list(gc.callbacks)
    collector = ProcessCollector()
    name = f"python_gc_collections_total{GENERATION}"
    before = numbers(collector)[name]
    gc.collect(0)
    assert numbers(collector)[name] > before
    assert gc.callbacks == callbacks


# --- the CPU share


@pytest.mark.parametrize(
    ("readings", "shares"),
    [
        pytest.param([(100, 7)], [0], id="first-is-0"),
        pytest.param([(100, 7), (110, 9.5)], [0, 25], id="a-quarter-of-a-core"),
        pytest.param([(0, 0), (10, 40)], [0, 400], id="four-cores"),
        pytest.param([(0, 0), (10, 5), (20, 5), (30, 15)], [0, 50, 0, 100], id="since-the-last"),
        pytest.param(
            [(0, 0), (10, 5), (10.9, 5.9), (12, 6)], [0, 50, 50, 50], id="too-soon-repeats"
        ),
        pytest.param([(0, 0), (0.5, 0.5)], [0, 0], id="too-soon-after-the-first"),
        pytest.param([(0, 9), (10, 3)], [0, 0], id="cpu-clock-went-back"),
        pytest.param([(50, 1), (10, 3), (60, 6)], [0, 0, 50], id="clock-went-back"),
    ],
)
def test_cpu_percent(readings: list[tuple[float, float]], shares: list[float]) -> None:
    """CPU seconds over wall seconds since the last scrape a second back; 0 at first."""
    wall, cpu = Clock(), Clock()
    collector = ProcessCollector(clock=wall, cpu_clock=cpu)
    seen = []
    for wall.now, cpu.now in readings:
        values = numbers(collector)
        assert values["process_cpu_seconds_total"] == cpu.now
        seen.append(values["process_cpu_percent"])
    assert seen == pytest.approx(shares)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
def test_cpu_percent_begins_anew_after_a_fork() -> None:
    """A child's first scrape gives 0: the parent's last reading is not its own."""
    script = """
        import os
        from opsguard.metrics.process import ProcessCollector
        now = [0.0]
        collector = ProcessCollector(clock=lambda: now[0], cpu_clock=lambda: now[0] / 2)
        def share():
            return [s.value for f in collector.collect() for s in f.samples
                    if s.name == "process_cpu_percent"][0]
        shares = [share()]
        for now[0] in (10.0, 20.0):
            shares.append(share())
        child = os.fork()
        if child == 0:
            now[0] = 30.0
            print(shares, share(), flush=True)
            os._exit(0)
        os._exit(os.waitpid(child, 0)[1])
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert (done.stdout, done.returncode) == ("[0.0, 50.0, 50.0] 0.0\n", 0), done.stderr


# --- other platforms


class FakeProcess:
    """psutil's Process, as far as it is asked."""

    def __init__(self, files: int | None = 12) -> None:
        self._files = files

    def oneshot(self) -> threading.Lock:
        return threading.Lock()

    def memory_info(self) -> types.SimpleNamespace:
        return types.SimpleNamespace(rss=2_000_000, vms=9_000_000)

    def create_time(self) -> float:
        return 1_700_000_000.5

    def num_threads(self) -> int:
        return 3

    def num_fds(self) -> int:
        if self._files is None:
            raise AttributeError("num_fds")
        return self._files


RESOURCE = types.SimpleNamespace(
    RLIMIT_NOFILE=7, RLIM_INFINITY=-1, getrlimit=lambda which: (256, 4096)
)
UNLIMITED = types.SimpleNamespace(
    RLIMIT_NOFILE=7, RLIM_INFINITY=-1, getrlimit=lambda which: (-1, -1)
)


@pytest.mark.parametrize(
    ("modules", "names"),
    [
        pytest.param(
            {"psutil": types.SimpleNamespace(Process=FakeProcess), "resource": RESOURCE},
            ALL,
            id="macos-with-psutil",
        ),
        pytest.param(
            {"psutil": None, "resource": RESOURCE}, PORTABLE | {"process_max_fds"}, id="macos"
        ),
        pytest.param(
            {
                "psutil": types.SimpleNamespace(Process=lambda: FakeProcess(files=None)),
                "resource": None,
            },
            ALL - {"process_open_fds", "process_max_fds"},
            id="windows-with-psutil",
        ),
        pytest.param({"psutil": None, "resource": None}, PORTABLE, id="windows"),
        pytest.param(
            {"psutil": types.SimpleNamespace(), "resource": types.SimpleNamespace()},
            PORTABLE,
            id="nothing-works",
        ),
    ],
)
def test_families_by_platform(
    modules: dict[str, types.SimpleNamespace | None],
    names: set[str],
    tmp_path: Path,
    without: Callable[..., None],
) -> None:
    """What a platform cannot tell is absent; nothing is raised."""
    without(**modules)
    assert numbers(elsewhere(tmp_path)).keys() == names


def test_units_elsewhere(tmp_path: Path, without: Callable[..., None]) -> None:
    """psutil's and resource's numbers come out in the same units as Linux's."""
    without(psutil=types.SimpleNamespace(Process=FakeProcess), resource=RESOURCE)
    values = numbers(elsewhere(tmp_path, cpu_clock=Clock(1.25)))
    assert values.items() >= {
        ("process_cpu_seconds_total", 1.25),
        ("process_resident_memory_bytes", 2_000_000),
        ("process_memory_bytes", 2_000_000),
        ("process_virtual_memory_bytes", 9_000_000),
        ("process_start_time_seconds", 1_700_000_000.5),
        ("process_threads", 3),
        ("process_open_fds", 12),
        ("process_max_fds", 256),
    }


def test_no_limit_is_infinity(tmp_path: Path, without: Callable[..., None]) -> None:
    """RLIM_INFINITY, a different number on each system, is +Inf."""
    without(psutil=None, resource=UNLIMITED)
    assert numbers(elsewhere(tmp_path))["process_max_fds"] == float("inf")


def test_a_real_psutil_does(tmp_path: Path) -> None:
    """With the extra `system` a machine without /proc tells its memory."""
    pytest.importorskip("psutil")
    assert numbers(elsewhere(tmp_path)).keys() >= MEMORY | {"process_threads"}


@pytest.mark.skipif(sys.platform == "win32", reason="a Unix proc file system")
def test_a_broken_proc_is_no_exception(tmp_path: Path, without: Callable[..., None]) -> None:
    """A /proc that lies or lacks files (a sandbox) costs the families it should tell."""
    without(psutil=None, resource=RESOURCE)
    (tmp_path / "stat").write_text("cpu 1\nbtime 1700000000\n")
    process = tmp_path / "self"
    process.mkdir()
    (process / "stat").write_text("1 (a) b) S 1 2")
    (process / "limits").write_text("Max open files  unlimited  unlimited  files\n")
    assert numbers(elsewhere(tmp_path)).keys() == PORTABLE | {"process_max_fds"}
    shutil.rmtree(process)
    assert numbers(elsewhere(tmp_path)).keys() == PORTABLE | {"process_max_fds"}


def test_a_name_with_parentheses_is_read_past(tmp_path: Path, without: Callable[..., None]) -> None:
    """The process name in /proc/self/stat may look like the fields after it."""
    without(psutil=None, resource=None)
    (tmp_path / "self").mkdir()
    fields = " ".join(str(number) for number in range(4, 53))
    (tmp_path / "self" / "stat").write_text(f"1 (a) S 9 (b)) S {fields}\n")
    assert numbers(elsewhere(tmp_path))["process_threads"] == 20  # field 20 of proc(5)


def test_construction_reads_nothing() -> None:
    """A constructor reads no clock and no file; that is left to the first scrape."""

    def never() -> float:
        raise AssertionError("read at construction")

    ProcessCollector(clock=never, cpu_clock=never, proc="\0")


def test_16_threads_may_collect_at_once() -> None:
    """Concurrent scrapes see sane shares and no exception."""
    wall = Clock()
    collector = ProcessCollector(clock=wall, cpu_clock=lambda: wall.now / 2)
    shares: list[float] = []
    together = threading.Barrier(16)

    def work() -> None:
        together.wait(10)
        for _ in range(10):
            wall.now += 1
            shares.append(numbers(collector)["process_cpu_percent"])

    threads = [threading.Thread(target=work) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(shares) == 160
    assert all(share >= 0 for share in shares)
