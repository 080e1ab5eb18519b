"""Who belongs together: the processes that one manager started, found without configuration.

The manager is, in this order,

1. what was known before a fork: a child belongs where its parent belonged, so a pool that a worker
   starts by forking stays in the worker's group;
2. gunicorn's arbiter, if this process is one of its workers or the arbiter itself;
3. the process that made this one with :mod:`multiprocessing` (uvicorn, granian, hypercorn);
4. this process itself (one worker, a development server and its reloader, pytest).

A bare parent pid says nothing, since one shell can start two apps. gunicorn's arbiter is told by
the stack: the main thread of all its processes runs below a method of the ``Arbiter`` that started
them, which keeps the pid that it had then. If a later gunicorn does that in another way, nothing is
found and the answer is the process itself: each worker is then a group of its own. It comes before
`multiprocessing`, because it is nearer: an arbiter that a script started with `multiprocessing`
hands that script on to all its workers.

A manager is named by pid, start time and pid namespace, so a pid that is used again, in this
container or in another one that shares the folder, is another name. Where there is no ``/proc``,
the pid has to do.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

__all__ = ["Process", "manager", "several"]


@dataclass(frozen=True, slots=True)
class Process:
    """A process among all that ever had its pid. The other two are 0 where there is no /proc."""

    pid: int
    start: int = 0
    """Clock ticks from the machine's start to the process's."""
    namespace: int = 0
    """Inode of the pid namespace in which `pid` counts."""

    @classmethod
    def of(cls, pid: int) -> Process:
        """The living process of this pid, which must be in our namespace."""
        start = _stat(pid, 19)
        return cls(pid, start, _namespace()) if start else cls(pid)

    @classmethod
    def parse(cls, name: str) -> Process | None:
        """The process of this `name`, or None for any other text."""
        parts = name.split("-")
        if len(parts) not in (1, 3) or not all(part.isascii() and part.isdigit() for part in parts):
            return None
        return cls(*map(int, parts))

    @property
    def name(self) -> str:
        """``<pid>-<start>-<namespace>``, or the pid alone."""
        return f"{self.pid}-{self.start}-{self.namespace}" if self.start else str(self.pid)

    @property
    def here(self) -> bool:
        """Whether its pid counts in the namespace of this process."""
        return self.namespace == _namespace()

    @property
    def alive(self) -> bool:
        """Whether it runs. Only for a process that is `here`."""
        return bool(self.start) and _stat(self.pid, 19) == self.start


def manager() -> Process:
    """The manager of this process: the same in all processes that belong together.

    Found once, and kept over forks. Takes no lock; never raises.
    """
    global _manager
    if _manager is None:
        _manager = _find()
    return _manager


def several() -> bool:
    """Whether this process is one of a group of workers, or will be forked into one: a server that
    loads the app before it forks (gunicorn with --preload, uWSGI).
    """
    if manager().pid != os.getpid():
        return True
    return "uwsgi" in sys.modules or _arbiter() is not None


_manager: Process | None = None


def _find() -> Process:
    own = Process.of(os.getpid())
    pid = _arbiter() or _maker()
    if not pid or pid == own.pid:
        return own
    found = Process.of(pid)
    # One that began after us is not what started us: the manager is gone, and its pid used again.
    known = bool(found.start) or not own.start
    return found if known and found.start <= own.start else own


def _arbiter() -> int | None:
    """The pid of the gunicorn arbiter whose method the main thread runs in, else None."""
    module = sys.modules.get("gunicorn.arbiter")
    kind, file = getattr(module, "Arbiter", None), getattr(module, "__file__", None)
    if not isinstance(kind, type):
        return None
    for frame in _main_thread():
        if frame.f_code.co_filename == file and isinstance(frame.f_locals.get("self"), kind):
            # Without a pid yet it is loading the app, with --preload: this process is it.
            return getattr(frame.f_locals["self"], "pid", None) or os.getpid()
    return None


def _maker() -> int | None:
    """The pid of the process that made this one with multiprocessing, else None."""
    process: Any = sys.modules.get("multiprocessing.process")
    if process is None:
        return None
    parent = process.parent_process()
    if parent is not None:
        pid: int = parent.pid
        return pid
    # A child that imports its parent's main module, in which the app may be made (`python main.py`
    # with `uvicorn.run("main:app", workers=4)`), and learns only after that who its parent is.
    inheriting = getattr(process.current_process(), "_inheriting", False)
    server: Any = sys.modules.get("multiprocessing.forkserver")
    if server is not None:
        running = {frame.f_code for frame in _main_thread()}
        if getattr(server.main, "__code__", None) in running:
            # A fork server, which may have imported the app ahead, was made by the parent of those
            # that it forks; they run below `_serve_one`.
            one = getattr(getattr(server, "_serve_one", None), "__code__", None)
            return _stat(os.getppid(), 1) if one in running else os.getppid()
    return os.getppid() if inheriting else None


def _main_thread() -> Iterator[FrameType]:
    """What the main thread is in the middle of, innermost first."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _stat(pid: int, field: int) -> int:
    """A field of /proc/<pid>/stat, counted from the one after the name; 0 if there is none."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[field])
    except (OSError, ValueError, IndexError):
        return 0


def _namespace() -> int:
    try:
        return Path("/proc/self/ns/pid").stat().st_ino
    except OSError:
        return 0


def _remember() -> None:
    """Before a fork, when it can still be found: a daemon's first parent is gone after it."""
    manager()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_remember)
