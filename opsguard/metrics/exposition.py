"""The answer of `/metrics`: every number there is, in the form the scraper asked for.

:class:`Exposition` reads its sources in their order, keeps each metric name once (the
first source wins) and gives one :class:`opsguard.http.Response`. The answer is always
200, whatever a collector does:

- one that raises, or hangs past the budget, costs its own families and is counted
  (`crew`);
- text that would break the scrape is cleaned, what cannot be cleaned is left out and
  counted (`cleaning`, `page`).

Collectors are read and encoded family by family. A source of ours may hand over finished
text instead, by a method `expose`, because building one object per series is most of the
cost of a scrape.

Formats (`negotiation`): Prometheus text 0.0.4 and 1.0.0, OpenMetrics 1.0.0
(https://prometheus.io/docs/instrumenting/exposition_formats/,
https://prometheus.io/docs/specs/om/open_metrics_spec/,
https://prometheus.io/docs/instrumenting/content_negotiation/).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future

from prometheus_client import CollectorRegistry
from prometheus_client.registry import Collector

from opsguard.forks import in_child
from opsguard.http import Response
from opsguard.metrics.crew import Crew, Exposable, Outcome, Source, collectors_of, read
from opsguard.metrics.negotiation import Form, accepts_gzip, negotiate
from opsguard.metrics.page import Page, finished

__all__ = ["Exposable", "Exposition", "Form", "Source", "negotiate"]

_NOT_ALLOWED = Response(
    405,
    (
        ("Allow", "GET, HEAD"),
        ("Content-Type", "text/plain; charset=utf-8"),
        ("Content-Length", "0"),
    ),
    b"",
)


class _Here:
    """What belongs to one process: locks that another thread may hold while it forks."""

    def __init__(self, clock: Callable[[], float], budget: float) -> None:
        self.crew = Crew(clock, budget)
        self.turn = threading.Lock()  # held while rendering
        self.lock = threading.Lock()  # guards `flights`, held for a moment
        self.flights: dict[tuple[Form, bool], Future[bytes]] = {}


class Exposition:
    """Renders the sources' numbers. Starts nothing before the first call; survives a fork.

    `sources` come in order of precedence: of two families that would expose one name the
    first is kept. A source is an :class:`Exposable`, a collector, or a registry. The
    collectors in a registry are users' code: they run in helper threads within `budget`
    seconds altogether. A source given by itself is trusted to return and read in the
    calling thread. `failures(site, error)` is told of everything left out and must not
    raise; sites are `collector:<class>` and `exposition`. `clock` counts seconds.
    `covered(collector)` tells which members of a registry an earlier source speaks for:
    they are not called.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        failures: Callable[[str, BaseException | None], None],
        clock: Callable[[], float] = time.monotonic,
        budget: float = 2.0,
        covered: Callable[[Collector], bool] = lambda collector: False,
    ) -> None:
        self._covered = covered
        self._sources = tuple(sources)
        self._failures = failures
        self._clock = clock
        self._budget = budget
        self._begin()
        in_child(self, Exposition._begin)

    def _begin(self) -> None:
        self._here = _Here(self._clock, self._budget)

    def render(self, method: str, accept: str, accept_encoding: str) -> Response:
        """Return the answer to a request with these headers ("" where one is absent).

        Blocking, so keep it off an event loop; thread-safe. GET and HEAD give 200, other
        methods 405. Calls that ask for the same form while it waits to be rendered share
        one rendering, which begins after all of them arrived: nobody is given numbers
        older than the question. One rendering runs at a time. If it gets stuck, the
        others are given an empty exposition after at most four budgets.
        """
        if method not in ("GET", "HEAD"):
            return _NOT_ALLOWED
        form = negotiate(accept)
        compressed = accepts_gzip(accept_encoding)
        body = self._shared(form, compressed)
        headers = [
            ("Content-Type", form.content_type),
            ("Content-Length", str(len(body))),
            ("Vary", "Accept, Accept-Encoding"),
        ]
        if compressed:
            headers.append(("Content-Encoding", "gzip"))
        return Response(200, tuple(headers), b"" if method == "HEAD" else body)

    def _shared(self, form: Form, compressed: bool) -> bytes:
        here, key = self._here, (form, compressed)
        with here.lock:
            flight = here.flights.get(key)
            leads = flight is None
            if flight is None:
                flight = here.flights[key] = Future()
        if leads:
            self._lead(here, form, compressed, flight)
        try:
            return flight.result(timeout=4 * self._budget)
        except TimeoutError as error:
            self._failures("exposition", error)
            return finished([], form, compressed)

    def _lead(self, here: _Here, form: Form, compressed: bool, flight: Future[bytes]) -> None:
        body = finished([], form, compressed)
        key = form, compressed
        try:
            if not here.turn.acquire(timeout=2 * self._budget):
                raise TimeoutError("an earlier rendering is stuck")
            try:
                with here.lock:
                    del here.flights[key]  # who comes from here on waits for the next one
                body = finished(self._blocks(here.crew, form), form, compressed)
            finally:
                here.turn.release()
        except Exception as error:
            self._failures("exposition", error)
        finally:
            with here.lock:
                if here.flights.get(key) is flight:
                    del here.flights[key]
            flight.set_result(body)

    def _blocks(self, crew: Crew, form: Form) -> list[bytes]:
        # Trusted sources are read before any helper thread runs, so that the number of
        # threads we report is the app's.
        own = {id(s): s for s in self._sources if not isinstance(s, CollectorRegistry)}
        trusted = {key: read(source, form.openmetrics) for key, source in own.items()}
        foreign: dict[int, Collector] = {}
        members: dict[int, list[Collector]] = {}
        for source in self._sources:
            if isinstance(source, CollectorRegistry):
                found = collectors_of(source, crew.patience)
                members[id(source)] = [one for one in found if not self._covered(one)]
                foreign.update((id(collector), collector) for collector in members[id(source)])
        outcomes = crew.collect(list(foreign.values()), form.openmetrics) if foreign else []
        collected = dict(zip(foreign, outcomes, strict=True))

        page = Page(form, self._failures)
        for source in self._sources:
            if not isinstance(source, CollectorRegistry):
                self._write(page, source, trusted.pop(id(source), []))
                continue
            for collector in members.pop(id(source), ()):
                self._write(page, collector, collected.pop(id(collector), []))
        return page.blocks

    def _write(self, page: Page, source: Source, outcome: Outcome) -> None:
        site = f"collector:{type(source).__name__}"
        if isinstance(outcome, BaseException):
            self._failures(site, outcome)
        elif isinstance(outcome, tuple):
            page.add_texts(site, outcome)
        else:
            page.add_metrics(site, outcome)
