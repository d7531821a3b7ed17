"""On PostgreSQL writers run side by side: two requests for one name are a conflict, never a defect."""

from __future__ import annotations

import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
from pydantic import SecretStr
from sqlalchemy import create_engine, text
from sqlalchemy.orm import Session

from engram.errors import Conflict, NotFound
from engram.memory import Where
from engram.oversight import WhatIfAsk
from engram.schemas import BufferCreate, ForkCreate
from engram_service import backup, buffers, decisions, ingest, samples, served, tallies
from engram_service.collect import collect
from engram_service.commit import fork, remove
from engram_service.database import Database
from engram_service.replay import View
from engram_service.restore import restore
from engram_service.samples import SampleFolder
from engram_service.served import Served
from engram_service.settings import Settings
from engram_service.storage import PackStore
from engram_service.tokens import RECHECK_S
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


def test_tokens_sessions_and_the_audit_of_two_replicas(settings: Settings, database: Database) -> None:
    create(database, "lab-1")
    create(database, "other")
    guarded = settings.model_copy(update={"admin_token": SecretStr("of-the-environment"), "workers": 0})
    services = [ServiceThread(guarded) for _ in range(2)]
    try:
        with http(services[0], "of-the-environment") as admin:
            made = admin.post("/v1/tokens", json={"name": "lab", "scope": "admin", "prefix": "lab-"}).json()
            with http(services[1], made["token"]) as lab, http(services[1]) as browser:
                assert [found["name"] for found in lab.get("/v1/buffers").json()["buffers"]] == ["lab-1"]
                assert [found["buffer"] for found in lab.get("/v1/audit").json()["entries"]] == ["lab-1"]
                assert lab.get("/v1/buffers/other").status_code == 403
                csrf = re.findall(r'name="csrf" value="([^"]+)"', browser.get("/console/login").text)[0]
                begun = browser.post("/console/login", data={"csrf": csrf, "token": made["token"]})
                assert begun.status_code == 303, begun.text
                assert browser.get("/console").status_code == 200
                admin.delete(f"/v1/tokens/{made['id']}")
                revoked_at = time.monotonic()
                while lab.get("/v1/buffers").status_code == 200:
                    assert time.monotonic() < revoked_at + 4 * RECHECK_S
                assert browser.get("/console").status_code == 303
            services[1].state.tokens.write_down()
            (token,) = admin.get("/v1/tokens").json()["tokens"]
            assert token["last_used_at"] is not None
            actions = [entry["action"] for entry in admin.get("/v1/audit", params={"limit": 3}).json()["entries"]]
            assert actions == ["token.revoke", "session.begin", "token.create"]
        old = guarded.model_copy(update={"audit_s": 1e-6})
        assert collect(database, PackStore(settings.packs_dir), old).records == 5
    finally:
        for service in services:
            service.stop()


def test_what_several_services_serve_adds_up_while_buffers_are_deleted_and_nobody_waits_for_ever(
    database: Database, settings: Settings
) -> None:
    names = ["a", "b", "c"]
    for name in names:
        create(database, name)
        fill(database, settings, 0, {0: 2, 1: 2}, name=name)
    with database.reading() as session:
        views = [
            View(name, 1, buffers.find(session, name).created_at, buffers.packs_to_draw_from(session, name, 1))
            for name in names
        ]
    own = [Database(settings) for _ in range(4)]
    several = [Served(each) for each in own]

    def serve(number: int) -> None:
        for _ in range(20):
            # Each in another order.
            for view in views[number % 3 :] + views[: number % 3]:
                several[number].note(view, np.array([0, 1, 1]), 10, 0)
            several[number].flush()

    with ThreadPoolExecutor(6) as pool:
        running = [pool.submit(serve, number) for number in range(4)]
        with database.session() as session:
            buffers.delete(session, "b")
        for task in range(1, 5):
            fill(database, settings, task, {0: 2}, name="c")
        for ended in running:
            ended.result()
    for counted, its_database in zip(several, own, strict=True):
        # A transaction that the server gave up on is written later.
        counted.stop()
        its_database.close()
    with database.reading() as session:
        found = {(row.buffer, row.class_id): row.exemplars for row in served.page(session, limit=99).served}
        assert served.by_class(session, "a", limit=9, after=(0, 0))[0, 1].exemplars == 160
        assert served.by_who(session, "a", limit=9)["service"].exemplars == 240
        assert tallies.read(session)["ingests"] == {"committed": 7}
        first = served.page(session, limit=3)
        assert len(served.page(session, limit=3, cursor=first.next).served) == 1
    assert found == {("a", 0): 80, ("a", 1): 160, ("c", 0): 80, ("c", 1): 160}


def test_metrics_are_told_of_a_postgresql_database(database: Database, settings: Settings) -> None:
    create(database)
    fill(database, settings, 0, {0: 2})
    service = ServiceThread(settings)
    try:
        with http(service) as client:
            assert client.get("/v1/buffers/b/draw?size=2").status_code == 200
            text = client.get("/metrics").text
    finally:
        service.stop()
    assert 'engram_draw_exemplars_total{buffer="b"} 2.0' in text
    assert re.search(r'engram_disk_bytes\{part="database"\} [1-9]', text)
    assert 'engram_ingests_ended_total{state="committed"} 1.0' in text
    with database.reading() as session:
        assert [row.exemplars for row in served.page(session, limit=9).served] == [2]


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


def test_an_upload_that_is_tried_again_while_it_is_sent_again_is_queued_once(
    database: Database, settings: Settings
) -> None:
    create(database)
    queued = queue(database, settings, BODY, key="k")
    with database.session() as session:
        ingest.cancel(session, queued.id)
    with database.session() as session, ThreadPoolExecutor(1) as pool:
        ingest.retry(session, queued.id)
        sent = pool.submit(queue, database, settings, BODY, key="k")
        assert wait([sent], timeout=0.5).not_done
        session.commit()
        assert sent.result().id == queued.id


def test_an_upload_that_is_sent_again_and_the_deletion_of_its_buffer_do_not_wait_for_each_other(
    database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    create(database)
    queued = queue(database, settings, BODY, key="k")
    with database.session() as session:
        ingest.cancel(session, queued.id)
    arrival = ingest._arrival

    def delete() -> None:
        with database.session() as session:
            buffers.delete(session, "b")

    with ThreadPoolExecutor(1) as pool:

        def deleted_meanwhile(session: Session, buffer: str) -> float:
            deletions.append(pool.submit(delete))
            assert wait(deletions, timeout=0.5).not_done
            return arrival(session, buffer)

        deletions: list[Future[None]] = []
        monkeypatch.setattr(ingest, "_arrival", deleted_meanwhile)
        assert queue(database, settings, BODY, key="k").id != queued.id
        deletions[0].result()


def test_originals_come_and_go_with_what_they_are_of(database: Database, settings: Settings) -> None:
    create(database, quality=None)
    store = PackStore(settings.packs_dir)
    queued = queue(database, settings, tar_of_arrays(pictures(3, 40), np.arange(40) % 2))
    work_through(database, store, settings)
    assert final(database, queued).state == "committed"
    fork(database, store, "b", ForkCreate(name="f"))
    remove(database, store, "b", Where(class_id=1))
    with database.reading() as session:
        folder = SampleFolder(settings.samples_dir)
        kept = {name: samples.OfBuffer(session, folder, name)[0] for name in ("b", "f")}
        again = decisions.what_if(session, "b", 0, WhatIfAsk(epsilon=0.5))
    assert {name: {*sample.class_ids.tolist()} for name, sample in kept.items()} == {"b": {0}, "f": {0, 1}}
    assert again.epsilon == 0.5
    assert collect(database, store, settings.model_copy(update={"grace_s": 0})).samples == 0
    with database.session() as session:
        buffers.delete(session, "f")
    assert collect(database, store, settings.model_copy(update={"grace_s": 0})).samples == 1


def test_pages_of_buffers_are_those_of_a_postgresql_database(database: Database, settings: Settings) -> None:
    create(database, "b")
    fill(database, settings, 0, {0: 8, 1: 8})
    fork(database, PackStore(settings.packs_dir), "b", ForkCreate(name="c", frozen=True))
    service = ServiceThread(settings)
    try:
        with http(service) as client:
            pages = ("", "/classes", "/forecast?new_classes=1", "/snapshots", "/compare?with=c")
            for path in (*(f"buffers/b{page}" for page in pages), "ingests?buffer=b&state=committed", "extractors"):
                assert client.get(f"/console/{path}").status_code == 200, path
            assert "of 1.00 MB" in client.get("/console").text
            assert client.get("/v1/buffers/c").json()["forked_from"] == "b"
    finally:
        service.stop()
