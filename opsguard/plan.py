"""The path of a request: functions made once at install, with a step for each feature that is on
and nothing for one that is off.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from opsguard.clock import elapsed, wall
from opsguard.context import current
from opsguard.exchange import Exchange
from opsguard.http import Response
from opsguard.ids import fresh, valid
from opsguard.metrics import UNMATCHED, HttpMetrics, Metrics
from opsguard.problems import problem

if TYPE_CHECKING:
    from opsguard.guard import Runtime
    from opsguard.metrics import RouteSeries
    from opsguard.metrics.exposition import Exposition
    from opsguard.settings import Settings

__all__ = ["H", "Plan", "Port", "Protocol", "Step"]

Step = Callable[[Exchange], Response | None]
"""A check at one of the two hook points: an answer to send instead of going on, or None."""

H = TypeVar("H")
"""A response header in the form of a protocol: a pair of bytes or of str."""

PROBES = frozenset(
    {
        *("/health", "/health/live", "/health/ready", "/health/startup", "/health/detailed"),
        *("/healthz", "/livez", "/readyz"),
    }
)
"""Endpoints whose good answers are not worth a log line."""

CLIENT_LEFT = 499
_FORWARDED = "x-forwarded-for"
_LENGTH = "content-length"
_CHUNKED = "transfer-encoding"


@dataclass(frozen=True, slots=True)
class Protocol(Generic[H]):
    """How a protocol reads and writes headers.

    `exchange` is the subclass that reads a request header. `incoming(name)` is what the protocol
    calls the request header of this lower-case name; `outgoing(name)` is the name of a response
    header in lower case, in the protocol's type; `header(name)` gives the function that makes a
    response header of this name from a latin-1 value.
    """

    exchange: type[Exchange]
    incoming: Callable[[str], str | bytes]
    outgoing: Callable[[str], str | bytes]
    header: Callable[[str], Callable[[str], H]]


class Plan:
    """The path of a request for one choice of settings. Immutable; shared by all threads."""

    def __init__(self, runtime: Runtime, settings: Settings, metrics: Metrics) -> None:
        from opsguard.addresses import resolver
        from opsguard.logging import access_line

        self.settings = settings
        self.clock = elapsed
        self.failures = runtime.failures
        self.runtime = runtime
        self._metrics = metrics
        self._http = HttpMetrics(metrics, settings.metrics) if settings.metrics.enabled else None
        self._exposition: Exposition | None = None
        self._edge = self._guarded(runtime.edge)
        self._route = self._guarded(runtime.route)
        self._resolve = resolver(settings.proxies.trusted, settings.proxies.hops)
        self._endpoints: dict[str, Callable[[Exchange], Response]] = {}
        if settings.metrics.enabled:
            self._endpoints[settings.metrics.path] = self._scrape
        self._line = access_line(
            settings.logging,
            service=settings.service,
            environment=settings.environment,
            sink=runtime.sink,
            clock=wall,
        )
        self.enter = self._enter_with()
        self.close = self._close_with()

    @property
    def wanted(self) -> tuple[str, ...]:
        """Lower-case names of the request headers that `open` takes."""
        ids, proxies = self.settings.ids, self.settings.proxies
        names = [_LENGTH, _CHUNKED]
        if ids.trust_inbound:
            names += [name.lower() for name in (ids.request_header, ids.correlation_header) if name]
        if proxies.trusted or proxies.hops:
            names.append(_FORWARDED)
        return tuple(names)

    def open_with(
        self, exchange_type: type[Exchange]
    ) -> Callable[[str, str, str, str | None, Mapping[str, str] | None, Any], Exchange]:
        """The function that opens an exchange: method, the whole path, the path the router sees,
        the peer's address, the wanted headers that are there (None: none is), and the adapter's
        own request. Sets the context; an adapter calls it once for each request.
        """
        plan, clock, resolve, set_current = self, self.clock, self._resolve, current.set
        endpoints, edge, identify = self._endpoints, self._edge, self._identify

        def open(
            method: str,
            path: str,
            routed: str,
            peer: str | None,
            headers: Mapping[str, str] | None,
            source: Any,
        ) -> Exchange:
            started = clock()
            if headers is None:
                request_id = correlation_id = fresh()
                client = resolve(peer, None)
            else:
                request_id, correlation_id = identify(headers)
                client = resolve(peer, headers.get(_FORWARDED))
            exchange = exchange_type(
                plan, method, path, client, request_id, correlation_id, started, source
            )
            set_current(exchange)
            if headers is not None:
                exchange.received = _length(headers.get(_LENGTH, ""))
                exchange.uploads = exchange.received > 0 or _CHUNKED in headers
            if routed in endpoints:
                exchange.endpoint = routed
                exchange.work = endpoints[routed]
            elif edge is not None:
                exchange.reply = edge(exchange)
            return exchange

        return open

    def head_with(self, protocol: Protocol[H]) -> Callable[[Exchange, int], list[H]]:
        """The function that starts the answer: notes status and first byte, and gives the headers
        to add.
        """
        clock, ids = self.clock, self.settings.ids
        request = protocol.header(ids.request_header)

        def one(exchange: Exchange, status: int) -> list[H]:
            exchange.status = status
            exchange.first_byte = clock()
            return [request(exchange.request_id)]

        if not ids.correlation_header:
            return one
        correlation = protocol.header(ids.correlation_header)

        def both(exchange: Exchange, status: int) -> list[H]:
            exchange.status = status
            exchange.first_byte = clock()
            return [request(exchange.request_id), correlation(exchange.correlation_id)]

        return both

    @property
    def own_headers(self) -> tuple[str, ...]:
        """Names of the response headers that `head_with` adds."""
        ids = self.settings.ids
        return tuple([name for name in (ids.request_header, ids.correlation_header) if name])

    def failure(self, exchange: Exchange, error: Exception) -> Response:
        """The answer to a request whose handler raised `error`: what it was is told to developers
        only.
        """
        message = "The server failed to answer this request."
        if self.settings.development:
            message = f"{type(error).__name__}: {error}"
        return problem(500, "Internal server error", message, exchange.request_id)

    def socket_opened(self, exchange: Exchange) -> None:
        """A websocket was accepted."""
        if self._http is not None:
            self._http.socket_opened(exchange.endpoint or UNMATCHED)
            exchange.begun = True

    def close_socket(self, exchange: Exchange, error: BaseException | None) -> None:
        """A websocket ended: its gauge, and one access line with status 101, 403 or 500."""
        if exchange.closed:
            return
        exchange.closed = True
        try:
            endpoint = exchange.endpoint or UNMATCHED
            if self._http is not None and exchange.begun:
                self._http.socket_closed(endpoint)
            if self._http is not None and error is not None:
                series = self._http.series(exchange.method, endpoint)
                self._http.error(series, type(error).__name__)
            self._write(exchange, endpoint, exchange.status, self.clock() - exchange.started)
        except Exception as fault:
            self.failures.report("close", fault)
        finally:
            exchange.source = None

    def late(self, exchange: Exchange, error: BaseException) -> None:
        """The app raised after its answer had ended, in a background task for one."""
        if self._http is None:
            return
        try:
            endpoint = exchange.endpoint or UNMATCHED
            series = exchange.series or self._http.series(exchange.method, endpoint)
            self._http.error(series, type(error).__name__)
        except Exception as fault:
            self.failures.report("late", fault)

    def _identify(self, headers: Mapping[str, str]) -> tuple[str, str]:
        """Request and correlation id: the client's where they are sound, else one fresh id."""
        ids = self.settings.ids
        request_id = headers.get(ids.request_header.lower(), "")
        correlation_id = headers.get(ids.correlation_header.lower(), "")
        if not valid(correlation_id):
            correlation_id = ""
        if not valid(request_id):
            request_id = correlation_id or fresh()
        return request_id, correlation_id or request_id

    def _guarded(self, steps: Iterable[Step]) -> Step | None:
        """The steps as one; the first answer counts, a step that raises is counted and skipped."""
        steps = tuple(steps)
        if not steps:
            return None

        def run(exchange: Exchange) -> Response | None:
            for step in steps:
                try:
                    reply = step(exchange)
                except Exception as error:
                    self.failures.report(f"step:{getattr(step, '__name__', 'step')}", error)
                    continue
                if reply is not None:
                    return reply
            return None

        return run

    def _enter_with(self) -> Step:
        http, route = self._http, self._route
        if http is None:
            return route or _go_on
        routes, series_of, begin = http.routes, http.series, http.begin_with()

        def enter(exchange: Exchange) -> Response | None:
            if exchange.websocket:
                return None if route is None else route(exchange)
            try:
                endpoint = exchange.endpoint or UNMATCHED
                series = routes.get((exchange.method, endpoint))
                if series is None:
                    series = series_of(exchange.method, endpoint)
                exchange.series = series
                begin(series)
                exchange.begun = True
            except Exception as fault:
                self.failures.report("enter", fault)
            return None if route is None else route(exchange)

        return enter

    def _close_with(self) -> Callable[[Exchange], None]:
        http, clock, failures = self._http, self.clock, self.failures
        muted = PROBES | set(self._endpoints)
        finish = None if http is None else http.finish_with()
        line = self._line

        def close(exchange: Exchange) -> None:
            exchange.closed = True
            exchange.source = None
            try:
                status = exchange.status
                ended = exchange.ended
                if not ended or not status or exchange.left:
                    ended = ended or clock()
                    status = _unfinished(exchange)
                started = exchange.started
                endpoint = exchange.endpoint or UNMATCHED
                if http is not None and finish is not None:
                    series = exchange.series or http.series(exchange.method, endpoint)
                    finish(
                        series,
                        status,
                        ended - started,
                        (exchange.first_byte or ended) - started,
                        exchange.received,
                        exchange.sent,
                        exchange.begun,
                    )
                    if status >= 500 or exchange.error is not None:
                        _count_error(http, series, exchange, status)
                if status >= 400 or endpoint not in muted:
                    line(
                        exchange.method,
                        exchange.path,
                        endpoint,
                        status,
                        ended - started,
                        exchange.sent,
                        exchange.client,
                        exchange.request_id,
                        exchange.correlation_id,
                        exchange.fields,
                    )
            except Exception as fault:
                failures.report("close", fault)

        return close

    def _write(self, exchange: Exchange, endpoint: str, status: int, duration: float) -> None:
        self._line(
            exchange.method,
            exchange.path,
            endpoint,
            status,
            duration,
            exchange.sent,
            exchange.client,
            exchange.request_id,
            exchange.correlation_id,
            exchange.fields,
        )

    def _scrape(self, exchange: Exchange) -> Response:
        """The answer of the metrics endpoint. Blocks; never raises."""
        if self._exposition is None:
            self._exposition = self._sources()
        return self._exposition.render(
            exchange.method, exchange.header("accept"), exchange.header("accept-encoding")
        )

    def _sources(self) -> Exposition:
        from prometheus_client import REGISTRY

        from opsguard.metrics.exposition import Exposition
        from opsguard.metrics.process import ProcessCollector

        settings, metrics = self.settings, self._metrics
        info = metrics.gauge(
            "service_info",
            "The service, always 1.",
            ("service", "version", "git_sha", "environment"),
        )
        labels = (settings.service, settings.version, settings.git_sha, settings.environment)
        info.labels(*labels).set(1)
        shared = () if metrics is self.runtime.ops.metrics else (self.runtime.ops.metrics,)
        return Exposition(
            (metrics, *shared, ProcessCollector(), REGISTRY),
            failures=self.failures.report,
            clock=time.monotonic,
        )


class Port(Generic[H]):
    """A plan in the words of one protocol.

    An adapter reads the attributes anew for each request: `override` exchanges them in tests.
    `wanted` maps the request headers that `open` takes, in the protocol's own naming, to their
    lower-case names; `own_headers` are the names of the response headers that `head` gives, in
    lower case, in the protocol's own form.
    """

    __slots__ = ("head", "open", "own_headers", "plan", "protocol", "wanted")

    def __init__(self, protocol: Protocol[H], plan: Plan) -> None:
        self.protocol = protocol
        self.adopt(plan)

    def adopt(self, plan: Plan) -> None:
        self.plan = plan
        self.open = plan.open_with(self.protocol.exchange)
        self.head = plan.head_with(self.protocol)
        self.wanted = {self.protocol.incoming(name): name for name in plan.wanted}
        self.own_headers = frozenset([self.protocol.outgoing(name) for name in plan.own_headers])


def _count_error(
    http: HttpMetrics, series: Any, exchange: Exchange, status: int
) -> None:
    error = exchange.error
    if error is None:
        http.error(series, str(status))
    elif status != CLIENT_LEFT:
        http.error(series, type(error).__name__)


def _unfinished(exchange: Exchange) -> int:
    """The status of an answer whose last byte never went."""
    if exchange.left or (exchange.error is None and exchange.status):
        return CLIENT_LEFT
    return exchange.status or 500


def _length(text: str) -> int:
    """A Content-Length as a number; 0 for what is none (a server has refused it or will)."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 19 else 0


def _go_on(exchange: Exchange) -> None:
    return None
