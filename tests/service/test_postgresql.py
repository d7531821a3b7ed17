"""On PostgreSQL writers run side by side: two requests for one name are a conflict, never a defect."""

from __future__ import annotations

import re
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import pytest
from sqlalchemy import create_engine, text

from engram.errors import Conflict, NotFound
from engram.schemas import BufferCreate, ForkCreate
from engram_service import backup, buffers, ingest
from engram_service.commit import fork
from engram_service.database import Database
from engram_service.restore import restore
from engram_service.settings import Settings
from engram_service.storage import PackStore
from tests.contents import create, fill, pictures
from tests.servers import ServiceThread, eventually, http
from tests.uploads import final, queue, tar_of_arrays, work_through

pytestmark = pytest.mark.services

T = TypeVar("T")

BODY = tar_of_arrays(pictures(7, 4), [7] * 4)


def empty_postgres(url: str, name: str) -> str:
    """Another empty database on the server of this one."""
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    engine.dispose()
    return re.sub(r"/\w+\?", f"/{name}?", url)


@pytest.fixture
def settings(postgres_url: str, tmp_path: Path) -> Settings:
    found = Settings(data_dir=tmp_path / "data", database_url=postgres_url, workers=0)
    found.make_folders()
    return found


@pytest.fixture
def database(settings: Settings) -> Iterator[Database]:
    found = Database(settings)
    found.migrate()
    yield found
    found.close()


def overlapping(database: Database, first: str, second: Callable[[], T]) -> T | Exception:
    """What `second` does while a transaction that makes buffer `first` is about to commit, and then does."""
    ended: list[T | Exception] = []

    def run() -> None:
        try:
            ended.append(second())
        except Exception as error:
            ended.append(error)

    waiting = text(
        "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    )

    def is_waiting() -> bool:
        with database.reading() as looking:
            return bool(looking.scalar(waiting)) or bool(ended)

    with database.session() as session:
        buffers.create(session, BufferCreate(name=first, budget_bytes=1000))
        thread = threading.Thread(target=run)
        thread.start()
        assert eventually(is_waiting)
    thread.join()
    return ended[0]


def test_two_creations_of_one_name_that_overlap_are_one_buffer_and_a_conflict(database: Database) -> None:
    ended = overlapping(database, "b", lambda: create(database, "b"))
    assert isinstance(ended, Conflict), repr(ended)
    assert "there is a buffer 'b' already" in ended.message


def test_a_fork_and_a_creation_of_one_name_that_overlap_are_one_buffer_and_a_conflict(
    database: Database, settings: Settings
) -> None:
    create(database, "source")
    fill(database, settings, 0, {0: 4}, name="source")
    store = PackStore(settings.packs_dir)
    ended = overlapping(database, "b", lambda: fork(database, store, "source", ForkCreate(name="b")))
    assert isinstance(ended, Conflict), repr(ended)


def test_many_clients_that_make_and_delete_one_buffer_at_once_get_no_defect(
    database: Database, settings: Settings
) -> None:
    service = ServiceThread(settings)
    try:

        def make_and_delete(_: int) -> set[int]:
            with http(service) as client:
                return {
                    answer.status_code
                    for _ in range(20)
                    for answer in (
                        client.post("/v1/buffers", json={"name": "b", "budget_bytes": 1000}),
                        client.delete("/v1/buffers/b"),
                    )
                }

        with ThreadPoolExecutor(4) as pool:
            seen = set[int]().union(*pool.map(make_and_delete, range(4)))
    finally:
        service.stop()
    assert {201, 204} <= seen <= {201, 204, 404, 409}


def test_two_deletions_of_one_buffer_that_overlap_are_one_deletion(database: Database) -> None:
    create(database, "b")
    ended: list[Exception | None] = []

    def delete() -> None:
        try:
            with database.session() as session:
                buffers.delete(session, "b")
            ended.append(None)
        except Exception as error:
            ended.append(error)

    with database.session() as session:
        buffers.delete(session, "b")
        thread = threading.Thread(target=delete)
        thread.start()
    thread.join()
    assert isinstance(ended[0], NotFound), repr(ended[0])


@pytest.mark.parametrize("target", ["postgresql", "sqlite"])
def test_a_service_is_backed_up_and_restored_to_either_database(
    database: Database, settings: Settings, postgres_url: str, tmp_path: Path, target: str
) -> None:
    create(database)
    for task in range(2):
        fill(database, settings, task, {task: 12})
    waiting = queue(database, settings, BODY, task=5)
    made = backup.back_up(database, settings, tmp_path / "backups")[1]
    assert set(made.uploads) == {waiting.id}
    url = empty_postgres(postgres_url, f"other_{tmp_path.name[-6:]}_{target}") if target == "postgresql" else None
    other = Settings(data_dir=tmp_path / "other", database_url=url, workers=0)
    restore(other, tmp_path / "backups")
    copied = Database(other)
    try:
        with database.reading() as one, copied.reading() as two:
            before, after = buffers.manifest(one, "b"), buffers.manifest(two, "b")
        assert after.model_copy(update={"created_at": before.created_at}) == before
        # What is numbered is numbered on.
        work_through(copied, PackStore(other.packs_dir), other)
        assert final(copied, waiting).state == "committed"
    finally:
        copied.close()
    if target == "postgresql":
        shutil.rmtree(other.data_dir)
        with pytest.raises(Conflict, match="has tables already"):
            restore(other, tmp_path / "backups")


def test_of_two_who_try_an_ingest_again_at_once_one_does(database: Database, settings: Settings) -> None:
    create(database)
    queued = queue(database, settings, BODY)
    with database.session() as session:
        ingest.cancel(session, queued.id)

    def retry() -> None:
        with database.session() as session:
            ingest.retry(session, queued.id)

    with database.session() as session:
        ingest.retry(session, queued.id)
        ended: list[Exception] = []

        def second() -> None:
            try:
                retry()
            except Conflict as error:
                ended.append(error)

        other = threading.Thread(target=second)
        other.start()
        other.join(0.3)
        assert other.is_alive()
    other.join()
    assert len(ended) == 1
