"""What a handler says about keys. The decorators mark it (see :mod:`opsguard.marks`) and return a
wrapper of its own kind: the route hook reads the marks and asks `KeyGuard.route`, and where that
hook never ran the wrapper sees to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from opsguard.enforcing import enforcing
from opsguard.exceptions import DeclarationError
from opsguard.keys.policy import KeyRequirement

__all__ = ["public", "require_key"]

F = TypeVar("F", bound=Callable[..., Any])


def require_key(*, tiers: Sequence[str] = (), scopes: Sequence[str] = ()) -> Callable[[F], F]:
    """Only callers with an API key of one of `tiers` (none: of any) and with all `scopes`.

    For functions of any kind, methods and classes. Of two on one handler the outer one counts.

    :raises DeclarationError: for a tier or scope that is no text, or a text in place of several.
    """
    for what, texts in (("tiers", tiers), ("scopes", scopes)):
        if isinstance(texts, str) or not all(texts):
            raise DeclarationError(
                f"require_key: {what} must be several texts, as in {what}=('pro',), not {texts!r}"
            )
    requirement = KeyRequirement(tuple(tiers), tuple(scopes))

    def decorate(handler: F) -> F:
        return enforcing(handler, keys=requirement)

    return decorate


def public(handler: F) -> F:
    """No key is needed here, whatever `keys.required` says of the path."""
    return enforcing(handler, public=True)
