"""The store that the settings ask for. Nothing is connected to yet."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from opsguard.clock import Clock
from opsguard.limiter.local import LocalStore
from opsguard.limiter.stores import GuardedStore, Store

if TYPE_CHECKING:
    from opsguard.limiter.fallback import StoreReport
    from opsguard.settings import Limiter as Options

__all__ = ["check_store", "open_store"]

_FAILURE = 0.004  # seconds
_WORKERS = 8  # how many processes are taken to share a remote store, where leases ask


def open_store(
    options: Options,
    *,
    full: Callable[[], None],
    report: StoreReport,
    clock: Clock,
) -> Store | GuardedStore:
    """`full` is called for each newcomer that a full local store has no bucket for; it must not
    block. `report` hears of a remote store's failures.

    :raises ValueError: for a store that is none, or whose driver is missing.
    """
    local = LocalStore(max_keys=options.max_keys, clock=clock, on_full=full)
    url = _url(options)
    if not url:
        return local
    from opsguard.limiter.breaker import Breaker
    from opsguard.limiter.fallback import FallbackStore
    from opsguard.limiter.leases import LeaseStore
    from opsguard.limiter.storages import remote_store

    # What a failure itself costs, an exception and a closed connection, is part of the time.
    wait = max(options.timeout - _FAILURE, options.timeout / 2)
    remote = remote_store(url, timeout=wait)
    guarded = FallbackStore(remote, local, breaker=Breaker(clock=clock), report=report)
    if options.lease == 1:
        return guarded
    return LeaseStore(guarded, lease=options.lease, workers=_WORKERS, clock=clock)


def check_store(options: Options) -> None:
    """Whether `limiter.store` could be opened, for a service that limits nothing yet.

    :raises ValueError: for a store that is none, or whose driver is missing.
    """
    from opsguard.limiter.storages import remote_store

    if options.store != "auto" and (url := _url(options)):
        remote_store(url, timeout=options.timeout).close()


def _url(options: Options) -> str:
    """The URL of a remote store; "" for the one in this process."""
    if options.store == "auto":
        return options.redis_url
    if options.store == "workers":
        raise ValueError("the store 'workers' is not there yet: take 'local' or a Redis")
    if options.store == "local":
        return ""
    return options.store
