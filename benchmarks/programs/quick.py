"""The quick gate, for every change: the Fortunes page through the server's own HTTP code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from benchmarks.drivers.request import HEADERS, KEYED
from benchmarks.estimates import Controls, added_percent
from benchmarks.guarding import KEYED_VARIANTS
from benchmarks.harness import Claim, Plan
from benchmarks.inprocess import compare
from benchmarks.program import Program, Record, Table
from benchmarks.programs.gate import LIMIT_PERCENT, PATH, gate_table

CASES = ("fastapi", "flask", "django", "asgi", "wsgi")


def measure(framework: str, plan: Plan, variant: str = "guarded") -> Record:
    claims = [Claim("added %", added_percent(variant), LIMIT_PERCENT)]
    headers = KEYED if variant in KEYED_VARIANTS else HEADERS
    record = compare(
        framework, PATH, "protocol", (variant,), claims, Controls(), plan, headers=headers
    )
    record["figures"]["added µs"] = record["figures"][f"{variant} added µs"]
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
LIMITED = replace(
    PROGRAM,
    name="quick-limits",
    title="The quick gate with a limit and an API key",
    question=(
        "As the quick gate, with one limit (the tier's, in the local store, its headers on every "
        "answer) and an API key that is in the cache; every app gets the same requests, which "
        "carry the key."
    ),
    measure=partial(measure, variant="limits and keys"),
)
