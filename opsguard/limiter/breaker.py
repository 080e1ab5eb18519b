"""A circuit breaker: a store that fails again and again is left alone, and asked now and then.

It has three states (M. Nygard, *Release It!*, "Circuit Breaker"): closed, everybody may ask; open,
nobody; half-open, one may, as a probe. The rules are pure functions of a frozen state and the time;
:class:`Breaker` puts a lock around them.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from enum import Enum
from typing import Final

from opsguard.clock import Clock

__all__ = ["CLOSED", "Breaker", "Permit", "State", "ask", "failed"]


class Permit(Enum):
    """What the breaker says to somebody who wants to ask the store."""

    ASK = "ask"
    PROBE = "probe"
    """Ask, and you are the only one: what becomes of it decides for all."""
    WAIT = "wait"


@dataclass(frozen=True, slots=True)
class State:
    """What a breaker remembers. `probe_at` counts once the failures have reached the threshold."""

    failures: int = 0
    """In a row."""
    probe_at: float = 0.0
    """When the next probe may go; a probe that never reports back is replaced by then."""


CLOSED: Final = State()


def ask(state: State, now: float, *, threshold: int, delay: float) -> tuple[State, Permit]:
    """May somebody ask now? Half-open is an open state whose time has come: the first one to come
    is the probe, and puts the time of the next one off by `delay`.
    """
    if state.failures < threshold:
        return state, Permit.ASK
    if now < state.probe_at:
        return state, Permit.WAIT
    return State(state.failures, now + delay), Permit.PROBE


def failed(state: State, now: float, *, delay: float) -> State:
    """The store did not answer. (When it did, the state is :data:`CLOSED`, whatever it was.)"""
    return State(state.failures + 1, now + delay)


class Breaker:
    """The state of one store, shared by threads. Holds its lock for no I/O.

    It opens after `threshold` failures in a row and lets one probe pass every `delay` seconds of
    `clock`, which is monotonic. So it closes within `delay`, plus the time of one probe, of the
    store's return.
    """

    def __init__(self, *, clock: Clock, threshold: int = 5, delay: float = 1.0) -> None:
        self._clock = clock
        self._threshold = threshold
        self._delay = delay
        self._lock = threading.Lock()
        self._state = CLOSED

    @property
    def open(self) -> bool:
        """Whether the store is being left alone."""
        return self._state.failures >= self._threshold

    def ask(self) -> Permit:
        """May I ask the store now?"""
        state = self._state
        if state is CLOSED:
            return Permit.ASK
        now = self._clock()
        if state.failures >= self._threshold and now < state.probe_at:
            return Permit.WAIT
        with self._lock:
            self._state, permit = ask(
                self._state, now, threshold=self._threshold, delay=self._delay
            )
            return permit

    def succeeded(self) -> None:
        """The store answered."""
        if self._state is not CLOSED:
            with self._lock:
                self._state = CLOSED

    def failed(self) -> None:
        """The store did not answer."""
        with self._lock:
            self._state = failed(self._state, self._clock(), delay=self._delay)

    def after_fork(self) -> None:
        """In the child: another thread of the parent may have held the lock."""
        self._lock = threading.Lock()
