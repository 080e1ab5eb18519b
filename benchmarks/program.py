"""What a program of this package is: a question, its cases, how to answer and show them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.harness import Plan

# One case's answer: JSON-able, with at least "case" and "verdict" (see `estimates.Verdict`).
Record = dict[str, Any]
DEFAULT_PLAN = Plan()


@dataclass(frozen=True, slots=True)
class Table:
    """Cells are text already; the first column names the row."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class Program:
    """``measure`` runs in a fresh process per case, its standard output a drained pipe."""

    name: str
    title: str
    question: str
    cases: tuple[str, ...]
    measure: Callable[[str, Plan], Record]
    tables: Callable[[Sequence[Record]], Sequence[Table]]
    plan: Plan = DEFAULT_PLAN
    # Counts only as failed if it is certainly so (the quick gate); see `__main__`.
    lenient: bool = False
    # Part of a run that names no program.
    regular: bool = True


def finished(record: Record, complaints: Sequence[str]) -> Record:
    """The record with further objections; any objection makes it void."""
    record["objections"] = [*record["objections"], *complaints]
    if record["objections"]:
        record["verdict"] = "void"
    return record


def figure(interval: Any, digits: int = 2) -> str:
    """An interval of a record, for people: ``5.1 [4.9, 5.3]``."""
    if interval is None:
        return "–"
    value, low, high = (f"{interval[key]:.{digits}f}" for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"
