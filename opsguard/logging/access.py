"""The access line: one for each request, so it is put together from pieces made before.

What the requests of one series share (method, endpoint, status, level and all fixed keys) is
encoded once. A line costs one look-up, two or three escaped texts and one f-string: about a tenth
of a `LogRecord` through a formatter. Both ways give the same JSON; a test holds them together.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from typing import Final, Protocol, TypeAlias

from opsguard.logging.encode import (
    THOUSANDTHS,
    Redact,
    dumps,
    guarded,
    plain,
    quote,
    text,
    utc_second,
)
from opsguard.logging.formatters import (
    ACCESS_KEYS,
    ACCESS_MARK,
    ConsoleFormatter,
    JsonFormatter,
    Keys,
)
from opsguard.logging.sink import Sink

__all__ = [
    "LOGGER",
    "MESSAGE",
    "AccessLine",
    "access_line",
    "access_template",
    "colour_wanted",
    "console_wanted",
]

LOGGER: Final = "opsguard.access"
MESSAGE: Final = "request_completed"
MAX_SERIES: Final = 2_000
"""Series whose pieces are kept; those of further ones are made for each line."""

AccessLine: TypeAlias = Callable[
    [str, str, str, int, float, int, "str | None", str, str, "Mapping[str, object] | None"], None
]
"""``(method, path, endpoint, status, duration, size, client, request_id, correlation_id, fields)``

All positional. `duration` is in seconds, `size` the answer's body in bytes, `client` the caller's
address, `correlation_id` is written only if it is neither empty nor the request id, `fields` are
those bound to the request. Thread-safe; never waits for the output.
"""


class LoggingSettings(Protocol):
    """What this room reads of the group `logging` of the settings."""

    @property
    def level(self) -> str: ...
    @property
    def format(self) -> str: ...
    @property
    def names(self) -> Mapping[str, str]: ...
    @property
    def nest_context(self) -> bool: ...
    @property
    def access(self) -> str: ...


def console_wanted(settings: LoggingSettings, environment: str, sink: Sink) -> bool:
    """Whether lines are for a person: asked for, or development on a terminal."""
    if settings.format == "auto":
        return environment == "development" and sink.terminal
    return settings.format == "console"


def colour_wanted(environ: Mapping[str, str], sink: Sink) -> bool:
    """Colours are for terminals, and only if NO_COLOR (https://no-color.org) is not set."""
    return sink.terminal and not environ.get("NO_COLOR")


def level_of(status: int) -> int:
    """5xx is ERROR, 4xx (499, a client that left, included) WARNING, the rest INFO."""
    if status >= 500:
        return logging.ERROR
    return logging.WARNING if status >= 400 else logging.INFO


def access_line(
    settings: LoggingSettings,
    *,
    service: str,
    environment: str,
    sink: Sink,
    clock: Callable[[], float],
    environ: Mapping[str, str] = os.environ,
    redact: Redact | None = None,
) -> AccessLine:
    """The function that writes access lines to `sink`, made for these settings.

    `clock` gives wall seconds. `environ` is asked for NO_COLOR. `redact` passes over the path and
    the bound fields.

    The function steps aside for a real `LogRecord` as long as the logger ``opsguard.access`` has
    handlers, filters or a level of its own, which is looked at for each line. The record goes to
    those, and the line to `sink` as before, unless a filter refuses it or `propagate` is False.
    """
    if settings.access == "off":
        return _no_line
    lowest = logging.WARNING if settings.access == "errors" else logging.NOTSET
    level = logging.getLevelNamesMapping().get(settings.level.upper(), logging.INFO)
    if console_wanted(settings, environment, sink):
        formatter: logging.Formatter = ConsoleFormatter(
            colour=colour_wanted(environ, sink), redact=redact
        )
        return _record_line(formatter, sink, clock, lowest, level)
    formatter = JsonFormatter(
        service=service,
        environment=environment,
        names=settings.names,
        nest_context=settings.nest_context,
        redact=redact,
    )
    aside = _record_line(formatter, sink, clock, lowest, level)
    keys = Keys(settings.names, nest_context=settings.nest_context)
    make = _pieces_maker(keys, service, environment, max(lowest, level))
    return _json_line(make, keys, sink, clock, redact, aside)


def access_template(
    settings: LoggingSettings, *, service: str, environment: str, sink: Sink
) -> Callable[[int], tuple[str, bool] | None] | None:
    """The function that makes the %-template of all lines with a status, with whether they are
    urgent; it gives None where such lines are not wanted.

    A template takes: the text of the second up to its point, milliseconds, the request id, method,
    path and endpoint as JSON, the whole milliseconds of the duration and the microseconds beyond
    them, the size, the client as JSON. It is for lines with one id and no bound fields. There are
    none (None instead of a function) for the console.
    """
    if settings.access == "off" or console_wanted(settings, environment, sink):
        return None
    lowest = logging.WARNING if settings.access == "errors" else logging.NOTSET
    level = logging.getLevelNamesMapping().get(settings.level.upper(), logging.INFO)
    keys = Keys(settings.names, nest_context=settings.nest_context)
    make = _pieces_maker(keys, service, environment, max(lowest, level))

    def key(name: str) -> str:
        return f",{quote(keys.name(name))}:".replace("%", "%%")

    def template(status: int) -> tuple[str, bool] | None:
        pieces = make("", "", status)
        if pieces is None:
            return None
        start = f'{{{quote(keys.name("timestamp"))}:"'.replace("%", "%%")
        head = pieces[0].replace("%", "%%")
        text = (
            f'{start}%s%03d{head}"%s"{key("method")}%s{key("path")}%s{key("endpoint")}%s'
            f"{key('status_code')}{int(status)}{key('duration_ms')}%d.%03d{key('size')}%d"
            f"{key('client')}%s}}"
        )
        return text, pieces[3]

    return template


def _no_line(
    method: str,
    path: str,
    endpoint: str,
    status: int,
    duration: float,
    size: int,
    client: str | None,
    request_id: str,
    correlation_id: str,
    fields: Mapping[str, object] | None,
) -> None:
    return None


_Pieces: TypeAlias = "tuple[str, str, str, bool] | None"
"""What all lines of a series share: up to the request id, up to the path, up to the duration; and
whether they are urgent. None: the series has no lines."""


def _pieces_maker(
    keys: Keys, service: str, environment: str, lowest: int
) -> Callable[[str, str, int], _Pieces]:
    def key(name: str) -> str:
        return f",{quote(keys.name(name))}:"

    def make(method: str, endpoint: str, status: int) -> _Pieces:
        level = level_of(status)
        if level < lowest:
            return None
        fixed = {
            "level": logging.getLevelName(level),
            "logger": LOGGER,
            "message": MESSAGE,
            "service": service,
            "environment": environment,
        }
        head = "".join([f"{key(name)}{quote(text(value))}" for name, value in fixed.items()])
        return (
            f'Z"{head}{key("request_id")}',
            f"{key('method')}{quote(text(method))}{key('path')}",
            f"{key('endpoint')}{quote(text(endpoint))}"
            f"{key('status_code')}{int(status)}{key('duration_ms')}",
            level >= logging.ERROR,
        )

    return make


def _json_line(
    make: Callable[[str, str, int], _Pieces],
    keys: Keys,
    sink: Sink,
    clock: Callable[[], float],
    redact: Redact | None,
    aside: AccessLine,
) -> AccessLine:
    logger = logging.getLogger(LOGGER)
    write = sink.write
    clean = guarded(redact)
    start = f'{{{quote(keys.name("timestamp"))}:"'
    correlation_key = f",{quote(keys.name('correlation_id'))}:"
    size_key = f",{quote(keys.name('size'))}:"
    client_key = f",{quote(keys.name('client'))}:"
    # Threads may make the pieces of one series twice, or pass the bound by as many as they are:
    # both do no harm.
    series: dict[tuple[str, str, int], _Pieces] = {}
    # The second of the last line and the text of it: one tuple, replaced as one, so that a thread
    # sees a second together with its own text.
    last: tuple[float, str] = (-1.0, "")

    def line(
        method: str,
        path: str,
        endpoint: str,
        status: int,
        duration: float,
        size: int,
        client: str | None,
        request_id: str,
        correlation_id: str,
        fields: Mapping[str, object] | None,
    ) -> None:
        nonlocal last
        if logger.handlers or logger.filters or logger.level:
            aside(
                method, path, endpoint, status, duration, size, client,
                request_id, correlation_id, fields,
            )  # fmt: skip
            return
        try:
            pieces = series[method, endpoint, status]
        except KeyError:
            pieces = make(method, endpoint, status)
            if len(series) < MAX_SERIES:
                series[method, endpoint, status] = pieces
        if pieces is None:
            return
        head, before_path, before_duration, urgent = pieces
        now = clock()
        second, moment = last
        fraction = now - second
        if not 0.0 <= fraction < 1.0:
            second, moment = last = (now // 1, start + utc_second(int(now // 1)))
            fraction = now - second
        if redact is not None or not path.isascii():
            path = clean(path)
        if correlation_id != request_id and correlation_id:
            before_path = f"{correlation_key}{quote(text(correlation_id))}{before_path}"
        end = "}"
        if fields:
            bound = keys.rename(fields, access=True).items()
            end = "".join([f",{quote(key)}:{dumps(plain(field, clean))}" for key, field in bound])
            end += "}"
        micros = int(duration * 1e6 + 0.5)
        write(
            f"{moment}{THOUSANDTHS[int(fraction * 1000)]}{head}{quote(request_id)}"
            f"{before_path}{quote(path)}{before_duration}"
            f"{micros // 1000}.{THOUSANDTHS[micros % 1000]}{size_key}{size}"
            f"{client_key}{'null' if client is None else quote(client)}{end}",
            urgent,
        )

    return line


def _record_line(
    formatter: logging.Formatter,
    sink: Sink,
    clock: Callable[[], float],
    lowest: int,
    default: int,
) -> AccessLine:
    """The long way: for people at a terminal, and for what users hang on the logger.

    No line is below the level `lowest`; below `default` only those that the logger's own level
    allows.
    """
    logger = logging.getLogger(LOGGER)

    def line(
        method: str,
        path: str,
        endpoint: str,
        status: int,
        duration: float,
        size: int,
        client: str | None,
        request_id: str,
        correlation_id: str,
        fields: Mapping[str, object] | None,
    ) -> None:
        level = level_of(status)
        if level < lowest or level < (logger.level or default):
            return
        values = (method, path, endpoint, status, int(duration * 1e6 + 0.5) / 1000, size, client)
        record = logging.LogRecord(LOGGER, level, "", 0, MESSAGE, None, None)
        record.created = clock()
        record.msecs = record.created % 1 * 1000
        record.__dict__.update(zip(ACCESS_KEYS, values, strict=True))
        record.__dict__.update(
            {"request_id": request_id, "correlation_id": correlation_id, ACCESS_MARK: fields}
        )
        if logger.handlers or logger.filters:
            allowed = logger.filter(record)
            if not allowed:
                return
            if isinstance(allowed, logging.LogRecord):  # from 3.12 on a filter may replace it
                record = allowed
            logger.callHandlers(record)
            if not logger.propagate:
                return
        sink.write(formatter.format(record), level >= logging.ERROR)

    return line
