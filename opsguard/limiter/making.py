"""The store that the settings ask for. Nothing is connected to yet."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from opsguard.clock import Clock
from opsguard.limiter.local import LocalStore
from opsguard.limiter.stores import GuardedStore, RemoteStore, Store

if TYPE_CHECKING:
    from opsguard.limiter.fallback import StoreReport
    from opsguard.settings import Limiter as Options

__all__ = ["can_share", "check_store", "open_store"]

_NEEDS_LINUX = "the store 'workers' needs Linux: take 'local' or a Redis"
_FAILURE = 0.004  # seconds
_WORKERS = 8  # how many processes are taken to share a remote store, where leases ask


def _nowhere() -> None:
    return None


def open_store(
    options: Options,
    *,
    full: Callable[[], None],
    report: StoreReport,
    clock: Clock,
    folder: Callable[[], Path | None] = _nowhere,
    several: bool = False,
) -> Store | GuardedStore:
    """`full` is called for each newcomer that a full store on this machine has no bucket for; it
    must not block. `report` hears of failures of a store that is not in this process. `folder` is
    where the group of workers meets, asked at the first decision of each process; `several` says
    whether this process belongs to one, so that `auto` means `workers`.

    :raises ValueError: for a store that is none, whose driver is missing, or that this platform
        lacks.
    """
    local = LocalStore(max_keys=options.max_keys, clock=clock, on_full=full)
    if options.store == "workers" or (several and _is_free(options) and can_share()):
        return _workers(options, local, full, report, clock, folder)
    url = _url(options)
    if not url:
        return local
    from opsguard.limiter.breaker import Breaker
    from opsguard.limiter.fallback import FallbackStore
    from opsguard.limiter.leases import LeaseStore

    # What a failure itself costs, an exception and a closed connection, is part of the time.
    wait = max(options.timeout - _FAILURE, options.timeout / 2)
    remote = _remote(options, url, wait)
    guarded = FallbackStore(remote, local, breaker=Breaker(clock=clock), report=report)
    if options.lease == 1:
        return guarded
    return LeaseStore(guarded, lease=options.lease, workers=_WORKERS, clock=clock)


def can_share() -> bool:
    """Whether this platform has what workers need to share a table: the locks of Linux, and memory
    that they guard. Where it does not, `auto` means `local`.
    """
    return sys.platform == "linux"


def _workers(
    options: Options,
    local: LocalStore,
    full: Callable[[], None],
    report: StoreReport,
    clock: Clock,
    folder: Callable[[], Path | None],
) -> Store:
    if not can_share():
        raise ValueError(_NEEDS_LINUX)
    from opsguard.limiter.workers import WorkersStore

    return WorkersStore(
        folder,
        local,
        report=report,
        max_keys=options.max_keys,
        clock=clock,
        on_full=full,
        patience=options.timeout,
    )


def _is_free(options: Options) -> bool:
    """Whether the settings leave the choice to us."""
    return options.store == "auto" and not options.redis_url


def check_store(options: Options) -> None:
    """Whether `limiter.store` could be opened, for a service that limits nothing yet.

    :raises ValueError: for a store that is none, or whose driver is missing.
    """
    if options.store == "workers" and not can_share():
        raise ValueError(_NEEDS_LINUX)
    if options.store != "auto" and (url := _url(options)):
        _remote(options, url, options.timeout).close()


def _remote(options: Options, url: str, timeout: float) -> RemoteStore:
    from opsguard.limiter.storages import remote_store

    try:
        return remote_store(url, timeout=timeout)
    except ValueError as error:
        setting = "redis_url" if options.store == "auto" else "store"
        raise ValueError(f"{setting}: {error}") from None


def _url(options: Options) -> str:
    """The URL of a remote store; "" for the one in this process."""
    if options.store == "auto":
        return options.redis_url
    if options.store == "local":
        return ""
    return options.store
