"""Type-checked, never run: what users write against the core."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import assert_type

from opsguard import Exchange, OpsGuard, Response, Settings
from opsguard.logging import Logger
from opsguard.metrics import Counter, Gauge, Histogram
from opsguard.settings import Ids, Metrics, Proxies

ops = OpsGuard(service="checkout")
OpsGuard("checkout", version="1", environment="staging", git_sha="abc")
OpsGuard(metrics={"path": "/m", "buckets": (0.1, 1.0)}, logging={"level": "INFO"})
OpsGuard(metrics=Metrics(path="/m"), ids=Ids(trust_inbound=False), proxies=Proxies(hops=1))

assert_type(ops.request_id, str | None)
assert_type(ops.settings, Settings)
assert_type(ops.settings.metrics.buckets, tuple[float, ...])
assert_type(ops.settings.origin("metrics.path"), str)
assert_type(ops.installed, bool)
ops.bind(tenant_id="t1", items=3, nested={"a": [1]})

log = assert_type(ops.logger(__name__), Logger)
log.info("Item looked up", item=3)
log.error("%d failed", 3, error=ValueError("x"))
assert_type(log.bind(component="orders"), Logger)

orders = assert_type(ops.metrics.counter("orders_total", "Orders placed.", ("plan",)), Counter)
orders.labels(plan="pro").inc()
orders.labels("pro").inc(2, exemplar={"trace_id": "0af7"})
queue = assert_type(ops.metrics.gauge("queue_length"), Gauge)
queue.set(3)
queue.set_function(lambda: 3.0)
with queue.track_inprogress():
    pass
price = ops.metrics.histogram("price_euros", "Prices.", ["plan"], buckets=[1, 10.5])
assert_type(price, Histogram)
price.labels(plan="free").observe(9.5)


@price.labels(plan="free").time()
def rank(items: list[int], *, deep: bool = False) -> list[int]:
    return sorted(items) if deep else items


assert_type(rank([1], deep=True), list[int])
rank("abc")  # type: ignore[arg-type]


@ops.at_edge
def note(exchange: Exchange) -> None:
    assert_type(exchange.request_id, str)
    assert_type(exchange.client, str | None)


@ops.at_route
def closed(exchange: Exchange) -> Response | None:
    if exchange.endpoint == "/orders" and exchange.header("x-day") == "sunday":
        return Response(503, (("Content-Length", "6"),), b"closed")
    return None


@ops.at_route  # type: ignore[arg-type]
def wrong(exchange: Exchange) -> str:
    return "an answer is a Response"


override: AbstractContextManager[None] = ops.override(ids={"correlation_header": ""})
with ops.override(metrics={"enabled": False}):
    pass
