"""Access lines made in batches: the same lines, in order, none lost and none twice."""

from __future__ import annotations

import json
import logging
import os
import threading
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from opsguard import OpsGuard
from opsguard.exchange import Exchange
from opsguard.logging import AccessLog, Sink, access_line, access_template
from opsguard.logging.targets import PIPE_BUF
from opsguard.settings import Logging, Settings
from opsguard.testing import ManualClock

MOMENT = "2023-11-14T22:13:20.000Z"
ID = "0123456789abcdef0123456789abcdef"


class Bench:
    """A log with its file, and clocks that stand still."""

    def __init__(self, folder: Path, **logging_: Any) -> None:
        self.path = folder / "log.jsonl"
        self.sink = Sink(self.path)
        self.faults: list[tuple[str, BaseException]] = []
        self.wall, self.elapsed = ManualClock(1_700_000_000.25), ManualClock(100.0)
        settings: Logging = Settings.load({"logging": logging_}, environ={}).logging
        given: Any = {"service": "shop", "environment": "production", "sink": self.sink}
        self.log = AccessLog(
            lambda clock: access_line(settings, **given, clock=clock),
            access_template(settings, **given),
            self.sink,
            wall=self.wall,
            elapsed=self.elapsed,
            unmatched="<unmatched>",
            report=lambda site, fault: self.faults.append((site, fault)),
        )

    def lines(self) -> list[dict[str, Any]]:
        self.sink.flush()
        return [json.loads(line) for line in self.path.read_text().splitlines()]


def exchange(**values: Any) -> Any:
    usual = {
        "method": "GET",
        "path": "/items/7",
        "endpoint": "/items/{id}",
        "status": 200,
        "started": 99.5,
        "ended": 99.75,
        "sent": 12,
        "client": "127.0.0.1",
        "request_id": ID,
        "correlation_id": ID,
        "fields": None,
    }
    made = Exchange()
    for name, value in {**usual, **values}.items():
        setattr(made, name, value)
    return made


CASES = [
    pytest.param({}, id="usual"),
    pytest.param({"status": 404, "endpoint": None}, id="unmatched"),
    pytest.param({"status": 503}, id="error"),
    pytest.param({"path": '/a"b\\c'}, id="path to escape"),
    pytest.param({"path": "/a%b", "endpoint": "/a%{b}"}, id="percent signs"),
    pytest.param({"path": "/\x1b[31m\r\n"}, id="control characters"),
    pytest.param({"path": "/ü\ud800"}, id="no ASCII"),
    pytest.param({"client": None}, id="no client"),
    pytest.param({"client": 'x"y'}, id="odd client"),
    pytest.param({"correlation_id": "other"}, id="two ids"),
    pytest.param({"fields": {"tenant_id": "t-1"}}, id="bound fields"),
    pytest.param({"ended": 99.500001}, id="a microsecond"),
    pytest.param({"method": "BOGUS"}, id="unknown method"),
]


@pytest.mark.parametrize("values", CASES)
def test_a_line_of_a_batch_is_the_line_of_the_long_way(
    values: dict[str, Any], tmp_path: Path
) -> None:
    bench = Bench(tmp_path)
    done = exchange(**values)
    bench.log.write(done)
    bench.log._write_long(done, bench.wall() - bench.elapsed() + done.ended)
    short, long = bench.lines()
    assert short == long
    assert list(short) == list(long)
    assert short["timestamp"] == ("2023-11-14T22:13:19.750Z" if "ended" in values else MOMENT)


def test_lines_keep_their_own_moments(tmp_path: Path) -> None:
    """They are told apart by when each request ended, not by when the batch was written."""
    bench = Bench(tmp_path)
    for ended in (99.0, 99.9, 100.0):
        bench.log.queue.append(exchange(ended=ended))
    bench.log.drain()
    assert [line["timestamp"][-5:] for line in bench.lines()] == [
        ".250Z",
        ".150Z",
        ".250Z",
    ]


@pytest.mark.parametrize(
    ("settings", "statuses"),
    [
        ({"access": "errors"}, [404, 500]),
        ({"level": "ERROR"}, [500]),
        ({}, [200, 404, 500]),
    ],
    ids=["errors only", "from a level on", "all"],
)
def test_lines_below_what_is_asked_for_are_left_out(
    settings: dict[str, Any], statuses: list[int], tmp_path: Path
) -> None:
    bench = Bench(tmp_path, **settings)
    for status in (200, 404, 500):
        bench.log.queue.append(exchange(status=status))
    bench.log.drain()
    assert [line["status_code"] for line in bench.lines()] == statuses


def test_lines_of_all_lengths_are_put_together_and_none_is_cut(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.log.write(exchange())  # the first line of a status is made on its own
    paths = ["/" + "x" * (length % 4000) for length in range(0, 200_000, 1237)]
    texts: list[str] = []
    bench.sink.write_all = lambda lines, urgent=False: texts.extend(lines)  # type: ignore[method-assign]
    for path in paths:
        bench.log.queue.append(exchange(path=path))
    bench.log.drain()
    written = [json.loads(line)["path"] for text in texts for line in text.split("\n")]
    assert written == paths
    assert all(len(text) < PIPE_BUF or "\n" not in text for text in texts)


@pytest.mark.parametrize("before", [None, {"tenant_id": "t-1"}])
def test_what_is_bound_after_the_end_is_not_in_the_line(
    before: dict[str, object] | None, tmp_path: Path
) -> None:
    """In a background task; whether the batch was written meanwhile must make no difference."""
    bench = Bench(tmp_path)
    for _ in range(2):  # the first line of a status is made on its own
        done = exchange(fields=before)
        bench.log.queue.append(done)
        done.fields = {**(before or {}), "job": 7}
        bench.log.drain()
        assert done.fields["job"] == 7
    for line in bench.lines():
        assert "job" not in line
        assert line.get("tenant_id") == (before or {}).get("tenant_id")


@pytest.mark.parametrize(
    "odd",
    [{"client": 5}, {"method": None}, {"status": []}, {"path": 5, "fields": {"a": 1}}],
    ids=str,
)
def test_an_exchange_that_an_app_has_damaged_costs_no_other_its_line(
    tmp_path: Path, odd: dict[str, Any]
) -> None:
    bench = Bench(tmp_path)
    for values in ({"path": "/1"}, {"path": "/2"}, odd, {"path": "/3"}, odd, {"path": "/4"}):
        bench.log.queue.append(exchange(**values))
    bench.log.drain()

    assert [line["path"] for line in bench.lines()] == ["/1", "/2", "/3", "/4"]
    assert [site for site, _ in bench.faults] == ["access", "access"]


def test_a_flush_of_the_sink_takes_what_is_in_the_queue(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.log.queue.append(exchange())
    assert len(bench.lines()) == 1


def test_the_first_in_the_queue_is_written_without_another_request(tmp_path: Path) -> None:
    """The sink's thread comes by within 100 ms; it is waited for, up to two seconds."""
    bench = Bench(tmp_path)
    bench.log.queue.append(exchange())
    bench.log.nudge()
    arrived = threading.Event()
    for _ in range(200):
        if bench.path.exists() and bench.path.read_text().endswith("\n"):
            break
        arrived.wait(0.01)
    assert len(bench.path.read_text().splitlines()) == 1
    bench.sink.close()


@pytest.mark.parametrize("path", ["Python", "C"])
def test_a_request_that_ends_beside_lines_that_have_waited_too_long_takes_them_along(
    path: str, tmp_path: Path
) -> None:
    """As a server does that always has requests waiting, and so no moment to look after lines."""
    log = tmp_path / "log"
    ops = OpsGuard("shop", logging={"file": str(log)}, metrics={"enabled": False})
    plan = ops.runtime().plan
    if path == "C" and plan.core is None:
        pytest.skip("opsguard._speed was not built")
    close = plan.core.close if path == "C" else plan._close_with()
    ops.runtime().sink.nudge = nudged = Mock()  # type: ignore[method-assign]

    def lines() -> int:
        return len(log.read_text().splitlines()) if log.exists() else 0

    for before, began in ((0, 5.0), (5, 6.0)):
        for waited in (0.0, 0.0625, 0.09375):
            close(exchange(ended=began + waited, held=None, left=False))
        assert lines() == before
        close(exchange(ended=began + 0.125, held=None, left=False))
        assert lines() == before + 4
        close(exchange(ended=began + 0.25, held=None, left=False))
        assert lines() == before + 4, "the next batch begins anew"
        ops.runtime().sink.flush()
    assert nudged.call_count == 4
    ops.runtime().sink.close()


def test_a_listener_of_the_logger_hears_every_line(tmp_path: Path) -> None:
    heard: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = heard.append  # type: ignore[method-assign]
    logger = logging.getLogger("opsguard.access")
    logger.addHandler(handler)
    try:
        bench = Bench(tmp_path)
        bench.log.write(exchange())
    finally:
        logger.removeHandler(handler)
    assert [record.getMessage() for record in heard] == ["request_completed"]
    assert len(bench.lines()) == 1


def test_sixteen_threads_lose_and_double_no_line(tmp_path: Path) -> None:
    bench = Bench(tmp_path)

    def serve(thread: int) -> None:
        for number in range(200):
            bench.log.queue.append(exchange(path=f"/{thread}/{number}"))
            if len(bench.log.queue) >= bench.log.most:
                bench.log.drain()

    threads = [threading.Thread(target=serve, args=(n,)) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    paths = [line["path"] for line in bench.lines()]
    assert sorted(paths) == sorted(f"/{t}/{n}" for t in range(16) for n in range(200))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_over_a_fork_the_parent_writes_what_is_in_the_queue_and_the_child_does_not(
    tmp_path: Path,
) -> None:
    bench = Bench(tmp_path)
    bench.log.write(exchange(path="/before"))  # the sink hears of forks from its first line on
    bench.log.queue.append(exchange(path="/parent"))
    child = os.fork()
    if child == 0:
        bench.log.queue.append(exchange(path="/child"))
        bench.sink.flush()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert sorted(line["path"] for line in bench.lines()) == ["/before", "/child", "/parent"]
    bench.sink.close()
