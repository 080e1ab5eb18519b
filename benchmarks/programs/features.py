"""What each part of opsguard costs, inside FastAPI and around a raw ASGI app."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.estimates import Controls, added_us
from benchmarks.guarding import PARTS
from benchmarks.harness import Claim, Plan
from benchmarks.inprocess import compare
from benchmarks.program import Program, Record, Table, figure

PATH = "/json"


def measure(framework: str, plan: Plan) -> Record:
    claims = [Claim("added µs", added_us("guarded"))]
    controls = Controls(zero_percent=2.0, planted_tolerance=0.15)
    record = compare(framework, PATH, "direct", tuple(PARTS), claims, controls, plan)
    return record | {"case": framework}


def tables(records: Sequence[Record]) -> Sequence[Table]:
    names = {"guarded": "everything"}
    rows = tuple(
        (
            one["case"],
            figure(one["bare"], 1),
            *(figure(one["figures"][f"{variant} added µs"]) for variant in PARTS),
            one["verdict"],
        )
        for one in records
    )
    heads = tuple(f"{names.get(variant, variant)} µs" for variant in PARTS)
    return [Table(("framework", "bare handler µs", *heads, "verdict"), rows)]


PROGRAM = Program(
    name="features",
    title="Each part alone",
    question=(
        "The JSON handler in process, with parts of opsguard turned off by its settings. The "
        "frame is ids, context, client address and both hook points."
    ),
    cases=("fastapi", "flask", "asgi", "wsgi"),
    measure=measure,
    tables=tables,
    plan=Plan(first=32, cap=32),
)
