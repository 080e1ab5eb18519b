"""The board: what one worker tells, all know; what is no board, nobody minds."""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from opsguard.testing import ManualClock
from opsguard.workers.board import Board
from tests.servers.processes import until

NOW = 1_000_000.0


class Member:
    """A worker's view of the board, with a clock of its own that stands still."""

    def __init__(self, folder: Path | None) -> None:
        self.clock, self.wall = ManualClock(), ManualClock(NOW)
        self.reports: list[BaseException | None] = []
        self.heard: list[dict[str, str]] = []
        self.board = Board(
            lambda: folder,
            self.report,
            self.hear,
            clock=self.clock,
            wall=self.wall,
        )

    def report(self, site: str, error: BaseException | None) -> None:
        assert site == "board"
        self.reports.append(error)

    def hear(self, levels: Mapping[str, str]) -> None:
        self.heard.append(dict(levels))

    def later(self, seconds: float = 1.0) -> Board:
        """A second passes, and somebody looks."""
        self.clock.advance(seconds)
        self.wall.advance(seconds)
        self.board.refresh()
        return self.board


@pytest.fixture
def one(tmp_path: Path) -> Member:
    return Member(tmp_path)


@pytest.fixture
def two(tmp_path: Path) -> Member:
    return Member(tmp_path)


def test_what_one_worker_tells_the_others_know_a_second_later(one: Member, two: Member) -> None:
    two.board.refresh()
    assert one.board.set_level("shop", "DEBUG")
    assert one.board.drain()
    assert one.board.disable("keys")
    two.board.refresh()
    assert (two.board.levels, two.board.draining, two.board.disabled) == ({}, False, frozenset())
    board = two.later()
    assert (board.levels, board.draining, board.disabled) == ({"shop": "DEBUG"}, True, {"keys"})
    assert two.heard == one.heard == [{"shop": "DEBUG"}]


def test_what_was_told_can_be_taken_back_by_another(one: Member, two: Member) -> None:
    one.board.set_level("shop", "DEBUG")
    one.board.drain()
    one.board.disable("keys")
    two.board.set_level("shop", None)
    two.board.drain(False)
    two.board.disable("keys", False)
    board = one.later()
    assert (board.levels, board.draining, board.disabled) == ({}, False, frozenset())
    assert one.heard == [{"shop": "DEBUG"}, {}]


def test_a_worker_that_starts_later_knows_as_well(one: Member, tmp_path: Path) -> None:
    one.board.set_level("", "ERROR")
    late = Member(tmp_path)
    late.board.refresh()
    assert late.heard == [{"": "ERROR"}]


def test_the_file_is_looked_at_once_a_second(
    one: Member, two: Member, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = 0
    real = Path.lstat

    def counted(path: Path) -> os.stat_result:
        nonlocal looks
        looks += 1
        return real(path)

    one.board.drain()
    monkeypatch.setattr(Path, "lstat", counted)
    for _ in range(50):
        two.later(0.1)
    assert 5 <= looks <= 6


def test_a_level_has_its_time(one: Member, two: Member) -> None:
    one.board.set_level("shop", "DEBUG", NOW + 60.0)
    one.board.set_level("", "ERROR")
    two.later()
    two.later(58.0)
    assert two.board.levels == {"shop": "DEBUG", "": "ERROR"}
    two.later()
    assert two.board.levels == {"": "ERROR"}
    assert two.heard == [{"shop": "DEBUG", "": "ERROR"}, {"": "ERROR"}]
    two.board.drain()
    assert one.later().draining
    assert json.loads((two.board._folder or Path()).joinpath("board").read_text())["levels"] == {
        "": {"level": "ERROR", "until": None}
    }


BAD = {
    "empty": b"",
    "cut off": b'{"version": 1, "lev',
    "not JSON": b"\xff\x00\x01",
    "deep": b"[" * 30_000,
    "large": b'{"version": 1}' + b" " * (64 << 10),
    "a list": b"[]",
    "another version": b'{"version": 2, "levels": {}, "draining": true, "disabled": []}',
    "no levels": b'{"version": 1, "draining": true, "disabled": []}',
    "a level that is none": b'{"version":1,"levels":{"a":3},"draining":true,"disabled":[]}',
    "a date that is none": b'{"version":1,"levels":{"a":{"level":"INFO","until":"x"}},'
    b'"draining":true,"disabled":[]}',
    "draining a number": b'{"version": 1, "levels": {}, "draining": 1, "disabled": []}',
    "disabled a text": b'{"version": 1, "levels": {}, "draining": true, "disabled": "abc"}',
}


@pytest.mark.parametrize("content", BAD.values(), ids=BAD)
def test_what_is_no_board_is_counted_once_and_changes_nothing(
    content: bytes, one: Member, tmp_path: Path
) -> None:
    one.board.set_level("shop", "DEBUG")
    (tmp_path / "board").write_bytes(content)
    for _ in range(3):
        board = one.later()
    assert (board.levels, board.draining) == ({"shop": "DEBUG"}, False)
    assert len(one.reports) == 1
    assert board.drain()  # and the next writer mends it, with what it knew
    fresh = Member(tmp_path)
    fresh.board.refresh()
    assert (fresh.board.levels, fresh.board.draining) == ({"shop": "DEBUG"}, True)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    content=st.binary()
    | st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    ).map(lambda value: json.dumps(value).encode())
    | st.fixed_dictionaries(
        {
            "version": st.just(1),
            "levels": st.dictionaries(
                st.text(),
                st.fixed_dictionaries(
                    {"level": st.text(), "until": st.none() | st.floats() | st.integers()}
                ),
            ),
            "draining": st.booleans(),
            "disabled": st.lists(st.text()),
        }
    ).map(lambda value: json.dumps(value).encode())
)
def test_no_file_makes_it_raise(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "board").write_bytes(content)
    one = Member(tmp_path)
    one.board.refresh()
    assert one.board.drain()
    two = Member(tmp_path)
    two.board.refresh()
    assert two.board.draining
    assert two.reports == []
    assert two.board.levels == one.board.levels


@pytest.mark.parametrize("kind", ["folder", "pipe", "link", "dangling link"])
def test_what_is_no_file_at_all_is_no_board(kind: str, one: Member, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text('{"version":1,"levels":{},"draining":true,"disabled":[]}')
    path = tmp_path / "board"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(tmp_path / ("elsewhere" if kind == "link" else "nowhere"))
    assert not one.later().draining
    assert len(one.reports) == 1


def test_when_the_file_is_taken_away_nothing_is_told_any_more(one: Member, tmp_path: Path) -> None:
    one.board.drain()
    (tmp_path / "board").unlink()
    assert not one.later().draining
    assert one.reports == []


def test_without_a_folder_it_is_this_process_s_alone() -> None:
    member = Member(None)
    assert not member.board.set_level("shop", "DEBUG", NOW + 60.0)
    assert member.later().levels == {"shop": "DEBUG"}
    assert member.later(60.0).levels == {}
    assert member.reports == []


def test_where_nothing_can_be_written_it_is_this_process_s_alone(tmp_path: Path) -> None:
    member = Member(tmp_path / "missing")
    assert not member.board.drain()
    assert member.later().draining
    assert len(member.reports) == 1


def test_a_folder_that_cannot_be_had_is_said_by_whoever_keeps_the_numbers(one: Member) -> None:
    def refused() -> Path:
        raise PermissionError

    board = Board(refused, one.report, one.hear)
    board.refresh()
    assert not board.drain()
    assert board.draining
    assert one.reports == []


def test_a_lock_that_is_never_let_go_costs_two_seconds_and_no_more(
    one: Member, two: Member, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    monkeypatch.setattr("opsguard.workers.board._TRIES", 3)
    with (tmp_path / "board.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert not one.board.drain()
    assert one.board.draining
    assert isinstance(one.reports[0], TimeoutError)
    assert one.board.drain()
    assert two.later().draining


def disable_many(folder: Path, prefix: str) -> None:
    member = Member(folder)
    assert all(member.board.disable(f"{prefix}{number}") for number in range(50))


def test_of_several_writers_none_is_lost(
    one: Member, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In threads and in processes, which here wait for the lock for as long as it takes."""
    monkeypatch.setattr("opsguard.workers.board._TRIES", 3_000)
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=disable_many, args=(tmp_path, f"p{number}-")) for number in range(3)
    ]
    threads = [
        threading.Thread(target=disable_many, args=(tmp_path, f"t{number}-")) for number in range(2)
    ]
    for started in (*processes, *threads):
        started.start()
    for started in (*processes, *threads):
        started.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len(one.later().disabled) == 250
    assert {path.name for path in tmp_path.iterdir()} == {"board", "board.lock"}


def test_readers_never_see_half_a_board(one: Member, tmp_path: Path) -> None:
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            reader.later()

    reader = Member(tmp_path)
    thread = threading.Thread(target=read)
    thread.start()
    for number in range(300):
        one.board.set_level(f"logger{number % 40}", "DEBUG")
    assert until(lambda: len(reader.board.levels) == 40)
    done.set()
    thread.join()
    assert reader.reports == []
