"""From records to what people read: tables on the terminal, JSON, the page in the docs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.program import Program, Record, Table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
PAGE = ROOT / "docs" / "reference" / "performance.md"

INTRODUCTION = """# What opsguard costs

This page is generated from the JSON in `benchmarks/results/` by `python -m benchmarks`; do not
edit it. Where a table says what opsguard adds to a request, the bare app stands beside it. A
program has its section here once its results are kept there.

The aim is at most 2 % of the CPU of a page that reads a database and renders it. The same
microseconds are a larger part of a handler that only returns JSON.

## How it is measured

Figures are CPU time per request, as `median [95 % interval]`, not wall time: on a shared machine
wall time measures the neighbours. Bare and guarded take turns in short blocks (ABBA), so that what
the machine does meanwhile falls on both. In the gate and its quick form turns are a few
milliseconds. Work put off (buffered log lines) is on the account of the app that did; the median of
the paired differences is the figure and a bootstrap over them the interval. On real servers the
worker reads its own CPU clock. In the gate the apps take turns in one worker, and the first
requests of each turn, which find the caches full of another app, do not count. There and in the
quick gate processes are started anew for every sample, for two of the same code differ by a per
cent.

Two controls run in turn with the rest: the bare app against a second copy of itself, which must
read 0, and the bare app with 30 µs of CPU planted in it, which must read 30 (or a little more: what
is planted finds the caches cold, as the guard does). If one is off, the run is **void** and says
nothing. A limit is **passed** if the whole interval is within it,
**failed** if the whole interval is above, and otherwise measured on until one is true or the run
is at its end (**undecided**). The guarded app's own counter and the number of access lines that
came out must match the requests sent, so a guard that is off cannot win.
"""


def text(program: Program, records: Sequence[Record]) -> str:
    """Title and tables for a terminal, objections below them."""
    parts = [f"\n== {program.title} ==\n"]
    complete = [one for one in records if len(one) > 3]
    if complete:
        parts += [_aligned(table) for table in program.tables(complete)]
    parts += [
        f"VOID {one['case']}: {objection}" for one in records for objection in one["objections"]
    ]
    return "\n".join(parts)


def _aligned(table: Table) -> str:
    lines = [table.columns, *table.rows]
    widths = [max(len(line[place]) for line in lines) for place in range(len(table.columns))]
    done = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        for line in lines
    ]
    done.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(line.rstrip() for line in done)


def save(program: Program, records: Sequence[Record], facts: Mapping[str, Any], taken: str) -> None:
    """Write the program's JSON; ``taken`` is the day of the run, ISO 8601."""
    RESULTS.mkdir(exist_ok=True)
    content = {
        "program": program.name,
        "title": program.title,
        "taken": taken,
        "machine": facts,
        "cases": list(records),
    }
    path = RESULTS / f"{program.name}.json"
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def saved(program: Program) -> dict[str, Any] | None:
    """What `save` wrote last, or None."""
    path = RESULTS / f"{program.name}.json"
    if not path.exists():
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def page(programs: Sequence[Program]) -> str:
    """The page of all programs that have results, as Markdown."""
    parts = [INTRODUCTION]
    for program in programs:
        result = saved(program)
        if result is None:
            continue
        complete = [one for one in result["cases"] if len(one) > 3]
        parts.append(f"## {program.title}\n\n{program.question}\n")
        if complete:
            parts += [_markdown(table) for table in program.tables(complete)]
        for one in result["cases"]:
            for objection in one["objections"]:
                parts.append(f"The run for {one['case']} is void: {objection}.\n")
        parts.append(_provenance(result))
    return "\n".join(parts)


def _markdown(table: Table) -> str:
    lines = [table.columns, tuple("---" for _ in table.columns), *table.rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _provenance(result: Mapping[str, Any]) -> str:
    machine = result["machine"]
    packages = ", ".join(f"{name} {number}" for name, number in machine["packages"].items())
    gil = "" if machine["gil"] else " without the GIL"
    path = f", the request path in {machine['path']}" if "path" in machine else ""
    return (
        f"Taken {result['taken']} on {machine['implementation']} {machine['python']}{gil}{path}, "
        f"{machine['processor']}, {machine['cores']} cores, {machine['system']}; {packages}.\n"
    )
