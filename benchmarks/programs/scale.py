"""A request in a worker on its own and in one of eight: the same cost."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from benchmarks import cores, guarding, servers
from benchmarks.apps import Served
from benchmarks.drivers import direct
from benchmarks.estimates import Controls, added_us, arm_ratio, arm_us, bare_us
from benchmarks.harness import Claim, InProcess, Plan, in_teams, requests_per_block, run
from benchmarks.inprocess import Counted, counted_requests, metrics_text
from benchmarks.load import Connections, to_one_worker
from benchmarks.planted import planted_asgi
from benchmarks.program import Program, Record, Table, figure, finished
from benchmarks.programs.growth import app

WORKERS = 8
RATIO_LIMIT = 1.05
PATH = "/route"
SERVED = 2_000  # requests of each of the others, before it idles
RATE: dict[str, Any] = {"limiter": {"store": "workers", "policies": {PATH: guarding.RATE}}}
SETTINGS: dict[str, dict[str, Any]] = {"request": {}, "limit": RATE}
BLOCK = 400  # requests to a real server
CONTROLS = Controls(twin="one again", zero_percent=2.0, planted_tolerance=0.15)
"""Two copies of the guarded app in one process differ by a per cent (where the allocator put them);
the limit is on five."""


def measure(case: str, plan: Plan) -> Record:
    with tempfile.TemporaryDirectory(dir=_memory()) as folder:
        if case == "server":
            return _servers(plan, folder) | {"case": case}
        return _in_process(case, plan, folder) | {"case": case}


def _memory() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


# In process: this one is the eighth worker ------------------------------------------------------


def guarded(case: str, service: str, folder: str) -> Served:
    import opsguard_asgi
    from opsguard import OpsGuard

    said = guarding.settings() | {"service": service, "metrics": {"directory": folder}}
    ops = OpsGuard(**said | SETTINGS[case])
    served = opsguard_asgi.install(app, ops, endpoint=lambda scope: scope["path"])
    return Served(served, "asgi", guarding.drain_of(ops))


def _in_process(case: str, plan: Plan, folder: str) -> Record:
    with _others(case, folder) as alive:
        cores.measure_here()
        loop = direct.new_loop()
        served = {name: guarded(case, name, folder) for name in ("one", "eight", "one again")}
        arms = {name: _arm(name, one, loop) for name, one in served.items()}
        one = served["one"]
        planted = Served(planted_asgi(one.app), "asgi", one.drain)
        arms["planted"] = _arm("planted", planted, loop)
        teams = [(arms["one"], arms[name]) for name in ("eight", "one again", "planted")]
        claims = [
            Claim("one µs", bare_us("eight")),
            Claim("eight µs", arm_us("eight")),
            Claim("ratio", arm_ratio("eight"), RATIO_LIMIT),
            Claim("again", arm_ratio("one again")),
        ]
        requests = requests_per_block(arms["one"])
        record = run(in_teams(teams, requests), claims, CONTROLS, plan).as_record()
        mine = _count(arms["eight"])
        seen = counted_requests(metrics_text(served["eight"], loop), PATH)
        complaints = [] if alive() else ["another worker of the group has ended"]
        if seen != mine + (WORKERS - 1) * SERVED:
            complaints.append(f"the group of eight counted {seen:g} requests, not what it served")
    lines = sum(_count(arm) for arm in arms.values())
    return finished(record, complaints) | {"guarded_requests": lines}


def _arm(name: str, served: Served, loop: Any) -> InProcess:
    return InProcess(name, Counted(direct.serve(served, (PATH,), loop)), served.drain)


def _count(arm: InProcess) -> int:
    assert isinstance(arm.serve, Counted)
    return arm.serve.requests


@contextlib.contextmanager
def _others(case: str, folder: str) -> Iterator[Callable[[], bool]]:
    """Seven living workers of the service "eight", which have served. They are forked by this
    process, so they belong to it as to a manager. Gives what says whether all still live.
    """
    context = multiprocessing.get_context("fork")
    pipes, running = [], []
    for _ in range(WORKERS - 1):
        ours, theirs = context.Pipe()
        running.append(context.Process(target=_serve_and_idle, args=(theirs, case, folder)))
        running[-1].start()
        pipes.append(ours)
    try:
        for pipe in pipes:
            pipe.recv()
        yield lambda: all(one.is_alive() for one in running)
    finally:
        for pipe in pipes:
            with contextlib.suppress(OSError):
                pipe.send("over")
        for one in running:
            one.join()


def _serve_and_idle(pipe: Connection, case: str, folder: str) -> None:
    loop = direct.new_loop()
    served = guarded(case, "eight", folder)
    direct.serve(served, (PATH,), loop)(SERVED)
    served.drain()
    pipe.send("served")
    pipe.recv()


# Real servers -----------------------------------------------------------------------------------


@dataclass(slots=True)
class Machine:
    """A server as an arm: one worker serves, and the CPU time is that of all."""

    name: str
    connections: Connections
    workers: frozenset[int]
    requests: int = 0

    def block(self, requests: int) -> float:
        before = self._spent()
        self.connections.send("/json", requests)
        self.requests += requests
        return self._spent() - before

    def _spent(self) -> float:
        # The CPU clocks of other processes, all their threads included: clock_getcpuclockid(3).
        return float(sum(time.clock_gettime_ns(~pid << 3 | 2) for pid in self.workers))

    def counted(self) -> float:
        """What opsguard has counted, by the answer of any worker."""
        answer = self.connections.fetch("/metrics", encoding="identity")
        return counted_requests(answer.decode(), "/json")


def _servers(plan: Plan, folder: str) -> Record:
    os.environ["OPSGUARD_METRICS__DIRECTORY"] = folder
    with contextlib.ExitStack() as running:
        arms = {
            (variant, workers): running.enter_context(_machine(variant, workers))
            for workers in (1, WORKERS)
            for variant in ("bare", "guarded")
        }
        teams = [(arms["bare", workers], arms["guarded", workers]) for workers in (1, WORKERS)]
        claims = [
            Claim(f"{what} at {workers}", statistic(f"guarded {workers}"))
            for workers in (1, WORKERS)
            for what, statistic in (("bare", bare_us), ("guarded", arm_us), ("added", added_us))
        ]
        record = run(in_teams(teams, BLOCK), claims, None, plan).as_record()
        complaints = [
            f"{arm.name} workers served {arm.requests} requests and counted {seen:g}"
            for (variant, _), arm in arms.items()
            if variant == "guarded" and (seen := arm.counted()) != arm.requests
        ]
    return finished(record, complaints)


@contextlib.contextmanager
def _machine(variant: str, workers: int) -> Iterator[Machine]:
    """A server whose workers have all answered, with connections to one of them."""
    arguments = ("--workers", str(workers))
    with servers.serving("fastapi", (variant,), 1, arguments) as running:
        port = running[variant].port
        connections, pids = to_one_worker(port, servers.CONNECTIONS, workers)
        with connections:
            yield Machine(f"{variant} {workers}", connections, pids)


def tables(records: Sequence[Record]) -> Sequence[Table]:
    found = {one["case"]: one for one in records}
    made = []
    if within := [found[case] for case in SETTINGS if case in found]:
        made.append(Table(_COLUMNS, tuple(_row(one) for one in within)))
    if "server" in found:
        made.append(Table(_SERVER_COLUMNS, tuple(_server_rows(found["server"]))))
    return made


_COLUMNS = (
    "in process",
    "one worker, µs",
    "one of eight, µs",
    "eight / one",
    "at most",
    "one against itself, µs",
    "planted 30 µs reads",
    "verdict",
)
_SERVER_COLUMNS = ("uvicorn", "bare µs", "guarded µs", "opsguard adds µs", "verdict")
_TITLES = {"request": "no limit", "limit": "one limit in the workers' store"}


def _row(one: Record) -> tuple[str, ...]:
    figures = one["figures"]
    return (
        _TITLES[one["case"]],
        figure(figures["one µs"]),
        figure(figures["eight µs"]),
        figure(figures["ratio"], 3),
        f"{RATIO_LIMIT:g}",
        figure(one["controls"]["one again"]),
        figure(one["controls"]["planted"], 1),
        one["verdict"],
    )


def _server_rows(one: Record) -> Iterator[tuple[str, ...]]:
    for workers in (1, WORKERS):
        cells = [one["figures"][f"{what} at {workers}"] for what in ("bare", "guarded", "added")]
        name = f"{workers} worker{'s' if workers > 1 else ''}"
        yield (name, *(figure(cell, 1) for cell in cells), one["verdict"])


PROGRAM = Program(
    name="scale",
    title="One worker and eight",
    question=(
        "CPU time of a whole guarded request to the smallest ASGI app, in a worker alone in its "
        "group and in the last of eight: the seven others are real processes that have served, "
        "hold their files and idle. Then a real server, the JSON handler of FastAPI: all requests "
        "go to one worker, as its only one or beside seven others, so that it is as busy in both; "
        "the CPU time is the sum of all workers."
    ),
    cases=("request", "limit", "server"),
    measure=measure,
    tables=tables,
    plan=Plan(first=24, cap=192),
)
