"""The route hook of Starlette and FastAPI: every route tells its exchange when it is reached.

A router calls ``route.handle(scope, receive, send)`` once it has chosen the route and before body,
dependencies and handler. Each route gets a `handle` of its own that enters the exchange first; no
class is changed. The label is the template from the root of the app: what a mount stands for is
kept in the scope on the way in, since `root_path` has only the concrete path.

FastAPI, from 0.137 on, keeps included routers as they are: one route may stand for several paths,
and ``scope["fastapi"]["effective_route_context"]`` says for which one it was chosen.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import Any

from starlette.applications import Starlette
from starlette.routing import BaseRoute, Host, Match, Mount, WebSocketRoute
from starlette.types import Receive, Scope, Send

from opsguard.accelerator import speed
from opsguard.inspection import Served
from opsguard_asgi import KEY, instead_of

__all__ = ["depends_on", "hook_routes", "late_label", "mounted", "served"]

_PREFIX = "opsguard.prefix"
"""The scope's key of what the mounts passed so far stand for, such as ``/tenants/{tenant}``."""

_DEEPEST = 32  # mounts in mounts
Above = tuple[tuple[object, str], ...]
"""The routers on the way to one, each with what the mounts before it stand for."""
Handle = Callable[[Scope, Receive, Send], Awaitable[None]]


def hook_routes(app: Any, prefix: str = "", above: Above = ()) -> None:
    """Hook all routes below `app` that are not hooked yet. An app that is mounted in itself has its
    routes once: a limit on one of them holds for all of its paths.
    """
    router = _router(app)
    above = (*above, (router, prefix))
    for route in _routes(router):
        inner = _inner(route)
        if inner is None:
            _hook_leaf(route)
            continue
        again = _prefix_above(inner, above)
        if isinstance(route, Mount):
            _hook_mount(route, again)
        if again is None:
            hook_routes(inner, prefix + _prefix(route), above)


def served(app: Any, prefix: str = "", above: Above = ()) -> Iterator[Served]:
    """The routes below `app`, with their whole templates. HEAD goes with GET."""
    router = _router(app)
    above = (*above, (router, prefix))
    for route, template in _templates(router):
        inner = _inner(route)
        if inner is not None:
            if _prefix_above(inner, above) is None:
                yield from served(inner, prefix + _prefix(route), above)
            continue
        handler = getattr(route, "endpoint", None) or getattr(route, "app", None)
        for method in _methods(route):
            yield Served(prefix + template, method, handler)


def depends_on(app: Any, callables: Iterable[object], above: Above = ()) -> bool:
    """Whether any route below `app` has one of these among its dependencies, at whatever depth."""
    wanted, router = list(callables), _router(app)
    above = (*above, (router, ""))
    for route in _contexts(router):
        inner = _inner(route)
        known = inner is None or _prefix_above(inner, above) is not None
        if not known and depends_on(inner, wanted, above):
            return True
        waiting = [getattr(route, "dependant", None)]
        while waiting:
            dependant = waiting.pop()
            if any(getattr(dependant, "call", None) is one for one in wanted):
                return True
            waiting += getattr(dependant, "dependencies", ())
    return False


def _contexts(router: Any) -> Iterable[Any]:
    """The routes of a router; included ones with the dependencies of all their routers."""
    try:
        from fastapi.routing import iter_route_contexts
    except ImportError:
        return _routes(router)
    contexts = iter_route_contexts(list(getattr(router, "routes", ())))
    return [
        one if hasattr(one, "dependant") else getattr(one, "original_route", one)
        for one in contexts
    ]


def mounted(app: Any, above: Above = ()) -> Iterator[Starlette]:
    """`app` and the apps mounted below it."""
    if isinstance(app, Starlette):
        yield app
    router = _router(app)
    above = (*above, (router, ""))
    for route in _routes(router):
        inner = _inner(route)
        if inner is not None and _prefix_above(inner, above) is None:
            yield from mounted(inner, above)


def _methods(route: Any) -> Iterable[str]:
    if isinstance(route, WebSocketRoute):
        return ("WEBSOCKET",)
    methods = set(getattr(route, "methods", None) or ())
    endpoint = getattr(route, "endpoint", None)
    if not methods and isinstance(endpoint, type):
        # An HTTPEndpoint takes the methods that it has functions for.
        methods = {name.upper() for name in _VERBS if hasattr(endpoint, name)}
    if "GET" in methods:
        methods.discard("HEAD")
    return sorted(methods) or ("*",)


_VERBS = ("get", "head", "post", "put", "patch", "delete", "options")


def late_label(app: Starlette) -> Callable[[Scope], str | None]:
    """Names the requests of routes that were added after the app began to serve, and hooks these
    routes for the next request.
    """

    def label(scope: Scope) -> str | None:
        if "endpoint" not in scope:
            return None
        hook_routes(app)
        return _search(app, scope)

    return label


def _search(app: Any, scope: Scope) -> str | None:
    """The template of the route that serves `scope`, found by asking the routes anew."""
    root = scope.get("app_root_path", scope.get("root_path", ""))
    asked: Scope = {**scope, "root_path": root, "path_params": {}}
    prefix, router = "", app
    for _ in range(_DEEPEST):
        route = next((r for r in _routes(router) if _serves(r, asked, scope)), None)
        inner = _inner(route)
        if route is None or inner is None:
            return None if route is None else prefix + _own_template(route, scope)
        prefix += _prefix(route)
        asked.update(route.matches(asked)[1])
        router = inner
    return None


def _serves(route: BaseRoute, asked: Scope, scope: Scope) -> bool:
    if scope.get("route") is route and _inner(route) is None:
        return True
    return route.matches(asked)[0] is not Match.NONE


def _routes(router: Any) -> Iterable[BaseRoute]:
    """The routes of a router as they are called."""
    return [route for route, _ in _templates(router)]


def _templates(router: Any) -> Iterable[tuple[BaseRoute, str]]:
    """The routes of a router as they are called, with their templates below the last mount.
    Included ones are looked up by FastAPI, which copies the plain ones among them.
    """
    routes = list(getattr(router, "routes", ()))
    try:
        from fastapi.routing import APIRoute, iter_route_contexts
    except ImportError:  # Starlette alone, or a FastAPI that copies included routes itself
        return [(route, _path_of(route)) for route in (*routes, *_last_asked(router))]
    found = []
    for context in iter_route_contexts([*routes, *_last_asked(router)]):
        original = context.original_route
        chosen = original if isinstance(original, APIRoute) else context._effective_route
        route = chosen if isinstance(chosen, BaseRoute) else original
        found.append((route, _path_of(context if chosen is original else route)))
    return found


def _last_asked(router: Any) -> Iterator[BaseRoute]:
    """What FastAPI asks when no other route matches: the frontends of a router and, without their
    prefix, of those that it includes.
    """
    yield from getattr(router, "_low_priority_routes", ())
    for route in getattr(router, "routes", ()):
        included = getattr(route, "original_router", None)
        if included is not None:
            yield from _last_asked(included)


def _path_of(route: Any) -> str:
    return getattr(route, "path_format", None) or getattr(route, "path", None) or "/{path}"


def _hook_leaf(route: BaseRoute) -> None:
    if _is_hooked(route):
        return
    handle: Handle = route.handle
    methods = getattr(route, "methods", None)
    endpoint = getattr(route, "endpoint", None)
    own = _path_of(route)

    def hooked(scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        exchange = scope.get(KEY)
        if exchange is None or exchange.endpoint is not None:
            return handle(scope, receive, send)
        plain = _PREFIX not in scope and "fastapi" not in scope
        template = own if plain else _template(route, scope)
        # What the route looks at: a middleware may have made a GET of a HEAD.
        if methods and scope["type"] == "http" and scope["method"] not in methods:
            exchange.name(template)
            return handle(scope, receive, send)  # it answers 405
        reply = exchange.enter(template, endpoint)
        if reply is None:
            return handle(scope, receive, send)
        return instead_of(reply, handle, scope, receive, send)

    twin = hooked
    if speed is not None:
        twin = speed.Hook(
            handle=handle,
            hooked=hooked,
            methods=frozenset(methods) if methods else None,
            template=own,
            endpoint=endpoint,
            key=KEY,
            prefix=_PREFIX,
            refuse=instead_of,
        )
    _set_handle(route, twin)


def _hook_mount(mount: Mount, again: str | None) -> None:
    """An app with routes is mounted there: what the mount stands for is passed on to them; `again`
    is what stands before an app that has come before.
    """
    if _is_hooked(mount):
        return
    handle: Handle = mount.handle
    prefix = _prefix(mount)

    def hooked(scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        scope[_PREFIX] = scope.get(_PREFIX, "") + prefix if again is None else again
        return handle(scope, receive, send)

    _set_handle(mount, hooked)


def _prefix_above(app: Any, above: Above) -> str | None:
    """What stands before an app that is mounted in itself; None for any other."""
    router = _router(app)
    return next((prefix for one, prefix in above if one is router), None)


def _router(app: Any) -> Any:
    """The router of an app; a router may be mounted by itself."""
    return getattr(app, "router", app)


def _inner(route: Any) -> Any:
    """The app with routes behind a mount or host, perhaps behind middleware; None if none is: then
    the mount is a route by itself.
    """
    if not isinstance(route, Mount | Host):
        return None
    inner: Any = route.app
    while not _has_routes(inner) and hasattr(inner, "app"):
        inner = inner.app
    return inner if _has_routes(inner) else None


def _has_routes(app: Any) -> bool:
    """Routes of Starlette, that is; an app of another framework may have some of its own."""
    routes = getattr(app, "routes", None)
    return isinstance(routes, list) and all(isinstance(route, BaseRoute) for route in routes)


def _prefix(mount: Any) -> str:
    """What a mount stands for in a template; a host stands for nothing."""
    return "" if isinstance(mount, Host) else str(mount.path_format.removesuffix("/{path}"))


def _template(route: Any, scope: Scope) -> str:
    """The whole template of the route that was chosen for this scope."""
    prefix: str = scope.get(_PREFIX, "")
    return prefix + _own_template(route, scope)


def _own_template(route: Any, scope: Scope) -> str:
    """The template below the last mount."""
    context = scope.get("fastapi", {}).get("effective_route_context")
    if context is None or getattr(context, "original_route", None) is not route:
        context = route
    return _path_of(context)


def _set_handle(route: Any, handle: Handle) -> None:
    handle.hooks = route  # type: ignore[attr-defined]
    route.handle = handle


def _is_hooked(route: Any) -> bool:
    """By a hook of its own: a copied route brings the hook of its original along."""
    return getattr(route.__dict__.get("handle"), "hooks", None) is route
