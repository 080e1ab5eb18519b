"""A known cost, planted outside the app: the harness must find it again.

The loop watches a clock, so it spends the same time whatever the machine's speed at the moment.
Looking at the clock costs some before the first look and after the last, which is measured first
and taken off. The clock is the wall's, which is read without entering the kernel: two looks at the
thread's own CPU clock and nothing else made a page 7 µs dearer, since on a page the kernel's code
has to come from far. A loop that is moved off its core plants less; a median over many rounds does
not notice.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

PLANTED_US = 30.0
Clock = Callable[[], int]
_STEPS = range(60)


def spend(nanoseconds: int, clock: Clock = time.perf_counter_ns) -> None:
    """Burn CPU until the clock has gone on by so much; it looks every microsecond or two."""
    end = clock() + nanoseconds
    while clock() < end:
        for _ in _STEPS:
            pass


def aim(wanted: int, clock: Clock = time.perf_counter_ns, trials: int = 9, calls: int = 50) -> int:
    """What to ask of `spend` so that a call costs ``wanted`` nanoseconds, its own cost included."""
    costs = []
    for _ in range(trials):
        began = clock()
        for _ in range(calls):
            spend(wanted, clock)
        costs.append((clock() - began) / calls)
    return wanted - max(0, round(min(costs)) - wanted)


def planted_asgi(app: Any) -> Any:
    """The ASGI app, each request dearer by `PLANTED_US`."""
    nanoseconds = aim(int(PLANTED_US * 1_000))

    def serve(scope: Any, receive: Any, send: Any) -> Any:
        if scope["type"] == "http":
            spend(nanoseconds)
        return app(scope, receive, send)

    return serve


def planted_wsgi(app: Any) -> Any:
    """The WSGI app, each request dearer by `PLANTED_US`."""
    nanoseconds = aim(int(PLANTED_US * 1_000))

    def serve(environ: Any, start_response: Any) -> Any:
        spend(nanoseconds)
        return app(environ, start_response)

    return serve
