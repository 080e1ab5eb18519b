"""Log levels that change while the service runs."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from opsguard import OpsGuard
from opsguard.logging import Sink, configure, level_of_name
from opsguard.logging.levels import Levels
from opsguard.settings import Settings
from tests.servers.processes import until


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    found = logging.getLogger("tests.levels")
    found.setLevel(logging.WARNING)
    yield found
    found.setLevel(logging.NOTSET)


def test_a_logger_gets_a_level_and_its_own_again(logger: logging.Logger) -> None:
    levels = Levels()
    levels.apply({logger.name: "DEBUG"})
    assert logger.level == logging.DEBUG
    levels.apply({logger.name: "ERROR"})
    assert logger.level == logging.ERROR
    levels.apply({})
    assert logger.level == logging.WARNING


def test_a_level_that_somebody_gave_it_since_is_left_alone(logger: logging.Logger) -> None:
    levels = Levels()
    levels.apply({logger.name: "DEBUG"})
    logger.setLevel(logging.CRITICAL)
    levels.apply({})
    assert logger.level == logging.CRITICAL


def test_a_level_that_this_process_does_not_know_is_passed_over(logger: logging.Logger) -> None:
    Levels().apply({logger.name: "VERBOSE"})
    assert logger.level == logging.WARNING


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_of_two_that_change_one_logger_the_last_counts(
    order: tuple[int, int], logger: logging.Logger
) -> None:
    """And it has its own again when both are gone, in whatever order they go."""
    both = Levels(), Levels()
    both[0].apply({logger.name: "DEBUG"})
    both[1].apply({logger.name: "ERROR"})
    both[0].apply({logger.name: "DEBUG"})  # says nothing new
    assert logger.level == logging.ERROR
    both[order[0]].apply({})
    assert logger.level == (logging.ERROR if order[0] == 0 else logging.DEBUG)
    both[order[1]].apply({})
    assert logger.level == logging.WARNING


def test_one_that_is_gone_wants_nothing_any_more(logger: logging.Logger) -> None:
    other = Levels()
    Levels().apply({logger.name: "DEBUG"})
    other.apply({})
    assert logger.level == logging.WARNING


def test_setting_up_logging_again_keeps_it_and_what_it_hides(tmp_path: Path) -> None:
    """Servers configure logging after us, and each start of a lifespan repairs that."""
    root, uvicorn = logging.getLogger(), logging.getLogger("uvicorn")
    before = root.level, uvicorn.level
    uvicorn.setLevel(logging.INFO)
    levels, sink = Levels(), Sink(tmp_path / "log")
    settings = Settings.load({}, environ={}).logging
    undo = configure(settings, service="s", environment="e", sink=sink)
    levels.apply({"": "ERROR", "uvicorn": "DEBUG"})
    for _ in range(2):
        undo = configure(settings, service="s", environment="e", sink=sink)
        assert (root.level, uvicorn.level) == (logging.ERROR, logging.DEBUG)
    levels.apply({})
    assert (root.level, uvicorn.level) == (logging.INFO, logging.INFO)
    undo()
    uvicorn.setLevel(before[1])
    sink.close()
    assert root.level == before[0]


@pytest.mark.parametrize(
    ("said", "level"), [("debug", "DEBUG"), (" Warning ", "WARNING"), ("30", "WARNING")]
)
def test_a_level_is_known_in_any_spelling(said: str, level: str) -> None:
    assert level_of_name(said) == level


@pytest.mark.parametrize("said", ["", "loud", "7", "-1"])
def test_what_is_no_level_is_said(said: str) -> None:
    with pytest.raises(ValueError, match="is no log level: one of"):
        level_of_name(said)


def guarded(folder: Path, service: str = "levels") -> OpsGuard:
    return OpsGuard(
        service,
        metrics={"directory": str(folder)},
        logging={"file": str(folder / "log"), "durability": "line"},
    )


def test_it_is_audited_and_said_wrong_it_raises(tmp_path: Path, logger: logging.Logger) -> None:
    ops = guarded(tmp_path)
    runtime = ops.runtime()
    assert ops.set_log_level("error")
    with pytest.raises(ValueError, match="'loud' is no log level"):
        ops.set_log_level("loud")
    assert logging.getLogger().level == logging.ERROR
    assert ops.set_log_level(None, "root")
    assert logging.getLogger().level == logging.INFO
    runtime.sink.flush()
    first, second = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert first["logger"] == "opsguard.audit"
    assert first["event"] == "log.level_changed"
    assert (first["target"], first["set_to"], first["minutes"]) == ("root", "ERROR", 15.0)
    assert (second["set_to"], "minutes" in second) == ("its own", False)


def test_a_change_in_one_worker_reaches_another_about_a_second_later(
    tmp_path: Path, logger: logging.Logger
) -> None:
    """Without a request: any line of a logger makes it look."""
    ops = guarded(tmp_path)
    ops.runtime()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:  # pragma: no cover
        reached = until(
            lambda: logging.getLogger("shop").warning("waiting") or logger.level == logging.DEBUG
        )
        os.write(writer, b"reached" if reached else b"missed")
        os._exit(0)
    os.close(writer)
    try:
        assert ops.set_log_level("DEBUG", logger.name, minutes=None)
        with os.fdopen(reader) as pipe:
            assert pipe.read() == "reached"
    finally:
        os.waitpid(child, 0)
        ops.set_log_level(None, logger.name)
    assert logger.level == logging.WARNING
