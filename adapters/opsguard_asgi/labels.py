"""Route templates that frameworks leave in the scope, for apps installed without `endpoint=`."""

from __future__ import annotations

from typing import Any

from opsguard_asgi.types import Scope

__all__ = ["label"]


def label(scope: Scope) -> str | None:
    """The template of the matched route: Litestar's ``path_template``, else the ``path_format`` of
    the route that Starlette leaves. None where there is none, or where a mount stands before it:
    then only its adapter knows the whole template.
    """
    template: Any = scope.get("path_template")
    if template is None and scope.get("app_root_path", scope.get("root_path")) == scope.get(
        "root_path"
    ):
        template = getattr(scope.get("route"), "path_format", None)
    return template if isinstance(template, str) else None
