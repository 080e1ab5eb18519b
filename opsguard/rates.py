"""How much in how long: rates, and the texts that people write for them.

The notation is that of the `limits` package, so that a text can be moved between the two. It is
read here rather than there, because a wrong one must be told to a person, and because the package
takes a zero for an amount.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Final, Literal

__all__ = ["MAX_AMOUNT", "UNITS", "OnStoreError", "Rate", "Strategy", "parse_rates"]

Strategy = Literal["fixed", "sliding", "gcra", "concurrency"]
"""How a rate is counted; `opsguard.limiter.algorithms` says what each one admits."""

OnStoreError = Literal["local", "allow", "deny"]
"""Who decides while a remote store is down: this process alone, or one answer for everybody."""

UNITS: Final = {
    "second": 1,
    "minute": 60,
    "hour": 3600,
    "day": 86_400,
    "month": 2_592_000,
    "year": 31_104_000,
}
"""Seconds of each unit; a month has 30 days and a year 12 months, as in `limits`."""

MAX_AMOUNT: Final = 1_000_000_000
"""Requests in a rate, and units in its period, at most: what a float and Redis count exactly."""

_SEPARATOR = re.compile(r"[,;|]")
_ONE = re.compile(r"\s*(-?[0-9]+)\s*(?:/|\s*per\s*)\s*(-?[0-9]+)?\s*([a-z]+)\s*", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Rate:
    """`amount` requests in `period` seconds. Immutable; shared by threads."""

    amount: int
    """Above 0. For the strategy `concurrency` the most in flight."""
    period: int
    """Whole seconds, above 0. For `concurrency`: after how long a slot nobody returned is free."""
    text: str
    """For people: `10 per 1 minute`, as the `limits` package writes it."""
    burst: int = 0
    """GCRA only: how many may come at once; 0 means `amount`."""

    @property
    def most(self) -> int:
        """The highest cost that can ever be admitted at once."""
        return self.burst or self.amount

    def with_burst(self, burst: int) -> Rate:
        """The same rate with another burst.

        :raises ValueError: for a burst below 1.
        """
        if burst < 1 or burst > MAX_AMOUNT:
            raise ValueError(f"burst must be from 1 to {MAX_AMOUNT}, not {burst}")
        return replace(self, burst=burst)


def parse_rates(text: str) -> tuple[Rate, ...]:
    """The rates that a text names, in its order: `10/minute`, `100 per hour; 5/second`.

    A rate is an amount, `/` or `per`, an optional number of units and a unit from
    :data:`UNITS` (an `s` at its end is fine). Several have `;`, `,` or `|` between them.

    :raises ValueError: with a message for the person who wrote the text.
    """
    if not text.strip():
        raise ValueError("must be a rate like '10/minute', not an empty text")
    return tuple(_rate(piece) for piece in _SEPARATOR.split(text))


def _rate(text: str) -> Rate:
    found = _ONE.fullmatch(text)
    if found is None:
        raise ValueError(
            f"{_shown(text)} is not a rate: write '10/minute', '5 per 2 hours' "
            "or several with ';' between them"
        )
    amount, multiple, word = _number(found[1]), _number(found[2] or "1"), found[3].lower()
    unit = word if word in UNITS else word.removesuffix("s")
    if unit not in UNITS:
        raise ValueError(f"{_shown(text)}: {word!r} is not one of {', '.join(UNITS)}")
    for number, what in ((amount, "amount"), (multiple, "number of units")):
        if not 0 < number <= MAX_AMOUNT:
            raise ValueError(f"{_shown(text)}: the {what} must be from 1 to {MAX_AMOUNT}")
    return Rate(amount, multiple * UNITS[unit], f"{amount} per {multiple} {unit}")


def _number(text: str) -> int:
    # An int of thousands of digits is refused by Python itself, and in other words.
    return int(text) if len(text) < 20 else MAX_AMOUNT + 1


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")
