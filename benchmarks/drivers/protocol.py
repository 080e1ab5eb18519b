"""The server's own HTTP code, driven over memory.

uvicorn's ``HttpToolsProtocol`` gets a transport that swallows what is written, after the startup of
its lifespan; gunicorn's sync worker runs its own loop, over sockets that hold one request and
swallow the answer. Parsing, scope or environ, the call of the app and the writing of the answer are
the server's; sockets and polling are not there, so the bare app looks a little cheaper than on the
real server and ours a little dearer beside it: a gate passed here is passed there.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
from collections.abc import Callable
from typing import Any

from benchmarks.apps import Served
from benchmarks.drivers.request import CLIENT, HEADERS, Headers, wire

SERVER = ("127.0.0.1", 8000)
PEER = (CLIENT, 50_000)


def serve(
    served: Served, path: str, loop: asyncio.AbstractEventLoop, headers: Headers = HEADERS
) -> Callable[[int], None]:
    """A function that serves a number of requests."""
    if served.protocol == "wsgi":
        return _gunicorn(served.app, wire(path, headers))
    return _uvicorn(served.app, wire(path, headers), loop)


class MemoryTransport(asyncio.Transport):
    """A connection whose other end reads everything at once and says nothing by itself."""

    def __init__(self) -> None:
        super().__init__({"peername": PEER, "sockname": SERVER})
        self.written = 0

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += len(data)

    def is_closing(self) -> bool:
        return False

    def close(self) -> None:
        raise ConnectionError("the server closed a connection it should keep")

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass


def _uvicorn(app: Any, request: bytes, loop: asyncio.AbstractEventLoop) -> Callable[[int], None]:
    from uvicorn import Config
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
    from uvicorn.server import ServerState

    class Protocol(HttpToolsProtocol):
        """Tells the driver when an answer is complete."""

        answered: asyncio.Future[None]

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self.answered.set_result(None)

    config = Config(
        app, http="httptools", interface="asgi3", access_log=False, log_config=None, lifespan="auto"
    )
    config.load()
    loop.run_until_complete(_start(config))
    state = ServerState()
    state.default_headers = [
        (b"date", b"Thu, 01 Jan 1970 00:00:00 GMT"),
        *config.encoded_headers,
    ]

    async def connect() -> Protocol:
        protocol = Protocol(config, state, {}, _loop=loop)
        protocol.connection_made(MemoryTransport())
        return protocol

    connection = loop.run_until_complete(connect())

    async def several(requests: int) -> None:
        for _ in range(requests):
            connection.answered = loop.create_future()
            connection.data_received(request)
            await connection.answered
        while state.tasks:  # the app may work on after the last byte
            await asyncio.sleep(0)

    return lambda requests: loop.run_until_complete(several(requests))


async def _start(config: Any) -> None:
    """As the server does first: what looks after the lines may live in its event loop."""
    await config.lifespan_class(config).startup()


class MemorySocket:
    """A connection that brings one request and takes the answer."""

    def __init__(self, request: bytes, descriptor: int) -> None:
        self._unread = request
        self._descriptor = descriptor
        self.answer = b""

    def recv(self, size: int) -> bytes:
        data, self._unread = self._unread[:size], self._unread[size:]
        return data

    def sendall(self, data: bytes) -> None:
        self.answer = data if not self.answer else self.answer + data

    def getsockname(self) -> tuple[str, int]:
        return SERVER

    def settimeout(self, seconds: float | None) -> None:
        pass

    def setblocking(self, flag: bool) -> None:
        pass

    def fileno(self) -> int:
        return self._descriptor

    def shutdown(self, how: int) -> None:
        pass

    def close(self) -> None:
        if not self.answer.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(f"gunicorn answered {self.answer[:100]!r}")


class MemoryListener(MemorySocket):
    """Where as many connections wait as `waiting` says."""

    def __init__(self, request: bytes) -> None:
        super().__init__(request, os.open(os.devnull, os.O_RDWR))  # for the life of the process
        self._request = request
        self.waiting = 0

    def accept(self) -> tuple[MemorySocket, tuple[str, int]]:
        if not self.waiting:
            raise BlockingIOError(errno.EAGAIN, "nobody is waiting")
        self.waiting -= 1
        return MemorySocket(self._request, self._descriptor), PEER


def _gunicorn(app: Any, request: bytes) -> Callable[[int], None]:
    from gunicorn.config import Config  # type: ignore[import-untyped]
    from gunicorn.glogging import Logger  # type: ignore[import-untyped]
    from gunicorn.workers.sync import StopWaiting, SyncWorker  # type: ignore[import-untyped]

    class Worker(SyncWorker):  # type: ignore[misc]
        """Goes to sleep when nobody is waiting: then its loop ends."""

        def wait(self, timeout: float) -> None:
            raise StopWaiting

    config = Config()
    app_loader: Any = None  # the app is set below
    listener = MemoryListener(request)
    worker: Any = Worker(0, os.getppid(), [listener], app_loader, 30, config, Logger(config))
    logging.getLogger("gunicorn.error").setLevel(logging.WARNING)
    worker.wsgi = app

    def several(requests: int) -> None:
        listener.waiting = requests
        worker.run()
        if listener.waiting:
            raise RuntimeError(f"gunicorn left {listener.waiting} of {requests} requests")

    return several
