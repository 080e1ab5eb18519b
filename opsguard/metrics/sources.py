"""One file of a group of workers, as somebody else reads it.

Anything may be in the way: a file that is empty, cut short, random, of another version, a link, a
folder, a pipe. Nothing here blocks, and nothing maps the file. Files only grow, so what was parsed
once is kept, and the next reading parses only what is new.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from math import isfinite
from pathlib import Path
from typing import NamedTuple

from opsguard.metrics.definitions import Definition
from opsguard.metrics.exemplars import read_exemplars
from opsguard.metrics.inflight import Open, read_places
from opsguard.metrics.layout import (
    EXEMPLARS,
    FAMILY,
    HEADER_SIZE,
    IN_FLIGHT,
    NAMES,
    SERIES,
    Found,
    Header,
    read_header,
    scan,
)
from opsguard.metrics.text import Exemplar, cleaned

__all__ = [
    "Index",
    "Series",
    "Source",
    "Unreadable",
    "is_held",
    "is_shortage",
    "open_regular",
    "read_whole",
]

_MOST = 64 << 20  # bytes of a file that are read
_FLAGS = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
_FLAGS |= getattr(os, "O_CLOEXEC", 0)


class Unreadable(OSError):
    """What is there is no file of ours."""


def is_shortage(error: OSError) -> bool:
    """Whether the process or the machine is out of descriptors or memory: nothing is wrong with the
    file, and it can be read another time.
    """
    return error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


class Series(NamedTuple):
    """One series of a file: where its first cell is."""

    definition: Definition
    values: tuple[str, ...]
    at: int


class Index:
    """What a file says beside its numbers. Grows with the file; thread-safe under its owner's
    lock.
    """

    __slots__ = ("_by_cell", "_tables", "definitions", "end", "names", "revision", "series")

    def __init__(self) -> None:
        self.series: list[Series] = []
        self.names: frozenset[str] = frozenset()
        """Of the files that are contained in this one: it is a retired file then."""
        self.revision = 0
        self.end = HEADER_SIZE
        """The byte behind the last record that is known."""
        self.definitions: list[Definition | None] = []
        self._tables: list[Found] = []
        self._by_cell: dict[int, Series] = {}

    def grow(self, data: bytes, header: Header) -> None:
        """Take in the records that are new in `data`."""
        for found in scan(data, self.end, header.used):
            self.end = found.end
            if found.kind == SERIES:
                self._add(found)
            elif found.kind == FAMILY:
                self.definitions.append(Definition.read(found.key))
            elif found.kind in (IN_FLIGHT, EXEMPLARS):
                self._tables.append(found)
            elif found.kind == NAMES and isinstance(found.key, list):
                self.names |= {name for name in found.key if isinstance(name, str)}

    def exemplars(self, data: bytes) -> Iterator[tuple[Series, int, Exemplar]]:
        """(series, place in it, exemplar) of all that are whole."""
        for table in self._tables:
            if table.kind == EXEMPLARS and table.end <= len(data):
                for cell, exemplar in read_exemplars(data, table.first, table.width):
                    yield from self._place(cell, exemplar)

    def in_flight(self, data: bytes) -> Iterator[tuple[Series, Open]]:
        """What the process was serving, with the series that counts it as in progress."""
        by_cell = {series.at: series for series in self.series}
        for table in self._tables:
            if table.kind == IN_FLIGHT and table.end <= len(data):
                for place in read_places(data, table.first, table.width):
                    if place.cell in by_cell:
                        yield by_cell[place.cell], place

    def _add(self, found: Found) -> None:
        key = found.key
        if not isinstance(key, list) or not key or type(key[0]) is not int:
            return
        values = tuple(key[1:])
        if not 0 <= key[0] < len(self.definitions) or not all(type(v) is str for v in values):
            return
        definition = self.definitions[key[0]]
        if definition is None or len(values) != len(definition.labels):
            return
        if found.width == definition.width:
            self.series.append(Series(definition, cleaned(values), found.first))

    def _place(self, cell: int, exemplar: Exemplar) -> Iterator[tuple[Series, int, Exemplar]]:
        if len(self._by_cell) != len(self.series):
            self._by_cell = {series.at: series for series in self.series}
        for back in range(512):  # a histogram has at most this many cells
            series = self._by_cell.get(cell - back)
            if series is not None:
                if back < series.definition.width - (series.definition.kind == "histogram"):
                    yield series, back, exemplar
                return


class Source:
    """A file at one moment: its index, which lives on, and its bytes."""

    __slots__ = ("alive", "data", "header", "index", "name", "serves")

    def __init__(self, name: str, data: bytes, header: Header, index: Index, alive: bool) -> None:
        self.name = name
        self.data = data
        self.header = header
        self.index = index
        self.alive = alive
        """A living process's: its gauges count."""
        self.serves = alive
        """A living worker's. Not so the file of a manager that loaded the app and then forked."""

    @classmethod
    def of(cls, name: str, data: bytes, known: Index | None, *, alive: bool) -> Source:
        """Raises Unreadable for bytes that no store wrote."""
        header = read_header(data)
        if header is None:
            raise Unreadable("not a metrics file of this version")
        stale = known is None or known.revision != header.revision
        index = Index() if known is None or stale else known
        index.revision = header.revision
        index.grow(data, header)
        return cls(name, data, header, index, alive)

    def cells(self) -> list[float]:
        """All cells, those of the header and the keys too: they are never looked at. Zeros where
        the file has been cut short.
        """
        missing = self.index.end - len(self.data)
        data = self.data + bytes(missing) if missing > 0 else self.data
        cells: memoryview[float] = memoryview(data)[: len(data) & ~7].cast("d")
        return list(cells)

    def mend(self, cells: list[float]) -> bool:
        """Empty the histograms whose counts are none, which no scrape could show; tells whether
        there were any. A sum may be infinite or no number, as what was observed.
        """
        mended = False
        for definition, _, at in self.index.series:
            end = at + definition.width
            if definition.kind == "histogram" and not isfinite(sum(cells[at : end - 1])):
                cells[at:end] = [0.0] * definition.width
                mended = True
        return mended


def open_regular(path: Path) -> int:
    """Open a file of ours for reading, at once whatever is there. Raises OSError."""
    file = os.open(path, _FLAGS)
    found = os.fstat(file)
    if stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid():
        return file
    os.close(file)
    raise Unreadable(f"{path.name} is not a file of ours")


def is_held(file: int) -> bool:
    """Whether a living process holds the lock of this open file."""
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    fcntl.flock(file, fcntl.LOCK_UN)
    return False


def read_whole(file: int) -> bytes:
    """The header and the finished records of an open file; less if it was cut short."""
    header = read_header(os.pread(file, HEADER_SIZE, 0))
    if header is None:
        raise Unreadable("not a metrics file of this version")
    size = min(header.used, os.fstat(file).st_size, _MOST)
    return os.pread(file, max(size, HEADER_SIZE), 0)
