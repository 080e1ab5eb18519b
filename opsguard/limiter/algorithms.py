"""The strategies, as pure functions of (state, time, cost).

What each one admits of a rate of N in a period P:

`fixed`
    N in each window, so up to 2 N in a stretch of P that has a border in it.
`sliding`
    The estimate never exceeds N: what was admitted in this window, and of the window before
    the share that a stretch of P that ends now still covers, as if it had come evenly. In one
    window never more than N.
`gcra`
    The generic cell rate algorithm (ITU-T I.371): `burst` at once (N if it is not given), and
    N in P for ever. In any stretch of t seconds at most ``burst + t * N / P``.
`concurrency`
    N in flight. A slot that nobody returned is free again after P.

Each is made for one rate, which pays for its arithmetic once, and consists of plain functions: they
neither read a clock nor keep anything. Times are seconds of a monotonic clock; `passed` is what
has passed of the current window. A state is an int, a float or a tuple: small, immutable, and
nothing that the garbage collector would have to follow.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NamedTuple

from opsguard.rates import Rate, Strategy

__all__ = ["ALGORITHMS", "Algorithm", "Outcome", "concurrency", "fixed", "gcra", "sliding"]

Outcome = tuple[bool, Any, int, float, float]
"""Allowed; the state afterwards; remaining; seconds until the quota is whole; seconds to wait."""

_BITS = 30
_COUNT: Final = (1 << _BITS) - 1  # above rates.MAX_AMOUNT
# What a sum of floats may be off by. A rate is met to a millionth of a request and, in GCRA, to a
# nanosecond, so that whoever waits as long as told is admitted.
_REQUESTS = 1e-6
_SECONDS = 1e-9


class Algorithm(NamedTuple):
    """One strategy for one rate."""

    empty: Any
    """The state of a bucket that nobody has used."""
    span: float
    """The length of its window. A state untouched for one whole window and the rest of the one
    before it is worth as much as `empty`."""
    decide: Callable[[Any, float, float, int], Outcome]
    """(state, passed, now, cost) to the outcome. After a refusal the state is worth what it was
    before; it is another object only if it was mended, after a jump of the clock."""
    carry: Callable[[Any], Any]
    """The state at the beginning of the next window."""
    give_back: Callable[[Any, float, int], Any]
    """(state, now, cost) to the state without that cost."""
    used: Callable[[Any, float, float], float]
    """(state, passed, now) to the used share of the quota, from 0 to 1."""


def fixed(rate: Rate) -> Algorithm:
    """The state is the count in this window."""
    amount, period = rate.amount, float(rate.period)

    def decide(count: int, passed: float, now: float, cost: int) -> Outcome:
        used = count + cost
        left = period - passed
        if used > amount:
            return False, count, amount - count, left, left
        return True, used, amount - used, left, 0.0

    def give_back(count: int, now: float, cost: int) -> int:
        return max(count - cost, 0)

    def used(count: int, passed: float, now: float) -> float:
        return count / amount

    return Algorithm(0, period, decide, lambda count: 0, give_back, used)


def sliding(rate: Rate) -> Algorithm:
    """The state is the count in this window and, 30 bits higher, the one in the window before."""
    amount, period = rate.amount, float(rate.period)
    most = amount + _REQUESTS

    def decide(state: int, passed: float, now: float, cost: int) -> Outcome:
        if state > _COUNT:
            before, count = state >> _BITS, state & _COUNT
            estimate = count + before * (1.0 - passed / period)
        else:
            before, count, estimate = 0, state, state
        after = estimate + cost
        if after > most:
            left = max(int(most - estimate), 0)
            whole = (2.0 if count else 1.0) * period - passed
            return False, state, left, whole, wait(before, count, passed, cost)
        return True, state + cost, int(most - after), 2.0 * period - passed, 0.0

    def wait(before: int, count: int, passed: float, cost: int) -> float:
        """Until what the window before still weighs leaves room for the cost."""
        room = amount - cost - count
        if cost > amount:
            return period  # never, in truth; a limiter does not ask
        if room >= 0:
            return max(period * (1.0 - room / before) - passed, _SECONDS)
        # Not in this window any more: in the next one this count is the one before.
        return period - passed + period * max(1.0 - (amount - cost) / count, 0.0)

    def carry(state: int) -> int:
        return (state & _COUNT) << _BITS

    def give_back(state: int, now: float, cost: int) -> int:
        now_given = min(cost, state & _COUNT)  # the rest was taken in the window before
        before = max((state >> _BITS) - (cost - now_given), 0)
        return (before << _BITS) + (state & _COUNT) - now_given

    def used(state: int, passed: float, now: float) -> float:
        return ((state & _COUNT) + (state >> _BITS) * (1.0 - passed / period)) / amount

    return Algorithm(0, period, decide, carry, give_back, used)


def gcra(rate: Rate) -> Algorithm:
    """The state is the theoretical arrival time: when the bucket will be whole again."""
    interval = rate.period / rate.amount
    whole = interval * rate.most

    def decide(arrival: float, passed: float, now: float, cost: int) -> Outcome:
        # A clock that was set back must not keep anybody out for longer than a whole bucket.
        arrival = min(max(arrival, now), now + whole)
        debt = arrival - now + interval * cost
        if debt > whole + _SECONDS:
            left = int((whole - (arrival - now)) / interval + _REQUESTS)
            return False, arrival, left, arrival - now, debt - whole
        left = int((whole - debt) / interval + _REQUESTS)
        return True, arrival + interval * cost, left, debt, 0.0

    def carry(arrival: float) -> float:
        return arrival

    def give_back(arrival: float, now: float, cost: int) -> float:
        return arrival - interval * cost

    def used(arrival: float, passed: float, now: float) -> float:
        return min(max(arrival - now, 0.0) / whole, 1.0)

    return Algorithm(float("-inf"), whole, decide, carry, give_back, used)


def concurrency(rate: Rate) -> Algorithm:
    """The state is when each slot in use is given up for lost, the earliest first.

    When a slot will be returned nobody knows; the wait that a refusal names is one second.
    """
    amount, period = rate.amount, float(rate.period)

    def held(slots: tuple[float, ...], now: float) -> tuple[float, ...]:
        if slots and (slots[0] <= now or slots[-1] > now + period):
            return tuple(min(end, now + period) for end in slots if end > now)
        return slots

    def decide(slots: tuple[float, ...], passed: float, now: float, cost: int) -> Outcome:
        slots = held(slots, now)
        left = amount - len(slots)
        if cost > left:
            return False, slots, left, slots[-1] - now if slots else 0.0, 1.0
        return True, slots + (now + period,) * cost, left - cost, period, 0.0

    def carry(slots: tuple[float, ...]) -> tuple[float, ...]:
        return slots

    def give_back(slots: tuple[float, ...], now: float, cost: int) -> tuple[float, ...]:
        # The slots have no names. Without the earliest one, what is held counts rather too long
        # than too short.
        return held(slots, now)[cost:]

    def used(slots: tuple[float, ...], passed: float, now: float) -> float:
        return len(held(slots, now)) / amount

    return Algorithm((), period, decide, carry, give_back, used)


ALGORITHMS: Final[dict[Strategy, Callable[[Rate], Algorithm]]] = {
    "fixed": fixed,
    "sliding": sliding,
    "gcra": gcra,
    "concurrency": concurrency,
}
