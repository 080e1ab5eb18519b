"""The gate's page beside the server's own access log: what changes for who has that on today."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.apps import PROTOCOLS
from benchmarks.estimates import Controls, added_percent, added_us
from benchmarks.harness import Claim, Plan
from benchmarks.program import Program, Record, Table, figure, finished
from benchmarks.programs.gate import Fleet, assessed

ACCESS_LOG = {
    "asgi": ("--access-log", "--log-level", "info"),  # what uvicorn does by itself
    "wsgi": ("--access-logfile", "-"),
}
"""Arguments of the server, by protocol."""


def measure(framework: str, plan: Plan) -> Record:
    arguments = ACCESS_LOG[PROTOCOLS[framework]]
    claims = [Claim("added %", added_percent("guarded")), Claim("added µs", added_us("guarded"))]
    fleet = Fleet(framework, "guarded", Controls(), arguments)
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
