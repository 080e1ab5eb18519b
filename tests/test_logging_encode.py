"""What becomes of values that JSON has no form for."""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import enum
import json
import pathlib
import subprocess
import sys
import uuid
from collections import OrderedDict, deque
from collections.abc import Iterator
from types import MappingProxyType
from typing import Any

import pytest

from opsguard.logging.encode import MAX_TEXT, describe, dumps, guarded, plain, rfc3339, text


class Hostile:
    def __repr__(self) -> str:
        raise RuntimeError("no")


class Pretender:
    """An object whose class can't even be asked for."""

    @property
    def __class__(self) -> Any:  # type: ignore[override]
        raise RuntimeError("no")


class Colour(enum.Enum):
    RED = "red"


class Size(enum.IntEnum):
    BIG = 3


class Text(str):
    def __str__(self) -> str:
        raise RuntimeError("no")


@dataclasses.dataclass
class Login:
    user: str
    password: str = dataclasses.field(repr=False)


class Endless(dict[str, int]):
    def items(self) -> Iterator[tuple[str, int]]:  # type: ignore[override]
        while True:
            yield "again", 1


def cycle() -> list[Any]:
    loop: list[Any] = [1]
    loop.append(loop)
    return loop


def deep(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


VALUES: dict[str, tuple[object, object]] = {
    "text": ("ä", "ä"),
    "none": (None, None),
    "bool": (True, True),
    "integer": (7, 7),
    "largest integer": (2**64 - 1, 2**64 - 1),
    "70-bit integer": (2**70, "1180591620717411303424"),
    "negative 70-bit integer": (-(2**70), "-1180591620717411303424"),
    "integer of 5,000 digits": (10**5_000, "<unprintable int>"),
    "float": (0.25, 0.25),
    "nan": (float("nan"), None),
    "infinity": (float("-inf"), None),
    "lone surrogate": ("\udcff", "\\udcff"),
    "bytes": (b"abc", "abc"),
    "bytes that are no text": (b"\xff\x00", "\\xff\x00"),
    "bytearray": (bytearray(b"abc"), "abc"),
    "tuple": ((1, "a"), [1, "a"]),
    "set": ({1}, [1]),
    "frozenset": (frozenset({"a"}), ["a"]),
    "deque": (deque([1]), [1]),
    "mapping": (MappingProxyType({"a": OrderedDict(b=1)}), {"a": {"b": 1}}),
    "keys that are no text": (
        {1: "a", None: "b", (1, 2): "c"},
        {"1": "a", "null": "b", "[1,2]": "c"},
    ),
    "cycle": (cycle(), [1, "<cycle>"]),
    "enum": (Colour.RED, "red"),
    "int enum": (Size.BIG, 3),
    "subclass of str that raises": (Text("x"), "x"),
    "datetime": (
        datetime.datetime(2026, 11, 20, 1, 2, 3, tzinfo=datetime.UTC),
        "2026-11-20T01:02:03+00:00",
    ),
    "date": (datetime.date(2026, 11, 20), "2026-11-20"),
    "timedelta": (datetime.timedelta(seconds=90), "0:01:30"),
    "decimal": (decimal.Decimal("1.10"), "1.10"),
    "uuid": (uuid.UUID(int=1), "00000000-0000-0000-0000-000000000001"),
    "path": (pathlib.PurePosixPath("/a"), "/a"),
    "class": (Login, f"{__name__}.Login"),
    "dataclass without its secret": (Login("ada", "hunter2"), {"user": "ada"}),
    "repr raises": (Hostile(), "<unprintable Hostile>"),
    "repr raises, inside": ({"a": [Hostile()]}, {"a": ["<unprintable Hostile>"]}),
    "class raises": (Pretender(), "<unprintable Pretender>"),
    "built-in class": (object, "builtins.object"),
}


@pytest.mark.parametrize(("value", "expected"), VALUES.values(), ids=VALUES)
def test_a_value_becomes_what_the_table_says(value: object, expected: object) -> None:
    got = plain(value)
    assert got == expected
    assert type(got) is type(expected)
    assert json.loads(dumps({"v": got})) == {"v": expected}


def test_a_value_too_deep_is_cut() -> None:
    line = dumps(plain(deep(100_000)))
    assert "<too deep>" in line
    assert len(line) < 100


def test_a_value_too_large_is_cut() -> None:
    """Twenty levels of two references each would be a million values."""
    value: list[Any] = []
    for _ in range(19):
        value = [value, value]
    assert len(dumps(plain(value))) < 200_000
    assert dumps(plain([1] * 20_000)).endswith(',"<cut>"]')
    assert dumps(plain(Endless(a=1))) == '{"again":1,"<cut>":true}'


def test_a_text_too_long_loses_its_middle() -> None:
    got = text("a" * MAX_TEXT + "b" * MAX_TEXT)
    assert got.startswith("aaa")
    assert got.endswith("bbb")
    assert f"[{MAX_TEXT} characters cut]" in got
    assert len(got) < MAX_TEXT + 50
    assert text("c" * MAX_TEXT) == "c" * MAX_TEXT


LINE_ENDS = "a\nb\rc\x00d\x1b[31me\u2028f\u2029g\x85h\x0b\x0ci\x1cj\x9bk\ufeffl\x7fm"


def test_no_text_makes_a_second_line_or_drives_a_terminal() -> None:
    line = dumps({"v": LINE_ENDS})
    assert line.isascii()
    assert line.isprintable()
    assert len(line.splitlines()) == 1
    assert json.loads(line) == {"v": LINE_ENDS}


def test_both_encoders_write_the_same() -> None:
    """orjson is an extra; without it the lines are no others."""
    script = """
import sys
sys.modules["orjson"] = None
from opsguard.logging.encode import dumps, plain
import ast
sys.stdout.write(dumps(plain(ast.literal_eval(sys.stdin.read()))))
"""
    value = {"a": [1, 0.5, None, True, "ä\u2028\U0001f600\n\x7f", b"\xff", {"k": {}}, []], "": -1.5}
    done = subprocess.run(
        [sys.executable, "-c", script],
        input=repr(value),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout == dumps(plain(value))


def test_an_exception_has_type_message_and_the_stack_of_its_cause() -> None:
    try:
        try:
            raise KeyError("inner")
        except KeyError as error:
            raise ValueError("outer\nline") from error
    except ValueError as error:
        got = describe(error)
    assert list(got) == ["type", "message", "stack"]
    assert (got["type"], got["message"]) == ("ValueError", "outer\nline")
    assert "KeyError: 'inner'" in str(got["stack"])
    assert "direct cause" in str(got["stack"])


def test_an_exception_as_a_value_is_described() -> None:
    assert plain({"error": subprocess.TimeoutExpired("ls", 1)}) == {
        "error": {
            "type": "subprocess.TimeoutExpired",
            "message": "Command 'ls' timed out after 1 seconds",
            "stack": "subprocess.TimeoutExpired: Command 'ls' timed out after 1 seconds\n",
        }
    }


def test_an_exception_whose_text_raises_is_described() -> None:
    class Silent(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no")

    got = describe(Silent())
    assert str(got["message"]).startswith("<unprintable ")
    assert "Silent" in str(got["type"])


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0.0, "1970-01-01T00:00:00.000Z"),
        (1_795_201_081.25, "2026-11-20T18:58:01.250Z"),
        (1_795_201_081.9999998, "2026-11-20T18:58:01.999Z"),
    ],
    ids=["epoch", "exact", "cut, not rounded into the next second"],
)
def test_a_timestamp_is_rfc_3339_in_utc_with_milliseconds(seconds: float, expected: str) -> None:
    assert rfc3339(seconds) == expected


def test_redaction_reaches_every_text_of_a_value_and_its_keys() -> None:
    clean = guarded(lambda value: value.replace("secret", "***"))
    value = {"secret": ["a secret", {"b": b"secret"}, Colour.RED, ValueError("secret")]}
    assert "secret" not in dumps(plain(value, clean))


def test_a_text_that_redaction_fails_on_is_replaced_not_passed() -> None:
    def broken(value: str) -> str:
        raise RuntimeError(value)

    assert guarded(broken)("secret") == "<redaction failed>"
