"""A flood of distinct clients on the local store: memory, pauses, and what the others notice."""

from __future__ import annotations

import gc
import time
from array import array
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

from benchmarks import cores, guarding
from benchmarks.apps import Served
from benchmarks.drivers import direct
from benchmarks.drivers.request import scopes
from benchmarks.estimates import percentile
from benchmarks.harness import Plan
from benchmarks.memory import resident
from benchmarks.program import Program, Record, Table, finished
from benchmarks.programs.growth import app, route

PATH = "/route/0"
CAP = 100_000
FLOOD = 1_000_000
OTHERS = 100  # clients who come all the time, each tenth request in the flood
EVERY = 10
MEMORY_LIMIT_MB = 64.0
PAUSE_LIMIT_MS = 10.0
RATIO_LIMIT = 2.0
KEY_LIMIT_BYTES = 250.0
REFUSED = 3  # requests that a client may make in the case about memory


def measure(case: str, plan: Plan) -> Record:
    cores.measure_here()
    return {"flood": _flood, "memory": _memory}[case]() | {"case": case}


def _guarded(rate: str, **changes: Any) -> tuple[Served, Any]:
    import opsguard_asgi
    from opsguard import OpsGuard

    limiter = {"default": rate, "max_keys": CAP}
    ops = OpsGuard(**(guarding.settings() | {"limiter": limiter} | changes))
    served = opsguard_asgi.install(app, ops, endpoint=route)
    return Served(served, "asgi", guarding.drain_of(ops)), ops


class Times:
    """Nanoseconds of CPU and of the wall clock; in arrays, which are next to nothing of the memory
    that is measured, and nothing to the garbage collector.
    """

    def __init__(self) -> None:
        self.cpu = array("q")
        self.wall = array("q")

    def add(self, pair: tuple[int, int]) -> None:
        self.cpu.append(pair[0])
        self.wall.append(pair[1])


class Clients:
    """Requests from addresses of our choice; each is timed."""

    def __init__(self, served: Served) -> None:
        self._app = served.app
        self._scope = scopes()
        self.statuses: dict[int, int] = {}

    async def ask(self, client: str) -> tuple[int, int]:
        """Nanoseconds of this thread's CPU, and of the wall clock."""
        scope = self._scope(PATH)
        scope["client"] = (client, 50_000)
        cpu, wall = time.thread_time_ns, time.perf_counter_ns
        looked, began = wall(), cpu()
        await self._app(scope, _receive, self._send)
        return cpu() - began, wall() - looked

    async def _send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            status = message["status"]
            self.statuses[status] = self.statuses.get(status, 0) + 1


async def _receive() -> dict[str, Any]:
    return {"type": "http.request", "body": b"", "more_body": False}


def address(number: int) -> str:
    """The address of the flood's client of this number.

    >>> address(258)
    '10.0.1.2'
    """
    return f"10.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}"


def other(number: int) -> str:
    """The address of one who comes all the time."""
    return f"192.0.2.{number % OTHERS}"


def _flood() -> Record:
    served, ops = _guarded(guarding.RATE)
    clients, loop = Clients(served), direct.new_loop()

    async def quiet(times: int) -> Times:
        found = Times()
        for number in range(times):
            found.add(await clients.ask(other(number)))
        return found

    async def flooded() -> tuple[Times, int, int, int]:
        calm, longest, slowest, total = Times(), 0, 0, 0
        others = count()
        for number in range(FLOOD):
            cpu, wall = await clients.ask(address(number))
            total += cpu
            longest, slowest = max(longest, cpu), max(slowest, wall)
            if number % EVERY == 0:
                cpu, wall = await clients.ask(other(next(others)))
                calm.add((cpu, wall))
                longest, slowest = max(longest, cpu), max(slowest, wall)
        return calm, longest, slowest, total

    loop.run_until_complete(quiet(20_000))
    served.drain()
    before = loop.run_until_complete(quiet(FLOOD // EVERY))
    gc.collect()
    memory = resident()
    during, longest, slowest, total = loop.run_until_complete(flooded())
    served.drain()
    grown = (resident() - memory) / 1e6
    store = ops.runtime().limiter().store
    ratio = percentile(during.cpu, 0.99) / percentile(before.cpu, 0.99)
    held = grown <= MEMORY_LIMIT_MB and longest / 1e6 <= PAUSE_LIMIT_MS and ratio <= RATIO_LIMIT
    complaints = []
    if len(store) < CAP:
        complaints.append(f"the store has {len(store)} buckets, so it was not full")
    if set(clients.statuses) != {200}:
        complaints.append(f"the app answered {clients.statuses}")
    record: Record = {
        "verdict": "pass" if held else "fail",
        "objections": [],
        "memory_mb": grown,
        "buckets": len(store),
        "request_us": total / FLOOD / 1e3,
        "before_p99_us": percentile(before.cpu, 0.99) / 1e3,
        "during_p99_us": percentile(during.cpu, 0.99) / 1e3,
        "p99_ratio": ratio,
        "before_wall_p99_us": percentile(before.wall, 0.99) / 1e3,
        "during_wall_p99_us": percentile(during.wall, 0.99) / 1e3,
        "longest_ms": longest / 1e6,
        "longest_wall_ms": slowest / 1e6,
        "before_longest_ms": max(before.cpu) / 1e6,
    }
    return finished(record, complaints)


def _memory() -> Record:
    """Buckets in the full store: of clients who came once, and of ones who are refused."""
    found = {}
    for name, times in (("new", 1), ("refused", REFUSED + 1)):
        quiet = {"format": "json", "access": "off"}
        served, ops = _guarded(f"{REFUSED}/minute", logging=quiet)
        clients, loop = Clients(served), direct.new_loop()

        async def come(numbers: range, asked: Clients = clients, each: int = times) -> None:
            for number in numbers:
                for _ in range(each):
                    await asked.ask(address(number))

        loop.run_until_complete(come(range(1_000)))
        gc.collect()
        before = resident()
        loop.run_until_complete(come(range(1_000, CAP)))
        gc.collect()
        buckets = len(ops.runtime().limiter().store) - 1_000
        found[name] = (resident() - before) / buckets
    worst = max(found.values())
    return {
        "verdict": "pass" if worst <= KEY_LIMIT_BYTES else "fail",
        "objections": [] if buckets == CAP - 1_000 else [f"the store has {buckets:,} buckets"],
        "new_bytes": found["new"],
        "refused_bytes": found["refused"],
    }


def tables(records: Sequence[Record]) -> Sequence[Table]:
    rows: list[tuple[str, ...]] = []
    for one in records:
        rows += _ROWS[one["case"]](one)
    return [Table(("what", "measured", "limit", "verdict"), tuple(rows))]


def _flood_rows(one: Record) -> list[tuple[str, ...]]:
    def row(what: str, value: float, digits: int, limit: float) -> tuple[str, ...]:
        verdict = "pass" if value <= limit else "fail"
        verdict = "void" if one["verdict"] == "void" else verdict
        return (what, f"{value:,.{digits}f}", f"{limit:g}", verdict)

    def told(what: str, value: float, digits: int) -> tuple[str, ...]:
        return (what, f"{value:,.{digits}f}", "–", "info")

    before, during = one["before_p99_us"], one["during_p99_us"]
    return [
        row(
            f"memory that {FLOOD:,} clients leave ({one['buckets']:,} buckets), MB",
            one["memory_mb"],
            1,
            MEMORY_LIMIT_MB,
        ),
        row(
            f"other clients, 99 %: in the flood / before ({during:.0f} / {before:.0f} µs of CPU)",
            one["p99_ratio"],
            2,
            RATIO_LIMIT,
        ),
        row("the longest request of all, ms of CPU", one["longest_ms"], 1, PAUSE_LIMIT_MS),
        told("the same before the flood, ms of CPU", one["before_longest_ms"], 1),
        told("the longest of all, ms of wall time", one["longest_wall_ms"], 1),
        told("other clients, 99 % before, µs of wall time", one["before_wall_p99_us"], 0),
        told("other clients, 99 % in the flood, µs of wall time", one["during_wall_p99_us"], 0),
        told("a request of the flood, µs of CPU", one["request_us"], 1),
    ]


def _memory_rows(one: Record) -> list[tuple[str, ...]]:
    def row(who: str, value: float) -> tuple[str, ...]:
        verdict = "pass" if value <= KEY_LIMIT_BYTES else "fail"
        verdict = "void" if one["verdict"] == "void" else verdict
        what = f"memory per live key, bytes: {who}"
        return (what, f"{value:,.0f}", f"{KEY_LIMIT_BYTES:g}", verdict)

    return [
        row("clients who came once", one["new_bytes"]),
        row("clients who are being refused", one["refused_bytes"]),
    ]


_ROWS: dict[str, Callable[[Record], list[tuple[str, ...]]]] = {
    "flood": _flood_rows,
    "memory": _memory_rows,
}

PROGRAM = Program(
    name="flood",
    title="A million clients",
    question=(
        f"A raw ASGI app with one limit by client address in the local store, which may hold "
        f"{CAP:,} buckets. {FLOOD:,} clients come once each, one after the other; each "
        f"{EVERY}th request is from one of {OTHERS} who come all the time, and who alone came "
        "before. Every request is timed by its thread's CPU clock, as on a shared machine the "
        "wall clock shows the neighbours; it is told beside it. Memory is private pages."
    ),
    cases=("flood", "memory"),
    measure=measure,
    tables=tables,
)
