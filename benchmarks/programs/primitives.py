"""The parts a request is made of, ours beside what they replace, in tight loops."""

from __future__ import annotations

import gc
import logging
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from itertools import repeat
from typing import TYPE_CHECKING, Any

from benchmarks import guarding, peers
from benchmarks.estimates import Pair, Round, added_us
from benchmarks.harness import Claim, InProcess, Plan, one_round, requests_per_block, run
from benchmarks.program import Program, Record, Table

if TYPE_CHECKING:
    from opsguard import Exchange

Operation = Callable[[], object]
BLOCK_SECONDS = 0.01
ID = "0123456789abcdef0123456789abcdef"
# Name: (what ours is, what theirs is). The operations are made in the case's process.
TITLES = {
    "counter": ("ops.metrics counter, inc()", "prometheus_client Counter.inc()"),
    "labels": ("labels(plan=…) and inc()", "prometheus_client labels(plan=…) and inc()"),
    "histogram": ("ops.metrics histogram, observe()", "prometheus_client Histogram.observe()"),
    "request": (
        "one request recorded: count, duration, first byte, sizes, in progress",
        "prometheus_client: the same six by child objects",
    ),
    "context": ("context set and cleared (set(None))", "ContextVar set and reset"),
    "id": ("fresh request id", "uuid4().hex"),
    "line": (
        "access line, sink included",
        "logging + python-json-logger (orjson), StreamHandler included",
    ),
}


def measure(case: str, plan: Plan) -> Record:
    operations, drain = _operations()
    bare = _arm("nothing", _nothing, _nothing)
    arms = [_arm(name, operation, drain) for name, operation in operations.items()]
    claims = [Claim(name, added_us(name)) for name in operations]
    outcome = run(_rounds(bare, arms), claims, None, plan)
    return outcome.as_record() | {"case": case}


def _rounds(bare: InProcess, arms: Sequence[InProcess]) -> Iterator[Round]:
    # Each operation has a block length of its own: the dearest costs 500 times the cheapest.
    teams = [(arm, requests_per_block(arm, BLOCK_SECONDS)) for arm in arms]
    gc.collect()
    gc.freeze()
    turned = False
    while True:
        found: dict[str, Pair] = {}
        for arm, times in teams:
            found |= one_round(bare, [arm], times, turned=turned)
        yield found
        turned = not turned


def _nothing() -> None:
    pass


def _arm(name: str, operation: Operation, drain: Operation) -> InProcess:
    def serve(times: int) -> None:
        for _ in repeat(None, times):
            operation()

    return InProcess(name, serve, drain)


def _operations() -> tuple[dict[str, Operation], Operation]:
    ours, drain = _ours()
    theirs = _theirs()
    found = {}
    for name in TITLES:
        found[f"ours {name}"] = ours[name]
        found[f"theirs {name}"] = theirs[name]
    return found, drain


def _ours() -> tuple[dict[str, Operation], Operation]:
    from opsguard import OpsGuard
    from opsguard.clock import wall
    from opsguard.context import current
    from opsguard.ids import fresh
    from opsguard.logging import access_line
    from opsguard.metrics import HttpMetrics, Metrics
    from opsguard.metrics.store import Store

    ops = OpsGuard(**guarding.settings())
    plain = ops.metrics.counter("bench_plain_total", "Plain.")
    labelled = ops.metrics.counter("bench_labelled_total", "Labelled.", ("plan",))
    histogram = ops.metrics.histogram("bench_seconds", "Seconds.", ("plan",)).labels(plan="pro")
    runtime = ops.runtime()
    settings = ops.settings
    aside = Metrics(Store(lambda: None, ops.failures.report), failed=ops.failures.report)
    http = HttpMetrics(aside, settings.metrics)
    begin, finish = http.begin_with(), http.record_with()
    exchange = _ended("GET", "/orders/{id}")
    line = access_line(
        settings.logging,
        service=settings.service,
        environment=settings.environment,
        sink=runtime.sink,
        clock=wall,
    )
    plain_series = plain.labels()

    def record() -> None:
        begin(exchange)
        finish(exchange)

    def context() -> None:
        current.set(exchange)
        current.set(None)

    def write() -> None:
        line(
            *("GET", "/orders/42", "/orders/{id}", 200, 0.012, 1_103, "198.51.100.4", ID, ID),
            None,
        )

    operations: dict[str, Operation] = {
        "counter": plain_series.inc,
        "labels": lambda: labelled.labels(plan="pro").inc(),
        "histogram": lambda: histogram.observe(0.012),
        "request": record,
        "context": context,
        "id": fresh,
        "line": write,
    }
    return operations, runtime.sink.flush


def _ended(method: str, endpoint: str) -> Exchange:
    """An exchange as it is when its request is to be recorded."""
    from opsguard import Exchange

    exchange = Exchange()
    exchange.method, exchange.endpoint, exchange.status = method, endpoint, 200
    exchange.received, exchange.sent = 0, 1_103
    exchange.started, exchange.first_byte, exchange.ended = 1.0, 1.011, 1.012
    return exchange


def _theirs() -> dict[str, Operation]:
    import prometheus_client

    registry = prometheus_client.CollectorRegistry()
    names = ("method", "endpoint")
    labels = {"method": "GET", "endpoint": "/orders/{id}"}

    def histogram_of(name: str) -> Any:
        made = prometheus_client.Histogram(name, name, names, registry=registry)
        return made.labels(**labels)

    plain = prometheus_client.Counter("plain", "Plain.", registry=registry)
    labelled = prometheus_client.Counter("labelled", "Labelled.", ("plan",), registry=registry)
    histogram = histogram_of("seconds")
    count = prometheus_client.Counter(
        "requests", "Requests.", (*names, "status"), registry=registry
    ).labels(**labels, status="200")
    gauge = prometheus_client.Gauge("progress", "In progress.", names, registry=registry)
    in_progress = gauge.labels(**labels)
    duration, first_byte = histogram_of("duration"), histogram_of("first_byte")
    received, sent = histogram_of("received"), histogram_of("sent")
    variable: ContextVar[object] = ContextVar("variable", default=None)
    logger: logging.Logger = peers.json_logger("peer.line")
    value = object()

    def record() -> None:
        in_progress.inc()
        count.inc()
        duration.observe(0.012)
        first_byte.observe(0.011)
        received.observe(0)
        sent.observe(1_103)
        in_progress.dec()

    def context() -> None:
        token = variable.set(value)
        variable.reset(token)

    def write() -> None:
        logger.info(
            "request_completed",
            extra={
                "service": guarding.SERVICE,
                "request_id": ID,
                "method": "GET",
                "path": "/orders/42",
                "endpoint": "/orders/{id}",
                "status_code": 200,
                "duration_ms": 12.0,
                "size": 1_103,
                "client": "198.51.100.4",
            },
        )

    return {
        "counter": plain.inc,
        "labels": lambda: labelled.labels(plan="pro").inc(),
        "histogram": lambda: histogram.observe(0.012),
        "request": record,
        "context": context,
        "id": lambda: uuid.uuid4().hex,
        "line": write,
    }


def tables(records: Sequence[Record]) -> Sequence[Table]:
    rows = []
    for name, (ours, theirs) in TITLES.items():
        figures = records[0]["figures"]
        mine, other = (1_000 * figures[f"{side} {name}"]["value"] for side in ("ours", "theirs"))
        rows.append((ours, f"{mine:,.0f}", theirs, f"{other:,.0f}", f"{other / mine:.1f}"))
    return [Table(("ours", "ns", "theirs", "ns", "theirs / ours"), tuple(rows))]


PROGRAM = Program(
    name="primitives",
    title="Primitives",
    question=(
        "Nanoseconds of CPU per call above an empty call, in tight loops with warm caches: "
        "inside a framework the same calls cost about twice as much. Lines go to a drained pipe."
    ),
    cases=("all",),
    measure=measure,
    tables=tables,
    plan=Plan(first=24, cap=24),
)
