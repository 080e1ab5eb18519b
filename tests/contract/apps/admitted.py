"""What the apps with keys and limits have in common: the same handlers in every framework.

Each app has these paths; what a path is decorated with is in its name. Every handler notes that it
ran, so that a refusal can be seen to have come before it.
"""

from __future__ import annotations

import contextvars
import functools
import json
import threading
from collections.abc import Callable
from importlib import import_module
from typing import Any

from opsguard import OpsGuard
from opsguard.exceptions import Refused

MODULES = {
    "asgi": ("admitted_raw", "make_asgi"),
    "wsgi": ("admitted_raw", "make_wsgi"),
    "fastapi": ("admitted_fastapi", "make"),
    "flask": ("admitted_flask", "make"),
    "django": ("admitted_django", "make"),
    "django-async": ("admitted_django", "make_async"),
}
OPEN = (
    *("/open", "/auth/login", "/chat", "/health", "/predict/revenue-lstm", "/docs", "/"),
    *("/openapi.json", "/admin/users", "/admin/open"),
)
"""Paths of handlers that nothing is decorated with."""


class Boom(Exception):
    """What the apps raise."""


class Desk:
    """The decorators of one app under test, and what its handlers saw."""

    def __init__(self, ops: OpsGuard) -> None:
        self.ops = ops
        self.calls: list[str] = []
        self.cost: Callable[[], object] = lambda: 1
        self.key: Callable[[], object] = lambda: "one"
        self.later: list[str] = []
        self.later_done = threading.Event()
        self.entered = threading.Event()
        self.leave = threading.Event()
        limit = ops.limit
        slot = functools.partial(limit, "1/minute", strategy="concurrency")
        self.decorators: dict[str, Callable[[Any], Any]] = {
            "/limited": limit("2/minute"),
            "/sync": limit("2/minute"),
            "/method": limit("2/minute"),
            "/api/v1/things/{id}": limit("2/minute"),
            "/wrapped": limit("2/minute"),
            "/upload": limit("2/minute"),
            "/several": limit("3/minute; 100/hour"),
            "/stacked": lambda handler: limit("3/minute")(limit("2/minute")(handler)),
            "/shared/a": limit("2/minute", scope="together"),
            "/shared/b": limit("2/minute", scope="together"),
            "/cost": limit("10/minute", cost=lambda: self.cost()),
            "/three": limit("10/minute", cost=3),
            "/key": limit("1/minute", key=lambda: self.key()),
            "/tenant": limit("1/minute", key="tenant"),
            "/exempt": ops.exempt,
            "/shadow": limit("1/minute", shadow=True),
            "/deny": limit("100/minute", on_store_error="deny"),
            "/allow": limit("1/minute", on_store_error="allow"),
            "/slot": slot(),
            "/slot/boom": slot(),
            "/slot/stream": slot(),
            "/slot/endless": slot(),
            "/keyed": ops.require_key,
            "/pro": ops.require_key(tiers=("pro", "enterprise")),
            "/scoped": ops.require_key(scopes=("write",)),
            "/keyed-slot": lambda handler: slot()(ops.require_key(tiers=("pro",))(handler)),
            "/admin/public": ops.public,
        }

    def ran(self, path: str) -> str:
        """A handler ran: what it answers."""
        self.calls.append(path)
        return "ran"

    def who(self) -> str:
        """The identity as the handler knows it, as JSON."""
        found = self.ops.identity()
        return json.dumps(None if found is None else [found.key_id, found.tenant_id, found.tier])

    def who_in_a_thread(self) -> str:
        found: list[str] = []
        context = contextvars.copy_context()
        worker = threading.Thread(target=lambda: found.append(context.run(self.who)))
        worker.start()
        worker.join()
        return found[0]

    def ask_twice(self) -> str:
        """What a function under `require_key` gives a handler that catches its refusal, as JSON."""
        # Decorated here, as Django wants each mark that it knows at start on a route.
        secret: Callable[[], str] = self.ops.require_key(lambda: "secret")

        def ask() -> int | str:
            try:
                return secret()
            except Refused as refusal:
                return refusal.response.status

        return json.dumps([ask(), ask()])

    def after(self) -> None:
        """The background work."""
        self.later.append(self.who())
        self.later_done.set()

    def plainly(self, path: str) -> str:
        """What a handler without anything special answers."""
        if path == "/who":
            return self.who()
        if path == "/who/thread":
            return self.who_in_a_thread()
        if path == "/who/twice":
            return self.ask_twice()
        if path == "/slot/boom":
            self.calls.append(path)
            raise Boom("boom")
        return self.ran(path)


ODD = (
    *("/slot/stream", "/slot/endless", "/who/background", "/api/v1/things/{id}"),
    *("/upload", "/method", "/wrapped", "/sync"),
)
"""Paths whose handlers each framework writes in its own way."""


def plain_paths(desk: Desk) -> list[str]:
    """The paths with handlers that are alike."""
    return [
        *[path for path in desk.decorators if path not in ODD],
        *OPEN,
        *("/who", "/who/thread", "/who/twice"),
    ]


def same(handler: Any) -> Any:
    """The decorator that does nothing."""
    return handler


def make(adapter: str, desk: Desk, **options: Any) -> Any:
    """The app of this adapter, guarded. `late`: its routes are declared after install()."""
    module, name = MODULES[adapter]
    return getattr(import_module(f"tests.contract.apps.{module}"), name)(desk, **options)
