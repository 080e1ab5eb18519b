"""Limits that the workers of a machine share, beside the store of one process."""

from __future__ import annotations

import gc
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.estimates import percentile
from benchmarks.harness import Plan
from benchmarks.program import Program, Record, Table, finished

WORKERS = 8
BLOCKS = 40
BLOCK = 2_000  # decisions; the store in a file makes a tenth
LIMIT_US = 4.0
AMOUNT = 1_000_000_000
STORES = {
    "local": "local, in the process",
    "segment": "workers, in shared memory",
    "file": "workers, in a file (without the C module)",
}
ROUNDS = (("one worker", 1, False), ("own keys", WORKERS, False), ("one key", WORKERS, True))


def measure(case: str, plan: Plan) -> Record:
    from opsguard.accelerator import shared

    context = multiprocessing.get_context("fork")
    rows, complaints = [], []
    for store in STORES:
        if store == "segment" and shared is None:
            complaints.append("opsguard._shared was not built")
            continue
        for keys, workers, same in ROUNDS:
            with tempfile.TemporaryDirectory() as folder:
                found = _together(context, store, case, workers, same, Path(folder))
            rows.append({"store": store, "keys": keys, "workers": workers} | found)
    held = [row["worst_us"] <= LIMIT_US for row in rows if _has_limit(case, row)]
    record: Record = {
        "verdict": "pass" if all(held) else "fail",
        "objections": [],
        "rows": rows,
    }
    return finished(record, complaints) | {"case": case}


def _has_limit(case: str, row: dict[str, Any]) -> bool:
    """The promise is about one rate, decided in C."""
    return case != "concurrency" and row["store"] == "segment"


def _together(
    context: Any, store: str, case: str, workers: int, same: bool, folder: Path
) -> dict[str, Any]:
    pipes, running = [], []
    for number in range(workers):
        ours, theirs = context.Pipe()
        key = "203.0.113.0" if same else f"203.0.113.{number}"
        running.append(context.Process(target=_worker, args=(theirs, store, case, key, folder)))
        running[-1].start()
        pipes.append(ours)
    for pipe in pipes:
        pipe.recv()
    for pipe in pipes:
        pipe.send("go")
    found = [json.loads(pipe.recv()) for pipe in pipes]
    for one in running:
        one.join()
    medians = [median(one["cpu_us"]) for one in found]
    return {
        "cpu_us": median(medians),
        "worst_us": max(medians),
        "wall_p99_us": max(percentile(one["wall_us"], 0.99) for one in found),
        "in_vain": sum(one["in_vain"] for one in found),
        "decisions": sum(one["decisions"] for one in found),
    }


def _worker(pipe: Connection, store: str, case: str, key: str, folder: Path) -> None:
    in_vain: list[BaseException] = []
    decide = _decisions(store, case, key, folder, in_vain)
    block = BLOCK // 10 if store == "file" or case == "concurrency" else BLOCK
    decide(block)
    gc.collect()
    gc.freeze()
    pipe.send("ready")
    pipe.recv()
    in_vain.clear()
    cpu_us, wall_us = [], []
    for _ in range(BLOCKS):
        looked, began = time.perf_counter(), time.process_time()
        decide(block)
        cpu_us.append((time.process_time() - began) / block * 1e6)
        wall_us.append((time.perf_counter() - looked) / block * 1e6)
    done = {"cpu_us": cpu_us, "wall_us": wall_us, "in_vain": len(in_vain)}
    pipe.send(json.dumps(done | {"decisions": BLOCKS * block}))


def _decisions(
    store: str, case: str, key: str, folder: Path, in_vain: list[BaseException]
) -> Callable[[int], None]:
    """A function that makes so many decisions."""
    from opsguard.accelerator import shared
    from opsguard.limiter import Charge, LocalStore
    from opsguard.limiter.rates import Rate, Strategy
    from opsguard.limiter.workers import WorkersStore

    strategies: dict[str, Strategy] = {"concurrency": "concurrency", "fixed": "fixed"}
    strategies |= {"gcra": "gcra", "sliding": "sliding"}
    rate, strategy = Rate(AMOUNT, 60, ""), strategies[case]
    made: Any = LocalStore()
    if store != "local":
        made = WorkersStore(
            lambda: folder,
            made,
            report=lambda site, error: in_vain.append(error),
            native=shared if store == "segment" else None,
        )
    take = made.gate(rate, strategy)
    slots = (Charge(key, rate, strategy, 1),)

    def plain(times: int) -> None:
        for _ in range(times):
            take(key, 1)

    def flying(times: int) -> None:
        for _ in range(times):
            take(key, 1)
            made.give_back(slots)

    return flying if strategy == "concurrency" else plain


def tables(records: Sequence[Record]) -> Sequence[Table]:
    columns = (
        "strategy",
        "store",
        "keys",
        "CPU of a decision, µs",
        "of the worker with the dearest",
        "at most",
        "wall time, 99 % of blocks, µs",
        "waited in vain, of",
        "verdict",
    )
    rows = []
    for one in records:
        for row in one["rows"]:
            limited = _has_limit(one["case"], row)
            verdict = "pass" if row["worst_us"] <= LIMIT_US else "fail"
            many = f"{row['workers']} workers, {row['keys']}"
            rows.append(
                (
                    one["case"],
                    STORES[row["store"]],
                    row["keys"] if row["workers"] == 1 else many,
                    f"{row['cpu_us']:.2f}",
                    f"{row['worst_us']:.2f}",
                    f"{LIMIT_US:g}" if limited else "–",
                    f"{row['wall_p99_us']:.1f}",
                    f"{row['in_vain']:,} of {row['decisions']:,}",
                    (verdict if one["verdict"] != "void" else "void") if limited else "info",
                )
            )
    return [Table(columns, tuple(rows))]


PROGRAM = Program(
    name="shared",
    title="One limit for eight workers",
    question=(
        f"CPU time of one decision by the store's quick way for one rate, no request around it. "
        f"{WORKERS} processes decide as fast as they can, each about its own key and all about "
        "one, and none pauses: so the locks are held by others as often as they can be, and more "
        "processes run than there are cores. Beside it one process alone, and the store in the "
        "process. With the strategy `concurrency` a slot is taken and returned. A worker that has "
        "waited 25 ms in vain for a lock decides by itself, which is counted."
    ),
    cases=("fixed", "sliding", "gcra", "concurrency"),
    measure=measure,
    tables=tables,
)
