"""The shop on Flask: ``gunicorn opsguard.demo.apps.flask:app``."""

from __future__ import annotations

import time
from collections.abc import Iterator

from flask import Flask, Response, jsonify, request

from opsguard import OpsGuard
from opsguard.demo.shop import CATALOGUE, PAUSE, SLOW, read_order, receipt
from opsguard_flask import install

__all__ = ["app", "make_app", "ops"]

ops = OpsGuard(service="shop", version="1.0")
log = ops.logger("shop")
orders = ops.metrics.counter("shop_orders_total", "Orders placed.", ("item_id",))


def make_app() -> Flask:
    app = Flask("shop")

    @app.get("/items")
    def items() -> Response:
        return jsonify(list(CATALOGUE.values()))

    @app.get("/items/<item_id>")
    def item(item_id: str) -> tuple[Response, int]:
        found = CATALOGUE.get(item_id)
        return jsonify(found or {"error": "no such item"}), 200 if found else 404

    @app.post("/orders")
    def place() -> tuple[Response, int]:
        order = read_order(request.get_data())
        if order is None:
            return jsonify(error="not an order"), 422
        ops.bind(item_id=order.item_id)  # on every further log line of this request
        log.info("order placed", quantity=order.quantity)
        orders.labels(item_id=order.item_id).inc()
        return jsonify(item_id=order.item_id, quantity=order.quantity), 201

    @app.post("/uploads")
    def upload() -> tuple[Response, int]:
        return jsonify(bytes=len(request.get_data())), 201

    @app.get("/slow")
    def slow() -> Response:
        time.sleep(SLOW)
        log.info("report ready")
        return jsonify(seconds=SLOW)

    @app.get("/boom")
    def boom() -> Response:
        raise RuntimeError("the till is on fire")

    @app.get("/stream")
    def stream() -> Response:
        def lines() -> Iterator[bytes]:
            for line in receipt():
                yield line
                time.sleep(PAUSE)

        return Response(lines(), mimetype="text/plain")

    @app.get("/health")
    def health() -> Response:
        return jsonify(status="ok")

    return app


app = make_app()
install(app, ops)
