"""The ASGI edge against servers and apps of every kind: it passes on, notes, never interferes."""

from __future__ import annotations

import asyncio
import copy
import functools
import inspect
import json
import sys
import threading
from collections.abc import Awaitable, Callable, Generator
from pathlib import Path
from typing import Any

import anyio
import pytest
from asgiref.compatibility import is_double_callable
from starlette.testclient import TestClient
from uvicorn import Config

import opsguard_asgi
from opsguard import Exchange, OpsGuard, Response
from opsguard.accelerator import speed
from opsguard.context import current
from opsguard.context import of_error as signature_of
from opsguard.exceptions import Refused
from opsguard.metrics.http import HttpMetrics
from opsguard.testing import Request, call_asgi
from opsguard_asgi import KEY, off_loop
from tests.contract.harness import Samples, parse

App = Callable[[Any, Any, Any], Awaitable[None]]
TEAPOT = Response(418, (("Content-Length", "2"),), b"no")


class Boom(Exception):
    pass


class ClientDisconnect(Exception):
    """Named like the exception that Starlette raises."""


class WebSocketDisconnect(Exception):
    """Named like the exception that Starlette raises."""


def start(status: int = 200, headers: Any = ()) -> dict[str, Any]:
    return {"type": "http.response.start", "status": status, "headers": headers}


def body(data: bytes = b"", more: bool = False) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": more}


def scope_of(kind: str = "http", path: str = "/a", **values: Any) -> dict[str, Any]:
    scope = {"type": kind, "path": path, "headers": [], "client": ("127.0.0.1", 1), "root_path": ""}
    if kind == "http":
        scope["method"] = "GET"
    return {**scope, **values}


class Wire:
    """The server's side: takes messages, fails at the one with the number `fails_at`."""

    def __init__(self, *incoming: dict[str, Any], fails_at: int | None = None) -> None:
        self.incoming = list(incoming)
        self.fails_at = fails_at
        self.sent: list[Any] = []
        self.received = 0

    async def receive(self) -> Any:
        self.received += 1
        await asyncio.sleep(0)
        return self.incoming.pop(0) if self.incoming else {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        if self.fails_at == len(self.sent):
            raise BrokenPipeError("the client left")
        self.sent.append(message)
        await asyncio.sleep(0)

    def header(self, name: str, at: int = 0) -> list[str]:
        encoded = name.encode()
        return [v.decode() for n, v in self.sent[at]["headers"] if n == encoded]


class Guarded:
    """An app behind an edge whose files are in `folder`."""

    def __init__(self, folder: Path, app: App, *, ops: OpsGuard | None = None, **how: Any) -> None:
        self.log = folder / "log"
        self.ops = ops or made(folder)
        how = how or {"endpoint": lambda scope: scope["path"]}
        self.app = opsguard_asgi.install(app, self.ops, **how)

    def run(self, wire: Wire, scope: dict[str, Any] | None = None) -> BaseException | None:
        """What reached the server."""
        scope = scope if scope is not None else scope_of()

        async def serve() -> BaseException | None:
            try:
                await self.app(scope, wire.receive, wire.send)
            except (Exception, asyncio.CancelledError) as error:
                return error
            assert current.get() is None
            return None

        return asyncio.run(serve())

    def lines(self) -> list[dict[str, Any]]:
        self.ops.runtime().sink.flush()
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [line for line in map(json.loads, lines) if line["logger"] == "opsguard.access"]

    def line(self) -> dict[str, Any]:
        (found,) = self.lines()
        return found

    def samples(self) -> Samples:
        return parse("".join([text for _, text in self.ops.metrics.expose(False)]))

    def total(self, name: str, **labels: str) -> float:
        wanted = set(labels.items())
        found = self.samples().items()
        return sum([v for (sample, has), v in found if sample == name and wanted <= has])


def made(folder: Path, **settings: Any) -> OpsGuard:
    return OpsGuard(
        "s", logging={"file": str(folder / "log")}, metrics={"directory": str(folder)}, **settings
    )


def sending(*messages: dict[str, Any]) -> App:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        for message in messages:
            await send(message)

    return app


# --- what the app sends


@pytest.mark.parametrize(
    ("fails_at", "size"),
    [
        pytest.param(0, 0, id="start"),
        pytest.param(1, 1, id="middle"),
        pytest.param(3, 3, id="last"),
    ],
)
def test_a_send_that_fails_is_a_client_that_left(fails_at: int, size: int, tmp_path: Path) -> None:
    """Status 499 wherever it happens; the error goes on to the server as it would without us."""
    app = sending(start(), body(b"1", True), body(b"2", True), body(b"3"))
    guarded = Guarded(tmp_path, app)
    error = guarded.run(Wire(fails_at=fails_at))
    assert isinstance(error, BrokenPipeError)
    assert (guarded.line()["status_code"], guarded.line()["size"]) == (499, size)
    assert guarded.total("http_requests_total", status="499") == 1.0
    assert guarded.total("http_errors_total") == 0.0
    assert guarded.total("http_requests_in_progress") == 0.0


@pytest.mark.parametrize("kind", ["start", "chunk", "last"])
def test_an_app_that_survives_a_failed_send_is_recorded_as_left_too(
    kind: str, tmp_path: Path
) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        for message in (start(), body(b"1", True), body(b"2")):
            try:
                await send(message)
            except OSError:
                return

    guarded = Guarded(tmp_path, app)
    assert guarded.run(Wire(fails_at=["start", "chunk", "last"].index(kind))) is None
    assert guarded.line()["status_code"] == 499


def test_frameworks_say_by_an_exception_of_theirs_that_the_client_left(tmp_path: Path) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(start())
        raise ClientDisconnect

    guarded = Guarded(tmp_path, app)
    wire = Wire()
    assert isinstance(guarded.run(wire), ClientDisconnect)
    assert [message["type"] for message in wire.sent] == ["http.response.start"]
    assert guarded.line()["status_code"] == 499
    assert guarded.total("http_errors_total") == 0.0


def test_a_request_that_began_before_anothers_end_does_not_keep_that(tmp_path: Path) -> None:
    """Pipelined requests, each with work to do after its 500: uvicorn makes the task of the next
    within it. That is not served within this one, whose answer is out.
    """
    tasks: list[asyncio.Task[None]] = []
    found: list[Exchange] = []
    outer: list[Exchange | None] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        found.append(scope[KEY])
        outer.append(scope[KEY].outer)
        await send(start(500))
        await send(body())
        if len(tasks) < 3:
            tasks.append(asyncio.create_task(guarded.app(scope_of(), wire.receive, wire.send)))
        await asyncio.sleep(0.01)

    class Cycle(Wire):
        __module__ = "uvicorn.protocols.http.h11_impl"

    async def serve() -> None:
        await guarded.app(scope_of(), wire.receive, wire.send)
        for task in tasks:
            await task

    wire, guarded = Cycle(), Guarded(tmp_path, app)
    asyncio.run(serve())
    assert outer == [None] * 4
    assert [exchange.closed for exchange in found] == [True] * 4
    assert [exchange.outer for exchange in found] == [None] * 4


@pytest.mark.parametrize("sent", [0, 1, 2], ids=["at once", "after the start", "after a chunk"])
def test_a_cancelled_request_is_499_and_leaks_nothing(sent: int, tmp_path: Path) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        for message in (start(), body(b"1", True))[:sent]:
            await send(message)
        await asyncio.Event().wait()

    guarded = Guarded(tmp_path, app)
    wire = Wire()

    async def cancel() -> None:
        task = asyncio.ensure_future(guarded.app(scope_of(), wire.receive, wire.send))
        for _ in range(5):
            await asyncio.sleep(0)
        assert guarded.total("http_requests_in_progress") == 1.0
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())
    assert len(wire.sent) == sent
    assert guarded.line()["status_code"] == 499
    assert guarded.total("http_requests_in_progress") == 0.0
    assert guarded.total("http_errors_total") == 0.0


def test_an_app_cancelled_after_its_last_byte_is_complete(tmp_path: Path) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(start())
        await send(body(b"whole"))
        raise asyncio.CancelledError

    guarded = Guarded(tmp_path, app)
    assert isinstance(guarded.run(Wire()), asyncio.CancelledError)
    assert (guarded.line()["status_code"], guarded.line()["size"]) == (200, 5)


@pytest.mark.parametrize("status", [200, 503])
@pytest.mark.parametrize("end", [asyncio.CancelledError, ClientDisconnect])
def test_who_leaves_after_the_last_byte_changes_nothing(
    end: type[BaseException], status: int, tmp_path: Path
) -> None:
    """A server says so after each answer, and frameworks that listen end what waits for it."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send(start(status))
        await send(body(b"whole"))
        await receive()
        raise end

    guarded = Guarded(tmp_path, app)
    wire = Wire(*upload(b"1"))
    assert isinstance(guarded.run(wire, scope_of(headers=[(b"content-length", b"1")])), end)
    assert guarded.line()["status_code"] == status
    errors = {key: value for key, value in guarded.samples().items() if "errors_total" in key[0]}
    assert sum(errors.values()) == (1.0 if status == 503 else 0.0)
    assert guarded.total("http_errors_total", error_type="503") == (status == 503)


def test_an_app_that_returns_without_an_answer_is_500(tmp_path: Path) -> None:
    guarded = Guarded(tmp_path, sending())
    wire = Wire()
    assert guarded.run(wire) is None
    assert wire.sent == []
    assert guarded.line()["status_code"] == 500
    assert guarded.total("http_errors_total", error_type="500") == 1.0


def test_an_app_that_returns_before_the_last_chunk_is_499(tmp_path: Path) -> None:
    guarded = Guarded(tmp_path, sending(start(), body(b"1", True)))
    guarded.run(Wire())
    assert guarded.line()["status_code"] == 499


def test_a_chunk_without_a_body_is_empty(tmp_path: Path) -> None:
    app = sending(start(), {"type": "http.response.body", "more_body": True}, body())
    guarded = Guarded(tmp_path, app)
    assert guarded.run(Wire()) is None
    assert (guarded.line()["status_code"], guarded.line()["size"]) == (200, 0)


def test_a_file_sent_by_the_server_ends_the_answer(tmp_path: Path) -> None:
    """http.response.pathsend is the last message."""
    app = sending(start(), {"type": "http.response.pathsend", "path": "/file"})
    guarded = Guarded(tmp_path, app)
    wire = Wire()
    guarded.run(wire)
    assert wire.sent[1] == {"type": "http.response.pathsend", "path": "/file"}
    assert guarded.line()["status_code"] == 200


@pytest.mark.parametrize("kind", ["http.response.trailers", "http.response.push", "x.unknown"])
def test_other_messages_pass_untouched(kind: str, tmp_path: Path) -> None:
    other = {"type": kind, "headers": [(b"x", b"y")]}
    guarded = Guarded(tmp_path, sending(other, start(), body()))
    wire = Wire()
    guarded.run(wire)
    assert wire.sent[0] is other
    assert other == {"type": kind, "headers": [(b"x", b"y")]}
    assert guarded.line()["status_code"] == 200


def test_messages_and_lists_that_the_app_uses_again_are_not_changed(tmp_path: Path) -> None:
    first, last = start(200, [(b"x-a", b"1")]), body(b"ok")
    guarded = Guarded(tmp_path, sending(first, last))
    for _ in range(2):
        wire = Wire()
        assert guarded.run(wire) is None
        assert len(wire.header("x-request-id")) == 1
    assert (first, last) == (start(200, [(b"x-a", b"1")]), body(b"ok"))


@pytest.mark.parametrize(
    "headers",
    [
        pytest.param([[b"x-a", b"1"], [b"x-b", b"2"]], id="pairs as lists"),
        pytest.param(((b"x-a", b"1"), (b"x-b", b"2")), id="a tuple"),
        pytest.param(iter([(b"x-a", b"1"), (b"x-b", b"2")]), id="an iterator"),
    ],
)
def test_headers_in_any_form_keep_their_order_and_get_ours_behind(
    headers: Any, tmp_path: Path
) -> None:
    guarded = Guarded(tmp_path, sending(start(200, headers), body()))
    wire = Wire()
    assert guarded.run(wire) is None
    names = [bytes(name) for name, _ in wire.sent[0]["headers"]]
    assert names == [b"x-a", b"x-b", b"x-request-id"]


def test_names_of_headers_in_text_are_left_to_the_server(tmp_path: Path) -> None:
    """ASGI asks for bytes; uvicorn with h11 takes text as well."""
    ops = made(tmp_path, ids={"answer_correlation": "always"})
    guarded = Guarded(tmp_path, sending(start(200, [("X-Request-ID", "mine")]), body()), ops=ops)
    wire = Wire()
    assert guarded.run(wire) is None
    names = [name for name, _ in wire.sent[0]["headers"]]
    assert names == ["X-Request-ID", b"x-correlation-id"]


@pytest.mark.parametrize("headers", [7, [7]], ids=["number", "no pair"])
def test_headers_that_are_none_begin_no_answer(headers: Any, tmp_path: Path) -> None:
    guarded = Guarded(tmp_path, sending(start(200, headers), body()))
    wire = Wire()
    assert isinstance(guarded.run(wire), TypeError | ValueError)
    assert [message.get("status") for message in wire.sent] == [500, None]
    assert guarded.line()["status_code"] == 500


@pytest.mark.parametrize("said", [{}, {"path": "/a\0b"}, {"path": 1.5}, {"path": "/nothing"}])
def test_a_file_that_is_none_is_for_the_server_to_refuse(said: Any, tmp_path: Path) -> None:
    message = {"type": "http.response.pathsend", **said}
    wire = Wire()
    assert Guarded(tmp_path, sending(start(), message)).run(wire) is None
    assert wire.sent[1] == message


def test_an_answer_without_headers_gets_ours(tmp_path: Path) -> None:
    app = sending({"type": "http.response.start", "status": 204}, body())
    wire = Wire()
    assert Guarded(tmp_path, app).run(wire) is None
    assert len(wire.header("x-request-id")) == 1


@pytest.mark.parametrize("form", [list, tuple, iter], ids=["list", "tuple", "iterator"])
def test_an_id_that_the_app_sets_is_left_and_the_other_added(form: Any, tmp_path: Path) -> None:
    wire = Wire()
    headers = form([[b"x-request-id", b"mine"]])
    ops = made(tmp_path, ids={"answer_correlation": "always"})
    Guarded(tmp_path, sending(start(200, headers), body()), ops=ops).run(wire)
    assert wire.header("x-request-id") == ["mine"]
    assert len(wire.header("x-correlation-id")) == 1


# --- exceptions


def test_an_exception_before_the_start_is_answered_then_passed_on(tmp_path: Path) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise Boom

    guarded = Guarded(tmp_path, app)
    wire = Wire()
    assert isinstance(guarded.run(wire), Boom)
    assert [message["type"] for message in wire.sent] == [
        "http.response.start",
        "http.response.body",
    ]
    assert wire.sent[0]["status"] == 500
    assert len(wire.header("x-request-id")) == 1
    assert guarded.total("http_errors_total", error_type="Boom") == 1.0


def test_an_exception_that_takes_no_attributes_is_passed_on_as_it_is(tmp_path: Path) -> None:
    class Stubborn(Exception):
        def __setattr__(self, name: str, value: object) -> None:
            raise AttributeError(name)

    raised = Stubborn()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise raised

    guarded = Guarded(tmp_path, app)
    assert guarded.run(Wire()) is raised
    assert guarded.total("http_errors_total", error_type="Stubborn") == 1.0


def test_an_exception_after_the_start_is_passed_on_only(tmp_path: Path) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(start(202))
        raise Boom

    guarded = Guarded(tmp_path, app)
    wire = Wire()
    assert isinstance(guarded.run(wire), Boom)
    assert len(wire.sent) == 1
    assert guarded.line()["status_code"] == 202
    assert guarded.total("http_errors_total", error_type="Boom") == 1.0


def test_an_exception_of_background_work_is_counted_once(tmp_path: Path) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(start())
        await send(body(b"done"))
        raise Boom

    guarded = Guarded(tmp_path, app)
    assert isinstance(guarded.run(Wire()), Boom)
    assert guarded.line()["status_code"] == 200
    assert guarded.total("http_errors_total") == 1.0
    assert guarded.total("http_requests_total", status="200") == 1.0


def test_nobody_there_for_the_error_answer_changes_nothing(tmp_path: Path) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise Boom

    guarded = Guarded(tmp_path, app)
    assert isinstance(guarded.run(Wire(fails_at=0)), Boom)
    assert guarded.total("http_errors_total", error_type="Boom") == 1.0


def test_what_is_no_exception_is_not_answered(tmp_path: Path) -> None:
    """SystemExit and the like are for the server."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise SystemExit(3)

    guarded = Guarded(tmp_path, app)
    wire = Wire()

    async def serve() -> None:
        with pytest.raises(SystemExit):
            await guarded.app(scope_of(), wire.receive, wire.send)

    asyncio.run(serve())
    assert wire.sent == []
    assert guarded.line()["status_code"] == 500
    assert guarded.total("http_requests_in_progress") == 0.0


# --- what the app receives


def upload(*chunks: bytes) -> list[dict[str, Any]]:
    last = len(chunks) - 1
    return [
        {"type": "http.request", "body": chunk, "more_body": at < last}
        for at, chunk in enumerate(chunks)
    ]


def reading(times: int) -> App:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        for _ in range(times):
            if (await receive())["type"] == "http.disconnect":
                return
        await send(start())
        await send(body())

    return app


@pytest.mark.parametrize(
    ("headers", "counted"),
    [
        pytest.param([(b"content-length", b"100")], 100.0, id="as declared"),
        pytest.param([(b"transfer-encoding", b"chunked")], 6.0, id="as read"),
        pytest.param([], 0.0, id="without a body"),
    ],
)
def test_the_size_of_an_upload(headers: Any, counted: float, tmp_path: Path) -> None:
    guarded = Guarded(tmp_path, reading(2))
    guarded.run(Wire(*upload(b"123", b"456")), scope_of(headers=headers))
    assert guarded.total("http_request_size_bytes_sum") == counted


@pytest.mark.parametrize("version", [None, 2, "", "1.1"])
def test_a_version_that_says_nothing_of_a_body_is_taken_for_none(
    version: Any, tmp_path: Path
) -> None:
    guarded = Guarded(tmp_path, reading(1))
    guarded.run(Wire(*upload(b"123")), scope_of(method="POST", http_version=version))
    assert guarded.total("http_request_size_bytes_sum") == 0.0


@pytest.mark.parametrize("version", ["2", "3"])
def test_an_upload_without_a_length_is_counted_where_none_is_needed(
    version: str, tmp_path: Path
) -> None:
    """HTTP/2 has no Transfer-Encoding."""
    guarded = Guarded(tmp_path, reading(2))
    guarded.run(Wire(*upload(b"123", b"456")), scope_of(method="POST", http_version=version))
    assert guarded.total("http_request_size_bytes_sum") == 6.0
    guarded.run(Wire(*upload(b"123", b"4")[:1]), scope_of(method="POST", http_version=version))
    assert [line["status_code"] for line in guarded.lines()] == [200, 499]


def test_we_never_receive_ourselves(tmp_path: Path) -> None:
    guarded = Guarded(tmp_path, reading(0))
    wire = Wire(*upload(b"123"))
    guarded.run(wire, scope_of(headers=[(b"content-length", b"3")]))
    assert wire.received == 0


def test_a_disconnect_that_the_app_reads_while_uploading_is_499(tmp_path: Path) -> None:
    guarded = Guarded(tmp_path, reading(2))
    guarded.run(Wire(*upload(b"123", b"4")[:1]), scope_of(headers=[(b"content-length", b"9")]))
    assert guarded.line()["status_code"] == 499


def test_a_disconnect_after_the_answer_changes_nothing(tmp_path: Path) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send(start())
        await send(body())
        await receive()

    guarded = Guarded(tmp_path, app)
    guarded.run(Wire(*upload(b"123")), scope_of(headers=[(b"content-length", b"3")]))
    assert guarded.line()["status_code"] == 200


# --- scopes


@pytest.mark.parametrize(
    ("client", "logged"),
    [
        pytest.param(None, None, id="no client"),
        pytest.param((), None, id="an empty client"),
        pytest.param(["", None], None, id="a unix socket"),
        pytest.param(("/run/app.sock", 0), "/run/app.sock", id="the path of a unix socket"),
    ],
)
def test_a_request_without_a_clients_address_is_served(
    client: Any, logged: str | None, tmp_path: Path
) -> None:
    guarded = Guarded(tmp_path, sending(start(), body()))
    assert guarded.run(Wire(), scope_of(client=client)) is None
    assert guarded.line()["client"] == logged


def test_a_scope_without_root_path_is_served(tmp_path: Path) -> None:
    scope = scope_of()
    del scope["root_path"], scope["client"]
    guarded = Guarded(tmp_path, sending(start(), body()))
    assert guarded.run(Wire(), scope) is None
    assert guarded.line()["path"] == "/a"


@pytest.mark.parametrize(
    ("root", "path", "routed"),
    [
        ("/api", "/api/items", "/items"),
        ("/api", "/api", ""),
        ("/api", "/api-admin/users", "/api-admin/users"),
        ("/", "/metrics", "/metrics"),
        ("/api", "/items", "/items"),
    ],
)
def test_a_path_is_cut_where_a_segment_ends(
    root: str, path: str, routed: str, tmp_path: Path
) -> None:
    """As Starlette's router has it: what it serves must not escape a pattern for that path."""
    seen: list[str] = []
    ops = made(tmp_path)
    ops.at_edge(lambda exchange: seen.append(exchange.routed))
    Guarded(tmp_path, sending(start(), body()), ops=ops).run(
        Wire(), scope_of(path=path, root_path=root)
    )
    assert seen == [routed] if routed != "/metrics" else seen == []


def test_the_exchange_is_in_the_scope_for_whoever_asks(tmp_path: Path) -> None:
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append((scope[KEY], current.get()))
        await send(start())
        await send(body())

    Guarded(tmp_path, app).run(Wire())
    assert isinstance(seen[0][0], Exchange)
    assert seen[0][0] is seen[0][1]


@pytest.mark.parametrize(
    ("scope", "endpoint"),
    [
        pytest.param({"path_template": "/items/{id}"}, "/items/{id}", id="litestar"),
        pytest.param({"path_template": 7}, "<unmatched>", id="not text"),
        pytest.param({}, "<unmatched>", id="nothing"),
    ],
)
def test_without_endpoint_the_template_in_the_scope_names_the_route(
    scope: dict[str, Any], endpoint: str, tmp_path: Path
) -> None:
    async def app(inner: Any, receive: Any, send: Any) -> None:
        inner.update(scope)
        await send(start())
        await send(body())

    guarded = Guarded(tmp_path, app, endpoint=None)
    guarded.run(Wire())
    assert guarded.line()["endpoint"] == endpoint


@pytest.mark.parametrize(
    ("roots", "endpoint"),
    [
        pytest.param({"root_path": ""}, "/items/{id}", id="plain"),
        pytest.param({"root_path": "/x", "app_root_path": "/x"}, "/items/{id}", id="server prefix"),
        pytest.param({"root_path": "/m/7", "app_root_path": ""}, "<unmatched>", id="below a mount"),
    ],
)
def test_starlettes_route_in_the_scope_names_it_unless_a_mount_stands_before_it(
    roots: dict[str, str], endpoint: str, tmp_path: Path
) -> None:
    class Route:
        path_format = "/items/{id}"

    async def app(inner: Any, receive: Any, send: Any) -> None:
        inner.update(roots, route=Route())
        await send(start())
        await send(body())

    guarded = Guarded(tmp_path, app, endpoint=None)
    guarded.run(Wire())
    assert guarded.line()["endpoint"] == endpoint


def test_an_unknown_kind_of_scope_goes_to_the_app_as_it_is(tmp_path: Path) -> None:
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append((scope, receive, send))

    guarded = Guarded(tmp_path, app)
    wire = Wire()
    scope = {"type": "mystery"}
    assert guarded.run(wire, scope) is None
    assert seen == [(scope, wire.receive, wire.send)]
    assert scope == {"type": "mystery"}


# --- lifespan


async def lifespan(scope: Any, receive: Any, send: Any) -> None:
    for kind in ("startup", "shutdown"):
        assert (await receive())["type"] == f"lifespan.{kind}"
        await send({"type": f"lifespan.{kind}.complete"})


def test_lifespan_is_the_apps_own_and_tells_us_of_start_and_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guarded = Guarded(tmp_path, lifespan)
    told: list[str] = []
    runtime = guarded.ops.runtime()
    monkeypatch.setattr(runtime, "start", lambda: told.append("start"))
    monkeypatch.setattr(runtime, "stop", lambda: told.append("stop"))
    wire = Wire({"type": "lifespan.startup"}, {"type": "lifespan.shutdown"})
    assert guarded.run(wire, {"type": "lifespan"}) is None
    assert told == ["start", "stop"]
    assert [message["type"] for message in wire.sent] == [
        "lifespan.startup.complete",
        "lifespan.shutdown.complete",
    ]


def test_after_the_stop_lines_are_written_at_once(tmp_path: Path) -> None:
    guarded = Guarded(tmp_path, lifespan)
    wire = Wire({"type": "lifespan.startup"}, {"type": "lifespan.shutdown"})
    guarded.run(wire, {"type": "lifespan"})
    guarded.ops.logger("late").info("still here")
    assert "still here" in guarded.log.read_text()


def test_an_app_that_does_not_know_lifespan_raises_as_before(tmp_path: Path) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise NotImplementedError(f"no {scope['type']}")

    guarded = Guarded(tmp_path, app)
    wire = Wire({"type": "lifespan.startup"})
    error = guarded.run(wire, {"type": "lifespan"})
    assert isinstance(error, NotImplementedError)
    assert wire.sent == []
    assert guarded.samples() == {}


def test_a_failed_startup_passes(tmp_path: Path) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "lifespan.startup.failed", "message": "no database"})

    wire = Wire({"type": "lifespan.startup"})
    assert Guarded(tmp_path, app).run(wire, {"type": "lifespan"}) is None
    assert wire.sent == [{"type": "lifespan.startup.failed", "message": "no database"}]


# --- websockets

CONNECT = {"type": "websocket.connect"}


def text(message: str) -> dict[str, Any]:
    return {"type": "websocket.receive", "text": message}


async def echo(scope: Any, receive: Any, send: Any) -> None:
    await receive()
    await send({"type": "websocket.accept", "headers": [(b"x-a", b"1")]})
    while (message := await receive())["type"] == "websocket.receive":
        await send({"type": "websocket.send", "text": message["text"]})
        await send({"type": "websocket.send", "bytes": b"12"})


def socket(**values: Any) -> dict[str, Any]:
    return scope_of("websocket", "/ws", **values)


def test_a_websocket_gets_ids_metrics_and_one_line(tmp_path: Path) -> None:
    seen: list[float] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        async def watch(message: Any) -> None:
            await send(message)
            seen.append(guarded.total("websocket_connections_in_progress", endpoint="/ws"))

        await echo(scope, receive, watch)

    guarded = Guarded(tmp_path, app)
    wire = Wire(CONNECT, text("hey"), {"type": "websocket.disconnect", "code": 1000})
    scope = socket(headers=[(b"x-request-id", b"w-1")])
    assert guarded.run(wire, scope) is None
    assert wire.header("x-request-id") == ["w-1"]
    assert wire.header("x-a") == ["1"]
    assert seen == [1.0, 1.0, 1.0]
    assert guarded.total("websocket_connections_in_progress") == 0.0
    assert guarded.total("websocket_connections_total", endpoint="/ws") == 1.0
    assert guarded.total("http_requests_total") == 0.0
    line = guarded.line()
    assert (line["method"], line["endpoint"], line["status_code"]) == ("WEBSOCKET", "/ws", 101)
    assert (line["size"], line["request_id"]) == (5, "w-1")


def test_a_text_counts_in_the_bytes_that_go_out(tmp_path: Path) -> None:
    guarded = Guarded(tmp_path, echo)
    guarded.run(Wire(CONNECT, text("hé"), {"type": "websocket.disconnect"}), socket())
    assert guarded.line()["size"] == len("hé".encode()) + len(b"12")


def test_a_websocket_without_a_route_is_unmatched(tmp_path: Path) -> None:
    asked: list[str] = []
    guarded = Guarded(tmp_path, echo, endpoint=lambda scope: asked.append(scope["path"]))
    guarded.run(Wire(CONNECT), socket())
    assert asked == ["/ws"]
    assert guarded.total("websocket_connections_total", endpoint="<unmatched>") == 1.0


def test_a_websocket_that_the_app_closes_before_the_handshake_is_403(tmp_path: Path) -> None:
    close = {"type": "websocket.close", "code": 1000}
    guarded = Guarded(tmp_path, sending(close))
    wire = Wire(CONNECT)
    guarded.run(wire, socket())
    assert wire.sent == [close]
    assert guarded.line()["status_code"] == 403
    assert guarded.total("websocket_connections_total") == 0.0


def test_a_websocket_answered_in_http_has_that_status_and_our_ids(tmp_path: Path) -> None:
    app = sending(
        {"type": "websocket.http.response.start", "status": 401, "headers": []},
        {"type": "websocket.http.response.body", "body": b"who?"},
    )
    guarded = Guarded(tmp_path, app)
    wire = Wire(CONNECT)
    guarded.run(wire, socket())
    assert len(wire.header("x-request-id")) == 1
    assert guarded.line()["status_code"] == 401
    assert guarded.total("websocket_connections_total") == 0.0


@pytest.mark.parametrize("where", ["at_edge", "at_route"])
def test_a_websocket_refused_by_us_never_reaches_the_app(where: str, tmp_path: Path) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        pytest.fail("the app ran")

    ops = made(tmp_path)
    getattr(ops, where)(lambda exchange: TEAPOT)
    guarded = Guarded(tmp_path, app, ops=ops)
    wire = Wire(CONNECT)
    assert guarded.run(wire, socket()) is None
    assert wire.sent == [{"type": "websocket.close", "code": 1008}]
    assert guarded.line()["status_code"] == 403
    assert guarded.total("websocket_connections_total") == 0.0


@pytest.mark.parametrize("where", ["at_edge", "at_route"])
def test_steps_can_tell_a_websocket(where: str, tmp_path: Path) -> None:
    seen: list[bool] = []
    ops = made(tmp_path)
    getattr(ops, where)(lambda exchange: seen.append(exchange.websocket))
    Guarded(tmp_path, echo, ops=ops).run(Wire(CONNECT), socket())
    assert seen == [True]


@pytest.mark.parametrize("opened", [False, True], ids=["before the handshake", "when open"])
def test_an_exception_of_a_websocket_is_counted_once_and_passed_on(
    opened: bool, tmp_path: Path
) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if opened:
            await send({"type": "websocket.accept"})
        raise Boom

    guarded = Guarded(tmp_path, app)
    assert isinstance(guarded.run(Wire(CONNECT), socket()), Boom)
    assert guarded.line()["status_code"] == (101 if opened else 500)
    assert guarded.total("http_errors_total", error_type="Boom", endpoint="/ws") == 1.0
    assert guarded.total("websocket_connections_in_progress") == 0.0
    assert guarded.total("websocket_connections_total") == float(opened)


def test_a_websocket_that_the_app_never_answers_is_500(tmp_path: Path) -> None:
    guarded = Guarded(tmp_path, sending())
    guarded.run(Wire(CONNECT), socket())
    assert guarded.line()["status_code"] == 500


def test_a_client_that_leaves_a_websocket_is_no_error(tmp_path: Path) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "websocket.accept"})
        raise WebSocketDisconnect

    guarded = Guarded(tmp_path, app)
    assert isinstance(guarded.run(Wire(CONNECT), socket()), WebSocketDisconnect)
    assert guarded.total("http_errors_total") == 0.0
    assert guarded.total("websocket_connections_in_progress") == 0.0


def test_a_cancelled_websocket_is_no_error_and_leaks_nothing(tmp_path: Path) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "websocket.accept"})
        raise asyncio.CancelledError

    guarded = Guarded(tmp_path, app)
    assert isinstance(guarded.run(Wire(CONNECT), socket()), asyncio.CancelledError)
    assert guarded.total("websocket_connections_in_progress") == 0.0
    assert guarded.total("http_errors_total") == 0.0


def test_a_websocket_to_the_metrics_path_is_the_apps(tmp_path: Path) -> None:
    guarded = Guarded(tmp_path, echo)
    wire = Wire(CONNECT)
    guarded.run(wire, scope_of("websocket", "/metrics"))
    assert wire.sent[0]["type"] == "websocket.accept"


@pytest.mark.parametrize("path", ["/ws", "/metrics"])
def test_a_websocket_needs_the_key_that_is_required(path: str, tmp_path: Path) -> None:
    """Also at the path of an endpoint of ours, which answers no websocket."""
    keys = {"pepper": "p" * 32, "store": f"sqlite:///{tmp_path}/keys.db", "required": ["*"]}
    guarded = Guarded(tmp_path, echo, ops=made(tmp_path, keys=keys))
    wire = Wire(CONNECT)
    assert guarded.run(wire, scope_of("websocket", path)) is None
    assert wire.sent == [{"type": "websocket.close", "code": 1008}]


@pytest.mark.parametrize("where", ["before the handshake", "when open"])
def test_a_refusal_of_a_decorator_ends_a_websocket(where: str, tmp_path: Path) -> None:
    keys = {"pepper": "p" * 32, "store": f"sqlite:///{tmp_path}/keys.db"}
    ops = made(tmp_path, keys=keys)

    @ops.require_key()
    async def serve() -> None:
        pytest.fail("it ran")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if where == "when open":
            await send({"type": "websocket.accept"})
        await serve()

    guarded = Guarded(tmp_path, app, ops=ops)
    wire = Wire(CONNECT)
    assert guarded.run(wire, socket()) is None
    assert wire.sent[-1] == {"type": "websocket.close", "code": 1008}
    assert guarded.line()["status_code"] == (101 if where == "when open" else 403)
    assert guarded.total("http_errors_total") == 0.0


def test_a_refusal_that_the_app_catches_is_one_each_time(tmp_path: Path) -> None:
    keys = {"pepper": "p" * 32, "store": f"sqlite:///{tmp_path}/keys.db"}
    ops = made(tmp_path, keys=keys)
    refused: list[int] = []

    @ops.require_key
    async def secret() -> None:
        pytest.fail("it ran")

    @ops.require_key
    def other_secret() -> None:
        pytest.fail("it ran")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        for ask in (secret, secret, other_secret, other_secret, secret):
            try:
                waiting = ask()
                if waiting is not None:
                    await waiting
            except Refused as refusal:
                refused.append(refusal.response.status)
        await send(start())
        await send(body())

    assert Guarded(tmp_path, app, ops=ops).run(Wire()) is None
    assert refused == [401] * 5


def test_a_handler_that_is_called_while_it_is_decided_about_is_decided_about_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two calls at once, where the store is asked outside of the process."""
    ops = made(tmp_path, keys={"pepper": "p" * 32, "store": f"sqlite:///{tmp_path}/keys.db"})

    @ops.require_key
    async def secret() -> None:
        pytest.fail("it ran")

    class Asked:
        async def arun(self) -> Response:
            await asyncio.sleep(0)
            return TEAPOT

    async def app(scope: Any, receive: Any, send: Any) -> None:
        ended = await asyncio.gather(secret(), secret(), return_exceptions=True)
        assert [type(error) for error in ended] == [Refused] * 2
        await send(start())
        await send(body())

    guarded = Guarded(tmp_path, app, ops=ops)
    admission = ops.runtime().plan.admission
    monkeypatch.setattr(admission, "_late", lambda exchange, handler: Asked())
    assert guarded.run(Wire()) is None


def test_an_exception_of_a_websocket_knows_its_request(tmp_path: Path) -> None:
    """For the line that the server writes of it, when the context has ended."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise Boom

    guarded = Guarded(tmp_path, app)
    error = guarded.run(Wire(CONNECT), socket(headers=[(b"x-request-id", b"w-1")]))
    assert error is not None
    signature = signature_of(error)
    assert signature is not None
    assert signature.request_id == "w-1"


def test_a_websocket_inside_of_an_edge_is_counted_once(tmp_path: Path) -> None:
    ops = made(tmp_path)
    guarded = Guarded(tmp_path, opsguard_asgi.install(echo, ops), ops=ops)
    guarded.run(Wire(CONNECT), socket())
    assert guarded.total("websocket_connections_total") == 1.0
    assert len(guarded.lines()) == 1


def test_only_the_first_route_of_a_websocket_and_its_first_end_count(tmp_path: Path) -> None:
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope[KEY])
        assert scope[KEY].enter("/second") is None
        await echo(scope, receive, send)

    guarded = Guarded(tmp_path, app)
    guarded.run(Wire(CONNECT), socket())
    seen[0].plan.close_socket(seen[0])
    assert guarded.line()["endpoint"] == "/ws"
    assert guarded.total("websocket_connections_in_progress") == 0.0
    assert guarded.total("http_errors_total") == 0.0


def test_websockets_without_access_lines_are_counted(tmp_path: Path) -> None:
    ops = OpsGuard(
        "s",
        logging={"file": str(tmp_path / "log"), "access": "off"},
        metrics={"directory": str(tmp_path)},
    )
    guarded = Guarded(tmp_path, echo, ops=ops)
    guarded.run(Wire(CONNECT), socket())
    assert guarded.lines() == []
    assert guarded.total("websocket_connections_total") == 1.0


def test_websockets_without_metrics_are_logged(tmp_path: Path) -> None:
    ops = OpsGuard("s", logging={"file": str(tmp_path / "log")}, metrics={"enabled": False})
    guarded = Guarded(tmp_path, echo, ops=ops)
    guarded.run(Wire(CONNECT), socket())
    assert guarded.line()["status_code"] == 101


def test_a_fault_of_ours_in_a_websockets_end_is_counted_and_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise LookupError

    monkeypatch.setattr(HttpMetrics, "socket_closed", broken)
    guarded = Guarded(tmp_path, echo)
    assert guarded.run(Wire(CONNECT), socket()) is None
    assert guarded.total("opsguard_internal_errors_total") == 1.0


def test_a_fault_of_ours_in_a_websockets_start_is_counted_and_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise LookupError

    monkeypatch.setattr(HttpMetrics, "socket_opened", broken)
    guarded = Guarded(tmp_path, echo)
    wire = Wire(CONNECT)
    assert guarded.run(wire, socket()) is None
    assert wire.sent[0]["type"] == "websocket.accept"
    assert guarded.total("opsguard_internal_errors_total") == 1.0


# --- the app that is served


def test_whoever_asks_takes_it_for_an_asgi3_app(tmp_path: Path) -> None:
    """uvicorn, asgiref, Starlette's test client and hypercorn look at `__call__`."""
    app = Guarded(tmp_path, sending(start(), body())).app
    config = Config(app, interface="auto", lifespan="off", log_config=None)
    config.load()
    assert config.interface == "asgi3"
    assert not is_double_callable(app)
    assert TestClient(app).get("/a").status_code == 200
    assert inspect.iscoroutinefunction(app.__call__)
    assert inspect.iscoroutinefunction(type(app).__call__)


def test_a_wrapper_that_takes_its_name_takes_no_more_of_it(tmp_path: Path) -> None:
    """As granian's, which is a plain function under `functools.wraps`."""
    app: Any = Guarded(tmp_path, sending(start(), body())).app

    @functools.wraps(app)
    def wrapper() -> str:
        return "wrapped"

    assert wrapper.__call__() == "wrapped"


def test_the_apps_attributes_can_be_reached_and_a_copy_serves(tmp_path: Path) -> None:
    class App:
        title = "Shop"
        serve = "the app's own"

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            await sending(start(), body(b"abc"))(scope, receive, send)

    guarded = Guarded(tmp_path, App())
    for app in (guarded.app, copy.copy(guarded.app)):
        assert (app.title, app.serve) == ("Shop", "the app's own")
        with pytest.raises(AttributeError):
            _ = app.absent
        for _ in range(2):
            assert call_asgi(app, Request("/a")).body == b"abc"
    assert len(guarded.lines()) == 4


def test_a_class_below_it_may_call_it(tmp_path: Path) -> None:
    class Mine(opsguard_asgi.Guarded):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            await super().__call__({**scope, "path": "/mine"}, receive, send)

    guarded = Guarded(tmp_path, sending(start(), body()))
    app = Mine(guarded.app.app, guarded.ops, lambda scope: scope["path"])
    for _ in range(2):
        assert call_asgi(app, Request("/a")).status == 200
    assert [line["endpoint"] for line in guarded.lines()] == ["/mine"] * 2


def test_its_arguments_may_be_given_by_name(tmp_path: Path) -> None:
    guarded, wire = Guarded(tmp_path, sending(start(), body())), Wire()
    for _ in range(2):
        asyncio.run(guarded.app(scope=scope_of(), receive=wire.receive, send=wire.send))  # type: ignore[arg-type]
    assert len(guarded.lines()) == 2


async def in_a_task(app: App, *given: Any) -> None:
    await asyncio.create_task(app(*given))  # type: ignore[arg-type]


async def in_asyncios_group(app: App, *given: Any) -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(app(*given), name="one")  # type: ignore[arg-type]


async def in_anyios_group(app: App, *given: Any) -> None:
    async with anyio.create_task_group() as group:
        group.start_soon(app, *given)


async def gathered(app: App, *given: Any) -> None:
    await asyncio.gather(app(*given))


async def with_a_limit(app: App, *given: Any) -> None:
    await asyncio.wait_for(app(*given), 10)


class Awaited:
    """A wrapper around a coroutine that has to see its end, as tracing libraries have them."""

    def __init__(self, inner: Awaitable[None]) -> None:
        self.inner = inner

    def __await__(self) -> Generator[Any, Any, None]:
        yield from self.inner.__await__()


async def wrapped(app: App, *given: Any) -> None:
    scope, receive, send = given

    async def sent(message: Any) -> None:
        await Awaited(send(message))

    await Awaited(app(scope, receive, sent))


@pytest.mark.parametrize(
    "way", [in_a_task, in_asyncios_group, in_anyios_group, gathered, with_a_limit, wrapped]
)
def test_it_may_be_run_in_any_way_that_asyncio_has(way: Any, tmp_path: Path) -> None:
    guarded, wire = Guarded(tmp_path, sending(start(), body(b"abc"))), Wire()

    async def run() -> None:
        for _ in range(2):
            await way(guarded.app, scope_of(), wire.receive, wire.send)

    asyncio.run(run())
    assert [line["size"] for line in guarded.lines()] == [3, 3]


def test_what_it_returns_is_a_coroutine_in_each_of_its_states(tmp_path: Path) -> None:
    """anyio 4.8 insists on one for a task, and asks for its state before it cancels it."""
    inside: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/states":
            inside.append(inspect.getcoroutinestate(call))
            await asyncio.sleep(0)

    guarded, wire = Guarded(tmp_path, app), Wire()
    guarded.run(wire)  # the first call of all takes another way
    call: Any = guarded.app(scope_of(path="/states"), wire.receive, wire.send)
    assert inspect.iscoroutine(call)
    assert asyncio.iscoroutine(call)
    assert inspect.isawaitable(call)
    assert isinstance(call.__name__, str)
    assert isinstance(call.__qualname__, str)
    assert call.cr_await is None
    assert inspect.getcoroutinestate(call) in {"CORO_CREATED", "CORO_CLOSED"}
    call.send(None)
    assert inspect.getcoroutinestate(call) == "CORO_SUSPENDED"
    assert inspect.isawaitable(call.cr_await)
    call.close()
    assert inside == ["CORO_RUNNING"]
    assert inspect.getcoroutinestate(call) == "CORO_CLOSED"


@pytest.mark.parametrize("begun", [False, True], ids=["before its first step", "while it waits"])
def test_an_anyio_group_can_be_cancelled(begun: bool, tmp_path: Path) -> None:
    waits: list[bool] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/waits":
            waits.append(True)
            await asyncio.Event().wait()

    guarded, wire = Guarded(tmp_path, app), Wire()
    guarded.run(wire)  # the first call of all takes another way

    async def run() -> None:
        async with anyio.create_task_group() as group:
            scope = scope_of(path="/waits")
            group.start_soon(guarded.app, scope, wire.receive, wire.send)
            while begun and not waits:
                await asyncio.sleep(0)
            group.cancel_scope.cancel()

    asyncio.run(asyncio.wait_for(run(), 30))
    assert [line["status_code"] for line in guarded.lines()] == [500, 499]


@pytest.mark.skipif(speed is None, reason="opsguard._speed was not built")
def test_no_frame_of_ours_is_between_the_server_and_the_app(tmp_path: Path) -> None:
    frames: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        frames.append(sys._getframe(1).f_code)

    guarded, wire = Guarded(tmp_path, app), Wire()

    async def serve() -> None:
        for _ in range(2):
            await guarded.app(scope_of(), wire.receive, wire.send)

    asyncio.run(serve())
    assert frames[1] is serve.__code__


# --- work off the loop


def test_a_scrape_runs_in_a_thread_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    guarded = Guarded(tmp_path, sending(start(), body()))
    expose = guarded.ops.metrics.expose

    def watched(openmetrics: bool) -> Any:
        seen.append(threading.current_thread().name)
        return expose(openmetrics)

    monkeypatch.setattr(guarded.ops.metrics, "expose", watched)
    answer = call_asgi(guarded.app, Request("/metrics"))
    assert answer.status == 200
    assert seen
    assert threading.main_thread().name not in seen


def test_off_loop_returns_what_the_function_returns_or_raises() -> None:
    def fail() -> None:
        raise Boom

    async def run() -> None:
        assert await off_loop(divmod, 7, 2) == (3, 1)
        with pytest.raises(Boom):
            await off_loop(fail)
        assert await off_loop(threading.current_thread) is not threading.current_thread()

    asyncio.run(run())


def test_off_loop_may_be_cancelled_while_the_function_runs() -> None:
    go = threading.Event()

    async def run() -> None:
        task = asyncio.ensure_future(off_loop(go.wait, 10))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        go.set()
        await off_loop(int)  # the first thread has had its turn at the loop by now

    asyncio.run(run())


def test_off_loop_survives_a_loop_that_closes_meanwhile() -> None:
    go, threads = threading.Event(), []

    async def run() -> None:
        task = asyncio.ensure_future(off_loop(go.wait, 10))
        await asyncio.sleep(0)
        threads.extend([t for t in threading.enumerate() if t.name == "opsguard-work"])
        task.cancel()

    asyncio.run(run())
    go.set()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()
    assert threads


def test_without_asyncio_off_loop_runs_where_it_is() -> None:
    """As under trio: the coroutine is driven by hand here."""
    coroutine = off_loop(threading.current_thread)
    with pytest.raises(StopIteration) as stopped:
        coroutine.send(None)
    assert stopped.value.value is threading.current_thread()
