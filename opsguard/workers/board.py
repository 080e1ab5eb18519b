"""What all workers of a group have to know, told by any of them: log levels, draining, and features
that are switched off.

It is one small JSON file in the folder of the group::

    {"version": 1, "levels": {"shop": {"level": "DEBUG", "until": 1763728000.0}},
     "draining": false, "disabled": ["keys"]}

A writer takes the lock of the file beside it, reads, and puts a new file in the place of the old
one: who reads sees one or the other, and of two writers none is lost. Readers look at the file's
date, at most once a second, when somebody calls `Board.refresh`; what they ask in between is a
plain attribute. A worker that starts later reads the same file, and a restart of the manager starts
with none, as its folder is new.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import stat
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from opsguard.clock import Clock, elapsed, wall

__all__ = ["Board", "Level", "Shared"]

VERSION = 1
EVERY = 1.0
"""Seconds between two looks at the file."""
LARGEST = 64 << 10
"""Bytes of a board; a larger file is none."""
_TRIES, _PAUSE = 200, 0.01  # for the lock, which is held for a fraction of a millisecond
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_WRITE = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
_LOCK = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC

_Signature = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True)
class Level:
    """The level of a logger by its name, and until when: seconds since the epoch, None for ever."""

    level: str
    until: float | None = None


@dataclass(frozen=True, slots=True)
class Shared:
    """What the file says. `levels` are by logger; "" is the root logger."""

    levels: Mapping[str, Level] = field(default_factory=dict)
    draining: bool = False
    disabled: frozenset[str] = frozenset()


class Board:
    """The board of one group.

    `place` names the folder, or None, and may raise OSError: then the board is this process's
    alone. `report(site, error)` hears of a file that is no board, once for each, and of one that
    could not be written. `changed(levels)` hears when other log levels are in force.

    Thread-safe, and goes on in a forked child: it holds no lock and no open file between calls.
    """

    def __init__(
        self,
        place: Callable[[], Path | None],
        report: Callable[[str, BaseException | None], None],
        changed: Callable[[Mapping[str, str]], None],
        *,
        clock: Clock = elapsed,
        wall: Clock = wall,
    ) -> None:
        self._place = place
        self._report = report
        self._changed = changed
        self._clock = clock
        self._wall = wall
        self._folder: Path | None = None
        self._asked = False
        self._seen: tuple[_Signature | None, Shared] = (None, Shared())
        self._told: Mapping[str, str] = {}
        self._due = -math.inf

    @property
    def draining(self) -> bool:
        """Whether the workers are to take no new requests. Nothing refuses any by it yet."""
        return self._seen[1].draining

    @property
    def disabled(self) -> frozenset[str]:
        """The names of the features that are to be off. Nothing is switched by it yet."""
        return self._seen[1].disabled

    @property
    def levels(self) -> Mapping[str, str]:
        """The log levels in force now, by logger."""
        found = self._seen[1].levels
        return _in_force(found, self._wall()) if found else {}

    def refresh(self) -> None:
        """Look at the file if the last look was a second ago. Never raises."""
        now = self._clock()
        if now < self._due:
            return
        self._due = now + EVERY
        self._look()
        self._tell()

    def set_level(self, logger: str, level: str | None, until: float | None = None) -> bool:
        """Give a logger a level, None: its own again. False if only this process knows.

        So for all that change the board: they wait for the file's lock for 2 s at most, never
        raise, and take effect in this process at once.
        """

        def edit(shared: Shared) -> Shared:
            levels = {name: one for name, one in shared.levels.items() if name != logger}
            if level is not None:
                levels[logger] = Level(level, until)
            return replace(shared, levels=levels)

        return self._change(edit)

    def drain(self, draining: bool = True) -> bool:
        """Note for all workers that they are to take no new requests, or to take them again."""
        return self._change(lambda shared: replace(shared, draining=draining))

    def disable(self, feature: str, disabled: bool = True) -> bool:
        """Note for all workers that a feature is to be off, or on again."""
        return self._change(
            lambda shared: replace(
                shared,
                disabled=shared.disabled | {feature} if disabled else shared.disabled - {feature},
            )
        )

    def _change(self, edit: Callable[[Shared], Shared]) -> bool:
        told = False
        try:
            folder = self._found()
            if folder is not None:
                with _locked(folder / "board.lock"):
                    self._look()
                    self._seen = _write(folder, self._prune(edit(self._seen[1])))
                told = True
        except OSError as error:
            self._report("board", error)
        if not told:
            signature, shared = self._seen
            self._seen = (signature, self._prune(edit(shared)))
        self._tell()
        return told

    def _prune(self, shared: Shared) -> Shared:
        """Without the levels whose time is over."""
        now = self._wall()
        levels = {name: one for name, one in shared.levels.items() if _lasts(one, now)}
        return replace(shared, levels=levels)

    def _look(self) -> None:
        folder = self._found()
        if folder is None:
            return
        try:
            signature = _signature((folder / "board").lstat())
        except OSError:
            signature = None
        before, shared = self._seen
        if signature == before:
            return
        try:
            self._seen = (None, Shared()) if signature is None else _read(folder / "board")
        except (OSError, ValueError, RecursionError) as error:
            self._seen = (signature, shared)  # what is known stays in force
            self._report("board", error)

    def _found(self) -> Path | None:
        if not self._asked:
            try:
                self._folder = self._place()
            except OSError:
                self._folder = None  # whoever keeps the numbers there says so
            self._asked = True
        return self._folder

    def _tell(self) -> None:
        levels = self.levels
        if levels != self._told:
            self._told = levels
            self._changed(levels)


def _in_force(levels: Mapping[str, Level], now: float) -> dict[str, str]:
    return {name: one.level for name, one in levels.items() if _lasts(one, now)}


def _lasts(level: Level, now: float) -> bool:
    return level.until is None or now < level.until


def _signature(found: os.stat_result) -> _Signature:
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _read(path: Path) -> tuple[_Signature, Shared]:
    """The board in this file. Raises OSError, ValueError or RecursionError for anything else."""
    file = os.open(path, _READ)
    try:
        found = os.fstat(file)
        if not stat.S_ISREG(found.st_mode) or found.st_size > LARGEST:
            raise ValueError(f"{path} is no board: not a small file")
        return _signature(found), _parse(json.loads(os.read(file, LARGEST)))
    finally:
        os.close(file)


def _parse(said: object) -> Shared:
    if not isinstance(said, dict) or said.get("version") != VERSION:
        raise ValueError("no board of this version")
    levels, draining, disabled = said.get("levels"), said.get("draining"), said.get("disabled")
    if not isinstance(levels, dict) or not isinstance(draining, bool):
        raise ValueError("a board without levels or draining")
    if not isinstance(disabled, list) or not all(isinstance(name, str) for name in disabled):
        raise ValueError("a board without disabled features")
    return Shared(
        {name: _parse_level(one) for name, one in levels.items()}, draining, frozenset(disabled)
    )


def _parse_level(said: object) -> Level:
    level, until = (said.get("level"), said.get("until")) if isinstance(said, dict) else (0, 0)
    dated = until is None or type(until) in (int, float)
    if not isinstance(level, str) or not dated:
        raise ValueError("a board with a level that is none")
    return Level(level, until)


def _write(folder: Path, shared: Shared) -> tuple[_Signature, Shared]:
    levels = {name: {"level": one.level, "until": one.until} for name, one in shared.levels.items()}
    said = {
        "version": VERSION,
        "levels": levels,
        "draining": shared.draining,
        "disabled": sorted(shared.disabled),
    }
    data = json.dumps(said).encode("ascii")
    if len(data) > LARGEST:
        raise OSError(f"a board holds at most {LARGEST} bytes")
    draft = folder / "board.draft"
    file = os.open(draft, _WRITE, 0o600)
    try:
        if os.write(file, data) < len(data):
            raise OSError("no room for the board")
        signature = _signature(os.fstat(file))
    finally:
        os.close(file)
    draft.replace(folder / "board")
    return signature, shared


@contextmanager
def _locked(path: Path) -> Generator[None]:
    file = os.open(path, _LOCK, 0o600)
    try:
        _lock(file)
        yield
        # Not left to the closing: a child forked in this moment has the file open as well.
        fcntl.flock(file, fcntl.LOCK_UN)
    finally:
        os.close(file)


def _lock(file: int) -> None:
    for _ in range(_TRIES):
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(_PAUSE)
    raise TimeoutError("another process keeps the board's lock")
