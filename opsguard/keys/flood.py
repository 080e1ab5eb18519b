"""Who sends wrong credentials too often: counted by address, before anything is hashed."""

from __future__ import annotations

import ipaddress
from threading import Lock

from opsguard.clock import Clock
from opsguard.forks import in_child

__all__ = ["Failures", "source_of"]

WINDOW = 60.0  # seconds
ADDRESSES = 10_000


class Failures:
    """Counts failures of each address in windows of a minute that begin with the first.

    At most `ADDRESSES` are remembered: of more, the ones whose window began first are forgotten.
    An address that goes on in flight at its limit may exceed it by the requests it has in flight.
    For all threads; the lock is held for no call of others, and a fork's child has its own.
    """

    def __init__(self, most: int, clock: Clock) -> None:
        self._most = most
        self._clock = clock
        self._found: dict[str, list[float]] = {}  # window's end, failures
        self._lock = Lock()
        in_child(self, Failures._after_fork)

    def blocked(self, address: str | None) -> float:
        """For how many seconds more this address is refused; 0.0 if it is not."""
        found = self._found.get(source_of(address))
        if found is None or found[1] < self._most:
            return 0.0
        return max(0.0, found[0] - self._clock())

    def count(self, address: str | None) -> bool:
        """One failure more; whether it was the one that reached the limit."""
        source, now = source_of(address), self._clock()
        with self._lock:
            found = self._found.get(source)
            if found is None or found[0] <= now:
                self._found.pop(source, None)
                if len(self._found) >= ADDRESSES:
                    del self._found[next(iter(self._found))]
                found = self._found[source] = [now + WINDOW, 0]
            found[1] += 1
            return found[1] == self._most

    def _after_fork(self) -> None:
        self._lock = Lock()


def source_of(address: str | None) -> str:
    """What is counted together: an IPv4 address, the /64 of an IPv6 address, all that is none."""
    try:
        found = ipaddress.ip_address(address or "")
    except ValueError:
        return "unknown"
    if found.version == 4:
        return str(found)
    mapped = found.ipv4_mapped
    if mapped is not None:
        return str(mapped)
    return f"{ipaddress.IPv6Address(int(found) >> 64 << 64)}/64"
