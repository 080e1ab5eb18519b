"""Log levels that are changed while a service runs, and changed back.

`logging` is one tree for the process, so what each logger had before is kept in one place. Where
several OpsGuards change the same logger, the last one counts; it gets its own level back when
nobody wants another. A level that somebody else gave it in the meantime is left alone.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final
from weakref import WeakKeyDictionary

from opsguard.forks import in_each_child

__all__ = ["Levels", "level_of_name", "set_aside"]


class Levels:
    """The levels that one OpsGuard wants. Thread- and fork-safe."""

    __slots__ = ("__weakref__",)

    def apply(self, wanted: Mapping[str, str]) -> None:
        """Set these, by logger ("" is the root logger), and take back those that are gone.

        A level that this process does not know is passed over.
        """
        known = logging.getLevelNamesMapping()
        levels = {name: known[level] for name, level in wanted.items() if level in known}
        with _lock:
            for name, level in levels.items():
                change = _changes.setdefault(name, _Change())
                if change.wanted.get(self) != level:
                    change.wanted.pop(self, None)  # the last one counts
                    change.wanted[self] = level
            for name in [name for name in _changes if name not in levels]:
                _changes[name].wanted.pop(self, None)
            for name in list(_changes):
                _settle(name)


@contextmanager
def set_aside() -> Generator[None]:
    """While it lasts, all loggers have the levels that they had before."""
    with _lock:
        for name, change in _changes.items():
            _give_back(name, change)
        try:
            yield
        finally:
            for name in list(_changes):
                _settle(name)


def level_of_name(name: str) -> str:
    """The name of a level as `logging` has it, from any spelling of it or its number.

    :raises ValueError: if it has none.
    """
    level = name.strip().upper()
    if level.isascii() and level.isdigit():
        level = logging.getLevelName(int(level))
    known = logging.getLevelNamesMapping()
    if level not in known:
        raise ValueError(f"{name!r} is no log level: one of {', '.join(known)}")
    return level


@dataclass(slots=True)
class _Change:
    """A logger's own level and the one we gave it, None while it has its own."""

    wanted: WeakKeyDictionary[Levels, int] = field(default_factory=WeakKeyDictionary)
    own: int = logging.NOTSET
    given: int | None = None


_lock = threading.RLock()
_changes: Final[dict[str, _Change]] = {}


def _settle(name: str) -> None:
    change, logger = _changes[name], logging.getLogger(name)
    levels = list(change.wanted.values())
    if not levels:
        _give_back(name, change)
        del _changes[name]
        return
    if change.given is None:
        change.own = logger.level
    change.given = levels[-1]
    if logger.level != change.given:
        logger.setLevel(change.given)


def _give_back(name: str, change: _Change) -> None:
    logger = logging.getLogger(name)
    if change.given is not None and logger.level == change.given:
        logger.setLevel(change.own)
    change.given = None


def _after_fork() -> None:
    global _lock
    _lock = threading.RLock()  # another thread of the parent may have held it


in_each_child(_after_fork)
