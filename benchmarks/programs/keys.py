"""What an API key adds to a guarded request once it is in the cache."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.drivers.request import KEYED
from benchmarks.estimates import Controls, added_us, bare_us
from benchmarks.harness import SHORT_BLOCK_SECONDS, Claim, Plan
from benchmarks.inprocess import compare
from benchmarks.program import Program, Record, Table, figure

PATH = "/json"
ADDED_LIMITS_US = {"fastapi": 0.5}
WHAT = {"key": "a cached key", "limits and keys": "a cached key and its tier's limit"}
BESIDE = dict.fromkeys((*WHAT, "guarded again"), "guarded")


def measure(framework: str, plan: Plan) -> Record:
    claims = [
        Claim("key µs", added_us("key"), ADDED_LIMITS_US.get(framework)),
        Claim("bare µs", bare_us("planted")),
    ]
    controls = Controls(twin="guarded again", zero_percent=0.5, planted_tolerance=0.15)
    record = compare(
        framework,
        PATH,
        "direct",
        tuple(WHAT),
        claims,
        controls,
        plan,
        beside=BESIDE,
        headers=KEYED,
        block=SHORT_BLOCK_SECONDS,
    )
    return record | {"case": framework}


def tables(records: Sequence[Record]) -> Sequence[Table]:
    columns = (
        "framework",
        "what",
        "bare handler µs",
        "guarded without µs",
        "adds µs",
        "at most µs",
        "guarded against itself µs",
        "planted 30 µs reads",
        "verdict",
    )
    rows = []
    for one in records:
        for variant, title in WHAT.items():
            limit = ADDED_LIMITS_US.get(one["case"]) if variant == "key" else None
            rows.append(
                (
                    one["case"],
                    title,
                    figure(one["figures"]["bare µs"], 1),
                    figure(one["bare"], 1),
                    figure(one["figures"][f"{variant} added µs"]),
                    f"{limit:g}" if limit is not None else "–",
                    figure(one["controls"]["guarded again"]),
                    figure(one["controls"]["planted"], 1),
                    one["verdict"] if limit is not None or one["verdict"] == "void" else "info",
                )
            )
    return [Table(columns, tuple(rows))]


PROGRAM = Program(
    name="keys",
    title="An API key",
    question=(
        "CPU time that keys add to the JSON handler, the app called as a server calls it, once "
        "the key is in the cache. Every variant, the bare app too, gets the same request with an "
        "X-API-Key header; the handler requires a key. Without one it must answer 401."
    ),
    cases=("fastapi", "flask", "asgi", "wsgi"),
    measure=measure,
    tables=tables,
    plan=Plan(first=96, cap=768),
)
