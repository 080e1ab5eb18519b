"""The quick gate, for every change: the Fortunes page through the server's own HTTP code."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.estimates import Controls, added_percent
from benchmarks.harness import Claim, Plan
from benchmarks.inprocess import compare
from benchmarks.program import Program, Record, Table
from benchmarks.programs.gate import LIMIT_PERCENT, PATH, gate_table

CASES = ("fastapi", "flask", "django", "asgi", "wsgi")


def measure(framework: str, plan: Plan) -> Record:
    claims = [Claim("added %", added_percent("guarded"), LIMIT_PERCENT)]
    record = compare(framework, PATH, "protocol", ("guarded",), claims, Controls(), plan)
    record["figures"]["added µs"] = record["figures"]["guarded added µs"]
    server = "uvicorn" if framework in ("fastapi", "asgi") else "gunicorn"
    return record | {"case": framework, "server": f"{server}'s protocol code"}


def tables(records: Sequence[Record]) -> Sequence[Table]:
    return [gate_table(records)]


PROGRAM = Program(
    name="quick",
    title="The quick gate: the same page through the server's protocol code, in process",
    question=(
        "CPU time per Fortunes request through uvicorn's httptools protocol or gunicorn's sync "
        "worker, fed over memory instead of a socket. Less noise than a real server, and no "
        "kernel time for the socket in the bare figure, so a little stricter. Fails only when "
        "the whole interval lies above the limit."
    ),
    cases=CASES,
    measure=measure,
    tables=tables,
    plan=Plan(first=20, cap=80, seconds=13.0),
    lenient=True,
)
