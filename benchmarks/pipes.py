"""Drained pipes: where the access lines of what we measure go.

A container's standard output is a pipe that another process reads. Here it is a thread of the
process above, which throws the bytes away and counts the access lines in them, so that a run
can tell whether the lines were written at all.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading

MARK = b"request_completed"
ROOM = 1 << 20


class Drain:
    """A pipe and the thread that empties it. Give ``writer`` to a child, then `started`."""

    def __init__(self) -> None:
        self._reader, self.writer = os.pipe()
        if hasattr(fcntl, "F_SETPIPE_SZ"):  # room, should the reader have to wait for a core
            with contextlib.suppress(OSError):
                fcntl.fcntl(self.writer, fcntl.F_SETPIPE_SZ, ROOM)
        self.lines = 0
        """Access lines of opsguard."""
        self.printed = 0
        """Lines of any kind."""
        self._thread = threading.Thread(target=self._empty, daemon=True)

    def started(self) -> None:
        """The child has its end: close ours, and read until the child is gone."""
        os.close(self.writer)
        self._thread.start()

    def finish(self, timeout: float = 10.0) -> int:
        """Wait for the end of what was written; the number of access lines seen."""
        self._thread.join(timeout)
        return self.lines

    def _empty(self) -> None:
        tail = b""
        while data := os.read(self._reader, 1 << 16):
            whole = tail + data
            self.lines += whole.count(MARK)
            self.printed += data.count(b"\n")
            tail = whole[-(len(MARK) - 1) :]
        os.close(self._reader)
