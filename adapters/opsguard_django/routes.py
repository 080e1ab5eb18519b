"""The routes of a Django project, listed from its URLconfs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from django.conf import settings
from django.core.signals import request_started
from django.urls import URLResolver, get_resolver

from opsguard.inspection import Served, announce, insist, open_public
from opsguard.runtime import Runtime
from opsguard_django.templates import template

__all__ = ["announce_routes", "project_routes"]

_VERBS = ("get", "post", "put", "patch", "delete")


def announce_routes(runtime: Runtime) -> None:
    """See that every mark is on a route, now that the handler loads and all routes are known, and
    tell the edge, which may be outside of Django, the public ones. What is limited is said when the
    first request is there, as a module that makes a handler may be imported for other ends.

    A project whose middleware sets ``request.urlconf`` names these URLconfs in
    ``OPSGUARD_URLCONFS``. One that cannot be imported is Django's to complain about.

    :raises DeclarationError: for limits and required keys that no route carries.
    """
    try:
        routes = list(project_routes())
    except Exception as fault:
        runtime.failures.report("routes", fault)
        return
    insist(runtime, routes)
    open_public(runtime, routes)
    name = f"opsguard.announce.{id(runtime)}"

    def say(sender: object, **_: object) -> None:
        request_started.disconnect(dispatch_uid=name)
        announce(runtime, routes)

    request_started.connect(say, weak=False, dispatch_uid=name)


def project_routes() -> Iterator[Served]:
    """Every route of the project, by the template that requests are named with."""
    urlconfs = [settings.ROOT_URLCONF, *getattr(settings, "OPSGUARD_URLCONFS", ())]
    for urlconf in urlconfs:
        yield from _served(get_resolver(urlconf).url_patterns, "")


def _served(patterns: Iterable[Any], prefix: str) -> Iterator[Served]:
    for pattern in patterns:
        route = _joined(prefix, str(pattern.pattern))
        if isinstance(pattern, URLResolver):
            yield from _served(pattern.url_patterns, route)
            continue
        for method in _methods(pattern.callback):
            yield Served(template(route), method, pattern.callback)


def _joined(prefix: str, route: str) -> str:
    """As Django's resolver joins what a `ResolverMatch` calls its route."""
    return prefix + route[1:] if prefix and route.startswith("^") else prefix + route


def _methods(view: Any) -> Iterable[str]:
    """Those of a class-based view or a view set; a function is called for all."""
    actions = getattr(view, "actions", None)  # of Django REST framework, by method
    if isinstance(actions, Mapping):
        return [verb.upper() for verb in actions if verb in _VERBS]
    view_class = getattr(view, "view_class", None)
    return [verb.upper() for verb in _VERBS if hasattr(view_class, verb)] or ["*"]
