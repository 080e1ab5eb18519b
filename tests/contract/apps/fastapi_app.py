"""The contract's app in FastAPI."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any

from fastapi import APIRouter, BackgroundTasks, Body, Depends, FastAPI, Request, Response, WebSocket
from fastapi.responses import (
    FileResponse,
    PlainTextResponse,
    RedirectResponse,
    StreamingResponse,
)
from starlette.endpoints import HTTPEndpoint
from starlette.routing import Mount
from starlette.websockets import WebSocketDisconnect

import opsguard_fastapi
from opsguard import OpsGuard
from tests.contract.apps.shop import FILE, Boom, Shop


class Handled(Exception):
    """An exception that the app answers for."""


def wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    async def wrapper(*args: Any, **kwargs: Any) -> Any:
        return await function(*args, **kwargs)

    return wrapper


class Views:
    async def method(self) -> PlainTextResponse:
        return PlainTextResponse("method")


class ClassView(HTTPEndpoint):
    async def get(self, request: Request) -> PlainTextResponse:
        return PlainTextResponse("class")


def make(shop: Shop, ops: OpsGuard | None) -> Any:
    """The app, guarded if there is an OpsGuard."""
    app = FastAPI(title="shop", docs_url=None, redoc_url=None)
    if ops is not None:
        opsguard_fastapi.install(app, ops)
    routes(app, shop)
    return app


def routes(app: FastAPI, shop: Shop) -> None:
    text = PlainTextResponse

    @app.get("/plain")
    async def plain() -> Response:
        return text("hello")

    @app.post("/items")
    async def create(request: Request) -> Response:
        return text(f"made {len(await request.body())}", 201)

    @app.get("/items/{id:int}")
    async def item(id: int) -> Response:
        return text(f"item {id}")

    @app.get("/empty", status_code=204)
    async def empty() -> Response:
        return Response(status_code=204)

    @app.get("/moved")
    async def moved() -> Response:
        return RedirectResponse("/plain", 302)

    @app.get("/bad")
    async def bad() -> Response:
        return text("bad", 400)

    @app.get("/broken")
    async def broken() -> Response:
        return text("broken", 500)

    @app.get("/boom")
    async def boom() -> Response:
        raise Boom("boom")

    @app.exception_handler(Handled)
    async def handle(request: Request, error: Exception) -> Response:
        return text("handled", 409)

    @app.get("/handled")
    async def handled() -> Response:
        raise Handled

    @app.post("/upload")
    async def upload(request: Request) -> Response:
        return text(str(len(await request.body())))

    @app.get("/decorated")
    @wrapped
    async def decorated() -> Response:
        return text("wrapped")

    app.add_api_route("/method", Views().method, methods=["GET"])
    app.add_route("/class", ClassView)

    async def parts(*data: bytes) -> AsyncIterator[bytes]:
        for part in data:
            yield part

    @app.get("/stream")
    async def stream() -> Response:
        return StreamingResponse(parts(*[b"0123456789"] * 1000))

    @app.get("/midway")
    async def midway() -> Response:
        async def fail() -> AsyncIterator[bytes]:
            yield b"abc"
            yield b"def"
            raise Boom("midway")

        return StreamingResponse(fail())

    @app.get("/endless")
    async def endless() -> Response:
        async def ticks() -> AsyncIterator[bytes]:
            while True:
                yield b"tick"
                await asyncio.sleep(0.01)

        return StreamingResponse(ticks())

    @app.get("/background")
    async def background(tasks: BackgroundTasks) -> Response:
        tasks.add_task(shop.after)
        return text("soon", background=tasks)

    @app.get("/ids")
    async def ids() -> Response:
        return text(shop.ids())

    @app.get("/thread")
    def thread() -> Response:
        return text(shop.ids())

    @app.get("/wait")
    async def wait() -> Response:
        shop.ops.bind(tenant_id=shop.ids())
        await asyncio.sleep(0.01)
        return text(shop.ids())

    @app.get("/within")
    async def within() -> Response:
        await shop.within()
        return text(shop.ids())

    @app.get("/bound")
    async def bound() -> Response:
        shop.ops.bind(tenant_id="t-1")
        return text("bound")

    @app.get("/own-id")
    async def own_id() -> Response:
        return text("own", headers={"X-Request-ID": "mine"})

    @app.get("/file")
    async def file() -> Response:
        return FileResponse(FILE)

    @app.get("/health")
    async def health() -> Response:
        return text("ok")

    def dependency() -> None:
        shop.calls.append("a dependency of /refused ran")

    @app.post("/refused/{id}", dependencies=[Depends(dependency)])
    async def refused(id: str, body: Annotated[dict[str, int], Body()]) -> Response:
        shop.calls.append("the handler of /refused ran")
        return text("ran")

    @app.websocket("/ws")
    async def ws(websocket: WebSocket) -> None:
        await websocket.accept()
        try:
            while True:
                message = await websocket.receive_text()
                await websocket.send_text(f"{shop.ids()} {message}")
        except WebSocketDisconnect:
            return

    users = APIRouter(prefix="/users")

    @users.get("/{name}")
    async def user(name: str) -> Response:
        return text(f"user {name}")

    api = APIRouter(prefix="/v1")
    api.include_router(users)
    app.include_router(api, prefix="/api")

    tenant = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    @tenant.get("/things/{thing}")
    async def thing(request: Request, thing: str) -> Response:
        return text(f"{request.path_params['tenant']} {thing}")

    app.router.routes.append(Mount("/tenants/{tenant}", app=tenant))
