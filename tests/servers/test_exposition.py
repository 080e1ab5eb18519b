"""/metrics over the wire."""

from __future__ import annotations

import gzip
import random

import pytest
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as parse_openmetrics,
)
from prometheus_client.parser import text_string_to_metric_families as parse_text

from opsguard.testing import Answer, Request
from tests.contract.scenarios import ADAPTERS, ASGI
from tests.servers.client import encode
from tests.servers.processes import SERVERS, Pool, Running, until

pytestmark = pytest.mark.servers

SERVED = [
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
OPENMETRICS = "application/openmetrics-text; version=1.0.0"


def check_all_forms(running: Running) -> None:
    """Text, OpenMetrics, either with gzip, and HEAD."""
    text = running.get("/metrics")
    check_kind(text, "text/plain")
    assert "service_info" in {family.name for family in parse_text(text.body.decode())}

    openmetrics = running.get("/metrics", Accept=OPENMETRICS)
    check_kind(openmetrics, "application/openmetrics-text")
    assert openmetrics.body.endswith(b"# EOF\n")
    assert "service_info" in {
        family.name for family in parse_openmetrics(openmetrics.body.decode())
    }

    packed = running.get("/metrics", Accept_Encoding="gzip")
    check_kind(packed, "text/plain")
    assert packed.header("content-encoding") == ["gzip"]
    assert len(packed.body) < len(text.body)
    assert list(parse_text(gzip.decompress(packed.body).decode()))

    head = running.ask(Request("/metrics", "HEAD"))
    check_kind(head, "text/plain")
    assert head.body == b""

    posted = running.ask(Request("/metrics", "POST", body=b"x"))
    assert posted.status in (200, 405)


def check_kind(answer: Answer, kind: str) -> None:
    assert (answer.status, answer.complete) == (200, True)
    assert answer.header("content-type")[0].startswith(kind)
    assert len(answer.header("x-request-id")) == 1


@pytest.mark.parametrize(("server", "app"), SERVED)
def test_every_form_is_served(server: str, app: str, pool: Pool) -> None:
    check_all_forms(pool.get(server, app))


@pytest.mark.parametrize(
    "server",
    [
        pytest.param(server.name, marks=[pytest.mark.full] if server.full else [])
        for server in SERVERS.values()
        if server.protocol == "asgi"
    ],
)
def test_a_scrape_goes_through_while_handlers_block_every_thread(server: str, pool: Pool) -> None:
    """The loop's default executor is full, so a scrape that went there would wait for it."""
    running = pool.get(server, "asgi-blocking")
    with running.client() as client:
        client.send(encode(Request("/block")))
        blocked = client.answer(enough=7)
        assert blocked.body == b"blocked"
        check_all_forms(running)
        assert running.get("/release").status == 200
        client.read_on(blocked)
    assert blocked.complete


@pytest.mark.parametrize(("server", "app"), SERVED)
def test_a_thousand_random_paths_make_one_series(server: str, app: str, pool: Pool) -> None:
    running = pool.get(server, app)
    before = running.samples()
    paths = odd_paths(1000)
    answered = 0
    client = running.client()
    for path in paths:
        answer = client.ask(Request(path))
        assert answer.status is not None
        assert answer.status < 500
        answered += answer.status == 404
        if not running.server.keep_alive or "close" in answer.header("connection"):
            client.close()
            client = running.client()
    client.close()
    assert answered > 900
    until(lambda: total(running, before) >= answered)
    grown = {key for key in running.since(before) if key[0] == "http_requests_total"}
    assert {dict(labels)["endpoint"] for _, labels in grown} == {"<unmatched>"}
    assert len({labels for _, labels in grown if ("status", "404") in labels}) == 1


def total(running: Running, before: dict[object, float]) -> float:
    return sum(
        value
        for (name, _), value in running.since(before).items()  # type: ignore[arg-type]
        if name == "http_requests_total"
    )


def odd_paths(count: int) -> list[str]:
    """Paths that nobody serves; some hold what is no text, a NUL, or a second slash."""
    chosen = random.Random(7)
    odd = ("", "%ff", "%00", "%C3%A9", "%c3%28", "//", "/../", ";x=1", "%2F", "%0d%0a")
    return [f"/none/{chosen.getrandbits(64):x}{chosen.choice(odd)}/x" for _ in range(count)]
