"""The access line: the same JSON on the fast and on the long way, at every level and setting."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from opsguard.logging import AccessLine, Sink, access_line
from opsguard.settings import Logging

NOW = 1_795_201_081.25
RID = "0123456789abcdef0123456789abcdef"


class Lines(Sink):
    """A sink that keeps what it is given."""

    def __init__(self, *, terminal: bool = False) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.urgent: list[bool] = []
        self._terminal = terminal

    def write(self, line: str, urgent: bool = False) -> None:
        self.lines.append(line)
        self.urgent.append(urgent)

    @property
    def terminal(self) -> bool:
        return self._terminal


@pytest.fixture
def sink() -> Lines:
    return Lines()


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    logger = logging.getLogger("opsguard.access")
    yield logger
    logger.handlers.clear()
    logger.filters.clear()
    logger.setLevel(logging.NOTSET)
    logger.propagate = True


class Keeping(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


def make(
    sink: Sink,
    settings: Logging | None = None,
    clock: Callable[[], float] = lambda: NOW,
    **options: Any,
) -> AccessLine:
    return access_line(
        settings or Logging(format="json"),
        service="checkout",
        environment="production",
        sink=sink,
        clock=clock,
        environ={},
        **options,
    )


REQUEST: dict[str, Any] = {
    "method": "GET",
    "path": "/items/7",
    "endpoint": "/items/{id}",
    "status": 200,
    "duration": 0.0032146,
    "size": 1234,
    "client": "10.0.0.1",
    "request_id": RID,
    "correlation_id": RID,
    "fields": None,
}


def send(line: AccessLine, **changed: Any) -> None:
    line(*(REQUEST | changed).values())


def test_the_line_has_these_keys_in_this_order(sink: Lines) -> None:
    send(make(sink), correlation_id="c-1", fields={"tenant_id": "t1"})
    assert sink.lines == [
        '{"timestamp":"2026-11-20T18:58:01.250Z","level":"INFO","logger":"opsguard.access",'
        '"message":"request_completed","service":"checkout","environment":"production",'
        f'"request_id":"{RID}","correlation_id":"c-1","method":"GET","path":"/items/7",'
        '"endpoint":"/items/{id}","status_code":200,"duration_ms":3.215,"size":1234,'
        '"client":"10.0.0.1","tenant_id":"t1"}'
    ]


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "created": {"method": "POST", "status": 201, "size": 0},
    "redirect": {"status": 307},
    "not found": {"status": 404, "endpoint": "<unmatched>", "path": "/nope"},
    "client left": {"status": 499},
    "server error": {"status": 500},
    "no client": {"client": None},
    "hostile client": {"client": 'a"\n\\'},
    "own correlation id": {"correlation_id": "abc-123"},
    "no correlation id": {"correlation_id": ""},
    "no id": {"request_id": "", "correlation_id": "c"},
    "path with quotes": {"path": '/a"b\\c'},
    "path with controls": {"path": "/a\r\nb\x00\x1b[31m\x7f"},
    "path with line separators": {"path": "/a\u2028b\u2029c\x85d"},
    "path of another script": {"path": "/größe/\U0001f600"},
    "path with a lone surrogate": {"path": "/\udcff"},
    "method and endpoint with quotes": {"method": 'G"', "endpoint": '/"/\udcff'},
    "no time": {"duration": 0.0},
    "microseconds": {"duration": 0.000_000_6},
    "an hour": {"duration": 3_600.123_456_7},
    "half a microsecond": {"duration": 0.000_002_5},
    "large": {"size": 2**40},
    "bound": {"fields": {"tenant_id": "t1", "n": 7, "x": None}},
    "bound to nothing": {"fields": {}},
    "bound to names of ours": {
        "fields": {"path": "/x", "message": "m", "level": 1, "request_id": "r", "exception": "e"}
    },
    "bound to a name that is taken twice": {"fields": {"field_path": 1, "path": 2}},
    "bound to odd values": {"fields": {"a": {1, }, "b": b"\xff", "c": float("nan"), "d": 2**70}},
    "bound to an odd name": {"fields": {'"\n\udcff': 1}},
    "bound to a context": {"fields": {"context": 1}},
}  # fmt: skip

SETTINGS: dict[str, Logging] = {
    "default": Logging(format="json"),
    "nested": Logging(format="json", nest_context=True),
    "renamed": Logging(
        format="json",
        names={
            "message": "event",
            "timestamp": "@timestamp",
            "duration_ms": 'took"',
            "tenant_id": "tenant",
            "request_id": "rid",
            "client": "größe",
        },
    ),
}


@pytest.mark.parametrize("redact", [None, str.upper], ids=["plain", "redacted"])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("changed", CASES.values(), ids=CASES)
def test_the_fast_way_and_the_long_way_give_the_same_json(
    changed: dict[str, Any],
    settings: Logging,
    redact: Callable[[str], str] | None,
    sink: Lines,
    logger: logging.Logger,
) -> None:
    line = make(sink, settings, redact=redact)
    send(line, **changed)
    logger.addHandler(logging.NullHandler())
    send(line, **changed)
    fast, long = sink.lines
    assert json.loads(fast, object_pairs_hook=list) == json.loads(long, object_pairs_hook=list)
    assert fast.isascii()
    assert "\n" not in fast
    assert sink.urgent[0] == sink.urgent[1]


@pytest.mark.parametrize(
    ("status", "level", "urgent"),
    [
        (100, "INFO", False),
        (200, "INFO", False),
        (304, "INFO", False),
        (400, "WARNING", False),
        (499, "WARNING", False),
        (500, "ERROR", True),
        (599, "ERROR", True),
    ],
)
def test_the_level_follows_the_class_of_the_status(
    status: int, level: str, urgent: bool, sink: Lines
) -> None:
    send(make(sink), status=status)
    assert json.loads(sink.lines[0])["level"] == level
    assert sink.urgent == [urgent]


@pytest.mark.parametrize("format", ["json", "console"])
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [200, 404, 500]),
        ({"level": "DEBUG"}, [200, 404, 500]),
        ({"level": "WARNING"}, [404, 500]),
        ({"level": "ERROR"}, [500]),
        ({"level": "CRITICAL"}, []),
        ({"access": "errors"}, [404, 500]),
        ({"access": "errors", "level": "ERROR"}, [500]),
        ({"access": "off"}, []),
    ],
    ids=str,
)
def test_level_and_access_settings_choose_the_lines(
    settings: dict[str, Any], expected: list[int], format: Any, sink: Lines
) -> None:
    line = make(sink, Logging(format=format, **settings))
    for status in (200, 404, 500):
        send(line, status=status)
    assert [status for status in (200, 404, 500) if f"{status}" in "".join(sink.lines)] == expected
    assert len(sink.lines) == len(expected)


def test_the_clock_may_pass_seconds_and_jump_back(sink: Lines) -> None:
    times = iter([0.0, 0.9999999, 1.0, 1.5, 86_400.001, 2.25])
    line = make(sink, clock=lambda: next(times))
    for _ in range(6):
        send(line)
    assert [json.loads(line)["timestamp"] for line in sink.lines] == [
        "1970-01-01T00:00:00.000Z",
        "1970-01-01T00:00:00.999Z",
        "1970-01-01T00:00:01.000Z",
        "1970-01-01T00:00:01.500Z",
        "1970-01-02T00:00:00.001Z",
        "1970-01-01T00:00:02.250Z",
    ]


def test_more_series_than_are_kept_are_still_written(sink: Lines) -> None:
    line = make(sink)
    for n in range(2_100):
        send(line, endpoint=f"/{n}")
    assert [json.loads(line)["endpoint"] for line in sink.lines] == [f"/{n}" for n in range(2_100)]


# Stepping aside -----------------------------------------------------------------------------------


def test_a_handler_of_the_user_gets_real_records_and_our_line_stays(
    sink: Lines, logger: logging.Logger
) -> None:
    line = make(sink)
    handler = Keeping()
    logger.addHandler(handler)
    send(line, status=404)
    logger.removeHandler(handler)
    send(line)
    (record,) = handler.records
    assert record.getMessage() == "request_completed"
    assert (record.levelno, record.created) == (logging.WARNING, NOW)
    attributes = record.__dict__
    assert {key: attributes[key] for key in ("method", "path", "status_code", "request_id")} == {
        "method": "GET",
        "path": "/items/7",
        "status_code": 404,
        "request_id": RID,
    }
    assert len(sink.lines) == 2


def test_a_handler_without_propagation_has_the_lines_for_itself(
    sink: Lines, logger: logging.Logger
) -> None:
    handler = Keeping()
    logger.addHandler(handler)
    logger.propagate = False
    send(make(sink))
    assert len(handler.records) == 1
    assert sink.lines == []


def test_a_filter_of_the_user_can_refuse_and_change_lines(
    sink: Lines, logger: logging.Logger
) -> None:
    def no_probes(record: logging.LogRecord) -> bool:
        record.__dict__["path"] = "/changed"
        record.__dict__["extra"] = "added"
        return record.__dict__["endpoint"] != "/ready"

    logger.addFilter(no_probes)
    line = make(sink)
    send(line)
    send(line, endpoint="/ready")
    (written,) = map(json.loads, sink.lines)
    assert (written["path"], written["extra"]) == ("/changed", "added")


@pytest.mark.parametrize(
    ("level", "expected"),
    [(logging.DEBUG, [200, 500]), (logging.WARNING, [500]), (logging.CRITICAL, [])],
)
def test_a_level_of_the_logger_itself_counts_before_the_setting(
    level: int, expected: list[int], sink: Lines, logger: logging.Logger
) -> None:
    logger.setLevel(level)
    line = make(sink, Logging(format="json", level="WARNING"))
    for status in (200, 500):
        send(line, status=status)
    assert [json.loads(line)["status_code"] for line in sink.lines] == expected


# Console ------------------------------------------------------------------------------------------


def console(sink: Lines, **options: Any) -> AccessLine:
    return make(sink, Logging(format="console"), **options)


def test_the_console_line_reads_like_this(sink: Lines) -> None:
    send(console(sink), correlation_id="c-1", fields={"tenant_id": "t 1"})
    _time, _, rest = sink.lines[0].partition(" ")
    assert rest == (
        f"INFO  GET /items/7 200 3.2ms 1234B id={RID} correlation=c-1 client=10.0.0.1"
        ' tenant_id="t 1"'
    )


def test_a_hostile_path_can_forge_nothing_on_a_console(sink: Lines) -> None:
    send(console(sink), path="/a\r\n12:00:00 INFO GET /forged\x1b[2J\u2028 200 1ms\udcff")
    (line,) = sink.lines
    assert line.isprintable()
    assert r'"/a\r\n12:00:00 INFO GET /forged\x1b[2J\u2028 200 1ms\\udcff" 200' in line


@pytest.mark.parametrize(
    ("terminal", "environ", "coloured"),
    [(True, {}, True), (True, {"NO_COLOR": "1"}, False), (False, {}, False)],
    ids=["terminal", "NO_COLOR", "no terminal"],
)
def test_only_terminals_without_no_color_get_colours(
    terminal: bool, environ: dict[str, str], coloured: bool
) -> None:
    sink = Lines(terminal=terminal)
    line = access_line(
        Logging(format="console"),
        service="s",
        environment="development",
        sink=sink,
        clock=lambda: NOW,
        environ=environ,
    )
    send(line)
    assert ("\x1b[" in sink.lines[0]) == coloured


@pytest.mark.parametrize(
    ("format", "environment", "terminal", "json_expected"),
    [
        ("auto", "development", True, False),
        ("auto", "development", False, True),
        ("auto", "production", True, True),
        ("console", "production", False, False),
        ("json", "development", True, True),
    ],
)
def test_auto_means_console_on_a_terminal_in_development(
    format: Any, environment: str, terminal: bool, json_expected: bool
) -> None:
    sink = Lines(terminal=terminal)
    line = access_line(
        Logging(format=format),
        service="s",
        environment=environment,
        sink=sink,
        clock=lambda: NOW,
        environ={},
    )
    send(line)
    assert sink.lines[0].startswith("{") == json_expected
