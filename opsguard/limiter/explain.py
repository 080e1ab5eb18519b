"""Which policies apply and why: for the start's log line, for `ops.limiter.explain` and for the
`opsguard limits` command. Nothing here takes a token.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

from opsguard.limiter.buckets import Ask, bucket_name
from opsguard.limiter.rules import Rule
from opsguard.limiter.stages import Stage
from opsguard.marks import NO_MARKS, Marks

if TYPE_CHECKING:
    from opsguard.limiter.limiter import Limiter

__all__ = ["Coverage", "Explanation", "Route", "describe", "explain", "match", "table"]


@dataclass(frozen=True, slots=True)
class Route:
    """A route of the app: its template, one of its methods, and the marks on its handler."""

    endpoint: str
    method: str
    marks: Marks = NO_MARKS


class Named(Protocol):
    """What is known of a route to find it by."""

    @property
    def endpoint(self) -> str: ...
    @property
    def method(self) -> str: ...


R = TypeVar("R", bound=Named)


@dataclass(frozen=True, slots=True)
class Coverage:
    """Which routes are limited for everybody, which are exempt on purpose, and which are neither
    (those are limited by a key's tier at most).
    """

    limited: tuple[Route, ...]
    exempt: tuple[Route, ...]
    uncovered: tuple[Route, ...]

    def __str__(self) -> str:
        text = (
            f"limiter: {_routes(self.limited)} limited, {len(self.exempt)} exempt, "
            f"{len(self.uncovered)} uncovered"
        )
        if not self.uncovered:
            return text
        named = [f"{route.method} {route.endpoint}" for route in self.uncovered[:10]]
        more = len(self.uncovered) - len(named)
        return f"{text}: {', '.join(named)}{f' and {more} more' if more else ''}"


@dataclass(frozen=True, slots=True)
class Explanation:
    """One policy that applies, or the reason why none does."""

    stage: str
    """`edge` or `route`."""
    policy: str
    """Empty if none applies."""
    why: str
    rates: tuple[str, ...] = ()
    strategy: str = ""
    key: str = ""
    scope: str = ""
    on_store_error: str = ""
    shadow: bool = False
    buckets: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Identity:
    tier: str
    master: bool = False


@dataclass(frozen=True, slots=True)
class _Imagined:
    """A request that nobody sent."""

    method: str
    routed: str
    endpoint: str | None
    identity: _Identity | None
    client: str | None = None
    request_id: str = ""
    source: object = None

    def header(self, name: str) -> str:
        return ""


def explain(
    limiter: Limiter,
    path: str,
    method: str = "GET",
    *,
    key: str | None = None,
    tier: str | None = None,
    master: bool = False,
    endpoint: str | None = None,
    marks: Marks = NO_MARKS,
    ask: Ask | None = None,
) -> tuple[Explanation, ...]:
    """What applies to a request of this method to this path: at least one line for each stage.

    `key` is the client asked about, in the sense of the policies' keys (an address, a key id, …);
    `tier` that of its API key; `endpoint` and `marks` tell of the route, where it is known. With
    `ask`, a request that is being served, its own buckets are told instead.
    """
    identity = _Identity(tier or "", master) if tier is not None or master else None
    imagined = _Imagined(method.upper(), path, endpoint, identity)
    edge = _explained(limiter.edge_stage(imagined), key, ask)
    if not edge:
        why = (
            "the path is exempt" if limiter.exempts(path, imagined.method) else "no policy matches"
        )
        edge = (Explanation("edge", "", why),)
    route = _explained(limiter.route_stage(imagined, marks), key, ask)
    if not route:
        route = (Explanation("route", "", _why_nothing(limiter, imagined, marks)),)
    return edge + route


def describe(limiter: Limiter, routes: Iterable[Route]) -> Coverage:
    """Sort the routes. Call it at install: it also makes the decorators' rules ready.

    :raises ValueError: for a decorator that asks for what the store cannot do.
    """
    limited: list[Route] = []
    exempt: list[Route] = []
    uncovered: list[Route] = []
    for route in routes:
        limiter.check(route.endpoint, route.marks)
        ask = _Imagined(route.method, route.endpoint, route.endpoint, None)
        at_edge = limiter.edge_stage(ask)
        at_route = limiter.route_stage(ask, route.marks)
        if at_edge is not None or at_route is not None:
            limited.append(route)
        elif route.marks.exempt or limiter.exempts(route.endpoint, route.method):
            exempt.append(route)
        else:
            uncovered.append(route)
    return Coverage(tuple(limited), tuple(exempt), tuple(uncovered))


def match(routes: Iterable[R], path: str, method: str) -> R | None:
    """The route that probably serves this path: only the framework knows for sure. The template
    itself or an exact path comes first, then the one with the fewest parameters, last one whose
    final parameter takes several segments.
    """
    ranked: list[tuple[int, int, R]] = []
    for number, route in enumerate(routes):
        if route.method not in (method, "*") and (method, route.method) != ("HEAD", "GET"):
            continue
        rank = _rank(route.endpoint, path)
        if rank is not None:
            ranked.append((rank, number, route))
    return min(ranked, key=lambda one: one[:2])[2] if ranked else None


_PARAMETER = re.compile(r"\\{[^{}]*\\}")
_MOST_PARAMETERS = 1000


def _rank(template: str, path: str) -> int | None:
    if path == template:
        return 0
    escaped = re.escape(template)
    each, count = _PARAMETER.subn("[^/]+", escaped)
    if count and re.fullmatch(each, path):
        return count
    if count and template.endswith("}"):
        rest = each.removesuffix("[^/]+") + ".*"
        if re.fullmatch(rest, path, re.DOTALL):
            return _MOST_PARAMETERS + count
    return None


def table(lines: Sequence[Explanation]) -> str:
    """Explanations for a terminal, a line each with aligned columns."""
    rows = [("STAGE", "POLICY", "RATE", "STRATEGY", "KEY", "WHY")]
    for line in lines:
        rate = "; ".join(line.rates) + (" (shadow)" if line.shadow else "")
        rows.append(
            (
                line.stage,
                line.policy or "-",
                rate or "-",
                line.strategy or "-",
                line.key or "-",
                line.why,
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _explained(stage: Stage | None, key: str | None, ask: Ask | None) -> tuple[Explanation, ...]:
    return () if stage is None else tuple(_of_rule(rule, key, ask) for rule in stage.rules)


def _of_rule(rule: Rule, key: str | None, ask: Ask | None) -> Explanation:
    client = bucket_name(rule.key, key) if ask is None else rule.whose(ask)
    return Explanation(
        stage=rule.stage,
        policy=rule.name,
        why=rule.why,
        rates=tuple(rate.text for rate in rule.policy.rates),
        strategy=rule.strategy,
        key=rule.kind,
        scope=rule.policy.scope,
        on_store_error=rule.on_error,
        shadow=rule.shadow,
        buckets=tuple(start + client for start in rule.prefixes),
    )


def _why_nothing(limiter: Limiter, ask: _Imagined, marks: Marks) -> str:
    if marks.exempt:
        return "the handler is exempt"
    if ask.identity is not None and ask.identity.master:
        return "the master key has no tier's limit"
    if limiter.exempts(ask.routed, ask.method):
        return "the path is exempt"
    return "no decorator, no tier and no default"


def _routes(routes: Sequence[Route]) -> str:
    return "1 route" if len(routes) == 1 else f"{len(routes)} routes"
