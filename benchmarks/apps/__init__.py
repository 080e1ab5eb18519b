"""The apps under test: a JSON handler and a Fortunes page in each framework.

`make_all` builds the variants of one framework's app that a process compares:

``bare``     the app as its authors would deploy it
``twin``     the same, built again: for the control that must read 0
``planted``  the bare app with a known cost: for the control that must read it
``guarded``  with opsguard, everything on that is on by default
``guarded again``  the same, built again
``frame``, ``frame and metrics``, ``frame and line``: with a part of opsguard (not for Django)
``limit by path``, ``limit by default``, ``limit by decorator``, ``key``, ``limits and keys``:
             with these on top (Django: of the guarded variants one in a process)
``limiter``  the bare app with the rate limiter that people take for this framework
``peers``    with the packages people glue together today (see `benchmarks.peers`)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from benchmarks import guarding, peers
from benchmarks.planted import planted_asgi, planted_wsgi

Protocol = Literal["asgi", "wsgi"]
PROTOCOLS: dict[str, Protocol] = {
    "fastapi": "asgi",
    "flask": "wsgi",
    "django": "wsgi",
    "django-asgi": "asgi",
    "asgi": "asgi",
    "wsgi": "wsgi",
}


@dataclass(frozen=True, slots=True)
class Served:
    """An app ready to serve. ``drain`` finishes what its requests left for later."""

    app: Any
    protocol: Protocol
    drain: Callable[[], object]

    @property
    def sink(self) -> Any:
        """Where the access lines go; None without opsguard."""
        return getattr(self.drain, "__self__", None)


def make_all(framework: str, variants: Sequence[str]) -> dict[str, Served]:
    """Build these variants of one framework's app, to live side by side in this process."""
    protocol = PROTOCOLS[framework]
    if framework.startswith("django"):
        from benchmarks.apps import django_site

        django_site.configure(framework, variants)
    return {variant: _make(framework, protocol, variant) for variant in variants}


def _make(framework: str, protocol: Protocol, variant: str) -> Served:
    if variant in guarding.VARIANTS:
        app, drain = guarding.guarded(
            framework, lambda around: _build(framework, "guarded", around), variant
        )
        return Served(app, protocol, drain)
    if variant == "limiter":
        return Served(peers.limited(framework), protocol, lambda: None)
    app = _build(framework, variant)
    if variant == "peers":
        app = peers.glued(framework, app)
    elif variant == "planted":
        app = planted_asgi(app) if protocol == "asgi" else planted_wsgi(app)
    return Served(app, protocol, lambda: None)


def _build(framework: str, variant: str, around: guarding.Around | None = None) -> Any:
    """The framework's app, its JSON handler decorated with `around`.

    Only Django needs to know the variant: its middleware is a setting.
    """
    if framework == "fastapi":
        from benchmarks.apps import fastapi_app

        return fastapi_app.build(around)
    if framework == "flask":
        from benchmarks.apps import flask_app

        return flask_app.build(around)
    if framework == "asgi":
        from benchmarks.apps import asgi_app

        return asgi_app.app
    if framework == "wsgi":
        from benchmarks.apps import wsgi_app

        return wsgi_app.app
    from benchmarks.apps import django_site

    return django_site.handler(framework, variant)
