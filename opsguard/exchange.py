"""One request and its answer, from the first header to the last byte."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from opsguard.http import Response

if TYPE_CHECKING:
    from opsguard.plan import Plan
    from opsguard.metrics import RouteSeries

__all__ = ["Exchange"]


class Exchange:
    """What is known of the request being served; the adapters fill it in as it comes.

    Belongs to one request. Its threads and tasks may read it and bind fields; only the adapter
    writes the rest. Times are seconds of the plan's monotonic clock, 0.0 for "not yet".
    """

    __slots__ = (
        "begun",
        "client",
        "closed",
        "correlation_id",
        "ended",
        "endpoint",
        "error",
        "fields",
        "first_byte",
        "left",
        "marked",
        "method",
        "path",
        "plan",
        "received",
        "reply",
        "request_id",
        "sent",
        "series",
        "source",
        "started",
        "status",
        "uploads",
        "websocket",
        "work",
    )

    def __init__(
        self,
        plan: Plan,
        method: str,
        path: str,
        client: str | None,
        request_id: str,
        correlation_id: str,
        started: float,
        source: Any,
    ) -> None:
        self.plan = plan
        self.method = method
        self.path = path
        self.client = client
        self.request_id = request_id
        self.correlation_id = correlation_id
        self.started = started
        self.source = source
        """The adapter's own request, for headers that only few requests need; None once closed."""
        self.endpoint: str | None = None
        """The route's template, once known; names the request in metrics and logs."""
        self.marked: object = None
        """The function or class that the route leads to."""
        self.series: RouteSeries | None = None
        self.fields: dict[str, object] | None = None
        """What `ops.bind` bound."""
        self.status = 0
        self.websocket = False
        self.uploads = False
        """The request has a body."""
        self.received = 0
        """Bytes of the request's body: as declared, else as read by the app so far."""
        self.sent = 0
        """Bytes of the answer's body."""
        self.first_byte = 0.0
        self.ended = 0.0
        """When the last byte went; 0.0 when the answer never ended."""
        self.left = False
        """The client left before the last byte."""
        self.error: BaseException | None = None
        self.reply: Response | None = None
        """Our own answer, to be sent instead of going on."""
        self.work: Callable[[Exchange], Response] | None = None
        """As `reply`, but made by a function that blocks and must not run in an event loop."""
        self.begun = False
        self.closed = False

    def enter(self, endpoint: str, marked: object = None) -> Response | None:
        """The route is known: its template, and the function or class it leads to.

        Returns an answer to send instead of going on (body, dependencies and handler untouched),
        or None. Only the first call counts.
        """
        if self.endpoint is not None or self.closed:
            return None
        self.endpoint = endpoint
        self.marked = marked
        return self.plan.enter(self)

    def name(self, endpoint: str) -> None:
        """Only name the route, without entering it: its answer has begun, or it was matched but
        refused the method.
        """
        if self.endpoint is None:
            self.endpoint = endpoint

    def fail(self, error: BaseException) -> None:
        """The app raised `error` and did not handle it. One error is counted for a request, also
        when it comes after the answer, from a background task.
        """
        if self.error is not None:
            return
        self.error = error
        if self.closed:
            self.plan.late(self, error)

    def finish(self) -> None:
        """The last byte of the answer is out: record the request.

        One that failed waits for `close`: frameworks answer 500 first and let the exception go on
        then, and what it was belongs to the record.
        """
        if self.closed:
            return
        self.ended = self.plan.clock()
        if self.status < 500:
            self.plan.close(self)

    def close(self) -> None:
        """The app is done with the request: record it, unless that was done at its last byte."""
        if not self.closed:
            self.plan.close(self)

    def enter_by(self, label: Callable[[Any], str | None], request: Any) -> None:
        """Enter the route that the user's `label` names, unless there is an answer already."""
        if self.reply is None and self.work is None:
            template = self._ask(label, request)
            if template is not None:
                self.reply = self.enter(template)

    def name_by(self, label: Callable[[Any], str | None], request: Any) -> None:
        """Only name the route, as `label` has it."""
        template = self._ask(label, request)
        if template is not None:
            self.name(template)

    def header(self, name: str) -> str:
        """A header of the request by its lower-case name; "" if there is none or once closed.

        Each protocol's adapter reads it from `source` in a subclass of its own.
        """
        raise NotImplementedError

    def _ask(self, label: Callable[[Any], str | None], request: Any) -> str | None:
        try:
            return label(request)
        except Exception as error:
            self.plan.failures.report("endpoint", error)
            return None
