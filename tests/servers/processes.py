"""Real servers as child processes, and eyes for what they logged, counted and printed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from opsguard.testing import Answer, Request
from tests.contract.harness import Samples, parse
from tests.ports import free_port
from tests.servers.client import TIMEOUT, Client

__all__ = ["SERVERS", "Pool", "Running", "Server", "requests", "running", "until"]

ROOT = Path(__file__).parents[2]
"""The folder above tests/: where it is in the checkout, or in the copy that nox makes."""
APP = "tests.servers.served:app"
START_SECONDS = 60.0
STOP_SECONDS = 15.0
WAIT_SECONDS = 30.0
KEPT = 4

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Server:
    """A server and how it is started; ``{port}`` stands for the port."""

    name: str
    protocol: str
    command: str
    full: bool = True
    """Not in the fast tier."""
    keep_alive: bool = True
    """Takes several requests on one connection."""

    def arguments(self, port: int, *extra: str) -> list[str]:
        module, *rest = self.command.format(port=port).split()
        return [sys.executable, "-m", module, *rest, *extra, APP]


_UVICORN = "uvicorn --host 127.0.0.1 --port {port} --interface asgi3"
_HTTPTOOLS = f"{_UVICORN} --http httptools"
_GUNICORN = "gunicorn --bind 127.0.0.1:{port} --workers 1 --graceful-timeout 5"
_GRANIAN = "granian --host 127.0.0.1 --port {port} --workers 1"

SERVERS = {
    server.name: server
    for server in (
        Server("uvicorn-httptools", "asgi", f"{_HTTPTOOLS} --loop uvloop", full=False),
        Server("gunicorn-gthread", "wsgi", f"{_GUNICORN} -k gthread --threads 8", full=False),
        Server("uvicorn-h11", "asgi", f"{_UVICORN} --http h11 --loop asyncio"),
        Server("gunicorn-uvicorn", "asgi", f"{_GUNICORN} -k uvicorn.workers.UvicornWorker"),
        Server("gunicorn-asgi", "asgi", f"{_GUNICORN} -k asgi"),
        Server("granian-asgi", "asgi", f"{_GRANIAN} --interface asgi"),
        Server("gunicorn-sync", "wsgi", f"{_GUNICORN} -k sync", keep_alive=False),
        Server("granian-wsgi", "wsgi", f"{_GRANIAN} --interface wsgi --blocking-threads 8"),
    )
}


def until(ask: Callable[[], T], *, seconds: float = WAIT_SECONDS) -> T:
    """What `ask` returns as soon as that is true or its assertions hold, or the last it said.

    What a server does after the last byte of an answer can only be waited for.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            found = ask()
            if found or time.monotonic() > deadline:
                return found
        except AssertionError:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.01)


class Running:
    """A server that runs, with one app and files of its own."""

    def __init__(
        self, server: Server, app: str, port: int, folder: Path, process: subprocess.Popen[bytes]
    ) -> None:
        self.server = server
        self.app = app
        self.port = port
        self.process = process
        self.root = ""
        """What stands before every path that the server takes (SCRIPT_NAME)."""
        self._log = folder / "log.jsonl"
        self._events = folder / "events"
        self._output = folder / "output"
        self._reader = threading.Thread(target=self._read_output)
        self._reader.start()

    def client(self, timeout: float = TIMEOUT) -> Client:
        return Client(self.port, timeout)

    def ask(self, request: Request) -> Answer:
        """One request on a connection of its own."""
        with self.client() as client:
            return client.ask(request)

    def get(self, path: str, **headers: str) -> Answer:
        pairs = tuple([(name.replace("_", "-"), value) for name, value in headers.items()])
        return self.ask(Request(path, headers=pairs))

    def mark(self) -> int:
        """The place in the log up to which everything is older than what comes now."""
        return self._log.stat().st_size if self._log.exists() else 0

    def lines(self, mark: int = 0) -> list[dict[str, Any]]:
        """All log lines since `mark`. Every one must be JSON."""
        data = self._log.read_bytes()[mark:] if self._log.exists() else b""
        whole = data[: data.rfind(b"\n") + 1]
        return [json.loads(line) for line in whole.decode("utf-8").split("\n") if line]

    def access(self, mark: int = 0) -> list[dict[str, Any]]:
        """The access lines since `mark`."""
        return [line for line in self.lines(mark) if line["logger"] == "opsguard.access"]

    def events(self, kind: str) -> list[str]:
        """What the app told."""
        text = self._events.read_text() if self._events.exists() else ""
        pairs = [line.split(": ", 1) for line in text.splitlines()]
        return [item for found, item in pairs if found == kind]

    def samples(self) -> Samples:
        """What /metrics has, without the traces of asking for it."""
        answer = self.get(f"{self.root}/metrics")
        assert answer.status == 200, answer
        return {
            (name, labels): value
            for (name, labels), value in parse(answer.body.decode()).items()
            if ("endpoint", "/metrics") not in labels
        }

    def still(self) -> tuple[int, Samples]:
        """`mark` and `samples` at a moment when nothing goes on any more."""
        while True:
            mark, samples = self.mark(), self.samples()
            if (mark, requests(samples)) == (self.mark(), requests(self.samples())):
                return mark, samples

    def since(self, before: Samples) -> Samples:
        """How much our own samples have grown since `before`; those that have not are left out."""
        now = self.samples()
        grown = {key: now.get(key, 0.0) - before.get(key, 0.0) for key in now.keys() | before}
        ours = ("http_", "websocket_", "opsguard_")
        return {key: value for key, value in grown.items() if value and key[0].startswith(ours)}

    def _read_output(self) -> None:
        """Keep the server's pipe empty, until all that it started are gone."""
        assert self.process.stdout is not None
        with self.process.stdout as pipe, self._output.open("ab") as file:
            shutil.copyfileobj(pipe, file)

    def output(self) -> str:
        """All that the server has printed so far, on either stream."""
        return self._output.read_text(errors="replace")

    def stop(self) -> str:
        """SIGTERM, then SIGKILL for all it started; what it printed."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self._reader.join(STOP_SECONDS)
        return self.output()

    def await_start(self) -> None:
        """Return when it answers; raises ConnectionError with its output if it never does."""
        deadline = time.monotonic() + START_SECONDS
        while self.process.poll() is None and time.monotonic() < deadline:
            try:
                if self.get(f"{self.root}/metrics").status is not None:
                    return
            except OSError:
                time.sleep(0.05)
        raise ConnectionError(f"{self.server.name} did not start\n{self.stop()[-2000:]}")


def requests(samples: Samples) -> float:
    """How many requests were counted in all."""
    return sum(value for (name, _), value in samples.items() if name == "http_requests_total")


@contextmanager
def running(
    server: Server,
    app: str,
    folder: Path,
    *arguments: str,
    settings: dict[str, Any] | None = None,
    environ: dict[str, str] | None = None,
    log_file: bool = True,
) -> Iterator[Running]:
    """A server that is up, and stopped at the end.

    It logs to a file, each line at once; with `log_file` False as it would by itself.
    """
    given: dict[str, Any] = {"metrics": {"directory": str(folder)}}
    if log_file:
        given["logging"] = {"file": str(folder / "log.jsonl"), "durability": "line"}
    for group, values in (settings or {}).items():
        given[group] = {**given.get(group, {}), **values}
    # The settings of the shell that runs the tests are not those of the service under test.
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("OPSGUARD_")}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {
        **inherited,
        "PYTHONPATH": path,
        "HOME": str(folder),  # gunicorn keeps a socket there
        "CONTRACT_APP": app,
        "CONTRACT_SETTINGS": json.dumps(given),
        "CONTRACT_EVENTS": str(folder / "events"),
        **(environ or {}),
    }
    root = environment.get("SCRIPT_NAME", "")
    found = _start(server, app, folder, arguments, environment, root)
    try:
        yield found
    finally:
        found.stop()


def _start(
    server: Server,
    app: str,
    folder: Path,
    arguments: tuple[str, ...],
    environ: dict[str, str],
    root: str,
) -> Running:
    for attempt in range(3):  # somebody else may take the port before the server does
        port = free_port()
        process = subprocess.Popen(
            server.arguments(port, *arguments),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            bufsize=0,
            cwd=folder,
            env=environ,
            start_new_session=True,
        )
        found = Running(server, app, port, folder, process)
        found.root = root
        try:
            found.await_start()
            return found
        except ConnectionError:
            if attempt == 2 or "in use" not in found.output():
                raise
    raise AssertionError("unreachable")


class Pool:
    """Servers that several tests share, started when first asked for; few run at a time."""

    def __init__(self, folder: Callable[[str], Path]) -> None:
        self._folder = folder
        self._running: dict[tuple[str, ...], tuple[Running, Any]] = {}
        self._broken: dict[tuple[str, ...], str] = {}

    def get(self, server: str, app: str, *arguments: str) -> Running:
        key = (server, app, *arguments)
        if key in self._running:
            self._running[key] = self._running.pop(key)  # the one last used is the last to go
            return self._running[key][0]
        if key in self._broken:  # all its tests fail, but each of them at once
            raise ConnectionError(self._broken[key])
        while len(self._running) >= KEPT:
            self._stop(next(iter(self._running)))
        context = running(SERVERS[server], app, self._folder(f"{server}-{app}"), *arguments)
        try:
            self._running[key] = (context.__enter__(), context)
        except ConnectionError as error:
            self._broken[key] = str(error)
            raise
        return self._running[key][0]

    def close(self) -> None:
        for key in list(self._running):
            self._stop(key)

    def _stop(self, key: tuple[str, ...]) -> None:
        _, context = self._running.pop(key)
        context.__exit__(None, None, None)
