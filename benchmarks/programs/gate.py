"""The gate: the Fortunes page on real servers, by the CPU time of the worker."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import median
from typing import ClassVar

from benchmarks.apps import PROTOCOLS
from benchmarks.estimates import Controls, Pair, Round, added_percent, added_us
from benchmarks.guarding import KEYED_VARIANTS
from benchmarks.harness import Claim, Plan, run
from benchmarks.inprocess import counted_requests
from benchmarks.load import Connections, reading
from benchmarks.program import Program, Record, Table, figure, finished
from benchmarks.servers import Load, Server, Shared, serving

LIMIT_PERCENT = 2.0
PATH = "/fortunes"
WARM = 4
"""Requests at the start of a turn that do not count. They find the core's caches full of another
app, as those of a server under load do not.
"""
TURN = 16
"""Requests that count: some milliseconds, short beside the neighbours' bursts. With the warm ones
no part of a batch of access lines, so where one is full moves through the turns, and what it costs
is counted as often as it ought to be.
"""
CYCLES = 15
"""Times ABBA for one pair of figures."""
ROUNDS_PER_START = 3


@dataclass(slots=True)
class Fleet:
    """Starts a worker again and again; a sample is one start.

    Two workers of the same code differ by a per cent or so, for as long as they live, by where
    their memory happens to lie: so one worker has all arms, which take turns in it. What is left of
    that luck is the apps' own memory. Rounds on the same worker share it and so are not
    independent: they are averaged, and only a new start counts as new evidence.
    """

    framework: str
    variant: str
    controls: Controls
    arguments: Sequence[str] = ()
    starts: int = 0
    requests: int = 0
    access_lines: int = 0
    bare_lines: int = 0
    complaints: list[str] = field(default_factory=list)
    together: ClassVar[bool] = True

    @property
    def keep_alive(self) -> bool:
        return PROTOCOLS[self.framework] == "asgi"

    def rounds(self) -> Generator[Round]:
        """Samples without end, the guarded arm first."""
        names = ("bare", self.variant, self.controls.twin, self.controls.planted)
        with Load() as load:
            while True:
                # The order of starting is an order in memory, too: it takes turns.
                order = names if self.starts % 2 else names[::-1]
                self.starts += 1
                with serving(
                    self.framework,
                    order,
                    self.starts,
                    self.arguments,
                    one_core=True,
                    together=self.together,
                ) as servers:
                    sample = self.one_start(names, servers, load)
                self.access_lines += servers[self.variant].drain.lines
                self.bare_lines += servers["bare"].drain.printed
                yield sample

    def one_start(
        self, names: Sequence[str], servers: dict[str, Server], load: Load
    ) -> dict[str, Pair]:
        """What one start finds: for each arm the bare cost and the one beside it."""
        keyed = self.variant in KEYED_VARIANTS
        worker = Shared(servers["bare"], load, PATH, self.keep_alive, keyed)
        bare, *rest = names
        found: dict[str, list[Pair]] = {name: [] for name in rest}
        for number in range(1 + ROUNDS_PER_START):
            for name in rest:
                arms = (bare, name) if number % 2 else (name, bare)
                cost = worker.pair(arms, CYCLES, TURN, WARM)
                if number > 0:  # the first finds code that Python has not seen run yet
                    found[name].append(Pair(cost[bare], cost[name]))
        self.requests += worker.requests[self.variant]
        self.complaints += idle_guard(worker.server, self.variant, worker.requests[self.variant])
        return {name: middle(pairs) for name, pairs in found.items()}


def middle(pairs: Sequence[Pair]) -> Pair:
    """The median bare cost and, above it, the median of the paired differences."""
    bare = median([pair.bare for pair in pairs])
    return Pair(bare, bare + median([pair.added for pair in pairs]))


def measure(framework: str, plan: Plan, variant: str = "guarded") -> Record:
    claims = [
        Claim("added %", added_percent(variant), LIMIT_PERCENT),
        Claim("added µs", added_us(variant)),
    ]
    return assessed(Fleet(framework, variant, Controls()), claims, plan)


def assessed(fleet: Fleet, claims: Sequence[Claim], plan: Plan) -> Record:
    """What this fleet's workers say of the claims."""
    rounds = fleet.rounds()
    try:
        outcome = run(rounds, claims, fleet.controls, plan)
    finally:
        rounds.close()
    if fleet.access_lines < fleet.requests:
        fleet.complaints.append(f"{fleet.access_lines} access lines for {fleet.requests} requests")
    return finished(outcome.as_record(), fleet.complaints) | {
        "case": fleet.framework,
        "server": "uvicorn (uvloop, httptools)" if fleet.keep_alive else "gunicorn (sync)",
        "starts": fleet.starts,
        "requests": fleet.requests,
        "access_lines": fleet.access_lines,
    }


def idle_guard(server: Server, arm: str, requests: int) -> list[str]:
    """Whether the guarded app's own counter has seen every request that it was sent."""
    connections = Connections(server.port, keep_alive=False, width=1)
    reading(connections, arm=arm)
    answer = connections.fetch("/metrics", encoding="identity")
    seen = counted_requests(answer.decode(), PATH)
    if seen != requests:
        return [f"the guarded app counted {seen:g} of {requests} requests: is it on?"]
    return []


def tables(records: Sequence[Record]) -> Sequence[Table]:
    return [gate_table(records)]


def gate_table(records: Sequence[Record]) -> Table:
    """One row per framework; the bare page beside what opsguard adds."""
    return Table(
        (
            "framework",
            "server",
            "bare page µs",
            "opsguard adds µs",
            "opsguard adds %",
            "limit %",
            "bare against itself µs",
            "planted 30 µs reads",
            "verdict",
        ),
        tuple(
            (
                one["case"],
                one["server"],
                figure(one["bare"], 0),
                figure(one["figures"]["added µs"]),
                figure(one["figures"]["added %"]),
                f"{LIMIT_PERCENT:g}",
                figure(one["controls"]["twin"]),
                figure(one["controls"]["planted"], 1),
                one["verdict"],
            )
            for one in records
        ),
    )


PROGRAM = Program(
    name="gate",
    title="The gate: a page that reads a database and renders, on a real server",
    question=(
        "CPU time of the worker per Fortunes request (12 rows through the ORM from SQLite in "
        "memory, sorted, escaped, rendered), read by the worker itself. The bare and the guarded "
        "app take turns in one worker under the same load from a client process with 8 "
        "connections; gunicorn's sync worker closes each. The worker keeps to one core. The "
        "guarded app has ids, metrics and the access line on, JSON lines to a pipe that is "
        "drained; the bare one writes no access log."
    ),
    cases=tuple(PROTOCOLS),
    measure=measure,
    tables=tables,
    plan=Plan(first=12, cap=48, seconds=270.0),
)
LIMITED = replace(
    PROGRAM,
    name="gate-limits",
    title="The gate with a limit and an API key",
    question=(
        "As the gate, with one limit (the tier's, in the local store, its headers on every "
        "answer) and an API key that is in the cache; every worker gets the same requests, which "
        "carry the key."
    ),
    measure=partial(measure, variant="limits and keys"),
)
