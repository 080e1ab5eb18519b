"""Putting opsguard on each framework's app, everything on, as its README says.

The access line goes, as JSON, to this process's standard output: the programs make that a pipe
which another process drains, as a container runtime would.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable, Iterable
from typing import Any

from benchmarks.drivers.request import KEY

Around = Callable[[Any], Any]
"""What decorates a handler."""

SERVICE = "benchmark"
DJANGO_APPS = ("opsguard_django",)
DJANGO_MIDDLEWARE = ("opsguard_django.OpsGuardMiddleware",)


RATE = "10000000/minute"
"""A limit that no run reaches: what is measured is a request that is let pass."""
PEPPER = "the pepper of the benchmarks"
_KEYS = {
    "required": ("/json", "/fortunes"),
    "pepper": PEPPER,
    "static": {
        "benchmark": {
            "hash": hmac.new(PEPPER.encode(), KEY.encode(), hashlib.sha256).hexdigest(),
            "tier": "pro",
        }
    },
}

# The guarded app and its parts: what is changed from its defaults.
PARTS: dict[str, dict[str, Any]] = {
    "guarded": {},
    "frame and metrics": {"logging": {"format": "json", "access": "off"}},
    "frame and line": {"metrics": {"enabled": False}},
    "frame": {"metrics": {"enabled": False}, "logging": {"format": "json", "access": "off"}},
}
# With limits and keys, which nobody has who declares none. "limit by decorator" is in the code of
# the app (see `benchmarks.apps`), not in its settings.
LIMITED: dict[str, dict[str, Any]] = {
    "limit by path": {"limiter": {"policies": {"/json": RATE}}},
    "limit by default": {"limiter": {"default": RATE}},
    "limit by decorator": {},
    "key": {"keys": _KEYS, "limiter": {"enabled": False}},
    "limits and keys": {"keys": _KEYS, "limiter": {"tiers": {"pro": RATE}}},
}
KEYED_VARIANTS = ("key", "limits and keys")
"""They answer nobody without a key."""
VARIANTS = PARTS | LIMITED | {"guarded again": {}}


def settings(variant: str = "guarded") -> dict[str, Any]:
    """The keywords of `OpsGuard`: defaults, but for a format that does not depend on a tty."""
    return {
        "service": SERVICE,
        "version": "1",
        "environment": "production",
        "logging": {"format": "json"},
    } | VARIANTS[variant]


def django_settings(variants: Iterable[str]) -> dict[str, Any]:
    """Those of the one guarded variant that a process can have under Django."""
    (variant,) = {name for name in variants if name in VARIANTS} or {"guarded"}
    return settings(variant)


def guarded(
    framework: str, build: Callable[[Around | None], Any], variant: str = "guarded"
) -> tuple[Any, Callable[[], object]]:
    """The app with opsguard on it, and what finishes its deferred work. `build` makes the app; it
    is given the decorator of its JSON handler.
    """
    if framework.startswith("django"):
        from opsguard_django import ops  # the middleware is in the app's settings

        return build(None), drain_of(ops)
    from opsguard import OpsGuard

    ops = OpsGuard(**settings(variant))
    app = build(ops.limit(RATE) if variant == "limit by decorator" else None)
    return install(framework, app, ops), drain_of(ops)


def install(framework: str, app: Any, ops: Any) -> Any:
    """The app with this opsguard on it."""
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
    return app


def drain_of(ops: Any) -> Callable[[], object]:
    """What writes the access lines still in the buffer."""
    flush: Callable[[], bool] = ops.runtime().sink.flush
    return flush
