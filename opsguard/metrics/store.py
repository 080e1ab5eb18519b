"""Numbers in shared memory: one mapped file per process, additions in place, readable by others.

Layout, version 1, native byte order, everything aligned to 8 bytes::

    header    64 bytes   magic "OPSGUARD", version, pid, used (bytes of finished records)
    record    16 bytes   total size, key size, number of cells, kind (see below)
              key        UTF-8 JSON, padded with NUL to 8 bytes
              cells      that many doubles
    record    ...

A family record's key is an object (name, type, help, label names, buckets); its id is its place
among the family records. A series record's key is an array, ``[family id, label values…]``. One
spare record comes first: cells that nobody reads, for samples that have no room. Records are only
ever appended, and `used` is moved past a record after it is complete: a reader that reads `used`
first and then `used` bytes never sees half a record.

**Why no increment is lost.** The writer says ``cells[i] += x`` on a memoryview of doubles with `x`
a float or int. CPython switches threads (and runs signal handlers) only at calls, function entry
and backward jumps; reading a memoryview item, adding two floats and writing the item are three
instructions with none of these between them, so under the GIL the statement is one step. Without
the GIL (a free-threaded build) it is not, and every writer takes the store's lock: see `exclusive`.

**Why no SIGBUS.** A hole in a mapped file on a full disk is SIGBUS on the first write to it. Every
page is reserved with `posix_fallocate` before a cell on it is handed out; if that fails the store
goes on in anonymous memory, or, once open, hands out no new cells. Readers use `read_records`,
which copies with `pread` and maps nothing, so a file cut short by somebody else is a short read.
"""

from __future__ import annotations

import itertools
import json
import mmap
import os
import struct
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from opsguard.accelerator import speed
from opsguard.workers import is_held

__all__ = [
    "FAMILY",
    "SERIES",
    "SPARE",
    "SPARE_CELLS",
    "Record",
    "Store",
    "StoreFull",
    "read_records",
]

MAGIC = b"OPSGUARD"
VERSION = 1
FAMILY, SERIES, SPARE = 0, 1, 2
SPARE_CELLS = 512

_HEADER = struct.Struct("=8sIIQQ")  # magic, version, header size, pid, used
_HEADER_SIZE = 64
_USED_AT = _HEADER.size - 8
_RECORD = struct.Struct("=IIII")  # total size, key size, cells, kind
_LIMIT = 64 << 20  # addresses, not memory: pages are reserved as they are needed
_STEP = 64 << 10
_NO_FILE = "metrics file (numbers are kept in private memory)"
_OPEN_FLAGS = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0)


class StoreFull(Exception):
    """No room for new cells: the disk is full or the store has reached its limit."""


@dataclass(frozen=True, slots=True)
class Record:
    """One record as read back: `cells` are the values at the moment of reading."""

    kind: int
    key: object
    cells: tuple[float, ...]


def gil_enabled() -> bool:
    """Whether this interpreter runs one thread at a time."""
    return getattr(sys, "_is_gil_enabled", lambda: True)()


if TYPE_CHECKING or speed is None:

    class Shelf:
        """Where `cells` is; the accelerator has a type of this name."""

        cells: memoryview[float]

else:
    Shelf = speed.Shelf


class Store(Shelf):
    """The numbers of one process.

    `cells` is a memoryview of doubles over the whole mapping; an index that `allocate` gave stays
    valid for the life of the process and, after a fork, means the same series in the child, which
    starts with a file of its own and zeros. Nothing is opened before the first `allocate`.

    `place` names a directory to put the file in (None: anonymous memory); it is asked again in
    each new process. `complain(site, error)` hears once that the file could not be had.
    """

    def __init__(
        self,
        place: Callable[[], Path | None],
        complain: Callable[[str, BaseException | None], None],
        *,
        limit: int = _LIMIT,
        gil: bool | None = None,
    ) -> None:
        self.cells: memoryview[float] = memoryview(b"").cast("d")
        self.path: Path | None = None
        self.lock = threading.RLock()
        self.gil = gil_enabled() if gil is None else gil
        self.exclusive: AbstractContextManager[object] = nullcontext() if self.gil else self.lock
        """What a writer holds around its additions: nothing under the GIL, else the lock."""
        self._place = place
        self._complain = complain
        self._limit = limit
        self._map: mmap.mmap | None = None
        self._file: int | None = None
        self._used = _HEADER_SIZE
        self._reserved = 0
        self._families = 0
        self.spare = 0
        if hasattr(os, "register_at_fork"):
            _watch_forks(self)

    def family(self, definition: dict[str, object]) -> int:
        """Record a family; returns its id. Raises StoreFull."""
        with self.lock:
            self._append(FAMILY, definition, 0)
            self._families += 1
            return self._families - 1

    def series(self, family: int, labels: tuple[str, ...], count: int) -> int:
        """Record a series of `count` cells, zeroed; returns the index of the first in `cells`.

        Raises StoreFull. Takes the lock; not for the request path, which reuses the index.
        """
        return self._append(SERIES, [family, *labels], count)

    def _append(self, kind: int, key: object, count: int) -> int:
        text = json.dumps(key, ensure_ascii=True, separators=(",", ":")).encode("ascii")
        text += b"\0" * (-len(text) % 8)
        size = _RECORD.size + len(text) + 8 * count
        with self.lock:
            if self._map is None:
                complaint = self._open()
                self.spare = self._append(SPARE, None, SPARE_CELLS)
                if complaint is not None:  # only now, as a complaint is counted in here too
                    self._complain(_NO_FILE, complaint)
            self._reserve(self._used + size)
            assert self._map is not None
            start = self._used
            first = start + _RECORD.size + len(text)
            self._map[start:first] = _RECORD.pack(size, len(text), count, kind) + text
            self._publish(start + size)
        return first // 8

    def read(self) -> bytes:
        """The finished records as they are now, as `read_records` takes them."""
        return b"" if self._map is None else self._map[: self._used]

    def close(self) -> None:
        """Unlink the file; the mapping lives on until its last user is gone. Idempotent."""
        path, self.path = self.path, None
        if path is not None:
            path.unlink(missing_ok=True)
            _remove_empty(path.parent)
        file, self._file = self._file, None
        if file is not None:
            os.close(file)

    def _open(self) -> Exception | None:
        """Map the file, or private memory; returns why it is not the file."""
        complaint: Exception | None = None
        try:
            mapping = self._mapped_file() or _anonymous(self._limit)
        except (OSError, ValueError) as error:
            mapping, complaint = _anonymous(self._limit), error
        self._map = mapping
        self.cells = memoryview(mapping).cast("d")
        header = _HEADER.pack(MAGIC, VERSION, _HEADER_SIZE, os.getpid(), self._used)
        mapping[: len(header)] = header
        return complaint

    def _mapped_file(self) -> mmap.mmap | None:
        directory = self._place()
        if directory is None:
            return None
        path = _free_path(directory)
        file = os.open(path, _OPEN_FLAGS, 0o600)
        try:
            _hold(file)
            os.ftruncate(file, self._limit)
            _fill(file, 0, _STEP)
            mapping = mmap.mmap(file, self._limit)
        except BaseException:
            os.close(file)
            path.unlink(missing_ok=True)
            raise
        self._file, self.path, self._reserved = file, path, _STEP
        return mapping

    def _reserve(self, end: int) -> None:
        if end > self._limit:
            raise StoreFull(f"the store holds at most {self._limit} bytes")
        if self._file is None or end <= self._reserved:
            return
        more = max(_STEP, -(-(end - self._reserved) // _STEP) * _STEP)
        more = min(more, self._limit - self._reserved)
        try:
            _fill(self._file, self._reserved, more)
        except OSError as error:
            raise StoreFull(f"no room for new series: {error}") from error
        self._reserved += more

    def _publish(self, used: int) -> None:
        assert self._map is not None
        self._used = used
        self._map[_USED_AT : _USED_AT + 8] = struct.pack("=Q", used)

    def _after_fork(self) -> None:
        """In the child: the same records in a file of our own, with zeros."""
        self.lock = threading.RLock()
        self.exclusive = nullcontext() if self.gil else self.lock
        if self._map is None:
            return
        records = self._map[_HEADER_SIZE : self._used]
        inherited, self._file, self.path, self._reserved = self._file, None, None, 0
        if inherited is not None:
            os.close(inherited)  # else we would keep the parent's lock when it dies
        complaint = self._open()
        header = self._map[:_HEADER_SIZE]
        try:
            self._reserve(self._used)
        except StoreFull as error:
            complaint = error
            self.close()
            self._map = _anonymous(self._limit)
            self.cells = memoryview(self._map).cast("d")
            self._map[:_HEADER_SIZE] = header
        self._map[_HEADER_SIZE : self._used] = records
        for first, count in _spans(self._map[: self._used]):
            self.cells[first : first + count] = memoryview(bytes(8 * count)).cast("d")
        if complaint is not None:
            self._complain(_NO_FILE, complaint)


def read_records(data: bytes) -> Iterator[Record]:
    """The records in `data`, the first bytes of a store's file. Stops at the first that is not
    whole or not sane; yields nothing for a file of another version. Never raises on bad bytes.
    """
    if len(data) < _HEADER_SIZE:
        return
    magic, version, at, _, used = _HEADER.unpack_from(data)
    if magic != MAGIC or version != VERSION or at != _HEADER_SIZE:
        return
    end = min(used, len(data))
    while at + _RECORD.size <= end:
        size, key_size, count, kind = _RECORD.unpack_from(data, at)
        first = at + _RECORD.size + key_size
        if size != _RECORD.size + key_size + 8 * count or at + size > end or key_size % 8:
            return
        try:
            key = json.loads(data[at + _RECORD.size : first].rstrip(b"\0"))
        except (ValueError, RecursionError):
            return
        yield Record(kind, key, struct.unpack_from(f"={count}d", data, first))
        at += size


def _free_path(directory: Path) -> Path:
    """A path for this process's file. Its other stores hold theirs; one that nobody holds was left
    by an earlier process with our pid.
    """
    pid = os.getpid()
    for number in itertools.count():
        path = directory / (f"worker-{pid}-{number}" if number else f"worker-{pid}")
        if not is_held(path):
            path.unlink(missing_ok=True)
            return path
    raise AssertionError("unreachable")  # pragma: no cover


def _spans(data: bytes) -> Iterator[tuple[int, int]]:
    """(index of the first cell, number of cells) of each record of a store of our own."""
    at = _HEADER_SIZE
    while at < len(data):
        size, key_size, count, _ = _RECORD.unpack_from(data, at)
        yield (at + _RECORD.size + key_size) // 8, count
        at += size


def _anonymous(size: int) -> mmap.mmap:
    if sys.platform == "win32":  # pragma: no cover
        return mmap.mmap(-1, size)
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def _fill(file: int, start: int, size: int) -> None:
    """Make the file system commit to these bytes; OSError if it can't."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, start, size)
    else:  # macOS
        os.pwrite(file, bytes(size), start)


def _hold(file: int) -> None:
    """Alive is who holds the lock: the kernel lets go of it however the process ends."""
    import fcntl

    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _remove_empty(directory: Path) -> None:
    try:
        directory.rmdir()
    except OSError:
        return  # others are still in it


def _watch_forks(store: Store) -> None:
    reference = weakref.ref(store)

    def in_child() -> None:
        alive = reference()
        if alive is not None:
            alive._after_fork()

    os.register_at_fork(after_in_child=in_child)
