"""The contract over sockets: the table's scenarios on real servers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from opsguard.testing import Answer
from tests.contract.harness import Samples, request_of, send
from tests.contract.scenarios import ADAPTERS, ASGI, SCENARIOS, WSGI, Expected, Scenario
from tests.contract.test_contract import OURS, level_of
from tests.contract.test_contract import check_metrics as check_samples
from tests.servers import served as apps
from tests.servers.client import encode
from tests.servers.differences import expected_of, is_served, unknown_scenarios
from tests.servers.processes import SERVERS, Pool, Running, until

pytestmark = [
    pytest.mark.servers,
    # Of the bare apps: Django's ASGI handler leaves the spooled body open when an answer breaks
    # off, and it warns of a stream of the other kind.
    pytest.mark.filterwarnings("ignore:.*SpooledTemporaryFile.*"),
    pytest.mark.filterwarnings("ignore:StreamingHttpResponse must consume"),
]
SERVERS_OWN = ("date", "server", "connection", "transfer-encoding", "keep-alive")
"""What servers add to an answer."""


def served() -> list[tuple[str, str, str]]:
    """Server, app, and the adapter of the table whose expectations hold for it."""
    found = [
        (server.name, adapter, adapter)
        for server in SERVERS.values()
        for adapter in (ASGI if server.protocol == "asgi" else WSGI)
    ]
    return [
        *found,
        ("gunicorn-sync", "wsgi-validated", "wsgi"),
        # What Django hands on is a matter of the protocol, not of the kind of view.
        ("uvicorn-h11", "django-under-asgi", "django-async"),
        ("gunicorn-sync", "django-async-under-wsgi", "django"),
        ("uvicorn-h11", "django-async-outside", "django-async"),
        ("gunicorn-sync", "django-outside", "django"),
    ]


def cases() -> list[object]:
    return [
        pytest.param(
            *(server, app, adapter, scenario),
            id=f"{server} {app}: {scenario.name}",
            marks=[pytest.mark.full] if SERVERS[server].full else [],
        )
        for server, app, adapter in served()
        for scenario in SCENARIOS
        if scenario.sockets and adapter in scenario.only and is_served(server, app, scenario)
    ]


@pytest.mark.parametrize(("server", "app", "adapter", "scenario"), cases())
def test_contract(server: str, app: str, adapter: str, scenario: Scenario, pool: Pool) -> None:
    running = pool.get(server, app)
    expected = expected_of(server, app, adapter, scenario)
    mark, before = running.mark(), running.samples()
    calls, after = len(running.events("call")), len(running.events("after"))

    answer = perform(running, scenario, adapter)
    check_answer(scenario, expected, answer)
    if not (expected.answer_is_ours or scenario.leave or scenario.tells_ids):
        check_untouched(scenario, app, adapter, answer)
    check_line(running, mark, scenario, expected, answer)
    until(lambda: check_metrics(scenario, expected, running.since(before), answer))
    assert len(running.access(mark)) == expected.logged
    assert [line for line in running.lines(mark) if line["logger"] == "opsguard"] == []
    assert running.events("call")[calls:] == []
    if scenario.path == "/background":
        until(lambda: len(running.events("after")) > after)
        (ids,) = running.events("after")[after:]
        assert ids.split() == answer.header("x-request-id") * 2


def perform(running: Running, scenario: Scenario, adapter: str) -> Answer:
    """Send the scenario's request, and leave when it says so."""
    request = request_of(scenario, adapter)
    with running.client() as client:
        if scenario.leave == "upload":
            data = encode(request)
            client.send(data[: len(data) - len(request.body) // 2])
            return Answer()
        client.send(encode(request))
        return client.answer(request.method, enough=12 if scenario.leave else None)


def check_answer(scenario: Scenario, expected: Expected, answer: Answer) -> None:
    """The client got what the table says with our headers on it, all of it unless the app failed
    in the middle: then the connection breaks behind what was sent.
    """
    assert answer.status == expected.status
    if answer.status is None:
        return
    broken = expected.raises is not None and answer.status == 200
    assert answer.complete is not (broken or bool(scenario.leave))
    if broken:
        assert answer.body == b"abcdef"
    if expected.body is not None:
        assert answer.body == expected.body
    sent = [name.lower() for name, _ in scenario.headers]
    for name in OURS:
        assert len(answer.header(name)) == (name == "x-request-id" or name in sent)
    for name, value in scenario.headers:
        assert answer.header(name) == [value]
    if answer.status == 500 and expected.answer_is_ours:
        assert answer.header("content-type") == ["application/problem+json"]
        assert answer.header("x-request-id")[0] in answer.body.decode()


def check_untouched(scenario: Scenario, app: str, adapter: str, answer: Answer) -> None:
    """Our headers and the server's aside, it is the bare app's own answer byte for byte."""
    # Real servers take more than `wsgiref.validate` does.
    plain = send(adapter, apps.bare(app), replace(request_of(scenario, adapter), strict=False))
    assert answer.status == plain.status
    assert answer.body == plain.body
    skipped = SERVERS_OWN
    if not plain.header("content-length"):
        skipped = (*SERVERS_OWN, "content-length")  # granian tells it for an answer in one piece
    assert own_headers(answer, skipped) == own_headers(plain, skipped)


def own_headers(answer: Answer, skipped: tuple[str, ...]) -> list[tuple[str, str]]:
    """The app's own headers, in no order: granian has one of its own."""
    return sorted(
        (name.lower(), in_order(value) if name.lower() == "allow" else value)
        for name, value in answer.headers
        if name.lower() not in skipped and (name.lower() not in OURS or value == "mine")
    )


def in_order(value: str) -> str:
    """Flask lists the allowed methods in the order of a set, so in another one in each process."""
    return ", ".join(sorted(value.split(", ")))


def check_line(
    running: Running, mark: int, scenario: Scenario, expected: Expected, answer: Answer
) -> None:
    """Exactly one access line, which agrees with the answer; none for a good probe."""
    if not expected.logged:
        return
    (line,) = until(lambda: running.access(mark))
    assert line["message"] == "request_completed"
    assert line["method"] == scenario.method
    assert line["path"] == scenario.path.partition("?")[0]
    assert line["endpoint"] == expected.endpoint
    assert line["status_code"] == expected.recorded
    assert line["client"] == "127.0.0.1"
    assert line["level"] == level_of(expected.recorded or 0)
    if answer.status is not None and scenario.path != "/own-id":
        assert [line["request_id"]] == answer.header("x-request-id")
    if expected.size != -1:
        assert line["size"] == (len(answer.body) if expected.size is None else expected.size)
    if scenario.path == "/bound":
        assert line["tenant_id"] == "t-1"


def check_metrics(scenario: Scenario, expected: Expected, samples: Samples, answer: Answer) -> bool:
    check_samples(scenario, expected, samples, answer)
    return True


def test_every_adapter_of_the_table_is_served_in_the_fast_tier() -> None:
    fast = {adapter for server, _, adapter in served() if not SERVERS[server].full}
    assert fast == set(ADAPTERS)


def test_every_difference_is_about_a_scenario_of_the_table() -> None:
    assert unknown_scenarios() == set()
