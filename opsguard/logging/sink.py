"""Where finished lines go: standard output or a file, never at the caller's expense.

A caller appends to a list. The bytes leave in batches of whole lines of at most `PIPE_BUF`, which
POSIX makes atomic on a pipe, so that workers which share one never mix their lines. A line leaves
at once, or, where a daemon thread looks after them, in a batch: when that is full, when a line is
urgent, or at the latest after 100 ms.

The thread is started by the first need for it: a feeder whose lines wait, or a target that takes
nothing. Not earlier, because a second thread makes every lock of the process dearer: glibc leaves
out the atomic part of a mutex while there is one thread, and SQLite for one takes dozens of them a
query. Between the start and the stop of a server's event loop a timer of the loop looks after the
feeders instead, and under gunicorn's sync worker the worker itself, when it goes to sleep.

Nothing here waits for the target on a request's time. What cannot be written stays in a buffer of
1 MiB; beyond that the newest lines are dropped and counted, because the oldest say how it began.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Final, Literal, Protocol

from opsguard.forks import in_child
from opsguard.logging.idle import tended_by_server
from opsguard.logging.targets import PIPE_BUF, File, Stdout, Target

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

__all__ = ["Sink", "open_sink"]

BATCH: Final = PIPE_BUF
"""Bytes in one write at most, unless a single line is longer."""
LIMIT: Final = 1 << 20
"""Characters kept while the target takes nothing."""
TICK: Final = 0.1
"""Seconds a line may wait."""
_RETRY: Final = 0.01
"""Seconds until a pipe that was full is tried again: a reader empties its 64 KiB in less."""
_BEAT: Final = 1.0
_IDLE_TICKS: Final = 10
_LOCKED_ROUNDS: Final = 64


class Feeder(Protocol):
    """Makes lines late: it writes them to the sink when it is asked."""

    def drain(self) -> None:
        """Write all lines there are. Any thread; never waits."""

    def forget(self) -> None:
        """In a forked child: the lines there are belong to the parent."""


class Sink:
    """Takes lines from any thread and writes them to one target in their order.

    `file` is a path, or None for standard output. The file is opened for appending at the first
    write and again whenever the path leads elsewhere, so it survives logrotate and several
    workers may share it. Standard output is the descriptor of the process's own stream (see
    :class:`~opsguard.logging.targets.Stdout`), or an object that has none (a notebook, a test's
    capture). While `sys.stdout` is None the target takes nothing.

    `dropped` is called with a number of lost lines, in the thread that lost them.

    Safe in threads, in signal handlers and over a fork: buffered lines are written before it, the
    child starts empty. Construction starts and opens nothing. No method raises.
    """

    def __init__(
        self,
        file: str | os.PathLike[str] | None = None,
        *,
        durability: Literal["batch", "line"] = "batch",
        dropped: Callable[[int], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        # The folder may change later (a daemon goes to "/"); the path must not.
        self._target: Target = Stdout() if file is None else File(Path(file).absolute())
        self._dropped = dropped
        self._clock = clock
        self._each_line = durability == "line"

        self.separated = False
        """A newline within a text parts two lines, as in JSON, where none is within a line."""
        # One list for ever: a writer in another thread may hold it, so it is emptied in place.
        # Append, slice, slice deletion and pop are atomic, with the GIL and without.
        self._lines: list[str] = []
        # Characters in `_lines`. Added to without a lock: exact with the GIL, a hint without (a
        # lost addition makes a batch later by one line, and `_tick` counts anew).
        self._size = 0
        # `write` does no more than append while `_size` is below the mark. The mark is 0 when
        # somebody has to act on the next line, and LIMIT while the target takes nothing.
        self._mark = 0
        self._eager = self._each_line
        self._blocked = False
        self._unsent = b""  # the rest of a batch that was taken in part

        self._gone = False  # blocked, and waiting would not help: closed, no space left
        # The thread and its alarm, replaced as one. A queue, because its `put` is reentrant, unlike
        # threading.Event's `set`: a signal handler may log in the middle of one.
        self._watcher: tuple[threading.Thread, SimpleQueue[bool]] | None = None
        self._parked = False
        self._hooked = False
        self._new_process = True
        self._lock = threading.Lock()  # held by whoever writes; the request path only ever tries it
        self._holder = 0
        self._again = False
        self._feeders: tuple[Feeder, ...] = ()
        self._looks: tuple[Callable[[], object], ...] = ()
        self._loop: AbstractEventLoop | None = None
        self._wanted = False  # the thread is, by a feeder
        self._tended = False  # the server looks after the feeders when it is idle
        # Before all that may write a line in the child, and with it the lines of the parent.
        in_child(self, Sink._after_fork)

    # The request's side ---------------------------------------------------------------------------

    def write(self, line: str, urgent: bool = False) -> None:
        """Take one line, without its newline. `urgent` lines, and all before them, leave at once.

        Never waits for the target and never raises.
        """
        if self._holder and self._holder == threading.get_ident():
            self._target.reentered()
        self._lines.append(line)
        length = len(line) + 1
        self._size += length
        if self._size >= self._mark or urgent:
            self._push(urgent)

    def write_all(self, lines: list[str], urgent: bool = False) -> None:
        """As `write`, for several lines at once. A text may hold some, with newlines between."""
        self._lines.extend(lines)
        self._size += sum(map(len, lines)) + len(lines)
        if self._size >= self._mark or urgent:
            self._push(urgent)

    def feed(self, feeder: Feeder) -> None:
        """Ask `feeder` for its lines whenever those here are looked after."""
        self._feeders = (*self._feeders, feeder)

    def also(self, look: Callable[[], object]) -> None:
        """Call `look` whenever lines are looked after: with each line of a logger, with each batch
        of others, and once a second in the event loop of a server. It must be quick.
        """
        self._looks = (*self._looks, look)

    def look(self) -> None:
        """Call all those. For who writes lines and leaves none to be looked after."""
        try:  # a `suppress` would cost more than the look
            for look in self._looks:
                look()
        except Exception:  # a fault in there must not end the thread
            return

    def nudge(self) -> None:
        """A feeder has its first line: see that somebody looks after it within 100 ms."""
        if self._mark != 0 or self._tended:
            return
        if self._eager:
            self.draw()
        elif self._loop is not None and _running_loop() is self._loop:
            self._loop.call_later(TICK, self._tick)
        elif tended_by_server(self._tick, every=TICK, clock=self._clock):
            self._tended = True
            self._push(True)
        else:
            self._wanted = True
            self._push(True)

    def draw(self) -> None:
        """Take in what the feeders hold. Call it before a line that is younger than theirs."""
        for feeder in self._feeders:
            with contextlib.suppress(Exception):  # a fault in there must not end the thread
                feeder.drain()
        self.look()

    def _push(self, whole: bool) -> None:
        """Write what fills batches, or `whole`: all there is, blocked the last time or not."""
        # Whoever has the lock writes for all. A thread that doesn't get it leaves its line, and
        # `_again` if it is urgent, for the holder, who looks after the release: no line is left
        # behind, nobody waits. A signal handler that interrupts the holder takes the same way out.
        if whole:
            self._again = True
        for _ in range(_LOCKED_ROUNDS):  # bounded: nobody is to write for the others for ever
            if not self._lock.acquire(False):
                return
            lost = 0
            try:
                self._holder = threading.get_ident()
                if self._mark == 0:
                    self._set_up()
                if self._wanted:
                    self._watch()
                alone = self._watcher is None or self._parked
                whole = whole or self._again or alone
                self._again = False
                if alone:  # there are no ticks
                    self._target.stale = True
                if whole or not self._blocked:
                    self._drain(whole)
                if alone and self._blocked:
                    self._watch()
                if self._size > LIMIT:
                    lost = self._trim()
            except Exception:  # a stream object's own: the lines stay, the next tick tries again
                self._blocked = True
            finally:
                self._set_mark()
                self._holder = 0
                self._lock.release()
            if lost:
                self._report(lost)
            if not (self._again or self._left_behind()):
                return

    def _left_behind(self) -> bool:
        """Whether there are lines that no tick and no batch will take along."""
        return bool(self._lines) and self._mark == 0 and not self._blocked

    def _report(self, lost: int) -> None:
        if self._dropped is not None:
            with contextlib.suppress(Exception):
                self._dropped(lost)

    # With the lock held ---------------------------------------------------------------------------

    def _drain(self, whole: bool) -> None:
        """Write until there is nothing left (or no full batch) or the target takes no more."""
        self._blocked = self._gone = False
        try:
            send = self._target.prepare()
            for _ in range(LIMIT // BATCH):  # bounded: others may append as fast as we write
                if not self._unsent:
                    if self._size < BATCH and not whole:
                        return
                    if not self._lines:
                        self._size = 0
                        return
                    self._take_batch()
                sent = send(self._unsent)
                self._unsent = self._unsent[sent:]
        except BlockingIOError:
            self._blocked = True
        except (OSError, ValueError):  # ValueError is a closed file object's way to say it
            self._blocked = self._gone = True

    def _take_batch(self) -> None:
        """Move whole lines from the front, as many as fit, to `_unsent`."""
        taken = size = 0
        for line in self._lines:
            longer = size + len(line) + 1
            if longer > BATCH and taken:
                break
            size = longer
            taken += 1
        lines = self._lines[:taken]
        data = _encode(lines)
        while len(data) > BATCH and len(lines) > 1:  # not ASCII: more bytes than characters
            size -= len(lines.pop()) + 1
            data = _encode(lines)
        # In this order: `flush` in another thread must see the lines in one place or the other.
        self._unsent = data
        del self._lines[: len(lines)]
        self._size -= size

    def _trim(self) -> int:
        """Drop the newest lines beyond the limit. Returns how many."""
        if not self._blocked:
            self._count()  # can't be that much, so it is the hint that is wrong
        lost = 0
        while self._size > LIMIT and self._lines:
            text = self._lines.pop()
            self._size -= len(text) + 1
            lost += text.count("\n") + 1 if self.separated else 1
        return lost

    def _count(self) -> None:
        self._size = sum(map(len, self._lines)) + len(self._lines)

    def _set_mark(self) -> None:
        if self._eager or self._parked or self._watcher is None:
            self._mark = 0
        else:
            self._mark = LIMIT if self._blocked else BATCH

    def _set_up(self) -> None:
        if not self._hooked:
            self._hooked = True
            _at_exit_and_fork(self)
        if self._new_process:
            self._new_process = False
            _at_exit_of_multiprocessing(self)

    def _watch(self) -> None:
        """See that a thread looks after the lines that wait."""
        self._wanted = False
        if self._eager:
            return
        if self._watcher is None:
            alarm: SimpleQueue[bool] = SimpleQueue()
            thread = threading.Thread(
                target=_look_after,
                args=(weakref.ref(self), alarm),
                name="opsguard-log",
                daemon=True,
            )
            try:
                thread.start()
            except RuntimeError:  # no more threads, or the interpreter is going down
                self._eager = True
            else:
                self._watcher = (thread, alarm)
        elif self._parked:
            self._parked = False
            self._watcher[1].put(True)

    # The thread's side ----------------------------------------------------------------------------

    def _tick(self) -> bool:
        """Write what waits. True if there was anything, or still is."""
        self.draw()
        if not self._lines and not self._unsent:
            return False
        self._target.stale = True
        if self._blocked:
            self._count()
        self._push(True)
        return True

    def _park(self) -> bool:
        """Announce that nobody looks any more; False if a line came in at that moment."""
        if not self._lock.acquire(blocking=False):
            return False
        self._parked = True
        self._mark = 0
        self._target.stale = True
        self._lock.release()
        # A writer appends first and reads the mark second; we do it the other way round.
        # One of the two sees the other.
        self.draw()
        if self._lines:
            self._push(True)
        return self._parked

    # The owner's side -----------------------------------------------------------------------------

    def flush(self, timeout: float = 1.0) -> bool:
        """Write all lines, waiting at most `timeout` seconds for the target. True if all left."""
        deadline = self._clock() + timeout
        self.draw()
        self._target.stale = True
        while True:
            self._push(True)
            if not self._lines and not self._unsent:
                return True
            if self._holder == threading.get_ident():
                return False  # we are a signal handler in the middle of a write, which goes on
            left = deadline - self._clock()
            if left <= 0 or self._gone:
                return False
            time.sleep(min(0.005, left))

    def shutdown(self, timeout: float = 1.0) -> None:
        """The service ends: write all lines, and from now on each at once.

        Servers that end by a signal run no exit handlers, so nothing may be left to them.
        """
        self._eager = True
        self._loop = None
        self._tended = False
        self._mark = 0
        self._target.stale = True
        self._stop_thread()
        self.flush(timeout)

    def resume(self) -> None:
        """Batch again after :meth:`shutdown`, for an app that is started a second time."""
        self._eager = self._each_line

    def settle_in(self) -> None:
        """A server says, in its event loop, that it starts: the loop runs until `shutdown`."""
        loop = self._loop = _running_loop()
        if loop is not None and self._looks:
            loop.call_later(_BEAT, self._beat, loop)

    def _beat(self, loop: AbstractEventLoop) -> None:
        """In a server's loop, also while nothing is served."""
        if self._loop is loop:
            self._tick()
            loop.call_later(_BEAT, self._beat, loop)

    def close(self) -> None:
        """Write all lines and release thread and descriptors. A later `write` opens them anew."""
        self.shutdown()
        if self._lock.acquire(timeout=1.0):
            try:
                self._target.close()
            finally:
                self._lock.release()

    @property
    def terminal(self) -> bool:
        """Whether a person reads this: the target is a terminal."""
        return self._target.terminal()

    def _stop_thread(self) -> None:
        watcher, self._watcher = self._watcher, None
        self._parked = False
        self._mark = 0
        if watcher is None:
            return
        thread, alarm = watcher
        alarm.put(False)
        if thread is not threading.current_thread():
            thread.join(TICK)

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # half built, or the interpreter half gone
            self._eager = True
            if self._watcher is not None:
                self._watcher[1].put(False)
            self._push(True)
            self._target.close()

    # Around a fork --------------------------------------------------------------------------------

    def _before_fork(self) -> None:
        self.draw()
        # What stays in the buffer stays with the parent. A thread would not live in the child, and
        # from 3.12 on Python warns about a fork beside one, so ours ends here and starts again.
        self._push(True)
        self._stop_thread()

    def _after_fork(self) -> None:
        self._lock = threading.Lock()  # another thread of the parent may have held it
        self._holder = 0
        self._again = False
        for feeder in self._feeders:
            feeder.forget()
        self._lines.clear()
        self._unsent = b""
        self._size = 0
        # The first thing a daemon does is to fork, the next to part with the old output.
        self._target.close()
        self._watcher = None
        self._parked = self._blocked = self._gone = False
        self._eager = self._each_line
        self._mark = 0
        self._loop = None
        self._tended = False
        self._new_process = True


class SinkSettings(Protocol):
    """What a sink needs of the group `logging` of the settings."""

    @property
    def file(self) -> str | None: ...
    @property
    def durability(self) -> Literal["batch", "line"]: ...


def open_sink(settings: SinkSettings, *, dropped: Callable[[int], None] | None = None) -> Sink:
    """The sink these settings ask for. Nothing is opened before the first line."""
    return Sink(settings.file, durability=settings.durability, dropped=dropped)


def _running_loop() -> AbstractEventLoop | None:
    """The event loop this code runs in. asyncio is not imported for the question."""
    asyncio = sys.modules.get("asyncio")
    loop: AbstractEventLoop | None = None if asyncio is None else asyncio._get_running_loop()
    return loop


def _encode(lines: list[str]) -> bytes:
    return ("\n".join(lines) + "\n").encode("utf-8", "backslashreplace")


def _look_after(ref: weakref.ref[Sink], alarm: SimpleQueue[bool]) -> None:
    """The thread: a tick every 100 ms while lines come, asleep when none came for a second.

    Holds the sink only for the time of a tick, so that it can be collected. In `alarm` True wakes
    the thread and False ends it.
    """
    idle, wait = 0, TICK
    while True:
        try:
            if not alarm.get(timeout=wait if idle < _IDLE_TICKS else None):
                return
            idle = 0
        except Empty:
            sink = ref()
            if sink is None:
                return
            idle = 0 if sink._tick() else idle + 1
            wait = _RETRY if sink._blocked and not sink._gone else TICK
            if idle >= _IDLE_TICKS and not sink._park():
                idle = 0
            del sink


# Exit and fork ------------------------------------------------------------------------------------


def _at_exit_and_fork(sink: Sink) -> None:
    """Registered at the first write, for the life of the process; keeps no sink alive."""
    ref = weakref.ref(sink)

    def before() -> None:
        if (alive := ref()) is not None:
            alive._before_fork()

    atexit.register(_shut_down, ref)
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=before)


def _shut_down(ref: weakref.ref[Sink]) -> None:
    if (alive := ref()) is not None:
        alive.shutdown()


def _at_exit_of_multiprocessing(sink: Sink) -> None:
    """Children of `multiprocessing` end without exit handlers, but run its own finalizers.

    Those registered right after the fork are forgotten; so this is for the first write.
    """
    util = sys.modules.get("multiprocessing.util")
    if util is not None:
        util.Finalize(None, _shut_down, args=(weakref.ref(sink),), exitpriority=0)
