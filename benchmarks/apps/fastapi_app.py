"""The FastAPI app."""

from __future__ import annotations

from fastapi import FastAPI
from fastapi.responses import HTMLResponse

from benchmarks.apps.fortunes import Fortunes


def build() -> FastAPI:
    app = FastAPI()
    fortunes = Fortunes()

    @app.get("/json")
    async def greet() -> dict[str, str]:
        return {"message": "Hello, World!"}

    @app.get("/fortunes", response_class=HTMLResponse)
    async def page() -> HTMLResponse:
        return HTMLResponse(fortunes.page())

    return app
