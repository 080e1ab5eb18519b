"""The WSGI or ASGI application of a project, guarded from outside."""

from __future__ import annotations

from typing import Any

import opsguard_asgi
import opsguard_wsgi
from opsguard import OpsGuard
from opsguard_django.project import project_ops

__all__ = ["install"]


def install(application: Any, ops: OpsGuard | None = None) -> Any:
    """Guard what ``get_wsgi_application()`` or ``get_asgi_application()`` gave; serve the result.

    The middleware alone sees what Django hands it. This sees all: requests that Django refuses
    before any middleware, lifespan, websockets, clients that leave. The middleware still names the
    routes; each request is counted once. Without `ops` the project's own is taken.
    """
    ops = ops if ops is not None else project_ops()
    if _is_asgi(application):
        return opsguard_asgi.install(application, ops)
    return opsguard_wsgi.install(application, ops)


def _is_asgi(application: Any) -> bool:
    from asgiref.sync import iscoroutinefunction

    return iscoroutinefunction(application) or iscoroutinefunction(
        getattr(application, "__call__", None)  # noqa: B004 - the method itself is asked for
    )
