"""Process metrics of several workers: each by its number, and the service in all."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from opsguard.metrics.exposition import Exposition
from opsguard.metrics.process import ProcessCollector
from opsguard.metrics.procfs import family_tree, open_files, status

pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's /proc")

# A manager with two workers. A line "burn N" lets worker N use 0.2 s of CPU, "drop N" ends it,
# "wait N" waits for it, "kill N" does both; each is answered once it is done. Worker N has N
# threads and files more than a bare one.
MANAGER = """
    import os, signal, sys, threading, time

    def worker(number, read, write):
        held = [os.dup(0) for _ in range(number)]
        for _ in range(number):
            threading.Thread(target=threading.Event().wait, daemon=True).start()
        os.write(write, b"+")
        while os.read(read, 1):
            until = time.process_time() + 0.2
            while time.process_time() < until:
                pass
            os.write(write, b"+")
        os._exit(0)

    pipes, pids = [], []
    for number in (0, 1):
        down, up = os.pipe(), os.pipe()
        pid = os.fork()
        if pid == 0:
            worker(number, down[0], up[1])
        os.read(up[0], 1)
        pipes.append((down[1], up[0]))
        pids.append(pid)
    print(*pids, flush=True)
    for line in sys.stdin:
        order, number = line.split()
        number = int(number)
        if order == "burn":
            os.write(pipes[number][0], b"+")
            os.read(pipes[number][1], 1)
        if order in ("kill", "drop"):
            os.kill(pids[number], signal.SIGKILL)
        if order in ("kill", "wait"):
            os.waitpid(pids[number], 0)
        print(order, flush=True)
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
"""


class Manager:
    """A running manager and what it is told."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(MANAGER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pids = [int(pid) for pid in self.answer().split()]
        self.alive = [0, 1]

    def tell(self, order: str, number: int) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{order} {number}\n")
        self.process.stdin.flush()
        assert self.answer().strip() == order

    def answer(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the manager has ended"
        return line

    def workers(self) -> Sequence[tuple[int, int]]:
        return [(number, self.pids[number]) for number in self.alive]

    def collector(self, **options: Any) -> ProcessCollector:
        return ProcessCollector(workers=self.workers, manager=lambda: self.process.pid, **options)


@pytest.fixture
def manager() -> Iterator[Manager]:
    made = Manager()
    yield made
    made.process.communicate(timeout=30)


def samples(collector: ProcessCollector) -> dict[str, float]:
    return {
        sample.name + "".join(f"|{value}" for value in sample.labels.values()): sample.value
        for family in collector.collect()
        for sample in family.samples
        if not family.name.startswith("python_")
    }


def test_each_worker_has_its_own_numbers(manager: Manager) -> None:
    """The families of one process, for each living worker by its number, read from outside."""
    seen = samples(manager.collector())
    alone = samples(ProcessCollector())
    names = {name for name in seen if not name.startswith("service_")}
    assert names == {f"{name}|{number}" for name in alone for number in (0, 1)}
    assert seen["process_threads|1"] == seen["process_threads|0"] + 1 == 2
    assert seen["process_open_fds|1"] > seen["process_open_fds|0"]
    for number, pid in manager.workers():
        resident = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        assert seen[f"process_resident_memory_bytes|{number}"] == pytest.approx(
            resident * os.sysconf("SC_PAGE_SIZE"), rel=0.2
        )
        assert seen[f"process_memory_bytes|{number}"] > 0
        started = seen[f"process_start_time_seconds|{number}"]
        assert -2 < time.time() - started < 3600


def test_totals_are_those_of_the_whole_tree(manager: Manager) -> None:
    """Manager and workers together; children of theirs as well."""
    seen = samples(manager.collector())
    pids = [manager.process.pid, *manager.pids]
    assert sorted(family_tree("/proc", [manager.process.pid])) == sorted(pids)
    states = [status("/proc", pid) for pid in pids]
    assert seen["service_workers"] == 2
    assert seen["service_threads"] == sum(state.threads for state in states if state) == 4
    assert seen["service_open_fds"] == sum(open_files("/proc", pid) for pid in pids)
    assert seen["service_memory_bytes"] == pytest.approx(
        sum(state.resident for state in states if state), rel=0.2
    )


def test_cpu_of_the_service_goes_on_when_a_worker_dies(manager: Manager) -> None:
    """What a dead worker has used stays in the total: while it is a zombie, and after the wait."""
    collector = manager.collector()
    totals = [samples(collector)["service_cpu_seconds_total"]]
    manager.tell("burn", 0)
    manager.tell("burn", 1)
    totals.append(samples(collector)["service_cpu_seconds_total"])
    assert totals[1] >= totals[0] + 0.35
    manager.alive = [0, 1]
    manager.tell("drop", 1)  # a zombie now
    # Each time by another answering process, which has no memory of what was said before.
    totals.append(samples(manager.collector())["service_cpu_seconds_total"])
    manager.tell("wait", 1)
    totals.append(samples(manager.collector())["service_cpu_seconds_total"])
    manager.tell("burn", 0)
    totals.append(samples(manager.collector())["service_cpu_seconds_total"])
    assert totals == sorted(totals)
    assert totals[-1] >= totals[0] + 0.55


def test_the_last_worker_left_keeps_its_label(manager: Manager) -> None:
    """Once several were seen labels stay, so that no series is another one for a while."""
    collector = manager.collector()
    assert samples(collector)["service_workers"] == 2
    manager.tell("burn", 1)
    before = samples(collector)["service_cpu_seconds_total"]
    manager.tell("kill", 0)
    manager.alive = [1]
    seen = samples(collector)
    assert seen["service_workers"] == 1
    assert seen["service_cpu_seconds_total"] >= before
    assert [name for name in seen if name.startswith("process_threads")] == ["process_threads|1"]


@pytest.mark.parametrize(
    "workers",
    [
        pytest.param(list, id="nobody-known"),
        pytest.param(lambda: [(0, os.getpid())], id="one"),
        pytest.param(lambda: 1 / 0, id="the-list-fails"),
    ],
)
def test_one_worker_alone_is_as_ever(workers: Callable[[], Any]) -> None:
    """No label, no totals."""
    seen = samples(ProcessCollector(workers=workers, manager=os.getppid))
    assert seen.keys() == samples(ProcessCollector()).keys()


def test_a_worker_that_has_just_gone_is_left_out(manager: Manager) -> None:
    """The list may be older than the scrape."""
    manager.tell("kill", 1)
    seen = samples(manager.collector())
    assert [name for name in seen if name.startswith("process_threads")] == ["process_threads|0"]
    assert seen["service_workers"] == 1


def test_without_a_manager_the_workers_are_what_there_is(manager: Manager) -> None:
    """And a manager that has gone costs its part, never the scrape."""
    for boss in (lambda: None, lambda: 2**22 + 1, lambda: 1 / 0):
        seen = samples(ProcessCollector(workers=manager.workers, manager=boss))
        assert "process_threads|1" in seen
    assert samples(ProcessCollector(workers=manager.workers))["service_workers"] == 2


def test_the_cpu_share_of_each_worker(manager: Manager) -> None:
    """By the readings of the answering process, for each process by itself; 0 for a new one."""
    now = [0.0]
    collector = manager.collector(clock=lambda: now[0])
    first = samples(collector)
    assert (first["process_cpu_percent|0"], first["process_cpu_percent|1"]) == (0, 0)
    manager.tell("burn", 1)
    now[0] = 2.0
    second = samples(collector)
    assert second["process_cpu_percent|0"] < 2
    assert second["process_cpu_percent|1"] == pytest.approx(10, abs=3)
    now[0] = 2.5  # within a second: said again
    manager.tell("burn", 0)
    third = samples(collector)
    assert third["process_cpu_percent|1"] == second["process_cpu_percent|1"]
    assert third["process_cpu_percent|0"] == second["process_cpu_percent|0"]


def test_a_reused_pid_begins_anew(tmp_path: Path) -> None:
    """A process is known by pid and start: the next one with the pid has no share of the first."""
    (tmp_path / "stat").write_text("btime 1700000000\n")

    def process(pid: int | str, cpu: int, started: int) -> None:
        (tmp_path / str(pid)).mkdir(exist_ok=True)
        fields = [0] * 50
        fields[11], fields[17], fields[19], fields[20], fields[21] = cpu, 1, started, 1, 1
        text = " ".join(["S", *map(str, fields[1:])])
        (tmp_path / str(pid) / "stat").write_text(f"{pid} (python) {text}\n")

    now = [0.0]
    collector = ProcessCollector(
        proc=str(tmp_path), clock=lambda: now[0], workers=lambda: [(0, 11), (1, 12)]
    )
    process(os.getpid(), 0, 1)
    process(11, 100, 5)
    process(12, 100, 5)
    samples(collector)
    now[0] = 10.0
    process(11, 200, 5)
    process(12, 500, 9)
    seen = samples(collector)
    assert (seen["process_cpu_percent|0"], seen["process_cpu_percent|1"]) == (10, 0)


def test_the_page_of_several_workers_is_sound(manager: Manager) -> None:
    """Both formats, through the exposition; nothing is reported as left out."""
    failed: list[object] = []
    exposition = Exposition(
        [manager.collector()], failures=lambda site, error: failed.append((site, error))
    )
    text = exposition.render("GET", "", "").body.decode()
    assert '# TYPE process_threads gauge\nprocess_threads{worker="0"} 1.0\n' in text
    assert "# TYPE service_cpu_seconds_total counter\n" in text
    assert 'process_cpu_seconds_total{worker="1"}' in text
    assert "service_workers 2.0\n" in text
    form = "application/openmetrics-text"
    assert (
        "# TYPE service_cpu_seconds counter\n" in exposition.render("GET", form, "").body.decode()
    )
    assert failed == []
