"""Access lines put off to the next batch: the request only leaves itself behind.

Formatting a line on the request path costs twice what it costs in a loop, where code and data are
in the processor's caches. So a finished exchange is appended to a queue, and the lines of a batch
are made together, when the batch is full or the sink's thread comes by, at the latest after
100 ms. Nothing more can be lost than with finished lines: the sink buffers those as long.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol

from opsguard.clock import Clock
from opsguard.logging.access import AccessLine
from opsguard.logging.sink import Sink

__all__ = ["AccessLog", "Logged"]

_BATCH = 12
"""Lines of usual length that fill one write of the sink."""


class Logged(Protocol):
    """What an access line tells, in the words of the exchange. Final once it is handed over."""

    method: str
    path: str
    endpoint: str | None
    status: int
    started: float
    ended: float
    sent: int
    client: str | None
    request_id: str
    correlation_id: str
    fields: dict[str, object] | None


class AccessLog:
    """The queue before a sink. Thread-safe; over a fork the parent writes what it holds.

    `line` is made by `make` with a clock that tells each line its own moment: `elapsed` says how
    long ago the exchange ended, `wall` what time it is now. `unmatched` names the endpoint of an
    exchange without one. `batch` is False when each line has to go at once.
    """

    def __init__(
        self,
        make: Callable[[Clock], AccessLine],
        sink: Sink,
        *,
        wall: Clock,
        elapsed: Clock,
        unmatched: str,
        batch: bool = True,
    ) -> None:
        self._queue: deque[Logged] = deque()
        self._moment = 0.0
        self._line = make(lambda: self._moment)
        self._sink = sink
        self._wall = wall
        self._elapsed = elapsed
        self._unmatched = unmatched
        self._batch = batch
        sink.feed(self)

    def writer(self) -> Callable[[Logged], None]:
        """The function that takes a finished exchange."""
        queue, drain, nudge = self._queue, self.drain, self._sink.nudge
        most = _BATCH if self._batch else 1

        def write(exchange: Logged) -> None:
            queue.append(exchange)
            waiting = len(queue)
            if waiting >= most or exchange.status >= 500 or exchange.fields is not None:
                drain()
            elif waiting == 1:
                nudge()

        return write

    def drain(self) -> None:
        """Hand all lines to the sink."""
        take, line = self._queue.popleft, self._line
        offset = self._wall() - self._elapsed()
        while True:
            try:
                exchange = take()
            except IndexError:
                return
            self._moment = offset + exchange.ended
            line(
                exchange.method,
                exchange.path,
                exchange.endpoint or self._unmatched,
                exchange.status,
                exchange.ended - exchange.started,
                exchange.sent,
                exchange.client,
                exchange.request_id,
                exchange.correlation_id,
                exchange.fields,
            )

    def forget(self) -> None:
        """In a forked child: what is here is the parent's to write."""
        self._queue.clear()
