"""Everything opsguard raises on purpose.

::

    OpsGuardError
    ├── SettingsError        a wrong value in settings; stops the start
    ├── DeclarationError     something declared after install() froze the declarations
    └── InstallError         install() on an app it cannot be installed on

All of them are raised at start, none while a request is served: a request is answered,
whatever becomes of our part in it.
"""

from __future__ import annotations

__all__ = ["DeclarationError", "InstallError", "OpsGuardError", "SettingsError"]


class OpsGuardError(Exception):
    """The root of all errors of this package."""


class SettingsError(OpsGuardError):
    """One or more settings have a wrong value. The message lists each with its source."""


class DeclarationError(OpsGuardError):
    """A declaration came too late, twice, or contradicts an earlier one."""

    @classmethod
    def frozen(cls, what: str) -> DeclarationError:
        return cls(
            f"{what} must be declared before install(): this OpsGuard is already installed "
            "and its declarations are frozen"
        )


class InstallError(OpsGuardError):
    """The app cannot be guarded as asked. The message says what to do instead."""
