"""Putting opsguard on each framework's app, everything on, as its README says.

The access line goes, as JSON, to this process's standard output: the programs make that a pipe
which another process drains, as a container runtime would.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

SERVICE = "benchmark"
DJANGO_APPS = ("opsguard_django",)
DJANGO_MIDDLEWARE = ("opsguard_django.OpsGuardMiddleware",)


# Variants of the guarded app: what is changed from everything on.
VARIANTS: dict[str, dict[str, Any]] = {
    "guarded": {},
    "frame and metrics": {"logging": {"format": "json", "access": "off"}},
    "frame and line": {"metrics": {"enabled": False}},
    "frame": {"metrics": {"enabled": False}, "logging": {"format": "json", "access": "off"}},
}


def settings(variant: str = "guarded") -> dict[str, Any]:
    """The keywords of `OpsGuard`: defaults, but for a format that does not depend on a tty."""
    return {
        "service": SERVICE,
        "version": "1",
        "environment": "production",
        "logging": {"format": "json"},
    } | VARIANTS[variant]


def guarded(framework: str, app: Any, variant: str = "guarded") -> tuple[Any, Callable[[], object]]:
    """The app with opsguard on it, and what finishes its deferred work."""
    if framework.startswith("django"):
        from opsguard_django import ops  # the middleware has been in the app's settings already

        return app, drain_of(ops)
    from opsguard import OpsGuard

    ops = OpsGuard(**settings(variant))
    if framework == "fastapi":
        import opsguard_fastapi

        opsguard_fastapi.install(app, ops)
    elif framework == "flask":
        import opsguard_flask

        opsguard_flask.install(app, ops)
    elif framework == "asgi":
        import opsguard_asgi
        from benchmarks.apps import asgi_app

        app = opsguard_asgi.install(app, ops, endpoint=asgi_app.endpoint)
    else:
        import opsguard_wsgi
        from benchmarks.apps import wsgi_app

        app = opsguard_wsgi.install(app, ops, endpoint=wsgi_app.endpoint)
    return app, drain_of(ops)


def drain_of(ops: Any) -> Callable[[], object]:
    """What writes the access lines still in the buffer."""
    flush: Callable[[], bool] = ops.runtime().sink.flush
    return flush
