"""What follows from a request's credential, or from its having none."""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from opsguard.exceptions import DeclarationError
from opsguard.http import Response
from opsguard.keys import (
    Identity,
    Invalid,
    KeyGuard,
    KeyRecord,
    Keys,
    Lookup,
    credential,
    public,
    require_key,
)
from opsguard.keys import flood as flood_module
from opsguard.keys.audit import LINES, Audit
from opsguard.keys.flood import Failures, source_of
from opsguard.keys.identity import MASTER
from opsguard.keys.minting import mint
from opsguard.keys.policy import KeyRequirement, Paths
from opsguard.marks import NO_MARKS, Marks, marks_of
from opsguard.settings import Settings

MASTER_KEY = "the-master-key"
PEPPER = "a pepper of the tests"
REQUIRED = {"required": ["/api/*"], "public": ["/api/docs", "/api/open/*"]}


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Request:
    """What the guard asks of an exchange."""

    path: str = "/api/x"
    headers: dict[str, str] = field(default_factory=dict)
    client: str | None = "203.0.113.9"
    request_id: str = "r-1"
    identity: Identity | None = None

    @property
    def routed(self) -> str:
        return self.path

    def header(self, name: str) -> str:
        return self.headers.get(name, "")


class House:
    """Keys and a guard over a real file, with clocks that stand still."""

    def __init__(self, folder: Path, **keys: Any) -> None:
        self.clock = Clock()
        self.file = folder / "keys.db"
        options = {"store": f"sqlite:///{self.file}", "pepper": PEPPER, "master": MASTER_KEY}
        settings = Settings.load(
            {"service": "shop", "keys": options | REQUIRED | keys}, environ={}, directory=folder
        )
        self.faults: list[str] = []
        self.keys = Keys(
            lambda: settings,
            report=lambda site, error: self.faults.append(site),
            clock=self.clock,
            wall=lambda: 1_800_000_000.0 + self.clock.now,
        )
        self.guard: KeyGuard = self.keys.guard()

    def ask(self, request: Request) -> Identity | Response | None:
        """The edge, with its look-up."""
        found = self.guard.edge(request)
        return found.run() if isinstance(found, Lookup) else found


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    made = House(tmp_path)
    yield made
    made.keys.close()


def status(answer: object) -> int:
    assert isinstance(answer, Response), answer
    return answer.status


def body(answer: object) -> dict[str, object]:
    assert isinstance(answer, Response), answer
    assert dict(answer.headers)["Content-Length"] == str(len(answer.body))
    found: dict[str, object] = json.loads(answer.body)
    return found


def unknown() -> str:
    return mint("ops", "pro", os.urandom)[1]


# The credential.


@pytest.mark.parametrize(
    ("key", "authorization", "found"),
    [
        ("", "", None),
        ("abc", "", "abc"),
        ("", "Bearer abc", "abc"),
        ("", "bEARER   abc", "abc"),
        ("abc", "Bearer abc", "abc"),
        ("abc", "Basic dXNlcjpwdw==", "abc"),
        ("", "Basic dXNlcjpwdw==", None),
        ("", "Bearerabc", None),
        ("x" * 256, "", "x" * 256),
    ],
)
def test_a_credential_is_found(key: str, authorization: str, found: str | None) -> None:
    assert credential(key, authorization) == found


@pytest.mark.parametrize(
    ("key", "authorization"),
    [
        ("", "Bearer"),
        ("", "Bearer "),
        ("", "Bearer a b"),
        ("", "Bearer abc, Bearer abc"),
        ("", "Bearer abc,Bearer def"),
        ("abc, abc", ""),
        ("abc,def", ""),
        ("abc", "Bearer def"),
        ("abc", "Bearer"),
        ("clé", ""),
        ("", "Bearer cl\xe9"),
        ("a\x00b", ""),
        ("a\n", ""),
        (" abc", ""),
        ("x" * 257, ""),
        ("x" * 1_000_000, ""),
        ("", "Bearer " + "x" * 1_000_000),
        ("", "Bearer " + " " * 1_000_000),
        ("\ud800", ""),
    ],
)
def test_what_was_meant_as_a_credential_and_is_none(
    key: str, authorization: str, house: House
) -> None:
    found = credential(key, authorization)
    assert isinstance(found, Invalid)
    headers = {"x-api-key": key, "authorization": authorization}
    answer = house.ask(Request(headers=headers))
    assert status(answer) == 401
    assert answer == house.ask(Request(headers={"x-api-key": unknown()}))


def test_a_key_in_the_query_is_no_key(house: House) -> None:
    key = house.keys.create("t")
    assert status(house.ask(Request(path=f"/api/x?api_key={key}"))) == 401


# The edge.


def test_a_good_key_is_looked_up_once_and_then_known(house: House) -> None:
    key = house.keys.create("customer-123", "pro", "Production", scopes=("a",))
    for request in (
        Request(headers={"x-api-key": key}),
        Request(headers={"authorization": f"Bearer {key}"}),
        Request(headers={"authorization": f"bearer {key}"}),
        Request(headers={"authorization": f"Bearer {key}", "x-api-key": key}),
        Request(headers={"authorization": "Basic eDp5", "x-api-key": key}),
    ):
        house.keys.verifier.clear()
        first = house.guard.edge(request)
        assert isinstance(first, Lookup)
        identity = first.run()
        assert isinstance(identity, Identity)
        assert (identity.tenant_id, identity.tier, identity.name) == (
            "customer-123",
            "pro",
            "Production",
        )
        assert house.guard.edge(request) is identity
        assert (
            house.guard.judge(request, request.header("x-api-key"), request.header("authorization"))
            is identity
        )


def test_a_look_up_can_be_awaited(house: House) -> None:
    found = house.guard.edge(Request(headers={"x-api-key": house.keys.create("t")}))
    assert isinstance(found, Lookup)
    assert isinstance(asyncio.run(found.arun()), Identity)


def test_a_cached_key_behind_another_scheme_is_none(house: House) -> None:
    key = house.keys.create("t")
    assert isinstance(house.ask(Request(headers={"x-api-key": key})), Identity)
    assert status(house.ask(Request(headers={"authorization": f"Secret {key}"}))) == 401


def test_without_a_key_where_one_is_needed(house: House) -> None:
    answer = house.ask(Request())
    assert status(answer) == 401
    assert body(answer)["error"] == "missing_api_key"
    assert body(answer)["request_id"] == "r-1"
    assert isinstance(answer, Response)
    assert dict(answer.headers)["WWW-Authenticate"] == 'Bearer realm="shop"'
    assert "X-API-Key" in str(body(answer)["message"])
    assert house.ask(Request(headers={"authorization": "Basic eDp5"})) == answer


def test_unknown_wrong_revoked_and_expired_get_one_answer(house: House) -> None:
    from datetime import timedelta

    good = house.keys.create("t")
    expired = house.keys.create("t", expires=timedelta(seconds=1))
    revoked = house.keys.create("t")
    house.keys.revoke(revoked.split("_")[2])
    house.clock.now += 1.0
    wrong = good[:-1] + ("0" if good[-1] != "0" else "1")
    answers = [
        house.ask(Request(headers={"x-api-key": key}))
        for key in (unknown(), wrong, revoked, expired, "whatever")
    ]
    assert answers == [answers[0]] * 5
    assert status(answers[0]) == 401
    assert body(answers[0])["error"] == "invalid_api_key"
    assert isinstance(answers[0], Response)
    challenge = dict(answers[0].headers)["WWW-Authenticate"]
    assert challenge == 'Bearer realm="shop", error="invalid_token"'


def test_a_wrong_key_where_none_is_needed_is_nobody(house: House) -> None:
    for path in ("/", "/api/docs", "/api/open/x"):
        assert house.ask(Request(path=path)) is None
        assert house.ask(Request(path=path, headers={"x-api-key": unknown()})) is None
        assert house.ask(Request(path=path, headers={"x-api-key": "a,b"})) is None
        assert house.ask(Request(path=path, headers={"authorization": "Bearer ey.jwt.x"})) is None


@pytest.mark.parametrize(
    "path",
    [
        *("//api/x", "/api//docs", "/api/docs/", "/API/x", "/x/../api/x", "/api/docs/../x"),
        *("/%61pi/x", "/api", "/api/", "/api/docs/x", "/api/Docs", "/api/open/../x"),
        *("/api/open//", "\\api\\x"),
    ],
)
def test_no_spelling_of_a_path_goes_without_a_key(path: str, house: House) -> None:
    assert status(house.ask(Request(path=path))) == 401


def test_of_two_patterns_the_narrower_counts_and_of_equals_required() -> None:
    paths = Paths(["*", "/a/b/*", "/x", "/y/*"], ["/a/*", "/a/b/c", "/x", "/y/*", "/y/z"])
    needed = {
        path: paths.need_key(path)
        for path in ("/", "/a", "/a/x", "/a/b", "/a/b/c", "/a/b/d", "/x", "/y", "/y/z", "/y/q")
    }
    assert [path for path, needs in needed.items() if not needs] == ["/a", "/a/x", "/a/b/c", "/y/z"]
    assert not Paths([], ["/a"]).need_key("/a")
    assert not Paths([], []).need_key("/a")


def test_a_header_of_another_name(tmp_path: Path) -> None:
    house = House(tmp_path, header="X-Shop-Key")
    key = house.keys.create("t")
    assert isinstance(house.ask(Request(headers={"x-shop-key": key})), Identity)
    assert status(house.ask(Request(headers={"x-api-key": key}))) == 401
    house.keys.close()


def test_a_realm_that_would_break_the_header_does_not(tmp_path: Path) -> None:
    from opsguard.keys.answers import Answers

    answer = Answers('a"b\\c\r\nd\u20ac', "X").missing("r")
    assert dict(answer.headers)["WWW-Authenticate"] == 'Bearer realm="abcd"'


# The store that fails.


def test_a_store_that_fails_is_503_and_never_200(house: House) -> None:
    key, known = house.keys.create("t"), house.keys.create("t")
    assert isinstance(house.ask(Request(headers={"x-api-key": known})), Identity)
    house.keys.close()
    house.file.write_bytes(b"no database any more, nor anything that looks like one" * 50)
    for suffix in ("-wal", "-shm"):
        house.file.with_name(house.file.name + suffix).unlink(missing_ok=True)
    request = Request(headers={"x-api-key": key})
    answer = house.ask(request)
    assert status(answer) == 503
    assert body(answer)["error"] == "key_store_unavailable"
    found = house.guard.edge(request)
    assert isinstance(found, Lookup)
    assert status(asyncio.run(found.arun())) == 503
    # Where no key is needed nobody is refused, but the handler may need one.
    elsewhere = Request(path="/", headers={"x-api-key": key})
    assert house.ask(elsewhere) is None
    assert status(house.guard.route(elsewhere, Marks(keys=KeyRequirement()))) == 503
    # The master key and those that were verified before still work.
    assert house.ask(Request(headers={"x-api-key": MASTER_KEY})) is MASTER
    assert isinstance(house.ask(Request(headers={"x-api-key": known})), Identity)
    assert house.faults


# The flood.


def test_after_too_many_failures_an_address_costs_no_look_up(tmp_path: Path) -> None:
    house = House(tmp_path, max_failures=3)
    known, new = house.keys.create("t"), house.keys.create("t")
    assert isinstance(house.ask(Request(headers={"x-api-key": known})), Identity)
    for _ in range(3):
        assert status(house.ask(Request(headers={"x-api-key": unknown()}))) == 401
    for key in (unknown(), new):
        request = Request(headers={"x-api-key": key})
        answer = house.guard.edge(request)  # no look-up
        assert status(answer) == 429
        assert body(answer)["error"] == "too_many_failures"
        assert isinstance(answer, Response)
        assert dict(answer.headers)["Retry-After"] == "60"
        assert body(answer)["retry_after"] == 60
    elsewhere = Request(path="/", headers={"x-api-key": new})
    assert house.guard.edge(elsewhere) is None
    assert status(house.guard.route(elsewhere, Marks(keys=KeyRequirement()))) == 429
    # Others behind the same address go on, also once their key is no longer cached.
    assert isinstance(house.guard.edge(Request(headers={"x-api-key": known})), Identity)
    house.clock.now += 31.0
    assert isinstance(house.ask(Request(headers={"x-api-key": known})), Identity)
    # So do other addresses, and this one after its minute.
    assert isinstance(house.ask(Request(headers={"x-api-key": new}, client="::1")), Identity)
    house.clock.now += 60.0
    assert isinstance(house.ask(Request(headers={"x-api-key": new})), Identity)
    house.keys.close()


def test_good_keys_missing_ones_and_other_schemes_are_no_failures(tmp_path: Path) -> None:
    house = House(tmp_path, max_failures=1)
    key = house.keys.create("t")
    for _ in range(3):
        house.ask(Request())
        house.ask(Request(headers={"x-api-key": key}))
        house.ask(Request(headers={"authorization": "Basic eDp5"}))
        house.ask(Request(path="/", headers={"authorization": "Bearer ey.jwt.x"}))
    assert isinstance(house.guard.edge(Request(headers={"x-api-key": unknown()})), Lookup)
    house.keys.close()


def test_malformed_and_repeated_credentials_are_failures_too(tmp_path: Path) -> None:
    house = House(tmp_path, max_failures=2)
    assert status(house.ask(Request(headers={"authorization": "Bearer"}))) == 401
    assert status(house.ask(Request(headers={"x-api-key": "whatever"}))) == 401
    assert status(house.ask(Request(headers={"x-api-key": "whatever"}))) == 429
    house.keys.close()
    house = House(tmp_path, max_failures=2)
    same = unknown()
    assert [status(house.ask(Request(headers={"x-api-key": same}))) for _ in range(3)] == [
        401,
        401,
        429,
    ]
    house.keys.close()


@pytest.mark.parametrize(
    ("address", "source"),
    [
        ("203.0.113.9", "203.0.113.9"),
        ("::ffff:203.0.113.9", "203.0.113.9"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2:ffff::", "2001:db8:1:2::/64"),
        (None, "unknown"),
        ("", "unknown"),
        ("testclient", "unknown"),
    ],
)
def test_whose_failures_are_counted_together(address: str | None, source: str) -> None:
    assert source_of(address) == source


def test_the_addresses_that_failed_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flood_module, "ADDRESSES", 10)
    clock = Clock()
    failures = Failures(1, clock)
    for number in range(100):
        assert failures.count(f"10.0.0.{number}")
    assert len(failures._found) == 10
    assert failures.blocked("10.0.0.99") == 60.0
    assert failures.blocked("10.0.0.1") == 0.0
    assert not failures.count("10.0.0.99")
    clock.now += 60.0
    assert failures.blocked("10.0.0.99") == 0.0
    assert failures.count("10.0.0.99")


# The route.


PRO = Identity("k", "t", "pro", frozenset({"read"}))


@pytest.mark.parametrize(
    ("identity", "marks", "path", "expected"),
    [
        (None, NO_MARKS, "/", None),
        (PRO, NO_MARKS, "/api/x", None),
        (None, NO_MARKS, "/api/x", (401, "missing_api_key")),
        (None, Marks(public=True), "/api/x", None),
        (None, Marks(keys=KeyRequirement()), "/", (401, "missing_api_key")),
        (None, Marks(keys=KeyRequirement()), "/api/docs", (401, "missing_api_key")),
        (None, Marks(keys=KeyRequirement(), public=True), "/", (401, "missing_api_key")),
        (PRO, Marks(keys=KeyRequirement()), "/", None),
        (PRO, Marks(keys=KeyRequirement(("pro", "enterprise"))), "/", None),
        (PRO, Marks(keys=KeyRequirement(("enterprise",))), "/", (403, "insufficient_tier")),
        (PRO, Marks(keys=KeyRequirement((), ("read",))), "/", None),
        (PRO, Marks(keys=KeyRequirement((), ("read", "w"))), "/", (403, "insufficient_scope")),
        (MASTER, Marks(keys=KeyRequirement(("enterprise",), ("x",))), "/", None),
    ],
)
def test_what_a_handler_asks_for(
    identity: Identity | None,
    marks: Marks,
    path: str,
    expected: tuple[int, str] | None,
    house: House,
) -> None:
    answer = house.guard.route(Request(path=path, identity=identity), marks)
    if expected is None:
        assert answer is None
    else:
        assert (status(answer), body(answer)["error"]) == expected


@pytest.mark.parametrize("value", ["whatever", "a,b", "cl\xe9"])
def test_a_wrong_key_is_told_at_the_route_as_at_the_edge(value: str, house: House) -> None:
    request = Request(path="/", headers={"x-api-key": value})
    assert house.ask(request) is None
    answer = house.guard.route(request, Marks(keys=KeyRequirement()))
    assert answer == house.ask(Request(headers={"x-api-key": unknown()}))


def test_decorators_mark_and_change_nothing_else() -> None:
    def plain() -> int:
        return 1

    async def later() -> int:
        return 2

    decorate = require_key(tiers=("pro",), scopes=["a"])
    assert decorate(plain)() == 1
    assert asyncio.run(decorate(later)()) == 2
    assert marks_of(decorate(later)).keys == KeyRequirement(("pro",), ("a",))
    assert marks_of(plain) is NO_MARKS
    assert marks_of(public(plain)).public
    assert public(plain)() == 1


@pytest.mark.parametrize("wrong", [{"tiers": "pro"}, {"scopes": "a"}, {"tiers": ("",)}])
def test_a_requirement_that_means_something_else_is_told(wrong: dict[str, Any]) -> None:
    with pytest.raises(DeclarationError, match="require_key"):
        require_key(**wrong)


# The audit.


def test_each_key_event_has_a_line_and_none_has_a_key(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    key = house.keys.create("t1", "pro", "Production")
    key_id = key.split("_")[2]
    new = house.keys.rotate(key_id)
    house.keys.revoke(key_id)
    house.ask(Request(headers={"x-api-key": MASTER_KEY}))
    for _ in range(30):
        house.ask(Request(headers={"x-api-key": unknown()}))
    lines = [record.__dict__ for record in caplog.records if record.name == "opsguard.audit"]
    assert [line["event"] for line in lines] == [
        *("keys.created", "keys.rotated", "keys.revoked", "keys.master_used", "keys.flood_refused")
    ]
    assert lines[0]["key_id"] == lines[1]["old_key_id"] == lines[2]["key_id"] == key_id
    assert lines[1]["key_id"] == new.split("_")[2]
    assert (lines[0]["tenant_id"], lines[0]["tier"], lines[0]["key_name"]) == (
        "t1",
        "pro",
        "Production",
    )
    assert lines[3]["client"] == lines[4]["client"] == "203.0.113.9"
    everything = repr(lines)
    assert not any(secret in everything for secret in (key, new, MASTER_KEY, PEPPER))


def test_a_flood_of_master_uses_is_counted_not_written(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = Clock()
    audit = Audit(clock)
    for _ in range(LINES + 40):
        audit.often("keys.master_used", "used")
    assert len(caplog.records) == LINES
    clock.now += 60.0
    audit.often("keys.master_used", "used")
    audit.often("keys.master_used", "used")
    assert caplog.records[LINES].__dict__["suppressed"] == 40
    assert "suppressed" not in caplog.records[LINES + 1].__dict__


def test_the_audit_does_not_depend_on_the_log_level(caplog: pytest.LogCaptureFixture) -> None:
    logger, root = logging.getLogger("opsguard.audit"), logging.getLogger()
    before, root_before = logger.level, root.level
    logger.setLevel(logging.NOTSET)
    root.setLevel(logging.ERROR)
    try:
        Audit(Clock()).event("keys.created", "made", client=None)
    finally:
        logger.setLevel(before)
        root.setLevel(root_before)
    assert [record.message for record in caplog.records] == ["made"]
    assert "client" not in caplog.records[0].__dict__


def test_every_use_of_the_master_key_is_noted_also_from_the_cache(
    house: House, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(3):
        assert house.ask(Request(headers={"x-api-key": MASTER_KEY})) is MASTER
    assert sum("master" in record.message for record in caplog.records) == 3


def test_a_record_hides_its_digest() -> None:
    assert "\\x07" not in repr(KeyRecord("k", b"\x07" * 32, "t", "free"))
