"""What a forked child begins anew, in two turns: locks first, then what may take them."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

__all__ = ["in_child", "in_each_child", "start_over"]

T = TypeVar("T")
Steps = WeakKeyDictionary[Any, Callable[[Any], None]]

_renewing: Steps = WeakKeyDictionary()
_starting: Steps = WeakKeyDictionary()


def in_child(owner: T, renew: Callable[[T], None]) -> None:
    """Call `renew(owner)` in each child that this process forks, as long as `owner` lives.

    `renew` replaces locks, which a thread of the parent may have held, and lets go of what is the
    parent's. It takes no lock and logs nothing. It must not refer to `owner` by itself.
    """
    _renewing[owner] = renew


def in_each_child(renew: Callable[[], None]) -> None:
    """The same for what a module holds: `renew()`. It is a function of the module."""
    _renewing[renew] = lambda renew: renew()


def start_over(owner: T, start: Callable[[T], None]) -> None:
    """As `in_child`, but when all locks are new, in the order of these calls: `start` may log."""
    _starting[owner] = start


def _begin() -> None:
    for turn in (_renewing, _starting):
        for owner, step in list(turn.items()):
            try:
                step(owner)
            except BaseException:  # as `os.register_at_fork` has it: told, and the next one's turn
                with suppress(BaseException):  # there may be nobody to tell
                    traceback.print_exc()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin)
