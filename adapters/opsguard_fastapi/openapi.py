"""OpenAPI: API keys as security schemes, and the answers 401, 403 and 429 where they may come.

What the app says itself stays: an operation with a security of its own keeps it, and an answer that
it describes is described as it says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from fastapi import FastAPI

from opsguard.inspection import Demand, demand
from opsguard.runtime import Runtime
from opsguard_fastapi.routes import served

__all__ = ["describe_api"]

_KEY: Final = "OpsGuardKey"
_BEARER: Final = "OpsGuardBearer"
_PROBLEM: Final = "OpsGuardProblem"
_MARK: Final = "documents"


def describe_api(app: FastAPI, runtime: Runtime) -> None:
    """Have `app.openapi()` tell of keys and limits. It goes on to make and to cache the description
    as it does: ours is written into what it gives, once. An `openapi` that the user puts in its
    place before the app serves counts as well, if this is called again.
    """
    describe: Callable[[], dict[str, Any]] = app.openapi
    if getattr(describe, _MARK, None) is app:
        return
    last: list[dict[str, Any]] = []

    def openapi() -> dict[str, Any]:
        schema = describe()
        if not last or last[0] is not schema:
            try:
                _complete(schema, app, runtime)
                last[:] = [schema]
            except Exception as fault:
                runtime.failures.report("openapi", fault)
        return schema

    setattr(openapi, _MARK, app)
    app.openapi = openapi  # type: ignore[method-assign]


def _complete(schema: dict[str, Any], app: FastAPI, runtime: Runtime) -> None:
    """Write what we ask of requests into the description. Twice is as once."""
    paths = schema.get("paths", {})
    found: list[Demand] = []
    for route in served(app):
        operation = paths.get(route.endpoint, {}).get(route.method.lower())
        if operation is None:
            continue
        asked = demand(runtime, route)
        found.append(asked)
        _secure(operation, asked, schema)
        _add_answers(operation, asked)
    components = schema.setdefault("components", {}) if any(map(_matters, found)) else {}
    if any(asked.key for asked in found):
        header = runtime.plan.settings.keys.header
        schemes = components.setdefault("securitySchemes", {})
        schemes.setdefault(_KEY, {"type": "apiKey", "in": "header", "name": header})
        schemes.setdefault(_BEARER, {"type": "http", "scheme": "bearer"})
    if any(map(_matters, found)):
        components.setdefault("schemas", {}).setdefault(_PROBLEM, _problem())


def _matters(asked: Demand) -> bool:
    return asked.key or asked.limited


def _secure(operation: dict[str, Any], asked: Demand, schema: dict[str, Any]) -> None:
    """Either form of a key will do. A security that the user wrote may well mean the same key."""
    if asked.key and "security" not in operation and "security" not in schema:
        operation["security"] = [{_KEY: []}, {_BEARER: []}]


def _add_answers(operation: dict[str, Any], asked: Demand) -> None:
    answers = operation.setdefault("responses", {})
    if asked.key:
        challenge = {"WWW-Authenticate": _header("How to send a key.", "string")}
        answers.setdefault("401", _answer("An API key is missing or not valid.", challenge))
    if asked.certain_keys:
        answers.setdefault("403", _answer("The API key is not of the tier or scope needed.", {}))
    if asked.limited:
        limits = {
            "Retry-After": _header("Seconds until the next request may pass.", "integer"),
            "X-RateLimit-Limit": _header("Requests in the period.", "integer"),
            "X-RateLimit-Remaining": _header("What is left of them.", "integer"),
            "X-RateLimit-Reset": _header("When they are all back, in epoch seconds.", "integer"),
        }
        answers.setdefault("429", _answer("Too many requests.", limits))


def _answer(description: str, headers: dict[str, Any]) -> dict[str, Any]:
    reference = {"$ref": f"#/components/schemas/{_PROBLEM}"}
    answer: dict[str, Any] = {
        "description": description,
        "content": {"application/problem+json": {"schema": reference}},
    }
    return {**answer, "headers": headers} if headers else answer


def _header(description: str, kind: str) -> dict[str, Any]:
    return {"description": description, "schema": {"type": kind}}


def _problem() -> dict[str, Any]:
    """The body of an answer of ours: problem details, RFC 9457."""
    return {
        "title": "Problem",
        "type": "object",
        "required": ["status", "error", "message", "request_id"],
        "properties": {
            "status": {"type": "integer"},
            "error": {"type": "string"},
            "message": {"type": "string"},
            "request_id": {"type": "string"},
            "retry_after": {"type": "integer"},
        },
    }
