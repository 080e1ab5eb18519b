"""The JSON handler in process: what opsguard adds beside what people glue together today."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.estimates import Controls, added_ratio, added_us
from benchmarks.harness import Claim, Plan
from benchmarks.inprocess import compare
from benchmarks.program import Program, Record, Table, figure

PATH = "/json"
# opsguard's part of what the peers add, at most.
RATIO_LIMITS = {"fastapi": 1 / 13, "flask": 1 / 5, "django": 1 / 5}
ADDED_LIMITS_US = {"fastapi": 5.3}
PEERS = {
    "fastapi": "prometheus-fastapi-instrumentator + asgi-correlation-id + access line "
    "(python-json-logger, orjson)",
    "flask": "prometheus-flask-exporter alone",
    "django": "django-prometheus alone",
}


def measure(framework: str, plan: Plan) -> Record:
    claims = [
        Claim("added µs", added_us("guarded"), ADDED_LIMITS_US.get(framework)),
        Claim("part", added_ratio("guarded", "peers"), RATIO_LIMITS[framework]),
    ]
    # The bare handler is short: what is a trace beside the figures is a larger part of it.
    controls = Controls(zero_percent=2.0, planted_tolerance=0.15)
    record = compare(framework, PATH, "direct", ("guarded", "peers"), claims, controls, plan)
    return record | {"case": framework, "peers": PEERS[framework]}


def tables(records: Sequence[Record]) -> Sequence[Table]:
    columns = (
        "framework",
        "bare handler µs",
        "opsguard adds µs",
        "limit µs",
        "peers",
        "peers add µs",
        "ours / theirs",
        "limit",
        "bare against itself µs",
        "planted 30 µs reads",
        "verdict",
    )
    rows = []
    for one in records:
        figures = one["figures"]
        limit = ADDED_LIMITS_US.get(one["case"])
        rows.append(
            (
                one["case"],
                figure(one["bare"], 1),
                figure(figures["added µs"]),
                f"{limit:g}" if limit is not None else "–",
                one["peers"],
                figure(figures["peers added µs"], 1),
                figure(figures["part"], 3),
                f"1/{round(1 / RATIO_LIMITS[one['case']])}",
                figure(one["controls"]["twin"]),
                figure(one["controls"]["planted"], 1),
                one["verdict"],
            )
        )
    return [Table(columns, tuple(rows))]


PROGRAM = Program(
    name="json",
    title="A JSON handler in process, beside the peers",
    question=(
        "CPU time added to a handler that returns a small dict, the app called as a server "
        "calls it. opsguard has ids, metrics and the access line on; the FastAPI peers do the "
        "same work (in-progress gauge on), the Flask and Django peers only export metrics. "
        "Access lines of both go to a drained pipe: opsguard's in batches, the peers' line by "
        "line, as each does by default."
    ),
    cases=tuple(PEERS),
    measure=measure,
    tables=tables,
    plan=Plan(first=48, cap=384),
)
