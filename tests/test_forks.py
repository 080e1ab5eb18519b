"""A fork at any moment: the child serves, counts, logs and limits; nothing is said twice."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from opsguard.forks import in_child, start_over
from tests import forking

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("scenario", "numbers"),
    [
        pytest.param(forking.the_search_finds_the_locks_of_all_rooms, (), id="search"),
        pytest.param(forking.a_child_forked_while_all_locks_are_held_works, (), id="locks held"),
        pytest.param(
            forking.all_locks_are_free_when_the_first_starts_over, (), id="locks in turn two"
        ),
        pytest.param(forking.a_fork_waits_for_what_it_must_not_cut_in_two, (), id="fork waits"),
        pytest.param(forking.what_was_logged_before_a_fork_is_written_once, (), id="lines"),
        pytest.param(forking.forks_under_load_hang_nobody, (40,), id="40 under load"),
        pytest.param(
            forking.forks_under_load_hang_nobody,
            (1000,),
            id="1000 under load",
            marks=pytest.mark.full,
        ),
    ],
)
def test_it_holds(scenario: object, numbers: tuple[int, ...], tmp_path: Path) -> None:
    """What the scenario says; its asserts end it with a traceback."""
    name = getattr(scenario, "__name__", "")
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-m", "tests.forking", name, str(tmp_path), *map(str, numbers)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def test_who_is_gone_is_not_asked_in_a_child() -> None:
    class Owner:
        renewed = False

        def renew(self) -> None:
            self.renewed = True

    one, other = Owner(), Owner()
    in_child(one, Owner.renew)
    in_child(other, Owner.renew)
    del other
    assert forking.ended(forking.forked(lambda: os._exit(0 if one.renewed else 1))) == 0
    assert not one.renewed


def test_what_starts_over_finds_all_locks_new() -> None:
    class Owner:
        def renew(self) -> None:
            told.append("renewed")

        def start(self) -> None:
            told.append("started")

    told: list[str] = []
    first, second = Owner(), Owner()
    start_over(first, Owner.start)
    in_child(first, Owner.renew)
    start_over(second, Owner.start)
    in_child(second, Owner.renew)
    expected = ["renewed", "renewed", "started", "started"]
    assert forking.ended(forking.forked(lambda: os._exit(0 if told == expected else 1))) == 0
    assert not told


def test_a_step_that_fails_is_told_and_keeps_no_other_from_its_turn(
    capfd: pytest.CaptureFixture[str],
) -> None:
    class Owner:
        started = False

        def fail(self) -> None:
            raise OSError("no such seat")

        def start(self) -> None:
            self.started = True

    one, other = Owner(), Owner()
    start_over(one, Owner.fail)
    start_over(other, Owner.start)
    assert forking.ended(forking.forked(lambda: os._exit(0 if other.started else 1))) == 0
    assert "no such seat" in capfd.readouterr().err


@pytest.mark.parametrize("ends", [KeyboardInterrupt, SystemExit], ids=lambda kind: kind.__name__)
def test_nothing_else_keeps_another_from_its_turn_either(
    ends: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Owner:
        started = False

        def end(self) -> None:
            raise ends

        def start(self) -> None:
            self.started = True

    class Closed:
        def write(self, text: str) -> None:
            raise ValueError("I/O operation on closed file")

    one, other = Owner(), Owner()
    start_over(one, Owner.end)
    start_over(other, Owner.start)
    monkeypatch.setattr(sys, "stderr", Closed())
    assert forking.ended(forking.forked(lambda: os._exit(0 if other.started else 1))) == 0
