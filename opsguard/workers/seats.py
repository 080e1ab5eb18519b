"""A small number for each living process that shares a file: 0, 1, 2 …, free again when it ends.

A seat is a lock on one byte of a file, at the seat's number. The kernel lets go of it however the
process ends, so the number of a dead worker goes to the next one and labels stay few. The locks are
those of an open file description (``F_OFD_SETLK``, Linux): unlike POSIX locks they are not lost
when some other code in the process opens and closes the same file. Their price: a forked child
holds its parent's seat until it closes the file (:meth:`Seat.leave`) and takes one of its own.
"""

from __future__ import annotations

import fcntl
import os
import struct
from pathlib import Path

__all__ = ["MOST", "OFD_LOCKS", "Seat", "claim", "is_taken"]

MOST = 1024
"""Seats of a file."""

# struct flock of Linux, 64 bits: type, whence, start, length, pid.
_FLOCK = struct.Struct("=hh4xqqi4x")
_SET, _GET = getattr(fcntl, "F_OFD_SETLK", None), getattr(fcntl, "F_OFD_GETLK", None)
OFD_LOCKS = _SET is not None
"""Whether the platform has such locks."""
_FLAGS = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW


class Seat:
    """A seat that this process has taken, until `leave` or its end."""

    __slots__ = ("_file", "number")

    def __init__(self, file: int, number: int) -> None:
        self._file = file
        self.number = number

    @property
    def file(self) -> int:
        """The descriptor that holds the seat, for further locks on the same file; -1 once left."""
        return self._file

    def leave(self) -> None:
        """Give the seat up. In a forked child: close the copy of its parent's, which keeps it.
        Idempotent.
        """
        file, self._file = self._file, -1
        if file >= 0:
            os.close(file)


def claim(path: Path, most: int = MOST) -> Seat:
    """Take the lowest free seat of the file at `path`, which is made if it is not there.

    Raises OSError if the file cannot be had, the platform has no such locks, or all `most` seats
    are taken.
    """
    if _SET is None:
        raise OSError("this platform has no locks of open file descriptions")
    file = os.open(path, _FLAGS, 0o600)
    try:
        for number in range(most):
            if _take(file, number):
                return Seat(file, number)
        raise OSError(f"all {most} seats of {path} are taken")
    except BaseException:
        os.close(file)
        raise


def is_taken(file: int, number: int | None = None) -> bool:
    """Whether another open file than this descriptor's holds the seat, or any. Takes nothing.

    Raises OSError for a descriptor that cannot be asked.
    """
    if _GET is None:
        raise OSError("this platform has no locks of open file descriptions")
    span = (0, 0) if number is None else (number, 1)  # a length of 0 is all of the file
    asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, *span, 0)
    found = fcntl.fcntl(file, _GET, asked)
    kind: int = _FLOCK.unpack(found)[0]
    return kind != fcntl.F_UNLCK


def _take(file: int, number: int) -> bool:
    assert _SET is not None
    try:
        fcntl.fcntl(file, _SET, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, number, 1, 0))
    except (BlockingIOError, PermissionError):
        return False
    return True
