"""Invariants of keys: for any tier, any credential, any spelling of a path."""

from __future__ import annotations

import hashlib

from hypothesis import given
from hypothesis import strategies as st

from opsguard.keys import Invalid, credential
from opsguard.keys.fixed import FixedKeys
from opsguard.keys.identity import KeyRecord
from opsguard.keys.minting import is_shaped, mint, sealed
from opsguard.keys.policy import Paths
from opsguard.keys.sqlite import SqliteStore
from opsguard.keys.stores import record_of, row_of
from opsguard.keys.verifier import Verifier
from opsguard.patterns import Patterns, forms, is_plain

parts = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_-]{0,31}", fullmatch=True)
seeds = st.binary(min_size=9, max_size=9)
anything = st.text(max_size=80)
segments = st.sampled_from(
    ["admin", "Admin", "x", "docs", "", ".", "..", "%2e", "%2E%2e", "%61dmin"]
)
paths = st.lists(segments, max_size=7).map(lambda found: "/" + "/".join(found)) | anything


def bytes_from(seed: bytes, size: int) -> bytes:
    return hashlib.sha256(seed).digest()[:size]


@given(parts, parts, seeds)
def test_a_key_can_be_taken_apart_whatever_prefix_and_tier_are(
    prefix: str, tier: str, seed: bytes
) -> None:
    key_id, key = mint(prefix, tier, lambda size: bytes_from(seed, size))
    head, found, secret = key.rsplit("_", 2)
    assert (head, found, len(found), len(secret)) == (f"{prefix}_{tier}", key_id, 12, 43)
    assert is_shaped(key)
    assert credential(key, "") == credential("", f"Bearer {key}") == key


@given(seeds, seeds)
def test_other_randomness_gives_another_key(one: bytes, other: bytes) -> None:
    first = mint("ops", "pro", lambda size: bytes_from(one, size))
    second = mint("ops", "pro", lambda size: bytes_from(other, size))
    assert (first == second) == (one == other)


@given(anything, anything)
def test_no_headers_raise_and_no_odd_text_is_a_credential(key: str, authorization: str) -> None:
    found = credential(key, authorization)
    if found is None:
        assert not key
    elif not isinstance(found, Invalid):
        assert found.isascii()
        assert found.isprintable()
        assert " " not in found
        assert 1 <= len(found) <= 256


@given(anything)
def test_nobody_is_let_in_by_chance(text: str) -> None:
    verifier = Verifier(
        SqliteStore("/nonexistent/keys.db", "check"),
        FixedKeys({}, b"pepper", development=True, demo=False),
        b"pepper",
        master="a master key",
        cache=30.0,
        clock=lambda: 0.0,
        wall=lambda: 0.0,
        report=lambda site, error: None,
    )
    assert (verifier.verify(text) is not None) == (text == "a master key")


times = st.none() | st.floats(0, 1e12)
texts = st.text(max_size=20)


@given(
    st.builds(
        KeyRecord,
        key_id=texts,
        digest=st.binary(min_size=32, max_size=32),
        tenant_id=texts,
        tier=texts,
        name=texts,
        scopes=st.lists(texts).map(tuple),
        user_id=st.none() | texts,
        created=st.floats(0, 1e12),
        expires=times,
        revoked=times,
        last_used=times,
    )
)
def test_a_record_survives_its_row(record: KeyRecord) -> None:
    row = row_of(record)
    assert None not in [row[name] for name in ("expires", "revoked", "last_used")]
    assert record_of(list(row.values())) == record
    assert len(sealed(b"pepper", "x")) == 32


@given(paths)
def test_whoever_reaches_the_sub_tree_by_some_reading_needs_a_key(path: str) -> None:
    rules = Paths(["/admin/*"], ["/docs/*"])
    reached = any(f"{form}/".startswith("/admin/") for form in forms(path))
    assert rules.need_key(path) == reached


@given(paths)
def test_odd_paths_are_never_public(path: str) -> None:
    needs = Paths(["*"], ["/docs/*"]).need_key(path)
    literally = path == "/docs" or path.startswith("/docs/")
    assert needs or literally
    if not needs:
        assert ".." not in path.split("/")
        assert "" not in path.rstrip("/").split("/")[1:]


@given(paths)
def test_patterns_never_raise_and_forms_are_settled(path: str) -> None:
    rules = Patterns([("/admin/*", 1), ("/x", 2), ("*", 3)])
    found = rules.each(path)
    assert found
    assert found[0] == rules.first(path) == min(found)
    assert (rules.plain(path) is None) == (not is_plain(path))
