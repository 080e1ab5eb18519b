"""What the tests of keys and limits have in common: a guarded app, and what clients are told."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import http_sfv

from opsguard import OpsGuard
from opsguard.testing import Answer, Request
from tests.contract.apps.admitted import Desk, make
from tests.contract.harness import Samples, parse, send

PEPPER = "a pepper of the tests"
HEADERS = ("x-ratelimit-limit", "x-ratelimit-remaining", "x-ratelimit-reset")


@dataclass
class Gate:
    """A guarded app with its OpsGuard, and eyes for what it recorded."""

    adapter: str
    ops: OpsGuard
    desk: Desk
    app: Any
    log: Path

    def send(self, request: Request) -> Answer:
        return send(self.adapter, self.app, request)

    def get(self, path: str, method: str = "GET", **headers: str) -> Answer:
        pairs = tuple([(name.replace("_", "-"), value) for name, value in headers.items()])
        # Frameworks let through what `wsgiref.validate` takes for a mistake: a body for OPTIONS.
        return self.send(Request(path, method, pairs, strict=self.adapter == "wsgi"))

    def statuses(self, path: str, times: int, method: str = "GET", **headers: str) -> list[int]:
        return [self.get(path, method, **headers).status or 0 for _ in range(times)]

    def samples(self) -> Samples:
        return parse("".join([text for _, text in self.ops.metrics.expose(False)]))

    def decisions(self) -> dict[tuple[str, str], float]:
        """What was decided, by policy and outcome."""
        found = {}
        for (name, labels), value in self.samples().items():
            if name == "rate_limit_decisions_total":
                has = dict(labels)
                found[has["policy"], has["outcome"]] = value
        return found

    def lines(self, logger: str = "opsguard.access") -> list[dict[str, Any]]:
        self.ops.runtime().sink.flush()
        if not self.log.exists():
            return []
        lines = [json.loads(line) for line in self.log.read_text().splitlines()]
        return [line for line in lines if line.get("logger") == logger]

    def faults(self) -> float:
        return sum(
            value
            for (name, _), value in self.samples().items()
            if name == "opsguard_internal_errors_total"
        )


def admitted(
    adapter: str, folder: Path, late: bool = False, options: Any = None, **settings: Any
) -> Gate:
    """A new app of this adapter with the handlers of `apps/admitted.py`."""
    log = folder / "log.jsonl"
    given: dict[str, Any] = {
        "logging": {"file": str(log)},
        "metrics": {"directory": str(folder)},
        "keys": {"pepper": PEPPER, "store": f"sqlite:///{folder / 'keys.db'}"},
    }
    for group, values in settings.items():
        given[group] = {**given.get(group, {}), **values} if isinstance(values, dict) else values
    ops = OpsGuard("contract", **given)
    desk = Desk(ops)
    return Gate(adapter, ops, desk, make(adapter, desk, late=late, **(options or {})), log)


def told(answer: Answer) -> tuple[int, int]:
    """Limit and rest that the client is told; its headers must agree with each other."""
    values = [answer.header(name) for name in HEADERS]
    assert [len(value) for value in values] == [1, 1, 1], answer.headers
    limit, rest, reset = [int(value[0]) for value in values]
    assert reset > 1_600_000_000
    parsed: Any = http_sfv
    policies, state = parsed.List(), parsed.List()
    policies.parse("".join(answer.header("ratelimit-policy")).encode())
    state.parse("".join(answer.header("ratelimit")).encode())
    (one,) = state
    assert one.params["r"] == rest
    assert one.params["t"] >= 0
    quotas = {policy.value: policy.params["q"] for policy in policies}
    assert quotas[one.value] == limit
    return limit, rest


def check_refusal(answer: Answer, message: str | None = None) -> None:
    """A 429 with all its members and headers."""
    assert answer.status == 429
    body = json.loads(answer.body)
    assert set(body) == {"status", "error", "message", "request_id", "retry_after"}
    assert body["status"] == 429
    assert body["error"] == "rate_limit_exceeded"
    if message is not None:
        assert body["message"] == message
    assert answer.header("content-type") == ["application/problem+json"]
    assert answer.header("content-length") == [str(len(answer.body))]
    assert answer.header("retry-after") == [str(body["retry_after"])]
    assert body["retry_after"] >= 1
    assert answer.header("x-request-id") == [body["request_id"]]
    assert told(answer)[1] == 0
