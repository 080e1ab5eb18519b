"""What `install` makes of an OpsGuard: the numbers, the logs and the plan that its apps share."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from opsguard.clock import elapsed, wall
from opsguard.exceptions import SettingsError
from opsguard.forks import start_over
from opsguard.inspection import Served, Source, check
from opsguard.metrics import Death, Metrics
from opsguard.metrics.adoption import adopt
from opsguard.metrics.store import Store
from opsguard.plan import Plan
from opsguard.ports import Port, Protocol, T
from opsguard.steps import Step
from opsguard.workers import several

if TYPE_CHECKING:
    from opsguard.admission import Admission
    from opsguard.guard import OpsGuard
    from opsguard.keys import Keys
    from opsguard.keys.policy import OpenRoutes
    from opsguard.limiter import Limiter
    from opsguard.logging import Sink
    from opsguard.settings import Settings

__all__ = ["Runtime"]

_SAID = 20
"""Requests of one dead worker that get a line each."""


class Runtime:
    """An installed OpsGuard: what its apps share. Made by `OpsGuard.runtime`."""

    def __init__(self, ops: OpsGuard, edge: tuple[Step, ...], route: tuple[Step, ...]) -> None:
        from opsguard.logging import open_sink

        self.ops = ops
        self.edge = edge
        self.route = route
        self.failures = ops.failures
        self.ports: list[Port[Any]] = []
        self._open: OpenRoutes | None = None
        self.sources: list[Source] = []
        """Of its apps' routes; the adapters of frameworks that have routes add theirs."""
        self._said: set[str] = set()
        self._errors = ops.metrics.counter(
            "opsguard_internal_errors_total",
            "Faults of opsguard itself, by the step that was skipped.",
            ("site",),
        )
        self._dropped = ops.metrics.counter(
            "opsguard_dropped_total", "Items lost because a sink did not keep up.", ("sink",)
        )
        self._deaths = ops.metrics.counter(
            "worker_deaths_total", "Workers that ended without closing their numbers."
        )
        ops.metrics.died = self._mourn
        self.failures.count_error = lambda site: self._errors.labels(site).inc()
        self.failures.count_dropped = lambda sink, count: self._dropped.labels(sink).inc(count)
        self.sink: Sink = open_sink(
            ops.settings.logging, dropped=lambda count: self.failures.dropped("logs", count)
        )
        self.sink.also(ops.board.refresh)
        self.plan = self.compile(ops.settings)
        if ops.settings.metrics.enabled and ops.settings.metrics.adopt:
            adopt(ops.metrics, self.failures.report)
        self.set_up_logging()
        self._tidy()
        start_over(self, Runtime._tidy)

    def port(self, protocol: Protocol[T]) -> Port[T]:
        """What one adapter holds."""
        port = Port(protocol, self.plan)
        self.ports.append(port)
        return port

    def compile(self, settings: Settings, *, aside: bool = False) -> Plan:
        """The plan for these settings; `aside`: with HTTP numbers of its own, from zero."""
        metrics = self.ops.metrics
        if aside:
            store = Store(lambda: None, self.failures.report)
            limit = settings.metrics.max_series
            metrics = Metrics(store, limit=limit, failed=self.failures.report)
        return Plan(self, settings, metrics)

    def admission(self, settings: Settings, metrics: Metrics) -> Admission | None:
        """Keys and limits as these settings and the marks so far have it; None if there are none.

        Raises SettingsError for what cannot be enforced as asked.
        """
        keys, ops = settings.keys, self.ops
        keyed = bool(keys.required or keys.master or keys.static or keys.pepper or ops.marked.keys)
        guard = self._keys(settings).guard(self._public()) if keyed else None
        limiter = None
        options = settings.limiter
        limited = options.policies or options.default or ops.marked.limits or keyed
        try:
            if options.enabled and limited:
                limiter = self._limiter(settings, metrics)
                for target in ops.marked.targets():
                    check(limiter, target)
            elif options.enabled and options.store not in ("auto", "local"):
                from opsguard.limiter.making import check_store

                check_store(options)  # who sets it means to limit, at the latest with a late mark
        except ValueError as error:
            raise SettingsError(f"limiter: {error}") from None
        if guard is None and limiter is None:
            return None
        from opsguard.admission import Admission

        return Admission(
            guard,
            limiter,
            self.failures,
            None if guard is None else _counting(metrics),
            marked=ops.marked.limits or ops.marked.keys,
        )

    def _keys(self, settings: Settings) -> Keys:
        if settings.keys == self.ops.settings.keys:
            return self.ops.keys
        from opsguard.keys import Keys

        return Keys(lambda: settings, report=self.failures.report_keys)

    def _public(self) -> OpenRoutes:
        """The routes marked public, as far as the apps have told: one list for all plans."""
        if self._open is None:
            from opsguard.keys.policy import OpenRoutes

            self._open = OpenRoutes()
        return self._open

    def open_route(self, template: str) -> None:
        """The handler of this route is marked public: its paths are for the route to judge."""
        self._public().add(template)

    def _limiter(self, settings: Settings, metrics: Metrics) -> Limiter:
        from opsguard.limiter import Limiter
        from opsguard.limiter.making import open_store

        decisions = metrics.counter(
            "rate_limit_decisions_total",
            "Decisions of the rate limiter, by policy.",
            ("policy", "outcome"),
        )

        def count(policy: str, decision: str) -> Callable[[], None]:
            return decisions.labels(policy, decision).one

        store = open_store(
            settings.limiter,
            full=count("", "store_full"),
            report=self.failures.report,
            clock=elapsed,
            folder=lambda: self.ops.place.directory(wall()),
            several=several(),
        )
        return Limiter(
            settings.limiter,
            store,
            report=self.failures.report,
            count=count,
            store_name=settings.limiter.store.partition("://")[0],
        )

    def limiter(self) -> Limiter | None:
        """The limiter of the plan in force."""
        admission = self.plan.admission
        return None if admission is None else admission.limiter

    def routes(self) -> list[Served]:
        """The routes of all apps that know theirs, as they are now."""
        found: list[Served] = []
        for source in self.sources:
            try:
                found += source()
            except Exception as fault:
                self.failures.report("routes", fault)
        return found

    def say_once(self, level: int, message: str) -> None:
        """Log what people should know at start, unless it was said already."""
        if message not in self._said:
            self._said.add(message)
            logging.getLogger("opsguard").log(level, "%s", message)

    def protect(self) -> None:
        """A handler was marked after install(): enforce marks from now on."""
        plan, ops = self.plan, self.ops
        limits, keys = plan.settings.limiter.enabled and ops.marked.limits, ops.marked.keys
        admission = plan.admission
        ready = admission is not None and admission.covers(limits=limits, keys=keys)
        if (limits or keys) and not ready:
            self.use(Plan(self, plan.settings, plan.metrics, like=plan))
            plan.shut()

    def use(self, plan: Plan) -> None:
        """Serve by `plan` from the next request on."""
        self.plan = plan
        for port in self.ports:
            port.adopt(plan)

    def start(self) -> None:
        """The server said that it starts: it has configured its own logging by now."""
        self.set_up_logging()
        self.sink.settle_in()
        self.ops.metrics.leave(False)
        self._tidy()

    def set_up_logging(self) -> None:
        """Route the root and the servers' loggers to our output. Repeated at lifespan start, as
        some servers configure logging after the app was made.
        """
        from opsguard.logging import configure

        settings = self.plan.settings
        configure(
            settings.logging,
            service=settings.service,
            environment=settings.environment,
            sink=self.sink,
        )

    def stop(self) -> None:
        """The server said that it stops: write what is buffered, and from now on every line."""
        self.ops.metrics.leave()
        self.sink.shutdown()

    def _tidy(self) -> None:
        """As a worker begins: fold what those before it left. Makes no folder. Never raises."""
        try:
            found = self.ops.place.found()
        except OSError:
            return  # nothing is writable here, which is told when there is something to write
        self.ops.metrics.tidy(found)

    def _mourn(self, death: Death) -> None:
        """A worker was found dead: count it, and say what it was serving."""
        self._deaths.inc()
        logger, now = logging.getLogger("opsguard"), elapsed()
        for request in death.requests[:_SAID]:
            logger.warning(
                "worker %d died while serving %s %s, request %s, %.1f s after it began",
                death.pid,
                request.method,
                request.endpoint,
                request.request_id,
                now - request.started,
                extra={
                    "worker_pid": death.pid,
                    "method": request.method,
                    "endpoint": request.endpoint,
                    "interrupted_request_id": request.request_id,
                    "age_seconds": round(now - request.started, 3),
                },
            )
        if len(death.requests) > _SAID:
            more = len(death.requests) - _SAID
            logger.warning("worker %d died while serving %d further requests", death.pid, more)
        elif not death.requests:
            logger.warning("worker %d died; it was serving nothing", death.pid)


def _counting(metrics: Metrics) -> Callable[[str, str], Callable[[], None]]:
    """(outcome, tier) to what counts a check of a key. Declared where keys are on."""
    checks = metrics.counter(
        "api_key_checks_total", "API keys that requests came with.", ("outcome", "tier")
    )
    return lambda outcome, tier: checks.labels(outcome, tier).one
