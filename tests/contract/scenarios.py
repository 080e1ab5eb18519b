"""The contract: what every adapter does, as one table.

A scenario says which requests are sent and what must come of them. What is not said is the same
for all five: the app's own answer byte for byte as without us, our two headers on it, exactly one
access line that agrees with the answer, exactly one request in the metrics, nothing in progress
afterwards. Where protocols or frameworks differ, `but` says what each does instead.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

ADAPTERS = ("asgi", "wsgi", "fastapi", "flask", "django", "django-async")
ASGI = ("asgi", "fastapi", "django-async")
WSGI = ("wsgi", "flask", "django")
FRAMEWORKS = ("fastapi", "flask", "django", "django-async")
UNMATCHED = "<unmatched>"


@dataclass(frozen=True)
class Expected:
    """What the access line and the metrics say, and what the client got."""

    status: int | None = 200
    """None: no answer reaches the client, the connection breaks."""
    endpoint: str = ""
    """"" is the path itself."""
    method: str = ""
    """"" is the request's own."""
    recorded: int | None = None
    """The status in line and metrics, where it is not the one the client got."""
    body: bytes | None = None
    size: int | None = None
    """Bytes of the answer in line and metrics; None: as many as the client got."""
    received: int | None = None
    """Bytes of the request in the metrics; None: as many as were sent."""
    error: str | None = None
    """The type under which it is counted as an error."""
    raises: str | None = None
    """The exception that reaches the server."""
    logged: bool = True
    answer_is_ours: bool = False
    """The bare app would have answered otherwise (or the server for it)."""


@dataclass(frozen=True)
class Scenario:
    """One row: a request, and what comes of it."""

    name: str
    path: str = "/plain"
    method: str = "GET"
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b""
    chunked: bool = False
    leave: str = ""
    """The client leaves: after some "chunk" of the answer, or in the middle of the "upload"."""
    expected: Expected = field(default_factory=Expected)
    but: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What differs, by adapter: values of Expected."""
    only: tuple[str, ...] = ADAPTERS
    strict: bool = True
    """WSGI frameworks too pass `wsgiref.validate` here."""
    tells_ids: bool = False
    """The body tells the ids, so it differs from the bare app's."""
    in_process: bool = True
    sockets: bool = True

    def expect(self, adapter: str) -> Expected:
        """What comes of it with this adapter, defaults filled in."""
        expected = replace(self.expected, **self.but.get(adapter, {}))
        path = self.path.partition("?")[0]
        return replace(
            expected,
            endpoint=expected.endpoint or path,
            method=expected.method or self.method,
            recorded=expected.recorded or expected.status,
        )


def both(adapters: tuple[str, ...], **values: Any) -> dict[str, dict[str, Any]]:
    return dict.fromkeys(adapters, values)


UPLOAD = b"0123456789" * 50
FRAMEWORK_500 = "the framework answers for the exception itself"

SCENARIOS = (
    Scenario("answers 200", expected=Expected(200, body=b"hello")),
    Scenario(
        "answers 201",
        "/items",
        "POST",
        body=b"abc",
        strict=False,
        expected=Expected(201, body=b"made 3"),
    ),
    Scenario(
        "answers 204 without a body", "/empty", strict=False, expected=Expected(204, body=b"")
    ),
    Scenario("answers 302", "/moved", expected=Expected(302)),
    Scenario("answers 400 of the handler", "/bad", expected=Expected(400, body=b"bad")),
    Scenario(
        "answers 500 of the handler, counted by its status",
        "/broken",
        expected=Expected(500, body=b"broken", error="500"),
    ),
    Scenario("passes the query over in the path", "/plain?token=1", expected=Expected(200)),
    Scenario(
        "reads a body",
        "/upload",
        "POST",
        body=UPLOAD,
        strict=False,
        expected=Expected(200, body=b"500"),
    ),
    Scenario(
        "reads a body without a length",
        "/upload",
        "POST",
        body=UPLOAD,
        chunked=True,
        strict=False,
        expected=Expected(200, body=b"500"),
        but={
            "wsgi": {},
            # Django under WSGI reads no body without a length; under ASGI it has read it before
            # any middleware runs, and only an edge outside of it sees how long it was.
            "django": {"body": b"0", "received": 0},
            "django-async": {"received": 0},
        },
    ),
    Scenario(
        "names the route by its template, converters aside",
        "/items/7",
        expected=Expected(200, "/items/{id}", body=b"item 7"),
    ),
    Scenario(
        "names the whole template behind a router, blueprint or include",
        "/api/v1/users/ann",
        expected=Expected(200, "/api/v1/users/{name}", body=b"user ann"),
    ),
    Scenario(
        "names the whole template behind a mount with a parameter",
        "/tenants/t1/things/5",
        expected=Expected(200, "/tenants/{tenant}/things/{thing}", body=b"t1 5"),
    ),
    Scenario("serves decorated functions", "/decorated", expected=Expected(200, body=b"wrapped")),
    Scenario("serves bound methods", "/method", expected=Expected(200, body=b"method")),
    Scenario("serves class-based views", "/class", expected=Expected(200, body=b"class")),
    Scenario("answers 404", "/nowhere/1", expected=Expected(404, UNMATCHED)),
    Scenario("answers 404 below a mount", "/tenants/t1/nothing", expected=Expected(404, UNMATCHED)),
    Scenario("answers 405 under the route it refused", "/plain", "DELETE", expected=Expected(405)),
    Scenario(
        "counts unknown methods together",
        "/plain",
        "BOGUS",
        expected=Expected(405, method="_OTHER"),
    ),
    Scenario(
        "counts methods together that are known to servers, but not to HTTP itself",
        "/plain",
        "PURGE",
        in_process=False,  # `wsgiref.validate` takes it for a mistake
        expected=Expected(405, method="_OTHER"),
    ),
    Scenario(
        "answers HEAD with the headers of GET where the framework does",
        "/plain",
        "HEAD",
        expected=Expected(200, body=b"", size=0),
        # Starlette's and Flask's own rules: an API route refuses HEAD; Django leaves the body to
        # the server, as plain apps do.
        but={
            "fastapi": {"status": 405, "size": 31},
            "django": {"size": 5},
            "django-async": {"size": 5},
            "asgi": {"size": 5},
            "wsgi": {"size": 5},
        },
    ),
    Scenario(
        "counts an unhandled exception once and lets it through",
        "/boom",
        expected=Expected(500, error="Boom", answer_is_ours=True),
        but={
            "asgi": {"raises": "Boom"},
            "wsgi": {"raises": "Boom"},
            "fastapi": {"raises": "Boom", "answer_is_ours": False},
            **both(("flask", "django", "django-async"), answer_is_ours=False),
        },
    ),
    Scenario(
        "streams a thousand chunks",
        "/stream",
        expected=Expected(200, body=b"0123456789" * 1000),
    ),
    Scenario(
        "counts an exception in mid-stream under the status that was sent",
        "/midway",
        expected=Expected(200, error="Boom", raises="Boom", size=6),
    ),
    Scenario(
        "records a client that leaves as 499",
        "/endless",
        leave="chunk",
        expected=Expected(200, recorded=499, size=-1),
    ),
    Scenario(
        "records a client that leaves while it uploads as 499",
        "/upload",
        "POST",
        body=UPLOAD,
        leave="upload",
        expected=Expected(None, recorded=499, size=0),
        only=ASGI,  # a WSGI server reads the body for the app: what it does then is its own
        # Django reads the body before any middleware runs, so only an edge outside of it sees.
        # FastAPI answers nobody with a 500.
        but={"django-async": {"logged": False}, "fastapi": {"size": 21}},
    ),
    Scenario("runs background work after the last byte", "/background", expected=Expected(200)),
    Scenario(
        "knows the id in handlers", "/ids", headers=(("X-Request-ID", "abc-1"),), tells_ids=True
    ),
    Scenario(
        "knows the id in threads", "/thread", headers=(("X-Request-ID", "abc-2"),), tells_ids=True
    ),
    Scenario("writes bound fields", "/bound", expected=Expected(200)),
    Scenario("leaves an id header that the app sets alone", "/own-id", expected=Expected(200)),
    Scenario(
        "refuses at the route before body, dependencies and handler",
        "/refused/9",
        "POST",
        body=b"never read",
        expected=Expected(418, "/refused/{id}", body=b"no", answer_is_ours=True),
    ),
    Scenario(
        "refuses at the edge before routing",
        "/edge-refused",
        expected=Expected(418, UNMATCHED, body=b"no", answer_is_ours=True),
    ),
    Scenario("sends a file", "/file", expected=Expected(200, body=b"file" * 1000)),
    Scenario("serves a route whose exception the app handles", "/handled", expected=Expected(409)),
    Scenario("starts the answer in its iterable", "/lazy", only=("wsgi",)),
    Scenario("writes by write()", "/write", only=("wsgi",), expected=Expected(body=b"written")),
    Scenario(
        "starts again with exc_info",
        "/restart",
        only=("wsgi",),
        expected=Expected(503, body=b"restarted", error="503"),
    ),
    Scenario("answers a health probe without a line", "/health", expected=Expected(logged=False)),
)
"""Scenarios of one request. Those of several are tests of their own."""
