"""What a limit adds to a guarded request, beside the limiters that people take today."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.estimates import Controls, added_ratio, added_us, arm_us, bare_us
from benchmarks.harness import SHORT_BLOCK_SECONDS, Claim, Plan
from benchmarks.inprocess import compare
from benchmarks.program import Program, Record, Table, figure

PATH = "/json"
RATIO_LIMIT = 1 / 15
ADDED_LIMITS_US = {"fastapi": 1.1}
PEERS = {"fastapi": "slowapi, decorator", "flask": "flask-limiter, default limits"}
KINDS = {
    "limit by decorator": "@ops.limit on the handler",
    "limit by default": "limiter.default",
    "limit by path": "limiter.policies by path",
}
# Each is compared with the guarded app that has no limit; so is a second copy of that.
BESIDE = dict.fromkeys((*KINDS, "guarded again"), "guarded")


def measure(framework: str, plan: Plan) -> Record:
    limit = ADDED_LIMITS_US.get(framework)
    claims = [Claim("bare µs", bare_us("limiter")), Claim("limiter µs", arm_us("limiter"))]
    for kind in KINDS:
        claims += [
            Claim(f"{kind} µs", added_us(kind), limit),
            Claim(f"{kind} part", added_ratio(kind, "limiter"), RATIO_LIMIT),
        ]
    # Two guarded copies differ by a trace; it must stay small beside what a limit may cost.
    controls = Controls(twin="guarded again", zero_percent=0.5, planted_tolerance=0.15)
    subjects = (*KINDS, "limiter")
    record = compare(
        framework,
        PATH,
        "direct",
        subjects,
        claims,
        controls,
        plan,
        beside=BESIDE,
        block=SHORT_BLOCK_SECONDS,
    )
    return record | {"case": framework, "peer": PEERS[framework]}


def tables(records: Sequence[Record]) -> Sequence[Table]:
    columns = (
        "framework",
        "limit by",
        "bare handler µs",
        "guarded without µs",
        "the limit adds µs",
        "at most µs",
        "peer",
        "peer adds µs",
        "ours / theirs",
        "at most",
        "guarded against itself µs",
        "planted 30 µs reads",
        "verdict",
    )
    rows = []
    for one in records:
        figures, limit = one["figures"], ADDED_LIMITS_US.get(one["case"])
        for kind, title in KINDS.items():
            rows.append(
                (
                    one["case"],
                    title,
                    figure(figures["bare µs"], 1),
                    figure(one["bare"], 1),
                    figure(figures[f"{kind} µs"]),
                    f"{limit:g}" if limit is not None else "–",
                    one["peer"],
                    figure(figures["limiter added µs"], 1),
                    figure(figures[f"{kind} part"], 3),
                    f"1/{round(1 / RATIO_LIMIT)}",
                    figure(one["controls"]["guarded again"]),
                    figure(one["controls"]["planted"], 1),
                    _verdict(one, kind),
                )
            )
    return [Table(columns, tuple(rows))]


def _verdict(one: Record, kind: str) -> str:
    """That of this kind alone: time and part, if both have a limit."""
    if one["verdict"] == "void":
        return "void"
    found = [one["verdicts"].get(f"{kind} {what}") for what in ("µs", "part")]
    return ", ".join(
        f"{verdict} ({what})"
        for verdict, what in zip(found, ("µs", "part"), strict=True)
        if verdict is not None
    )


PROGRAM = Program(
    name="limits",
    title="One limit, beside slowapi and flask-limiter",
    question=(
        "CPU time that one limit adds to the JSON handler, the app called as a server calls it. "
        "Ours: the guarded app with one policy by client address (sliding window, local store, "
        "X-RateLimit and RateLimit headers on every answer) beside the guarded app without. "
        "Theirs: the app with the limiter (fixed window, its default; memory storage; headers "
        "on) beside the bare app. Nobody is refused."
    ),
    cases=tuple(PEERS),
    measure=measure,
    tables=tables,
    plan=Plan(first=96, cap=768),
)
