"""The logger people use: a standard logger that takes keyword fields."""

from __future__ import annotations

import logging
from typing import Any

from opsguard.logging.formatters import FIELDS

__all__ = ["Logger"]


class Logger:
    """A thin wrapper around ``logging.getLogger(name)``, with the same handlers and levels.

    ::

        log = ops.logger(__name__)
        log.info("Operation started", operation="train_model")
        log.error("It failed", error=exc)  # logs the exception with its stack

    Keyword arguments become fields of the line, except `exc_info`, `stack_info`, `stacklevel` and
    `extra`, which mean what they mean in :mod:`logging`, and `error` if it is an exception.
    ``%`` arguments work as usual. Immutable and thread-safe.
    """

    __slots__ = ("_fields", "stdlib")

    def __init__(self, name: str, fields: dict[str, object] | None = None) -> None:
        self.stdlib = logging.getLogger(name)
        """The standard logger behind it, for handlers, filters and levels."""
        self._fields = fields or {}

    @property
    def name(self) -> str:
        return self.stdlib.name

    def bind(self, /, **fields: object) -> Logger:
        """A logger of the same name whose lines all have these fields as well."""
        return Logger(self.stdlib.name, {**self._fields, **fields})

    def debug(self, message: object, /, *args: object, **fields: Any) -> None:
        if self.stdlib.isEnabledFor(logging.DEBUG):
            self._emit(logging.DEBUG, message, args, fields)

    def info(self, message: object, /, *args: object, **fields: Any) -> None:
        if self.stdlib.isEnabledFor(logging.INFO):
            self._emit(logging.INFO, message, args, fields)

    def warning(self, message: object, /, *args: object, **fields: Any) -> None:
        if self.stdlib.isEnabledFor(logging.WARNING):
            self._emit(logging.WARNING, message, args, fields)

    def error(self, message: object, /, *args: object, **fields: Any) -> None:
        if self.stdlib.isEnabledFor(logging.ERROR):
            self._emit(logging.ERROR, message, args, fields)

    def critical(self, message: object, /, *args: object, **fields: Any) -> None:
        if self.stdlib.isEnabledFor(logging.CRITICAL):
            self._emit(logging.CRITICAL, message, args, fields)

    def exception(self, message: object, /, *args: object, **fields: Any) -> None:
        """`error` with the exception being handled."""
        if self.stdlib.isEnabledFor(logging.ERROR):
            fields.setdefault("exc_info", not isinstance(fields.get("error"), BaseException))
            self._emit(logging.ERROR, message, args, fields)

    def log(self, level: int, message: object, /, *args: object, **fields: Any) -> None:
        if self.stdlib.isEnabledFor(level):
            self._emit(level, message, args, fields)

    def _emit(
        self, level: int, message: object, args: tuple[object, ...], fields: dict[str, Any]
    ) -> None:
        exc_info = fields.pop("exc_info", None)
        if not exc_info and isinstance(fields.get("error"), BaseException):
            exc_info = fields.pop("error")
        stack_info = bool(fields.pop("stack_info", False))
        # Past this method and the one that called it.
        stacklevel = int(fields.pop("stacklevel", 1)) + 2
        extra = fields.pop("extra", None)
        self.stdlib.log(
            level,
            message,
            *args,
            exc_info=exc_info,
            stack_info=stack_info,
            stacklevel=stacklevel,
            extra={**(extra or {}), FIELDS: {**self._fields, **fields}},
        )

    def __repr__(self) -> str:
        return f"Logger({self.stdlib.name!r})"
