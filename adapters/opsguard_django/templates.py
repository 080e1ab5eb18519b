"""Django's routes in the common form of templates."""

from __future__ import annotations

import re
from functools import lru_cache

__all__ = ["template"]

_PARAMETER = re.compile(r"<(?:[^<>:]*:)?([^<>:]+)>")
_EXPRESSION = re.compile(r"[\\^$(]")
_NAMED = re.compile(r"\(\?P<(\w+)>")
_CLASSES = frozenset("AbBdDsSwWZ")
_MARKS = frozenset("^$?*+")


@lru_cache(maxsize=4096)
def template(route: str) -> str:
    r"""``items/<int:id>/`` as ``/items/{id}/``, and ``^articles/(?P<year>[0-9]{4})/$`` as
    ``/articles/{year}/``; a group without a name is ``{var}``.
    """
    if _EXPRESSION.search(route):
        route = _plain(route)
    return "/" + _PARAMETER.sub(r"{\1}", route).lstrip("/")


def _plain(expression: str) -> str:
    """A regular expression as the path it stands for, its groups as parameters."""
    found: list[str] = []
    at = 0
    while at < len(expression):
        mark = expression[at]
        if mark == "(":
            end = _end_of_group(expression, at)
            found.append(_group(expression[at:end]))
            at = end
        elif mark == "\\" and at + 1 < len(expression):
            found.append("" if expression[at + 1] in _CLASSES else expression[at + 1])
            at += 2
        else:
            found.append("" if mark in _MARKS else mark)
            at += 1
    return "".join(found)


def _group(group: str) -> str:
    named = _NAMED.match(group)
    if named is not None:
        return f"{{{named[1]}}}"
    if group.startswith("(?:"):
        return _plain(group[3:-1])
    return "" if group.startswith("(?") else "{var}"


def _end_of_group(expression: str, start: int) -> int:
    """The index behind the parenthesis that closes the one at `start`."""
    depth, at, in_class = 0, start, False
    while at < len(expression):
        mark = expression[at]
        if mark == "\\":
            at += 1
        elif in_class or mark == "[":
            in_class = mark != "]"
        elif mark in "()":
            depth += 1 if mark == "(" else -1
        at += 1
        if depth == 0:
            break
    return at
