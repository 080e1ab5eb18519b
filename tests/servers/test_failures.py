"""Apps that fail at odd moments."""

from __future__ import annotations

import json

import pytest

from tests.servers.processes import SERVERS, Pool, until

pytestmark = pytest.mark.servers


@pytest.mark.parametrize(
    ("server", "app"),
    [
        pytest.param(
            server,
            app,
            id=f"{server} {app}",
            marks=[pytest.mark.full] if SERVERS[server].full else [],
        )
        for server in ("gunicorn-gthread", "gunicorn-sync", "granian-wsgi")
        for app in ("wsgi-late", "flask-late")
    ],
)
def test_a_stream_that_fails_before_its_first_byte_is_one_sound_500(
    server: str, app: str, pool: Pool
) -> None:
    """The app has announced another status and length by then. None of it may reach the client:
    two lengths in one answer make proxies refuse it.
    """
    running = pool.get(server, app)
    mark = running.mark()
    answer = running.get("/late")
    assert (answer.status, answer.complete) == (500, True)
    for name in ("content-type", "content-length", "x-request-id"):
        assert len(answer.header(name)) == 1, answer.headers
    assert json.loads(answer.body)["request_id"] == answer.header("x-request-id")[0]
    (line,) = until(lambda: running.access(mark))
    assert (line["endpoint"], line["status_code"]) == ("/late", 500)


@pytest.mark.parametrize("path", ["/list", "/stream"])
@pytest.mark.parametrize(
    "server", ["gunicorn-gthread", pytest.param("gunicorn-sync", marks=pytest.mark.full)]
)
def test_headers_that_the_server_refuses_are_its_own_500(
    server: str, path: str, pool: Pool
) -> None:
    """Recorded as what the client got; a stream is closed all the same, and nothing in progress."""
    running = pool.get(server, "wsgi-refused")
    mark, before = running.still()
    closed = len(running.events("closed"))
    answer = running.get(path)
    assert answer.status == 500
    assert answer.header("x-evil") == []
    assert len(answer.header("content-length")) == 1
    (line,) = until(lambda: running.access(mark))
    assert (line["endpoint"], line["status_code"]) == (path, 500)
    grown = running.since(before)
    assert not [key for key in grown if key[0].endswith("in_progress")]
    assert len(running.events("closed")) - closed == (path == "/stream")
    assert running.get("/plain").body == b"hello"
