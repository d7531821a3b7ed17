"""The collector passes over what it cannot remove: no file stops it, and it stops no worker."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
from sqlalchemy import select

from engram_service import worker
from engram_service.collect import collect
from engram_service.database import Database
from engram_service.settings import Settings
from engram_service.storage import PackStore
from engram_service.tables import PackRow
from tests.contents import create, fill, pictures
from tests.servers import eventually
from tests.uploads import final, queue, tar_of_arrays


def put_a_folder(path: Path) -> None:
    """In the place of a file from long ago: not even root removes a folder as if it were a file."""
    path.unlink(missing_ok=True)
    path.mkdir(parents=True)
    os.utime(path, (1e9, 1e9))


def retired(database: Database) -> set[str]:
    with database.reading() as session:
        return {row.digest for row in session.scalars(select(PackRow)) if row.until is not None}


def test_what_cannot_be_removed_is_passed_over_and_the_rest_goes(
    database: Database, store: PackStore, settings: Settings
) -> None:
    create(database, budget_bytes=3000)
    for task in range(8):
        fill(database, settings, task, {task: 12})
    digests = sorted(retired(database))
    assert len(digests) > 1
    pack = store.path(digests[0])
    stuck = [pack, pack.with_name(f".{pack.name}.0.tmp"), settings.spool_dir / "0123.tar"]
    for path in stuck:
        put_a_folder(path)
    leftover = pack.with_name(f".{pack.name}.1.tmp")
    leftover.write_bytes(b"of a crash")
    os.utime(leftover, (1e9, 1e9))
    for _ in range(2):
        found = collect(database, store, settings.model_copy(update={"grace_s": 0.0}))
        assert set(found.stuck) == {*map(str, stuck)}
    assert retired(database) == set()
    assert {digest for digest, _ in store.digests()} & {*digests} == {pack.name}
    assert not leftover.exists()


def test_a_worker_goes_on_where_something_cannot_be_collected_and_says_so_once(
    database: Database, store: PackStore, settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    create(database)
    unnamed = store.path("ab" * 32)
    put_a_folder(unnamed)
    stop = threading.Event()
    often = settings.model_copy(update={"grace_s": 0.0, "worker_poll_s": 0.01})
    running = threading.Thread(target=worker.run, args=(often, stop))
    running.start()
    try:
        body = tar_of_arrays(pictures(1, 4), [1] * 4)
        queued = [queue(database, settings, body, task=task) for task in range(3)]
        assert eventually(lambda: all(final(database, one).state == "committed" for one in queued))
    finally:
        stop.set()
        running.join()
    said = [record.getMessage() for record in caplog.records if unnamed.name in record.getMessage()]
    assert said == [f"1 leftovers cannot be removed and keep their room, among them {unnamed}: Is a directory"]
