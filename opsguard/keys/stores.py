"""Where keys are kept: what every store can do, and the one statement it is asked.

| store | setting | for |
|---|---|---|
| :class:`~opsguard.keys.fixed.FixedKeys` | `keys.static`, the demo keys | keys that are deployed with the code |
| :class:`~opsguard.keys.sqlite.SqliteStore` | `sqlite:///opsguard-keys.db` | the default: one machine, many processes |
| :class:`~opsguard.keys.sql.SqlStore` | any other SQLAlchemy URL | many machines |

A key is found by its digest, so an unknown id and a wrong secret are one and the same question.
The question is not for the row of a digest, but for the first one from there on. The decoy, which
has the highest digest there can be, is the last of all, so there always is one: found or not, the
database walks its index once, reads one row and hands it over, and it is for the caller to see
whose it is. What a database's comparison of digests takes tells nothing of keys: nobody without
the pepper can choose a digest.
"""  # noqa: E501

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Protocol

from opsguard.exceptions import OpsGuardError
from opsguard.keys.identity import KeyRecord

__all__ = [
    "COLUMNS",
    "DECOY",
    "SCHEMA",
    "KeyStoreDown",
    "KeyStoreError",
    "NoSuchKey",
    "Store",
    "check_meta",
    "record_of",
    "row_of",
]

SCHEMA = 1
"""The version of the tables; kept in `opsguard_keys_meta`."""

COLUMNS = (
    *("key_id", "digest", "tenant_id", "tier", "name", "scopes", "user_id"),
    *("created", "expires", "revoked", "last_used"),
)


class KeyStoreError(OpsGuardError):
    """The key store cannot be used as it stands. The message says what to do."""


class KeyStoreDown(KeyStoreError):
    """The key store did not answer, or not usably. A request that needs it is answered 503."""


class NoSuchKey(KeyStoreError):
    """There is no key of this id, or it no longer counts."""

    @classmethod
    def unknown(cls, key_id: str) -> NoSuchKey:
        return cls(f"there is no key with the id {key_id!r}: `opsguard keys list` shows them")

    @classmethod
    def dead(cls, key_id: str) -> NoSuchKey:
        return cls(f"the key {key_id!r} is revoked or expired: create a new one instead")


class Store(Protocol):
    """Keeps records. Blocks; for all threads; may be inherited over a fork.

    Every method raises KeyStoreError with a message for people if the store cannot be used, and
    whatever its driver raises if it does not answer.
    """

    def find(self, digest: bytes) -> KeyRecord | None:
        """The record of this digest, else some record of another one, or None."""
        ...

    def add(self, record: KeyRecord, *, retire: tuple[str, float] | None = None) -> None:
        """Keep a new record; `retire` (an id, and when it expires) in the same transaction."""
        ...

    def all(self) -> Sequence[KeyRecord]:
        """Every record, the oldest first."""
        ...

    def get(self, key_id: str) -> KeyRecord | None: ...

    def revoke(self, key_id: str, at: float) -> bool:
        """Whether there is such a key; one that was revoked before stays as it was."""
        ...

    def touch(self, key_id: str, at: float) -> None:
        """Note that the key was used. May be skipped if the store is busy."""
        ...

    def close(self) -> None:
        """Close what is open; the next call opens it again."""
        ...


DECOY = KeyRecord("", b"\xff" * 32, "nobody", "none", "decoy", (), None, 1.0, 2.0, 2.0, 2.0)
"""The row behind all others. Its id is no key's."""

_NEVER = 1e18
"""How a row writes None for a time: with NULL a live key would be read faster than a dead one."""


def row_of(record: KeyRecord) -> dict[str, Any]:
    """A record as a row, by COLUMNS."""
    row = {name: getattr(record, name) for name in COLUMNS}
    row["scopes"] = json.dumps(record.scopes)
    for name in ("expires", "revoked", "last_used"):
        if row[name] is None:
            row[name] = _NEVER
    return row


def record_of(row: Sequence[Any]) -> KeyRecord:
    """A row, in the order of COLUMNS, as a record."""
    key_id, digest, tenant_id, tier, name, scopes, user_id, created, expires, revoked, used = row
    return KeyRecord(
        *(key_id, bytes(digest), tenant_id, tier, name, tuple(json.loads(scopes)), user_id),
        created,
        None if expires == _NEVER else expires,
        None if revoked == _NEVER else revoked,
        None if used == _NEVER else used,
    )


def check_meta(meta: dict[str, str], pepper_check: str, place: str) -> None:
    """Whether a store is one of ours, of this version, and of this pepper.

    :raises KeyStoreError: if it is not.
    """
    schema = meta.get("schema", "")
    if schema != str(SCHEMA):
        said = f"version {schema}" if schema else "no version"
        raise KeyStoreError(
            f"the key store {place} has tables of {said}, and this opsguard knows version {SCHEMA}:"
            " use the opsguard that wrote it, or another store"
        )
    if meta.get("pepper") != pepper_check:
        raise KeyStoreError(
            f"the key store {place} was filled with another pepper than keys.pepper is now: set "
            "OPSGUARD_KEYS__PEPPER to that one again; without it none of its keys can be verified"
        )
