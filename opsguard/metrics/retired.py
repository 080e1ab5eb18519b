"""What the dead have counted: one file for all of them.

Whoever finds a file that nobody holds folds it: the counters and histograms of the dead worker are
added to those of the retired file, in a new one that names the files it contains, which then takes
the old one's place in one step. Only then the dead worker's file is removed. A reader leaves out
every file that the retired one contains. So wherever a fold is cut off, nothing is lost and nothing
counts twice:

- before the new file is in place, the old one is true, and the dead worker's file is read beside
  it;
- before the dead worker's file is removed, the retired file names it; the next fold removes it.

Names of files that are gone are left out of the next retired file. The newest exemplars of the dead
are kept, gauges end with their process.
"""

from __future__ import annotations

import errno
import os
import secrets
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from opsguard.metrics.definitions import Definition
from opsguard.metrics.exemplars import pack_exemplars
from opsguard.metrics.layout import (
    CLOSED,
    EXEMPLARS,
    FAMILY,
    HEADER_SIZE,
    NAMES,
    SERIES,
    pack_header,
    pack_record,
    read_header,
)
from opsguard.metrics.merge import OVERFLOW
from opsguard.metrics.sources import (
    Source,
    Unreadable,
    is_held,
    is_shortage,
    open_regular,
    read_whole,
)
from opsguard.metrics.store import NEW, WORKER
from opsguard.metrics.text import Exemplar

__all__ = ["RETIRED", "Death", "Interrupted", "fold", "generation", "read_retired"]

RETIRED = "retired"
_DRAFT = "retired-"
_LOCK = "fold"
_LOCK_FLAGS = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
_LOCK_FLAGS |= getattr(os, "O_CLOEXEC", 0)
_GRACE = 60.0  # seconds a file may be unfinished

Totals = dict[Definition, dict[tuple[str, ...], list[float]]]
Exemplars = dict[tuple[Definition, tuple[str, ...], int], Exemplar]


@dataclass(frozen=True, slots=True)
class Interrupted:
    """A request that a dead worker was serving; `started` in monotonic seconds of the machine."""

    method: str
    endpoint: str
    request_id: str
    started: float


@dataclass(frozen=True, slots=True)
class Death:
    """A worker that ended without a word."""

    pid: int
    number: int
    requests: tuple[Interrupted, ...]


def generation(directory: Path) -> int:
    """Which retired file is there: 0 for none, and for what is none. Raises OSError for a shortage,
    in which nobody can tell.
    """
    try:
        file = open_regular(directory / RETIRED)
    except OSError as error:
        if is_shortage(error):
            raise
        return 0
    try:
        header = read_header(os.pread(file, HEADER_SIZE, 0))
    finally:
        os.close(file)
    return 0 if header is None else header.pid


def read_retired(directory: Path, known: Source | None) -> Source | None:
    """The retired file; None if there is none. Raises OSError if it cannot be read."""
    if known is not None and known.header.pid == generation(directory):
        return known
    try:
        file = open_regular(directory / RETIRED)
    except FileNotFoundError:
        return None
    try:
        return Source.of(RETIRED, read_whole(file), None, alive=False)
    finally:
        os.close(file)


def fold(
    directory: Path,
    *,
    limit: int,
    now: float,
    complain: Callable[[str, OSError], None],
) -> list[Death]:
    """Fold the files that nobody holds; returns who died without closing its file.

    Does nothing while another process is at it. Raises OSError if the new file cannot be written:
    then everything is as it was. `complain(name, error)` hears of files that hold nothing.
    """
    with _alone(directory) as free:
        return _fold(directory, limit, now, complain) if free else []


def _fold(
    directory: Path, limit: int, now: float, complain: Callable[[str, OSError], None]
) -> list[Death]:
    try:
        retired = read_retired(directory, None)
    except OSError as error:
        if not isinstance(error, Unreadable) and error.errno != errno.ELOOP:
            raise  # it is there, and can be read another time: what it holds must not go
        complain(RETIRED, error)
        retired = None
    contained = frozenset() if retired is None else retired.index.names
    dead = list(_dead(directory, now, complain))
    present = {source.name for source in dead}
    fresh = [source for source in dead if source.name not in contained]
    if fresh:
        totals: Totals = {}
        exemplars: Exemplars = {}
        for source in (*([] if retired is None else [retired]), *fresh):
            _add(totals, source, limit)
            _keep(exemplars, totals, source)
        _replace(directory, totals, exemplars, sorted(present))
    deaths = []
    for source in dead:
        (directory / source.name).unlink(missing_ok=True)
        if not source.header.flags & CLOSED and _has_counted(source):
            deaths.append(_death(source))
    return deaths


def _has_counted(source: Source) -> bool:
    """Not so the file of a process that was forked for something else, and never served; gauges it
    may have from its parent.
    """
    cells = source.cells()
    counted = [series for series in source.index.series if series.definition.kind != "gauge"]
    return any(any(cells[at : at + kind.width]) for kind, _, at in counted) or any(
        source.index.in_flight(source.data)
    )


def _dead(
    directory: Path, now: float, complain: Callable[[str, OSError], None]
) -> Iterator[Source]:
    """The files of the dead, and none of what can only be removed: that is removed."""
    for entry in sorted(directory.iterdir()):
        if entry.name.startswith(_DRAFT):
            _remove(entry)  # nobody else is writing one: we have the lock
        elif entry.name.startswith((WORKER, NEW)):
            try:
                source = _abandoned(entry, now)
            except OSError as error:
                complain(entry.name, error)
                continue
            if source is not None:
                yield source


def _abandoned(path: Path, now: float) -> Source | None:
    """What a worker left; None if it lives, or if it left nothing. Raises OSError."""
    try:
        file = open_regular(path)
    except FileNotFoundError:
        return None
    try:
        if path.name.startswith(NEW):
            # A young one is not even asked: that takes its lock, which its owner is about to take.
            if now - os.fstat(file).st_mtime > _GRACE and not is_held(file):
                _remove(path)
            return None
        if is_held(file):
            return None
        return Source.of(path.name, read_whole(file), None, alive=False)
    except Unreadable:
        _remove(path)
        raise
    finally:
        os.close(file)


def _add(totals: Totals, source: Source, limit: int) -> None:
    cells = source.cells()
    for definition, values, at in source.index.series:
        if definition.kind == "gauge":
            continue
        family = totals.setdefault(definition, {})
        if values not in family and len(family) >= limit and values:
            values = (OVERFLOW,) * len(values)
        width = definition.width
        sums = family.setdefault(values, [0.0] * width)
        sums[:] = [one + other for one, other in zip(sums, cells[at : at + width], strict=True)]


def _keep(exemplars: Exemplars, totals: Totals, source: Source) -> None:
    for series, place, exemplar in source.index.exemplars(source.data):
        if series.values not in totals.get(series.definition, ()):
            continue  # a gauge's, or one beyond the limit
        known = exemplars.get((series.definition, series.values, place))
        if known is None or known.when < exemplar.when:
            exemplars[series.definition, series.values, place] = exemplar


def _replace(directory: Path, totals: Totals, exemplars: Exemplars, names: list[str]) -> None:
    body = bytearray(pack_record(NAMES, names, b""))
    first: dict[tuple[Definition, tuple[str, ...]], int] = {}
    for number, (definition, family) in enumerate(totals.items()):
        body += pack_record(FAMILY, definition.record(), b"")
        form = struct.Struct(f"={definition.width}d")
        for values, sums in family.items():
            body += pack_record(SERIES, [number, *values], form.pack(*sums))
            first[definition, values] = (HEADER_SIZE + len(body)) // 8 - definition.width
    if exemplars:
        cells = [
            (first[definition, values] + place, exemplar)
            for (definition, values, place), exemplar in exemplars.items()
        ]
        body += pack_record(EXEMPLARS, None, pack_exemplars(cells))
    header = pack_header(pid=secrets.randbits(64) | 1, used=HEADER_SIZE + len(body))
    draft = directory / f"{_DRAFT}{secrets.token_hex(8)}"
    try:
        file = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(file, "wb") as writing:
            writing.write(header + body)
        draft.replace(directory / RETIRED)
    except OSError:
        draft.unlink(missing_ok=True)
        raise


def _death(source: Source) -> Death:
    requests = [
        Interrupted(*series.values[:2], place.request_id, place.started)
        for series, place in source.index.in_flight(source.data)
        if len(series.values) == 2
    ]
    return Death(source.header.pid, source.header.number, tuple(requests))


@contextmanager
def _alone(directory: Path) -> Iterator[bool]:
    """Whether we have the group's lock, until the block ends. Never waits."""
    import fcntl

    file = os.open(directory / _LOCK, _LOCK_FLAGS, 0o600)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)  # a child that was forked meanwhile has a copy
        os.close(file)


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return  # a folder, or not ours to remove
