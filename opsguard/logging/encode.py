"""Any value in, one line of JSON out.

:func:`plain` turns whatever a caller logs into values that every JSON reader accepts;
:func:`dumps` writes them as ASCII on one line. Nothing here raises for a value it does not like:
a value that cannot be read is replaced by a short note in angle brackets that names its type.

What becomes of the values JSON has no form for:

====================================  ==============================================================
value                                 in the line
====================================  ==============================================================
NaN, infinities                       null (an index that expects a number refuses a text)
integers beyond 64 bits               their digits as text (most readers would round the number)
lone surrogates                       their escape as text: ``\\udcff``
bytes                                 text; bytes that are not UTF-8 as ``\\xff``
sets, tuples, deques                  lists
mappings, dataclasses                 objects; dataclass fields with ``repr=False`` are left out
enum members                          their value
dates, times                          ISO 8601
exceptions                            an object with ``type``, ``message`` and ``stack``
anything else                         its repr
====================================  ==============================================================

Bounds: containers 20 deep, 10,000 values in one field, 65,536 characters in one text.
"""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import enum
import json
import math
import numbers
import pathlib
import re
import time
import traceback
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from json.encoder import encode_basestring_ascii as quote
from typing import Any, TypeAlias

__all__ = [
    "MAX_TEXT",
    "THOUSANDTHS",
    "Redact",
    "describe",
    "dumps",
    "guarded",
    "plain",
    "quote",
    "rfc3339",
    "text",
    "utc_second",
]

Json: TypeAlias = "str | int | float | bool | list[Json] | dict[str, Json] | None"
Redact: TypeAlias = "Callable[[str], str]"

MAX_TEXT = 65_536
"""Characters kept of one text; the middle of a longer one is cut out."""
_MAX_DEPTH = 20
_MAX_VALUES = 10_000
_INT64 = range(-(2**63), 2**64)

THOUSANDTHS = tuple(f"{n:03d}" for n in range(1000))
"""`000` to `999`: looked up, as formatting costs three times more."""


# Time ---------------------------------------------------------------------------------------------


def utc_second(whole: int) -> str:
    """``2026-11-20T18:58:01.``: a timestamp up to its dot. `whole` is in epoch seconds."""
    year, month, day, hour, minute, second = time.gmtime(whole)[:6]
    return f"{year:04d}-{month:02d}-{day:02d}T{hour:02d}:{minute:02d}:{second:02d}."


def rfc3339(seconds: float) -> str:
    """The RFC 3339 form of `seconds` since the epoch: UTC, milliseconds, cut and not rounded."""
    whole = int(seconds)
    return f"{utc_second(whole)}{THOUSANDTHS[int((seconds - whole) * 1000)]}Z"


# Text ---------------------------------------------------------------------------------------------


def text(value: str) -> str:
    """`value` without lone surrogates and at most about `MAX_TEXT` long."""
    if len(value) > MAX_TEXT:
        cut = len(value) - MAX_TEXT
        value = f"{value[: MAX_TEXT // 2]}...[{cut} characters cut]...{value[-MAX_TEXT // 2 :]}"
    if value.isascii():
        return value
    # Not an error handler of `json`: its "\udcff" is an escape that strict readers refuse.
    return value.encode("utf-8", "backslashreplace").decode("utf-8")


def guarded(redact: Redact | None) -> Redact:
    """`redact` with :func:`text` around it. A text it fails on is replaced, never passed on."""
    if redact is None:
        return text

    def clean(value: str) -> str:
        try:
            return text(redact(text(value)))
        except Exception:
            return "<redaction failed>"

    return clean


# Values -------------------------------------------------------------------------------------------


def plain(value: object, clean: Redact = text) -> Json:
    """`value` as JSON can hold it; `clean` is applied to every text in it. Never raises.

    A mapping's keys become text as well; they pass `clean` too, as a key can be user input.
    """
    kind = type(value)
    if kind is str:
        return clean(value)  # type: ignore[arg-type]
    if value is None or kind is bool or (kind is int and value in _INT64):
        return value  # type: ignore[return-value]
    return _Walk(clean).visit(value)


def describe(error: BaseException, clean: Redact = text) -> dict[str, Json]:
    """An exception as ``type``, ``message`` and ``stack`` (with its causes). Never raises."""
    kind = type(error)
    name = kind.__qualname__
    if kind.__module__ not in ("builtins", "__main__"):
        name = f"{kind.__module__}.{name}"
    try:
        message = str(error)
    except Exception:
        message = _unprintable(error)
    try:
        stack = "".join(traceback.format_exception(error))
    except Exception:
        stack = ""
    return {"type": text(name), "message": clean(message), "stack": clean(stack)}


class _Walk:
    """One walk through one value; counts what it saw, so that no value can cost without bound."""

    __slots__ = ("_above", "_clean", "_left")

    def __init__(self, clean: Redact) -> None:
        self._clean = clean
        self._left = _MAX_VALUES
        self._above: list[int] = []  # ids of the containers we are inside of

    def visit(self, value: object) -> Json:
        try:
            return self._visit(value)
        except Exception:  # the value's own code: __repr__, __iter__, a property
            return _unprintable(value)

    def _visit(self, value: Any) -> Json:
        if value is None or value is True or value is False:
            return value
        if isinstance(value, enum.Enum):
            return self.visit(value.value)
        if isinstance(value, str):
            return self._clean(str.__str__(value))
        if isinstance(value, numbers.Integral):
            number = int(value)
            return number if number in _INT64 else str(number)
        if isinstance(value, numbers.Real):
            real = float(value)
            return real if math.isfinite(real) else None
        if isinstance(value, (bytes, bytearray, memoryview)):
            return self._clean(bytes(value).decode("utf-8", "backslashreplace"))
        if isinstance(value, (datetime.date, datetime.time)):
            return value.isoformat()
        if isinstance(value, BaseException):
            return describe(value, self._clean)
        if isinstance(value, Mapping):
            return self._inside(value, self._object, value.items())
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            # repr=False is how a dataclass says that a field is not for printing.
            shown = [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value) if f.repr]
            return self._inside(value, self._object, shown)
        if isinstance(value, (list, tuple, set, frozenset, deque)):
            return self._inside(value, self._list, value)
        if isinstance(value, type):
            return text(f"{value.__module__}.{value.__qualname__}")
        if isinstance(value, _STR_IS_BETTER):
            return self._clean(str(value))
        return self._clean(repr(value))

    def _inside(self, value: object, build: Callable[[Any], Json], content: object) -> Json:
        if id(value) in self._above:
            return "<cycle>"
        if len(self._above) >= _MAX_DEPTH:
            return "<too deep>"
        self._above.append(id(value))
        try:
            return build(content)
        finally:
            self._above.pop()

    def _list(self, items: Iterable[object]) -> Json:
        out: list[Json] = []
        for item in items:
            if self._spent():
                out.append("<cut>")
                break
            out.append(self.visit(item))
        return out

    def _object(self, items: Iterable[tuple[object, object]]) -> Json:
        out: dict[str, Json] = {}
        for key, item in items:
            if self._spent():
                out["<cut>"] = True
                break
            out[self._key(key)] = self.visit(item)
        return out

    def _key(self, key: object) -> str:
        name = self.visit(key)
        return name if isinstance(name, str) else dumps(name)

    def _spent(self) -> bool:
        self._left -= 1
        return self._left < 0


_STR_IS_BETTER = (decimal.Decimal, pathlib.PurePath, uuid.UUID, datetime.timedelta)
"""Types whose repr says how to build them, where a reader of logs wants the value."""


def _unprintable(value: object) -> str:
    return f"<unprintable {text(type(value).__qualname__)}>"


# JSON ---------------------------------------------------------------------------------------------


_NOT_PRINTABLE = re.compile(r"[^\x20-\x7e]+")


def _escape(match: re.Match[str]) -> str:
    return quote(match[0])[1:-1]


def _fastest() -> Callable[[object], str]:
    try:
        from orjson import dumps as to_bytes
    except ImportError:  # the extra `fast` is not installed, or has no wheel for this build
        return json.JSONEncoder(
            ensure_ascii=True, allow_nan=False, check_circular=False, separators=(",", ":")
        ).encode

    def to_text(value: object) -> str:
        line = to_bytes(value).decode("utf-8")
        if line.isascii() and "\x7f" not in line:
            return line
        return _NOT_PRINTABLE.sub(_escape, line)

    return to_text


dumps = _fastest()
"""JSON of a value that :func:`plain` returned: compact, ASCII, so without any line separator.

ASCII also keeps the lengths of texts and of bytes the same, which the sink counts on, and shows a
terminal nothing but printable characters.
"""
