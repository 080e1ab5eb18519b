"""The gate: the Fortunes page on real servers, by the CPU time of the worker."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from statistics import median

from benchmarks.apps import PROTOCOLS
from benchmarks.estimates import Controls, Pair, Round, added_percent, added_us
from benchmarks.guarding import KEYED_VARIANTS
from benchmarks.harness import Claim, Plan, interleaved, requests_per_block, run
from benchmarks.inprocess import counted_requests
from benchmarks.load import Connections
from benchmarks.program import Program, Record, Table, figure, finished
from benchmarks.servers import Load, Served, Server, serving
from opsguard.logging.batches import BATCH

LIMIT_PERCENT = 2.0
PATH = "/fortunes"
WARM = 16
"""Requests at the start of a turn that do not count. They find the core's caches full of another
process, as those of a server under load do not: of the first, opsguard is 130 µs and more.
"""
TURN = BATCH - WARM
"""Requests that count, some fifty milliseconds. With the warm ones a batch of access lines, so that
to write what waits at the end of a turn wakes the reader of the pipe as rarely as under load.
"""
ROUNDS_PER_START = 8


@dataclass(slots=True)
class Fleet:
    """Starts the workers again and again; a sample is one start.

    Two workers of the same code differ by a per cent or so, for as long as they live, by where
    their memory happens to lie. Rounds on the same workers share that luck and so are not
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
                seed = self.starts + 1
                with serving(self.framework, order, seed, self.arguments, one_core=True) as servers:
                    yield self._one_start(names, servers, load)

    def _one_start(
        self, names: Sequence[str], servers: dict[str, Server], load: Load
    ) -> dict[str, Pair]:
        keyed = self.variant in KEYED_VARIANTS
        arms = {
            name: Served(name, servers[name], load, PATH, self.keep_alive, keyed) for name in names
        }
        bare, *rest = arms.values()
        requests = requests_per_block(bare, step=TURN)
        teams = [(bare, one) for one in rest]
        rounds = list(islice(interleaved(teams, requests, TURN, WARM), ROUNDS_PER_START))
        guarded = arms[self.variant]
        self.starts += 1
        self.requests += guarded.requests
        self.complaints += idle_guard(guarded.server, guarded.requests)
        self.access_lines += guarded.server.drain.lines
        self.bare_lines += bare.server.drain.printed
        return {name: middle([one[name] for one in rounds]) for name in rounds[0]}


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


def idle_guard(server: Server, requests: int) -> list[str]:
    """Whether the guarded worker's own counter has seen every request of its blocks."""
    connections = Connections(server.port, keep_alive=False, width=1)
    answer = connections.fetch("/metrics", encoding="identity")
    seen = counted_requests(answer.decode(), PATH)
    if seen < requests:
        return [f"the guarded worker counted {seen:g} of {requests} requests: is it on?"]
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
        "memory, sorted, escaped, rendered), read by the worker itself. Bare and guarded "
        "workers take turns under the same load from a client process with 8 connections; "
        "gunicorn's sync worker closes each. All workers are on one core. The guarded worker has "
        "ids, metrics and the access line on, JSON lines to a pipe that is drained; the bare one "
        "writes no access log."
    ),
    cases=tuple(PROTOCOLS),
    measure=measure,
    tables=tables,
    plan=Plan(first=16, cap=48),
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
