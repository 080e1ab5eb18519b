"""The contract on every adapter, in process."""

from __future__ import annotations

from pathlib import Path

import pytest

from opsguard.testing import Answer
from tests.contract.harness import Guarded, Samples, bare, guard, request_of, send
from tests.contract.scenarios import ADAPTERS, SCENARIOS, Expected, Scenario

# Django's ASGI handler leaves the spooled body open when an answer breaks off.
pytestmark = pytest.mark.filterwarnings("ignore:.*SpooledTemporaryFile.*")
OURS = ("x-request-id", "x-correlation-id")
CASES = [
    pytest.param(scenario, adapter, id=f"{adapter}: {scenario.name}")
    for scenario in SCENARIOS
    for adapter in ADAPTERS
    if adapter in scenario.only and scenario.in_process
]


@pytest.mark.parametrize(("scenario", "adapter"), CASES)
def test_contract(scenario: Scenario, adapter: str, tmp_path: Path) -> None:
    expected = scenario.expect(adapter)
    guarded = guard(adapter, tmp_path)
    answer = guarded.send(request_of(scenario, adapter))
    check_answer(scenario, expected, answer)
    if not (expected.answer_is_ours or scenario.leave or scenario.tells_ids):
        check_untouched(scenario, adapter, answer)
    check_line(scenario, expected, guarded, answer)
    check_metrics(scenario, expected, guarded.samples(), answer)
    assert guarded.shop.calls == []


def check_answer(scenario: Scenario, expected: Expected, answer: Answer) -> None:
    """The client got what the table says, with our headers on it."""
    assert answer.status == expected.status
    raised = type(answer.error).__name__ if answer.error else None
    if scenario.leave != "upload":
        assert raised == expected.raises, answer.error
    if expected.body is not None:
        assert answer.body == expected.body
    if answer.status is None:
        return
    assert len(answer.header("x-request-id")) == 1
    sent = [name.lower() for name, _ in scenario.headers]
    assert len(answer.header("x-correlation-id")) == ("x-correlation-id" in sent)
    for name, value in scenario.headers:
        assert answer.header(name) == [value]


def check_untouched(scenario: Scenario, adapter: str, answer: Answer) -> None:
    """Our headers aside, it is the bare app's own answer byte for byte."""
    _, app = bare(adapter)
    plain = send(adapter, app, request_of(scenario, adapter))
    assert answer.status == plain.status
    assert answer.body == plain.body
    assert type(answer.error) is type(plain.error)
    assert without_ours(answer) == without_ours(plain)


def without_ours(answer: Answer) -> list[tuple[str, str]]:
    skipped = (*OURS, "date")
    return [(n, v) for n, v in answer.headers if n.lower() not in skipped or v == "mine"]


def check_line(scenario: Scenario, expected: Expected, guarded: Guarded, answer: Answer) -> None:
    """Exactly one access line, which agrees with the answer; none for a good probe."""
    lines = guarded.lines()
    if not expected.logged:
        assert lines == []
        return
    assert len(lines) == 1, lines
    line = lines[0]
    assert line["message"] == "request_completed"
    assert line["method"] == scenario.method
    assert line["path"] == scenario.path.partition("?")[0]
    assert line["endpoint"] == expected.endpoint
    assert line["status_code"] == expected.recorded
    assert line["client"] == "127.0.0.1"
    assert line["level"] == level_of(expected.recorded or 0)
    assert line["duration_ms"] >= 0
    if answer.status is not None and scenario.path != "/own-id":
        assert [line["request_id"]] == answer.header("x-request-id")
    if expected.size != -1:
        size = len(answer.body) if expected.size is None else expected.size
        assert line["size"] == size
    if scenario.path == "/bound":
        assert line["tenant_id"] == "t-1"


def level_of(status: int) -> str:
    return "ERROR" if status >= 500 else "WARNING" if status >= 400 else "INFO"


def check_metrics(scenario: Scenario, expected: Expected, samples: Samples, answer: Answer) -> None:
    """Exactly one request in the metrics, nothing in progress, nothing else."""
    if not expected.logged and answer.status is None:
        assert of(samples, "http_requests_total") == {}
        return
    route = {"method": expected.method, "endpoint": expected.endpoint}
    assert of(samples, "http_requests_total") == {
        labels(**route, status=str(expected.recorded)): 1.0
    }
    for name in ("http_request_duration_seconds", "http_request_first_byte_seconds"):
        assert of(samples, f"{name}_count") == {labels(**route): 1.0}
    assert of(samples, "http_requests_in_progress") == {}
    errors = {labels(**route, error_type=expected.error): 1.0} if expected.error else {}
    assert of(samples, "http_errors_total") == errors
    if expected.size != -1:
        size = len(answer.body) if expected.size is None else expected.size
        sizes = {labels(**route): float(size)} if size else {}
        assert of(samples, "http_response_size_bytes_sum") == sizes
    if scenario.leave != "upload" and not expected.answer_is_ours:
        size = len(scenario.body) if expected.received is None else expected.received
        received = {labels(**route): float(size)} if size else {}
        assert of(samples, "http_request_size_bytes_sum") == received
    assert of(samples, "opsguard_internal_errors_total") == {}


def labels(**values: str) -> frozenset[tuple[str, str]]:
    return frozenset(values.items())


def of(samples: Samples, name: str) -> dict[frozenset[tuple[str, str]], float]:
    return {found: value for (sample, found), value in samples.items() if sample == name}


def test_the_table_has_no_two_scenarios_of_one_name() -> None:
    names = [scenario.name for scenario in SCENARIOS]
    assert len(set(names)) == len(names)
