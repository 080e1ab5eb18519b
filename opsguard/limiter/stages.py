"""One decision: some rules, a request, a store.

A stage is made for the rules that apply together. The usual one has a single rule with a single
rate and a store on this machine; it is decided without building anything that the answer does not
need. All others go through one flow, a generator that yields what is to be taken and receives
verdicts, and that is driven with and without `await`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from sys import maxsize
from typing import Any, Final, NamedTuple

from opsguard.accelerator import limits
from opsguard.clock import Clock, elapsed
from opsguard.clock import wall as wall_clock
from opsguard.http import Response
from opsguard.limiter.algorithms import Outcome
from opsguard.limiter.buckets import IDENTITIES, Ask, of_address
from opsguard.limiter.headers import TITLES, Headers, fixed_texts, refusal, say_with
from opsguard.limiter.local import LocalStore, Table
from opsguard.limiter.rates import OnStoreError, Rate, Strategy
from opsguard.limiter.rules import Rule
from opsguard.limiter.stores import Charge, GatedStore, GuardedStore, Store, Verdict

__all__ = ["Decision", "Stage", "tighter"]

Taken = tuple[Any, ...]
"""Rule, client and cost of all that was charged, one after the other."""

Flow = Generator[tuple[Sequence[Charge], OnStoreError], Verdict, "Decision | None"]

_STRICTER: Final[dict[OnStoreError, int]] = {"allow": 0, "local": 1, "deny": 2}
_new = tuple.__new__


class Decision(NamedTuple):
    """What was decided about a request at one stage."""

    allowed: bool
    headers: Headers
    """To be added to the app's answer; the refusing `response` has its own already."""
    response: Response | None
    """The answer 429, if the request is refused."""
    remaining: int
    """Of the tightest rate."""
    taken: Taken
    """What the request was charged; nothing if it was refused."""

    @property
    def says(self) -> bool:
        """Whether there are headers."""
        return bool(self.headers)

    @property
    def charges(self) -> tuple[Charge, ...]:
        """What `taken` is in the words of a store."""
        taken = self.taken
        return tuple(
            charge
            for at in range(0, len(taken), 3)
            for charge in taken[at].charges(taken[at + 1], taken[at + 2])
        )

    @property
    def slots(self) -> tuple[Charge, ...]:
        """The concurrency slots in `charges`, to be returned when the request ends."""
        return tuple(charge for charge in self.charges if charge.strategy == "concurrency")


def tighter(edge: Decision | None, route: Decision | None) -> Decision | None:
    """Of the decisions of both stages the one whose headers tell the client more."""
    if edge is None or not edge.says:
        return route
    if route is None or not route.says:
        return edge
    return edge if edge.remaining < route.remaining else route


class Stage:
    """The rules that apply together, over a store. Immutable; shared by threads.

    `decide` is for stores that do not block, and for threads that may; `adecide` for event
    loops. Neither raises, unless the store does.
    """

    def __init__(
        self, rules: Sequence[Rule], store: Store | GuardedStore, *, error: str, wall: Clock
    ) -> None:
        self.rules = tuple(rules)
        self._enforced = tuple(rule for rule in rules if not rule.shadow)
        self._shadows = tuple(rule for rule in rules if rule.shadow)
        self._store = store
        self._answers = store.blocking or isinstance(store, GatedStore)  # whatever happens
        self._error = error
        self._wall = wall
        self._on_error: OnStoreError = "allow" if self._enforced else "local"
        quotas: list[tuple[str, Rate, Strategy]] = []
        names = _told_apart(self._enforced)
        for rule in self._enforced:
            if _STRICTER[rule.on_error] > _STRICTER[self._on_error]:
                self._on_error = rule.on_error
            quotas.extend((next(names), rate, rule.strategy) for rate in rule.policy.rates)
        self._quotas = quotas
        self._says = [say_with(quotas, at, wall) for at in range(len(quotas))]
        self._messages = [text for rule in self._enforced for text in rule.messages]
        self.decide: Callable[[Ask], Decision | None] = self._quick() or self._drive
        self.at_hand = self._leased()
        """Decides without I/O, of a store that blocks, where its tokens suffice; None where they do
        not, or where this is None: then it is for `decide` or `adecide`."""

    async def adecide(self, ask: Ask) -> Decision | None:
        """As `decide`, without blocking the event loop."""
        if not self._store.blocking:
            return self.decide(ask)
        store: GuardedStore = self._store  # type: ignore[assignment]  # blocking ones are guarded
        flow = self._flow(ask)
        try:
            charges, on_error = next(flow)
            while True:
                charges, on_error = flow.send(await store.atake(charges, on_error))
        except StopIteration as stop:
            decision: Decision | None = stop.value
            return decision

    def _drive(self, ask: Ask) -> Decision | None:
        take: Callable[[Sequence[Charge], OnStoreError], Verdict]
        take = self._store.take if self._answers else self._take_here  # type: ignore[assignment]
        flow = self._flow(ask)
        try:
            charges, on_error = next(flow)
            while True:
                charges, on_error = flow.send(take(charges, on_error))
        except StopIteration as stop:
            decision: Decision | None = stop.value
            return decision

    def _take_here(self, charges: Sequence[Charge], on_error: OnStoreError) -> Verdict:
        return self._store.take(charges)

    def _flow(self, ask: Ask) -> Flow:
        taken: list[tuple[Rule, str, int]] = []
        charges: list[Charge] = []
        places: list[int] = []
        at = 0
        for rule in self._enforced:
            cost = rule.cost(ask)
            if cost > rule.most:
                rule.refused()
                return self._refusal(ask, at, None, self._says[at](0, 0.0))
            if cost:
                client = rule.whose(ask)
                taken.append((rule, client, int(cost)))
                charges += rule.charges(client, int(cost))
                places += range(at, at + len(rule.policy.rates))
            else:
                rule.free()
            at += len(rule.policy.rates)
        headers: Headers = ()
        remaining = maxsize
        if charges:
            verdict = yield charges, self._on_error
            place = places[verdict.charge]
            headers = self._says[place](verdict.remaining, verdict.reset)
            if verdict.stood_in:
                for rule, _, _ in taken:
                    rule.store_error()
            if not verdict.allowed:
                self._owner(place).refused()
                return self._refusal(ask, place, verdict.retry_after, headers)
            remaining = verdict.remaining
            for rule, _, _ in taken:
                rule.allowed()
        yield from self._in_shadow(ask, taken)
        if not taken:
            return None
        return Decision(True, headers, None, remaining, tuple(chain.from_iterable(taken)))

    def _in_shadow(
        self, ask: Ask, taken: list[tuple[Rule, str, int]]
    ) -> Generator[tuple[Sequence[Charge], OnStoreError], Verdict, None]:
        """Count what the rules in shadow mode would say, each for itself."""
        for rule in self._shadows:
            cost = rule.cost(ask)
            if not cost:
                rule.free()
            elif cost > rule.most:
                rule.shadow_refused()
            else:
                client = rule.whose(ask)
                verdict = yield rule.charges(client, int(cost)), rule.on_error
                if verdict.stood_in:
                    rule.store_error()
                if verdict.allowed:
                    taken.append((rule, client, int(cost)))
                    rule.allowed()
                else:
                    rule.shadow_refused()

    def _owner(self, place: int) -> Rule:
        """The rule of the quota at this place."""
        return [rule for rule in self._enforced for _ in rule.policy.rates][place]

    def _refusal(self, ask: Ask, place: int, wait: float | None, headers: Headers) -> Decision:
        answer = refusal(self._error, self._messages[place], ask.request_id, wait, headers)
        return Decision(False, (), answer, 0, ())

    def _quick(self) -> Callable[[Ask], Decision] | None:
        """The decision for one rule with one rate at a fixed cost, on this machine."""
        store = self._store
        if len(self._enforced) != 1 or self._shadows or not isinstance(store, GatedStore):
            return None
        rule = self._enforced[0]
        cost = rule.price
        if len(rule.policy.rates) != 1 or not isinstance(cost, int):
            return None
        at_once = limits is not None and rule.strategy != "concurrency" and cost > 0
        if at_once and isinstance(store, LocalStore):
            table = store.table(rule.policy.rates[0], rule.strategy)
            clock = None if store.clock is elapsed else store.clock
            return self._in_c(
                rule, cost, table.take, table=table, locked=store.lock.locked, clock=clock
            )
        take = store.gate(rule.policy.rates[0], rule.strategy, rule.on_error)
        say, start, whose, allowed_one = self._says[0], rule.prefixes[0], rule.whose, rule.allowed
        refuse, refused_one = partial(self._refusal, place=0), rule.refused
        by_address = whose is of_address

        def decide(ask: Ask) -> Decision:
            if by_address and (client := ask.client) and ":" not in client and len(client) < 40:
                name = client  # what `of_address` would say of nearly all, without the call
            else:
                name = whose(ask)
            allowed, _, remaining, reset, wait = take(start + name, cost)
            headers = say(remaining, reset)
            if allowed:
                allowed_one()
                return _new(Decision, (True, headers, None, remaining, (rule, name, cost)))
            refused_one()
            return refuse(ask, wait=wait, headers=headers)

        return decide

    def _leased(self) -> Callable[[Ask], Decision | None] | None:
        """What `at_hand` is for one rule with one rate, at a fixed cost for a bucket that no
        function of the app's names: those are not to be called twice.
        """
        at_hand = getattr(self._store, "at_hand", None)
        if at_hand is None or len(self._enforced) != 1 or self._shadows:
            return None
        rule = self._enforced[0]
        cost = rule.price
        if len(rule.policy.rates) != 1 or not isinstance(cost, int) or not 0 < cost <= rule.most:
            return None
        if callable(rule.key) or rule.strategy == "concurrency":
            return None
        if limits is not None:
            store: Any = self._store
            locked, leases = store.lock.locked, store.leases if store.clock is elapsed else None
            return self._in_c(rule, cost, at_hand, leases=leases, locked=locked)
        say, start, whose, allowed_one = self._says[0], rule.prefixes[0], rule.whose, rule.allowed

        def decide(ask: Ask) -> Decision | None:
            name = whose(ask)
            found = at_hand(start + name, cost)
            if found is None:
                return None
            remaining, reset = found[2], found[3]
            allowed_one()
            headers = say(remaining, reset)
            return _new(Decision, (True, headers, None, remaining, (rule, name, cost)))

        return decide

    def _in_c(
        self,
        rule: Rule,
        cost: int,
        take: Callable[[str, int], Outcome | None],
        *,
        table: Table | None = None,
        leases: Mapping[str, object] | None = None,
        locked: Callable[[], bool] | None = None,
        clock: Clock | None = None,
    ) -> Callable[[Ask], Any]:
        """What `_quick` and `_leased` give, by the accelerator: what it decides of requests that
        are let pass has the attributes of a Decision. Without a `table` or `leases` it asks `take`
        for all.
        """
        rate, say, refused_one = rule.policy.rates[0], self._says[0], rule.refused

        def refused(ask: Ask, remaining: int, reset: float, wait: float) -> Decision:
            refused_one()
            return self._refusal(ask, 0, wait, say(remaining, reset))

        decide: Callable[[Ask], Any] = limits.Decider(
            table=table,
            leases=leases,
            locked=locked,
            take=take,
            clock=clock,
            wall=None if self._wall is wall_clock else self._wall,
            start=rule.prefixes[0],
            by=rule.whose is of_address or IDENTITIES.get(str(rule.key)),
            whose=rule.whose,
            rule=rule,
            allowed=rule.allowed,
            refused=refused,
            titles=TITLES,
            texts=fixed_texts(self._quotas, 0),
            strategy=rule.strategy,
            amount=rate.amount,
            most=rate.most,
            period=float(rate.period),
            span=0.0 if table is None else table.span,
            cost=cost,
        )
        return decide


def _told_apart(rules: Sequence[Rule]) -> Iterator[str]:
    """A name for each rate of these rules, in the words of clients: that of its rule, with the rate
    where a name would come twice, and with a number where that does too.
    """
    quotas = [(rule.said, rate.text) for rule in rules for rate in rule.policy.rates]
    names = [said for said, _ in quotas]
    names = [said if names.count(said) == 1 else f"{said} {text}" for said, text in quotas]
    for at, name in enumerate(names):
        before = names[:at].count(name)
        yield f"{name} #{before + 1}" if before else name
