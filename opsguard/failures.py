"""The one place where our own failures end.

The host app must never pay for a fault of ours: whoever catches one reports it here, where it is
counted (`opsguard_internal_errors_total{site}`, `opsguard_dropped_total{sink}`) and logged, at most
once a minute for each site, and goes on as if the feature were off.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from opsguard.clock import Clock, elapsed

__all__ = ["Failures"]

_LOG_EVERY = 60.0


class Failures:
    """Counts and logs faults of ours. Thread-safe; never raises; holds no lock over a fork.

    `count_error(site)` and `count_dropped(sink, n)` are attached once the metrics exist; before
    that, faults are only logged.
    """

    def __init__(self, clock: Clock = elapsed) -> None:
        self._clock = clock
        self._logged: dict[str, float] = {}
        self._log = logging.getLogger("opsguard")
        self.count_error: Callable[[str], None] = _nothing
        self.count_dropped: Callable[[str, int], None] = _nothing_at_all

    def report(
        self, site: str, error: BaseException | None = None, *, then: str = "was skipped"
    ) -> None:
        """A step of ours failed at `site` (a short, constant name) with `error`, and `then` says
        what became of the request.
        """
        try:
            self.count_error(site)
            if self._due(site):
                self._log.error("opsguard: %s failed and %s", site, then, exc_info=error)
        except Exception:  # the last resort: there is nobody left to tell
            return

    def report_keys(self, site: str, error: BaseException | None = None) -> None:
        """As `report`, of a fault for which nobody may pass."""
        self.report(site, error, then="who needs a key was answered 503")

    def dropped(self, sink: str, count: int = 1) -> None:
        """`count` items for `sink` were lost because it did not keep up."""
        try:
            self.count_dropped(sink, count)
        except Exception:
            return

    def _due(self, site: str) -> bool:
        now = self._clock()
        last = self._logged.get(site)
        if last is not None and now - last < _LOG_EVERY:
            return False
        self._logged[site] = now
        return True


def _nothing(site: str) -> None:
    return None


def _nothing_at_all(sink: str, count: int) -> None:
    return None
