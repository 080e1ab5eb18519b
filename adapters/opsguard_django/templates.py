"""Django's routes in the common form of templates."""

from __future__ import annotations

import re
from functools import lru_cache

from django.contrib.admindocs.utils import (
    replace_metacharacters,
    replace_named_groups,
    replace_unnamed_groups,
)

__all__ = ["template"]

_PARAMETER = re.compile(r"<(?:[^<>:]*:)?([^<>:]+)>")
_EXPRESSION = re.compile(r"[\\^$(]")


@lru_cache(maxsize=4096)
def template(route: str) -> str:
    r"""``items/<int:id>/`` as ``/items/{id}/``, and ``^articles/(?P<year>[0-9]{4})/$`` as
    ``/articles/{year}/``; a group without a name is ``{var}``.
    """
    if _EXPRESSION.search(route):
        route = replace_metacharacters(replace_unnamed_groups(replace_named_groups(route)))
    return "/" + _PARAMETER.sub(r"{\1}", route).lstrip("/")
