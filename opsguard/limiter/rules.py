"""A policy made ready: everything that does not depend on the request is worked out here, once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from opsguard.limiter.buckets import Ask, cost_of, describe_key, prefix, whose
from opsguard.limiter.rates import OnStoreError, Strategy
from opsguard.limiter.stores import Charge, check_strategy
from opsguard.policies import Policy

if TYPE_CHECKING:
    from opsguard.settings import Limiter as Options

__all__ = ["Count", "Maker", "Report", "Rule"]

Count = Callable[[str, str], Callable[[], None]]
"""(policy, outcome) to a function that adds one. Outcomes: `allowed`, `refused`,
`shadow_refused`, `store_error` (the store did not answer; it counts beside what was decided without
it), `free` (it cost nothing), `key_fallback` and `cost_fallback` (a user's function
failed), `store_full`."""

Report = Callable[[str, BaseException], None]
"""(site, error): a user's function raised. It counts, and logs now and then."""


class Rule:
    """One policy in force. Immutable; shared by threads."""

    __slots__ = (
        *("allowed", "free", "key", "messages", "most", "name", "on_error", "policy", "prefixes"),
        *("price", "refused", "shadow", "said", "shadow_refused", "stage", "store_error"),
        *("strategy", "whose", "why"),
    )

    name: str
    said: str
    """What clients know it by: a decorator's route, never where its handler is in the code."""
    policy: Policy
    strategy: Strategy
    key: str | Callable[..., object]
    on_error: OnStoreError
    shadow: bool
    stage: str
    """`edge` or `route`."""
    why: str
    """For people: what made this policy count."""
    prefixes: tuple[str, ...]
    """For each rate, what stands before the client in a bucket's key."""
    messages: tuple[str, ...]
    """For each rate, what a client who exceeded it is told."""
    most: int
    """What a request may cost to be ever admitted."""
    price: int | Callable[[Ask], float]
    whose: Callable[[Ask], str]
    allowed: Callable[[], None]
    refused: Callable[[], None]
    shadow_refused: Callable[[], None]
    free: Callable[[], None]
    store_error: Callable[[], None]

    def charges(self, client: str, cost: int) -> tuple[Charge, ...]:
        """What a request of this client takes, one charge for each rate."""
        rates, strategy = self.policy.rates, self.strategy
        return tuple(
            Charge(start + client, rate, strategy, cost)
            for start, rate in zip(self.prefixes, rates, strict=True)
        )

    def cost(self, ask: Ask) -> float:
        """What this request costs: from 0, and infinite at most."""
        return self.price if isinstance(self.price, int) else self.price(ask)

    @property
    def kind(self) -> str:
        """Who shares a bucket, for people."""
        return describe_key(self.key)


@dataclass(frozen=True, slots=True)
class Maker:
    """Makes rules of policies, with what the settings say where a policy says nothing."""

    options: Options
    store: str
    can: frozenset[Strategy]
    count: Count
    report: Report

    def rule(
        self, policy: Policy, *, name: str, scope: str, stage: str, why: str, said: str = ""
    ) -> Rule:
        """`scope` is the policy's own, where it shares none; `said` is what clients know it by, if
        that is not the name.

        :raises ValueError: for a strategy that the store cannot do, and a cost above the limit.
        """
        options = self.options
        rule = Rule()
        rule.name, rule.policy, rule.stage, rule.why = name, policy, stage, why
        rule.said = said or name
        rule.strategy = policy.strategy or options.strategy
        check_strategy(self.store, self.can, rule.strategy, name)
        rule.key = policy.key if policy.key is not None else options.key
        rule.on_error = policy.on_store_error or options.on_store_error
        rule.shadow = options.shadow if policy.shadow is None else policy.shadow
        rule.most = min((rate.most for rate in policy.rates), default=0)
        # Counted apart, so that a typo in one scope never lets two policies share by accident.
        shared = f"={policy.scope}" if policy.scope else f"@{scope}"
        kind, rule.whose = whose(rule.key, self._fallback(name, "key"))
        rule.prefixes = tuple(prefix(shared, rate, rule.strategy, kind) for rate in policy.rates)
        rule.messages = tuple(options.message.replace("{rate}", rate.text) for rate in policy.rates)
        price: Any = policy.cost
        rule.price = cost_of(price, self._fallback(name, "cost")) if callable(price) else price
        rule.allowed = self.count(name, "allowed")
        rule.refused = self.count(name, "refused")
        rule.shadow_refused = self.count(name, "shadow_refused")
        rule.free = self.count(name, "free")
        rule.store_error = self.count(name, "store_error")
        return rule

    def _fallback(self, name: str, what: str) -> Callable[[BaseException | None], None]:
        count, report = self.count(name, f"{what}_fallback"), self.report

        def fallback(error: BaseException | None) -> None:
            count()
            if error is not None:
                report(f"limiter.{what}", error)

        return fallback
