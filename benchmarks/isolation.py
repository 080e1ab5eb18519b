"""Run a case in a fresh process and take its record."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from benchmarks.harness import Plan
from benchmarks.pipes import Drain
from benchmarks.program import Program, Record, finished


def answer(program: Program, case: str, plan: Plan) -> Record:
    """The case's record; a case that crashed is void, its error is on standard error."""
    drain = Drain()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "record.json"
        order = [program.name, case, str(out), json.dumps(asdict(plan))]
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.child", *order],
            stdin=subprocess.DEVNULL,
            stdout=drain.writer,
        )
        drain.started()
        code = process.wait()
        lines = drain.finish()
        if code != 0:
            reason = f"the process of the case ended with code {code}"
            return {"case": case, "verdict": "void", "objections": [reason]}
        record: Record = json.loads(out.read_text(encoding="utf-8"))
    expected = record.get("guarded_requests", 0)
    if lines < expected:
        return finished(record, [f"{lines} access lines for {expected} guarded requests"])
    return record
