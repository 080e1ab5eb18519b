"""What a client is told: the headers of a decision, and the answer 429.

Two families of headers say the same: `X-RateLimit-Limit`, `-Remaining` and `-Reset` (epoch
seconds), which clients know, and the structured fields `RateLimit-Policy` and `RateLimit` of
draft-ietf-httpapi-ratelimit-headers-10 (RFC 9651), which are to become the standard. `reset` and
`t` say when the quota is whole again. The limit and the rest are those of the tightest rate of a
decision; the policy header names all of its rates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil
from typing import Final

from opsguard.clock import Clock
from opsguard.http import Response
from opsguard.limiter.rates import Rate, Strategy
from opsguard.problems import problem

__all__ = ["TITLES", "Headers", "Say", "fixed_texts", "refusal", "say_with", "structured_name"]

TITLES: Final = (
    *("X-RateLimit-Limit", "X-RateLimit-Remaining", "X-RateLimit-Reset"),
    *("RateLimit-Policy", "RateLimit"),
)

Headers = tuple[tuple[str, str], ...]
Say = Callable[[int, float], Headers]
"""(remaining, seconds until the quota is whole) to the headers."""


def say_with(quotas: Sequence[tuple[str, Rate, Strategy]], tightest: int, wall: Clock) -> Say:
    """The function that makes the headers of a decision about `quotas` (name, rate, strategy), of
    which the one at `tightest` decided.
    """
    most, every, start = fixed_texts(quotas, tightest)
    limit, policies = (TITLES[0], most), (TITLES[3], every)
    remain, both = TITLES[1], TITLES[4]

    # The moment stays the same for as long as a window, and the seconds for one: what is made
    # of them is kept. Each is one value that is replaced as a whole, so threads may share it.
    moment = (0.0, ("", ""))
    tail = (-1.0, "")

    def say(remaining: int, reset: float) -> Headers:
        nonlocal moment, tail
        at, seconds = -(-(wall() + reset) // 1.0), -(-reset // 1.0)  # ceil, without a call
        known, whole = moment
        if known != at:
            whole = (TITLES[2], f"{at:.0f}")
            moment = (at, whole)
        known, end = tail
        if known != seconds:
            end = f";t={seconds:.0f}"
            tail = (seconds, end)
        left = f"{remaining}"
        return (
            limit,
            (remain, left),
            whole,
            policies,
            (both, start + left + end),
        )

    return say


def fixed_texts(
    quotas: Sequence[tuple[str, Rate, Strategy]], tightest: int
) -> tuple[str, str, str]:
    """What the headers of all decisions have in common: the limit, the policies, and the start of
    `RateLimit`.
    """
    name, rate, _ = quotas[tightest]
    every = ", ".join(_policy(*quota) for quota in quotas)
    return str(rate.most), every, f"{structured_name(name)};r="


def refusal(
    error: str, message: str, request_id: str, wait: float | None, headers: Headers
) -> Response:
    """The answer 429. `wait` is in seconds; None if waiting does not help, as the request costs
    more than its limit: then nothing tells the client to come again.
    """
    if wait is None:
        return problem(429, error, message, request_id, headers=headers)
    # A wait that is a whole number but for the rounding of floats is that number.
    seconds = max(ceil(wait - 1e-6), 1)
    return problem(
        429,
        error,
        message,
        request_id,
        headers=(("Retry-After", str(seconds)), *headers),
        retry_after=seconds,
    )


def structured_name(name: str) -> str:
    """A structured-field string: printable ASCII between quotes (RFC 9651, 3.3.3)."""
    plain = "".join(one if " " <= one <= "~" else "?" for one in name)
    return '"' + plain.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _policy(name: str, rate: Rate, strategy: Strategy) -> str:
    if strategy == "concurrency":
        return f'{structured_name(name)};q={rate.most};qu="concurrent-requests"'
    # A burst is whole again in its own time, not in that of the rate.
    window = ceil(rate.most * rate.period / rate.amount) if strategy == "gcra" else rate.period
    return f"{structured_name(name)};q={rate.most};w={window}"
