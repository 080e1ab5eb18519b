"""Two apps that take turns in one worker, and the CPU time of each.

The turns are a few milliseconds, so that a neighbour's burst on a shared machine falls on both
apps, and nobody asks the worker between them, which would cost as much as some requests.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle
from time import process_time_ns


class Turns:
    """Which of two arms serves which request: ABBA, in turns of ``warm`` requests that do not count
    and ``turn`` that do. `starts` is called with the arm whose turn it is.

    Work that an arm has put off and that is done in the other's turn is charged to whom it belongs
    (`late`): as much of it counts as there are requests that count.
    """

    def __init__(
        self,
        arms: tuple[str, str],
        turn: int,
        warm: int,
        starts: Callable[[str], object],
        clock: Callable[[], int] = process_time_ns,
    ) -> None:
        if turn < 1 or warm < 1:
            raise ValueError("a turn has one request at least, and so has what comes before it")
        first, second = arms
        self.spent = dict.fromkeys(arms, 0)
        """CPU nanoseconds of the requests that count."""
        self.counted = dict.fromkeys(arms, 0)
        """How many those are."""
        self._order = cycle((first, second, second, first))
        self._turn = turn
        self._warm = warm
        self._starts = starts
        self._clock = clock
        self._since: int | None = None
        self._left = 0
        self._arm = first
        self._change()

    def arrived(self) -> None:
        """A request is about to be served."""
        if self._left == 0:
            if self._since is None:
                self._since = self._clock()
                self._left = self._turn
            else:
                self.spent[self._arm] += self._clock() - self._since
                self.counted[self._arm] += self._turn
                self._change()
        self._left -= 1

    def late(self, arm: str, spent: int) -> None:
        """In the last so many nanoseconds something was done that this arm had put off."""
        if self._since is None or arm == self._arm:
            return
        self.spent[self._arm] -= spent
        if arm in self.spent:
            self.spent[arm] += spent

    def _change(self) -> None:
        self._arm = next(self._order)
        self._starts(self._arm)
        self._since = None
        self._left = self._warm
