"""The limiter: which policies apply to a request, at each of its two stages.

At the **edge** the first path policy that matches counts (and the method, where one names methods).
At the **route** the decorators of the handler count, else the tier of the request's API key, else
the default. `exempt` on a handler switches the route's stage off, whatever it would be; a
policy by path has been decided by then and stays. A path that the settings call `exempt` has no
limit by path and no default; decorators and tiers stay.

Scopes. A path policy, a tier and the default each have one bucket for a client, whatever the route.
A decorator has one for each route. Policies with the same `scope` and rate share theirs.

Spelling. Paths are matched under every form that a router may give them (see
:mod:`opsguard.patterns`); one in an odd spelling is charged by the policies of all its forms, and
never exempt. Methods are matched in upper case, as Flask and Django serve them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, cast

from opsguard.clock import Clock
from opsguard.clock import wall as wall_clock
from opsguard.http import METHODS
from opsguard.limiter.buckets import Ask
from opsguard.limiter.rules import Count, Maker, Report, Rule
from opsguard.limiter.stages import Decision, Stage
from opsguard.limiter.stores import Charge, GuardedStore, Store
from opsguard.marks import Marks
from opsguard.patterns import Patterns, exactness
from opsguard.policies import Policy

if TYPE_CHECKING:
    from opsguard.settings import Limiter as Options

__all__ = ["Limiter", "is_preflight"]

_MOST_COMBINATIONS = 256
_MOST_HANDLERS = 16_384


@dataclass(frozen=True, slots=True, eq=False)
class _Path:
    """A policy by path; `stage` and its `decide` are None where it exempts."""

    pattern: str
    policy: Policy
    stage: Stage | None
    decide: Callable[[Ask], Decision | None] | None


class Limiter:
    """Decides about requests. Immutable but for what it remembers; for all threads and forks.

    `store` keeps the quotas; one that blocks is a :class:`~opsguard.limiter.stores.GuardedStore`.
    With a store that does not block, `edge` and `route` are CPU-only, and are for async apps
    as well; else those call `aedge` and `aroute`. `store_name` is for error messages.

    :raises ValueError: for a strategy that the store cannot do.
    """

    def __init__(
        self,
        options: Options,
        store: Store | GuardedStore,
        *,
        report: Report,
        count: Count,
        wall: Clock = wall_clock,
        store_name: str = "in the settings",
    ) -> None:
        self.options = options
        self.store = store
        self._wall = wall
        self._maker = Maker(options, store_name, store.strategies, count, report)
        paths = [self._path(name, policy) for name, policy in options.policies.items()]
        self.paths: tuple[_Path, ...] = tuple(paths)
        methods = {method for path in paths for method in path.policy.methods}
        self._others = _Finder(self, [path for path in paths if not path.policy.methods])
        # All usual methods, so that only odd ones are missed.
        self._by_method: dict[str, _Finder] = dict.fromkeys(METHODS, self._others)
        self._by_method |= {method: _Finder(self, _for(paths, method)) for method in methods}
        self._plain, self._each = not methods, self._others.each
        self._exempting = any(path.stage is None for path in paths)
        self._tiers = {
            tier: self._one(_by_key(policy), f"tier:{tier}", "route", f"the key's tier is {tier}")
            for tier, policy in options.tiers.items()
        }
        self._default: Stage | None = None
        if options.default is not None:
            self._default = self._one(options.default, "default", "route", "nothing else applies")
        # By the identity of the policies, as their hash would take longer than the decision; they
        # are kept beside it, so that no others can have the same.
        self._decorated: dict[int, tuple[tuple[Policy, ...], dict[str, Stage]]] = {}

    # -- one request ----------------------------------------------------------------------

    def edge(self, ask: Ask, *, spared: bool = False) -> Decision | None:
        """Decide by path; None: no policy applies. `spared` is for requests that cost nothing
        unless a policy names exactly their path: those for endpoints of ours. Preflights, which
        are recognised here, cost nothing at all.
        """
        if not spared and self._plain:
            # What `edge_stage` comes to for nearly all requests, with fewer calls.
            found = self._each(ask.routed)
            if len(found) == 1 and found[0].decide is not None and ask.method != "OPTIONS":
                return found[0].decide(ask)
            if not found:
                return None
        stage = self.edge_stage(ask, spared)
        return None if stage is None else stage.decide(ask)

    async def aedge(self, ask: Ask, *, spared: bool = False) -> Decision | None:
        stage = self.edge_stage(ask, spared)
        return None if stage is None else await stage.adecide(ask)

    def route(self, ask: Ask, marks: Marks) -> Decision | None:
        """Decide by decorator, tier or default; None: none of them applies."""
        stage = self.route_stage(ask, marks)
        return None if stage is None else stage.decide(ask)

    async def aroute(self, ask: Ask, marks: Marks) -> Decision | None:
        stage = self.route_stage(ask, marks)
        return None if stage is None else await stage.adecide(ask)

    def by_path(self, path: str) -> Callable[[Ask], Decision | None] | Literal[False] | None:
        """What decides at the edge about all requests for this path but preflights (with a store
        that blocks: where it has tokens at hand); None: nothing. False: that cannot be said of a
        path alone.
        """
        found = self._each(path) if self._plain else ()
        if not self._plain or len(found) > 1 or any(one.decide is None for one in found):
            return False
        if found and self.store.blocking:
            return cast("Stage", found[0].stage).at_hand or False
        return found[0].decide if found else None

    def by_handler(
        self, ask: Ask, marks: Marks
    ) -> Callable[[Ask], Decision | None] | Literal[False] | None:
        """What decides at the route about all requests of this method for a handler of these marks
        on this route, from callers of this tier; None: nothing. False: it takes more to say.
        """
        if self._exempting and not marks.limits:
            return False
        stage = self.route_stage(ask, marks)
        if stage is not None and self.store.blocking:
            return stage.at_hand or False
        return None if stage is None else stage.decide

    def give_back(self, decision: Decision) -> None:
        """The request was refused after all: return everything it was charged."""
        if decision.taken:
            self.store.give_back(decision.charges)

    async def agive_back(self, decision: Decision) -> None:
        if decision.taken:
            await self._areturn(decision.charges)

    def release(self, decision: Decision) -> None:
        """The request has ended: return its concurrency slots. Needed if `holds` says so."""
        if slots := decision.slots:
            self.store.give_back(slots)

    async def arelease(self, decision: Decision) -> None:
        if slots := decision.slots:
            await self._areturn(slots)

    @property
    def holds(self) -> bool:
        """Whether any policy, now, counts what is in flight."""
        return any(rule.strategy == "concurrency" for rule in self.rules())

    async def _areturn(self, charges: Sequence[Charge]) -> None:
        if self.store.blocking:
            await cast("GuardedStore", self.store).agive_back(charges)
        else:
            self.store.give_back(charges)

    # -- which policies -------------------------------------------------------------------

    def edge_stage(self, ask: Ask, spared: bool = False) -> Stage | None:
        """What applies at the edge."""
        finder = self._others if self._plain else self._finder(ask.method)
        if ask.method == "OPTIONS" and is_preflight(ask):
            return None
        if spared:
            return finder.exactly(ask.routed)
        return finder.stage(ask.routed)

    def route_stage(self, ask: Ask, marks: Marks) -> Stage | None:
        """What applies at the route."""
        if marks.exempt or (ask.method == "OPTIONS" and is_preflight(ask)):
            return None
        if marks.limits:
            endpoint = ask.endpoint or ""
            stages = self._of_marks(marks)
            return stages.get(endpoint) or self._decorate(stages, marks.limits, endpoint)
        identity = getattr(ask, "identity", None)
        if identity is not None:
            if identity.master:
                return None
            stage = self._tiers.get(identity.tier)
            if stage is not None:
                return stage
        if self._exempting and self.exempts(ask.routed, ask.method):
            return None
        return self._default

    def exempts(self, path: str, method: str = "GET") -> bool:
        """Whether the settings take this path, as it is spelled, out of path limits and default."""
        return self._finder(method).exempts(path)

    def rules(self) -> tuple[Rule, ...]:
        """Every rule in force; those of decorators once their routes are known to it."""
        stages = [path.stage for path in self.paths] + [*self._tiers.values(), self._default]
        for _, by_endpoint in list(self._decorated.values()):
            stages += by_endpoint.values()
        return tuple(rule for stage in stages if stage is not None for rule in stage.rules)

    def check(self, endpoint: str, marks: Marks) -> None:
        """Make the rules of a route's decorators ready, at install.

        :raises ValueError: if the store cannot do what they ask.
        """
        if marks.limits and not marks.exempt:
            stages = self._of_marks(marks)
            if endpoint not in stages:
                self._decorate(stages, marks.limits, endpoint)

    def combined(self, rules: Sequence[Rule]) -> Stage:
        """A stage that decides these together."""
        return Stage(rules, self.store, error=self.options.error, wall=self._wall)

    def _finder(self, method: str) -> _Finder:
        """The path policies that count for a method, however its letters are sent: Flask and Django
        serve `post` as POST.
        """
        found = self._by_method.get(method)
        return self._by_method.get(method.upper(), self._others) if found is None else found

    def _path(self, pattern: str, policy: Policy) -> _Path:
        if policy.exempt:
            return _Path(pattern, policy, None, None)
        stage = self._one(policy, pattern, "edge", f"the path is {pattern}")
        return _Path(pattern, policy, stage, stage.decide)

    def _one(self, policy: Policy, name: str, stage: str, why: str) -> Stage:
        rule = self._maker.rule(policy, name=name, scope=name, stage=stage, why=why)
        return self.combined([rule])

    def _of_marks(self, marks: Marks) -> dict[str, Stage]:
        """The stages of a handler's decorators, by the route's template."""
        limits = marks.limits
        known = self._decorated.get(id(limits))
        if known is None:
            if len(self._decorated) >= _MOST_HANDLERS:  # somebody makes new marks all the time
                self._decorated.clear()
            known = self._decorated.setdefault(id(limits), (limits, {}))
        return known[1]

    def _decorate(
        self, stages: dict[str, Stage], policies: tuple[Policy, ...], endpoint: str
    ) -> Stage:
        rules = [
            self._maker.rule(
                policy,
                name=policy.name or endpoint,
                scope=f"{endpoint} {policy.name}",
                stage="route",
                why=f"the handler is decorated ({policy.name or endpoint})",
                said=policy.scope or endpoint or "route",
            )
            for policy in policies
        ]
        return stages.setdefault(endpoint, self.combined(rules))


class _Finder:
    """The path policies that count for one method."""

    def __init__(self, limiter: Limiter, paths: Iterable[_Path]) -> None:
        paths = tuple(paths)
        limits = [path for path in paths if path.stage is not None]
        self._limiter = limiter
        self._all = _patterns(paths)
        self._limits = _patterns(limits)
        self._exact = _patterns(path for path in limits if _is_exact(path.pattern))
        self.each = self._all.each
        self._combinations: dict[tuple[_Path, ...], Stage] = {}

    def stage(self, path: str) -> Stage | None:
        found = self.each(path)
        if len(found) == 1 and (stage := found[0].stage) is not None:
            return stage
        if not found or self.exempts(path):
            return None
        return self._together(self._limits.each(path))

    def exactly(self, path: str) -> Stage | None:
        """Only by policies that name the path itself."""
        return self._together(self._exact.each(path))

    def exempts(self, path: str) -> bool:
        """Whether the path, spelled as in the settings, is exempt."""
        found = self._all.plain(path)
        return found is not None and found.stage is None

    def _together(self, paths: tuple[_Path, ...]) -> Stage | None:
        stages = [path.stage for path in paths if path.stage is not None]
        if len(stages) < 2:
            return stages[0] if stages else None
        combined = self._combinations.get(paths)
        if combined is None:
            combined = self._limiter.combined([rule for stage in stages for rule in stage.rules])
            if len(self._combinations) < _MOST_COMBINATIONS:
                self._combinations[paths] = combined
        return combined


def is_preflight(ask: Ask) -> bool:
    """Whether this is a CORS preflight (Fetch standard, 4.8)."""
    return (
        ask.method == "OPTIONS"
        and bool(ask.header("origin"))
        and bool(ask.header("access-control-request-method"))
    )


def _for(paths: Iterable[_Path], method: str) -> list[_Path]:
    return [path for path in paths if not path.policy.methods or method in path.policy.methods]


def _by_key(policy: Policy) -> Policy:
    """A tier is the customer's, wherever he comes from."""
    return policy if policy.key is not None else replace(policy, key="key")


def _patterns(paths: Iterable[_Path]) -> Patterns[_Path]:
    return Patterns([(path.pattern, path) for path in paths])


def _is_exact(pattern: str) -> bool:
    return exactness(pattern) == exactness("/")
