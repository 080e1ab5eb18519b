"""opsguard for raw ASGI apps: ``app = install(app, ops)``.

The adapters of frameworks stand on `serve`.
"""

from __future__ import annotations

from typing import Any

from opsguard import OpsGuard
from opsguard.calls import Front, straight
from opsguard.inspection import announce
from opsguard_asgi.edge import instead_of, refuse, send_response, serve
from opsguard_asgi.labels import label
from opsguard_asgi.types import KEY, PROTOCOL, ASGIApp, Label, Receive, Scope, Send
from opsguard_asgi.work import off_loop

__all__ = [
    "KEY",
    "PROTOCOL",
    "Guarded",
    "install",
    "instead_of",
    "off_loop",
    "refuse",
    "send_response",
    "serve",
]


@straight
class Guarded(Front):
    """A guarded ASGI app; the attributes of the app it guards can be reached through it."""

    def __init__(self, app: ASGIApp, ops: OpsGuard, endpoint: Label | None) -> None:
        title = getattr(app, "title", None)
        runtime = ops.runtime(title if isinstance(title, str) else None)
        self.app = app
        self.ops = ops
        self._guarded = serve(app, runtime.port(PROTOCOL), endpoint=endpoint, label=label)
        self._serve = self._first

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._serve(scope, receive, send)

    async def _first(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The server has started: say what is limited, unless a framework's adapter does."""
        self._serve = self._guarded
        runtime = self.ops.runtime()
        if not runtime.sources:
            announce(runtime, None)
        await self._guarded(scope, receive, send)

    def __getattr__(self, name: str) -> Any:
        if name == "app":  # not set yet: while being copied or unpickled
            raise AttributeError(name)
        return getattr(self.app, name)


def install(app: ASGIApp, ops: OpsGuard, *, endpoint: Label | None = None) -> Guarded:
    """Guard an ASGI 3 app; serve what this returns instead of `app`.

    `endpoint` names the route of a scope, as a template such as ``"/items/{id}"``, or returns None
    where there is none. Without it, the templates that Litestar and Starlette leave in the scope
    are taken. Raises SettingsError.
    """
    return Guarded(app, ops, endpoint)
