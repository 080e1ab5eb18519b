"""opsguard for Flask: ``install(app, ops)``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from flask import Flask, Response, got_request_exception, request
from werkzeug.exceptions import HTTPException, MethodNotAllowed

from opsguard import Exchange, InstallError, OpsGuard
from opsguard.accelerator import speed
from opsguard.context import current
from opsguard.exceptions import Refused
from opsguard.exchange import settled
from opsguard.http import Pending
from opsguard.http import Response as Reply
from opsguard.inspection import Served, announce
from opsguard.runtime import Runtime
from opsguard_flask.commands import commands
from opsguard_flask.templates import template
from opsguard_wsgi import KEY, PROTOCOL, ROOT, serve

__all__ = ["init_app", "install"]

if TYPE_CHECKING:
    from opsguard.keys import Identity

_IDENTITY = "opsguard_identity"
_REQUEST = "werkzeug.request"
"""The environ's key under which Werkzeug leaves its request: no look through the proxy."""


def install(app: Flask, ops: OpsGuard | None = None) -> OpsGuard:
    """Guard a Flask app, before or after its routes are declared; returns `ops`.

    Without `ops` one is made from the mapping ``app.config["OPSGUARD"]``. It is kept in
    ``app.extensions["opsguard"]``. Installing the same one twice does nothing; another one raises
    InstallError. Raises SettingsError for wrong settings.

    Views find whose API key a request came with in ``g.opsguard_identity``: None without one. How
    many routes are limited is logged at the first request, when they are known; ``flask opsguard
    limits`` tells it at any time.
    """
    installed: OpsGuard | None = app.extensions.get("opsguard")
    if installed is not None and ops in (installed, None):
        return installed
    if installed is not None:
        raise InstallError("this Flask app is guarded by another OpsGuard already")
    guard = ops if ops is not None else OpsGuard(**app.config.get("OPSGUARD", {}))
    runtime = guard.runtime(app.name if app.name != "__main__" else None)
    port = runtime.port(PROTOCOL)
    runtime.sources.append(partial(_served, app))
    app.extensions["opsguard"] = guard
    _announcing(app, runtime, serve(app.wsgi_app, port, propagates=partial(_propagates, app)))
    _hook_routes(app)
    _offer_identity(app)
    if Refused not in app.error_handler_spec[None][None]:
        app.register_error_handler(Refused, _refused)
    app.cli.add_command(commands(guard))
    got_request_exception.connect(_note_exception, app)
    return guard


init_app = install
"""The same by the name that Flask extensions use."""


def _announcing(app: Flask, runtime: Runtime, guarded: Callable[..., Any]) -> None:
    """Put `guarded` in the app's place. At the first request the routes are known, as far as Flask
    can tell, and the edge has to know which of them are public.
    """
    known = False

    def first(environ: Any, start_response: Any) -> Any:
        nonlocal known
        if not known:
            announce(runtime, _served(app))
            known = True  # not before: other threads' first requests need the public routes too
            if vars(app).get("wsgi_app") is first:  # else somebody's middleware holds on to it
                app.wsgi_app = guarded  # type: ignore[method-assign]
        return guarded(environ, start_response)

    app.wsgi_app = first  # type: ignore[method-assign]


def _propagates(app: Flask) -> bool:
    """Whether exceptions are to reach the server: tests and the debugger wait for them."""
    asked: bool | None = app.config.get("PROPAGATE_EXCEPTIONS")
    return app.testing or app.debug if asked is None else asked


def _hook_routes(app: Flask) -> None:
    """Before all functions before the request, the app's own and those of blueprints.

    Not as one of them: for each of these Flask asks anew, through five functions of `inspect`,
    whether it is a coroutine.
    """
    views = app.view_functions
    preprocess: Callable[..., Any] = app.preprocess_request

    def enter(*context: Any) -> Any:
        exchange = current.get()
        if exchange is None or exchange.endpoint is not None:
            return preprocess(*context)
        environ = exchange.source
        asked = environ.get(_REQUEST) or request
        rule = asked.url_rule
        if rule is None:
            _name_refused(exchange)
            return preprocess(*context)
        mounts = (environ.get("SCRIPT_NAME") or "").removeprefix(environ[ROOT])
        found = exchange.enter(mounts + template(rule.rule), views.get(rule.endpoint))
        reply = _answered(found)
        return preprocess(*context) if reply is None else reply

    app.preprocess_request = enter  # type: ignore[method-assign]
    if speed is not None and type(views) is dict:
        app.preprocess_request = speed.Turn(  # type: ignore[method-assign]
            current=current,
            slow=enter,
            preprocess=preprocess,
            template=template,
            answer=_answered,
            views=views,
            root=ROOT,
        )


def _answered(reply: Reply | Pending | None) -> Response | None:
    """What the route's check says, as Flask takes it from a function before the request. Blocks."""
    told = settled(reply)
    return None if told is None else Response(told.body, told.status, list(told.headers))


def _served(app: Flask) -> Iterator[Served]:
    """The rules of the app. HEAD goes with GET, and OPTIONS is answered by Flask."""
    for rule in app.url_map.iter_rules():
        view = app.view_functions.get(rule.endpoint)
        for method in sorted((rule.methods or {"*"}) - {"HEAD", "OPTIONS"}):
            yield Served(template(rule.rule), method, view)


def _offer_identity(app: Flask) -> None:
    """Give `g` a property, so that only who asks for it pays."""
    base = app.app_ctx_globals_class
    if not hasattr(base, _IDENTITY):
        offering: Any = type(base.__name__, (base,), {_IDENTITY: property(_identity)})
        app.app_ctx_globals_class = offering


def _identity(_: object) -> Identity | None:
    exchange = current.get()
    return None if exchange is None else exchange.identity


def _refused(refusal: Refused) -> Response:
    """A handler's wrapper refused, because it was not called by its route."""
    reply = refusal.response
    return Response(reply.body, reply.status, list(reply.headers))


def _name_refused(exchange: Exchange) -> None:
    """No route matched; if only the method was wrong, the path's route still names the request."""
    error = request.routing_exception
    if not isinstance(error, MethodNotAllowed) or not error.valid_methods:
        return
    from flask.globals import request_ctx

    if request_ctx.url_adapter is None:
        return
    allowed = next(iter(error.valid_methods))
    try:
        rule, _ = request_ctx.url_adapter.match(method=allowed, return_rule=True)
    except HTTPException:  # a method that is allowed is redirected (`defaults`, `redirect_to`)
        return
    except Exception as fault:  # the app's own `redirect_to`, which nobody has asked for
        exchange.plan.failures.report("endpoint", fault)
        return
    exchange.name(template(rule.rule))


def _note_exception(sender: Flask, exception: BaseException, **_: Any) -> None:
    """Flask answers for exceptions itself, so they seldom reach the edge."""
    exchange: Exchange | None = request.environ.get(KEY)
    if exchange is not None:
        exchange.fail(exception)
