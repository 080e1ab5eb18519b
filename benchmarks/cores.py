"""One core for what is measured in process.

A process that the kernel moves between cores finds its caches empty, which costs more than what is
to be measured. Real servers are left where the kernel puts them: pinned to one core they disturb
each other, and the bare app against itself no longer reads 0. Where the system has no affinity, or
one core only, nothing is done, and the intervals are wider.
"""

from __future__ import annotations

import os


def measure_here() -> None:
    """Keep this process on one core from now on."""
    if not hasattr(os, "sched_setaffinity"):
        return
    cores = os.sched_getaffinity(0)
    if len(cores) > 1:
        os.sched_setaffinity(0, {max(cores)})
