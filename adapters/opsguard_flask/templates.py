"""Flask's rules in the common form of templates."""

from __future__ import annotations

import re
from functools import lru_cache

__all__ = ["template"]

_PARAMETER = re.compile(r"<(?:[^<>:]*(?:\([^()]*\))?:)?([^<>:]+)>")


@lru_cache(maxsize=4096)
def template(rule: str) -> str:
    """``/items/<int:id>`` as ``/items/{id}``; converters and their arguments say nothing here."""
    return _PARAMETER.sub(r"{\1}", rule)
