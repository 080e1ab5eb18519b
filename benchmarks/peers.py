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

from benchmarks import guarding

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


def limited(framework: str) -> Any:
    """The bare app with the rate limiter that people take, set up as its documentation says, with
    headers on and its memory storage. Both take the fixed window where nobody says otherwise: the
    cheapest that they have.
    """
    if framework == "fastapi":
        from slowapi import Limiter as SlowApi
        from slowapi import _rate_limit_exceeded_handler
        from slowapi.errors import RateLimitExceeded
        from slowapi.util import get_remote_address

        from benchmarks.apps import fastapi_app

        slow = SlowApi(key_func=get_remote_address, headers_enabled=True)
        app = fastapi_app.build(slow.limit(guarding.RATE), told=True)
        app.state.limiter = slow
        handler: Any = _rate_limit_exceeded_handler
        app.add_exception_handler(RateLimitExceeded, handler)
        return app
    if framework == "flask":
        from flask_limiter import Limiter
        from flask_limiter.util import get_remote_address as address

        from benchmarks.apps import flask_app

        site = flask_app.build()
        Limiter(
            address,
            app=site,
            default_limits=[guarding.RATE],
            headers_enabled=True,
            storage_uri="memory://",
        )
        return site
    raise ValueError(f"no limiter for {framework}")


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
