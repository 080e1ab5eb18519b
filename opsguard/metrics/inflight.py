"""What a process is serving at this moment, in its file: for the one that finds the file when the
process was killed.

A table of 256 places, each ten cells: when the request began (monotonic seconds, comparable between
the processes of a machine; 0.0: the place is free), the index of its in-progress cell, which tells
method and endpoint, and 64 bytes of its id. What does not fit is in progress all the same.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from opsguard.metrics.layout import HEADER_SIZE, IN_FLIGHT, SPARE, SPARE_CELLS, pack_record

if TYPE_CHECKING:
    from opsguard.metrics.store import Store

__all__ = ["PLACES", "PREFACE", "SPARE_AT", "TABLE_AT", "WIDTH", "Open", "Places", "read_places"]

PLACES, WIDTH = 256, 10
_PLACE = struct.Struct("=dd64s")
_SPARE = pack_record(SPARE, None, bytes(8 * SPARE_CELLS))
_TABLE = pack_record(IN_FLIGHT, None, bytes(8 * PLACES * WIDTH))
PREFACE = _SPARE + _TABLE
"""The records that every store begins with."""
SPARE_AT = (HEADER_SIZE + len(_SPARE)) // 8 - SPARE_CELLS
TABLE_AT = (HEADER_SIZE + len(PREFACE)) // 8 - PLACES * WIDTH
"""The first cell of the table, the same in every store."""


class Open(NamedTuple):
    """A request that had not ended."""

    started: float
    cell: int
    request_id: str


class Places:
    """Takes and frees places. The accelerator's Recorder does the same in C."""

    __slots__ = ("_cells", "_free", "_store")

    def __init__(self, store: Store) -> None:
        self._store = store
        self._cells: object = None
        self._free: list[int] = []

    def take(self, started: float, cell: int, request_id: str) -> int:
        """The first cell of a place that now says this; 0: all are taken."""
        cells = self._store.cells
        if cells is not self._cells:  # the store was opened, or a forked child has its own
            self._cells = cells
            self._free = [TABLE_AT + WIDTH * place for place in range(PLACES)]
        try:
            at = self._free.pop()
        except IndexError:
            return 0
        started = started if started > 0.0 else 1e-9
        _PLACE.pack_into(cells, 8 * at, started, cell, request_id.encode("utf-8", "replace"))
        return at

    def free(self, at: int) -> None:
        """Give back a place that `take` gave; what was taken before a fork is not the child's."""
        cells = self._store.cells
        if at and cells is self._cells and cells[at] != 0.0:
            cells[at] = 0.0
            self._free.append(at)


def read_places(data: bytes, first: int, count: int) -> Iterator[Open]:
    """The taken places of a table in a file; `first` and `count` are its cells."""
    for at in range(first, first + count - WIDTH + 1, WIDTH):
        started, cell, name = _PLACE.unpack_from(data, 8 * at)
        if started > 0.0 and 0.0 <= cell < 2.0**32:
            text = name.rstrip(b"\0").decode("utf-8", "replace")
            yield Open(started, int(cell), text)
