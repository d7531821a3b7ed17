"""Connect to the metadata database: SQLite by default, PostgreSQL by URL, with the same schema.

Two kinds of transaction, each one `with` block:

    with database.session() as session:    # may write: commits at the end of the block, rolls back on an exception
    with database.reading() as session:    # one consistent snapshot, never waits for a writer

On SQLite a writing transaction opens with BEGIN IMMEDIATE: it takes the write lock at its first statement, so what it
reads is still true when it writes, and no transaction dies half-way of SQLITE_BUSY. WAL lets readers go on, and
`synchronous=FULL` makes a commit survive a power cut. The block must end before a response is sent: a 2xx is a promise.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sqlalchemy import Connection, Engine, create_engine, event, inspect, text
from sqlalchemy.exc import DataError, DBAPIError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session, sessionmaker

from engram.errors import EngramError, InvalidRequest, StorageFull, Unavailable

from .settings import Settings

BUSY_TIMEOUT_MS = 30_000
"""How long a writer waits for another one. Commits take milliseconds; this is for a disk that stalls."""

POSTGRES_MIGRATION_LOCK = 0x656E6772616D
"""Key of the advisory lock that keeps two starting replicas from migrating at once ("engram" in ASCII)."""

if TYPE_CHECKING:
    from alembic.config import Config

SchemaState = Literal["empty", "current", "outdated", "unknown"]


class Database:
    """The engine and its sessions. `close()` it when done."""

    def __init__(self, settings: Settings) -> None:
        self.url = settings.sqlalchemy_url
        if settings.is_embedded:
            settings.data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        # Long polls and draws come from a thread pool of 40: as many connections, so that none waits for another.
        self.engine: Engine = create_engine(self.url, pool_size=8, max_overflow=40, pool_pre_ping=not self.is_sqlite)
        if self.is_sqlite:
            event.listen(self.engine, "connect", _prepare_sqlite)
            event.listen(self.engine, "begin", _begin_sqlite)
            self._reader = self.engine
        else:
            self._reader = self.engine.execution_options(isolation_level="REPEATABLE READ")
        self._writer = self.engine.execution_options(engram_writes=True)
        self._write = sessionmaker(self._writer, expire_on_commit=False)
        self._read = sessionmaker(self._reader, expire_on_commit=False)
        self._glancing: sqlite3.Connection | None = None
        self._glance_lock = threading.Lock()

    @property
    def is_sqlite(self) -> bool:
        """True for the embedded database."""
        return self.url.startswith("sqlite")

    @contextmanager
    def session(self) -> Iterator[Session]:
        """One transaction that may write; committed when the block ends, rolled back when it raises.

        Raises:
            StorageFull: the disk that holds the database is full; nothing was written.
            Unavailable: the database cannot be reached or stayed locked.
        """
        with translated(), self._write.begin() as session:
            yield session

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """One snapshot to read from.

        Raises:
            Unavailable: the database cannot be reached.
        """
        with translated(), self._read() as session:
            yield session

    def glance(self, query: str, *values: object) -> tuple[Any, ...] | None:
        """The first row, or None: of an embedded database, in some 20 us and without a transaction.

        None too if there is no row, if the database is not embedded or is busy: whoever needs to know asks a session.
        This is for the event loop, which must not wait; a session costs 50 times as much.
        """
        if not self.is_sqlite:
            return None
        with self._glance_lock:
            try:
                if self._glancing is None:
                    path = Path(self.engine.url.database or "").absolute().as_uri()
                    self._glancing = sqlite3.connect(f"{path}?mode=ro", uri=True, timeout=0, check_same_thread=False)
                row: tuple[Any, ...] | None = self._glancing.execute(query, values).fetchone()
            except sqlite3.OperationalError:
                return None
        return row

    def ping(self) -> None:
        """Returns if the database answers and has the schema of this version.

        Raises:
            Unavailable: it does not answer, or its schema is another version's.
        """
        state = self.schema_state()
        if state != "current":
            raise Unavailable(f"the database schema is {state}; run `engram-service migrate`", schema=state)

    def schema_state(self) -> SchemaState:
        """How the database's schema compares with this version: empty, current, outdated or unknown (newer)."""
        # Imported here and below: workers never ask, and start a fifth sooner without it.
        from alembic.runtime.migration import MigrationContext
        from alembic.script import ScriptDirectory

        scripts = ScriptDirectory.from_config(_alembic())
        with translated(), self.engine.connect() as connection:
            revision = MigrationContext.configure(connection).get_current_revision()
            if revision is None:
                return "empty" if not inspect(connection).get_table_names() else "unknown"
        if revision == scripts.get_current_head():
            return "current"
        return "outdated" if revision in {script.revision for script in scripts.walk_revisions()} else "unknown"

    def migrate(self, revision: str = "head") -> None:
        """The schema is at `revision` afterwards, or unchanged: one transaction, one process at a time."""
        from alembic import command

        with translated(), self._writer.begin() as connection:
            if not self.is_sqlite:
                connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": POSTGRES_MIGRATION_LOCK})
            config = _alembic()
            config.attributes["connection"] = connection
            command.upgrade(config, revision)

    def close(self) -> None:
        """Every connection is closed."""
        with self._glance_lock:
            if self._glancing is not None:
                self._glancing.close()
                self._glancing = None
        self.engine.dispose()


@contextmanager
def translated() -> Iterator[None]:
    """Database failures leave the block as errors of the tree; programming errors (a broken constraint) as they are."""
    try:
        yield
    except (DBAPIError, PoolTimeout) as error:
        translation = _translation(error)
        if translation is None:
            raise
        raise translation from error


def _translation(error: DBAPIError | PoolTimeout) -> EngramError | None:
    if isinstance(error, PoolTimeout):
        return Unavailable("all database connections are in use; try again", retry_after_s=1)
    code = getattr(error.orig, "sqlite_errorcode", None)
    if code is not None and code & 0xFF == sqlite3.SQLITE_FULL:
        return StorageFull("the disk that holds the database is full; nothing was written")
    if getattr(error.orig, "sqlstate", None) == "53100":
        return StorageFull("the disk of the database server is full; nothing was written")
    if isinstance(error, DataError):
        # PostgreSQL keeps no NUL in a text, so none can be looked for: /v1/buffers/%00
        return InvalidRequest(f"the database holds no such value: {error.orig}")
    if isinstance(error, OperationalError):
        return Unavailable(f"the database does not answer: {error.orig}", retry_after_s=1)
    return None


def migrations_folder() -> Path:
    """Where the migrations are: inside an installed package, or beside `service/` in a checkout."""
    installed = Path(__file__).parent / "migrations"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "migrations"


def _alembic() -> Config:
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(migrations_folder()).replace("%", "%%"))
    return config


def _prepare_sqlite(connection: Any, _record: object) -> None:
    # The driver must not open transactions by itself: it would open them deferred, and never around DDL.
    connection.isolation_level = None
    cursor = connection.cursor()
    # The timeout comes first: switching to WAL takes a lock that another starting process may hold.
    cursor.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_MS}")
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    writes = connection.get_execution_options().get("engram_writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
