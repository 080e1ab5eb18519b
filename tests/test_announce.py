"""Limits and keys cannot silently be off: what is said at start, and what is an error there."""

from __future__ import annotations

import functools
import gc
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi import APIRouter, FastAPI, WebSocket
from fastapi.testclient import TestClient
from flask import Flask
from flask.views import MethodView
from starlette.applications import Starlette
from starlette.endpoints import HTTPEndpoint
from starlette.requests import Request as StarletteRequest
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route

import opsguard_asgi
import opsguard_fastapi
import opsguard_flask
import opsguard_wsgi
from opsguard import DeclarationError, OpsGuard, SettingsError
from opsguard.inspection import Served
from opsguard.testing import Request, call_asgi, call_wsgi

PEPPER = "p" * 20


@pytest.fixture
def guard(tmp_path: Path) -> Callable[..., OpsGuard]:
    def make(**options: Any) -> OpsGuard:
        return OpsGuard("s", logging={"file": str(tmp_path / "log")}, **options)

    return make


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[..., list[str]]:
    """What was logged about the limits, at one level."""
    caplog.set_level(logging.INFO, logger="opsguard")

    def lines(level: str = "INFO") -> list[str]:
        return [
            record.getMessage()
            for record in caplog.records
            if record.name == "opsguard" and record.levelname == level
        ]

    return lines


Said = Callable[..., list[str]]
Guard = Callable[..., OpsGuard]


def plain() -> dict[str, str]:
    return {}


def bare_wsgi(environ: Any, start_response: Any) -> list[bytes]:
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"ok"]


async def bare_asgi(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"ok"})


# --- the line at start


def test_fastapi_says_how_many_routes_are_limited_exempt_and_uncovered(
    guard: Guard, said: Said
) -> None:
    ops = guard(limiter={"policies": {"/auth/*": "2/minute", "/free": "exempt"}})
    app = FastAPI(openapi_url=None)
    opsguard_fastapi.install(app, ops)
    inner = APIRouter()
    inner.get("/deep/{id}")(ops.limit("1/minute")(plain))
    middle = APIRouter()
    middle.include_router(inner, prefix="/inner")
    app.include_router(middle, prefix="/middle")
    sub = FastAPI(openapi_url=None)
    sub.get("/open/{id:path}")(plain)
    app.mount("/tenants/{tenant}", sub)
    app.get("/auth/login")(plain)
    app.get("/free")(plain)

    TestClient(app).get("/free")
    assert said() == [
        "limiter: 2 routes limited, 1 exempt, 1 uncovered: GET /tenants/{tenant}/open/{id}"
    ]
    assert said("WARNING") == []


def test_it_is_said_before_the_first_request_where_there_is_a_lifespan(
    guard: Guard, said: Said
) -> None:
    app = FastAPI(openapi_url=None)
    opsguard_fastapi.install(app, guard(limiter={"default": "1/minute"}))
    app.get("/a")(plain)
    with TestClient(app):
        assert said() == ["limiter: 1 route limited, 0 exempt, 0 uncovered"]


def test_starlette_counts_mounts_endpoints_and_websockets(guard: Guard, said: Said) -> None:
    class Both(HTTPEndpoint):
        async def get(self, request: StarletteRequest) -> PlainTextResponse:
            return PlainTextResponse("")

        async def post(self, request: StarletteRequest) -> PlainTextResponse:
            return PlainTextResponse("")

    async def socket(websocket: WebSocket) -> None: ...

    ops = guard(limiter={"policies": {"/in/*": "1/minute"}})
    app = Starlette(routes=[Mount("/in", routes=[Route("/both", Both)]), Mount("/raw", bare_asgi)])
    app.router.add_websocket_route("/ws", socket)
    opsguard_fastapi.install(app, ops)
    TestClient(app).get("/in/both")
    assert said() == [
        "limiter: 2 routes limited, 0 exempt, 2 uncovered: * /raw/{path}, WEBSOCKET /ws"
    ]


def test_flask_says_it_at_its_first_request_and_once(guard: Guard, said: Said) -> None:
    ops = guard(limiter={"policies": {"/auth/*": "2/minute"}})
    app = Flask(__name__, static_folder=None)
    opsguard_flask.install(app, ops)
    app.get("/auth/<int:id>")(lambda id: "")

    class View(MethodView):
        decorators = ()

        @ops.limit("1/minute")
        def post(self) -> str:
            return ""

        def get(self) -> str:
            return ""

    app.add_url_rule("/view", view_func=View.as_view("view"))
    assert said() == []
    for _ in range(3):
        app.test_client().get("/view").close()
    assert said() == ["limiter: 2 routes limited, 0 exempt, 1 uncovered: GET /view"]
    assert said("WARNING") == []


def test_somebody_s_own_wrapper_around_flask_s_hook_stays(guard: Guard, said: Said) -> None:
    app = Flask(__name__, static_folder=None)
    opsguard_flask.install(app, guard(limiter={"policies": {"/b": "1/minute"}}))
    ours, calls = app.preprocess_request, []

    def theirs(*context: Any) -> Any:
        calls.append(context)
        return ours(*context)

    app.preprocess_request = theirs  # type: ignore[method-assign]
    app.get("/a")(lambda: "")
    for _ in range(2):
        app.test_client().get("/a").close()
    assert len(calls) == 2
    assert said() == ["limiter: 0 routes limited, 0 exempt, 1 uncovered: GET /a"]


@pytest.mark.parametrize("protocol", ["asgi", "wsgi"])
def test_a_raw_app_says_that_its_routes_are_not_known(
    protocol: str, guard: Guard, said: Said
) -> None:
    ops = guard(limiter={"policies": {"/a": "9/minute"}})
    app: Any
    if protocol == "asgi":
        app, call = opsguard_asgi.install(bare_asgi, ops), call_asgi
    else:
        app, call = opsguard_wsgi.install(bare_wsgi, ops), call_wsgi
    assert said() == []
    assert [call(app, Request("/a")).status for _ in range(3)] == [200, 200, 200]
    (line,) = said()
    assert "1 policy by path; the routes of this app are not known here" in line


@pytest.mark.parametrize(
    ("options", "warning"),
    [
        (
            {"enabled": False, "default": "1/minute"},
            "limiter: off, as limiter.enabled is false (keyword): no limit is enforced",
        ),
        (
            {"shadow": True, "default": "1/minute"},
            "limiter: in shadow mode (keyword): what exceeds a limit is counted, not refused",
        ),
    ],
    ids=["disabled", "shadow"],
)
def test_limits_that_the_settings_switch_off_are_a_warning(
    options: dict[str, Any], warning: str, guard: Guard, said: Said
) -> None:
    app = FastAPI(openapi_url=None)
    opsguard_fastapi.install(app, guard(limiter=options))
    TestClient(app).get("/")
    assert said("WARNING") == [warning]


def test_who_asks_for_no_limits_is_told_nothing(guard: Guard, said: Said) -> None:
    app = FastAPI()
    opsguard_fastapi.install(app, guard())
    TestClient(app).get("/")
    assert (said(), said("WARNING")) == ([], [])


def test_a_fault_in_counting_is_reported_and_the_app_serves(guard: Guard, said: Said) -> None:
    ops = guard(limiter={"default": "9/minute"})
    app = Flask(__name__, static_folder=None)
    opsguard_flask.install(app, ops)
    app.get("/a")(lambda: "")

    def broken() -> Any:
        raise RuntimeError("no rules")

    ops.runtime().limiter = broken  # type: ignore[method-assign]
    answer = app.test_client().get("/a")
    assert answer.status_code == 200
    assert "opsguard: announce failed and was skipped" in said("ERROR")
    answer.close()


# --- marks that no route carries


def test_a_decorated_helper_is_named(guard: Guard, said: Said) -> None:
    ops = guard(keys={"pepper": PEPPER})
    app = FastAPI(openapi_url=None)
    opsguard_fastapi.install(app, ops)

    @app.get("/a")
    @ops.limit("1/minute")
    @ops.require_key()
    def routed() -> None: ...

    @ops.limit("1/minute")
    def helper() -> None: ...

    TestClient(app).get("/a")
    (warning,) = said("WARNING")
    assert ".helper:" in warning
    assert ".routed" not in warning


def test_a_decorator_that_hides_ours_is_noticed(guard: Guard, said: Said) -> None:
    ops = guard(keys={"pepper": PEPPER})
    app = Flask(__name__, static_folder=None)
    opsguard_flask.install(app, ops)

    def rude(function: Callable[[], str]) -> Callable[[], str]:
        return lambda: function()

    def polite(function: Callable[[], str]) -> Callable[[], str]:
        return functools.wraps(function)(lambda: function())

    @ops.limit("1/minute")
    def hidden() -> str:
        return ""

    @ops.require_key(tiers=("pro",))
    def seen() -> str:
        return ""

    app.add_url_rule("/hidden", view_func=rude(hidden), endpoint="hidden")
    app.add_url_rule("/seen", view_func=polite(seen), endpoint="seen")
    app.test_client().get("/seen").close()
    (warning,) = said("WARNING")
    assert ".hidden:" in warning
    assert ".seen" not in warning


def test_what_was_collected_since_is_forgotten(guard: Guard) -> None:
    """An app factory may run many times with one OpsGuard."""
    ops = guard()

    def factory() -> None:
        @ops.limit("1/minute")
        def inside() -> None: ...

    factory()
    gc.collect()
    assert ops.marked.unrouted([]) == []


def test_a_class_is_carried_by_those_below_it(guard: Guard) -> None:
    ops = guard()

    @ops.require_key()
    class Base(MethodView):
        @ops.require_key(tiers=("pro",))
        def get(self) -> str:
            return ""

        @staticmethod
        @ops.limit("1/minute")
        def lonely() -> None: ...

    class Below(Base):
        pass

    route = Served("/x", "GET", Below.as_view("x"))
    (name,) = ops.marked.unrouted([route])
    assert name.endswith("Base.lonely")


@pytest.mark.parametrize("when", ["before install", "after install"])
def test_a_strategy_that_the_store_cannot_do_stops_the_start(when: str, guard: Guard) -> None:
    ops = guard(limiter={"store": "redis+cluster://127.0.0.1:1"})
    if when == "before install":
        kept = ops.limit("1/minute", strategy="gcra")(plain)
        with pytest.raises(
            SettingsError, match=r"plain has the strategy 'gcra'[^;]*redis\+cluster"
        ):
            ops.runtime()
        assert kept() == {}
        return
    opsguard_asgi.install(bare_asgi, ops)
    limit = ops.limit("1/minute", strategy="gcra")
    with pytest.raises(DeclarationError, match=r"plain has the strategy 'gcra'[^;]*redis\+cluster"):
        limit(plain)
