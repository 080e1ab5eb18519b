"""The files of `prometheus_client`, where it keeps some (``PROMETHEUS_MULTIPROC_DIR``).

Then nothing is adopted, and what a registry tells is of one worker: another one at each scrape, so
counters would go up and down. Its own collector of these files knows the sums.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from prometheus_client import Metric, values
from prometheus_client.multiprocess import MultiProcessCollector

__all__ = ["Files"]


class Files:
    """A collector of what all workers have in these files; of nothing where there are none.

    Thread-safe; right in a forked child. Raises what reading them does.
    """

    def collect(self) -> Iterable[Metric]:
        if not getattr(values.ValueClass, "_multiprocess", False):
            return ()
        make: Any = MultiProcessCollector  # which has no types
        found: Iterable[Metric] = make(None).collect()
        return found
