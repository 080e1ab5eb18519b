"""Stores by their URI: Redis and Valkey are ours, any other storage is one of `limits`.

| URI                                             | store       | strategies                 |
|-------------------------------------------------|-------------|----------------------------|
| `redis://`, `rediss://`, `unix://`,             | RedisStore  | all, several at once       |
| `valkey://`, `valkeys://`                       |             |                            |
| `redis+cluster://`, `redis+sentinel://`, with   | LimitsStore | `fixed`, `sliding`         |
| TLS `rediss+cluster://` and so on, all of       |             |                            |
| valkey too, `memcached://`, `mongodb://`        |             |                            |
| a storage of one's own, registered with         | LimitsStore | `fixed`; `sliding` if it   |
| `limits`                                        |             | has a window for that      |
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Generator, Sequence
from contextlib import suppress
from hashlib import blake2b
from importlib.util import find_spec
from typing import Any, Final, TypeVar

import limits.aio.storage
import limits.aio.strategies
import limits.storage
import limits.strategies

from opsguard.clock import Clock, elapsed, wall
from opsguard.forks import in_child
from opsguard.limiter.drivers import Address, read_uri
from opsguard.limiter.loops import PerLoop
from opsguard.limiter.rates import Rate
from opsguard.limiter.stores import Charge, RemoteStore, StoreDown, Strategy, Verdict

__all__ = ["LimitsStore", "remote_store"]

T = TypeVar("T")
Step = Callable[[dict[Strategy, Any]], Any]
"""A question for one of the strategies of `limits`, by the names that they have here."""

_OURS: Final = {
    "redis": "redis",
    "rediss": "rediss",
    "unix": "unix",
    "redis+unix": "unix",
    "valkey": "redis",
    "valkeys": "rediss",
    "valkey+unix": "unix",
}
"""Schemes that RedisStore serves, and how the `redis` package writes them."""


def remote_store(uri: str, *, timeout: float) -> RemoteStore:
    """The store for a URI; `timeout` is the most that one decision may take, in seconds.

    Connects to nothing.

    :raises ValueError: for a URI that names no store, or one whose driver is not installed.
    """
    scheme, separator, rest = uri.partition("://")
    if not separator:
        raise ValueError("must be a URI like redis://localhost:6379")
    if scheme not in _OURS:
        return LimitsStore(uri, timeout=timeout)
    if find_spec("redis") is None:
        raise ValueError(
            f"a {scheme}:// store needs the redis package: install the extra `redis` of "
            "opsguard-toolkit"
        )
    from opsguard.limiter.redis import RedisStore

    return RedisStore(f"{_OURS[scheme]}://{rest}", timeout=timeout)


class LimitsStore:
    """Quotas in a storage of the `limits` package, counted by its own strategies.

    `fixed` is its fixed window; `sliding` its sliding window counter, or its moving window where
    there is no counter. The storage's driver is a package of its own. Thread-safe, fork-safe; there
    is a client for each event loop. Nothing connects before the first decision.

    Less exact than Redis: several charges are tested first and taken then, one after another. Two
    requests at the same moment can both pass the test; what the later one has taken, before one of
    its charges refuses it, stays taken. And `give_back` gives nothing back, as no storage can: a
    request that a later stage refuses has been counted.

    :raises ValueError: for a scheme that `limits` does not know, and for `memory://`.
    """

    blocking = True

    def __init__(
        self,
        uri: str,
        *,
        timeout: float = 0.025,
        clock: Clock = elapsed,
        epoch: Clock = wall,
    ) -> None:
        scheme = uri.partition("://")[0]
        if scheme == "memory" or scheme.startswith("async+"):
            raise ValueError(
                f"{scheme}:// is not a store here: leave the store out, or name 'local', for limits"
                " in this process; for others write the scheme without 'async+'"
            )
        self._address = address = read_uri(uri)
        self.strategies = _strategies(address)
        if not (self._installed(False) or self._installed(True)):
            raise ValueError(
                f"a {scheme}:// store needs the package {address.driver.sync}, or in async apps "
                f"{address.driver.asynchronous}"
            )
        self._timeout = timeout
        self._clock = clock
        self._epoch = epoch
        self._items: dict[Rate, limits.RateLimitItem] = {}
        self._limiters: dict[Strategy, Any] | None = None
        self._opening = threading.Lock()
        self._loops = PerLoop(self._aopen, _aclose)
        self._calls: set[asyncio.Task[Any]] = set()
        in_child(self, LimitsStore._after_fork)

    def __repr__(self) -> str:
        return f"<LimitsStore at {self._address.scheme}://>"

    def check_driver(self, *, asynchronous: bool) -> None:
        """Is the driver there that an app of this kind uses? The start only asks for one of both.

        :raises ValueError: if not, naming the package.
        """
        if not self._installed(asynchronous):
            package = self._address.driver.package(asynchronous=asynchronous)
            raise ValueError(
                f"a {self._address.scheme}:// store needs the package {package} in this app"
            )

    def take(self, charges: Sequence[Charge]) -> Verdict:
        """Decide. Blocks for two round trips a charge, one more for each of several.

        :raises StoreDown: if there was no usable answer in time. What was taken stays taken.
        """
        flow = self._taking(charges)
        # A call may take half of the time, and none begins in the second half.
        until = self._clock() + self._timeout / 2
        try:
            limiters = self._limiters or self._open()
            step = next(flow)
            while True:
                answer = step(limiters)
                if self._clock() > until:
                    raise TimeoutError("no answer in time")
                step = flow.send(answer)
        except StopIteration as done:
            verdict: Verdict = done.value
            return verdict
        except Exception as error:
            raise StoreDown(f"{type(error).__name__}: {error}") from error

    async def atake(self, charges: Sequence[Charge]) -> Verdict:
        # Who loses patience leaves the call to itself: drivers of many makers are not trusted to be
        # cancelled in the middle of a reply and to serve the next client well.
        call = asyncio.create_task(self._converse(self._taking(charges)))
        self._calls.add(call)
        call.add_done_callback(self._called)
        try:
            async with asyncio.timeout(self._timeout):
                return await asyncio.shield(call)
        except Exception as error:
            raise StoreDown(f"{type(error).__name__}: {error}") from error

    def give_back(self, charges: Sequence[Charge]) -> None:
        """Nothing: see the class."""

    async def agive_back(self, charges: Sequence[Charge]) -> None:
        """Nothing: see the class."""

    def close(self) -> None:
        """Forget the client of the threads; a later decision makes another."""
        limiters, self._limiters = self._limiters, None
        for client in _clients(limiters or {}):
            with suppress(Exception):
                client.close()

    async def aclose(self) -> None:
        await self._loops.aclose()
        self.close()

    def _taking(self, charges: Sequence[Charge]) -> Generator[Step, Any, Verdict]:
        asked = [_Asked(charge, self._item(charge.rate)) for charge in charges]
        # A fixed window counts what it refuses. One more after the last does not matter there.
        if len(asked) > 1 or asked[0].charge.cost > 1:
            for index, one in enumerate(asked):
                if not (yield one.test):
                    return self._refusal(index, one.charge, (yield one.stats))
        for index, one in enumerate(asked):
            if not (yield one.hit):
                return self._refusal(index, one.charge, (yield one.stats))
        tightest, left, reset = 0, -1, 0.0
        for index, one in enumerate(asked):
            at, remaining = yield one.stats
            if left < 0 or remaining < left:
                tightest, left, reset = index, max(0, int(remaining)), self._until(at, one.charge)
        return Verdict(True, left, reset, 0.0, tightest)

    def _refusal(self, index: int, charge: Charge, stats: tuple[float, int]) -> Verdict:
        at, remaining = stats
        reset = self._until(at, charge)
        return Verdict(False, max(0, int(remaining)), reset, reset or 1.0, index)

    def _until(self, at: float, charge: Charge) -> float:
        """Seconds until a time of the storage's clock, which may be off."""
        return min(max(0.0, at - self._epoch()), charge.rate.period)

    def _item(self, rate: Rate) -> limits.RateLimitItem:
        item = self._items.get(rate)
        if item is None:
            item = self._items[rate] = limits.RateLimitItemPerSecond(
                rate.amount, rate.period, namespace="opsguard"
            )
        return item

    async def _converse(self, flow: Generator[Step, Any, T]) -> T:
        limiters = await self._loops.get()
        try:
            step = next(flow)
            while True:
                step = flow.send(await step(limiters))
        except StopIteration as done:
            result: T = done.value
            return result

    def _called(self, call: asyncio.Task[Any]) -> None:
        self._calls.discard(call)
        if not call.cancelled():
            call.exception()  # has been looked at: who asked may be gone

    def _installed(self, asynchronous: bool) -> bool:
        return self._address.driver.installed(asynchronous=asynchronous)

    def _open(self) -> dict[Strategy, Any]:
        with self._opening:  # threads that come at the same time share one client
            if self._limiters is None:
                self.check_driver(asynchronous=False)
                options = self._address.options(self._timeout / 2)
                storage = limits.storage.storage_from_string(self._address.uri, **options)
                self._limiters = _limiters(storage, limits.strategies.STRATEGIES)
            return self._limiters

    def _aopen(self) -> dict[Strategy, Any]:
        self.check_driver(asynchronous=True)
        options = self._address.aoptions()
        storage = limits.storage.storage_from_string(f"async+{self._address.uri}", **options)
        return _limiters(storage, limits.aio.strategies.STRATEGIES)

    def _after_fork(self) -> None:
        self._limiters = None
        self._opening = threading.Lock()
        self._loops.after_fork()


class _Asked:
    """The three questions about a charge."""

    def __init__(self, charge: Charge, item: limits.RateLimitItem) -> None:
        # A key that any storage takes: memcached, for one, has no blanks in keys.
        key = blake2b(charge.key.encode(), digest_size=16).hexdigest()
        strategy, cost = charge.strategy, charge.cost
        self.charge = charge
        self.test: Step = lambda limiters: limiters[strategy].test(item, key, cost=cost)
        self.hit: Step = lambda limiters: limiters[strategy].hit(item, key, cost=cost)
        self.stats: Step = lambda limiters: limiters[strategy].get_window_stats(item, key)


def _strategies(address: Address) -> frozenset[Strategy]:
    """What a storage can do, as its class says it."""
    scheme = address.uri.partition("://")[0]
    storage = limits.storage.SCHEMES.get(scheme)  # type: ignore[attr-defined]
    if storage is None:
        raise ValueError(f"{address.scheme}:// is no storage that the limits package knows")
    windows = ("acquire_sliding_window_entry", "acquire_entry")
    if any(hasattr(storage, window) for window in windows):
        return frozenset(("fixed", "sliding"))
    return frozenset(("fixed",))


def _limiters(storage: Any, strategies: Any) -> dict[Strategy, Any]:
    """The strategies of `limits` on a storage, by the names that they have here."""
    limiters: dict[Strategy, Any] = {"fixed": strategies["fixed-window"](storage)}
    if hasattr(storage, "acquire_sliding_window_entry"):
        limiters["sliding"] = strategies["sliding-window-counter"](storage)
    elif hasattr(storage, "acquire_entry"):
        limiters["sliding"] = strategies["moving-window"](storage)
    return limiters


def _clients(limiters: dict[Strategy, Any]) -> list[Any]:
    """The driver's clients of a storage, where it keeps them in one of the usual places."""
    if not limiters:
        return []
    storage = limiters["fixed"].storage
    places = [place for place in (storage, getattr(storage, "bridge", None)) if place]
    clients = [_client(place) for place in places]
    for place in places:
        clients += getattr(getattr(place, "sentinel", None), "sentinels", ())
    return [client for client in clients if client is not None]


def _client(place: Any) -> Any:
    made = vars(place).get("_storage", place)
    # Where it is None, to ask for `storage` would make one, and connect.
    return getattr(place, "storage", None) if made is place else made


async def _aclose(limiters: dict[Strategy, Any]) -> None:
    for client in _clients(limiters):
        # Of its class: to a client of MongoDB any other name is a database.
        close = getattr(type(client), "aclose", None) or getattr(type(client), "close", None)
        if close is not None:
            with suppress(Exception):
                closing = close(client)
                if isinstance(closing, Awaitable):
                    await closing
