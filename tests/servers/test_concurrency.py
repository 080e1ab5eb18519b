"""Requests that are served at the same time, and those that follow each other on a connection."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor

import pytest

from opsguard.testing import Request
from tests.contract.scenarios import ADAPTERS, ASGI
from tests.servers.client import encode
from tests.servers.processes import SERVERS, Pool, Running, until

pytestmark = pytest.mark.servers

CLIENTS = 20
EACH = 5
CASES = [
    pytest.param(
        server.name,
        adapter,
        id=f"{server.name} {adapter}",
        marks=[pytest.mark.full] if server.full else [],
    )
    for server in SERVERS.values()
    for adapter in ADAPTERS
    if (adapter in ASGI) == (server.protocol == "asgi")
]


def talk(running: Running, name: str) -> list[tuple[str, str]]:
    """The ids sent, each with the answer's body, on one connection where the server keeps it."""
    ids = [f"{name}-{number}" for number in range(EACH)]
    requests = [Request("/wait", headers=(("X-Request-ID", id),)) for id in ids]
    if not running.server.keep_alive:
        answers = [running.ask(request) for request in requests]
    else:
        with running.client() as client:
            answers = [client.ask(request) for request in requests]
    for id, answer in zip(ids, answers, strict=True):
        assert answer.header("x-request-id") == [id]
    return [(id, answer.body.decode()) for id, answer in zip(ids, answers, strict=True)]


@pytest.mark.parametrize(("server", "app"), CASES)
def test_concurrent_requests_never_mix_their_ids(server: str, app: str, pool: Pool) -> None:
    """The handler knows its own id before and after it waits; its bound field and its line too."""
    running = pool.get(server, app)
    mark, before = running.mark(), running.samples()
    names = [f"c{number}" for number in range(CLIENTS)]
    with ThreadPoolExecutor(CLIENTS) as threads:
        found = [pair for pairs in threads.map(lambda n: talk(running, n), names) for pair in pairs]
    assert [body for _, body in found] == [f"{id} {id}" for id, _ in found]
    until(lambda: len(running.access(mark)) == len(found))
    lines = {line["request_id"]: line["tenant_id"] for line in running.access(mark)}
    assert lines == dict(found)
    labels = {"method": "GET", "endpoint": "/wait", "status": "200"}
    requests = ("http_requests_total", frozenset(labels.items()))
    until(lambda: running.since(before).get(requests) == len(found))
    assert running.since(before)[requests] == len(found)
    assert not [key for key in running.since(before) if key[0] == "http_requests_in_progress"]


@pytest.mark.parametrize(("server", "app"), [case for case in CASES if case.values[1] in ASGI])
def test_a_pipelined_request_has_an_id_of_its_own(server: str, app: str, pool: Pool) -> None:
    """uvicorn starts it in the context of the one before, whose exchange must not be found."""
    running = pool.get(server, app)
    mark = running.mark()
    given = [Request("/ids", headers=(("X-Request-ID", id),)) for id in ("p1", "p2")]
    with running.client() as client:
        client.send(b"".join([encode(request) for request in [*given, *[Request("/ids")] * 2]]))
        answers = [client.answer() for _ in range(4)]
    bodies = [answer.body.decode().split() for answer in answers]
    assert bodies[:2] == [["p1", "p1"], ["p2", "p2"]]
    fresh = [ids[0] for ids in bodies[2:]]
    assert all(re.fullmatch("[0-9a-f]{32}", id) for id in fresh)
    assert len(set(fresh)) == 2
    told = [id for answer in answers for id in answer.header("x-request-id")]
    assert told == ["p1", "p2", *fresh]
    until(lambda: len(running.access(mark)) == 4)
    assert [line["request_id"] for line in running.access(mark)] == ["p1", "p2", *fresh]
