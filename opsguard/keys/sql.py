"""Keys in any database that SQLAlchemy reaches (the extra `sql`): tables of Core, no ORM.

The engine is made at the first question of a process and pools its connections; a child of a fork
makes its own (https://docs.sqlalchemy.org/en/20/core/pooling.html, "Using Connection Pools with
Multiprocessing or os.fork()"). How long it waits for a database that hangs is the driver's
business: say it in the URL (`?connect_timeout=2` for PostgreSQL).
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

from opsguard.exceptions import SettingsError
from opsguard.forks import in_child
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

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine

__all__ = ["SqlStore"]

_PAUSES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
"""Seconds between the attempts to make the tables."""
_inherited: list[Engine] = []
"""The parent's, to the end of the process: they are not ours to dispose of."""


class SqlStore:
    """Keys in the database at `url`. Connects to nothing by itself; for all threads.

    `check` is what :func:`opsguard.keys.minting.pepper_check` says of the pepper.

    :raises SettingsError: without SQLAlchemy or the driver, or for a URL that is none.
    """

    def __init__(self, url: str, check: str) -> None:
        try:
            import sqlalchemy as sa
            from sqlalchemy import exc
        except ModuleNotFoundError:
            raise SettingsError(
                "keys.store: this URL needs SQLAlchemy: install the extra opsguard-toolkit[sql], "
                "or use sqlite:///<file>"
            ) from None
        try:
            self._url = sa.make_url(url)
            self._url.get_dialect().import_dbapi()
        except (exc.NoSuchModuleError, ModuleNotFoundError) as error:
            raise SettingsError(f"keys.store: {error}") from None
        except (exc.ArgumentError, ValueError):  # its text may have a password in it
            raise SettingsError(
                "keys.store: is no URL that SQLAlchemy can read: driver://user:password@host/name"
            ) from None
        self.place = self._url.render_as_string(hide_password=True)
        self._check = check
        self._made: Engine | None = None
        self._ready = False
        self._lock = threading.Lock()
        in_child(self, SqlStore._after_fork)
        self._sa = sa
        self._fault = exc.DBAPIError
        # A collation of the database's may take two ids that differ in case for one: our ids are
        # random, so that is as good as never, and a digest is bytes.
        text = sa.String(255)
        moment: sa.Double[float] = sa.Double()
        tables = sa.MetaData()
        self._keys = keys = sa.Table(
            "opsguard_keys",
            tables,
            sa.Column("key_id", sa.String(64), primary_key=True),
            sa.Column(
                "digest",
                sa.LargeBinary(32).with_variant(sa.BINARY(32), "mysql", "mariadb"),
                nullable=False,
            ),
            sa.Column("tenant_id", text, nullable=False),
            sa.Column("tier", sa.String(64), nullable=False),
            sa.Column("name", text, nullable=False),
            sa.Column("scopes", sa.Text, nullable=False),
            sa.Column("user_id", text),
            sa.Column("created", moment, nullable=False),
            *(
                sa.Column(name, moment, nullable=False)
                for name in ("expires", "revoked", "last_used")
            ),
            sa.UniqueConstraint("digest"),
        )
        self._meta = sa.Table(
            "opsguard_keys_meta",
            tables,
            sa.Column("name", sa.String(64), primary_key=True),
            sa.Column("value", text, nullable=False),
        )
        columns = [keys.c[name] for name in COLUMNS]
        reached = keys.c.digest >= sa.bindparam("digest")
        self._find = sa.select(*columns).where(reached).order_by(keys.c.digest).limit(1)
        self._get = sa.select(*columns).where(keys.c.key_id == sa.bindparam("id"))
        self._all = (
            sa.select(*columns).where(keys.c.key_id != DECOY.key_id).order_by(keys.c.created)
        )

    def find(self, digest: bytes) -> KeyRecord | None:
        return self._one(self._find, {"digest": digest})

    def get(self, key_id: str) -> KeyRecord | None:
        return self._one(self._get, {"id": key_id}) if key_id else None

    def all(self) -> list[KeyRecord]:
        with self._engine().connect() as connection:
            if not self._usable(connection):
                return []
            return [record_of(tuple(row)) for row in connection.execute(self._all)]

    def add(self, record: KeyRecord, *, retire: tuple[str, float] | None = None) -> None:
        sa, keys = self._sa, self._keys
        self._prepare()
        with self._engine().begin() as connection:
            connection.execute(sa.insert(keys), row_of(record))
            if retire is not None:
                key_id, at = retire
                change = sa.update(keys).where(keys.c.key_id == key_id, keys.c.expires > at)
                connection.execute(change.values(expires=at))

    def revoke(self, key_id: str, at: float) -> bool:
        sa, keys = self._sa, self._keys
        with self._engine().begin() as connection:
            if not key_id or not self._usable(connection):
                return False
            change = sa.update(keys).where(keys.c.key_id == key_id)
            # Counted by a question of its own: MySQL counts only the rows that changed.
            connection.execute(change.where(keys.c.revoked > at).values(revoked=at))
            return connection.execute(self._get, {"id": key_id}).first() is not None

    def touch(self, key_id: str, at: float) -> None:
        change = self._sa.update(self._keys).where(self._keys.c.key_id == key_id)
        with self._engine().begin() as connection:
            connection.execute(change.values(last_used=at))

    def close(self) -> None:
        engine, self._made = self._made, None
        if engine is not None:
            engine.dispose()

    def _after_fork(self) -> None:
        if self._made is not None:
            _inherited.append(self._made)
        self._made, self._ready = None, False
        self._lock = threading.Lock()

    def _one(self, question: Any, values: dict[str, object]) -> KeyRecord | None:
        with self._engine().connect() as connection:
            if not self._usable(connection):
                return None
            row = connection.execute(question, values).first()
        return None if row is None else record_of(tuple(row))

    def _engine(self) -> Engine:
        with self._lock:
            if self._made is None:
                self._made = self._sa.create_engine(self._url, pool_pre_ping=True)
            return self._made

    def _usable(self, connection: Connection) -> bool:
        """Whether the tables are there, checked once in each process.

        :raises KeyStoreError: if they are of another version or another pepper.
        """
        if self._ready:
            return True
        if not self._sa.inspect(connection).has_table(self._keys.name):
            return False
        if not self._sa.inspect(connection).has_table(self._meta.name):
            raise KeyStoreError(
                f"the key store {self.place} cannot be used: it has the table {self._keys.name}, "
                f"but not {self._meta.name}"
            )
        rows = connection.execute(self._sa.select(self._meta)).all()
        check_meta({str(name): str(value) for name, value in rows}, self._check, self.place)
        self._ready = True
        return True

    def _prepare(self) -> None:
        """Make the tables unless they are there. Where several processes do so at once, all but one
        fail at something that depends on the database, and find the other's tables a moment later.
        """
        for pause in (*_PAUSES, None):
            try:
                with self._engine().begin() as connection:
                    if not self._usable(connection):
                        self._make(connection)
                return
            except self._fault:
                if pause is None:
                    raise
                time.sleep(pause)

    def _make(self, connection: Connection) -> None:
        """The table of the keys comes last: who sees it sees a store that is whole, also where each
        CREATE TABLE is a transaction of its own (MySQL). What a process that died has made is kept.
        """
        sa, keys, meta = self._sa, self._keys, self._meta
        meta.create(connection, checkfirst=True)
        if connection.execute(sa.select(meta)).first() is None:
            rows = {"schema": str(SCHEMA), "pepper": self._check}
            connection.execute(
                sa.insert(meta), [{"name": name, "value": rows[name]} for name in rows]
            )
        keys.create(connection, checkfirst=True)
        if connection.execute(self._get, {"id": DECOY.key_id}).first() is None:
            connection.execute(sa.insert(keys), row_of(DECOY))
