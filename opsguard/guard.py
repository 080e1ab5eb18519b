"""The composer: declarations on OpsGuard, frozen by install into a Runtime, run by a Plan.

- `OpsGuard` collects what the user declares.
- `Runtime` is what `install` makes of it: settings, numbers, logs.
- `Plan` (in `plan`) is the path of a request for one choice of settings.
- `Port` (in `plan`) is a plan in the words of one protocol; an adapter holds one.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opsguard.clock import wall
from opsguard.context import current
from opsguard.exceptions import DeclarationError
from opsguard.failures import Failures
from opsguard.metrics import Metrics
from opsguard.metrics.place import worker_directory
from opsguard.metrics.store import Store
from opsguard.plan import Plan, Port, Protocol, Step, T

if TYPE_CHECKING:
    from opsguard.logging import Logger, Sink
    from opsguard.settings import Settings

__all__ = ["OpsGuard", "Runtime"]


class OpsGuard:
    """Everything an app declares about its operations. Made at import, in a factory or from a
    mapping; starts nothing. Settings are keywords: `service`, `version`, `environment` and the
    groups, each a mapping or its typed model; the environment wins over them.

    Safe to use from all threads. Installed on several apps, it counts them together.
    """

    def __init__(self, service: str | None = None, **settings: Any) -> None:
        self._keywords: dict[str, object] = dict(settings)
        if service is not None:
            self._keywords["service"] = service
        self._settings: Settings | None = None
        self._runtime: Runtime | None = None
        self._edge: list[Step] = []
        self._route: list[Step] = []
        self.failures = Failures()
        self._store = Store(self._directory, self.failures.report)
        self.metrics = Metrics(self._store, failed=self.failures.report)

    @property
    def settings(self) -> Settings:
        """The settings in force, read on first use. Raises SettingsError for wrong values."""
        if self._settings is None:
            from opsguard.settings import Settings

            self._settings = Settings.load(self._keywords)
        return self._settings

    @property
    def installed(self) -> bool:
        """Whether install() has frozen the declarations."""
        return self._runtime is not None

    def at_edge(self, step: Step) -> Step:
        """Declare a check of every request, before routing. Use as a decorator.

        It returns a Response to answer at once, or None. One that raises is counted and skipped.
        """
        return self._declare(self._edge, step)

    def at_route(self, step: Step) -> Step:
        """Declare a check of every request whose route is known, before body, dependencies and
        handler: `exchange.endpoint` is the template, `exchange.marked` the handler.
        """
        return self._declare(self._route, step)

    def bind(self, **fields: object) -> None:
        """Add fields to every further log line of this request. Outside a request: nothing."""
        exchange = current.get()
        if exchange is None:
            return
        bound = exchange.fields
        exchange.fields = {**bound, **fields} if bound else fields

    def logger(self, name: str) -> Logger:
        """A logger that takes keyword fields and knows the current request."""
        from opsguard.logging import Logger

        return Logger(name)

    @property
    def request_id(self) -> str | None:
        """The id of the current request; None outside one."""
        exchange = current.get()
        return None if exchange is None else exchange.request_id

    @contextmanager
    def override(self, **settings: Any) -> Generator[None]:
        """For tests: other settings for all apps this is installed on, and HTTP metrics from zero,
        until the block ends. Not while real traffic is served. Raises SettingsError.
        """
        runtime = self.runtime()
        before = runtime.plan
        runtime.use(runtime.compile(self.settings.merged(settings), aside=True))
        try:
            yield
        finally:
            runtime.use(before)

    def runtime(self, service: str | None = None, version: str | None = None) -> Runtime:
        """For adapters: freeze the declarations, or the runtime they are frozen in already.

        `service` and `version` are what the app calls itself. Raises SettingsError.
        """
        if self._runtime is None:
            self._settings = self.settings.with_service(service, version)
            self.metrics.set_limit(self._settings.metrics.max_series)
            self._runtime = Runtime(self, tuple(self._edge), tuple(self._route))
        return self._runtime

    def _declare(self, steps: list[Step], step: Step) -> Step:
        if self._runtime is not None:
            raise DeclarationError.frozen(getattr(step, "__name__", "this step"))
        steps.append(step)
        return step

    def _directory(self) -> Path:
        settings = self.settings
        return worker_directory(settings.metrics.directory, settings.service, wall())


class Runtime:
    """An installed OpsGuard: what its apps share. Made by `OpsGuard.runtime`."""

    def __init__(self, ops: OpsGuard, edge: tuple[Step, ...], route: tuple[Step, ...]) -> None:
        from opsguard.logging import open_sink

        self.ops = ops
        self.edge = edge
        self.route = route
        self.failures = ops.failures
        self.ports: list[Port[Any]] = []
        self._errors = ops.metrics.counter(
            "opsguard_internal_errors_total",
            "Faults of opsguard itself, by the step that was skipped.",
            ("site",),
        )
        self._dropped = ops.metrics.counter(
            "opsguard_dropped_total", "Items lost because a sink did not keep up.", ("sink",)
        )
        self.failures.count_error = lambda site: self._errors.labels(site).inc()
        self.failures.count_dropped = lambda sink, count: self._dropped.labels(sink).inc(count)
        self.sink: Sink = open_sink(
            ops.settings.logging, dropped=lambda count: self.failures.dropped("logs", count)
        )
        self.plan = self.compile(ops.settings)
        self.set_up_logging()

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

    def use(self, plan: Plan) -> None:
        """Serve by `plan` from the next request on."""
        self.plan = plan
        for port in self.ports:
            port.adopt(plan)

    def start(self) -> None:
        """The server said that it starts: it has configured its own logging by now."""
        self.set_up_logging()

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
        self.sink.shutdown()
