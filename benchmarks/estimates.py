"""Statistics of the harness: pure functions of numbers, no clock and no process.

The unit of evidence is a *round*: for each arm the pair (bare, with the arm) of CPU
nanoseconds per request, taken a few milliseconds apart. A statistic maps a list of rounds to
one number; its interval comes from resampling the rounds (percentile bootstrap, Efron 1979).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import median
from typing import TypeVar

S = TypeVar("S")


@dataclass(frozen=True, slots=True)
class Pair:
    """CPU nanoseconds per request of the bare app and, beside it, of one arm."""

    bare: float
    arm: float

    @property
    def added(self) -> float:
        return self.arm - self.bare


Round = Mapping[str, Pair]
Statistic = Callable[[Sequence[Round]], float]


@dataclass(frozen=True, slots=True)
class Interval:
    """A point estimate and the ends of its confidence interval, in the statistic's unit."""

    value: float
    low: float
    high: float

    def contains(self, number: float) -> bool:
        return self.low <= number <= self.high


class Verdict(StrEnum):
    """What a run says about a limit; ``INFO`` is a figure without one."""

    PASS = "pass"
    FAIL = "fail"
    UNDECIDED = "undecided"
    VOID = "void"
    INFO = "info"


def bootstrap(
    samples: Sequence[S],
    statistic: Callable[[Sequence[S]], float],
    *,
    seed: int = 1,
    resamples: int = 1_000,
    confidence: float = 0.95,
) -> Interval:
    """Percentile bootstrap of ``statistic``; the same seed gives the same interval.

    :raises ValueError: for an empty sample.
    """
    if not samples:
        raise ValueError("no samples: run at least one round")
    draw = random.Random(seed)
    size = len(samples)
    values = sorted(statistic(draw.choices(samples, k=size)) for _ in range(resamples))
    tail = (1.0 - confidence) / 2.0
    low = values[int(tail * (resamples - 1))]
    high = values[round((1.0 - tail) * (resamples - 1))]
    return Interval(statistic(samples), low, high)


def percentile(values: Sequence[float], part: float) -> float:
    """The value that ``part`` (0 to 1) of them do not exceed.

    :raises ValueError: for no values.
    """
    if not values:
        raise ValueError("no values: take some")
    return float(sorted(values)[round(part * (len(values) - 1))])


def judge(interval: Interval, limit: float) -> Verdict:
    """Pass only if the whole interval is within the limit, fail only if all of it is above."""
    if interval.high <= limit:
        return Verdict.PASS
    if interval.low > limit:
        return Verdict.FAIL
    return Verdict.UNDECIDED


def added_us(arm: str) -> Statistic:
    """Microseconds of CPU the arm adds to a request: median of the paired differences."""
    return lambda rounds: median([one[arm].added for one in rounds]) / 1_000.0


def bare_us(arm: str) -> Statistic:
    """Microseconds of CPU of the bare app in the blocks beside the arm's."""
    return lambda rounds: median([one[arm].bare for one in rounds]) / 1_000.0


def arm_us(arm: str) -> Statistic:
    """Microseconds of CPU of a whole request of the arm."""
    return lambda rounds: median([one[arm].arm for one in rounds]) / 1_000.0


def arm_ratio(arm: str) -> Statistic:
    """A whole request of the arm as a part of one beside it: median of the paired ratios."""
    return lambda rounds: median([one[arm].arm / one[arm].bare for one in rounds])


def added_percent(arm: str) -> Statistic:
    """What the arm adds, in per cent of the bare app."""
    added, bare = added_us(arm), bare_us(arm)
    return lambda rounds: 100.0 * added(rounds) / bare(rounds)


def added_ratio(arm: str, other: str) -> Statistic:
    """What ``arm`` adds as a part of what ``other`` adds in the same rounds."""
    mine, theirs = added_us(arm), added_us(other)
    return lambda rounds: mine(rounds) / theirs(rounds)


@dataclass(frozen=True, slots=True)
class Controls:
    """When to believe a run at all.

    ``twin`` is an arm that is the bare app again: it must read 0. ``planted`` is the bare app
    with a known number of microseconds of CPU added: it must read that number. A run that sees
    a difference where there is none, or misses one that is there, says nothing about the rest.

    ``planted_tolerance`` is a part of the planted cost: in an app with cold caches a loop costs a
    little more than it was asked for.

    ``zero_percent`` is the difference of the twin that is let pass although its interval does
    not hold 0, in per cent of the bare app: two copies of one app differ by a trace (where the
    allocator put them), and enough rounds will always show it. Keep it well under the limit.
    """

    twin: str = "twin"
    planted: str = "planted"
    planted_us: float = 30.0
    planted_tolerance: float = 0.25
    zero_percent: float = 0.5

    def objections(self, rounds: Sequence[Round]) -> list[str]:
        """Why the run is void, in words; empty if it is not."""
        found = []
        twin = bootstrap(rounds, added_us(self.twin))
        allowed = self.zero_percent / 100.0 * bare_us(self.twin)(rounds)
        if not twin.contains(0.0) and abs(twin.value) > allowed:
            found.append(
                f"the bare app against itself reads {twin.value:+.2f} µs "
                f"[{twin.low:+.2f}, {twin.high:+.2f}], not 0"
            )
        planted = bootstrap(rounds, added_us(self.planted))
        near = abs(planted.value - self.planted_us) <= self.planted_tolerance * self.planted_us
        # An interval so wide that it also holds half the planted cost has not seen it.
        seen = planted.low > self.planted_us / 2 and planted.high < self.planted_us * 2
        if not seen or not (near or planted.contains(self.planted_us)):
            found.append(
                f"the planted {self.planted_us:g} µs read {planted.value:.2f} µs "
                f"[{planted.low:.2f}, {planted.high:.2f}]"
            )
        return found
