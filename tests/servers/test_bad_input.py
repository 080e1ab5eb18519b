"""What no client should send. Whatever the server makes of it: never a 5xx, one line at most, and
nothing of it in ids, labels or later requests.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from opsguard.testing import Answer, Request
from tests.contract.harness import Samples
from tests.contract.scenarios import ADAPTERS, ASGI
from tests.servers.client import encode
from tests.servers.processes import SERVERS, Pool, Running, requests, running, until

pytestmark = pytest.mark.servers

SERVED = [
    pytest.param(
        server.name,
        adapter,
        id=f"{server.name} {adapter}",
        # In process all adapters get the like of this in the fast tier.
        marks=[] if adapter in ("fastapi", "flask") and not server.full else [pytest.mark.full],
    )
    for server in SERVERS.values()
    for adapter in ADAPTERS
    if (adapter in ASGI) == (server.protocol == "asgi")
]
SOUND_ID = re.compile("[A-Za-z0-9._-]{1,128}")
HOST = b"Host: testserver\r\n"


def sent(running: Running, data: bytes) -> Answer:
    """What comes back for these bytes, if anything does."""
    with running.client(timeout=1.0) as client:
        client.send(data)
        return client.answer()


def check(running: Running, mark: int, before: Samples, answer: Answer) -> None:
    """As `check_harmless`, and what we logged agrees with what the client got: no 5xx."""
    assert answer.status is None or answer.status < 500, answer
    ids = answer.header("x-request-id")
    check_harmless(running, mark, before)
    lines = [line for line in running.access(mark) if line["request_id"] in ids]
    assert len(lines) == len(ids) <= 1
    if ids:
        assert SOUND_ID.fullmatch(ids[0])
        assert lines[0]["status_code"] == answer.status


def check_harmless(running: Running, mark: int, before: Samples) -> None:
    """The server lives, we have no fault, nothing is in progress, and there are as many lines as
    requests.
    """
    alive = running.get("/plain", X_Request_ID="alive")
    assert alive.status == 200
    assert alive.header("x-request-id") == ["alive"]

    def is_settled() -> bool:
        """Servers with threads may be done with the second request before the first."""
        grown = running.since(before)
        assert len(running.access(mark)) == requests(grown) in (1, 2)
        assert not [key for key in grown if key[0].endswith("in_progress")]
        assert not [key for key in grown if key[0].startswith("opsguard_")]
        return True

    until(is_settled)
    assert [line for line in running.lines(mark) if line["logger"] == "opsguard"] == []


METHODS = {
    "bogus": b"BOGUS",
    "lower case": b"get",
    "mixed case": b"GeT",
    "empty": b"",
    "8 KB": b"M" * 8192,
    "60 KB": b"M" * 60_000,
    "not a token": b"G@T\x7f",
    "not ASCII": b"G\xc3\xa9T",
    "with a NUL": b"G\x00T",
    "CONNECT": b"CONNECT",
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize(("server", "app"), SERVED)
def test_methods(server: str, app: str, method: bytes, pool: Pool) -> None:
    """Whatever a method is, it is no label of its own."""
    running = pool.get(server, app)
    mark, before = running.still()
    check(running, mark, before, sent(running, method + b" /plain HTTP/1.1\r\n" + HOST + b"\r\n"))
    known = {"GET", "CONNECT", "_OTHER"}
    labels = [dict(labels) for name, labels in running.since(before) if name.startswith("http_")]
    assert {found["method"] for found in labels if "method" in found} <= known


IDS = {
    "spaces": b"a b",
    "NUL": b"a\x00b",
    "ANSI": b"\x1b[31mred",
    "U+2028": "a\u2028b".encode(),
    "not UTF-8": b"\xff\xfe",
    "129 characters": b"a" * 129,
    "64 KB": b"a" * 65_536,
    "a folded line": b"a\r\n b",
    "a bare CR": b"a\rX-Evil: 1",
    "a bare LF": b"a\nX-Evil: 1",
    "empty": b"",
    "quotes": b'"}\\n{"level":"ERROR',
    "twice": b"one\r\nX-Request-ID: two",
}
# Servers may take a line's end or the white space around it for what it is not: then the id that
# is left is a sound one.
LEFT_OVER = {b"a\nX-Evil: 1": "a", b"a\rX-Evil: 1": "a"}


@pytest.mark.parametrize("value", IDS.values(), ids=IDS)
@pytest.mark.parametrize("header", [b"X-Request-ID", b"X-Correlation-ID"], ids=["one", "two"])
@pytest.mark.parametrize(("server", "app"), SERVED)
def test_ids(server: str, app: str, header: bytes, value: bytes, pool: Pool) -> None:
    """An unsound id is replaced by one of ours, in header and line."""
    running = pool.get(server, app)
    mark, before = running.still()
    value = value.replace(b"X-Request-ID", header)
    head = b"GET /ids HTTP/1.1\r\n" + HOST
    answer = sent(running, head + header + b": " + value + b"\r\n\r\n")
    check(running, mark, before, answer)
    if answer.status != 200:
        return
    (found,) = answer.header("x-request-id")
    for one in (found, *answer.header("x-correlation-id")):
        assert re.fullmatch("[0-9a-f]{32}", one) or one == LEFT_OVER.get(value)
    assert answer.header("x-evil") == []


PATHS = {
    "not UTF-8": b"/items/%ff",
    "NUL": b"/%00",
    "mojibake": b"/%C3%83%C2%A9/\xc3\xa9",
    "raw bytes": b"/\xff\xfe",
    "line ends": b"/a%0d%0aX-Evil:%201",
    "U+2028": b"/%E2%80%A8",
    "ANSI": b"/%1b[31m",
    "quotes": b'/"}%22%5c',
    "percent only": b"/%",
    "dots": b"/../../items/7",
    "a whole address": b"http://elsewhere/plain",
    "no slash": b"plain",
    "asterisk": b"*",
    "8 KB": b"/" + b"p" * 8192,
    "a fragment": b"/plain#x",
    "empty": b"",
}


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize(("server", "app"), SERVED)
def test_paths(server: str, app: str, path: bytes, pool: Pool) -> None:
    """A path is never a label, and one line of JSON at most."""
    running = pool.get(server, app)
    mark, before = running.still()
    check(running, mark, before, sent(running, encode(Request("/"), target=path or b" ")))
    endpoints = {dict(labels).get("endpoint") for _, labels in running.since(before)}
    assert endpoints <= {"/plain", "/items/{id}", "<unmatched>"}


BODIES = {
    "a length that is none": b"Content-Length: abc\r\n\r\nbody",
    "a negative length": b"Content-Length: -1\r\n\r\n",
    "a huge length": b"Content-Length: 99999999999999999999999\r\n\r\nbody",
    "two lengths": b"Content-Length: 4\r\nContent-Length: 5\r\n\r\nbody!",
    "length and chunks": b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "a chunk size that is none": b"Transfer-Encoding: chunked\r\n\r\nxyz\r\nbody\r\n0\r\n\r\n",
    "an unknown coding": b"Transfer-Encoding: rot13\r\n\r\nbody",
}


@pytest.mark.parametrize("rest", BODIES.values(), ids=BODIES)
@pytest.mark.parametrize(("server", "app"), SERVED)
def test_bodies(server: str, app: str, rest: bytes, pool: Pool) -> None:
    """A body that does not keep to its own rules leaves no gauge behind. Some servers answer for it
    while the app still reads, with a 501 for one; with others the app's read fails.
    """
    running = pool.get(server, app)
    mark, before = running.still()
    answer = sent(running, b"POST /upload HTTP/1.1\r\n" + HOST + rest)
    check_harmless(running, mark, before)
    told = [line["request_id"] for line in running.access(mark)]
    assert set(answer.header("x-request-id")) <= set(told)


# The client's address -----------------------------------------------------------------------------

FORWARDED = {
    "one address": ("203.0.113.9", "203.0.113.9"),
    "only the last one that no proxy of ours wrote": ("6.6.6.6, 203.0.113.9", "203.0.113.9"),
    "a proxy of ours in between": ("6.6.6.6, 203.0.113.9, 127.0.0.2", "203.0.113.9"),
    "a port": ("203.0.113.9:4711", "203.0.113.9"),
    "IPv6": ("2001:db8::1", "2001:db8::1"),
    "IPv6 with a port": ("[2001:db8::1]:4711", "2001:db8::1"),
    "as many as servers take": (", ".join(["6.6.6.6"] * 800 + ["203.0.113.9"]), "203.0.113.9"),
}


@pytest.fixture(scope="module", params=[
    pytest.param((server, app), id=f"{server} {app}", marks=[pytest.mark.full] if full else [])
    for server, app, full in (
        ("uvicorn-httptools", "fastapi", False),
        ("gunicorn-gthread", "flask", False),
        ("uvicorn-h11", "asgi", True),
        ("uvicorn-h11", "django-async", True),
        ("gunicorn-sync", "wsgi", True),
        ("gunicorn-sync", "django", True),
        ("granian-asgi", "asgi", True),
        ("granian-wsgi", "wsgi", True),
        ("gunicorn-asgi", "fastapi", True),
    )
])  # fmt: skip
def behind_proxies(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    server, app = request.param
    # uvicorn believes X-Forwarded-For from 127.0.0.1 by itself; who trusts whom is to be ours.
    arguments = ("--no-proxy-headers",) if server.startswith("uvicorn") else ()
    settings = {"proxies": {"trusted": ["127.0.0.0/8"]}}
    folder = tmp_path_factory.mktemp("proxies")
    with running(SERVERS[server], app, folder, *arguments, settings=settings) as found:
        yield found


def client_of(running: Running, forwarded: str) -> str:
    mark = running.mark()
    assert running.get("/plain", X_Forwarded_For=forwarded).status == 200
    (line,) = until(lambda: running.access(mark))
    return str(line["client"])


@pytest.mark.parametrize(("forwarded", "client"), FORWARDED.values(), ids=FORWARDED)
def test_behind_trusted_proxies_the_line_has_the_client(
    behind_proxies: Running, forwarded: str, client: str
) -> None:
    assert client_of(behind_proxies, forwarded) == client


def test_ten_thousand_entries_do_no_harm(behind_proxies: Running) -> None:
    """Most servers refuse a header of 90 KB; one that does not must not make us fail."""
    mark, before = behind_proxies.still()
    forwarded = ", ".join(["6.6.6.6"] * 10_000)
    answer = behind_proxies.get("/plain", X_Forwarded_For=forwarded)
    check(behind_proxies, mark, before, answer)


@pytest.mark.parametrize("forwarded", ["unknown", "", "nonsense", "1.2.3.4.5", "a" * 5000])
def test_what_is_no_address_is_not_believed(behind_proxies: Running, forwarded: str) -> None:
    """The line has what is known for sure: an address, and none that the client wrote."""
    assert client_of(behind_proxies, forwarded) == "127.0.0.1"


@pytest.mark.parametrize(
    ("server", "app", "arguments"),
    [("uvicorn-httptools", "fastapi", ("--no-proxy-headers",)), ("gunicorn-gthread", "flask", ())],
    ids=["uvicorn", "gunicorn"],
)
def test_nothing_is_trusted_by_default(
    server: str, app: str, arguments: tuple[str, ...], pool: Pool
) -> None:
    assert client_of(pool.get(server, app, *arguments), "203.0.113.9") == "127.0.0.1"
