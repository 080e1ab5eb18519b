"""The app with keys and limits in Flask."""

from __future__ import annotations

from typing import Any

from flask import Blueprint, Flask, Response, request
from flask.views import MethodView, View

import opsguard_flask
from tests.contract.apps.admitted import Desk, plain_paths, same
from tests.contract.apps.admitted_raw import ticks


def text(body: str, status: int = 200) -> Response:
    return Response(body, status, content_type="text/plain")


def make(desk: Desk, late: bool = False) -> Any:
    app = Flask("desk")
    if late:
        opsguard_flask.install(app, desk.ops)
    routes(app, desk)
    if not late:
        opsguard_flask.install(app, desk.ops)
    return app


def routes(app: Flask, desk: Desk) -> None:
    ops, marks = desk.ops, desk.decorators

    def declare(path: str) -> None:
        def plain() -> Response:
            return text(desk.plainly(path))

        app.add_url_rule(
            path,
            endpoint=f"plain{path}",
            view_func=marks.get(path, same)(plain),
            methods=["GET", "POST", "HEAD", "OPTIONS"],
        )

    for path in plain_paths(desk):
        declare(path)

    @app.get("/sync")
    @marks["/sync"]
    def sync() -> Response:
        return text(desk.ran("/sync"))

    class Views:
        @marks["/method"]
        def method(self) -> Response:
            return text(desk.ran("/method"))

    app.add_url_rule("/method", view_func=Views().method)

    def careless(function: Any) -> Any:
        """A decorator of the app's that hides what it wraps."""

        def hidden() -> Any:
            return function()

        return hidden

    @app.get("/wrapped")
    @careless
    @marks["/wrapped"]
    def wrapped() -> Response:
        return text(desk.ran("/wrapped"))

    @ops.limit("2/minute")
    class ClassView(View):
        def dispatch_request(self) -> Response:
            return text(desk.ran("/class"))

    class ByMethod(MethodView):
        @ops.limit("2/minute")
        def get(self) -> Response:
            return text(desk.ran("/class-method"))

        def post(self) -> Response:
            return text(desk.ran("/class-method"))

    app.add_url_rule("/class", view_func=ClassView.as_view("class_view"))
    app.add_url_rule("/class-method", view_func=ByMethod.as_view("by_method"))

    @app.before_request
    def dependency() -> None:
        if request.path == "/upload":
            desk.calls.append("a before_request function of /upload")

    @app.post("/upload")
    @marks["/upload"]
    def upload() -> Response:
        return text(desk.ran("/upload"))

    @app.get("/slot/stream")
    @marks["/slot/stream"]
    def stream() -> Response:
        return Response(iter([b"part"] * 3))

    @app.get("/slot/endless")
    @marks["/slot/endless"]
    def endless() -> Response:
        desk.entered.set()
        return Response(ticks(desk))

    @app.get("/who/background")
    def background() -> Response:
        response = text("soon")
        response.call_on_close(desk.after)
        return response

    things = Blueprint("things", __name__, url_prefix="/things")

    @things.get("/<id>")
    @marks["/api/v1/things/{id}"]
    def thing(id: str) -> Response:
        return text(desk.ran("/api/v1/things/{id}"))

    api = Blueprint("api", __name__)
    api.register_blueprint(things)
    app.register_blueprint(api, url_prefix="/api/v1")
