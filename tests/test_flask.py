"""opsguard in Flask: its conventions, its ways to declare a rule, its ways to fail."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from flask import Blueprint, Flask, abort, current_app, g, request, stream_with_context
from flask import Response as FlaskResponse
from flask.testing import FlaskClient
from werkzeug.middleware.dispatcher import DispatcherMiddleware
from werkzeug.test import Client, create_environ

import opsguard_wsgi
from opsguard import Exchange, InstallError, OpsGuard, Response, SettingsError
from opsguard.context import current
from opsguard.exceptions import Refused
from opsguard_flask import init_app, install
from opsguard_flask.templates import template
from tests.contract.harness import Samples, parse

TEAPOT = Response(418, (("Content-Type", "text/plain"), ("Content-Length", "2")), b"no")


class Boom(Exception):
    pass


class Eyes:
    """What an OpsGuard recorded."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.log = folder / "log"
        self.ops = OpsGuard(
            "s",
            logging={"file": str(self.log)},
            metrics={"directory": str(folder)},
            **settings,
        )

    def lines(self) -> list[dict[str, Any]]:
        self.ops.runtime().sink.flush()
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [line for line in map(json.loads, lines) if line["logger"] == "opsguard.access"]

    def endpoints(self) -> list[str]:
        return [line["endpoint"] for line in self.lines()]

    def samples(self) -> Samples:
        return parse("".join([text for _, text in self.ops.metrics.expose(False)]))

    def total(self, name: str, **labels: str) -> float:
        wanted = set(labels.items())
        found = self.samples().items()
        return sum([v for (sample, has), v in found if sample == name and wanted <= has])


@pytest.fixture
def eyes(tmp_path: Path) -> Eyes:
    return Eyes(tmp_path)


@pytest.fixture
def entered(eyes: Eyes) -> list[tuple[str | None, object]]:
    """Template and view of each rule that was entered."""
    seen: list[tuple[str | None, object]] = []
    eyes.ops.at_route(lambda exchange: seen.append((exchange.endpoint, exchange.marked)))
    return seen


def view(**values: Any) -> str:
    return "view"


def boom() -> str:
    raise Boom("boom")


class Buffered(FlaskClient):
    """Reads and closes each answer, as servers do."""

    def open(self, *args: Any, buffered: bool = True, **kwargs: Any) -> Any:
        return super().open(*args, buffered=buffered, **kwargs)


def buffered(app: Flask) -> FlaskClient:
    app.test_client_class = Buffered
    return app.test_client()


def an_app(eyes: Eyes) -> Flask:
    """A guarded app; /boom fails."""
    app = Flask("shop")
    install(app, eyes.ops)
    app.add_url_rule("/boom", view_func=boom)
    return app


# --- installing


def test_install_returns_the_opsguard_and_keeps_it_as_an_extension(eyes: Eyes) -> None:
    app = Flask("shop")
    assert install(app, eyes.ops) is eyes.ops
    assert app.extensions["opsguard"] is eyes.ops
    assert init_app is install


def test_the_factory_pattern_serves_several_apps_by_one_opsguard(eyes: Eyes) -> None:
    def create_app() -> Flask:
        app = Flask("shop")
        init_app(app, eyes.ops)
        app.add_url_rule("/a", view_func=view)
        return app

    for _ in range(2):
        assert buffered(create_app()).get("/a").text == "view"
    assert eyes.total("http_requests_total", endpoint="/a") == 2.0


def test_settings_come_from_the_apps_config(tmp_path: Path) -> None:
    app = Flask("shop")
    app.config["OPSGUARD"] = {"service": "configured", "ids": {"request_header": "X-Mine"}}
    app.add_url_rule("/a", view_func=view)
    ops = install(app)
    assert ops.settings.service == "configured"
    assert len(buffered(app).get("/a").headers.getlist("x-mine")) == 1


def test_wrong_settings_stop_the_install() -> None:
    app = Flask("shop")
    app.config["OPSGUARD"] = {"metrics": {"path": 7}}
    with pytest.raises(SettingsError, match=r"metrics\.path"):
        install(app)
    assert "opsguard" not in app.extensions


@pytest.mark.parametrize(("name", "service"), [("shop", "shop"), ("__main__", None)])
def test_the_apps_name_names_the_service(
    name: str, service: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OTEL_SERVICE_NAME", raising=False)
    ops = install(Flask(name, root_path=str(tmp_path)))
    assert ops.settings.service != "__main__"
    assert service in (None, ops.settings.service)


def test_installing_the_same_twice_counts_once(eyes: Eyes) -> None:
    app = an_app(eyes)
    install(app, eyes.ops)
    buffered(app).get("/nothing")
    assert eyes.total("http_requests_total") == 1.0


def test_another_opsguard_is_refused(eyes: Eyes) -> None:
    with pytest.raises(InstallError, match="guarded by another OpsGuard already"):
        install(an_app(eyes), OpsGuard())


def test_inside_of_a_guarded_wsgi_app_it_counts_once_and_still_names_the_rule(
    eyes: Eyes,
) -> None:
    app = an_app(eyes)
    app.add_url_rule("/items/<id>", view_func=view)
    client: Client = Client(opsguard_wsgi.install(app, eyes.ops))
    assert client.get("/items/7", buffered=True).status_code == 200
    assert eyes.endpoints() == ["/items/{id}"]
    assert eyes.total("http_requests_total") == 1.0


# --- rules


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("/", "/"),
        ("/items/<id>", "/items/{id}"),
        ("/items/<int:id>", "/items/{id}"),
        ("/items/<string(length=2):code>", "/items/{code}"),
        ("/items/<any(a, b):kind>/<uuid:id>", "/items/{kind}/{id}"),
        ("/files/<path:name>", "/files/{name}"),
        ("/a/<x>.<y>", "/a/{x}.{y}"),
        ('/r/<regex("[a-z]+(x)?"):z>', "/r/{z}"),
        ("/braces/{x}", "/braces/{x}"),
    ],
)
def test_a_rule_has_the_common_form(rule: str, expected: str) -> None:
    assert template(rule) == expected


def test_nested_blueprints_give_the_whole_template(eyes: Eyes, entered: list[Any]) -> None:
    inner, outer = Blueprint("inner", __name__, url_prefix="/users"), Blueprint("outer", __name__)
    inner.add_url_rule("/<int:id>", view_func=view)
    outer.register_blueprint(inner, url_prefix="/v1/users")
    app = an_app(eyes)
    app.register_blueprint(outer, url_prefix="/<tenant>/api")
    buffered(app).get("/acme/api/v1/users/7")
    assert entered == [("/{tenant}/api/v1/users/{id}", view)]
    assert eyes.endpoints() == ["/{tenant}/api/v1/users/{id}"]


def test_rules_declared_before_install_count_too(eyes: Eyes, entered: list[Any]) -> None:
    app = Flask("shop")
    app.add_url_rule("/a", view_func=view)
    install(app, eyes.ops)
    buffered(app).get("/a")
    assert entered == [("/a", view)]


def test_static_files_are_one_rule(eyes: Eyes, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    app = Flask("shop", static_folder=str(tmp_path), static_url_path="/static")
    install(app, eyes.ops)
    with buffered(app).get("/static/a.txt") as found:
        assert found.status_code == 200
    buffered(app).get("/static/missing.txt")
    assert eyes.endpoints() == ["/static/{filename}"] * 2


def test_unmatched_paths_are_one_series(eyes: Eyes, entered: list[Any]) -> None:
    client = buffered(an_app(eyes))
    for number in range(5):
        assert client.get(f"/{number}").status_code == 404
    assert set(eyes.endpoints()) == {"<unmatched>"}
    assert eyes.total("http_requests_total", endpoint="<unmatched>", status="404") == 5.0
    assert entered == []


def test_a_404_of_a_view_keeps_its_template(eyes: Eyes) -> None:
    app = an_app(eyes)
    app.add_url_rule("/items/<id>", view_func=lambda id: abort(404))
    assert buffered(app).get("/items/7").status_code == 404
    assert eyes.endpoints() == ["/items/{id}"]


def test_a_redirect_to_the_path_with_a_slash_is_flasks_own(eyes: Eyes) -> None:
    app = an_app(eyes)
    app.add_url_rule("/items/", view_func=view)
    response = buffered(app).get("/items")
    assert (response.status_code, response.location) == (308, "http://localhost/items/")
    assert eyes.endpoints() == ["<unmatched>"]


@pytest.mark.parametrize(
    ("rule", "path"),
    [
        pytest.param("/items/<int:id>", "/items/7", id="plain"),
        pytest.param("/items/", "/items/", id="with a slash"),
        pytest.param("/items/", "/items", id="without the slash it should have"),
        pytest.param("/x/<path:p>/", "/x/a//b", id="with slashes to merge"),
    ],
)
def test_a_refused_method_keeps_the_template_and_the_answer_is_flasks_own(
    rule: str, path: str, eyes: Eyes, entered: list[Any]
) -> None:
    bare, app = Flask("shop"), an_app(eyes)
    for each in (bare, app):
        each.add_url_rule(rule, view_func=view, methods=["POST"])
    plain, guarded = (buffered(each).delete(path) for each in (bare, app))
    assert guarded.status_code == plain.status_code
    assert guarded.data == plain.data
    assert guarded.headers.get("Allow") == plain.headers.get("Allow")
    assert entered == []
    if plain.status_code == 405:
        assert eyes.endpoints() == [template(rule)]
    assert eyes.total("opsguard_internal_errors_total") == 0.0


def broken(adapter: Any, **values: Any) -> str:
    raise Boom("in redirect_to")


@pytest.mark.parametrize(
    ("options", "path", "faults"),
    [
        pytest.param({"defaults": {"page": 1}}, "/users/page/1", 0.0, id="defaults"),
        pytest.param({"redirect_to": "/new"}, "/users/", 0.0, id="redirect_to"),
        pytest.param({"redirect_to": broken}, "/users/", 1.0, id="a redirect_to that raises"),
    ],
)
def test_a_refused_method_of_a_rule_that_redirects_is_405(
    options: dict[str, Any], path: str, faults: float, eyes: Eyes
) -> None:
    """The redirect is for a method that is allowed, and nobody has asked with one."""
    app = an_app(eyes)
    app.add_url_rule("/users/", view_func=view, **options)
    app.add_url_rule("/users/page/<int:page>", view_func=view)
    response = buffered(app).post(path)
    assert (response.status_code, response.headers.get("Location")) == (405, None)
    assert set(response.headers["Allow"].split(", ")) == {"GET", "HEAD", "OPTIONS"}
    assert eyes.endpoints() == ["<unmatched>"]
    assert eyes.total("opsguard_internal_errors_total", site="endpoint") == faults


def test_a_rule_of_another_host_does_not_name_a_refused_method(eyes: Eyes) -> None:
    app = Flask("shop", host_matching=True, static_host="localhost")
    install(app, eyes.ops)
    app.add_url_rule("/a/<id>", host="localhost", view_func=view, methods=["POST"])
    assert buffered(app).get("/a/7").status_code == 405
    assert buffered(app).get("/a/7", base_url="http://other/").status_code == 404
    assert eyes.endpoints() == ["/a/{id}", "<unmatched>"]


@pytest.mark.parametrize("nested", ["same", "other", "none"])
def test_apps_behind_a_dispatcher_are_named_with_their_mount(
    nested: str, eyes: Eyes, tmp_path: Path
) -> None:
    """The edge stands outside of the dispatcher, which moves the mount into SCRIPT_NAME."""
    (tmp_path / "admin").mkdir()
    app, admin = Flask("shop"), Flask("admin")
    for each in (app, admin):
        each.add_url_rule("/users/<id>", view_func=view)
    app.wsgi_app = DispatcherMiddleware(app.wsgi_app, {"/admin": admin})  # type: ignore[method-assign]
    install(app, eyes.ops)
    other = Eyes(tmp_path / "admin")
    if nested != "none":
        install(admin, eyes.ops if nested == "same" else other.ops)
    client = buffered(app)
    assert client.get("/users/7").status_code == client.get("/admin/users/7").status_code == 200
    inner = "<unmatched>" if nested == "none" else "/admin/users/{id}"
    assert eyes.endpoints() == ["/users/{id}", inner]
    assert [line["path"] for line in eyes.lines()] == ["/users/7", "/admin/users/7"]
    assert eyes.total("http_requests_total") == 2.0
    assert other.ops.installed is (nested == "other")


def test_a_dispatcher_around_guarded_apps_leaves_each_its_own(eyes: Eyes, tmp_path: Path) -> None:
    (tmp_path / "admin").mkdir()
    other = Eyes(tmp_path / "admin")
    app, admin = an_app(eyes), an_app(other)
    for each in (app, admin):
        each.add_url_rule("/users/<id>", view_func=view)
    client: Client = Client(DispatcherMiddleware(app, {"/admin": admin}))
    client.get("/users/7", buffered=True)
    client.get("/admin/users/7", buffered=True)
    client.get("/admin/metrics", buffered=True)
    assert eyes.endpoints() == ["/users/{id}"]
    assert [line["path"] for line in other.lines()] == ["/admin/users/7"]


# --- the route hook


def test_a_refusal_comes_before_the_apps_own_functions_and_goes_through_its_last_ones(
    eyes: Eyes,
) -> None:
    eyes.ops.at_route(lambda exchange: TEAPOT)
    app = Flask("shop")
    called: list[str] = []

    @app.before_request
    def before() -> None:
        called.append("before")

    @app.after_request
    def after(response: Any) -> Any:
        called.append("after")
        return response

    app.add_url_rule("/a", view_func=lambda: called.append("view"))
    install(app, eyes.ops)
    response = buffered(app).get("/a")
    assert (response.status_code, response.data) == (418, b"no")
    assert called == ["after"]


def test_the_view_is_known_at_the_route_also_when_it_was_replaced(
    eyes: Eyes, entered: list[Any]
) -> None:
    def other() -> str:
        return "other"

    app = an_app(eyes)
    app.add_url_rule("/a", endpoint="named", view_func=view)
    app.view_functions["named"] = other
    assert buffered(app).get("/a").text == "other"
    assert entered == [("/a", other)]


def test_a_hook_outside_of_an_edge_does_nothing(eyes: Eyes, entered: list[Any]) -> None:
    """`app.test_request_context` and full_dispatch_request go past the edge."""
    app = an_app(eyes)
    app.add_url_rule("/a", view_func=view)
    with app.test_request_context("/a"):
        assert app.full_dispatch_request().status_code == 200
    assert entered == []
    with app.test_request_context("/boom"):
        assert app.handle_exception(Boom()).status_code == 500
    assert eyes.samples() == {}


@pytest.mark.skipif(find_spec("asgiref") is None, reason="needs asgiref")
def test_async_views_have_the_context(eyes: Eyes, entered: list[Any]) -> None:
    app = an_app(eyes)

    @app.get("/a/<id>")
    async def serve(id: str) -> str:
        eyes.ops.bind(tenant_id=id)
        return eyes.ops.request_id or ""

    response = buffered(app).get("/a/7", headers={"X-Request-ID": "r-1"})
    assert response.text == "r-1"
    assert eyes.lines()[0]["tenant_id"] == "7"
    assert entered[0][0] == "/a/{id}"


# --- exceptions


def test_an_exception_is_answered_by_flask_and_counted_once(eyes: Eyes) -> None:
    app = an_app(eyes)
    response = buffered(app).get("/boom")
    assert response.status_code == 500
    assert b"Internal Server Error" in response.data
    assert len(response.headers.getlist("x-request-id")) == 1
    assert eyes.total("http_errors_total") == 1.0
    assert eyes.total("http_errors_total", error_type="Boom", endpoint="/boom") == 1.0


@pytest.mark.parametrize("option", ["TESTING", "DEBUG", "PROPAGATE_EXCEPTIONS"])
def test_an_exception_that_flask_lets_through_is_raised_by_the_call_and_counted_once(
    option: str, eyes: Eyes
) -> None:
    """Tests say ``with pytest.raises(Boom): client.get("/boom")``, debuggers wait for it."""
    app = an_app(eyes)
    app.config[option] = True
    with pytest.raises(Boom):
        app.test_client().get("/boom")
    assert eyes.total("http_errors_total") == 1.0
    assert eyes.total("http_errors_total", error_type="Boom", endpoint="/boom") == 1.0
    assert eyes.total("http_requests_total", endpoint="/boom", status="500") == 1.0
    assert eyes.total("http_requests_in_progress") == 0.0
    assert current.get() is None


def failing_stream() -> FlaskResponse:
    def parts() -> Iterator[str]:
        raise Boom("in the first piece")
        yield ""

    return FlaskResponse(parts())


@pytest.mark.parametrize("option", ["TESTING", "DEBUG", "PROPAGATE_EXCEPTIONS"])
def test_so_is_one_of_the_first_piece_of_a_stream(option: str, eyes: Eyes) -> None:
    app = an_app(eyes)
    app.add_url_rule("/stream", view_func=failing_stream)
    app.config[option] = True
    with pytest.raises(Boom):
        app.test_client().get("/stream")
    assert eyes.total("http_errors_total", error_type="Boom", endpoint="/stream") == 1.0
    assert eyes.total("http_errors_total") == 1.0
    assert eyes.total("http_requests_total", endpoint="/stream", status="500") == 1.0
    assert eyes.total("http_requests_in_progress") == 0.0
    assert current.get() is None


@pytest.mark.parametrize("testing", [False, True])
def test_an_exception_of_a_streams_first_piece_is_answered_where_it_is_not_let_through(
    testing: bool, eyes: Eyes
) -> None:
    app = an_app(eyes)
    app.testing = testing
    app.config["PROPAGATE_EXCEPTIONS"] = False
    app.add_url_rule("/stream", view_func=failing_stream)
    response = app.test_client().get("/stream")
    assert response.status_code == 500
    assert "X-Request-ID" in response.headers
    with pytest.raises(Boom):  # for the server, behind the answer
        response.get_data()
    response.close()
    assert eyes.total("http_errors_total", error_type="Boom") == 1.0


def test_an_exception_that_the_app_handles_is_none(eyes: Eyes) -> None:
    app = an_app(eyes)
    app.register_error_handler(Boom, lambda error: ("handled", 409))
    response = buffered(app).get("/boom")
    assert (response.status_code, response.text) == (409, "handled")
    assert eyes.total("http_errors_total") == 0.0


def test_an_exception_of_a_before_request_function_is_counted_under_the_rule(eyes: Eyes) -> None:
    app = an_app(eyes)
    app.add_url_rule("/a", view_func=view)

    @app.before_request
    def fail() -> None:
        raise Boom

    assert buffered(app).get("/a").status_code == 500
    assert eyes.total("http_errors_total", error_type="Boom", endpoint="/a") == 1.0


def test_exceptions_of_another_app_are_not_ours(eyes: Eyes) -> None:
    an_app(eyes)
    unguarded = Flask("other")
    unguarded.add_url_rule("/boom", view_func=boom)
    assert buffered(unguarded).get("/boom").status_code == 500
    assert eyes.samples() == {}


def test_an_aborted_view_is_no_exception(eyes: Eyes) -> None:
    app = an_app(eyes)
    app.add_url_rule("/a", view_func=lambda: abort(503))
    assert buffered(app).get("/a").status_code == 503
    assert eyes.total("http_errors_total", error_type="503") == 1.0
    assert eyes.total("http_errors_total") == 1.0


@pytest.mark.parametrize(
    "told",
    [
        pytest.param(StopIteration, id="gunicorn's way"),
        pytest.param(ConnectionError, id="Werkzeug's"),
        pytest.param(None, id="the others'"),
    ],
)
def test_a_websocket_is_101_and_holds_its_slot_until_it_ends(
    told: type[Exception] | None, eyes: Eyes
) -> None:
    """As Flask-Sock has them: the view returns when the socket is closed."""

    class Closed(FlaskResponse):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            if told is not None:
                raise told
            return []

    app = an_app(eyes)
    slot = eyes.ops.limit("1/minute", strategy="concurrency")
    app.add_url_rule("/ws/<room>", "ws", slot(lambda room: Closed()), websocket=True)
    for _ in range(2):
        environ = create_environ("/ws/1", headers={"Connection": "Upgrade", "Upgrade": "websocket"})
        raised: type[BaseException] | None = None
        try:
            assert list(app(environ, lambda *args: print)) == []
        except (StopIteration, ConnectionError) as stop:
            raised = type(stop)
        assert raised is told
    assert [(line["status_code"], line["endpoint"]) for line in eyes.lines()] == [
        (101, "/ws/{room}")
    ] * 2
    assert eyes.total("websocket_connections_total", endpoint="/ws/{room}") == 2.0
    assert eyes.total("http_requests_total") == eyes.total("http_errors_total") == 0.0
    assert eyes.total("http_requests_in_progress") == 0.0


# --- streams


def stream(told: list[str]) -> Any:
    def serve() -> FlaskResponse:
        def parts() -> Iterator[str]:
            try:
                for number in range(100):
                    yield f"{number} {current_app.name} {request.path}\n"
            finally:
                told.append("closed")

        return FlaskResponse(stream_with_context(parts()))

    return serve


def test_a_stream_closed_early_by_the_test_client_is_499(eyes: Eyes) -> None:
    told: list[str] = []
    app = an_app(eyes)
    app.add_url_rule("/stream", view_func=stream(told))
    response = app.test_client().get("/stream")
    assert next(response.iter_encoded()) == b"0 shop /stream\n"
    assert eyes.total("http_requests_in_progress", endpoint="/stream") == 1.0
    response.close()
    assert told == ["closed"]
    assert [line["status_code"] for line in eyes.lines()] == [499]
    assert eyes.total("http_requests_in_progress") == 0.0


def test_a_stream_read_to_its_end_is_whole(eyes: Eyes) -> None:
    app = an_app(eyes)
    app.add_url_rule("/stream", view_func=stream([]))
    with buffered(app).get("/stream") as response:
        size = len(response.data)
    (line,) = eyes.lines()
    assert (line["status_code"], line["size"]) == (200, size)


def test_an_edge_step_sees_requests_that_no_rule_matches(eyes: Eyes) -> None:
    seen: list[str] = []

    @eyes.ops.at_edge
    def watch(exchange: Exchange) -> None:
        seen.append(exchange.path)

    buffered(an_app(eyes)).get("/nothing")
    assert seen == ["/nothing"]


def test_click_commands_run_without_a_request(eyes: Eyes) -> None:
    app = an_app(eyes)

    @app.cli.command("job")
    def job() -> None:
        eyes.ops.bind(tenant_id="t")
        eyes.ops.logger("job").info("done")

    result = app.test_cli_runner().invoke(args=["job"])
    assert result.exit_code == 0, result.output


# --- limits and keys


def test_g_has_the_identity_of_the_key(tmp_path: Path) -> None:
    keys = {"pepper": "p" * 20, "store": f"sqlite:///{tmp_path}/keys.db"}
    eyes = Eyes(tmp_path, keys=keys)
    app = Flask(__name__)
    install(app, eyes.ops)
    app.get("/who")(lambda: g.opsguard_identity.tenant_id if g.opsguard_identity else "nobody")
    client = buffered(app)
    assert client.get("/who").text == "nobody"
    key = eyes.ops.keys.create("t1", "free")
    assert client.get("/who", headers={"Authorization": f"Bearer {key}"}).text == "t1"
    with app.app_context():
        assert g.opsguard_identity is None


def test_a_public_route_is_open_to_requests_that_come_with_the_first(tmp_path: Path) -> None:
    """One thread counts the routes while another one's request is there already."""
    eyes = Eyes(tmp_path, environment="development", keys={"required": ["/v1/*"]})
    app = Flask(__name__)
    install(app, eyes.ops)
    app.add_url_rule("/v1/status", "status", eyes.ops.public(view))
    rules, statuses = app.url_map.iter_rules, []

    def counted() -> Any:
        app.url_map.iter_rules = rules  # type: ignore[method-assign]
        other = threading.Thread(
            target=lambda: statuses.append(buffered(app).get("/v1/status").status_code)
        )
        other.start()
        other.join()
        return rules()

    app.url_map.iter_rules = counted  # type: ignore[method-assign, assignment]
    statuses.append(buffered(app).get("/v1/status").status_code)
    assert statuses == [200, 200]


def test_a_class_of_one_s_own_for_g_stays(eyes: Eyes) -> None:
    class Mine(Flask.app_ctx_globals_class):  # type: ignore[misc, name-defined]
        def hello(self) -> str:
            return "hello"

    app = Flask(__name__)
    app.app_ctx_globals_class = Mine
    install(app, eyes.ops)
    with app.app_context():
        assert (g.hello(), g.opsguard_identity) == ("hello", None)


def refuse() -> str:
    raise Refused(TEAPOT)


def test_a_refusal_raised_in_the_app_is_its_answer(eyes: Eyes) -> None:
    app = Flask(__name__)
    install(app, eyes.ops)
    app.get("/a")(refuse)
    answer = buffered(app).get("/a")
    assert (answer.status_code, answer.data) == (418, b"no")
    assert "X-Request-ID" in answer.headers
    assert eyes.total("http_errors_total") == 0.0


@pytest.mark.parametrize("testing", [False, True])
def test_a_refusal_in_the_first_piece_of_a_stream_is_its_answer(testing: bool, eyes: Eyes) -> None:
    """Flask has no handler for it any more: the view has returned by then."""

    @eyes.ops.limit("1/minute")
    def rare() -> str:
        return "rare"

    def parts() -> Iterator[str]:
        yield rare()

    app = Flask(__name__)
    app.testing = testing
    install(app, eyes.ops)
    app.add_url_rule("/a", view_func=lambda: FlaskResponse(parts()), endpoint="a")
    client = buffered(app)
    assert [client.get("/a").status_code for _ in range(3)] == [200, 429, 429]
    assert eyes.total("http_requests_total", endpoint="/a", status="429") == 2.0
    assert eyes.total("http_errors_total") == 0.0


def test_the_user_s_own_handler_of_refusals_counts(eyes: Eyes) -> None:
    app = Flask(__name__)
    app.register_error_handler(Refused, lambda error: ("mine", 419))
    install(app, eyes.ops)
    app.get("/a")(refuse)
    assert buffered(app).get("/a").text == "mine"


def test_flask_opsguard_limits_tells_what_is_limited(eyes: Eyes) -> None:
    app = Flask(__name__, static_folder=None)
    install(app, eyes.ops)
    app.get("/items/<int:id>")(eyes.ops.limit("1/minute")(view))
    runner = app.test_cli_runner()
    assert "limits" in runner.invoke(args=["opsguard", "--help"]).output
    shown = runner.invoke(args=["opsguard", "limits", "show"]).output
    assert "limiter: 1 route limited, 0 exempt, 0 uncovered" in shown
    asked = runner.invoke(args=["opsguard", "limits", "explain", "/items/7"]).output
    assert "the handler is decorated" in asked
    assert runner.invoke(args=["opsguard", "nonsense"]).exit_code == 2


def test_explain_takes_flask_s_request_and_an_environ(eyes: Eyes) -> None:
    app = Flask(__name__)
    ops = eyes.ops
    install(app, ops)
    told: list[Any] = []

    @app.get("/items/<int:id>")
    @ops.limit("5/minute")
    def item(id: int) -> str:
        told.extend(ops.limiter.explain(one) for one in (None, request, request.environ))
        return ""

    buffered(app).get("/items/1")
    assert told[0] == told[1] == told[2]
    assert told[0][1].policy.endswith("item")
    environ = {"REQUEST_METHOD": "GET", "PATH_INFO": "/items/7", "REMOTE_ADDR": "10.0.0.9"}
    assert ops.limiter.explain(environ)[1].buckets[0].endswith(":a:10.0.0.9")
    assert ops.limiter.explain({"REQUEST_METHOD": "GET", "PATH_INFO": "/\u20ac"})[1].policy == ""
