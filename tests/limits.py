"""A manual clock, a request made by hand and a limiter around them, for the limiter's tests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from opsguard.limiter import Limiter, LocalStore, Store
from opsguard.settings import Settings

EPOCH = 1_700_000_000.0


class Manual:
    """Seconds that pass when told."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@dataclass
class Who:
    tier: str = "free"
    key_id: str = "k1"
    tenant_id: str = "t1"
    user_id: str | None = None
    master: bool = False


@dataclass
class Request:
    """What the limiter reads of a request."""

    path: str = "/"
    method: str = "GET"
    client: str | None = "203.0.113.7"
    request_id: str = "rid-1"
    endpoint: str | None = None
    source: Any = None
    identity: Who | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def routed(self) -> str:
        return self.path

    def header(self, name: str) -> str:
        return self.headers.get(name, "")


class Bench:
    """A limiter with a manual clock that notes what it counts and reports."""

    def __init__(self, store: Store | None = None, **options: object) -> None:
        self.clock = Manual()
        self.counts: Counter[tuple[str, str]] = Counter()
        self.reports: list[tuple[str, BaseException]] = []
        self.options = Settings.load({"limiter": options}, environ={}).limiter
        self.store = LocalStore(clock=self.clock) if store is None else store
        self.limiter = Limiter(
            self.options,
            self.store,
            report=lambda site, error: self.reports.append((site, error)),
            count=self.count,
            wall=lambda: EPOCH,
        )

    def count(self, policy: str, outcome: str) -> Callable[[], None]:
        def add() -> None:
            self.counts[policy, outcome] += 1

        return add

    def admitted(self, request: Request, times: int) -> int:
        """How many of so many such requests pass the edge."""
        return sum(self.passes(request) for _ in range(times))

    def passes(self, request: Request) -> bool:
        decision = self.limiter.edge(request)
        return decision is None or decision.allowed
