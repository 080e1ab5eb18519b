"""From a `LogRecord` to one line: JSON for machines, or a console form for people.

Both show the same content, read by one function. The order of the keys, and what they hold, is in
``docs/reference/logs.md``; the access line's fast path gives the same JSON and is in
:mod:`opsguard.logging.access`.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from pythonjsonlogger.core import BaseJsonFormatter

from opsguard.context import Signature, current, of_error
from opsguard.logging.encode import (
    THOUSANDTHS,
    Json,
    Redact,
    describe,
    dumps,
    guarded,
    plain,
    rfc3339,
    text,
)

__all__ = ["ACCESS_KEYS", "ACCESS_MARK", "ConsoleFormatter", "JsonFormatter", "Keys"]

ACCESS_KEYS: Final = (
    "method",
    "path",
    "endpoint",
    "status_code",
    "duration_ms",
    "size",
    "client",
)
ACCESS_MARK: Final = "opsguard_access"
"""The attribute of a record that is an access line; holds the bound fields."""
FIELDS: Final = "opsguard_fields"
"""The attribute of a record that holds the keyword fields of :class:`opsguard.logging.Logger`."""

_FIXED = ("timestamp", "level", "logger", "message", "service", "environment")
_IDS = ("request_id", "correlation_id")
_LAST = ("file", "line", "exception", "stack_info")

_OWN_BY_LOGGING = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}
# uvicorn repeats its message there with terminal escapes in it.
_SKIPPED = _OWN_BY_LOGGING | {ACCESS_MARK, FIELDS, "color_message"}


class Keys:
    """The names of the keys, and which of them no field may take.

    A field whose name is taken gets `field_` before it, so a caller can neither forge nor lose
    anything.
    """

    def __init__(self, names: Mapping[str, str], *, nest_context: bool = False) -> None:
        self._names = {text(ours): text(theirs) for ours, theirs in names.items()}
        always = (*_FIXED, *_LAST, "context") if nest_context else (*_FIXED, *_LAST)
        self._taken = frozenset(map(self.name, always))
        # Outside a request a field may say which request a line belongs to.
        self._taken_in_request = self._taken.union(map(self.name, _IDS))
        self._taken_in_access = self._taken_in_request.union(map(self.name, ACCESS_KEYS))

    def name(self, key: str) -> str:
        """The name that `key` has in a line."""
        return self._names.get(key, key)

    def rename(
        self, fields: Mapping[str, object], *, access: bool = False, request: bool = True
    ) -> dict[str, object]:
        """The fields under the names they get in a line; `access` or `request` says in which."""
        taken = self._taken
        if request:
            taken = self._taken_in_access if access else self._taken_in_request
        renamed: dict[str, object] = {}
        for key, value in fields.items():
            name = self.name(text(str(key)))
            while name in taken or name in renamed:
                name = f"field_{name}"
            renamed[name] = value
        return renamed


@dataclass(slots=True)
class _Entry:
    """What a record says."""

    message: str
    request_id: str
    correlation_id: str
    access: dict[str, Json] | None
    bound: Mapping[str, object]
    own: dict[str, object]
    place: tuple[str, int] | None
    exception: dict[str, Json] | None
    stack: str


def _read(record: logging.LogRecord, clean: Redact) -> _Entry:
    attributes = record.__dict__
    own = {
        key: value
        for key, value in attributes.items()
        if key not in _SKIPPED and not str(key).startswith("_")
    }
    message = record.msg
    if isinstance(message, dict):  # the convention of python-json-logger
        fields: dict[object, object] = dict(message)
        message_text = _string(fields.pop("message", ""))
        own.update((_string(key), value) for key, value in fields.items())
    else:
        message_text = _message(record)
    own.update(attributes.get(FIELDS) or {})
    # Django's records carry the request, whose repr has the query in it.
    if record.name.startswith("django"):
        own.pop("request", None)

    request_id = correlation_id = ""
    bound: Mapping[str, object] = {}
    access: dict[str, Json] | None = None
    if ACCESS_MARK in attributes:
        bound = attributes[ACCESS_MARK] or {}
        request_id = str(own.pop("request_id", ""))
        correlation_id = str(own.pop("correlation_id", ""))
        access = {key: plain(own.pop(key, None)) for key in ACCESS_KEYS}
        path = access["path"]
        access["path"] = clean(path) if isinstance(path, str) else path
    elif (exchange := current.get() or _of_error(record)) is not None:
        request_id = exchange.request_id
        correlation_id = exchange.correlation_id
        bound = exchange.fields or {}

    failed = record.levelno >= logging.ERROR and access is None
    return _Entry(
        message=message_text if access else clean(message_text),
        request_id=request_id,
        correlation_id=correlation_id if correlation_id != request_id else "",
        access=access,
        bound=bound,
        own=own,
        place=(record.pathname, record.lineno) if failed else None,
        exception=_exception(record, clean),
        stack=clean(str(record.stack_info)) if record.stack_info else "",
    )


def _of_error(record: logging.LogRecord) -> Signature | None:
    """A server logs the app's exception when the request's context is gone."""
    info = record.exc_info
    return of_error(info[1]) if isinstance(info, tuple) else None


def _message(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except Exception:  # arguments that do not fit, an object whose __str__ raises
        return f"{_string(record.msg)} {dumps(plain(record.args))}"


def _string(value: object) -> str:
    if isinstance(value, str):
        return value
    try:
        return str(value)
    except Exception:
        return f"<unprintable {type(value).__qualname__}>"


def _exception(record: logging.LogRecord, clean: Redact) -> dict[str, Json] | None:
    info = record.exc_info
    if isinstance(info, tuple) and info[1] is not None:
        return describe(info[1], clean)
    if record.exc_text:  # it came pickled from another process, as logging's queues do it
        return {"type": "", "message": "", "stack": clean(record.exc_text)}
    return None


# JSON ---------------------------------------------------------------------------------------------


class JsonFormatter(BaseJsonFormatter):
    """One JSON object per record, in ASCII on one line. Never raises for a value it is given.

    A formatter of python-json-logger: its `process_log_record` may be overridden to change the
    object. `redact` passes over the message, all texts in fields, the path and the exception.
    """

    def __init__(
        self,
        *,
        service: str,
        environment: str,
        names: Mapping[str, str] | None = None,
        nest_context: bool = False,
        redact: Redact | None = None,
    ) -> None:
        super().__init__()
        self._service = text(service)
        self._environment = text(environment)
        self._keys = Keys(names or {}, nest_context=nest_context)
        self._nest = nest_context
        self._clean = guarded(redact)

    def format(self, record: logging.LogRecord) -> str:
        data: dict[str, Any] = {}
        self.add_fields(data, record, {})
        return self.serialize_log_record(self.process_log_record(data))

    def jsonify_log_record(self, log_data: dict[str, Any]) -> str:
        return dumps(log_data)

    def add_fields(
        self, log_data: dict[str, Any], record: logging.LogRecord, message_dict: dict[str, Any]
    ) -> None:
        entry = _read(record, self._clean)
        keys, clean = self._keys, self._clean
        name = keys.name
        log_data[name("timestamp")] = rfc3339(record.created)
        log_data[name("level")] = text(record.levelname)
        log_data[name("logger")] = text(record.name)
        log_data[name("message")] = entry.message
        log_data[name("service")] = self._service
        log_data[name("environment")] = self._environment
        is_access = entry.access is not None
        in_request = is_access or bool(entry.request_id)
        if in_request:
            log_data[name("request_id")] = text(entry.request_id)
        if entry.correlation_id:
            log_data[name("correlation_id")] = text(entry.correlation_id)
        for key, value in (entry.access or {}).items():
            log_data[name(key)] = value
        for key, field in keys.rename(entry.bound, access=is_access).items():
            log_data[key] = plain(field, clean)
        if self._nest:
            if entry.own:
                log_data[name("context")] = plain(entry.own, clean)
        else:
            own = keys.rename(entry.own, access=is_access, request=in_request)
            for key, field in own.items():
                log_data[key] = plain(field, clean)
        if entry.place is not None:
            log_data[name("file")], log_data[name("line")] = text(entry.place[0]), entry.place[1]
        if entry.exception is not None:
            log_data[name("exception")] = entry.exception
        if entry.stack:
            log_data[name("stack_info")] = entry.stack


# Console ------------------------------------------------------------------------------------------


_COLOURS = {
    "DEBUG": "\x1b[36m",
    "INFO": "\x1b[32m",
    "WARNING": "\x1b[33m",
    "ERROR": "\x1b[31m",
    "CRITICAL": "\x1b[1;31m",
}
_DIM = "\x1b[2m"
_RESET = "\x1b[0m"
_BARE = re.compile(r"[^\s\"'=]+")


def console_time(seconds: float) -> str:
    """``12:34:56.789`` in local time: who reads it has a clock on the wall."""
    whole = int(seconds)
    clock = time.localtime(whole)
    fraction = THOUSANDTHS[int((seconds - whole) * 1000)]
    return f"{clock.tm_hour:02d}:{clock.tm_min:02d}:{clock.tm_sec:02d}.{fraction}"


def printable(value: str) -> str:
    """`value` with everything escaped that could move the cursor, colour or end a line."""
    if value.isprintable():
        return value
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in value
    )


def shown(value: Json) -> str:
    """A value as it stands behind ``key=``: in quotes if it could be taken for more than one."""
    if not isinstance(value, str):
        return printable(dumps(value))
    if _BARE.fullmatch(value):
        return printable(value)
    return '"' + printable(value.replace("\\", "\\\\").replace('"', '\\"')) + '"'


class Console:
    """The parts of a console line, with or without colours. Immutable."""

    def __init__(self, *, colour: bool) -> None:
        self._colour = colour

    def head(self, seconds: float, level: str) -> str:
        """Time and level."""
        padded = printable(level).ljust(5)
        if not self._colour:
            return f"{console_time(seconds)} {padded}"
        colour = _COLOURS.get(level, "")
        return f"{_DIM}{console_time(seconds)}{_RESET} {colour}{padded}{_RESET}"

    def fields(self, pairs: Iterable[tuple[str, Json]]) -> str:
        """`` key=value`` for each pair."""
        form = f" {_DIM}%s={_RESET}%s" if self._colour else " %s=%s"
        return "".join([form % (printable(key), shown(value)) for key, value in pairs])

    def access(self, values: Mapping[str, Json]) -> str:
        """``GET /items/7 200 3.2ms 1234B``."""
        duration = values["duration_ms"]
        taken = f"{duration:.1f}" if isinstance(duration, (int, float)) else "?"
        return (
            f"{shown(values['method'])} {shown(values['path'])} {shown(values['status_code'])} "
            f"{taken}ms {shown(values['size'])}B"
        )

    def block(self, value: str) -> str:
        """A traceback: the only thing that takes several lines, so each is set off and escaped."""
        return "".join([f"\n  | {printable(line)}" for line in value.rstrip("\n").split("\n")])


class ConsoleFormatter(logging.Formatter):
    """Records for people: one line each, tracebacks indented below it. Never raises for a value.

    Control characters are escaped, so no value can forge a line or drive the terminal.
    """

    def __init__(self, *, colour: bool = False, redact: Redact | None = None) -> None:
        super().__init__()
        self._console = Console(colour=colour)
        self._clean = guarded(redact)

    def format(self, record: logging.LogRecord) -> str:
        console, clean = self._console, self._clean
        entry = _read(record, clean)
        head = console.head(record.created, record.levelname)
        pairs: list[tuple[str, Json]] = []
        if entry.request_id:
            pairs.append(("id", text(entry.request_id)))
        if entry.correlation_id:
            pairs.append(("correlation", text(entry.correlation_id)))
        if entry.access is not None:
            body = console.access(entry.access)
            if entry.access["client"] is not None:
                pairs.append(("client", entry.access["client"]))
        else:
            body = f"{printable(record.name)}: {printable(entry.message)}"
        pairs += [(str(key), plain(value, clean)) for key, value in entry.bound.items()]
        pairs += [(str(key), plain(value, clean)) for key, value in entry.own.items()]
        if entry.place is not None:
            pairs.append(("at", f"{entry.place[0]}:{entry.place[1]}"))
        line = f"{head} {body}{console.fields(pairs)}"
        if entry.exception is not None:
            line += console.block(str(entry.exception["stack"]))
        if entry.stack:
            line += console.block(entry.stack)
        return line
