"""This file tests the database: its migrations make the schema of the tables, and its transactions keep their word."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import inspect, text

from engram.errors import StorageFull, Unavailable
from engram.schemas import BufferCreate
from engram_service import buffers
from engram_service.app import create_app, open_database
from engram_service.database import Database
from engram_service.settings import Settings
from engram_service.tables import Base, BufferRow
from tests.contents import create, fill
from tests.servers import environment


@pytest.fixture
def bare(tmp_path: Path) -> Settings:
    """Settings of a data folder that does not exist."""
    return Settings(data_dir=tmp_path / "nothing" / "yet")


def test_the_migrations_make_the_schema_of_the_tables(database: Database) -> None:
    with database.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        assert compare_metadata(context, Base.metadata) == []
        for name, table in Base.metadata.tables.items():
            found = inspect(connection).get_pk_constraint(name)["constrained_columns"]
            assert found == [column.name for column in table.primary_key]


def test_an_empty_embedded_database_is_migrated_without_asking(bare: Settings) -> None:
    app = create_app(bare)
    assert app.state.database.schema_state() == "current"
    app.state.database.close()


def test_an_outdated_database_is_not_touched_until_somebody_asks(bare: Settings) -> None:
    database = open_database(bare)
    with database.session() as session:
        session.execute(text("UPDATE alembic_version SET version_num = 'later'"))
    assert database.schema_state() == "unknown"
    database.close()
    with pytest.raises(Unavailable, match="engram-service migrate"):
        create_app(bare)


def test_a_database_of_another_program_is_not_touched(bare: Settings) -> None:
    bare.make_folders()
    database = Database(bare)
    with database.session() as session:
        session.execute(text("CREATE TABLE recipes (id INTEGER)"))
    assert database.schema_state() == "unknown"
    database.close()
    with pytest.raises(Unavailable, match="unknown"):
        create_app(bare)


def test_the_migrate_command_says_what_it_did(tmp_path: Path) -> None:
    def migrate() -> str:
        command = [sys.executable, "-m", "engram_service.cli", "migrate", "--data-dir", str(tmp_path / "data")]
        ended = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60, check=True)
        return ended.stdout

    assert migrate() == "the schema was empty and is current now\n"
    assert migrate() == "the schema was current already\n"


def test_processes_that_start_at_once_migrate_once(bare: Settings) -> None:
    bare.make_folders()
    failures: list[BaseException] = []

    def start() -> None:
        try:
            open_database(bare).close()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_a_transaction_that_raises_changes_nothing(database: Database) -> None:
    def fail() -> None:
        with database.session() as session:
            buffers.create(session, BufferCreate(name="b", budget_bytes=1))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    with database.reading() as session:
        assert session.get(BufferRow, "b") is None


def test_readers_see_one_state_and_do_not_wait_for_writers(database: Database) -> None:
    create(database, "a")
    with database.reading() as reader:
        before = reader.scalar(text("SELECT count(*) FROM buffers"))
        with database.session() as writer:
            writer.execute(text("UPDATE buffers SET generation = 5"))
            assert reader.scalar(text("SELECT max(generation) FROM buffers")) == 0
        create(database, "b")
        assert (before, reader.scalar(text("SELECT count(*) FROM buffers"))) == (1, 1)
    assert database.glance("SELECT count(*) FROM buffers") == 2


def test_writers_wait_for_each_other_and_lose_nothing(database: Database) -> None:
    create(database)

    def count_up() -> None:
        for _ in range(20):
            with database.session() as session:
                row = session.get(BufferRow, "b")
                assert row is not None
                row.generation += 1

    threads = [threading.Thread(target=count_up) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert database.glance("SELECT generation FROM buffers WHERE name = ?", "b") == 80


def test_a_commit_survives_a_power_cut(database: Database) -> None:
    with database.engine.connect() as connection:
        pragmas = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys")
        }
    full = 2
    assert pragmas == {"journal_mode": "wal", "synchronous": full, "foreign_keys": 1}


def test_a_full_disk_under_the_database_is_storage_full(database: Database) -> None:
    create(database)
    with database.engine.connect() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar()

    def write_too_much() -> None:
        with database.session() as session:
            session.execute(text(f"PRAGMA max_page_count = {pages}"))
            for number in range(1000):
                session.execute(text(f"INSERT INTO tasks VALUES ('b', {number}, 50, 'ring', '{'x' * 1000}', NULL)"))

    with pytest.raises(StorageFull):
        write_too_much()
    with database.reading() as session:
        assert session.scalar(text("SELECT count(*) FROM tasks")) == 0


def test_a_database_that_cannot_be_reached_is_unavailable() -> None:
    settings = Settings(database_url="postgresql+psycopg://nobody@127.0.0.1:9/none?connect_timeout=2")
    database = Database(settings)
    with pytest.raises(Unavailable, match="does not answer"):
        database.ping()
    database.close()


@pytest.mark.services
def test_postgresql_has_the_same_schema_and_keeps_a_buffer(postgres_url: str, tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path / "data", database_url=postgres_url)
    with pytest.raises(Unavailable, match="schema is empty; run `engram-service migrate`"):
        open_database(settings)
    database = Database(settings)
    starters = [threading.Thread(target=database.migrate) for _ in range(3)]
    for starter in starters:
        starter.start()
    for starter in starters:
        starter.join()
    assert database.schema_state() == "current"
    with database.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []
    create(database)
    pixels = fill(database, settings, 0, {0: 5})
    with database.reading() as session:
        assert buffers.read(session, "b").exemplars == len(pixels) == 5
        assert session.scalar(text("SHOW transaction_isolation")) == "repeatable read"
    database.close()
