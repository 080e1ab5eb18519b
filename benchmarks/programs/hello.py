"""Hello, world: the same cost beside the smallest request there is. A figure without a limit."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.estimates import Controls, added_percent, added_us
from benchmarks.harness import Claim, Plan
from benchmarks.inprocess import compare
from benchmarks.program import Program, Record, Table, figure
from benchmarks.programs.quick import CASES


def measure(framework: str, plan: Plan) -> Record:
    claims = [
        Claim("added µs", added_us("guarded")),
        Claim("added %", added_percent("guarded")),
    ]
    controls = Controls(zero_percent=2.0, planted_tolerance=0.15)
    record = compare(framework, "/json", "protocol", ("guarded",), claims, controls, plan)
    return record | {"case": framework}


def tables(records: Sequence[Record]) -> Sequence[Table]:
    return [
        Table(
            ("framework", "bare handler µs", "opsguard adds µs", "opsguard adds %", "verdict"),
            tuple(
                (
                    one["case"],
                    figure(one["bare"], 1),
                    figure(one["figures"]["added µs"]),
                    figure(one["figures"]["added %"], 1),
                    one["verdict"],
                )
                for one in records
            ),
        )
    ]


PROGRAM = Program(
    name="hello",
    title="The same microseconds beside a JSON hello-world",
    question=(
        "The JSON handler through the server's protocol code: the smallest request, so the "
        "largest percentage. Without a limit; published beside the gate so that both are seen."
    ),
    cases=CASES,
    measure=measure,
    tables=tables,
    plan=Plan(first=48, cap=96),
)
