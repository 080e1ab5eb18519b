"""For tests of apps and adapters: requests in process, without a server, and a clock to set.

The drivers keep to their protocol's rules strictly, so a fault of an app or adapter shows: the
WSGI side goes through `wsgiref.validate`, the ASGI side fails on a second start, a message after
the end, or a `receive` that nobody may call.
"""

from __future__ import annotations

import asyncio
import contextvars
import io
from collections.abc import Awaitable, Callable, Iterable, Iterator, MutableMapping
from dataclasses import dataclass, field
from typing import Any
from wsgiref.util import FileWrapper
from wsgiref.validate import validator

__all__ = [
    "Answer",
    "ManualClock",
    "Request",
    "call_asgi",
    "call_wsgi",
    "release_metrics",
    "serve_asgi",
]

Message = MutableMapping[str, Any]


class ManualClock:
    """Seconds that pass only when told to."""

    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


@dataclass(frozen=True, slots=True)
class Request:
    """A request as a server would hand it on.

    `chunked` sends the body without a length. `leave_after` is the number of answer chunks after
    which the client is gone; `leave_upload` lets it go when half of the body was read.
    """

    path: str = "/"
    method: str = "GET"
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b""
    chunked: bool = False
    client: str | None = "127.0.0.1"
    root_path: str = ""
    leave_after: int | None = None
    leave_upload: bool = False
    strict: bool = True
    """WSGI goes through `wsgiref.validate`, which refuses more than servers do: unknown methods,
    `read()` without a size, a Content-Type on a 204.
    """
    send_fails: bool = False
    """Servers tell an app that sends to nobody by an OSError, or not at all."""

    def all_headers(self) -> list[tuple[str, str]]:
        headers = [("host", "testserver"), *[(n.lower(), v) for n, v in self.headers]]
        if self.chunked:
            headers.append(("transfer-encoding", "chunked"))
        elif self.body:
            headers.append(("content-length", str(len(self.body))))
        return headers


@dataclass(slots=True)
class Answer:
    """What came back. `error` is the exception that reached the server."""

    status: int | None = None
    headers: list[tuple[str, str]] = field(default_factory=list)
    chunks: list[bytes] = field(default_factory=list)
    complete: bool = False
    error: BaseException | None = None

    @property
    def body(self) -> bytes:
        return b"".join(self.chunks)

    def header(self, name: str) -> list[str]:
        """All values of a header, by its name in any case."""
        return [value for key, value in self.headers if key.lower() == name.lower()]


class ClientLeft(OSError):
    """The driver's client is gone."""


def call_asgi(app: Any, request: Request) -> Answer:
    """One request to an ASGI app, in a loop of its own and an empty context."""
    return contextvars.Context().run(asyncio.run, serve_asgi(app, request))


def release_metrics() -> None:
    """Give `prometheus_client` back the metrics that the first `install` of this process adopted,
    with their numbers, and let the next `install` be the first.
    """
    from opsguard.metrics.adoption import release

    release()


async def serve_asgi(app: Callable[..., Awaitable[None]], request: Request) -> Answer:
    """One request to an ASGI app, in the running loop."""
    answer = Answer()
    gone = asyncio.Event()
    path, _, query = request.path.partition("?")
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": request.method,
        "scheme": "http",
        "path": request.root_path + path,
        "raw_path": (request.root_path + path).encode("utf-8", "surrogateescape"),
        "query_string": query.encode("latin-1"),
        "root_path": request.root_path,
        "headers": [(n.encode("latin-1"), v.encode("latin-1")) for n, v in request.all_headers()],
        "client": None if request.client is None else (request.client, 50_000),
        "server": ("testserver", 80),
        "state": {},
    }
    uploads = _upload_messages(request)

    async def receive() -> Message:
        message = next(uploads, None)
        if message is None:
            if request.leave_upload:
                gone.set()
            await gone.wait()
            message = {"type": "http.disconnect"}
        return message

    async def send(message: Message) -> None:
        if gone.is_set() and not answer.complete:
            if request.send_fails:
                raise ClientLeft("the client left")
            return
        if message["type"] == "http.response.start":
            assert answer.status is None, "the answer was started twice"
            answer.status = message["status"]
            pairs = message.get("headers", ())
            answer.headers = [(n.decode("latin-1"), v.decode("latin-1")) for n, v in pairs]
            return
        assert message["type"] == "http.response.body", message["type"]
        assert answer.status is not None, "a body before its start"
        assert not answer.complete, "a body after the end"
        answer.chunks.append(message.get("body", b""))
        if not message.get("more_body", False):
            answer.complete = True
            gone.set()
        elif request.leave_after is not None and len(answer.chunks) >= request.leave_after:
            gone.set()
        await asyncio.sleep(0)

    try:
        await app(scope, receive, send)
    except (Exception, asyncio.CancelledError) as error:
        answer.error = error
    if request.method == "HEAD":
        answer.chunks = []
    return answer


def _upload_messages(request: Request) -> Iterator[Message]:
    half = max(1, len(request.body) // 2)
    if not request.body:
        yield {"type": "http.request", "body": b"", "more_body": False}
        return
    yield {"type": "http.request", "body": request.body[:half], "more_body": True}
    if request.leave_upload:
        return
    yield {"type": "http.request", "body": request.body[half:], "more_body": False}


def call_wsgi(app: Any, request: Request) -> Answer:
    """One request to a WSGI app, in an empty context, under `wsgiref.validate`."""
    return contextvars.Context().run(_serve_wsgi, app, request)


def _serve_wsgi(app: Any, request: Request) -> Answer:
    answer = Answer()
    environ = _environ(request)

    def start_response(
        status: str, headers: list[tuple[str, str]], exc_info: Any = None
    ) -> Callable[[bytes], object]:
        assert answer.status is None or exc_info, "the answer was started twice"
        if exc_info and answer.chunks:
            raise exc_info[1]
        answer.status = int(status[:3])
        answer.headers = list(headers)
        return answer.chunks.append

    body: Iterable[bytes] = ()
    try:
        body = (validator(app) if request.strict else app)(environ, start_response)
        _read(body, answer, request)
    except Exception as error:
        answer.error = error
    finally:
        close = getattr(body, "close", None)
        if close is not None:
            close()
    if request.method == "HEAD":
        answer.chunks = []
    return answer


def _read(body: Iterable[bytes], answer: Answer, request: Request) -> None:
    for chunk in body:
        answer.chunks.append(chunk)
        if request.leave_after is not None and len(answer.chunks) >= request.leave_after:
            return
    answer.complete = True


def _environ(request: Request) -> dict[str, Any]:
    path, _, query = request.path.partition("?")
    environ: dict[str, Any] = {
        "REQUEST_METHOD": request.method,
        "SCRIPT_NAME": request.root_path,
        "PATH_INFO": path.encode("utf-8", "surrogateescape").decode("latin-1"),
        "QUERY_STRING": query,
        "SERVER_NAME": "testserver",
        "SERVER_PORT": "80",
        "SERVER_PROTOCOL": "HTTP/1.1",
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": "http",
        "wsgi.input": io.BytesIO(request.body),
        "wsgi.errors": io.StringIO(),
        "wsgi.multithread": True,
        "wsgi.multiprocess": False,
        "wsgi.run_once": False,
        "wsgi.input_terminated": request.chunked,
        "wsgi.file_wrapper": FileWrapper,
    }
    if request.client is not None:
        environ["REMOTE_ADDR"] = request.client
    for name, value in request.all_headers():
        key = name.upper().replace("-", "_")
        key = key if key in ("CONTENT_LENGTH", "CONTENT_TYPE") else f"HTTP_{key}"
        environ[key] = f"{environ[key]},{value}" if key in environ else value
    return environ
