"""The path of a request: functions made once at install, with a step for each feature that is on
and nothing for one that is off.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar, cast

from opsguard.accelerator import speed
from opsguard.clock import Clock, elapsed, wall
from opsguard.context import current
from opsguard.endpoints import Scrape
from opsguard.exceptions import Refused
from opsguard.exchange import Exchange, Socket
from opsguard.http import Pending, Response
from opsguard.ids import fresh, valid
from opsguard.marks import Marks
from opsguard.metrics import UNMATCHED, HttpMetrics, Metrics
from opsguard.problems import problem
from opsguard.steps import Step, chained

if TYPE_CHECKING:
    from opsguard.keys import Identity
    from opsguard.logging import AccessLine, AccessLog
    from opsguard.ports import Port, Protocol, T
    from opsguard.runtime import Runtime
    from opsguard.settings import Settings

__all__ = ["Plan"]

X = TypeVar("X", bound=Exchange)

_PROBES = (
    *("/health", "/health/live", "/health/ready", "/health/startup", "/health/detailed"),
    *("/healthz", "/livez", "/readyz"),
)
PROBES = frozenset((*_PROBES, *(f"{path}/" for path in _PROBES)))
"""Endpoints whose good answers are not worth a log line; Django's end with a slash."""

CLIENT_LEFT = 499
_FORWARDED = "x-forwarded-for"
_LENGTH = "content-length"
_CHUNKED = "transfer-encoding"
_AUTHORIZATION = "authorization"


class Plan:
    """The path of a request for one choice of settings. Immutable; shared by all threads."""

    def __init__(
        self, runtime: Runtime, settings: Settings, metrics: Metrics, like: Plan | None = None
    ) -> None:
        """`like`: a plan of the same settings, whose numbers and log this one goes on with."""
        from opsguard.addresses import resolver

        self.settings = settings
        self.clock = elapsed
        self.failures = runtime.failures
        self.runtime = runtime
        self.metrics = metrics
        self._http: HttpMetrics | None = None
        if like is not None:
            self._http = like._http
        elif settings.metrics.enabled:
            self._http = HttpMetrics(metrics, settings.metrics)
        self.admission = runtime.admission(settings, metrics)
        ours = self.admission
        report = self.failures.report
        self._edge = chained(None if ours is None else ours.at_edge, runtime.edge, report)
        self._route = chained(None if ours is None else ours.at_route, runtime.route, report)
        self._resolve = resolver(settings.proxies.trusted, settings.proxies.hops)
        self._endpoints: dict[str, Callable[[Exchange], Response]] = {}
        # Protected means behind a token or key, which are not there yet: until then it is closed.
        if settings.metrics.enabled and not settings.metrics.protected:
            scrape = Scrape(runtime, settings, metrics)
            self._endpoints[settings.metrics.path] = self._limited(scrape)
        self._log: AccessLog | None = self._access_log() if like is None else like._log
        self.enter: Step = self._enter_with()
        self.enter_socket = self._route or _go_on
        self.close: Callable[[Exchange], None] = self._close_with()
        self.core: Any = self._core()
        if self.core is not None:
            self.enter, self.close = self.core.enter, self.core.close

    @property
    def wanted(self) -> tuple[str, ...]:
        """Lower-case names of the request headers that `open` takes."""
        ids, proxies = self.settings.ids, self.settings.proxies
        names = [_LENGTH, _CHUNKED]
        if ids.trust_inbound:
            names += [name.lower() for name in (ids.request_header, ids.correlation_header) if name]
        if proxies.trusted or proxies.hops:
            names.append(_FORWARDED)
        if self._key_header:
            names += [self._key_header, _AUTHORIZATION]
        return tuple(dict.fromkeys(names))

    @property
    def _key_header(self) -> str:
        """The lower-case name of the header that API keys come in; "" where none are used."""
        ours = self.admission
        return "" if ours is None or ours.guard is None else ours.guard.header

    def open_with(
        self, exchange_type: type[X]
    ) -> Callable[[str, str, str, str | None, Mapping[str, str] | None, Any], X]:
        """The function that opens an exchange: method, the whole path, the path the router sees,
        the peer's address, the wanted headers that are there (None: none is), and the adapter's
        own request. Sets the context; an adapter calls it once for each request.
        """
        plan, clock = self, self.clock
        get_current, set_current, reset_current = current.get, current.set, current.reset
        proxies = self.settings.proxies
        resolve = self._resolve if proxies.trusted or proxies.hops else None
        edge, identify = self._edge, self._identify
        # A websocket is not answered by an endpoint of ours, so there it goes through all checks.
        endpoints = {} if exchange_type.websocket else self._endpoints

        def open(
            method: str,
            path: str,
            routed: str,
            peer: str | None,
            headers: Mapping[str, str] | None,
            source: Any,
        ) -> X:
            exchange = exchange_type()
            exchange.started = clock()
            exchange.plan = plan
            exchange.method = method
            exchange.path = path
            exchange.client = peer
            exchange.source = source
            exchange.status = exchange.sent = exchange.received = 0
            exchange.first_byte = exchange.ended = 0.0
            exchange.uploads = exchange.left = exchange.closed = exchange.correlated = False
            exchange.endpoint = exchange.series = exchange.fields = exchange.error = None
            exchange.reply = exchange.work = exchange.identity = exchange.credentials = None
            exchange.held = exchange.extra = exchange.marked = None
            exchange.charged = ()
            exchange.routed = routed
            if headers is None:
                exchange.request_id = exchange.correlation_id = fresh()
            else:
                identify(exchange, headers)
            if resolve is not None:
                forwarded = None if headers is None else headers.get(_FORWARDED)
                exchange.client = resolve(peer, forwarded)
            outer = get_current()
            exchange.outer = outer if outer is not None and outer.goes_on else None
            token = set_current(exchange)
            try:
                if routed in endpoints:
                    exchange.endpoint = routed
                    exchange.work = endpoints[routed]
                elif edge is not None:
                    exchange.reply = edge(exchange)
            except BaseException:  # nobody will close it
                reset_current(token)
                raise
            return exchange

        return open

    def head_with(
        self, protocol: Protocol[T]
    ) -> Callable[[Exchange, int, Iterable[tuple[T, T]]], list[tuple[T, T]]]:
        """The function that starts the answer: notes its status and its first byte, and gives the
        app's headers with ours behind them. A header that the app sets itself is left to it. The
        list is new: the app may keep its own for the next answer.
        """
        clock, ids = self.clock, self.settings.ids
        fold, value, spell = protocol.fold, protocol.value, protocol.name
        request = protocol.name(ids.request_header)
        correlation = protocol.name(ids.correlation_header) if ids.correlation_header else None
        always = ids.answer_correlation == "always"
        ours = frozenset([fold(name) for name in (request, correlation) if name is not None])
        unset = ours.isdisjoint
        names_of = protocol.names or (lambda headers: [fold(name) for name, _ in headers])

        def head(
            exchange: Exchange, status: int, headers: Iterable[tuple[T, T]]
        ) -> list[tuple[T, T]]:
            if type(headers) is not list:
                headers = list(headers)  # any iterable will do, and it is read twice
            request_id = value(exchange.request_id)
            if correlation is None or not (always or exchange.correlated):
                added = [*headers, (request, request_id)]
            elif exchange.correlation_id is exchange.request_id:
                added = [*headers, (request, request_id), (correlation, request_id)]
            else:
                other = value(exchange.correlation_id)
                added = [*headers, (request, request_id), (correlation, other)]
            if not unset(names_of(headers)):
                added = _without_ours(added, headers, fold, ours)
            if exchange.extra:
                added += [(spell(name), value(text)) for name, text in exchange.extra]
            exchange.status = status
            exchange.first_byte = clock()
            return added

        return head

    def _core(self) -> Any:
        """`enter`, `close` and what `open` needs of a plan, in C; None where that is not used."""
        http, log = self._http, self._log
        if speed is None:
            return None
        proxies, resolve = self.settings.proxies, self._resolve

        def client(peer: str | None, headers: Mapping[str, str] | None) -> str | None:
            return resolve(peer, None if headers is None else headers.get(_FORWARDED))

        def count_error(exchange: Exchange) -> None:
            if http is not None:
                _count_error(http.error, exchange)

        return speed.Core(
            plan=self,
            current=current,
            endpoints=self._endpoints,
            edge=self._edge,
            identify=self._identify,
            resolve=client if proxies.trusted or proxies.hops else None,
            route=self._route,
            begin=None if http is None else http.begin_with(),
            record=None if http is None else http.record_with(),
            queue=None if log is None else log.queue,
            most=0 if log is None else log.most,
            longest=0.0 if log is None else log.longest,
            drain=_nothing if log is None else log.drain,
            nudge=_nothing if log is None else log.nudge,
            muted=PROBES | set(self._endpoints),
            count_error=count_error,
            release=_nothing if self.admission is None else self.admission.release,
            report=self.failures.report,
            key_header=self._key_header or None,
        )

    def shut(self) -> None:
        """Close what only this plan has open: the stores of an override that has ended."""
        if self.admission is not None:
            self.admission.close(keys=self.settings.keys != self.runtime.ops.settings.keys)

    def door(self, port: Port[T]) -> Any:
        """`open` and `head` of a port in C, or None."""
        if self.core is None:
            return None
        ids, protocol = self.settings.ids, port.protocol
        return speed.Door(
            core=self.core,
            exchange=protocol.exchange,
            requests=not protocol.exchange.websocket,
            request=protocol.name(ids.request_header),
            correlation=protocol.name(ids.correlation_header) if ids.correlation_header else None,
            spell=protocol.name,
            always=ids.answer_correlation == "always",
            head=port.head,
            wanted=port.wanted,
        )

    def failure(self, exchange: Exchange, error: Exception) -> Response:
        """The answer to a request whose handler raised `error`: what it was is told to developers
        only.
        """
        message = "The server failed to answer this request."
        if self.settings.development:
            message = f"{type(error).__name__}: {error}"
        return problem(500, "Internal server error", message, exchange.request_id)

    def _access_log(self) -> AccessLog | None:
        """Where closed exchanges leave their line; None if access lines are off."""
        from opsguard.logging import AccessLog, access_line, access_template

        settings, sink = self.settings, self.runtime.sink
        if settings.logging.access == "off":
            return None

        def line(clock: Clock) -> AccessLine:
            return access_line(
                settings.logging,
                service=settings.service,
                environment=settings.environment,
                sink=sink,
                clock=clock,
            )

        template = access_template(
            settings.logging,
            service=settings.service,
            environment=settings.environment,
            sink=sink,
        )
        batch = settings.logging.durability == "batch"
        return AccessLog(
            line,
            template,
            sink,
            wall=wall,
            elapsed=self.clock,
            unmatched=UNMATCHED,
            report=self.failures.report,
            batch=batch,
        )

    def socket_opened(self, exchange: Socket) -> None:
        """A websocket was accepted."""
        try:
            if self._http is not None:
                self._http.socket_opened(exchange.endpoint or UNMATCHED)
                exchange.opened = True
        except Exception as fault:
            self.failures.report("socket", fault)

    def close_socket(self, exchange: Socket) -> None:
        """A websocket ended: its gauge, and one access line with status 101, 403 or 500."""
        if exchange.closed:
            return
        endpoint = exchange.endpoint or UNMATCHED

        def count(http: HttpMetrics) -> None:
            if exchange.opened:
                http.socket_closed(endpoint)
            if exchange.error is not None:
                http.error(exchange.method, endpoint, type(exchange.error).__name__)

        self._end(exchange, exchange.status or (CLIENT_LEFT if exchange.left else 500), count)

    def close_upgraded(self, exchange: Exchange) -> None:
        """A request that became a websocket has ended: it is none in the metrics of requests, whose
        durations it would spoil, and its access line has status 101.
        """
        self._end(exchange, 101, lambda http: http.upgraded(exchange))

    def _end(self, exchange: Exchange, status: int, count: Callable[[HttpMetrics], None]) -> None:
        """What is no request in the metrics has ended: count it, and write its line."""
        exchange.closed = True
        exchange.source = None
        exchange.ended = self.clock()
        exchange.status = status
        try:
            if exchange.held is not None and self.admission is not None:
                self.admission.release(exchange)
            if self._http is not None:
                count(self._http)
            if self._log is not None:
                self._log.write(exchange)
        except Exception as fault:
            self.failures.report("close", fault)

    def late(self, exchange: Exchange, error: BaseException) -> None:
        """The app raised after its answer had ended, in a background task for one."""
        if self._http is None:
            return
        try:
            endpoint = exchange.endpoint or UNMATCHED
            self._http.error(exchange.method, endpoint, type(error).__name__)
        except Exception as fault:
            self.failures.report("late", fault)

    def _identify(self, exchange: Exchange, headers: Mapping[str, str]) -> None:
        """Request and correlation id: the client's where they are sound, else one fresh id."""
        ids = self.settings.ids
        request_id = headers.get(ids.request_header.lower(), "")
        correlation_id = headers.get(ids.correlation_header.lower(), "")
        if not valid(correlation_id):
            correlation_id = ""
        if not valid(request_id):
            request_id = correlation_id or fresh()
        exchange.request_id = request_id
        exchange.correlation_id = correlation_id or request_id
        exchange.correlated = correlation_id != ""
        if self._key_header:
            key, authorization = headers.get(self._key_header, ""), headers.get(_AUTHORIZATION, "")
            if key or authorization:
                exchange.credentials = (key, authorization)
        exchange.received = _length(headers.get(_LENGTH, ""))
        exchange.uploads = exchange.received > 0 or _CHUNKED in headers

    def _limited(self, work: Callable[[Exchange], Response]) -> Callable[[Exchange], Response]:
        """The answer of an endpoint of ours, behind the policies that name its very path."""
        ours = self.admission
        if ours is None or ours.limiter is None:
            return work
        return lambda exchange: ours.spared(exchange) or work(exchange)

    def enforce(self, exchange: Exchange, handler: object) -> Response | None:
        """The route's checks for a marked handler that was called without its hook. Blocks."""
        return None if self.admission is None else self.admission.enforce(exchange, handler)

    async def aenforce(self, exchange: Exchange, handler: object) -> Response | None:
        return None if self.admission is None else await self.admission.aenforce(exchange, handler)

    def identified(self, exchange: Exchange) -> Identity:
        """Whose API key the request came with. Without one it is refused: raises Refused."""
        if exchange.identity is not None:
            return exchange.identity
        from opsguard.keys.policy import KeyRequirement

        guard = None if self.admission is None else self.admission.guard
        marks = Marks(keys=KeyRequirement())
        refusal = None if guard is None else guard.route(cast("Any", exchange), marks)
        message = "This needs an API key, and this service has none."
        raise Refused(refusal or problem(401, "missing_api_key", message, exchange.request_id))

    def _enter_with(self) -> Step:
        http, route, failures = self._http, self._route, self.failures
        if http is None:
            return route or _go_on
        begin = http.begin_with()

        def enter(exchange: Exchange) -> Response | Pending | None:
            try:
                begin(exchange)
            except Exception as fault:
                failures.report("enter", fault)
            return None if route is None else route(exchange)

        return enter

    def _close_with(self) -> Callable[[Exchange], None]:
        http, clock, failures = self._http, self.clock, self.failures
        muted = PROBES | set(self._endpoints)
        record = None if http is None else http.record_with()
        count_error = None if http is None else http.error
        log = self._log
        queue = None if log is None else log.queue
        most, longest, drain, nudge = (
            (0, 0.0, _nothing, _nothing)
            if log is None
            else (log.most, log.longest, log.drain, log.nudge)
        )
        ours = self.admission

        def close(exchange: Exchange) -> None:
            exchange.closed = True
            exchange.source = None
            try:
                if exchange.held is not None and ours is not None:
                    ours.release(exchange)
                status = exchange.status
                if not exchange.ended or not status or exchange.left:
                    exchange.ended = exchange.ended or clock()
                    status = exchange.status = _unfinished(exchange)
                if record is not None and count_error is not None:
                    record(exchange)
                    if status >= 500 or exchange.error is not None:
                        _count_error(count_error, exchange)
                if queue is not None and (status >= 400 or exchange.endpoint not in muted):
                    queue.append(exchange)
                    late = exchange.ended - queue.since > longest
                    if late or len(queue) >= most or status >= 500:
                        drain()
                    elif len(queue) == 1:
                        nudge()
            except Exception as fault:
                failures.report("close", fault)

        return close


def _without_ours(
    added: list[tuple[T, T]], theirs: list[tuple[T, T]], fold: Callable[[T], T], ours: frozenset[T]
) -> list[tuple[T, T]]:
    """`added` is `theirs` and ours behind; drop those of ours that the app has set."""
    taken = {fold(name) for name, _ in theirs}
    return theirs + [pair for pair in added[len(theirs) :] if fold(pair[0]) not in taken]


def _count_error(count: Callable[[str, str, str], None], exchange: Exchange) -> None:
    """Under the exception's class; an answer of 500 and above without one under its status."""
    error = exchange.error
    if error is None or exchange.status != CLIENT_LEFT:
        name = str(exchange.status) if error is None else type(error).__name__
        count(exchange.method, exchange.endpoint or UNMATCHED, name)


def _unfinished(exchange: Exchange) -> int:
    """The status of an answer whose last byte never went."""
    if exchange.left or (exchange.error is None and exchange.status):
        return CLIENT_LEFT
    return exchange.status or 500


def _length(text: str) -> int:
    """A Content-Length as a number; 0 for what is none (a server has refused it or will)."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 19 else 0


def _nothing() -> None:
    return None


def _go_on(exchange: Exchange) -> None:
    return None
