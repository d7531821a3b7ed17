"""Connect to the metadata database: SQLite by default, PostgreSQL by URL, with the same schema.

Two kinds of transaction, each one `with` block:

    with database.session() as session:    # may write: commits at the end of the block, rolls back on an exception
    with database.reading() as session:    # one consistent snapshot, never waits for a writer

On SQLite a writing transaction opens with BEGIN IMMEDIATE: it takes the write lock at its first statement, so what it
reads is still true when it writes, and no transaction dies half-way of SQLITE_BUSY. WAL lets readers go on, and
`synchronous=FULL` makes a commit survive a power cut. The block must end before a response is sent: a 2xx is a promise.

An SQLite database that was found corrupt, or whose file was taken away or replaced, is not used any more: every
transaction is refused until the service is started again, so that nothing is acknowledged that would be lost.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from functools import cache
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

SHARED_MEMORY_BYTES = 2**16
"""What SQLite needs to make its files beside the database; else it says that the disk fails, not that it is full."""

CHECK_SHARE = 0.01
"""The share of the time that a database is being read from end to end, to find out whether it is sound."""

POSTGRES_MIGRATION_LOCK = 0x656E6772616D
"""Key of the advisory lock that keeps two starting replicas from migrating at once ("engram" in ASCII)."""

if TYPE_CHECKING:
    from alembic.config import Config

logger = logging.getLogger(__name__)

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
            event.listen(self.engine, "connect", self._prepare_sqlite)
            event.listen(self.engine, "begin", _begin_sqlite)
            self._reader = self.engine
        else:
            self._reader = self.engine.execution_options(isolation_level="REPEATABLE READ")
        self._writer = self.engine.execution_options(engram_writes=True)
        self._write = sessionmaker(self._writer, expire_on_commit=False)
        self._read = sessionmaker(self._reader, expire_on_commit=False)
        self._glancing: sqlite3.Connection | None = None
        self._glance_lock = threading.Lock()
        self._file = Path(self.engine.url.database).absolute() if self.is_sqlite and self.engine.url.database else None
        self._identity: tuple[int, int] | None = None
        self._fault: str | None = None
        self._check_lock = threading.Lock()
        self._check_at = 0.0

    @property
    def is_sqlite(self) -> bool:
        """True for the embedded database."""
        return self.url.startswith("sqlite")

    @contextmanager
    def session(self) -> Iterator[Session]:
        """One transaction that may write; committed when the block ends, rolled back when it raises.

        Raises:
            StorageFull: the disk that holds the database is full; nothing was written.
            Unavailable: the database cannot be reached, is corrupt, or stayed locked.
        """
        with self._translated(), self._write.begin() as session:
            yield session

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """One snapshot to read from.

        Raises:
            Unavailable: the database cannot be reached, or is corrupt.
        """
        with self._translated(), self._read() as session:
            yield session

    def glance(self, query: str, *values: object) -> tuple[Any, ...] | None:
        """The first row, or None: of an embedded database, in some 20 us and without a transaction.

        None too if there is no row, if the database is not embedded, is busy or broken: a session tells which.
        This is for the event loop, which must not wait; a session costs 50 times as much.
        """
        if self._file is None:
            return None
        with self._glance_lock:
            try:
                if self._glancing is None:
                    self._glancing = self._read_only(timeout_s=0)
                row: tuple[Any, ...] | None = self._glancing.execute(query, values).fetchone()
            except sqlite3.Error:
                return None
        return row

    def ping(self) -> None:
        """Returns if the database answers and has the schema of this version.

        Raises:
            Unavailable: it does not answer, is corrupt, or its schema is another version's.
        """
        state = self.schema_state()
        if state != "current":
            raise Unavailable(f"the database schema is {state}; run `engram-service migrate`", schema=state)

    def check(self) -> None:
        """Returns if the database answers as in `ping`, and nothing is known to be wrong with an embedded one's file.

        The file is read from end to end, unless that was done a short while ago: see `CHECK_SHARE`. What this process
        has of it in memory says nothing.

        Raises:
            Unavailable: it does not answer, is corrupt, gone, or its schema is another version's.
        """
        self.ping()
        if self._file is None or time.monotonic() < self._check_at or not self._check_lock.acquire(blocking=False):
            return
        try:
            began = time.monotonic()
            with self._translated(), closing(self._read_only(timeout_s=1)) as connection:
                (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
            ended = time.monotonic()
            self._check_at = ended + (ended - began) / CHECK_SHARE
        finally:
            self._check_lock.release()
        if found != "ok":
            raise self._broken(f"is corrupt: {' '.join(found.split())}")

    def schema_state(self) -> SchemaState:
        """How the database's schema compares with this version: empty, current, outdated or unknown (newer)."""
        # Imported here and below: workers never ask, and start a fifth sooner without it.
        from alembic.runtime.migration import MigrationContext

        head, known = _revisions()
        with self._translated(), self.engine.connect() as connection:
            revision = MigrationContext.configure(connection).get_current_revision()
            if revision is None:
                return "empty" if not inspect(connection).get_table_names() else "unknown"
        if revision == head:
            return "current"
        return "outdated" if revision in known else "unknown"

    def migrate(self, revision: str = "head") -> None:
        """The schema is at `revision` afterwards, or unchanged: one transaction, one process at a time."""
        from alembic import command

        with self._translated(), self._writer.begin() as connection:
            if not self.is_sqlite:
                connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": POSTGRES_MIGRATION_LOCK})
            config = _alembic()
            config.attributes["connection"] = connection
            command.upgrade(config, revision)

    def copy_to(self, path: Path) -> None:
        """The file has what an embedded database has at one instant; writers go on meanwhile.

        Raises:
            StorageFull, Unavailable: a disk does not do its part, or the database is corrupt.
        """
        with (
            self._translated(),
            closing(self._read_only(timeout_s=BUSY_TIMEOUT_MS / 1000)) as source,
            closing(sqlite3.connect(path)) as target,
        ):
            source.backup(target)
            (found,) = target.execute("PRAGMA quick_check(1)").fetchone()
        if found != "ok":
            raise Unavailable(f"the copy of the database is corrupt: {found}")

    def truncate_log(self) -> None:
        """The write-ahead log of an embedded database takes no room on the disk, unless a reader still needs it."""
        if self._file is not None:
            with suppress(sqlite3.Error), closing(sqlite3.connect(self._file, timeout=1)) as connection:
                connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def close(self) -> None:
        """Every connection is closed."""
        with self._glance_lock:
            if self._glancing is not None:
                self._glancing.close()
                self._glancing = None
        self.engine.dispose()

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Failures of the database leave the block as errors of the tree, our own (a broken constraint) as they are.

        Raises:
            Unavailable: among others, at once, if the file is broken or is not the one that was opened.
        """
        self._check_file()
        try:
            yield
        except (DBAPIError, PoolTimeout, sqlite3.Error) as error:
            translation = self._translation(error)
            if translation is None:
                raise
            raise translation from error

    def _translation(self, error: DBAPIError | PoolTimeout | sqlite3.Error) -> EngramError | None:
        if isinstance(error, PoolTimeout):
            return Unavailable("all database connections are in use; try again", retry_after_s=1)
        cause = error.orig if isinstance(error, DBAPIError) else error
        # The extended code tells more in its upper bytes.
        code = (getattr(cause, "sqlite_errorcode", None) or 0) & 0xFF
        if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            return self._broken(f"is corrupt: {cause}")
        if code == sqlite3.SQLITE_FULL or (code in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN) and self._is_full()):
            return StorageFull("the disk that holds the database is full; nothing was written")
        if getattr(cause, "sqlstate", None) == "53100":
            return StorageFull("the disk of the database server is full; nothing was written")
        if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_IOERR):
            return Unavailable(f"the disk does not give or take the database {self._file}: {cause}", retry_after_s=1)
        if isinstance(error, DataError):
            # PostgreSQL keeps no NUL in a text, so none can be looked for: /v1/buffers/%00
            return InvalidRequest(f"the database holds no such value: {cause}")
        if isinstance(error, OperationalError):
            return Unavailable(f"the database does not answer: {cause}", retry_after_s=1)
        return None

    def _broken(self, what: str) -> Unavailable:
        """The error for a file that is not to be used again; it is remembered."""
        self._fault = (
            f"the database {self._file} {what}. Stop the service, move this file and those named like it with -wal and "
            "-shm away, put back a backup of the data folder, and start the service again"
        )
        logger.error("%s", self._fault)
        return Unavailable(self._fault)

    def _check_file(self) -> None:
        """Returns if the file is the one that was opened and none was found broken.

        A file that was removed still takes writes, through the connections that are open, and loses them.
        """
        if self._fault is not None:
            raise Unavailable(self._fault)
        if self._file is None or self._identity is None:
            return
        found = _identity(self._file)
        if found != self._identity:
            raise Unavailable(
                f"the database {self._file} {'is gone' if found is None else 'was replaced'} while the service ran; "
                "put the right one there and start the service again"
            )

    def _is_full(self) -> bool:
        if self._file is None:
            return False
        disk = os.statvfs(self._file.parent)
        return disk.f_bavail * disk.f_frsize < SHARED_MEMORY_BYTES

    def _read_only(self, *, timeout_s: float) -> sqlite3.Connection:
        assert self._file is not None, "only a file is opened by hand"
        return sqlite3.connect(f"{self._file.as_uri()}?mode=ro", uri=True, timeout=timeout_s, check_same_thread=False)

    def _prepare_sqlite(self, connection: Any, _record: object) -> None:
        # The driver must not open transactions by itself: it would open them deferred, and never around DDL.
        connection.isolation_level = None
        cursor = connection.cursor()
        # The timeout comes first: switching to WAL takes a lock that another starting process may hold.
        cursor.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_MS}")
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute("PRAGMA synchronous=FULL")
        cursor.execute("PRAGMA foreign_keys=ON")
        cursor.close()
        if self._file is not None and self._identity is None:
            self._identity = _identity(self._file)


def migrations_folder() -> Path:
    """Where the migrations are: inside an installed package, or beside `service/` in a checkout."""
    installed = Path(__file__).parent / "migrations"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "migrations"


def _alembic() -> Config:
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(migrations_folder()).replace("%", "%%"))
    return config


@cache
def _revisions() -> tuple[str | None, frozenset[str]]:
    """The revision of this version's schema, and all that lead to it."""
    from alembic.script import ScriptDirectory

    scripts = ScriptDirectory.from_config(_alembic())
    return scripts.get_current_head(), frozenset(script.revision for script in scripts.walk_revisions())


def _identity(path: Path) -> tuple[int, int] | None:
    """Which file it is, whatever its name; None if there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _begin_sqlite(connection: Connection) -> None:
    writes = connection.get_execution_options().get("engram_writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
