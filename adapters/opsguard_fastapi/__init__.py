"""opsguard for FastAPI and Starlette: ``install(app, ops)``."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.types import ASGIApp

from opsguard import InstallError, OpsGuard
from opsguard_asgi import PROTOCOL, serve
from opsguard_fastapi.routes import hook_routes, late_label

__all__ = ["install"]

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
    port = guard.runtime(_title(app), getattr(app, "version", None)).port(PROTOCOL)
    setattr(app.state, _ATTRIBUTE, guard)
    build = app.build_middleware_stack

    def build_guarded() -> ASGIApp:
        """Stand outside of ServerErrorMiddleware: what it answers is seen, and gets its id."""
        hook_routes(app)
        return serve(build(), port, label=late_label(app))

    app.build_middleware_stack = build_guarded  # type: ignore[method-assign]
    return guard


def _title(app: Starlette) -> str | None:
    """The name of a FastAPI app, unless it is the one that every FastAPI app has."""
    title = getattr(app, "title", None)
    return None if title == "FastAPI" else title
