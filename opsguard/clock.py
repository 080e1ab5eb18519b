"""The clocks. Whoever measures takes one as a parameter; nobody calls `time` in a function body."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter, time

__all__ = ["Clock", "elapsed", "wall"]

Clock = Callable[[], float]
"""Seconds, as a float. Monotonic or wall, as the parameter's name says."""

elapsed: Clock = perf_counter
"""Monotonic seconds with the finest resolution; the origin means nothing."""

wall: Clock = time
"""Seconds since the epoch, UTC; may jump."""
