"""One app on a simulated processor, as `benchmarks.programs.code` starts it.

Runs under valgrind, and counts nothing itself: it says on one descriptor when it is ready and when
it is done, and waits for a word on another each time.
"""

from __future__ import annotations

import os
import sys

from benchmarks.apps import make_all
from benchmarks.drivers import direct
from benchmarks.drivers.request import HEADERS
from benchmarks.inprocess import DRIVERS
from opsguard.logging import batches, sink

VARIANTS = ("bare", "guarded")
WARM = 400
"""Requests before the counted ones: Python has made its code special by then."""


def wait(says: int, hears: int) -> None:
    """Say that it is so far, and wait for the word to go on."""
    os.write(says, b".")
    os.read(hears, 1)


def main(framework: str, variant: str, path: str, requests: str, says: str, hears: str) -> None:
    # A simulated processor is fifty times as slow, and what comes every 100 ms would come as much
    # too often.
    sink.TICK = batches.TICK = 3600.0  # type: ignore[misc]
    # Both live in the process whichever is counted: so what they share lies in memory alike.
    served = make_all(framework, VARIANTS)
    loop = direct.new_loop()
    serve = {name: DRIVERS["protocol"](served[name], path, loop, HEADERS) for name in VARIANTS}
    for name in VARIANTS:
        serve[name](WARM)
        served[name].drain()
    wait(int(says), int(hears))
    serve[variant](int(requests))
    served[variant].drain()
    wait(int(says), int(hears))
    os._exit(0)  # what happens at exit is no part of a request


if __name__ == "__main__":
    main(*sys.argv[1:])
