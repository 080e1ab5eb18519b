"""A remote store that always answers: by itself, or while it is down by what stands in for it.

A request never pays for a store that is down more than the store's time limit, and once the breaker
is open not even that: whether the store is back is asked in the background, never by a request.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from opsguard.forks import in_child
from opsguard.limiter.breaker import Breaker, Permit
from opsguard.limiter.rates import Rate
from opsguard.limiter.standin import StandIn
from opsguard.limiter.stores import (
    Charge,
    OnStoreError,
    RemoteStore,
    Store,
    Strategy,
    Verdict,
)

__all__ = ["FallbackStore", "StoreReport"]


_THEN: Final[dict[OnStoreError, str]] = {
    "local": "this process decided the request by itself (on_store_error is local)",
    "allow": "the request was let through (on_store_error is allow)",
    "deny": "the request was refused (on_store_error is deny)",
}
_LATER: Final = "is asked again later"


class StoreReport(Protocol):
    """(site, error, what was done then)."""

    def __call__(self, site: str, error: BaseException, *, then: str = ...) -> None: ...


class FallbackStore:
    """`remote`, and while it is down `local` or one answer for all. Nothing here raises.

    `report` is told of each failure of the store, and what was done about it; it counts, and logs
    now and then. Thread-safe; fork-safe if both stores are.

    What `local` took is given back to `local`. For a concurrency slot that is remembered; other
    charges are given back at once if at all, and go where a decision would go now. So one that
    `local` took just before the store returned, or the breaker opened, is credited to the other.
    """

    blocking = True

    def __init__(
        self,
        remote: RemoteStore,
        local: Store,
        *,
        breaker: Breaker,
        report: StoreReport,
    ) -> None:
        self.strategies: frozenset[Strategy] = remote.strategies & local.strategies
        self._remote = remote
        self._local = local
        self._breaker = breaker
        self._report = report
        self._forget: Callable[[Sequence[Charge]], None] = getattr(remote, "forget", _nothing)
        self._probe = (_probe_for(remote.strategies),)
        self._probing: set[asyncio.Task[Verdict | None]] = set()
        self._stand_in = StandIn(local, report)
        in_child(self, FallbackStore._after_fork)

    @property
    def down(self) -> bool:
        """Whether the store is being left alone at present."""
        return self._breaker.open

    def take(self, charges: Sequence[Charge], on_error: OnStoreError = "local") -> Verdict:
        """Decide. `on_error` says who does if the store cannot: `local` alone, or one answer."""
        permit = self._breaker.ask()
        if permit is Permit.ASK:
            verdict = self._ask(charges, _THEN[on_error])
            if verdict is not None:
                return verdict
        if permit is Permit.PROBE:
            self._probe_in_thread()
        return self._stand_in.take(charges, on_error)

    async def atake(self, charges: Sequence[Charge], on_error: OnStoreError = "local") -> Verdict:
        permit = self._breaker.ask()
        if (
            permit is Permit.ASK
            and (verdict := await self._aask(charges, _THEN[on_error])) is not None
        ):
            return verdict
        if permit is Permit.PROBE:
            self._probe_in_task()
        return self._stand_in.take(charges, on_error)

    def take_with(
        self, charge: Charge, more: int, on_error: OnStoreError = "local"
    ) -> tuple[Verdict, int]:
        """As `take` of one charge, with `more` tokens of its bucket if there are as many. How many
        came besides is told: none of what `local` decides.
        """
        permit = self._breaker.ask()
        if permit is Permit.ASK:
            for besides in (more, 0):
                order = charge._replace(cost=charge.cost + besides)
                verdict = self._ask((order,), _THEN[on_error])
                if verdict is None:
                    break
                if verdict.allowed or not besides:
                    return verdict, besides
        if permit is Permit.PROBE:
            self._probe_in_thread()
        return self._stand_in.take((charge,), on_error), 0

    def reserve(self, charges: Sequence[Charge]) -> Verdict | None:
        """Decide by the remote store or not at all: None if it is down. Not for requests."""
        return self._ask(charges) if self._breaker.ask() is not Permit.WAIT else None

    async def areserve(self, charges: Sequence[Charge]) -> Verdict | None:
        return await self._aask(charges) if self._breaker.ask() is not Permit.WAIT else None

    def give_back(self, charges: Sequence[Charge]) -> None:
        """Return charges to whoever took them. If the store is down they expire there."""
        ours = self._remaining(charges)
        if ours:
            try:
                self._remote.give_back(ours)
            except Exception as error:
                self._failed(error)

    async def agive_back(self, charges: Sequence[Charge]) -> None:
        ours = self._remaining(charges)
        if ours:
            try:
                await self._remote.agive_back(ours)
            except Exception as error:
                self._failed(error)

    def close(self) -> None:
        """Close the remote store's connections."""
        try:
            self._remote.close()
        except Exception as error:
            self._report("limiter.store", error)

    async def aclose(self) -> None:
        try:
            await self._remote.aclose()
        except Exception as error:
            self._report("limiter.store", error)

    def _remaining(self, charges: Sequence[Charge]) -> list[Charge]:
        """Give `local` its own back; what is left is the remote store's."""
        down = self._breaker.open
        there = self._stand_in.give_back(charges, down=down)
        if down and there:
            self._forget(there)
            return []
        return there

    def _ask(self, charges: Sequence[Charge], then: str = _LATER) -> Verdict | None:
        try:
            verdict = self._remote.take(charges)
        except Exception as error:
            self._failed(error, then)
            return None
        self._breaker.succeeded()
        return verdict

    async def _aask(self, charges: Sequence[Charge], then: str = _LATER) -> Verdict | None:
        try:
            verdict = await self._remote.atake(charges)
        except Exception as error:
            self._failed(error, then)
            return None
        self._breaker.succeeded()
        return verdict

    def _failed(self, error: Exception, then: str = _LATER) -> None:
        # Anything but StoreDown is a fault of ours; the request is answered all the same.
        self._breaker.failed()
        self._report("limiter.store", error, then=then)

    def _after_fork(self) -> None:
        self._breaker.after_fork()
        self._stand_in.after_fork()

    def _probe_in_thread(self) -> None:
        probe = threading.Thread(
            target=self._ask, args=(self._probe,), name="opsguard-probe", daemon=True
        )
        try:
            probe.start()
        except RuntimeError as error:  # the interpreter is ending, or there are too many threads
            self._failed(error)

    def _probe_in_task(self) -> None:
        probe = asyncio.create_task(self._aask(self._probe))
        self._probing.add(probe)  # a loop holds its tasks weakly
        probe.add_done_callback(self._probing.discard)


def _nothing(charges: Sequence[Charge]) -> None:
    return None


def _probe_for(strategies: frozenset[Strategy]) -> Charge:
    """A charge that writes, so that a read-only or full server is not taken for a healthy one."""
    strategy: Strategy = "fixed" if "fixed" in strategies else min(strategies)
    return Charge("opsguard-probe", Rate(1_000_000, 1, "1000000 per 1 second"), strategy, 1)
