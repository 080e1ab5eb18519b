"""The words of error messages: what was wrong with a value, and which name was meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["nearest", "reason", "shown"]

_REASONS = {
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "int_parsing": "must be a whole number",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "string_type": "must be text",
    "tuple_type": "must be a list",
    "dict_type": "must be a mapping",
}
"""Pydantic's error types in words for an operator."""


def reason(kind: str, message: str) -> str:
    """Why a value is wrong, from the type and message of pydantic's error: "must be a number"."""
    words = message.removeprefix("Value error, ").replace("Input should", "must", 1)
    return _REASONS.get(kind, words)


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the most similar known one, or nothing."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def shown(value: object) -> str:
    """The value in at most 80 characters. Secrets are not masked here."""
    try:
        text = repr(value)
    except Exception:  # a value's own repr is not ours to trust
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 80 else f"{text[:77]}..."
