"""The answer of `/metrics`: every number there is, in the form the scraper asked for.

:class:`Exposition` reads its sources in their order, keeps each metric name once (the
first source wins) and gives one :class:`opsguard.http.Response`. The answer is always
200, whatever a collector does:

- one that raises, or hangs past the budget, costs its own families and is counted;
- text that would break the scrape is cleaned, what cannot be cleaned is left out and
  counted.

Collectors are read and encoded here family by family; `prometheus_client` does the
encoding itself. A source of ours may hand over finished text instead, by a method
`expose`, because building one object per series is most of the cost of a scrape.

Formats: Prometheus text 0.0.4 and 1.0.0, OpenMetrics 1.0.0
(https://prometheus.io/docs/instrumenting/exposition_formats/,
https://prometheus.io/docs/specs/om/open_metrics_spec/,
https://prometheus.io/docs/instrumenting/content_negotiation/).
"""

from __future__ import annotations

import gzip
import math
import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from typing import NamedTuple, Protocol, TypeAlias

from prometheus_client import CollectorRegistry, Metric
from prometheus_client import generate_latest as _text
from prometheus_client.metrics_core import METRIC_TYPES
from prometheus_client.openmetrics import exposition as _openmetrics
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar, Sample, Timestamp

from opsguard.http import Response
from opsguard.metrics.families import clean

__all__ = ["Exposable", "Exposition", "Form", "Source", "negotiate"]


class Exposable(Protocol):
    """A source that writes its own text, for speed."""

    def expose(self, openmetrics: bool) -> Iterable[tuple[str, str]]:
        """Return (family name, text) pairs, each text with its HELP and TYPE lines.

        The text must be whole lines, its names legal in every version of the format, its
        label values escaped; `# EOF` is not part of it.
        """
        ...


Source: TypeAlias = Exposable | Collector | CollectorRegistry
Outcome: TypeAlias = list[Metric] | tuple[tuple[str, str], ...] | BaseException
"""What reading a source gave: metrics, or finished texts (the tuple), or the error."""

_UNSAFE = re.compile(r"[\x00\ud800-\udfff]")
_LEGAL = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
_TYPE_LINE = re.compile(r"^# TYPE (\S+) (\S+)$", re.MULTILINE)
_WEIGHT = re.compile(r"0(?:\.[0-9]{0,3})?|1(?:\.0{0,3})?")  # RFC 9110, section 12.4.2

# The sample names that a family of each type lays claim to, its own name aside.
_SUFFIXES: Mapping[str, tuple[str, ...]] = {
    "counter": ("_total",),
    "summary": ("_sum", "_count"),
    "histogram": ("_bucket", "_sum", "_count"),
    "gaugehistogram": ("_bucket", "_gsum", "_gcount"),
    "info": ("_info",),
}
# A part of one of these says something else than the whole: all or nothing.
_COMPOUND = frozenset({"summary", "histogram", "gaugehistogram"})

_EOF = b"# EOF\n"
_NOT_ALLOWED = Response(
    405,
    (
        ("Allow", "GET, HEAD"),
        ("Content-Type", "text/plain; charset=utf-8"),
        ("Content-Length", "0"),
    ),
    b"",
)


# --- what was asked for


class Form(NamedTuple):
    """One representation of the answer."""

    content_type: str
    openmetrics: bool
    utf8_names: bool


_TEXT = Form("text/plain; version=0.0.4; charset=utf-8", openmetrics=False, utf8_names=False)


def _offer(media: str, version: str, escaping: str) -> Form | None:
    """Return the form that serves one media range, or None if there is none."""
    if media in ("*/*", "text/*") or (media == "text/plain" and version in ("", "0.0.4")):
        return _TEXT
    openmetrics = media == "application/openmetrics-text"
    if openmetrics and not version:
        return Form(f"{media}; version=1.0.0; charset=utf-8", True, False)
    if not version.startswith("1.") or not (openmetrics or media == "text/plain"):
        return None
    # `dots` and `values` are answered by `underscores`, and Content-Type says so.
    scheme = "allow-utf-8" if escaping == "allow-utf-8" else "underscores"
    content_type = f"{media}; version=1.0.0; charset=utf-8; escaping={scheme}"
    return Form(content_type, openmetrics, scheme == "allow-utf-8")


def _ranges(header: str) -> Iterator[tuple[str, dict[str, str], float]]:
    """Yield (name, parameters, weight) of each element; a malformed weight is 0."""
    for element in header.lower().split(","):
        name, *rest = element.split(";")
        pairs = (item.partition("=") for item in rest)
        parameters = {key.strip(): value.strip().strip('"') for key, _, value in pairs}
        weight = parameters.get("q", "1")
        yield name.strip(), parameters, float(weight) if _WEIGHT.fullmatch(weight) else 0.0


def negotiate(accept: str) -> Form:
    """Return the form with the highest weight in an Accept header.

    Equal weights: a named type before a wildcard, then the first. Nothing acceptable, or
    no header, gives text 0.0.4, which every scraper reads (RFC 9110, section 12.4.1
    allows that instead of 406).
    """
    best, rank = _TEXT, (0.0, False)
    for media, parameters, weight in _ranges(accept):
        form = _offer(media, parameters.get("version", ""), parameters.get("escaping", ""))
        if form is not None and weight > 0 and (weight, "*" not in media) > rank:
            best, rank = form, (weight, "*" not in media)
    return best


def _accepts_gzip(accept_encoding: str) -> bool:
    weights = {name: weight for name, _, weight in _ranges(accept_encoding)}
    weight = weights.get("gzip", weights.get("*", 0.0))
    return weight > 0 and weight >= weights.get("identity", 0.0)


# --- from collectors' families to text that no scraper chokes on


def _claims(name: str, kind: str) -> set[str]:
    """Return the names that a family may expose, in either format."""
    base = name.removesuffix("_total") if kind == "counter" else name
    return {name, base, *(base + suffix for suffix in _SUFFIXES.get(kind, ()))}


def _exposed_name(name: str, utf8_names: bool) -> str:
    if not name:
        raise ValueError("a metric or label has an empty name")
    if _LEGAL.fullmatch(name):
        return name
    name = _UNSAFE.sub("\ufffd", name)
    return name if utf8_names else _openmetrics.escape_metric_name(name, _openmetrics.UNDERSCORES)


def _moment(timestamp: float | Timestamp | None) -> float | Timestamp | None:
    if timestamp is None or isinstance(timestamp, Timestamp):
        return timestamp
    if not math.isfinite(seconds := float(timestamp)):
        raise ValueError("a timestamp is not a moment")
    return seconds


def _exemplar(sample: Sample, kind: str) -> Exemplar | None:
    """Return the exemplar if OpenMetrics allows it here, else None: the sample stands alone."""
    exemplar = sample.exemplar
    allowed = {"counter": "_total", "histogram": "_bucket", "gaugehistogram": "_bucket"}
    if exemplar is None or not sample.name.endswith(allowed.get(kind, "\n")):
        return None
    labels = {name: clean(value) for name, value in exemplar.labels.items()}
    names_legal = all(_LEGAL.fullmatch(name) and ":" not in name for name in labels)
    if not names_legal or sum(map(len, (*labels, *labels.values()))) > 128:
        return None
    try:
        return Exemplar(labels, float(exemplar.value), _moment(exemplar.timestamp))
    except (TypeError, ValueError, OverflowError):
        return None


def _label_name(name: str, utf8_names: bool) -> str:
    name = _exposed_name(name, utf8_names)
    name = name if utf8_names else name.replace(":", "_")
    if name.startswith("__"):  # a second __name__ would refuse the whole scrape
        raise ValueError("label names that begin with __ are Prometheus's own")
    return name


def _sample(sample: Sample, kind: str, form: Form) -> Sample:
    """Return the sample as it may be encoded.

    :raises Exception: of whatever kind, if it cannot be.
    """
    labels = {
        _label_name(name, form.utf8_names): clean(value)
        for name, value in (sample.labels or {}).items()
    }
    if len(labels) != len(sample.labels or {}):
        raise ValueError("two labels have one name once escaped")
    return Sample(
        _exposed_name(sample.name, form.utf8_names),
        labels,
        float(sample.value),
        _moment(sample.timestamp),
        _exemplar(sample, kind) if form.openmetrics else None,
    )


def _family(parts: Sequence[Metric], form: Form) -> tuple[Metric, BaseException | None]:
    """Join the metrics of one collector that have one name, and make them safe to encode.

    Returns the family and the first reason why a sample was left out, if one was: its
    value is no number, its labels are not encodable, or cleaning made it equal to another.
    Native histograms, which neither format knows, are passed over.

    :raises Exception: if the family as a whole cannot be encoded.
    """
    first = parts[0]
    kind = first.type if first.type in METRIC_TYPES else "unknown"
    name = _exposed_name(first.name, form.utf8_names)
    family = Metric(name, clean(first.documentation), kind)
    if first.unit and name.endswith("_" + first.unit):
        family.unit = first.unit
    seen: set[object] = set()
    fault: BaseException | None = None
    for part in parts:
        for sample in part.samples:
            try:
                if sample.native_histogram is not None:
                    continue
                safe = _sample(sample, kind, form)
                key = safe.name, frozenset(safe.labels.items())
                if key in seen:
                    raise ValueError(f"{name} has two samples with the same labels")
            except Exception as error:
                if kind in _COMPOUND:
                    raise
                fault = fault or error
                continue
            seen.add(key)
            family.samples.append(safe)
    return family, fault


class _Only:
    """A registry of one metric: the encoders of prometheus_client ask for no more."""

    def __init__(self, metric: Metric) -> None:
        self._metric = metric

    def collect(self) -> Iterable[Metric]:
        return (self._metric,)


_openmetrics_text: Callable[[Collector, str], bytes] = _openmetrics.generate_latest


def _encode(family: Metric, form: Form) -> bytes:
    # The names are escaped already, so "allow-utf-8" lets them through unchanged; the
    # OpenMetrics encoder's own escaping would turn the colon of a name into "_".
    encoder = _openmetrics_text if form.openmetrics else _text
    return encoder(_Only(family), _openmetrics.ALLOWUTF8).removesuffix(_EOF)


# --- collectors that are not ours


def _collectors(registry: CollectorRegistry, patience: float) -> list[Collector]:
    """Return what is registered, one by one, so that each can be isolated.

    The attributes are private: without them the registry is one collector like another.
    Its lock may be held for long (a collector is described under it) or, after a fork,
    for ever, and its own methods would wait for it; the copy of a dict is whole without.
    """
    try:
        lock = registry._lock
        locked = lock.acquire(timeout=patience)
        try:
            collectors, target = list(registry._collector_to_names), registry._target_info
        finally:
            if locked:
                lock.release()
    except (AttributeError, RuntimeError):  # RuntimeError: it grew while it was copied
        return [registry]
    if not target:
        return collectors
    metric = Metric("target", "Target metadata", "info")
    metric.add_sample("target_info", target, 1)
    return [_Only(metric), *collectors]


def _read(source: Exposable | Collector, openmetrics: bool) -> Outcome:
    expose: Callable[[bool], Iterable[tuple[str, str]]] | None
    expose = getattr(source, "expose", None)
    try:
        if expose is not None:
            return tuple(expose(openmetrics))
        return list(source.collect())  # type: ignore[union-attr]
    except Exception as error:
        return error


class _Crew:
    """Runs users' collectors, so that one which hangs costs only itself. Thread-safe.

    A daemon thread takes them in turn and ends with the last. When one collector holds
    it up for a twentieth of the budget, another thread goes on with those still waiting.
    What runs past the budget is left behind in its thread and not called again before it
    has returned: never more than one thread per collector.
    """

    def __init__(self, clock: Callable[[], float], budget: float) -> None:
        self._clock = clock
        self._budget = budget
        self.patience = budget / 20
        self._changed = threading.Condition()
        # By identity, as collectors need not be hashable; kept so that no id is reused.
        self._running: dict[int, Collector] = {}

    def collect(self, collectors: Sequence[Collector], openmetrics: bool) -> list[Outcome]:
        """Return for each collector what it gave, or the error that took its place."""
        deadline = self._clock() + self._budget
        late = f"no answer within {self._budget:g} s"
        outcomes: list[Outcome] = [TimeoutError(late) for _ in collectors]
        with self._changed:
            waiting = deque(
                (index, collector)
                for index, collector in enumerate(collectors)
                if id(collector) not in self._running
            )
            unfinished = {index for index, _ in waiting}
            work = waiting, unfinished, outcomes, openmetrics
            held_up = True  # nobody is at work yet
            while unfinished and (remaining := deadline - self._clock()) > 0:
                if held_up and waiting and not self._hire(*work):
                    break
                before = len(unfinished)
                self._changed.wait(min(remaining, self.patience))
                held_up = len(unfinished) == before
            waiting.clear()  # what has not begun by now does not begin
            return list(outcomes)

    def _hire(
        self,
        waiting: deque[tuple[int, Collector]],
        unfinished: set[int],
        outcomes: list[Outcome],
        openmetrics: bool,
    ) -> bool:
        worker = threading.Thread(
            target=self._work,
            args=(waiting, unfinished, outcomes, openmetrics),
            name="opsguard-collector",
            daemon=True,
        )
        try:
            worker.start()
        except RuntimeError as error:  # no thread to be had, or the interpreter is ending
            for index, _ in waiting:
                outcomes[index] = error
            return False
        return True

    def _work(
        self,
        waiting: deque[tuple[int, Collector]],
        unfinished: set[int],
        outcomes: list[Outcome],
        openmetrics: bool,
    ) -> None:
        while True:
            with self._changed:
                if not waiting:
                    return
                index, collector = waiting.popleft()
                self._running[id(collector)] = collector
            outcome: Outcome
            try:
                outcome = _read(collector, openmetrics)
            except BaseException as error:  # SystemExit of a collector is its own affair
                outcome = error
            with self._changed:
                del self._running[id(collector)]
                outcomes[index] = outcome
                unfinished.discard(index)
                if not unfinished:
                    self._changed.notify_all()


# --- the whole answer


class _Here:
    """What belongs to one process: locks that another thread may hold while it forks."""

    def __init__(self, pid: int, clock: Callable[[], float], budget: float) -> None:
        self.pid = pid
        self.crew = _Crew(clock, budget)
        self.turn = threading.Lock()  # held while rendering
        self.lock = threading.Lock()  # guards `flights`, held for a moment
        self.flights: dict[tuple[Form, bool], Future[bytes]] = {}


class _Page:
    """The families of one answer, each name once."""

    def __init__(self, form: Form, failures: Callable[[str, BaseException | None], None]) -> None:
        self.blocks: list[bytes] = []
        self._form = form
        self._failures = failures
        self._taken: set[str] = set()

    def add_texts(self, site: str, texts: Iterable[tuple[str, str]]) -> None:
        for name, text in texts:
            line = _TYPE_LINE.search(text)
            if not self._take(_claims(*line.groups()) if line else {name}):
                continue
            try:
                self.blocks.append(text.encode())
            except UnicodeEncodeError as error:
                self._failures(site, error)
                self.blocks.append(_UNSAFE.sub("\ufffd", text).encode())

    def add_metrics(self, site: str, metrics: Iterable[Metric]) -> None:
        parts: dict[tuple[str, str], list[Metric]] = {}
        for metric in metrics:
            try:
                name = _exposed_name(metric.name, self._form.utf8_names)
                parts.setdefault((name, metric.type), []).append(metric)
            except Exception as error:
                self._failures(site, error)
        for same_name in parts.values():
            try:
                family, fault = _family(same_name, self._form)
                names = {sample.name for sample in family.samples}
                if not self._take(_claims(family.name, family.type) | names):
                    continue
                self.blocks.append(_encode(family, self._form))
            except Exception as error:
                fault = error
            if fault is not None:
                self._failures(site, fault)

    def _take(self, names: set[str]) -> bool:
        if not self._taken.isdisjoint(names):
            return False
        self._taken |= names
        return True


class Exposition:
    """Renders the sources' numbers. Starts nothing before the first call; survives a fork.

    `sources` come in order of precedence: of two families that would expose one name the
    first is kept. A source is an :class:`Exposable`, a collector, or a registry. The
    collectors in a registry are users' code: they run in helper threads within `budget`
    seconds altogether. A source given by itself is trusted to return and read in the
    calling thread. `failures(site, error)` is told of everything left out and must not
    raise; sites are `collector:<class>` and `exposition`. `clock` counts seconds.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        failures: Callable[[str, BaseException | None], None],
        clock: Callable[[], float] = time.monotonic,
        budget: float = 2.0,
    ) -> None:
        self._sources = tuple(sources)
        self._failures = failures
        self._clock = clock
        self._budget = budget
        self._here = _Here(os.getpid(), clock, budget)

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
        compressed = _accepts_gzip(accept_encoding)
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
        here, key = self._process(), (form, compressed)
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
            return _finished([], form, compressed)

    def _process(self) -> _Here:
        # In a forked child the first call begins anew. Two threads may both do so at
        # once; then one of them renders by itself, which is harmless.
        here, pid = self._here, os.getpid()
        if here.pid != pid:
            here = self._here = _Here(pid, self._clock, self._budget)
        return here

    def _lead(self, here: _Here, form: Form, compressed: bool, flight: Future[bytes]) -> None:
        body = _finished([], form, compressed)
        key = form, compressed
        try:
            if not here.turn.acquire(timeout=2 * self._budget):
                raise TimeoutError("an earlier rendering is stuck")
            try:
                with here.lock:
                    del here.flights[key]  # who comes from here on waits for the next one
                body = _finished(self._blocks(here.crew, form), form, compressed)
            finally:
                here.turn.release()
        except Exception as error:
            self._failures("exposition", error)
        finally:
            with here.lock:
                if here.flights.get(key) is flight:
                    del here.flights[key]
            flight.set_result(body)

    def _blocks(self, crew: _Crew, form: Form) -> list[bytes]:
        # Trusted sources are read before any helper thread runs, so that the number of
        # threads we report is the app's.
        own = {id(s): s for s in self._sources if not isinstance(s, CollectorRegistry)}
        read = {key: _read(source, form.openmetrics) for key, source in own.items()}
        foreign: dict[int, Collector] = {}
        members: dict[int, list[Collector]] = {}
        for source in self._sources:
            if isinstance(source, CollectorRegistry):
                members[id(source)] = _collectors(source, crew.patience)
                foreign.update((id(collector), collector) for collector in members[id(source)])
        outcomes = crew.collect(list(foreign.values()), form.openmetrics) if foreign else []
        collected = dict(zip(foreign, outcomes, strict=True))

        page = _Page(form, self._failures)
        for source in self._sources:
            if not isinstance(source, CollectorRegistry):
                self._write(page, source, read.pop(id(source), []))
                continue
            for collector in members.pop(id(source), ()):
                self._write(page, collector, collected.pop(id(collector), []))
        return page.blocks

    def _write(self, page: _Page, source: Source, outcome: Outcome) -> None:
        site = f"collector:{type(source).__name__}"
        if isinstance(outcome, BaseException):
            self._failures(site, outcome)
        elif isinstance(outcome, tuple):
            page.add_texts(site, outcome)
        else:
            page.add_metrics(site, outcome)


def _finished(blocks: list[bytes], form: Form, compressed: bool) -> bytes:
    body = b"".join(blocks) + (_EOF if form.openmetrics else b"")
    # Exposition text is so repetitive that level 1 takes nine tenths off it already;
    # mtime=0 keeps the wall clock out.
    return gzip.compress(body, compresslevel=1, mtime=0) if compressed else body
