"""Ports of this machine for what a test starts."""

from __future__ import annotations

import random
import socket
from contextlib import suppress

PORTS = range(12_000, 22_000)
"""Below those that the kernel gives to connections, with the second port of a Redis cluster's node
10,000 above.
"""


def free_port() -> int:
    """One that is free, and that nobody is given by chance before it is used."""
    while True:
        port = random.SystemRandom().choice(PORTS)
        with suppress(OSError), socket.socket() as one, socket.socket() as other:
            one.bind(("127.0.0.1", port))
            other.bind(("127.0.0.1", port + 10_000))
            return port
