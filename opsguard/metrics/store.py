"""Numbers in shared memory: one mapped file per process, additions in place, readable by others.

How the file is laid out is told in `layout`.

**Why no increment is lost.** The writer says ``cells[i] += x`` on a memoryview of doubles with `x`
a float or int. CPython switches threads (and runs signal handlers) only at calls, function entry
and backward jumps; reading a memoryview item, adding two floats and writing the item are three
instructions with none of these between them, so under the GIL the statement is one step. Without
the GIL (a free-threaded build) it is not, and every writer takes the store's lock: see `exclusive`.

**Why no SIGBUS.** A hole in a mapped file on a full disk is SIGBUS on the first write to it. Every
page is reserved with `posix_fallocate` before a cell on it is handed out; if that fails the store
goes on in anonymous memory, or, once open, hands out no new cells. Readers copy with `pread` and
map nothing, so a file cut short by somebody else is a short read. Our own file, cut short under us,
is caught by the `Net` of the module in C: the process goes on with empty pages, sees at the next
scrape what happened, and begins again at zero in private memory. Without that module it is SIGBUS.

**Alive** is who holds the lock (`flock`) of the file: the kernel lets go of it however the process
ends. A file is made under another name, and renamed once it is locked and whole: nobody ever finds
one that looks dead because it is just being made. No file is ever removed by its own process;
whoever finds it abandoned adds up what it holds first (see `retired`).
"""

from __future__ import annotations

import atexit
import mmap
import os
import secrets
import struct
import sys
import threading
import time
import weakref
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opsguard.accelerator import shared, speed
from opsguard.clock import Clock, wall
from opsguard.forks import in_child, start_over
from opsguard.metrics.exemplars import ExemplarTable
from opsguard.metrics.inflight import PREFACE, SPARE_AT
from opsguard.metrics.layout import (
    CLOSED,
    FAMILY,
    FLAGS_AT,
    GONE,
    HEADER_SIZE,
    RECORD,
    REVISION_AT,
    SERIES,
    SPARE,
    USED_AT,
    pack_header,
    pack_record,
    read_header,
)

if TYPE_CHECKING:
    from opsguard.metrics.text import Exemplar
    from opsguard.workers import Seat

__all__ = ["NEW", "WORKER", "Store", "StoreFull"]

WORKER, NEW, SEATS = "worker-", "new-", "seats"
"""How the names of finished and of unfinished files begin; where numbers are taken."""
_LIMIT = 64 << 20  # addresses, not memory: pages are reserved as they are needed
_STEP = 64 << 10
_NO_FILE = "metrics file (numbers are kept in private memory)"
_OPEN_FLAGS = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0)
_LOOKERS = 100  # milliseconds
_WORD = struct.Struct("=I")


class StoreFull(Exception):
    """No room for new cells: the disk is full or the store has reached its limit."""


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

    `cells` is a memoryview of doubles over the whole mapping; an index that was handed out stays
    valid for the life of the process and, after a fork, means the same series in the child, which
    starts with a file of its own and zeros. Nothing is opened before the first record.

    `place` names the directory that the workers of a group share (None: anonymous memory); it is
    asked again in each new process. `complain(site, error)` hears once that the file could not be
    had.
    """

    def __init__(
        self,
        place: Callable[[], Path | None],
        complain: Callable[[str, BaseException | None], None],
        *,
        limit: int = _LIMIT,
        gil: bool | None = None,
        clock: Clock = wall,
    ) -> None:
        self.cells: memoryview[float] = memoryview(b"").cast("d")
        self.path: Path | None = None
        self.number = 0
        """Of this worker among the living ones of its group."""
        self.lock = threading.RLock()
        self.gil = gil_enabled() if gil is None else gil
        self.exclusive: AbstractContextManager[object] = nullcontext() if self.gil else self.lock
        """What a writer holds around its additions: nothing under the GIL, else the lock."""
        self.spare = SPARE_AT
        """Cells for what has no room."""
        self._place = place
        self._complain = complain
        self._limit = limit
        self._clock = clock
        self._map: mmap.mmap | None = None
        self._file: int | None = None
        self._net: Any = None
        self._lost = False
        self._seat: Seat | None = None
        self._used = HEADER_SIZE
        self._starts = array("I")
        """The first byte of each record, in their order: where a series is found by its cell."""
        self._reserved = 0
        self._families = 0
        self._revision = 0
        self._exemplars = ExemplarTable(self)
        self._heeded = False
        self._untold: Exception | None = None
        in_child(self, Store._after_fork)
        start_over(self, Store._begin_anew)

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

    def keep_exemplar(self, cell: int, exemplar: Exemplar) -> None:
        """Write the last exemplar of a cell for the other workers to read, if there is room."""
        if self.path is None:
            return  # nobody else reads this
        try:
            self._exemplars.keep(cell, exemplar)
        except StoreFull:
            return

    def tell(self) -> None:
        """Complain of what has kept a record from the file. Whoever records calls it, without the
        lock: a log handler may count something new, and wait for that.
        """
        untold, self._untold = self._untold, None
        if untold is not None:
            self._complain(_NO_FILE, untold)

    def table(self, kind: int, count: int) -> int:
        """Record a table of `count` cells; returns the index of the first. Raises StoreFull."""
        return self._append(kind, None, count)

    def drop(self, firsts: Iterable[int]) -> None:
        """The series with these first cells are not to be read any more. The cells stay taken."""
        self._turn(firsts, SERIES, GONE)

    def revive(self, firsts: Iterable[int]) -> None:
        """The series with these first cells, which were dropped, are to be read again."""
        self._turn(firsts, GONE, SERIES)

    def _turn(self, firsts: Iterable[int], old: int, new: int) -> None:
        with self.lock:
            assert self._map is not None
            for first in firsts:
                start = self._starts[bisect_right(self._starts, 8 * first) - 1]
                _, key_size, _, kind = RECORD.unpack_from(self._map, start)
                # Of a file that was damaged, or was given up for it, there may be no such record.
                if kind == old and start + RECORD.size + key_size == 8 * first:
                    self.write(start + RECORD.size - _WORD.size, _WORD.pack(new))
            self._revision += 1
            self.write(REVISION_AT, _WORD.pack(self._revision))

    def write(self, start: int, data: bytes) -> None:
        """Put bytes where cells of ours are, in one step under the GIL."""
        assert self._map is not None
        self._map[start : start + len(data)] = data

    def read(self) -> bytes:
        """The header and the finished records as they are now."""
        if self._map is None:
            return b""
        if self._damaged():
            self._go_private()
        return self._map[: self._used]

    def _damaged(self) -> bool:
        """Whether somebody has cut the file short, or written over its beginning."""
        if self._map is None or self._file is None or self.path is None:
            return False
        if os.fstat(self._file).st_size != self._limit:
            return True
        header = read_header(self._map[:HEADER_SIZE])
        return header is None or (header.pid, header.used) != (os.getpid(), self._used)

    def _go_private(self) -> None:
        """Begin again at zero, in memory that only this process has. Every index stays valid."""
        with self.lock:
            if not self._damaged():
                return  # another thread was first
            self._let_go()
            self._lost = True
            mapping = _anonymous(self._limit)
            empty = len(pack_record(SPARE, None, b""))
            self._begin(mapping, pack_record(SPARE, None, bytes(self._used - HEADER_SIZE - empty)))
            self._map = mapping  # the net stays: somebody may be about to write to the old one
            self.cells = memoryview(mapping).cast("d")
        self._complain(_NO_FILE, OSError("somebody damaged the file: it begins again at zero"))

    def is_removed(self) -> bool:
        """Whether somebody deleted the file: counting goes on, and nobody else can read it."""
        file = self._file
        return file is not None and os.fstat(file).st_nlink == 0

    def leave(self, leaving: bool = True) -> None:
        """The process says that it ends, or that it goes on after all: what it was serving when it
        ends is no accident then.
        """
        with self.lock:
            if self._map is not None:
                self.write(FLAGS_AT, _WORD.pack(CLOSED if leaving else 0))

    def close(self) -> None:
        """Leave, and let go of the file, which the other workers add to what they know. Counting
        goes on, for nobody. Idempotent.
        """
        self.leave()
        self._let_go()

    def _append(self, kind: int, key: object, count: int) -> int:
        record = pack_record(kind, key, bytes(8 * count))
        with self.lock:
            if self._map is None:
                self._untold = self._open(PREFACE)
            self._reserve(self._used + len(record))
            start = self._used
            self.write(start, record)
            self._starts.append(start)
            self._publish(start + len(record))
        return (start + len(record)) // 8 - count

    def _open(self, records: bytes) -> Exception | None:
        """Map a file that begins with these records, or private memory; returns why it is not the
        file.
        """
        complaint: Exception | None = None
        self.number = 0
        try:
            mapping = self._mapped_file(records) or _anonymous(self._limit)
        except (OSError, ValueError, StoreFull) as error:
            self._let_go()
            mapping, complaint = _anonymous(self._limit), error
        if self.path is None:
            self._begin(mapping, records)
        self._map = mapping
        self._heed_the_end()
        self._used = HEADER_SIZE + len(records)
        self.cells = memoryview(mapping).cast("d")
        return complaint

    def _mapped_file(self, records: bytes) -> mmap.mmap | None:
        directory = None if self._lost else self._place()
        if directory is None:
            return None
        self._take_seat(directory)
        token = secrets.token_hex(8)
        path = directory / f"{NEW}{token}"
        file = os.open(path, _OPEN_FLAGS, 0o600)
        try:
            _hold(file)
            os.ftruncate(file, self._limit)
            self._file, self._reserved = file, _STEP
            _fill(file, 0, _STEP)
            self._reserve(HEADER_SIZE + len(records))
            mapping = _map(path, self._limit)
            self._net = _net_under(mapping)
            self._begin(mapping, records)
            known = path.rename(directory / f"{WORKER}{self.number}-{os.getpid()}-{token}")
        except BaseException:
            self._file = None
            os.close(file)
            path.unlink(missing_ok=True)
            raise
        self.path = known
        return mapping

    def _heed_the_end(self) -> None:
        """Leave when the process ends in good order. The children of `multiprocessing` end without
        `atexit`, and forget at their start what they were to do at the end.
        """
        leave = _weakly(self, Store.leave)
        if not self._heeded:
            self._heeded = True
            atexit.register(leave)
        processes: Any = sys.modules.get("multiprocessing.util")
        if processes is not None:

            def in_child(store: object) -> None:
                processes.Finalize(None, leave, exitpriority=0)

            in_child(self)
            processes.register_after_fork(self, in_child)

    def _take_seat(self, directory: Path) -> None:
        """Without seats (macOS has none) the pid is as good a number, if not as small."""
        from opsguard.workers import claim

        try:
            self._seat = claim(directory / SEATS)
            self.number = self._seat.number
        except OSError:
            self.number = os.getpid()

    def _begin(self, mapping: mmap.mmap, records: bytes) -> None:
        used = HEADER_SIZE + len(records)
        self._starts = array("I", [HEADER_SIZE + at for at, _, _, _ in _spans(records)])
        mapping[HEADER_SIZE:used] = records
        mapping[:HEADER_SIZE] = pack_header(
            pid=os.getpid(), used=used, number=self.number, started=self._clock()
        )

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
        self._used = used
        self.write(USED_AT, struct.pack("=Q", used))

    def _let_go(self) -> None:
        """Of the file and the seat; in a forked child, of its copies of the parent's."""
        file, self._file, self.path, self._reserved = self._file, None, None, 0
        if file is not None:
            os.close(file)
        seat, self._seat = self._seat, None
        if seat is not None:
            seat.leave()

    def _after_fork(self) -> None:
        self.lock = threading.RLock()
        self.exclusive = nullcontext() if self.gil else self.lock

    def _begin_anew(self) -> None:
        """In the child: the same records in a file of our own, with zeros."""
        if self._map is None:
            return
        records = bytearray(self._map[HEADER_SIZE : self._used])
        self._families = 0  # another thread may have been about to count one
        for _, start, size, kind in _spans(records):
            records[start : start + size] = bytes(size)
            self._families += kind == FAMILY
        self._let_go()  # else we would keep the parent's lock when it dies
        complaint = self._open(bytes(records))
        if complaint is not None:
            self._complain(_NO_FILE, complaint)


def _spans(records: bytes | bytearray) -> Iterator[tuple[int, int, int, int]]:
    """Of each record of our own: its start, the start and size of its cells, its kind; in bytes."""
    at = 0
    while at < len(records):
        size, key_size, count, kind = RECORD.unpack_from(records, at)
        yield at, at + RECORD.size + key_size, 8 * count, kind
        at += size


def _net_under(mapping: mmap.mmap) -> Any:
    """A `Net`; None where there is none, or one process has more stores than the nets there are."""
    try:
        return None if shared is None else shared.Net(mapping)
    except OSError:
        return None


def _anonymous(size: int) -> mmap.mmap:
    if sys.platform == "win32":  # pragma: no cover
        return mmap.mmap(-1, size)
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def _map(path: Path, size: int) -> mmap.mmap:
    """The mapping keeps a copy of its descriptor, with which a forked child would hold our lock for
    as long as anybody there refers to the old cells: so it gets a description of its own.
    """
    file = os.open(path, os.O_RDWR | getattr(os, "O_CLOEXEC", 0))
    try:
        return mmap.mmap(file, size)
    finally:
        os.close(file)


def _fill(file: int, start: int, size: int) -> None:
    """Make the file system commit to these bytes; OSError if it can't."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, start, size)
    else:  # macOS
        os.pwrite(file, bytes(size), start)


def _hold(file: int) -> None:
    """Nobody else wants this lock, but who looks whether it is held has it for a moment."""
    import fcntl

    for _ in range(_LOOKERS):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.001)
        else:
            return
    raise BlockingIOError("somebody else holds the lock of a new metrics file")


def _weakly(store: Store, method: Callable[[Store], None]) -> Callable[[], None]:
    """A call of the method that does not keep the store alive."""
    reference = weakref.ref(store)

    def call() -> None:
        alive = reference()
        if alive is not None:
            method(alive)

    return call
