"""What a server, or Django between two protocols, does otherwise than the contract's table says.

All of it is theirs: the bare app shows the same. What we do otherwise has no place here.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from tests.contract.scenarios import SCENARIOS, UNMATCHED, Expected, Scenario

__all__ = ["DIFFERENCES", "Differs", "expected_of", "is_served"]


@dataclass(frozen=True, slots=True)
class Differs:
    """One scenario that comes out otherwise with these servers or apps, and why."""

    scenario: str
    where: tuple[str, ...]
    why: str
    values: dict[str, Any] | None = field(default=None)
    """Of Expected; None: it cannot be served there at all."""


MIDWAY = "counts an exception in mid-stream under the status that was sent"
LEAVES = "records a client that leaves as 499"
UPLOADS = "records a client that leaves while it uploads as 499"

DIFFERENCES = (
    Differs(
        "counts unknown methods together",
        ("uvicorn-httptools", "gunicorn-uvicorn"),
        "llhttp refuses methods that it does not know, before any app",
    ),
    Differs("writes by write()", ("granian-wsgi",), "granian has no write()"),
    Differs(
        MIDWAY,
        ("granian-wsgi",),
        "granian ends the answer of a WSGI app that failed as if it were whole",
        {"raises": None, "body": b"abcdef"},
    ),
    Differs(
        MIDWAY,
        ("django-under-asgi", "django-async-under-wsgi"),
        "Django reads a stream of the other kind to its end before it sends any of it",
    ),
    Differs(
        LEAVES,
        ("django-under-asgi", "django-async-under-wsgi"),
        "Django reads a stream of the other kind to its end, and this one has none",
    ),
    Differs(
        UPLOADS,
        ("django-async-outside",),
        "an edge outside of Django sees what Django keeps from its middleware",
        {"logged": True, "endpoint": UNMATCHED},
    ),
    Differs(
        "reads a body without a length",
        ("django-async-outside",),
        "an edge outside of Django sees what Django keeps from its middleware",
        {"received": 500},
    ),
)


def is_served(server: str, app: str, scenario: Scenario) -> bool:
    """Whether this server can serve the scenario at all."""
    found = _difference(server, app, scenario)
    return found is None or found.values is not None


def expected_of(server: str, app: str, adapter: str, scenario: Scenario) -> Expected:
    """What comes of the scenario there."""
    found = _difference(server, app, scenario)
    return replace(scenario.expect(adapter), **((found and found.values) or {}))


def _difference(server: str, app: str, scenario: Scenario) -> Differs | None:
    for found in DIFFERENCES:
        if found.scenario == scenario.name and (server in found.where or app in found.where):
            return found
    return None


def unknown_scenarios() -> set[str]:
    """Names in this list that the table does not have (any more)."""
    return {found.scenario for found in DIFFERENCES} - {found.name for found in SCENARIOS}
