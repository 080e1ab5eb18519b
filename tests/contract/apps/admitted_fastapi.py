"""The app with keys and limits in FastAPI."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, BackgroundTasks, Body, Depends, FastAPI, Request, Response, WebSocket
from fastapi.responses import PlainTextResponse, StreamingResponse
from starlette.endpoints import HTTPEndpoint
from starlette.websockets import WebSocketDisconnect

import opsguard_fastapi
from tests.contract.apps.admitted import Desk, plain_paths, same


def make(desk: Desk, late: bool = False) -> Any:
    app = FastAPI(title="desk", docs_url=None, redoc_url=None, openapi_url=None)
    if late:
        opsguard_fastapi.install(app, desk.ops)
    routes(app, desk)
    if not late:
        opsguard_fastapi.install(app, desk.ops)
    return app


def routes(app: FastAPI, desk: Desk) -> None:
    text, ops, marks = PlainTextResponse, desk.ops, desk.decorators

    def declare(path: str) -> None:
        async def plain() -> Response:
            return text(desk.plainly(path))

        app.add_api_route(
            path, marks.get(path, same)(plain), methods=["GET", "POST", "HEAD", "OPTIONS"]
        )

    for path in plain_paths(desk):
        declare(path)

    @app.get("/sync")
    @marks["/sync"]
    def sync() -> Response:
        return text(desk.ran("/sync"))

    class Views:
        @marks["/method"]
        async def method(self) -> Response:
            return text(desk.ran("/method"))

    app.add_api_route("/method", Views().method, methods=["GET"])

    def careless(function: Any) -> Any:
        """A decorator of the app's that hides what it wraps."""

        async def hidden() -> Any:
            return await function()

        return hidden

    @app.get("/wrapped")
    @careless
    @marks["/wrapped"]
    async def wrapped() -> Response:
        return text(desk.ran("/wrapped"))

    @ops.limit("2/minute")
    class ClassView(HTTPEndpoint):
        async def get(self, request: Request) -> Response:
            return text(desk.ran("/class"))

    class MethodView(HTTPEndpoint):
        @ops.limit("2/minute")
        async def get(self, request: Request) -> Response:
            return text(desk.ran("/class-method"))

        async def post(self, request: Request) -> Response:
            return text(desk.ran("/class-method"))

    classes: list[tuple[str, Any]] = [("/class", ClassView), ("/class-method", MethodView)]
    for path, view in classes:
        app.add_route(path, view)

    def dependency() -> None:
        desk.calls.append("a dependency of /upload")

    @app.post("/upload", dependencies=[Depends(dependency)])
    @marks["/upload"]
    async def upload(body: Annotated[dict[str, int], Body()]) -> Response:
        return text(desk.ran("/upload"))

    @app.get("/slot/stream")
    @marks["/slot/stream"]
    async def stream() -> Response:
        async def parts() -> AsyncIterator[bytes]:
            for _ in range(3):
                yield b"part"

        return StreamingResponse(parts())

    @app.get("/slot/endless")
    @marks["/slot/endless"]
    async def endless() -> Response:
        async def ticks() -> AsyncIterator[bytes]:
            desk.entered.set()
            while not desk.leave.is_set():
                yield b"tick"
                await asyncio.sleep(0.01)

        return StreamingResponse(ticks())

    @app.get("/who/background")
    async def background(tasks: BackgroundTasks) -> Response:
        tasks.add_task(desk.after)
        return text("soon", background=tasks)

    things = APIRouter(prefix="/things")

    @things.get("/{id}")
    @marks["/api/v1/things/{id}"]
    async def thing(id: str) -> Response:
        return text(desk.ran("/api/v1/things/{id}"))

    api = APIRouter(prefix="/v1")
    api.include_router(things)
    app.include_router(api, prefix="/api")

    @app.websocket("/ws")
    @ops.limit("2/minute")
    async def ws(websocket: WebSocket) -> None:
        desk.calls.append("/ws")
        await websocket.accept()
        try:
            while True:
                await websocket.receive_text()
        except WebSocketDisconnect:
            return
