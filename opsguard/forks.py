"""What a forked child starts anew: locks that a thread of its parent may have held."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

__all__ = ["in_child"]

T = TypeVar("T")

_owners: WeakKeyDictionary[Any, Callable[[Any], None]] = WeakKeyDictionary()


def in_child(owner: T, renew: Callable[[T], None]) -> None:
    """Call `renew(owner)` in each child that this process forks, as long as `owner` lives.

    `renew` replaces locks, and does not take them. It must not refer to `owner` by itself.
    """
    _owners[owner] = renew


def _renew() -> None:
    for owner, renew in list(_owners.items()):
        renew(owner)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)
