"""The bytes of a metrics file: how they are laid out, and how they are read back.

Layout, version 2, native byte order, everything aligned to 8 bytes::

    header    64 bytes   magic "OPSGUARD", version, header size, pid, used (bytes of finished
                         records), worker number, flags, start (seconds since the epoch), revision,
                         12 bytes of zeros
    record    16 bytes   total size, key size, number of cells, kind (see below)
              key        UTF-8 JSON, padded with NUL to 8 bytes
              cells      that many doubles
    record    ...

A family record's key is an object (see `definitions`); its id is its place among the family
records. A series record's key is an array, ``[family id, label values…]``. Records are only ever
appended, and `used` is moved past a record after it is complete: a reader that reads `used` first
and then `used` bytes never sees half a record. The one thing that changes in place, beside cells,
is the kind of a series that was taken off the page: it becomes GONE, and `revision` goes up by one.

The last 8 bytes of the header are a cell that is always 0.0: what a reader takes for a series that
a file does not have.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

__all__ = [
    "EXEMPLARS",
    "FAMILY",
    "GONE",
    "HEADER",
    "HEADER_SIZE",
    "IN_FLIGHT",
    "NAMES",
    "SERIES",
    "SPARE",
    "SPARE_CELLS",
    "ZERO",
    "Found",
    "Header",
    "Record",
    "pack_record",
    "read_header",
    "read_records",
    "scan",
]

MAGIC = b"OPSGUARD"
VERSION = 2
FAMILY, SERIES, SPARE, GONE, IN_FLIGHT, EXEMPLARS, NAMES = range(7)
"""Kinds of records. SPARE comes first: cells that nobody reads, for samples that have no room."""
SPARE_CELLS = 512
CLOSED = 1
"""Flag: the process said that it ends; what it leaves behind is no accident."""

HEADER = struct.Struct("=8sIIQQIIdI12x")
HEADER_SIZE = HEADER.size
USED_AT, FLAGS_AT, REVISION_AT = 24, 36, 48
ZERO = HEADER_SIZE // 8 - 1
RECORD = struct.Struct("=IIII")  # total size, key size, cells, kind


class Header(NamedTuple):
    """A file's first bytes. `token` of a retired file is in the place of `pid`."""

    magic: bytes
    version: int
    size: int
    pid: int
    used: int
    number: int
    flags: int
    started: float
    revision: int


@dataclass(frozen=True, slots=True)
class Record:
    """One record as read back: `cells` are the values at the moment of reading."""

    kind: int
    key: object
    cells: tuple[float, ...]


class Found(NamedTuple):
    """Where a record is: `first` is the index of its first cell, `end` the byte behind it."""

    kind: int
    key: object
    first: int
    width: int
    end: int


def pack_header(
    *, pid: int, used: int, number: int = 0, flags: int = 0, started: float = 0.0
) -> bytes:
    """The header of a new file."""
    return HEADER.pack(MAGIC, VERSION, HEADER_SIZE, pid, used, number, flags, started, 0)


def pack_record(kind: int, key: object, cells: bytes) -> bytes:
    """A record with these cells, as bytes."""
    text = json.dumps(key, ensure_ascii=True, separators=(",", ":")).encode("ascii")
    text += b"\0" * (-len(text) % 8)
    size = RECORD.size + len(text) + len(cells)
    return RECORD.pack(size, len(text), len(cells) // 8, kind) + text + cells


def read_header(data: bytes) -> Header | None:
    """The header at the start of `data`; None if it is not one of this version."""
    if len(data) < HEADER_SIZE or any(data[ZERO * 8 : HEADER_SIZE]):
        return None
    header = Header(*HEADER.unpack_from(data))
    sound = header.magic == MAGIC and header.version == VERSION and header.size == HEADER_SIZE
    return header if sound else None


def scan(data: bytes, at: int, end: int) -> Iterator[Found]:
    """The records between two bytes of a file. Stops at the first that is not whole or not sane."""
    end = min(end, len(data))
    while at + RECORD.size <= end:
        size, key_size, count, kind = RECORD.unpack_from(data, at)
        first = at + RECORD.size + key_size
        if size != RECORD.size + key_size + 8 * count or at + size > end or key_size % 8:
            return
        try:
            key = json.loads(str(data[at + RECORD.size : first], "utf-8").rstrip("\0"))
        except (ValueError, RecursionError):
            return
        at += size
        yield Found(kind, key, first // 8, count, at)


def read_records(data: bytes) -> Iterator[Record]:
    """The records in `data`, the first bytes of a store's file. Stops at the first that is not
    whole or not sane; yields nothing for a file of another version. Never raises on bad bytes.
    """
    header = read_header(data)
    if header is None:
        return
    for found in scan(data, HEADER_SIZE, header.used):
        cells = struct.unpack_from(f"={found.width}d", data, found.first * 8)
        yield Record(found.kind, found.key, cells)
