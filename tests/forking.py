"""What is tried with forks, in a process of its own (see test_forks.py): ``python -m tests.forking
scenario folder``. Under pytest a child would start anew what all other tests left behind.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import signal
import sys
import threading
import time
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import tests.coverage_over_forks  # noqa: F401  (before anything else registers for forks)

# isort: split
import opsguard_wsgi
from opsguard import OpsGuard, forks
from opsguard.limiter.local import LocalStore
from opsguard.testing import Answer, Request, call_wsgi

DEADLINE = 30.0
LOCKS = (type(threading.Lock()), type(threading.RLock()))
CONTAINERS = (dict, list, tuple, set, frozenset, deque, types.CellType, types.MethodType, partial)


def shop(environ: Any, start_response: Callable[..., Any]) -> list[bytes]:
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [b"hello"]


class Served:
    """An app with all that we have, and what a worker does with it."""

    def __init__(self, folder: Path, **logging: Any) -> None:
        self.log = folder / "log"
        self.ops = OpsGuard(
            "forks",
            metrics={"directory": str(folder / "metrics")},
            logging={"file": str(self.log), **logging},
            limiter={
                "policies": {
                    "/window": "1000000/hour",
                    "/gcra": {"rate": "1000000/hour", "strategy": "gcra"},
                    "/many": {"rate": "1000/minute", "strategy": "concurrency"},
                },
                "tiers": {"pro": "1000000/minute"},
            },
            keys={
                "pepper": "p" * 32,
                "store": f"sqlite:///{folder / 'keys.db'}",
                "required": ["/keyed"],
                "max_failures": 1_000_000,
            },
        )
        self.done = self.ops.metrics.counter("done_total", "Done.", ("what",))
        self.took = self.ops.metrics.histogram("took_seconds", "Took.")
        self.app = opsguard_wsgi.install(
            shop, self.ops, endpoint=lambda environ: environ["PATH_INFO"]
        )
        self.key = self.ops.keys.create(tenant_id="t", tier="pro", name="n")
        self.work("before")

    def get(self, path: str, *headers: tuple[str, str]) -> Answer:
        return call_wsgi(self.app, Request(path, headers=headers))

    def work(self, name: str) -> None:
        """Everything once, with `name` in its log line."""
        for path in ("/window", "/gcra", "/many", f"/by/{name}"):
            assert self.get(path).status == 200
        assert self.get("/keyed", ("x-api-key", self.key)).status == 200
        assert self.get("/keyed", ("x-api-key", "no key")).status == 401
        self.done.labels(what=f"work {name}").inc()
        self.took.observe(0.1)
        self.ops.logger("shop").info("done", who=name)
        self.ops.limiter.explain("/window")
        self.ops.set_log_level("INFO", "shop")
        self.ops.board.refresh()
        scraped = self.get("/metrics")
        assert scraped.status == 200
        assert f'done_total{{what="work {name}"}}' in scraped.body.decode()
        self.ops.runtime().sink.flush()


def ours(module: str | None) -> bool:
    return bool(module) and str(module).partition(".")[0].startswith(("opsguard", "_speed"))


def inside(thing: object) -> Iterable[object]:
    """What it is made of, if that may be ours."""
    kind = type(thing)
    if isinstance(thing, types.ModuleType):
        return vars(thing).values() if ours(thing.__name__) else ()
    if isinstance(thing, types.FunctionType):
        known = (*(thing.__closure__ or ()), *(thing.__defaults__ or ()))
        return known if ours(thing.__module__) else ()
    if isinstance(thing, type):
        return vars(thing).values() if ours(thing.__module__) else ()
    plain = kind in CONTAINERS or kind.__module__ in ("weakref", "_weakrefset", "functools")
    waits = kind.__module__ == "threading" and not isinstance(thing, threading.Thread)
    return gc.get_referents(thing) if plain or waits or ours(kind.__module__) else ()


def locks(*roots: object) -> list[tuple[str, Any]]:
    """Every lock that can be reached from there through things of ours, and where it was found."""
    modules = [module for name, module in list(sys.modules.items()) if ours(name)]
    waiting = deque((root, type(root).__name__) for root in (*roots, *modules))
    seen: set[int] = set()
    found = []
    while waiting:
        thing, where = waiting.popleft()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, LOCKS):
            found.append((where, thing))
            continue
        name = f"{where} > {type(thing).__name__}" if ours(type(thing).__module__) else where
        waiting.extend((one, name) for one in inside(thing))
    return found


@contextmanager
def held(wanted: Iterable[Any]) -> Iterator[None]:
    """Another thread holds these."""
    taken, over = threading.Event(), threading.Event()

    def hold() -> None:
        have = [lock for lock in wanted if lock.acquire(timeout=5.0)]
        taken.set()
        over.wait()
        for lock in have:
            lock.release()

    holder = threading.Thread(target=hold)
    holder.start()
    assert taken.wait(DEADLINE)
    try:
        yield
    finally:
        over.set()
        holder.join()


def forked(work: Callable[[], object]) -> int:
    """The pid of a child that does this and ends: with 0, or where it hung or what it raised."""
    child = os.fork()
    if child:
        return child
    try:
        work()
        os._exit(0)
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
    finally:
        os._exit(1)


def ended(child: int) -> int:
    """Its exit code. If it takes too long it is ended, and says where it was."""
    deadline = time.monotonic() + DEADLINE
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, signal.SIGABRT)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def the_search_finds_the_locks_of_all_rooms(folder: Path) -> None:
    served = Served(folder)
    where = " ".join(place for place, _ in locks(served.ops, served.app))
    rooms = ("Store", "Sink", "LocalStore", "Verifier", "Keys", "KeyGuard", "AccessLog")
    assert [room for room in rooms if room not in where] == []


def a_child_forked_while_all_locks_are_held_works(folder: Path) -> None:
    """Those that a fork waits for are let go of in time, as they are in use; all others are not."""
    served = Served(folder)
    stores = {id(store.lock) for store in gc.get_objects() if isinstance(store, LocalStore)}
    found = [lock for _, lock in locks(served.ops, served.app) if id(lock) not in stores]
    assert len(found) > 8
    with held(found):
        child = forked(lambda: served.work("child"))
    assert ended(child) == 0
    served.work("parent")


def all_locks_are_free_when_the_first_starts_over(folder: Path) -> None:
    """Also those of modules, and those that the fork itself took: who starts over may log, to a
    handler of the user's, which may do anything.
    """
    served = Served(folder)
    stores = {id(store.lock) for store in gc.get_objects() if isinstance(store, LocalStore)}
    found = [lock for _, lock in locks(served.ops, served.app) if id(lock) not in stores]
    taken: list[str] = []

    def take_all(served: Served) -> None:
        for where, lock in locks(served.ops, served.app):
            if lock.acquire(timeout=1.0):
                lock.release()
            else:
                taken.append(where)

    others = dict(forks._starting)
    forks._starting.clear()
    forks.start_over(served, take_all)
    forks._starting.update(others)

    def told() -> None:
        assert taken == [], taken
        served.work("child")

    with held(found):
        child = forked(told)
    assert ended(child) == 0


def a_fork_waits_for_what_it_must_not_cut_in_two(folder: Path) -> None:
    served = Served(folder)
    stores = [store for store in gc.get_objects() if isinstance(store, LocalStore)]
    with held([store.lock for store in stores]):
        threading.Timer(0.1, lambda: [store.lock.release() for store in stores]).start()
        child = forked(lambda: served.work("child"))
        assert ended(child) == 0
        for store in stores:
            store.lock.acquire()  # for who holds them to let go of


def what_was_logged_before_a_fork_is_written_once(folder: Path) -> None:
    """Lines and requests that wait for their batch belong to the parent."""
    served = Served(folder, durability="batch")
    for number in range(200):
        served.get(f"/{number}")
        served.ops.logger("shop").info("line", number=number)
        if number % 50 == 0:
            assert ended(forked(partial(served.work, f"child-{number}"))) == 0
    served.ops.runtime().sink.flush()
    lines = [json.loads(line) for line in served.log.read_text().splitlines()]
    paths = [line.get("path") for line in lines]
    assert [paths.count(f"/{number}") for number in range(200)] == [1] * 200
    numbers = [line.get("number") for line in lines]
    assert [numbers.count(number) for number in range(200)] == [1] * 200
    assert [paths.count(f"/by/child-{number}") for number in range(0, 200, 50)] == [1] * 4


def forks_under_load_hang_nobody(folder: Path, forks: int = 100) -> None:
    """Threads serve, count, log and limit all the time, and each child does as well."""
    served = Served(folder)
    over = threading.Event()
    faults: list[BaseException] = []

    def load(name: str) -> None:
        while not over.is_set():
            try:
                served.work(name)
            except BaseException as error:
                faults.append(error)
                return

    threads = [threading.Thread(target=load, args=(f"thread-{n}",)) for n in range(3)]
    for thread in threads:
        thread.start()
    try:
        codes = [ended(forked(lambda: served.work("child"))) for _ in range(forks)]
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert faults == []
    assert codes == [0] * forks


if __name__ == "__main__":
    faulthandler.enable()
    scenario, place, *numbers = sys.argv[1:]
    globals()[scenario](Path(place), *map(int, numbers))
