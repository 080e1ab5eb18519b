"""Where keys are kept: what every store does alike, and what can be wrong with one."""

from __future__ import annotations

import gc
import os
import sqlite3
import stat
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from opsguard.exceptions import SettingsError
from opsguard.keys import KeyRecord, KeyStoreError, Store
from opsguard.keys import sqlite as sqlite_module
from opsguard.keys.fixed import DEMO, FixedKeys
from opsguard.keys.manager import open_store
from opsguard.keys.minting import pepper_check, sealed
from opsguard.keys.sql import SqlStore
from opsguard.keys.sqlite import SqliteStore
from opsguard.settings import StaticKey

PEPPER = b"a pepper of the tests"
FULL = KeyRecord(
    "full", b"\x01" * 32, "tenant-1", "pro", "Production", ("a", "b"), "u1", 10.5, 99.0
)
BARE = KeyRecord("bare", b"\x02" * 32, "tenant-2", "free", created=11.5)

Open = Callable[[], Store]


@pytest.fixture(params=["sqlite", "memory", "sqlalchemy"])
def open_(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Open]:
    """Opens one and the same place each time."""
    urls = {
        "sqlite": f"sqlite:///{tmp_path / 'keys.db'}",
        "memory": "sqlite://",
        "sqlalchemy": f"sqlite+pysqlite:///{tmp_path / 'keys.db'}",
    }
    opened: list[Store] = []

    def open_it() -> Store:
        if request.param == "memory" and opened:
            return opened[0]
        opened.append(open_store(urls[request.param], PEPPER))
        return opened[-1]

    yield open_it
    for store in opened:
        store.close()


# The contract.


def test_an_empty_store_knows_nobody_and_makes_nothing(open_: Open, tmp_path: Path) -> None:
    store = open_()
    assert list(tmp_path.iterdir()) == []
    found = store.find(bytes(32))
    assert found is None or not found.key_id
    assert store.get("full") is None
    assert list(store.all()) == []
    assert not store.revoke("full", 1.0)


def test_a_record_comes_back_as_it_was(open_: Open) -> None:
    store = open_()
    store.add(BARE)
    store.add(FULL)
    for again in (store, open_()):
        assert again.find(FULL.digest) == FULL
        assert again.find(BARE.digest) == BARE
        assert again.get("full") == FULL
        assert list(again.all()) == [FULL, BARE]  # the oldest first


def test_an_unknown_digest_is_answered_with_the_next_row_and_the_last_is_no_key(
    open_: Open,
) -> None:
    store = open_()
    store.add(FULL)
    assert store.find(bytes(32)) == FULL
    decoy = store.find(b"\x09" * 32)
    assert decoy is not None
    assert decoy.digest != b"\x09" * 32
    assert decoy.revoked is not None
    assert store.get("") is None
    assert not store.revoke("", 1.0)
    assert decoy not in store.all()


def test_revoking_happens_once(open_: Open) -> None:
    store = open_()
    store.add(FULL)
    assert store.revoke("full", 20.0)
    assert store.revoke("full", 30.0)
    assert not store.revoke("other", 30.0)
    record = store.find(FULL.digest)
    assert record is not None
    assert record.revoked == 20.0


def test_a_replaced_key_expires_in_the_same_step_and_never_later_than_before(open_: Open) -> None:
    store = open_()
    store.add(BARE)
    store.add(FULL, retire=("bare", 50.0))
    assert [record.expires for record in store.all()] == [99.0, 50.0]
    another = KeyRecord("third", b"\x03" * 32, "t", "free", created=12.0)
    store.add(another, retire=("bare", 60.0))
    assert [record.expires for record in store.all()] == [99.0, 50.0, None]
    # One that fails takes the other back with it.
    with pytest.raises(Exception, match=r"(?i)unique"):
        store.add(another, retire=("bare", 40.0))
    assert [record.expires for record in store.all()] == [99.0, 50.0, None]


def test_the_last_use_is_kept(open_: Open) -> None:
    store = open_()
    store.add(FULL)
    store.touch("full", 77.0)
    record = store.get("full")
    assert record is not None
    assert record.last_used == 77.0


def test_threads_share_a_store(open_: Open) -> None:
    store = open_()
    store.add(FULL)
    found: list[KeyRecord | None] = []

    def ask() -> None:
        found.extend([store.find(FULL.digest) for _ in range(50)])

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [FULL] * 400


def test_a_closed_store_opens_again(open_: Open, request: pytest.FixtureRequest) -> None:
    store = open_()
    store.close()
    store.add(FULL)
    store.close()
    store.close()
    if "memory" not in request.node.name:
        assert store.get("full") == FULL


def in_use(folder: Path) -> tuple[SqliteStore, object, sqlite3.Connection]:
    """A store with what this process has open of it."""
    store = SqliteStore(str(folder / "keys.db"), pepper_check(PEPPER))
    store.add(FULL)
    assert store._opened is not None
    return store, store._opened, store._opened.connection


def test_a_store_that_is_dropped_in_a_cycle_closes_its_file(tmp_path: Path) -> None:
    """Not the connection itself, which would warn of it since Python 3.13."""
    store, opened, connection = in_use(tmp_path)
    cycle: list[object] = [store, opened]
    cycle.append(cycle)
    del store, opened, cycle
    gc.collect()
    with pytest.raises(sqlite3.ProgrammingError, match="closed"):
        connection.execute("SELECT 1")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_child_that_drops_a_store_leaves_its_parents_connection_open(tmp_path: Path) -> None:
    store, opened, connection = in_use(tmp_path)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            del store, opened
            gc.collect()
            status = 0 if connection.execute("SELECT 1").fetchone() == (1,) else 2
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize(
    "last",
    [
        pytest.param("ask_in_thread()", id="thread"),
        pytest.param("asked_at_exit.append(True)", id="exit handler"),
        pytest.param("sys.exit(os.waitpid(os.fork() or sys.exit(0), 0)[1])", id="child"),
        pytest.param("drop_in_child()", id="child that drops it"),
    ],
)
def test_a_store_in_use_at_exit_harms_nobody(last: str, tmp_path: Path) -> None:
    """A connection closed below a thread that is within a statement ends the process by SIGSEGV."""
    script = f"""
import atexit, gc, os, sqlite3, sys, threading
from opsguard.keys.sqlite import SqliteStore
from opsguard.keys import KeyRecord
path = {str(tmp_path / "keys.db")!r}
store = SqliteStore(path, "a check")
record = KeyRecord("full", b"1" * 32, "tenant", "pro")

def ask(other):
    while True:
        try:
            store.revoke("full", 5.0)
        except sqlite3.OperationalError:
            pass

def drop_in_child():
    global store
    pid = os.fork()
    if pid:
        sys.exit(os.waitpid(pid, 0)[1])
    del store
    gc.collect()

def ask_in_thread():
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    within = threading.Event()
    store.get("full")
    said = lambda text: text.startswith("UPDATE") and within.set()
    store._opened.connection.set_trace_callback(said)
    threading.Thread(target=ask, args=(other,), daemon=True).start()
    assert within.wait(30)  # for the lock of this one

asked_at_exit = []
atexit.register(lambda: asked_at_exit and print(store.get("nobody")))
store.add(record)
{last}
"""
    done = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, "unclosed database" in done.stderr) == (0, False), done.stderr
    if last.startswith("asked_at_exit"):
        assert done.stdout == "None\n", done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_child_of_a_fork_asks_by_itself(open_: Open, request: pytest.FixtureRequest) -> None:
    if "memory" in request.node.name:
        pytest.skip("it is this process's alone")
    store = open_()
    store.add(FULL)
    lock = store._lock if isinstance(store, SqliteStore) else threading.Lock()
    with lock:  # as if another thread were at it
        child = os.fork()
        if not child:
            try:
                right = store.find(FULL.digest) == FULL
                store.add(BARE)
            except BaseException:
                right = False
            os._exit(0 if right else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert [record.key_id for record in store.all()] == ["full", "bare"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_fork_waits_for_a_thread_that_is_within_sqlite(tmp_path: Path) -> None:
    """SQLite has mutexes of its own, which the child would find taken."""
    store = SqliteStore(str(tmp_path / "keys.db"), pepper_check(PEPPER))
    store.add(FULL)
    within, over = threading.Event(), threading.Event()

    def ask() -> None:
        with store._open():
            within.set()
            time.sleep(0.1)
            over.set()

    asking = threading.Thread(target=ask)
    asking.start()
    assert within.wait(30)
    child = os.fork()
    if not child:
        os._exit(0 if over.is_set() and store.find(FULL.digest) == FULL else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    asking.join()
    assert store.find(FULL.digest) == FULL


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_processes_that_make_the_first_keys_at_once_lose_none(tmp_path: Path) -> None:
    store = SqliteStore(str(tmp_path / "keys.db"), "check")
    children = []
    for worker in range(6):
        child = os.fork()
        if not child:
            try:
                for number in range(10):
                    digest = bytes([worker, number]) * 16
                    store.add(KeyRecord(f"{worker}-{number}", digest, "t", "free"))
            except BaseException:
                os._exit(1)
            os._exit(0)
        children.append(child)
    ends = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert ends == [0] * 6
    assert len(store.all()) == 60
    store.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_processes_that_make_the_tables_at_once_lose_no_key(tmp_path: Path) -> None:
    for again in range(5):
        race_for_the_first_key(f"sqlite+pysqlite:///{tmp_path / f'{again}.db'}")


def race_for_the_first_key(url: str, workers: int = 4) -> None:
    """Each of some processes adds a key where there are no tables yet, all at the same moment."""
    gun, starter = os.pipe()
    children = []
    for worker in range(workers):
        child = os.fork()
        if not child:
            try:
                os.close(starter)
                store = open_store(url, PEPPER)
                os.read(gun, 1)  # until the parent lets go
                store.add(KeyRecord(f"key-{worker}", bytes([worker]) * 32, "t", "free"))
                store.close()
            except BaseException as error:
                os.write(2, f"{error}\n".encode())
                os._exit(1)
            os._exit(0)
        children.append(child)
    os.close(starter)
    os.close(gun)
    ends = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert ends == [0] * workers
    store = open_store(url, PEPPER)
    assert len(store.all()) == workers
    decoy = store.find(b"\xfe" * 32)
    assert decoy is not None
    assert decoy.key_id == ""
    store.close()


@pytest.mark.parametrize("url", ["sqlite:///{}", "sqlite+pysqlite:///{}"])
def test_another_pepper_is_told(url: str, tmp_path: Path) -> None:
    url = url.format(tmp_path / "keys.db")
    first = open_store(url, PEPPER)
    first.add(FULL)
    first.close()
    other = open_store(url, b"another pepper")
    for ask in (other.all, lambda: other.find(FULL.digest), lambda: other.add(BARE)):
        with pytest.raises(KeyStoreError, match=r"another pepper.*OPSGUARD_KEYS__PEPPER"):
            ask()
    other.close()


@pytest.mark.parametrize("url", ["sqlite:///{}", "sqlite+pysqlite:///{}"])
@pytest.mark.parametrize(
    ("statement", "says"),
    [
        ("UPDATE opsguard_keys_meta SET value = '0' WHERE name = 'schema'", "version 0"),
        ("UPDATE opsguard_keys_meta SET value = '2' WHERE name = 'schema'", "version 2"),
        ("DELETE FROM opsguard_keys_meta WHERE name = 'schema'", "no version"),
        ("DROP TABLE opsguard_keys_meta", "cannot be used"),
    ],
)
def test_tables_of_another_version_are_told(
    url: str, statement: str, says: str, tmp_path: Path
) -> None:
    path = tmp_path / "keys.db"
    first = open_store(url.format(path), PEPPER)
    first.add(FULL)
    first.close()
    connection = sqlite3.connect(path)
    connection.execute(statement)
    connection.commit()
    connection.close()
    store = open_store(url.format(path), PEPPER)
    with pytest.raises(KeyStoreError, match=says):
        store.find(FULL.digest)
    store.close()


def test_stdlib_and_sqlalchemy_read_each_others_file(tmp_path: Path) -> None:
    path = tmp_path / "keys.db"
    one, other = SqliteStore(str(path), "check"), SqlStore(f"sqlite:///{path}", "check")
    one.add(FULL)
    assert other.find(FULL.digest) == FULL
    other.add(BARE)
    assert one.get("bare") == BARE
    one.close()
    other.close()


# SQLite.


def test_only_the_owner_may_read_the_file(tmp_path: Path) -> None:
    store = SqliteStore(str(tmp_path / "keys.db"), "check")
    store.add(FULL)
    store.close()
    assert stat.S_IMODE((tmp_path / "keys.db").stat().st_mode) == 0o600


def test_a_folder_that_is_not_there_or_not_writable_is_told(tmp_path: Path) -> None:
    for place in (tmp_path / "none" / "keys.db", Path("/proc/opsguard-keys.db")):
        with pytest.raises(KeyStoreError, match=r"cannot be made: .*keys\.store"):
            SqliteStore(str(place), "check").add(FULL)


def test_a_file_that_is_no_database_is_told(tmp_path: Path) -> None:
    (tmp_path / "keys.db").write_bytes(b"this is no database, but a text of some length" * 100)
    with pytest.raises(KeyStoreError, match="must be a SQLite file"):
        SqliteStore(str(tmp_path / "keys.db"), "check").find(FULL.digest)


def test_a_file_without_tables_yet_has_no_keys(tmp_path: Path) -> None:
    (tmp_path / "keys.db").touch()
    store = SqliteStore(str(tmp_path / "keys.db"), "check")
    assert store.find(FULL.digest) is None
    assert store.all() == []
    store.touch("full", 1.0)
    store.add(FULL)
    assert store.find(FULL.digest) == FULL
    store.close()


def test_readers_do_not_wait_for_a_writer_and_writers_not_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_module, "BUSY", 50)
    path = tmp_path / "keys.db"
    store = SqliteStore(str(path), "check")
    store.add(FULL)
    other = sqlite3.connect(path)
    other.execute("BEGIN EXCLUSIVE")
    assert store.find(FULL.digest) == FULL
    with pytest.raises(sqlite3.OperationalError, match="locked"):
        store.add(BARE)
    with pytest.raises(sqlite3.OperationalError, match="locked"):
        store.touch("full", 1.0)
    other.rollback()
    other.close()
    store.add(BARE)
    store.close()


def test_a_file_locked_while_it_is_opened_is_no_matter_of_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_module, "BUSY", 50)
    path = tmp_path / "keys.db"
    other = sqlite3.connect(path)
    other.execute("CREATE TABLE x (y)")
    other.execute("BEGIN EXCLUSIVE")
    store = SqliteStore(str(path), "check")
    with pytest.raises(sqlite3.OperationalError, match="locked"):
        store.add(FULL)
    other.rollback()
    other.close()
    store.add(FULL)
    store.close()


# URLs.


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("keys.db", "must be a database URL"),
        ("sqlite://host/keys.db", "must be sqlite:///"),
        ("sqlite:///keys.db?mode=ro", "must be sqlite:///"),
        ("nosuchdatabase://host/db", "nosuchdatabase"),
        ("postgresql+nosuchdriver://user:pazzword@host/db", "nosuchdriver"),
        ("postgresql://host:pazzword/db", "SQLAlchemy can read"),
    ],
)
def test_a_store_that_is_none_is_told_at_start(url: str, says: str) -> None:
    with pytest.raises(SettingsError, match=r"keys\.store") as caught:
        open_store(url, PEPPER)
    assert says in str(caught.value)
    assert "pazzword" not in str(caught.value)


def test_without_sqlalchemy_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sqlalchemy", None)
    with pytest.raises(SettingsError, match=r"opsguard-toolkit\[sql\]"):
        SqlStore("postgresql://host/db", "check")


def test_relative_and_full_paths() -> None:
    relative, full = open_store("sqlite:///a.db", PEPPER), open_store("sqlite:////b/a.db", PEPPER)
    assert isinstance(relative, SqliteStore)
    assert isinstance(full, SqliteStore)
    assert (relative.path, full.path) == ("a.db", "/b/a.db")


# Keys in the settings.


def fixed(development: bool = True, demo: bool = False, **keys: StaticKey) -> FixedKeys:
    return FixedKeys(keys, PEPPER, development=development, demo=demo)


def test_a_key_in_the_settings_is_found_by_its_hash_or_its_text() -> None:
    hashed = StaticKey(hash=sealed(PEPPER, "secret-1").hex(), tier="pro", scopes=("ops",))
    ends = datetime(2030, 1, 1)  # noqa: DTZ001
    plain = StaticKey(key="secret-2", tenant_id="t", expires=ends)
    keys = fixed(ci=hashed, dev=plain)
    ci, dev = keys.find(sealed(PEPPER, "secret-1")), keys.find(sealed(PEPPER, "secret-2"))
    assert ci is not None
    assert (ci.key_id, ci.tenant_id, ci.tier, ci.scopes) == ("ci", "ci", "pro", ("ops",))
    assert dev is not None
    assert dev.tenant_id == "t"
    assert dev.expires == ends.replace(tzinfo=UTC).timestamp()
    assert keys.find(sealed(PEPPER, "secret-3")) is None


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"a": StaticKey()}, "keys.static.a: must have either"),
        ({"a": StaticKey(hash="0" * 64, key="x")}, "keys.static.a: must have either"),
        ({"a": StaticKey(key="x")}, "keys.static.a: has its key in plain text"),
        (
            {"a": StaticKey(hash="0" * 64), "b": StaticKey(hash="0" * 64)},
            "keys.static.b: is the same key as a",
        ),
    ],
)
def test_a_wrong_key_in_the_settings_is_told(keys: dict[str, StaticKey], says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        fixed(development=False, **keys)


def test_demo_keys_work_in_development_alone() -> None:
    for development, demo, count in ((True, True, 3), (True, False, 0), (False, True, 0)):
        found = [fixed(development, demo).find(sealed(PEPPER, key)) for key in DEMO.values()]
        assert [record is not None for record in found] == [count == 3] * 3
    record = fixed(True, True).find(sealed(PEPPER, "demo-pro-key-67890"))
    assert record is not None
    assert record.tier == "pro"


def test_the_pepper_check_tells_nothing_of_the_pepper() -> None:
    assert pepper_check(PEPPER) == pepper_check(PEPPER) != pepper_check(b"x")
    assert "pepper" not in pepper_check(PEPPER)
