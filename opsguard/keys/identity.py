"""Who a verified key belongs to, and what the key store knows of it."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["MASTER", "Identity", "KeyRecord"]


@dataclass(frozen=True, slots=True)
class Identity:
    """Who sent a request, as its key says. Immutable; never holds the key itself."""

    key_id: str
    tenant_id: str
    tier: str
    scopes: frozenset[str] = frozenset()
    name: str = ""
    user_id: str | None = None
    master: bool = False
    """It came with the master key: every scope, every tier, and no tier's limit."""

    def has(self, scope: str) -> bool:
        """Whether this key may do what `scope` names."""
        return self.master or scope in self.scopes


MASTER = Identity("master", "", "master", name="master", master=True)
"""Whoever holds the master key."""


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """One key as a store keeps it. Times are seconds since the epoch, None for never."""

    key_id: str
    digest: bytes = field(repr=False)
    """HMAC-SHA-256 of the whole key under the pepper, 32 bytes."""
    tenant_id: str
    tier: str
    name: str = ""
    scopes: tuple[str, ...] = ()
    user_id: str | None = None
    created: float = 0.0
    expires: float | None = None
    revoked: float | None = None
    last_used: float | None = None
    """Some minutes coarse."""

    def alive(self, now: float) -> bool:
        """Whether the key counts at this moment. It looks at both ends in any case."""
        expires = float("inf") if self.expires is None else self.expires
        revoked = float("inf") if self.revoked is None else self.revoked
        return now < min(expires, revoked)

    @property
    def identity(self) -> Identity:
        return Identity(
            self.key_id, self.tenant_id, self.tier, frozenset(self.scopes), self.name, self.user_id
        )
