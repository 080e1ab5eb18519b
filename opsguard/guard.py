"""The composer: declarations on OpsGuard, frozen by install into a Runtime, run by a Plan.

- `OpsGuard` collects what the user declares.
- `Runtime` (in `runtime`) is what `install` makes of it: settings, numbers, logs.
- `Plan` (in `plan`) is the path of a request for one choice of settings.
- `Port` (in `ports`) is a plan in the words of one protocol; an adapter holds one.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, overload

from opsguard.clock import elapsed, wall
from opsguard.context import current
from opsguard.exceptions import DeclarationError
from opsguard.failures import Failures
from opsguard.inspection import Limits, Marked, check
from opsguard.metrics import Metrics
from opsguard.metrics.store import Store
from opsguard.runtime import Runtime
from opsguard.steps import Step
from opsguard.workers import Board, Place, manager

if TYPE_CHECKING:
    from opsguard.keys import Identity, Keys
    from opsguard.logging import Levels, Logger
    from opsguard.settings import Settings

__all__ = ["OpsGuard"]

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
        self._keys: Keys | None = None
        self._place: Place | None = None
        self.failures = Failures()
        self.marked = Marked()
        self._store = Store(self._folder, self.failures.report)
        self.metrics = Metrics(
            self._store, failed=self.failures.report, manager=lambda: manager().pid
        )
        self._levels: Levels | None = None
        self.board = Board(self._folder, self.failures.report, self._apply_levels)

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
        DeclarationError. What the store cannot do is one too once install() was called, else a
        SettingsError of install().
        """
        from opsguard.limiter import limit

        self.marked.limits = True
        self._protect()
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

    @overload
    def require_key(self, handler: F, /) -> F: ...
    @overload
    def require_key(
        self, /, *, tiers: Sequence[str] = (), scopes: Sequence[str] = ()
    ) -> Callable[[F], F]: ...
    def require_key(
        self, handler: Any = None, /, *, tiers: Sequence[str] = (), scopes: Sequence[str] = ()
    ) -> Any:
        """Only callers with an API key of one of `tiers` (none: any) and with all `scopes` may use
        this handler or class: a decorator, with or without parentheses. Raises DeclarationError.
        """
        from opsguard.keys import require_key

        self.use_keys()
        require_key(tiers=tiers, scopes=scopes)  # what is wrong with it is said here
        # Each handler gets a requirement of its own, by which its route can be told.
        mark = self._marking(lambda handler: require_key(tiers=tiers, scopes=scopes)(handler))
        return mark if handler is None else mark(handler)

    def use_keys(self) -> None:
        """Look at the API keys that requests come with, also where nothing else asks for them: for
        a handler that wants to know who calls. `require_key`, FastAPI's `KeyIdentity` and the
        settings of keys do so by themselves. Raises SettingsError for keys that cannot be used.
        """
        self.marked.keys = True
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

    @property
    def place(self) -> Place:
        """Where the workers of this service meet: all its files are in one folder, in each worker
        the same. Raises SettingsError.
        """
        if self._place is None:
            settings = self.settings
            self._place = Place(settings.metrics.directory, settings.service)
        return self._place

    def _folder(self) -> Path:
        return self.place.directory(wall())
