"""Real servers, one worker each, as arms of the harness."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.apps import PROTOCOLS
from benchmarks.pipes import Drain

CONNECTIONS = 8
START_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class Server:
    """A running server. ``drain`` counts the access lines of its worker."""

    port: int
    process: subprocess.Popen[bytes]
    drain: Drain


def command(framework: str, port: int) -> list[str]:
    """uvicorn with uvloop and httptools for ASGI, gunicorn's sync worker for WSGI."""
    if PROTOCOLS[framework] == "asgi":
        return [
            *(sys.executable, "-m", "uvicorn", "--factory", "benchmarks.served:application"),
            *("--port", str(port), "--loop", "uvloop", "--http", "httptools"),
            *("--interface", "asgi3", "--no-access-log", "--log-level", "warning"),
            # An arm waits while the others have their turn; its connections must outlive that.
            *("--timeout-keep-alive", "120"),
        ]
    return [
        *(sys.executable, "-m", "gunicorn", "benchmarks.served:application()"),
        *("--bind", f"127.0.0.1:{port}", "--worker-class", "sync", "--workers", "1"),
        *("--log-level", "warning"),
    ]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def serving(
    framework: str,
    variants: Sequence[str],
    seed: int,
    arguments: Sequence[str] = (),
    *,
    one_core: bool = False,
    together: bool = False,
) -> Iterator[dict[str, Server]]:
    """The server of each variant, all up; stopped at the end. Each has its own, or they share one
    whose worker has them all (`together`). All with the same `seed` of text hashes, which decides
    how Python's dictionaries lie in memory, and with that a per cent of the time. `arguments` are
    added to the server's. With `one_core` all workers share the core that is measured.
    """
    running: dict[str, Server] = {}
    groups = [tuple(variants)] if together else [(variant,) for variant in variants]
    with tempfile.TemporaryDirectory() as folder:
        try:
            for group in groups:
                own = Path(folder, group[0])
                own.mkdir()
                server = _start(framework, group, seed, arguments, one_core, own)
                running |= dict.fromkeys(group, server)
            for server in running.values():
                _wait(server)
            yield running
        finally:
            _stop(list({server.port: server for server in running.values()}.values()))


def _stop(servers: Sequence[Server]) -> None:
    for server in servers:
        server.process.send_signal(signal.SIGTERM)
    for server in servers:
        try:
            server.process.wait(10)
        except subprocess.TimeoutExpired:
            server.process.kill()
            server.process.wait()
        server.drain.finish()


def _start(
    framework: str,
    variants: Sequence[str],
    seed: int,
    arguments: Sequence[str],
    one_core: bool,
    folder: Path,
) -> Server:
    port, drain = free_port(), Drain()
    process = subprocess.Popen(
        [*command(framework, port), *arguments],
        stdin=subprocess.DEVNULL,
        stdout=drain.writer,
        env=os.environ
        | {
            "BENCHMARK_FRAMEWORK": framework,
            "BENCHMARK_VARIANTS": ",".join(variants),
            "BENCHMARK_ONE_CORE": "1" if one_core else "",
            "PYTHONHASHSEED": str(seed),
            "XDG_RUNTIME_DIR": str(folder),  # else all gunicorns want the same control socket
        },
    )
    drain.started()
    return Server(port, process, drain)


def _wait(server: Server) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and server.process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", server.port), timeout=1.0).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise RuntimeError(f"the server did not start: {server.process.args!r}")


class Load:
    """The client process; a context manager."""

    def __enter__(self) -> Load:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.load"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *details: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(10)

    def run(self, order: dict[str, Any]) -> dict[str, Any]:
        """One job, and what it found."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError("the load client died; its error is above")
        found: dict[str, Any] = json.loads(answer)
        return found


@dataclass(slots=True)
class Worker:
    """A real server under load. ``keyed``: with an API key."""

    server: Server
    load: Load
    path: str
    keep_alive: bool
    keyed: bool = False

    def run(self, **asked: int | str) -> dict[str, Any]:
        """A job of the load client; what the worker says of it."""
        return self.load.run(
            {
                "port": self.server.port,
                "process": self.server.process.pid,
                "path": self.path,
                "keep_alive": self.keep_alive,
                "keyed": self.keyed,
                "connections": CONNECTIONS,
                "asked": asked,
            }
        )


@dataclass(slots=True)
class Shared(Worker):
    """One that has several arms, of which two take turns, see `benchmarks.turns`."""

    requests: dict[str, int] = field(default_factory=dict)
    """How many each arm has served."""

    def pair(self, arms: tuple[str, str], cycles: int, turn: int, warm: int) -> dict[str, float]:
        """CPU nanoseconds per request of either, in so many times ABBA."""
        # One more, as a turn ends when the next request comes.
        requests = cycles * 4 * (turn + warm) + 1
        found = self.run(requests=requests, turns=",".join(arms), turn=turn, warm=warm)
        counted = 2 * cycles * turn
        if found["counted"] != dict.fromkeys(arms, counted):
            raise RuntimeError(f"{counted} requests were to count: {found['counted']}")
        for arm in arms:
            self.requests[arm] = self.requests.get(arm, 0) + 2 * cycles * (turn + warm)
        self.requests[arms[0]] += 1
        return {arm: found["spent"][arm] / counted for arm in arms}


@dataclass(slots=True)
class Served(Worker):
    """One as an arm: CPU as its worker reports it."""

    name: str = ""
    requests: int = 0

    def block(self, requests: int) -> float:
        return self.part(requests)

    def part(self, requests: int, warm: int = 0) -> float:
        """CPU nanoseconds, what was put off included, and the warm ones not."""
        found = self.run(requests=requests, warm=warm)
        sent = warm + requests
        if found["requests"] != sent:
            raise RuntimeError(f"{self.name} served {found['requests']} of {sent} requests")
        self.requests += sent
        return float(found["cpu_ns"])

    def rest(self) -> float:
        return 0.0  # a part leaves nothing behind
