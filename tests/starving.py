"""One request after the other in which one allocation fails, each in a process of its own.

``python -m tests.starving asgi|wsgi FOLDER`` ends with 0 if each process lived, served the requests
after that one, and had none of them in progress at its end; else it says which did not.
"""

from __future__ import annotations

import _testcapi
import faulthandler
import gc
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

from opsguard import OpsGuard
from opsguard_asgi import install as install_asgi
from opsguard_wsgi import install as install_wsgi
from tests.contract.harness import parse

KEY = "pro-key-12345"
AFTER = 3
"""Requests that have to be served after the one that lacked memory."""
ALLOCATIONS = 80
"""Twice what a request makes."""


def guard_in(folder: Path) -> OpsGuard:
    return OpsGuard(
        "starving",
        environment="development",
        logging={"file": os.devnull},
        metrics={"directory": str(folder)},
        keys={"pepper": "a pepper of the tests", "static": {"pro": {"key": KEY, "tier": "pro"}}},
        limiter={"store": "local", "tiers": {"pro": "1000000/minute"}},
    )


def over_asgi(ops: OpsGuard) -> Callable[[], object]:
    """What serves a request, and returns its status."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"a", b"b")]})
        await send({"type": "http.response.body", "body": b"body"})

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    sent: list[Any] = []
    guarded: Any = install_asgi(app, ops, endpoint=lambda scope: "/items/{id}")
    headers = [
        (b"host", b"shop"),
        (b"x-api-key", KEY.encode()),
        (b"x-request-id", b"of the client"),
    ]
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "method": "GET",
        "path": "/items/7",
        "query_string": b"",
        "headers": headers,
        "client": ("127.0.0.1", 5000),
    }

    def serve() -> object:
        sent.clear()
        awaitable = guarded(dict(scope), receive, send).__await__()
        with suppress(StopIteration):
            awaitable.send(None)
        return sent[0]["status"]

    return serve


def over_wsgi(ops: OpsGuard) -> Callable[[], object]:
    """What serves a request, and returns its status."""

    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [("A", "b")])
        return [b"body"]

    def start_response(status: str, headers: Any, exc_info: Any = None) -> Any:
        statuses.append(int(status[:3]))

    statuses: list[int] = []
    guarded: Any = install_wsgi(app, ops, endpoint=lambda environ: "/items/{id}")
    environ = {
        "REQUEST_METHOD": "GET",
        "PATH_INFO": "/items/7",
        "REMOTE_ADDR": "127.0.0.1",
        "HTTP_X_API_KEY": KEY,
        "HTTP_X_REQUEST_ID": "of the client",
        "wsgi.input": BytesIO(),
    }

    def serve() -> object:
        statuses.clear()
        answer = guarded(dict(environ), start_response)
        for _ in answer:
            pass
        if hasattr(answer, "close"):
            answer.close()
        return statuses[0]

    return serve


def starve(serve: Callable[[], object], allocation: int) -> None:
    """Serve a request in which this allocation fails, from 0, if it makes that many."""
    gc.collect()
    gc.disable()  # its allocations are not of the request
    with suppress(BaseException):
        _testcapi.set_nomemory(allocation, allocation + 1)
        serve()
    _testcapi.remove_mem_hooks()
    gc.enable()


def fault_of(ops: OpsGuard, serve: Callable[[], object], allocation: int) -> str:
    """What is wrong after that; empty: nothing."""
    starve(serve, allocation)
    statuses = [serve() for _ in range(AFTER)]
    gc.collect()
    samples = parse("".join(text for _, text in ops.metrics.expose(False)))
    open_ones = [
        value for (name, _), value in samples.items() if name == "http_requests_in_progress"
    ]
    return "" if statuses == [200] * AFTER and not open_ones else f"{statuses}, {open_ones} open"


def main(protocol: str, folder: str) -> int:
    faulthandler.enable()
    ops = guard_in(Path(folder))
    serve = {"asgi": over_asgi, "wsgi": over_wsgi}[protocol](ops)
    for _ in range(200):  # caches are full, and counters have their cells
        assert serve() == 200
    faults = 0
    for allocation in range(ALLOCATIONS):
        child = os.fork()
        if not child:
            fault = fault_of(ops, serve, allocation)
            print(fault, end="", file=sys.stderr, flush=True)
            os._exit(bool(fault))
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        if code:
            print(f"allocation {allocation}: {code}", file=sys.stderr, flush=True)
            faults = 1
    return faults


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
