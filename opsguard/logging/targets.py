"""The two places lines can go, written to without ever waiting.

Not thread-safe: the sink's lock is around every call.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import stat
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Protocol, TypeAlias

__all__ = ["PIPE_BUF", "File", "Send", "Stdout", "Target"]

PIPE_BUF: Final[int] = getattr(select, "PIPE_BUF", 4096)
"""Bytes that a pipe takes as one (POSIX): 4096 on Linux."""

Send: TypeAlias = Callable[[bytes], int]
"""Writes as much as goes without waiting and says how much. BlockingIOError if nothing goes now,
any other OSError or ValueError if nothing will."""

_TOLD_BY_CALL: Final = hasattr(socket, "MSG_DONTWAIT") and hasattr(socket, "SOCK_NONBLOCK")
"""Whether each call on a socket can say that it does not wait."""


class Target(Protocol):
    stale: bool
    """Look again where the target is now, at the next `prepare`. Set with each tick."""

    def prepare(self) -> Send:
        """The function that writes to where the target is now. OSError if it is nowhere."""
        ...

    def reentered(self) -> None:
        """The thread that writes to the target has a new line, before it is back from there."""

    def close(self) -> None:
        """Release descriptors. The next `prepare` opens new ones."""

    def terminal(self) -> bool:
        """Whether a person reads it."""
        ...


class Stdout:
    """The process's standard output.

    That is what `sys.stdout` was when we first looked, if it writes to where Python's own stream
    does, until it is closed: what takes its place later, for instance with
    `contextlib.redirect_stdout`, is meant for what one request prints, and is there for all
    threads. A forked child may choose another one that has a descriptor. Had somebody led
    `sys.stdout` elsewhere before us (a notebook, a test's capture), the same hands replace it at
    any time, so it is looked up at each write.

    Python's own stream also stands for an object that logs whatever is written to it, as those do
    that lead `print` to logging: each line would bring one more, without an end.
    """

    __slots__ = ("_channel", "_echo", "_former", "_kept", "_send", "_stream", "_within", "stale")

    def __init__(self) -> None:
        self._stream: Any = sys.stdout
        self._kept = _is_own(sys.stdout)
        self._former: Any = None  # what was kept before a fork
        self._channel: Channel | None = None
        self._send: Send = self._send_to_object
        self._within = False  # the `write` of an object
        self._echo: Any = None  # the object that was found to log what is written to it
        self.stale = True

    def _current(self) -> Any:
        if self._kept and not _ended(self._stream):
            return self._stream
        stream = sys.stdout
        if self._former is not None and not _ended(self._former) and _is_object(stream):
            return self._former
        if stream is None or stream is not self._echo:
            return stream
        own = sys.__stdout__
        return own if own is not self._echo else None

    def prepare(self) -> Send:
        stream = self._current()
        if stream is not self._stream:
            # What stands for an object that logs is not kept: another one may take its place.
            self._stream, self._kept = stream, sys.stdout is not self._echo and _is_own(stream)
        elif not self.stale:
            return self._send
        try:
            number = _descriptor_of(stream)
            # The number can come to mean something else: a daemon's dup2, a capture that ended.
            here = None if number is None else (number, _identity(os.fstat(number)))
        except OSError:
            self.close()  # we would be the last to hold it open, and somebody may wait for its end
            raise
        if self._channel is not None and (self._channel.number, self._channel.identity) != here:
            self._hang_up()
        if number is None:
            self._send = self._send_to_object
        else:
            if self._channel is None:
                self._channel = Channel(number)
            self._send = self._channel.send
        self.stale = False
        return self._send

    def _send_to_object(self, data: bytes) -> int:
        stream = self._stream
        self._within = True
        try:
            stream.write(data.decode("utf-8"))
            if hasattr(stream, "flush"):
                stream.flush()
        finally:
            self._within = False
        if stream is not self._echo:
            return len(data)
        send = self.prepare()  # it came back as lines, so it has been written nowhere yet
        return send(data)

    def reentered(self) -> None:
        # A signal handler that logs at this very moment looks the same, and so does an object that
        # warns of something: no line is lost by it.
        if self._within:
            self._echo = self._stream

    def close(self) -> None:
        if self._kept:
            self._former = self._stream
        self._stream, self._kept = None, False
        self._hang_up()

    def _hang_up(self) -> None:
        self.stale = True
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()

    def terminal(self) -> bool:
        try:
            number = _descriptor_of(self._current())
        except OSError:
            return False
        return number is not None and os.isatty(number)


class File:
    """A path, opened for appending; followed when it is moved away or removed."""

    __slots__ = ("_channel", "_path", "stale")

    def __init__(self, path: Path) -> None:
        self._path = path
        self._channel: Channel | None = None
        self.stale = True

    def prepare(self) -> Send:
        if self._channel is not None and (not self.stale or self._in_place(self._channel)):
            self.stale = False
            return self._channel.send
        self.close()
        # Not waiting: opening a FIFO that nobody reads would.
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NONBLOCK", 0)
        number = os.open(self._path, flags | getattr(os, "O_NOCTTY", 0), 0o644)
        self._channel = Channel(number, owned=True)
        self.stale = False
        return self._channel.send

    def reentered(self) -> None:
        return None

    def _in_place(self, channel: Channel) -> bool:
        try:
            return _identity(self._path.stat()) == channel.identity
        except FileNotFoundError:
            return False

    def close(self) -> None:
        self.stale = True
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()

    def terminal(self) -> bool:
        return False


class Channel:
    """One open file, written to without waiting, through a descriptor that is ours alone.

    O_NONBLOCK is a property of the open file, which standard output shares with other processes
    (a shell, the other workers): setting it there would break them. So a pipe is opened a second
    time, a socket is told by each call, and the rest is asked before each write.
    """

    __slots__ = ("_ours", "_poll", "_socket", "identity", "number", "send")

    send: Send

    def __init__(self, number: int, *, owned: bool = False) -> None:
        """`owned`: the descriptor is ours already, and was opened without waiting."""
        self.number = number
        status = os.fstat(number)
        self.identity = _identity(status)
        self._socket: socket.socket | None = None
        self._poll: select.poll | None = None
        if owned:
            self._ours = number
            self.send = self._send_plain
            return
        reopened = _open_again(number) if stat.S_ISFIFO(status.st_mode) else None
        # A copy, because the number may be closed and given to another file between two looks.
        self._ours = os.dup(number) if reopened is None else reopened
        if reopened is not None or stat.S_ISREG(status.st_mode):
            self.send = self._send_plain
        elif stat.S_ISSOCK(status.st_mode) and _TOLD_BY_CALL:
            # The type says non-blocking, so that Python's object passes over the app's
            # `socket.setdefaulttimeout`, for which it would set O_NONBLOCK and wait in `send`. The
            # open file itself is not changed. Nothing depends on the rest of the type.
            how = socket.SOCK_STREAM | socket.SOCK_NONBLOCK
            self._socket = socket.socket(type=how, fileno=self._ours)
            self.send = self._send_socket
        elif hasattr(select, "poll"):
            self._poll = select.poll()
            self._poll.register(self._ours, select.POLLOUT)
            self.send = self._send_polled
        else:
            self.send = self._send_plain

    def _send_plain(self, data: bytes) -> int:
        return os.write(self._ours, data)

    def _send_socket(self, data: bytes) -> int:
        assert self._socket is not None
        return self._socket.send(data, socket.MSG_DONTWAIT)

    def _send_polled(self, data: bytes) -> int:
        # Writable means room for PIPE_BUF bytes; more could wait. Another process may take the
        # room between the two calls: then we wait for the reader once.
        assert self._poll is not None
        if not self._poll.poll(0):
            raise BlockingIOError("the target takes nothing now")
        return os.write(self._ours, data[:PIPE_BUF])

    def close(self) -> None:
        with contextlib.suppress(OSError):  # of no use to anyone here
            if self._socket is not None:
                self._socket.close()
            else:
                os.close(self._ours)


def _open_again(number: int) -> int | None:
    """The pipe behind `number`, opened without waiting. None where that can't be done: outside
    Linux, without /proc, or if the pipe is another user's.
    """
    try:
        return os.open(f"/proc/self/fd/{number}", os.O_WRONLY | os.O_NONBLOCK)
    except OSError:
        return None


def _descriptor_of(stream: Any) -> int | None:
    """The descriptor behind a stream; None if it is an object with none.

    :raises OSError: there is no stream, as in a process begun without one, or it was closed. The
        number that it would have may already belong to another file.
    """
    if stream is None:
        raise OSError("there is no standard output")
    if _ended(stream):
        raise OSError("standard output is closed")
    try:
        number = stream.fileno()
    except Exception:
        return None
    return number if isinstance(number, int) else None


def _is_own(stream: Any) -> bool:
    """Whether it writes to where Python's own stream does: it is that, or was made of it."""
    own = sys.__stdout__
    try:
        number = _descriptor_of(stream)
        # One whose buffer was taken out, to make another stream of it, does not tell its number.
        theirs = 1 if own is not None and _ended(own) else _descriptor_of(own)
    except OSError:
        return False
    return number is not None and number == theirs


def _is_object(stream: Any) -> bool:
    """Whether it is one without a descriptor, as what captures what is printed."""
    try:
        return _descriptor_of(stream) is None
    except OSError:
        return False


def _ended(stream: Any) -> bool:
    try:
        return bool(getattr(stream, "closed", False))
    except Exception:  # its buffer was taken out, to make another stream of it
        return True


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
