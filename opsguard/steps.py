"""Checks at the hook points, several as one."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from opsguard.exchange import Exchange, asettled, settled
from opsguard.http import Pending, Response

__all__ = ["Step", "chained"]

Step = Callable[[Exchange], Response | Pending | None]
"""A check at one of the two hook points: an answer to send instead of going on, or None. Ours may
also give what will tell.
"""


def chained(
    first: Step | None, others: Iterable[Step], report: Callable[[str, Exception], None]
) -> Step | None:
    """The steps as one; the first answer counts, a step that raises is reported and skipped.
    `first` is ours, and never raises.
    """
    steps = tuple(others) if first is None else (first, *others)
    if not steps or steps == (first,):
        return first

    def run(exchange: Exchange, at: int = 0) -> Response | Pending | None:
        for number, step in enumerate(steps[at:], at + 1):
            try:
                reply = step(exchange)
            except Exception as error:
                report(f"step:{getattr(step, '__name__', 'step')}", error)
                continue
            if reply is not None and not isinstance(reply, Response) and number < len(steps):
                return _Then(reply, lambda: run(exchange, number))  # noqa: B023 - it returns
            if reply is not None:
                return reply
        return None

    return run


class _Then:
    """What will tell, and the steps behind it."""

    __slots__ = ("_first", "_rest")

    def __init__(self, first: Pending, rest: Callable[[], Response | Pending | None]) -> None:
        self._first = first
        self._rest = rest

    def run(self) -> Response | None:
        return settled(self._first.run() or self._rest())

    async def arun(self) -> Response | None:
        return await asettled(await self._first.arun() or self._rest())
