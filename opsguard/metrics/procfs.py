"""Processes as Linux's `/proc` tells of them: what proc(5) calls stat, task/*/children and fd.

Whatever cannot be read (the process has gone, is somebody else's, there is no `/proc`) is None or
left out; nothing is raised.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

__all__ = ["Status", "family_tree", "open_files", "status"]

_TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100
_PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096


class Status(NamedTuple):
    """One process. CPU is user and system time, in seconds."""

    cpu: float
    reaped: float
    """CPU of children that have ended and were waited for, with that of theirs."""
    threads: int
    started: int
    """Ticks since the boot: with the pid it names one process for good."""
    resident: int
    """Bytes."""


def status(proc: str, pid: int | str) -> Status | None:
    """What a process has used so far."""
    try:
        data = Path(proc, str(pid), "stat").read_bytes()
        # The name in parentheses may hold anything; from here on field 3 of proc(5) is the first.
        fields = data.rpartition(b")")[2].split()
        numbers = [int(fields[place]) for place in (11, 12, 13, 14, 17, 19, 21)]
    except (OSError, ValueError, IndexError):
        return None
    user, system, child_user, child_system, threads, started, pages = numbers
    return Status(
        (user + system) / _TICKS,
        (child_user + child_system) / _TICKS,
        threads,
        started,
        pages * _PAGE,
    )


def family_tree(proc: str, roots: Iterable[int]) -> list[int]:
    """The pids of `roots` and of all that descends from them, each once; those that have ended and
    were not waited for are among them.
    """
    found: dict[int, None] = {}
    waiting = list(roots)
    while waiting:
        pid = waiting.pop()
        if pid not in found:
            found[pid] = None
            waiting += _children(proc, pid)
    return list(found)


def open_files(proc: str, pid: int) -> int:
    """The number of open file descriptors; 0 for a process of somebody else."""
    try:
        return sum(1 for _ in Path(proc, str(pid), "fd").iterdir())
    except OSError:
        return 0


def _children(proc: str, pid: int) -> list[int]:
    found: list[int] = []
    try:
        for task in Path(proc, str(pid), "task").iterdir():
            found += map(int, (task / "children").read_text().split())
    except (OSError, ValueError):  # gone meanwhile, or a kernel without these files
        return found
    return found
