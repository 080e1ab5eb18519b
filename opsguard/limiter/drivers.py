"""How the storages of `limits` are told to connect: the driver, its options, its limits on time.

Of a `redis+cluster://` or `redis+sentinel://` URL `limits` reads the hosts, the user and the
service, and passes over the rest. What stands behind the `?` is read here, as the `redis` package
reads it, and so is TLS: `rediss+cluster://` is `redis+cluster://` with `ssl=True`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Final
from urllib.parse import SplitResult, parse_qsl, urlencode, urlsplit

import limits

__all__ = ["Address", "driver_of", "read_uri"]

_LINGER: Final = 1.0
"""Seconds after which a call on an event loop ends that nobody waits for any more; so long, that
connecting has its time, and what it made serves the next decision."""
_SENTINEL: Final = "sentinel_"
_POOL: Final = ("max_connections", "timeout")
Options = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Driver:
    """What is particular to a family of storages."""

    sync: str
    asynchronous: str
    limit: Callable[[float], Options]
    """The options that end a call after so many seconds."""
    alimit: Callable[[float], Options]
    aoptions: Mapping[str, Any]

    def package(self, *, asynchronous: bool) -> str:
        return self.asynchronous if asynchronous else self.sync

    def installed(self, *, asynchronous: bool) -> bool:
        return find_spec(self.package(asynchronous=asynchronous)) is not None


def _socket_timeouts(seconds: float) -> Options:
    return {"socket_timeout": seconds, "socket_connect_timeout": seconds}


def _memcached_timeouts(seconds: float) -> Options:
    return {"timeout": seconds, "connect_timeout": seconds}


def _amemcached_timeouts(seconds: float) -> Options:
    if int(limits.__version__.partition(".")[0]) < 5:
        return {}  # those of another driver, emcache
    return {"read_timeout": seconds, "connect_timeout": seconds}


def _mongodb_timeouts(seconds: float) -> Options:
    names = ("serverSelectionTimeoutMS", "connectTimeoutMS", "socketTimeoutMS")
    return dict.fromkeys(names, max(1, round(seconds * 1000)))


def _no_options(seconds: float) -> Options:
    return {}


_DRIVERS: Final = {
    "redis": Driver(
        "redis", "redis", _socket_timeouts, _socket_timeouts, {"implementation": "redispy"}
    ),
    "valkey": Driver("valkey", "valkey", _socket_timeouts, _socket_timeouts, {}),
    "memcached": Driver("pymemcache", "memcachio", _memcached_timeouts, _amemcached_timeouts, {}),
    "mongodb": Driver("pymongo", "motor", _mongodb_timeouts, _mongodb_timeouts, {}),
}
_UNKNOWN: Final = Driver("limits", "limits", _no_options, _no_options, {})


def driver_of(scheme: str) -> Driver:
    return _DRIVERS.get(scheme.partition("+")[0], _UNKNOWN)


@dataclass(frozen=True, slots=True)
class Address:
    """A URI as `limits` takes it, and what it does not read of it. Its repr holds no secret.

    Thread-safe and fork-safe: each call makes options of its own.
    """

    scheme: str
    """As it was written."""
    uri: str
    driver: Driver
    _family: str = ""
    _kind: str = ""
    """`cluster`, `sentinel`, or empty."""
    _query: Mapping[str, Any] | None = None
    _watch: Mapping[str, Any] | None = None
    """Options for the sentinels alone."""

    def __repr__(self) -> str:
        return f"<Address {self.scheme}://>"

    def options(self, seconds: float) -> Options:
        """For the storage of the threads, whose calls end after so many seconds."""
        return self._with(self.driver.limit(seconds), "retry", "backoff")

    def aoptions(self) -> Options:
        """For the storage of an event loop."""
        limit = {**self.driver.alimit(_LINGER), **self.driver.aoptions}
        return self._with(limit, "asyncio.retry", "backoff")

    def _with(self, limit: Options, retry: str, backoff: str) -> Options:
        if not self._family:
            return limit
        # The drivers try again on their own, with pauses: the breaker knows better.
        once = import_module(f"{self._family}.{retry}").Retry(
            import_module(f"{self._family}.{backoff}").NoBackoff(), 0
        )
        found = {**(self._query or {}), **limit, "retry": once}
        if self._kind == "sentinel":
            # A replica lags: it would tell what was left a moment ago.
            found["use_replicas"] = False
            told = {name: found[name] for name in found if name.startswith(("ssl", "socket_"))}
            found["sentinel_kwargs"] = {**told, "retry": once, **(self._watch or {})}
        return found


def read_uri(uri: str) -> Address:
    """Which driver a URI names, and what it is told. Connects to nothing.

    :raises ValueError: for hosts, a service or options that cannot be used.
    """
    scheme = uri.partition("://")[0]
    base, _, kind = scheme.partition("+")
    secure = base in ("rediss", "valkeys") and kind != ""
    family = base.removesuffix("s") if secure else base
    driver = driver_of(family)
    if scheme == "mongodb" and driver.installed(asynchronous=False):
        _check_mongodb(uri)
    if family not in ("redis", "valkey"):
        return Address(scheme, uri, driver)
    known = "+".join(filter(None, (family, kind)))
    if kind not in ("cluster", "sentinel") or not driver.installed(asynchronous=False):
        return Address(scheme, known + uri[len(scheme) :], driver, family)
    parts = urlsplit(uri)
    _check_hosts(scheme, parts)
    if kind == "sentinel" and not parts.path.strip("/"):
        raise ValueError(
            f"{scheme}:// needs the service after the hosts: {scheme}://host:26379/name"
        )
    for room in (kind, f"asyncio.{kind}"):
        import_module(f"{family}.{room}")  # some 0.1 s, which the first request has not
    query, watch = _query(scheme, family, parts.query, secure=secure)
    plain = parts._replace(scheme=known, query="").geturl()
    return Address(scheme, plain, driver, family, kind, query, watch)


def _check_mongodb(uri: str) -> None:
    """Not of `mongodb+srv://`, whose hosts and options are somewhere else."""
    try:
        import_module("pymongo.uri_parser").parse_uri(uri)
    except Exception as error:
        raise ValueError(f"the mongodb:// URL cannot be used: {error}") from None


def _check_hosts(scheme: str, parts: SplitResult) -> None:
    for host in parts.netloc.rpartition("@")[2].split(","):
        try:
            whole = urlsplit(f"//{host.strip()}")
            complete = bool(whole.hostname and whole.port)
        except ValueError:
            complete = False
        if not complete:
            raise ValueError(f"{scheme}:// needs host:port, or several with commas between")


def _query(
    scheme: str, family: str, query: str, *, secure: bool
) -> tuple[Options, Mapping[str, Any]]:
    """Options for the servers; and who we are to the sentinels, where the URL says so."""
    connection = import_module(f"{family}.connection")
    pairs = parse_qsl(query, keep_blank_values=True)
    rest = urlencode([(name, value) for name, value in pairs if not name.startswith(_SENTINEL)])
    options: Options = connection.parse_url(f"{family}://?{rest}")
    for name in _POOL:
        options.pop(name, None)
    theirs = dict(pair for pair in pairs if pair[0].startswith(_SENTINEL))
    watch = {name: theirs.get(_SENTINEL + name) or None for name in ("username", "password")}
    kind = connection.SSLConnection if secure else connection.Connection
    try:
        kind(**options)  # connects to nothing
    except Exception as error:
        hint = "" if secure or "ssl" not in query else f"; TLS is {family}s+...://"
        raise ValueError(
            f"the options of the {scheme}:// URL cannot be used: {error}{hint}"
        ) from None
    if secure:
        options["ssl"] = True
    return options, watch if theirs else {}
