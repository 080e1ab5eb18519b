"""The FastAPI app."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse

from benchmarks.apps.fortunes import Fortunes


def build(around: Callable[[Any], Any] | None = None, *, told: bool = False) -> FastAPI:
    """`around` decorates the JSON handler; `told`: which then takes request and answer, as slowapi
    needs them.
    """
    app = FastAPI()
    fortunes = Fortunes()

    async def greet() -> dict[str, str]:
        return {"message": "Hello, World!"}

    async def greet_told(request: Request, response: Response) -> dict[str, str]:
        return {"message": "Hello, World!"}

    handler: Any = greet_told if told else greet
    app.get("/json")(handler if around is None else around(handler))

    @app.get("/fortunes", response_class=HTMLResponse)
    async def page() -> HTMLResponse:
        return HTMLResponse(fortunes.page())

    return app
