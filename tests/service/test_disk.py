"""What the service takes on its disk, as it tells it."""

from __future__ import annotations

import shutil

from engram.oversight import Disk
from engram.schemas import ForkCreate
from engram_service import commit, disk
from engram_service.database import Database
from engram_service.settings import Settings
from engram_service.storage import PackStore
from tests.contents import create, fill
from tests.servers import ServiceThread, http
from tests.uploads import queue


def usage(database: Database, settings: Settings) -> Disk:
    with database.reading() as session:
        return disk.usage(session, settings)


def test_packs_are_counted_once_and_live_ones_apart_from_those_of_older_generations(
    database: Database, store: PackStore, settings: Settings
) -> None:
    nothing = usage(database, settings)
    assert (nothing.live_bytes, nothing.retired_bytes, nothing.spool_bytes, nothing.extractor_bytes) == (0, 0, 0, 0)
    assert nothing.database_bytes > 0
    create(database)
    for task in range(3):
        fill(database, settings, task, {task: 12})
    commit.fork(database, store, "b", ForkCreate(name="snapshot", frozen=True))
    before = usage(database, settings)
    on_disk = {digest: store.path(digest).stat().st_size for digest, _ in store.digests()}
    assert (before.live_bytes, before.retired_bytes) == (sum(on_disk.values()), 0)
    commit.reshare(database, store, "b", without_task=1)
    # The snapshot still has it.
    assert usage(database, settings).retired_bytes == 0
    fill(database, settings, 3, {3: 12})
    commit.reshare(database, store, "b", without_task=3)
    after = usage(database, settings)
    assert after.live_bytes == before.live_bytes
    assert after.live_bytes + after.retired_bytes == sum(store.path(d).stat().st_size for d, _ in store.digests())


def test_waiting_uploads_and_the_state_of_the_disk_are_told(served: ServiceThread) -> None:
    create(served.state.database)
    queue(served.state.database, served.settings, bytes(1234))
    (served.settings.extractors_dir / ("ab" * 32)).write_bytes(bytes(77))
    (served.settings.spool_dir / "part.part").write_bytes(bytes(10))
    with http(served) as client:
        found = Disk.model_validate(client.get("/v1/disk").json())
    total = shutil.disk_usage(served.settings.data_dir).total
    assert (found.spool_bytes, found.extractor_bytes, found.total_bytes) == (1244, 77, total)
    assert 0 < found.free_bytes < total


def test_a_folder_that_is_gone_takes_nothing(database: Database, settings: Settings) -> None:
    shutil.rmtree(settings.spool_dir)
    assert usage(database, settings).spool_bytes == 0
