"""The TLS of a store: certificates are read at the start and when they change, not by requests."""

from __future__ import annotations

import os
import ssl
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, Final

__all__ = ["Certificates"]

_FILES: Final = ("ssl_ca_certs", "ssl_ca_path", "ssl_certfile", "ssl_keyfile")
"""Options of the `redis` package that name a file, or a folder of them."""
Stamp = tuple[tuple[int, int, int], ...]


class Certificates:
    """One `ssl.SSLContext` for all connections of a store.

    The `redis` package makes one for each connection. That reads every certificate that the system
    trusts, some 20 ms of CPU: about the time that a whole decision may take, on an event loop time
    that nobody else has.

    `make` makes a context of the options. It is asked again when one of their files has changed, so
    a renewed client certificate needs no restart; if it then fails, say because the other half is
    still to be written, the old context stays. Thread-safe; a fork may share it.

    :raises OSError: for a file that is not there, or (`ssl.SSLError`) holds no such thing.
    """

    def __init__(self, make: Callable[[], ssl.SSLContext], options: Mapping[str, Any]) -> None:
        self._make = make
        self._files = [str(options[name]) for name in _FILES if options.get(name)]
        self._stamp = self._look()
        self._context = make()

    def context(self) -> ssl.SSLContext:
        """For a new connection."""
        if not self._files:
            return self._context
        with suppress(OSError):
            stamp = self._look()
            if stamp != self._stamp:
                self._stamp = stamp  # first: what fails is tried again when the files have changed
                self._context = self._make()
        return self._context

    def _look(self) -> Stamp:
        found = map(os.stat, self._files)
        return tuple((stat.st_mtime_ns, stat.st_size, stat.st_ino) for stat in found)
