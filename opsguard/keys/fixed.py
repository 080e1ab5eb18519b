"""Keys that stand in the settings: named ones, and the demo keys of development."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC
from types import MappingProxyType

from opsguard.exceptions import SettingsError
from opsguard.keys.identity import KeyRecord
from opsguard.keys.minting import sealed
from opsguard.settings import StaticKey

__all__ = ["DEMO", "FixedKeys"]

DEMO: Mapping[str, str] = MappingProxyType(
    {
        "free": "demo-free-key-12345",
        "pro": "demo-pro-key-67890",
        "enterprise": "demo-enterprise-key-abcdef",
    }
)
"""The demo keys by tier; everybody knows them."""


class FixedKeys:
    """The keys of the settings, by digest. Immutable; asking it costs a look-up in a dict.

    :raises SettingsError: for a key that is not as it must be.
    """

    blocking = False

    def __init__(
        self, keys: Mapping[str, StaticKey], pepper: bytes, *, development: bool, demo: bool
    ) -> None:
        self._found: dict[bytes, KeyRecord] = {}
        for name, key in keys.items():
            self._add(_record(name, key, pepper, development))
        if demo and development:
            for tier, text in DEMO.items():
                name = f"demo-{tier}"
                self._add(KeyRecord(name, sealed(pepper, text), name, tier, name))

    def find(self, digest: bytes) -> KeyRecord | None:
        return self._found.get(digest)

    def all(self) -> tuple[KeyRecord, ...]:
        return tuple(self._found.values())

    def _add(self, record: KeyRecord) -> None:
        other = self._found.setdefault(record.digest, record)
        if other is not record:
            raise SettingsError(
                f"keys.static.{record.key_id}: is the same key as {other.key_id}: drop one of them"
            )


def _record(name: str, key: StaticKey, pepper: bytes, development: bool) -> KeyRecord:
    if bool(key.hash) == bool(key.key):
        raise SettingsError(f"keys.static.{name}: must have either hash or key")
    if key.key and not development:
        raise SettingsError(
            f"keys.static.{name}: has its key in plain text, which is for development only: "
            "put the hash there that `opsguard keys hash` prints"
        )
    expires = None
    if key.expires is not None:
        moment = key.expires if key.expires.tzinfo else key.expires.replace(tzinfo=UTC)
        expires = moment.timestamp()
    return KeyRecord(
        name,
        sealed(pepper, key.key) if key.key else bytes.fromhex(key.hash),
        key.tenant_id or name,
        key.tier,
        name,
        key.scopes,
        expires=expires,
    )
