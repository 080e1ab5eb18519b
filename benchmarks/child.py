"""One case in a process of its own: ``python -m benchmarks.child PROGRAM CASE OUT PLAN``.

Standard output belongs to the apps under test (their access lines); the record goes to a file.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from benchmarks.harness import Plan
from benchmarks.registry import PROGRAMS


def main(name: str, case: str, out: str, plan: str) -> None:
    record = PROGRAMS[name].measure(case, Plan(**json.loads(plan)))
    Path(out).write_text(json.dumps({"case": case} | record), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
