"""What grows with the number of series: cost of a request, of a scrape, memory."""

from __future__ import annotations

import gc
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import guarding
from benchmarks.apps import Served
from benchmarks.drivers import direct
from benchmarks.estimates import Interval, added_ratio, added_us, bootstrap, judge
from benchmarks.harness import Claim, InProcess, Plan, in_teams, requests_per_block, run
from benchmarks.inprocess import metrics_text
from benchmarks.memory import resident
from benchmarks.program import Program, Record, Table, figure

COUNTS = (1, 100, 2_000)
RATIO_LIMIT = 1.2
SCRAPE_LIMIT_MS = 50.0
MEMORY_LIMIT_BYTES = 2_048.0
SCRAPES = 25


async def app(scope: Any, receive: Any, send: Any) -> None:
    """The smallest app that answers every path."""
    headers = [(b"content-type", b"application/json"), (b"content-length", b"2")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"{}"})


def route(scope: Any) -> str | None:
    """Every path is a route of its own, its template a new string as a router's might be."""
    path: str = scope["path"]
    return "/route" + path[6:] if path.startswith("/route") else None


def paths(count: int) -> tuple[str, ...]:
    return tuple(f"/route/{number:04d}/comments" for number in range(count))


def guarded(service: str) -> Served:
    import opsguard_asgi
    from opsguard import OpsGuard

    ops = OpsGuard(**(guarding.settings() | {"service": service}))
    return Served(opsguard_asgi.install(app, ops, endpoint=route), "asgi", guarding.drain_of(ops))


def measure(case: str, plan: Plan) -> Record:
    record = {"requests": _requests, "scrape": _scrape, "memory": _memory}[case](plan)
    return record | {"case": case}


def _requests(plan: Plan) -> Record:
    loop = direct.new_loop()
    teams: list[tuple[InProcess, InProcess]] = []
    for count in COUNTS:
        served = guarded(f"growth-{count}")
        bare = direct.serve(Served(app, "asgi", lambda: None), paths(count), loop)
        mine = direct.serve(served, paths(count), loop)
        mine(count)
        teams.append((InProcess("bare", bare), InProcess(f"{count}", mine, served.drain)))
    rounds = in_teams(teams, requests_per_block(teams[0][1]))
    first = f"{COUNTS[0]}"
    claims = [Claim(f"added µs at {count}", added_us(f"{count}")) for count in COUNTS]
    claims += [
        Claim(f"{count} beside {first}", added_ratio(f"{count}", first), RATIO_LIMIT)
        for count in COUNTS[1:]
    ]
    return run(rounds, claims, None, plan).as_record()


def _filled() -> tuple[Served, Any, Callable[[], None]]:
    loop = direct.new_loop()
    served = guarded("growth")
    serve = direct.serve(served, paths(COUNTS[-1]), loop)
    return served, loop, lambda: serve(COUNTS[-1])


def _scrape(plan: Plan) -> Record:
    served, loop, fill = _filled()
    fill()
    direct.fetch(served, "/metrics", loop)
    cpu, wall = [], []
    for _ in range(SCRAPES):
        began, looked = time.process_time_ns(), time.perf_counter_ns()
        direct.fetch(served, "/metrics", loop, encoding="identity")
        cpu.append((time.process_time_ns() - began) / 1e6)
        wall.append((time.perf_counter_ns() - looked) / 1e6)
    text = metrics_text(served, loop)
    interval = bootstrap(cpu, median)
    return {
        "verdict": str(judge(interval, SCRAPE_LIMIT_MS)),
        "objections": [],
        "cpu_ms": _plain(interval),
        "wall_ms": _plain(bootstrap(wall, median)),
        "samples": len(re.findall(r"^[^#]", text, re.MULTILINE)),
        "bytes": len(text),
    }


def _memory(plan: Plan) -> Record:
    served, loop, fill = _filled()
    serve_one = direct.serve(served, paths(1), loop)
    serve_one(3_000)
    served.drain()
    gc.collect()
    before = resident(), _mapped()
    fill()
    served.drain()
    gc.collect()
    private, shared = resident() - before[0], _mapped() - before[1]
    sets = COUNTS[-1] - 1
    value = (private + shared) / sets
    return {
        "verdict": str(judge(Interval(value, value, value), MEMORY_LIMIT_BYTES)),
        "objections": [],
        "bytes_per_set": value,
        "private_bytes": private / sets,
        "mapped_bytes": shared / sets,
    }


def _mapped() -> int:
    """Bytes that the mapped metrics file takes on its disk, or the shared memory in its place."""
    names = set()
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        name = line.split(maxsplit=5)[-1]
        if "opsguard-" in name and name.startswith("/"):
            names.add(name)
    on_disk = sum(Path(name).stat().st_blocks * 512 for name in names)
    status = Path("/proc/self/status").read_text(encoding="ascii")
    found = re.search(r"^RssShmem:\s+(\d+) kB", status, re.MULTILINE)
    assert found is not None
    return max(on_disk, int(found.group(1)) * 1_024)


def _plain(interval: Interval) -> dict[str, float]:
    return {"value": interval.value, "low": interval.low, "high": interval.high}


def tables(records: Sequence[Record]) -> Sequence[Table]:
    rows: list[tuple[str, ...]] = []
    for one in records:
        rows += _ROWS[one["case"]](one)
    return [Table(("what", "measured", "limit", "verdict"), tuple(rows))]


def _request_rows(one: Record) -> list[tuple[str, ...]]:
    bare = f"{one['bare']['value']:.1f} µs bare"
    added = [
        (
            f"added to a request at {count:,} series, µs ({bare})",
            figure(one["figures"][f"added µs at {count}"]),
            "–",
            "info",
        )
        for count in COUNTS
    ]
    ratios = [
        (
            f"added at {count:,} series / at 1",
            figure(one["figures"][key]),
            f"{RATIO_LIMIT:g}",
            one["verdicts"][key],
        )
        for count in COUNTS[1:]
        for key in [f"{count} beside {COUNTS[0]}"]
    ]
    return [*added, *ratios]


def _scrape_rows(one: Record) -> list[tuple[str, ...]]:
    size = f"{one['samples']:,} samples, {one['bytes'] / 1e6:.1f} MB"
    return [
        (
            f"scrape at {COUNTS[-1]:,} label sets ({size}), ms of CPU",
            figure(one["cpu_ms"], 1),
            f"{SCRAPE_LIMIT_MS:g}",
            one["verdict"],
        ),
        ("the same, ms of wall time", figure(one["wall_ms"], 1), "–", "info"),
    ]


def _memory_rows(one: Record) -> list[tuple[str, ...]]:
    parts = f"{one['private_bytes']:,.0f} private, {one['mapped_bytes']:,.0f} mapped file"
    return [
        (
            f"memory per (method, endpoint, status), bytes ({parts})",
            f"{one['bytes_per_set']:,.0f}",
            f"{MEMORY_LIMIT_BYTES:,.0f}",
            one["verdict"],
        )
    ]


_ROWS = {"requests": _request_rows, "scrape": _scrape_rows, "memory": _memory_rows}

PROGRAM = Program(
    name="growth",
    title="Growth",
    question=(
        "A raw ASGI app that answers every path, each path a route of its own. Requests go "
        "round 1, 100 and 2,000 routes, so that each finds its series where the caches left "
        "them. The scrape is the whole text format; memory counts private pages and the blocks "
        "of the mapped file."
    ),
    cases=("requests", "scrape", "memory"),
    measure=measure,
    tables=tables,
    plan=Plan(first=48, cap=192),
)
