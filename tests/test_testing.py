"""The drivers that other projects test with: strict where a server would be, and no stricter."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Iterator
from typing import Any

import pytest

from opsguard.testing import (
    Answer,
    ClientLeft,
    ManualClock,
    Request,
    call_asgi,
    call_wsgi,
)

VARIABLE: contextvars.ContextVar[str] = contextvars.ContextVar("VARIABLE", default="empty")
TEXT = [("Content-Type", "text/plain")]


def test_a_manual_clock_passes_only_when_told_to() -> None:
    clock = ManualClock(5.0)
    assert (clock(), clock()) == (5.0, 5.0)
    clock.advance(1.5)
    assert clock() == 6.5


def test_an_answer_gives_all_values_of_a_header_in_any_case() -> None:
    answer = Answer(200, [("X-A", "1"), ("x-a", "2"), ("x-b", "3")], [b"a", b"b"])
    assert answer.header("X-a") == ["1", "2"]
    assert answer.header("missing") == []
    assert answer.body == b"ab"


class Asgi:
    """An app that sends these messages, and keeps the scope and what it received."""

    def __init__(self, *messages: dict[str, Any], receives: int = 0) -> None:
        self.messages = messages
        self.receives = receives
        self.received: list[Any] = []
        self.scope: Any = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.scope = scope
        for _ in range(self.receives):
            self.received.append(await receive())
        for message in self.messages:
            await send(message)


def start(status: int = 200) -> dict[str, Any]:
    return {"type": "http.response.start", "status": status, "headers": [(b"x-a", b"1")]}


def body(data: bytes = b"", more: bool = False) -> dict[str, Any]:
    return {"type": "http.response.body", "body": data, "more_body": more}


def test_an_asgi_request_arrives_as_a_server_would_hand_it_on() -> None:
    app = Asgi(start(), body(b"ok"), receives=2)
    answer = call_asgi(
        app, Request("/a?b=c", "POST", (("X-A", "1"),), b"12345", root_path="/root", client="::1")
    )
    assert (answer.status, answer.body, answer.complete, answer.error) == (200, b"ok", True, None)
    assert answer.header("x-a") == ["1"]
    scope = app.scope
    assert (scope["path"], scope["root_path"], scope["query_string"]) == (
        "/root/a",
        "/root",
        b"b=c",
    )
    assert scope["client"] == ("::1", 50_000)
    assert (b"content-length", b"5") in scope["headers"]
    assert (b"x-a", b"1") in scope["headers"]
    first, second = app.received
    assert (first["body"], first["more_body"]) == (b"12", True)
    assert (second["body"], second["more_body"]) == (b"345", False)


def test_a_client_may_be_unknown() -> None:
    app = Asgi(start(), body())
    call_asgi(app, Request(client=None))
    assert app.scope["client"] is None


@pytest.mark.parametrize(
    ("messages", "complaint"),
    [
        pytest.param((start(), start()), "started twice", id="two starts"),
        pytest.param((body(),), "before its start", id="a body before the start"),
        pytest.param((start(), body(), body()), "after the end", id="a body after the end"),
        pytest.param((start(), {"type": "http.nonsense"}), "http.nonsense", id="another message"),
    ],
)
def test_an_asgi_app_that_breaks_the_rules_fails(
    messages: tuple[dict[str, Any], ...], complaint: str
) -> None:
    answer = call_asgi(Asgi(*messages), Request())
    assert isinstance(answer.error, AssertionError)
    assert complaint in str(answer.error)


def test_an_asgi_app_that_raises_or_is_cancelled_is_told() -> None:
    async def raising(scope: Any, receive: Any, send: Any) -> None:
        raise LookupError

    async def cancelled(scope: Any, receive: Any, send: Any) -> None:
        raise asyncio.CancelledError

    assert isinstance(call_asgi(raising, Request()).error, LookupError)
    assert isinstance(call_asgi(cancelled, Request()).error, asyncio.CancelledError)


@pytest.mark.parametrize("fails", [True, False])
def test_after_an_asgi_client_left_sending_fails_or_goes_nowhere(fails: bool) -> None:
    app = Asgi(start(), body(b"1", True), body(b"2", True), body(b"3"))
    answer = call_asgi(app, Request(leave_after=1, send_fails=fails))
    assert answer.chunks == [b"1"]
    assert not answer.complete
    assert isinstance(answer.error, ClientLeft) is fails


def test_an_asgi_upload_may_break_off() -> None:
    app = Asgi(receives=2)
    call_asgi(app, Request("/", "POST", body=b"1234", leave_upload=True))
    assert [message["type"] for message in app.received] == ["http.request", "http.disconnect"]
    assert app.received[0]["more_body"]


def test_a_chunked_upload_has_no_length() -> None:
    app = Asgi(start(), body())
    call_asgi(app, Request("/", "POST", body=b"1234", chunked=True))
    assert (b"transfer-encoding", b"chunked") in app.scope["headers"]
    assert not [name for name, _ in app.scope["headers"] if name == b"content-length"]


def test_a_head_answer_has_no_body() -> None:
    def app(environ: Any, start_response: Any) -> list[bytes]:
        start_response("200 OK", TEXT)
        return [b"body"]

    assert call_asgi(Asgi(start(), body(b"body")), Request(method="HEAD")).body == b""
    assert call_wsgi(app, Request(method="HEAD", strict=False)).body == b""


def test_requests_run_in_an_empty_context() -> None:
    """Nothing of the test leaks into the app, nor the other way round."""
    seen: list[str] = []

    def wsgi(environ: Any, start_response: Any) -> list[bytes]:
        seen.append(VARIABLE.get())
        VARIABLE.set("leaked")
        start_response("200 OK", TEXT)
        return [b""]

    async def asgi(scope: Any, receive: Any, send: Any) -> None:
        seen.append(VARIABLE.get())
        VARIABLE.set("leaked")

    def test() -> None:
        VARIABLE.set("of the test")
        call_wsgi(wsgi, Request())
        call_asgi(asgi, Request())
        assert VARIABLE.get() == "of the test"

    contextvars.copy_context().run(test)
    assert seen == ["empty", "empty"]


def test_a_wsgi_request_arrives_as_a_server_would_hand_it_on() -> None:
    seen: dict[str, Any] = {}

    def app(environ: Any, start_response: Any) -> list[bytes]:
        seen.update(environ, body=environ["wsgi.input"].read(5))
        start_response("201 Created", [*TEXT, ("X-A", "1")])
        return [b"o", b"k"]

    headers = (("X-A", "1"), ("X-A", "2"), ("Content-Type", "text/plain"))
    request = Request("/é?b=c", "POST", headers, b"12345", root_path="/root", client="::1")
    answer = call_wsgi(app, request)
    assert (answer.status, answer.body, answer.complete, answer.error) == (201, b"ok", True, None)
    assert answer.header("x-a") == ["1"]
    assert seen["PATH_INFO"] == "/é".encode().decode("latin-1")
    assert (seen["SCRIPT_NAME"], seen["QUERY_STRING"], seen["body"]) == ("/root", "b=c", b"12345")
    assert (seen["HTTP_X_A"], seen["CONTENT_TYPE"], seen["CONTENT_LENGTH"]) == (
        "1,2",
        "text/plain",
        "5",
    )
    assert seen["REMOTE_ADDR"] == "::1"


class Parts:
    """An iterable that knows how often it was closed."""

    def __init__(self) -> None:
        self.closed = 0

    def __iter__(self) -> Iterator[bytes]:
        yield from (b"1", b"2", b"3")

    def close(self) -> None:
        self.closed += 1


@pytest.mark.parametrize(("leave_after", "read"), [(None, b"123"), (2, b"12")])
def test_a_wsgi_body_is_closed_once_whether_the_client_stays_or_leaves(
    leave_after: int | None, read: bytes
) -> None:
    parts = Parts()

    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", TEXT)
        return parts

    answer = call_wsgi(app, Request(leave_after=leave_after))
    assert (answer.body, answer.complete, parts.closed) == (read, leave_after is None, 1)


def test_a_strict_wsgi_request_is_validated() -> None:
    def app(environ: Any, start_response: Any) -> list[bytes]:
        start_response("200 OK", [])  # no Content-Type
        return [b""]

    assert isinstance(call_wsgi(app, Request()).error, AssertionError)
    assert call_wsgi(app, Request(strict=False)).error is None


def test_a_wsgi_restart_is_allowed_before_the_first_byte_only() -> None:
    def restart(environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", TEXT)
        if environ["PATH_INFO"] == "/late":
            yield b"sent"
        error = LookupError("late")
        start_response("500 Oops", TEXT, (LookupError, error, None))
        yield b"restarted"

    early = call_wsgi(restart, Request("/early"))
    assert (early.status, early.body) == (500, b"restarted")
    late = call_wsgi(restart, Request("/late"))
    assert isinstance(late.error, LookupError)
    assert (late.status, late.body) == (200, b"sent")


def test_a_second_wsgi_start_without_an_error_fails() -> None:
    def app(environ: Any, start_response: Any) -> list[bytes]:
        start_response("200 OK", TEXT)
        start_response("200 OK", TEXT)
        return [b""]

    assert isinstance(call_wsgi(app, Request(strict=False)).error, AssertionError)


def test_a_wsgi_client_may_be_unknown() -> None:
    def app(environ: Any, start_response: Any) -> list[bytes]:
        start_response("200 OK", TEXT)
        return [str("REMOTE_ADDR" in environ).encode()]

    assert call_wsgi(app, Request(client=None)).body == b"False"
