"""opsguard for Django: an app, a middleware, and `install` for what happens outside of both.

::

    INSTALLED_APPS = [..., "opsguard_django"]
    MIDDLEWARE = ["opsguard_django.OpsGuardMiddleware", ...]
    OPSGUARD = {"service": "checkout"}      # or "project.ops.ops"
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opsguard import OpsGuard
    from opsguard_django.entry import install
    from opsguard_django.middleware import OpsGuardMiddleware

    ops: OpsGuard

__all__ = ["OpsGuardMiddleware", "install", "ops"]


def __getattr__(name: str) -> Any:
    # Django imports this package to find its app before settings and apps are ready.
    if name == "ops":
        from opsguard_django.project import project_ops

        return project_ops()
    if name == "install":
        from opsguard_django.entry import install

        return install
    if name == "OpsGuardMiddleware":
        from opsguard_django.middleware import OpsGuardMiddleware

        return OpsGuardMiddleware
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
