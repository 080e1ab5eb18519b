"""What the process itself uses: CPU, memory, threads, files, garbage collection.

`prometheus_client` reads `/proc` and the interpreter; this module puts its collectors
together, adds the few numbers it lacks, and asks psutil (the extra `system`) where there
is no `/proc`. Names and units: https://prometheus.io/docs/instrumenting/writing_clientlibs/
(process metrics); seconds and bytes throughout.
"""

from __future__ import annotations

import importlib
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.gc_collector import GCCollector
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector as ProcCollector

__all__ = ["ProcessCollector"]

_HELP = {
    "process_cpu_seconds": "Total user and system CPU time spent in seconds.",
    "process_virtual_memory_bytes": "Virtual memory size in bytes.",
    "process_resident_memory_bytes": "Resident memory size in bytes.",
    "process_start_time_seconds": "Start time of the process since unix epoch in seconds.",
    "process_open_fds": "Number of open file descriptors.",
    "process_max_fds": "Maximum number of open file descriptors.",
    "process_threads": "Number of threads of the process, as the system counts them.",
    "process_memory_bytes": "Resident memory size in bytes (as process_resident_memory_bytes).",
    "process_cpu_percent": "CPU time per wall time since the last scrape; 100 is one core.",
}

_SHORTEST = 1.0
"""Seconds: a scrape that follows sooner is given the CPU share of the one before."""


class _Reading(NamedTuple):
    pid: int
    wall: float
    cpu: float
    percent: float


class ProcessCollector:
    """A collector of one process's own numbers.

    Thread-safe, and right in a forked child, where the CPU share begins anew. Starts
    nothing: files are opened while :meth:`collect` runs and closed before it returns. What
    the platform does not tell is absent; nothing is raised. Families by platform:

    - Linux: all of them, from `/proc`;
    - elsewhere with psutil: all of them, `process_open_fds` and `process_max_fds` only on Unix;
    - elsewhere without: CPU seconds and share, `process_max_fds` (Unix), the interpreter's.

    `process_cpu_percent` is 0 at the first scrape of a process, and after that the share
    since the last scrape that lies at least a second back.

    :param clock: monotonic seconds.
    :param cpu_clock: seconds of user and system CPU time of this process.
    :param proc: where the proc file system is mounted.
    """

    def __init__(
        self,
        *,
        clock: Callable[[], float] = time.monotonic,
        cpu_clock: Callable[[], float] = time.process_time,
        proc: str = "/proc",
    ) -> None:
        self._clock = clock
        self._cpu_clock = cpu_clock
        self._proc = proc
        # Replaced as a whole, never changed: no lock that a fork could leave held.
        self._last: _Reading | None = None

    def collect(self) -> Iterable[Metric]:
        families = _by_name(self._from_proc)
        if "process_resident_memory_bytes" not in families:
            families |= _by_name(_from_psutil)
        families = _by_name(_from_resource) | families | _by_name(self._from_clocks)
        if resident := families.get("process_resident_memory_bytes"):
            alias = _gauge("process_memory_bytes", resident.samples[0].value)
            families[alias.name] = alias
        families |= _by_name(lambda: GCCollector(CollectorRegistry()).collect())
        families |= _by_name(lambda: PlatformCollector(registry=None).collect())
        return list(families.values())

    def _from_clocks(self) -> Iterator[Metric]:
        seconds = self._cpu_clock()
        yield _counter("process_cpu_seconds", seconds)
        yield _gauge("process_cpu_percent", self._share(seconds))

    def _share(self, cpu: float) -> float:
        pid, wall, last = os.getpid(), self._clock(), self._last
        if last is None or last.pid != pid:
            percent = 0.0
        elif wall - last.wall < _SHORTEST:
            return last.percent
        else:
            percent = max(0.0, 100 * (cpu - last.cpu) / (wall - last.wall))
        self._last = _Reading(pid, wall, cpu, percent)
        return percent

    def _from_proc(self) -> Iterator[Metric]:
        yield from ProcCollector(proc=self._proc, registry=None).collect()
        # The name in parentheses may hold anything; field 20 of proc(5) is the 18th after it.
        status = Path(self._proc, "self", "stat").read_bytes().rpartition(b")")[2].split()
        yield _gauge("process_threads", int(status[17]))


def _from_psutil() -> Iterator[Metric]:
    psutil: Any = importlib.import_module("psutil")
    process = psutil.Process()
    with process.oneshot():
        memory = process.memory_info()
        yield _gauge("process_resident_memory_bytes", memory.rss)
        yield _gauge("process_virtual_memory_bytes", memory.vms)
        yield _gauge("process_start_time_seconds", process.create_time())
        yield _gauge("process_threads", process.num_threads())
        yield _gauge("process_open_fds", process.num_fds())


def _from_resource() -> Iterator[Metric]:
    # ru_maxrss is the peak, not what is resident now: better absent than wrong.
    resource: Any = importlib.import_module("resource")
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    yield _gauge("process_max_fds", math.inf if limit == resource.RLIM_INFINITY else limit)


def _by_name(read: Callable[[], Iterable[Metric]]) -> dict[str, Metric]:
    """Return what a reader tells before it fails: what a platform lacks is no failure."""
    families: dict[str, Metric] = {}
    try:
        for family in read():
            families[family.name] = family
    except Exception:
        return families
    return families


def _gauge(name: str, value: float) -> Metric:
    return GaugeMetricFamily(name, _HELP[name], value=value)


def _counter(name: str, value: float) -> Metric:
    return CounterMetricFamily(name, _HELP[name], value=value)
