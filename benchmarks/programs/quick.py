"""The quick gate, for every change: the Fortunes page through the server's own HTTP code.

A sample is a process, as in the gate: within one the figure is sharp, and off by as much as is to
be measured, for the copies of the app lie in memory as they happen to.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

from benchmarks.drivers.request import HEADERS, KEYED
from benchmarks.estimates import Controls, Pair, Round, added_percent, added_us
from benchmarks.guarding import KEYED_VARIANTS
from benchmarks.harness import Claim, Plan, run
from benchmarks.inprocess import compare
from benchmarks.isolation import answer
from benchmarks.program import Program, Record, Table, finished
from benchmarks.programs.gate import LIMIT_PERCENT, PATH, gate_table
from opsguard.logging.batches import BATCH

TURN = 8
"""Requests: some three milliseconds, short beside the neighbours' bursts on a shared machine."""
WARM = 2
"""Requests before each turn that do not count, as in the gate: of the first, opsguard is 50 µs."""
STEP = 2 * BATCH
"""Of a block's requests: both its halves, with the warm ones, are then whole batches of lines, and
where one is full moves through the turns, so that what waits is counted as often as it ought to be.
"""
ROUNDS_PER_START = 2
CASES = ("fastapi", "flask", "django", "asgi", "wsgi")


def one_start(framework: str, plan: Plan, variant: str = "guarded") -> Record:
    """What one process finds."""
    headers = KEYED if variant in KEYED_VARIANTS else HEADERS
    return compare(
        framework,
        PATH,
        "protocol",
        (variant,),
        (),
        Controls(),
        plan,
        headers=headers,
        turn=TURN,
        warm=WARM,
        step=STEP,
        judged=False,
    )


def rounds(start: Program, framework: str, found: list[Record]) -> Iterator[Round]:
    """Samples without end, each from a new process, whose record goes to `found`."""
    while True:
        record = answer(start, framework, start.plan)
        if "figures" not in record:
            raise ChildProcessError(record["objections"])
        found.append(record)
        bare = record["bare"]["value"] * 1_000.0
        added = {
            key.removesuffix(" added µs"): figure["value"] * 1_000.0
            for key, figure in record["figures"].items()
        }
        yield {arm: Pair(bare, bare + more) for arm, more in added.items()}


def measure(framework: str, plan: Plan, start: Program, variant: str = "guarded") -> Record:
    claims = [
        Claim("added %", added_percent(variant), LIMIT_PERCENT),
        Claim("added µs", added_us(variant)),
    ]
    found: list[Record] = []
    outcome = run(rounds(start, framework, found), claims, Controls(), plan)
    server = "uvicorn" if framework in ("fastapi", "asgi") else "gunicorn"
    complaints = [complaint for record in found for complaint in record["objections"]]
    return finished(outcome.as_record(), complaints) | {
        "case": framework,
        "server": f"{server}'s protocol code",
        "starts": len(found),
        "requests": sum(record["guarded_requests"] for record in found),
    }


def tables(records: Sequence[Record]) -> Sequence[Table]:
    return [gate_table(records)]


START = Program(
    name="quick-start",
    title="One process of the quick gate",
    question="A sample of the quick gate; its controls are judged there, over all processes.",
    cases=CASES,
    measure=one_start,
    tables=lambda records: (),
    plan=Plan(first=ROUNDS_PER_START, cap=ROUNDS_PER_START),
    regular=False,
)
LIMITED_START = replace(
    START, name="quick-limits-start", measure=partial(one_start, variant="limits and keys")
)
PROGRAM = Program(
    name="quick",
    title="The quick gate: the same page through the server's protocol code, in process",
    question=(
        "CPU time per Fortunes request through uvicorn's httptools protocol or gunicorn's sync "
        "worker, fed over memory instead of a socket. Less noise than a real server, and no "
        "kernel time for the socket in the bare figure, so a little stricter. The apps take turns "
        "in one process, and each process is one sample. Fails only when the whole interval lies "
        "above the limit."
    ),
    cases=CASES,
    measure=partial(measure, start=START),
    tables=tables,
    plan=Plan(first=8, cap=32, seconds=20.0),
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
    measure=partial(measure, start=LIMITED_START, variant="limits and keys"),
)
