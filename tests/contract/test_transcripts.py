"""The transcripts of two services, as data: the same policies in every adapter.

A row is a request, repeated, and what its client must get. `ai_worker` lives on tiers, `assistant`
on limits per kind of endpoint.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from opsguard.testing import Answer, Request
from tests.contract.admission import HEADERS, Gate, admitted, check_refusal, told
from tests.contract.scenarios import ADAPTERS

EVERYWHERE = pytest.mark.parametrize("adapter", ADAPTERS)


@dataclass(frozen=True)
class Row:
    """`times` requests like this are all answered by `status`."""

    path: str
    status: int
    times: int = 1
    method: str = "GET"
    headers: dict[str, str] = field(default_factory=dict)
    client: str = "127.0.0.1"
    limit: int | None = None
    """What `X-RateLimit-Limit` says."""
    error: str | None = None
    message: str | None = None

    def send(self, gate: Gate) -> Answer:
        pairs = tuple(self.headers.items())
        # Frameworks pass `wsgiref.validate` as far as they can.
        return gate.send(Request(self.path, self.method, pairs, client=self.client, strict=False))


def play(gate: Gate, rows: list[Row]) -> None:
    for row in rows:
        for number in range(row.times):
            answer = row.send(gate)
            assert answer.status == row.status, (row, number, answer.body)
            assert len(answer.header("x-request-id")) == 1
            check(row, answer)


def check(row: Row, answer: Answer) -> None:
    if row.limit is not None:
        assert told(answer)[0] == row.limit, row
    if row.status == 429:
        check_refusal(answer, row.message)
    if row.status == 401:
        assert answer.header("www-authenticate")
    if row.error is not None:
        assert json.loads(answer.body)["error"] == row.error


# --- ai_worker: tiers

EXCEEDED = "Rate limit exceeded: {} per 1 minute"
PREDICT = "/predict/revenue-lstm"
PUBLIC = ["/", "/health", "/metrics", "/docs", "/openapi.json"]
MASTER = "the-master-key-of-ai-worker"
DEMO = {
    "free": "demo-free-key-12345",
    "pro": "demo-pro-key-67890",
    "enterprise": "demo-enterprise-key-abcdef",
}


def ai_worker(adapter: str, folder: Path, monkeypatch: Any, **environ: str) -> Gate:
    """Its environment, and the little that is said in code."""
    given = {
        "MASTER_API_KEY": MASTER,
        "ENVIRONMENT": "development",
        "LOG_LEVEL": "INFO",
        "GIT_SHA": "abc1234",
        **environ,
    }
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    return admitted(
        adapter,
        folder,
        keys={"required": ["*"], "public": PUBLIC, "prefix": "omni"},
        limiter={"default": "20/minute"},
    )


@EVERYWHERE
def test_ai_worker_knows_its_callers(adapter: str, tmp_path: Path, monkeypatch: Any) -> None:
    gate = ai_worker(adapter, tmp_path, monkeypatch)
    minted = gate.ops.keys.create(tenant_id="customer-123", tier="pro", name="Production")
    assert minted.startswith("omni_pro_")
    keyed = [{"X-API-Key": minted}, {"Authorization": f"Bearer {minted}"}]
    rows = [
        Row(PREDICT, 401, method="POST", error="missing_api_key"),
        Row(PREDICT, 401, method="POST", headers={"X-API-Key": "no"}, error="invalid_api_key"),
        *[Row(PREDICT, 200, method="POST", headers=headers) for headers in keyed],
        *[Row(path, 200) for path in PUBLIC],
        *[Row(PREDICT, 200, method="POST", headers={"X-API-Key": key}) for key in DEMO.values()],
        Row(PREDICT, 200, method="POST", headers={"X-API-Key": MASTER}),
        Row("/open", 401),
    ]
    play(gate, rows)
    answer = gate.get(PREDICT, "POST", X_API_Key=minted, X_Request_ID="abc-123")
    assert answer.header("x-request-id") == ["abc-123"]
    assert gate.lines()[-1]["request_id"] == "abc-123"
    assert gate.faults() == 0


@EVERYWHERE
def test_ai_worker_knows_no_demo_key_in_production(
    adapter: str, tmp_path: Path, monkeypatch: Any
) -> None:
    gate = ai_worker(adapter, tmp_path, monkeypatch, ENVIRONMENT="production")
    rows = [Row(PREDICT, 401, headers={"X-API-Key": key}) for key in DEMO.values()]
    play(gate, [*rows, Row(PREDICT, 200, headers={"X-API-Key": MASTER})])


@EVERYWHERE
def test_ai_worker_limits_by_tier(adapter: str, tmp_path: Path, monkeypatch: Any) -> None:
    """The tier replaces the default of 20, and is the customer's, wherever he comes from."""
    gate = ai_worker(adapter, tmp_path, monkeypatch)
    free, pro, enterprise = [{"X-API-Key": key} for key in DEMO.values()]
    rows = [
        Row("/health", 200, limit=20),
        Row(PREDICT, 200, method="POST", headers=pro, limit=1_000),
        Row(PREDICT, 200, method="POST", headers=enterprise, limit=10_000),
        Row(PREDICT, 200, times=100, method="POST", headers=free, limit=100),
        Row(
            PREDICT,
            429,
            method="POST",
            headers=free,
            message="Rate limit exceeded: 100 per 1 minute",
        ),
        Row(PREDICT, 429, headers=free, client="10.0.0.9", limit=100),
        Row(PREDICT, 200, times=101, headers=pro),
        Row(PREDICT, 200, times=30, headers={"X-API-Key": MASTER}),
    ]
    play(gate, rows)
    refused = [line for line in gate.lines() if line["status_code"] == 429]
    assert len(refused) == 2
    assert {line["endpoint"] for line in refused} == {PREDICT}


@EVERYWHERE
def test_ai_worker_can_turn_limits_off(adapter: str, tmp_path: Path, monkeypatch: Any) -> None:
    gate = ai_worker(adapter, tmp_path, monkeypatch, ENABLE_RATE_LIMITING="false")
    play(gate, [Row(PREDICT, 200, times=120, headers={"X-API-Key": DEMO["free"]})])
    answer = gate.get(PREDICT, X_API_Key=DEMO["free"])
    assert [answer.header(name) for name in HEADERS] == [[], [], []]
    assert gate.get(PREDICT).status == 401  # keys are another matter


# --- assistant: limits per kind of endpoint

ASSISTANT = {
    "/auth/*": "10/minute",
    "/chat": "30/minute",
    "/health": "60/minute",
    "*": "100/minute",
}


@EVERYWHERE
def test_assistant_limits_each_kind_of_endpoint_by_address(adapter: str, tmp_path: Path) -> None:
    gate = admitted(adapter, tmp_path, limiter={"policies": ASSISTANT})
    login = "/auth/login"
    rows = [
        Row(login, 200, times=10, method="POST", limit=10),
        Row(
            *(login, 429),
            times=3,
            method="POST",
            limit=10,
            error="rate_limit_exceeded",
            message=EXCEEDED.format(10),
        ),
        Row(login, 200, method="POST", client="10.0.0.7"),
        Row("/chat", 200, times=30, method="POST", limit=30),
        Row("/chat", 429, method="POST", message=EXCEEDED.format(30)),
        Row("/health", 200, times=60, limit=60),
        Row("/health", 429, message=EXCEEDED.format(60)),
        Row("/open", 200, times=50, limit=100),
        Row("/docs", 200, times=50, limit=100),
        Row("/nowhere", 429, message=EXCEEDED.format(100)),
        Row("/metrics", 200, times=3),
    ]
    play(gate, rows)
    decisions = gate.decisions()
    assert decisions["/auth/*", "refused"] == 3
    assert decisions["/chat", "allowed"] == 30
    assert gate.faults() == 0


@EVERYWHERE
def test_assistant_answers_a_correlation_id_always(adapter: str, tmp_path: Path) -> None:
    """On refusals, too, and each line has it."""
    gate = admitted(
        adapter,
        tmp_path,
        limiter={"policies": {"/auth/*": "1/minute"}},
        ids={"answer_correlation": "always"},
    )
    for number, status in enumerate((200, 429)):
        answer = gate.get("/auth/login", "POST", X_Correlation_ID=f"c-{number}")
        assert answer.status == status
        assert answer.header("x-correlation-id") == [f"c-{number}"]
    line = gate.lines()[-1]
    assert line["message"] == "request_completed"
    assert (line["method"], line["path"], line["status_code"]) == ("POST", "/auth/login", 429)
    assert line["duration_ms"] >= 0


@EVERYWHERE
def test_assistant_sees_its_clients_behind_a_trusted_proxy(adapter: str, tmp_path: Path) -> None:
    gate = admitted(
        adapter,
        tmp_path,
        limiter={"policies": {"/auth/*": "1/minute"}},
        proxies={"trusted": ["127.0.0.0/8"]},
    )
    login = "/auth/login"
    forged = {"X-Forwarded-For": "198.51.100.7, 203.0.113.1"}
    rows = [
        Row(login, 200, headers={"X-Forwarded-For": "203.0.113.1"}),
        Row(login, 429, headers={"X-Forwarded-For": "203.0.113.1"}),
        Row(login, 429, headers=forged),
        Row(login, 200, headers={"X-Forwarded-For": "203.0.113.2"}),
        Row(login, 200, headers={"X-Forwarded-For": "203.0.113.1"}, client="10.1.1.1"),
    ]
    play(gate, rows)
