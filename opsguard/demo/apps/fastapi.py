"""The shop on FastAPI: ``uvicorn opsguard.demo.apps.fastapi:app``."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

from opsguard import OpsGuard
from opsguard.demo.shop import CATALOGUE, PAUSE, SLOW, read_order, receipt
from opsguard_fastapi import install

__all__ = ["app", "make_app", "ops"]

ops = OpsGuard(service="shop", version="1.0")
log = ops.logger("shop")
orders = ops.metrics.counter("shop_orders_total", "Orders placed.", ("item_id",))


def make_app() -> FastAPI:
    app = FastAPI(title="Shop")

    @app.get("/items")
    async def items() -> JSONResponse:
        return JSONResponse(list(CATALOGUE.values()))

    @app.get("/items/{item_id}")
    async def item(item_id: str) -> JSONResponse:
        found = CATALOGUE.get(item_id)
        return JSONResponse(found or {"error": "no such item"}, 200 if found else 404)

    @app.post("/orders")
    async def place(request: Request) -> JSONResponse:
        order = read_order(await request.body())
        if order is None:
            return JSONResponse({"error": "not an order"}, 422)
        ops.bind(item_id=order.item_id)  # on every further log line of this request
        log.info("order placed", quantity=order.quantity)
        orders.labels(item_id=order.item_id).inc()
        return JSONResponse({"item_id": order.item_id, "quantity": order.quantity}, 201)

    @app.post("/uploads")
    async def upload(request: Request) -> JSONResponse:
        return JSONResponse({"bytes": len(await request.body())}, 201)

    @app.get("/slow")
    def slow() -> JSONResponse:  # not async: it runs in a thread, and its log line has the id too
        time.sleep(SLOW)
        log.info("report ready")
        return JSONResponse({"seconds": SLOW})

    @app.get("/boom")
    async def boom() -> JSONResponse:
        raise RuntimeError("the till is on fire")

    @app.get("/stream")
    async def stream() -> StreamingResponse:
        async def lines() -> AsyncIterator[bytes]:
            for line in receipt():
                yield line
                await asyncio.sleep(PAUSE)

        return StreamingResponse(lines(), media_type="text/plain")

    @app.get("/health")
    async def health() -> JSONResponse:
        return JSONResponse({"status": "ok"})

    return app


app = make_app()
install(app, ops)
