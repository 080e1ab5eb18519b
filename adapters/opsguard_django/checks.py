"""System checks."""

from __future__ import annotations

from typing import Any

from django.conf import settings
from django.core.checks import CheckMessage, Error
from django.utils.module_loading import import_string

from opsguard_django.project import project_ops
from opsguard_django.routes import project_routes

__all__ = ["marks_have_routes", "middleware_is_first"]

_MIDDLEWARE = (
    "opsguard_django.OpsGuardMiddleware",
    "opsguard_django.middleware.OpsGuardMiddleware",
)


def middleware_is_first(**_: Any) -> list[CheckMessage]:
    """opsguard.E001: what stands before the middleware is neither measured nor given an id. A
    class below it, which a project may have made, is as good.
    """
    middleware = list(settings.MIDDLEWARE)
    if middleware and _is_ours(middleware[0]):
        return []
    return [
        Error(
            "opsguard_django.OpsGuardMiddleware is not the first entry of MIDDLEWARE.",
            hint="Put it first, so that it sees every request and every answer.",
            id="opsguard.E001",
        )
    ]


def _is_ours(path: str) -> bool:
    if path in _MIDDLEWARE:
        return True
    from opsguard_django.middleware import OpsGuardMiddleware

    try:
        found = import_string(path)
    except Exception:  # Django says what is wrong with it when it loads its handler
        return False
    return isinstance(found, type) and issubclass(found, OpsGuardMiddleware)


def marks_have_routes(**_: Any) -> list[CheckMessage]:
    """opsguard.E002: a limit or a required key that no route carries guards nothing at the route.
    What is wrong with the settings or the URLconf itself is for others to say.
    """
    try:
        unrouted = project_ops().marked.unrouted(project_routes())
    except Exception:
        return []
    return [
        Error(
            f"No route carries the limits or keys of {name}.",
            hint="Decorate the view that the route leads to; a decorator above ours must use "
            "functools.wraps. URLconfs that a middleware chooses belong into OPSGUARD_URLCONFS.",
            id="opsguard.E002",
        )
        for name in unrouted
    ]
