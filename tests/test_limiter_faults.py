"""A Redis that fails in every way it can: each is StoreDown, in time, and never another's reply."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from opsguard.clock import elapsed
from opsguard.limiter.breaker import Breaker
from opsguard.limiter.connections import Deadline, TimedSocket
from opsguard.limiter.fallback import FallbackStore
from opsguard.limiter.local import LocalStore
from opsguard.limiter.rates import Rate
from opsguard.limiter.redis import RedisStore
from opsguard.limiter.stores import Charge, StoreDown, Verdict
from tests.ports import free_port
from tests.redis_server import RedisServer, running
from tests.stalls import STALL

LIMIT = 0.025
TEN = Rate(10, 3600, "10 per 1 hour")
ONE = [Charge("k", TEN, "fixed", 1)]

Ask = Callable[[], Verdict]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    with running(tmp_path) as server:
        yield server


@pytest.fixture(params=["threads", "loop"])
def driver(request: pytest.FixtureRequest) -> Iterator[Callable[[RedisStore], Ask]]:
    """How a store is asked for ONE: by a thread, or on an event loop that lives for the test."""
    if request.param == "threads":
        yield lambda store: lambda: store.take(ONE)
        return
    stores: list[RedisStore] = []
    with asyncio.Runner() as runner:

        def ask(store: RedisStore) -> Ask:
            stores.append(store)  # else the collector may find it while the loop still runs

            async def once() -> Verdict:
                await asyncio.sleep(0.001)  # lets the loop see what has happened to its sockets
                return await store.atake(ONE)

            return lambda: runner.run(once())

        yield ask


def down(ask: Ask, within: float = LIMIT + STALL) -> str:
    """Ask, and be told in time that the store is down; what it said."""
    begun = time.monotonic()
    with pytest.raises(StoreDown) as told:
        ask()
    assert time.monotonic() - begun < within
    return str(told.value)


def patient(server: RedisServer) -> RedisStore:
    return RedisStore(server.url, timeout=2.0)


def test_connection_refused(driver: Callable[[RedisStore], Ask]) -> None:
    ask = driver(RedisStore(f"redis://127.0.0.1:{free_port()}", timeout=2.0))

    assert "refused" in down(ask) or "Connect call failed" in down(ask)


def test_no_such_host(driver: Callable[[RedisStore], Ask]) -> None:
    down(driver(RedisStore("redis://nobody.invalid:6379", timeout=2.0)), within=10)


def test_black_holed_from_the_start(
    server: RedisServer, driver: Callable[[RedisStore], Ask]
) -> None:
    server.freeze()

    ask = driver(RedisStore(server.url, timeout=LIMIT))

    for _ in range(3):
        down(ask)
    server.thaw()


def test_black_holed_in_the_middle_and_back(
    server: RedisServer, driver: Callable[[RedisStore], Ask]
) -> None:
    store = RedisStore(server.url, timeout=LIMIT)
    ask = driver(store)
    answered(ask)  # the first one connects, which may take its time
    server.freeze()
    for _ in range(3):
        down(ask)
    server.thaw()

    # It has counted what it was asked while frozen, and answers this one with its own number.
    assert answered(ask).allowed


def answered(ask: Ask) -> Verdict:
    """What it says once it says something: a busy machine may need more than the time limit."""
    deadline = time.monotonic() + 5.0
    while True:
        try:
            return ask()
        except StoreDown:
            if time.monotonic() > deadline:
                raise


def test_killed_and_restarted(server: RedisServer, driver: Callable[[RedisStore], Ask]) -> None:
    ask = driver(patient(server))
    assert ask().remaining == 9
    server.kill()
    down(ask, within=2.0)
    server.start()

    assert ask().remaining == 9  # an empty server that has never seen the script


def test_read_only_replica(server: RedisServer, driver: Callable[[RedisStore], Ask]) -> None:
    ask = driver(patient(server))
    assert ask().allowed
    with server.client() as client:
        client.execute_command("REPLICAOF", "127.0.0.1", free_port())
        assert "READONLY" in down(ask, within=2.0).upper().replace("READ ONLY", "READONLY")
        client.execute_command("REPLICAOF", "NO", "ONE")

    assert ask().remaining == 8


def test_out_of_memory(server: RedisServer, driver: Callable[[RedisStore], Ask]) -> None:
    ask = driver(patient(server))
    assert ask().allowed
    with server.client() as client:
        client.config_set("maxmemory-policy", "noeviction")
        client.config_set("maxmemory", 1)
        assert "maxmemory" in down(ask, within=2.0)
        client.config_set("maxmemory", 0)

    assert ask().remaining == 8


def test_loading(tmp_path: Path, driver: Callable[[RedisStore], Ask]) -> None:
    with running(tmp_path, "--rdbcompression", "no") as server:
        with server.client() as client:
            for number in range(40):
                client.set(f"filler:{number}", b"x" * 1_000_000)
            client.save()
        server.kill()
        # A pause after each key; every 2 MB it says that it is loading.
        server.start("--key-load-delay", "50000")

        assert "loading" in down(driver(patient(server)), within=2.0).lower()


def test_a_key_of_another_type_takes_nothing(
    server: RedisServer, driver: Callable[[RedisStore], Ask]
) -> None:
    store = patient(server)
    ask = driver(store)
    with server.client() as client:
        client.lpush("opsguard:f:k", "somebody else's")
        assert "WRONGTYPE" in down(ask, within=2.0)
        with pytest.raises(StoreDown):
            store.take([Charge("j", TEN, "gcra", 1), *ONE])
        assert client.keys("opsguard:g:*") == []
        client.delete("opsguard:f:k")

    assert ask().remaining == 9


def test_password_changed(server: RedisServer, driver: Callable[[RedisStore], Ask]) -> None:
    ask = driver(patient(server))
    assert ask().allowed
    with server.client() as client:
        client.config_set("requirepass", "new")
        client.client_kill_filter(_type="normal", skipme=True)
        assert "auth" in down(ask, within=2.0).lower()
        client.config_set("requirepass", "")

    assert ask().remaining == 8


def test_wrong_password_does_not_show_in_the_error(
    server: RedisServer, driver: Callable[[RedisStore], Ask]
) -> None:
    with server.client() as client:
        client.config_set("requirepass", "right")

        store = RedisStore(f"redis://:wrong-one@127.0.0.1:{server.port}", timeout=2.0)
        assert "wrong-one" not in down(driver(store), within=2.0)


def test_lost_script_and_lost_connection(
    server: RedisServer, driver: Callable[[RedisStore], Ask]
) -> None:
    ask = driver(patient(server))
    assert ask().remaining == 9
    with server.client() as client:
        client.script_flush()
        client.client_kill_filter(_type="normal", skipme=True)

    assert ask().remaining == 8


# A network that misbehaves ------------------------------------------------------------------------


class Proxy:
    """Between a client and the server; `reply` says what becomes of the server's bytes."""

    def __init__(self, server: RedisServer) -> None:
        self._server = server
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{self._listener.getsockname()[1]}"
        self.reply: Callable[[socket.socket, bytes], None] = socket.socket.sendall
        self.accepted = 0
        self._sockets: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                self.accepted += 1
                far = socket.create_connection(("127.0.0.1", self._server.port))
                self._sockets += [near, far]
                for source, target, back in ((near, far, False), (far, near, True)):
                    threading.Thread(
                        target=self._pump, args=(source, target, back), daemon=True
                    ).start()

    def _pump(self, source: socket.socket, target: socket.socket, back: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if back:
                    self.reply(target, data)
                else:
                    target.sendall(data)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for end in self._sockets:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


@pytest.fixture
def proxy(server: RedisServer) -> Iterator[Proxy]:
    proxy = Proxy(server)
    yield proxy
    proxy.close()


def test_a_reply_cut_in_the_middle(proxy: Proxy, driver: Callable[[RedisStore], Ask]) -> None:
    def cut(target: socket.socket, data: bytes) -> None:
        target.sendall(data[:3])
        target.shutdown(socket.SHUT_RDWR)

    ask = driver(RedisStore(proxy.url, timeout=2.0))
    assert ask().remaining == 9
    proxy.reply = cut
    down(ask, within=2.0)
    proxy.reply = socket.socket.sendall

    assert ask().remaining == 7  # the one that was cut had been counted


def test_a_reply_that_comes_byte_by_byte(proxy: Proxy, driver: Callable[[RedisStore], Ask]) -> None:
    """Each byte arrives within the limit, the whole does not."""

    def drip(target: socket.socket, data: bytes) -> None:
        for position in range(len(data)):
            target.sendall(data[position : position + 1])
            time.sleep(0.4)

    ask = driver(RedisStore(proxy.url, timeout=0.5))
    ask()
    proxy.reply = drip

    down(ask, within=0.5 + STALL)


def test_a_name_with_several_addresses_takes_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which each leaves those who connect waiting: the one deadline is for all."""
    with contextlib.ExitStack() as stack:
        addresses = []
        for _ in range(3):
            full = stack.enter_context(socket.socket())
            full.bind(("127.0.0.1", 0))
            full.listen(0)
            addresses.append(full.getsockname())
            for _ in range(4):
                filling = stack.enter_context(socket.socket())
                filling.setblocking(False)
                filling.connect_ex(full.getsockname())
        found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", address) for address in addresses]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_: found)
        store = RedisStore("redis://several.example:6379", timeout=1.0)
        began = time.monotonic()
        with pytest.raises(StoreDown):
            store.take(ONE)
        assert 0.9 < time.monotonic() - began < 1.0 + STALL


def test_a_deadline_covers_all_calls_of_a_socket() -> None:
    clock = [10.0]
    deadline = Deadline(lambda: clock[0])
    near, far = socket.socketpair()
    with near, far:
        timed = TimedSocket(near, deadline)
        deadline.until = 11.0
        far.sendall(b"abc")
        assert timed.recv(1) == b"a"
        assert timed.recv_into(bytearray(1), 1) == 1
        timed.sendall(b"x")
        assert far.recv(1) == b"x"
        assert timed.fileno() == near.fileno()

        clock[0] = 11.0
        with pytest.raises(TimeoutError):
            timed.recv(1)
        timed.settimeout(0)  # to look whether there is something takes no time
        assert timed.recv(1) == b"c"


def test_a_late_reply_is_nobody_elses(proxy: Proxy, driver: Callable[[RedisStore], Ask]) -> None:
    def late(target: socket.socket, data: bytes) -> None:
        time.sleep(1.0)
        target.sendall(data)

    ask = driver(RedisStore(proxy.url, timeout=0.5))
    assert ask().remaining == 9
    proxy.reply = late
    down(ask, within=0.5 + STALL)
    proxy.reply = socket.socket.sendall
    time.sleep(1.0)

    assert [ask().remaining for _ in range(3)] == [7, 6, 5]
    assert proxy.accepted == 2


def test_garbage_for_a_reply(proxy: Proxy, driver: Callable[[RedisStore], Ask]) -> None:
    for garbage in (b"HTTP/1.1 400 Bad Request\r\n\r\n", b"*1\r\n:1\r\n", b"$-1\r\n", b"+OK\r\n"):
        proxy.reply = socket.socket.sendall
        ask = driver(RedisStore(proxy.url, timeout=2.0))
        ask()

        def reply(target: socket.socket, data: bytes, garbage: bytes = garbage) -> None:
            target.sendall(garbage)

        proxy.reply = reply
        down(ask, within=2.0)


def test_cancelled_calls_leave_no_reply_behind(proxy: Proxy) -> None:
    """Half of the calls are cancelled at odd moments; the others get their own bucket's answer."""

    def slow(target: socket.socket, data: bytes) -> None:
        time.sleep(0.002)
        target.sendall(data)

    proxy.reply = slow
    store = RedisStore(proxy.url, timeout=5.0, connections=4)

    async def one(number: int) -> tuple[int, Verdict]:
        rate = Rate(1000 + number, 3600, "many")
        return number, await store.atake([Charge(f"bucket-{number}", rate, "fixed", 1)])

    async def main() -> None:
        tasks = [asyncio.create_task(one(number)) for number in range(120)]
        for task in tasks[::2]:
            await asyncio.sleep(0.0013)
            task.cancel()
        kept = await asyncio.gather(*tasks[1::2])
        for number, verdict in kept:
            assert verdict.remaining == 999 + number
        await asyncio.gather(*tasks, return_exceptions=True)
        assert (await one(500))[1].remaining == 1499

    asyncio.run(main())


def test_a_time_limit_of_the_caller_is_a_cancellation_too(server: RedisServer) -> None:
    store = RedisStore(server.url, timeout=5.0)

    async def main() -> None:
        await store.atake(ONE)
        server.freeze()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(store.atake(ONE), 0.02)
        server.thaw()
        assert (await store.atake([Charge("other", TEN, "fixed", 3)])).remaining == 7

    asyncio.run(main())


# The whole ----------------------------------------------------------------------------------------


def guarded(server: RedisServer, delay: float = 0.2) -> tuple[FallbackStore, list[str]]:
    reports: list[str] = []
    store = FallbackStore(
        RedisStore(server.url, timeout=LIMIT),
        LocalStore(),
        breaker=Breaker(clock=elapsed, threshold=3, delay=delay),
        report=lambda site, error, then="": reports.append(site),
    )
    return store, reports


@pytest.mark.parametrize("how", ["freeze", "kill"])
@pytest.mark.parametrize("asynchronous", [False, True], ids=["threads", "loop"])
def test_the_service_lives_on_without_redis_and_goes_back_to_it(
    server: RedisServer, how: str, asynchronous: bool
) -> None:
    store, reports = guarded(server)

    async def ask() -> Verdict:
        return await store.atake(ONE) if asynchronous else store.take(ONE)

    async def main() -> None:
        await ask()
        getattr(server, how)()
        slow = 0
        for _ in range(50):
            begun = time.monotonic()
            await ask()
            took = time.monotonic() - begun
            assert took < LIMIT + STALL
            slow += took > LIMIT / 2
        assert store.down
        assert slow <= 3 + 7  # the threshold, and what a busy machine may do
        assert not (await ask()).allowed  # the local limit holds
        assert len(reports) >= 3

        server.thaw() if how == "freeze" else server.start()
        with server.client() as client:
            client.flushall()
        begun = time.monotonic()
        while store.down:
            assert time.monotonic() - begun < 5, "recovery within 5 seconds"
            await ask()
            await asyncio.sleep(0.02)
        assert (await ask()).allowed
        await store.aclose()

    asyncio.run(main())
    store.close()


def test_while_the_breaker_is_open_a_decision_is_quick(server: RedisServer) -> None:
    store, _ = guarded(server, delay=60.0)
    server.kill()
    while not store.down:
        store.take(ONE)

    begun = time.perf_counter()
    for _ in range(1000):
        store.take(ONE)
    took = time.perf_counter() - begun

    assert took / 1000 < 0.001
