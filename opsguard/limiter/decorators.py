"""`@limit` and `@exempt`: marks on a handler, which hold by :mod:`opsguard.enforcing`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from opsguard.enforcing import enforcing
from opsguard.exceptions import DeclarationError
from opsguard.marks import marks_of
from opsguard.policies import Policy, policy

__all__ = ["exempt", "limit"]

F = TypeVar("F", bound=Callable[..., Any])


def limit(
    rate: str,
    *,
    strategy: str | None = None,
    key: str | Callable[..., object] | None = None,
    cost: int | Callable[..., object] = 1,
    scope: str = "",
    burst: int | None = None,
    on_store_error: str | None = None,
    shadow: bool | None = None,
) -> Callable[[F], F]:
    """Limit a handler, a method of a class-based view, or all of a class.

    `rate` is one rate or several (`"100 per hour; 5/second"`), decided as one. `key` says whose
    bucket: `address`, `key`, `tenant`, `user`, `global`, or a function of the framework's
    request, or of nothing. `cost` is a number or such a function: 0 is free, a negative number or
    an error counts as 1, more than the limit is refused without a time to come again. `scope` names
    a bucket that several handlers share. Limits that are stacked are decided as one.

    :raises DeclarationError: for a rate or an option that could not be meant.
    """
    try:
        made = policy(
            rate,
            strategy=strategy,
            key=key,
            cost=cost,
            scope=scope,
            burst=burst,
            on_store_error=on_store_error,
            shadow=shadow,
        )
        if made.exempt:
            raise ValueError("write @exempt instead")
    except ValueError as error:
        raise DeclarationError(f"limit({rate!r}): {error}") from None

    def decorate(target: F) -> F:
        return enforcing(target, limits=(_named(made, target),))

    return decorate


def exempt(target: F) -> F:
    """Take a handler out of the route's stage: no decorator, tier or default counts for it.

    A policy by path still does: it was decided before the route was known.
    """
    return enforcing(target, exempt=True)


def _named(made: Policy, target: Any) -> Policy:
    """The policy with the function's name, and a number where it is not the first there."""
    inner = getattr(target, "__func__", target)
    path = f"{getattr(inner, '__module__', '')}.{getattr(inner, '__qualname__', '')}"
    name = path.rpartition("<locals>.")[2].strip(".")
    others = len(marks_of(target).limits)
    return made.named(f"{name}#{others + 1}" if others else name)
