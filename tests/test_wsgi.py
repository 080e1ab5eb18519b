"""The WSGI edge against servers and apps of every kind: bodies stay what they are, close once."""

from __future__ import annotations

import copy
import io
import json
import socket
import sys
from collections.abc import Callable, Iterator
from functools import wraps
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from wsgiref.util import FileWrapper

import pytest

import opsguard_wsgi
from opsguard import Exchange, OpsGuard, Response
from opsguard.accelerator import speed
from opsguard.context import current
from opsguard.testing import Request, call_wsgi
from opsguard_wsgi import KEY
from opsguard_wsgi.edge import CountedInput, status_line
from tests.contract.harness import Samples, parse

App = Callable[[Any, Any], Any]
TEXT = [("Content-Type", "text/plain")]


class Boom(Exception):
    pass


class Server:
    """A server's side, by the letter of PEP 3333; `fails_at` is the chunk it can't send."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.fails_at = fails_at
        self.starts: list[tuple[str, list[tuple[str, str]], Any]] = []
        self.sent: list[bytes] = []
        self.body: Any = None
        self.error: BaseException | None = None

    def start_response(self, status: str, headers: Any, exc_info: Any = None) -> Any:
        assert not self.starts or exc_info
        if exc_info and any(self.sent):
            raise exc_info[1]
        self.starts.append((status, headers, exc_info))
        return self.sent.append

    def run(self, app: App, environ: dict[str, Any] | None = None) -> Server:
        environ = environ if environ is not None else environ_of()
        try:
            self.body = app(environ, self.start_response)
            try:
                for number, chunk in enumerate(self.body):
                    if number == self.fails_at:
                        raise BrokenPipeError("the client left")
                    self.sent.append(chunk)
            finally:
                if hasattr(self.body, "close"):
                    self.body.close()
        except (Exception, SystemExit) as error:
            self.error = error
        assert current.get() is None
        return self

    @property
    def status(self) -> str:
        return self.starts[-1][0]

    def header(self, name: str) -> list[str]:
        return [v for n, v in self.starts[-1][1] if n.lower() == name]


def environ_of(path: str = "/a", method: str = "GET", **values: Any) -> dict[str, Any]:
    return {
        "REQUEST_METHOD": method,
        "PATH_INFO": path,
        "SCRIPT_NAME": "",
        "REMOTE_ADDR": "127.0.0.1",
        "wsgi.input": io.BytesIO(),
        **values,
    }


class Guarded:
    def __init__(self, folder: Path, app: App, *, ops: OpsGuard | None = None) -> None:
        self.log = folder / "log"
        self.ops = ops or made(folder)
        self.app = opsguard_wsgi.install(app, self.ops, endpoint=lambda environ: "/a")

    def run(self, environ: dict[str, Any] | None = None, fails_at: int | None = None) -> Server:
        return Server(fails_at).run(self.app, environ)

    def line(self) -> dict[str, Any]:
        self.ops.runtime().sink.flush()
        lines = map(json.loads, self.log.read_text().splitlines())
        (found,) = [line for line in lines if line["logger"] == "opsguard.access"]
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


def answering(body: Any, headers: Any = TEXT, status: str = "200 OK") -> App:
    def app(environ: Any, start_response: Any) -> Any:
        start_response(status, list(headers))
        return body

    return app


class Parts:
    """An iterable that knows how often it was begun and closed, and raises at chunk `fails_at`."""

    def __init__(self, *chunks: bytes, fails_at: int | None = None) -> None:
        self.chunks = chunks
        self.fails_at = fails_at
        self.begun = 0
        self.closed = 0

    def __iter__(self) -> Iterator[bytes]:
        self.begun += 1
        for number, chunk in enumerate(self.chunks):
            if number == self.fails_at:
                raise Boom
            yield chunk

    def close(self) -> None:
        self.closed += 1


# --- bodies


@pytest.mark.parametrize("body", [[b"ab", b"c"], (b"abc",), []], ids=["list", "tuple", "empty"])
def test_a_body_that_is_whole_goes_on_as_it_is(body: Any, tmp_path: Path) -> None:
    """A server may take its length and send it at once."""
    guarded = Guarded(tmp_path, answering(body))
    server = guarded.run()
    assert server.body is body
    assert guarded.line()["size"] == len(b"".join(body))
    assert guarded.line()["status_code"] == 200


def test_an_iterable_is_begun_once_and_closed_once(tmp_path: Path) -> None:
    parts = Parts(b"1", b"22", b"333")
    guarded = Guarded(tmp_path, answering(parts))
    server = guarded.run()
    assert server.sent == [b"1", b"22", b"333"]
    assert (parts.begun, parts.closed) == (1, 1)
    assert (guarded.line()["status_code"], guarded.line()["size"]) == (200, 6)


def test_chunks_are_passed_on_one_by_one(tmp_path: Path) -> None:
    made_so_far: list[int] = []

    def chunks() -> Iterator[bytes]:
        for number in range(3):
            made_so_far.append(number)
            yield b"x"

    guarded = Guarded(tmp_path, answering(chunks()))
    body = iter(guarded.app(environ_of(), Server().start_response))
    for number in range(3):
        next(body)
        assert made_so_far == list(range(number + 1))


def test_a_client_that_leaves_is_499_and_the_iterable_is_closed_once(tmp_path: Path) -> None:
    parts = Parts(b"1", b"2", b"3")
    guarded = Guarded(tmp_path, answering(parts))
    server = guarded.run(fails_at=1)
    assert isinstance(server.error, BrokenPipeError)
    assert parts.closed == 1
    assert guarded.line()["status_code"] == 499
    assert guarded.total("http_errors_total") == 0.0
    assert guarded.total("http_requests_in_progress") == 0.0


def test_a_generator_is_told_when_the_client_leaves(tmp_path: Path) -> None:
    told: list[str] = []

    def chunks() -> Iterator[bytes]:
        try:
            yield b"1"
            yield b"2"
        finally:
            told.append("closed")

    Guarded(tmp_path, answering(chunks())).run(fails_at=1)
    assert told == ["closed"]


def test_a_close_that_raises_is_the_apps_and_the_request_is_recorded(tmp_path: Path) -> None:
    class Sticky(Parts):
        def close(self) -> None:
            raise Boom

    guarded = Guarded(tmp_path, answering(Sticky(b"1")))
    server = guarded.run()
    assert isinstance(server.error, Boom)
    assert guarded.line()["status_code"] == 200
    assert guarded.total("http_requests_in_progress") == 0.0


@pytest.mark.parametrize("asked", [True, False], ids=["asked for", "not asked for"])
def test_a_head_request_is_complete_whether_its_body_is_asked_for_or_not(
    asked: bool, tmp_path: Path
) -> None:
    parts = Parts(b"body")
    guarded = Guarded(tmp_path, answering(parts))
    body = guarded.app(environ_of(method="HEAD"), Server().start_response)
    if asked:
        assert list(body) == [b"body"]
    body.close()  # type: ignore[attr-defined]
    assert guarded.line()["status_code"] == 200
    assert parts.closed == 1


# --- a request within a request


@pytest.mark.parametrize("passes_it_on", [False, True], ids=["reads it", "passes it on"])
def test_a_stream_within_a_request_is_made_in_its_own_context(
    passes_it_on: bool, tmp_path: Path
) -> None:
    """The handler that reads it piece by piece, and closes it twice, has its own in between."""
    ops = made(tmp_path)
    seen: list[str | None] = []

    def inner(environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", list(TEXT))
        for _ in range(3):
            seen.append(ops.request_id)
            yield b"1"

    part = opsguard_wsgi.install(inner, ops)

    def outer(environ: Any, start_response: Any) -> Any:
        environ = environ_of(HTTP_X_REQUEST_ID="inner")
        body: Any = part(environ, start_response if passes_it_on else Server().start_response)
        seen.append(ops.request_id)
        if passes_it_on:
            return body
        seen.extend(ops.request_id for _ in body)
        for _ in range(2):
            body.close()
            seen.append(ops.request_id)
        start_response("200 OK", list(TEXT))
        return [b"111"]

    guarded = Guarded(tmp_path, outer, ops=ops)
    server = guarded.run(environ_of(HTTP_X_REQUEST_ID="outer"))
    assert b"".join(server.sent) == b"111"
    between = [] if passes_it_on else ["outer"]
    assert seen == ["inner", "outer", *between, "inner", *between, "inner", *(3 * between)]
    assert guarded.total("http_requests_total", status="200") == 2.0
    assert guarded.total("http_requests_in_progress") == 0.0


def test_an_answer_that_is_closed_after_the_request_it_was_made_in_forgets_that(
    tmp_path: Path,
) -> None:
    ops = made(tmp_path)
    bodies: list[Any] = []
    found: list[Exchange] = []

    def inner(environ: Any, start_response: Any) -> Iterator[bytes]:
        found.append(environ[KEY])
        start_response("200 OK", list(TEXT))
        yield b"1"

    part = opsguard_wsgi.install(inner, ops)

    def outer(environ: Any, start_response: Any) -> Any:
        bodies.append(part(environ_of(), Server().start_response))
        assert found[0].outer is environ[KEY]
        start_response("200 OK", list(TEXT))
        return [b""]

    Guarded(tmp_path, outer, ops=ops).run()
    bodies[0].close()
    assert found[0].outer is None
    assert current.get() is None


# --- exceptions


def raising(environ: Any, start_response: Any) -> Any:
    raise Boom("in the app")


def raising_in_the_first_chunk(environ: Any, start_response: Any) -> Iterator[bytes]:
    raise Boom("in the first chunk")
    yield b""


def raising_after_start(environ: Any, start_response: Any) -> Any:
    start_response("200 OK", list(TEXT))
    raise Boom("after the start")


def raising_in_iter(environ: Any, start_response: Any) -> Any:
    class Broken:
        def __iter__(self) -> Iterator[bytes]:
            raise Boom("in iter")

    start_response("200 OK", list(TEXT))
    return Broken()


@pytest.mark.parametrize(
    "app",
    [raising, raising_in_the_first_chunk, raising_after_start, raising_in_iter],
    ids=lambda app: app.__name__.replace("_", " "),
)
def test_an_exception_before_the_first_byte_is_answered_then_passed_on(
    app: App, tmp_path: Path
) -> None:
    guarded = Guarded(tmp_path, app)
    server = guarded.run(environ_of(HTTP_X_REQUEST_ID="r-1"))
    assert isinstance(server.error, Boom)
    assert server.status == "500 Internal Server Error"
    assert server.header("x-request-id") == ["r-1"]
    assert json.loads(b"".join(server.sent))["request_id"] == "r-1"
    assert (guarded.line()["status_code"], guarded.line()["request_id"]) == (500, "r-1")
    assert guarded.total("http_errors_total") == 1.0
    assert guarded.total("http_errors_total", error_type="Boom") == 1.0
    assert guarded.total("http_requests_in_progress") == 0.0


def test_an_iterable_that_raises_in_its_first_chunk_is_closed_once(tmp_path: Path) -> None:
    parts = Parts(b"1", fails_at=0)
    server = Guarded(tmp_path, answering(parts)).run()
    assert isinstance(server.error, Boom)
    assert parts.closed == 1


@pytest.mark.parametrize("where", ["in iter", "in its first chunk"])
def test_an_iterable_that_raises_what_is_no_exception_is_closed_once(
    where: str, tmp_path: Path
) -> None:
    """The time limits of gevent and eventlet do; the server was not given the iterable yet."""

    class Timeout(BaseException):
        pass

    class Stopped(Parts):
        def __iter__(self) -> Iterator[bytes]:
            if where == "in iter":
                raise Timeout
            return self.late()

        def late(self) -> Iterator[bytes]:
            raise Timeout
            yield b""

        def close(self) -> None:
            super().close()
            seen.append(current.get())

    seen: list[Any] = []
    parts = Stopped()
    guarded = Guarded(tmp_path, answering(parts))
    server = Server()
    with pytest.raises(Timeout):
        guarded.app(environ_of(), server.start_response)
    assert parts.closed == 1
    assert isinstance(seen[0], Exchange)
    assert server.starts == []
    assert guarded.total("http_errors_total", error_type="Timeout") == 1.0
    assert guarded.line()["status_code"] == 500
    assert guarded.total("http_requests_in_progress") == 0.0
    assert current.get() is None


def test_an_exception_after_the_first_byte_is_passed_on_only(tmp_path: Path) -> None:
    parts = Parts(b"1", b"2", b"3", fails_at=2)
    guarded = Guarded(tmp_path, answering(parts))
    server = guarded.run()
    assert isinstance(server.error, Boom)
    assert len(server.starts) == 1
    assert server.sent == [b"1", b"2"]
    assert parts.closed == 1
    assert (guarded.line()["status_code"], guarded.line()["size"]) == (200, 2)
    assert guarded.total("http_errors_total", error_type="Boom") == 1.0


def test_an_empty_first_chunk_is_not_the_first_byte_of_an_exception(tmp_path: Path) -> None:
    """Servers send headers with the first byte; what follows is still one answer."""

    def chunks() -> Iterator[bytes]:
        yield b""
        raise Boom

    guarded = Guarded(tmp_path, answering(chunks()))
    server = guarded.run()
    assert isinstance(server.error, Boom)
    assert guarded.total("http_errors_total") == 1.0


def test_an_exception_after_write_is_passed_on_only(tmp_path: Path) -> None:
    def app(environ: Any, start_response: Any) -> Any:
        write = start_response("200 OK", list(TEXT))
        write(b"12345")
        raise Boom

    guarded = Guarded(tmp_path, app)
    server = guarded.run()
    assert isinstance(server.error, Boom)
    assert len(server.starts) == 1
    assert server.sent == [b"12345"]
    assert (guarded.line()["status_code"], guarded.line()["size"]) == (200, 5)
    assert guarded.total("http_errors_total", error_type="Boom") == 1.0


def test_written_and_returned_bytes_are_one_answer(tmp_path: Path) -> None:
    def app(environ: Any, start_response: Any) -> Any:
        write = start_response("200 OK", list(TEXT))
        write(b"12")
        write(b"3")
        return [b"45"]

    guarded = Guarded(tmp_path, app)
    assert b"".join(guarded.run().sent) == b"12345"
    assert guarded.line()["size"] == 5


@pytest.mark.parametrize("stop", [SystemExit, KeyboardInterrupt, GeneratorExit])
def test_what_is_no_exception_goes_to_the_server_and_is_recorded(
    stop: type[BaseException], tmp_path: Path
) -> None:
    def app(environ: Any, start_response: Any) -> Any:
        raise stop

    guarded = Guarded(tmp_path, app)
    server = Server()
    with pytest.raises(stop):
        guarded.app(environ_of(), server.start_response)
    assert server.starts == []
    assert guarded.line()["status_code"] == 500
    assert guarded.total("http_requests_in_progress") == 0.0
    assert current.get() is None


# --- start_response


def test_a_restart_before_the_first_byte_is_the_only_start_that_the_server_sees(
    tmp_path: Path,
) -> None:
    """gunicorn would send the headers of both."""

    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", list(TEXT))
        try:
            raise Boom
        except Boom:
            start_response("503 Service Unavailable", list(TEXT), sys.exc_info())
        return [b"restarted"]

    guarded = Guarded(tmp_path, app)
    server = guarded.run()
    assert [status for status, _, _ in server.starts] == ["503 Service Unavailable"]
    assert len(server.header("x-request-id")) == 1
    assert guarded.line()["status_code"] == 503


def restarting(first: bytes, by_write: bool) -> App:
    """An app that starts again after its first piece."""

    def again(start_response: Any) -> None:
        try:
            raise Boom
        except Boom:
            start_response("503 Service Unavailable", list(TEXT), sys.exc_info())

    def pieces(start_response: Any) -> Iterator[bytes]:
        yield first
        again(start_response)
        yield b"sorry"

    def app(environ: Any, start_response: Any) -> Any:
        write = start_response("200 OK", list(TEXT))
        if not by_write:
            return pieces(start_response)
        write(first)
        again(start_response)
        return [b"sorry"]

    return app


BY_WRITE = pytest.mark.parametrize("by_write", [False, True], ids=["yielded", "written"])


@BY_WRITE
def test_a_restart_after_an_empty_piece_is_the_answer(by_write: bool, tmp_path: Path) -> None:
    """Headers go with the first piece that is not empty (PEP 3333)."""
    guarded = Guarded(tmp_path, restarting(b"", by_write))
    server = guarded.run(environ_of(HTTP_X_REQUEST_ID="r-1"))
    assert (server.error, server.status) == (None, "503 Service Unavailable")
    assert server.header("x-request-id") == ["r-1"]
    assert b"".join(server.sent) == b"sorry"
    assert (guarded.line()["status_code"], guarded.line()["size"]) == (503, 5)
    assert guarded.total("http_errors_total", error_type="503") == 1.0


@BY_WRITE
def test_a_restart_that_comes_too_late_changes_nothing(by_write: bool, tmp_path: Path) -> None:
    guarded = Guarded(tmp_path, restarting(b"half", by_write))
    server = guarded.run()
    assert isinstance(server.error, Boom)
    assert (len(server.starts), server.sent) == (1, [b"half"])
    assert guarded.line()["status_code"] == 200
    assert guarded.total("http_errors_total", error_type="Boom") == 1.0


def test_what_is_written_after_a_restart_is_counted(tmp_path: Path) -> None:
    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", list(TEXT))(b"")
        try:
            raise Boom
        except Boom:
            start_response("503 Service Unavailable", list(TEXT), sys.exc_info())(b"12345")
        return []

    guarded = Guarded(tmp_path, app)
    assert guarded.run().sent == [b"", b"12345"]
    assert guarded.line()["size"] == 5


def test_header_lists_that_the_app_uses_again_are_not_changed(tmp_path: Path) -> None:
    headers = list(TEXT)

    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", headers)
        return [b""]

    guarded = Guarded(tmp_path, app)
    for _ in range(2):
        assert len(guarded.run().header("x-request-id")) == 1
    assert headers == TEXT


def test_the_servers_own_start_response_is_called_as_the_app_calls_it(tmp_path: Path) -> None:
    """Some servers' own takes no third argument unless it is given."""
    seen: list[Any] = []

    def start_response(status: str, headers: Any) -> Any:
        seen.append((status, type(headers), [type(pair) for pair in headers]))

    Guarded(tmp_path, answering([b""])).app(environ_of(), start_response)
    assert seen == [("200 OK", list, [tuple, tuple])]


@pytest.mark.parametrize("name", ["X-Request-ID", "x-request-id", "X-REQUEST-ID"])
def test_an_id_that_the_app_sets_is_left_and_the_other_added(name: str, tmp_path: Path) -> None:
    ops = made(tmp_path, ids={"answer_correlation": "always"})
    guarded = Guarded(tmp_path, answering([b""], [*TEXT, (name, "mine")]), ops=ops)
    server = guarded.run()
    assert server.header("x-request-id") == ["mine"]
    assert len(server.header("x-correlation-id")) == 1


def test_an_environ_of_another_type_is_guarded_too(tmp_path: Path) -> None:
    class Environ(dict[str, Any]):
        pass

    server = Guarded(tmp_path, answering([b""])).run(Environ(environ_of()))
    assert len(server.header("x-request-id")) == 1


# --- gunicorn, whose list of headers ours may be put into


class Gunicorn:
    """gunicorn's own answer to one request, as its workers drive it."""

    def __init__(self, kind: type[Any] | None = None) -> None:
        wsgi = pytest.importorskip("gunicorn.http.wsgi")
        config = pytest.importorskip("gunicorn.config").Config()
        self.read, self.socket = socket.socketpair()
        request = SimpleNamespace(method="GET", version=(1, 1), should_close=lambda: True)
        self.answer = (kind or wsgi.Response)(request, self.socket, config)

    def run(self, app: App, environ: dict[str, Any] | None = None) -> bytes:
        with self.read, self.socket:
            body = app(environ_of() if environ is None else environ, self.answer.start_response)
            for part in body:
                self.answer.write(part)
            self.answer.close()
            self.socket.shutdown(socket.SHUT_WR)
            sent = b""
            while part := self.read.recv(65536):
                sent += part
        return sent

    def header(self, name: str) -> list[str]:
        return [value for key, value in self.answer.headers if key.lower() == name]


def test_gunicorns_hooks_see_ours_behind_the_apps(tmp_path: Path) -> None:
    server = Gunicorn()
    environ = environ_of(HTTP_X_CORRELATION_ID="theirs")
    sent = server.run(Guarded(tmp_path, answering([b"x"])).app, environ)
    (request_id,) = server.header("x-request-id")
    assert server.answer.headers == [
        *TEXT,
        ("X-Request-ID", request_id),
        ("X-Correlation-ID", "theirs"),
    ]
    assert f"\r\nX-Request-ID: {request_id}\r\nX-Correlation-ID: theirs\r\n".encode() in sent


@pytest.mark.parametrize("unsound", ["a\r\nSet-Cookie: b=c", "a\nb", "a\0b", "\N{EURO SIGN}"])
@pytest.mark.parametrize("which", ["request_id", "correlation_id"])
def test_gunicorn_looks_through_an_id_that_the_app_has_set(
    which: str, unsound: str, tmp_path: Path
) -> None:
    """It refuses what would end the header, as it does in any other."""

    def app(environ: Any, start_response: Any) -> Any:
        setattr(environ[KEY], which, unsound)
        start_response("200 OK", list(TEXT))
        return [b"x"]

    errors = pytest.importorskip("gunicorn.http.errors")
    server, guarded = Gunicorn(), Guarded(tmp_path, app)
    with pytest.raises(errors.InvalidResponseHeader):
        server.run(guarded.app, environ_of(HTTP_X_CORRELATION_ID="theirs"))
    assert unsound not in [value for _, value in server.answer.headers]
    assert guarded.line()["status_code"] == 500


@pytest.mark.parametrize("sent", ["", " mine ", "caf\xe9", 7, None])
def test_an_id_of_any_other_kind_goes_to_gunicorn_as_to_any_server(
    sent: Any, tmp_path: Path
) -> None:
    def app(environ: Any, start_response: Any) -> Any:
        environ[KEY].request_id = sent
        start_response("200 OK", list(TEXT))
        return [b"x"]

    server = Gunicorn()
    server.run(Guarded(tmp_path, app).app)
    assert server.header("x-request-id") == [str(sent).strip()]


def test_an_id_is_the_one_of_the_time_when_the_app_started_its_answer(tmp_path: Path) -> None:
    before = []

    def app(environ: Any, start_response: Any) -> Any:
        before.append(environ[KEY].request_id)
        start_response("200 OK", list(TEXT))
        environ[KEY].request_id = "later"
        environ[KEY].correlated = True
        return [b"x"]

    server = Gunicorn()
    server.run(Guarded(tmp_path, app).app)
    assert server.header("x-request-id") == before
    assert server.header("x-correlation-id") == []


def test_an_id_that_is_gone_when_gunicorn_hears_of_the_start_is_no_fault(tmp_path: Path) -> None:
    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", list(TEXT))
        del environ[KEY].request_id
        return [b"x"]

    server = Gunicorn()
    server.run(Guarded(tmp_path, app).app)
    assert len(server.header("x-request-id")) == 1


def test_what_stands_in_for_gunicorns_start_response_sees_all_headers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it takes the place of the method before the first request, or after it."""
    wsgi = pytest.importorskip("gunicorn.http.wsgi")
    own = wsgi.Response.start_response
    seen: list[list[str]] = []

    @wraps(own)
    def start_response(self: Any, status: str, headers: Any, *more: Any) -> Any:
        seen.append([name for name, _ in headers])
        return own(self, status, headers, *more)

    class Response(wsgi.Response):  # type: ignore[name-defined, misc]
        pass

    Response.__module__, Response.__qualname__ = "gunicorn.http.wsgi", "Response"
    Response.start_response = start_response
    app = Guarded(tmp_path, answering([b"x"])).app
    for kind in (None, Response, None):
        server = Gunicorn(kind)
        server.run(app)
        assert len(server.header("x-request-id")) == 1
    monkeypatch.setattr(wsgi.Response, "start_response", start_response)
    Gunicorn().run(app)
    assert seen == [["Content-Type", "X-Request-ID"]] * 2


def test_a_restart_that_fails_leaves_what_was_started(tmp_path: Path) -> None:
    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", list(TEXT))
        with pytest.raises(TypeError):
            start_response("503 Service Unavailable", 7, (Boom, Boom(), None))
        return [b"x"]

    server = Gunicorn()
    assert server.run(Guarded(tmp_path, app).app).startswith(b"HTTP/1.1 200 OK\r\n")
    assert len(server.header("x-request-id")) == 1


def test_a_list_that_gunicorn_no_longer_keeps_costs_the_app_nothing(tmp_path: Path) -> None:
    """Nothing does so today: the second answer's is exchanged here before the app is called."""

    class Headers(list[Any]):
        pass

    guarded = Guarded(tmp_path, answering([b"x"]))
    Gunicorn().run(guarded.app)
    server = Gunicorn()
    server.answer.headers = Headers()
    assert server.run(guarded.app).endswith(b"1\r\nx\r\n0\r\n\r\n")
    faults = guarded.total("opsguard_internal_errors_total", site="head")
    assert faults == 1 - len(server.header("x-request-id"))


@pytest.mark.parametrize(
    ("status", "line"),
    [(200, "200 OK"), (404, "404 Not Found"), (299, "299 Unknown"), (799, "799 Unknown")],
)
def test_a_status_has_a_reason(status: int, line: str) -> None:
    assert status_line(status) == line


# --- the context of a thread


def unread(environ: Any, start_response: Any) -> Iterator[bytes]:
    start_response("200 OK", [("Content-Type", "text/plain")])
    yield b"one"
    yield b"two"


def test_a_body_that_nobody_closes_is_nobodys_context(tmp_path: Path) -> None:
    """As of a test client whose answer is never read."""
    outers: list[Any] = []
    ops = made(tmp_path)
    ops.at_edge(lambda exchange: outers.append(exchange.outer))
    guarded = Guarded(tmp_path, unread, ops=ops)
    for _ in range(3):
        body = guarded.app(environ_of(), lambda *_: print)
        assert next(iter(body)) == b"one"
        del body
    assert outers == [None] * 3
    assert guarded.total("http_requests_total", status="499") == 3.0


def test_a_refusal_whose_start_the_server_does_not_take_ends_its_request(tmp_path: Path) -> None:
    keys = {"pepper": "p" * 32, "store": f"sqlite:///{tmp_path}/keys.db"}
    ops = made(tmp_path, keys=keys)

    @ops.require_key
    def secret() -> None:
        pytest.fail("it ran")

    def app(environ: Any, start_response: Any) -> Any:
        secret()

    def refuse(*_: Any) -> Any:
        raise TimeoutError("too late")

    guarded = Guarded(tmp_path, app, ops=ops)
    for _ in range(2):
        with pytest.raises(TimeoutError):
            guarded.app(environ_of(), refuse)
        assert current.get() is None


# --- websockets of the app's own


def stopping(environ: Any, start_response: Any) -> Any:
    raise StopIteration


def dropping(environ: Any, start_response: Any) -> Any:
    raise ConnectionError


def refused_by_its_store(environ: Any, start_response: Any) -> Any:
    raise ConnectionRefusedError


def returning_nothing(environ: Any, start_response: Any) -> Any:
    return []


def generating_nothing(environ: Any, start_response: Any) -> Iterator[bytes]:
    yield from ()


UPGRADE = {"HTTP_CONNECTION": "Upgrade", "HTTP_UPGRADE": "WebSocket"}


@pytest.mark.parametrize(
    "app",
    [stopping, dropping, returning_nothing, generating_nothing],
    ids=lambda app: app.__name__.replace("_", " "),
)
def test_a_websocket_of_the_apps_own_is_101_and_no_request_in_the_metrics(
    app: App, tmp_path: Path
) -> None:
    """The ways in which servers want to be told that a connection was taken over."""
    guarded = Guarded(tmp_path, app)
    server = guarded.run(environ_of(**UPGRADE))
    raised = {stopping: StopIteration, dropping: ConnectionError}
    assert type(server.error) is raised.get(app, type(None))
    assert (server.starts, server.sent) == ([], [])
    line = guarded.line()
    assert (line["status_code"], line["level"], line["endpoint"]) == (101, "INFO", "/a")
    names = {name for name, _ in guarded.samples() if name.startswith(("http", "web", "opsguard"))}
    assert names == {"websocket_connections_total"}
    assert guarded.total("websocket_connections_total", endpoint="/a") == 1.0


@pytest.mark.parametrize("app", [returning_nothing, generating_nothing])
def test_without_an_upgrade_an_app_that_starts_no_answer_has_failed(
    app: App, tmp_path: Path
) -> None:
    guarded = Guarded(tmp_path, app)
    guarded.run(environ_of(HTTP_UPGRADE="h2c"))
    assert guarded.line()["status_code"] == 500
    assert guarded.total("http_requests_total", status="500") == 1.0


@pytest.mark.parametrize(
    ("app", "status"),
    [
        pytest.param(answering([b"no"], status="400 Bad Request"), 400, id="refused"),
        pytest.param(raising, 500, id="failed"),
        pytest.param(refused_by_its_store, 500, id="failed by a connection of the app's"),
    ],
)
def test_an_upgrade_that_is_answered_is_a_request(app: App, status: int, tmp_path: Path) -> None:
    guarded = Guarded(tmp_path, app)
    assert guarded.run(environ_of(**UPGRADE)).status.startswith(str(status))
    assert guarded.line()["status_code"] == status
    assert guarded.total("http_requests_total", status=str(status)) == 1.0
    assert guarded.total("websocket_connections_total") == 0.0


# --- files


class Wrapper:
    """A server's file wrapper as gunicorn has it: recognised by its type."""

    def __init__(self, filelike: Any, blksize: int = 8192) -> None:
        self.filelike = filelike
        self.blksize = blksize
        self.closed = 0

    def __iter__(self) -> Iterator[bytes]:
        while data := self.filelike.read(self.blksize):
            yield data

    def close(self) -> None:
        self.closed += 1
        self.filelike.close()


class Slotted(Wrapper):
    """One that takes no attributes, like those of servers written in C."""

    __slots__ = ()

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "close":
            raise AttributeError(name)
        super().__setattr__(name, value)


def wrapping(file: Any, *headers: tuple[str, str]) -> App:
    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [*TEXT, *headers])
        return environ["wsgi.file_wrapper"](file)

    return app


def file_of(folder: Path, data: bytes) -> Any:
    path = folder / "file"
    path.write_bytes(data)
    return path.open("rb")


def test_a_servers_file_wrapper_stays_itself_and_its_end_is_heard(tmp_path: Path) -> None:
    file = file_of(tmp_path, b"x" * 20_000)
    file.seek(5_000)
    guarded = Guarded(tmp_path, wrapping(file))
    environ = environ_of(**{"wsgi.file_wrapper": Wrapper})
    body: Any = guarded.app(environ, Server().start_response)
    assert type(body) is Wrapper
    assert guarded.total("http_requests_in_progress") == 1.0
    body.close()  # sent by sendfile: it was never iterated
    assert (body.closed, file.closed) == (1, True)
    assert (guarded.line()["status_code"], guarded.line()["size"]) == (200, 15_000)
    assert guarded.total("http_requests_in_progress") == 0.0
    assert current.get() is None


def test_a_wrapper_that_takes_no_close_of_ours_is_iterated(tmp_path: Path) -> None:
    guarded = Guarded(tmp_path, wrapping(file_of(tmp_path, b"x" * 10_000)))
    server = guarded.run(environ_of(**{"wsgi.file_wrapper": Slotted}))
    assert b"".join(server.sent) == b"x" * 10_000
    assert (guarded.line()["status_code"], guarded.line()["size"]) == (200, 10_000)


@pytest.mark.parametrize(
    ("length", "sent"),
    [
        pytest.param("100", 100, id="less than the rest of the file"),
        pytest.param("0", 0, id="nothing"),
        pytest.param("20000", 9_000, id="more than there is"),
        pytest.param("many", 9_000, id="no number"),
    ],
)
def test_of_a_wrapped_file_as_much_is_sent_as_its_length_says(
    length: str, sent: int, tmp_path: Path
) -> None:
    """An app may seek and let the server send a part."""
    file = file_of(tmp_path, b"x" * 10_000)
    file.seek(1_000)
    guarded = Guarded(tmp_path, wrapping(file, ("content-length", length)))
    body: Any = guarded.app(environ_of(**{"wsgi.file_wrapper": Wrapper}), Server().start_response)
    assert type(body) is Wrapper
    body.close()
    assert guarded.line()["size"] == sent


def test_a_file_without_a_descriptor_is_sent_piece_by_piece(tmp_path: Path) -> None:
    """As any server does: there is no sendfile without one."""
    file = io.BytesIO(b"x" * 10_000)
    guarded = Guarded(tmp_path, wrapping(file))
    server = guarded.run(environ_of(**{"wsgi.file_wrapper": Wrapper}))
    assert b"".join(server.sent) == b"x" * 10_000
    assert file.closed
    assert (guarded.line()["status_code"], guarded.line()["size"]) == (200, 10_000)


def test_a_wrapper_that_does_not_tell_its_file_is_iterated(tmp_path: Path) -> None:
    """waitress calls it otherwise."""

    class Other:
        def __init__(self, file: Any) -> None:
            self.file = file

        def __iter__(self) -> Iterator[bytes]:
            return iter(self.file)

        def close(self) -> None:
            self.file.close()

    guarded = Guarded(tmp_path, wrapping(file_of(tmp_path, b"abc")))
    server = guarded.run(environ_of(**{"wsgi.file_wrapper": Other}))
    assert server.sent == [b"abc"]
    assert guarded.line()["size"] == 3


def test_a_wrapper_without_close_is_recorded_at_its_end(tmp_path: Path) -> None:
    class Closeless:
        def __init__(self, filelike: Any) -> None:
            self.filelike = filelike

        def __iter__(self) -> Iterator[bytes]:
            return iter(self.filelike)

    file = file_of(tmp_path, b"abc")
    guarded = Guarded(tmp_path, wrapping(file))
    server = guarded.run(environ_of(**{"wsgi.file_wrapper": Closeless}))
    assert server.sent == [b"abc"]
    file.close()
    assert guarded.line()["status_code"] == 200


def test_a_file_wrapper_that_is_a_function_is_no_type_to_look_for(tmp_path: Path) -> None:
    guarded = Guarded(tmp_path, wrapping(io.BytesIO(b"abc")))
    server = guarded.run(environ_of(**{"wsgi.file_wrapper": lambda file: FileWrapper(file)}))
    assert b"".join(server.sent) == b"abc"
    assert guarded.line()["size"] == 3


# --- the environ


def test_a_reader_of_a_body_without_a_length_is_counted_however_it_reads(tmp_path: Path) -> None:
    def app(environ: Any, start_response: Any) -> Any:
        source = environ["wsgi.input"]
        assert source.read(3) == b"abc"
        assert source.readline() == b"d\n"
        assert source.readline(1) == b"e"
        assert source.readlines() == [b"f\n", b"g\n"]
        assert list(source) == []
        assert source.read() == b""
        assert source.seekable()
        start_response("200 OK", list(TEXT))
        return [b""]

    guarded = Guarded(tmp_path, app)
    data = io.BytesIO(b"abcd\nef\ng\n")
    chunked = {"HTTP_TRANSFER_ENCODING": "chunked", "wsgi.input": data}
    assert guarded.run(environ_of(method="POST", **chunked)).error is None
    assert guarded.total("http_request_size_bytes_sum") == 10.0


def test_counted_lines_add_up(tmp_path: Path) -> None:
    class Counted:
        received = 0

    counted: Any = Counted()
    assert list(CountedInput(io.BytesIO(b"a\nbc\n"), counted)) == [b"a\n", b"bc\n"]
    assert counted.received == 5


def test_an_input_with_a_length_is_left_alone(tmp_path: Path) -> None:
    seen: list[Any] = []

    def app(environ: Any, start_response: Any) -> Any:
        seen.append(environ["wsgi.input"])
        start_response("200 OK", list(TEXT))
        return [b""]

    source = io.BytesIO(b"abc")
    guarded = Guarded(tmp_path, app)
    guarded.run(environ_of(method="POST", CONTENT_LENGTH="3", **{"wsgi.input": source}))
    assert seen == [source]
    assert guarded.total("http_request_size_bytes_sum") == 3.0


@pytest.mark.parametrize("missing", ["REMOTE_ADDR", "SCRIPT_NAME", "PATH_INFO"])
def test_what_an_environ_may_leave_out_is_not_needed(missing: str, tmp_path: Path) -> None:
    environ = environ_of()
    del environ[missing]
    guarded = Guarded(tmp_path, answering([b"ok"]))
    server = guarded.run(environ)
    assert (server.error, server.sent) == (None, [b"ok"])
    line = guarded.line()
    assert line["client"] == (None if missing == "REMOTE_ADDR" else "127.0.0.1")
    assert line["path"] == ("" if missing == "PATH_INFO" else "/a")


@pytest.mark.parametrize(
    ("raw", "logged"),
    [
        pytest.param("/é".encode().decode("latin-1"), "/é", id="UTF-8"),
        pytest.param("/\xff", "/\N{REPLACEMENT CHARACTER}", id="no UTF-8"),
        pytest.param("/\0", "/\0", id="NUL"),
        pytest.param("/\u2028", "/?", id="not latin-1, which no server may hand on"),
    ],
)
def test_paths_are_logged_as_text(raw: str, logged: str, tmp_path: Path) -> None:
    guarded = Guarded(tmp_path, answering([b""]))
    assert guarded.run(environ_of(raw, SCRIPT_NAME="/shop")).error is None
    assert guarded.line()["path"] == f"/shop{logged}"


def test_the_exchange_is_in_the_environ_for_whoever_asks(tmp_path: Path) -> None:
    seen: list[Any] = []

    def app(environ: Any, start_response: Any) -> Any:
        seen.append((environ[KEY], current.get()))
        start_response("200 OK", list(TEXT))
        return [b""]

    Guarded(tmp_path, app).run()
    assert isinstance(seen[0][0], Exchange)
    assert seen[0][0] is seen[0][1]


def test_the_context_lasts_until_the_body_is_closed(tmp_path: Path) -> None:
    seen: list[Any] = []

    def app(environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", list(TEXT))
        for _ in range(2):
            exchange = current.get()
            seen.append(exchange and exchange.request_id)
            yield b"x"

    Guarded(tmp_path, app).run(environ_of(HTTP_X_REQUEST_ID="r-1"))
    assert seen == ["r-1", "r-1"]
    assert current.get() is None


def test_a_refusal_is_valid_wsgi(tmp_path: Path) -> None:
    ops = made(tmp_path)
    ops.at_edge(lambda exchange: Response(429, (*TEXT, ("Content-Length", "4")), b"slow"))
    guarded = Guarded(tmp_path, raising, ops=ops)
    answer = call_wsgi(guarded.app, Request("/a"))
    assert (answer.status, answer.body, answer.error) == (429, b"slow", None)


def test_a_server_that_refuses_the_headers_of_a_stream_gets_its_exception_back(
    tmp_path: Path,
) -> None:
    """The app's generator is closed by then, with the server's exception still on its way."""
    closed: list[bool] = []

    def app(environ: Any, start_response: Any) -> Any:
        start_response("200 OK", [("X-Name", "a\nb")])
        try:
            yield b"never sent"
        finally:
            closed.append(True)

    class Refusal(Exception):
        pass

    def refuse(status: str, headers: Any, exc_info: Any = None) -> Any:
        raise Refusal

    guarded = Guarded(tmp_path, app)
    with pytest.raises(Refusal):
        list(guarded.app(environ_of(), refuse))
    assert closed == [True]
    assert guarded.line()["status_code"] == 500


def test_a_refusal_by_a_handlers_wrapper_gives_back_what_edge_and_default_took(
    tmp_path: Path,
) -> None:
    limits = {"policies": {"/a": "10/minute"}, "default": "50/minute"}
    ops = made(tmp_path, limiter=limits)

    @ops.limit("1/minute")
    def rare() -> bytes:
        return b"rare"

    def app(environ: Any, start_response: Any) -> Any:
        body = rare() if environ["QUERY_STRING"] == "rare" else b"plain"
        start_response("200 OK", list(TEXT))
        return [body]

    guarded = Guarded(tmp_path, app, ops=ops)
    rarely = [guarded.run(environ_of(QUERY_STRING="rare")).status for _ in range(4)]
    assert rarely == ["200 OK", *["429 Too Many Requests"] * 3]
    server = guarded.run(environ_of(QUERY_STRING=""))
    assert server.header("x-ratelimit-remaining") == ["8"]  # of the ten: one each


@pytest.mark.parametrize("kind", ["a handler that is a generator", "an app that is one"])
def test_a_refusal_in_the_first_piece_of_a_body_is_the_answer(kind: str, tmp_path: Path) -> None:
    """What a generator calls, it calls when its first piece is asked for."""
    ops = made(tmp_path)

    @ops.limit("1/minute")
    def rare() -> bytes:
        return b"rare"

    @ops.limit("1/minute")
    def handler(environ: Any, start_response: Any) -> Iterator[bytes]:
        start_response("200 OK", list(TEXT))
        yield b"rare"

    def lazy(environ: Any, start_response: Any) -> Iterator[bytes]:
        body = rare()
        start_response("200 OK", list(TEXT))
        yield body

    guarded = Guarded(tmp_path, lazy if kind == "an app that is one" else handler, ops=ops)
    assert guarded.run().sent == [b"rare"]
    server = guarded.run(environ_of(HTTP_X_REQUEST_ID="r-1"))
    assert (server.error, server.status) == (None, "429 Too Many Requests")
    assert json.loads(b"".join(server.sent))["request_id"] == "r-1"
    assert server.header("x-request-id") == ["r-1"]
    assert guarded.total("http_requests_total", status="429") == 1.0
    assert guarded.total("http_response_size_bytes_sum") == 4 + len(b"".join(server.sent))
    assert guarded.total("http_errors_total") == 0.0
    assert guarded.total("http_requests_in_progress") == 0.0


# --- the app that is served


def test_the_apps_attributes_can_be_reached_and_a_copy_serves(tmp_path: Path) -> None:
    class App:
        name = "shop"
        serve = "the app's own"

        def __call__(self, environ: Any, start_response: Any) -> Any:
            return answering([b"abc"])(environ, start_response)

    guarded = Guarded(tmp_path, App())
    for app in (guarded.app, copy.copy(guarded.app)):
        assert (app.name, app.serve) == ("shop", "the app's own")
        with pytest.raises(AttributeError):
            _ = app.absent
        for _ in range(2):
            assert call_wsgi(app, Request("/a")).body == b"abc"
    assert guarded.total("http_requests_total") == 4.0


def test_its_arguments_may_be_given_by_name(tmp_path: Path) -> None:
    guarded = Guarded(tmp_path, answering([b"abc"]))
    for _ in range(2):
        found = guarded.app(environ=environ_of(), start_response=Server().start_response)
        assert b"".join(found) == b"abc"
    assert guarded.total("http_requests_total") == 2.0


def test_a_class_below_it_may_call_it(tmp_path: Path) -> None:
    class Mine(opsguard_wsgi.Guarded):
        def __call__(self, environ: Any, start_response: Any) -> Any:
            return super().__call__({**environ, "PATH_INFO": "/mine"}, start_response)

    ops = made(tmp_path)
    app = Mine(answering([b"abc"]), ops, lambda environ: environ["PATH_INFO"])
    for _ in range(2):
        assert call_wsgi(app, Request("/a")).status == 200
    found = parse("".join([text for _, text in ops.metrics.expose(False)]))
    assert [
        (v, ("endpoint", "/mine") in labels)
        for (name, labels), v in found.items()
        if name == "http_requests_total"
    ] == [(2.0, True)]


@pytest.mark.skipif(speed is None, reason="opsguard._speed was not built")
def test_no_frame_of_ours_is_between_the_server_and_the_app(tmp_path: Path) -> None:
    frames: list[Any] = []

    def app(environ: Any, start_response: Any) -> Any:
        frames.append(sys._getframe(1).f_code)
        return answering([b"abc"])(environ, start_response)

    guarded = Guarded(tmp_path, app)
    for _ in range(2):
        guarded.app(environ_of(), Server().start_response)
    assert frames[1] is sys._getframe().f_code
