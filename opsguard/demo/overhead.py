"""What opsguard costs the shop, roughly: ``python -m opsguard.demo.overhead fastapi``.

The handler of one item, called in this process as a server would call it: bare, guarded, and bare
once more, in short blocks that take turns. A block's figure is the CPU time of the whole process,
the thread that writes log lines included. The second bare app must read the same as the first;
what it reads instead is the noise. No sockets, no load: `nox -s bench` is the real measurement.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from io import BytesIO
from statistics import median
from time import process_time_ns
from typing import Any

__all__ = ["ROUNDS", "Overhead", "estimate", "main", "measure"]

ROUNDS = 75
BLOCK = 10_000_000
"""Nanoseconds that a block of the bare app should take."""
PATH = "/items/1"
HEADERS = (
    ("host", "127.0.0.1"),
    ("user-agent", "Mozilla/5.0 (X11; Linux x86_64; rv:145.0) Gecko/20100101 Firefox/145.0"),
    ("accept", "application/json"),
    ("accept-language", "en-GB,en;q=0.7"),
    ("accept-encoding", "gzip, deflate, br"),
)
CLIENT = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Overhead:
    """Microseconds of CPU for each request: of the bare handler, what opsguard adds to it, and what
    the bare handler adds to itself, which is the noise.
    """

    bare: float
    added: float
    noise: float

    @property
    def telling(self) -> bool:
        """Whether the figure stands out of the noise."""
        return self.added > 2 * abs(self.noise)


Round = Mapping[str, float]
"""CPU nanoseconds per request of `bare`, `guarded` and `again` in neighbouring blocks."""


def estimate(rounds: Sequence[Round]) -> Overhead:
    """The medians over the rounds; differences are taken within a round, where times are alike."""
    return Overhead(
        bare=median([one["bare"] for one in rounds]) / 1000,
        added=median([one["guarded"] - one["bare"] for one in rounds]) / 1000,
        noise=median([one["again"] - one["bare"] for one in rounds]) / 1000,
    )


async def measure(framework: str, rounds: int = ROUNDS) -> Overhead:
    """Build the three apps of a framework and let them take turns."""
    shop = import_module(f"opsguard.demo.apps.{framework}")
    flush = shop.ops.runtime().sink.flush
    apps = {"bare": shop.make_app(), "guarded": shop.app, "again": shop.make_app()}
    call = _call_wsgi if framework in ("flask", "wsgi") else _call_asgi

    async def block(name: str, requests: int) -> float:
        app = apps[name]
        before = process_time_ns()
        for _ in range(requests):
            await call(app)
        flush()  # what the requests left for later is part of their cost
        return (process_time_ns() - before) / requests

    for name in apps:
        await block(name, 300)
    requests = max(10, round(BLOCK / await block("bare", 300)))

    async def turns(first: int) -> Round:
        names = [*apps][first:] + [*apps][:first]
        return {name: await block(name, requests) for name in names}

    return estimate([await turns(number % len(apps)) for number in range(rounds)])


async def _call_asgi(app: Callable[..., Awaitable[None]]) -> None:
    loop = asyncio.get_running_loop()
    asked = False

    async def receive() -> dict[str, Any]:
        nonlocal asked
        if asked:
            await loop.create_future()  # the client neither speaks nor leaves
        asked = True
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Mapping[str, Any]) -> None:
        if message.get("status", 200) != 200:
            raise RuntimeError(f"the shop answered {message['status']}")

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "server": (CLIENT, 8000),
        "client": (CLIENT, 50_000),
        "scheme": "http",
        "root_path": "",
        "headers": [(name.encode(), value.encode()) for name, value in HEADERS],
        "state": {},
        "method": "GET",
        "path": PATH,
        "raw_path": PATH.encode(),
        "query_string": b"",
    }
    await app(scope, receive, send)


async def _call_wsgi(app: Callable[..., Any]) -> None:
    def start_response(status: str, headers: object, exc_info: object = None) -> object:
        if not status.startswith("200"):
            raise RuntimeError(f"the shop answered {status}")
        return None

    environ = {
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": "http",
        "wsgi.multithread": True,
        "wsgi.multiprocess": False,
        "wsgi.run_once": False,
        "wsgi.input": BytesIO(),
        "wsgi.errors": sys.stderr,
        "SERVER_NAME": CLIENT,
        "SERVER_PORT": "8000",
        "SERVER_PROTOCOL": "HTTP/1.1",
        "REMOTE_ADDR": CLIENT,
        "REQUEST_METHOD": "GET",
        "SCRIPT_NAME": "",
        "PATH_INFO": PATH,
        "QUERY_STRING": "",
        **{"HTTP_" + name.upper().replace("-", "_"): value for name, value in HEADERS},
    }
    body = app(environ, start_response)
    for _ in body:
        pass
    close = getattr(body, "close", None)
    if close is not None:
        close()


def main(framework: str, rounds: int = ROUNDS) -> None:
    """Print the overhead as JSON, for the process that started this one."""
    sys.stdout.write(json.dumps(asdict(asyncio.run(measure(framework, rounds)))) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
