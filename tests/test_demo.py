"""The demo: its judgement on made-up data, and the whole of it on real servers."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from opsguard.demo import FRAMEWORKS, server
from opsguard.demo import play as playing
from opsguard.demo.checks import differences
from opsguard.demo.client import HOST, Answer, ask
from opsguard.demo.overhead import Overhead, estimate
from opsguard.demo.play import play
from opsguard.demo.report import Report, latencies
from opsguard.demo.scrape import Exposition, Log, quantile
from opsguard.demo.shop import Order, read_order, template
from opsguard.demo.traffic import Outcome, Visit, drive, pay, script
from tests.ports import free_port

# Judgement ----------------------------------------------------------------------------------------


@dataclasses.dataclass
class World:
    """A service of which everything is right; a test breaks one thing."""

    outcomes: list[Outcome]
    metrics: dict[str, float]
    lines: list[dict[str, Any]]
    tail: str = ""

    def differences(self) -> list[str]:
        text = "".join(f"{name} {value}\n" for name, value in self.metrics.items())
        log = [json.dumps(line) for line in self.lines] + ([self.tail] if self.tail else [])
        return differences(self.outcomes, Exposition(text), Log(log))


def make_world() -> World:
    order = Visit("POST", "/orders", "/orders", 201, body=b"{}", says="order placed")
    visits = [
        (order, "id-order", 201),
        (Visit("GET", "/items/1", "/items/{item_id}", 200, own_id="mine"), "mine", 200),
        (Visit("GET", "/x", "<unmatched>", 404), "id-lost", 404),
        (Visit("GET", "/stream", "/stream", 499, leaves=True), "id-left", 200),
        (Visit("GET", "/health", "/health", 200), "id-probe", 200),
        (Visit("GET", "/boom", "/boom", 500), "id-boom", 500),
        (Visit("POST", "/uploads", "/uploads", 201, body=b"12345"), "id-upload", 201),
        (Visit("BREW", "/items", "/items", 405, refusable=True), "", 400),
    ]
    outcomes = [
        Outcome(visit, Answer(status, (one,) if one else (), b"")) for visit, one, status in visits
    ]
    counted = [visit for visit, one, _ in visits if one]
    metrics = {'http_requests_in_progress{method="GET",endpoint="/stream"}': 0.0}
    for visit in counted:
        route = f'method="{visit.method}",endpoint="{visit.endpoint}"'
        metrics[f'http_requests_total{{{route},status="{visit.status}"}}'] = 1.0
        metrics[f"http_request_duration_seconds_count{{{route}}}"] = 1.0
    metrics['shop_orders_total{item_id="1"}'] = 1.0
    boom = 'method="GET",endpoint="/boom",error_type="RuntimeError"'
    metrics[f"http_errors_total{{{boom}}}"] = 1.0
    metrics['http_request_size_bytes_sum{method="POST",endpoint="/uploads"}'] = 5.0
    lines = [
        {
            "logger": "opsguard.access",
            "message": "request_completed",
            "request_id": one,
            "method": visit.method,
            "endpoint": visit.endpoint,
            "status_code": visit.status,
            "client": HOST,
        }
        for visit, one, _ in visits
        if one and visit.endpoint != "/health"
    ]
    lines.append({"logger": "shop", "message": "order placed", "request_id": "id-order"})
    return World(outcomes, metrics, lines)


def answered(world: World, index: int, **changes: Any) -> None:
    answer = world.outcomes[index].answer
    assert answer is not None
    changed = dataclasses.replace(answer, **changes)
    world.outcomes[index] = dataclasses.replace(world.outcomes[index], answer=changed)


def metric(world: World, start: str, value: float) -> None:
    (name,) = [name for name in world.metrics if name.startswith(start)]
    world.metrics[name] = value


def visited(world: World, index: int, **changes: Any) -> None:
    visit = dataclasses.replace(world.outcomes[index].visit, **changes)
    world.outcomes[index] = dataclasses.replace(world.outcomes[index], visit=visit)


def test_a_world_that_is_right_has_no_differences() -> None:
    assert make_world().differences() == []


Break = Callable[[World], object]
BROKEN: Mapping[str, tuple[Break, str]] = {
    "no answer": (
        lambda w: w.outcomes.__setitem__(2, Outcome(w.outcomes[2].visit, None, "reset")),
        "GET /x: no answer (reset)",
    ),
    "another status": (lambda w: answered(w, 2, status=500), "answered 500, not 404"),
    "no id": (lambda w: answered(w, 2, ids=()), "X-Request-ID is ()"),
    "two ids": (lambda w: answered(w, 2, ids=("a", "b")), "X-Request-ID is ('a', 'b')"),
    "an unsound id": (lambda w: answered(w, 2, ids=("a b",)), "X-Request-ID is ('a b',)"),
    "own id not echoed": (lambda w: answered(w, 1, ids=("other",)), "'mine' came back as 'other'"),
    "hostile id taken": (
        lambda w: visited(w, 2, headers=(("X-Request-ID", "id-lost"),)),
        "the hostile id 'id-lost' was taken",
    ),
    "one id twice": (lambda w: answered(w, 2, ids=("mine",)), "'mine' was given 2 times"),
    "not counted": (
        lambda w: metric(w, 'http_requests_total{method="GET",endpoint="/items', 0.0),
        "GET /items/{item_id} 200: 1 sent, 0 in http_requests_total",
    ),
    "counted though never sent": (
        lambda w: w.metrics.update(
            {'http_requests_total{method="GET",endpoint="/secret",status="200"}': 1.0}
        ),
        "GET /secret 200: 0 sent, 1 in http_requests_total",
    ),
    "refused, yet counted": (
        lambda w: w.metrics.update(
            {'http_requests_total{method="_OTHER",endpoint="/items",status="405"}': 1.0}
        ),
        "_OTHER /items 405: 0 sent, 1",
    ),
    "durations of other requests": (
        lambda w: metric(w, 'http_request_duration_seconds_count{method="GET",endpoint="/b', 2.0),
        "http_request_duration_seconds counts other requests",
    ),
    "a path as a label": (
        lambda w: w.metrics.update(
            {'http_requests_total{method="GET",endpoint="<unmatched>",status="405"}': 0.0}
        ),
        "have 2 series, not 1",
    ),
    "a leaked gauge": (
        lambda w: metric(w, "http_requests_in_progress", 1.0),
        "GET /stream: 1 in progress",
    ),
    "orders": (lambda w: metric(w, "shop_orders", 2.0), "orders: 1 sent, 2 in the metrics"),
    "exceptions": (lambda w: metric(w, "http_errors", 2.0), "exceptions: 1 sent, 2"),
    "bytes": (lambda w: metric(w, "http_request_size", 4.0), "uploaded bytes: 5 sent, 4"),
    "a fault of ours": (
        lambda w: w.metrics.update({'opsguard_internal_errors_total{site="close"}': 1.0}),
        "opsguard_internal_errors_total{'site': 'close'} is 1",
    ),
    "a lost line": (lambda w: w.lines.pop(0), "POST /orders: 0 access lines"),
    "a line twice": (lambda w: w.lines.append(w.lines[0]), "POST /orders: 2 access lines"),
    "a stranger's line": (
        lambda w: w.lines.append({**w.lines[0], "request_id": "who"}),
        "has the id who, which no answer had",
    ),
    "a probe's line": (
        lambda w: w.lines.append({**w.lines[0], "request_id": "id-probe"}),
        "has the id id-probe",
    ),
    "a wrong status in a line": (
        lambda w: w.lines[0].update(status_code=200),
        "POST /orders: its access line says",
    ),
    "a forged address": (
        lambda w: w.lines[0].update(client="203.0.113.7"),
        "'203.0.113.7'), not",
    ),
    "a line that is no JSON": (
        lambda w: setattr(w, "tail", "Traceback (most recent call last):"),
        "no JSON object: 'Traceback",
    ),
    "a handler's line without id": (
        lambda w: w.lines[-1].pop("request_id"),
        "'order placed': 2 lines are missing, double or of another request",
    ),
}


@pytest.mark.parametrize(("breaking", "complaint"), BROKEN.values(), ids=BROKEN)
def test_whatever_goes_wrong_is_named(breaking: Break, complaint: str) -> None:
    """No check is blind: each planted fault is found and said in words."""
    world = make_world()
    breaking(world)

    found = world.differences()

    assert [one for one in found if complaint in one], found


def test_many_complaints_of_a_kind_are_cut_short() -> None:
    world = make_world()
    world.tail = "\n".join(["no JSON"] * 50)
    log = Log(world.tail.split("\n"))

    found = [one for one in differences(world.outcomes, Exposition(""), log) if "JSON" in one]

    assert len(found) == 3
    assert any("... and 47 more like this" in one for one in differences([], Exposition(""), log))


@pytest.mark.parametrize(
    ("share", "buckets", "expected"),
    [
        (0.5, {}, math.nan),
        (0.5, {0.1: 0, math.inf: 0}, math.nan),
        (0.5, {0.1: 10, math.inf: 10}, 0.05),
        (0.5, {0.1: 0, 0.2: 10, math.inf: 10}, 0.15),
        (0.95, {0.1: 90, 0.2: 100, math.inf: 100}, 0.15),
        (1.0, {0.1: 5, 0.2: 10, math.inf: 10}, 0.2),
        (0.0, {0.1: 5, math.inf: 10}, 0.0),
        (0.0, {0.1: 0, 0.2: 5, math.inf: 5}, 0.0),
        (0.99, {0.1: 5, math.inf: 10}, 0.1),
    ],
    ids=["none", "empty", "middle", "second", "p95", "top", "zero", "zero-empty", "beyond"],
)
def test_a_quantile_is_estimated_as_prometheus_does(
    share: float, buckets: Mapping[float, int], expected: float
) -> None:
    assert quantile(share, buckets) == pytest.approx(expected, nan_ok=True)


def test_the_table_is_made_of_a_scrape() -> None:
    text = """
http_requests_total{method="GET",endpoint="/items",status="200"} 8
http_requests_total{method="POST",endpoint="/items",status="503"} 2
http_request_duration_seconds_bucket{method="GET",endpoint="/items",le="0.1"} 8
http_request_duration_seconds_bucket{method="GET",endpoint="/items",le="+Inf"} 8
http_requests_in_progress{method="GET",endpoint="/items"} 3
"""
    out = io.StringIO()

    Console(file=out, width=110).print(latencies(Exposition(text)))

    (row,) = [line for line in out.getvalue().splitlines() if "/items" in line]
    cells = [cell.strip() for cell in re.split("[│|]", row)[1:-1]]
    assert cells == ["/items", "10", "8", "2", "50 ms", "95 ms", "3"]


def test_the_overhead_is_the_median_of_paired_differences() -> None:
    """A machine that slows down halfway changes neither the cost nor the noise."""
    rounds = [{"bare": base, "guarded": base + 5_000, "again": base + 100} for base in range(9_000)]
    rounds[3] = {"bare": 0, "guarded": 9e9, "again": -9e9}

    found = estimate(rounds)

    assert (found.added, found.noise) == (5.0, 0.1)
    assert found.telling
    assert not Overhead(bare=60.0, added=1.0, noise=-0.6).telling


def test_a_figure_in_the_noise_is_called_that() -> None:
    out = io.StringIO()
    Report(Console(file=out, width=110)).overhead(Overhead(60.0, 1.0, 0.9))
    assert "the noise is as large" in out.getvalue()


@pytest.mark.parametrize(
    ("body", "order"),
    [
        (b'{"item_id": 1, "quantity": 2}', Order("1", 2)),
        (b'{"item_id": "3", "quantity": "4"}', Order("3", 4)),
        (b'{"item_id": 1, "quantity": 0}', None),
        (b'{"item_id": 999, "quantity": 1}', None),
        (b'{"item_id": 1}', None),
        (b'{"item_id": 1, "quantity": 1e999}', None),
        (b"[]", None),
        (b"\xff", None),
        (b"", None),
    ],
)
def test_an_order_is_read_or_refused(body: bytes, order: Order | None) -> None:
    assert read_order(body) == order


@pytest.mark.parametrize(
    ("path", "route"),
    [
        ("/items", "/items"),
        ("/items/1", "/items/{item_id}"),
        ("/items/", None),
        ("/items/1/x", None),
        ("/metrics", None),
        ("/", None),
    ],
)
def test_the_raw_shops_know_their_routes(path: str, route: str | None) -> None:
    assert template(path) == route


def test_the_script_has_what_it_promises() -> None:
    """Good, bad, slow, unknown, hostile; the same each time; and no id that is given twice."""
    visits = script()

    assert visits == script()
    assert {visit.status for visit in visits} == {200, 201, 404, 405, 422, 499, 500}
    unknown = [visit.target for visit in visits if visit.endpoint == "<unmatched>"]
    assert len(unknown) == len(set(unknown)) > 100
    assert max(len(value) for visit in visits for _, value in visit.headers) >= 4000
    assert any("\x1b" in value for visit in visits for _, value in visit.headers)
    assert any(visit.leaves for visit in visits)
    assert any(visit.chunked for visit in visits)
    own = [visit.own_id for visit in visits if visit.own_id]
    assert len(own) == len(set(own))


# The server ---------------------------------------------------------------------------------------


def test_the_shops_environment_is_its_own(tmp_path: Path) -> None:
    """Nobody's settings change the demo; what else a process needs stays."""
    environ = {
        "PATH": "/bin",
        "PYTHONPATH": f"here{os.pathsep}/there",
        "LOG_LEVEL": "ERROR",
        "ENABLE_METRICS": "false",
        "DEV_MODE": "1",
        "OPSGUARD_METRICS__PATH": "/other",
        "GUNICORN_CMD_ARGS": "--workers 4",
        "WEB_CONCURRENCY": "4",
        "DJANGO_SETTINGS_MODULE": "elsewhere",
    }

    assert server.environment(tmp_path, environ) == {
        "PATH": "/bin",
        "PYTHONPATH": f"{Path.cwd() / 'here'}{os.pathsep}/there",
        "OPSGUARD_LOGGING__FILE": str(tmp_path / "shop.log"),
        "OPSGUARD_METRICS__DIRECTORY": str(tmp_path),
    }


def test_a_taken_port_is_one_clear_message() -> None:
    out = io.StringIO()
    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]
        status = play("asgi", Console(file=out, width=110), port=port, once=True)

    assert status == 1
    assert out.getvalue() == f"port {port} of {HOST} is taken; without --port a free one is found\n"


def test_a_server_that_dies_tells_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(server.FRAMEWORKS, "nothing", ("uvicorn",))  # type: ignore[arg-type]

    with (
        pytest.raises(server.ServiceFailed, match=r"opsguard\.demo\.apps\.nothing"),
        server.serving("nothing", 0),
    ):
        pytest.fail("it is up")


def test_a_free_port_that_is_taken_meanwhile_is_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ports = []
    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setattr(server, "_free_port", lambda: ports.append(port) or port)
        monkeypatch.setattr(server, "START", 0.5)
        with (
            pytest.raises(server.ServiceFailed, match="3 free ports were taken"),
            server.serving("asgi", 0),
        ):
            pytest.fail("it is up")

    assert len(ports) == 3


STUBBORN = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("impatient", [False, True], ids=["too slow", "second ctrl-c"])
def test_a_server_that_will_not_end_is_ended(
    impatient: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [sys.executable, "-c", STUBBORN]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
    with process:
        assert process.stdout is not None
        process.stdout.readline()
        monkeypatch.setattr(server, "STOP", 0.05)
        if impatient:
            wait = process.wait
            calls = iter([KeyboardInterrupt])

            def interrupted(timeout: float | None = None) -> int:
                for error in calls:
                    raise error
                return wait(timeout)

            monkeypatch.setattr(process, "wait", interrupted)
            with pytest.raises(KeyboardInterrupt):
                server.stop(process)
        else:
            server.stop(process)

    assert process.returncode == -signal.SIGKILL
    server.stop(process)  # and once more does nothing


# All of it ----------------------------------------------------------------------------------------


@pytest.mark.servers
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_demo_is_right_on_every_framework(framework: str) -> None:
    """A real server, all of the script, nothing that differs, and nothing left behind."""
    out = io.StringIO()

    status = play(framework, Console(file=out, width=110), once=True, rounds=2)

    shown = out.getvalue()
    assert status == 0, shown
    assert "All as it should be" in shown
    assert "DIFFERENT" not in shown
    assert "Overhead, roughly: " in shown
    for row in ("/items/{item_id}", "<unmatched>", "_OTHER", "499", '"message":"order placed"'):
        assert row in shown
    assert_gone(shown)


@pytest.mark.servers
def test_what_is_wrong_is_shown_and_is_status_1(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client whose book has one visit too many, and an overhead that cannot be measured."""
    few = [visit for visit in script() if visit.endpoint == "/items"]
    monkeypatch.setattr(playing, "script", lambda: few)
    monkeypatch.setattr(playing, "SETTLE", 0.0)
    monkeypatch.setattr(
        playing, "drive", lambda port, visits: [*drive(port, visits), pay(port, few[0])][:-1] * 2
    )
    monkeypatch.setattr(playing, "MEASURE", 0.01)
    out = io.StringIO()

    status = play("asgi", Console(file=out, width=110), once=True)

    assert status == 1
    assert "things are not as they should be" in out.getvalue()
    assert re.search(r"GET /items 200: \d+ sent, \d+ in http_requests_total", out.getvalue())
    assert "the overhead could not be measured within" in out.getvalue()


@pytest.mark.servers
@pytest.mark.parametrize(
    ("sent", "status"), [(signal.SIGINT, 0), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_it_stays_until_it_is_told_and_cleans_up(sent: signal.Signals, status: int) -> None:
    code = (
        "import sys; from rich.console import Console; from opsguard.demo.play import play;"
        "sys.exit(play('wsgi', Console(width=110), rounds=2))"
    )
    command = [sys.executable, "-u", "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        shown = ""
        try:
            for line in process.stdout:
                shown += line
                if "stays open" in line:
                    break
            (port,) = re.findall(rf"stays open at http://{HOST}:(\d+)", shown)
            assert ask(int(port), "GET", "/items").status == 200
            process.send_signal(sent)
            assert process.wait(20) == status
        finally:
            process.terminate()  # one that stayed would be waited for

    assert_gone(shown)


def test_under_nohup_a_lost_terminal_does_not_end_it() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with playing._signals_end_it():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert callable(signal.getsignal(signal.SIGTERM))
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def assert_gone(shown: str) -> None:
    """Nobody listens at the address that was shown, and the folder of the log is removed."""
    port = int(re.findall(rf"http://{HOST}:(\d+)/items", shown)[0])
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((HOST, port), 1.0)
    assert not Path(re.findall(r"log lines: (\S+)", shown)[0]).parent.exists()


def test_on_a_terminal_a_table_follows_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    text = 'http_requests_total{method="GET",endpoint="/items",status="200"} 8\n'
    scraped = iter([Exposition(text), Exposition(text.replace("8", "9"))])

    def scrape(service: server.Service) -> tuple[Exposition, None]:
        for exposition in scraped:
            return exposition, None
        raise KeyboardInterrupt

    monkeypatch.setattr(playing, "_scrape", scrape)
    monkeypatch.setattr(playing, "REFRESH", 0.0)
    out = io.StringIO()
    console = Console(file=out, width=110, force_terminal=True, color_system=None)
    service = server.Service(1, ("uvicorn",), None, Path("/nowhere"))  # type: ignore[arg-type]

    playing._stay(service, console, Report(console))

    rows = [re.split("[│|]", line) for line in out.getvalue().splitlines()]
    shown = [row[2].strip() for row in rows if len(row) > 2 and row[1].strip() == "/items"]
    assert list(dict.fromkeys(shown)) == ["8", "9"]


def test_a_shop_that_ends_by_itself_ends_the_stay(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "raise SystemExit(7)"]) as process:
        process.wait()
    (tmp_path / "server.out").write_text("its last words\n")
    service = server.Service(1, ("uvicorn",), process, tmp_path)

    with pytest.raises(server.ServiceFailed, match=r"status 7.\n.*its last words"):
        service.check()


def test_a_broken_answer_is_a_connection_error() -> None:
    with socket.create_server((HOST, 0)) as listener:

        def reply() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(b"HELLO\r\n\r\n")

        thread = threading.Thread(target=reply)
        thread.start()
        with pytest.raises(ConnectionError, match="a broken answer"):
            ask(listener.getsockname()[1], "GET", "/")
        thread.join()
        outcome = pay(free_port(), Visit("GET", "/", "/", 200))

    assert outcome.answer is None
    assert outcome.error.startswith("ConnectionRefusedError")


def test_a_shop_that_ends_is_noticed_without_a_terminal_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In a container's log there is no live table, but a server that died is still noticed."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    console = Console(file=io.StringIO(), width=110)
    service = server.Service(1, ("uvicorn",), process, tmp_path)

    with pytest.raises(server.ServiceFailed, match="ended by itself"):
        playing._stay(service, console, Report(console))
