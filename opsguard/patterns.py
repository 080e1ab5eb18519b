"""Path patterns of the settings: which rule counts for a path, however the path is spelled.

A pattern is an exact path (``/login``), a sub-tree (``/admin/*``: ``/admin`` and everything below
it) or everything (``*``). The path it is held against is the one the router sees, decoded once.

A client chooses the spelling of a path, and routers differ in what they forgive: one merges
slashes, one drops a final slash, a file server resolves dots. So a path counts under every form
that some router could give it (:func:`forms`): as it stands, with slashes merged and escapes
decoded, and with dot segments resolved; always without a final slash, and case folded. Whatever
restricts is looked up with `first` or `each` and cannot be dodged by spelling. Whatever loosens
(public, exempt) is looked up with `plain`, which knows only the spelling in the pattern.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Generic, TypeVar
from urllib.parse import unquote

__all__ = ["Patterns", "check", "exactness", "forms", "is_plain"]

T = TypeVar("T")

_ODD = re.compile(
    r"\A(?!/)"  # no path at all, or the * of OPTIONS
    r"|//|/\.\.?(?:/|\Z)"  # empty and dot segments
    r"|%[0-9A-Fa-f]{2}|\\"  # decoded a second time, or read by Windows
    r"|[\x00-\x1f\x7f]"
)
_ESCAPED_PERCENT = re.compile(r"%(?:25)+(?=[0-9A-Fa-f]{2})")
_DECODED_AT_MOST = 3  # times; nobody decodes more often, and each costs a pass over the path
_REMEMBERED = 1024  # paths
_REMEMBERED_LENGTH = 256  # characters: so they take 0.3 MB or less


class Patterns(Generic[T]):
    """(pattern, value) pairs, in the order in which they count: the first match wins.

    Immutable but for a bounded memory of the paths asked last; for all threads. A look-up takes
    time in proportion to the path and to the number of sub-trees, never more.

    :raises ValueError: for a pattern that could not match what its author meant; see `check`.
    """

    __slots__ = ("_exact", "_literal", "_seen", "_trees")

    def __init__(self, entries: Sequence[tuple[str, T]]) -> None:
        self._exact: dict[str, int] = {}
        trees: list[tuple[int, str]] = []
        self._literal = tuple(entries)
        for at, (pattern, _) in enumerate(self._literal):
            check(pattern)
            root = _root(pattern)
            if root is None:
                self._exact.setdefault(_folded(pattern), at)
            else:
                trees.append((at, f"{_folded(root)}/" if root else ""))
        self._trees = tuple(trees)
        self._seen: dict[str, tuple[T, ...]] = {}

    def __bool__(self) -> bool:
        return bool(self._literal)

    def first(self, path: str) -> T | None:
        """The value of the first entry that matches the path in any of its forms."""
        found = self._seen.get(path)
        if found is None:
            found = self.each(path)
        return found[0] if found else None

    def each(self, path: str) -> tuple[T, ...]:
        """What `first` gives, and behind it what the path's other forms would be given, each
        value once: to be counted together where it is not enough to obey the first. More than
        one only for a path in an odd spelling, as in ``/admin/../login``.
        """
        found = self._seen.get(path)
        if found is None:
            places = {self._place(form) for form in forms(path)}
            found = tuple(self._literal[at][1] for at in sorted(places) if at >= 0)
            if len(path) <= _REMEMBERED_LENGTH:
                if len(self._seen) >= _REMEMBERED:
                    self._seen.clear()
                self._seen[path] = found
        return found

    def plain(self, path: str) -> T | None:
        """The value of the first entry whose pattern is spelled like the path; None for every
        path in an odd spelling. For rules that open a door.
        """
        if not is_plain(path):
            return None
        for pattern, value in self._literal:
            root = _root(pattern)
            if path == (pattern if root is None else root):
                return value
            if root is not None and path.startswith(root + "/"):
                return value
        return None

    def _place(self, form: str) -> int:
        """The place of the first entry that matches this form; -1 for none."""
        exact = self._exact.get(form, -1)
        below = form + "/"
        for at, tree in self._trees:
            if 0 <= exact < at:
                return exact
            if below.startswith(tree):
                return at
        return exact


def check(pattern: str) -> None:
    """Whether this is a pattern at all.

    :raises ValueError: for one that matches nothing or not what it seems to say.
    """
    if pattern == "*":
        return
    path = "/" if pattern == "/*" else pattern.removesuffix("/*")
    if not path.startswith("/"):
        raise ValueError(f"the path pattern {pattern!r} must start with / or be *")
    if "*" in path:
        raise ValueError(f"the path pattern {pattern!r} may have a * only at its end, after a /")
    if not is_plain(path):
        raise ValueError(
            f"the path pattern {pattern!r} must be a plain path: decoded, without empty or dot "
            "segments, backslashes and control characters"
        )
    if wrong := re.search(r"[?#{}<>]", path):
        raise ValueError(
            f"the path pattern {pattern!r} has a {wrong[0]}: patterns match the path of a request, "
            "without query, and not a route's template; for a sub-tree write /items/*"
        )


def is_plain(path: str) -> bool:
    """Whether every router reads this path alike, but for case and a final slash."""
    return _ODD.search(path) is None


def forms(path: str) -> tuple[str, ...]:
    """What routers could make of a path: case folded, without a final slash, the root being ``""``.
    The first is the path as it stands; a plain path has no other.
    """
    as_it_stands = _folded(path)
    if is_plain(path):
        return (as_it_stands,)
    decoded = path
    for _ in range(_DECODED_AT_MOST):
        if "%" not in decoded:
            break
        decoded = unquote(_ESCAPED_PERCENT.sub("%", decoded))
    segments = decoded.replace("\\", "/").split("/")
    named = [segment for segment in segments if segment]
    found = (
        as_it_stands,
        _folded("".join(f"/{segment}" for segment in named)),
        _folded(_resolved(named)),
        _folded(_resolved(segments)),  # by RFC 3986 5.2.4 an empty segment is one, too
    )
    return tuple(dict.fromkeys(found))


def exactness(pattern: str) -> int:
    """How narrow a pattern is, for rules of which the narrower wins: an exact path is above every
    sub-tree, a longer sub-tree above a shorter, ``*`` below all.
    """
    root = _root(pattern)
    return 1 << 32 if root is None else len(root)


def _root(pattern: str) -> str | None:
    """The root of a sub-tree, without a final slash; None for an exact path."""
    if pattern == "*":
        return ""
    return pattern[:-2] if pattern.endswith("/*") else None


def _folded(path: str) -> str:
    return path.rstrip("/").casefold()


def _resolved(segments: Sequence[str]) -> str:
    kept: list[str] = []
    for segment in segments:
        if segment == "..":
            if kept:
                kept.pop()
        elif segment != ".":
            kept.append(segment)
    return "".join(f"/{segment}" for segment in kept if segment)
