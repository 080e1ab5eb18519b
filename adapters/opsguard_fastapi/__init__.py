"""opsguard for FastAPI and Starlette: ``install(app, ops)``."""

from __future__ import annotations

import sys
from functools import partial
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.requests import HTTPConnection
from starlette.responses import Response
from starlette.types import ASGIApp
from starlette.websockets import WebSocket, WebSocketState

from opsguard import InstallError, OpsGuard
from opsguard.exceptions import Refused
from opsguard.inspection import announce
from opsguard.runtime import Runtime
from opsguard_asgi import PROTOCOL, serve
from opsguard_fastapi.routes import depends_on, hook_routes, late_label, mounted, served

if TYPE_CHECKING:
    from opsguard_fastapi.callers import (
        KeyIdentity,
        OptionalKeyIdentity,
        identity,
        require_identity,
    )

__all__ = ["KeyIdentity", "OptionalKeyIdentity", "identity", "install", "require_identity"]

_ATTRIBUTE = "opsguard"


def install(app: Starlette, ops: OpsGuard | None = None) -> OpsGuard:
    """Guard a FastAPI or Starlette app, before or after its routes are declared; returns `ops`.

    It is kept in ``app.state.opsguard``. Installing the same one twice does nothing. Raises
    InstallError for another one, or if the app has begun to serve, and SettingsError.
    """
    installed: OpsGuard | None = getattr(app.state, _ATTRIBUTE, None)
    if installed is not None and ops in (installed, None):
        return installed
    if installed is not None:
        raise InstallError("this app is guarded by another OpsGuard already")
    guard = ops if ops is not None else OpsGuard()
    if app.middleware_stack is not None:
        raise InstallError("install() must be called before the app serves its first request")
    runtime = guard.runtime(_title(app), getattr(app, "version", None))
    port = runtime.port(PROTOCOL)
    runtime.sources.append(partial(served, app))
    setattr(app.state, _ATTRIBUTE, guard)
    _describe(app, runtime)
    build = app.build_middleware_stack

    def build_guarded() -> ASGIApp:
        """Stand outside of ServerErrorMiddleware: what it answers is seen, and gets its id."""
        hook_routes(app)
        _describe(app, runtime)
        for one in mounted(app):  # each answers by itself for what is raised in it
            _answer_refusals(one)
        if _wants_identities(app):
            runtime.ops.use_keys()
        # More routes may come while the app serves.
        announce(runtime, served(app))
        return serve(build(), port, label=late_label(app))

    app.build_middleware_stack = build_guarded  # type: ignore[method-assign]
    return guard


def _wants_identities(app: Starlette) -> bool:
    """Whether a route asks for the identity of an API key by a dependency: then keys are on."""
    callers = sys.modules.get("opsguard_fastapi.callers")  # needs FastAPI, so nobody imported it
    if callers is None:
        return False
    return depends_on(app, (callers.identity, callers.require_identity))


def _title(app: Starlette) -> str | None:
    """The name of a FastAPI app, unless it is the one that every FastAPI app has."""
    title = getattr(app, "title", None)
    return None if title == "FastAPI" else title


def _describe(app: Any, runtime: Runtime) -> None:
    if hasattr(app, "openapi"):  # Starlette alone has none
        from opsguard_fastapi.openapi import describe_api

        describe_api(app, runtime)


def _answer_refusals(app: Starlette) -> None:
    """Make a refusal that a handler's wrapper raised the answer, unless the user does."""
    handled = [kind for kind in app.exception_handlers if isinstance(kind, type)]
    if not any(issubclass(Refused, kind) and kind is not Exception for kind in handled):
        answer: Any = _refused  # for both kinds of connection
        app.add_exception_handler(Refused, answer)


async def _refused(connection: HTTPConnection, refusal: Exception) -> Response | None:
    assert isinstance(refusal, Refused)
    if isinstance(connection, WebSocket):
        if connection.application_state is not WebSocketState.DISCONNECTED:
            await connection.close(1008)  # "policy violation", RFC 6455
        return None
    answer = refusal.response
    return Response(answer.body, answer.status, headers=dict(answer.headers))


def __getattr__(name: str) -> Any:
    # Starlette alone has no dependencies.
    if name in __all__:
        from opsguard_fastapi import callers

        return getattr(callers, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
