"""Access lines put off to the next batch: the request only leaves itself behind.

A line made on the request path costs twice what it costs in a loop, where code and data are in the
processor's caches. So a finished exchange is appended to a queue (the accelerator's keeps no more
of it than its line will say), and the lines of a batch are made together, when the batch is full or
the sink's thread comes by, at the latest after 100 ms. A request that ends later than that beside
others that still wait makes them itself: a server that says when it has nothing to do never says so
while requests wait for it.
What may be lost is what may be lost of finished lines too: the sink buffers those as long.
"""

from __future__ import annotations

import logging
import math
import threading
from collections import deque
from collections.abc import Callable
from copy import copy
from typing import TYPE_CHECKING, Any

from opsguard.accelerator import speed
from opsguard.clock import Clock
from opsguard.logging.access import LOGGER, AccessLine
from opsguard.logging.encode import quote, utc_second
from opsguard.logging.sink import TICK, Sink

if TYPE_CHECKING:
    from opsguard.exchange import Exchange

__all__ = ["AccessLog"]

BATCH = 128
"""Lines made at once: some 48 KiB, less than the 64 that a pipe holds."""
_STATUSES = 1000
"""Statuses that are remembered; an app may make up others."""


class Waiting(deque[Any]):
    """Finished exchanges, each as it is when put in: what is bound later is for later lines."""

    since = 0.0
    """When the one ended that found the queue empty: none in it waits for longer."""

    def append(self, exchange: Exchange) -> None:
        if not self:
            self.since = exchange.ended
        super().append((exchange, exchange.fields))

    def popleft(self) -> Exchange:
        exchange: Exchange
        exchange, fields = super().popleft()
        if exchange.fields is not fields:
            exchange = copy(exchange)
            exchange.fields = fields
        return exchange


class AccessLog:
    """The queue before a sink. Thread-safe; over a fork the parent writes what it holds.

    `line` writes any exchange, at the wall time that its clock gives; `template` makes the short
    form of usual lines (see `access_template`), or is None. `elapsed` is the clock of the
    exchanges. `unmatched` names the endpoint of an exchange that has none. Faults go to `report`.
    `batch` is False when each line has to go at once.
    """

    def __init__(
        self,
        line: Callable[[Clock], AccessLine],
        template: Callable[[int], tuple[str, bool] | None] | None,
        sink: Sink,
        *,
        wall: Clock,
        elapsed: Clock,
        unmatched: str,
        report: Callable[[str, BaseException], None],
        batch: bool = True,
    ) -> None:
        self.queue: Waiting = Waiting() if speed is None else speed.Queue()
        self.most = BATCH if batch else 1
        """So many in the queue are a batch."""
        self.longest = TICK
        """And so are fewer, if the last ended so many seconds after `queue.since`."""
        self._line = line(lambda: self._moment)
        self._moment = 0.0
        self._one_long_line = threading.RLock()  # `_line` reads the moment of its own line
        self._template = template
        self._templates: dict[int, tuple[str, bool] | None] = {}
        self._second = -math.inf, ""
        """The second of the last short line, and its text."""
        self._logger = logging.getLogger(LOGGER)
        self._sink = sink
        self._wall = wall
        self._elapsed = elapsed
        self._unmatched = unmatched
        self._report = report
        sink.feed(self)
        if template is not None:
            sink.separated = True

    def write(self, exchange: Exchange) -> None:
        """Log one exchange now."""
        self.queue.append(exchange)
        self.drain()

    def nudge(self) -> None:
        """The queue is no longer empty: see that it is looked after within 100 ms."""
        self._sink.nudge()

    def drain(self) -> None:
        """Hand the lines of all exchanges in the queue to the sink.

        One of which the app has made something that has no line is reported.
        """
        take = self.queue.popleft
        offset = self._wall() - self._elapsed()
        logger = self._logger
        listened = bool(logger.handlers or logger.filters or logger.level)
        fast = None if speed is None or listened else speed.take_lines
        lines: list[str] = []
        urgent = False
        while True:
            try:
                if fast is None:
                    exchange = take()
                elif (exchange := fast(self.queue, self._templates, offset, lines)) is None:
                    break
            except IndexError:
                break
            try:
                short = None if listened else self._short(exchange, offset)
                if short is not None:
                    lines.append(short[0])
                    urgent = urgent or short[1]
                    continue
                self._hand_over(lines)
                self._write_long(exchange, offset + exchange.ended)
            except Exception as fault:
                self._hand_over(lines)
                self._report("access", fault)
        if lines:
            self._sink.write_all(lines, urgent)
        if self.most == 1:
            self._sink.look()

    def forget(self) -> None:
        """In a forked child: what is here is the parent's to write."""
        self.queue.clear()
        self._one_long_line = threading.RLock()

    def _make(self, status: int) -> tuple[str, bool] | None:
        made = None if self._template is None else self._template(status)
        if len(self._templates) < _STATUSES:
            self._templates[status] = made
        return made

    def _hand_over(self, lines: list[str]) -> None:
        """Those before a line that takes another way."""
        self._sink.write_all(lines)
        lines.clear()

    def _short(self, exchange: Exchange, offset: float) -> tuple[str, bool] | None:
        """The line of a usual exchange, and whether it is urgent; None: it takes the long form."""
        try:
            found = self._templates[exchange.status]
        except KeyError:
            found = self._make(exchange.status)
        if (
            found is None
            or exchange.fields
            or exchange.correlation_id != exchange.request_id
            or not (exchange.path.isascii() and exchange.method.isascii())
        ):
            return None
        ended, client = exchange.ended, exchange.client
        second, moment = self._second
        fraction = offset + ended - second
        if not 0.0 <= fraction < 1.0:
            second = (offset + ended) // 1
            moment = utc_second(int(second))
            self._second = second, moment
            fraction = offset + ended - second
        template, urgent = found
        micros = int((ended - exchange.started) * 1e6 + 0.5)
        line = template % (
            moment,
            fraction * 1000.0,
            exchange.request_id,
            quote(exchange.method),
            quote(exchange.path),
            quote(exchange.endpoint or self._unmatched),
            micros // 1000,
            micros % 1000,
            exchange.sent,
            "null" if client is None else quote(client),
        )
        return line, urgent

    def _write_long(self, exchange: Exchange, moment: float) -> None:
        """Any line: two ids, bound fields, a path that is no plain text, a listener, a person."""
        with self._one_long_line:
            self._moment = moment
            self._line(
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
