"""Coverage's lock over a fork. To be imported before opsguard, by what forks beside threads."""

from __future__ import annotations

import os
import threading

import coverage


def _lock_of_coverage() -> threading.Lock | None:
    current = coverage.Coverage.current()
    return getattr(getattr(current, "_collector", None), "data_lock", None)


class _CoverageOverForks:
    """A child that was forked while another thread noted a file in coverage's data would wait for
    that thread's lock for ever. So a fork takes the lock, and both sides let it go.
    """

    def __init__(self) -> None:
        self._held: threading.Lock | None = None
        # The first to register is the last to run before, and the first after: so nothing that is
        # measured runs while the lock is held.
        os.register_at_fork(
            before=self._take, after_in_parent=self._let_go, after_in_child=self._let_go
        )

    def _take(self) -> None:
        self._held = _lock_of_coverage()
        if self._held is not None:
            self._held.acquire()

    def _let_go(self) -> None:
        if self._held is not None:
            self._held.release()


_CoverageOverForks()
