"""Apps below a path of the server's: root_path (ASGI) and SCRIPT_NAME (WSGI)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from opsguard.testing import Request
from tests.contract.scenarios import ADAPTERS, ASGI, UNMATCHED
from tests.servers.processes import SERVERS, Running, running, until

pytestmark = pytest.mark.servers

ROOT = "/api"


@dataclass(frozen=True, slots=True)
class Row:
    path: str
    endpoint: str
    status: int = 200
    method: str = "GET"


ROWS = [
    Row("/plain", "/plain"),
    Row("/items/7", "/items/{id}"),
    Row("/api/v1/users/ann", "/api/v1/users/{name}"),
    Row("/tenants/t1/things/5", "/tenants/{tenant}/things/{thing}"),
    Row("/nowhere", UNMATCHED, 404),
    Row("/plain", "/plain", 405, "DELETE"),
]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((server.name, adapter), id=f"{server.name} {adapter}",
                     marks=[pytest.mark.full] if server.full else [])
        for server in SERVERS.values()
        for adapter in ADAPTERS
        if (adapter in ASGI) == (server.protocol == "asgi")
        and server.name in ("uvicorn-httptools", "uvicorn-h11", "gunicorn-gthread", "gunicorn-sync")
    ],
)  # fmt: skip
def below(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    name, app = request.param
    asgi = SERVERS[name].protocol == "asgi"
    arguments = ("--root-path", ROOT) if asgi else ()
    environ = {} if asgi else {"SCRIPT_NAME": ROOT}
    folder = tmp_path_factory.mktemp("below")
    with running(SERVERS[name], app, folder, *arguments, environ=environ) as found:
        yield found


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.method} {row.path}")
def test_the_label_is_the_same_as_at_the_root(below: Running, row: Row) -> None:
    """The template is the app's own; only the logged path is the whole one."""
    mark, before = below.mark(), below.samples()
    # uvicorn puts its root before what the proxy left; gunicorn takes it away from the whole path.
    answer = below.ask(Request(below.root + row.path, row.method))
    assert answer.status == row.status
    (line,) = until(lambda: below.access(mark))
    assert (line["endpoint"], line["path"]) == (row.endpoint, ROOT + row.path)
    key = frozenset(
        {("method", row.method), ("endpoint", row.endpoint), ("status", str(row.status))}
    )
    assert until(lambda: below.since(before).get(("http_requests_total", key))) == 1


def test_metrics_are_found_below_the_root(below: Running) -> None:
    assert b"http_requests_total" in below.get(f"{below.root}/metrics").body
