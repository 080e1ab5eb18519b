"""Under gunicorn's sync worker lines are written when it is idle, and no thread is started."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
import urllib.request
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


def ask(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=10) as answer:
        text: str = answer.read().decode()
        return text


def test_lines_leave_when_the_worker_is_idle_and_it_stays_a_single_thread(tmp_path: Path) -> None:
    (tmp_path / "served.py").write_text(APP)
    port = free_port()
    command = [sys.executable, "-m", "gunicorn", "served:app", "-k", "sync", "-w", "1"]
    server = subprocess.Popen(
        [*command, "-b", f"127.0.0.1:{port}"],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        until_it_listens(port)
        assert [ask(port) for _ in range(5)] == ["1"] * 5
        written = until_there_are(tmp_path / "log", 5)
        assert ask(port) == "1"
        assert until_there_are(tmp_path / "log", 6) == 6
        assert written == 5
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(15)


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
