"""Everything opsguard raises on purpose.

::

    OpsGuardError
    ├── SettingsError        a wrong value in settings; stops the start
    ├── DeclarationError     a declaration that is wrong, late, or contradicts another
    ├── InstallError         install() on an app it cannot be installed on
    ├── KeyStoreError        the store of API keys cannot be used as it stands
    │   ├── KeyStoreDown     it does not answer
    │   └── NoSuchKey        no key of this id counts
    └── Refused              a decorated function was called, and may not be; carries the answer

What serves a request raises only the last: a request is answered, whatever becomes of our part in
it. `Refused` is how a decorator answers where the route's hook did not; the adapters make it the
answer. `ops.keys` raises what is about the store (`opsguard.keys`), declarations what is wrong with
them, whenever they are called; the other two come at start.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opsguard.http import Response

__all__ = ["DeclarationError", "InstallError", "OpsGuardError", "Refused", "SettingsError"]


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


class Refused(OpsGuardError):
    """A request was refused in the middle of the app; `response` is to be its answer."""

    def __init__(self, response: Response) -> None:
        super().__init__(f"refused with status {response.status}")
        self.response = response
