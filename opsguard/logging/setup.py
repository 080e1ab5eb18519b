"""Who writes where: the root logger and those of the servers and frameworks join one output.

`logging` is one tree for the whole process, so what is done to it is kept in one place here, with
what was there before. Every `configure` adds a layer; the last one that is still in force owns the
root logger. Access lines are not affected: each OpsGuard writes its own to its own sink.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from opsguard.forks import in_each_child
from opsguard.logging.access import LOGGER as ACCESS_LOGGER
from opsguard.logging.access import LoggingSettings, colour_wanted, console_wanted
from opsguard.logging.encode import Redact, dumps
from opsguard.logging.formatters import ACCESS_MARK, ConsoleFormatter, JsonFormatter
from opsguard.logging.levels import set_aside
from opsguard.logging.sink import Sink

__all__ = ["SinkHandler", "configure"]

JOINED: Final = (
    *("uvicorn", "uvicorn.error", "uvicorn.asgi"),
    *("gunicorn", "gunicorn.error"),
    *("hypercorn", "hypercorn.error"),
    "_granian",
    "werkzeug",
    *("django", "django.request"),
    "opsguard",
)
"""Loggers whose own console handlers go, and whose records reach the root logger."""

SILENCED: Final = (
    "uvicorn.access",
    "gunicorn.access",
    "hypercorn.access",
    "granian.access",
    "django.server",
)
"""Loggers of access lines, which ours replaces. They keep handlers that write elsewhere."""

OURS: Final = (ACCESS_LOGGER, "opsguard.audit")
"""Loggers of our own whose levels are not the application's: they are only kept enabled."""

_SILENT = logging.CRITICAL + 1


class SinkHandler(logging.Handler):
    """Formats records and hands them to a sink. Takes no lock: neither step needs one."""

    def __init__(self, sink: Sink, formatter: logging.Formatter) -> None:
        super().__init__()
        self.setFormatter(formatter)
        self._sink = sink

    def handle(self, record: logging.LogRecord) -> bool | logging.LogRecord:  # type: ignore[override,unused-ignore]
        # The handler's lock would make a signal handler that logs wait for itself.
        allowed = self.filter(record)
        if isinstance(allowed, logging.LogRecord):  # from 3.12 on
            record = allowed
        if allowed:
            self.emit(record)
        return allowed

    def emit(self, record: logging.LogRecord) -> None:
        if ACCESS_MARK in record.__dict__:
            return  # whose line it is wrote it, to its own sink
        try:
            line = self.format(record)
        except Exception as error:  # a formatter that was overridden; a fault of ours
            line = dumps(
                {"level": "ERROR", "message": f"a record was lost: {type(error).__name__}"}
            )
        self._sink.draw()
        self._sink.write(line, record.levelno >= logging.ERROR)

    def flush(self) -> None:
        # Not the sink's `flush`, which may wait: `logging.config` calls this in the middle of
        # serving. The sink has its own way out at exit.
        return None


def configure(
    settings: LoggingSettings,
    *,
    service: str,
    environment: str,
    sink: Sink,
    also: Iterable[str] = (),
    environ: Mapping[str, str] = os.environ,
    redact: Redact | None = None,
) -> Callable[[], None]:
    """Lead all application and server logs to `sink`. Returns the function that undoes it.

    - The root logger gets one handler of ours and the level of the settings. Handlers that write
      to standard output or error are taken off, as they would double every line; all others
      (files, Sentry, pytest's) stay.
    - `JOINED` loggers, and those named in `also`, lose console handlers of their own and propagate.
      One with a level below that of the settings is raised to it.
    - `SILENCED` loggers lose console handlers and do not propagate: uvicorn's then has no handler
      at all, which makes uvicorn skip its access log.
    - ``django.request`` is heard from ERROR on: its warnings repeat the access line.

    Call it again at any time, for instance when a server has configured logging after us: it
    repairs what was changed, and does nothing where nothing was. A sink after
    :meth:`Sink.shutdown` batches again. With several OpsGuards in a process the last call owns the
    root logger. Undoing restores handlers and levels, those found later included; the order of
    undoing doesn't matter. Thread-safe.
    """
    if console_wanted(settings, environment, sink):
        formatter: logging.Formatter = ConsoleFormatter(
            colour=colour_wanted(environ, sink), redact=redact
        )
    else:
        formatter = JsonFormatter(
            service=service,
            environment=environment,
            names=settings.names,
            nest_context=settings.nest_context,
            redact=redact,
        )
    level = logging.getLevelNamesMapping().get(settings.level.upper(), logging.INFO)
    layer = _Layer(sink, SinkHandler(sink, formatter), level, tuple(also))
    sink.resume()
    with _lock, set_aside():
        # The same sink again is a repair, not one more layer.
        _layers[:] = [other for other in _layers if other.sink is not sink]
        _layers.append(layer)
        _apply(layer)

    def undo() -> None:
        with _lock, set_aside():
            before = len(_layers)
            _layers[:] = [other for other in _layers if other.sink is not sink]
            if len(_layers) == before:
                return
            if _layers:
                _apply(_layers[-1])
            else:
                _restore()

    return undo


# The tree and what it was -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Layer:
    sink: Sink
    handler: SinkHandler
    level: int
    also: tuple[str, ...]


@dataclass(slots=True)
class _Before:
    """A logger as it was when we first touched it, and the handlers taken off since."""

    level: int
    propagate: bool
    disabled: bool
    removed: list[logging.Handler] = field(default_factory=list)
    set_level: int | None = None
    """The level we gave it; a level that somebody gave it later is left alone."""


_lock = threading.RLock()  # see `_after_fork`
_layers: list[_Layer] = []
_before: dict[str, _Before] = {}


def _apply(layer: _Layer) -> None:
    root = logging.getLogger()
    known = _touch(root)
    for handler in list(root.handlers):
        if isinstance(handler, SinkHandler):
            root.removeHandler(handler)
    _take_console_off(root, known)
    root.addHandler(layer.handler)
    _set_level(root, known, layer.level)

    for name in (*JOINED, *layer.also):
        logger = logging.getLogger(name)
        known = _touch(logger)
        _take_console_off(logger, known)
        logger.propagate = True
        logger.disabled = False
        lowest = logging.ERROR if name == "django.request" else layer.level
        original = logger.level if logger.level != known.set_level else known.level
        if name == "django.request" or 0 < original < lowest:
            _set_level(logger, known, max(original, lowest))
    for name in SILENCED:
        logger = logging.getLogger(name)
        known = _touch(logger)
        _take_console_off(logger, known)
        logger.propagate = False
        if not logger.handlers:
            _set_level(logger, known, _SILENT)
        elif logger.level == _SILENT:  # somebody attached a handler since
            _set_level(logger, known, known.level)

    for name in OURS:
        logging.getLogger(name).disabled = False
    werkzeug = logging.getLogger("werkzeug")
    if _no_access_line not in werkzeug.filters:
        werkzeug.addFilter(_no_access_line)


def _restore() -> None:
    logging.getLogger("werkzeug").removeFilter(_no_access_line)
    for name, known in _before.items():
        logger = logging.getLogger(name or None)
        for handler in list(logger.handlers):
            if isinstance(handler, SinkHandler):
                logger.removeHandler(handler)
        for handler in known.removed:
            logger.addHandler(handler)
        if known.set_level is None or logger.level == known.set_level:
            logger.setLevel(known.level)
        logger.propagate = known.propagate
        logger.disabled = known.disabled
    _before.clear()


def _touch(logger: logging.Logger) -> _Before:
    name = "" if logger is logging.getLogger() else logger.name
    if name not in _before:
        _before[name] = _Before(logger.level, logger.propagate, logger.disabled)
    return _before[name]


def _set_level(logger: logging.Logger, known: _Before, level: int) -> None:
    known.set_level = level
    if logger.level != level:
        logger.setLevel(level)


def _take_console_off(logger: logging.Logger, known: _Before) -> None:
    for handler in list(logger.handlers):
        if _writes_to_console(handler):
            logger.removeHandler(handler)
            known.removed.append(handler)


def _writes_to_console(handler: logging.Handler) -> bool:
    if not isinstance(handler, logging.StreamHandler) or isinstance(handler, logging.FileHandler):
        return False
    stream = handler.stream
    try:
        # Compared with ==, because Flask's is a proxy of the stream.
        if stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
            return True
        return stream.fileno() in (1, 2)
    except Exception:  # no descriptor, as a StringIO or a capture
        return False


def _no_access_line(record: logging.LogRecord) -> bool:
    """Werkzeug's development server logs its requests where it also says its address."""
    return not (
        record.levelno == logging.INFO
        and isinstance(record.msg, str)
        and " - - [" in record.msg
        and bool(record.args)
    )


def _after_fork() -> None:
    global _lock
    _lock = threading.RLock()  # another thread of the parent may have held it


in_each_child(_after_fork)
