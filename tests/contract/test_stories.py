"""The contract in stories of several requests, and of requests that no client should send."""

from __future__ import annotations

import asyncio
import contextvars
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from wsgiref.util import FileWrapper, setup_testing_defaults

import pytest

from opsguard.context import current
from opsguard.exceptions import Refused
from opsguard.testing import Answer, Request, serve_asgi
from tests.contract.apps.shop import Ended
from tests.contract.harness import Guarded, Samples, guard, parse, send
from tests.contract.scenarios import ADAPTERS, ASGI, WSGI

# Django's ASGI handler leaves the spooled body open when an answer breaks off.
pytestmark = pytest.mark.filterwarnings("ignore:.*SpooledTemporaryFile.*")
EVERYWHERE = pytest.mark.parametrize("adapter", ADAPTERS)
FRESH = re.compile(r"[0-9a-f]{32}")
PEER = "10.0.0.2"


def total(found: Samples, name: str, **labels: str) -> float:
    """The sum of the series of `name` that have these labels."""
    wanted = set(labels.items())
    return sum([v for (sample, has), v in found.items() if sample == name and wanted <= has])


def check_sane(guarded: Guarded, requests: int) -> None:
    """As many requests in the metrics as were sent, none in progress, no fault of ours, and a
    scrape that can be read.
    """
    found = guarded.samples()
    assert total(found, "http_requests_total") == requests
    assert total(found, "http_requests_in_progress") == 0.0
    assert total(found, "opsguard_internal_errors_total") == 0.0
    scrape = guarded.send(Request("/metrics"))
    assert scrape.status == 200
    assert total(parse(scrape.body.decode()), "http_requests_total") == requests


# --- requests at the same time


@EVERYWHERE
def test_requests_at_the_same_time_do_not_mix(adapter: str, tmp_path: Path) -> None:
    """Each handler has its own ids before and after it waits, each line its own bound field."""
    guarded = guard(adapter, tmp_path)
    names = [f"r-{number}" for number in range(40)]
    sent = [Request("/wait", headers=(("X-Request-ID", name),)) for name in names]
    answers = at_once(guarded, sent)
    assert [answer.body.decode() for answer in answers] == [f"{name} {name}" for name in names]
    assert [answer.header("x-request-id") for answer in answers] == [[name] for name in names]
    lines = {line["request_id"]: line["tenant_id"] for line in guarded.lines()}
    assert lines == {name: f"{name} {name}" for name in names}
    check_sane(guarded, 40)


def at_once(guarded: Guarded, sent: list[Request]) -> list[Answer]:
    if guarded.adapter not in ASGI:
        with ThreadPoolExecutor(8) as pool:
            return list(pool.map(guarded.send, sent))

    async def gather() -> list[Answer]:
        return await asyncio.gather(*[serve_asgi(guarded.app, request) for request in sent])

    return contextvars.Context().run(asyncio.run, gather())


@EVERYWHERE
def test_a_thread_or_task_serves_the_next_request_with_nothing_of_the_last(
    adapter: str, tmp_path: Path
) -> None:
    guarded = guard(adapter, tmp_path)
    for name in ("one", "two"):
        guarded.send(Request("/bound", headers=(("X-Request-ID", name),)))
        guarded.send(Request("/plain"))
    assert [line.get("tenant_id") for line in guarded.lines()] == ["t-1", None, "t-1", None]


# --- the context


def watched(guarded: Guarded, seen: list[object]) -> Any:
    """The app, with the context noted when the server is done with each request."""
    app = guarded.app

    async def asgi(scope: Any, receive: Any, send: Any) -> None:
        try:
            await app(scope, receive, send)
        finally:
            seen.append(current.get())

    def wsgi(environ: Any, start_response: Any) -> Any:
        body = app(environ, start_response)
        if not hasattr(body, "close"):
            seen.append(current.get())
            return body
        return Closing(body, seen)

    return asgi if guarded.adapter in ASGI else wsgi


class Closing:
    def __init__(self, body: Any, seen: list[object]) -> None:
        self.body = body
        self.seen = seen

    def __iter__(self) -> Any:
        return iter(self.body)

    def close(self) -> None:
        self.body.close()
        self.seen.append(current.get())


@EVERYWHERE
@pytest.mark.parametrize(
    "request_",
    [
        pytest.param(Request("/plain"), id="plain"),
        pytest.param(Request("/plain", "HEAD"), id="head"),
        pytest.param(Request("/nowhere"), id="404"),
        pytest.param(Request("/plain", "DELETE"), id="405"),
        pytest.param(Request("/boom"), id="exception"),
        pytest.param(Request("/midway"), id="exception in mid-stream"),
        pytest.param(Request("/stream"), id="stream"),
        pytest.param(Request("/endless", leave_after=2), id="client that leaves"),
        pytest.param(Request("/endless", leave_after=2, send_fails=True), id="send that fails"),
        pytest.param(Request("/file"), id="file"),
        pytest.param(Request("/background"), id="background work"),
        pytest.param(Request("/edge-refused"), id="refused at the edge"),
        pytest.param(Request("/refused/9", "POST", body=b"x"), id="refused at the route"),
        pytest.param(Request("/metrics"), id="scrape"),
    ],
)
def test_the_context_is_gone_after_every_answer(
    adapter: str, request_: Request, tmp_path: Path
) -> None:
    guarded = guard(adapter, tmp_path)
    seen: list[object] = []
    guarded.app = watched(guarded, seen)
    strict = adapter == "wsgi"
    guarded.send(Request(**{**fields_of(request_), "strict": strict}))
    assert seen == [None]
    assert total(guarded.samples(), "http_requests_in_progress") == 0.0
    assert total(guarded.samples(), "http_requests_total") == 1.0


def fields_of(request: Request) -> dict[str, Any]:
    return {name: getattr(request, name) for name in Request.__slots__}


@EVERYWHERE
def test_background_work_knows_its_request(adapter: str, tmp_path: Path) -> None:
    guarded = guard(adapter, tmp_path)
    for name in ("b-1", "b-2"):
        answer = guarded.send(Request("/background", headers=(("X-Request-ID", name),)))
        assert (answer.status, answer.body) == (200, b"soon")
        assert guarded.shop.after_done.wait(10)
    assert guarded.shop.after_ids == ["b-1 b-1", "b-2 b-2"]
    assert [line["status_code"] for line in guarded.lines()] == [200, 200]
    assert not any("job" in line for line in guarded.lines()), "bound when the last byte was out"


# --- a request within a request

INNER = (
    "/plain",
    "/stream",
    "/file",
    "/nowhere",
    "/boom",
    "/midway",
    "/edge-refused",
    "/background",
)
READERS = [
    pytest.param(adapter, reads, id=f"{adapter}: {reads}")
    for adapter in ADAPTERS
    for reads in ("closes", "reads", "only asks")
    if adapter not in ASGI or reads == "closes"  # an ASGI app has sent its answer when it returns
]


@pytest.mark.parametrize("path", INNER)
@pytest.mark.parametrize(("adapter", "reads"), READERS)
def test_a_request_that_a_handler_serves_leaves_it_its_own(
    adapter: str, path: str, reads: str, tmp_path: Path
) -> None:
    """A batch endpoint, a preview, a test client in a view: the handler has its own ids as soon as
    it has the answer, what it binds is on its own line, and a marked function that it calls is
    decided for its own request. Under WSGI it may leave the answer open, and read it later.
    """
    store = f"sqlite:///{tmp_path / 'keys.db'}"
    keys = {"pepper": "a pepper of the tests", "store": store, "required": ["/secret"]}
    guarded = guard(adapter, tmp_path, keys=keys)
    shop, inner = guarded.shop, Request(path, headers=(("X-Request-ID", "inner"),), strict=False)
    seen: list[object] = []
    left: list[Any] = []

    def knows() -> None:
        # Each asks for something else, so that the one before has not decided for it.
        secret = guarded.ops.require_key(scopes=(f"s{len(seen)}",))(lambda: "secret")
        with pytest.raises(Refused):
            secret()
        seen.append(shop.ids())

    def within() -> None:
        for _ in range(2):
            left.append(nested(guarded.app, inner, reads))
            knows()
        shop.ops.bind(tenant_id="t-1")

    async def awithin() -> None:
        for _ in range(2):
            await serve_asgi(guarded.app, inner)
            knows()
        shop.ops.bind(tenant_id="t-1")

    shop.within = awithin if adapter in ASGI else within
    context: list[object] = []
    guarded.app, bare = watched(guarded, context), guarded.app
    answer = guarded.send(Request("/within", headers=(("X-Request-ID", "outer"),)))
    guarded.app = bare
    assert (answer.body, answer.header("x-request-id")) == (b"outer outer", ["outer"])
    assert seen == ["outer outer"] * 2
    assert context[-1] is None
    for body in left:
        getattr(body, "close", lambda: None)()
    lines = guarded.lines()
    assert sorted([line["request_id"] for line in lines]) == ["inner", "inner", "outer"]
    assert [line["request_id"] for line in lines if "tenant_id" in line] == ["outer"]
    if path == "/background" and reads == "closes":
        assert guarded.shop.after_ids == ["inner inner"] * 2
    check_sane(guarded, 3)


def nested(app: Any, request: Request, reads: str) -> Any:
    """Serve a request to a WSGI app here, in this context; its body, if it is still open."""
    environ: dict[str, Any] = {"PATH_INFO": request.path, "SCRIPT_NAME": "", "REMOTE_ADDR": PEER}
    environ["wsgi.file_wrapper"] = FileWrapper
    environ.update({f"HTTP_{n.upper().replace('-', '_')}": v for n, v in request.headers})
    setup_testing_defaults(environ)
    body: Any = ()
    try:
        body = app(environ, lambda status, headers, exc_info=None: None)
        if reads != "only asks":
            b"".join(body)
    except Exception:  # as a server has it
        body.close()
    if reads == "closes":
        getattr(body, "close", lambda: None)()
    return () if reads == "closes" else body


@EVERYWHERE
def test_a_request_that_a_server_left_in_the_context_is_not_set_back(
    adapter: str, tmp_path: Path
) -> None:
    """A kept-alive connection may find the one before: it is over, and not the next one's."""
    guarded = guard(adapter, tmp_path)
    seen: list[object] = []
    earlier: list[Any] = []

    def within() -> None:
        earlier.append(current.get())

    async def awithin() -> None:
        within()

    guarded.shop.within = awithin if adapter in ASGI else within
    guarded.send(Request("/within"))
    assert earlier[0].closed
    app = watched(guarded, seen)

    async def asgi(scope: Any, receive: Any, send: Any) -> None:
        current.set(earlier[0])
        await app(scope, receive, send)

    def wsgi(environ: Any, start_response: Any) -> Any:
        current.set(earlier[0])
        return app(environ, start_response)

    guarded.app = asgi if adapter in ASGI else wsgi
    guarded.send(Request("/within"))
    guarded.send(Request("/stream"))
    assert seen == [None, None]
    assert earlier[1].outer is None


@EVERYWHERE
def test_a_check_that_a_server_ends_leaves_no_request_in_the_context(
    adapter: str, tmp_path: Path
) -> None:
    """A worker's timeout may be raised anywhere: what was being opened will never be closed."""
    guarded = guard(adapter, tmp_path)
    seen: list[object] = []

    def wsgi() -> None:
        with pytest.raises(Ended):
            nested(guarded.app, Request("/edge-ended"), "closes")
        seen.append(current.get())

    async def asgi() -> None:
        with pytest.raises(Ended):
            await serve_asgi(guarded.app, Request("/edge-ended"))
        seen.append(current.get())

    if adapter in ASGI:
        contextvars.Context().run(asyncio.run, asgi())
    else:
        contextvars.Context().run(wsgi)
    assert seen == [None]


# --- ids

HOSTILE = [
    pytest.param("", id="empty"),
    pytest.param("a\r\nSet-Cookie: x=1", id="CR LF"),
    pytest.param("a\n", id="trailing newline"),
    pytest.param("a\0b", id="NUL"),
    pytest.param("\x1b[31mred\x1b[0m", id="ANSI"),
    pytest.param("a\u2028b".encode().decode("latin-1"), id="U+2028 in UTF-8"),
    pytest.param("\xff", id="0xff"),
    pytest.param("x" * 65_536, id="64 KB"),
    pytest.param("x" * 129, id="129 characters"),
    pytest.param('{"a": 1}', id="JSON"),
    pytest.param("a b", id="a space"),
    pytest.param("../../etc/passwd", id="a path"),
    pytest.param("<script>", id="markup"),
]


@EVERYWHERE
@pytest.mark.parametrize("hostile", HOSTILE)
def test_a_hostile_id_is_replaced(adapter: str, hostile: str, tmp_path: Path) -> None:
    """In either header or both: nothing of it is in the answer, in the line, or in what the
    handler sees.
    """
    guarded = guard(adapter, tmp_path)
    one, other = (("X-Request-ID", hostile),), (("X-Correlation-ID", hostile),)
    ids = []
    for headers in (one, other, one + other):
        answer = guarded.send(Request("/ids", headers=headers, strict=False))
        (made,) = answer.header("x-request-id")
        assert FRESH.fullmatch(made)
        assert answer.header("x-correlation-id") == []
        assert answer.body.decode() == f"{made} {made}"
        ids.append(made)
    assert len(set(ids)) == 3
    assert [line["request_id"] for line in guarded.lines()] == ids
    assert not [line for line in guarded.lines() if "correlation_id" in line]
    check_sane(guarded, 3)


@EVERYWHERE
def test_an_id_that_came_twice_is_replaced(adapter: str, tmp_path: Path) -> None:
    guarded = guard(adapter, tmp_path)
    headers = (("X-Request-ID", "one"), ("X-Request-ID", "two"))
    (made,) = guarded.send(Request("/plain", headers=headers)).header("x-request-id")
    assert FRESH.fullmatch(made)


@EVERYWHERE
@pytest.mark.parametrize("sound", ["a", "A.b_c-9", "0" * 128], ids=lambda text: text[:9])
def test_a_sound_id_is_echoed(adapter: str, sound: str, tmp_path: Path) -> None:
    guarded = guard(adapter, tmp_path)
    answer = guarded.send(Request("/ids", headers=(("x-REQUEST-id", sound),)))
    assert answer.header("x-request-id") == [sound]
    assert answer.body.decode() == f"{sound} {sound}"


@EVERYWHERE
@pytest.mark.parametrize(
    ("request_id", "correlation_id", "expected"),
    [
        pytest.param(None, None, ("fresh", "fresh"), id="neither"),
        pytest.param("r", None, ("r", "r"), id="request id"),
        pytest.param(None, "c", ("c", "c"), id="correlation id"),
        pytest.param("r", "c", ("r", "c"), id="both"),
        pytest.param("no good", "c", ("c", "c"), id="unsound request id"),
        pytest.param("r", "no good", ("r", "r"), id="unsound correlation id"),
        pytest.param("no good", "no good", ("fresh", "fresh"), id="both unsound"),
        pytest.param("same", "same", ("same", "same"), id="both the same"),
    ],
)
def test_the_two_ids_stand_for_each_other(
    adapter: str,
    request_id: str | None,
    correlation_id: str | None,
    expected: tuple[str, str],
    tmp_path: Path,
) -> None:
    guarded = guard(adapter, tmp_path)
    given = (("X-Request-ID", request_id), ("X-Correlation-ID", correlation_id))
    headers = tuple([(name, value) for name, value in given if value is not None])
    answer = guarded.send(Request("/ids", headers=headers))
    (one,) = answer.header("x-request-id")
    (other,) = answer.header("x-correlation-id") or [one]
    assert bool(answer.header("x-correlation-id")) == (correlation_id == expected[1])
    if expected == ("fresh", "fresh"):
        assert FRESH.fullmatch(one)
        assert other == one
    else:
        assert (one, other) == expected
    assert answer.body.decode() == f"{one} {other}"
    (line,) = guarded.lines()
    assert line["request_id"] == one
    assert line.get("correlation_id") == (other if other != one else None)


@EVERYWHERE
@pytest.mark.parametrize(
    ("path", "method"),
    [
        ("/plain", "GET"),
        ("/nowhere", "GET"),
        ("/plain", "DELETE"),
        ("/boom", "GET"),
        ("/metrics", "GET"),
        ("/edge-refused", "GET"),
        ("/refused/9", "POST"),
        ("/moved", "GET"),
    ],
)
def test_the_ids_that_were_sent_are_on_every_answer(
    adapter: str, path: str, method: str, tmp_path: Path
) -> None:
    headers = (("X-Request-ID", "r"), ("X-Correlation-ID", "c"))
    answer = guard(adapter, tmp_path).send(Request(path, method, headers))
    assert answer.header("x-request-id") == ["r"]
    assert answer.header("x-correlation-id") == ["c"]


@EVERYWHERE
def test_the_correlation_id_is_answered_where_it_was_sent_or_always(
    adapter: str, tmp_path: Path
) -> None:
    sparing = guard(adapter, tmp_path)
    assert sparing.send(Request("/plain")).header("x-correlation-id") == []
    always = guard(adapter, tmp_path, ids={"answer_correlation": "always"})
    answer = always.send(Request("/plain"))
    assert answer.header("x-correlation-id") == answer.header("x-request-id")


# --- the client's address


@EVERYWHERE
@pytest.mark.parametrize(
    ("proxies", "peer", "forwarded", "client"),
    [
        pytest.param({}, PEER, "198.51.100.7", PEER, id="nothing is trusted"),
        pytest.param({}, None, "198.51.100.7", None, id="nothing is trusted, no peer"),
        pytest.param("10.0.0.0/8", PEER, None, PEER, id="no header"),
        pytest.param("10.0.0.0/8", PEER, "203.0.113.9", "203.0.113.9", id="one entry"),
        pytest.param(
            "10.0.0.0/8", PEER, "198.51.100.7, 203.0.113.9", "203.0.113.9", id="a forged entry"
        ),
        pytest.param(
            "10.0.0.0/8", PEER, "198.51.100.7, 10.0.0.3", "198.51.100.7", id="two proxies of ours"
        ),
        pytest.param("10.0.0.0/8", "192.0.2.1", "203.0.113.9", "192.0.2.1", id="another peer"),
        pytest.param("10.0.0.0/8", None, "203.0.113.9", "203.0.113.9", id="a unix socket"),
        pytest.param(1, PEER, "198.51.100.7, 203.0.113.9", "203.0.113.9", id="one hop"),
        pytest.param(2, PEER, "198.51.100.7, 203.0.113.9", "198.51.100.7", id="two hops"),
        pytest.param(1, PEER, "203.0.113.9:4711", "203.0.113.9", id="a port"),
        pytest.param(1, PEER, "[2001:db8::1]:443", "2001:db8::1", id="a port behind IPv6"),
        pytest.param(1, PEER, "::ffff:203.0.113.9", "203.0.113.9", id="a mapped address"),
        pytest.param(1, PEER, "fe80::1%eth0", "fe80::1", id="a zone"),
        pytest.param(1, PEER, "unknown", PEER, id="unknown"),
        pytest.param(1, PEER, "_hidden", PEER, id="hidden"),
        pytest.param(1, PEER, "\xff\x00\x1b", PEER, id="no text"),
        pytest.param(
            1, PEER, ", ".join(["198.51.100.7"] * 9_999 + ["203.0.113.9"]), "203.0.113.9",
            id="10,000 entries",
        ),
        pytest.param(1, PEER, "," * 10_000, PEER, id="10,000 empty entries"),
    ],
)  # fmt: skip
def test_the_client_is_who_the_trusted_proxies_say(
    adapter: str,
    proxies: Any,
    peer: str | None,
    forwarded: str | None,
    client: str | None,
    tmp_path: Path,
) -> None:
    if isinstance(proxies, str):
        proxies = {"trusted": [proxies]}
    elif isinstance(proxies, int):
        proxies = {"hops": proxies}
    guarded = guard(adapter, tmp_path, proxies=proxies)
    headers = () if forwarded is None else (("X-Forwarded-For", forwarded),)
    answer = guarded.send(Request("/plain", headers=headers, client=peer, strict=False))
    assert answer.status == 200
    (line,) = guarded.lines()
    assert line["client"] == client
    check_sane(guarded, 1)


@EVERYWHERE
def test_two_forwarded_headers_are_one_list(adapter: str, tmp_path: Path) -> None:
    guarded = guard(adapter, tmp_path, proxies={"trusted": ["10.0.0.0/8"]})
    headers = (("X-Forwarded-For", "198.51.100.7"), ("X-Forwarded-For", "203.0.113.9, 10.0.0.3"))
    guarded.send(Request("/plain", headers=headers, client=PEER))
    assert guarded.lines()[0]["client"] == "203.0.113.9"


# --- methods and paths


@EVERYWHERE
def test_methods_that_are_none_are_one_series(adapter: str, tmp_path: Path) -> None:
    guarded = guard(adapter, tmp_path)
    methods = ("BOGUS", "get", "", "M" * 8_192, "GET\r\nX: y", "\xff", "PROPFIND")
    for method in methods:
        answer = guarded.send(Request("/plain", method, strict=False))
        assert answer.error is None
        assert answer.status is not None
        assert answer.status < 500
    found = guarded.samples()
    used = {dict(labels)["method"] for name, labels in found if name == "http_requests_total"}
    assert used == {"_OTHER"}
    assert len(guarded.lines()) == len(methods)
    check_sane(guarded, len(methods))


@EVERYWHERE
def test_two_hundred_unknown_paths_are_one_series(adapter: str, tmp_path: Path) -> None:
    guarded = guard(adapter, tmp_path)
    for number in range(200):
        answer = guarded.send(Request(f"/{number * 7_919:x}/{'ab' * (number % 5)}"))
        assert answer.status == 404
    series = {
        labels: value
        for (name, labels), value in guarded.samples().items()
        if name == "http_requests_total"
    }
    assert list(series.values()) == [200.0]
    assert dict(next(iter(series)))["endpoint"] == "<unmatched>"
    assert len({line["path"] for line in guarded.lines()}) == 200
    check_sane(guarded, 200)


@EVERYWHERE
@pytest.mark.parametrize(
    "path",
    [
        pytest.param(b"/\xff", id="0xff"),
        pytest.param(b"/\xc3\x28", id="half a character"),
        pytest.param(b"/\0", id="NUL"),
        pytest.param("/é€😀".encode(), id="not ASCII"),
        pytest.param("/Ã©".encode(), id="mojibake"),
        pytest.param("/\u2028\u202e".encode(), id="line separator and bidi"),
        pytest.param(b"/\r\n\x1b[31m", id="control characters"),
        pytest.param(b'/"\\{}', id="quotes"),
        pytest.param(b"/" + b"x" * 8_192, id="8 KB"),
        pytest.param(b"//plain", id="two slashes"),
        pytest.param(b"/../plain", id="dots"),
        pytest.param(b"", id="empty"),
        pytest.param(b"*", id="asterisk"),
        pytest.param(b"/items/\xff", id="0xff for a parameter"),
        pytest.param(b"/metrics/\xff", id="below the metrics"),
    ],
)
def test_a_path_that_is_none_gets_one_sound_line_and_no_5xx(
    adapter: str, path: bytes, tmp_path: Path
) -> None:
    guarded = guard(adapter, tmp_path)
    # What servers make of it: ASGI has text, WSGI the bytes as they are.
    text = path.decode("utf-8", "replace" if adapter in ASGI else "surrogateescape")
    answer = guarded.send(Request(text, strict=False))
    assert answer.error is None
    assert answer.status is not None
    assert answer.status < 500
    (line,) = guarded.lines()
    assert line["status_code"] == answer.status
    assert [line["request_id"]] == answer.header("x-request-id")
    assert len(guarded.log.read_bytes().splitlines()) == 1 or adapter.startswith("django")
    check_sane(guarded, 1)


@pytest.mark.parametrize("adapter", WSGI)
def test_a_server_may_leave_out_script_name(adapter: str, tmp_path: Path) -> None:
    """PEP 3333 lets it where the app is at the server's root."""
    guarded = guard(adapter, tmp_path)

    def served(environ: Any, start_response: Any) -> Any:
        assert environ.pop("SCRIPT_NAME") == ""
        return guarded.app(environ, start_response)

    answer = send(adapter, served, Request("/items/7"))
    assert (answer.status, answer.body) == (200, b"item 7")
    assert [line["endpoint"] for line in guarded.lines()] == ["/items/{id}"]
    check_sane(guarded, 1)


# --- lives of an app


@EVERYWHERE
def test_nothing_leaks_over_a_mixed_crowd(adapter: str, tmp_path: Path) -> None:
    """Good, failing, leaving and refused requests from several threads at once."""
    guarded = guard(adapter, tmp_path)
    kinds: list[Callable[[], Request]] = [
        lambda: Request("/plain"),
        lambda: Request("/boom"),
        lambda: Request("/midway"),
        lambda: Request("/nowhere"),
        lambda: Request("/endless", leave_after=2),
        lambda: Request("/endless", leave_after=2, send_fails=True),
        lambda: Request("/refused/9", "POST", body=b"x", strict=False),
        lambda: Request("/upload", "POST", body=b"x" * 50, strict=False),
    ]
    before = threading.active_count()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda make: guarded.send(make()), kinds * 4))
    found = guarded.samples()
    assert total(found, "http_requests_total") == 32.0
    assert total(found, "http_requests_in_progress") == 0.0
    assert total(found, "http_errors_total", error_type="Boom") == 8.0
    assert total(found, "http_requests_total", status="499") == 8.0
    assert len({line["request_id"] for line in guarded.lines()}) == 32
    assert threading.active_count() <= before + 1  # the log's own
    check_sane(guarded, 32)
