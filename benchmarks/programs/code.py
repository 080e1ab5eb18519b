"""What a request runs, counted on a simulated processor, whatever else the machine does.

A clock cannot tell two microseconds in four hundred on a machine that others use, too. Counts can:
instructions, and the cache lines of code and data that were not in the first-level cache, or in
none. They are no time, but what time follows.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import fmean

from benchmarks.apps import PROTOCOLS
from benchmarks.harness import Plan
from benchmarks.program import Program, Record, Table
from benchmarks.simulated import VARIANTS
from opsguard.logging.batches import BATCH

PATHS = ("/json", "/fortunes")
REQUESTS = 3 * BATCH
"""Three batches of access lines."""
SEEDS = range(4)
"""Of Python's hashes. Where the objects lie decides how often its cache of attributes fails a page,
which moves a large one by half a per cent, with us and without.
"""
TOOLS = ("valgrind", "callgrind_control")
# First-level caches of 32 KiB, a second level of 1 MiB: those of today's servers.
CACHES = ("--cache-sim=yes", "--I1=32768,8,64", "--D1=32768,8,64", "--LL=1048576,8,64")

Counts = Mapping[str, float]
"""By the names that callgrind gives its events, for one request."""


def measure(case: str, plan: Plan) -> Record:
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        reason = f"{missing[0]} is not installed"
        return {"case": case, "verdict": "void", "objections": [reason]}
    return {
        "case": case,
        "verdict": "info",
        "objections": [],
        "figures": {
            path: {variant: by_seed(case, variant, path) for variant in VARIANTS} for path in PATHS
        },
    }


def by_seed(framework: str, variant: str, path: str) -> list[Counts]:
    """What one request costs this app, for each seed; counts do not mind what else runs."""
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return list(threads.map(partial(counted, framework, variant, path), SEEDS))


def counted(framework: str, variant: str, path: str, seed: int) -> Counts:
    said, says = os.pipe()
    hears, hear = os.pipe()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "counts"
        order = [TOOLS[0], "--tool=callgrind", "--instr-atstart=no", *CACHES]
        order += [f"--callgrind-out-file={out}", sys.executable, "-m", "benchmarks.simulated"]
        process = subprocess.Popen(
            [*order, framework, variant, path, str(REQUESTS), str(says), str(hears)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONHASHSEED": str(seed)},
            pass_fds=(says, hears),
        )
        os.close(says)
        os.close(hears)
        try:
            for instrumented in ("on", "off"):
                if not os.read(said, 1):
                    raise RuntimeError(f"{framework} ended with code {process.wait()}")
                switch = [TOOLS[1], "-i", instrumented, str(process.pid)]
                subprocess.run(switch, check=True, capture_output=True)
                os.write(hear, b".")
        finally:
            os.close(said)
            os.close(hear)  # one that still waits goes on, and ends
            process.wait()
        found = totals(out.read_text(encoding="utf-8"))
    return {name: count / REQUESTS for name, count in found.items()}


def totals(report: str) -> dict[str, int]:
    """The sums of callgrind's events, by their names, of the file that it writes.

    https://valgrind.org/docs/manual/cl-format.html
    """
    names: list[str] = []
    for line in report.splitlines():
        kind, _, rest = line.partition(": ")
        if kind == "events":
            names = rest.split()
        elif kind == "totals":
            return dict(zip(names, map(int, rest.split()), strict=False))
    raise ValueError("no totals in what callgrind wrote")


def instructions(counts: Counts) -> float:
    return counts["Ir"]


def code_lines(counts: Counts) -> float:
    return counts["I1mr"]


def data_lines(counts: Counts) -> float:
    return counts["D1mr"] + counts["D1mw"]


def far_lines(counts: Counts) -> float:
    """Of code and data, that the second level did not have either."""
    return counts["ILmr"] + counts["DLmr"] + counts["DLmw"]


def tables(records: Sequence[Record]) -> Sequence[Table]:
    rows = []
    for one in records:
        for path, runs in one["figures"].items():
            row = [one["case"], path]
            for what in (instructions, code_lines, data_lines, far_lines):
                bare, ours = ([what(counts) for counts in runs[name]] for name in VARIANTS)
                added = [with_us - without for with_us, without in zip(ours, bare, strict=True)]
                row.append(f"{fmean(bare):,.0f}")
                row.append(f"{fmean(added):,.0f} [{min(added):,.0f}, {max(added):,.0f}]")
            rows.append(tuple(row))
    columns = (
        "framework",
        "page",
        "bare instructions",
        "opsguard adds",
        "bare: lines of code",
        "opsguard adds",
        "bare: lines of data",
        "opsguard adds",
        "bare: from beyond the second level",
        "opsguard adds",
    )
    return [Table(columns, tuple(rows))]


PROGRAM = Program(
    name="code",
    title="What a request runs",
    question=(
        "Instructions of one request through the server's protocol code, and cache lines of code "
        "and data that the first-level cache (32 KiB each) did not have, and of both that the "
        "second (1 MiB) did not have either, counted by valgrind on a simulated processor: the "
        "mean of four hash seeds, what is added with its least and most. "
        "No time, but counts that no neighbour disturbs. Both apps live in each process, so that "
        "what they share lies alike for Python's cache of attributes; what is left of that luck "
        "is in the spread."
    ),
    cases=tuple(name for name in PROTOCOLS if name != "django-asgi"),
    measure=measure,
    tables=tables,
    regular=False,
)
