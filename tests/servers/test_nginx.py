"""The nginx of the deployment page, as it stands there, before real servers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from websockets.sync.client import connect

from opsguard.testing import Request
from tests.ports import free_port
from tests.servers.client import Client
from tests.servers.processes import ROOT, SERVERS, Running, running, until

NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin")

pytestmark = [
    pytest.mark.servers,
    pytest.mark.skipif(NGINX is None, reason="needs nginx"),
    pytest.mark.skipif(sys.platform != "linux", reason="needs all of 127.0.0.0/8"),
]

CLIENT = "127.0.0.2"
"""The address the client has, where the proxy has 127.0.0.1."""
PAGE = ROOT / "docs" / "how-to" / "deployment.md"
CONFIGURATION = """
pid {folder}/nginx.pid;
daemon off;
master_process off;
events {{}}
http {{
    log_format ids '$request_id $status';
    access_log {folder}/access ids;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    {page}
}}
"""


@dataclass(frozen=True, slots=True)
class Proxied:
    """An app behind nginx."""

    app: Running
    port: int
    folder: Path

    def client(self) -> Client:
        return Client(self.port, address=CLIENT)

    def line(self, mark: int, path: str) -> dict[str, Any]:
        """The app's access line for this path since `mark`; others may still be on their way."""
        found = until(lambda: [one for one in self.app.access(mark) if one["path"] == path])
        (line,) = found
        return line

    def logged(self) -> list[list[str]]:
        """Id and status of each request, as nginx saw it."""
        return [line.split() for line in (self.folder / "access").read_text().splitlines()]


def on_the_page(language: str, *, holding: str) -> str:
    """A block of the deployment page."""
    found = re.findall(rf"```{language}\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)
    (block,) = [text for text in found if holding in text]
    return str(block)


def nginx(upstream: str, port: int, folder: Path) -> subprocess.Popen[bytes]:
    """The page's nginx, with another address to listen at and another one to pass requests to."""
    block = on_the_page("nginx", holding="upstream shop")
    for old, new in (("127.0.0.1:8000", upstream), ("listen 80;", f"listen 127.0.0.1:{port};")):
        assert block.count(old) == 1
        block = block.replace(old, new)
    file = folder / "nginx.conf"
    file.write_text(CONFIGURATION.format(folder=folder, page=block))
    assert NGINX is not None
    return subprocess.Popen(
        [NGINX, "-p", str(folder), "-e", str(folder / "errors"), "-c", str(file)],
        stdin=subprocess.DEVNULL,
    )


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((server, app, socket), id=f"{server} {app}{' over a unix socket' * socket}",
                     marks=[pytest.mark.full] * full)
        for server, app, socket, full in (
            ("uvicorn-httptools", "fastapi", False, False),
            ("uvicorn-h11", "asgi", False, True),
            ("gunicorn-gthread", "flask", False, True),
            ("gunicorn-gthread", "django", True, False),
            ("gunicorn-sync", "wsgi", True, True),
            ("gunicorn-uvicorn", "asgi", True, True),
        )
    ],
)  # fmt: skip
def proxied(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Proxied]:
    server, app, unix = request.param
    folder, there, port = tmp_path_factory.mktemp("app"), tmp_path_factory.mktemp("n"), free_port()
    socket = there / "s"
    arguments = ("--bind", f"unix:{socket}", "--umask", "0") if unix else ()
    proxies = {"hops": 1} if unix else {"trusted": ["127.0.0.1"]}
    with running(SERVERS[server], app, folder, *arguments, settings={"proxies": proxies}) as found:
        process = nginx(f"unix:{socket}" if unix else f"127.0.0.1:{found.port}", port, there)
        try:
            made = Proxied(found, port, there)
            assert until(lambda: answers(made)), (there / "errors").read_text()
            yield made
        finally:
            process.terminate()
            process.wait(20)


def answers(made: Proxied) -> bool:
    try:
        with made.client() as client:
            return client.ask(Request("/plain")).status == 200
    except OSError:
        return False


def test_the_page_trusts_this_proxy() -> None:
    """The settings that the page puts beside it are those that are tried here."""
    assert 'trusted = ["127.0.0.1"]' in on_the_page("toml", holding="[proxies]")


def test_the_line_has_the_client_and_the_id_that_nginx_logs(proxied: Proxied) -> None:
    """Whatever the client says of both."""
    mark = proxied.app.mark()
    claims = (("X-Forwarded-For", "6.6.6.6"), ("X-Request-ID", "mine"))
    with proxied.client() as client:
        answer = client.ask(Request("/items/7", headers=claims))
    line = proxied.line(mark, "/items/7")
    assert (line["client"], line["endpoint"]) == (CLIENT, "/items/{id}")
    assert answer.header("x-request-id") == [line["request_id"]]
    assert until(lambda: [line["request_id"], "200"] in proxied.logged())


@pytest.mark.parametrize(
    "path", ["/metrics", "/metrics?x=1", "//metrics", "/x/../metrics", "/%6Detrics", "/metrics/"]
)
def test_nobody_reads_the_metrics_through_it(proxied: Proxied, path: str) -> None:
    with proxied.client() as client:
        answer = client.ask(Request(path))
    assert answer.status in (403, 404)
    assert b"http_requests_total" not in answer.body
    assert b"http_requests_total" in proxied.app.get("/metrics").body


def test_a_client_that_leaves_is_seen(proxied: Proxied) -> None:
    mark = proxied.app.mark()
    with proxied.client() as client:
        client.send(b"GET /endless HTTP/1.1\r\nHost: shop\r\n\r\n")
        client.answer(enough=12)
    line = proxied.line(mark, "/endless")
    assert (line["status_code"], line["client"]) == (499, CLIENT)


def test_a_websocket_passes(proxied: Proxied) -> None:
    if proxied.app.app not in ("asgi", "fastapi"):
        pytest.skip("WSGI has none")
    mark = proxied.app.mark()
    address = f"ws://127.0.0.1:{proxied.port}/ws"
    with connect(address, source_address=(CLIENT, 0), proxy=None, open_timeout=20) as socket:
        socket.send("one")
        assert str(socket.recv()).endswith(" one")
    line = proxied.line(mark, "/ws")
    assert (line["status_code"], line["client"]) == (101, CLIENT)
