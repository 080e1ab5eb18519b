"""The bytes of the shared table, and the locks on its sets.

They are in one of two places, and whoever makes the table decides for all:

A **segment** of System V shared memory, where `opsguard._shared` was built. Nobody can cut it short
under us, as its size is fixed for good; it is marked for removal as soon as it is made, which on
Linux lets others join by its id all the same, and frees it when the last worker ends, however. The
locks are words in it that say who holds them.

The **file** itself, read and written with `pread` and `pwrite`, under locks on ranges of its open
description. Slower, and right everywhere on Linux.

Neither maps a file. In both the file says which table it is, and the seats are locks on it, so that
the kernel knows who lives. Nobody waits for longer than `PATIENCE`, not even for a worker that was
stopped with a lock in its hand.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from secrets import token_bytes
from time import sleep
from typing import Any, Final, Protocol

from opsguard.clock import Clock, elapsed
from opsguard.limiter.layout import HEADER, SEATS, Geometry, Header, Salt, pack, unpack
from opsguard.limiter.stores import StoreDown
from opsguard.workers import Seat, claim, is_taken

__all__ = ["PATIENCE", "FileMemory", "Memory", "SegmentMemory", "join"]

PATIENCE: Final = 0.025
"""Seconds that anybody waits for a lock, if nothing else is said."""

_SPINS: Final = 4
_PAUSE: Final = 0.0002  # seconds between two looks at a lock that is taken
# Who did not get the processor for long has not seen much of the lock: so many looks at least. They
# take less than `PATIENCE` where there is a processor.
_LOOKS: Final = 60
_HURRY: Final = 0.01  # seconds of patience that are too few for them
_SET_LOCKS: Final = 1 << 40  # where the bytes are that stand for the sets' locks
_BEGIN_LOCK: Final = 1 << 41
_LOCKING = getattr(fcntl, "F_OFD_SETLK", None)
_FLOCK = struct.Struct("=hh4xqqi4x")  # struct flock of Linux, as in opsguard.workers.seats
_SEAT = struct.Struct("=QQ")
_BUSY: Final = (errno.EAGAIN, errno.EACCES)


class Memory(Protocol):
    """A table's bytes as this process has them. For one thread at a time."""

    header: Header
    seat: int
    """This process's own number."""

    def lock(self, sets: Sequence[int], patience: float) -> None:
        """Lock these sets, in this order, which is ascending for everybody.

        :raises StoreDown: if one is not to be had within `patience` seconds; then none is held.
        """
        ...

    def unlock(self, sets: Sequence[int]) -> None: ...

    def read(self, at: int, size: int) -> bytes:
        """Exactly `size` bytes; zeros where there are none."""
        ...

    def write(self, at: int, data: bytes) -> None:
        """:raises OSError: for a full disk."""
        ...

    def lives(self, seat: int) -> bool:
        """Whether a process sits there."""
        ...

    def changed(self, path: Path) -> bool:
        """Whether the table at `path` is another one by now, or none."""
        ...

    def leave(self) -> None:
        """Close everything; in a forked child too, whose parent keeps what it has."""
        ...


class _Seated:
    """What both have in common: the file and a seat at it."""

    def __init__(self, seat: Seat, header: Header) -> None:
        self.header = header
        self.seat = seat.number
        self._seat = seat
        self._packed = pack(header)

    def lives(self, seat: int) -> bool:
        return seat == self.seat or is_taken(self._seat.file, seat)

    def leave(self) -> None:
        self._seat.leave()

    def _is_at(self, path: Path) -> bool:
        """Whether our file is still the one at `path`."""
        try:
            there, ours = path.stat(), os.fstat(self._seat.file)
        except OSError:
            return False
        return (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)

    def _found(self) -> bytes:
        return os.pread(self._seat.file, HEADER, 0)


class FileMemory(_Seated):
    """The table in the file."""

    def lock(self, sets: Sequence[int], patience: float) -> None:
        file, held = self._seat.file, 0
        try:
            for index in sets:
                _lock(file, _SET_LOCKS + index, patience)
                held += 1
        except BaseException:
            self.unlock(sets[:held])
            raise

    def unlock(self, sets: Sequence[int]) -> None:
        for index in sets:
            _unlock(self._seat.file, _SET_LOCKS + index)

    def read(self, at: int, size: int) -> bytes:
        return os.pread(self._seat.file, size, at).ljust(size, b"\0")

    def write(self, at: int, data: bytes) -> None:
        if os.pwrite(self._seat.file, data, at) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def changed(self, path: Path) -> bool:
        return self._found() != self._packed or not self._is_at(path)


class SegmentMemory(_Seated):
    """The table in a segment; `segment` is of `opsguard._shared`."""

    def __init__(self, seat: Seat, header: Header, segment: Any) -> None:
        super().__init__(seat, header)
        self.segment = segment
        self.read, self.write = segment.read, segment.write

    def sit(self) -> None:
        """Tell the segment who we are, for its locks."""
        self.segment.sit(self._seat.file, self.seat, self.header.geometry.locks)

    def lock(self, sets: Sequence[int], patience: float) -> None:
        if not self.segment.lock(sets, patience):
            raise StoreDown(f"a set is locked for more than {patience} seconds")

    def unlock(self, sets: Sequence[int]) -> None:
        self.segment.unlock(sets)

    def changed(self, path: Path) -> bool:
        """A file that lost its header gets it back: what it stands for is in memory, and whole."""
        if not self._is_at(path):
            return True
        if self._found() == self._packed:
            return False
        with _beginning(self._seat.file):
            if unpack(self._found()) is None:
                os.pwrite(self._seat.file, self._packed, 0)
        return self._found() != self._packed

    def leave(self) -> None:
        self.segment.close()
        super().leave()


def join(path: Path, keys: int, shared: Any, patience: float = PATIENCE) -> Memory:
    """Take a seat at the table of the file at `path`; make it if there is none that is usable.

    `keys` is the size of a new one. `shared` is the module `opsguard._shared` or None. Others who
    are joining are waited for `patience` seconds.

    :raises StoreDown: if the table is in memory that this process cannot join.
    :raises OSError: if the file cannot be had, or no seat is free.
    """
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        # Before the seat is taken: so whoever sits has joined, while this lock is held.
        with _beginning(file, patience):
            return _taken_seat(path, file, keys, shared)
    finally:
        os.close(file)


def _taken_seat(path: Path, file: int, keys: int, shared: Any) -> FileMemory | SegmentMemory:
    seat = claim(path, SEATS)
    try:
        if not os.path.samestat(os.fstat(file), os.fstat(seat.file)):
            raise StoreDown("the file was replaced this very moment")
        memory = _sit_down(seat, keys, shared)
        _start_afresh(memory)
    except BaseException:
        seat.leave()
        raise
    return memory


def _sit_down(seat: Seat, keys: int, shared: Any) -> FileMemory | SegmentMemory:
    header = unpack(os.pread(seat.file, HEADER, 0))
    if header is not None and (header.boot, header.space) == _here():
        if header.segment < 0:
            return FileMemory(seat, header)
        memory = _joined(seat, header, shared)
        if memory is not None:
            return memory
    return _made(seat, keys, shared)


def _joined(seat: Seat, header: Header, shared: Any) -> SegmentMemory | None:
    """The table in the segment of that header; None: it is gone, with all who shared it."""
    if shared is None:
        raise StoreDown("the other workers share memory, for which this one lacks opsguard._shared")
    try:
        segment = shared.attach(header.segment, header.geometry.size)
    except OSError:
        segment = None
    if segment is not None and segment.read(0, HEADER) == pack(header):
        return SegmentMemory(seat, header, segment)
    if segment is not None:  # somebody else's, with the same id
        segment.close()
    if any(is_taken(seat.file, other) for other in range(SEATS) if other != seat.number):
        raise StoreDown("the memory that the other workers share is out of reach from here")
    return None


def _made(seat: Seat, keys: int, shared: Any) -> FileMemory | SegmentMemory:
    geometry = Geometry.of(keys)
    segment = None
    if shared is not None:
        with contextlib.suppress(OSError):  # there may be none to be had: then the file does
            segment = shared.create(geometry.size)
    header = Header(
        *_here(),
        Salt(token_bytes(16), token_bytes(16)),
        geometry,
        -1 if segment is None else segment.id,
    )
    os.ftruncate(seat.file, 0)  # what an older table left
    if segment is None:
        os.ftruncate(seat.file, geometry.size)
    else:
        segment.write(0, pack(header))
    os.pwrite(seat.file, pack(header), 0)
    if segment is None:
        return FileMemory(seat, header)
    return SegmentMemory(seat, header, segment)


def _start_afresh(memory: FileMemory | SegmentMemory) -> None:
    """Count up who sits here, and forget what the one before had in flight."""
    geometry = memory.header.geometry
    at = geometry.seat_at(memory.seat)
    sat, held = _SEAT.unpack(memory.read(at, _SEAT.size))
    if held:
        begin, size = geometry.all_flights(memory.seat)
        memory.write(begin, bytes(size))
    memory.write(at, _SEAT.pack((sat + 1) % (1 << 32), 0))
    if isinstance(memory, SegmentMemory):
        memory.sit()


def _here() -> tuple[bytes, int]:
    """What a time means here: since which boot, and in which namespace."""
    boot, space = bytes(16), 0
    with contextlib.suppress(OSError, ValueError):
        text = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
        boot = bytes.fromhex(text.strip().replace("-", ""))
    with contextlib.suppress(OSError):
        space = Path("/proc/self/ns/time").stat().st_ino
    return boot, space


@contextlib.contextmanager
def _beginning(file: int, patience: float = PATIENCE) -> Iterator[None]:
    """Nobody else makes or joins the table meanwhile."""
    _lock(file, _BEGIN_LOCK, patience)
    try:
        yield
    finally:
        _unlock(file, _BEGIN_LOCK)


def _lock(file: int, at: int, patience: float, clock: Clock = elapsed) -> None:
    assert _LOCKING is not None  # a seat was claimed, by the same kind of lock
    wanted = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, at, 1, 0)
    tried, until = 0, 0.0
    while True:
        try:
            fcntl.fcntl(file, _LOCKING, wanted)
            return
        except OSError as error:
            if error.errno not in _BUSY:
                raise
        now = clock()
        until = until or now + patience
        if now >= until and (tried > _LOOKS or patience < _HURRY):
            raise StoreDown(f"a lock is held for more than {patience} seconds")
        tried += 1
        if tried < _SPINS:
            os.sched_yield()
        else:
            sleep(_PAUSE)


def _unlock(file: int, at: int) -> None:
    assert _LOCKING is not None
    fcntl.fcntl(file, _LOCKING, _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, at, 1, 0))
