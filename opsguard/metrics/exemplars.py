"""The last exemplars of a process, in its file, for the worker that answers the scrape.

A table of 128 places, each 96 cells: a check sum of what follows, the cell that the exemplar
belongs to, its value, its moment, the length of its labels and the labels as JSON. A place that is
read while it is written fails the check and is passed over. The newest 128 are kept.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING
from zlib import crc32

from opsguard.metrics.definitions import LABEL
from opsguard.metrics.layout import EXEMPLARS
from opsguard.metrics.text import Exemplar, clean

if TYPE_CHECKING:
    from opsguard.metrics.store import Store

__all__ = ["ExemplarTable", "check_exemplar", "pack_exemplars", "read_exemplars"]

PLACES, WIDTH = 128, 96
_LONGEST = 128
"""Characters of all names and values, OpenMetrics 1.0."""
_SUM = struct.Struct("=Q")
_HEAD = struct.Struct("=dddQ")
_ROOM = 8 * WIDTH - _SUM.size - _HEAD.size


def check_exemplar(labels: Mapping[str, str]) -> dict[str, str]:
    """The labels of an exemplar as the page may have them: the values cleaned.

    Raises ValueError for what no value can be cleaned of, and what would cost the whole page: a
    name that is none, and more characters than OpenMetrics 1.0 allows.
    """
    texts = {name: clean(text) for name, text in labels.items()}
    for name in texts:
        if not LABEL.fullmatch(name):
            raise ValueError(
                f"{name!r} is not a label name for an exemplar: letters, digits and _, "
                "and no digit or __ at its beginning"
            )
    size = sum([len(name) + len(text) for name, text in texts.items()])
    if size > _LONGEST:
        raise ValueError(f"an exemplar has at most {_LONGEST} characters, not {size}")
    return texts


class ExemplarTable:
    """Writes the table of one store; it is made when there is a first exemplar."""

    __slots__ = ("_at", "_places", "_store")

    def __init__(self, store: Store) -> None:
        self._store = store
        self._at = 0
        self._places: dict[int, int] = {}

    def keep(self, cell: int, exemplar: Exemplar) -> None:
        """Write it for others to read. Raises StoreFull; takes the store's lock."""
        place = _pack(cell, exemplar)
        if place is None:
            return  # few of them do not fit; the worker that kept it still shows it
        with self._store.lock:
            if not self._at:
                self._at = self._store.table(EXEMPLARS, PLACES * WIDTH)
            self._store.write(8 * (self._at + WIDTH * self._place(cell)), place)

    def _place(self, cell: int) -> int:
        """The place of this cell's exemplar, moved to the end of the line; the oldest is taken."""
        found = self._places.pop(cell, None)
        if found is None:
            found = len(self._places)
            if found >= PLACES:
                found = self._places.pop(next(iter(self._places)))
        self._places[cell] = found
        return found


def pack_exemplars(kept: Iterable[tuple[int, Exemplar]]) -> bytes:
    """A table of the newest of these, each with its cell: for who writes a file as a whole."""
    newest = sorted(kept, key=lambda one: one[1].when)[-PLACES:]
    places = [_pack(cell, exemplar) for cell, exemplar in newest]
    return b"".join([place.ljust(8 * WIDTH, b"\0") for place in places if place is not None])


def _pack(cell: int, exemplar: Exemplar) -> bytes | None:
    labels = json.dumps(dict(exemplar.labels), ensure_ascii=False).encode()
    if len(labels) > _ROOM:
        return None
    body = _HEAD.pack(cell, exemplar.value, exemplar.when, len(labels)) + labels
    return _SUM.pack(crc32(body)) + body


def read_exemplars(data: bytes, first: int, count: int) -> Iterator[tuple[int, Exemplar]]:
    """(cell, exemplar) of a table in a file; `first` and `count` are its cells."""
    for place in range(first, first + count - WIDTH + 1, WIDTH):
        at = 8 * place + _SUM.size
        cell, value, when, length = _HEAD.unpack_from(data, at)
        if length > _ROOM or not when > 0.0 or not 0.0 <= cell < 2.0**32:
            continue
        (said,) = _SUM.unpack_from(data, 8 * place)
        end = at + _HEAD.size + length
        labels = _labels(data[at + _HEAD.size : end]) if crc32(data[at:end]) == said else None
        if labels is not None and when < 2.0**63:
            yield int(cell), Exemplar(labels, value, when)


def _labels(text: bytes) -> Mapping[str, str] | None:
    try:
        found = json.loads(text)
        return check_exemplar(found) if isinstance(found, dict) else None
    except (ValueError, RecursionError):
        return None
