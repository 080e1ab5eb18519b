"""The shop on Django: ``uvicorn opsguard.demo.apps.django:app``.

A whole project in one file. The three lines for opsguard are those in a project of many files:
INSTALLED_APPS, MIDDLEWARE, OPSGUARD; then views say ``from opsguard_django import ops``.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

from django.conf import settings
from django.core.asgi import get_asgi_application
from django.http import HttpRequest, JsonResponse, StreamingHttpResponse
from django.test.utils import override_settings
from django.urls import path
from django.views.decorators.http import require_GET, require_POST

from opsguard import OpsGuard
from opsguard.demo.shop import CATALOGUE, PAUSE, SLOW, read_order, receipt
from opsguard_django import install

__all__ = ["app", "make_app", "ops", "urlpatterns"]

ops = OpsGuard(service="shop", version="1.0")
log = ops.logger("shop")
orders = ops.metrics.counter("shop_orders_total", "Orders placed.", ("item_id",))

settings.configure(
    ALLOWED_HOSTS=["127.0.0.1"],
    SECRET_KEY="of a demo, which signs nothing",
    ROOT_URLCONF=__name__,
    INSTALLED_APPS=["opsguard_django"],
    MIDDLEWARE=["opsguard_django.OpsGuardMiddleware"],
    OPSGUARD=f"{__name__}.ops",  # or a mapping: {"service": "shop"}
)


@require_GET
async def items(request: HttpRequest) -> JsonResponse:
    return JsonResponse(list(CATALOGUE.values()), safe=False)


@require_GET
async def item(request: HttpRequest, item_id: str) -> JsonResponse:
    found = CATALOGUE.get(item_id)
    return JsonResponse(found or {"error": "no such item"}, status=200 if found else 404)


@require_POST
async def place(request: HttpRequest) -> JsonResponse:
    order = read_order(request.body)
    if order is None:
        return JsonResponse({"error": "not an order"}, status=422)
    ops.bind(item_id=order.item_id)  # on every further log line of this request
    log.info("order placed", quantity=order.quantity)
    orders.labels(item_id=order.item_id).inc()
    return JsonResponse({"item_id": order.item_id, "quantity": order.quantity}, status=201)


@require_POST
async def upload(request: HttpRequest) -> JsonResponse:
    return JsonResponse({"bytes": len(request.body)}, status=201)


@require_GET
def slow(request: HttpRequest) -> JsonResponse:  # not async: Django runs it in a thread
    time.sleep(SLOW)
    log.info("report ready")
    return JsonResponse({"seconds": SLOW})


@require_GET
async def boom(request: HttpRequest) -> JsonResponse:
    raise RuntimeError("the till is on fire")


@require_GET
async def stream(request: HttpRequest) -> StreamingHttpResponse:
    async def lines() -> AsyncIterator[bytes]:
        for line in receipt():
            yield line
            await asyncio.sleep(PAUSE)

    return StreamingHttpResponse(lines(), content_type="text/plain")


@require_GET
async def health(request: HttpRequest) -> JsonResponse:
    return JsonResponse({"status": "ok"})


urlpatterns = [
    path("items", items),
    path("items/<str:item_id>", item),
    path("orders", place),
    path("uploads", upload),
    path("slow", slow),
    path("boom", boom),
    path("stream", stream),
    path("health", health),
]


def make_app() -> Any:
    """The same project without opsguard, for the demo to measure beside it."""
    with override_settings(MIDDLEWARE=[]):
        return get_asgi_application()


app = install(get_asgi_application())
