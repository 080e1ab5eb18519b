"""opsguard in Django: settings, checks, the middleware under both protocols, `install` around."""

from __future__ import annotations

import asyncio
import gc
import io
import json
import subprocess
import sys
import textwrap
import threading
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from functools import update_wrapper
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from django.conf import settings
from django.core.asgi import get_asgi_application
from django.core.checks import run_checks
from django.core.exceptions import ImproperlyConfigured, PermissionDenied
from django.core.handlers.base import BaseHandler
from django.core.management import CommandError, call_command, load_command_class
from django.core.signals import got_request_exception
from django.core.wsgi import get_wsgi_application
from django.http import FileResponse, Http404, HttpRequest, HttpResponse, StreamingHttpResponse
from django.test import AsyncClient, Client, RequestFactory, override_settings
from django.urls import include, path, re_path
from django.views import View
from django.views.decorators.csrf import csrf_exempt

import opsguard_django
from opsguard import DeclarationError, OpsGuard, Response
from opsguard.accelerator import speed
from opsguard.context import current
from opsguard.testing import Request, call_asgi, call_wsgi
from opsguard_django.project import project_ops
from opsguard_wsgi import KEY
from tests.contract.apps.django_app import configure
from tests.contract.harness import Samples, parse

configure()

from opsguard_django.checks import middleware_is_first  # noqa: E402 - they need the settings
from opsguard_django.middleware import OpsGuardMiddleware  # noqa: E402
from opsguard_django.templates import template  # noqa: E402

MIDDLEWARE = "opsguard_django.OpsGuardMiddleware"
TEAPOT = Response(418, (("Content-Type", "text/plain"), ("Content-Length", "2")), b"no")
DECLARED = OpsGuard("declared")
MAPPED = {"service": "mapped"}

# Django's ASGI handler leaves the spooled body open when an answer breaks off.
pytestmark = pytest.mark.filterwarnings("ignore:.*SpooledTemporaryFile.*")


class Boom(Exception):
    pass


class Eyes:
    """What an OpsGuard recorded."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.log = folder / "log"
        self.ops = OpsGuard(
            "s", logging={"file": str(self.log)}, metrics={"directory": str(folder)}, **options
        )

    def lines(self) -> list[dict[str, Any]]:
        self.ops.runtime().sink.flush()
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [line for line in map(json.loads, lines) if line["logger"] == "opsguard.access"]

    def endpoints(self) -> list[str]:
        return [line["endpoint"] for line in self.lines()]

    def statuses(self) -> list[int]:
        return [line["status_code"] for line in self.lines()]

    def samples(self) -> Samples:
        return parse("".join([text for _, text in self.ops.metrics.expose(False)]))

    def total(self, name: str, **labels: str) -> float:
        wanted = set(labels.items())
        found = self.samples().items()
        return sum([v for (sample, has), v in found if sample == name and wanted <= has])


@pytest.fixture
def eyes(tmp_path: Path) -> Eyes:
    return Eyes(tmp_path)


@contextmanager
def project(ops: Any, *patterns: Any, middleware: list[str] | None = None) -> Iterator[None]:
    """A Django project with these settings, for the time of the block."""
    project_ops.cache_clear()
    with override_settings(
        ROOT_URLCONF=Urls(patterns),
        MIDDLEWARE=[MIDDLEWARE] if middleware is None else middleware,
        OPSGUARD=ops,
    ):
        yield
    project_ops.cache_clear()


class Urls:
    """Stands for a project's urls module."""

    def __init__(self, patterns: tuple[Any, ...]) -> None:
        self.urlpatterns = list(patterns)


def view(request: HttpRequest, **values: Any) -> HttpResponse:
    return HttpResponse("view")


async def async_view(request: HttpRequest, **values: Any) -> HttpResponse:
    return HttpResponse("view")


def boom(request: HttpRequest) -> HttpResponse:
    raise Boom


async def async_boom(request: HttpRequest) -> HttpResponse:
    raise Boom


Get = Callable[..., Any]


def sync_get(address: str, **options: Any) -> Any:
    return Client(raise_request_exception=False).get(address, **options)


def async_get(address: str, **options: Any) -> Any:
    """Its body is left as it is; Django's async client closes what is not streamed."""
    return asyncio.run(AsyncClient(raise_request_exception=False).get(address, **options))


CLIENTS = pytest.mark.parametrize("get", [sync_get, async_get], ids=["Client", "AsyncClient"])


# --- settings


@pytest.mark.parametrize(
    ("said", "service"),
    [
        pytest.param({"service": "mapping"}, "mapping", id="mapping"),
        pytest.param(f"{__name__}.DECLARED", "declared", id="dotted path of an OpsGuard"),
        pytest.param(f"{__name__}.MAPPED", "mapped", id="dotted path of a mapping"),
        pytest.param(DECLARED, "declared", id="an OpsGuard"),
    ],
)
def test_the_projects_opsguard_is_what_its_settings_say(said: Any, service: str) -> None:
    with project(said):
        ops = project_ops()
        assert ops.settings.service == service
        assert project_ops() is opsguard_django.ops is ops


def test_settings_without_opsguard_are_the_defaults() -> None:
    with project({}):
        del settings.OPSGUARD
        assert isinstance(project_ops(), OpsGuard)


@pytest.mark.parametrize("said", [None, 7, ["service"], OpsGuard], ids=repr)
def test_settings_of_another_type_are_an_error_that_says_what_to_do(said: Any) -> None:
    with (
        project(said),
        pytest.raises(ImproperlyConfigured, match="mapping of settings or the dotted path"),
    ):
        project_ops()


def test_a_path_that_leads_nowhere_is_an_import_error() -> None:
    with project("nowhere.to.be.found"), pytest.raises(ImportError):
        project_ops()


def test_the_package_knows_its_names_and_no_others() -> None:
    assert opsguard_django.OpsGuardMiddleware is OpsGuardMiddleware
    assert callable(opsguard_django.install)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = opsguard_django.nothing


@pytest.mark.parametrize(
    ("middleware", "problems"),
    [
        pytest.param([MIDDLEWARE], [], id="alone"),
        pytest.param((MIDDLEWARE, "x.Y"), [], id="first of a tuple"),
        pytest.param(["opsguard_django.middleware.OpsGuardMiddleware"], [], id="its full path"),
        pytest.param([f"{__name__}.Mine", "x.Y"], [], id="a class below it"),
        pytest.param([f"{__name__}.Eyes"], ["opsguard.E001"], id="another class"),
        pytest.param([f"{__name__}.view"], ["opsguard.E001"], id="a function"),
        pytest.param(["x.Y", MIDDLEWARE], ["opsguard.E001"], id="second"),
        pytest.param(["x.Y"], ["opsguard.E001"], id="missing"),
        pytest.param([], ["opsguard.E001"], id="no middleware"),
    ],
)
def test_a_system_check_wants_the_middleware_first(
    middleware: list[str], problems: list[str]
) -> None:
    with project({}, middleware=middleware):
        assert [found.id for found in middleware_is_first()] == problems
        assert [e.id for e in run_checks() if (e.id or "").startswith("opsguard")] == problems
        assert all("Put it first" in (found.hint or "") for found in middleware_is_first())


def test_setup_and_commands_start_nothing(tmp_path: Path) -> None:
    """`ready` runs for `migrate` too."""
    code = textwrap.dedent(
        """
        import sys, threading
        import django
        from django.conf import settings
        from django.core.management import call_command
        settings.configure(
            INSTALLED_APPS=["opsguard_django"], SECRET_KEY="x",
            MIDDLEWARE=["opsguard_django.OpsGuardMiddleware"],
            OPSGUARD={
                "metrics": {"directory": sys.argv[1]},
                "logging": {"file": sys.argv[1] + "/log"},
            },
        )
        django.setup()
        call_command("check")
        from opsguard_django import ops
        assert not ops.installed
        assert threading.active_count() == 1
        assert "opsguard_django.middleware" not in sys.modules
        """
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=60)
    assert list(tmp_path.iterdir()) == []


# --- templates


@pytest.mark.parametrize(
    ("route", "expected"),
    [
        ("", "/"),
        ("plain", "/plain"),
        ("items/<int:id>/", "/items/{id}/"),
        ("items/<id>", "/items/{id}"),
        ("<slug:tenant>/files/<path:name>", "/{tenant}/files/{name}"),
        (r"^$", "/"),
        (r"^articles/(?P<year>[0-9]{4})/$", "/articles/{year}/"),
        (r"^articles/(?P<year>[0-9]{4})/(?P<slug>[\w-]+)/\Z", "/articles/{year}/{slug}/"),
        (r"^old/([0-9]+)/(\w+)$", "/old/{var}/{var}"),
        (r"^nested/(?P<a>x(y|z))/$", "/nested/{a}/"),
        (r"api/^users/(?P<name>[a-z]+)$", "/api/users/{name}"),
        (r"<int:a>/^b/(?P<c>\d+)$", "/{a}/b/{c}"),
        (r"^file\.txt$", "/file.txt"),
    ],
)
def test_a_route_has_the_common_form(route: str, expected: str) -> None:
    assert template(route) == expected


# --- the middleware


@CLIENTS
@pytest.mark.parametrize("serve", [view, async_view])
def test_a_request_gets_ids_its_template_and_one_line(get: Get, serve: Any, eyes: Eyes) -> None:
    """Sync and async views under sync and async handlers."""
    seen: list[Any] = []
    eyes.ops.at_route(lambda exchange: seen.append((exchange.endpoint, exchange.marked)))
    users = [re_path(r"^users/(?P<name>[a-z]+)$", serve)]
    with project(eyes.ops, path("api/<slug:tenant>/", include(users))):
        answer = get("/api/acme/users/ann?token=1", headers={"X-Request-ID": "r-1"})
    assert (answer.status_code, answer.content) == (200, b"view")
    assert answer["X-Request-ID"] == "r-1"
    assert seen == [("/api/{tenant}/users/{name}", serve)]
    (line,) = eyes.lines()
    assert line["endpoint"] == "/api/{tenant}/users/{name}"
    assert (line["path"], line["client"]) == ("/api/acme/users/ann", "127.0.0.1")
    assert (line["status_code"], line["size"], line["request_id"]) == (200, 4, "r-1")
    assert eyes.total("http_requests_total", status="200") == 1.0
    assert eyes.total("http_requests_in_progress") == 0.0


@CLIENTS
@pytest.mark.parametrize("serve", [boom, async_boom])
def test_an_exception_is_answered_by_django_and_counted_once(
    get: Get, serve: Any, eyes: Eyes
) -> None:
    with project(eyes.ops, path("boom", serve)):
        answer = get("/boom")
    assert answer.status_code == 500
    assert b"Server Error" in answer.content
    assert len(answer["X-Request-ID"]) == 32
    assert eyes.total("http_errors_total") == 1.0
    assert eyes.total("http_errors_total", error_type="Boom", endpoint="/boom") == 1.0


def test_the_test_clients_raise_the_exception_and_it_is_counted_once(eyes: Eyes) -> None:
    with project(eyes.ops, path("boom", boom)):
        with pytest.raises(Boom):
            Client().get("/boom")
        with pytest.raises(Boom):
            asyncio.run(AsyncClient().get("/boom"))
    assert eyes.total("http_errors_total", error_type="Boom") == 2.0


@CLIENTS
@pytest.mark.parametrize(
    ("error", "status"), [(Http404, 404), (PermissionDenied, 403)], ids=["404", "403"]
)
def test_an_exception_that_is_an_answer_is_no_error(
    get: Get, error: type[Exception], status: int, eyes: Eyes
) -> None:
    def serve(request: HttpRequest) -> HttpResponse:
        raise error

    with project(eyes.ops, path("a", serve)):
        assert get("/a").status_code == status
    assert eyes.endpoints() == ["/a"]
    assert eyes.total("http_errors_total") == 0.0


@CLIENTS
def test_unmatched_paths_are_one_series(get: Get, eyes: Eyes) -> None:
    with project(eyes.ops, path("a", view)):
        for number in range(3):
            assert get(f"/{number}").status_code == 404
    assert eyes.total("http_requests_total", endpoint="<unmatched>", status="404") == 3.0


@CLIENTS
def test_a_request_of_a_host_that_is_not_allowed_has_an_id_and_a_line(get: Get, eyes: Eyes) -> None:
    with project(eyes.ops, path("a", view)), override_settings(ALLOWED_HOSTS=["good.example"]):
        common = "django.middleware.common.CommonMiddleware"
        with override_settings(MIDDLEWARE=[MIDDLEWARE, common]):
            answer = get("/a", headers={"Host": "evil.example"})
            scrape = get("/metrics", headers={"Host": "10.0.0.7"})
    assert answer.status_code == 400
    assert len(answer["X-Request-ID"]) == 32
    assert scrape.status_code == 200
    assert eyes.statuses() == [400]


@CLIENTS
def test_the_scrape_is_answered_before_any_view(get: Get, eyes: Eyes) -> None:
    with project(eyes.ops, path("a", view)):
        get("/a")
        answer = get("/metrics")
    assert answer["Content-Type"].startswith("text/plain")
    assert b'http_requests_total{method="GET",endpoint="/a",status="200"} 1.0' in answer.content


@CLIENTS
@pytest.mark.parametrize("where", ["at_edge", "at_route"])
def test_a_refusal_comes_before_the_view(get: Get, where: str, eyes: Eyes) -> None:
    def serve(request: HttpRequest) -> HttpResponse:
        pytest.fail("the view ran")

    getattr(eyes.ops, where)(lambda exchange: TEAPOT)
    with project(eyes.ops, path("a", serve)):
        answer = get("/a")
    assert (answer.status_code, answer.content) == (418, b"no")
    assert eyes.statuses() == [418]


@CLIENTS
def test_an_id_that_a_view_sets_is_left(get: Get, eyes: Eyes) -> None:
    def serve(request: HttpRequest) -> HttpResponse:
        return HttpResponse(headers={"x-request-id": "mine"})

    with project(eyes.ops, path("a", serve)):
        assert get("/a")["X-Request-ID"] == "mine"


def test_the_context_is_there_in_views_and_gone_after_the_answer(eyes: Eyes) -> None:
    seen: list[Any] = []

    def serve(request: HttpRequest) -> HttpResponse:
        eyes.ops.bind(tenant_id="t-1")
        seen.append(eyes.ops.request_id)
        return HttpResponse()

    with project(eyes.ops, path("a", serve)):
        Client().get("/a", headers={"X-Request-ID": "r-1"})
        assert current.get() is None
        asyncio.run(AsyncClient().get("/a", headers={"X-Request-ID": "r-2"}))
    assert seen == ["r-1", "r-2"]
    assert [line["tenant_id"] for line in eyes.lines()] == ["t-1", "t-1"]


def chunks(told: list[str] | None = None, fails: bool = False) -> Iterator[bytes]:
    try:
        yield b"12"
        yield b"345"
        if fails:
            raise Boom
    finally:
        (told if told is not None else []).append("closed")


async def async_chunks(told: list[str] | None = None, fails: bool = False) -> AsyncIterator[bytes]:
    for chunk in chunks(told, fails):
        yield chunk


def streaming(parts: Callable[..., Any], *arguments: Any) -> Any:
    def serve(request: HttpRequest) -> StreamingHttpResponse:
        return StreamingHttpResponse(parts(*arguments))

    return serve


def test_a_stream_is_recorded_at_its_last_byte(eyes: Eyes) -> None:
    with project(eyes.ops, path("s", streaming(chunks))):
        answer = Client().get("/s")
        assert eyes.total("http_requests_in_progress", endpoint="/s") == 1.0
        assert b"".join(answer.streaming_content) == b"12345"  # type: ignore[attr-defined]
        answer.close()
    (line,) = eyes.lines()
    assert (line["status_code"], line["size"]) == (200, 5)


@pytest.mark.filterwarnings("ignore:StreamingHttpResponse must consume")
@pytest.mark.parametrize("parts", [chunks, async_chunks], ids=["sync", "async"])
@pytest.mark.parametrize("fails", [False, True], ids=["whole", "raises"])
def test_what_the_app_does_after_a_stream_knows_its_request(
    parts: Callable[..., Any], fails: bool, eyes: Eyes
) -> None:
    """Django reads an async stream under WSGI in an event loop, and takes over its context."""
    found: list[str] = []

    def serve(request: HttpRequest) -> StreamingHttpResponse:
        response = StreamingHttpResponse(parts(None, fails))
        response._resource_closers.append(  # type: ignore[attr-defined]
            lambda: found.append(getattr(current.get(), "request_id", "nobody's"))
        )
        return response

    with project(eyes.ops, path("s", serve)):
        told = Request("/s", headers=(("X-Request-ID", "one"),), strict=False)
        call_wsgi(get_wsgi_application(), told)
    assert found == ["one"]
    assert current.get() is None


def test_a_stream_closed_early_is_499_and_its_generator_is_told(eyes: Eyes) -> None:
    told: list[str] = []
    with project(eyes.ops, path("s", streaming(chunks, told))):
        answer: Any = Client().get("/s")
        assert next(iter(answer.streaming_content)) == b"12"
        answer.close()
    assert told == ["closed"]
    assert eyes.statuses() == [499]


def test_a_stream_that_raises_is_counted_once_and_passed_on(eyes: Eyes) -> None:
    with project(eyes.ops, path("s", streaming(chunks, None, True))):
        answer: Any = Client().get("/s")
        with pytest.raises(Boom):
            list(answer.streaming_content)
        answer.close()
    assert eyes.statuses() == [200]
    assert eyes.total("http_errors_total", error_type="Boom") == 1.0


@pytest.mark.parametrize(
    ("read", "fails", "status"),
    [(None, False, 200), (1, False, 499), (None, True, 200)],
    ids=["to its end", "closed early", "raises"],
)
def test_an_async_stream_is_recorded_however_it_ends(
    read: int | None, fails: bool, status: int, eyes: Eyes
) -> None:
    async def run() -> bytes:
        answer: Any = await AsyncClient().get("/s")
        body, number = b"", 0
        content = answer.streaming_content
        try:
            async for part in content:
                body, number = body + part, number + 1
                if number == read:
                    break
        finally:
            await content.aclose()
            answer.close()
        return body

    with project(eyes.ops, path("s", streaming(async_chunks, None, fails))):
        if fails:
            with pytest.raises(Boom):
                asyncio.run(run())
        else:
            assert asyncio.run(run()) == (b"12345" if read is None else b"12")
    assert eyes.statuses() == [status]
    assert eyes.total("http_errors_total") == float(fails)
    assert eyes.total("http_requests_in_progress") == 0.0


def test_a_stream_that_head_asked_for_is_whole_without_being_read(eyes: Eyes) -> None:
    with project(eyes.ops, path("s", streaming(chunks))):
        Client().head("/s").close()
    assert eyes.statuses() == [200]


def test_a_file_is_recorded_with_its_size(eyes: Eyes, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x" * 100)
    with project(eyes.ops, path("f", lambda request: FileResponse(file.open("rb")))):
        answer: Any = Client().get("/f")
        assert b"".join(answer.streaming_content) == b"x" * 100
        answer.close()
    (line,) = eyes.lines()
    assert (line["status_code"], line["size"]) == (200, 100)


def test_an_answer_that_is_dropped_without_being_closed_is_recorded_when_it_is_collected(
    eyes: Eyes,
) -> None:
    def serve(request: HttpRequest) -> HttpResponse:
        return HttpResponse("dropped")

    with project(eyes.ops):
        middleware = OpsGuardMiddleware(serve)
        response = middleware(RequestFactory().get("/a"))
        assert eyes.total("http_requests_total") == 0.0
        del response
        gc.collect()
    assert eyes.total("http_requests_total") == 1.0


def test_what_django_lets_through_is_recorded_and_passed_on(eyes: Eyes) -> None:
    def raising(request: HttpRequest) -> HttpResponse:
        raise KeyboardInterrupt

    async def cancelled(request: HttpRequest) -> HttpResponse:
        raise asyncio.CancelledError

    async def failing(request: HttpRequest) -> HttpResponse:
        raise Boom

    with project(eyes.ops):
        with pytest.raises(KeyboardInterrupt):
            OpsGuardMiddleware(raising)(RequestFactory().get("/a"))
        assert current.get() is None
        for serve, error in ((cancelled, asyncio.CancelledError), (failing, Boom)):
            with pytest.raises(error):
                asyncio.run(OpsGuardMiddleware(serve)(RequestFactory().get("/a")))
    assert eyes.statuses() == [500, 499, 500]
    assert eyes.total("http_errors_total", error_type="Boom") == 1.0
    assert eyes.total("http_errors_total", error_type="CancelledError") == 0.0


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize(
    "odd", [{"HTTP_X_REQUEST_ID": uuid.uuid4()}, {"CONTENT_LENGTH": 3}], ids=["UUID", "number"]
)
def test_a_request_that_cannot_be_opened_is_answered_as_without_us(
    asynchronous: bool, odd: dict[str, Any], eyes: Eyes
) -> None:
    """A project's tests may put into META what no server does. The fault is ours: it is counted."""
    ids: list[str | None] = []

    def serve(request: HttpRequest) -> HttpResponse:
        ids.append(eyes.ops.request_id)
        return view(request)

    async def async_serve(request: HttpRequest) -> HttpResponse:
        return serve(request)

    def ask(**extra: Any) -> HttpResponse:
        answer = middleware(RequestFactory().get("/a", **extra))
        found: HttpResponse = asyncio.run(answer) if asynchronous else answer
        found.close()
        return found

    with project(eyes.ops):
        middleware = OpsGuardMiddleware(async_serve if asynchronous else serve)
        answer = ask(**odd)
        assert (answer.status_code, answer.content, ids) == (200, b"view", [None])
        assert eyes.total("opsguard_internal_errors_total", site="open") == 1.0
        assert ask()["X-Request-ID"] == ids[1]
    assert eyes.statuses() == [200]
    assert eyes.total("opsguard_internal_errors_total") == 1.0


class forgetful:
    """A middleware of a project that has a path without an answer."""

    sync_capable = async_capable = True

    def __init__(self, get_response: Any) -> None:
        return None

    def __call__(self, request: HttpRequest) -> None:
        return None


def test_a_project_that_gives_no_answer_is_recorded_and_leaves_no_request_behind(
    eyes: Eyes,
) -> None:
    with project(eyes.ops, middleware=[MIDDLEWARE, f"{__name__}.forgetful"]):
        assert sync_get("/a").status_code == 500
        assert current.get() is None
    assert eyes.statuses() == [500]
    assert eyes.total("http_errors_total", error_type="AttributeError") == 1.0


# --- a request within a request


def test_a_stream_that_a_view_reads_is_made_in_its_own_context(eyes: Eyes) -> None:
    """The view has its own ids as soon as it has the answer, between the pieces and afterwards."""
    seen: list[str | None] = []

    def note() -> None:
        seen.append(eyes.ops.request_id)

    def parts() -> Iterator[bytes]:
        for _ in range(2):
            note()
            yield b"1"

    async def async_parts() -> AsyncIterator[bytes]:
        for part in parts():
            yield part

    def serve(request: HttpRequest) -> HttpResponse:
        answer: Any = Client().get("/s", headers={"X-Request-ID": "inner"})
        note()
        for _ in answer.streaming_content:
            note()
        answer.close()
        note()
        return HttpResponse()

    async def async_serve(request: HttpRequest) -> HttpResponse:
        answer: Any = await AsyncClient().get("/s", headers={"X-Request-ID": "inner"})
        note()
        async for _ in answer.streaming_content:
            note()
        note()
        return HttpResponse()

    for get, outer, inner in (
        (sync_get, serve, streaming(parts)),
        (async_get, async_serve, streaming(async_parts)),
    ):
        with project(eyes.ops, path("a", outer), path("s", inner)):
            assert get("/a", headers={"X-Request-ID": "outer"}).status_code == 200
        assert seen == ["outer", "inner", "outer", "inner", "outer", "outer"]
        seen.clear()
        assert current.get() is None
    assert eyes.statuses() == [200] * 4


def test_who_closes_the_answer_of_another_request_late_keeps_his_own(eyes: Eyes) -> None:
    """A stream that a view began and left is closed while another request is served."""
    left: list[Any] = []
    seen: list[str | None] = []

    def begin(request: HttpRequest) -> HttpResponse:
        answer: Any = Client().get("/s", headers={"X-Request-ID": "inner"})
        next(iter(answer.streaming_content))
        left.append(answer)
        return HttpResponse()

    def close(request: HttpRequest) -> HttpResponse:
        left.pop().close()
        seen.append(eyes.ops.request_id)
        return HttpResponse()

    def parts() -> Iterator[bytes]:
        yield b"1"
        yield b"2"

    with project(eyes.ops, path("a", begin), path("b", close), path("s", streaming(parts))):
        assert sync_get("/a").status_code == 200
        assert sync_get("/b", headers={"X-Request-ID": "other"}).status_code == 200
    assert seen == ["other"]
    assert current.get() is None


def test_an_answer_that_a_view_passes_on_is_the_outer_request_s(eyes: Eyes) -> None:
    """As a preview does, with a handler of its own that nobody closes an answer of."""
    seen: list[str | None] = []

    def serve(request: HttpRequest) -> Any:
        inner = RequestFactory().get("/b", headers={"X-Request-ID": "inner"})
        handler = BaseHandler()
        handler.load_middleware()
        answer = handler.get_response(inner)
        seen.append(eyes.ops.request_id)
        return answer

    with project(eyes.ops, path("a", serve), path("b", view)):
        answer = sync_get("/a", headers={"X-Request-ID": "outer"})
        assert (answer.content, answer["X-Request-ID"]) == (b"view", "outer")
    assert seen == ["outer"]
    assert current.get() is None
    assert sorted([line["request_id"] for line in eyes.lines()]) == ["inner", "outer"]
    assert eyes.statuses() == [200, 200]


def test_two_of_the_middleware_count_once(eyes: Eyes) -> None:
    for get in (sync_get, async_get):
        with project(eyes.ops, path("a", view), middleware=[MIDDLEWARE, MIDDLEWARE]):
            assert get("/a").status_code == 200
    assert eyes.total("http_requests_total") == 2.0
    assert eyes.endpoints() == ["/a", "/a"]


class Mine(OpsGuardMiddleware):
    """What a project may make of it."""

    def __call__(self, request: HttpRequest) -> Any:
        request.path_info = "/a"
        return super().__call__(request)


@CLIENTS
def test_a_class_below_the_middleware_may_call_it(get: Get, eyes: Eyes) -> None:
    with project(eyes.ops, path("a", view), middleware=[f"{__name__}.Mine"]):
        assert [get("/b").status_code for _ in range(2)] == [200, 200]
    assert eyes.endpoints() == ["/a", "/a"]


@pytest.mark.skipif(speed is None, reason="opsguard._speed was not built")
def test_no_frame_of_ours_is_between_django_and_the_next_middleware(eyes: Eyes) -> None:
    frames: list[Any] = []

    def serve(request: HttpRequest) -> HttpResponse:
        frames.append(sys._getframe(1).f_code)
        return HttpResponse()

    with project(eyes.ops):
        OpsGuardMiddleware(serve)(RequestFactory().get("/a")).close()
    assert frames == [sys._getframe().f_code]


def test_a_request_outside_of_an_edge_is_left_alone(eyes: Eyes) -> None:
    """A view called by a test, an exception without a request: nothing of ours is there."""
    with project(eyes.ops):
        middleware = OpsGuardMiddleware(view)
        request = RequestFactory().get("/a")
        assert middleware.process_view(request, view, (), {}) is None
        got_request_exception.send(sender=None, request=None)
        got_request_exception.send(sender=None, request=request)
    assert eyes.samples() == {}


def test_a_view_hook_without_a_match_enters_nothing(eyes: Eyes) -> None:
    seen: list[Any] = []

    def serve(request: HttpRequest) -> HttpResponse:
        assert middleware.process_view(request, view, (), {}) is None
        seen.append(request.META[KEY].endpoint)
        return HttpResponse()

    with project(eyes.ops):
        middleware = OpsGuardMiddleware(serve)
        middleware(RequestFactory().get("/a")).close()
    assert seen == [None]


def test_the_async_middleware_needs_no_thread(eyes: Eyes) -> None:
    """A sync `process_view` would cost a thread hop for each request."""
    seen: list[threading.Thread] = []
    eyes.ops.at_route(lambda exchange: seen.append(threading.current_thread()))

    async def run() -> None:
        await AsyncClient().get("/a")
        assert seen == [threading.current_thread()]

    with project(eyes.ops, path("a", async_view)):
        asyncio.run(run())


# --- install around the application


@pytest.mark.parametrize("with_ops", [True, False], ids=["its OpsGuard", "the project's"])
@pytest.mark.parametrize("protocol", ["wsgi", "asgi"])
def test_an_application_guarded_from_outside_counts_once_and_knows_the_route(
    protocol: str, with_ops: bool, eyes: Eyes
) -> None:
    with project(eyes.ops, path("items/<int:id>", view), path("boom", boom)):
        application = get_wsgi_application() if protocol == "wsgi" else get_asgi_application()
        guarded = opsguard_django.install(application, *[eyes.ops] * with_ops)
        call = call_wsgi if protocol == "wsgi" else call_asgi
        answer = call(guarded, Request("/items/7"))
        failed = call(guarded, Request("/boom"))
    assert (answer.status, answer.body, answer.error) == (200, b"view", None)
    assert len(answer.header("x-request-id")) == len(failed.header("x-request-id")) == 1
    assert failed.status == 500
    assert eyes.endpoints() == ["/items/{id}", "/boom"]
    assert eyes.total("http_requests_total") == 2.0
    assert eyes.total("http_errors_total", error_type="Boom", endpoint="/boom") == 1.0


@pytest.mark.parametrize("protocol", ["wsgi", "asgi"])
def test_a_refusal_at_the_route_works_from_outside(protocol: str, eyes: Eyes) -> None:
    eyes.ops.at_route(lambda exchange: TEAPOT)
    with project(eyes.ops, path("a", view)):
        application = get_wsgi_application() if protocol == "wsgi" else get_asgi_application()
        guarded = opsguard_django.install(application)
        answer = (call_wsgi if protocol == "wsgi" else call_asgi)(guarded, Request("/a"))
    assert (answer.status, answer.body) == (418, b"no")
    assert eyes.statuses() == [418]


@pytest.mark.parametrize("protocol", ["wsgi", "asgi"])
def test_the_edge_outside_knows_public_routes_before_the_first_request(
    protocol: str, tmp_path: Path
) -> None:
    eyes = Eyes(
        tmp_path,
        keys={"pepper": "p" * 32, "store": f"sqlite:///{tmp_path}/keys", "required": ["*"]},
    )
    with project(eyes.ops, path("open", eyes.ops.public(view)), path("a", view)):
        application = get_wsgi_application() if protocol == "wsgi" else get_asgi_application()
        guarded = opsguard_django.install(application)
        call = call_wsgi if protocol == "wsgi" else call_asgi
        assert [call(guarded, Request(there)).status for there in ("/open", "/a")] == [200, 401]


def test_an_application_without_our_middleware_is_counted_without_routes(eyes: Eyes) -> None:
    with project(eyes.ops, path("a", view), middleware=[]):
        guarded = opsguard_django.install(get_wsgi_application())
        assert call_wsgi(guarded, Request("/a")).status == 200
    assert eyes.endpoints() == ["<unmatched>"]


def asgi_scope(**values: Any) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "GET",
        "path": "/a",
        "root_path": "",
        "query_string": b"",
        "headers": [(b"host", b"testserver")],
        "client": ("127.0.0.1", 1),
        "server": ("testserver", 80),
        **values,
    }


def drive(application: Any, scope: dict[str, Any], *incoming: dict[str, Any]) -> list[Any]:
    """The messages that an ASGI application sends."""
    messages, sent = list(incoming), []

    async def receive() -> Any:
        if not messages:
            await asyncio.Event().wait()
        return messages.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(application(scope, receive, send))
    return sent


def test_what_django_refuses_before_any_middleware_is_seen_from_outside(eyes: Eyes) -> None:
    """A query that is no UTF-8 is a 400 of Django's ASGI handler itself."""
    request = {"type": "http.request", "body": b"", "more_body": False}
    scope = asgi_scope(query_string=b"\xff")
    with project(eyes.ops, path("a", view)):
        inside = drive(get_asgi_application(), dict(scope), request)
        assert eyes.lines() == []
        sent = drive(opsguard_django.install(get_asgi_application()), scope, request)
    assert inside[0]["status"] == sent[0]["status"] == 400
    assert b"x-request-id" in dict(sent[0]["headers"])
    assert b"x-request-id" not in dict(inside[0]["headers"])
    assert eyes.statuses() == [400]
    assert eyes.endpoints() == ["<unmatched>"]


def test_lifespan_is_as_django_has_it(eyes: Eyes) -> None:
    """Django knows no lifespan: it raises, and servers go on without."""
    with project(eyes.ops):
        guarded = opsguard_django.install(get_asgi_application())
        with pytest.raises(ValueError, match="only handle ASGI/HTTP connections"):
            drive(guarded, {"type": "lifespan"}, {"type": "lifespan.startup"})


def test_an_asgi_application_is_told_from_a_wsgi_one_however_it_is_made(eyes: Eyes) -> None:
    async def function(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body"})

    class Application:
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            await function(scope, receive, send)

    def wsgi(environ: Any, start_response: Any) -> list[bytes]:
        start_response("204 No Content", [])
        return []

    with project(eyes.ops):
        for application in (function, Application()):
            guarded = opsguard_django.install(application)
            assert call_asgi(guarded, Request("/a")).status == 204
        assert call_wsgi(opsguard_django.install(wsgi), Request("/a")).status == 204
    assert eyes.statuses() == [204] * 3


def test_an_upload_is_read_by_the_view_and_counted_from_outside(eyes: Eyes) -> None:
    def serve(request: HttpRequest) -> HttpResponse:
        return HttpResponse(str(len(io.BytesIO(request.body).read())))

    with project(eyes.ops, path("a", serve)):
        guarded = opsguard_django.install(get_asgi_application())
        answer = call_asgi(guarded, Request("/a", "POST", body=b"x" * 500, chunked=True))
    assert answer.body == b"500"
    assert eyes.total("http_request_size_bytes_sum") == 500.0


def test_headers_are_added_beside_the_apps_own_with_and_without_djangos_private_store() -> None:
    """`ResponseHeaders._store` saves two exceptions a request; it may go away."""
    from django.http import HttpResponse

    from opsguard_django.middleware import _add_headers

    ours = [("X-Request-ID", "ours"), ("X-Correlation-ID", "ours")]
    response = HttpResponse(headers={"x-request-id": "mine"})
    _add_headers(response, ours)
    assert type(response.headers._store) is dict
    assert response["X-Request-ID"] == "mine"
    assert response["X-Correlation-ID"] == "ours"

    plain: Any = SimpleNamespace(headers={"X-Request-ID": "mine"})
    _add_headers(plain, ours)
    assert plain.headers == {"X-Request-ID": "mine", "X-Correlation-ID": "ours"}


@CLIENTS
def test_a_response_that_is_sent_again_has_the_headers_of_its_request(
    get: Get, tmp_path: Path
) -> None:
    """A view may have one response for all requests: no client gets the one before's."""
    eyes = Eyes(tmp_path, limiter={"policies": {"/limited": "100/minute"}})
    shared = HttpResponse("ok", headers={"X-Own": "1"})
    own = HttpResponse("ok", headers={"X-Request-ID": "mine"})
    routes = [path(name, lambda request: shared) for name in ("limited", "free")]
    found = []
    with project(eyes.ops, *routes, path("own", lambda request: own)):
        for address, name in (("/limited", "a"), ("/limited", "b"), ("/free", "c"), ("/own", "d")):
            answer = get(address, headers={"X-Request-ID": name})
            found.append([answer.get(key) for key in ("X-Request-ID", "X-RateLimit-Remaining")])
            assert answer.get("X-Own") == (None if name == "d" else "1")
        assert get("/own", headers={"X-Request-ID": "e"})["X-Request-ID"] == "mine"
    assert found == [["a", "99"], ["b", "98"], ["c", None], ["mine", None]]
    assert eyes.statuses() == [200] * 5
    assert [line["request_id"] for line in eyes.lines()] == ["a", "b", "c", "d", "e"]
    assert eyes.total("opsguard_internal_errors_total") == 0.0


def test_threads_that_send_one_response_at_once_leave_no_clients_headers_in_it() -> None:
    """Neither takes what the other one has just put there for the app's own."""
    from opsguard_django.middleware import _add_headers

    shared = HttpResponse("ok")

    class Slow(list[tuple[str, str]]):
        """Headers behind which a thread says so, and waits for the other one."""

        def __init__(self, pair: tuple[str, str], says: threading.Event, hears: threading.Event):
            super().__init__([pair])
            self.says, self.hears = says, hears

        def __iter__(self) -> Iterator[tuple[str, str]]:
            yield from super().__iter__()
            self.says.set()
            self.hears.wait(0.2)

    put, seen, done = threading.Event(), threading.Event(), threading.Event()

    def first() -> None:
        _add_headers(shared, Slow(("X-Request-ID", "a"), put, seen))
        done.set()

    thread = threading.Thread(target=first)
    thread.start()
    assert put.wait(30)
    _add_headers(shared, Slow(("X-Request-ID", "b"), seen, done))
    thread.join()
    _add_headers(shared, [("X-Request-ID", "last")])
    assert shared["X-Request-ID"] == "last"


def test_headers_of_another_answer_go_without_djangos_private_store_too() -> None:
    from opsguard_django.middleware import _add_headers

    plain: Any = SimpleNamespace(headers={"X-Own": "1"})
    _add_headers(plain, [("X-Request-ID", "a"), ("X-RateLimit-Limit", "1")])
    sent = plain.headers
    _add_headers(plain, [("X-Request-ID", "b")])
    assert plain.headers == {"X-Own": "1", "X-Request-ID": "b"}
    assert sent == {"X-Own": "1", "X-Request-ID": "a", "X-RateLimit-Limit": "1"}


# --- limits and keys


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_a_request_has_the_identity_of_its_key(tmp_path: Path, asynchronous: bool) -> None:
    keys = {"pepper": "p" * 20, "store": f"sqlite:///{tmp_path}/keys.db"}
    eyes = Eyes(tmp_path, keys=keys)

    def who(request: HttpRequest) -> HttpResponse:
        identity = request.opsguard_identity  # type: ignore[attr-defined]
        return HttpResponse("nobody" if identity is None else identity.tenant_id)

    with project(eyes.ops, path("who", who)):
        key = eyes.ops.keys.create("t1", "free")
        if asynchronous:

            async def ask() -> tuple[bytes, bytes]:
                client = AsyncClient()
                known = await client.get("/who", headers={"X-API-Key": key})
                return (await client.get("/who")).content, known.content

            assert asyncio.run(ask()) == (b"nobody", b"t1")
        else:
            client = Client()
            assert client.get("/who").content == b"nobody"
            assert client.get("/who", headers={"X-API-Key": key}).content == b"t1"


class Classy(View):
    def get(self, request: HttpRequest) -> HttpResponse:
        return HttpResponse("")

    def post(self, request: HttpRequest) -> HttpResponse:
        return HttpResponse("")


def test_at_the_first_request_the_log_says_what_is_limited(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="opsguard")
    eyes = Eyes(tmp_path, limiter={"policies": {"/api/*": "9/minute"}})
    limited = eyes.ops.limit("1/minute")(view)
    inner = [re_path(r"^items/(?P<id>[0-9]+)/$", view), path("classy", Classy.as_view())]
    with project(eyes.ops, path("api/", include(inner)), path("a", limited), path("b", view)):
        get_asgi_application()
        assert not [r for r in caplog.records if r.getMessage().startswith("limiter:")]
        for _ in range(2):
            Client().get("/b")
    told = [r.getMessage() for r in caplog.records if r.getMessage().startswith("limiter:")]
    assert told == ["limiter: 4 routes limited, 0 exempt, 1 uncovered: * /b"]


def test_a_mark_that_no_route_carries_stops_the_start(tmp_path: Path) -> None:
    eyes = Eyes(tmp_path)
    forgotten = eyes.ops.limit("1/minute")(view)
    with project(eyes.ops, path("a", view)):
        with pytest.raises(DeclarationError, match=r"tests\.test_django\.view"):
            get_wsgi_application()
        (complaint,) = run_checks()
        assert complaint.id == "opsguard.E002"
        assert "tests.test_django.view" in complaint.msg
    with project(eyes.ops, path("a", forgotten)):
        assert run_checks() == []


def test_a_urlconf_that_a_middleware_chooses_counts_if_it_is_named(tmp_path: Path) -> None:
    eyes = Eyes(tmp_path)
    elsewhere = eyes.ops.limit("1/minute")(view)
    with (
        project(eyes.ops, path("a", view)),
        override_settings(OPSGUARD_URLCONFS=[Urls((path("other", elsewhere),))]),
    ):
        get_wsgi_application()


def test_a_urlconf_that_cannot_be_imported_is_django_s_to_complain_about(eyes: Eyes) -> None:
    with project(eyes.ops), override_settings(ROOT_URLCONF="no.such.module"):
        get_wsgi_application()
        with pytest.raises(ModuleNotFoundError):
            Client().get("/a")


def test_manage_py_opsguard_limits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    eyes = Eyes(tmp_path)
    limited = eyes.ops.limit("1/minute")(view)
    with project(eyes.ops, path("items/<int:id>", limited)):
        command = load_command_class("opsguard_django", "opsguard")
        with pytest.raises(SystemExit) as ended:
            command.run_from_argv(["manage.py", "opsguard", "limits", "show", "--json"])
        assert ended.value.code == 0
        said = json.loads(capsys.readouterr().out)
        assert said["routes"]["limited"] == ["* /items/{id}"]
        with pytest.raises(SystemExit):
            call_command(command, "limits", "explain", "/items/7")
        assert "the handler is decorated" in capsys.readouterr().out
        with pytest.raises(CommandError, match="limits show"):
            call_command(command, "dance")


def test_manage_py_opsguard_without_click_names_the_extra(
    eyes: Eyes, monkeypatch: pytest.MonkeyPatch
) -> None:
    with project(eyes.ops, path("a", view)):
        command = load_command_class("opsguard_django", "opsguard")
        monkeypatch.setitem(sys.modules, "click", None)
        with pytest.raises(CommandError, match=r"opsguard-toolkit\[cli\]"):
            call_command(command, "limits", "show")


def test_explain_takes_django_s_request(eyes: Eyes) -> None:
    told: list[Any] = []

    def item(request: HttpRequest, id: int) -> HttpResponse:
        told.extend(eyes.ops.limiter.explain(one) for one in (None, request))
        return HttpResponse("")

    limited = eyes.ops.limit("5/minute")(item)
    with project(eyes.ops, path("items/<int:id>", limited)):
        Client().get("/items/1")
        assert told[0] == told[1]
        assert told[0][1].policy.endswith("item")
        later = eyes.ops.limiter.explain(RequestFactory().get("/items/7"))
        assert later[1].buckets[0].endswith(":a:127.0.0.1")


# --- Django REST framework


class Bound(View):
    """A view set's way to a view, as `rest_framework.viewsets.ViewSetMixin.as_view` has it."""

    @classmethod
    def to_view(cls, actions: dict[str, str]) -> Any:
        def view(request: HttpRequest, *args: Any, **kwargs: Any) -> Any:
            self = cls()
            if "get" in actions and "head" not in actions:
                actions["head"] = actions["get"]
            for method, action in actions.items():
                setattr(self, method, getattr(self, action))
            self.setup(request, *args, **kwargs)
            return self.dispatch(request, *args, **kwargs)

        update_wrapper(view, cls, updated=())
        update_wrapper(view, cls.dispatch, assigned=())
        view.cls = cls  # type: ignore[attr-defined]
        view.actions = actions  # type: ignore[attr-defined]
        return csrf_exempt(view)


def view_set(ops: OpsGuard, base: type[Any], answer: Callable[[str], Any]) -> type[Any]:
    class Things(base):  # type: ignore[misc]
        @ops.limit("2/minute")
        def list(self, request: Any) -> Any:
            return answer("list")

        def retrieve(self, request: Any) -> Any:
            return answer("retrieve")

        @ops.limit("1/minute")
        def publish(self, request: Any) -> Any:
            return answer("publish")

    return Things


def of_rest_framework() -> tuple[type[Any], Callable[[str], Any], str]:
    pytest.importorskip("rest_framework", reason="needs djangorestframework")
    from rest_framework.renderers import JSONRenderer
    from rest_framework.response import Response as Answer
    from rest_framework.viewsets import ViewSet

    class Plain(ViewSet):
        renderer_classes = (JSONRenderer,)
        authentication_classes = ()
        permission_classes = ()
        throttle_classes = ()

    return Plain, Answer, "as_view"


@pytest.mark.parametrize("real", [False, True], ids=["its way", "itself"])
@override_settings(REST_FRAMEWORK={"UNAUTHENTICATED_USER": None})
def test_marks_on_the_actions_of_a_view_set_count(real: bool, eyes: Eyes) -> None:
    base, answer, make = of_rest_framework() if real else (Bound, HttpResponse, "to_view")
    things = getattr(view_set(eyes.ops, base, answer), make)
    routes = (
        path("things", things({"get": "list"})),
        path("things/<int:id_>", as_thing(things({"get": "retrieve", "post": "publish"}))),
    )
    with project(eyes.ops, *routes):
        client = Client()
        assert [client.get("/things").status_code for _ in range(3)] == [200, 200, 429]
        assert client.head("/things").status_code == 429
        assert [client.get("/things/1").status_code for _ in range(4)] == [200] * 4
        assert [client.post("/things/1").status_code for _ in range(2)] == [200, 429]
        served = {(one.method, one.endpoint) for one in eyes.ops.runtime().routes()}
    assert {("GET", "/things"), ("POST", "/things/{id_}")} <= served


def as_thing(view: Any) -> Any:
    """The view without the id, which these do not take."""

    def inner(request: Any, id_: int) -> Any:
        return view(request)

    return update_wrapper(inner, view)
