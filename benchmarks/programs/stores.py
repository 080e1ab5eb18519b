"""Limits in a Redis: what exact decisions and leases cost, and what a dead one costs."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

from benchmarks import cores, guarding
from benchmarks.apps import PROTOCOLS, Served, make_all
from benchmarks.drivers import direct, protocol
from benchmarks.estimates import Controls, added_ratio, added_us, bare_us, percentile
from benchmarks.harness import Claim, InProcess, Plan, in_teams, requests_per_block, run
from benchmarks.program import Program, Record, Table, figure, finished
from benchmarks.redis_server import RedisServer, redis

PATH = "/json"
LEASE = 50
RATIO_LIMIT = 1 / 10
OPENING_LIMIT_MS = 25.0
OPEN_LIMIT_MS = 1.0
AFTER = 1_000  # requests to a service whose breaker is open
PAUSE = 0.002  # seconds between them, so that the breaker's probes come and go, too
BLOCK_SECONDS = 0.01
"""Of the bare app: an exact decision takes several times as long as such a request."""
FRAMEWORKS = {"async": "fastapi", "sync": "flask"}


def measure(case: str, plan: Plan) -> Record:
    what, _, kind = case.partition(" ")
    with redis() as server:
        record = {"lease": _lease, "black-holed": _black_hole}[what](kind, server, plan)
    return record | {"case": case}


def _limited(framework: str, server: RedisServer, lease: int) -> tuple[Served, Any]:
    """A guarded app with one limit in that Redis, and its OpsGuard."""
    from opsguard import OpsGuard

    limiter = {"default": guarding.RATE, "store": server.url, "lease": lease}
    ops = OpsGuard(**(guarding.settings() | {"limiter": limiter}))
    app = guarding.install(framework, make_all(framework, ("bare",))["bare"].app, ops)
    return Served(app, PROTOCOLS[framework], guarding.drain_of(ops)), ops


def _lease(kind: str, server: RedisServer, plan: Plan) -> Record:
    cores.measure_here()
    framework = FRAMEWORKS[kind]
    served = make_all(framework, ("bare", "guarded", "guarded again", "planted"))
    served["exact"], _ = _limited(framework, server, 1)
    served["leased"], _ = _limited(framework, server, LEASE)
    loop = direct.new_loop()
    arms = {
        # Through the server's own code: an event loop must turn between two requests, as a lease
        # is renewed by a task of its own.
        name: InProcess(name, protocol.serve(one, PATH, loop), one.drain)
        for name, one in served.items()
    }
    beside = [("guarded", "leased"), ("guarded", "exact"), ("guarded", "guarded again")]
    beside += [("bare", "planted")]
    claims = [
        Claim("bare µs", bare_us("planted")),
        Claim("exact µs", added_us("exact")),
        Claim("leased µs", added_us("leased")),
        Claim("part", added_ratio("leased", "exact"), RATIO_LIMIT),
    ]
    requests = requests_per_block(arms["bare"], BLOCK_SECONDS)
    rounds = in_teams([(arms[base], arms[name]) for base, name in beside], requests)
    controls = Controls(twin="guarded again", zero_percent=1.0, planted_tolerance=0.15)
    outcome = run(rounds, claims, controls, plan)
    complaints = []
    for name in ("exact", "leased"):
        _, headers, _ = direct.fetch(served[name], PATH, loop)
        if "x-ratelimit-remaining" not in headers:
            complaints.append(f"{name} sends no X-RateLimit-Remaining: is it on?")
    if not _keys_in(server):
        complaints.append("the Redis was not asked")
    return finished(outcome.as_record(), complaints) | {"framework": framework}


def _keys_in(server: RedisServer) -> int:
    """How many keys the Redis holds."""
    from redis import Redis

    with Redis.from_url(server.url) as client:
        return len(client.keys("*"))


def _black_hole(kind: str, server: RedisServer, plan: Plan) -> Record:
    framework = FRAMEWORKS[kind]
    served, ops = _limited(framework, server, 1)
    store = ops.runtime().limiter().store
    loop = direct.new_loop()
    serve = direct.serve(served, (PATH,), loop)
    complaints: list[str] = []

    def timed() -> float:
        began = time.perf_counter_ns()
        serve(1)
        return (time.perf_counter_ns() - began) / 1e6

    serve(200)
    gc.collect()
    gc.freeze()  # what a collection of the whole app takes is not the store's
    healthy = [timed() for _ in range(200)]
    server.freeze()
    opening: list[float] = []
    while not store.down and len(opening) < 100:
        opening.append(timed())
    after: list[float] = []
    for _ in range(AFTER):
        loop.run_until_complete(asyncio.sleep(PAUSE))  # what runs in the background goes on
        after.append(timed())
    if not store.down:
        complaints.append("the breaker did not open")
    status, headers, _ = direct.fetch(served, PATH, loop)
    if status != 200 or "x-ratelimit-remaining" not in headers:
        complaints.append(f"with the Redis down the app answers {status}")
    worst, late = max(opening), percentile(after, 0.99)
    verdict = "pass" if worst <= OPENING_LIMIT_MS and late <= OPEN_LIMIT_MS else "fail"
    record = {
        "verdict": verdict,
        "objections": [],
        "framework": framework,
        "healthy_ms": median(healthy),
        "opening": len(opening),
        "opening_ms": median(opening),
        "opening_worst_ms": worst,
        "after_ms": median(after),
        "after_p99_ms": late,
        "after_worst_ms": max(after),
    }
    return finished(record, complaints)


def tables(records: Sequence[Record]) -> Sequence[Table]:
    found = []
    for columns, kind, row in (
        (_LEASE_COLUMNS, "lease", _lease_row),
        (_HOLE_COLUMNS, "black-holed", _hole_row),
    ):
        rows = tuple(row(one) for one in records if one["case"].startswith(kind))
        if rows:
            found.append(Table(columns, rows))
    return found


_LEASE_COLUMNS = (
    "app",
    "bare handler µs",
    "guarded without µs",
    "exact adds µs",
    f"leases of {LEASE} add µs",
    "leased / exact",
    "at most",
    "verdict",
)
_HOLE_COLUMNS = (
    "app",
    "a request before, ms",
    "requests until the breaker opened",
    "each of them, ms",
    "the longest",
    "at most",
    "once it is open, ms",
    "99 %",
    "at most",
    "the longest",
    "verdict",
)


def _lease_row(one: Record) -> tuple[str, ...]:
    figures = one["figures"]
    return (
        f"{one['framework']}, {one['case'].partition(' ')[2]}",
        figure(figures["bare µs"], 1),
        figure(one["bare"], 1),
        figure(figures["exact µs"], 1),
        figure(figures["leased µs"]),
        figure(figures["part"], 3),
        f"1/{round(1 / RATIO_LIMIT)}",
        one["verdict"],
    )


def _hole_row(one: Record) -> tuple[str, ...]:
    return (
        f"{one['framework']}, {one['case'].partition(' ')[2]}",
        f"{one['healthy_ms']:.2f}",
        f"{one['opening']}",
        f"{one['opening_ms']:.1f}",
        f"{one['opening_worst_ms']:.1f}",
        f"{OPENING_LIMIT_MS:g}",
        f"{one['after_ms']:.2f}",
        f"{one['after_p99_ms']:.2f}",
        f"{OPEN_LIMIT_MS:g}",
        f"{one['after_worst_ms']:.2f}",
        one["verdict"],
    )


PROGRAM = Program(
    name="stores",
    title="Limits in a Redis: exact, leased, and with the Redis gone",
    question=(
        "A real Redis on this machine. First CPU time per JSON request of the app's process, all "
        "its threads, through the server's protocol code: one limit decided by the Redis each "
        f"time, and with leases of {LEASE} tokens. Then the Redis is stopped with SIGSTOP, so that "
        "it keeps its connections and says nothing: wall time of the requests until the breaker "
        "opens, and of those after."
    ),
    cases=("lease async", "lease sync", "black-holed async", "black-holed sync"),
    measure=measure,
    tables=tables,
    plan=Plan(first=32, cap=96),
)
