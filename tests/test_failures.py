"""Our own faults: counted each time, logged once a minute for each site, never passed on."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from opsguard.failures import Failures
from opsguard.testing import ManualClock


class Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@pytest.fixture
def log() -> Iterator[list[logging.LogRecord]]:
    """What the logger `opsguard` says."""
    logger, kept = logging.getLogger("opsguard"), Kept()
    logger.addHandler(kept)
    before, logger.propagate = logger.propagate, False
    yield kept.records
    logger.removeHandler(kept)
    logger.propagate = before


def test_every_report_is_counted_and_the_first_of_a_site_is_logged_once_a_minute(
    log: list[logging.LogRecord],
) -> None:
    clock, counted = ManualClock(), []
    failures = Failures(clock)
    failures.count_error = counted.append
    error = LookupError("broken")
    failures.report("a", error)
    failures.report("a", error)
    failures.report("b")
    assert counted == ["a", "a", "b"]
    assert [record.getMessage() for record in log] == [
        "opsguard: a failed and was skipped",
        "opsguard: b failed and was skipped",
    ]
    failures.report_keys("c", error)
    assert log.pop().getMessage() == "opsguard: c failed and who needs a key was answered 503"
    counted.pop()
    assert log[0].levelno == logging.ERROR
    assert log[0].exc_info is not None
    assert log[0].exc_info[1] is error
    clock.advance(59.9)
    failures.report("a", error)
    assert len(log) == 2
    clock.advance(0.1)
    failures.report("a", error)
    assert len(log) == 3
    assert len(counted) == 5


def test_drops_are_counted_by_sink() -> None:
    failures, counted = Failures(), []
    failures.count_dropped = lambda sink, count: counted.append((sink, count))
    failures.dropped("logs")
    failures.dropped("logs", 7)
    assert counted == [("logs", 1), ("logs", 7)]


def test_before_there_are_metrics_a_fault_is_logged_and_a_drop_is_forgotten(
    log: list[logging.LogRecord],
) -> None:
    failures = Failures()
    failures.report("early")
    failures.dropped("logs")
    assert len(log) == 1


def test_a_counter_that_fails_reaches_nobody() -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("the metrics are broken too")

    failures = Failures()
    failures.count_error = broken
    failures.count_dropped = broken
    assert failures.report("a", LookupError()) is None
    assert failures.dropped("logs") is None


def test_a_log_that_fails_reaches_nobody(log: list[logging.LogRecord]) -> None:
    class Broken(logging.Filter):
        def filter(self, record: logging.LogRecord) -> bool:
            raise RuntimeError("the log is broken too")

    broken = Broken()
    counted: list[str] = []
    failures = Failures()
    failures.count_error = counted.append
    logging.getLogger("opsguard").addFilter(broken)
    try:
        failures.report("a")
    finally:
        logging.getLogger("opsguard").removeFilter(broken)
    assert counted == ["a"]
    assert log == []
