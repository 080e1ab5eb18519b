"""opsguard for Flask: ``install(app, ops)``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flask import Flask, Response, got_request_exception, request
from werkzeug.exceptions import MethodNotAllowed

from opsguard import Exchange, InstallError, OpsGuard
from opsguard_flask.templates import template
from opsguard_wsgi import KEY, PROTOCOL, ROOT, serve

__all__ = ["init_app", "install"]


def install(app: Flask, ops: OpsGuard | None = None) -> OpsGuard:
    """Guard a Flask app, before or after its routes are declared; returns `ops`.

    Without `ops` one is made from the mapping ``app.config["OPSGUARD"]``. It is kept in
    ``app.extensions["opsguard"]``. Installing the same one twice does nothing; another one raises
    InstallError. Raises SettingsError for wrong settings.
    """
    installed: OpsGuard | None = app.extensions.get("opsguard")
    if installed is not None and ops in (installed, None):
        return installed
    if installed is not None:
        raise InstallError("this Flask app is guarded by another OpsGuard already")
    guard = ops if ops is not None else OpsGuard(**app.config.get("OPSGUARD", {}))
    port = guard.runtime(app.name if app.name != "__main__" else None).port(PROTOCOL)
    app.extensions["opsguard"] = guard
    app.wsgi_app = serve(app.wsgi_app, port, answers=False)  # type: ignore[method-assign, assignment]
    app.before_request_funcs.setdefault(None, []).insert(0, _route_hook(app))
    got_request_exception.connect(_note_exception, app)
    return guard


init_app = install
"""The same by the name that Flask extensions use."""


def _route_hook(app: Flask) -> Callable[[], Response | None]:
    """First of the functions before the request, so before the app's own."""
    views = app.view_functions
    the_request: Any = request

    def enter() -> Response | None:
        asked = the_request._get_current_object()  # once: each look through the proxy costs
        exchange: Exchange | None = asked.environ.get(KEY)
        if exchange is None:
            return None
        rule = asked.url_rule
        if rule is None:
            _name_refused(exchange)
            return None
        mounts = asked.environ["SCRIPT_NAME"].removeprefix(asked.environ[ROOT])
        reply = exchange.enter(mounts + template(rule.rule), views.get(rule.endpoint))
        if reply is None:
            return None
        return Response(reply.body, reply.status, list(reply.headers))

    return enter


def _name_refused(exchange: Exchange) -> None:
    """No route matched; if only the method was wrong, the path's route still names the request."""
    error = request.routing_exception
    if not isinstance(error, MethodNotAllowed) or not error.valid_methods:
        return
    from flask.globals import request_ctx

    if request_ctx.url_adapter is None:
        return
    allowed = next(iter(error.valid_methods))
    rule, _ = request_ctx.url_adapter.match(method=allowed, return_rule=True)
    exchange.name(template(rule.rule))


def _note_exception(sender: Flask, exception: BaseException, **_: Any) -> None:
    """Flask answers for exceptions itself, so they seldom reach the edge."""
    exchange: Exchange | None = request.environ.get(KEY)
    if exchange is not None:
        exchange.fail(exception)
