"""What a real server prints, with its own log settings and ours."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from opsguard.testing import Request
from tests.contract.scenarios import ASGI, WSGI
from tests.servers.client import encode
from tests.servers.processes import SERVERS, Running, running

pytestmark = pytest.mark.servers

# With the access log on, where that takes an argument.
ACCESS_LOG = {
    "gunicorn-sync": ("--access-logfile", "-"),
    "gunicorn-gthread": ("--access-logfile", "-"),
    "gunicorn-uvicorn": ("--access-logfile", "-"),
    "gunicorn-asgi": ("--access-logfile", "-"),
    "granian-asgi": ("--access-log",),
    "granian-wsgi": ("--access-log",),
}
# Each server with an app that reports failures itself (a framework) or leaves that to the server.
SERVED = [
    pytest.param(
        server.name,
        app,
        id=f"{server.name} {app}",
        marks=[] if app in ("fastapi", "wsgi") and not server.full else [pytest.mark.full],
    )
    for server in SERVERS.values()
    for app in (ASGI if server.protocol == "asgi" else WSGI)
]


def entries(output: str) -> list[dict[str, Any]]:
    """The lines of ours among what was printed."""
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")]


def printed(found: Running, path: str) -> list[str]:
    """The lines that speak of a path."""
    return [line for line in found.output().splitlines() if path in line]


@pytest.mark.parametrize(("server", "app"), SERVED)
def test_a_request_has_one_line_and_an_exception_one_report(
    server: str, app: str, tmp_path: Path
) -> None:
    """The server's own access line is replaced by ours, not added to it; whoever reports an
    exception, server or framework, does so once.
    """
    extra = ACCESS_LOG.get(server, ())
    with running(SERVERS[server], app, tmp_path, *extra, log_file=False) as found:
        for number in range(3):
            found.get(f"/items/{number + 70}")
        found.get("/boom")
        output = found.stop()
    for number in range(3):
        (line,) = printed(found, f"/items/{number + 70}")
        assert json.loads(line)["logger"] == "opsguard.access"
    lines = entries(output)
    access = [line for line in lines if line.get("logger") == "opsguard.access"]
    assert [line["path"] for line in access if line["path"] == "/boom"] == ["/boom"]
    # granian has the traceback in its message. gunicorn's own ASGI worker passes over exceptions
    # that come after the whole answer, which FastAPI, and our edge of a raw app, send first.
    reports = [line for line in lines if "Boom" in json.dumps(line)]
    silent = server == "gunicorn-asgi" and app in ("asgi", "fastapi")
    assert len(reports) == (0 if silent else 1), output
    others = [line for line in output.splitlines() if not line.startswith("{")]
    assert not any("Boom" in line for line in others), output


@pytest.mark.parametrize(("server", "app"), SERVED)
def test_the_last_lines_of_a_server_that_is_told_to_stop_are_not_lost(
    server: str, app: str, tmp_path: Path
) -> None:
    """SIGTERM comes as soon as the last answer is there, when its line is still in the buffer.

    Lines are in the order in which the requests end: on a kept connection an ASGI server may begin
    one while the app still closes the one before.
    """
    with running(SERVERS[server], app, tmp_path, log_file=False) as found:
        with found.client() as client:
            requests = 20 if SERVERS[server].keep_alive else 1
            for number in range(requests):
                answer = client.ask(Request(f"/items/{number}"))
                assert answer.status == 200
        found.process.send_signal(signal.SIGTERM)
        lines = entries(found.stop())
    access = [line["path"] for line in lines if line.get("logger") == "opsguard.access"]
    seen = [path for path in access if path.startswith("/items/")]
    asked = [f"/items/{number}" for number in range(requests)]
    if SERVERS[server].protocol == "asgi":
        seen, asked = sorted(seen), sorted(asked)
    assert seen == asked


@pytest.mark.parametrize(
    "server",
    [
        pytest.param(server.name, marks=[pytest.mark.full] if server.full else [])
        for server in SERVERS.values()
        if server.protocol == "asgi"
    ],
)
def test_lifespan_runs_and_what_it_logs_is_kept(server: str, tmp_path: Path) -> None:
    """The app's own start and end happen once each, and their lines reach the log."""
    with running(SERVERS[server], "fastapi-living", tmp_path, log_file=False) as found:
        assert found.get("/plain").status == 200
        assert found.events("lifespan") == ["started"]
        output = found.stop()
    assert found.events("lifespan") == ["started", "stopped"]
    messages = [line["message"] for line in entries(output) if line.get("logger") == "shop"]
    assert messages == ["opened", "closed"]


@pytest.mark.parametrize("app", ASGI)
def test_an_asgi_app_logs_json_from_its_start_on(app: str, tmp_path: Path) -> None:
    """What uvicorn says after it has the app is ours to print, so a log reader can parse it."""
    server = SERVERS["uvicorn-httptools"]
    with running(server, app, tmp_path, log_file=False) as found:
        with found.client() as client:
            client.send(encode(Request("/plain")))
            assert client.answer().status == 200
        output = found.stop()
    others = [line for line in output.splitlines() if not line.startswith("{")]
    assert len(others) <= 2, others  # "Started server process", before the app is imported
    assert "Shutting down" in [line["message"] for line in entries(output)]
