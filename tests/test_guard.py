"""OpsGuard: it collects, install freezes, requests are served, and its faults stay its own."""

from __future__ import annotations

import asyncio
import contextvars
import gzip
import json
import logging
import os
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import prometheus_client
import pytest

import opsguard
import opsguard_asgi
import opsguard_wsgi
from opsguard import (
    DeclarationError,
    Exchange,
    InstallError,
    OpsGuard,
    OpsGuardError,
    Response,
    SettingsError,
)
from opsguard.context import current
from opsguard.metrics.http import HttpMetrics
from opsguard.testing import Answer, Request, call_asgi, call_wsgi, serve_asgi
from tests.contract.harness import Samples, parse
from tests.redis_server import running

TEXT = ("Content-Type", "text/plain")
TEAPOT = Response(418, (TEXT, ("Content-Length", "2")), b"no")
MISSING = Response(404, (TEXT, ("Content-Length", "0")), b"")
PROTOCOLS = pytest.mark.parametrize("protocol", ["asgi", "wsgi"])
Handler = Callable[[], bytes]


class Boom(Exception):
    pass


class Host:
    """A guarded app of one protocol that answers every path with what `handler` returns."""

    def __init__(
        self, protocol: str, ops: OpsGuard, handler: Handler = lambda: b"hello", **options: Any
    ) -> None:
        self.ops = ops
        self.protocol = protocol
        options = options or {"endpoint": path_of}
        if protocol == "asgi":

            async def asgi(scope: Any, receive: Any, send: Any) -> None:
                body = handler()
                await send({"type": "http.response.start", "status": 200, "headers": []})
                await send({"type": "http.response.body", "body": body})

            self.app: Any = opsguard_asgi.install(asgi, ops, **options)
        else:

            def wsgi(environ: Any, start_response: Any) -> list[bytes]:
                body = handler()
                start_response("200 OK", [("Content-Type", "text/plain")])
                return [body]

            self.app = opsguard_wsgi.install(wsgi, ops, **options)

    def get(self, path: str = "/a", **headers: str) -> Answer:
        pairs = tuple([(name.replace("_", "-"), value) for name, value in headers.items()])
        return self.send(Request(path, headers=pairs))

    def send(self, request: Request) -> Answer:
        return (call_asgi if self.protocol == "asgi" else call_wsgi)(self.app, request)


def path_of(request: Any) -> str | None:
    """The path as its own template; of /unknown there is none."""
    path: str = request.get("path") or request.get("PATH_INFO", "")
    return None if path == "/unknown" else path


def declared(folder: Path, service: str = "s", **settings: Any) -> OpsGuard:
    """An OpsGuard whose files are in `folder`."""
    settings["logging"] = {"file": str(folder / "log"), **settings.get("logging", {})}
    settings["metrics"] = {"directory": str(folder), **settings.get("metrics", {})}
    return OpsGuard(service, **settings)


def lines(folder: Path, ops: OpsGuard) -> list[dict[str, Any]]:
    ops.runtime().sink.flush()
    log = folder / "log"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def access(folder: Path, ops: OpsGuard) -> list[dict[str, Any]]:
    return [line for line in lines(folder, ops) if line["logger"] == "opsguard.access"]


def samples(ops: OpsGuard) -> Samples:
    return parse("".join([text for _, text in ops.metrics.expose(False)]))


def total(found: Samples, name: str, **labels: str) -> float:
    """The sum of the series of `name` that have these labels."""
    wanted = set(labels.items())
    return sum([v for (sample, has), v in found.items() if sample == name and wanted <= has])


# --- collecting


def test_an_opsguard_collects_and_starts_nothing(tmp_path: Path) -> None:
    threads = set(threading.enumerate())
    open_files = count_open_files()
    handlers = list(logging.getLogger().handlers)
    ops = declared(tmp_path)
    ops.metrics.counter("orders_total")
    ops.at_edge(lambda exchange: None)
    ops.at_route(lambda exchange: None)
    ops.logger("mine")
    ops.bind(tenant_id="t")
    assert not ops.installed
    assert list(tmp_path.iterdir()) == []
    assert set(threading.enumerate()) <= threads
    assert logging.getLogger().handlers == handlers
    assert count_open_files() <= open_files


def count_open_files() -> int:
    """0 where the system does not tell."""
    place = Path("/proc/self/fd")
    return len(list(place.iterdir())) if place.exists() else 0


@PROTOCOLS
def test_install_opens_nothing_either(protocol: str, tmp_path: Path) -> None:
    threads = set(threading.enumerate())
    host = Host(protocol, declared(tmp_path))
    assert host.ops.installed
    assert list(tmp_path.iterdir()) == []
    assert set(threading.enumerate()) <= threads


def test_wrong_settings_stop_the_install_and_not_the_declaration() -> None:
    ops = OpsGuard(metrics={"path": 7})
    with pytest.raises(SettingsError, match=r"metrics\.path"):
        Host("asgi", ops)


@pytest.mark.parametrize("where", ["at_edge", "at_route"])
def test_a_declaration_after_install_is_an_error_that_says_so(where: str, tmp_path: Path) -> None:
    ops = declared(tmp_path)
    Host("asgi", ops)

    def check(exchange: Exchange) -> None:
        return None

    with pytest.raises(DeclarationError) as raised:
        getattr(ops, where)(check)
    assert str(raised.value) == (
        "check must be declared before install(): this OpsGuard is already installed "
        "and its declarations are frozen"
    )
    assert isinstance(raised.value, OpsGuardError)


def test_a_late_declaration_without_a_name_is_refused_too(tmp_path: Path) -> None:
    class Check:
        def __call__(self, exchange: Exchange) -> None:
            return None

    ops = declared(tmp_path)
    Host("asgi", ops)
    with pytest.raises(DeclarationError, match="this step must be declared before"):
        ops.at_edge(Check())


def test_a_declared_step_is_returned_so_that_it_decorates() -> None:
    def check(exchange: Exchange) -> None:
        return None

    ops = OpsGuard()
    assert ops.at_edge(check) is check
    assert ops.at_route(check) is check


def test_instruments_may_be_declared_after_install(tmp_path: Path) -> None:
    host = Host("asgi", declared(tmp_path))
    host.ops.metrics.counter("late_total").inc()
    assert total(samples(host.ops), "late_total") == 1.0


def test_the_front_door_knows_its_names_and_no_others() -> None:
    assert opsguard.Settings.__name__ == "Settings"
    with pytest.raises(AttributeError, match="'opsguard' has no attribute 'Nothing'"):
        _ = opsguard.Nothing  # type: ignore[attr-defined]


def test_the_errors_are_one_tree() -> None:
    for kind in (DeclarationError, InstallError, SettingsError):
        assert issubclass(kind, OpsGuardError)


# --- outside and inside of a request


def test_outside_a_request_there_is_no_id_and_bind_does_nothing() -> None:
    ops = OpsGuard()
    ops.bind(tenant_id="t")
    assert ops.request_id is None
    assert current.get() is None


@PROTOCOLS
def test_bound_fields_are_in_every_further_line_of_the_request(
    protocol: str, tmp_path: Path
) -> None:
    ops = declared(tmp_path)
    log = ops.logger("shop")

    def handler() -> bytes:
        log.info("before")
        ops.bind(tenant_id="t-1", plan="free")
        ops.bind(plan="pro")
        log.info("after", step=2)
        return (ops.request_id or "").encode()

    host = Host(protocol, ops, handler)
    answer = host.get(x_request_id="req-1")
    host.ops.logger("shop").info("outside")
    assert answer.body == b"req-1"
    before, after, completed, outside = lines(tmp_path, ops)
    assert before["message"] == "before"
    assert before["request_id"] == "req-1"
    assert "tenant_id" not in before
    for line in (after, completed):
        assert (line["request_id"], line["tenant_id"], line["plan"]) == ("req-1", "t-1", "pro")
    assert after["step"] == 2
    assert outside["message"] == "outside"
    assert "request_id" not in outside
    assert current.get() is None


@PROTOCOLS
def test_lines_of_other_libraries_carry_the_request_id_too(protocol: str, tmp_path: Path) -> None:
    def handler() -> bytes:
        logging.getLogger("some.library").warning("it is %s", "late")
        return b""

    host = Host(protocol, declared(tmp_path), handler)
    host.get(x_request_id="req-1", x_correlation_id="cor-1")
    line, _ = lines(tmp_path, host.ops)
    assert line["message"] == "it is late"
    assert (line["request_id"], line["correlation_id"]) == ("req-1", "cor-1")


@PROTOCOLS
def test_the_servers_own_line_about_an_exception_carries_the_ids(
    protocol: str, tmp_path: Path
) -> None:
    """A server logs it when the request is over for us."""

    def handler() -> bytes:
        raise Boom

    host = Host(protocol, declared(tmp_path), handler)
    answer = host.get(x_request_id="req-1")
    logging.getLogger("some.server").error("Exception in the app", exc_info=answer.error)
    (line,) = [line for line in lines(tmp_path, host.ops) if line["logger"] == "some.server"]
    assert line["request_id"] == "req-1"


# --- several apps, several OpsGuards


def test_one_opsguard_on_two_apps_counts_them_together(tmp_path: Path) -> None:
    ops = declared(tmp_path)
    first, second = Host("asgi", ops), Host("wsgi", ops)
    for host in (first, second, second):
        assert host.get("/a").status == 200
    assert total(samples(ops), "http_requests_total", endpoint="/a") == 3.0
    assert len(access(tmp_path, ops)) == 3
    assert b'endpoint="/a"' in first.get("/metrics").body


@PROTOCOLS
def test_two_opsguards_in_one_process_do_not_mix(protocol: str, tmp_path: Path) -> None:
    hosts = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        options = {"ids": {"request_header": f"X-{name}"}}
        hosts.append(Host(protocol, declared(tmp_path / name, name, **options)))
    one, two = hosts
    assert len(one.get("/a", x_one="id-1", x_two="id-2").header("x-one")) == 1
    for _ in range(2):
        assert two.get("/b", x_one="id-1", x_two="id-2").header("x-two") == ["id-2"]
    assert total(samples(one.ops), "http_requests_total") == 1.0
    assert total(samples(two.ops), "http_requests_total") == 2.0
    assert [line["service"] for line in access(tmp_path / "one", one.ops)] == ["one"]
    assert [line["service"] for line in access(tmp_path / "two", two.ops)] == ["two", "two"]
    assert b'endpoint="/b"' not in one.get("/metrics").body


@PROTOCOLS
def test_a_second_install_around_the_first_counts_once(protocol: str, tmp_path: Path) -> None:
    ops = declared(tmp_path)
    host = Host(protocol, ops)
    install = opsguard_asgi.install if protocol == "asgi" else opsguard_wsgi.install
    host.app = install(host.app, ops, endpoint=path_of)  # type: ignore[operator]
    answer = host.get()
    assert answer.status == 200
    assert len(answer.header("x-request-id")) == 1
    assert total(samples(ops), "http_requests_total") == 1.0
    assert len(access(tmp_path, ops)) == 1


@PROTOCOLS
def test_of_two_opsguards_around_each_other_the_outer_one_counts(
    protocol: str, tmp_path: Path
) -> None:
    (tmp_path / "inner").mkdir()
    host = Host(protocol, declared(tmp_path / "inner", "inner"))
    outer = declared(tmp_path, "outer")
    install = opsguard_asgi.install if protocol == "asgi" else opsguard_wsgi.install
    inner, host.app = host.ops, install(host.app, outer)  # type: ignore[operator]
    assert len(host.get().header("x-request-id")) == 1
    assert total(samples(outer), "http_requests_total") == 1.0
    assert total(samples(inner), "http_requests_total") == 0.0


@PROTOCOLS
def test_the_guarded_app_is_seen_through(protocol: str, tmp_path: Path) -> None:
    import copy

    class App:
        title = "inner title"

    install = opsguard_asgi.install if protocol == "asgi" else opsguard_wsgi.install
    app, ops = App(), declared(tmp_path)
    guarded: Any = install(app, ops)  # type: ignore[operator]
    assert (guarded.title, guarded.app, guarded.ops) == ("inner title", app, ops)
    with pytest.raises(AttributeError, match="nothing"):
        _ = guarded.nothing
    assert copy.copy(guarded).title == "inner title"


# --- the two hook points


@PROTOCOLS
@pytest.mark.parametrize("where", ["at_edge", "at_route"])
def test_the_first_answer_of_a_step_counts(protocol: str, where: str, tmp_path: Path) -> None:
    ops, called = declared(tmp_path), []
    for name, answer in (("first", None), ("second", TEAPOT), ("third", None)):

        def step(exchange: Exchange, name: str = name, answer: Any = answer) -> Response | None:
            called.append((name, exchange.endpoint))
            return answer  # type: ignore[no-any-return]

        getattr(ops, where)(step)
    host = Host(protocol, ops, lambda: pytest.fail("the app ran"))
    answer = host.get()
    assert (answer.status, answer.body) == (418, b"no")
    known = None if where == "at_edge" else "/a"
    assert called == [("first", known), ("second", known)]
    assert len(answer.header("x-request-id")) == 1
    assert total(samples(ops), "http_requests_total", status="418") == 1.0


@PROTOCOLS
def test_without_a_route_only_the_edge_is_asked(protocol: str, tmp_path: Path) -> None:
    ops, called = declared(tmp_path), []
    ops.at_edge(lambda exchange: called.append("edge"))
    ops.at_route(lambda exchange: called.append("route"))
    host = Host(protocol, ops)
    assert host.get("/unknown").status == 200
    assert called == ["edge"]
    assert total(samples(ops), "http_requests_total", endpoint="<unmatched>") == 1.0


@PROTOCOLS
@pytest.mark.parametrize("where", ["at_edge", "at_route"])
def test_a_step_that_raises_is_counted_and_skipped(
    protocol: str, where: str, tmp_path: Path
) -> None:
    ops = declared(tmp_path)

    def broken(exchange: Exchange) -> Response | None:
        raise Boom("of the step")

    getattr(ops, where)(broken)
    getattr(ops, where)(lambda exchange: TEAPOT if exchange.path == "/no" else None)
    host = Host(protocol, ops)
    assert (host.get("/a").status, host.get("/no").status) == (200, 418)
    found = samples(ops)
    assert total(found, "opsguard_internal_errors_total", site="step:broken") == 2.0
    assert total(found, "http_errors_total") == 0.0
    errors = [line for line in lines(tmp_path, ops) if line["level"] == "ERROR"]
    assert [line["message"] for line in errors] == ["opsguard: step:broken failed and was skipped"]


@PROTOCOLS
def test_an_endpoint_function_that_raises_leaves_the_request_unnamed(
    protocol: str, tmp_path: Path
) -> None:
    def broken(request: Any) -> str:
        raise Boom("of the user's function")

    host = Host(protocol, declared(tmp_path), endpoint=broken)
    answer = host.get()
    assert (answer.status, answer.error) == (200, None)
    found = samples(host.ops)
    assert total(found, "http_requests_total", endpoint="<unmatched>", status="200") == 1.0
    assert total(found, "opsguard_internal_errors_total", site="endpoint") == 1.0


@PROTOCOLS
@pytest.mark.parametrize(
    ("method", "site"), [("begin_with", "enter"), ("record_with", "close")], ids=["enter", "close"]
)
def test_a_fault_of_our_metrics_never_reaches_the_app_and_is_counted_once(
    protocol: str, method: str, site: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise Boom("of ours")

    monkeypatch.setattr(HttpMetrics, method, lambda self: broken)
    host = Host(protocol, declared(tmp_path))
    answer = host.get()
    assert (answer.status, answer.body, answer.error) == (200, b"hello", None)
    assert len(answer.header("x-request-id")) == 1
    found = samples(host.ops)
    assert total(found, "opsguard_internal_errors_total") == 1.0
    assert total(found, "opsguard_internal_errors_total", site=site) == 1.0
    assert current.get() is None


@PROTOCOLS
def test_a_fault_of_ours_beside_an_exception_of_the_app_hides_nothing(
    protocol: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise LookupError("of ours")

    def handler() -> bytes:
        raise Boom("of the app")

    monkeypatch.setattr(HttpMetrics, "record_with", lambda self: broken)
    host = Host(protocol, declared(tmp_path), handler)
    answer = host.get()
    assert isinstance(answer.error, Boom)
    assert answer.status == 500
    assert total(samples(host.ops), "opsguard_internal_errors_total") == 1.0


# --- answers of ours


@PROTOCOLS
@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ("production", "The server failed to answer this request."),
        ("development", "Boom: of the app"),
    ],
)
def test_an_unhandled_exception_is_answered_and_told_to_developers_only(
    protocol: str, environment: str, message: str, tmp_path: Path
) -> None:
    def handler() -> bytes:
        raise Boom("of the app")

    ops = declared(tmp_path, environment=environment, logging={"format": "json"})
    answer = Host(protocol, ops, handler).get(x_request_id="r-1")
    assert isinstance(answer.error, Boom)
    assert answer.status == 500
    assert answer.header("content-type") == ["application/problem+json"]
    assert answer.header("content-length") == [str(len(answer.body))]
    assert json.loads(answer.body) == {
        "status": 500,
        "error": "Internal server error",
        "message": message,
        "request_id": "r-1",
    }


@PROTOCOLS
def test_the_scrape_is_answered_in_the_form_and_coding_asked_for(
    protocol: str, tmp_path: Path
) -> None:
    host = Host(protocol, declared(tmp_path, "checkout", version="1.2"))
    host.get("/a")
    plain = host.get("/metrics")
    assert plain.status == 200
    assert plain.header("content-type") == ["text/plain; version=0.0.4; charset=utf-8"]
    assert len(plain.header("x-request-id")) == 1
    found = parse(plain.body.decode())
    assert total(found, "http_requests_total", endpoint="/a") == 1.0
    info = {"service": "checkout", "version": "1.2", "environment": "production"}
    assert total(found, "service_info", **info) == 1.0
    assert total(found, "process_cpu_seconds_total") > 0
    small = host.get("/metrics", accept="application/openmetrics-text", accept_encoding="gzip")
    assert small.header("content-encoding") == ["gzip"]
    assert gzip.decompress(small.body).endswith(b"# EOF\n")
    head = host.send(Request("/metrics", "HEAD"))
    assert (head.status, head.body) == (200, b"")
    assert host.send(Request("/metrics", "POST")).status == 405
    assert host.get("/metrics/").body == host.get("//metrics").body == b"hello"


@PROTOCOLS
def test_the_info_metric_can_have_another_name(protocol: str, tmp_path: Path) -> None:
    host = Host(protocol, declared(tmp_path, metrics={"names": {"service_info": "app_info"}}))
    found = parse(host.get("/metrics").body.decode())
    assert total(found, "app_info", service="s") == 1.0
    assert total(found, "service_info") == 0.0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_worker_forked_after_a_scrape_says_who_it_is(tmp_path: Path) -> None:
    host = Host("wsgi", declared(tmp_path))
    host.get("/metrics")
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        found = parse(host.get("/metrics").body.decode())
        counted = total(found, "http_requests_total")
        os.write(writing, repr((total(found, "service_info"), counted)).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        assert pipe.read() == "(1.0, 1.0)"  # once, and what its parent had counted
    os.waitpid(pid, 0)


@PROTOCOLS
def test_scrapes_are_counted_but_muted_in_the_log(protocol: str, tmp_path: Path) -> None:
    host = Host(protocol, declared(tmp_path))
    host.get("/metrics")
    assert total(samples(host.ops), "http_requests_total", endpoint="/metrics") == 1.0
    assert access(tmp_path, host.ops) == []
    host.send(Request("/metrics", "POST"))
    assert [line["status_code"] for line in access(tmp_path, host.ops)] == [405]


@PROTOCOLS
def test_users_own_metrics_are_beside_ours(protocol: str, tmp_path: Path) -> None:
    theirs = prometheus_client.Counter("guard_test_theirs_total", "help")
    try:
        host = Host(protocol, declared(tmp_path))
        theirs.inc(2)
        host.ops.metrics.counter("ours_total").inc(3)
        found = parse(host.get("/metrics").body.decode())
    finally:
        prometheus_client.REGISTRY.unregister(theirs)
    assert total(found, "guard_test_theirs_total") == 2.0
    assert total(found, "ours_total") == 3.0


@PROTOCOLS
def test_behind_a_prefix_of_the_server_the_endpoint_is_still_ours(
    protocol: str, tmp_path: Path
) -> None:
    host = Host(protocol, declared(tmp_path))
    found = host.send(Request("/metrics", root_path="/shop"))
    assert found.body.startswith(b"# HELP")
    host.send(Request("/a", root_path="/shop"))
    assert [line["path"] for line in access(tmp_path, host.ops)] == ["/shop/a"]


# --- settings


@PROTOCOLS
def test_the_metrics_path_can_be_another(protocol: str, tmp_path: Path) -> None:
    host = Host(protocol, declared(tmp_path, metrics={"path": "/internal/numbers"}))
    assert host.get("/internal/numbers").body.startswith(b"# HELP")
    assert host.get("/metrics").body == b"hello"


@PROTOCOLS
def test_without_metrics_requests_are_logged_and_nothing_is_counted(
    protocol: str, tmp_path: Path
) -> None:
    def handler() -> bytes:
        if current.get().path == "/boom":  # type: ignore[union-attr]
            raise Boom
        return b"hello"

    ops = declared(tmp_path, metrics={"enabled": False})
    host = Host(protocol, ops, handler)
    assert host.get("/metrics").body == b"hello"
    assert isinstance(host.get("/boom").error, Boom)
    assert [line["status_code"] for line in access(tmp_path, ops)] == [200, 500]
    assert total(samples(ops), "http_requests_total") == 0.0


@PROTOCOLS
def test_without_metrics_steps_at_the_route_still_count(protocol: str, tmp_path: Path) -> None:
    ops = declared(tmp_path, metrics={"enabled": False})
    ops.at_route(lambda exchange: TEAPOT)
    assert Host(protocol, ops).get().status == 418


@PROTOCOLS
@pytest.mark.parametrize(
    ("option", "written"), [("all", [200, 404]), ("errors", [404]), ("off", [])]
)
def test_access_lines_are_as_many_as_wanted(
    protocol: str, option: str, written: list[int], tmp_path: Path
) -> None:
    ops = declared(tmp_path, logging={"access": option})
    ops.at_edge(lambda exchange: MISSING if exchange.path == "/missing" else None)
    host = Host(protocol, ops)
    host.get("/a")
    host.get("/missing")
    assert [line["status_code"] for line in access(tmp_path, ops)] == written
    assert total(samples(ops), "http_requests_total") == 2.0


@PROTOCOLS
def test_health_probes_are_muted_unless_they_fail(protocol: str, tmp_path: Path) -> None:
    def handler() -> bytes:
        if current.get().path == "/livez":  # type: ignore[union-attr]
            raise Boom
        return b""

    host = Host(protocol, declared(tmp_path), handler)
    for path in ("/health/ready", "/health/", "/healthz", "/livez", "/healthz-admin"):
        host.get(path)
    assert [line["path"] for line in access(tmp_path, host.ops)] == ["/livez", "/healthz-admin"]


@PROTOCOLS
def test_id_headers_can_have_other_names(protocol: str, tmp_path: Path) -> None:
    names = {"request_header": "X-Trace", "correlation_header": "X-Flow"}
    host = Host(protocol, declared(tmp_path, ids=names))
    answer = host.get(x_trace="t-1", x_flow="f-1", x_request_id="r-1")
    assert answer.header("x-trace") == ["t-1"]
    assert answer.header("x-flow") == ["f-1"]
    assert answer.header("x-request-id") == []


@PROTOCOLS
def test_the_second_header_can_be_off(protocol: str, tmp_path: Path) -> None:
    host = Host(protocol, declared(tmp_path, ids={"correlation_header": ""}))
    answer = host.get(x_correlation_id="c-1")
    assert answer.header("x-correlation-id") == []
    assert answer.header("x-request-id") not in ([], ["c-1"])
    assert "correlation_id" not in access(tmp_path, host.ops)[0]


@PROTOCOLS
def test_inbound_ids_are_ignored_where_they_are_not_trusted(protocol: str, tmp_path: Path) -> None:
    host = Host(protocol, declared(tmp_path, ids={"trust_inbound": False}))
    answer = host.get(x_request_id="r-1", x_correlation_id="c-1")
    (made,) = answer.header("x-request-id")
    assert made not in ("r-1", "c-1")
    assert answer.header("x-correlation-id") == []


def test_the_service_is_named_by_the_app_unless_settings_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OTEL_SERVICE_NAME", raising=False)

    class Titled:
        title = "Checkout API"

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            return None

    unnamed, named = OpsGuard(), OpsGuard("mine")
    opsguard_asgi.install(Titled(), unnamed)
    opsguard_asgi.install(Titled(), named)
    assert unnamed.settings.service == "Checkout API"
    assert named.settings.service == "mine"


# --- override


@PROTOCOLS
def test_override_changes_the_settings_of_installed_apps_and_restores_them(
    protocol: str, tmp_path: Path
) -> None:
    host = Host(protocol, declared(tmp_path))
    host.get("/a")
    before = host.ops.runtime().plan
    with host.ops.override(
        metrics={"path": "/numbers"}, ids={"request_header": "X-Other"}, environment="test"
    ):
        answer = host.get("/b", x_other="o-1", x_request_id="r-1")
        assert answer.header("x-other") == ["o-1"]
        assert answer.header("x-request-id") == []
        page = host.get("/numbers").body.decode()
        assert host.get("/metrics").body == b"hello"
    assert total(parse(page), "service_info", environment="test") == 1.0
    assert access(tmp_path, host.ops)[1]["environment"] == "test"
    assert host.ops.runtime().plan is before
    assert host.get("/c", x_request_id="r-1").header("x-request-id") == ["r-1"]
    assert host.get("/numbers").body == b"hello"


@PROTOCOLS
def test_in_an_override_http_metrics_count_from_zero_and_instruments_go_on(
    protocol: str, tmp_path: Path
) -> None:
    ops = declared(tmp_path)
    orders = ops.metrics.counter("orders_total")
    host = Host(protocol, ops, lambda: orders.inc() or b"ordered")
    host.get("/a")
    with ops.override():
        host.get("/b")
        inside = parse(host.get("/metrics").body.decode())
    host.get("/c")
    after = parse(host.get("/metrics").body.decode())
    routes = ("/a", "/b", "/c")
    assert [total(inside, "http_requests_total", endpoint=path) for path in routes] == [0, 1, 0]
    assert [total(after, "http_requests_total", endpoint=path) for path in routes] == [1, 0, 1]
    assert total(inside, "orders_total") == 2.0
    assert total(after, "orders_total") == 3.0


def test_an_override_ends_with_its_block_however_it_ends_and_nests(tmp_path: Path) -> None:
    host = Host("asgi", declared(tmp_path))

    def header() -> str:
        (found,) = [
            n for n, _ in host.get().headers if n.startswith("x-") and n != "x-correlation-id"
        ]
        return found

    def fail() -> None:
        assert header() == "x-one"
        with host.ops.override(ids={"request_header": "X-Two"}):
            assert header() == "x-two"
        assert header() == "x-one"
        raise Boom

    with pytest.raises(Boom), host.ops.override(ids={"request_header": "X-One"}):
        fail()
    assert header() == "x-request-id"


def test_an_override_with_wrong_settings_changes_nothing(tmp_path: Path) -> None:
    host = Host("asgi", declared(tmp_path))
    with pytest.raises(SettingsError), host.ops.override(metrics={"path": 7}):
        pytest.fail("it began")
    assert len(host.get().header("x-request-id")) == 1


def test_a_request_that_began_before_an_override_ends_by_its_own_settings(tmp_path: Path) -> None:
    ops = declared(tmp_path)
    overriding: list[Any] = []

    def handler() -> bytes:
        if not overriding:
            overriding.append(ops.override(ids={"request_header": "X-Other"}))
            overriding[0].__enter__()
        return b""

    host = Host("asgi", ops, handler)
    try:
        answer = host.get()
        assert len(answer.header("x-request-id")) == 1
        assert len(host.get().header("x-other")) == 1
    finally:
        overriding[0].__exit__(None, None, None)
    assert total(samples(ops), "http_requests_total") == 1.0


# --- the exchange


def opened(tmp_path: Path, **settings: Any) -> tuple[OpsGuard, Exchange]:
    ops = declared(tmp_path, **settings)
    port = ops.runtime().port(opsguard_wsgi.PROTOCOL)
    environ = {"HTTP_ACCEPT": "text/plain", "CONTENT_TYPE": "text/html"}
    exchange = port.open("GET", "/a", "/a", None, None, environ)
    current.set(None)
    return ops, exchange


def test_only_the_first_entered_route_counts(tmp_path: Path) -> None:
    ops, exchange = opened(tmp_path)
    exchange.enter("/first", opened)
    exchange.enter("/second")
    exchange.name("/third")
    assert (exchange.endpoint, exchange.marked) == ("/first", opened)
    exchange.status = 200
    exchange.finish()
    exchange.close()
    exchange.finish()
    found = samples(ops)
    assert total(found, "http_requests_total", endpoint="/first") == 1.0
    assert total(found, "http_requests_total") == 1.0
    assert total(found, "http_requests_in_progress") == 0.0


def test_a_closed_exchange_enters_nothing(tmp_path: Path) -> None:
    ops, exchange = opened(tmp_path)
    exchange.close()
    assert exchange.enter("/late") is None
    assert total(samples(ops), "http_requests_in_progress") == 0.0


def test_headers_can_be_read_until_the_end(tmp_path: Path) -> None:
    _, exchange = opened(tmp_path)
    assert exchange.header("accept") == "text/plain"
    assert exchange.header("content-type") == "text/html"
    assert exchange.header("x-missing") == ""
    exchange.close()
    assert exchange.header("accept") == ""


def test_the_exchange_itself_leaves_headers_to_the_adapters(tmp_path: Path) -> None:
    _, exchange = opened(tmp_path)
    with pytest.raises(NotImplementedError):
        Exchange.header(exchange, "accept")


def test_one_error_is_counted_for_a_request_also_after_its_end(tmp_path: Path) -> None:
    ops, exchange = opened(tmp_path)
    exchange.enter("/a")
    exchange.status = 200
    exchange.finish()
    exchange.fail(Boom())
    exchange.fail(LookupError())
    found = samples(ops)
    assert total(found, "http_errors_total") == 1.0
    assert total(found, "http_errors_total", error_type="Boom", endpoint="/a") == 1.0


def test_an_error_of_a_request_whose_client_left_is_not_counted(tmp_path: Path) -> None:
    """It is the consequence of leaving."""
    ops, exchange = opened(tmp_path)
    exchange.left = True
    exchange.fail(Boom())
    exchange.close()
    found = samples(ops)
    assert total(found, "http_requests_total", status="499") == 1.0
    assert total(found, "http_errors_total") == 0.0


def test_a_late_error_of_a_request_without_a_route_is_counted_too(tmp_path: Path) -> None:
    ops, exchange = opened(tmp_path)
    exchange.status = 200
    exchange.finish()
    exchange.fail(Boom())
    assert total(samples(ops), "http_errors_total", endpoint="<unmatched>") == 1.0


def test_a_late_error_without_metrics_is_no_fault(tmp_path: Path) -> None:
    ops, exchange = opened(tmp_path, metrics={"enabled": False})
    exchange.close()
    exchange.fail(Boom())
    assert total(samples(ops), "opsguard_internal_errors_total") == 0.0


def test_a_fault_of_ours_in_a_late_error_is_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise LookupError

    monkeypatch.setattr(HttpMetrics, "error", broken)
    ops, exchange = opened(tmp_path)
    exchange.close()
    exchange.fail(Boom())
    assert total(samples(ops), "opsguard_internal_errors_total", site="late") == 1.0


@PROTOCOLS
@pytest.mark.parametrize(
    ("length", "counted"),
    [("7", 7.0), ("0", 0.0), ("-1", 0.0), ("x", 0.0), ("٣", 0.0), ("9" * 40, 0.0), ("1,1", 0.0)],
)
def test_a_content_length_that_is_none_counts_nothing(
    protocol: str, length: str, counted: float, tmp_path: Path
) -> None:
    host = Host(protocol, declared(tmp_path))
    text = length.encode("utf-8").decode("latin-1")
    answer = host.send(Request("/a", "POST", (("Content-Length", text),), strict=False))
    assert answer.status == 200
    found = samples(host.ops)
    assert total(found, "http_request_size_bytes_sum") == counted
    assert total(found, "opsguard_internal_errors_total") == 0.0


def test_lines_that_were_dropped_are_counted(tmp_path: Path) -> None:
    ops = declared(tmp_path)
    Host("asgi", ops)
    ops.failures.dropped("logs", 3)
    assert total(samples(ops), "opsguard_dropped_total", sink="logs") == 3.0


# --- stores


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"limiter": {"default": "5/minute"}},
        {"keys": {"required": ["/api/*"], "pepper": "p" * 20}},
    ],
    ids=["nothing limited", "limited", "keys only"],
)
def test_a_wrong_store_stops_the_start_whether_anything_is_limited_or_not(
    settings: dict[str, Any],
) -> None:
    limiter = {"store": "nonsense://127.0.0.1/0", **settings.get("limiter", {})}
    ops = OpsGuard("shop", **{**settings, "limiter": limiter})
    with pytest.raises(SettingsError, match=r"limiter.*nonsense") as stopped:
        ops.runtime()
    assert len(str(stopped.value).splitlines()) == 1


def test_a_store_that_is_switched_off_may_be_wrong(tmp_path: Path) -> None:
    limiter = {"store": "nonsense://127.0.0.1/0", "enabled": False}
    OpsGuard("shop", limiter=limiter, metrics={"directory": str(tmp_path)}).runtime()


@pytest.mark.parametrize("protocol", ["wsgi", "asgi"])
def test_the_stores_of_an_override_are_closed_with_it(protocol: str, tmp_path: Path) -> None:
    host = Host(protocol, declared(tmp_path))
    with running(tmp_path) as server, server.client() as client:

        def others() -> int:
            return int(client.info("clients")["connected_clients"]) - 1

        def overridden() -> Any:
            limiter = {"store": server.url, "policies": {"*": "9/minute"}, "timeout": 1.0}
            return host.ops.override(limiter=limiter)

        async def in_a_loop() -> None:
            with overridden():
                answer = await serve_asgi(host.app, Request("/a"))
                assert (answer.status, others()) == (200, 1)
            deadline = time.monotonic() + 5
            while others() and time.monotonic() < deadline:
                await asyncio.sleep(0.01)
            assert others() == 0

        if protocol == "asgi":
            contextvars.Context().run(asyncio.run, in_a_loop())
            return
        with overridden():
            assert host.get().status == 200
            assert others() == 1
        deadline = time.monotonic() + 5
        while others() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert others() == 0


@pytest.mark.parametrize("protocol", ["wsgi", "asgi"])
def test_where_nothing_can_be_written_the_app_starts_and_serves(
    protocol: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container whose file system is read-only, /dev/shm and /tmp included."""

    def nowhere() -> Path:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr("opsguard.workers.place._default_base", nowhere)
    host = Host(protocol, OpsGuard("s", limiter={"default": "9/minute"}))
    assert host.get().status == 200
    assert "http_requests_total" in host.get("/metrics").body.decode()


def test_a_mark_after_install_closes_what_the_limits_before_it_had_open(tmp_path: Path) -> None:
    with running(tmp_path) as server, server.client() as client:
        limiter = {"store": server.url, "policies": {"*": "9/minute"}, "timeout": 1.0}
        host = Host("wsgi", declared(tmp_path, limiter=limiter))
        before = host.get()
        assert int(client.info("clients")["connected_clients"]) == 2

        @host.ops.limit("1/minute")
        def handler() -> None:
            """Decorated late."""

        deadline = time.monotonic() + 5
        while int(client.info("clients")["connected_clients"]) > 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert int(client.info("clients")["connected_clients"]) == 1
        left = [one.header("X-RateLimit-Remaining") for one in (before, host.get())]
        assert left == [["8"], ["7"]]


@pytest.mark.parametrize(
    ("settings", "there"),
    [
        ({"limiter": {"default": "5/minute"}}, False),
        ({"keys": {"required": ["/api/*"], "pepper": "p" * 20}}, True),
    ],
)
def test_checks_of_keys_are_declared_where_keys_are_on(
    settings: dict[str, Any], there: bool, tmp_path: Path
) -> None:
    ops = OpsGuard("shop", metrics={"directory": str(tmp_path)}, **settings)
    ops.runtime()
    # A name that is taken already cannot be declared with other labels.
    with pytest.raises(DeclarationError) if there else nullcontext():
        ops.metrics.counter("api_key_checks_total", "The app's own.", ("mine",))
