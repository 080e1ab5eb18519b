"""The request path in C does what the one in Python does. The tests run on whichever is in use."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import threading
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from importlib.machinery import EXTENSION_SUFFIXES
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from opsguard import OpsGuard
from opsguard.accelerator import _found, _outdated, limits, shared, speed
from opsguard.context import current
from opsguard.exchange import Exchange
from opsguard.ids import valid
from opsguard.metrics import Metrics
from opsguard.metrics.http import HttpMetrics
from opsguard.metrics.store import Store
from opsguard.settings import Metrics as Options
from opsguard_asgi import PROTOCOL, serve
from opsguard_asgi.edge import alone

built = pytest.mark.skipif(speed is None, reason="opsguard._speed was not built")

Message = dict[str, Any]


class Pause:
    """An awaitable that gives `value` to the event loop, and what comes back to the awaiter."""

    def __init__(self, value: object = None) -> None:
        self.value = value

    def __await__(self) -> Iterator[object]:
        return (yield self.value)


def scope(path: str = "/a", **extra: Any) -> dict[str, Any]:
    return {"type": "http", "method": "GET", "path": path, "headers": [], **extra}


class Host:
    """An edge around an app, and what passed through it."""

    def __init__(self, app: Callable[..., Awaitable[None]], tmp_path: Path) -> None:
        self.sent: list[Message] = []
        self.ops = OpsGuard("t", logging={"file": str(tmp_path / "log")})
        self.port = self.ops.runtime().port(PROTOCOL)
        self.edge = serve(app, self.port)

    async def receive(self) -> Message:
        return {"type": "http.request", "body": b""}

    async def send(self, message: Message) -> None:
        await Pause("sending")
        self.sent.append(message)

    def call(self, **extra: Any) -> Coroutine[Any, Any, None]:
        return self.edge(scope(**extra), self.receive, self.send)  # type: ignore[return-value]

    def counted(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for family in self.ops.metrics.collect():
            for sample in family.samples:
                if sample.name == "http_requests_total":
                    found[sample.labels["status"]] = sample.value
        return found


async def answer(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"abc"})


async def waiting(scope: Any, receive: Any, send: Any) -> None:
    await Pause("waiting")
    await answer(scope, receive, send)


def drive(coroutine: Coroutine[Any, Any, None]) -> list[object]:
    """Run to the end; what the event loop was given."""
    given = []
    while True:
        try:
            given.append(coroutine.send(None))
        except StopIteration:
            return given


COMPILER = (sysconfig.get_config_var("CC") or "cc").split()[0]


@pytest.fixture(scope="module")
def hook(checkout: Path) -> ModuleType:
    found = spec_from_file_location("hatch_build", checkout / "hatch_build.py")
    assert found is not None
    assert found.loader is not None
    module = module_from_spec(found)
    found.loader.exec_module(module)
    return module


@pytest.fixture
def can_build(hook: ModuleType) -> None:
    why = hook.obstacle()
    if why is None and shutil.which(COMPILER) is None:
        why = "there is no compiler"
    if why is not None:
        pytest.skip(why)


def skip_unless_gcc() -> None:
    macros = subprocess.run(
        [COMPILER, "-dM", "-E", "-x", "c", os.devnull], capture_output=True, text=True, check=True
    ).stdout
    if "__GNUC__" not in macros or "__clang__" in macros:
        pytest.skip("the compiler is not GCC")


@pytest.mark.usefixtures("can_build")
def test_it_is_there_wherever_it_can_be_built(hook: ModuleType) -> None:
    """Else every test that needs it would be skipped, and nobody would see that it is gone."""
    found_here = {"_speed": speed, "_limits": limits, "_shared": shared}
    assert [name for name in hook.MODULES if found_here[name] is None] == []


@pytest.mark.usefixtures("can_build")
def test_gcc_lays_it_out_by_a_profile() -> None:
    """Else a training that no longer runs would only show in the figures."""
    skip_unless_gcc()
    assert speed.trained


@built
def test_the_training_goes_through(checkout: Path, tmp_path: Path) -> None:
    """With all that it checks: that the requests are answered, by the module that is trained."""
    subprocess.run([sys.executable, "-P", checkout / "training.py"], cwd=tmp_path, check=True)


def test_flags_of_the_environment_go_last(
    hook: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that they win, as who builds packages for a distribution expects."""
    monkeypatch.setenv("CFLAGS", "-O1 -DNAME='two words'")
    command = hook.compiler(tmp_path / "made.so", tmp_path / "source.c", "-DOURS")
    told = [word for word in command if word.startswith(("-O", "-D"))]
    assert told[-3:] == ["-DOURS", "-O1", "-DNAME=two words"]


def build_of(hook: ModuleType, checkout: Path) -> Any:
    """The hook as hatchling would have it; what it shows is in `said`."""

    class Build(hook.BuildHook):  # type: ignore[name-defined, misc]
        root = str(checkout)

        def __init__(self) -> None:
            self.said: list[str] = []

        @property
        def app(self) -> Any:
            return SimpleNamespace(display_info=self.said.append)

    return Build()


def trained(hook: ModuleType, made: Path) -> bool:
    program = f"exec({hook.LOADS!r}); print(made.trained)"
    command = [sys.executable, "-c", program, "opsguard._speed", made]
    return subprocess.check_output(command, text=True).strip() == "True"


@pytest.mark.usefixtures("can_build")
def test_a_build_that_cannot_be_trained_is_one_without(
    hook: ModuleType, checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train_to(*_: object) -> None:
        raise OSError("no training here")

    monkeypatch.setattr(hook, "MODULES", ("_speed",))
    monkeypatch.setattr(hook, "train_to", train_to)
    build = build_of(hook, checkout)
    (made,) = build._made(tmp_path)
    assert made.is_file()
    assert build.said == ["opsguard: _speed: train_to did not get through: no training here"]
    assert not trained(hook, made)


def test_a_module_that_cannot_be_built_is_said_once(
    hook: ModuleType, checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(*_: object) -> list[str]:
        return [
            sys.executable,
            "-c",
            "import sys; sys.stderr.buffer.write(b'n\\xe9in'); sys.exit(1)",
        ]

    monkeypatch.setattr(hook, "MODULES", ("_speed",))
    monkeypatch.setattr(hook, "obstacle", lambda: None)
    monkeypatch.setattr(hook, "compiler", nothing)
    build = build_of(hook, checkout)
    assert build._made(tmp_path) == []
    assert build.said == [
        "opsguard: _speed: train_to did not get through: n\N{REPLACEMENT CHARACTER}in",
        "opsguard: _speed stays in Python: "
        "compile_to did not get through: n\N{REPLACEMENT CHARACTER}in",
    ]


@pytest.mark.usefixtures("can_build")
def test_a_training_reads_its_sources_and_its_settings_are_its_own(
    hook: ModuleType, checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sources that may not be written stay as they are; and a process that runs the module which
    was there before goes on with it.
    """
    skip_unless_gcc()
    root, counts = tmp_path / "read only \xe9", tmp_path / "counts"
    for name in ("opsguard", "adapters"):
        left_out = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(checkout / name, root / name, ignore=left_out)
    shutil.copy(checkout / "training.py", root)
    folders = [root, *(path for path in root.rglob("*") if path.is_dir())]
    monkeypatch.setenv("GCOV_PREFIX", str(counts))
    monkeypatch.setenv("OPSGUARD_IDS__REQUEST_HEADER", "not a name")
    target = tmp_path / f"_speed{EXTENSION_SUFFIXES[0]}"
    target.write_bytes(b"the one before")
    before = tmp_path / "before"
    before.hardlink_to(target)
    there = sorted(root.rglob("*"))
    for folder in folders:
        folder.chmod(0o500)
    try:
        hook.train_to(target, root / "opsguard" / "_speed.c")
    finally:
        for folder in folders:
            folder.chmod(0o700)
    assert sorted(root.rglob("*")) == there
    assert not counts.exists()
    assert before.read_bytes() == b"the one before"
    assert trained(hook, target)


def test_it_is_left_out_when_the_environment_says_so() -> None:
    assert _found("_speed", {"OPSGUARD_PURE": "1"}) is None
    assert _found("_shared", {"OPSGUARD_PURE": "1"}) is None


def test_one_that_is_older_than_its_sources_is_left_out(tmp_path: Path) -> None:
    built = tmp_path / f"_speed{EXTENSION_SUFFIXES[0]}"
    header, source = tmp_path / "_c" / "tools.h", tmp_path / "_speed.c"
    header.parent.mkdir()
    assert not _outdated("_speed", tmp_path)  # neither is there
    for number, file in enumerate((header, source, built)):
        file.touch()
        os.utime(file, (1000 + number, 1000 + number))
    assert not _outdated("_speed", tmp_path)
    for changed in (header, source):
        os.utime(changed, (2000, 2000))
        with pytest.warns(RuntimeWarning, match=r"opsguard\._speed was built before"):
            assert _outdated("_speed", tmp_path)
        os.utime(changed, (1000, 1000))
    source.unlink()  # as installed from a wheel
    os.utime(header, (2000, 2000))
    assert not _outdated("_speed", tmp_path)


def test_without_it_the_package_works() -> None:
    program = "import opsguard.exchange, opsguard.accelerator as a; print(a.speed)"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "OPSGUARD_PURE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "None"


def test_what_the_app_and_the_server_yield_passes_through(tmp_path: Path) -> None:
    host = Host(waiting, tmp_path)
    assert drive(host.call()) == ["waiting", "sending", "sending"]
    assert [message["type"][14:] for message in host.sent] == ["start", "body"]
    assert host.counted() == {"200": 1.0}


def test_the_awaitable_is_a_coroutine_to_asyncio(tmp_path: Path) -> None:
    async def plain(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(0)
        await answer(scope, receive, send)

    host = Host(plain, tmp_path)

    async def send(message: Message) -> None:
        await asyncio.sleep(0)

    async def main() -> None:
        await asyncio.create_task(host.edge(scope(), host.receive, send))  # type: ignore[arg-type]

    asyncio.run(main())
    assert host.counted() == {"200": 1.0}


def test_an_exception_thrown_in_reaches_the_app_and_may_be_handled_there(tmp_path: Path) -> None:
    async def handles(scope: Any, receive: Any, send: Any) -> None:
        try:
            await Pause("waiting")
        except KeyError:
            await answer(scope, receive, send)

    host = Host(handles, tmp_path)
    call = host.call()
    assert call.send(None) == "waiting"
    assert call.throw(KeyError("x")) == "sending"
    drive(call)
    assert host.counted() == {"200": 1.0}


@pytest.mark.parametrize("error", [ValueError, asyncio.CancelledError, KeyboardInterrupt])
def test_what_the_app_does_not_handle_goes_on_and_is_recorded(
    error: type[BaseException], tmp_path: Path
) -> None:
    host = Host(waiting, tmp_path)
    call = host.call()
    call.send(None)
    raised = error("x")
    caught: BaseException | None = None
    try:
        call.throw(raised)
        drive(call)
    except error as one:
        caught = one
    assert caught is raised
    assert sum(host.counted().values()) == 1.0
    assert current.get() is None


def test_closed_in_the_middle_it_is_recorded_once(tmp_path: Path) -> None:
    host = Host(waiting, tmp_path)
    call = host.call()
    call.send(None)
    call.close()
    call.close()
    assert sum(host.counted().values()) == 1.0


def test_dropped_in_the_middle_it_is_recorded_and_all_is_freed(tmp_path: Path) -> None:
    kept: list[weakref.ref[Any]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        thing = Host.__new__(Host)
        kept.append(weakref.ref(thing))
        await Pause(thing)

    host = Host(app, tmp_path)
    call = host.call()
    call.send(None)
    del call
    gc.collect()
    assert sum(host.counted().values()) == 1.0
    assert kept[0]() is None


def test_never_awaited_it_opens_nothing(tmp_path: Path) -> None:
    host = Host(waiting, tmp_path)
    given = scope()
    call: Any = host.edge(given, host.receive, host.send)
    call.close()
    assert "opsguard.exchange" not in given
    assert host.counted() == {}


@built
@pytest.mark.parametrize("use", ["send", "throw"])
def test_a_finished_one_cannot_be_used_again(use: str, tmp_path: Path) -> None:
    call = Host(answer, tmp_path).call()
    drive(call)
    with pytest.raises(RuntimeError, match="already awaited"):
        getattr(call, use)(None if use == "send" else KeyError)


@built
def test_one_that_runs_cannot_be_entered_again(tmp_path: Path) -> None:
    errors: list[BaseException] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        try:
            call.send(None)
        except ValueError as error:
            errors.append(error)

    call = Host(app, tmp_path).call()
    drive(call)
    assert len(errors) == 1


@pytest.mark.parametrize(
    "headers",
    [[], [[b"a", b"b"]], ((b"a", b"b"),), [(b"X-Request-ID", b"mine")], [(b"x-request-id", b"m")]],
    ids=["none", "lists", "tuples", "ours in capitals", "ours"],
)
def test_the_answers_headers_are_those_of_the_python_path(headers: Any, tmp_path: Path) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body"})

    host = Host(app, tmp_path)
    drive(host.call())
    exchange = host.port.open("GET", "/a", "/a", None, {"x-request-id": "id"}, {})
    expected = [name for name, _ in host.port.plan.head_with(PROTOCOL)(exchange, 200, headers)]
    assert [name for name, _ in host.sent[0]["headers"]] == expected


@built
def test_ids_are_sound_and_none_comes_twice_in_threads() -> None:
    made: list[list[str]] = [[] for _ in range(8)]

    def work(ids: list[str]) -> None:
        ids.extend(speed.fresh() for _ in range(2_000))

    threads = [threading.Thread(target=work, args=(ids,)) for ids in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    together = [one for ids in made for one in ids]
    assert len(set(together)) == len(together) == 16_000
    assert all(len(one) == 32 and valid(one) for one in together)


@built
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_makes_other_ids() -> None:
    speed.fresh()  # the pool is filled
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write, speed.fresh().encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(write)
    theirs = os.read(read, 64).decode()
    os.close(read)
    assert theirs not in {speed.fresh() for _ in range(128)}


@built
def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(TypeError):
        speed.Recorder()
    with pytest.raises(TypeError):
        speed.take_lines(1, 2, 3, 4)
    with pytest.raises(TypeError):
        speed.Watch()


def test_each_of_many_routes_and_statuses_is_counted_for_itself(tmp_path: Path) -> None:
    """More than are found without the dictionary, in turn, and texts that are new each time."""

    async def by_path(scope: Any, receive: Any, send: Any) -> None:
        status = int(scope["path"].rpartition("/")[2])
        start = "".join(["http.response", ".start"])
        await send({"type": start, "status": status, "headers": []})
        await send({"type": "".join(["http.response", ".body"]), "body": b""})

    ops = OpsGuard("t", logging={"access": "off"}, metrics={"max_series": 15_000})
    port = ops.runtime().port(PROTOCOL)
    edge = serve(by_path, port, endpoint=lambda scope: "".join(scope["path"].rpartition("/")[:1]))

    async def no_message() -> Message:
        return {"type": "http.request", "body": b""}

    async def nowhere(message: Message) -> None:
        return None

    wanted: dict[tuple[str, str, str], int] = {}
    for turn in range(3):
        for number in range(1_500):
            endpoint = f"/é{number}" if number % 10 == 0 else f"/route-{number:03}"
            for method in ("GET", "POST", "BREW"):
                for status in (200, 404, 201)[: turn + 1]:
                    asked = {"type": "http", "method": method, "path": f"{endpoint}/{status}"}
                    drive(edge({**asked, "headers": []}, no_message, nowhere))  # type: ignore[arg-type]
                    key = (method if method != "BREW" else "_OTHER", endpoint, str(status))
                    wanted[key] = wanted.get(key, 0) + 1
    counted = {
        (sample.labels["method"], sample.labels["endpoint"], sample.labels["status"]): sample.value
        for family in ops.metrics.collect()
        for sample in family.samples
        if sample.name == "http_requests_total"
    }
    assert counted == wanted
    sums = {
        sample.labels["endpoint"]: sample.value
        for family in ops.metrics.collect()
        for sample in family.samples
        if sample.name == "http_request_duration_seconds_count" and sample.labels["method"] == "GET"
    }
    assert set(sums.values()) == {6.0}


@built
@pytest.mark.parametrize(
    "form",
    ["/api/v1/{}/{{item_id}}", "/api/v1/{}/<int:pk>/", "/{}", "/route/{}", "/a/{}/comments/{{c}}"],
)
def test_templates_that_are_new_texts_are_found_without_their_hash(form: str) -> None:
    """What goes through the dictionary of all has a hash afterwards."""
    things = ["users", "posts", "orders", "carts", "items", "pages", "roles", "teams", "tasks"]
    templates = [form.format(thing) for thing in things + [f"{n:03}" for n in range(200)]]
    metrics = Metrics(Store(lambda: None, lambda *fault: None), failed=lambda *fault: None)
    begin = HttpMetrics(metrics, Options()).begin_with()
    hashed = 0
    for turn in range(3):
        for template in templates:
            for method in ("GET", "POST", "DELETE"):
                x = Exchange()
                x.method, x.endpoint, x.request_id = method, "".join([template, "/"])[:-1], "r"
                begin(x)
                if turn == 2:
                    hashed += ctypes.c_ssize_t.from_address(id(x.endpoint) + 24).value != -1
    assert hashed < 0.02 * 3 * len(templates)


def test_each_request_beyond_the_limit_of_series_is_counted_as_such(tmp_path: Path) -> None:
    ops = OpsGuard("t", logging={"access": "off"}, metrics={"max_series": 20})
    edge = serve(answer, ops.runtime().port(PROTOCOL), endpoint=lambda scope: str(scope["path"]))

    async def nowhere(message: Message) -> None:
        return None

    for number in (*range(50), *[100] * 30):
        drive(edge(scope(f"/{number}"), Pause, nowhere))  # type: ignore[arg-type]
    found = {
        sample.labels["metric"]: sample.value
        for family in ops.metrics.collect()
        for sample in family.samples
        if sample.name == "opsguard_series_overflow_total"
    }
    assert found["http_requests_in_progress"] == 60.0
    assert found["http_requests_total"] == 60.0


def test_any_status_is_counted_as_itself(tmp_path: Path) -> None:
    """Also one that no server sends, as the first of its route."""
    given = [-1, 200, -1, True, 200, 2**31]

    async def odd(scope: Any, receive: Any, send: Any) -> None:
        status = given[int(scope["path"][1:])]
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    host = Host(odd, tmp_path)
    for number in range(len(given)):
        drive(host.call(path=f"/{number}"))
    assert host.counted() == {"-1": 2.0, "200": 2.0, "True": 1.0, str(2**31): 1.0}


def test_an_endpoint_without_a_name_is_none(tmp_path: Path) -> None:
    log = tmp_path / "log"
    ops = OpsGuard("t", environment="production", logging={"file": str(log), "format": "json"})
    edge = serve(answer, ops.runtime().port(PROTOCOL), endpoint=lambda scope: "")

    async def nowhere(message: Message) -> None:
        return None

    for _ in range(2):  # the first line of a status is made in Python
        drive(edge(scope(), Pause, nowhere))  # type: ignore[arg-type]
    ops.runtime().sink.flush()
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["endpoint"] for line in lines] == ["<unmatched>"] * 2
    found = {
        sample.labels["endpoint"]: sample.value
        for family in ops.metrics.collect()
        for sample in family.samples
        if sample.name == "http_requests_total"
    }
    assert found == {"<unmatched>": 2.0}


def test_only_the_probes_are_muted(tmp_path: Path) -> None:
    """Also where another endpoint looks like one at a glance."""

    async def fine(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    log = tmp_path / "log"
    ops = OpsGuard("t", environment="production", logging={"file": str(log), "format": "json"})
    edge = serve(fine, ops.runtime().port(PROTOCOL), endpoint=lambda scope: str(scope["path"]))

    async def nowhere(message: Message) -> None:
        return None

    paths = ["/health", "/abcdeh", "/livez", "/other", "/metrix", "/", "/héalth"]
    for path in paths:
        drive(edge(scope(path), Pause, nowhere))  # type: ignore[arg-type]
    ops.runtime().sink.flush()
    logged = [json.loads(line)["endpoint"] for line in log.read_text().splitlines()]
    assert logged == ["/abcdeh", "/other", "/metrix", "/", "/héalth"]


@built
def test_the_queue_keeps_the_order_and_grows() -> None:
    queue = speed.Queue()
    items = [object() for _ in range(1000)]
    taken = []
    for number, one in enumerate(items):
        queue.append(one)
        if number % 3 == 0:
            taken.append(queue.popleft())
    assert len(queue) == 1000 - len(taken)
    while queue:
        taken.append(queue.popleft())
    assert taken == items
    with pytest.raises(IndexError):
        queue.popleft()
    counts = [sys.getrefcount(one) for one in items]
    for one in items:
        queue.append(one)
    queue.append(queue)  # a ring that the collector has to find
    queue.clear()
    assert [sys.getrefcount(one) for one in items] == counts
    assert len(queue) == 0


@built
def test_a_queue_keeps_of_an_exchange_what_its_line_says() -> None:
    queue = speed.Queue()
    usual, bound, bare = Exchange(), Exchange(), Exchange()
    said = {
        "method": "GET",
        "path": "/items/7",
        "endpoint": "/items/{id}",
        "status": 200,
        "started": 99.5,
        "ended": 99.75,
        "sent": 12,
        "client": None,
        "request_id": "one",
    }
    for name, value in said.items():
        setattr(usual, name, value)
    usual.correlation_id = usual.request_id
    bound.fields = fields = {"tenant": "t-1"}
    counts = [sys.getrefcount(one) for one in (usual, bound, bare)]
    queue.append(usual)
    queue.append(bound)
    queue.append(bare)
    assert [sys.getrefcount(one) for one in (usual, bound, bare)] == [
        counts[0],
        counts[1],
        counts[2],
    ]
    gc.collect()  # goes through what is kept
    kept = queue.popleft()
    assert kept is not usual
    assert {name: getattr(kept, name) for name in said} == said
    assert kept.correlation_id == "one"
    assert kept.fields is None
    assert queue.popleft().fields is fields
    with pytest.raises(AttributeError):
        assert queue.popleft().path
    texts = [sys.getrefcount(said[name]) for name in said]
    for _ in range(1000):
        queue.append(usual)
    queue.clear()
    for _ in range(3):
        queue.append(usual)
        queue.popleft()
    assert [sys.getrefcount(said[name]) for name in said] == texts


@built
def test_a_queue_that_is_cleared_is_not_waited_for() -> None:
    queue = speed.Queue()

    class Again:
        """As a finalizer that makes a request."""

        times = 0

        def __del__(self) -> None:
            Again.times += 1
            if Again.times < 10:
                queue.append(Again())

    queue.append(Again())
    queue.clear()
    assert (Again.times, len(queue)) == (1, 1)
    while queue:
        queue.clear()
    assert Again.times == 10


def test_the_context_is_left_to_a_server_that_ends_it() -> None:
    from uvicorn.protocols.http.h11_impl import RequestResponseCycle

    cycle = object.__new__(RequestResponseCycle)
    assert alone(cycle.send)
    assert not alone(cycle.__init__.__func__)  # type: ignore[misc]
    assert not alone([].append)  # type: ignore[arg-type]


@built
def test_many_requests_leave_nothing_behind(tmp_path: Path) -> None:
    async def fails(scope: Any, receive: Any, send: Any) -> None:
        await Pause()
        raise LookupError

    hosts = [Host(answer, tmp_path), Host(fails, tmp_path)]

    def run(times: int) -> int:
        for _ in range(times):
            drive(hosts[0].call())
            with pytest.raises(LookupError):
                drive(hosts[1].call())
            left = hosts[0].call()
            left.send(None)
            del left
        for host in hosts:
            host.ops.runtime().sink.flush()
            host.sent.clear()
        gc.collect()
        return sys.getallocatedblocks()

    run(300)
    before = run(300)
    assert run(1_000) - before < 300


@built
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("protocol", ["asgi", "wsgi"])
def test_a_request_that_lacks_memory_harms_no_other(protocol: str, tmp_path: Path) -> None:
    """Each allocation of a request fails in turn. The Python path is CPython's to answer for."""
    pytest.importorskip("_testcapi", reason="this Python comes without its tests' module")
    path = os.pathsep.join(
        filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")])
    )
    done = subprocess.run(
        [sys.executable, "-m", "tests.starving", protocol, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode, done.stderr[-4000:]) == (0, "")
