"""The composer: declarations on OpsGuard, frozen by install into a Runtime, run by a Plan.

- `OpsGuard` collects what the user declares.
- `Runtime` is what `install` makes of it: settings, numbers, logs.
- `Plan` (in `plan`) is the path of a request for one choice of settings.
- `Port` (in `plan`) is a plan in the words of one protocol; an adapter holds one.
"""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from opsguard.clock import elapsed, wall
from opsguard.context import current
from opsguard.exceptions import DeclarationError, SettingsError
from opsguard.failures import Failures
from opsguard.inspection import Limits, Marked, Served, Source, check
from opsguard.metrics import Death, Metrics
from opsguard.metrics.adoption import adopt
from opsguard.metrics.store import Store
from opsguard.plan import Plan, Port, Protocol, Step, T
from opsguard.workers import Board, Place, manager, several

if TYPE_CHECKING:
    from opsguard.admission import Admission
    from opsguard.keys import Identity, Keys
    from opsguard.keys.policy import OpenRoutes
    from opsguard.limiter import Limiter
    from opsguard.logging import Levels, Logger, Sink
    from opsguard.settings import Settings

__all__ = ["OpsGuard", "Runtime"]

_SAID = 20
"""Requests of one dead worker that get a line each."""


F = TypeVar("F", bound=Callable[..., Any])
"""A handler: it keeps its type under our decorators."""


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
        self._limited = False
        self._keyed = False
        self._keys: Keys | None = None
        self._place: Place | None = None
        self.failures = Failures()
        self.marked = Marked()
        self._store = Store(self._directory, self.failures.report)
        self.metrics = Metrics(
            self._store, failed=self.failures.report, manager=lambda: manager().pid
        )
        self._levels: Levels | None = None
        self.board = Board(self._directory, self.failures.report, self._apply_levels)

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

    def limit(
        self,
        rate: str,
        *,
        strategy: str | None = None,
        key: str | Callable[..., object] | None = None,
        cost: int | Callable[..., object] = 1,
        scope: str = "",
        burst: int | None = None,
        on_store_error: str | None = None,
        shadow: bool | None = None,
    ) -> Callable[[F], F]:
        """Limit a handler, a method of a class-based view or all of a class: a decorator.

        `rate` is one rate or several (`"100 per hour; 5/second"`), decided as one. The other
        parameters are those of :func:`opsguard.policies.policy`. The handler needs no parameter
        for it, and is enforced before body, dependencies and handler run. Raises
        DeclarationError; what the store cannot do is one here or at install().
        """
        from opsguard.limiter import limit

        self._declare_limits()
        return self._marking(
            limit(
                rate,
                strategy=strategy,
                key=key,
                cost=cost,
                scope=scope,
                burst=burst,
                on_store_error=on_store_error,
                shadow=shadow,
            )
        )

    def exempt(self, handler: F) -> F:
        """No limit by decorator, tier or default for this handler; one by path stays."""
        from opsguard.limiter import exempt

        return exempt(handler)

    def require_key(
        self, *, tiers: Sequence[str] = (), scopes: Sequence[str] = ()
    ) -> Callable[[F], F]:
        """Only callers with an API key of one of `tiers` (none: any) and with all `scopes` may use
        this handler or class: a decorator. Raises DeclarationError.
        """
        from opsguard.keys import require_key

        self.use_keys()
        require_key(tiers=tiers, scopes=scopes)  # what is wrong with it is said here
        # Each handler gets a requirement of its own, by which its route can be told.
        return self._marking(lambda handler: require_key(tiers=tiers, scopes=scopes)(handler))

    def use_keys(self) -> None:
        """Look at the API keys that requests come with, also where nothing else asks for them: for
        a handler that wants to know who calls. `require_key`, FastAPI's `KeyIdentity` and the
        settings of keys do so by themselves. Raises SettingsError for keys that cannot be used.
        """
        self._keyed = True
        self._protect()

    def public(self, handler: F) -> F:
        """This handler needs no API key, whatever `keys.required` says of its path."""
        from opsguard.keys import public

        return public(handler)

    def identity(self) -> Identity | None:
        """Whose API key the current request came with; None without one, or outside a request."""
        exchange = current.get()
        return None if exchange is None else exchange.identity

    @property
    def keys(self) -> Keys:
        """The API keys of this service: `create`, `list`, `revoke`, `rotate`, and their async
        twins with the prefix `a`.
        """
        if self._keys is None:
            from opsguard.keys import Keys

            self._keys = Keys(lambda: self.settings, report=self.failures.report_keys)
        return self._keys

    @property
    def limiter(self) -> Limits:
        """What is limited and why: `explain(path)`."""
        return Limits(self)

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

    def set_log_level(
        self, level: str | None, logger: str = "", *, minutes: float | None = 15.0
    ) -> bool:
        """Give a logger ("" is the root logger) another level in all workers of this service on
        this machine, within about a second: those that serve requests, and those that idle in an
        event loop; others at their next request.

        It has its own level again after `minutes` (None: not before a restart), or by `level`
        None. Writes an audit line. Returns False if only this process could be reached. Raises
        ValueError for a level that `logging` does not know.
        """
        from opsguard.keys.audit import Audit
        from opsguard.logging import level_of_name

        name = "" if logger == "root" else logger
        known = None if level is None else level_of_name(level)
        until = None if known is None or minutes is None else wall() + 60.0 * minutes
        reached = self.board.set_level(name, known, until)
        Audit(elapsed).event(
            "log.level_changed",
            "log level changed",
            target=name or "root",
            set_to=known or "its own",
            minutes=None if until is None else minutes,
            all_workers=reached,
        )
        return reached

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
            aside = runtime.plan
            runtime.use(before)
            aside.shut()

    def runtime(self, service: str | None = None, version: str | None = None) -> Runtime:
        """For adapters: freeze the declarations, or the runtime they are frozen in already.

        `service` and `version` are what the app calls itself. Raises SettingsError.
        """
        if self._runtime is None:
            self._settings = self.settings.with_service(service, version)
            self.metrics.set_limit(self._settings.metrics.max_series)
            self._runtime = Runtime(self, tuple(self._edge), tuple(self._route))
        return self._runtime

    def _declare_limits(self) -> None:
        self._limited = True
        self._protect()

    def _marking(self, decorate: Callable[[F], F]) -> Callable[[F], F]:
        """`decorate`, and remember what it was used on."""

        def mark(handler: F) -> F:
            target = decorate(handler)
            limiter = None if self._runtime is None else self._runtime.limiter()
            if limiter is not None:
                try:
                    check(limiter, target)
                except ValueError as error:
                    raise DeclarationError(str(error)) from None
            return self.marked.note(target)

        return mark

    def _protect(self) -> None:
        """A handler was marked. Routes may be declared after install(): then the plan is made anew
        with what it takes to enforce marks, once.
        """
        if self._runtime is not None:
            self._runtime.protect()

    def _declare(self, steps: list[Step], step: Step) -> Step:
        if self._runtime is not None:
            raise DeclarationError.frozen(getattr(step, "__name__", "this step"))
        steps.append(step)
        return step

    def _apply_levels(self, levels: Mapping[str, str]) -> None:
        from opsguard.logging import Levels

        if self._levels is None:
            self._levels = Levels()
        self._levels.apply(levels)

    def _directory(self) -> Path:
        return self._meeting().directory(wall())

    def _meeting(self) -> Place:
        if self._place is None:  # kept: all its files are in one folder, in each worker the same
            settings = self.settings
            self._place = Place(settings.metrics.directory, settings.service)
        return self._place

    def _tidy(self) -> None:
        """As a worker begins: fold what those before it left. Makes no folder. Never raises."""
        try:
            found = self._meeting().found()
        except OSError:
            return  # nothing is writable here, which is told when there is something to write
        self.metrics.tidy(found)


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
        ops._tidy()
        _after_forks(self)  # after the sink's own hook: what is found is logged

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
        keyed = bool(keys.required or keys.master or keys.static or keys.pepper or ops._keyed)
        guard = self._keys(settings).guard(self._public()) if keyed else None
        limiter = None
        options = settings.limiter
        limited = options.policies or options.default or ops._limited or keyed
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
            marked=ops._limited or ops._keyed,
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
            folder=self.ops._directory,
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
        limits, keys = plan.settings.limiter.enabled and ops._limited, ops._keyed
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
        self.ops._tidy()

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


def _after_forks(runtime: Runtime) -> None:
    reference = weakref.ref(runtime)

    def in_child() -> None:
        alive = reference()
        if alive is not None:
            alive.ops._tidy()

    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=in_child)


def _counting(metrics: Metrics) -> Callable[[str, str], Callable[[], None]]:
    """(outcome, tier) to what counts a check of a key. Declared where keys are on."""
    checks = metrics.counter(
        "api_key_checks_total", "API keys that requests came with.", ("outcome", "tier")
    )
    return lambda outcome, tier: checks.labels(outcome, tier).one
