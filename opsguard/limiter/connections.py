"""Connections to one Redis or Valkey: checked at start, and each use ends by a deadline."""

from __future__ import annotations

import re
import socket
import ssl
from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import urlsplit

from redis.asyncio.connection import Connection as AsyncConnection
from redis.asyncio.connection import SSLConnection as AsyncTlsConnection
from redis.asyncio.connection import parse_url as parse_async_url
from redis.connection import Connection, parse_url
from redis.exceptions import RedisError

from opsguard.clock import Clock
from opsguard.limiter.tls import Certificates

__all__ = ["Deadline", "Server", "TimedSocket"]

_POOL: Final = ("max_connections", "timeout")
"""Options of a URL that are a pool's business, written for the pool of another program."""


class Server:
    """Where a server is, and how to connect to it: what its URL says.

    Makes connections, which connect by themselves when the first command is sent. Those for threads
    have a :class:`Deadline`; on event loops one timer around the whole decision does. Reads the
    certificates that a `rediss://` URL needs. Thread-safe and fork-safe.

    :raises ValueError: for a URL that cannot be read, an option that there is not, or certificates
        that cannot be used.
    """

    def __init__(self, url: str, *, timeout: float, clock: Clock) -> None:
        # Ours come last: a time limit in the URL would not be a limit.
        ours: dict[str, Any] = {"socket_timeout": timeout, "socket_connect_timeout": timeout}
        parsed: dict[str, Any] = parse_url(url)  # type: ignore[no-untyped-call]
        self._options = _options(parsed, ours)
        self._async_options = _options(parse_async_url(url), dict.fromkeys(ours))
        self._connect = _timed(self._options.pop("connection_class", Connection))
        self._aconnect = self._async_options.pop("connection_class", AsyncConnection)
        _check_number(url)
        self._clock = clock
        self._certificates: Certificates | None = None
        self._check()

    @property
    def place(self) -> str:
        """For people; holds no secret."""
        return str(self._options.get("path") or self._options.get("host", "localhost"))

    def connection(self) -> Any:
        """For a thread; whoever uses it sets `deadline.until` first."""
        connection = self._connect(Deadline(self._clock), **self._options)
        connection.certificates = self._certificates
        return connection

    def aconnection(self) -> Any:
        """For the running event loop."""
        connection = self._aconnect(**self._async_options)
        if self._certificates is not None:
            connection.ssl_context.context = self._certificates.context()
        return connection

    def _check(self) -> None:
        """Can connections be made with these options? Connects to nothing."""
        try:
            self.connection()
            trial = self.aconnection()
        except (TypeError, RedisError) as error:
            raise ValueError(_wrong_option(error)) from None
        if not isinstance(trial, AsyncTlsConnection):
            return

        def make() -> ssl.SSLContext:
            context: ssl.SSLContext = self._aconnect(**self._async_options).ssl_context.get()
            return context

        try:
            self._certificates = Certificates(make, self._async_options)
        except OSError as error:
            raise ValueError(f"the certificates in the URL cannot be used: {error}") from None


class Deadline:
    """The moment at which the present user of a connection gives up."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.until = 0.0

    def left(self) -> float:
        """In seconds.

        :raises TimeoutError: if nothing is.
        """
        left = self.until - self.clock()
        if left <= 0:
            raise TimeoutError("no answer in time")
        return left


class TimedSocket:
    """A socket whose calls together end by a deadline.

    A socket's own timeout starts anew with every call: a server that sends a byte now and then
    would hold a request for as long as it likes.
    """

    def __init__(self, inner: socket.socket, deadline: Deadline) -> None:
        self._inner = inner
        self._deadline = deadline

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def recv(self, *arguments: Any) -> bytes:
        self._arm()
        return self._inner.recv(*arguments)

    def recv_into(self, *arguments: Any) -> int:
        self._arm()
        return self._inner.recv_into(*arguments)

    def sendall(self, *arguments: Any) -> None:
        self._arm()
        self._inner.sendall(*arguments)

    def _arm(self) -> None:
        if self._inner.gettimeout() == 0:  # somebody only looks whether there is something
            return
        self._inner.settimeout(self._deadline.left())


def _timed(connection: Any) -> Any:
    """That class of connections of the `redis` package, with a deadline for each use."""

    class Timed(connection):  # type: ignore[misc]
        def __init__(self, deadline: Deadline, **options: Any) -> None:
            self.deadline = deadline
            self.certificates: Certificates | None = None
            super().__init__(**options)

        @property
        def socket_connect_timeout(self) -> float:
            return self.deadline.left()

        @socket_connect_timeout.setter
        def socket_connect_timeout(self, each: float | None) -> None:
            """For each address of a name; the deadline is for all of them."""

        def _connect(self) -> TimedSocket:
            return TimedSocket(super()._connect(), self.deadline)

        def _wrap_socket_with_ssl(self, sock: socket.socket) -> ssl.SSLSocket:
            assert self.certificates is not None
            sock.settimeout(self.deadline.left())  # of a socket's calls, the handshake is one
            context = self.certificates.context()
            return context.wrap_socket(sock, server_hostname=self.host)

    return Timed


def _options(parsed: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
    options = {name: value for name, value in parsed.items() if name not in _POOL}
    return {"protocol": 2, **options, **ours}


def _check_number(url: str) -> None:
    """The `redis` package takes a path that is no number for database 0, which may be another's."""
    path = urlsplit(url).path.strip("/")
    if path and not path.isdecimal() and not url.startswith("unix:"):
        raise ValueError("the URL must end with a host, or with the number of a database")


def _wrong_option(error: Exception) -> str:
    """What to say at start about options that the `redis` package does not take."""
    unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    if unknown is None:
        return f"the options in the URL cannot be used: {error}"
    name = unknown[1]
    hint = "; TLS is rediss:// or valkeys://" if name.startswith("ssl") else ""
    return f"the URL has the option {name!r}, which there is not for this kind of URL{hint}"
