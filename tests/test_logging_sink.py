"""The sink: nothing lost, nothing torn, nothing twice, and nobody waits."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import io
import itertools
import json
import os
import pty
import select
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from opsguard.logging import Sink, open_sink, targets
from opsguard.logging import sink as sink_module
from opsguard.settings import Logging

LIMIT = sink_module.LIMIT


@pytest.fixture
def slow_tick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread does nothing in the time of a test, so that only the caller's side is seen."""
    monkeypatch.setattr(sink_module, "TICK", 60.0)


@pytest.fixture
def sink(tmp_path: Path) -> Iterator[Sink]:
    made = Sink(tmp_path / "app.log")
    yield made
    made.close()


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "app.log"


class Pipe:
    """A pipe as standard output, and what came out of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reader, writer = os.pipe()
        os.set_blocking(self.reader, False)
        self.stream = os.fdopen(writer, "w")
        self._monkeypatch = monkeypatch
        self._sinks: list[Sink] = []

    def sink(self, **options: Any) -> Sink:
        # Not in the fixture: pytest sets standard output again before the test begins.
        self._monkeypatch.setattr(sys, "stdout", self.stream)
        self._sinks.append(Sink(**options))
        return self._sinks[-1]

    def read(self) -> str:
        """All there is now."""
        chunks: list[bytes] = []
        ready = select.poll()  # `select` takes no descriptor above 1023, which a long run may have
        ready.register(self.reader, select.POLLIN)
        while ready.poll(0) and (chunk := os.read(self.reader, 1 << 16)):
            chunks.append(chunk)
        return b"".join(chunks).decode()

    def close(self) -> None:
        os.close(self.reader)
        for sink in self._sinks:
            sink.close()
        self.stream.close()


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[Pipe]:
    made = Pipe(monkeypatch)
    yield made
    made.close()


def until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    """Wait for another thread or process; for what takes milliseconds, so the bound is generous."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


def run(script: str, *args: str) -> subprocess.CompletedProcess[bytes]:
    """A script in a process of its own; its stderr must stay empty."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(script), *args],
        capture_output=True,
        timeout=60,
    )
    assert done.stderr == b""
    return done


def our_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "opsguard-log"]


# When lines leave ---------------------------------------------------------------------------------


def test_construction_starts_no_thread_and_opens_no_file(sink: Sink, log: Path) -> None:
    assert our_threads() == []
    assert not log.exists()


@pytest.mark.usefixtures("slow_tick")
def test_a_batch_waits_until_it_is_full_and_keeps_the_order(sink: Sink, log: Path) -> None:
    """Four full batches leave by themselves; the rest of the lines waits for the next."""
    lines = [f"{n:03d}" + "x" * 97 for n in range(200)]
    sink.nudge()
    for line in lines:
        sink.write(line)
    there = log.read_text().splitlines()
    assert 0 < len(there) < 200
    assert there == lines[: len(there)]
    assert sink.flush()
    assert log.read_text().splitlines() == lines


def test_a_line_leaves_by_itself_after_a_tick(sink: Sink, log: Path) -> None:
    sink.nudge()
    sink.write("alone")
    until(lambda: log.exists() and log.read_text() == "alone\n")


def test_without_a_feeder_each_line_leaves_at_once_and_no_thread_is_needed(
    sink: Sink, log: Path
) -> None:
    sink.write("one")
    assert log.read_text() == "one\n"
    sink.write("two")
    assert log.read_text() == "one\ntwo\n"
    assert our_threads() == []


def test_in_the_loop_of_a_server_a_timer_of_it_stands_for_the_thread(sink: Sink, log: Path) -> None:
    class Feeder:
        def __init__(self) -> None:
            self.lines = ["fed"]

        def drain(self) -> None:
            while self.lines:
                sink.write(self.lines.pop())

        def forget(self) -> None:
            self.lines.clear()

    async def serve() -> None:
        sink.settle_in()
        sink.feed(Feeder())
        sink.nudge()
        assert not log.exists()
        await asyncio.sleep(sink_module.TICK * 3)
        assert log.read_text() == "fed\n"
        assert our_threads() == []
        sink.shutdown()

    asyncio.run(serve())


def test_a_pipe_that_is_full_in_a_loop_is_tried_again_by_the_thread(pipe: Pipe) -> None:
    sink = pipe.sink()

    async def serve() -> None:
        sink.settle_in()
        while not our_threads():
            sink.write("x" * 4000)
        sink.write("the last")
        got = ""
        for _ in range(500):
            got += pipe.read()
            if got.endswith("the last\n"):
                return
            await asyncio.sleep(0.01)
        raise AssertionError("it stayed in the buffer")

    asyncio.run(serve())


@pytest.mark.usefixtures("slow_tick")
def test_an_urgent_line_leaves_at_once_with_all_before_it(sink: Sink, log: Path) -> None:
    sink.nudge()
    sink.write("calm")
    assert not log.exists() or log.read_text() == ""
    sink.write("urgent", True)
    assert log.read_text() == "calm\nurgent\n"


@pytest.mark.usefixtures("slow_tick")
def test_with_durability_line_each_line_leaves_at_once_and_no_thread_is_needed(log: Path) -> None:
    sink = open_sink(Logging(file=str(log), durability="line"))
    sink.write("one")
    assert log.read_text() == "one\n"
    assert our_threads() == []
    sink.close()


@pytest.mark.usefixtures("slow_tick")
def test_after_shutdown_each_line_leaves_at_once_and_after_resume_they_batch_again(
    sink: Sink, log: Path
) -> None:
    sink.nudge()
    sink.write("before")
    sink.shutdown()
    assert log.read_text() == "before\n"
    assert our_threads() == []
    sink.write("after")
    assert log.read_text() == "before\nafter\n"
    sink.resume()
    sink.nudge()
    sink.write("waits")
    assert "waits" not in log.read_text()


def test_a_thread_that_fell_asleep_wakes_for_the_next_line(
    sink: Sink, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sink_module, "TICK", 0.002)
    sink.nudge()
    sink.write("one")
    until(lambda: sink._parked)
    (thread,) = our_threads()
    sink.nudge()
    sink.write("two")
    until(lambda: log.read_text() == "one\ntwo\n")
    assert our_threads() == [thread]


def test_where_no_thread_can_start_lines_leave_at_once(
    sink: Sink, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    sink.write("one")
    sink.write("two")
    assert log.read_text() == "one\ntwo\n"


def test_a_collected_sink_writes_its_lines_and_ends_its_thread(log: Path) -> None:
    sink = Sink(log)
    sink.nudge()
    sink.write("last words")
    (thread,) = our_threads()
    del sink
    gc.collect()
    assert log.read_text() == "last words\n"
    thread.join(10)
    assert not thread.is_alive()


def test_a_line_after_close_opens_the_file_again(sink: Sink, log: Path) -> None:
    sink.write("one")
    sink.close()
    sink.write("two")
    assert log.read_text() == "one\ntwo\n"


# Batches ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("letter", ["x", "ü", "\U0001f600"], ids=["1 byte", "2 bytes", "4 bytes"])
@pytest.mark.usefixtures("slow_tick")
def test_no_write_is_longer_than_a_pipe_takes_as_one_and_none_splits_a_line(
    letter: str, pipe: Pipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes: list[bytes] = []
    write = os.write

    def recorded(number: int, data: bytes) -> int:
        writes.append(bytes(data))
        return write(number, data)

    monkeypatch.setattr(targets.os, "write", recorded)
    sink = pipe.sink()
    lines = [letter * (n * 37 % 900) for n in range(120)]
    got = ""
    sink.nudge()
    for line in lines:
        sink.write(line)
        got += pipe.read()
    assert sink.flush()
    got += pipe.read()
    assert got.splitlines() == lines
    assert all(data.endswith(b"\n") and len(data) <= 4096 for data in writes)
    assert len(writes) < len(lines)


def test_a_line_longer_than_a_batch_is_written_as_it_is(sink: Sink, log: Path) -> None:
    long = "y" * 300_000
    for line in ("a", long, "b"):
        sink.write(line)
    sink.flush()
    assert log.read_text().split("\n") == ["a", long, "b", ""]


def test_a_lone_surrogate_is_written_as_its_escape(sink: Sink, log: Path) -> None:
    sink.write("\udcff", True)
    assert log.read_text() == "\\udcff\n"


def test_sixteen_threads_lose_and_tear_nothing(sink: Sink, log: Path) -> None:
    def work(worker: int) -> None:
        for n in range(1_500):
            sink.write(f"{worker}:{n}:" + "z" * (n % 50), n % 97 == 0)

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sink.flush(10.0)
    lines = log.read_text().splitlines()
    for worker in range(16):
        mine = [line for line in lines if line.startswith(f"{worker}:")]
        assert mine == [f"{worker}:{n}:" + "z" * (n % 50) for n in range(1_500)]
    assert len(lines) == 16 * 1_500


@pytest.mark.parametrize("parked", [False, True], ids=["no thread", "a thread that sleeps"])
def test_a_line_that_comes_as_another_thread_lets_go_is_not_left_behind(
    parked: bool, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That thread has found the buffer empty, and who comes finds the lock taken."""

    class Overtaken(Sink):
        def _set_mark(self) -> None:
            if late:
                other = threading.Thread(target=self.write, args=(late.pop(),))
                other.start()
                other.join()
            super()._set_mark()

    monkeypatch.setattr(sink_module, "TICK", 0.002)
    late: list[str] = []
    sink = Overtaken(log)
    if parked:
        sink.nudge()
        sink.write("before")
        until(lambda: sink._parked)
    late.append("second")
    sink.write("first")
    assert log.read_text().splitlines()[-2:] == ["first", "second"]
    sink.close()


def test_processes_that_share_a_pipe_tear_nothing() -> None:
    """Four children with four threads each write to one standard output."""
    script = """
        import os, threading
        from opsguard.logging import Sink
        sink = Sink()
        sink.write("parent")
        children = []
        for child in range(4):
            pid = os.fork()
            if not pid:
                def work(t):
                    for n in range(400):
                        sink.write(f"{child}/{t}/{n}/" + "x" * (n * 7 % 600) + "/end")
                threads = [threading.Thread(target=work, args=(t,)) for t in range(4)]
                for t in threads: t.start()
                for t in threads: t.join()
                os._exit(0 if sink.flush(30) else 1)
            children.append(pid)
        for pid in children:
            assert os.waitpid(pid, 0)[1] == 0
    """
    lines = run(script).stdout.decode().splitlines()
    assert sorted(lines) == sorted(
        ["parent"]
        + [
            f"{child}/{t}/{n}/" + "x" * (n * 7 % 600) + "/end"
            for child in range(4)
            for t in range(4)
            for n in range(400)
        ]
    )


# A target that is full, closed or away ------------------------------------------------------------


@pytest.mark.usefixtures("slow_tick")
def test_a_full_pipe_keeps_the_oldest_lines_and_counts_the_newest_as_dropped(pipe: Pipe) -> None:
    """Nobody reads; three times the buffer is written; whoever reads later finds the beginning."""
    lost: list[int] = []
    sink = pipe.sink(dropped=lost.append)
    lines = [f"{n:06d}" + "x" * 200 for n in range(3 * LIMIT // 207)]
    for line in lines:
        sink.write(line)
    got = ""
    while not sink.flush(0.0):
        got += pipe.read()
    got += pipe.read()
    kept = got.splitlines()
    assert kept == lines[: len(kept)]
    assert len(kept) + sum(lost) == len(lines)
    assert LIMIT <= len(got) < LIMIT + 200_000
    sink.write("again", True)
    assert pipe.read() == "again\n"


@pytest.mark.usefixtures("slow_tick")
def test_lines_of_one_text_are_counted_each_when_they_are_dropped(pipe: Pipe) -> None:
    lost: list[int] = []
    sink = pipe.sink(dropped=lost.append)
    sink.separated = True
    texts = ["\n".join(f"{n:06d}.{m}" + "x" * 200 for m in range(16)) for n in range(600)]
    for text in texts:
        sink.write_all([text])
    got = ""
    while not sink.flush(0.0):
        got += pipe.read()
    got += pipe.read()
    assert len(got.splitlines()) + sum(lost) == 600 * 16
    assert sum(lost) > 0


@pytest.mark.usefixtures("slow_tick")
def test_a_record_of_several_lines_is_dropped_as_one(pipe: Pipe) -> None:
    """A traceback, as it is written for people."""
    lost: list[int] = []
    sink = pipe.sink(dropped=lost.append)
    for n in range(600):
        sink.write(f"{n:06d}" + "\n  File" * 600)
    got = ""
    while not sink.flush(0.0):
        got += pipe.read()
    got += pipe.read()
    assert (got.count("\n") - got.count("\n  File")) + sum(lost) == 600
    assert sum(lost) > 0


@pytest.mark.usefixtures("slow_tick")
def test_a_blocked_pipe_does_not_delay_a_writer(pipe: Pipe) -> None:
    """The pipe holds 64 KiB. If a write waited for it, this test would never end."""
    sink = pipe.sink()
    for _ in range(1_000):
        sink.write("x" * 300, True)
    assert not sink.flush(0.0)
    while not sink.flush(0.0):
        pipe.read()


@pytest.mark.parametrize("default", [None, 30.0], ids=["no time limit", "an app's time limit"])
def test_a_full_socket_does_not_delay_a_writer(
    default: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """systemd gives its services a socket as standard output. An app's `setdefaulttimeout` is for
    the sockets that it makes.
    """
    ours, theirs = socket.socketpair()
    with os.fdopen(os.dup(theirs.fileno()), "w") as stream, ours, theirs:
        monkeypatch.setattr(sys, "stdout", stream)
        sink = Sink()
        lines = [f"{n:05d}" + "x" * 300 for n in range(3_000)]
        socket.setdefaulttimeout(default)
        try:
            sink.write(lines[0])
        finally:
            socket.setdefaulttimeout(None)
        started = time.monotonic()
        for line in lines[1:]:
            sink.write(line)
        assert time.monotonic() - started < 10
        got = b""
        while not sink.flush(0.0):
            got += ours.recv(1 << 20)
        ours.setblocking(False)
        while got.count(b"\n") < len(lines):
            got += ours.recv(1 << 20)
        assert got.decode().splitlines() == lines
        assert os.get_blocking(theirs.fileno()), "it is shared with other processes"
        sink.close()


def test_a_pipe_of_another_user_is_asked_before_each_write(
    pipe: Pipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the pipe can't be opened a second time, a full one still delays nobody."""
    monkeypatch.setattr(targets, "_open_again", lambda number: None)
    sink = pipe.sink()
    lines = [f"{n:05d}" + "x" * 300 for n in range(1_000)]
    for line in lines:
        sink.write(line)
    got = ""
    while not sink.flush(0.0):
        got += pipe.read()
    assert (got + pipe.read()).splitlines() == lines


def test_the_shared_descriptor_stays_blocking(pipe: Pipe) -> None:
    """O_NONBLOCK on it would break the shell and every other process that writes there."""
    sink = pipe.sink()
    sink.write("one", True)
    assert os.get_blocking(pipe.stream.fileno())


def test_a_reader_that_left_costs_the_app_nothing(pipe: Pipe) -> None:
    lost: list[int] = []
    sink = pipe.sink(dropped=lost.append)
    os.dup2(os.open(os.devnull, os.O_RDONLY), pipe.reader)
    for _ in range(2 * LIMIT // 1_000):
        sink.write("x" * 1_000, True)
    assert sum(lost) > 0
    started = time.monotonic()
    assert not sink.flush(30.0)
    assert time.monotonic() - started < 10, "waiting for a closed pipe is of no use"


def test_a_full_disk_costs_the_app_nothing() -> None:
    lost: list[int] = []
    sink = Sink("/dev/full", dropped=lost.append)
    for _ in range(2 * LIMIT // 1_000):
        sink.write("x" * 1_000, True)
    assert sum(lost) > 0
    sink.close()


def test_a_callback_that_raises_is_not_the_writers_problem() -> None:
    def dropped(count: int) -> None:
        raise RuntimeError("no")

    sink = Sink("/dev/full", dropped=dropped)
    for _ in range(2 * LIMIT // 1_000):
        sink.write("x" * 1_000, True)
    sink.close()


def test_flush_says_when_the_time_was_not_enough(pipe: Pipe) -> None:
    ticks = itertools.count()
    sink = pipe.sink(clock=lambda: float(next(ticks)))
    for _ in range(1_000):
        sink.write("x" * 300)
    assert not sink.flush(3.0)
    pipe.read()


@pytest.mark.parametrize("how", [">&-", "</dev/null >&-"], ids=["stdout", "stdin and stdout"])
def test_an_app_without_standard_output_runs(how: str, tmp_path: Path) -> None:
    script = tmp_path / "app.py"
    script.write_text(
        "import sys\n"
        "from opsguard.logging import Sink\n"
        "sink = Sink()\n"
        "sink.write('x', True)\n"
        "sink.write('y')\n"
        "print('ran', file=sys.stderr)\n"
    )
    done = subprocess.run(
        f"{sys.executable} {script} {how}", shell=True, capture_output=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, b"ran\n")


def test_without_standard_output_no_line_goes_into_the_file_that_has_its_number(
    tmp_path: Path,
) -> None:
    """The first file that such an app opens becomes descriptor 1."""
    script = tmp_path / "app.py"
    script.write_text(
        "import sys\n"
        "from opsguard.logging import Sink\n"
        "data = open('data', 'w')\n"
        "print(data.fileno(), sys.stdout, file=sys.stderr)\n"
        "sink = Sink()\n"
        "sink.write('a line', True)\n"
        "sink.shutdown()\n"
    )
    done = subprocess.run(
        f"{sys.executable} {script} </dev/null >&-",
        shell=True,
        capture_output=True,
        cwd=tmp_path,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, b"1 None\n")
    assert (tmp_path / "data").read_text() == ""


def test_standard_output_closed_while_running_is_let_go(pipe: Pipe) -> None:
    """Whoever waits for the end of the pipe must see it, although we opened it a second time."""
    sink = pipe.sink()
    sink.write("one", True)
    pipe.stream.close()
    sink.flush(0.0)
    sink.write("two", True)
    assert pipe.read() == "one\n"
    assert os.read(pipe.reader, 1) == b""


def test_standard_output_led_elsewhere_is_followed(pipe: Pipe, tmp_path: Path) -> None:
    """A daemon's dup2: the number is the same, the file behind it is not."""
    sink = pipe.sink()
    sink.write("one", True)
    sink.flush()
    with (tmp_path / "other").open("w") as other:
        os.dup2(other.fileno(), pipe.stream.fileno())
    sink.flush()
    sink.write("two")
    sink.flush()
    assert pipe.read() == "one\n"
    assert (tmp_path / "other").read_text() == "two\n"


@pytest.mark.parametrize("own", [True, False], ids=["Python's own", "another for its descriptor"])
def test_what_one_request_prints_into_a_buffer_gets_no_lines(
    own: bool, pipe: Pipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`redirect_stdout` holds for all threads; the first line may well come meanwhile."""
    monkeypatch.setattr(sys, "__stdout__", pipe.stream)
    if not own:
        pipe.stream = io.TextIOWrapper(pipe.stream.buffer, "utf-8")
    sink = pipe.sink()
    for name in ("one", "two"):
        with contextlib.redirect_stdout(io.StringIO()) as captured:
            print("its own")
            other = threading.Thread(target=sink.write, args=(name, True))
            other.start()
            other.join()
        assert captured.getvalue() == "its own\n"
    assert pipe.read() == "one\ntwo\n"


@pytest.mark.parametrize("how", ["closed", "detached"])
def test_a_stream_that_replaces_one_that_ended_is_followed(
    how: str, pipe: Pipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An app may make its own stream, for another encoding, of what is below the first."""
    monkeypatch.setattr(sys, "__stdout__", pipe.stream)
    sink = pipe.sink()
    sink.write("one", True)
    if how == "closed":
        new = os.fdopen(os.dup(pipe.stream.fileno()), "w")
        pipe.stream.close()
    else:
        new = io.TextIOWrapper(pipe.stream.detach(), "utf-8")
    pipe.stream = new
    monkeypatch.setattr(sys, "stdout", new)
    sink.write("two", True)
    assert pipe.read() == "one\ntwo\n"


def test_a_forked_child_may_have_an_output_of_its_own(tmp_path: Path) -> None:
    script = """
        import os, sys
        from opsguard.logging import Sink
        sink = Sink()
        sink.write("parent", True)
        pid = os.fork()
        if pid == 0:
            sys.stdout = open(sys.argv[1], "w")
            sink.write("child", True)
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
    """
    assert run(script, str(tmp_path / "log")).stdout == b"parent\n"
    assert (tmp_path / "log").read_text() == "child\n"


def test_what_a_forked_child_captures_gets_no_lines() -> None:
    """A job of a pool that captures what a library prints, at its first line."""
    script = """
        import contextlib, io, os
        from opsguard.logging import Sink
        sink = Sink(durability="line")
        sink.write("parent")
        pid = os.fork()
        if pid == 0:
            with contextlib.redirect_stdout(io.StringIO()) as captured:
                sink.write("child")
            sink.write("after")
            os._exit(captured.getvalue() != "")
        assert os.waitpid(pid, 0)[1] == 0
    """
    assert run(script).stdout == b"parent\nchild\nafter\n"


def test_a_stream_made_of_the_detached_own_one_is_the_own_one() -> None:
    """An idiom for another encoding."""
    script = """
        import contextlib, io, sys
        sys.stdout = io.TextIOWrapper(sys.stdout.detach(), encoding="utf-8")
        from opsguard.logging import Sink
        sink = Sink(durability="line")
        with contextlib.redirect_stdout(io.StringIO()) as captured:
            sink.write("a line")
        sys.exit(captured.getvalue() != "")
    """
    assert run(script).stdout == b"a line\n"


def test_an_object_that_logged_once_is_followed_by_the_next_one(
    pipe: Pipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is taken for one that logs all it is given; what takes its place is not."""

    class Warns(io.StringIO):
        def write(self, text: str) -> int:
            sink.write("slow", True)
            return super().write(text)

    monkeypatch.setattr(sys, "__stdout__", pipe.stream)
    monkeypatch.setattr(sys, "stdout", Warns())
    sink = Sink()
    sink.write("one", True)
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    sink.write("two", True)
    assert isinstance(sys.stdout, io.StringIO)
    assert sys.stdout.getvalue() == "two\n"
    sink.close()


def test_standard_output_without_a_descriptor_is_written_to_as_an_object(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sink = Sink()
    for text in ("one", "two"):
        monkeypatch.setattr(sys, "stdout", io.StringIO())
        sink.write(text, True)
        assert isinstance(sys.stdout, io.StringIO)
        assert sys.stdout.getvalue() == f"{text}\n"
    sink.close()


def test_a_capture_of_pytest_sees_the_lines(capsys: pytest.CaptureFixture[str]) -> None:
    sink = Sink()
    sink.write("captured", True)
    assert capsys.readouterr().out == "captured\n"
    sink.close()


def test_an_output_object_that_raises_is_not_the_writers_problem(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            raise KeyError(text)

    sink = Sink()
    monkeypatch.setattr(sys, "stdout", Broken())
    sink.write("kept", True)
    monkeypatch.setattr(sys, "stdout", good := io.StringIO())
    sink.write("next", True)
    assert good.getvalue() == "kept\nnext\n"
    sink.close()


@pytest.mark.parametrize("batches", [False, True], ids=["each line", "batches"])
def test_lines_for_an_object_that_logs_what_it_is_given_go_to_the_output_of_python(
    batches: bool, pipe: Pipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The usual way to lead `print` to logging; each line must not lead to one more."""

    class Logged(io.StringIO):
        def write(self, text: str) -> int:
            for line in text.rstrip().splitlines():
                sink.write(f"printed: {line}")
            return len(text)

    monkeypatch.setattr(sys, "__stdout__", pipe.stream)
    monkeypatch.setattr(sys, "stdout", Logged())
    sink = Sink()
    if batches:
        sink.nudge()
    sink.write("one")
    assert sink.flush()
    sink.write("two")
    print("three")
    assert sink.flush()
    assert pipe.read() == "one\nprinted: one\ntwo\nprinted: three\n"
    sink.close()


def test_lines_for_an_object_that_logs_what_it_is_given_end_where_there_is_no_other_output(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Logged(io.StringIO):
        def write(self, text: str) -> int:
            given.append(text)
            sink.write(f"printed: {text}")
            return len(text)

    given: list[str] = []
    sink = Sink(durability="line")
    monkeypatch.setattr(sys, "stdout", Logged())
    monkeypatch.setattr(sys, "__stdout__", sys.stdout)
    sink.write("one")
    assert not sink.flush(30.0)
    assert given == ["one\n"]
    monkeypatch.setattr(sys, "stdout", good := io.StringIO())
    assert sink.flush()
    assert good.getvalue().startswith("one\nprinted: one\n")
    sink.close()


def test_a_terminal_gets_the_lines_and_is_known_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    master, slave = pty.openpty()
    with os.fdopen(slave, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        sink = Sink()
        assert sink.terminal
        sink.write("hello", True)
        assert os.read(master, 100) == b"hello\r\n"
        sink.close()
    os.close(master)
    assert not sink.terminal, "closed"
    assert not Sink("/dev/tty").terminal, "a file is not read by a person"


# Files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("removed", [False, True], ids=["renamed", "removed"])
def test_a_file_that_was_moved_away_is_made_again(
    removed: bool, sink: Sink, log: Path, tmp_path: Path
) -> None:
    """What logrotate does, without telling us."""
    sink.write("one")
    sink.flush()
    if removed:
        log.unlink()
    else:
        log.rename(tmp_path / "app.log.1")
    sink.write("two")
    sink.flush()
    assert log.read_text() == "two\n"
    if not removed:
        assert (tmp_path / "app.log.1").read_text() == "one\n"


def test_lines_wait_for_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    sink = Sink(tmp_path / "logs" / "app.log")
    sink.write("early", True)
    (tmp_path / "logs").mkdir()
    until(lambda: (tmp_path / "logs" / "app.log").exists())
    sink.flush()
    assert (tmp_path / "logs" / "app.log").read_text() == "early\n"
    sink.close()


def test_a_relative_path_means_the_folder_at_construction(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sink = Sink("app.log")
    monkeypatch.chdir("/")
    sink.write("here", True)
    assert (tmp_path / "app.log").read_text() == "here\n"
    sink.close()


def test_a_fifo_without_a_reader_delays_nobody(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    sink = Sink(tmp_path / "fifo")
    sink.write("kept", True)
    reader = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    sink.flush()
    assert os.read(reader, 100) == b"kept\n"
    sink.close()
    os.close(reader)


# Fork, exit, signals ------------------------------------------------------------------------------


def test_what_is_logged_as_a_child_begins_brings_no_lines_of_its_parent(tmp_path: Path) -> None:
    """Another thread serves between our last look before the fork and the fork; and who begins in
    the child before the sink was told may have something to say.
    """
    script = f"""
        import os, logging
        late = []
        os.register_at_fork(before=lambda: [serve(path) for path in late])
        from opsguard import OpsGuard
        from opsguard.runtime import Runtime
        from opsguard_asgi import PROTOCOL, serve as edge_of
        def tell(runtime):
            if late:
                logging.getLogger("app").warning("told as it began")
        Runtime._tidy = tell
        ops = OpsGuard(logging={{"file": {str(tmp_path / "log")!r}, "format": "json"}})
        async def app(scope, receive, send):
            await send({{"type": "http.response.start", "status": 200, "headers": []}})
            await send({{"type": "http.response.body", "body": b""}})
        async def send(message): pass
        edge = edge_of(app, ops.runtime().port(PROTOCOL))
        def serve(path):
            scope = {{"type": "http", "method": "GET", "path": path, "headers": []}}
            try:
                edge(scope, None, send).send(None)
            except StopIteration:
                pass
        serve("/first")
        late.append("/late")
        pid = os.fork()
        if pid == 0:
            ops.runtime().sink.flush()
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        ops.runtime().sink.flush()
        """
    run(script)
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [line["path"] for line in lines if "path" in line].count("/late") == 1
    assert [line["message"] for line in lines].count("told as it began") == 1


def test_a_fork_writes_buffered_lines_once_and_the_child_goes_on() -> None:
    script = """
        import os, threading
        from opsguard.logging import Sink, sink as module
        module.TICK = 0.01
        sink = Sink()
        sink.nudge()
        sink.write("before")
        pid = os.fork()
        if pid == 0:
            sink.nudge()
            sink.write("child")
            sink.write("child, urgent", True)
            assert [t.name for t in threading.enumerate()] == ["MainThread", "opsguard-log"]
            sink.flush()
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        sink.write("parent")
    """
    assert run(script).stdout == b"before\nchild\nchild, urgent\nparent\n"


def test_what_a_full_pipe_holds_back_at_a_fork_stays_with_the_parent(tmp_path: Path) -> None:
    script = """
        import os, sys
        from opsguard.logging import Sink
        sink = Sink(sys.argv[1])
        sink.write("held", True)
        pid = os.fork()
        if pid == 0:
            os.mkdir(os.path.dirname(sys.argv[1]))
            sink.write("child", True)
            os._exit(0)
        os.waitpid(pid, 0)
    """
    path = tmp_path / "logs" / "app.log"
    run(script, str(path))
    assert path.read_text() == "child\nheld\n"


def test_a_fork_beside_a_writing_thread_leaves_the_child_able_to_write() -> None:
    """A lock held by a thread of the parent is held for ever in the child."""
    script = """
        import os, threading
        from opsguard.logging import Sink
        sink = Sink()
        sink.write("parent", True)
        held, done = threading.Event(), threading.Event()
        def hold():
            with sink._lock:
                held.set()
                done.wait()
        thread = threading.Thread(target=hold)
        thread.start()
        held.wait()
        import warnings
        warnings.simplefilter("ignore", DeprecationWarning)  # 3.12: a fork beside a thread
        pid = os.fork()
        if pid == 0:
            sink.write("child", True)
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        done.set()
        thread.join()
    """
    assert run(script).stdout == b"parent\nchild\n"


def test_no_thread_of_ours_lives_across_a_fork() -> None:
    """From 3.12 on Python warns about it, and this process turns warnings into errors."""
    script = """
        import os, threading
        from opsguard.logging import Sink
        sink = Sink()
        for n in range(5):
            sink.write("x")
            pid = os.fork()
            if pid == 0:
                assert threading.active_count() == 1
                os._exit(0)
            assert os.waitpid(pid, 0)[1] == 0
    """
    assert run(script).stdout == b"x\n" * 5


@pytest.mark.parametrize(
    "ending",
    ["", "raise SystemExit", "sys.exit(0)", "atexit.register(lambda: sink.write('late'))"],
    ids=["end", "SystemExit", "sys.exit", "another exit handler"],
)
def test_lines_are_written_at_exit(ending: str) -> None:
    script = f"""
        import atexit, sys
        from opsguard.logging import Sink
        sink = Sink()
        sink.write("buffered")
        {ending}
    """
    assert run(script).stdout.startswith(b"buffered\n")


@pytest.mark.parametrize("parent", ["parent", ""], ids=["parent wrote", "parent was silent"])
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_lines_of_a_multiprocessing_child_are_written_at_its_exit(
    method: str, parent: str, tmp_path: Path
) -> None:
    """Such a child runs no exit handlers."""
    script = tmp_path / "app.py"
    script.write_text(
        textwrap.dedent(
            """
            import multiprocessing, sys
            from opsguard.logging import Sink
            sink = Sink()
            def work():
                sink.write("child")
            if __name__ == "__main__":
                if sys.argv[2]:
                    sink.write(sys.argv[2])
                context = multiprocessing.get_context(sys.argv[1])
                child = context.Process(target=work)
                child.start()
                child.join()
            """
        )
    )
    done = subprocess.run(
        [sys.executable, str(script), method, parent], capture_output=True, timeout=60, check=True
    )
    assert sorted(done.stdout.decode().split()) == ["child", *filter(None, [parent])]


def test_a_signal_handler_may_log_in_the_middle_of_a_write() -> None:
    script = """
        import signal
        from opsguard.logging import Sink
        sink = Sink()
        count = 0
        def handler(*_):
            global count
            count += 1
            sink.write(f"signal {count}", count % 2 == 0)
            sink.flush(0.0)
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, 0.0002, 0.0002)
        n = 0
        while count < 300:
            n += 1
            sink.write(f"line {n}", n % 3 == 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        sink.flush(10)
        sink.write(f"total {n} {count}", True)
    """
    lines = run(script).stdout.decode().splitlines()
    _, n, count = lines.pop().split()
    assert len(lines) == len(set(lines)) == int(n) + int(count)


def test_flush_inside_an_interrupted_write_returns_at_once(
    sink: Sink, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The write it interrupted can't go on before it, so to wait would be a second for nothing."""
    results: list[bool] = []
    prepare = sink._target.prepare

    def interrupted() -> targets.Send:
        if not results:
            results.append(sink.flush(30.0))
        return prepare()

    monkeypatch.setattr(targets.File, "prepare", lambda self: interrupted())
    sink.write("one", True)
    assert results == [False]
    assert sink.flush()


def test_a_process_ended_by_a_signal_after_shutdown_lost_nothing() -> None:
    """uvicorn does that: it stops gracefully, then raises the signal again."""
    script = """
        import os, signal
        from opsguard.logging import Sink
        sink = Sink()
        sink.write("serving")
        sink.shutdown()
        sink.write("after")
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()
    """
    done = run(script)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, b"serving\nafter\n")


def test_who_looks_is_asked_with_the_lines_and_its_faults_are_its_own(sink: Sink) -> None:
    looks = []

    def look() -> None:
        looks.append(1)
        raise RuntimeError

    sink.also(look)
    sink.draw()
    sink.look()
    assert len(looks) == 2


def test_in_the_loop_of_a_server_who_looks_is_asked_once_a_second(
    sink: Sink, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While nothing is logged, and until the server stops."""
    monkeypatch.setattr("opsguard.logging.sink._BEAT", 0.01)
    looks: list[int] = []

    async def serve() -> None:
        sink.also(lambda: looks.append(1))
        sink.settle_in()
        while len(looks) < 3:
            await asyncio.sleep(0.005)
        sink.shutdown()
        looks.clear()
        await asyncio.sleep(0.05)

    asyncio.run(asyncio.wait_for(serve(), 10))
    assert looks == []
