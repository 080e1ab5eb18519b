"""`ops.keys`: makes, lists, revokes and replaces keys, and makes what verifies them."""

from __future__ import annotations

import asyncio
import secrets
import threading
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from opsguard.clock import Clock, elapsed, wall
from opsguard.exceptions import OpsGuardError, SettingsError
from opsguard.forks import in_child
from opsguard.keys.answers import Answers
from opsguard.keys.audit import Audit
from opsguard.keys.fixed import FixedKeys
from opsguard.keys.flood import Failures
from opsguard.keys.guard import KeyGuard
from opsguard.keys.identity import KeyRecord
from opsguard.keys.minting import Random, mint, pepper_check, peppered, sealed
from opsguard.keys.policy import OpenRoutes, Paths
from opsguard.keys.sql import SqlStore
from opsguard.keys.sqlite import SqliteStore
from opsguard.keys.stores import KeyStoreDown, NoSuchKey, Store
from opsguard.keys.verifier import Verifier

if TYPE_CHECKING:
    from opsguard.settings import Settings

__all__ = ["Keys", "open_store"]

OVERLAP = timedelta(hours=24)
"""For how long a key goes on working that was replaced, unless its owner says."""


class Keys:
    """The API keys of a service. Starts and opens nothing until it is used; for all threads, and
    over a fork. Each method has an async twin with the prefix `a`, which works in a thread.

    `settings` is asked once, at the first use; `audit` are fields of every audit line.

    Methods raise SettingsError for a store or a pepper that is not as it must be, KeyStoreError for
    a store that cannot be used, KeyStoreDown, which is one, for a store that did not answer.
    """

    def __init__(
        self,
        settings: Callable[[], Settings],
        *,
        report: Callable[[str, BaseException | None], None],
        clock: Clock = elapsed,
        wall: Clock = wall,
        random: Random = secrets.token_bytes,
        audit: Mapping[str, object] | None = None,
    ) -> None:
        self._settings = settings
        self._report = report
        self._clock = clock
        self._wall = wall
        self._random = random
        self._audit = Audit(clock, audit or {})
        self._lock = threading.RLock()
        self._made: _Parts | None = None
        in_child(self, Keys._after_fork)

    def create(
        self,
        tenant_id: str,
        tier: str = "free",
        name: str = "",
        *,
        scopes: Iterable[str] = (),
        expires: datetime | timedelta | None = None,
        user_id: str | None = None,
    ) -> str:
        """Make a key and return it. It is shown this once: only its hash is kept.

        `expires` is an aware moment or a time from now.

        :raises ValueError: for a tenant, tier, name or scope that is none, or an end in the past.
        """
        parts = self._parts()
        now = self._wall()
        record, key = self._minted(
            parts,
            _part("tier", tier),
            tenant_id=_text("tenant_id", tenant_id, needed=True),
            name=_text("name", name),
            scopes=tuple(_text("scope", scope, needed=True) for scope in _several(scopes)),
            user_id=None if user_id is None else _text("user_id", user_id, needed=True),
            created=now,
            expires=_moment("expires", expires, now),
        )
        with _plainly():
            parts.store.add(record)
        self._said("keys.created", "An API key was created", record)
        return key

    def list(self) -> Sequence[KeyRecord]:
        """Every key of the store, the oldest first, also those that are revoked or expired."""
        with _plainly():
            return self._parts().store.all()

    def revoke(self, key_id: str) -> None:
        """End a key: here at once, in other processes within `keys.cache` seconds.

        :raises NoSuchKey: if there is none of this id.
        """
        parts = self._parts()
        with _plainly():
            record = self._stored(parts, key_id)
            if not parts.store.revoke(key_id, self._wall()):
                raise self._unknown(key_id)
        parts.verifier.forget(key_id)
        self._said("keys.revoked", "An API key was revoked", record)

    def rotate(self, key_id: str, overlap: timedelta = OVERLAP) -> str:
        """Make a key like this one and return it; the old one works for `overlap` more, so that
        its owner has time to change over. The new one expires when the old one would have.

        :raises NoSuchKey: if there is none of this id, or it is revoked or expired.
        :raises ValueError: for an overlap below zero.
        """
        if overlap < timedelta(0):
            raise ValueError("overlap must not be below zero")
        parts = self._parts()
        now = self._wall()
        with _plainly():
            old = self._stored(parts, key_id)
            if not old.alive(now):
                raise NoSuchKey.dead(key_id)
            new, key = self._minted(
                parts,
                old.tier,
                tenant_id=old.tenant_id,
                name=old.name,
                scopes=old.scopes,
                user_id=old.user_id,
                created=now,
                expires=old.expires,
            )
            parts.store.add(new, retire=(key_id, now + overlap.total_seconds()))
        parts.verifier.forget(key_id)
        self._said("keys.rotated", "An API key was rotated", new, old_key_id=key_id)
        return key

    def last_used(self, key_id: str) -> float | None:
        """When the key was last used, in seconds since the epoch, some minutes coarse; None for
        never.

        :raises NoSuchKey: if there is none of this id.
        """
        with _plainly():
            return self._stored(self._parts(), key_id).last_used

    async def acreate(
        self,
        tenant_id: str,
        tier: str = "free",
        name: str = "",
        *,
        scopes: Iterable[str] = (),
        expires: datetime | timedelta | None = None,
        user_id: str | None = None,
    ) -> str:
        return await asyncio.to_thread(
            self.create,
            *(tenant_id, tier, name),
            scopes=scopes,
            expires=expires,
            user_id=user_id,
        )

    async def alist(self) -> Sequence[KeyRecord]:
        return await asyncio.to_thread(self.list)

    async def arevoke(self, key_id: str) -> None:
        await asyncio.to_thread(self.revoke, key_id)

    async def arotate(self, key_id: str, overlap: timedelta = OVERLAP) -> str:
        return await asyncio.to_thread(self.rotate, key_id, overlap)

    async def alast_used(self, key_id: str) -> float | None:
        return await asyncio.to_thread(self.last_used, key_id)

    @property
    def verifier(self) -> Verifier:
        """What tells whose a credential is. Opens nothing yet."""
        return self._parts().verifier

    def hash(self, key: str) -> str:
        """What `keys.static.<name>.hash` must be for this key."""
        return sealed(self._parts().pepper, key).hex()

    def guard(self, open_routes: OpenRoutes | None = None) -> KeyGuard:
        """What the path of a request asks. Opens nothing yet. `open_routes` are those of handlers
        that are marked public.

        :raises SettingsError: for settings that it cannot work with; so call it at start.
        """
        settings, parts = self._settings(), self._parts()
        keys = settings.keys
        return KeyGuard(
            parts.verifier,
            Paths(keys.required, keys.public),
            Answers(settings.service, keys.header),
            Failures(keys.max_failures, self._clock),
            self._audit,
            header=keys.header,
            open_routes=open_routes,
        )

    def close(self) -> None:
        """Close the store; the next use opens it again."""
        if self._made is not None:
            self._made.store.close()

    def _parts(self) -> _Parts:
        made = self._made
        if made is None:
            with self._lock:
                made = self._made = self._made or self._make()
        return made

    def _after_fork(self) -> None:
        self._lock = threading.RLock()

    def _make(self) -> _Parts:
        settings = self._settings()
        keys = settings.keys
        if not keys.pepper and not settings.development:
            raise SettingsError(
                "keys.pepper: API keys need a pepper outside development: set "
                "OPSGUARD_KEYS__PEPPER to a long random text, and keep it: without it no key can be"
                " verified again"
            )
        pepper = peppered(keys.pepper)
        store = open_store(keys.store, pepper)
        fixed = FixedKeys(keys.static, pepper, development=settings.development, demo=keys.demo)
        verifier = Verifier(
            store,
            fixed,
            pepper,
            master=keys.master,
            cache=keys.cache,
            clock=self._clock,
            wall=self._wall,
            report=self._report,
        )
        return _Parts(keys.prefix, pepper, store, fixed, verifier)

    def _minted(self, parts: _Parts, tier: str, **what: Any) -> tuple[KeyRecord, str]:
        """A new key's record, with `what` else belongs in there, and the key."""
        key_id, key = mint(parts.prefix, tier, self._random)
        return KeyRecord(key_id, sealed(parts.pepper, key), tier=tier, **what), key

    def _stored(self, parts: _Parts, key_id: str) -> KeyRecord:
        """The record of this id, or NoSuchKey."""
        record = parts.store.get(key_id)
        if record is None:
            raise self._unknown(key_id)
        return record

    def _unknown(self, key_id: str) -> NoSuchKey:
        if any(record.key_id == key_id for record in self._parts().fixed.all()):
            return NoSuchKey(f"the key {key_id!r} stands in the settings: change it there")
        return NoSuchKey.unknown(key_id)

    def _said(self, event: str, message: str, record: KeyRecord, **fields: object) -> None:
        self._audit.event(
            event,
            message,
            key_id=record.key_id,
            key_name=record.name or None,
            tenant_id=record.tenant_id,
            tier=record.tier,
            **fields,
        )


class _Parts:
    """What is made of the settings at the first use."""

    __slots__ = ("fixed", "pepper", "prefix", "store", "verifier")

    def __init__(
        self, prefix: str, pepper: bytes, store: Store, fixed: FixedKeys, verifier: Verifier
    ) -> None:
        self.prefix = prefix
        self.pepper = pepper
        self.store = store
        self.fixed = fixed
        self.verifier = verifier


def open_store(url: str, pepper: bytes) -> Store:
    """The store at this URL. It opens nothing before it is asked.

    :raises SettingsError: for a URL that is none.
    """
    scheme, separator, rest = url.partition("://")
    if not separator:
        raise SettingsError(
            "keys.store: must be a database URL: sqlite:///<file>, or any of SQLAlchemy's"
        )
    check = pepper_check(pepper)
    if scheme != "sqlite":
        return SqlStore(url, check)
    host, _, path = rest.partition("/")
    if host or "?" in path:
        raise SettingsError("keys.store: must be sqlite:///<file>, or sqlite://// for a full path")
    return SqliteStore(path or ":memory:", check)


@contextmanager
def _plainly() -> Generator[None]:
    """What a driver raises, as an error of ours."""
    try:
        yield
    except OpsGuardError:
        raise
    except Exception as error:
        raise KeyStoreDown(f"the key store did not answer: {error}") from error


def _part(what: str, text: str) -> str:
    plain = text.replace("_", "").replace("-", "")
    if not (plain.isascii() and plain.isalnum() and text[0].isalnum() and len(text) <= 32):
        raise ValueError(f"{what} must be at most 32 letters, digits, '_' and '-', not '_' first")
    return text


def _text(what: str, text: str, *, needed: bool = False) -> str:
    if not text.isprintable() or len(text) > 255:
        raise ValueError(f"{what} must be printable text of at most 255 characters")
    if needed and not text.strip():
        raise ValueError(f"{what} must not be empty")
    return text


def _several(scopes: Iterable[str]) -> Iterable[str]:
    if isinstance(scopes, str):
        raise ValueError(f"scopes must be several: write ({scopes!r},)")
    return dict.fromkeys(scopes)


def _moment(what: str, value: datetime | timedelta | None, now: float) -> float | None:
    if value is None:
        return None
    if isinstance(value, datetime) and value.tzinfo is None:
        raise ValueError(f"{what} must say its time zone: datetime(..., tzinfo=UTC)")
    at = now + value.total_seconds() if isinstance(value, timedelta) else value.timestamp()
    if at <= now:
        raise ValueError(f"{what} must be in the future")
    return at
