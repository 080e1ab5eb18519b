"""Whatever is logged, it is one valid line, and both ways to an access line agree."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opsguard.accelerator import speed
from opsguard.exchange import Exchange
from opsguard.logging import (
    AccessLog,
    ConsoleFormatter,
    JsonFormatter,
    Sink,
    access_line,
    access_template,
    batches,
)
from opsguard.logging.encode import rfc3339
from opsguard.settings import Logging


class Hostile:
    def __repr__(self) -> str:
        raise RuntimeError("no")


class Loop(list[Any]):
    def __init__(self) -> None:
        super().__init__([self])


any_text = st.text(st.characters(), max_size=40)
"""Surrogates and control characters included."""

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | any_text
    | st.binary(max_size=20)
    | st.complex_numbers()
    | st.decimals()
    | st.datetimes()
    | st.timedeltas()
    | st.uuids()
    | st.builds(Hostile)  # not sampled: Hypothesis would print it
    | st.sampled_from([Loop(), Hostile, ValueError("\ud800\n"), object(), print])
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.dictionaries(any_text | st.integers() | st.none(), inner, max_size=4)
        | st.builds(lambda items: {"set": frozenset(items)}, st.lists(st.integers(), max_size=3))
    ),
    max_leaves=12,
)
fields = st.dictionaries(any_text, values, max_size=4)


def record(message: object, args: tuple[object, ...], own: dict[str, Any]) -> logging.LogRecord:
    made = logging.LogRecord("app", logging.ERROR, "/srv/app.py", 7, message, args, None)
    made.__dict__["opsguard_fields"] = own
    return made


@given(any_text | values, st.tuples() | st.tuples(values) | st.tuples(values, values), fields)
def test_any_record_is_one_line_of_valid_json(
    message: object, args: tuple[object, ...], own: dict[str, Any]
) -> None:
    line = JsonFormatter(service="s", environment="e").format(record(message, args, own))
    assert line.isascii()
    assert line.isprintable()
    assert len(line.splitlines()) == 1
    parsed = json.loads(line, parse_constant=lambda name: refuse(name))
    assert list(parsed)[:4] == ["timestamp", "level", "logger", "message"]
    assert (parsed["level"], parsed["logger"]) == ("ERROR", "app")
    json.dumps(parsed, ensure_ascii=False).encode("utf-8")  # no lone surrogate came through


def refuse(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


@given(any_text | values, fields)
def test_any_record_is_one_printable_line_on_a_console(
    message: object, own: dict[str, Any]
) -> None:
    line = ConsoleFormatter().format(record(message, (), own))
    assert line.isprintable()


class Lines(Sink):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def write(self, line: str, urgent: bool = False) -> None:
        self.lines.append(line)

    def write_all(self, lines: Iterable[str], urgent: bool = False) -> None:
        self.lines += lines


@given(
    st.tuples(
        any_text,
        any_text,
        any_text,
        st.integers(100, 599),
        st.floats(0, 1e6),
        st.integers(0, 2**53),
        st.none() | st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
        st.text("abcdef0123456789.-_", max_size=20),
        any_text,
        st.none() | fields,
    ),
    st.floats(0, 4e9),
    st.booleans(),
)
def test_both_ways_to_an_access_line_give_the_same_json(
    request: tuple[Any, ...], now: float, nest: bool
) -> None:
    sink = Lines()
    line = access_line(
        Logging(format="json", nest_context=nest),
        service="s",
        environment="e",
        sink=sink,
        clock=lambda: now,
        environ={},
    )
    logger = logging.getLogger("opsguard.access")
    line(*request)
    aside = logging.NullHandler()
    logger.addHandler(aside)
    try:
        line(*request)
    finally:
        logger.removeHandler(aside)
    fast, long = sink.lines
    assert json.loads(fast, object_pairs_hook=list) == json.loads(long, object_pairs_hook=list)
    assert fast.isascii()
    assert fast.isprintable()


usual = st.text(
    st.characters(min_codepoint=32, max_codepoint=126, exclude_characters='"\\'),
    min_size=1,
    max_size=40,
)
odd = any_text | st.integers(0, 5000).map("a".__mul__)
rarely = st.integers(0, 15).map(lambda number: number == 7)
texts = rarely.flatmap(lambda now: odd if now else usual)
renamed = st.text('ab%sd"\\{}\u00e9 ', min_size=1, max_size=8).filter(str.strip)
exchanges = st.fixed_dictionaries(
    {
        "method": texts,
        "path": texts,
        "endpoint": texts | st.none(),
        "status": st.sampled_from([200, 200, 200, 404, 503, 0, -1]),
        "started": st.floats(0, 5) | st.floats(0, 1e7),
        "ended": st.floats(0, 5) | st.floats(0, 1e7) | st.integers(0, 4000).map(lambda n: n / 2e6),
        "sent": st.integers(-1, 2**62),
        "client": texts | st.none(),
        "request_id": st.text("abcdef0123456789.-_", min_size=1, max_size=140),
        "fields": rarely.flatmap(lambda now: fields if now else st.none()),
    }
)


@pytest.mark.skipif(speed is None, reason="opsguard._speed was not built")
@given(
    texts,
    st.dictionaries(st.sampled_from(["timestamp", "message", "path", "size"]), renamed, max_size=3),
    st.lists(exchanges, min_size=1, max_size=5),
    st.floats(0, 4e9),
)
def test_a_batch_in_c_has_the_lines_of_one_in_python(
    service: str, names: dict[str, str], requests: list[dict[str, Any]], now: float
) -> None:
    faults: list[BaseException] = []

    def lines() -> list[str]:
        sink = Lines()
        settings = Logging(format="json", names=names)
        told: Any = {"service": service, "environment": "e", "sink": sink}
        log = AccessLog(
            lambda clock: access_line(settings, **told, clock=clock, environ={}),
            access_template(settings, **told),
            sink,
            wall=lambda: now,
            elapsed=lambda: 0.0,
            unmatched="<unmatched>",
            report=lambda site, fault: faults.append(fault),
        )
        for values in requests * 3:  # the first line of a status is made in Python
            exchange = Exchange()
            for name, value in values.items():
                setattr(exchange, name, value)
            exchange.ended += exchange.started
            exchange.correlation_id = exchange.request_id
            log.queue.append(exchange)
        log.drain()
        return sink.lines

    fast = lines()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "speed", None)
        slow = lines()
    assert [line for text in fast for line in text.split("\n")] == slow
    assert not faults


@given(st.floats(0, 4e9))
def test_a_timestamp_has_one_form(seconds: float) -> None:
    stamp = rfc3339(seconds)
    assert len(stamp) == 24
    assert stamp[10] == "T"
    assert stamp[19] == "."
    assert stamp.endswith("Z")
