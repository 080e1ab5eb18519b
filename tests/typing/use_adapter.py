"""Type-checked, never run: an adapter for a protocol of its own."""

from __future__ import annotations

from typing import Any, assert_type

from opsguard import Exchange, OpsGuard, Response
from opsguard.http import Pending
from opsguard.ports import Port, Protocol
from opsguard_asgi import PROTOCOL as ASGI
from opsguard_wsgi import PROTOCOL as WSGI


class EventExchange(Exchange):
    __slots__ = ()

    def header(self, name: str) -> str:
        return str(self.source["headers"].get(name, ""))


PROTOCOL: Protocol[str] = Protocol(
    exchange=EventExchange, incoming=str.lower, name=str, value=str, fold=str.lower
)

runtime = OpsGuard().runtime("events", "1.0")
port = assert_type(runtime.port(PROTOCOL), Port[str])
assert_type(runtime.port(ASGI), Port[bytes])
assert_type(runtime.port(WSGI), Port[str])


def serve(event: dict[str, Any]) -> list[tuple[str, str]]:
    exchange = port.open("GET", "/", "/", None, None, event)
    assert_type(exchange.enter("/", serve), Response | Pending | None)
    exchange.fail(ValueError())
    answer = assert_type(exchange.plan.failure(exchange, ValueError()), Response)
    headers = port.head(exchange, answer.status, answer.headers)
    exchange.finish()
    exchange.close()
    return assert_type(headers, list[tuple[str, str]])
