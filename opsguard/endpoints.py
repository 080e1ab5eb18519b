"""Endpoints of our own: what `/metrics` answers, and where it has that from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from opsguard.clock import elapsed
from opsguard.exchange import Exchange
from opsguard.http import Response
from opsguard.metrics import Metrics
from opsguard.workers import manager

if TYPE_CHECKING:
    from opsguard.metrics.exposition import Exposition
    from opsguard.runtime import Runtime
    from opsguard.settings import Settings

__all__ = ["Scrape"]


class Scrape:
    """Answers a scrape, from the numbers of one plan and those of the whole service. Thread-safe.

    Reads nothing, and imports nothing that is large, before the first one.
    """

    def __init__(self, runtime: Runtime, settings: Settings, metrics: Metrics) -> None:
        self._runtime = runtime
        self._settings = settings
        self._metrics = metrics
        self._exposition: Exposition | None = None

    def __call__(self, exchange: Exchange) -> Response:
        """Blocks; never raises."""
        if self._exposition is None:
            self._exposition = self._sources()
        self._say_who()
        return self._exposition.render(
            exchange.method, exchange.header("accept"), exchange.header("accept-encoding")
        )

    def _say_who(self) -> None:
        """Set `service_info`; at each scrape, as a forked worker starts with zeros."""
        settings = self._settings
        info = self._metrics.gauge(
            settings.metrics.names.get("service_info", "service_info"),
            "The service, always 1.",
            ("service", "version", "git_sha", "environment"),
            mode="max",
        )
        labels = (settings.service, settings.version, settings.git_sha, settings.environment)
        info.labels(*labels).set(1)

    def _sources(self) -> Exposition:
        from prometheus_client import REGISTRY

        from opsguard.metrics import adoption
        from opsguard.metrics.exposition import Exposition
        from opsguard.metrics.foreign import Files
        from opsguard.metrics.process import ProcessCollector

        ours = self._runtime.ops.metrics
        numbers = (ours,) if self._metrics is ours else (self._metrics, ours)
        processes = ProcessCollector(workers=ours.workers, manager=lambda: manager().pid)
        return Exposition(
            (*numbers, adoption.Beside(numbers), processes, Files(), REGISTRY),
            covered=adoption.covers,
            failures=self._runtime.failures.report,
            clock=elapsed,
        )
