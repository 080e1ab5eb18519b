"""The edge of a WSGI app: what passes between server and app, told to the exchange.

What the app returns decides how the end is seen: a list or tuple is whole already and goes on as
it is, a server's wrapper round a file of the system's too, with its `close` listened to; anything
else goes through `Body`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from http import HTTPStatus
from typing import Any

from opsguard.accelerator import speed
from opsguard.context import Within, leave
from opsguard.exceptions import Refused
from opsguard.exchange import Exchange
from opsguard.http import Response
from opsguard.ports import Port
from opsguard_wsgi.gunicorn import keeps_headers
from opsguard_wsgi.types import (
    KEY,
    ROOT,
    Environ,
    Label,
    Pair,
    StartResponse,
    WSGIApp,
    open_exchange,
    text,
)

__all__ = ["send_response", "serve", "status_line"]


Answer = Callable[[Exchange, Exception, "Start"], Iterator[bytes]]

TAKING_OVER = (StopIteration, ConnectionError)
"""What an app raises to tell its server (gunicorn, Werkzeug's own) to leave the connection to it.
A connection that fails is of a class below."""


def serve(
    app: WSGIApp,
    port: Port[str],
    *,
    endpoint: Label | None = None,
    propagates: Callable[[], bool] | None = None,
) -> WSGIApp:
    """`app` behind an edge. `endpoint` names the route before the app runs. `propagates` is for a
    framework that answers for exceptions itself, so that one it raises is wanted outside: it says
    whether one of a body's first piece is too, of which the framework does not hear.
    """

    def guarded(environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        if KEY in environ:
            return app(environ, start_response)
        try:
            exchange = open_exchange(port, environ)
        except Exception as fault:
            port.plan.failures.report("open", fault)
            return app(environ, start_response)
        start = Start(exchange, port, start_response)
        try:
            if endpoint is not None:
                exchange.enter_by(endpoint, environ)
            if exchange.work is not None or exchange.reply is not None:
                instead = refuse(exchange, environ, start)
                if instead is not None:
                    return _whole(exchange, instead, start)
            if exchange.uploads and not exchange.received:
                _count_input(environ, exchange)
            return body_of(exchange, app(environ, start), environ, start)
        except BaseException as error:
            body = failed(exchange, error, start)
            if body is None:
                raise
            return body

    def refuse(exchange: Exchange, environ: Environ, start: Start) -> list[bytes] | None:
        """The answer that is sent instead of the app's; None if the app is to answer after all."""
        reply = exchange.told(endpoint, environ)
        return None if reply is None else send_response(reply, start)

    def failed(exchange: Exchange, error: BaseException, start: Start) -> Iterable[bytes] | None:
        """The app raised: an answer of ours, or None if the exception is to go on."""
        if isinstance(error, Refused) and not start.asked:  # by a handler's wrapper
            return refused(exchange, error, start)
        unstarted = start.headers is None and not start.asked
        if unstarted and type(error) in TAKING_OVER and exchange.taken_over():
            leave(exchange)
            return None
        if propagates is None and isinstance(error, Exception) and not start.asked:
            return _streamed(exchange, answer(exchange, error, start), start, answer)
        exchange.fail(error)
        start.fail()
        exchange.close()
        leave(exchange)
        return None

    def refused(exchange: Exchange, error: Refused, start: Start) -> Iterable[bytes]:
        try:
            return _whole(exchange, send_response(error.response, start, again=error), start)
        except BaseException as fault:  # the server takes no start
            exchange.fail(fault)
            exchange.close()
            leave(exchange)
            raise

    def answer(exchange: Exchange, error: Exception, start: Start) -> Iterator[bytes]:
        """What is sent where the app failed before its first piece was there."""
        return _answer(exchange, error, start, propagates is not None and propagates())

    def body_of(
        exchange: Exchange, body: Iterable[bytes], environ: Environ, start: Start
    ) -> Iterable[bytes]:
        if isinstance(body, list | tuple):
            return _whole(exchange, body, start)
        wrapper = environ.get("wsgi.file_wrapper")
        # Within another request nobody sends the file as one: who asked for it reads the pieces.
        if exchange.outer is None and isinstance(wrapper, type) and isinstance(body, wrapper):
            size = _file_size(body, start.headers)
            if size is not None and _listen(exchange, body, size):
                start.go()
                return body
        return _streamed(exchange, body, start, answer)

    if port.door is None:
        return guarded
    twin: WSGIApp = speed.Gate(
        app=app,
        port=port,
        guarded=guarded,
        key=KEY,
        root=ROOT,
        endpoint=endpoint,
        text=text,
        counted=_count_input,
        refuse=refuse,
        other=body_of,
        failed=failed,
        answer=answer,
        keeps=keeps_headers,
        within=Within,
    )
    return twin


def _count_input(environ: Environ, exchange: Exchange) -> None:
    environ["wsgi.input"] = CountedInput(environ["wsgi.input"], exchange)


def send_response(
    response: Response, start_response: StartResponse, again: BaseException | None = None
) -> list[bytes]:
    """Start an answer of ours, in place of one that `again` came after; returns its body."""
    failure: Any = () if again is None else ((type(again), again, again.__traceback__),)
    start_response(status_line(response.status), list(response.headers), *failure)
    return [response.body]


def status_line(status: int) -> str:
    """The status with its reason, as `start_response` takes it."""
    try:
        return f"{status} {HTTPStatus(status).phrase}"
    except ValueError:
        return f"{status} Unknown"


class Start:
    """`start_response` as the app sees it. The server's own is called when the first piece of the
    body is there, so what an app takes back before that never reaches the server.

    PEP 3333 lets `exc_info` replace what was started; gunicorn sends the headers of both, two
    lengths among them.
    """

    __slots__ = ("_exchange", "_head", "_server", "_status", "_write", "asked", "headers")

    def __init__(self, exchange: Exchange, port: Port[str], server: StartResponse) -> None:
        self._exchange = exchange
        self._head = port.head
        self._server = server
        self._status = ""
        self._write: Callable[[bytes], object] | None = None
        self.headers: list[Pair] | None = None
        """Of a start that the server has not heard of yet."""
        self.asked = False
        """The server has heard of a start: nothing may be started in its place any more."""

    def __call__(
        self, status: str, headers: list[Pair], exc_info: Any = None
    ) -> Callable[[bytes], object]:
        if self.asked:
            return self._again(status, headers, exc_info)
        if self.headers is not None and exc_info is None:
            raise AssertionError("start_response() was called twice")
        self.headers = self._head(self._exchange, int(status[:3]), headers)
        self._status = status
        return self.write

    def _again(self, status: str, headers: list[Pair], exc_info: Any) -> Callable[[bytes], object]:
        """Another start: the server takes it as long as it has sent nothing but empty pieces, else
        it says in its own way that it is too late.
        """
        exchange = self._exchange
        begun = exchange.status, exchange.first_byte
        ours = self._head(exchange, int(status[:3]), headers)
        try:
            self._write = self._server(status, ours, *((exc_info,) if exc_info else ()))
        except BaseException:
            exchange.status, exchange.first_byte = begun
            raise
        return self.write

    def go(self) -> None:
        """There is something to send now, or nothing at all."""
        if self.headers is not None:
            headers, self.headers = self.headers, None
            self.asked = True
            try:
                self._write = self._server(self._status, headers)
            except Exception:
                self._exchange.status = 500  # it refuses the headers, and answers for that
                raise
        elif not self.asked:
            self._exchange.taken_over()

    def fail(self) -> None:
        """The app failed, and is not answered for: a start that was not heard of is none."""
        if not self.asked:
            self._exchange.status = 500

    def write(self, data: bytes) -> object:
        """What PEP 3333 calls the `write()` callable."""
        self.go()
        self._exchange.sent += len(data)
        assert self._write is not None  # it is given out by the start only
        return self._write(data)


def _whole(exchange: Exchange, body: Collection[bytes], start: Start) -> Iterable[bytes]:
    """A body that is there already: the app has done its part, and what it took is known."""
    start.go()
    exchange.sent += sum([len(part) for part in body])
    exchange.finish()
    exchange.close()
    leave(exchange)
    return body


def _streamed(
    exchange: Exchange, body: Iterable[bytes], start: Start, answer: Answer
) -> Iterable[bytes]:
    """A body that is made while it is sent. Its first piece is asked for at once, as the server
    would do next: if the app fails there, it can still be answered for.
    """
    made = Body(exchange, body)
    try:
        made.begin(start, answer)
    except BaseException as error:  # the server never gets the body, so it cannot close it
        exchange.fail(error)
        start.fail()
        made.close()
        raise
    if exchange.outer is None:
        return made
    leave(exchange)  # who asked for it goes on before it has read and closed it
    return Within(exchange, made)


def _listen(exchange: Exchange, body: Any, size: int) -> bool:
    """Hear when the server closes its file wrapper; False if it takes no `close` of ours.

    The server sends the file itself, perhaps by sendfile, so `size` is what it will send.
    """
    close = getattr(body, "close", None)

    def closed() -> None:
        try:
            if close is not None:
                close()
        finally:
            exchange.finish()
            exchange.close()
            leave(exchange)

    try:
        body.close = closed
    except AttributeError:
        return False
    exchange.sent += size
    return True


def _file_size(body: Any, headers: Iterable[Pair] | None) -> int | None:
    """How much of a wrapped file is sent: to its end, or as much as Content-Length says. None for
    one without a descriptor, as in memory: no server sends that in another way than piece by piece.
    """
    import os

    try:
        file = body.filelike
        size: int = max(0, os.fstat(file.fileno()).st_size - file.tell())
        for name, value in headers or ():
            if name.lower() == "content-length" and value.isascii() and value.isdigit():
                size = min(size, int(value))
    except (AttributeError, OSError, TypeError, ValueError):
        return None
    return size


def _answer(
    exchange: Exchange, error: Exception, start: Start, propagates: bool
) -> Iterator[bytes]:
    """A safe answer for the client, if nothing was sent yet and nobody waits for the exception as
    it is; then the app's exception for the server: it has the whole answer by then, logs the
    exception as it would have without us, and closes the connection. A refusal is its answer, and
    no failure.
    """
    if isinstance(error, Refused) and not start.asked:  # by the wrapper of a generator, for one
        yield from send_response(error.response, start, again=error)
        return
    exchange.fail(error)
    if not (start.asked or propagates):
        answer = exchange.plan.failure(exchange, error)
        failure: Any = (type(error), error, error.__traceback__)
        start(status_line(answer.status), list(answer.headers), failure)
        yield answer.body
    raise error


class Body:
    """A body that is made while it is sent. Iterated once, closed once, by one thread at a time. If
    nobody closes it, as test clients do whose answers nobody reads, its end is heard when it goes.
    """

    __slots__ = ("_body", "_exchange", "_first", "_next")

    def __init__(self, exchange: Exchange, body: Iterable[bytes]) -> None:
        self._exchange = exchange
        self._body = body
        self._next: Callable[[], bytes] | None = None
        self._first: bytes | None = None

    def begin(self, start: Start, answer: Answer) -> None:
        """Have the first piece, or an answer of ours if there is none because the app failed."""
        try:
            self._next = iter(self._body).__next__
            self._first = self._next()
        except StopIteration:
            pass  # it will say so again
        except Exception as error:
            self._next = answer(self._exchange, error, start).__next__
            self._first = None if start.asked else self._next()
        start.go()

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        exchange = self._exchange
        try:
            data, self._first = self._first, None
            if data is None:
                assert self._next is not None
                data = self._next()
        except StopIteration:
            exchange.finish()
            raise
        except Exception as error:
            exchange.fail(error)
            raise
        exchange.sent += len(data)
        return data

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
            leave(exchange)

    def __del__(self) -> None:
        self._exchange.close()


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
