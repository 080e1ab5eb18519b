"""The harness: bare and guarded blocks side by side until the evidence suffices.

Method. One *block* is a run of requests of about 30 ms. Bare and arm alternate in blocks in the
order ABBA (and BAAB in the next round), so that a drift of the machine falls on both alike. A
block's cost is CPU time, not wall time, over all threads of the process, and whatever the arm
put off is done inside the block (its ``drain``), so a background thread hides nothing. Where access
lines are written a block is a whole number of their batches, as under load: to write a few lines at
the end of each block would wake the reader of the pipe once more for them. Each ABBA
gives one paired difference; the figure is their median. In process a block begins with a few
requests that are not counted: on its server an app does not take turns with others, and need not
fetch its code anew after 100 ms. Beside the arms under test run the two
controls (see `Controls`): if either reads wrong, the run is void and no verdict is given.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from benchmarks.estimates import (
    Controls,
    Interval,
    Pair,
    Round,
    Statistic,
    Verdict,
    added_us,
    bare_us,
    bootstrap,
    judge,
)

BLOCK_SECONDS = 0.03
SHORT_BLOCK_SECONDS = 0.01
"""For what is a fraction of a microsecond, see `inprocess.compare`."""


class Arm(Protocol):
    """One variant of the app under the same load."""

    @property
    def name(self) -> str: ...

    def block(self, requests: int) -> float:
        """Serve ``requests`` requests; CPU nanoseconds spent, deferred work included."""
        ...


class Divisible(Arm, Protocol):
    """One whose block can be served in parts, with those of another in between."""

    def part(self, requests: int, warm: int = 0) -> float:
        """Serve some, after ``warm`` that do not count; CPU nanoseconds spent, without what `rest`
        will tell.
        """
        ...

    def rest(self) -> float:
        """What has not been told since the last time, deferred work included."""
        ...


def _nothing() -> None:
    pass


@dataclass(frozen=True, slots=True)
class InProcess:
    """An arm served in this process. ``drain`` finishes deferred work, on the arm's account.

    ``warm`` requests before a block bring its code back into the caches.
    """

    name: str
    serve: Callable[[int], None]
    drain: Callable[[], object] = _nothing
    clock: Callable[[], int] = time.process_time_ns
    warm: int = 8

    def block(self, requests: int) -> float:
        self.serve(self.warm)
        self.drain()
        return self.part(requests) + self.rest()

    def part(self, requests: int, warm: int = 0) -> float:
        if warm:
            self.serve(warm)
        started = self.clock()
        self.serve(requests)
        return float(self.clock() - started)

    def rest(self) -> float:
        started = self.clock()
        self.drain()
        return float(self.clock() - started)


@dataclass(frozen=True, slots=True)
class Claim:
    """A figure of the run; with a ``limit`` it is judged."""

    key: str
    statistic: Statistic
    limit: float | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """How long to look. Rounds double from ``first`` to ``cap`` while something is open.

    ``seconds`` ends the run early, undecided or void if so it stands: for a gate that must end.
    """

    first: int = 24
    cap: int = 192
    seconds: float = float("inf")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run found. ``figures`` holds an interval per claim, ``verdicts`` what follows."""

    rounds: int
    bare: Interval
    figures: dict[str, Interval]
    verdicts: dict[str, Verdict]
    controls: dict[str, Interval]
    objections: list[str] = field(default_factory=list)

    @property
    def verdict(self) -> Verdict:
        """The worst verdict, a void run before all."""
        if self.objections:
            return Verdict.VOID
        for worst in (Verdict.FAIL, Verdict.UNDECIDED, Verdict.PASS):
            if worst in self.verdicts.values():
                return worst
        return Verdict.INFO

    def as_record(self) -> dict[str, Any]:
        """JSON-able; times in µs of CPU per request unless a key says otherwise."""
        record = asdict(self)
        record["verdict"] = str(self.verdict)
        record["verdicts"] = {key: str(value) for key, value in self.verdicts.items()}
        return record


def requests_per_block(
    arm: Arm, seconds: float = BLOCK_SECONDS, least: int = 4, *, step: int = 1
) -> int:
    """How many requests of this arm make a block of about ``seconds``, a multiple of ``step``.
    Warms the arm up too.
    """
    requests = least
    while True:
        spent = arm.block(requests)
        if spent >= seconds * 1e9 / 2:
            wanted = max(least, round(requests * seconds * 1e9 / spent))
            return max(step, round(wanted / step) * step)
        requests *= 2


def one_round(bare: Arm, arms: Sequence[Arm], requests: int, *, turned: bool) -> dict[str, Pair]:
    """Four blocks for each arm: bare, arm, arm, bare, or the other way round if ``turned``."""
    found = {}
    for arm in arms:
        a, b = (arm, bare) if turned else (bare, arm)
        a1, b1, b2, a2 = (one.block(requests) for one in (a, b, b, a))
        first, second = (a1 + a2) / (2 * requests), (b1 + b2) / (2 * requests)
        found[arm.name] = Pair(second, first) if turned else Pair(first, second)
    return found


def assess(rounds: Sequence[Round], claims: Sequence[Claim], controls: Controls | None) -> Outcome:
    """Judge what has been seen so far. Pure."""
    figures = {claim.key: bootstrap(rounds, claim.statistic) for claim in claims}
    verdicts = {
        claim.key: judge(figures[claim.key], claim.limit)
        for claim in claims
        if claim.limit is not None
    }
    arms = list(rounds[0])
    readings = {}
    if controls is not None:
        for name in (controls.twin, controls.planted):
            readings[name] = bootstrap(rounds, added_us(name))
    return Outcome(
        rounds=len(rounds),
        bare=bootstrap(rounds, bare_us(arms[0])),
        figures=figures,
        verdicts=verdicts,
        controls=readings,
        objections=[] if controls is None else controls.objections(rounds),
    )


def in_teams(teams: Sequence[tuple[Arm, Arm]], requests: int) -> Iterator[Round]:
    """Rounds without end. Each arm has one that it is compared with, which is named first."""
    _settle(teams, requests)
    turned = False
    while True:
        found: dict[str, Pair] = {}
        for bare, arm in teams:
            found |= one_round(bare, [arm], requests, turned=turned)
        yield found
        turned = not turned


def _settle(teams: Sequence[tuple[Arm, Arm]], requests: int) -> None:
    """Run each arm once before it counts, and leave no garbage to its time."""
    for arm in {arm.name: arm for team in teams for arm in team}.values():
        arm.block(requests)
    gc.collect()
    gc.freeze()


def interleaved(
    teams: Sequence[tuple[Divisible, Divisible]], requests: int, turn: int, warm: int = 0
) -> Iterator[Round]:
    """As `in_teams`, but the two of a team take turns of ``turn`` requests: what somebody else's
    burst of work costs on a shared machine falls on both alike. Before each turn come ``warm``
    requests that do not count.

    :raises ValueError: if ``turn`` does not divide ``requests``.
    """
    if requests % turn:
        raise ValueError(f"turns of {turn} do not divide a block of {requests} requests")
    _settle(teams, requests)
    turned = False
    while True:
        yield {arm.name: _in_turns(bare, arm, requests, turn, warm, turned) for bare, arm in teams}
        turned = not turned


def _in_turns(
    bare: Divisible, arm: Divisible, requests: int, turn: int, warm: int, turned: bool
) -> Pair:
    first, second = (arm, bare) if turned else (bare, arm)
    for one in (first, second):
        one.rest()  # what was put off before is on nobody's account
    spent = {first.name: 0.0, second.name: 0.0}
    for _ in range(requests // turn):
        for one in (first, second, second, first):
            spent[one.name] += one.part(turn, warm)
    for one in (first, second):
        spent[one.name] += one.rest()
    return Pair(spent[bare.name] / (2 * requests), spent[arm.name] / (2 * requests))


def run(
    rounds: Iterator[Round],
    claims: Sequence[Claim],
    controls: Controls | None,
    plan: Plan,
    *,
    monotonic: Callable[[], float] = time.monotonic,
) -> Outcome:
    """Take rounds until every claim is decided and the controls hold, or the plan is used up.

    The first arm of a round is the one under test: the bare figure reported is the one beside
    it. Looking again after each doubling (at most a handful of looks) and not after each round
    keeps the error of the 95 % interval near what it says.
    """
    began = monotonic()
    seen: list[Round] = []
    target = plan.first
    while True:
        while len(seen) < target and (not seen or monotonic() - began < plan.seconds):
            seen.append(next(rounds))
        outcome = assess(seen, claims, controls)
        settled = outcome.verdict not in (Verdict.VOID, Verdict.UNDECIDED)
        if settled or len(seen) < target or target >= plan.cap:
            return outcome
        target = min(2 * target, plan.cap)
