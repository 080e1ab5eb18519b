"""One core for what is measured.

A process that the kernel moves between cores finds its caches empty, which costs more than what is
to be measured. And on a shared machine each core has its own neighbours: two servers of the same
page, on different cores, read 30 µs a request apart and more, while on one core, in turns of a few
requests, both have the same bad luck. Where the system has no affinity, or one core only, nothing
is done, and the intervals are wider.
"""

from __future__ import annotations

import os


def measure_here() -> None:
    """Keep this process on the core for what is measured from now on."""
    cores = _cores()
    if len(cores) > 1:
        os.sched_setaffinity(0, {max(cores)})


def keep_off() -> None:
    """Keep this process from that core."""
    cores = _cores()
    if len(cores) > 1:
        os.sched_setaffinity(0, cores - {max(cores)})


def _cores() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
