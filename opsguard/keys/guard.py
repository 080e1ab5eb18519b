"""What the path of a request asks of the keys: who is it, and may they?"""

from __future__ import annotations

from typing import Protocol

from opsguard.http import Response
from opsguard.keys.answers import Answers
from opsguard.keys.audit import Audit
from opsguard.keys.credentials import Invalid, credential
from opsguard.keys.flood import Failures
from opsguard.keys.identity import Identity
from opsguard.keys.minting import is_shaped
from opsguard.keys.policy import KeyRequirement, OpenRoutes, Paths
from opsguard.keys.stores import KeyStoreDown
from opsguard.keys.verifier import Verifier
from opsguard.marks import Marks

__all__ = ["Ask", "KeyGuard", "Lookup"]


class Ask(Protocol):
    """What is asked of a request."""

    @property
    def routed(self) -> str:
        """The decoded path that the router sees."""
        ...

    @property
    def client(self) -> str | None: ...

    @property
    def request_id(self) -> str: ...

    @property
    def identity(self) -> Identity | None:
        """What `edge` found, at the route."""
        ...

    def header(self, name: str) -> str: ...


class KeyGuard:
    """Decides at the two hook points. Immutable; for all threads.

    `edge` is CPU-only: a key that is not cached gives a :class:`Lookup`, which the caller runs or
    awaits, as its protocol has it. A wrong credential is refused only where a key is needed;
    elsewhere the app may use `Authorization` for its own ends.
    """

    def __init__(
        self,
        verifier: Verifier,
        paths: Paths,
        answers: Answers,
        failures: Failures,
        audit: Audit,
        *,
        header: str = "X-API-Key",
        open_routes: OpenRoutes | None = None,
    ) -> None:
        self.verifier = verifier
        self.header = header.lower()
        """The lower-case name of the header that keys come in, beside `authorization`."""
        self.requires = bool(paths)
        """Whether a path needs a key by the settings: else `edge` has nothing to say of a request
        without a credential."""
        self._cached = verifier.cached
        self._paths = paths
        self._open = open_routes
        self._answers = answers
        self._failures = failures
        self._audit = audit

    def edge(self, ask: Ask) -> Identity | Response | Lookup | None:
        """Who sends this request, an answer to send instead of going on, or the look-up that will
        tell; None for somebody without a key where none is needed.
        """
        return self.judge(ask, ask.header(self.header), ask.header("authorization"))

    def judge(self, ask: Ask, key: str, authorization: str) -> Identity | Response | Lookup | None:
        """`edge` for a caller that has the two headers at hand; "" for one that is not there."""
        if not key and not authorization:
            return self._answers.missing(ask.request_id) if self._needed(ask) else None
        if not key:
            identity = self._cached(authorization[7:])
            if identity is not None and authorization[:7].lower() != "bearer ":
                identity = None
        else:
            identity = None if authorization else self._cached(key)
        if identity is None:
            return self._slowly(ask, key, authorization)
        if identity.master:
            self._note_master(ask)
        return identity

    def route(self, ask: Ask, marks: Marks) -> Response | None:
        """Whether the caller may use this handler: an answer to send instead, or None. CPU-only.

        The patterns are looked at again, for a caller of `edge` that left them to the route.
        """
        identity, requirement = ask.identity, marks.keys
        if not isinstance(requirement, KeyRequirement):
            if identity is not None or marks.public or not self._paths.need_key(ask.routed):
                return None
            return self._stranger(ask)
        if identity is None:
            return self._stranger(ask)
        if not requirement.tier_is_enough(identity):
            return self._answers.wrong_tier(requirement.tiers, ask.request_id)
        if missing := requirement.missing(identity):
            return self._answers.lacks_scopes(missing, ask.request_id)
        return None

    def _slowly(
        self, ask: Ask, key: str, authorization: str
    ) -> Identity | Response | Lookup | None:
        found = credential(key, authorization)
        if found is None:
            return self._answers.missing(ask.request_id) if self._needed(ask) else None
        if isinstance(found, Invalid):
            return self.conclude(ask, None, costly=False)
        verifier, costly = self.verifier, is_shaped(found)
        identity = verifier.cached(found)
        if identity is not None:
            return self.conclude(ask, identity, costly=costly)
        seconds = self._failures.blocked(ask.client)
        if seconds and not verifier.was_good(found):
            if not self._needed(ask):
                return None
            return self._answers.too_many_failures(seconds, ask.request_id)
        if verifier.refused(found):
            return self.conclude(ask, None, costly=costly)
        if costly:
            return Lookup(self, ask, found)
        # Nothing that was minted: the settings have it or nobody, and they are in memory.
        return self.conclude(ask, verifier.verify(found), costly=False)

    def conclude(
        self, ask: Ask, identity: Identity | None, *, costly: bool
    ) -> Identity | Response | None:
        """What follows from a verified credential; `costly`: the store was asked for it."""
        if identity is not None:
            if identity.master:
                self._note_master(ask)
            return identity
        needed = self._needed(ask)
        if (needed or costly) and self._failures.count(ask.client):
            self._audit.often(
                "keys.flood_refused",
                "Too many invalid API keys from one address",
                client=ask.client,
            )
        return self._answers.invalid(ask.request_id) if needed else None

    def unavailable(self, ask: Ask) -> Response | None:
        """What follows where the store cannot tell: never that somebody passes who must not."""
        return self._answers.unavailable(ask.request_id) if self._needed(ask) else None

    def broken(self, ask: Ask) -> Response:
        """What follows from a fault of the keys themselves where it is not known who may pass."""
        return self._answers.unavailable(ask.request_id)

    def _needed(self, ask: Ask) -> bool:
        """Whether the edge must see a key. Where the route may be public it is the route's say,
        which looks at the patterns again.
        """
        path = ask.routed
        return self._paths.need_key(path) and not (self._open and self._open.match(path))

    def _stranger(self, ask: Ask) -> Response:
        """The answer to somebody without an identity where one is needed."""
        found = credential(ask.header(self.header), ask.header("authorization"))
        if found is None:
            return self._answers.missing(ask.request_id)
        if isinstance(found, str) and not self.verifier.refused(found):
            # `edge` could not tell, or was not allowed to ask.
            if self.verifier.down:
                return self._answers.unavailable(ask.request_id)
            if seconds := self._failures.blocked(ask.client):
                return self._answers.too_many_failures(seconds, ask.request_id)
        return self._answers.invalid(ask.request_id)

    def _note_master(self, ask: Ask) -> None:
        self._audit.often(
            "keys.master_used", "The master key was used", client=ask.client, path=ask.routed[:256]
        )


class Lookup:
    """A credential that only the store can judge. `run` blocks for it, `arun` awaits it; the
    result is that of `KeyGuard.edge`. Once.
    """

    __slots__ = ("_ask", "_credential", "_guard")

    def __init__(self, guard: KeyGuard, ask: Ask, credential: str) -> None:
        self._guard = guard
        self._ask = ask
        self._credential = credential

    def run(self) -> Identity | Response | None:
        try:
            identity = self._guard.verifier.verify(self._credential)
        except KeyStoreDown:
            return self._guard.unavailable(self._ask)
        return self._guard.conclude(self._ask, identity, costly=True)

    async def arun(self) -> Identity | Response | None:
        try:
            identity = await self._guard.verifier.averify(self._credential)
        except KeyStoreDown:
            return self._guard.unavailable(self._ask)
        return self._guard.conclude(self._ask, identity, costly=True)
