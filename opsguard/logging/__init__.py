"""Logs: one JSON object per line, from every logger of the process, to one output.

- :func:`open_sink` makes the output, :func:`configure` leads the loggers to it,
- :func:`access_line` makes the function that writes the line of a request,
- :class:`Logger` takes keyword fields.
"""

from __future__ import annotations

from opsguard.logging.access import AccessLine, access_line, access_template
from opsguard.logging.batches import AccessLog
from opsguard.logging.formatters import ConsoleFormatter, JsonFormatter
from opsguard.logging.levels import Levels, level_of_name
from opsguard.logging.logger import Logger
from opsguard.logging.setup import configure
from opsguard.logging.sink import Sink, open_sink

__all__ = [
    "AccessLine",
    "AccessLog",
    "ConsoleFormatter",
    "JsonFormatter",
    "Levels",
    "Logger",
    "Sink",
    "access_line",
    "access_template",
    "configure",
    "level_of_name",
    "open_sink",
]
