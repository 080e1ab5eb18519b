"""Builds the contract's apps, sends requests in process, and reads what was recorded."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from opsguard import OpsGuard
from opsguard.testing import Answer, Request, call_asgi, call_wsgi
from tests.contract.apps.shop import Shop, declare
from tests.contract.scenarios import ASGI, Scenario

MODULES = {
    "asgi": ("asgi", "make"),
    "wsgi": ("wsgi", "make"),
    "fastapi": ("fastapi_app", "make"),
    "flask": ("flask_app", "make"),
    "django": ("django_app", "make"),
    "django-async": ("django_app", "make_async"),
}


def maker(adapter: str) -> Callable[[Shop, OpsGuard | None], Any]:
    module, name = MODULES[adapter]
    made: Callable[[Shop, OpsGuard | None], Any] = getattr(
        import_module(f"tests.contract.apps.{module}"), name
    )
    return made


Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


@dataclass
class Guarded:
    """A guarded app with its OpsGuard, and eyes for what it recorded."""

    adapter: str
    ops: OpsGuard
    shop: Shop
    app: Any
    log: Path

    def send(self, request: Request) -> Answer:
        return send(self.adapter, self.app, request)

    def lines(self) -> list[dict[str, Any]]:
        """The access lines."""
        self.ops.runtime().sink.flush()
        if not self.log.exists():
            return []
        lines = [json.loads(line) for line in self.log.read_text().splitlines()]
        return [line for line in lines if line.get("logger") == "opsguard.access"]

    def samples(self) -> Samples:
        """The samples of our own metrics, zeros left out."""
        texts = "".join([text for _, text in self.ops.metrics.expose(False)])
        return parse(texts)


def parse(texts: str) -> Samples:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(texts)
        for sample in family.samples
        if sample.value
    }


def guard(adapter: str, folder: Path, **settings: Any) -> Guarded:
    """A new app of this adapter, guarded by an OpsGuard of its own."""
    log = folder / "log.jsonl"
    given = {"logging": {"file": str(log)}, "metrics": {"directory": str(folder)}}
    for group, values in settings.items():
        given[group] = {**given.get(group, {}), **values}
    ops = OpsGuard("contract", **given)
    declare(ops)
    shop = Shop(ops)
    return Guarded(adapter, ops, shop, maker(adapter)(shop, ops), log)


def bare(adapter: str) -> tuple[Shop, Any]:
    shop = Shop(None)
    return shop, maker(adapter)(shop, None)


def send(adapter: str, app: Any, request: Request) -> Answer:
    return (call_asgi if adapter in ASGI else call_wsgi)(app, request)


def request_of(scenario: Scenario, adapter: str) -> Request:
    return Request(
        strict=scenario.method != "BOGUS" and (adapter == "wsgi" or scenario.strict),
        path=scenario.path,
        method=scenario.method,
        headers=scenario.headers,
        body=scenario.body,
        chunked=scenario.chunked,
        leave_after=3 if scenario.leave == "chunk" else None,
        leave_upload=scenario.leave == "upload",
    )
