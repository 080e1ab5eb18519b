"""The edge of a WSGI app: what passes between server and app, told to the exchange.

What the app returns decides how the end is seen: a list or tuple is whole already and goes on as
it is, a server's file wrapper too with its `close` listened to, anything else goes through `Body`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from http import HTTPStatus
from typing import Any

from opsguard.context import current
from opsguard.exchange import Exchange
from opsguard.http import Response
from opsguard.plan import Port
from opsguard_wsgi.types import (
    KEY,
    Environ,
    Label,
    Pair,
    StartResponse,
    WSGIApp,
    open_exchange,
)

__all__ = ["send_response", "serve", "status_line"]


def serve(
    app: WSGIApp, port: Port[str], *, endpoint: Label | None = None, answers: bool = True
) -> WSGIApp:
    """`app` behind an edge. `endpoint` names the route before the app runs. `answers` is False for
    a framework that answers for exceptions itself: one that it lets through is wanted outside.
    """

    def guarded(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        if KEY in environ:
            return app(environ, start_response)
        try:
            exchange = open_exchange(port, environ)
        except Exception as fault:
            port.plan.failures.report("open", fault)
            return app(environ, start_response)
        start = _starter(exchange, port, start_response)
        try:
            if endpoint is not None:
                exchange.enter_by(endpoint, environ)
            if exchange.work is not None:
                exchange.reply = exchange.work(exchange)
            if exchange.reply is not None:
                return _whole(exchange, send_response(exchange.reply, start))
            if exchange.uploads and not exchange.received:
                environ["wsgi.input"] = CountedInput(environ["wsgi.input"], exchange)
            return _body(exchange, app(environ, start), environ, start)
        except BaseException as error:
            if answers and isinstance(error, Exception):
                return Body(exchange, _answer(exchange, error, start), start)
            exchange.fail(error)
            exchange.close()
            current.set(None)
            raise

    return guarded


def send_response(response: Response, start_response: StartResponse) -> list[bytes]:
    """Start an answer of ours; returns its body."""
    start_response(status_line(response.status), list(response.headers))
    return [response.body]


def status_line(status: int) -> str:
    """The status with its reason, as `start_response` takes it."""
    try:
        return f"{status} {HTTPStatus(status).phrase}"
    except ValueError:
        return f"{status} Unknown"


def _starter(exchange: Exchange, port: Port[str], start_response: StartResponse) -> StartResponse:
    head = port.head

    def start(status: str, headers: list[Pair], exc_info: Any = None) -> Callable[[bytes], object]:
        ours = head(exchange, int(status[:3]), headers)
        if exc_info is None:
            write = start_response(status, ours)
        else:
            write = start_response(status, ours, exc_info)

        def counted(data: bytes) -> object:
            exchange.sent += len(data)
            return write(data)

        return counted

    return start


def _body(
    exchange: Exchange, body: Iterable[bytes], environ: Environ, start: StartResponse
) -> Iterable[bytes]:
    if isinstance(body, list | tuple):
        return _whole(exchange, body)
    wrapper = environ.get("wsgi.file_wrapper")
    if isinstance(wrapper, type) and isinstance(body, wrapper) and _listen(exchange, body):
        return body
    return Body(exchange, body, start)


def _whole(exchange: Exchange, body: Collection[bytes]) -> Iterable[bytes]:
    """A body that is there already: the app has done its part, and what it took is known."""
    exchange.sent += sum([len(part) for part in body])
    exchange.finish()
    exchange.close()
    current.set(None)
    return body


def _listen(exchange: Exchange, body: Any) -> bool:
    """Hear when the server closes its file wrapper; False if it takes no `close` of ours.

    The server sends the file itself, perhaps by sendfile, so its size is taken from the file.
    """
    close = getattr(body, "close", None)

    def closed() -> None:
        try:
            if close is not None:
                close()
        finally:
            exchange.finish()
            exchange.close()
            current.set(None)

    size = _file_size(body)
    try:
        body.close = closed
    except AttributeError:
        return False
    exchange.sent += size
    return True


def _file_size(body: Any) -> int:
    import os

    try:
        file = body.filelike
        return int(os.fstat(file.fileno()).st_size - file.tell())
    except (AttributeError, OSError, ValueError):
        return 0


def _answer(exchange: Exchange, error: Exception, start: StartResponse) -> Iterator[bytes]:
    """A safe answer for the client, if nothing was sent yet, then the app's exception for the
    server: it has the whole answer by then, logs the exception as it would have without us, and
    closes the connection.

    The answer is started here, not when its body is asked for: granian takes the status as soon as
    it has the iterable.
    """
    exchange.fail(error)
    if exchange.sent:
        return _then_raise(b"", error)
    answer = exchange.plan.failure(exchange, error)
    failure: Any = (type(error), error, error.__traceback__)
    try:
        start(status_line(answer.status), list(answer.headers), failure)
    except Exception as refused:  # the server says that something was sent after all
        return _then_raise(b"", refused)
    return _then_raise(answer.body, error)


def _then_raise(body: bytes, error: Exception) -> Iterator[bytes]:
    if body:
        yield body
    raise error


class Body:
    """A body that is made while it is sent. Iterated once, closed once, by one thread at a time."""

    __slots__ = ("_begun", "_body", "_exchange", "_next", "_start")

    def __init__(self, exchange: Exchange, body: Iterable[bytes], start: StartResponse) -> None:
        self._exchange = exchange
        self._body = body
        self._start = start
        self._next: Callable[[], bytes] | None = None
        self._begun = False

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        exchange = self._exchange
        try:
            if self._next is None:
                self._next = iter(self._body).__next__
            data = self._next()
        except StopIteration:
            exchange.finish()
            raise
        except Exception as error:
            data = self._failed(error)
        exchange.sent += len(data)
        self._begun = True
        return data

    def _failed(self, error: Exception) -> bytes:
        """The app raised: answer for it if nothing was sent yet, else let it through."""
        if self._begun:
            self._exchange.fail(error)
            raise error
        self._next = _answer(self._exchange, error, self._start).__next__
        return self._next()

    def close(self) -> None:
        """The server is done, at the end or before it: then the client has left."""
        exchange = self._exchange
        try:
            close = getattr(self._body, "close", None)
            if close is not None:
                close()
        finally:
            if exchange.method == "HEAD" and exchange.error is None:
                exchange.finish()  # some servers do not ask for a body they will not send
            exchange.close()
            current.set(None)


class CountedInput:
    """`wsgi.input` of a request without a length: what the app reads is counted."""

    def __init__(self, source: Any, exchange: Exchange) -> None:
        self._source = source
        self._exchange = exchange

    def read(self, *size: int) -> bytes:
        return self._count(self._source.read(*size))

    def readline(self, *size: int) -> bytes:
        return self._count(self._source.readline(*size))

    def readlines(self, *hint: int) -> list[bytes]:
        return [self._count(line) for line in self._source.readlines(*hint)]

    def __iter__(self) -> Iterator[bytes]:
        return map(self._count, self._source)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)

    def _count(self, data: bytes) -> bytes:
        self._exchange.received += len(data)
        return data
