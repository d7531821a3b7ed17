"""An ingest that failed or was cancelled is tried again from its upload, which is kept for a while."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import select, update

from engram.errors import Conflict, NotFound
from engram.schemas import BufferChange, ForkCreate, Ingest
from engram_service import buffers, commit, ingest, work
from engram_service.acting import ACTING, Acting, Principal
from engram_service.collect import collect
from engram_service.database import Database
from engram_service.settings import Settings
from engram_service.storage import PackStore
from engram_service.tables import AuditRow, IngestRow
from tests.contents import create, pictures
from tests.servers import ServiceThread, http
from tests.uploads import final, queue, tar_of_arrays, work_through

BODY = tar_of_arrays(pictures(1, 4), [0, 1, 0, 1])
OTHER = tar_of_arrays(pictures(2, 4), [0, 1, 0, 1])


def retry(database: Database, one: Ingest) -> Ingest:
    with database.session() as session:
        return ingest.retry(session, one.id)


def cancel(database: Database, one: Ingest) -> Ingest:
    with database.session() as session:
        return ingest.cancel(session, one.id)


def spooled(settings: Settings) -> set[str]:
    return {path.stem for path in settings.spool_dir.iterdir()}


def seen(database: Database) -> int:
    with database.reading() as session:
        if not buffers.read(session, "b").tasks:
            return 0
        return sum(row.seen for row in buffers.task(session, "b", 0).classes)


def later(database: Database, seconds: float) -> None:
    with database.session() as session:
        session.execute(update(IngestRow).values(updated_at=IngestRow.updated_at - seconds))


def test_an_ingest_that_failed_commits_once_what_was_wrong_is_made_right_and_still_says_what_that_was(
    database: Database, store: PackStore, settings: Settings
) -> None:
    create(database, budget_bytes=30)
    queued = queue(database, settings, BODY, key="k")
    work_through(database, store, settings)
    failed = final(database, queued)
    assert (failed.state, failed.can_retry, failed.failures) == ("failed", True, [])
    commit.change(database, store, "b", BufferChange(budget_bytes=10**5))
    again = retry(database, queued)
    assert (again.id, again.state, again.attempts, again.problem) == (queued.id, "received", 0, None)
    assert (again.can_retry, again.failures) == (False, [failed.problem])
    work_through(database, store, settings)
    ended = final(database, queued)
    assert (ended.state, ended.problem, ended.failures) == ("committed", None, [failed.problem])
    assert (spooled(settings), seen(database)) == (set(), 4)
    with database.reading() as session:
        (row,) = session.scalars(select(AuditRow).where(AuditRow.action == "ingest.retry"))
        assert (row.buffer, row.subject) == ("b", queued.id)
        assert row.before is not None
        assert row.before["problem"] == failed.problem
    with pytest.raises(Conflict, match="is committed; only one that failed or was cancelled"):
        retry(database, queued)


def test_a_cancelled_ingest_is_tried_again_over_http(served: ServiceThread) -> None:
    create(served.state.database)
    with http(served) as client:
        sent = client.post("/v1/buffers/b/tasks/0/ingests", content=BODY).json()
        path = f"/v1/ingests/{sent['id']}"
        early = client.post(f"{path}/retry")
        assert (early.status_code, early.json()["state"]) == (409, "received")
        assert client.delete(path).json()["can_retry"]
        again = client.post(f"{path}/retry")
        assert (again.status_code, again.headers["location"], again.json()["state"]) == (202, path, "received")
        assert client.post(f"{path}/retry").status_code == 409
        assert client.post("/v1/ingests/none/retry").status_code == 404
        gone = f"?extractor={'ab' * 32}"
        assert client.post(f"/v1/buffers/b/tasks/0/ingests{gone}", content=BODY).status_code == 404


def test_an_ingest_whose_extractor_is_gone_is_not_queued_again(served: ServiceThread) -> None:
    create(served.state.database)
    with http(served) as client:
        sent = client.post("/v1/buffers/b/tasks/0/ingests", content=BODY).json()
        client.delete(f"/v1/ingests/{sent['id']}")
        with served.state.database.session() as session:
            session.execute(update(IngestRow).values(options=sent["options"] | {"extractor": "ab" * 32}))
        assert client.post(f"/v1/ingests/{sent['id']}/retry").status_code == 404
        assert client.get(f"/v1/ingests/{sent['id']}").json()["can_retry"]


def test_what_is_tried_again_waits_behind_what_came_after_it(
    database: Database, store: PackStore, settings: Settings
) -> None:
    create(database)
    first, second = queue(database, settings, BODY), queue(database, settings, OTHER)
    cancel(database, first)
    held = ingest.claim(database, settings, owner="one")
    assert held is not None
    assert held.id == second.id
    again = retry(database, first)
    assert again.created_at > second.created_at
    # One ingest of a buffer at a time.
    assert ingest.claim(database, settings, owner="two") is None
    work.attempt(database, store, settings, held, threading.Event())
    work_through(database, store, settings)
    assert [final(database, one).generation for one in (first, second)] == [2, 1]


def test_a_worker_that_was_at_a_cancelled_ingest_does_not_end_the_next_try_of_it(
    database: Database, store: PackStore, settings: Settings
) -> None:
    create(database)
    queued = queue(database, settings, BODY)
    slow = ingest.claim(database, settings, owner="slow")
    assert slow is not None
    cancel(database, queued)
    retry(database, queued)
    quick = ingest.claim(database, settings, owner="quick")
    assert quick is not None
    work.attempt(database, store, settings, slow, threading.Event())
    assert final(database, queued).state == "selecting"
    work.attempt(database, store, settings, quick, threading.Event())
    assert (final(database, queued).state, seen(database)) == ("committed", 4)


def test_of_two_who_try_again_at_once_one_does(database: Database, store: PackStore, settings: Settings) -> None:
    create(database)
    queued = queue(database, settings, BODY)
    cancel(database, queued)

    def once(_: int) -> bool:
        try:
            retry(database, queued)
        except Conflict:
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert sorted(pool.map(once, range(4))) == [False, False, False, True]
    work_through(database, store, settings)
    assert seen(database) == 4


def test_an_upload_that_was_sent_again_under_its_key_is_not_tried_again_as_well(
    database: Database, store: PackStore, settings: Settings
) -> None:
    create(database)
    first = queue(database, settings, BODY, key="k")
    cancel(database, first)
    second = queue(database, settings, BODY, key="k")
    assert second.id != first.id
    assert not final(database, first).can_retry
    with pytest.raises(Conflict, match="or was sent again"):
        retry(database, first)
    collect(database, store, settings)
    assert spooled(settings) == {second.id}
    # The key is the ingest's still when it is tried again: it is the same upload.
    cancel(database, second)
    retry(database, second)
    assert queue(database, settings, BODY, key="k").id == second.id


def test_a_kept_upload_goes_when_its_time_is_over(database: Database, store: PackStore, settings: Settings) -> None:
    create(database)
    queued = queue(database, settings, BODY)
    cancel(database, queued)
    assert collect(database, store, settings).uploads == 0
    later(database, settings.failed_s - 60)
    assert collect(database, store, settings).uploads == 0
    assert final(database, queued).can_retry
    later(database, 60)
    assert collect(database, store, settings).uploads == 1
    assert (spooled(settings), final(database, queued).can_retry) == (set(), False)
    with pytest.raises(Conflict, match="upload its images again"):
        retry(database, queued)


def test_kept_uploads_go_the_oldest_first_when_they_are_too_many(
    database: Database, store: PackStore, settings: Settings
) -> None:
    create(database)
    queued = [queue(database, settings, BODY, task=task) for task in range(4)]
    for one in queued:
        cancel(database, one)
    few = settings.model_copy(update={"failed_bytes": 2 * len(BODY) + 1})
    assert collect(database, store, few).uploads == 2
    assert spooled(settings) == {one.id for one in queued[2:]}
    assert [final(database, one).can_retry for one in queued] == [False, False, True, True]
    collect(database, store, settings.model_copy(update={"failed_bytes": 0}))
    assert spooled(settings) == set()


def test_what_is_tried_again_is_no_longer_a_kept_upload(
    database: Database, store: PackStore, settings: Settings
) -> None:
    create(database)
    queued = queue(database, settings, BODY)
    cancel(database, queued)
    retry(database, queued)
    with database.session() as session:
        ingest.let_go(session, [queued.id])
    collect(database, store, settings.model_copy(update={"failed_s": 0.0, "failed_bytes": 0}))
    assert spooled(settings) == {queued.id}


def test_nothing_is_tried_again_in_a_snapshot_or_a_buffer_that_is_gone(
    database: Database, store: PackStore, settings: Settings
) -> None:
    create(database)
    queued = queue(database, settings, BODY)
    cancel(database, queued)
    commit.fork(database, store, "b", ForkCreate(name="frozen", frozen=True))
    with database.session() as session:
        session.execute(update(IngestRow).values(buffer="frozen"))
    with pytest.raises(Conflict, match="frozen"):
        retry(database, queued)
    with database.session() as session:
        buffers.delete(session, "frozen")
    with pytest.raises(NotFound):
        retry(database, queued)
    collect(database, store, settings)
    assert spooled(settings) == set()


def test_an_ingest_of_another_prefix_is_not_there_to_be_tried_again(database: Database, settings: Settings) -> None:
    create(database)
    queued = queue(database, settings, BODY)
    cancel(database, queued)
    for prefix, is_theirs in (("c", False), ("b", True)):
        token = ACTING.set(Acting(Principal("somebody", "write", prefix=prefix), "r1"))
        try:
            if is_theirs:
                retry(database, queued)
            else:
                with pytest.raises(NotFound):
                    retry(database, queued)
        finally:
            ACTING.reset(token)
    with database.reading() as session:
        row = session.get_one(IngestRow, queued.id)
        # What its worker does now is done on their behalf.
        assert (row.who, row.request_id) == ("somebody", "r1")


def test_only_the_last_failures_are_remembered(database: Database, store: PackStore, settings: Settings) -> None:
    create(database)
    queued = queue(database, settings, b"no tar")
    for number in range(ingest.FAILURES + 2):
        work_through(database, store, settings)
        assert len(retry(database, queued).failures) == min(number + 1, ingest.FAILURES)


def test_an_upload_that_is_gone_from_the_spool_is_no_defect_of_the_service(
    database: Database, store: PackStore, settings: Settings
) -> None:
    create(database)
    queued = queue(database, settings, BODY)
    ingest.spool_path(settings.spool_dir, queued.id).unlink()
    work_through(database, store, settings.model_copy(update={"max_attempts": 1}))
    problem = final(database, queued).problem
    assert problem is not None
    assert problem["type"].endswith("/unavailable")
    assert "is not in the spool folder" in problem["detail"]
