"""API keys, the same in every adapter."""

from __future__ import annotations

import asyncio
import contextvars
import json
import sqlite3
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from opsguard.testing import Answer, Request, serve_asgi
from tests.contract.admission import PEPPER, Gate, admitted
from tests.contract.scenarios import ADAPTERS, ASGI

EVERYWHERE = pytest.mark.parametrize("adapter", ADAPTERS)
MASTER = "the-master-key"
REQUIRED = {"required": ["/admin/*", "/chat"], "public": ["/admin/open"]}
CHALLENGE = 'Bearer realm="contract"'


def gate_of(adapter: str, folder: Path, **settings: Any) -> Gate:
    keys = {**REQUIRED, "master": MASTER, **settings.pop("keys", {})}
    return admitted(adapter, folder, keys=keys, **settings)


def body(answer: Answer) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(answer.body)
    assert answer.header("content-type") == ["application/problem+json"]
    assert answer.header("x-request-id") == [found["request_id"]]
    assert found["status"] == answer.status
    return found


def ended(gate: Gate) -> None:
    """No fault of ours, and as many lines as requests (good scrapes have none)."""
    assert gate.faults() == 0
    requests = sum(
        value
        for (name, labels), value in gate.samples().items()
        if name == "http_requests_total" and ("endpoint", "/metrics") not in labels
    )
    assert len(gate.lines()) == requests


# --- who may


@EVERYWHERE
def test_without_a_key_it_is_401_and_nothing_runs(adapter: str, tmp_path: Path) -> None:
    gate = gate_of(adapter, tmp_path)
    for path in ("/admin/users", "/chat", "/admin/nowhere", "/keyed", "/pro", "/scoped"):
        answer = gate.get(path)
        assert answer.status == 401, path
        assert body(answer)["error"] == "missing_api_key"
        assert answer.header("www-authenticate") == [CHALLENGE]
    for path in ("/open", "/admin/open", "/"):
        assert gate.get(path).status == 200, path
    assert gate.get("/metrics").status == 200
    assert gate.desk.calls == ["/open", "/admin/open", "/"]
    ended(gate)


@EVERYWHERE
@pytest.mark.parametrize("how", ["X-API-Key", "Authorization", "lower case", "both"])
def test_a_key_comes_in_its_header_or_as_bearer(adapter: str, how: str, tmp_path: Path) -> None:
    gate = gate_of(adapter, tmp_path)
    key = gate.ops.keys.create(tenant_id="t-1", tier="pro", name="Production", scopes=["write"])
    sent = {
        "X-API-Key": (("X-API-Key", key),),
        "Authorization": (("Authorization", f"Bearer {key}"),),
        "lower case": (("authorization", f"bearer {key}"),),
        "both": (("X-API-Key", key), ("Authorization", f"Bearer {key}")),
    }[how]
    for path in ("/admin/users", "/chat", "/keyed", "/pro", "/scoped"):
        assert gate.send(Request(path, headers=sent)).status == 200, path
    who = json.loads(gate.send(Request("/who", headers=sent)).body)
    assert who[1:] == ["t-1", "pro"]
    assert key not in gate.log.read_text()
    ended(gate)


@EVERYWHERE
def test_the_header_is_a_setting(adapter: str, tmp_path: Path) -> None:
    gate = gate_of(adapter, tmp_path, keys={"header": "X-Our-Key"})
    assert gate.get("/chat", X_Our_Key=MASTER).status == 200
    assert gate.get("/chat", X_API_Key=MASTER).status == 401


@EVERYWHERE
def test_tiers_and_scopes_that_are_not_enough_are_403(adapter: str, tmp_path: Path) -> None:
    gate = gate_of(adapter, tmp_path)
    free = gate.ops.keys.create(tenant_id="t-1", tier="free")
    answer = gate.get("/pro", X_API_Key=free)
    assert (answer.status, body(answer)["error"]) == (403, "insufficient_tier")
    answer = gate.get("/scoped", X_API_Key=free)
    assert (answer.status, body(answer)["error"]) == (403, "insufficient_scope")
    assert 'error="insufficient_scope"' in answer.header("www-authenticate")[0]
    assert gate.get("/keyed", X_API_Key=free).status == 200
    assert gate.desk.calls == ["/keyed"]
    ended(gate)


@EVERYWHERE
def test_the_master_key_may_all(adapter: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("MASTER_API_KEY", "another-master-key")
    gate = gate_of(adapter, tmp_path)
    for path in ("/admin/users", "/keyed", "/pro", "/scoped"):
        assert gate.get(path, X_API_Key="another-master-key").status == 200, path
        assert gate.get(path, X_API_Key=MASTER).status == 401, path  # the environment wins


# --- what is no key

BAD = [
    pytest.param((("X-API-Key", "no-such-key"),), id="unknown"),
    pytest.param((("X-API-Key", "ops_pro_aaaaaaaaaaaa_" + "b" * 43),), id="unknown, well formed"),
    pytest.param((("Authorization", "Bearer"),), id="Bearer alone"),
    pytest.param((("Authorization", "Bearer "),), id="Bearer and a space"),
    pytest.param((("X-API-Key", MASTER), ("X-API-Key", MASTER)), id="twice"),
    pytest.param(
        (("Authorization", f"Bearer {MASTER}"), ("Authorization", f"Bearer {MASTER}")),
        id="Bearer twice",
    ),
    pytest.param((("X-API-Key", MASTER), ("Authorization", "Bearer other")), id="two of them"),
    pytest.param((("X-API-Key", "\xe9\xff"),), id="not ASCII"),
    pytest.param((("X-API-Key", f"{MASTER}\0"),), id="NUL"),
    pytest.param((("Authorization", f"Bearer {MASTER} x"),), id="a space in it"),
    pytest.param((("X-API-Key", "x" * 1_048_576),), id="1 MB"),
    pytest.param((("Authorization", "Bearer " + "x" * 1_048_576),), id="1 MB of Bearer"),
]


@EVERYWHERE
@pytest.mark.parametrize("headers", BAD)
@pytest.mark.parametrize("path", ["/chat", "/keyed"], ids=["by path", "by decorator"])
def test_what_is_no_key_is_one_401(
    adapter: str, headers: tuple[tuple[str, str], ...], path: str, tmp_path: Path
) -> None:
    gate = gate_of(adapter, tmp_path)
    answer = gate.send(Request(path, headers=(*headers, ("X-Request-ID", "r")), strict=False))
    assert answer.status == 401
    assert body(answer) == {
        "status": 401,
        "error": "invalid_api_key",
        "message": "This API key is not valid.",
        "request_id": "r",
    }
    assert answer.header("www-authenticate") == [f'{CHALLENGE}, error="invalid_token"']
    assert gate.desk.calls == []
    ended(gate)


@EVERYWHERE
@pytest.mark.parametrize(
    ("path", "headers"),
    [
        (f"/chat?api_key={MASTER}", ()),
        (f"/chat?X-API-Key={MASTER}", ()),
        ("/chat", (("Authorization", "Basic dXNlcjpwYXNz"),)),
    ],
    ids=["in the query", "in the query by name", "another scheme"],
)
def test_elsewhere_a_key_counts_for_nothing(
    adapter: str, path: str, headers: tuple[tuple[str, str], ...], tmp_path: Path
) -> None:
    gate = gate_of(adapter, tmp_path)
    answer = gate.send(Request(path, headers=headers))
    assert (answer.status, body(answer)["error"]) == (401, "missing_api_key")


@EVERYWHERE
def test_wrong_revoked_and_expired_are_told_as_one(adapter: str, tmp_path: Path) -> None:
    gate = gate_of(adapter, tmp_path, keys={"cache": 0})
    keys = gate.ops.keys
    good = keys.create(tenant_id="t", tier="pro")
    revoked = keys.create(tenant_id="t")
    expired = keys.create(tenant_id="t", expires=timedelta(hours=1))
    (record,) = [one for one in keys.list() if one.expires is not None]
    for one in keys.list():
        if one.key_id in revoked:
            keys.revoke(one.key_id)
    age(tmp_path / "keys.db", record.key_id)
    wrong = f"{good[:-1]}{'A' if good[-1] != 'A' else 'B'}"
    answers = [
        gate.get("/chat", X_API_Key=key, X_Request_ID="r") for key in (wrong, revoked, expired)
    ]
    assert [answer.status for answer in answers] == [401] * 3
    assert len({answer.body for answer in answers}) == 1
    assert len({str(answer.headers) for answer in answers}) == 1
    assert gate.get("/chat", X_API_Key=good).status == 200


def age(file: Path, key_id: str) -> None:
    """Let a key have expired an hour ago."""
    with sqlite3.connect(file) as connection:
        tables = [row[0] for row in connection.execute("SELECT name FROM sqlite_master")]
        for table in tables:
            columns = [row[1] for row in connection.execute(f"PRAGMA table_info({table})")]
            if {"expires", "key_id"} <= set(columns):
                connection.execute(f"UPDATE {table} SET expires = 1.0 WHERE key_id = ?", (key_id,))
    connection.close()


@EVERYWHERE
@pytest.mark.parametrize("path", ["//admin/users", "/x/../admin/users", "/ADMIN/users"])
def test_a_spelling_opens_no_door(adapter: str, path: str, tmp_path: Path) -> None:
    gate = gate_of(adapter, tmp_path)
    assert gate.get(path).status == 401
    # Nor does a public path that is spelled in another way.
    assert gate.get(path.replace("users", "open")).status == 401
    assert gate.desk.calls == []


# --- the handler knows whose key it is


@EVERYWHERE
def test_a_refusal_that_a_handler_catches_is_one_each_time(adapter: str, tmp_path: Path) -> None:
    gate = gate_of(adapter, tmp_path)
    key = gate.ops.keys.create(tenant_id="t-7", tier="pro")
    assert json.loads(gate.get("/who/twice").body) == [401, 401]
    assert json.loads(gate.get("/who/twice", X_API_Key=key).body) == ["secret", "secret"]


@EVERYWHERE
def test_identity_in_handlers_threads_and_background_work(adapter: str, tmp_path: Path) -> None:
    gate = gate_of(adapter, tmp_path)
    key = gate.ops.keys.create(tenant_id="t-7", tier="pro")
    for path in ("/who", "/who/thread"):
        assert json.loads(gate.get(path, X_API_Key=key).body)[1:] == ["t-7", "pro"]
        assert json.loads(gate.get(path).body) is None
        # Where none is needed, a wrong one is the app's business.
        assert json.loads(gate.get(path, Authorization="Bearer of-another-kind").body) is None
    assert gate.get("/who/background", X_API_Key=key).status == 200
    assert gate.desk.later_done.wait(10)
    assert json.loads(gate.desk.later[0])[1:] == ["t-7", "pro"]
    assert gate.ops.identity() is None


@EVERYWHERE
def test_requests_at_the_same_time_have_identities_of_their_own(
    adapter: str, tmp_path: Path
) -> None:
    """With look-ups under way at the same time, as none of the keys is cached."""
    gate = gate_of(adapter, tmp_path)
    keys = {f"t-{n}": gate.ops.keys.create(tenant_id=f"t-{n}", tier="pro") for n in range(8)}
    requests = [Request("/who", headers=(("X-API-Key", key),)) for key in keys.values()] * 2
    if adapter in ASGI:

        async def gather() -> list[Answer]:
            return await asyncio.gather(*[serve_asgi(gate.app, one) for one in requests])

        answers = contextvars.Context().run(asyncio.run, gather())
    else:
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(gate.send, requests))
    assert [json.loads(answer.body)[1] for answer in answers] == [*keys, *keys]


# --- the store


@EVERYWHERE
def test_a_store_that_is_down_answers_503_and_never_200(adapter: str, tmp_path: Path) -> None:
    gate = gate_of(adapter, tmp_path, keys={"cache": 0})
    key = gate.ops.keys.create(tenant_id="t", tier="pro", scopes=["write"])
    assert gate.get("/chat", X_API_Key=key).status == 200
    gate.ops.keys.close()
    for file in tmp_path.glob("keys.db*"):
        file.unlink()
    (tmp_path / "keys.db").mkdir()
    for path in ("/chat", "/admin/users", "/keyed", "/pro", "/scoped"):
        answer = gate.get(path, X_API_Key=key)
        assert answer.status == 503, path
        assert body(answer)["error"] == "key_store_unavailable"
        assert answer.header("retry-after") == ["1"]
    assert gate.get("/chat").status == 401  # no key is no key
    assert gate.get("/chat", X_API_Key=MASTER).status == 200  # it stands in no store
    assert gate.get("/open", X_API_Key=key).status == 200
    assert gate.get("/metrics").status == 200
    assert gate.desk.calls == ["/chat", "/chat", "/open"]


@EVERYWHERE
def test_a_key_is_good_as_soon_as_it_is_made_and_bad_as_soon_as_it_is_revoked(
    adapter: str, tmp_path: Path
) -> None:
    gate = gate_of(adapter, tmp_path)
    key = gate.ops.keys.create(tenant_id="t", tier="pro")
    assert gate.get("/chat", X_API_Key=key).status == 200
    (record,) = gate.ops.keys.list()
    gate.ops.keys.revoke(record.key_id)
    assert gate.get("/chat", X_API_Key=key).status == 401


@EVERYWHERE
def test_a_fault_of_the_limiter_refuses_nobody_and_one_of_the_keys_lets_nobody_pass(
    adapter: str, tmp_path: Path, monkeypatch: Any
) -> None:
    limiter = {"policies": {"/open": "exempt", "*": "99/minute"}, "default": "99/minute"}
    gate = gate_of(adapter, tmp_path, limiter=limiter)
    admission = gate.ops.runtime().plan.admission
    assert admission is not None
    limits, guard = admission.limiter, admission.guard

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("a fault of ours")

    with monkeypatch.context() as faulty:
        for name in ("edge", "route", "edge_stage", "route_stage"):
            faulty.setattr(limits, name, broken)
        for path in ("/chat", "/pro", "/open"):
            assert gate.get(path, X_API_Key=MASTER).status == 200, path
            assert gate.get(path).status == (200 if path == "/open" else 401), path
        assert gate.faults() > 0
    ran = list(gate.desk.calls)
    with monkeypatch.context() as faulty:
        for name in ("judge", "route"):
            faulty.setattr(guard, name, broken)
        for path in ("/chat", "/pro"):
            assert gate.get(path, X_API_Key=MASTER).status == 503, path
            assert gate.get(path).status == 503, path
    assert gate.desk.calls == ran


# --- demo keys, floods, overrides


@EVERYWHERE
def test_demo_keys_work_in_development_only(adapter: str, tmp_path: Path) -> None:
    demo = {
        "free": "demo-free-key-12345",
        "pro": "demo-pro-key-67890",
        "enterprise": "demo-enterprise-key-abcdef",
    }
    there = gate_of(adapter, tmp_path, environment="development")
    here = gate_of(adapter, tmp_path)
    for tier, key in demo.items():
        assert json.loads(there.get("/who", X_API_Key=key).body)[2] == tier
        assert there.get("/chat", X_API_Key=key).status == 200
        assert here.get("/chat", X_API_Key=key).status == 401


@EVERYWHERE
def test_a_flood_of_wrong_keys_is_429_by_address(adapter: str, tmp_path: Path) -> None:
    gate = gate_of(adapter, tmp_path, keys={"max_failures": 3})
    good = gate.ops.keys.create(tenant_id="t")
    assert gate.get("/chat", X_API_Key=good).status == 200
    statuses = [gate.get("/chat", X_API_Key=f"wrong-{n}").status for n in range(5)]
    assert statuses == [401, 401, 401, 429, 429]
    answer = gate.get("/keyed", X_API_Key="wrong-9")
    assert (answer.status, body(answer)["error"]) == (429, "too_many_failures")
    assert answer.header("retry-after") == [str(body(answer)["retry_after"])]
    other = Request("/chat", headers=(("X-API-Key", "wrong-9"),), client="10.9.9.9")
    assert gate.send(other).status == 401
    assert gate.get("/chat", X_API_Key=good).status == 200  # who was known stays known


@EVERYWHERE
def test_a_tier_takes_the_place_of_the_default(adapter: str, tmp_path: Path) -> None:
    tiers = {"free": "2/minute", "pro": "3/minute"}
    gate = gate_of(adapter, tmp_path, limiter={"default": "1/minute", "tiers": tiers})
    keys = {tier: gate.ops.keys.create(tenant_id=tier, tier=tier) for tier in tiers}
    assert gate.statuses("/open", 2) == [200, 429]
    assert gate.statuses("/open", 3, X_API_Key=keys["free"]) == [200, 200, 429]
    assert gate.statuses("/chat", 4, X_API_Key=keys["pro"]) == [200, 200, 200, 429]
    assert gate.statuses("/chat", 9, X_API_Key=MASTER) == [200] * 9


@EVERYWHERE
def test_a_test_may_override_the_keys(adapter: str, tmp_path: Path) -> None:
    gate = gate_of(adapter, tmp_path)
    assert gate.get("/chat").status == 401
    with gate.ops.override(keys={"required": []}):
        assert gate.get("/chat").status == 200
    with gate.ops.override(keys={"master": "of-this-test-only"}):
        assert gate.get("/chat", X_API_Key="of-this-test-only").status == 200
        assert gate.get("/chat", X_API_Key=MASTER).status == 401
    assert gate.get("/chat", X_API_Key=MASTER).status == 200


@EVERYWHERE
def test_public_on_a_handler_needs_no_key(adapter: str, tmp_path: Path) -> None:
    gate = admitted(adapter, tmp_path, keys={"required": ["/api/*"], "pepper": PEPPER})
    assert gate.get("/admin/public").status == 200


@pytest.mark.parametrize("adapter", ["fastapi", "flask", "django", "django-async"])
def test_public_on_a_handler_opens_a_required_path(adapter: str, tmp_path: Path) -> None:
    gate = gate_of(adapter, tmp_path)
    assert gate.get("/admin/public").status == 200
    assert gate.get("/admin/users").status == 401


@pytest.mark.parametrize("adapter", ["asgi", "wsgi"])
def test_without_a_router_a_required_path_stays_shut(adapter: str, tmp_path: Path) -> None:
    """Nobody can tell the edge which handler is public: the door stays shut."""
    assert gate_of(adapter, tmp_path).get("/admin/public").status == 401


@EVERYWHERE
def test_a_key_event_is_an_audit_line(adapter: str, tmp_path: Path) -> None:
    gate = gate_of(adapter, tmp_path)
    gate.get("/chat", X_API_Key=MASTER)
    key = gate.ops.keys.create(tenant_id="t", tier="pro")
    gate.ops.runtime().sink.flush()
    text = gate.log.read_text()
    assert "master" in text
    assert '"opsguard.audit"' in text
    assert key not in text
    assert MASTER not in text


# --- websockets


@pytest.mark.parametrize("adapter", ["asgi", "fastapi"])
def test_a_websocket_without_a_key_is_closed_before_the_handshake(
    adapter: str, tmp_path: Path
) -> None:
    from tests.contract.test_limits import connects

    gate = gate_of(adapter, tmp_path, keys={"required": ["/ws"]})
    assert connects(gate, 1) == [["websocket.close"]]
    assert gate.desk.calls == []


@EVERYWHERE
def test_checks_of_keys_are_counted(adapter: str, tmp_path: Path) -> None:
    gate = gate_of(adapter, tmp_path)
    gate.get("/chat")
    gate.get("/chat", X_API_Key="no-such-key")
    gate.get("/chat", X_API_Key=MASTER)
    found = {
        (dict(labels)["outcome"], dict(labels)["tier"]): value
        for (name, labels), value in gate.samples().items()
        if name == "api_key_checks_total"
    }
    assert found == {("missing", ""): 1, ("refused", ""): 1, ("accepted", "master"): 1}
