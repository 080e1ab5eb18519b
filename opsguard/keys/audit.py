"""One line for each key event, to the logger `opsguard.audit`: what happened to which key, never
the key itself.

Creating, revoking and rotating are rare, and each is written. The use of the master key and
refused floods come as often as a client likes: of these at most `LINES` a minute are written, and
the next line says how many were not.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from opsguard.clock import Clock

__all__ = ["LOGGER", "Audit"]

LOGGER: Final = "opsguard.audit"
NOTHING: Final[Mapping[str, object]] = MappingProxyType({})
LINES = 60  # a minute, of one kind
_MINUTE = 60.0


class Audit:
    """Writes audit lines. Thread-safe: two threads at the end of a minute may write a line more.

    `always` are fields of every line: `who` and `how` of a command in a shell.
    """

    def __init__(self, clock: Clock, always: Mapping[str, object] = NOTHING) -> None:
        self._clock = clock
        self._always = always
        self._log = logging.getLogger(LOGGER)
        if self._log.level == logging.NOTSET:
            self._log.setLevel(logging.INFO)  # LOG_LEVEL=ERROR is no wish to lose these
        self._minutes: dict[str, tuple[float, int]] = {}

    def event(self, event: str, message: str, **fields: object) -> None:
        """Write a line with these fields. A None is left out."""
        fields = {**fields, **self._always}
        said = {name: value for name, value in fields.items() if value is not None}
        self._log.info("%s", message, extra={"event": event, **said})

    def often(self, event: str, message: str, **fields: object) -> None:
        """`event`, for what a client can do as often as it likes."""
        now = self._clock()
        began, lines = self._minutes.get(event, (now, 0))
        if now - began >= _MINUTE:
            began, lines, fields = now, 0, {**fields, "suppressed": max(0, lines - LINES) or None}
        self._minutes[event] = (began, lines + 1)
        if lines < LINES:
            self.event(event, message, **fields)
