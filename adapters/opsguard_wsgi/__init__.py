"""opsguard for raw WSGI apps: ``app = install(app, ops)``.

The adapters of frameworks stand on `serve`.
"""

from __future__ import annotations

from typing import Any

from opsguard import OpsGuard
from opsguard.calls import Front, straight
from opsguard.inspection import announce
from opsguard_wsgi.edge import serve
from opsguard_wsgi.types import KEY, PROTOCOL, ROOT, Environ, Label, StartResponse, WSGIApp

__all__ = ["KEY", "PROTOCOL", "ROOT", "Guarded", "install", "serve"]


@straight
class Guarded(Front):
    """A guarded WSGI app; the attributes of the app it guards can be reached through it."""

    def __init__(self, app: WSGIApp, ops: OpsGuard, endpoint: Label | None) -> None:
        self.app = app
        self.ops = ops
        runtime = ops.runtime()
        self._guarded = serve(app, runtime.port(PROTOCOL), endpoint=endpoint)
        self._serve = self._first

    def __call__(self, environ: Environ, start_response: StartResponse) -> Any:
        return self._serve(environ, start_response)

    def _first(self, environ: Environ, start_response: StartResponse) -> Any:
        """The server has started: say what is limited, unless a framework's adapter does."""
        self._serve = self._guarded
        runtime = self.ops.runtime()
        if not runtime.sources:
            announce(runtime, None)
        return self._guarded(environ, start_response)

    def __getattr__(self, name: str) -> Any:
        if name == "app":  # not set yet: while being copied or unpickled
            raise AttributeError(name)
        return getattr(self.app, name)


def install(app: WSGIApp, ops: OpsGuard, *, endpoint: Label | None = None) -> Guarded:
    """Guard a WSGI app (PEP 3333); serve what this returns instead of `app`.

    `endpoint` names the route of an environ, as a template such as ``"/items/{id}"``, or returns
    None where there is none. Raises SettingsError.
    """
    return Guarded(app, ops, endpoint)
