"""opsguard in FastAPI and Starlette: every way to declare a route, and the conventions of both."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Annotated, Any, ClassVar

import fastapi
import pytest
from fastapi import APIRouter, Depends, FastAPI, HTTPException, WebSocket
from fastapi.responses import JSONResponse, PlainTextResponse
from fastapi.testclient import TestClient
from starlette.applications import Starlette
from starlette.endpoints import HTTPEndpoint
from starlette.requests import Request
from starlette.routing import Host, Mount, Route, Router, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.websockets import WebSocketDisconnect

from opsguard import Exchange, InstallError, OpsGuard, OpsGuardError, Response, SettingsError
from opsguard.exceptions import Refused
from opsguard_fastapi import KeyIdentity, OptionalKeyIdentity, install
from tests.contract.harness import Samples, parse

TEAPOT = Response(418, (("Content-Length", "2"),), b"no")


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
    """Template and handler of each route that was entered."""
    seen: list[tuple[str | None, object]] = []
    eyes.ops.at_route(lambda exchange: seen.append((exchange.endpoint, exchange.marked)))
    return seen


async def text(request: Request) -> PlainTextResponse:
    return PlainTextResponse("text")


async def handler() -> str:
    return "handler"


# --- installing


def test_install_returns_the_opsguard_and_keeps_it_in_the_state(eyes: Eyes) -> None:
    app = FastAPI()
    assert install(app, eyes.ops) is eyes.ops
    assert app.state.opsguard is eyes.ops


def test_without_an_opsguard_one_is_made() -> None:
    app = Starlette()
    made = install(app)
    assert isinstance(made, OpsGuard)
    assert app.state.opsguard is made


def test_installing_the_same_twice_counts_once(eyes: Eyes) -> None:
    app = FastAPI()
    app.get("/a")(handler)
    install(app, eyes.ops)
    install(app, eyes.ops)
    assert TestClient(app).get("/a").status_code == 200
    assert eyes.total("http_requests_total") == 1.0


def test_another_opsguard_is_refused(eyes: Eyes) -> None:
    app = FastAPI()
    install(app, eyes.ops)
    with pytest.raises(InstallError, match="guarded by another OpsGuard already"):
        install(app, OpsGuard())


def test_an_app_that_serves_already_is_refused(eyes: Eyes) -> None:
    app = FastAPI()
    TestClient(app).get("/")
    with pytest.raises(InstallError, match="before the app serves its first request"):
        install(app, eyes.ops)


def test_one_opsguard_on_two_apps_counts_them_together(eyes: Eyes) -> None:
    for _ in range(2):
        app = FastAPI()
        app.get("/a")(handler)
        install(app, eyes.ops)
        TestClient(app).get("/a")
    assert eyes.total("http_requests_total", endpoint="/a") == 2.0


@pytest.mark.parametrize(
    ("title", "service"), [("FastAPI", None), ("Shop API", "Shop API")], ids=["default", "own"]
)
def test_the_apps_title_names_the_service_unless_it_is_the_default(
    title: str, service: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OTEL_SERVICE_NAME", raising=False)
    ops = OpsGuard()
    install(FastAPI(title=title, version="9.9"), ops)
    assert ops.settings.service == service or (service is None and ops.settings.service != title)
    assert ops.settings.version == "9.9"


# --- the test client


@pytest.mark.parametrize("lifespan", [True, False], ids=["with lifespan", "without"])
def test_the_test_client_works_with_and_without_lifespan(lifespan: bool, eyes: Eyes) -> None:
    told: list[str] = []

    @contextlib.asynccontextmanager
    async def span(app: FastAPI) -> AsyncIterator[None]:
        told.append("up")
        yield
        told.append("down")

    app = FastAPI(lifespan=span)
    app.get("/a")(handler)
    install(app, eyes.ops)
    client = TestClient(app)
    with client if lifespan else contextlib.nullcontext():
        for _ in range(2):
            assert client.get("/a").json() == "handler"
        assert 'endpoint="/a"' in client.get("/metrics").text
    assert told == (["up", "down"] if lifespan else [])
    assert eyes.total("http_requests_total", endpoint="/a") == 2.0


def test_the_test_client_raises_the_apps_exception_once_counted(eyes: Eyes) -> None:
    app = FastAPI()

    @app.get("/boom")
    async def boom() -> None:
        raise Boom

    install(app, eyes.ops)
    with pytest.raises(Boom):
        TestClient(app).get("/boom")
    quiet = TestClient(app, raise_server_exceptions=False).get("/boom")
    assert (quiet.status_code, quiet.text) == (500, "Internal Server Error")
    assert len(quiet.headers.get_list("x-request-id")) == 1
    assert eyes.total("http_errors_total", error_type="Boom", endpoint="/boom") == 2.0


# --- routes: the label is the whole template


def direct(app: FastAPI) -> str:
    app.get("/items/{id:int}")(lambda id: id)
    return "/items/7"


def included(app: FastAPI) -> str:
    router = APIRouter(prefix="/users")
    router.get("/{id}")(lambda id: id)
    app.include_router(router, prefix="/api")
    return "/api/users/7"


def nested(app: FastAPI) -> str:
    inner, middle = APIRouter(), APIRouter(prefix="/v{version}")
    inner.get("/items/{id}")(lambda version, tenant, id: id)
    middle.include_router(inner, prefix="/t/{tenant}")
    app.include_router(middle)
    return "/v1/t/acme/items/7"


def twice(app: FastAPI) -> str:
    """One router under two prefixes: each request has the template of its own path."""
    router = APIRouter()
    router.get("/{id}")(lambda id: id)
    app.include_router(router, prefix="/one")
    app.include_router(router, prefix="/two")
    return "/two/7"


def grown(app: FastAPI) -> str:
    """A route that its router got after it was included."""
    router = APIRouter()
    app.include_router(router, prefix="/grown")
    router.get("/{id}")(lambda id: id)
    return "/grown/7"


def plain(app: FastAPI) -> str:
    app.add_route("/plain/{id}", text)
    return "/plain/7"


def of_a_class(app: FastAPI) -> str:
    class View(HTTPEndpoint):
        async def get(self, request: Request) -> PlainTextResponse:
            return PlainTextResponse("class")

    app.add_route("/class/{id}", View)
    return "/class/7"


def plain_in_a_router(app: FastAPI) -> str:
    router = APIRouter()
    router.add_route("/plain/{id}", text)
    app.include_router(router, prefix="/in")
    return "/in/plain/7"


def below_a_mount(app: FastAPI) -> str:
    app.mount("/m/{tenant}", Starlette(routes=[Route("/items/{id}", text)]))
    return "/m/acme/items/7"


def below_two_mounts(app: FastAPI) -> str:
    inner = Router([Route("/items/{id}", text)])
    app.mount("/outer/{a}", Router([Mount("/inner/{b}", app=inner)]))
    return "/outer/1/inner/2/items/3"


def below_a_wrapped_mount(app: FastAPI) -> str:
    """Middleware around the mounted app hides its routes no longer than its attribute `app`."""

    class Middleware:
        def __init__(self, app: Any) -> None:
            self.app = app

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            await self.app(scope, receive, send)

    app.mount("/w", Middleware(Starlette(routes=[Route("/items/{id}", text)])))
    return "/w/items/7"


def a_mounted_app_without_routes(app: FastAPI) -> str:
    async def raw(scope: Any, receive: Any, send: Any) -> None:
        await PlainTextResponse("raw")(scope, receive, send)

    app.mount("/raw", raw)
    return "/raw/any/thing"


def a_sub_application(app: FastAPI) -> str:
    sub = FastAPI()
    sub.get("/items/{id}")(lambda id: id)
    app.mount("/sub", sub)
    return "/sub/items/7"


def in_a_router_of_a_sub_application(app: FastAPI) -> str:
    sub, router = FastAPI(), APIRouter(prefix="/users")
    router.get("/{id}")(lambda id: id)
    sub.include_router(router, prefix="/api")
    app.mount("/sub/{tenant}", sub)
    return "/sub/acme/api/users/7"


def in_a_mount_of_a_router(app: FastAPI) -> str:
    sub, router = FastAPI(), APIRouter()
    sub.get("/items/{id}")(lambda id: id)
    router.mount("/sub", sub)
    app.include_router(router, prefix="/v1")
    return "/v1/sub/items/7"


def in_itself(app: FastAPI) -> str:
    """An alias for a prefix: the route is the same, and so are its limits."""
    app.get("/own/{id}")(lambda id: id)
    app.mount("/alias", app)
    app.mount("/other", app)
    return "/alias/own/7"


class Answering:
    """A mounted app of another framework."""

    routes: Any = ()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await PlainTextResponse("theirs")(scope, receive, send)


def with_routes_of_another_framework(app: FastAPI) -> str:
    """Litestar's have slots."""

    class HTTPRoute:
        __slots__ = ("path",)

    theirs = Answering()
    theirs.routes = [HTTPRoute()]
    app.mount("/theirs", theirs)
    return "/theirs/items"


def behind_a_bridge_to_wsgi(app: FastAPI) -> str:
    """Bottle has routes and a router."""

    class Bottle:
        routes: ClassVar[list[object]] = [object()]
        router = object()

    bridge = Answering()
    bridge.app = Bottle()  # type: ignore[attr-defined]
    app.mount("/old", bridge)
    return "/old/items"


def for_one_host(app: FastAPI) -> str:
    app.router.routes.append(Host("testserver", Router([Route("/host/{id}", text)])))
    return "/host/7"


ROUTES = {
    direct: "/items/{id}",
    included: "/api/users/{id}",
    nested: "/v{version}/t/{tenant}/items/{id}",
    twice: "/two/{id}",
    grown: "/grown/{id}",
    plain: "/plain/{id}",
    of_a_class: "/class/{id}",
    plain_in_a_router: "/in/plain/{id}",
    below_a_mount: "/m/{tenant}/items/{id}",
    below_two_mounts: "/outer/{a}/inner/{b}/items/{id}",
    below_a_wrapped_mount: "/w/items/{id}",
    a_mounted_app_without_routes: "/raw/{path}",
    a_sub_application: "/sub/items/{id}",
    in_a_router_of_a_sub_application: "/sub/{tenant}/api/users/{id}",
    for_one_host: "/host/{id}",
    in_a_mount_of_a_router: "/v1/sub/items/{id}",
    in_itself: "/own/{id}",
    with_routes_of_another_framework: "/theirs/{path}",
    behind_a_bridge_to_wsgi: "/old/{path}",
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("declare", ROUTES, ids=lambda declare: declare.__name__)
def test_a_route_is_entered_under_its_whole_template(
    declare: Callable[[FastAPI], str], when: str, eyes: Eyes, entered: list[Any]
) -> None:
    """Whether it was declared before install or after."""
    app = FastAPI()
    if when == "before":
        path = declare(app)
        install(app, eyes.ops)
    else:
        install(app, eyes.ops)
        path = declare(app)
    for _ in range(2):
        assert TestClient(app).get(path).status_code == 200
    template = ROUTES[declare]
    assert eyes.total("opsguard_internal_errors_total") == 0.0
    assert [endpoint for endpoint, _ in entered] == [template] * 2
    assert eyes.endpoints() == [template] * 2
    assert eyes.total("http_requests_total", endpoint=template, status="200") == 2.0
    assert eyes.total("http_requests_in_progress") == 0.0


@pytest.mark.parametrize("declare", ROUTES, ids=lambda declare: declare.__name__)
def test_a_route_added_while_serving_is_named_at_once_and_entered_from_the_second_request_on(
    declare: Callable[[FastAPI], str], eyes: Eyes, entered: list[Any]
) -> None:
    app = FastAPI()
    app.get("/first")(handler)
    install(app, eyes.ops)
    client = TestClient(app)
    client.get("/first")
    entered.clear()
    path = declare(app)
    for _ in range(2):
        assert client.get(path).status_code == 200
    template = ROUTES[declare]
    assert eyes.endpoints()[1:] == [template] * 2
    assert [endpoint for endpoint, _ in entered][-1:] == [template]


def test_the_handler_is_known_at_the_route(eyes: Eyes, entered: list[Any]) -> None:
    router = APIRouter()
    router.get("/b")(handler)
    app = FastAPI()
    app.get("/a")(handler)
    app.add_route("/c", text)
    app.include_router(router, prefix="/r")
    install(app, eyes.ops)
    for path in ("/a", "/r/b", "/c"):
        TestClient(app).get(path)
    assert entered == [("/a", handler), ("/r/b", handler), ("/c", text)]


def test_static_files_are_one_route(eyes: Eyes, tmp_path: Path) -> None:
    (tmp_path / "static").mkdir()
    for name in ("a.txt", "b.txt"):
        (tmp_path / "static" / name).write_text(name)
    app = FastAPI()
    app.mount("/static", StaticFiles(directory=tmp_path / "static"), name="static")
    install(app, eyes.ops)
    client = TestClient(app)
    statuses = [client.get(f"/static/{n}").status_code for n in ("a.txt", "b.txt", "c.txt")]
    assert statuses == [200, 200, 404]
    assert eyes.endpoints() == ["/static/{path}"] * 3


@pytest.mark.skipif(not hasattr(FastAPI, "frontend"), reason="needs FastAPI.frontend")
def test_a_frontend_is_one_route_behind_the_others(eyes: Eyes, tmp_path: Path) -> None:
    (tmp_path / "dist").mkdir()
    (tmp_path / "dist" / "index.html").write_text("<p>hello</p>")
    (tmp_path / "dist" / "app.js").write_text("1")
    app = FastAPI()
    app.get("/api")(handler)
    app.frontend("/", directory=tmp_path / "dist")
    install(app, eyes.ops)
    client = TestClient(app)
    for path in ("/app.js", "/", "/api"):
        assert client.get(path).status_code == 200
    first, second, third = eyes.endpoints()
    assert first == second != "<unmatched>"
    assert "app.js" not in first
    assert third == "/api"


@pytest.mark.skipif(not hasattr(FastAPI, "frontend"), reason="needs FastAPI.frontend")
@pytest.mark.parametrize("depth", [1, 2])
def test_a_frontend_of_an_included_router_is_entered(
    depth: int, eyes: Eyes, entered: list[Any], tmp_path: Path
) -> None:
    (tmp_path / "dist").mkdir()
    (tmp_path / "dist" / "app.js").write_text("1")
    router = APIRouter()
    router.frontend("/", directory=tmp_path / "dist")
    for _ in range(depth - 1):
        outer = APIRouter()
        outer.include_router(router)
        router = outer
    app = FastAPI()
    install(app, eyes.ops)
    app.include_router(router, prefix="/ui")
    client = TestClient(app)
    for _ in range(2):
        assert client.get("/ui/app.js").status_code == 200
    assert len(entered) == 2
    assert eyes.endpoints() == [entered[0][0]] * 2


def test_a_method_that_a_middleware_changes_is_the_one_that_counts_for_the_route(
    eyes: Eyes, entered: list[Any]
) -> None:
    """A HEAD that is served as a GET, say: what the router serves it must pass the route's hook."""

    class HeadAsGet:
        def __init__(self, app: Any) -> None:
            self.app = app

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] == "http" and scope["method"] == "HEAD":
                scope = {**scope, "method": "GET"}
            await self.app(scope, receive, send)

    app = FastAPI()
    app.get("/a")(handler)
    app.add_middleware(HeadAsGet)
    install(app, eyes.ops)
    assert TestClient(app).head("/a").status_code == 200
    assert [endpoint for endpoint, _ in entered] == ["/a"]


def test_a_limit_holds_for_all_paths_of_an_app_that_is_mounted_in_itself(eyes: Eyes) -> None:
    app = FastAPI()
    app.get("/a")(eyes.ops.limit("1/hour")(handler))
    app.mount("/self", app)
    install(app, eyes.ops)
    client = TestClient(app)
    statuses = [client.get(f"{'/self' * times}/a").status_code for times in (0, 1, 2, 1)]
    assert statuses == [200, 429, 429, 429]


def test_routers_in_one_another_serve(eyes: Eyes, entered: list[Any]) -> None:
    one, other = Router(), Router()
    one.mount("/x", other)
    other.mount("/x", one)
    one.add_route("/a", text)
    app = Starlette(routes=[Mount("/r", app=one)])
    install(app, eyes.ops)
    for path in ("/r/a", "/r/x/x/a"):
        assert TestClient(app).get(path).status_code == 200
    assert [endpoint for endpoint, _ in entered] == ["/r/a"] * 2


def test_the_documentation_has_routes_of_its_own(eyes: Eyes) -> None:
    app = FastAPI()
    install(app, eyes.ops)
    for path in ("/docs", "/openapi.json", "/redoc"):
        assert TestClient(app).get(path).status_code == 200
    assert eyes.endpoints() == ["/docs", "/openapi.json", "/redoc"]


def test_the_openapi_document_is_the_same_as_without_us(eyes: Eyes) -> None:
    def make() -> FastAPI:
        app = FastAPI()
        included(app)
        direct(app)
        return app

    guarded = make()
    install(guarded, eyes.ops)
    assert TestClient(guarded).get("/openapi.json").json() == make().openapi()


@pytest.mark.parametrize("path", ["/nothing", "/sub/nothing", "/api/users/7/nothing"])
def test_unmatched_paths_are_one_series(path: str, eyes: Eyes, entered: list[Any]) -> None:
    app = FastAPI()
    included(app)
    a_sub_application(app)
    install(app, eyes.ops)
    assert TestClient(app).get(path).status_code == 404
    assert eyes.endpoints() == ["<unmatched>"]
    assert entered == []


def test_a_refused_method_keeps_the_template_and_enters_nothing(
    eyes: Eyes, entered: list[Any]
) -> None:
    app = FastAPI()
    paths = [declare(app) for declare in (included, plain, below_a_mount, a_sub_application)]
    install(app, eyes.ops)
    for path in paths:
        assert TestClient(app).delete(path).status_code == 405
    assert eyes.endpoints() == [
        ROUTES[declare] for declare in (included, plain, below_a_mount, a_sub_application)
    ]
    assert entered == []


def test_a_method_that_another_route_of_the_path_takes_is_entered_there(
    eyes: Eyes, entered: list[Any]
) -> None:
    async def create() -> str:
        return "created"

    app = FastAPI()
    app.get("/items")(handler)
    app.post("/items")(create)
    install(app, eyes.ops)
    assert TestClient(app).post("/items").json() == "created"
    assert entered == [("/items", create)]


def test_a_redirect_to_the_path_with_a_slash_is_unmatched_and_its_target_is_not(
    eyes: Eyes,
) -> None:
    app = FastAPI()
    app.get("/items/")(handler)
    install(app, eyes.ops)
    assert TestClient(app).get("/items").status_code == 200
    assert [line["status_code"] for line in eyes.lines()] == [307, 200]
    assert eyes.endpoints() == ["<unmatched>", "/items/"]


@pytest.mark.parametrize("separate", [False, True], ids=["the same OpsGuard", "one of its own"])
def test_a_sub_application_with_its_own_install_counts_once(
    separate: bool, eyes: Eyes, entered: list[Any], tmp_path: Path
) -> None:
    (tmp_path / "sub").mkdir()
    other = Eyes(tmp_path / "sub") if separate else eyes
    app, sub = FastAPI(), FastAPI()
    sub.get("/items/{id}")(lambda id: id)
    install(sub, other.ops)
    app.mount("/sub/{tenant}", sub)
    install(app, eyes.ops)
    for _ in range(2):
        response = TestClient(app).get("/sub/acme/items/7")
        assert response.json() == "7"
        assert len(response.headers.get_list("x-request-id")) == 1
    assert eyes.endpoints() == ["/sub/{tenant}/items/{id}"] * 2
    assert eyes.total("http_requests_total") == 2.0
    assert len(entered) == 2
    TestClient(sub).get("/items/7")
    assert other.endpoints()[-1] == "/items/{id}"


def test_one_router_in_two_guarded_apps_reports_to_the_app_that_serves(tmp_path: Path) -> None:
    router = APIRouter()
    router.get("/{id}")(lambda id: id)
    pairs = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        found, app = Eyes(tmp_path / name), FastAPI()
        app.include_router(router, prefix=f"/{name}")
        install(app, found.ops)
        pairs.append((found, TestClient(app)))
    for (_, client), name in zip(pairs, ("one", "two"), strict=True):
        assert client.get(f"/{name}/7").status_code == 200
    assert [found.endpoints() for found, _ in pairs] == [["/one/{id}"], ["/two/{id}"]]


def test_a_route_that_was_hooked_still_serves_without_us(eyes: Eyes) -> None:
    """Its hook finds no exchange: the mounted app is served by itself."""
    sub = FastAPI()
    sub.get("/items/{id}")(lambda id: id)
    app = FastAPI()
    app.mount("/sub", sub)
    install(app, eyes.ops)
    TestClient(app).get("/sub/items/7")
    assert TestClient(sub).get("/items/8").json() == "8"
    assert len(eyes.lines()) == 1


# --- refusing at the route


def refusing(eyes: Eyes) -> None:
    @eyes.ops.at_route
    def refuse(exchange: Exchange) -> Response | None:
        return TEAPOT


@pytest.mark.parametrize("declare", ROUTES, ids=lambda declare: declare.__name__)
def test_every_kind_of_route_can_be_refused_before_anything_runs(
    declare: Callable[[FastAPI], str], eyes: Eyes
) -> None:
    def dependency() -> None:
        pytest.fail("a dependency ran")

    refusing(eyes)
    app = FastAPI(dependencies=[Depends(dependency)])
    path = declare(app)
    install(app, eyes.ops)
    response = TestClient(app).get(path)
    assert (response.status_code, response.content) == (418, b"no")
    assert len(response.headers.get_list("x-request-id")) == 1


def test_a_refusal_goes_out_through_the_apps_own_middleware(eyes: Eyes) -> None:
    refusing(eyes)
    app = FastAPI()
    app.get("/a")(handler)

    @app.middleware("http")
    async def mark(request: Request, call_next: Any) -> Any:
        response = await call_next(request)
        response.headers["x-mark"] = "seen"
        return response

    install(app, eyes.ops)
    response = TestClient(app).get("/a")
    assert (response.status_code, response.headers["x-mark"]) == (418, "seen")


# --- exceptions


def test_exception_handlers_of_the_app_are_kept(eyes: Eyes) -> None:
    app = FastAPI()

    @app.exception_handler(Boom)
    async def on_boom(request: Request, error: Boom) -> JSONResponse:
        return JSONResponse({"mine": True}, 409)

    @app.exception_handler(Exception)
    async def on_any(request: Request, error: Exception) -> JSONResponse:
        return JSONResponse({"any": True}, 500)

    @app.get("/boom")
    async def boom() -> None:
        raise Boom

    @app.get("/any")
    async def other() -> None:
        raise LookupError

    @app.get("/http")
    async def http() -> None:
        raise HTTPException(403, "no")

    @app.get("/validated")
    async def validated(number: int) -> None:
        return None

    install(app, eyes.ops)
    client = TestClient(app, raise_server_exceptions=False)
    answers = [client.get(path) for path in ("/boom", "/any", "/http", "/validated?number=x")]
    assert [a.status_code for a in answers] == [409, 500, 403, 422]
    assert [answers[0].json(), answers[1].json(), answers[2].json()] == [
        {"mine": True},
        {"any": True},
        {"detail": "no"},
    ]
    assert answers[3].json()["detail"][0]["loc"] == ["query", "number"]
    assert all(len(answer.headers.get_list("x-request-id")) == 1 for answer in answers)
    assert eyes.total("http_errors_total") == 1.0
    assert eyes.total("http_errors_total", error_type="LookupError", endpoint="/any") == 1.0


def test_an_exception_of_a_background_task_is_counted_once(eyes: Eyes) -> None:
    app = FastAPI()

    def fail() -> None:
        raise Boom

    @app.get("/a")
    async def serve(tasks: fastapi.BackgroundTasks) -> str:
        tasks.add_task(fail)
        return "soon"

    install(app, eyes.ops)
    assert TestClient(app, raise_server_exceptions=False).get("/a").json() == "soon"
    assert eyes.total("http_requests_total", status="200") == 1.0
    assert eyes.total("http_errors_total", error_type="Boom") == 1.0


# --- websockets


@pytest.fixture
def sockets(eyes: Eyes) -> FastAPI:
    app, router = FastAPI(), APIRouter(prefix="/rooms")

    async def echo(websocket: WebSocket) -> None:
        await websocket.accept(headers=[(b"x-a", b"1")])
        eyes.ops.bind(tenant_id="t-1")
        try:
            while True:
                await websocket.send_text(f"{eyes.ops.request_id} {await websocket.receive_text()}")
        except WebSocketDisconnect:
            return

    router.websocket("/{room}")(echo)
    app.websocket("/ws/{id}")(echo)
    app.include_router(router)
    app.mount("/m/{tenant}", Starlette(routes=[WebSocketRoute("/ws/{id}", echo)]))
    return app


@pytest.mark.parametrize(
    ("path", "endpoint"),
    [
        pytest.param("/ws/7", "/ws/{id}", id="direct"),
        pytest.param("/rooms/7", "/rooms/{room}", id="included"),
        pytest.param("/m/acme/ws/7", "/m/{tenant}/ws/{id}", id="mounted"),
    ],
)
def test_a_websocket_has_ids_metrics_and_one_line(
    path: str, endpoint: str, eyes: Eyes, sockets: FastAPI
) -> None:
    install(sockets, eyes.ops)
    with TestClient(sockets).websocket_connect(path, headers={"X-Request-ID": "w-1"}) as socket:
        accepted = dict(socket.extra_headers)
        assert (accepted[b"x-request-id"], accepted[b"x-a"]) == (b"w-1", b"1")
        socket.send_text("hey")
        assert socket.receive_text() == "w-1 hey"
        assert eyes.total("websocket_connections_in_progress", endpoint=endpoint) == 1.0
    assert eyes.total("websocket_connections_in_progress") == 0.0
    assert eyes.total("websocket_connections_total", endpoint=endpoint) == 1.0
    (line,) = eyes.lines()
    assert (line["endpoint"], line["status_code"], line["tenant_id"]) == (endpoint, 101, "t-1")
    assert line["request_id"] == "w-1"


@pytest.mark.parametrize("where", ["at_edge", "at_route"])
@pytest.mark.parametrize("path", ["/ws/7", "/rooms/7", "/m/acme/ws/7"])
def test_a_refused_websocket_never_reaches_its_handler(
    where: str, path: str, eyes: Eyes, sockets: FastAPI
) -> None:
    getattr(eyes.ops, where)(lambda exchange: TEAPOT)
    install(sockets, eyes.ops)
    client = TestClient(sockets)
    with pytest.raises(WebSocketDisconnect) as closed, client.websocket_connect(path):
        pytest.fail("it was accepted")
    assert closed.value.code == 1008
    assert [line["status_code"] for line in eyes.lines()] == [403]
    assert eyes.total("websocket_connections_total") == 0.0


def test_an_unmatched_websocket_is_403(eyes: Eyes, sockets: FastAPI) -> None:
    install(sockets, eyes.ops)
    client = TestClient(sockets)
    with pytest.raises(WebSocketDisconnect), client.websocket_connect("/nothing"):
        pytest.fail("it was accepted")
    (line,) = eyes.lines()
    assert (line["endpoint"], line["status_code"]) == ("<unmatched>", 403)


# --- Starlette alone


def test_a_starlette_app_is_guarded_just_so(eyes: Eyes, entered: list[Any]) -> None:
    async def boom(request: Request) -> PlainTextResponse:
        raise Boom

    app = Starlette(
        routes=[
            Route("/items/{id:int}", text),
            Route("/boom", boom),
            Mount("/m/{a}", routes=[Route("/b/{c}", text)]),
        ]
    )
    install(app, eyes.ops)
    client = TestClient(app, raise_server_exceptions=False)
    for path in ("/items/7", "/boom", "/m/1/b/2", "/nothing"):
        client.get(path)
    assert eyes.endpoints() == ["/items/{id}", "/boom", "/m/{a}/b/{c}", "<unmatched>"]
    assert [endpoint for endpoint, _ in entered] == ["/items/{id}", "/boom", "/m/{a}/b/{c}"]
    assert eyes.total("http_errors_total", error_type="Boom") == 1.0


def test_a_starlette_route_added_while_serving_is_named_at_once(
    eyes: Eyes, entered: list[Any]
) -> None:
    app = Starlette()
    install(app, eyes.ops)
    client = TestClient(app)
    client.get("/")
    app.add_route("/late/{id}", text)
    for _ in range(2):
        assert client.get("/late/7").status_code == 200
    assert eyes.endpoints() == ["<unmatched>", "/late/{id}", "/late/{id}"]
    assert [endpoint for endpoint, _ in entered][-1:] == ["/late/{id}"]


def test_without_fastapi_routes_are_taken_as_starlette_has_them(
    eyes: Eyes, entered: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "fastapi.routing", None)
    app = Starlette(routes=[Route("/items/{id}", text)])
    install(app, eyes.ops)
    assert TestClient(app).get("/items/7").status_code == 200
    assert [endpoint for endpoint, _ in entered] == ["/items/{id}"]


# --- what we rely on and FastAPI does not promise


def test_the_private_names_of_fastapi_that_we_rely_on_are_there() -> None:
    """When this fails, read `opsguard_fastapi.routes` beside FastAPI's routing module."""
    if tuple(map(int, fastapi.__version__.split(".")[:2])) < (0, 137):
        pytest.skip("this FastAPI copies included routes itself")
    from fastapi import routing

    router = APIRouter()
    router.get("/{id}")(handler)
    app = FastAPI()
    app.include_router(router, prefix="/api")
    contexts = list(routing.iter_route_contexts(app.router.routes))
    assert all(hasattr(context, "original_route") for context in contexts)
    assert all(hasattr(context, "_effective_route") for context in contexts)
    if hasattr(FastAPI, "frontend"):
        assert hasattr(app.router, "_low_priority_routes")
    seen: list[Any] = []

    @app.get("/scope")
    async def scope_of(request: Request) -> None:
        seen.append(request.scope)

    @router.get("/in/{id}")
    async def inside(request: Request, id: str) -> None:
        seen.append(request.scope)

    TestClient(app).get("/api/in/7")
    context = seen[0]["fastapi"]["effective_route_context"]
    assert context.path_format == "/api/in/{id}"
    assert context.original_route is seen[0]["route"]


def test_starlette_calls_handle_of_the_route_it_chose() -> None:
    """Our hook is an attribute `handle` of the route itself."""
    assert list(inspect.signature(Route.handle).parameters) == ["self", "scope", "receive", "send"]
    app = Starlette(routes=[Route("/a", text)])
    called: list[str] = []
    route: Any = app.router.routes[0]
    handle = route.handle

    def watched(scope: Any, receive: Any, send: Any) -> Any:
        called.append(scope["path"])
        return handle(scope, receive, send)

    route.handle = watched
    TestClient(app).get("/a")
    assert called == ["/a"]


# --- limits and keys

PEPPER = "p" * 20


@pytest.fixture
def keyed(tmp_path: Path) -> Eyes:
    return Eyes(
        tmp_path,
        keys={
            "required": ["/api/*"],
            "pepper": PEPPER,
            "store": f"sqlite:///{tmp_path}/keys.db",
            "master": "mastermaster",
        },
        limiter={"policies": {"/auth/*": "99/minute"}, "tiers": {"free": "9/minute"}},
    )


def operation(app: FastAPI, path: str, method: str = "get") -> dict[str, Any]:
    found: dict[str, Any] = app.openapi()["paths"][path][method]
    return found


OURS = [{"OpsGuardKey": []}, {"OpsGuardBearer": []}]


def test_openapi_shows_keys_and_the_answers_that_may_come(keyed: Eyes) -> None:
    ops, app = keyed.ops, FastAPI()
    install(app, ops)
    router = APIRouter()
    router.get("/deep/{id}")(ops.require_key(tiers=("pro",))(handler))
    app.include_router(router, prefix="/in")
    app.get("/api/x")(handler)
    app.get("/api/open")(ops.public(handler))
    app.get("/auth/login")(handler)
    app.get("/plain")(handler)

    told = {
        path: (found["get"].get("security"), sorted(found["get"]["responses"]))
        for path, found in app.openapi()["paths"].items()
    }
    assert told == {
        "/in/deep/{id}": (OURS, ["200", "401", "403", "429"]),
        "/api/x": (OURS, ["200", "401", "429"]),
        "/api/open": (None, ["200"]),
        "/auth/login": (None, ["200", "429"]),
        "/plain": (None, ["200"]),
    }
    components = app.openapi()["components"]
    assert components["securitySchemes"] == {
        "OpsGuardKey": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
        "OpsGuardBearer": {"type": "http", "scheme": "bearer"},
    }
    assert "OpsGuardProblem" in components["schemas"]
    answer = operation(app, "/auth/login")["responses"]["429"]
    assert "Retry-After" in answer["headers"]
    assert "application/problem+json" in answer["content"]


def test_openapi_keeps_what_the_user_says(keyed: Eyes) -> None:
    app = FastAPI()
    install(app, keyed.ops)
    bearer = fastapi.security.HTTPBearer()
    app.get("/api/x", responses={401: {"description": "mine"}}, dependencies=[Depends(bearer)])(
        handler
    )
    found = operation(app, "/api/x")
    assert found["security"] == [{"HTTPBearer": []}]
    assert found["responses"]["401"] == {"description": "mine"}
    assert "429" in found["responses"]


def test_openapi_is_made_once_and_as_the_user_makes_it(keyed: Eyes) -> None:
    app = FastAPI()
    install(app, keyed.ops)
    app.get("/api/x")(handler)
    made = app.openapi()
    assert app.openapi() is made
    assert app.openapi_schema is made

    def custom() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = fastapi.openapi.utils.get_openapi(
                title="mine", version="9", routes=app.routes
            )
        return app.openapi_schema

    app.openapi_schema = None
    app.openapi = custom  # type: ignore[method-assign]
    served = TestClient(app).get("/openapi.json").json()
    assert served["info"]["title"] == "mine"
    assert served["paths"]["/api/x"]["get"]["security"] == OURS


def test_openapi_without_keys_and_limits_is_what_fastapi_makes(eyes: Eyes) -> None:
    app, bare = FastAPI(), FastAPI()
    install(app, eyes.ops)
    for one in (app, bare):
        one.get("/a")(handler)
    assert app.openapi() == bare.openapi()


def test_a_fault_of_ours_leaves_openapi_as_it_is(
    keyed: Eyes, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = FastAPI()
    install(app, keyed.ops)
    app.get("/api/x")(handler)
    monkeypatch.setattr("opsguard_fastapi.openapi.demand", lambda *_: 1 / 0)
    assert "security" not in operation(app, "/api/x")


def test_the_identity_of_the_key_is_a_dependency(keyed: Eyes) -> None:
    app = FastAPI()
    install(app, keyed.ops)

    @app.get("/strict")
    async def strict(who: KeyIdentity) -> str:
        return who.tenant_id

    @app.get("/loose")
    def loose(who: OptionalKeyIdentity) -> str:
        return "nobody" if who is None else who.tenant_id

    client = TestClient(app)
    key = {"X-API-Key": keyed.ops.keys.create("t1", "free")}
    assert client.get("/loose").json() == "nobody"
    assert client.get("/loose", headers=key).json() == "t1"
    assert client.get("/strict", headers=key).json() == "t1"
    refused = client.get("/strict")
    assert (refused.status_code, refused.json()["error"]) == (401, "missing_api_key")
    assert "WWW-Authenticate" in refused.headers
    wrong = client.get("/strict", headers={"X-API-Key": "ops_free_wrong"})
    assert (wrong.status_code, wrong.json()["error"]) == (401, "invalid_api_key")


def of_tenant(who: KeyIdentity) -> str:
    return who.tenant_id


def or_nobody(who: OptionalKeyIdentity) -> str:
    return "nobody" if who is None else who.tenant_id


def by_parameter(app: FastAPI) -> None:
    app.get("/who")(of_tenant)


def by_option(app: FastAPI) -> None:
    app.get("/who")(or_nobody)


def by_another_dependency(app: FastAPI) -> None:
    @app.get("/who")
    async def who(tenant: Annotated[str, Depends(of_tenant)]) -> str:
        return tenant


def in_a_router(app: FastAPI) -> None:
    inner, outer = APIRouter(), APIRouter()
    inner.get("/who")(of_tenant)
    outer.include_router(inner)
    app.include_router(outer)


def by_a_router(app: FastAPI) -> None:
    router = APIRouter(dependencies=[Depends(of_tenant)])

    @router.get("/who")
    async def who() -> str:
        return "t1"

    app.include_router(router)


def in_a_mount(app: FastAPI) -> None:
    below = FastAPI()
    below.get("/")(of_tenant)
    app.mount("/who", below)


def in_a_mount_of_an_included_router(app: FastAPI) -> None:
    below, router = FastAPI(), APIRouter()
    below.get("/")(of_tenant)
    router.mount("/who", below)
    app.include_router(router)


@pytest.mark.parametrize(
    "declare",
    [
        by_parameter,
        by_option,
        by_another_dependency,
        in_a_router,
        by_a_router,
        in_a_mount,
        in_a_mount_of_an_included_router,
    ],
)
def test_whoever_asks_for_the_identity_switches_keys_on(
    declare: Callable[[FastAPI], None], tmp_path: Path
) -> None:
    keys, metrics = {"store": f"sqlite:///{tmp_path / 'keys.db'}"}, {"directory": str(tmp_path)}
    ops = OpsGuard("shop", environment="development", keys=keys, metrics=metrics)
    app = FastAPI()
    install(app, ops)
    declare(app)
    key = ops.keys.create("t1")
    with TestClient(app) as client:
        assert client.get("/who", headers={"X-API-Key": key}).json() == "t1"
        without = client.get("/who")
    assert without.status_code == (200 if declare is by_option else 401)
    ops.keys.close()


def test_identities_without_a_pepper_are_an_error_at_start(tmp_path: Path) -> None:
    ops = OpsGuard("shop", environment="production", metrics={"directory": str(tmp_path)})
    app = FastAPI()
    install(app, ops)
    by_parameter(app)
    with pytest.raises(SettingsError, match="OPSGUARD_KEYS__PEPPER"), TestClient(app):
        pass


def test_no_keys_are_on_where_nobody_asks(tmp_path: Path) -> None:
    ops = OpsGuard("shop", environment="production", metrics={"directory": str(tmp_path)})
    app = FastAPI()
    install(app, ops)
    app.get("/who")(handler)
    with TestClient(app) as client:
        assert client.get("/who").status_code == 200
    assert ops.runtime().plan.admission is None


def test_the_dependency_outside_of_a_guarded_app_says_so() -> None:
    app = FastAPI()

    @app.get("/strict")
    async def strict(who: KeyIdentity) -> str:
        return who.tenant_id

    @app.get("/loose")
    async def loose(who: OptionalKeyIdentity) -> str:
        return str(who)

    assert TestClient(app).get("/loose").json() == "None"
    with pytest.raises(RuntimeError, match="was opsguard installed"):
        TestClient(app).get("/strict")


def raises(*_: Any) -> Any:
    raise Refused(Response(429, (("Content-Length", "2"), ("Retry-After", "7")), b"no"))


@pytest.mark.parametrize("kind", [FastAPI, Starlette])
def test_a_refusal_raised_in_the_app_is_its_answer(kind: type[Starlette], eyes: Eyes) -> None:
    app = kind()
    install(app, eyes.ops)
    app.router.add_route("/a", raises)
    answer = TestClient(app).get("/a")
    assert (answer.status_code, answer.text, answer.headers["Retry-After"]) == (429, "no", "7")
    assert "X-Request-ID" in answer.headers
    assert eyes.total("http_errors_total") == 0.0


@pytest.mark.parametrize("theirs", [Refused, OpsGuardError])
def test_the_user_s_own_handler_of_refusals_counts(theirs: type[Exception], eyes: Eyes) -> None:
    app = FastAPI()
    install(app, eyes.ops)
    app.router.add_route("/a", raises)

    @app.exception_handler(theirs)
    async def mine(request: Request, error: Exception) -> PlainTextResponse:
        return PlainTextResponse("mine", 418)

    assert TestClient(app).get("/a").text == "mine"


def test_a_refusal_raised_for_a_websocket_closes_it(eyes: Eyes) -> None:
    app = FastAPI()
    install(app, eyes.ops)
    app.websocket("/ws")(refused_socket)
    with pytest.raises(WebSocketDisconnect) as closed, TestClient(app).websocket_connect("/ws"):
        pass
    assert closed.value.code == 1008


def test_a_refused_websocket_is_closed_and_answered_no_more(eyes: Eyes) -> None:
    """A server takes an answer behind the close for an error of the app."""
    app = FastAPI()
    install(app, eyes.ops)
    app.websocket("/ws")(refused_socket)
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message["type"])

    scope = {
        "type": "websocket",
        "path": "/ws",
        "headers": [],
        "query_string": b"",
        "root_path": "",
    }
    asyncio.run(app(scope, receive, send))
    assert sent == ["websocket.close"]
    assert eyes.total("http_errors_total") == 0.0


def test_a_refusal_after_the_app_has_closed_its_websocket_closes_it_no_more(eyes: Eyes) -> None:
    app = FastAPI()
    install(app, eyes.ops)

    @app.websocket("/ws")
    async def closed(websocket: WebSocket) -> None:
        await websocket.close()
        raises()

    with pytest.raises(WebSocketDisconnect) as end, TestClient(app).websocket_connect("/ws"):
        pass
    assert end.value.code == 1000
    assert eyes.total("http_errors_total") == 0.0


def test_middleware_can_be_found_behind_the_edge(eyes: Eyes) -> None:
    """FastAPI looks along `app` for the one of OpenTelemetry, and else traces by itself too."""

    class Traced:
        def __init__(self, app: Any) -> None:
            self.app = app

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            await self.app(scope, receive, send)

    app = FastAPI()
    app.add_middleware(Traced)
    install(app, eyes.ops)
    TestClient(app).get("/")
    layer: Any = app.middleware_stack
    while layer is not None and not isinstance(layer, Traced):
        layer = getattr(layer, "app", None)
    assert layer is not None


async def refused_socket(websocket: WebSocket) -> None:
    raises()


def test_explain_takes_a_request_a_scope_and_the_current_one(eyes: Eyes) -> None:
    ops, app = eyes.ops, FastAPI()
    install(app, ops)
    told: list[Any] = []

    @app.get("/items/{id}")
    @ops.limit("5/minute")
    async def item(id: str, request: Request) -> None:
        told.extend(ops.limiter.explain(one) for one in (None, request, request.scope))

    TestClient(app).get("/items/1")
    now, by_request, by_scope = told
    assert now == by_request == by_scope
    assert now[1].policy.endswith("item")
    assert now[1].buckets[0].endswith(":a:testclient")
    scope = {"type": "http", "method": "GET", "path": "/in/items/7", "root_path": "/in"}
    later = ops.limiter.explain({**scope, "client": ("10.0.0.9", 1)})
    assert later[1].buckets[0].endswith(":a:10.0.0.9")
    assert ops.limiter.explain() == ()
    with pytest.raises(TypeError, match="a path or a request"):
        ops.limiter.explain(object())
    with pytest.raises(TypeError, match="a path or a request"):
        ops.limiter.explain({})


def test_explain_knows_whose_key_it_is(keyed: Eyes) -> None:
    ops, app = keyed.ops, FastAPI()
    install(app, ops)
    told: list[Any] = []

    @app.get("/api/x")
    def x(request: Request) -> None:
        told.extend(ops.limiter.explain(request))

    TestClient(app).get("/api/x", headers={"X-API-Key": ops.keys.create("t1", "free")})
    TestClient(app).get("/api/x", headers={"X-API-Key": "mastermaster"})
    assert [one.why for one in told if one.stage == "route"] == [
        "the key's tier is free",
        "the master key has no tier's limit",
    ]
