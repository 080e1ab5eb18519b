"""Where everything lies in the table that the workers of a machine share. Plain arithmetic.

```text
0        header    a page: what is here, for whom, how large; its own checksum
4096     seats     16 bytes for each worker: how many have sat here, whether one held slots
8192     locks     8 bytes for each set; used where the table is in memory only
         sets      8 slots of 64 bytes each: the buckets
         flights   for each seat 512 sets of 8 records of 64 bytes: who has how many in flight
```

A bucket's place is its hash: 128 bits of BLAKE2b over its key, its rate and 32 random bytes of the
table, so nobody can aim for a set. Numbers are in native order: a table never leaves its machine.
"""

from __future__ import annotations

import struct
from hashlib import blake2b
from typing import Final, NamedTuple

__all__ = [
    "AHEAD",
    "EMPTY",
    "FLIGHT",
    "HEADER",
    "MAGIC",
    "SEATS",
    "SET",
    "SHARED",
    "SLOT",
    "SLOTS",
    "Geometry",
    "Header",
    "Salt",
    "pack",
    "unpack",
]

VERSION: Final = 1
MAGIC: Final = b"OPSLIMIT"
SEATS: Final = 192
"""Workers of a table."""
SLOTS: Final = 8
SLOT: Final = 64
SET: Final = SLOTS * SLOT
SHARED: Final = 128
"""Sets, behind the others, for buckets that newcomers share when theirs is full."""
FLIGHTS: Final = 512
"""Sets of records of what one worker has in flight."""
AHEAD: Final = struct.Struct("=16sBxHId")
"""What every slot begins with: hash, strategy, used share in thousandths, a number of the
strategy's own, and when it expires. The state is the other 32 bytes."""
FLIGHT: Final = struct.Struct("=16sq8Id")
"""Who has how many in flight: the bucket, a slice of time, the counts up to it, and until when the
record stands for anything."""
EMPTY: Final = bytes(SLOT)

_PAGE: Final = 4096
_FIELDS = struct.Struct("=8sI16sQ16s16sIq")
_SUM: Final = 8
HEADER: Final = _FIELDS.size + _SUM


class Salt(NamedTuple):
    """The random bytes of a table."""

    salt: bytes
    secret: bytes

    def quota(self, name: str) -> bytes:
        """16 bytes that stand for a rate and its strategy."""
        return blake2b(name.encode(), digest_size=16, key=self.secret).digest()

    def bucket(self, quota: bytes, key: str) -> bytes:
        """The hash of a bucket, of which no two are the same in practice; never all zeros."""
        text = key.encode("utf-8", "surrogatepass")
        return blake2b(text, digest_size=16, salt=self.salt, person=quota).digest()


class Geometry:
    """The size of a table, and what follows from it. Immutable."""

    __slots__ = ("flights", "locks", "sets", "size", "table")

    def __init__(self, sets: int) -> None:
        self.sets = sets
        self.locks = 2 * _PAGE
        self.table = self.locks + _pages((sets + SHARED) * 8)
        self.flights = self.table + _pages((sets + SHARED) * SET)
        self.size = self.flights + SEATS * FLIGHTS * SET

    @classmethod
    def of(cls, keys: int) -> Geometry:
        """Room for so many buckets: a set of eight for three, so that one in 250 is ever full."""
        return cls(max(-(-keys // 3), 64))

    def index(self, digest: bytes) -> int:
        """The set of a bucket."""
        return int.from_bytes(digest[:4], "little") % self.sets

    def shared(self, digest: bytes) -> int:
        """The set of a shared bucket."""
        return self.sets + int.from_bytes(digest[:4], "little") % SHARED

    def set_at(self, index: int) -> int:
        return self.table + index * SET

    def seat_at(self, seat: int) -> int:
        return _PAGE + seat * 16

    def flights_at(self, seat: int, digest: bytes) -> int:
        """Where the record of a bucket is to be looked for among those of a seat."""
        found = int.from_bytes(digest[4:8], "little") % FLIGHTS
        return self.flights + (seat * FLIGHTS + found) * SET

    def all_flights(self, seat: int) -> tuple[int, int]:
        """Begin and length of the records of a seat."""
        return self.flights + seat * FLIGHTS * SET, FLIGHTS * SET


class Header(NamedTuple):
    """What makes two tables the same one."""

    boot: bytes
    """16 bytes of the kernel's boot id: the clock starts at zero with it."""
    space: int
    """The time namespace, where clocks may be offset."""
    salt: Salt
    geometry: Geometry
    segment: int
    """The id of the shared memory segment that has the table; -1: it is in the file."""


def pack(header: Header) -> bytes:
    boot, space, salt, geometry, segment = header
    fields = (MAGIC, VERSION, boot, space, *salt, geometry.sets, segment)
    packed = _FIELDS.pack(*fields)
    return packed + blake2b(packed, digest_size=_SUM).digest()


def unpack(packed: bytes) -> Header | None:
    """The header; None for whatever else may be in its place."""
    fields, checked = packed[: _FIELDS.size], packed[_FIELDS.size : HEADER]
    if len(checked) != _SUM or blake2b(fields, digest_size=_SUM).digest() != checked:
        return None
    magic, version, boot, space, salt, secret, sets, segment = _FIELDS.unpack(fields)
    if (magic, version) != (MAGIC, VERSION):
        return None
    return Header(boot, space, Salt(salt, secret), Geometry(sets), segment)


def _pages(size: int) -> int:
    return -(-size // _PAGE) * _PAGE
