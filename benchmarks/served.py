"""The app factory the real servers load: ``benchmarks.served:application``.

Which app is in the environment (``BENCHMARK_FRAMEWORK``, ``BENCHMARK_VARIANT``), and whether the
worker stays on the core that is measured (``BENCHMARK_ONE_CORE``). Around it, and around opsguard,
in every variant alike, stands a control endpoint by which the worker itself tells its pid, the CPU
time it has used, in nanoseconds, and how many requests it served: clock ticks would be too coarse.
Before it answers it finishes what was put off.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from typing import Any

from benchmarks import cores
from benchmarks.apps import Served, make_all

CONTROL = "/-/cpu"


class _Meter:
    def __init__(self, drain: Callable[[], object]) -> None:
        self.requests = 0
        self._drain = drain

    def reading(self) -> bytes:
        self._drain()
        told = {"pid": os.getpid(), "cpu_ns": time.process_time_ns(), "requests": self.requests}
        return json.dumps(told).encode()


class AsgiControl(_Meter):
    """ASGI form. Not a coroutine itself: that would cost every request a frame."""

    def __init__(self, served: Served) -> None:
        super().__init__(served.drain)
        self._app = served.app

    def __call__(self, scope: Any, receive: Any, send: Any) -> Any:
        if scope["type"] == "http":
            if scope["path"] == CONTROL:
                return self._answer(send)
            self.requests += 1
        return self._app(scope, receive, send)

    async def _answer(self, send: Any) -> None:
        body = self.reading()
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
            body = self.reading()
            start_response("200 OK", [("Content-Length", str(len(body)))])
            return [body]
        self.requests += 1
        return self._app(environ, start_response)


def application() -> Any:
    """Build the app of this worker; servers call it in the worker process."""
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)  # each start is no news
    if os.environ.get("BENCHMARK_ONE_CORE"):
        cores.measure_here()
    framework, variant = os.environ["BENCHMARK_FRAMEWORK"], os.environ["BENCHMARK_VARIANT"]
    served = make_all(framework, (variant,))[variant]
    return AsgiControl(served) if served.protocol == "asgi" else WsgiControl(served)
