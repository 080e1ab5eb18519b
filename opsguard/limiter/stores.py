"""What a limiter asks of a store: the types on the seam, and which store can do what.

| strategy      | local, workers | redis, valkey      | another storage of `limits`            |
|---------------|----------------|--------------------|----------------------------------------|
| `fixed`       | yes            | yes                | yes                                    |
| `sliding`     | yes            | yes                | where the storage has a sliding window |
| `gcra`        | yes            | yes                | no                                     |
| `concurrency` | yes            | yes                | no                                     |
| several rates | atomic         | atomic, one script | tested first, then taken: a small gap  |

A strategy that the store in the settings cannot do is an error at start (:func:`check_strategy`),
never a limit that is quietly off.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from opsguard.limiter.rates import OnStoreError, Rate, Strategy

__all__ = [
    "Charge",
    "GatedStore",
    "GuardedStore",
    "OnStoreError",
    "RemoteStore",
    "Store",
    "StoreDown",
    "Strategy",
    "Verdict",
    "check_strategy",
]


class Charge(NamedTuple):
    """What one request takes from one bucket."""

    key: str
    """The bucket. No two policies or clients share one by accident (its parts are length-prefixed
    or hashed); holds no secret; at most 200 characters."""
    rate: Rate
    strategy: Strategy
    cost: int
    """At least 1. One above the rate's amount (or burst) is always refused."""


class Verdict(NamedTuple):
    """What a store decided about the charges of one request."""

    allowed: bool
    remaining: int
    """Of the tightest charge after this decision, at least 0."""
    reset: float
    """Seconds until that charge's quota is whole again, at least 0."""
    retry_after: float
    """0.0 if allowed; else seconds until the same cost may be admitted, above 0."""
    charge: int
    """Index of the charge that decided: the one that refuses, else the tightest."""
    stood_in: bool = False
    """The store did not answer: what `on_store_error` says decided."""


class Store(Protocol):
    """Where quotas are kept. Of several charges all are taken, or none. Thread-safe."""

    blocking: bool
    """False: `take` is CPU-only, and is called directly in async apps too."""
    strategies: frozenset[Strategy]
    """What it can do."""

    def take(self, charges: Sequence[Charge]) -> Verdict:
        """Take all of the charges or none."""
        ...

    def give_back(self, charges: Sequence[Charge]) -> None:
        """Return what was taken for a request that was refused later on, or the concurrency slots
        of a request that has ended.
        """
        ...


class RemoteStore(Store, Protocol):
    """A store that does I/O: `blocking` is True, and each verb has a twin for event loops.

    `take` and its twin raise :class:`StoreDown` and nothing else.
    """

    async def atake(self, charges: Sequence[Charge]) -> Verdict: ...
    async def agive_back(self, charges: Sequence[Charge]) -> None: ...
    def close(self) -> None: ...
    async def aclose(self) -> None: ...


class GuardedStore(Protocol):
    """A remote store that answers whatever happens; what the limiter itself holds of one.

    Nothing here raises. `on_error` says what an answer is worth that the store did not give.
    """

    blocking: bool
    strategies: frozenset[Strategy]

    def take(self, charges: Sequence[Charge], on_error: OnStoreError = "local") -> Verdict: ...
    async def atake(
        self, charges: Sequence[Charge], on_error: OnStoreError = "local"
    ) -> Verdict: ...
    def give_back(self, charges: Sequence[Charge]) -> None: ...
    async def agive_back(self, charges: Sequence[Charge]) -> None: ...
    def close(self) -> None: ...
    async def aclose(self) -> None: ...


@runtime_checkable
class GatedStore(Protocol):
    """A store on this machine: it decides at once, whatever happens, and has a quick way for one
    bucket. Nothing here raises.
    """

    blocking: bool
    """False."""
    strategies: frozenset[Strategy]

    def take(self, charges: Sequence[Charge], on_error: OnStoreError = "local") -> Verdict: ...
    def give_back(self, charges: Sequence[Charge]) -> None: ...

    def gate(
        self, rate: Rate, strategy: Strategy, on_error: OnStoreError = "local"
    ) -> Callable[[str, int], tuple[bool, Any, int, float, float]]:
        """(key, cost) to an outcome: allowed, what is the store's business, remaining, reset,
        seconds to wait.
        """
        ...


class StoreDown(Exception):
    """The store did not answer in time or not usably. Raised by a remote store and by the table
    that workers share; it never leaves this room.
    """


def check_strategy(store: str, can: frozenset[Strategy], strategy: Strategy, policy: str) -> None:
    """Stop the start if `policy` needs what the store cannot do.

    :raises ValueError: with a message that names both and says what would work.
    """
    if strategy not in can:
        raise ValueError(
            f"the policy {policy} has the strategy {strategy!r}, which the store {store} cannot "
            f"do; it can do {', '.join(sorted(can))}"
        )
