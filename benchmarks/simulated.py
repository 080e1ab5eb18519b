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
from opsguard.logging import sink

WARM = 400
"""Requests before the counted ones: Python has made its code special by then."""


def main(framework: str, variant: str, path: str, requests: str, says: str, hears: str) -> None:
    # A simulated processor is fifty times as slow, and what comes every 100 ms would come as much
    # too often.
    sink.TICK = 3600.0  # type: ignore[misc]
    served = make_all(framework, (variant,))[variant]
    serve = DRIVERS["protocol"](served, path, direct.new_loop(), HEADERS)
    for number in (WARM, int(requests)):
        serve(number)
        served.drain()
        os.write(int(says), b".")
        os.read(int(hears), 1)
    os._exit(0)  # what happens at exit is no part of a request


if __name__ == "__main__":
    main(*sys.argv[1:])
