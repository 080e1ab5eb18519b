"""The middleware: edge and route hook of a Django project, sync and async natively."""

from __future__ import annotations

import threading
from asyncio import CancelledError
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from asgiref.sync import iscoroutinefunction, markcoroutinefunction
from django.core.signals import got_request_exception
from django.http import FileResponse, HttpRequest, HttpResponse, StreamingHttpResponse
from django.http.response import HttpResponseBase

from opsguard import Exchange, Response
from opsguard.accelerator import speed
from opsguard.calls import Front, straight
from opsguard.context import Within, current, leave
from opsguard.exceptions import Refused
from opsguard.exchange import asettled, settled
from opsguard.forks import in_each_child
from opsguard.http import Pending
from opsguard_asgi import off_loop
from opsguard_django.project import project_ops
from opsguard_django.routes import announce_routes, project_routes
from opsguard_django.templates import template
from opsguard_wsgi import KEY, PROTOCOL

__all__ = ["OpsGuardMiddleware"]


_NO_SCOPE: dict[str, Any] = {}
_OURS = "_opsguard_headers"
"""The response's attribute for what we put into its headers: an app may send it once more."""
_adding = threading.Lock()


def _after_fork() -> None:
    global _adding
    _adding = threading.Lock()


in_each_child(_after_fork)


@straight
class OpsGuardMiddleware(Front):
    """First in MIDDLEWARE. Holds nothing of a request; safe for any number of threads and tasks.

    Views find whose API key a request came with in ``request.opsguard_identity``: None without one.
    Made when Django loads its handler: then it raises DeclarationError for limits and required keys
    that no route carries. At the first request it is logged how many routes are limited.
    """

    sync_capable = True
    async_capable = True

    def __init__(self, get_response: Callable[[HttpRequest], Any]) -> None:
        self.get_response = get_response
        runtime = project_ops().runtime()
        self.port = runtime.port(PROTOCOL)
        if project_routes not in runtime.sources:
            runtime.sources.append(project_routes)
        announce_routes(runtime)
        self.process_view: Callable[..., Any] = self._enter
        self._serve = self._serve_sync
        got_request_exception.connect(_note_exception, dispatch_uid="opsguard")
        self._async = iscoroutinefunction(get_response)
        if self._async:
            markcoroutinefunction(self)
            # A sync process_view would cost a thread hop for each request.
            self.process_view = self._enter_async
            self._serve = self._serve_async
        elif speed is not None and self.port.door is not None:
            self._speed_up()

    def __call__(self, request: HttpRequest) -> Any:
        return self._serve(request)

    def _speed_up(self) -> None:
        """Let the usual request of a sync project go through C."""
        self._serve = speed.Middle(
            port=self.port,
            get_response=self.get_response,
            served=self._serve_sync,
            go_on=self._go_on,
            finish=self._finish,
            failed=_failed,
            key=KEY,
            plain=HttpResponse,
        )
        self.process_view = speed.Entry(
            slow=self._enter, template=template, answer=_answered, key=KEY
        )

    def _serve_sync(self, request: HttpRequest) -> HttpResponseBase:
        exchange = self._open(request)
        if exchange is None:
            outer: HttpResponseBase = self.get_response(request)
            return outer
        return self._go_on(exchange, request)

    def _go_on(self, exchange: Exchange, request: HttpRequest) -> HttpResponseBase:
        try:
            instead = None
            if exchange.work is not None or exchange.reply is not None:
                instead = exchange.told()
            if instead is None:
                response: HttpResponseBase = self.get_response(request)
            else:
                response = _answer(instead)
            return self._finish(exchange, response)
        except BaseException as error:
            _failed(exchange, error)
            raise

    async def _serve_async(self, request: HttpRequest) -> HttpResponseBase:
        exchange = self._open(request)
        if exchange is None:
            outer: HttpResponseBase = await self.get_response(request)
            return outer
        try:
            instead = None
            if exchange.work is not None:
                exchange.reply = await off_loop(exchange.work, exchange)
            if exchange.reply is not None:
                instead = await exchange.atold()
            if instead is None:
                response: HttpResponseBase = await self.get_response(request)
            else:
                response = _answer(instead)
            return self._finish(exchange, response)
        except BaseException as error:
            _failed(exchange, error)
            raise

    def _enter(self, request: HttpRequest, view: Any, args: Any, kwargs: Any) -> Any:
        """The route hook: the first `process_view`, before any view."""
        return _answered(_entered(request, view))

    async def _enter_async(self, request: HttpRequest, view: Any, args: Any, kwargs: Any) -> Any:
        found = _entered(request, view)
        reply = None if found is None else await asettled(found)
        return None if reply is None else _answer(reply)

    def process_exception(self, request: HttpRequest, exception: Exception) -> Any:
        """A refusal that a handler's wrapper raised, because it was not called by its route."""
        return _answer(exception.response) if isinstance(exception, Refused) else None

    def _open(self, request: HttpRequest) -> Exchange | None:
        """The exchange to serve, or None if an edge outside of Django has opened one already, or if
        that failed: then the project answers without us.
        """
        meta = request.META
        scope: Any = getattr(request, "scope", None)  # an ASGI request has one
        if not isinstance(scope, dict):
            scope = _NO_SCOPE
        outer = meta.get(KEY) or scope.get("opsguard.exchange")
        if outer is not None:
            meta[KEY] = outer
            return None
        peer = meta.get("REMOTE_ADDR") or None
        path, routed, port = request.path, request.path_info, self.port
        try:
            # As the client sent it: request.method is in upper case already.
            method = scope.get("method") or meta["REQUEST_METHOD"]
            exchange: Exchange = port.open(method, path, routed, peer, port.gather(meta), meta)
        except Exception as fault:
            port.plan.failures.report("open", fault)
            return None
        meta[KEY] = exchange
        return exchange

    def _finish(self, exchange: Exchange, response: HttpResponseBase) -> HttpResponseBase:
        """Add our headers, and hear when the last byte is out."""
        _add_headers(response, self.port.head(exchange, response.status_code, ()))
        if isinstance(response, HttpResponse):
            whole = True
            exchange.sent = len(response.content)
        elif isinstance(response, StreamingHttpResponse) and not isinstance(response, FileResponse):
            whole = exchange.method == "HEAD"  # Django's servers don't ask for a body then
            _count_stream(exchange, response)
        else:
            whole = True  # a file, which the server may send by itself
            exchange.sent = int(response.headers.get("Content-Length", 0))
        closers: list[Any] = response._resource_closers  # type: ignore[attr-defined]
        if whole and closers:  # the last byte is out before what the app does then
            closers.insert(0, exchange.finish)
            whole = False
        # Under ASGI the middleware runs in a task of its own (until Django 6.1), and so does an
        # async stream under WSGI: what comes after them (a stream, the app's closers) knows the
        # request only if it is told again. So it is where a view has asked for this answer, which
        # goes on before it closes that.
        nested = exchange.outer is not None
        apart = self._async or "wsgi.input" not in exchange.source
        if nested:
            visit = Visit(exchange)
            closers.insert(0, visit.begin)
            closers += (Closer(exchange, whole), visit.end)
            leave(exchange)
            return response
        if apart or getattr(response, "is_async", False):
            closers.insert(0, partial(current.set, exchange))
        closers.append(Closer(exchange, whole))
        return response


def _entered(request: HttpRequest, view: Any) -> Response | Pending | None:
    exchange: Exchange | None = request.META.get(KEY)
    if exchange is None:
        return None
    request.opsguard_identity = exchange.identity  # type: ignore[attr-defined]
    if request.resolver_match is None:
        return None
    return exchange.enter(template(request.resolver_match.route or ""), view)


def _add_headers(response: HttpResponseBase, ours: list[tuple[str, str]]) -> None:
    """Add what the app has not set itself. What a response has from the last time that the app
    sent it goes: that was another client's.
    """
    # Threads may send one response at once: none must take another's headers for the app's.
    with _adding:
        _put_headers(response, ours)


def _put_headers(response: HttpResponseBase, ours: list[tuple[str, str]]) -> None:
    before = getattr(response, _OURS, None)
    if before is not None:
        # Another object: that answer may still be on its way, in another thread.
        kept = [pair for pair in response.headers.items() if pair not in before]
        response.headers = type(response.headers)(dict(kept))
    headers = response.headers
    # Django's own `setdefault` raises and catches a KeyError, and converts what is ASCII already.
    # Its dictionary is private, so without it the long way is taken.
    store = getattr(headers, "_store", None)
    if type(store) is dict:
        ours = [pair for pair in ours if store.setdefault(pair[0].lower(), pair) is pair]
    else:
        ours = [pair for pair in ours if pair[0] not in headers]
        for name, value in ours:
            headers[name] = value
    setattr(response, _OURS, ours)


class Visit:
    """Who closes the answer of a request that was served within another keeps its own context."""

    __slots__ = ("_before", "_exchange")

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._before: Exchange | None = None

    def begin(self) -> None:
        self._before = current.get()
        current.set(self._exchange)

    def end(self) -> None:
        current.set(self._before)
        self._before = None


class Closer:
    """Called when Django closes the response: the last byte is out. `whole`: nothing else says
    whether that is so. If Django drops the response without closing it, as its ASGI handler does
    when sending fails, the end is heard when it is collected.
    """

    __slots__ = ("_exchange", "_whole")

    def __init__(self, exchange: Exchange, whole: bool) -> None:
        self._exchange = exchange
        self._whole = whole

    def __call__(self) -> None:
        if self._whole:
            self._exchange.finish()
        self._exchange.close()
        leave(self._exchange)

    def __del__(self) -> None:
        self._exchange.close()


if not TYPE_CHECKING and speed is not None:
    Closer = speed.Closer


def _count_stream(exchange: Exchange, response: StreamingHttpResponse) -> None:
    """Count what a stream yields, and note whether it comes to its end."""
    content: Any = response.streaming_content
    nested = exchange.outer is not None

    def count() -> Iterator[bytes]:
        current.set(exchange)
        for part in _noting(exchange, content):
            exchange.sent += len(part)
            yield part
        exchange.finish()

    async def count_async() -> AsyncIterator[bytes]:
        current.set(exchange)
        try:
            async for part in content:
                exchange.sent += len(part)
                if nested:
                    leave(exchange)
                yield part
                if nested:
                    current.set(exchange)
            exchange.finish()
        except Exception as error:
            exchange.fail(error)
            raise
        finally:
            exchange.close()
            leave(exchange)  # Django 6.1 streams in the server's task, and does not close then

    if response.is_async:
        response.streaming_content = count_async()
    else:
        response.streaming_content = Within(exchange, count()) if nested else count()


def _noting(exchange: Exchange, content: Any) -> Iterator[bytes]:
    try:
        yield from content
    except Exception as error:
        exchange.fail(error)
        raise


def _answer(reply: Response) -> HttpResponse:
    return HttpResponse(reply.body, status=reply.status, headers=dict(reply.headers))


def _answered(reply: Response | Pending | None) -> HttpResponse | None:
    """What the route's check says, as Django takes it from a `process_view`. Blocks."""
    told = settled(reply)
    return None if told is None else _answer(told)


def _failed(exchange: Exchange, error: BaseException) -> None:
    """Only what Django does not turn into an answer comes here: a cancelled task for one."""
    if isinstance(error, CancelledError):
        exchange.left = True
    else:
        exchange.fail(error)
    exchange.close()
    leave(exchange)


def _note_exception(sender: Any, request: HttpRequest | None = None, **_: Any) -> None:
    """Django answers for exceptions itself, before they reach any middleware."""
    import sys

    exchange: Exchange | None = request.META.get(KEY) if request is not None else None
    error = sys.exc_info()[1]
    if exchange is not None and error is not None:
        exchange.fail(error)
