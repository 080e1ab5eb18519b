"""opsguard: one object and one line make a Python web app ready for production."""

from __future__ import annotations

from typing import TYPE_CHECKING

from opsguard.exceptions import DeclarationError, InstallError, OpsGuardError, SettingsError
from opsguard.exchange import Exchange
from opsguard.guard import OpsGuard
from opsguard.http import Response

if TYPE_CHECKING:
    from opsguard.settings import Settings

__all__ = [
    "DeclarationError",
    "Exchange",
    "InstallError",
    "OpsGuard",
    "OpsGuardError",
    "Response",
    "Settings",
    "SettingsError",
    "__version__",
]

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    # Settings bring pydantic with them; an import of opsguard alone should not.
    if name == "Settings":
        from opsguard.settings import Settings

        return Settings
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
