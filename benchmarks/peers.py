"""Putting on each framework the packages people glue together today.

FastAPI gets the whole glue for the same work: metrics (prometheus-fastapi-instrumentator), ids
(asgi-correlation-id) and an access line (logging with python-json-logger over orjson, the
faster of its two formatters). Flask and Django get their metrics exporter alone.
"""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

DJANGO_APPS = ("django_prometheus",)
DJANGO_MIDDLEWARE = (
    "django_prometheus.middleware.PrometheusBeforeMiddleware",
    "django_prometheus.middleware.PrometheusAfterMiddleware",
)


def glued(framework: str, app: Any) -> Any:
    """The app with the peers of its framework."""
    if framework == "fastapi":
        return _fastapi(app)
    if framework == "flask":
        from prometheus_client import CollectorRegistry
        from prometheus_flask_exporter import (  # type: ignore[import-untyped]
            PrometheusMetrics,
        )

        PrometheusMetrics(app, registry=CollectorRegistry(), group_by="url_rule")
        return app
    if framework.startswith("django"):
        return app  # its middleware has been in the app's settings already
    raise ValueError(f"no peers for {framework}")


def _fastapi(app: Any) -> Any:
    from asgi_correlation_id import CorrelationIdMiddleware
    from prometheus_fastapi_instrumentator import Instrumentator

    Instrumentator(should_instrument_requests_inprogress=True, inprogress_labels=True).instrument(
        app
    ).expose(app)
    app.add_middleware(AccessLine)
    app.add_middleware(CorrelationIdMiddleware)
    return app


def json_logger(name: str) -> logging.Logger:
    """A logger that writes JSON lines to standard output through python-json-logger."""
    from pythonjsonlogger.orjson import OrjsonFormatter

    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(
        OrjsonFormatter("%(asctime)s %(levelname)s %(name)s %(message)s", timestamp=True)
    )
    logger = logging.getLogger(name)
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(logging.INFO)
    return logger


class AccessLine:
    """An access line as people write it: one pure ASGI middleware around a JSON logger."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self._logger = json_logger("peer.access")

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        from asgi_correlation_id import correlation_id

        began = time.perf_counter()
        status = 500
        size = 0

        async def watch(message: Any) -> None:
            nonlocal status, size
            if message["type"] == "http.response.start":
                status = message["status"]
            else:
                size += len(message.get("body", b""))
            await send(message)

        try:
            await self._app(scope, receive, watch)
        finally:
            client = scope.get("client")
            self._logger.info(
                "request_completed",
                extra={
                    "service": "benchmark",
                    "request_id": correlation_id.get(),
                    "method": scope["method"],
                    "path": scope["path"],
                    "status_code": status,
                    "duration_ms": round((time.perf_counter() - began) * 1_000, 3),
                    "size": size,
                    "client": client[0] if client else None,
                },
            )
