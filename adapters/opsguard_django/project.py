"""The project's OpsGuard, as its settings name it."""

from __future__ import annotations

from functools import cache

from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.utils.module_loading import import_string

from opsguard import OpsGuard

__all__ = ["project_ops"]


@cache
def project_ops() -> OpsGuard:
    """The OpsGuard of ``settings.OPSGUARD``: a mapping of its settings, the dotted path of one, or
    one itself. Made once. Raises ImproperlyConfigured for anything else.
    """
    said = getattr(settings, "OPSGUARD", {})
    if isinstance(said, str):
        said = import_string(said)
    if isinstance(said, dict):
        return OpsGuard(**said)
    if isinstance(said, OpsGuard):
        return said
    raise ImproperlyConfigured(
        f"OPSGUARD must be a mapping of settings or the dotted path of an OpsGuard, not {said!r}"
    )
