"""The app factory the real servers load: ``benchmarks.served:application``.

Which apps is in the environment (``BENCHMARK_FRAMEWORK``, and ``BENCHMARK_VARIANTS`` with commas),
and whether the worker stays on the core that is measured (``BENCHMARK_ONE_CORE``). Around them, and
around opsguard, in every variant alike, stands a control endpoint by which the worker itself tells
its pid, the CPU time it has used, in nanoseconds, and how many requests it served: clock ticks
would be too coarse. Before it answers it finishes what was put off. Asked with ``?warm=N`` it
leaves the next N requests out of the time, with what they put off. Asked with ``?arm=NAME`` that
variant serves from then on, the first one before. Asked with ``?turns=NAME,NAME&turn=N&warm=N``
these two take turns from then on (see `benchmarks.turns`), and then it tells what each has spent.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping
from time import process_time_ns
from typing import Any
from urllib.parse import parse_qsl

from benchmarks import cores
from benchmarks.apps import PROTOCOLS, Served, make_all
from benchmarks.guarding import VARIANTS
from benchmarks.turns import Turns

CONTROL = "/-/cpu"


class _Meter:
    def __init__(self, arms: Mapping[str, Served]) -> None:
        self.requests = 0
        self._arms = arms
        self._choose(next(iter(arms)))
        self._counts_again = 0
        """The number of the request with which the time counts again."""
        self._spent_before = 0
        self._left_out = 0
        self._turns: Turns | None = None
        for name, arm in arms.items():
            if arm.sink is not None:
                arm.sink._tick = self._charged(name, arm.sink._tick)

    def arrived(self) -> None:
        self.requests += 1
        if self._turns is not None:
            self._turns.arrived()
        elif self.requests == self._counts_again:
            self._left_out += self._spent() - self._spent_before

    def reading(self, query: str) -> bytes:
        """What the worker says of itself."""
        asked = dict(parse_qsl(query))
        told: dict[str, Any] = {"pid": os.getpid(), "requests": self.requests}
        if self._turns is not None:
            told |= {"spent": self._turns.spent, "counted": self._turns.counted}
            self._turns = None
        spent = self._spent()
        told["cpu_ns"] = spent - self._left_out
        if "turns" in asked:
            first, second = asked["turns"].split(",")
            turn, warm = int(asked["turn"]), int(asked["warm"])
            self._turns = Turns((first, second), turn, warm, self._choose)
        elif "warm" in asked:
            warm = int(asked["warm"])
            self._spent_before, self._counts_again = spent, self.requests + warm + 1
        if "arm" in asked:
            self._choose(asked["arm"])
        return json.dumps(told).encode()

    def _charged(self, arm: str, tick: Callable[[], object]) -> Callable[[], object]:
        """What is put off is done by a timer, too, whoever's turn it is."""

        def timed() -> object:
            began = process_time_ns()
            found = tick()
            if self._turns is not None:
                self._turns.late(arm, process_time_ns() - began)
            return found

        return timed

    def _choose(self, arm: str) -> None:
        chosen = self._arms[arm]
        self._app, self._drain = chosen.app, chosen.drain

    def _spent(self) -> int:
        self._drain()
        return process_time_ns()


class AsgiControl(_Meter):
    """ASGI form. Not a coroutine itself: that would cost every request a frame."""

    def __call__(self, scope: Any, receive: Any, send: Any) -> Any:
        if scope["type"] == "lifespan":
            return self._alive()(scope, receive, send)
        if scope["type"] == "http":
            if scope["path"] == CONTROL:
                return self._answer(scope["query_string"].decode(), send)
            self.arrived()
        return self._app(scope, receive, send)

    def _alive(self) -> Any:
        """The app that is told of start and stop: opsguard's, as the others do nothing then."""
        guarded = (one.app for name, one in self._arms.items() if name in VARIANTS)
        return next(guarded, self._app)

    async def _answer(self, query: str, send: Any) -> None:
        body = self.reading(query)
        headers = [(b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})


class WsgiControl(_Meter):
    """WSGI form."""

    def __call__(self, environ: Any, start_response: Any) -> Any:
        if environ["PATH_INFO"] == CONTROL:
            body = self.reading(environ["QUERY_STRING"])
            start_response("200 OK", [("Content-Length", str(len(body)))])
            return [body]
        self.arrived()
        return self._app(environ, start_response)


def application() -> Any:
    """Build the apps of this worker; servers call it in the worker process."""
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)  # each start is no news
    if os.environ.get("BENCHMARK_ONE_CORE"):
        cores.measure_here()
    framework, variants = os.environ["BENCHMARK_FRAMEWORK"], os.environ["BENCHMARK_VARIANTS"]
    arms = make_all(framework, variants.split(","))
    return AsgiControl(arms) if PROTOCOLS[framework] == "asgi" else WsgiControl(arms)
