"""Where a key is needed, and which keys do.

A path of `keys.required` needs a key, and one of `keys.public` none. Where both match, the narrower
pattern counts (an exact path is narrower than any sub-tree), and of two equally narrow ones
`required`. A path in an odd spelling (`//x`, `/x/../y`, `/X`, `%2e`; see
:mod:`opsguard.patterns`) is required if any of its forms is, and never public.

A decorator on the handler counts more than a pattern. `require_key` needs a key also where the path
is public; `public` needs none also where the path is required. With both on one handler (its class
requires, a method is public), the key is needed: of two readings the one that shuts the door.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from opsguard.keys.identity import Identity
from opsguard.patterns import Patterns, exactness, is_plain

__all__ = ["KeyRequirement", "OpenRoutes", "Paths"]


@dataclass(frozen=True, slots=True)
class KeyRequirement:
    """What a caller must show: a key; of one of `tiers`, if there are any; with all `scopes`."""

    tiers: tuple[str, ...] = ()
    scopes: tuple[str, ...] = ()

    def tier_is_enough(self, identity: Identity) -> bool:
        return not self.tiers or identity.master or identity.tier in self.tiers

    def missing(self, identity: Identity) -> tuple[str, ...]:
        """The scopes that the identity lacks."""
        return tuple(scope for scope in self.scopes if not identity.has(scope))


class Paths:
    """The two lists of path patterns. Immutable.

    :raises ValueError: for a pattern that is none.
    """

    def __init__(self, required: Iterable[str], public: Iterable[str]) -> None:
        self._required = _narrowest_first(required)
        self._public = _narrowest_first(public)

    def __bool__(self) -> bool:
        """Whether a key is needed anywhere."""
        return bool(self._required)

    def need_key(self, path: str) -> bool:
        """Whether a request for this path needs a key, as far as the settings say."""
        required = self._required.first(path)
        if required is None:
            return False
        public = self._public.plain(path)
        return public is None or exactness(required) >= exactness(public)


class OpenRoutes:
    """The routes whose handlers are marked `public`, by template, as an app knows them once it
    starts: a path that could be one of theirs is let through to the route, which decides.

    Added to at start, read by all threads. Only paths in a plain spelling can match.
    """

    def __init__(self) -> None:
        self._patterns: dict[str, re.Pattern[str]] = {}

    def __bool__(self) -> bool:
        return bool(self._patterns)

    def add(self, template: str) -> None:
        pieces = re.split(r"\{[^}]*\}", template)
        self._patterns[template] = re.compile("[^/]+".join(map(re.escape, pieces)))

    def match(self, path: str) -> bool:
        return is_plain(path) and any(
            pattern.fullmatch(path) for pattern in list(self._patterns.values())
        )


def _narrowest_first(patterns: Iterable[str]) -> Patterns[str]:
    ordered = sorted(patterns, key=exactness, reverse=True)
    return Patterns([(pattern, pattern) for pattern in ordered])
