"""Import time of opsguard, in fresh interpreters."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from statistics import median

from benchmarks.estimates import bootstrap, judge
from benchmarks.harness import Plan
from benchmarks.program import Program, Record, Table, figure

LIMIT_MS = 100.0
STARTS = 15
SCRIPT = """
import json, time
a = time.process_time_ns()
import prometheus_client, pydantic
b = time.process_time_ns()
import opsguard
c = time.process_time_ns()
opsguard.OpsGuard(service="benchmark").settings
d = time.process_time_ns()
print(json.dumps([(b - a) / 1e6, (c - b) / 1e6, (d - c) / 1e6]))
"""


def measure(case: str, plan: Plan) -> Record:
    runs = []
    for start in range(STARTS + 1):
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT], check=True, capture_output=True, text=True
        )
        if start:  # the first one fills the file cache
            runs.append(json.loads(done.stdout))
    under, ours, settings = (bootstrap(column, median) for column in zip(*runs, strict=True))
    figures = {"dependencies": under, "opsguard": ours, "settings": settings}
    return {
        "case": case,
        "verdict": str(judge(ours, LIMIT_MS)),
        "objections": [],
        "figures": {
            name: {"value": one.value, "low": one.low, "high": one.high}
            for name, one in figures.items()
        },
    }


def tables(records: Sequence[Record]) -> Sequence[Table]:
    one = records[0]
    figures = one["figures"]
    return [
        Table(
            ("import", "ms of CPU", "limit ms", "verdict"),
            (
                ("prometheus_client, pydantic", figure(figures["dependencies"], 1), "–", "info"),
                (
                    "opsguard, beyond these",
                    figure(figures["opsguard"], 1),
                    f"{LIMIT_MS:g}",
                    one["verdict"],
                ),
                ("first settings read, at install", figure(figures["settings"], 1), "–", "info"),
            ),
        )
    ]


PROGRAM = Program(
    name="imports",
    title="Import time",
    question="CPU time of the import in fresh interpreters, the file cache warm.",
    cases=("all",),
    measure=measure,
    tables=tables,
)
