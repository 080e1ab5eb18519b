"""What an app limits, as people see it: the line at its start, `ops.limiter.explain`, and what an
API's description says.

Adapters list the routes of their app as :class:`Served` values; what these are asked for is worked
out here. Nothing of it is on the path of a request.
"""

from __future__ import annotations

import inspect
import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

from opsguard.context import current
from opsguard.exceptions import DeclarationError
from opsguard.exchange import Exchange
from opsguard.forks import in_child
from opsguard.http import below
from opsguard.marks import Marks, marks_of

if TYPE_CHECKING:
    import click

    from opsguard.guard import OpsGuard
    from opsguard.limiter import Explanation, Limiter, Route
    from opsguard.limiter.cli import Inspected
    from opsguard.runtime import Runtime

__all__ = [
    "Demand",
    "Limits",
    "Marked",
    "Served",
    "Source",
    "announce",
    "check",
    "demand",
    "described",
    "insist",
    "inspected",
]

T = TypeVar("T")
_KEY = "opsguard.exchange"
"""Where the adapters leave the exchange in a scope or environ."""


class Served(NamedTuple):
    """A route of an app: its template, one of its methods, and what it leads to."""

    endpoint: str
    method: str
    handler: object


Source = Callable[[], Iterable[Served]]
"""Lists the routes of an app as they are now."""


@dataclass(frozen=True, slots=True)
class Demand:
    """What a route asks of a request, for the description of an API."""

    key: bool
    """An API key; without a good one the answer is 401."""
    certain_keys: bool
    """Not any key will do: with another one the answer is 403."""
    limited: bool
    """The answer may be 429."""


class Marked:
    """The functions and classes that were limited or given a required key, as long as they live.
    For all threads.

    A mark protects where the route's hook finds it. One that no route carries (a helper was
    decorated, the view is in no URLconf, a decorator without `functools.wraps` hides it) does so
    late or, on a class, not at all; nobody should have to find that out.
    """

    def __init__(self) -> None:
        self.limits = False
        """Whether anything was limited."""
        self.keys = False
        """Whether anything asks for a key."""
        self._targets: WeakKeyDictionary[Any, None] = WeakKeyDictionary()
        self._lock = threading.Lock()
        in_child(self, Marked._after_fork)

    def _after_fork(self) -> None:
        self._lock = threading.Lock()

    def note(self, target: T) -> T:
        """`target` was decorated just now."""
        inner = getattr(target, "__func__", target)  # of a static method or a class method
        with self._lock:
            with suppress(TypeError):  # it takes no weak reference, so it is not among ours
                # A decorator on top of another one: the outer wrapper stands for both.
                self._targets.pop(getattr(inner, "__wrapped__", inner), None)
            self._targets[inner] = None
        return target

    def targets(self) -> list[Any]:
        with self._lock:
            return list(self._targets)

    def unrouted(self, routes: Iterable[Served]) -> list[str]:
        """The names of those whose marks are on none of the routes."""
        seen: set[int] = set()
        classes: set[type] = set()
        for route in routes:
            seen.update(map(id, _tokens(marks_of(route.handler, route.method))))
            view = getattr(route.handler, "view_class", route.handler)
            if not inspect.isclass(view):  # Django REST framework calls it so
                view = getattr(route.handler, "cls", view)
            if inspect.isclass(view):
                classes.add(view)
        return sorted(
            {_name(target) for target in self.targets() if not _is_on(target, seen, classes)}
        )


def _tokens(marks: Marks) -> tuple[object, ...]:
    """What tells one decoration from all others: objects that were made for it alone."""
    return marks.limits if marks.keys is None else (*marks.limits, marks.keys)


def _is_on(target: Any, seen: set[int], classes: set[type]) -> bool:
    if inspect.isclass(target) and any(issubclass(one, target) for one in classes):
        return True
    return any(id(token) in seen for token in _tokens(marks_of(target)))


def _name(target: Any) -> str:
    return f"{target.__module__}.{target.__qualname__}"


# -- at start ---------------------------------------------------------------------------------


def announce(runtime: Runtime, routes: Iterable[Served] | None) -> None:
    """Log how many routes are limited, exempt and neither, wherever limits or keys are used; None:
    the app has no routes to count. A mark that no route carries is a warning, as more routes may
    come. What was said once is not repeated. Never raises: a fault of ours in it is counted.
    """
    try:
        found = None if routes is None else list(routes)
        if coverage := _coverage(runtime, found):
            runtime.say_once(logging.INFO, coverage)
        for warning in _off(runtime):
            runtime.say_once(logging.WARNING, warning)
        open_public(runtime, found or ())
        unrouted = [] if found is None else runtime.ops.marked.unrouted(found)
        if unrouted:
            runtime.say_once(logging.WARNING, _complaint(unrouted))
    except Exception as fault:
        runtime.failures.report("announce", fault)


def open_public(runtime: Runtime, routes: Iterable[Served]) -> None:
    """Tell the edge which routes are marked public, so that it leaves them to the route."""
    for route in routes:
        marks = marks_of(route.handler, route.method)
        if marks.public and marks.keys is None:
            runtime.open_route(route.endpoint)


def insist(runtime: Runtime, routes: Iterable[Served]) -> None:
    """For a framework whose routes are all known at start: each mark must be on one of them.

    :raises DeclarationError: if one is not.
    """
    if unrouted := runtime.ops.marked.unrouted(routes):
        raise DeclarationError(_complaint(unrouted))


def _complaint(unrouted: Iterable[str]) -> str:
    return (
        f"no route carries the limits or keys of {', '.join(unrouted)}: a function is guarded only "
        "once it is called, a class not at all. Decorate what the route leads to; a decorator "
        "above ours must use functools.wraps"
    )


def _coverage(runtime: Runtime, routes: list[Served] | None) -> str:
    """Empty where nobody asked for limits or keys."""
    limiter = runtime.limiter()
    if limiter is None:
        return ""
    if routes is None:
        return (
            f"limiter: {len(limiter.paths)} {'policy' if len(limiter.paths) == 1 else 'policies'} "
            "by path; the routes of this app are not known here, so those that no policy covers "
            "are not counted"
        )
    from opsguard.limiter import describe

    return str(describe(limiter, described(routes)))


def _off(runtime: Runtime) -> Iterable[str]:
    """What was asked for and is switched off."""
    settings = runtime.plan.settings
    options = settings.limiter
    asked = bool(options.policies or options.default)
    limits = any(marks_of(target).limits for target in runtime.ops.marked.targets())
    if (asked or limits) and not options.enabled:
        origin = settings.origin("limiter.enabled")
        yield f"limiter: off, as limiter.enabled is false ({origin}): no limit is enforced"
    elif options.enabled and options.shadow:
        origin = settings.origin("limiter.shadow")
        yield f"limiter: in shadow mode ({origin}): what exceeds a limit is counted, not refused"


def described(routes: Iterable[Served]) -> list[Route]:
    """The routes with the marks that count for them."""
    from opsguard.limiter import Route

    return [Route(one.endpoint, one.method, marks_of(one.handler, one.method)) for one in routes]


def check(limiter: Limiter, target: object) -> None:
    """What the decorators of `target` ask for must be possible in the store.

    :raises ValueError: if it is not.
    """
    from opsguard.limiter.stores import check_strategy

    options = limiter.options
    store = options.store.partition("://")[0]
    for policy in marks_of(target).limits:
        strategy = policy.strategy or options.strategy
        check_strategy(store, limiter.store.strategies, strategy, policy.name)


def demand(runtime: Runtime, route: Served) -> Demand:
    """What a request for this route is asked for."""
    from opsguard.keys.policy import KeyRequirement, Paths
    from opsguard.limiter import describe

    settings = runtime.plan.settings
    (described_route,) = described([route])
    marks = described_route.marks
    certain, key = False, False
    if isinstance(marks.keys, KeyRequirement):
        key, certain = True, bool(marks.keys.tiers or marks.keys.scopes)
    elif not marks.public:
        key = Paths(settings.keys.required, settings.keys.public).need_key(route.endpoint)
    limiter = runtime.limiter()
    limited = False
    if limiter is not None:
        limited = bool(describe(limiter, [described_route]).limited)
        # Whoever has a key has a tier.
        limited = limited or (key and not marks.exempt and bool(settings.limiter.tiers))
    return Demand(key, certain, limited)


# -- for people -------------------------------------------------------------------------------


class Limits:
    """What is limited, for people: `ops.limiter`."""

    def __init__(self, ops: OpsGuard) -> None:
        self._ops = ops

    def explain(
        self,
        request: object = None,
        method: str = "",
        *,
        key: str | None = None,
        tier: str | None = None,
        endpoint: str | None = None,
        handler: object = None,
    ) -> tuple[Explanation, ...]:
        """Which policies apply to a request, and why; takes no token.

        `request` is a path, or a request in any form: of the framework, an ASGI scope, a WSGI
        environ, an exchange; without one it is the current request. `method` is GET for a path.
        `key` is the client asked about (an address or a key id, as the policies have it), `tier`
        that of its API key; `endpoint` is the route's template and `handler` the function or class
        that it leads to, where the routes of the app do not tell. Empty where the limiter is off or
        has no policy. Raises TypeError for what is no request.
        """
        from opsguard.limiter.explain import explain, match

        runtime = self._ops.runtime()
        limiter = runtime.limiter()
        asked = _asked(request, method)
        if limiter is None or asked is None:
            return ()
        exchange = asked.exchange
        if endpoint is None:
            endpoint = asked.endpoint
        if handler is None:
            handler = asked.handler
        if endpoint is None or handler is None:
            route = match(runtime.routes(), endpoint or asked.path, asked.method)
            if route is not None:
                endpoint, handler = endpoint or route.endpoint, handler or route.handler
        identity = None if exchange is None else exchange.identity
        return explain(
            limiter,
            asked.path,
            asked.method,
            key=key or (asked.client if exchange is None else None),
            tier=tier or (None if identity is None else identity.tier),
            master=tier is None and identity is not None and identity.master,
            endpoint=endpoint,
            marks=marks_of(handler, asked.method),
            ask=exchange if key is None else None,
        )

    def commands(self) -> click.Group:
        """The command `limits`, for the command line of a framework. Needs click."""
        from opsguard.limiter.cli import commands

        return commands(lambda _: inspected(self._ops), app=False)


def inspected(ops: OpsGuard) -> Inspected:
    """What the command `limits` shows of an app."""
    from opsguard.limiter.cli import Inspected

    runtime = ops.runtime()
    routes = runtime.routes()
    return Inspected(
        settings=runtime.plan.settings,
        limiter=runtime.limiter(),
        routes=tuple(described(routes)) if runtime.sources else None,
        unrouted=tuple(ops.marked.unrouted(routes)) if runtime.sources else (),
    )


@dataclass(frozen=True, slots=True)
class _Asked:
    """The request that a person asks about."""

    path: str
    method: str
    endpoint: str | None = None
    handler: object = None
    client: str | None = None
    exchange: Exchange | None = None


def _asked(request: object, method: str) -> _Asked | None:
    if request is None:
        request = current.get()
        if request is None:
            return None
    if isinstance(request, str):
        return _Asked(request, method.upper() or "GET")
    if isinstance(request, Exchange):
        return _of_exchange(request)
    # Werkzeug's request has an environ, Django's META, which under ASGI is one as well.
    for name in ("environ", "META", "scope"):
        raw: Any = getattr(request, name, None)
        if isinstance(raw, Mapping):
            break
    else:
        raw = request
    if not isinstance(raw, Mapping):
        raise TypeError(f"a path or a request is needed, not {request!r}")
    exchange = raw.get(_KEY)
    if isinstance(exchange, Exchange):
        return _of_exchange(exchange)
    if "REQUEST_METHOD" in raw:
        path = getattr(request, "path_info", None) or _decoded(raw.get("PATH_INFO", "/"))
        return _Asked(path, raw["REQUEST_METHOD"], client=raw.get("REMOTE_ADDR"))
    if "path" in raw:
        path = below(raw["path"], raw.get("root_path")) or "/"
        client = (raw.get("client") or (None,))[0]
        return _Asked(path, raw.get("method", "WEBSOCKET"), client=client)
    raise TypeError(f"a path or a request is needed, not {request!r}")


def _of_exchange(exchange: Exchange) -> _Asked:
    return _Asked(
        exchange.routed,
        exchange.method,
        exchange.endpoint,
        exchange.marked,
        exchange.client,
        exchange,
    )


def _decoded(path: str) -> str:
    """A path of a WSGI environ (PEP 3333: bytes in the form of latin-1) as text."""
    try:
        return path.encode("latin-1").decode("utf-8", "replace")
    except UnicodeEncodeError:
        return path
