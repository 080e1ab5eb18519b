"""The gate's page beside the server's own access log: what changes for who has that on today."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from benchmarks.apps import PROTOCOLS
from benchmarks.estimates import Controls, Pair, added_percent, added_us
from benchmarks.harness import Claim, Plan, interleaved, requests_per_block
from benchmarks.program import Program, Record, Table, figure, finished
from benchmarks.programs.gate import PATH, Fleet, assessed, idle_guard, middle
from benchmarks.servers import Load, Served, Server
from opsguard.logging.batches import BATCH

ACCESS_LOG = {
    "asgi": ("--access-log", "--log-level", "info"),  # what uvicorn does by itself
    "wsgi": ("--access-logfile", "-"),
}
"""Arguments of the server, by protocol."""


WARM = 16
"""Requests at the start of a turn that do not count. They find the core's caches full of another
process, as those of a server under load do not: of the first, opsguard is 130 µs and more.
"""
TURN = BATCH - WARM
"""Requests that count, some fifty milliseconds. With the warm ones a batch of access lines, so that
to write what waits at the end of a turn wakes the reader of the pipe as rarely as under load.
"""
ROUNDS_PER_START = 8


class Apart(Fleet):
    """As the gate's, with a worker for each arm, all on one core: opsguard takes the server's line
    away, so the bare app cannot live beside it.
    """

    together = False

    def one_start(
        self, names: Sequence[str], servers: dict[str, Server], load: Load
    ) -> dict[str, Pair]:
        arms = {
            name: Served(servers[name], load, PATH, self.keep_alive, name=name) for name in names
        }
        bare, *rest = arms.values()
        requests = requests_per_block(bare, step=TURN)
        teams = [(bare, one) for one in rest]
        rounds = list(islice(interleaved(teams, requests, TURN, WARM), ROUNDS_PER_START))
        guarded = arms[self.variant]
        self.requests += guarded.requests
        self.complaints += idle_guard(guarded.server, guarded.name, guarded.requests)
        return {name: middle([one[name] for one in rounds]) for name in rounds[0]}


def measure(framework: str, plan: Plan) -> Record:
    arguments = ACCESS_LOG[PROTOCOLS[framework]]
    claims = [Claim("added %", added_percent("guarded")), Claim("added µs", added_us("guarded"))]
    fleet = Apart(framework, "guarded", Controls(), arguments)
    record = assessed(fleet, claims, plan)
    if fleet.bare_lines < fleet.requests:
        return finished(
            record, [f"the server wrote {fleet.bare_lines} lines of its own: is it on?"]
        )
    return record


def tables(records: Sequence[Record]) -> Sequence[Table]:
    return [
        Table(
            (
                "framework",
                "server",
                "page with the server's line µs",
                "opsguard instead adds µs",
                "opsguard instead adds %",
                "page against itself µs",
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
                    figure(one["controls"]["twin"]),
                    figure(one["controls"]["planted"], 1),
                    one["verdict"],
                )
                for one in records
            ),
        )
    ]


PROGRAM = Program(
    name="replaced",
    title="The same page beside the server's own access log",
    question=(
        "As the gate, but the bare worker writes the server's own access log, which opsguard "
        "replaces: uvicorn's is on unless somebody switches it off, gunicorn's is switched on "
        "here. Below 0 the page is cheaper with opsguard than without. A figure without a limit; "
        "the gate's bare worker writes none."
    ),
    cases=("fastapi", "flask", "asgi", "wsgi"),
    measure=measure,
    tables=tables,
    plan=Plan(first=8, cap=16),
    regular=False,
)
