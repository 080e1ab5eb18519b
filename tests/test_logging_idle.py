"""Under gunicorn's sync worker lines are written when it is idle, and no thread is started."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from opsguard.logging.idle import tended_by_server
from tests.ports import free_port

APP = """
import threading

import opsguard_wsgi
from opsguard import OpsGuard


def app(environ, start_response):
    body = str(threading.active_count()).encode()
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]


app = opsguard_wsgi.install(app, OpsGuard("idle", logging={"format": "json", "file": "log"}))
"""

BUSY = APP.replace("import threading", "import pathlib, time").replace(
    "    body = str(threading.active_count()).encode()",
    """\
    time.sleep(0.5 if environ["PATH_INFO"] == "/0" else 0.01)  # until all the others wait
    log = pathlib.Path("log")
    body = str(log.read_text().count("request_completed") if log.exists() else 0).encode()""",
)


def ask(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=10) as answer:
        text: str = answer.read().decode()
        return text


@contextmanager
def sync_worker(folder: Path, app: str) -> Iterator[int]:
    """The port of a gunicorn with one of them."""
    (folder / "served.py").write_text(app)
    port = free_port()
    command = [sys.executable, "-m", "gunicorn", "served:app", "-k", "sync", "-w", "1"]
    server = subprocess.Popen(
        [*command, "-b", f"127.0.0.1:{port}"],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        until_it_listens(port)
        yield port
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(15)


def test_lines_leave_when_the_worker_is_idle_and_it_stays_a_single_thread(tmp_path: Path) -> None:
    with sync_worker(tmp_path, APP) as port:
        assert [ask(port) for _ in range(5)] == ["1"] * 5
        written = until_there_are(tmp_path / "log", 5)
        assert ask(port) == "1"
        assert until_there_are(tmp_path / "log", 6) == 6
        assert written == 5


def test_lines_leave_while_requests_always_wait_for_the_worker(tmp_path: Path) -> None:
    """It takes one after the other and never goes to sleep. Each says how many lines there were."""
    with sync_worker(tmp_path, BUSY) as port:
        waiting = [socket.create_connection(("127.0.0.1", port), timeout=30.0) for _ in range(40)]
        for number, connection in enumerate(waiting):
            connection.sendall(b"GET /%d HTTP/1.1\r\nHost: here\r\n\r\n" % number)
        lines = []
        for connection in waiting:
            with connection, connection.makefile("rb") as answer:
                lines.append(int(answer.read().rpartition(b"\r\n\r\n")[2]))
    assert lines == sorted(lines)
    assert lines[0] == 0
    assert lines[-1] > 0


def until_it_listens(port: int) -> None:
    for _ in range(200):
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1.0).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    pytest.fail("the server did not start")


def until_there_are(log: Path, count: int) -> int:
    """The number of access lines, as soon as there are `count`, or after two seconds."""
    found = 0
    for _ in range(100):
        found = log.read_text().count("request_completed") if log.exists() else 0
        if found >= count:
            break
        time.sleep(0.02)
    return found


def test_another_server_is_left_alone() -> None:
    assert not tended_by_server(lambda: None, every=0.1, clock=time.monotonic)
