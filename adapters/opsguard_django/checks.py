"""System checks."""

from __future__ import annotations

from typing import Any

from django.conf import settings
from django.core.checks import CheckMessage, Error

__all__ = ["middleware_is_first"]

_MIDDLEWARE = (
    "opsguard_django.OpsGuardMiddleware",
    "opsguard_django.middleware.OpsGuardMiddleware",
)


def middleware_is_first(**_: Any) -> list[CheckMessage]:
    """opsguard.E001: what stands before the middleware is neither measured nor given an id."""
    middleware = list(settings.MIDDLEWARE)
    if middleware and middleware[0] in _MIDDLEWARE:
        return []
    return [
        Error(
            "opsguard_django.OpsGuardMiddleware is not the first entry of MIDDLEWARE.",
            hint="Put it first, so that it sees every request and every answer.",
            id="opsguard.E001",
        )
    ]
