"""Seats: a number for each living process, free again however the process ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from opsguard.workers.seats import claim, is_taken

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="locks of open files are Linux's")

SITS = """
import sys
from pathlib import Path
from opsguard.workers.seats import claim
print(claim(Path(sys.argv[1])).number, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "seats"


def sitting(path: Path) -> tuple[subprocess.Popen[str], int]:
    """Another process, and the number of its seat."""
    process = subprocess.Popen(
        [sys.executable, "-c", SITS, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    return process, int(process.stdout.readline())


def ended(process: subprocess.Popen[str]) -> None:
    with process:
        process.send_signal(signal.SIGKILL)


def test_each_claim_gets_the_lowest_free_number(path: Path) -> None:
    first, second, third = claim(path), claim(path), claim(path)
    second.leave()
    again = claim(path)
    assert [first.number, second.number, third.number, again.number] == [0, 1, 2, 1]
    for seat in (first, third, again):
        seat.leave()


def test_the_seat_of_a_killed_process_is_free(path: Path) -> None:
    process, number = sitting(path)
    mine = claim(path)
    ended(process)
    after = claim(path)
    assert (number, mine.number, after.number) == (0, 1, 0)
    mine.leave()
    after.leave()


def test_who_sits_is_seen_from_outside(path: Path) -> None:
    process, number = sitting(path)
    file = os.open(path, os.O_RDWR)
    assert is_taken(file, number)
    assert not is_taken(file, number + 1)
    ended(process)
    assert not is_taken(file, number)
    os.close(file)


def test_code_that_opens_and_closes_the_file_loses_nobody_a_seat(path: Path) -> None:
    mine = claim(path)
    path.read_bytes()
    other = claim(path)
    assert other.number == 1
    mine.leave()
    other.leave()


def test_a_forked_child_that_leaves_takes_nothing_from_its_parent(path: Path) -> None:
    mine = claim(path)
    child = os.fork()
    if child == 0:  # pragma: no cover
        mine.leave()
        os._exit(claim(path).number)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
    other = claim(path)
    assert other.number == 1
    mine.leave()
    other.leave()


def test_when_all_are_taken_it_says_so(path: Path) -> None:
    seats = [claim(path, most=2), claim(path, most=2)]
    with pytest.raises(OSError, match="all 2 seats"):
        claim(path, most=2)
    for seat in seats:
        seat.leave()
    seats[0].leave()  # once more does nothing
