"""Application records: which keys a line has, and that nothing can break it."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from typing import Any

import pytest

from opsguard.context import current
from opsguard.logging import ConsoleFormatter, JsonFormatter


class FakeExchange:
    request_id = "r-1"
    correlation_id = "r-1"
    method = "GET"
    path = "/"
    endpoint = None
    fields: dict[str, object] | None = None


@pytest.fixture
def exchange() -> Iterator[FakeExchange]:
    """A request being served."""
    made = FakeExchange()
    current.set(made)  # type: ignore[arg-type]
    yield made
    current.set(None)


def record(message: Any = "hello", *args: Any, **attributes: Any) -> logging.LogRecord:
    made = logging.LogRecord("app", logging.INFO, "/srv/app.py", 7, message, args, None)
    made.created = 1_795_201_081.25
    made.__dict__.update(attributes)
    return made


def formatted(made: logging.LogRecord, **options: Any) -> dict[str, Any]:
    line = JsonFormatter(service="checkout", environment="production", **options).format(made)
    assert line.isascii()
    assert line.isprintable()
    result = json.loads(line)
    assert isinstance(result, dict)
    return result


FIXED = {
    "timestamp": "2026-11-20T18:58:01.250Z",
    "level": "INFO",
    "logger": "app",
    "message": "hello",
    "service": "checkout",
    "environment": "production",
}


def failed(kind: type[Exception] = ValueError) -> Exception:
    try:
        raise kind("no\nsecond line")
    except kind as error:
        return error


def info(error: Exception) -> Any:
    return type(error), error, error.__traceback__


# Keys ---------------------------------------------------------------------------------------------


def test_a_line_outside_a_request_has_the_fixed_keys_only() -> None:
    assert list(formatted(record()).items()) == list(FIXED.items())


def test_a_line_inside_a_request_has_its_ids_and_bound_fields_in_this_order(
    exchange: FakeExchange,
) -> None:
    exchange.fields = {"tenant_id": "t1"}
    exchange.correlation_id = "c-1"
    made = record(levelno=logging.ERROR, levelname="ERROR", n=1, exc_info=info(failed()))
    assert list(formatted(made)) == [
        *FIXED,
        *("request_id", "correlation_id", "tenant_id", "n", "file", "line", "exception"),
    ]


def test_a_correlation_id_equal_to_the_request_id_is_not_repeated(exchange: FakeExchange) -> None:
    assert formatted(record()) == FIXED | {"request_id": "r-1"}


@pytest.mark.parametrize("level", [logging.INFO, logging.WARNING, logging.ERROR, logging.CRITICAL])
def test_file_and_line_are_there_from_error_up(level: int) -> None:
    got = formatted(record(levelno=level))
    place = (got.get("file"), got.get("line"))
    assert place == (("/srv/app.py", 7) if level >= logging.ERROR else (None, None))


def test_an_exception_has_type_message_and_stack() -> None:
    got = formatted(record(exc_info=info(failed())))["exception"]
    assert (got["type"], got["message"]) == ("ValueError", "no\nsecond line")
    assert got["stack"].startswith("Traceback (most recent call last):\n")


def test_exc_info_without_an_exception_is_nothing() -> None:
    assert "exception" not in formatted(record(exc_info=(None, None, None)))


def test_the_text_of_an_exception_from_another_process_is_kept() -> None:
    assert formatted(record(exc_text="Traceback"))["exception"]["stack"] == "Traceback"


def test_stack_info_is_a_key_of_its_own() -> None:
    assert formatted(record(stack_info="Stack:\n  here"))["stack_info"] == "Stack:\n  here"


def test_context_nests_the_fields_of_the_call_and_leaves_bound_ones(
    exchange: FakeExchange,
) -> None:
    exchange.fields = {"tenant_id": "t1"}
    got = formatted(record(opsguard_fields={"n": 1, "message": "m"}), nest_context=True)
    assert got["tenant_id"] == "t1"
    assert got["context"] == {"n": 1, "message": "m"}
    assert got["message"] == "hello"


def test_names_rename_every_key() -> None:
    names = {"message": "event", "timestamp": "@timestamp", "level": "severity", "n": "count"}
    got = formatted(record(n=1), names=names)
    assert list(got) == [
        *("@timestamp", "severity", "logger", "event", "service", "environment", "count")
    ]


@pytest.mark.parametrize(
    "name",
    [*FIXED, "exception", "stack_info", "file", "line", "request_id", "correlation_id"],
)
@pytest.mark.parametrize("how", ["bound", "call", "extra"])
def test_a_field_with_a_name_of_ours_is_kept_beside_it(
    name: str, how: str, exchange: FakeExchange
) -> None:
    fields = {name: "theirs"}
    if how == "bound":
        exchange.fields = fields
    made = record(opsguard_fields=fields if how == "call" else {})
    if how == "extra":
        if name in ("message", "exc_info", "stack_info"):  # `logging` itself refuses these
            return
        made.__dict__.update(fields)
    got = formatted(made)
    assert got[f"field_{name}"] == "theirs"
    assert {key: got[key] for key in FIXED} == FIXED


def test_a_field_with_the_new_name_of_a_key_is_kept_beside_it() -> None:
    got = formatted(record(event="theirs"), names={"message": "event"})
    assert (got["event"], got["field_event"]) == ("hello", "theirs")


def test_outside_a_request_a_line_may_say_which_request_it_belongs_to() -> None:
    assert formatted(record(request_id="r-9"))["request_id"] == "r-9"


def test_a_field_of_the_call_wins_over_a_bound_one(exchange: FakeExchange) -> None:
    exchange.fields = {"n": 1}
    assert formatted(record(n=2))["n"] == 2


def test_a_dict_as_message_gives_its_fields() -> None:
    got = formatted(record({"message": "hello", "n": 1}))
    assert got == FIXED | {"n": 1}


def test_what_servers_put_on_their_records_for_themselves_is_left_out() -> None:
    """uvicorn: the message in colours. Django: the request, whose repr has the query in it."""
    made = record(color_message="\x1b[1mhello", name="django.request", request=object())
    assert formatted(made) == FIXED | {"logger": "django.request"}


def test_private_attributes_of_a_record_are_left_out() -> None:
    assert formatted(record(_internal=1)) == FIXED


# Hostile content ----------------------------------------------------------------------------------


class Hostile:
    def __str__(self) -> str:
        raise RuntimeError("no")

    __repr__ = __str__


@pytest.mark.parametrize(
    ("message", "args", "expected"),
    [
        ("%d apples", ("many",), '%d apples ["many"]'),
        ("%s and %s", (1,), "%s and %s [1]"),
        ("%s", (Hostile(),), '%s ["<unprintable Hostile>"]'),
        (Hostile(), (), "<unprintable Hostile> []"),
        (7, (), "7"),
        ("100%", (), "100%"),
        ("a\r\nb\u2028\x1b[2J", (), "a\r\nb\u2028\x1b[2J"),
    ],
    ids=["wrong type", "too few", "arg raises", "message raises", "number", "percent", "controls"],
)
def test_any_message_is_logged(message: Any, args: tuple[Any, ...], expected: str) -> None:
    assert formatted(record(message, *args))["message"] == expected


def test_redaction_reaches_message_fields_exception_and_stack(exchange: FakeExchange) -> None:
    exchange.fields = {"bound": "secret"}
    try:
        raise ValueError("secret")
    except ValueError as error:
        made = record(
            "a %s", "secret", exc_info=info(error), own=["secret"], stack_info="secret here"
        )
    for formatter in (
        JsonFormatter(service="s", environment="e", redact=lambda t: t.replace("secret", "***")),
        ConsoleFormatter(redact=lambda t: t.replace("secret", "***")),
    ):
        line = formatter.format(made)
        assert "secret" not in line
        assert line.count("***") >= 5


# Console ------------------------------------------------------------------------------------------


def shown(made: logging.LogRecord, **options: Any) -> str:
    return ConsoleFormatter(**options).format(made)


def test_a_console_line_reads_like_this(exchange: FakeExchange) -> None:
    exchange.fields = {"tenant_id": "t1"}
    line = shown(record(n=1, text="two words", empty="", items=[1, "a"], none=None))
    assert re.fullmatch(
        r'\d\d:\d\d:01\.250 INFO  app: hello id=r-1 tenant_id=t1 n=1 text="two words" empty="" '
        r'items=\[1,"a"\] none=null',
        line,
    )


def test_a_console_error_says_where_and_shows_the_stack_set_off() -> None:
    made = record(levelno=logging.ERROR, levelname="ERROR", exc_info=info(failed()))
    first, *rest = shown(made).split("\n")
    assert first.endswith("ERROR app: hello at=/srv/app.py:7")
    assert rest[0] == "  | Traceback (most recent call last):"
    assert rest[-1] == "  | second line"
    assert all(line.startswith("  | ") for line in rest)


def test_colours_only_if_asked_for() -> None:
    assert "\x1b[" in shown(record(n=1), colour=True)
    assert "\x1b[" not in shown(record(n=1))


@pytest.mark.parametrize("colour", [False, True])
def test_nothing_in_a_record_can_forge_a_line_or_drive_the_terminal(colour: bool) -> None:
    """Wherever the text stands: every line but the first is set off, no escape is theirs."""
    bad = '"\r\n12:00:00.000 INFO forged\x1b[2J\x9b31m\u2028\x7f\udcff\u202e'
    made = record(
        bad,
        name=bad,
        levelname=bad,
        exc_info=info(ValueError(bad)),
        stack_info=bad,
        own=bad,
        nested={bad: [bad]},
        levelno=logging.ERROR,
        pathname=bad,
    )
    made.__dict__[bad] = 1
    first, *rest = re.sub("\x1b\\[[0-9;]*m", "", shown(made, colour=colour)).split("\n")
    assert all(line.startswith("  | ") for line in rest)
    assert all(line.isprintable() for line in (first, *rest))
