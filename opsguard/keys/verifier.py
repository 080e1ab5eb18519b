"""From a credential to an identity: cached, in one flight, in the same time for every wrong one.

What is remembered is remembered by the credential itself. Hashing it first would cost more than
all the rest, and hide nothing: the process holds the credential anyway in the request that it
serves, the pepper beside it, and both for longer. A dict is no oracle either: it compares texts
only after their full hashes, which are keyed anew in each process, have been found equal. The
accelerator looks into the same dict, for what is believed; all else (unknown, wrong, revoked,
expired) goes on to the same Python code after that one look.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from hmac import compare_digest
from typing import Any

from opsguard.clock import Clock, elapsed
from opsguard.forks import in_child
from opsguard.keys.fixed import FixedKeys
from opsguard.keys.identity import MASTER, Identity, KeyRecord
from opsguard.keys.minting import LONGEST, is_shaped, sealed
from opsguard.keys.stores import KeyStoreDown, Store

__all__ = ["Verifier"]

GOOD_AT_MOST = 50_000
BAD_AT_MOST = 4_096
BAD_FOR = 5.0  # seconds; a key made in another process may have been tried too early
DOWN_FOR = 1.0  # seconds that a store which failed is left alone
PATIENCE = 5.0  # seconds that one look-up is waited for
TOUCH_EVERY = 300.0  # seconds between two notes of a key's last use


class Verifier:
    """Verifies credentials. For all threads, tasks and loops; a fork's child starts with the
    cache of its parent. Starts nothing.

    `cache` is for how many seconds a verified key is believed without asking the store. `clock`
    is monotonic, `wall` the time that keys expire by. `report(site, error)` hears of faults that
    are nobody's business but ours.
    """

    def __init__(
        self,
        store: Store,
        fixed: FixedKeys,
        pepper: bytes,
        *,
        master: str = "",
        cache: float,
        clock: Clock,
        wall: Clock,
        report: Callable[[str, BaseException | None], None],
    ) -> None:
        self._store = store
        self._fixed = fixed
        self._pepper = pepper
        self._master = sealed(pepper, master) if master else None
        self._cache = cache
        self._clock = clock
        self._wall = wall
        self._report = report
        self._good: dict[str, tuple[Identity, float]] = {}
        self._bad: dict[str, float] = {}
        self._forgotten = 0
        self._down_until = float("-inf")
        self._begin()
        in_child(self, Verifier._begin)

    def cached(self, credential: str) -> Identity | None:
        """Who a credential belongs to that was verified a short time ago; else None.

        CPU-only, and the path of nearly every request.
        """
        found = self._good.get(credential)
        if found is not None and found[1] > self._clock():
            return found[0]
        return None

    def refused(self, credential: str) -> bool:
        """Whether this credential was found wrong a short time ago. CPU-only."""
        until = self._bad.get(credential)
        return until is not None and until > self._clock()

    @property
    def believed(self) -> dict[str, tuple[Identity, float]] | None:
        """What `cached` reads: whom a credential belongs to, and until when that is believed. For
        the accelerator, which reads it too, and knows one clock; None with another.
        """
        return self._good if self._clock is elapsed else None

    @property
    def down(self) -> bool:
        """Whether the store failed a moment ago."""
        return self._clock() < self._down_until

    def was_good(self, credential: str) -> bool:
        """Whether this credential was verified once, be it too long ago to be believed."""
        return credential in self._good

    def verify(self, credential: str) -> Identity | None:
        """Who the credential belongs to; None for one that is unknown, wrong, revoked or expired.

        :raises KeyStoreDown: if that cannot be told now.
        """
        known = self.cached(credential)
        if known is not None or self._hopeless(credential):
            return known
        flight, ours = self._join(credential)
        if ours:
            self._fly(credential, flight)
        return self._landed(flight)

    async def averify(self, credential: str) -> Identity | None:
        """`verify` for a coroutine: the store is asked in a thread."""
        known = self.cached(credential)
        if known is not None or self._hopeless(credential):
            return known
        flight, ours = self._join(credential)
        if ours:
            self._fly_apart(credential, flight)
        waiter = asyncio.wrap_future(flight)
        waiter.add_done_callback(_heard)
        done, _ = await asyncio.wait([waiter], timeout=PATIENCE)
        if not done:
            raise self._late()
        return self._landed(flight)

    def forget(self, key_id: str) -> None:
        """Believe nothing of this key that was found out before now."""
        with self._lock:
            self._forgotten += 1
            for credential, (identity, _) in list(self._good.items()):
                if identity.key_id == key_id:
                    del self._good[credential]

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._forgotten += 1
            self._good.clear()
            self._bad.clear()

    def close(self) -> None:
        """Close the store; the next look-up opens it again."""
        try:
            self._store.close()
        except Exception as error:
            self._report("keys", error)

    def _hopeless(self, credential: str) -> bool:
        if not credential or len(credential) > LONGEST or not credential.isascii():
            return True
        return self.refused(credential)

    def _join(self, credential: str) -> tuple[Future[Identity | None], bool]:
        """The look-up of this credential that is under way, and whether the caller has to do it."""
        with self._lock:
            flight = self._flights.get(credential)
            if flight is not None:
                return flight, False
            flight = self._flights[credential] = Future()
            flight.set_running_or_notify_cancel()  # from now on no waiter can cancel it
            return flight, True

    def _fly_apart(self, credential: str, flight: Future[Identity | None]) -> None:
        """`_fly` in a thread; whoever is cancelled meanwhile, the others get the answer."""
        try:
            thread = asyncio.get_running_loop().run_in_executor(None, self._fly, credential, flight)
        except RuntimeError:  # the loop is being shut down
            self._land(credential)
            flight.set_exception(KeyStoreDown("the server stops"))
        else:
            thread.add_done_callback(_heard)

    def _fly(self, credential: str, flight: Future[Identity | None]) -> None:
        try:
            identity = self._look_up(credential)
        except KeyStoreDown as error:
            self._land(credential)
            flight.set_exception(error)
        except BaseException as error:
            self._land(credential)
            flight.set_exception(KeyStoreDown("the look-up was broken off"))
            if not isinstance(error, Exception):
                raise
            self._report("keys", error)
        else:
            self._land(credential)
            flight.set_result(identity)

    def _land(self, credential: str) -> None:
        with self._lock:
            self._flights.pop(credential, None)

    def _landed(self, flight: Future[Identity | None]) -> Identity | None:
        try:
            return flight.result(PATIENCE)
        except TimeoutError:
            raise self._late() from None
        except KeyStoreDown as error:
            raise KeyStoreDown(*error.args) from error  # each waiter raises its own

    def _late(self) -> KeyStoreDown:
        self._down_until = self._clock() + DOWN_FOR
        return KeyStoreDown("the key store did not answer in time")

    def _look_up(self, credential: str) -> Identity | None:
        forgotten, now, wall = self._forgotten, self._clock(), self._wall()
        digest = sealed(self._pepper, credential)
        if self._master is not None and compare_digest(digest, self._master):
            self._believe(credential, MASTER, now + self._cache, forgotten)
            return MASTER
        record = self._fixed.find(digest)
        touched = False
        if not _counts(record, digest, wall) and is_shaped(credential):
            record = self._ask(digest, now)
            touched = True
        if record is None or not _counts(record, digest, wall):
            self._doubt(credential, now + BAD_FOR)
            return None
        until = now + self._cache
        if record.expires is not None:
            until = min(until, now + record.expires - wall)
        identity = record.identity
        self._believe(credential, identity, until, forgotten)
        if touched and wall - (record.last_used or 0.0) >= TOUCH_EVERY:
            self._touch(record.key_id, wall)
        return identity

    def _ask(self, digest: bytes, now: float) -> KeyRecord | None:
        if now < self._down_until:
            raise KeyStoreDown("the key store failed a moment ago")
        try:
            return self._store.find(digest)
        except Exception as error:
            self._down_until = self._clock() + DOWN_FOR
            self._report("keys", error)
            raise KeyStoreDown(f"the key store failed: {type(error).__name__}") from error

    def _touch(self, key_id: str, wall: float) -> None:
        try:
            self._store.touch(key_id, wall)
        except Exception:  # a busy or read-only store: the next look-up tries again
            return

    def _believe(self, credential: str, identity: Identity, until: float, forgotten: int) -> None:
        with self._lock:
            if forgotten != self._forgotten:
                return  # revoked while it was looked up: what the store said may be old
            self._good.pop(credential, None)
            if len(self._good) >= GOOD_AT_MOST:
                del self._good[next(iter(self._good))]
            self._good[credential] = (identity, until)

    def _doubt(self, credential: str, until: float) -> None:
        with self._lock:
            self._good.pop(credential, None)
            self._bad.pop(credential, None)
            if len(self._bad) >= BAD_AT_MOST:
                del self._bad[next(iter(self._bad))]
            self._bad[credential] = until

    def _begin(self) -> None:
        """Locks and look-ups of this process; another thread of the parent may hold those."""
        self._lock = threading.Lock()
        self._flights: dict[str, Future[Identity | None]] = {}


def _counts(record: KeyRecord | None, digest: bytes, wall: float) -> bool:
    """Whether a record is that of this digest, and alive. It looks at everything in any case."""
    if record is None:
        return False
    return compare_digest(record.digest, digest) & record.alive(wall)


def _heard(future: asyncio.Future[Any]) -> None:
    """Take note of an error that nobody may be there to hear any more."""
    if not future.cancelled():
        future.exception()
