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
        # Not granian: it has sent the app's status by the time the body is asked for.
        for server in ("gunicorn-gthread", "gunicorn-sync")
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
    for name in ("content-type", "content-length", "x-request-id", "x-correlation-id"):
        assert len(answer.header(name)) == 1, answer.headers
    assert json.loads(answer.body)["request_id"] == answer.header("x-request-id")[0]
    (line,) = until(lambda: running.access(mark))
    assert (line["endpoint"], line["status_code"]) == ("/late", 500)
