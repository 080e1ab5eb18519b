"""The contract's app in Flask."""

from __future__ import annotations

import contextvars
import functools
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from flask import Blueprint, Flask, Response, redirect, request, send_file
from flask.views import MethodView

import opsguard_flask
from opsguard import OpsGuard
from tests.contract.apps.shop import FILE, Boom, Shop


class Handled(Exception):
    """An exception that the app answers for."""


def wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


class Views:
    def method(self) -> Response:
        return text("method")


class ClassView(MethodView):
    def get(self) -> Response:
        return text("class")


def text(body: str, status: int = 200, **headers: str) -> Response:
    return Response(body, status, headers=headers, content_type="text/plain")


def make(shop: Shop, ops: OpsGuard | None) -> Any:
    """The app, guarded if there is an OpsGuard."""
    app = Flask("shop")
    if ops is not None:
        opsguard_flask.install(app, ops)
    routes(app, shop)
    return app


def routes(app: Flask, shop: Shop) -> None:
    @app.get("/plain")
    def plain() -> Response:
        return text("hello")

    @app.post("/items")
    def create() -> Response:
        return text(f"made {len(request.get_data())}", 201)

    @app.get("/items/<int:id>")
    def item(id: int) -> Response:
        return text(f"item {id}")

    @app.get("/empty")
    def empty() -> Response:
        return Response(status=204)

    @app.get("/moved")
    def moved() -> Any:
        return redirect("/plain")

    @app.get("/bad")
    def bad() -> Response:
        return text("bad", 400)

    @app.get("/broken")
    def broken() -> Response:
        return text("broken", 500)

    @app.get("/boom")
    def boom() -> Response:
        raise Boom("boom")

    @app.errorhandler(Handled)
    def handle(error: Exception) -> Response:
        return text("handled", 409)

    @app.get("/handled")
    def handled() -> Response:
        raise Handled

    @app.post("/upload")
    def upload() -> Response:
        return text(str(len(request.get_data())))

    @app.get("/decorated")
    @wrapped
    def decorated() -> Response:
        return text("wrapped")

    app.add_url_rule("/method", view_func=Views().method)
    app.add_url_rule("/class", view_func=ClassView.as_view("class_view"))

    @app.get("/stream")
    def stream() -> Response:
        return Response(b"0123456789" for _ in range(1000))

    @app.get("/midway")
    def midway() -> Response:
        def fail() -> Iterator[bytes]:
            yield b"abc"
            yield b"def"
            raise Boom("midway")

        return Response(fail())

    @app.get("/endless")
    def endless() -> Response:
        def ticks() -> Iterator[bytes]:
            while True:
                yield b"tick"
                time.sleep(0.005)

        return Response(ticks())

    @app.get("/background")
    def background() -> Response:
        response = text("soon")
        response.call_on_close(shop.after)
        return response

    @app.get("/ids")
    def ids() -> Response:
        return text(shop.ids())

    @app.get("/thread")
    def thread() -> Response:
        found: list[str] = []
        context = contextvars.copy_context()
        worker = threading.Thread(target=lambda: found.append(context.run(shop.ids)))
        worker.start()
        worker.join()
        return text(found[0])

    @app.get("/wait")
    def wait() -> Response:
        shop.ops.bind(tenant_id=shop.ids())
        time.sleep(0.01)
        return text(shop.ids())

    @app.get("/within")
    def within() -> Response:
        shop.within()
        return text(shop.ids())

    @app.get("/bound")
    def bound() -> Response:
        shop.ops.bind(tenant_id="t-1")
        return text("bound")

    @app.get("/own-id")
    def own_id() -> Response:
        return text("own", **{"X-Request-ID": "mine"})

    @app.get("/file")
    def file() -> Any:
        return send_file(FILE, mimetype="text/plain")

    @app.get("/health")
    def health() -> Response:
        return text("ok")

    @app.before_request
    def dependency() -> None:
        if request.path.startswith("/refused"):
            shop.calls.append("a before_request function of /refused ran")

    @app.post("/refused/<int:id>")
    def refused(id: int) -> Response:
        shop.calls.append("the handler of /refused ran")
        return text("ran")

    users = Blueprint("users", __name__, url_prefix="/users")

    @users.get("/<name>")
    def user(name: str) -> Response:
        return text(f"user {name}")

    api = Blueprint("api", __name__, url_prefix="/v1")
    api.register_blueprint(users)
    app.register_blueprint(api, url_prefix="/api/v1")

    tenant = Blueprint("tenant", __name__)

    @tenant.get("/things/<string(length=1):thing>")
    def thing(tenant: str, thing: str) -> Response:
        return text(f"{tenant} {thing}")

    app.register_blueprint(tenant, url_prefix="/tenants/<tenant>")
