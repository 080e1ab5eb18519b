"""What answers for a store that is down: a store of this process, or one answer for all.

What the local store took is given back to it. For a concurrency slot that is remembered; other
charges are given back at once if at all, and go where a decision would go now.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Final

from opsguard.limiter.stores import Charge, OnStoreError, Store, Verdict

__all__ = ["StandIn"]

_RETRY_AFTER: Final = 1.0
"""Seconds that a client is told to wait while the store is down and policies deny."""


class StandIn:
    """`local`, or one answer for all. Nothing here raises. Thread-safe."""

    def __init__(self, local: Store, report: Callable[[str, BaseException], None]) -> None:
        self._local = local
        self._report = report
        self._elsewhere = _Slots()

    @property
    def holds(self) -> bool:
        """Whether there are slots that the store itself does not know of."""
        return self._elsewhere.any

    def take(self, charges: Sequence[Charge], on_error: OnStoreError) -> Verdict:
        if on_error == "deny":
            return Verdict(False, 0, _RETRY_AFTER, _RETRY_AFTER, 0, stood_in=True)
        if on_error == "local":
            try:
                verdict = self._local.take(charges)
            except Exception as error:
                self._report("limiter.local", error)
            else:
                if verdict.allowed:
                    self._elsewhere.hold(charges, locally=True)
                return verdict._replace(stood_in=True)
        self._elsewhere.hold(charges, locally=False)
        return Verdict(True, charges[0].rate.amount, 0.0, 0.0, 0, stood_in=True)

    def give_back(self, charges: Sequence[Charge], *, down: bool) -> list[Charge]:
        """Give `local` its own back, and while the store is `down` what is not in flight; what is
        left is the store's.
        """
        here, there = [], []
        for charge in charges:
            locally = self._elsewhere.release(charge)
            if locally is None:
                locally = down and charge.strategy != "concurrency"
                if not locally:
                    there.append(charge)
            if locally:
                here.append(charge)
        if here:
            try:
                self._local.give_back(here)
            except Exception as error:
                self._report("limiter.local", error)
        return there

    def after_fork(self) -> None:
        """In the child: what is held is the parent's."""
        self._elsewhere = _Slots()


class _Slots:
    """Concurrency slots that the store does not know of, and whether `local` does."""

    def __init__(self) -> None:
        self._held: dict[str, list[bool]] = {}
        self._lock = threading.Lock()

    @property
    def any(self) -> bool:
        return bool(self._held)

    def hold(self, charges: Sequence[Charge], *, locally: bool) -> None:
        for charge in charges:
            if charge.strategy == "concurrency":
                with self._lock:
                    self._held.setdefault(charge.key, []).append(locally)

    def release(self, charge: Charge) -> bool | None:
        """Whether `local` holds a slot of that bucket for us; None if the store does."""
        if not self._held:
            return None
        with self._lock:
            held = self._held.get(charge.key)
            if not held:
                return None
            locally = held.pop()
            if not held:
                del self._held[charge.key]
            return locally
