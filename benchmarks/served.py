"""The app factory the real servers load: ``benchmarks.served:application``.

Which app is in the environment (``BENCHMARK_FRAMEWORK``, ``BENCHMARK_VARIANT``), and whether the
worker stays on the core that is measured (``BENCHMARK_ONE_CORE``). Around it, and around opsguard,
in every variant alike, stands a control endpoint by which the worker itself tells its pid, the CPU
time it has used, in nanoseconds, and how many requests it served: clock ticks would be too coarse.
Before it answers it finishes what was put off. Asked with ``?warm=N`` it leaves the next N requests
out of the time, with what they put off.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from time import process_time_ns
from typing import Any

from benchmarks import cores
from benchmarks.apps import Served, make_all

CONTROL = "/-/cpu"


class _Meter:
    def __init__(self, drain: Callable[[], object]) -> None:
        self.requests = 0
        self._drain = drain
        self._counts_again = 0
        """The number of the request with which the time counts again."""
        self._spent_before = 0
        self._left_out = 0

    def arrived(self) -> None:
        self.requests += 1
        if self.requests == self._counts_again:
            self._left_out += self._spent() - self._spent_before

    def reading(self, query: str) -> bytes:
        """What the worker says of itself."""
        spent = self._spent()
        told = {
            "pid": os.getpid(),
            "cpu_ns": spent - self._left_out,
            "requests": self.requests,
        }
        if query:
            warm = int(query.removeprefix("warm="))
            self._spent_before, self._counts_again = spent, self.requests + warm + 1
        return json.dumps(told).encode()

    def _spent(self) -> int:
        self._drain()
        return process_time_ns()


class AsgiControl(_Meter):
    """ASGI form. Not a coroutine itself: that would cost every request a frame."""

    def __init__(self, served: Served) -> None:
        super().__init__(served.drain)
        self._app = served.app

    def __call__(self, scope: Any, receive: Any, send: Any) -> Any:
        if scope["type"] == "http":
            if scope["path"] == CONTROL:
                return self._answer(scope["query_string"].decode(), send)
            self.arrived()
        return self._app(scope, receive, send)

    async def _answer(self, query: str, send: Any) -> None:
        body = self.reading(query)
        headers = [(b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})


class WsgiControl(_Meter):
    """WSGI form."""

    def __init__(self, served: Served) -> None:
        super().__init__(served.drain)
        self._app = served.app

    def __call__(self, environ: Any, start_response: Any) -> Any:
        if environ["PATH_INFO"] == CONTROL:
            body = self.reading(environ["QUERY_STRING"])
            start_response("200 OK", [("Content-Length", str(len(body)))])
            return [body]
        self.arrived()
        return self._app(environ, start_response)


def application() -> Any:
    """Build the app of this worker; servers call it in the worker process."""
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)  # each start is no news
    if os.environ.get("BENCHMARK_ONE_CORE"):
        cores.measure_here()
    framework, variant = os.environ["BENCHMARK_FRAMEWORK"], os.environ["BENCHMARK_VARIANT"]
    served = make_all(framework, (variant,))[variant]
    return AsgiControl(served) if served.protocol == "asgi" else WsgiControl(served)
