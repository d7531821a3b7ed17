"""The database: its migrations make the schema of the tables, and its transactions keep their word."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import alembic.command
import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from sqlalchemy import inspect, text
from typer.testing import CliRunner, Result

from engram.errors import Conflict, StorageFull, Unavailable
from engram.schemas import BufferCreate, IngestOptions
from engram_service import buffers, cli, ingest
from engram_service.app import create_app, open_database
from engram_service.database import Database, migrations_folder
from engram_service.settings import Settings
from engram_service.tables import Base, BufferRow, TaskRow
from tests.contents import create, fill


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


def command(name: str, data_dir: Path) -> Result:
    """What `engram-service NAME` says of this folder."""
    return CliRunner().invoke(cli.app, [name, "--data-dir", str(data_dir)])


def test_the_migrate_command_says_what_it_did(tmp_path: Path) -> None:
    said = [command("migrate", tmp_path / "data").stdout for _ in range(2)]
    assert said == ["the schema was empty and is current now\n", "the schema was current already\n"]


OLD_OPTIONS = {"quality": 40, "candidates": [10, 50], "ranking": "ring", "extractor": None, "seed": 3}


@pytest.fixture
def first_schema(bare: Settings) -> Iterator[Database]:
    """The database of an older version: a buffer without packs, a task that has seen images, an ingest that waits."""
    bare.make_folders()
    database = Database(bare)
    database.migrate("0001")
    with database.session() as session:
        session.execute(
            text("INSERT INTO buffers VALUES ('b', 1000, 'buffer', 'class', '4:2:0', 3, 3, 16, 16, 3, 1700000000.0)")
        )
        session.execute(text("INSERT INTO tasks VALUES ('b', 0, 50, 'ring', '{\"7\": 12}', '{\"quality\": 50}')"))
        session.execute(
            text(
                "INSERT INTO ingests (id, buffer, task, state, body_sha256, body_bytes, options, images_total,"
                " images_done, attempts, created_at, updated_at)"
                " VALUES ('i', 'b', 0, 'received', 'ab', 5, :options, 0, 0, 0, 1.0, 1.0)"
            ),
            {"options": json.dumps(OLD_OPTIONS)},
        )
    yield database
    database.close()


def test_a_buffer_without_packs_comes_along_and_its_quality_is_open(first_schema: Database) -> None:
    assert first_schema.schema_state() == "outdated"
    first_schema.migrate()
    assert first_schema.schema_state() == "current"
    with first_schema.reading() as session:
        buffer = buffers.read(session, "b")
        row = session.get(TaskRow, ("b", 0))
        waiting = ingest.read(session, "i")
    assert (buffer.budget_bytes, buffer.generation, buffer.image_shape) == (1000, 3, (16, 16, 3))
    assert (buffer.quality, buffer.quality_is) == (None, "provisional")
    assert row is not None
    assert (row.seen, row.decision, row.means) == ({"7": 12}, None, None)
    assert (buffer.class_names, buffer.is_frozen) == ({}, False)
    with first_schema.reading() as session:
        assert buffers.find(session, "b").next_class_id == 8
    assert (waiting.state, waiting.options) == ("received", IngestOptions(candidates=(10, 50), ranking="ring", seed=3))


def test_a_buffer_that_came_along_takes_new_uploads(first_schema: Database, bare: Settings) -> None:
    first_schema.migrate()
    with first_schema.session() as session:
        session.execute(text("DELETE FROM ingests"))
    fill(first_schema, bare, 0, {7: 2})
    with first_schema.reading() as session:
        assert [(c.class_id, c.seen, c.exemplars) for c in buffers.task(session, "b", 0).classes] == [(7, 14, 2)]


def put_a_pack_of_version_1(database: Database) -> None:
    with database.session() as session:
        session.execute(
            text(
                "INSERT INTO packs (buffer, task, digest, bytes, exemplars, quality, runs, class_bytes, since)"
                " VALUES ('b', 0, 'ab', 500, 12, 50, '[[7, 12]]', '[400]', 3)"
            )
        )


def test_packs_of_version_1_are_refused_and_nothing_changes(first_schema: Database) -> None:
    put_a_pack_of_version_1(first_schema)
    with pytest.raises(Conflict, match=r"1 packs of format version 1.* export .* with Engram 0.1"):
        first_schema.migrate()
    assert first_schema.schema_state() == "outdated"
    assert first_schema.glance("SELECT quality FROM tasks") == (50,)


def test_the_commands_refuse_a_folder_of_version_1_in_one_sentence(first_schema: Database, bare: Settings) -> None:
    put_a_pack_of_version_1(first_schema)
    for name, says in (
        ("serve", "run `engram-service migrate`"),
        ("worker", "run `engram-service migrate`"),
        ("migrate", "packs of format version 1, which Engram 0.1 wrote and this version does not read: export"),
    ):
        ended = command(name, bare.data_dir)
        assert (ended.exit_code, ended.stdout) == (2, "")
        assert ended.stderr.startswith("engram-service: ")
        assert says in ended.stderr
        assert ended.stderr.count("\n") == 1, ended.stderr


def steps(database: Database, revision: str) -> None:
    """The schema is at an earlier revision."""
    config = Config()
    config.set_main_option("script_location", str(migrations_folder()))
    with database.engine.begin() as connection:
        config.attributes["connection"] = connection
        alembic.command.downgrade(config, revision)


def test_a_step_back_makes_the_schema_it_came_from(first_schema: Database) -> None:
    def schema() -> dict[str, list[tuple[str, str, bool]]]:
        with first_schema.engine.connect() as connection:
            return {
                table: sorted(
                    (column["name"], str(column["type"]), column["nullable"])
                    for column in inspect(connection).get_columns(table)
                )
                for table in inspect(connection).get_table_names()
            }

    before = schema()
    first_schema.migrate()
    assert schema() != before
    steps(first_schema, "0001")
    assert schema() == before
    assert first_schema.glance("SELECT seen FROM tasks") == ('{"7": 12}',)
    first_schema.migrate()


def test_no_step_back_leads_to_a_version_that_cannot_read_the_packs(database: Database, settings: Settings) -> None:
    create(database)
    fill(database, settings, 0, {0: 2})
    with pytest.raises(Conflict, match=r"1 packs of format version 2"):
        steps(database, "0001")
    assert database.schema_state() == "current"


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
    assert database.glance("SELECT count(*) FROM buffers") == (2,)


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
    assert database.glance("SELECT generation FROM buffers WHERE name = ?", "b") == (80,)


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
                session.execute(text(f"INSERT INTO tasks VALUES ('b', {number}, '{'x' * 1000}', NULL, NULL, NULL)"))

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
