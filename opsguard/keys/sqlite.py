"""Keys in a SQLite file, with the driver that Python has: the default store.

A process has one connection, made at its first question and shared by its threads behind a lock:
a question takes microseconds, and verified keys are cached. A child of a fork makes its own and
leaves the inherited one alone (https://www.sqlite.org/howtocorrupt.html, 2.6).

The file is in WAL mode, so that readers never wait for a writer. Only the making of a key makes the
file; until then every key is unknown.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import weakref
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from opsguard.forks import in_child, in_each_child
from opsguard.keys.identity import KeyRecord
from opsguard.keys.stores import (
    COLUMNS,
    DECOY,
    SCHEMA,
    KeyStoreError,
    check_meta,
    record_of,
    row_of,
)

__all__ = ["SqliteStore"]

BUSY = 1000  # milliseconds that a statement waits for other processes
BUSY_TOUCH = 20  # a note of last use is not worth more

_TABLES = """
CREATE TABLE opsguard_keys (
    key_id TEXT NOT NULL UNIQUE, digest BLOB PRIMARY KEY, tenant_id TEXT NOT NULL,
    tier TEXT NOT NULL, name TEXT NOT NULL, scopes TEXT NOT NULL, user_id TEXT,
    created REAL NOT NULL, expires REAL NOT NULL, revoked REAL NOT NULL, last_used REAL NOT NULL
) WITHOUT ROWID;
CREATE TABLE opsguard_keys_meta (name TEXT PRIMARY KEY, value TEXT NOT NULL);
"""
_SELECT = f"SELECT {', '.join(COLUMNS)} FROM opsguard_keys"
_FIND = f"{_SELECT} WHERE digest >= ? ORDER BY digest LIMIT 1"
_INSERT = f"INSERT INTO opsguard_keys VALUES ({', '.join(f':{name}' for name in COLUMNS)})"
_RETIRE = "UPDATE opsguard_keys SET expires = min(expires, :at) WHERE key_id = :id"
_REVOKE = "UPDATE opsguard_keys SET revoked = min(revoked, :at) WHERE key_id = :id"
_TOUCH = "UPDATE opsguard_keys SET last_used = :at WHERE key_id = :id"


class _Opened:
    """A connection, closed with what holds it at the latest.

    One that ends by itself warns of it since Python 3.13, and in a cycle it may do so before any
    `__del__` of ours.
    """

    def __init__(self, connection: sqlite3.Connection) -> None:
        self.connection = connection
        self._end = weakref.finalize(self, connection.close)
        # At exit a thread may be within a statement, and an exit handler may still ask.
        self._end.atexit = False

    def close(self) -> None:
        self._end.detach()
        self.connection.close()

    def __del__(self) -> None:
        self.close()  # when the interpreter ends, nobody calls finalizers of weakref any more


_inherited: list[_Opened] = []
"""The parent's: they are not ours to close before the process ends."""
_stores: weakref.WeakSet[SqliteStore] = weakref.WeakSet()
_taken: list[threading.Lock] = []


class SqliteStore:
    """Keys in the file `path` (":memory:" for this process alone). Opens nothing by itself.

    `check` is what :func:`opsguard.keys.minting.pepper_check` says of the pepper. Raises
    KeyStoreError for a file that cannot be used, sqlite3.Error for one that does not answer
    within a second (locked by another process).
    """

    def __init__(self, path: str, check: str) -> None:
        self.path = path
        self._check = check
        self._lock = threading.Lock()
        self._opened: _Opened | None = None
        _stores.add(self)
        in_child(self, SqliteStore._after_fork)

    def find(self, digest: bytes) -> KeyRecord | None:
        with self._open() as connection:
            if connection is None:
                return None
            row = connection.execute(_FIND, (digest,)).fetchone()
        return None if row is None else record_of(row)

    def get(self, key_id: str) -> KeyRecord | None:
        with self._open() as connection:
            if connection is None or not key_id:
                return None
            row = connection.execute(f"{_SELECT} WHERE key_id = ?", (key_id,)).fetchone()
        return None if row is None else record_of(row)

    def all(self) -> list[KeyRecord]:
        with self._open() as connection:
            if connection is None:
                return []
            rows = connection.execute(f"{_SELECT} WHERE key_id <> '' ORDER BY created").fetchall()
        return [record_of(row) for row in rows]

    def add(self, record: KeyRecord, *, retire: tuple[str, float] | None = None) -> None:
        with self._open(create=True) as connection:
            assert connection is not None
            with connection:
                connection.execute(_INSERT, row_of(record))
                if retire is not None:
                    connection.execute(_RETIRE, {"id": retire[0], "at": retire[1]})

    def revoke(self, key_id: str, at: float) -> bool:
        with self._open() as connection:
            if connection is None or not key_id:
                return False
            with connection:
                return connection.execute(_REVOKE, {"id": key_id, "at": at}).rowcount == 1

    def touch(self, key_id: str, at: float) -> None:
        with self._open() as connection:
            if connection is None:
                return
            # Nor is it worth a wait for the disk.
            connection.execute(f"PRAGMA busy_timeout = {BUSY_TOUCH}")
            connection.execute("PRAGMA synchronous = NORMAL")
            try:
                with connection:
                    connection.execute(_TOUCH, {"id": key_id, "at": at})
            finally:
                connection.execute(f"PRAGMA busy_timeout = {BUSY}")
                connection.execute("PRAGMA synchronous = FULL")

    def close(self) -> None:
        with self._lock:
            opened, self._opened = self._opened, None
            if opened is not None:
                opened.close()

    @contextmanager
    def _open(self, *, create: bool = False) -> Generator[sqlite3.Connection | None]:
        """This process's connection, locked; None if there is no file yet and none is made."""
        with self._lock:
            if self._opened is None:
                connection = self._connect(create)
                self._opened = None if connection is None else _Opened(connection)
            yield None if self._opened is None else self._opened.connection

    def _after_fork(self) -> None:
        self._lock = threading.Lock()
        if self._opened is not None:
            _inherited.append(self._opened)
            self._opened = None

    def _connect(self, create: bool) -> sqlite3.Connection | None:
        memory = self.path == ":memory:"
        if not memory and not create and not Path(self.path).exists():
            return None
        connection = None
        try:
            if not memory and create:
                # Made before SQLite makes it, as only its owner may read it.
                os.close(os.open(self.path, os.O_CREAT | os.O_RDWR, 0o600))
            connection = sqlite3.connect(
                ":memory:" if memory else f"file:{quote(self.path)}?mode=rw",
                uri=not memory,
                timeout=BUSY / 1000,
                check_same_thread=False,
            )
            if not self._set_up(connection, create or memory):
                connection.close()
                return None
        except OSError as error:
            raise KeyStoreError(
                f"the key store {self.path} cannot be made: {error.strerror}: "
                "point keys.store at a folder that this process may write to"
            ) from error
        except (KeyStoreError, sqlite3.Error) as error:
            if connection is not None:
                connection.close()
            if isinstance(error, KeyStoreError) or _passes(error):
                raise
            raise KeyStoreError(
                f"the key store {self.path} cannot be used: {error}: it must be a SQLite file in a "
                "folder that this process may write to"
            ) from error
        return connection

    def _set_up(self, connection: sqlite3.Connection, create: bool) -> bool:
        """Make the tables if that is asked for, and check them; whether there are any."""
        if not _has_tables(connection):
            if not create:
                return False  # another process is making the file at this moment
            if self.path != ":memory:":
                connection.execute("PRAGMA journal_mode = WAL")
            with connection:
                connection.execute("BEGIN IMMEDIATE")
                if not _has_tables(connection):
                    self._make_tables(connection)
        meta = dict(connection.execute("SELECT name, value FROM opsguard_keys_meta").fetchall())
        check_meta(meta, self._check, self.path)
        return True

    def _make_tables(self, connection: sqlite3.Connection) -> None:
        for statement in filter(str.strip, _TABLES.split(";")):
            connection.execute(statement)
        connection.execute(_INSERT, row_of(DECOY))
        connection.executemany(
            "INSERT INTO opsguard_keys_meta VALUES (?, ?)",
            [("schema", str(SCHEMA)), ("pepper", self._check)],
        )


def _before_fork() -> None:
    # SQLite has mutexes of its own, for all connections: a child that is forked while another
    # thread holds one would wait for it for ever.
    locks = [store._lock for store in list(_stores)]
    _taken.extend(lock for lock in locks if lock.acquire(timeout=2 * BUSY / 1000))


def _after_fork() -> None:
    while _taken:
        _taken.pop().release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork)
in_each_child(_after_fork)


def _has_tables(connection: sqlite3.Connection) -> bool:
    tables = (
        "SELECT count(*) FROM sqlite_schema WHERE name GLOB 'opsguard_keys*' AND type = 'table'"
    )
    return bool(connection.execute(tables).fetchone()[0])


def _passes(error: Exception) -> bool:
    """Whether the same may work a moment later: another process holds a lock."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in (
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_LOCKED,
    )
