"""Servers that can be asked to say when they have nothing to do.

gunicorn's sync worker serves one request after the other in one thread and sleeps in a method of
its own in between. Where that is the server, lines that wait are looked after there, and the
process needs no second thread (see :mod:`opsguard.logging.sink` for what that saves). The method is
gunicorn's own business: one that is not found as expected means a thread, as everywhere else.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import PurePath
from typing import Any

from opsguard.clock import Clock

__all__ = ["tended_by_server"]

_SYNC_WORKER = ("gunicorn", "workers", "sync.py")


def tended_by_server(tick: Callable[[], object], *, every: float, clock: Clock) -> bool:
    """Have the server that serves this request call `tick` when it goes to sleep, at most once in
    `every` seconds while requests come, and then before it sleeps for longer. False if it can't.
    """
    worker = _sync_worker()
    wait = getattr(worker, "wait", None)
    if worker is None or not callable(wait):
        return False
    last = clock()

    def wait_tended(timeout: float) -> Any:
        nonlocal last
        if clock() - last < every:
            ready = wait(min(every, timeout))
            if ready:
                return ready
        tick()
        last = clock()
        return wait(timeout)

    try:
        worker.wait = wait_tended
    except AttributeError:
        return False
    return True


def _sync_worker() -> Any:
    """The worker below this request on the stack; None if it is another server's."""
    frame = sys._getframe()
    while frame is not None:
        code = frame.f_code
        if code.co_name == "run" and PurePath(code.co_filename).parts[-3:] == _SYNC_WORKER:
            return frame.f_locals.get("self")
        frame = frame.f_back  # type: ignore[assignment]
    return None
