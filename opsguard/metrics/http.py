"""HTTP metrics: what is counted of each request, and under which names.

Everything about a request is resolved to cell indexes once per (method, endpoint) and once more
per status; recording is then a few additions.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from opsguard.accelerator import speed
from opsguard.http import METHODS
from opsguard.metrics.families import Family
from opsguard.metrics.inflight import TABLE_AT, Places

if TYPE_CHECKING:
    from opsguard import settings as options
    from opsguard.exchange import Exchange
    from opsguard.metrics import Metrics

__all__ = ["UNMATCHED", "HttpMetrics", "RouteSeries"]

UNMATCHED = "<unmatched>"
OTHER = "_OTHER"
SIZE_BUCKETS = (100.0, 1_000.0, 10_000.0, 100_000.0, 1_000_000.0, 10_000_000.0)
"""Bytes."""

_OTEL_NAMES = {
    "http_request_duration_seconds": "http_server_request_duration_seconds",
    "http_requests_in_progress": "http_server_active_requests",
    "http_request_size_bytes": "http_server_request_body_size_bytes",
    "http_response_size_bytes": "http_server_response_body_size_bytes",
}
_OTEL_LABELS = {
    "method": "http_request_method",
    "endpoint": "http_route",
    "status": "http_response_status_code",
}


class RouteSeries:
    """The cells of one (method, endpoint). `outcomes` maps a status to its two cells: the requests
    counter and the first of the duration histogram.
    """

    __slots__ = (
        "endpoint",
        "first_byte",
        "in_progress",
        "method",
        "outcomes",
        "received",
        "sent",
    )

    def __init__(
        self,
        method: str,
        endpoint: str,
        in_progress: int,
        first_byte: int,
        received: int,
        sent: int,
    ) -> None:
        self.method = method
        self.endpoint = endpoint
        self.in_progress = in_progress
        self.first_byte = first_byte
        self.received = received
        self.sent = sent
        self.outcomes: dict[int, tuple[int, int]] = {}


if speed is not None and not TYPE_CHECKING:
    RouteSeries = speed.RouteSeries


class HttpMetrics:
    """Counts requests: `begin` at the route, `record` once at the end. Both are made for this
    interpreter, with a lock where it has no GIL, and are safe in threads for any method, endpoint
    and status.
    """

    def __init__(self, metrics: Metrics, settings: options.Metrics) -> None:
        otel = settings.schema == "otel"
        names = dict(_OTEL_NAMES) if otel else {}
        names.update(settings.names)
        labels = dict(_OTEL_LABELS) if otel else {}
        labels.update(settings.labels)

        def family(
            name: str, help: str, kind: str, keys: tuple[str, ...], buckets: tuple[float, ...] = ()
        ) -> Family:
            exposed = names.get(name) or name.replace("http", settings.prefix, 1)
            return metrics.family(
                exposed, help, kind, tuple([labels.get(key, key) for key in keys]), buckets
            )

        route = ("method", "endpoint")
        seconds = settings.buckets
        self._store = metrics.store
        self._seconds = seconds
        self._by_status = otel
        self._requests = family(
            "http_requests_total", "HTTP requests served.", "counter", (*route, "status")
        )
        self._duration = family(
            "http_request_duration_seconds",
            "Seconds from the arrival of a request to the last byte of its answer.",
            "histogram",
            (*route, "status") if otel else route,
            seconds,
        )
        self._first_byte = family(
            "http_request_first_byte_seconds",
            "Seconds from the arrival of a request to the start of its answer.",
            "histogram",
            route,
            seconds,
        )
        self._in_progress = family(
            "http_requests_in_progress",
            "Requests being served, from the moment their route is known.",
            "gauge",
            route,
        )
        self._received = family(
            "http_request_size_bytes", "Bytes of request bodies.", "histogram", route, SIZE_BUCKETS
        )
        self._sent = family(
            "http_response_size_bytes",
            "Bytes of answers' bodies.",
            "histogram",
            route,
            SIZE_BUCKETS,
        )
        self._errors = family(
            "http_errors_total",
            "Unhandled exceptions by type, and answers of 500 and above by status.",
            "counter",
            (*route, "error_type"),
        )
        self._sockets = family(
            "websocket_connections_total",
            "Websocket connections opened.",
            "counter",
            ("endpoint",),
        )
        self._sockets_in_progress = family(
            "websocket_connections_in_progress",
            "Websocket connections that are open.",
            "gauge",
            ("endpoint",),
        )
        self._places = Places(metrics.store)
        self.routes: dict[tuple[str, str], RouteSeries] = {}
        self.recorder: Any = self._recorder()

    def _recorder(self) -> Any:
        """`begin` and `record` in C, or None."""
        if speed is None or not self._store.gil:
            return None
        return speed.Recorder(
            store=self._store,
            routes=self.routes,
            resolve=self._resolve,
            outcome=self._outcome,
            unmatched=UNMATCHED,
            table=TABLE_AT,
            seconds=self._seconds,
            sizes=SIZE_BUCKETS,
        )

    def begin_with(self) -> Callable[[Exchange], None]:
        """The function that says: this request's route is known, it is in progress."""
        if self.recorder is not None:
            fast: Callable[[Exchange], None] = self.recorder.begin
            return fast
        store, routes, resolve = self._store, self.routes, self._resolve
        take = self._places.take

        def begin(exchange: Exchange) -> None:
            endpoint = exchange.endpoint or UNMATCHED
            try:
                series = routes[exchange.method, endpoint]
            except KeyError:
                series = resolve(exchange.method, endpoint)
            at = series.in_progress
            exchange.place = take(exchange.started, at, exchange.request_id)
            store.cells[at] += 1.0
            exchange.series = series

        def locked(exchange: Exchange) -> None:
            with store.lock:
                begin(exchange)

        return begin if store.gil else locked

    def record_with(self) -> Callable[[Exchange], None]:
        """The function that records one request, which has ended."""
        if self.recorder is not None:
            fast: Callable[[Exchange], None] = self.recorder.record
            return fast
        store, seconds, outcome, resolve = self._store, self._seconds, self._outcome, self.series
        free = self._places.free
        last, size_last = len(seconds) + 1, len(SIZE_BUCKETS) + 1

        def record(exchange: Exchange) -> None:
            series = exchange.series
            begun = 1.0
            if series is None:  # its route was never entered
                series = resolve(exchange.method, exchange.endpoint or UNMATCHED)
                begun = 0.0
            else:
                free(exchange.place)
            try:
                count, total = series.outcomes[exchange.status]
            except KeyError:
                count, total = outcome(series, exchange.status)
            started, sent, received = exchange.started, exchange.sent, exchange.received
            duration = exchange.ended - started
            first_byte = (exchange.first_byte or exchange.ended) - started
            bucket = total + bisect_left(seconds, duration)
            early = series.first_byte
            early_bucket = early + bisect_left(seconds, first_byte)
            body = series.sent
            body_bucket = body + bisect_left(SIZE_BUCKETS, sent)
            upload = series.received
            upload_bucket = upload + bisect_left(SIZE_BUCKETS, received) if received else upload
            # From here on there is no call, so that under the GIL each line is one step: see store.
            cells = store.cells
            cells[count] += 1.0
            cells[bucket] += 1.0
            cells[total + last] += duration
            cells[early_bucket] += 1.0
            cells[early + last] += first_byte
            cells[body_bucket] += 1.0
            cells[body + size_last] += sent
            cells[upload_bucket] += 1.0
            if received:
                cells[upload + size_last] += received
            cells[series.in_progress] -= begun

        def locked(exchange: Exchange) -> None:
            with store.lock:
                record(exchange)

        return record if store.gil else locked

    def error(self, method: str, endpoint: str, error_type: str) -> None:
        """Count one error: the name of an exception's class, or a status of 500 and above."""
        method = method if method in METHODS else OTHER
        at = self._errors.at((method, endpoint, error_type))
        with self._store.exclusive:
            self._store.cells[at] += 1.0

    def socket_opened(self, endpoint: str) -> None:
        total = self._sockets.at((endpoint,))
        open_now = self._sockets_in_progress.at((endpoint,))
        with self._store.exclusive:
            self._store.cells[total] += 1.0
            self._store.cells[open_now] += 1.0

    def socket_closed(self, endpoint: str) -> None:
        open_now = self._sockets_in_progress.at((endpoint,))
        with self._store.exclusive:
            self._store.cells[open_now] -= 1.0

    def upgraded(self, exchange: Exchange) -> None:
        """This request was a websocket, which has ended; it is in progress no more."""
        total = self._sockets.at((exchange.endpoint or UNMATCHED,))
        with self._store.exclusive:
            self._store.cells[total] += 1.0
            if self.recorder is not None:
                self.recorder.leave(exchange)
            elif exchange.series is not None:
                self._store.cells[exchange.series.in_progress] -= 1.0
                self._places.free(exchange.place)

    def series(self, method: str, endpoint: str) -> RouteSeries:
        """The cells of (method, endpoint)."""
        return self.routes.get((method, endpoint)) or self._resolve(method, endpoint)

    def _resolve(self, method: str, endpoint: str) -> RouteSeries:
        """The cells of a (method, endpoint) that was not seen yet; an unknown method is _OTHER."""
        method = method if method in METHODS else OTHER
        key = (method, endpoint)
        found = self.routes.get(key)
        if found is not None:
            return found
        made = RouteSeries(
            method,
            endpoint,
            self._in_progress.at(key),
            self._first_byte.at(key),
            self._received.at(key),
            self._sent.at(key),
        )
        if len(self.routes) < self._requests.limit:
            self.routes[key] = made
        return made

    def _outcome(self, series: RouteSeries, status: int) -> tuple[int, int]:
        key = (series.method, series.endpoint)
        labels = (*key, str(status))
        found = (
            self._requests.at(labels),
            self._duration.at(labels if self._by_status else key),
        )
        if len(series.outcomes) < 1000:
            series.outcomes[status] = found
        return found
