"""Websockets on real servers, with the client of the package `websockets`."""

from __future__ import annotations

from contextlib import AbstractContextManager
from socket import SHUT_RDWR

import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import ClientConnection, connect

from tests.servers.processes import SERVERS, Pool, Running, until

pytestmark = pytest.mark.servers

CASES = [
    pytest.param(
        server.name,
        app,
        id=f"{server.name} {app}",
        marks=[pytest.mark.full] if server.full else [],
    )
    for server in SERVERS.values()
    for app in ("asgi", "fastapi")
    if server.protocol == "asgi"
]
OPEN = ("websocket_connections_in_progress", frozenset({("endpoint", "/ws")}))
TOTAL = ("websocket_connections_total", frozenset({("endpoint", "/ws")}))


def open_socket(
    running: Running, path: str = "/ws", **headers: str
) -> AbstractContextManager[ClientConnection]:
    pairs = {name.replace("_", "-"): value for name, value in headers.items()}
    address = f"ws://127.0.0.1:{running.port}{path}"
    return connect(address, additional_headers=pairs, proxy=None, open_timeout=20)


@pytest.mark.parametrize(("server", "app"), CASES)
def test_an_echo_knows_its_ids_and_has_one_line(server: str, app: str, pool: Pool) -> None:
    """The client's id comes back with the handshake, is known to the handler, and is in the line;
    the gauge is one while the connection is open.
    """
    running = pool.get(server, app)
    mark, before = running.mark(), running.samples()
    with open_socket(running, X_Request_ID="ws-1", X_Correlation_ID="cor-1") as socket:
        assert socket.response is not None
        if server != "granian-asgi":  # it drops the headers of every handshake
            assert socket.response.headers.get_all("X-Request-ID") == ["ws-1"]
            assert socket.response.headers.get_all("X-Correlation-ID") == ["cor-1"]
        for text in ("one", "two"):
            socket.send(text)
            assert socket.recv() == f"ws-1 cor-1 {text}"
        assert running.since(before)[OPEN] == 1
        assert running.access(mark) == []
    (line,) = until(lambda: running.access(mark))
    assert line["method"] == "WEBSOCKET"
    assert (line["path"], line["endpoint"], line["status_code"]) == ("/ws", "/ws", 101)
    assert (line["request_id"], line["correlation_id"]) == ("ws-1", "cor-1")
    assert line["size"] == 2 * len("ws-1 cor-1 one")
    until(lambda: OPEN not in running.since(before))
    assert running.since(before) == {TOTAL: 1.0}


@pytest.mark.parametrize(("server", "app"), CASES)
def test_two_connections_at_once_keep_their_ids(server: str, app: str, pool: Pool) -> None:
    running = pool.get(server, app)
    with (
        open_socket(running, X_Request_ID="ws-a") as first,
        open_socket(running, X_Request_ID="ws-b") as second,
    ):
        for socket in (first, second, first):
            socket.send("x")
        assert (first.recv(), second.recv()) == ("ws-a ws-a x", "ws-b ws-b x")
        assert first.recv() == "ws-a ws-a x"


@pytest.mark.parametrize(("server", "app"), CASES)
def test_a_refused_websocket_is_one_line_and_no_connection(
    server: str, app: str, pool: Pool
) -> None:
    """The app closes before it accepts: the client gets 403, nothing counts as a connection."""
    running = pool.get(server, app)
    mark, before = running.mark(), running.samples()
    with pytest.raises(InvalidStatus) as refused, open_socket(running, "/elsewhere"):
        pass
    assert refused.value.response.status_code == 403
    (line,) = until(lambda: running.access(mark))
    assert (line["method"], line["status_code"]) == ("WEBSOCKET", 403)
    assert running.since(before) == {}


@pytest.mark.parametrize(("server", "app"), CASES)
def test_a_client_that_is_cut_off_leaks_no_gauge(server: str, app: str, pool: Pool) -> None:
    running = pool.get(server, app)
    mark, before = running.mark(), running.samples()
    with open_socket(running) as socket:
        socket.send("x")
        socket.recv()
        socket.socket.shutdown(SHUT_RDWR)  # without a word
    assert until(lambda: running.access(mark), seconds=30)[0]["status_code"] == 101
    until(lambda: OPEN not in running.since(before))
    assert running.since(before) == {TOTAL: 1.0}
