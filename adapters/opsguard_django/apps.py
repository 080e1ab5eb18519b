"""The Django app: it registers checks and starts nothing, as `ready` runs for `migrate` too."""

from __future__ import annotations

from django.apps import AppConfig
from django.core import checks

from opsguard_django.checks import marks_have_routes, middleware_is_first

__all__ = ["OpsGuardConfig"]


class OpsGuardConfig(AppConfig):
    name = "opsguard_django"
    verbose_name = "opsguard"

    def ready(self) -> None:
        checks.register(middleware_is_first)
        checks.register(marks_have_routes)
