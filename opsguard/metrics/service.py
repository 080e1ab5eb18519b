"""What a service of several workers uses in all: CPU, memory, threads, files.

Counted is the tree of processes below the manager: itself, the workers, and what they have started.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from prometheus_client import Metric
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily

from opsguard.metrics.procfs import Status, family_tree, open_files, status

__all__ = ["ServiceTotals"]

_TRIES = 5


class ServiceTotals:
    """The totals of one service. Thread-safe; after a fork it goes on as it was.

    CPU seconds go on when a worker dies: the kernel adds what a child has used to the `reaped` of
    the parent that waited for it. They are never less than this process said before, whatever ends
    without being waited for.
    """

    def __init__(self, proc: str) -> None:
        self._proc = proc
        self._highest = 0.0

    def collect(self, workers: Sequence[int], manager: int | None) -> Iterator[Metric]:
        """The families, for the pids of the living workers and of their manager, if they have one
        (else what a dead worker has used is known to nobody).
        """
        root = os.getpid() if manager is None else manager
        members = self._members([root, *workers])
        highest = self._highest = max(self._highest, sum(s.cpu + s.reaped for _, s in members))
        files = sum(open_files(self._proc, pid) for pid, _ in members)
        yield _gauge("service_workers", "Workers that live.", len(workers))
        yield CounterMetricFamily(
            "service_cpu_seconds",
            "User and system CPU time of the manager, its workers and what they started.",
            value=highest,
        )
        yield _gauge(
            "service_memory_bytes",
            "Resident memory of all processes of the service; what they share counts in each.",
            sum(s.resident for _, s in members),
        )
        yield _gauge(
            "service_threads", "Threads of the service.", sum(s.threads for _, s in members)
        )
        yield _gauge("service_open_fds", "Open file descriptors of the service.", files)

    def _members(self, roots: list[int]) -> list[tuple[int, Status]]:
        """All processes, at one moment: read anew if a child was waited for meanwhile, as it would
        be missing, or be there twice.
        """
        found: list[tuple[int, Status]] = []
        for _ in range(_TRIES):
            before = self._reaped(roots)
            pids = family_tree(self._proc, roots)
            found = [(pid, s) for pid in pids if (s := status(self._proc, pid)) is not None]
            if self._reaped(roots) == before:
                break
        return found

    def _reaped(self, roots: list[int]) -> list[float]:
        return [s.reaped for pid in roots if (s := status(self._proc, pid)) is not None]


def _gauge(name: str, help: str, value: float) -> Metric:
    return GaugeMetricFamily(name, help, value=value)
