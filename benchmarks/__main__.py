"""``python -m benchmarks``: measure, print, keep.

Exit code: 0 if every limit holds, 1 if one is missed, 3 if a run is void, 4 if a limit is left
undecided (the quick gate lets that pass: it fails only what is certainly too dear).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from benchmarks import report
from benchmarks.facts import machine
from benchmarks.isolation import answer
from benchmarks.program import Program, Record, figure
from benchmarks.registry import PROGRAMS

FAILED, VOID, UNDECIDED = 1, 3, 4
HELD = Path(__file__).with_name("held.json")
"""Per case of the quick gate, the percentage that no change may raise; it is only ever lowered."""


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    made.add_argument("--list", action="store_true", help="name the programs and their cases")
    made.add_argument("--quick", action="store_true", help="the quick gate alone, some two minutes")
    made.add_argument(
        "--held",
        action="store_true",
        help="with --quick: where a limit is missed, fail only above what held.json says",
    )
    made.add_argument("--only", metavar="NAME", action="append", help="a program, or PROGRAM:CASE")
    made.add_argument("--save", action="store_true", help="keep the results of --quick too")
    made.add_argument("--page", action="store_true", help="only write the docs page anew")
    return made


def chosen(arguments: argparse.Namespace) -> dict[str, tuple[str, ...]]:
    """Programs and the cases of each.

    :raises SystemExit: for a name that does not exist.
    """
    if arguments.quick:
        return {"quick": PROGRAMS["quick"].cases}
    if not arguments.only:
        return {name: program.cases for name, program in PROGRAMS.items() if program.regular}
    found: dict[str, tuple[str, ...]] = {}
    for wanted in arguments.only:
        name, _, case = wanted.partition(":")
        if name not in PROGRAMS or (case and case not in PROGRAMS[name].cases):
            raise SystemExit(f"no such program: {wanted}; see --list")
        found[name] = (*found.get(name, ()), case) if case else PROGRAMS[name].cases
    return found


def held_code(records: Sequence[Record]) -> int:
    """A ratchet for a limit that is not met yet: failed only if an interval lies wholly above what
    has been reached before. A void run says nothing, so it fails nothing.
    """
    held: dict[str, float] = json.loads(HELD.read_text(encoding="utf-8"))
    code = 0
    for record in records:
        if record["verdict"] != "fail":
            continue
        low, ceiling = record["figures"]["added %"]["low"], held[record["case"]]
        worse = low > ceiling
        print(
            f"{record['case']}: the limit is missed; at least {low:.1f} % is "
            f"{'ABOVE' if worse else 'within'} the {ceiling:g} % held until it is met"
        )
        code = FAILED if worse else code
    return code


def exit_code(answers: Iterable[tuple[Program, Sequence[Record]]]) -> int:
    """The gravest of the verdicts: void, then failed, then undecided."""
    codes = set()
    for program, records in answers:
        for record in records:
            verdict = record["verdict"]
            if verdict == "void":
                codes.add(VOID)
            elif verdict == "fail":
                codes.add(FAILED)
            elif verdict == "undecided" and not program.lenient:
                codes.add(UNDECIDED)
    for code in (VOID, FAILED, UNDECIDED):
        if code in codes:
            return code
    return 0


def main(words: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(words)
    if arguments.list:
        for program in PROGRAMS.values():
            print(f"{program.name:12} {program.title} ({', '.join(program.cases)})")
        return 0
    answers = []
    if not arguments.page:
        for name, cases in chosen(arguments).items():
            program = PROGRAMS[name]
            records = [_measured(program, case) for case in cases]
            print(report.text(program, records), flush=True)
            answers.append((program, records))
            if (arguments.save or not arguments.quick) and cases == program.cases:
                report.save(program, records, machine(), datetime.now(UTC).date().isoformat())
    if arguments.save or not arguments.quick:
        report.PAGE.parent.mkdir(parents=True, exist_ok=True)
        report.PAGE.write_text(report.page(list(PROGRAMS.values())), encoding="utf-8")
    if arguments.held and arguments.quick:
        return held_code(answers[0][1])
    return exit_code(answers)


def _measured(program: Program, case: str) -> Record:
    print(f"… {program.name} {case}", file=sys.stderr, flush=True)
    record = answer(program, case, program.plan)
    # A case of the gate takes ten minutes: whoever stops before the table has what was measured.
    intervals = [item for item in record.get("figures", {}).items() if "low" in item[1]]
    told = [f"{name} {figure(interval)}" for name, interval in intervals]
    print(f"  {record['verdict']}: {', '.join(told)}", file=sys.stderr, flush=True)
    return record


if __name__ == "__main__":
    sys.exit(main())
