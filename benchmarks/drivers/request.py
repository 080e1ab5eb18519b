"""One realistic request, in the forms the drivers need.

Ten headers, as a browser behind a proxy sends them; one with an API key has eleven. Everything a
server would allocate for a request is allocated anew for each: an app must not find its caches
warmed by shared objects.
"""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from typing import Any

Headers = tuple[tuple[str, str], ...]
HEADERS: Headers = (
    ("host", "shop.example.com"),
    ("user-agent", "Mozilla/5.0 (X11; Linux x86_64; rv:145.0) Gecko/20100101 Firefox/145.0"),
    ("accept", "text/html,application/xhtml+xml,application/json;q=0.9,*/*;q=0.8"),
    ("accept-language", "en-GB,en;q=0.7,de;q=0.3"),
    ("accept-encoding", "gzip, deflate, br, zstd"),
    ("referer", "https://shop.example.com/catalogue?page=2"),
    ("x-forwarded-for", "203.0.113.7"),
    ("x-forwarded-proto", "https"),
    ("sec-fetch-mode", "navigate"),
    ("cache-control", "max-age=0"),
)
CLIENT = "198.51.100.4"
# As minted: prefix, tier, id, 256 bits of secret. It opens nothing but the apps under test.
KEY = "ops_pro_CI5CFKlFNXfs_fYQc87OMjaGdlpbCB0GNEPCr990RtoreVy0x70an4D8"
KEYED: Headers = (*HEADERS, ("x-api-key", KEY))
"""The request of a client that has an API key."""


def with_encoding(headers: Headers, encoding: str) -> Headers:
    """The headers with another Accept-Encoding."""
    return tuple(
        (name, encoding if name == "accept-encoding" else value) for name, value in headers
    )


def wire(path: str, headers: Headers = HEADERS) -> bytes:
    """The request as bytes on the wire, HTTP/1.1 with keep-alive."""
    lines = [f"GET {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers)]
    lines += ["", ""]
    return "\r\n".join(lines).encode("ascii")


def _offsets(headers: Headers) -> tuple[bytes, tuple[tuple[int, int, int, int], ...]]:
    blob, offsets = b"", []
    for name, value in headers:
        start = len(blob)
        middle, end = start + len(name), start + len(name) + len(value)
        blob += (name + value).encode("ascii")
        offsets.append((start, middle, middle, end))
    return blob, tuple(offsets)


def scopes(headers: Headers = HEADERS) -> Callable[[str], dict[str, Any]]:
    """What makes a fresh ASGI scope for a path."""
    blob, offsets = _offsets(headers)

    def scope(path: str) -> dict[str, Any]:
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "server": ("127.0.0.1", 8000),
            "client": (CLIENT, 50_000),
            "scheme": "http",
            "root_path": "",
            "headers": [(blob[a:b], blob[c:d]) for a, b, c, d in offsets],
            "state": {},
            "method": "GET",
            "path": path,
            "raw_path": path.encode("ascii"),
            "query_string": b"",
        }

    return scope


_ENVIRON: dict[str, Any] = {
    "wsgi.version": (1, 0),
    "wsgi.url_scheme": "http",
    "wsgi.multithread": False,
    "wsgi.multiprocess": False,
    "wsgi.run_once": False,
    "SERVER_NAME": "127.0.0.1",
    "SERVER_PORT": "8000",
    "SERVER_PROTOCOL": "HTTP/1.1",
    "REMOTE_ADDR": CLIENT,
    "REMOTE_PORT": "50000",
    "REQUEST_METHOD": "GET",
    "SCRIPT_NAME": "",
    "QUERY_STRING": "",
}


def environs(errors: Any, headers: Headers = HEADERS) -> Callable[[str], dict[str, Any]]:
    """What makes a fresh WSGI environ for a path; ``errors`` is its ``wsgi.errors``."""
    blob, offsets = _offsets(headers)
    names = ["HTTP_" + name.upper().replace("-", "_") for name, _ in headers]
    values = [(name, at[2], at[3]) for name, at in zip(names, offsets, strict=True)]

    def environ(path: str) -> dict[str, Any]:
        found = dict(_ENVIRON)
        for name, start, end in values:
            found[name] = blob[start:end].decode("latin-1")
        found["PATH_INFO"] = path
        found["wsgi.input"] = BytesIO()
        found["wsgi.errors"] = errors
        return found

    return environ
