"""The logger with keyword fields: a standard logger in all other respects."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from opsguard.logging import Logger


class Keeping(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@pytest.fixture
def handler() -> Iterator[Keeping]:
    made = Keeping()
    logger = logging.getLogger("tests.logger")
    logger.addHandler(made)
    logger.setLevel(logging.DEBUG)
    yield made
    logger.removeHandler(made)
    logger.setLevel(logging.NOTSET)


@pytest.fixture
def log(handler: Keeping) -> Logger:
    return Logger("tests.logger")


def fields(record: logging.LogRecord) -> Any:
    return record.__dict__["opsguard_fields"]


@pytest.mark.parametrize("level", ["debug", "info", "warning", "error", "critical"])
def test_each_level_takes_percent_arguments_and_fields(
    level: str, log: Logger, handler: Keeping
) -> None:
    getattr(log, level)("%s is %d", "it", 7, operation="train", level=1, message="m", self=2)
    (record,) = handler.records
    assert record.levelname == level.upper()
    assert record.getMessage() == "it is 7"
    assert fields(record) == {"operation": "train", "level": 1, "message": "m", "self": 2}


def test_log_takes_any_level(log: Logger, handler: Keeping) -> None:
    log.log(25, "notice", n=1)
    (record,) = handler.records
    assert (record.levelno, fields(record)) == (25, {"n": 1})


@pytest.mark.parametrize("call", ["info", "log", "exception"])
def test_file_line_and_function_are_those_of_the_caller(
    call: str, log: Logger, handler: Keeping
) -> None:
    arguments: list[Any] = [logging.INFO, "here"] if call == "log" else ["here"]
    frame = inspect.currentframe()
    assert frame is not None
    line = frame.f_lineno + 1
    getattr(log, call)(*arguments)
    (record,) = handler.records
    assert (record.pathname, record.lineno) == (__file__, line)
    assert record.funcName == "test_file_line_and_function_are_those_of_the_caller"


def test_stacklevel_counts_from_the_caller(log: Logger, handler: Keeping) -> None:
    def helper() -> None:
        log.info("for my caller", stacklevel=2)

    helper()
    assert handler.records[0].funcName == "test_stacklevel_counts_from_the_caller"


def test_an_exception_as_error_is_logged_as_one(log: Logger, handler: Keeping) -> None:
    error = ValueError("no")
    log.error("failed", error=error, n=1)
    (record,) = handler.records
    assert record.exc_info is not None
    assert record.exc_info[1] is error
    assert fields(record) == {"n": 1}


def test_an_error_that_is_no_exception_is_a_field(log: Logger, handler: Keeping) -> None:
    log.error("failed", error="E42")
    (record,) = handler.records
    assert (record.exc_info, fields(record)) == (None, {"error": "E42"})


@pytest.mark.parametrize("how", ["exception()", "exc_info=True", "exc_info=error"])
def test_the_exception_being_handled_is_logged(how: str, log: Logger, handler: Keeping) -> None:
    try:
        raise KeyError("k")
    except KeyError as error:
        expected = error
        if how == "exception()":
            log.exception("failed", n=1)
        else:
            log.error("failed", exc_info=True if how == "exc_info=True" else error, n=1)
    (record,) = handler.records
    assert record.exc_info is not None
    assert record.exc_info[1] is expected
    assert fields(record) == {"n": 1}


def test_exception_with_another_error_logs_that_one(log: Logger, handler: Keeping) -> None:
    other = ValueError("other")
    try:
        raise KeyError("k")
    except KeyError:
        log.exception("failed", error=other)
    assert handler.records[0].exc_info is not None
    assert handler.records[0].exc_info[1] is other


def test_stack_info_and_extra_mean_what_they_mean_in_logging(log: Logger, handler: Keeping) -> None:
    log.info("here", stack_info=True, extra={"theirs": 1}, n=2)
    (record,) = handler.records
    assert record.stack_info is not None
    assert (record.__dict__["theirs"], fields(record)) == (1, {"n": 2})


def test_bind_gives_a_child_and_leaves_the_parent(log: Logger, handler: Keeping) -> None:
    child = log.bind(tenant="t1", n=1).bind(n=2, self="s")
    child.info("one", n=3)
    child.info("two")
    log.info("three")
    assert [fields(record) for record in handler.records] == [
        {"tenant": "t1", "n": 3, "self": "s"},
        {"tenant": "t1", "n": 2, "self": "s"},
        {},
    ]


def test_a_disabled_level_formats_nothing_and_reaches_nobody(log: Logger, handler: Keeping) -> None:
    log.stdlib.setLevel(logging.CRITICAL)
    for level in ("debug", "info", "warning", "error", "exception"):
        getattr(log, level)("no", n=1)
    log.log(logging.INFO, "no")
    assert handler.records == []


def test_it_is_named_like_the_standard_logger(log: Logger) -> None:
    assert log.name == "tests.logger"
    assert log.stdlib is logging.getLogger("tests.logger")
    assert repr(log) == "Logger('tests.logger')"
