"""What the process itself uses: CPU, memory, threads, files, garbage collection. Where several
workers live, each of them, told apart by the label `worker`, and all of them together (`service`).

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
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.gc_collector import GCCollector
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector as ProcCollector

from opsguard.metrics.procfs import status
from opsguard.metrics.service import ServiceTotals

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
    wall: float
    cpu: float
    percent: float


class ProcessCollector:
    """A collector of this process's own numbers, or of those of all workers.

    Thread-safe, and right in a forked child, where the CPU share begins anew. Starts
    nothing: files are opened while :meth:`collect` runs and closed before it returns. What
    the platform does not tell is absent; nothing is raised. Families by platform:

    - Linux: all of them, from `/proc`;
    - elsewhere with psutil: all of them, `process_open_fds` and `process_max_fds` only on Unix;
    - elsewhere without: CPU seconds and share, `process_max_fds` (Unix), the interpreter's.

    `process_cpu_percent` is 0 at the first scrape of a process, and after that the share
    since the last scrape that lies at least a second back.

    On Linux, once `workers` has named several, the families `process_*` have a sample for each
    living worker, with the label `worker`, and the totals of :class:`ServiceTotals` are there.
    The interpreter's own families are always those of this process.

    :param clock: monotonic seconds.
    :param cpu_clock: seconds of user and system CPU time of this process.
    :param proc: where the proc file system is mounted.
    :param workers: (number, pid) of each living worker, this one among them.
    :param manager: the pid of the process that starts the workers, None if nobody does.
    """

    def __init__(
        self,
        *,
        clock: Callable[[], float] = time.monotonic,
        cpu_clock: Callable[[], float] = time.process_time,
        proc: str = "/proc",
        workers: Callable[[], Sequence[tuple[int, int]]] = tuple,
        manager: Callable[[], int | None] = lambda: None,
    ) -> None:
        self._clock = clock
        self._cpu_clock = cpu_clock
        self._proc = proc
        self._workers = workers
        self._manager = manager
        self._several = False
        self._totals = ServiceTotals(proc)
        # By pid and start. Replaced as a whole, never changed: no lock for a fork to leave held.
        self._readings: dict[tuple[int, int], _Reading] = {}

    def collect(self) -> Iterable[Metric]:
        workers = self._living()
        families = self._of_all(workers) if workers else self._of_this()
        families |= _by_name(lambda: GCCollector(CollectorRegistry()).collect())
        families |= _by_name(lambda: PlatformCollector(registry=None).collect())
        return list(families.values())

    def _living(self) -> list[tuple[int, int]]:
        """The workers, where there are several. Labels that came do not go: the last one left keeps
        its own.
        """
        try:
            workers = sorted(self._workers())
        except Exception:
            return []
        self._several = self._several or len(workers) > 1
        return workers if self._several and status(self._proc, os.getpid()) else []

    def _of_this(self) -> dict[str, Metric]:
        families = _by_name(lambda: self._from_proc("self"))
        if "process_resident_memory_bytes" not in families:
            families |= _by_name(_from_psutil)
        families = _by_name(_from_resource) | families
        seconds = self._cpu_clock()
        (percent,) = self._shares({(os.getpid(), 0): seconds})
        return _with_share(families | _by_name(lambda: [_counter(seconds)]), percent)

    def _of_all(self, workers: list[tuple[int, int]]) -> dict[str, Metric]:
        found = {pid: now for _, pid in workers if (now := status(self._proc, pid)) is not None}
        # The kernel's count for all: ours is finer, and one that changes its source may go back.
        shares = self._shares({(pid, now.started): now.cpu for pid, now in found.items()})
        percents = dict(zip(found, shares, strict=True))
        families: dict[str, Metric] = {}
        for number, pid in workers:
            if pid not in found:
                continue
            own = _with_share(_by_name(partial(self._from_proc, pid)), percents[pid])
            for name, family in own.items():
                joined = families.setdefault(name, Metric(name, _HELP[name], family.type))
                for sample in family.samples:
                    joined.add_sample(sample.name, {"worker": str(number)}, sample.value)
        return families | _by_name(lambda: self._totals.collect(list(found), self._manager()))

    def _shares(self, seconds: dict[tuple[int, int], float]) -> list[float]:
        """The CPU share of each process (pid, start) by what it has used so far."""
        now, before = self._clock(), self._readings
        readings = {}
        for key, cpu in seconds.items():
            last = before.get(key)
            percent = 0.0
            if last is not None and now - last.wall < _SHORTEST:
                readings[key] = last
                continue
            if last is not None:
                percent = max(0.0, 100 * (cpu - last.cpu) / (now - last.wall))
            readings[key] = _Reading(now, cpu, percent)
        self._readings = readings
        return [reading.percent for reading in readings.values()]

    def _from_proc(self, pid: int | str) -> Iterator[Metric]:
        yield from ProcCollector(proc=self._proc, pid=lambda: pid, registry=None).collect()
        now = status(self._proc, pid)
        if now is not None:
            yield _gauge("process_threads", now.threads)


def _with_share(families: dict[str, Metric], percent: float) -> dict[str, Metric]:
    """The families with those that follow from others."""
    share = _gauge("process_cpu_percent", percent)
    families[share.name] = share
    if resident := families.get("process_resident_memory_bytes"):
        alias = _gauge("process_memory_bytes", resident.samples[0].value)
        families[alias.name] = alias
    return families


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


def _counter(seconds: float) -> Metric:
    name = "process_cpu_seconds"
    return CounterMetricFamily(name, _HELP[name], value=seconds)
