"""One request and its answer, from the first header to the last byte."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from opsguard.accelerator import speed
from opsguard.context import sign
from opsguard.http import Pending, Response

if TYPE_CHECKING:
    from opsguard.keys import Identity
    from opsguard.metrics import RouteSeries
    from opsguard.plan import Plan

__all__ = ["Exchange", "Socket", "asettled", "settled"]


if TYPE_CHECKING or speed is None:

    class Fields:
        """Where the attributes are; the accelerator has a type of this name."""

        __slots__ = (
            "charged",
            "client",
            "closed",
            "correlated",
            "correlation_id",
            "credentials",
            "ended",
            "endpoint",
            "error",
            "extra",
            "fields",
            "first_byte",
            "held",
            "identity",
            "left",
            "marked",
            "method",
            "outer",
            "path",
            "place",
            "plan",
            "received",
            "reply",
            "request_id",
            "routed",
            "sent",
            "series",
            "source",
            "started",
            "status",
            "uploads",
            "work",
        )

else:
    Fields = speed.Fields


class Exchange(Fields):
    """What is known of the request being served; the adapters fill it in as it comes.

    Belongs to one request. Its threads and tasks may read it and bind fields; only the adapter
    writes the rest. Times are seconds of the plan's monotonic clock, 0.0 for "not yet".
    """

    __slots__ = ()

    websocket: ClassVar[bool] = False
    """Whether this is a websocket connection."""

    # There is no __init__: `Plan.open_with` fills an exchange in where it makes it, which saves a
    # call on each request.
    plan: Plan
    method: str
    path: str
    """The whole path, decoded, without the query."""
    routed: str
    """The path as the app's router sees it: without what the app is mounted under."""
    client: str | None
    """The client's address, as far as the trusted proxies tell it."""
    request_id: str
    correlation_id: str
    correlated: bool
    """The client sent a correlation id, so the answer carries it too."""
    started: float
    source: Any
    """The adapter's own request, for headers that only few requests need; None once closed."""
    outer: Exchange | None
    """The request that this one is served within; None: it is served by itself."""
    endpoint: str | None
    """The route's template, once known; names the request in metrics and logs."""
    marked: object
    """The function or class that the route leads to; set when the route is entered."""
    series: RouteSeries | None
    """Set when the route is entered: from then on the request is in progress."""
    place: int
    """Where the worker's file says that this request is being served; set with `series`."""
    fields: dict[str, object] | None
    """What `ops.bind` bound."""
    status: int
    uploads: bool
    """The request has a body."""
    received: int
    """Bytes of the request's body: as declared, else as read by the app so far."""
    sent: int
    """Bytes of the answer's body."""
    first_byte: float
    ended: float
    """When the last byte went; 0.0 when the answer never ended."""
    left: bool
    """The client left before the last byte."""
    error: BaseException | None
    credentials: tuple[str, str] | None
    """The API key header and Authorization, if the request has one of them and keys are used."""
    identity: Identity | None
    """Whose API key it came with."""
    charged: tuple[Any, ...]
    """The decisions by which the request was charged for limits, the edge's first."""
    held: Any
    """Decisions whose slots are to be returned when the request ends."""
    extra: tuple[tuple[str, str], ...] | None
    """Headers of ours for the app's answer, in text, beside the ids."""
    reply: Response | Pending | None
    """Our own answer, to be sent instead of going on, or what will tell whether there is one."""
    work: Callable[[Any], Response] | None
    """As `reply`, but made by a function that blocks and must not run in an event loop."""
    closed: bool

    def enter(self, endpoint: str, marked: object = None) -> Response | Pending | None:
        """The route is known: its template, and the function or class it leads to.

        Returns an answer to send instead of going on (body, dependencies and handler untouched),
        what will tell whether there is one, or None. Only the first call counts.
        """
        if self.endpoint is not None or self.closed:
            return None
        self.endpoint = endpoint
        self.marked = marked
        return self.plan.enter(self)

    def told(
        self, label: Callable[[Any], str | None] | None = None, request: Any = None
    ) -> Response | None:
        """The answer to send instead of going on, looked for outside where that is needed. Blocks;
        for protocols that do. None: the app is to answer. `label` is as in `enter_by`, which could
        not be asked while the edge had to look outside first.
        """
        if self.work is not None:
            self.reply = self.work(self)
            return self.reply
        self.reply = settled(self.reply)
        if self.reply is None and label is not None:
            self.enter_by(label, request)
            self.reply = settled(self.reply)
        return self.reply

    async def atold(
        self, label: Callable[[Any], str | None] | None = None, request: Any = None
    ) -> Response | None:
        """As `told`, for event loops; `work` blocks, and is the adapter's to put elsewhere."""
        self.reply = await asettled(self.reply)
        if self.reply is None and label is not None:
            self.enter_by(label, request)
            self.reply = await asettled(self.reply)
        return self.reply

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
        sign(error, self)
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

    @property
    def goes_on(self) -> bool:
        """Whether another request may be served within this one: its answer is not out, and its app
        has not failed.
        """
        return not (self.closed or self.ended or self.error is not None)

    def taken_over(self) -> bool:
        """The app is done and has started no answer: whether it has spoken to its client over a
        websocket of its own instead, as apps under WSGI do. That is recorded as one then.
        """
        if self.closed or self.error is not None or self.header("upgrade").lower() != "websocket":
            return False
        self.plan.close_upgraded(self)
        return True

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


if not TYPE_CHECKING and speed is not None:
    # The accelerator's type has them: without a frame in Python.
    del Exchange.enter, Exchange.finish, Exchange.close


def settled(reply: Response | Pending | None) -> Response | None:
    """The answer that `reply` is or tells. Blocks."""
    return reply if reply is None or isinstance(reply, Response) else reply.run()


async def asettled(reply: Response | Pending | None) -> Response | None:
    """As `settled`, without blocking the event loop."""
    return reply if reply is None or isinstance(reply, Response) else await reply.arun()


class Socket(Exchange):
    """A websocket connection. It is no request in the metrics, so entering a route counts none."""

    __slots__ = ("opened",)
    websocket = True

    opened: bool
    """It was accepted."""

    def enter(self, endpoint: str, marked: object = None) -> Response | Pending | None:
        if self.endpoint is not None or self.closed:
            return None
        self.endpoint = endpoint
        self.marked = marked
        return self.plan.enter_socket(self)
