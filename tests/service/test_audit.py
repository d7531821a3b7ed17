"""The audit: every change has its row, with who made it, and what failed has none."""

from __future__ import annotations

import time
from hashlib import sha256
from typing import Any

import httpx
import pytest
from sqlalchemy import func, select, update

from engram_service import audit
from engram_service.collect import collect
from engram_service.database import Database
from engram_service.settings import Settings
from engram_service.storage import PackStore
from engram_service.tables import AuditRow
from engram_service.tokens import make_secret
from tests.contents import create, pictures
from tests.models import model
from tests.servers import ServiceThread, http
from tests.uploads import queue, tar_of_arrays, work_through


def token(admin: httpx.Client, name: str, scope: str, prefix: str = "") -> str:
    made = admin.post("/v1/tokens", json={"name": name, "scope": scope, "prefix": prefix})
    found: str = made.json()["token"]
    return found


def entries(admin: httpx.Client, **filters: str) -> list[dict[str, Any]]:
    answer = admin.get("/v1/audit", params=filters)
    assert answer.status_code == 200, answer.text
    found: list[dict[str, Any]] = answer.json()["entries"]
    return found


def upload(client: httpx.Client, task: int, **headers: str) -> httpx.Response:
    return client.post(
        f"/v1/buffers/b/tasks/{task}/ingests",
        content=tar_of_arrays(pictures(task, 12), [task] * 12),
        headers=headers,
    )


def work(guarded: ServiceThread) -> None:
    work_through(guarded.state.database, guarded.state.store, guarded.settings)


def test_every_change_of_a_buffer_is_recorded_with_what_it_did(guarded: ServiceThread, admin: httpx.Client) -> None:
    trainer = token(admin, "trainer", "write")
    assert admin.post("/v1/buffers", json={"name": "b", "budget_bytes": 10**6, "quality": 50}).status_code == 201
    with http(guarded, trainer) as client:
        queued = upload(client, 0, **{"X-Request-ID": "run-1"}).json()
        upload(client, 1)
    work(guarded)
    names = admin.patch("/v1/buffers/b", json={"class_names": {"0": "zero"}})
    assert names.status_code == 200
    relabelled = admin.patch("/v1/buffers/b/exemplars", params={"class_id": 1}, json={"class_id": 7})
    assert relabelled.status_code == 200, relabelled.text
    assert admin.delete("/v1/buffers/b/exemplars", params={"class_id": 7}).status_code == 200
    held = admin.get("/v1/buffers/b").json()
    assert admin.patch("/v1/buffers/b", json={"budget_bytes": 4000}).status_code == 200
    shrunk = admin.get("/v1/buffers/b").json()
    assert admin.post("/v1/buffers/b/forks", json={"name": "c", "frozen": True}).status_code == 201
    assert admin.delete("/v1/buffers/b/tasks/0").status_code == 204
    assert admin.delete("/v1/buffers/b").status_code == 204

    told = entries(admin, buffer="b")[::-1]
    assert [(entry["action"], entry["who"]) for entry in told] == [
        ("buffer.create", "admin"),
        ("ingest.receive", "trainer"),
        ("ingest.receive", "trainer"),
        ("ingest.commit", "trainer"),
        ("ingest.commit", "trainer"),
        ("buffer.change", "admin"),
        ("exemplars.relabel", "admin"),
        ("exemplars.remove", "admin"),
        ("buffer.change", "admin"),
        ("task.delete", "admin"),
        ("buffer.delete", "admin"),
    ]
    commit = told[3]
    assert (commit["subject"], commit["request_id"], commit["token_id"] is not None) == (queued["id"], "run-1", True)
    assert (commit["before"]["exemplars"], commit["after"]["exemplars"]) == (0, 12)
    assert told[5]["after"]["class_names"] == {"0": "zero"}
    assert (told[6]["subject"], told[6]["after"]["class_id"]) == ("class id 1", 7)
    resize = told[8]
    assert (resize["before"]["budget_bytes"], resize["after"]["budget_bytes"]) == (10**6, 4000)
    for figures, buffer in ((resize["before"], held), (resize["after"], shrunk)):
        assert (figures["used_bytes"], figures["exemplars"]) == (buffer["used_bytes"], buffer["exemplars"])
    assert told[9]["subject"] == "task 0"
    assert told[10]["before"]["tasks"] == 0
    (fork,) = entries(admin, buffer="c")
    assert (fork["action"], fork["after"]["forked_from"]) == ("buffer.fork", "b")
    assert fork["after"]["generation"] == shrunk["generation"]
    assert (fork["after"]["exemplars"], fork["after"]["frozen"]) == (shrunk["exemplars"], True)


def test_a_cancelled_and_a_failed_ingest_are_recorded_once(guarded: ServiceThread, admin: httpx.Client) -> None:
    trainer = token(admin, "trainer", "write")
    create(guarded.state.database, budget_bytes=10**6)
    with http(guarded, trainer) as client:
        first = upload(client, 0).json()["id"]
        assert [client.delete(f"/v1/ingests/{first}").status_code for _ in range(2)] == [200, 200]
        second = client.post("/v1/buffers/b/tasks/0/ingests", content=b"no tar at all" * 100).json()["id"]
    work(guarded)
    told = [(entry["action"], entry["subject"], entry["who"]) for entry in entries(admin, action="ingest")[::-1]]
    assert told == [
        ("ingest.receive", first, "trainer"),
        ("ingest.cancel", first, "trainer"),
        ("ingest.receive", second, "trainer"),
        ("ingest.fail", second, "trainer"),
    ]
    (failed,) = entries(admin, action="ingest.fail")
    assert failed["after"]["problem"] == "bad-upload"


def test_an_upload_that_is_given_up_is_recorded(settings: Settings, database: Database, store: PackStore) -> None:
    create(database)
    queue(database, settings, b"a tar")
    tired = settings.model_copy(update={"max_attempts": 0})
    work_through(database, store, tired)
    with database.reading() as session:
        actions = session.scalars(select(AuditRow.action).order_by(AuditRow.id)).all()
    assert actions == ["buffer.create", "ingest.receive", "ingest.fail"]


def test_tokens_and_extractors_are_recorded(admin: httpx.Client) -> None:
    made = admin.post("/v1/tokens", json={"name": "trainer", "prefix": "lab-"}).json()
    for _ in range(2):
        admin.delete(f"/v1/tokens/{made['id']}")
    data = model()
    digest = sha256(data).hexdigest()
    for _ in range(2):
        assert admin.put(f"/v1/extractors/{digest}", content=data).is_success
    assert admin.delete(f"/v1/extractors/{digest}").status_code == 204
    told = [(entry["action"], entry["subject"]) for entry in entries(admin)[::-1]]
    assert told == [
        ("token.create", "trainer"),
        ("token.revoke", "trainer"),
        ("extractor.register", digest),
        ("extractor.delete", digest),
    ]
    (created,) = entries(admin, action="token.create")
    assert created["after"] == {
        "id": made["id"],
        "name": "trainer",
        "scope": "read",
        "prefix": "lab-",
        "expires_in_s": None,
        "requests_per_s": None,
    }


def test_what_fails_is_not_in_the_audit(guarded: ServiceThread, admin: httpx.Client) -> None:
    create(guarded.state.database, budget_bytes=10**6)
    upload(admin, 0)
    work(guarded)
    before = entries(admin)
    answers = [
        admin.post("/v1/buffers", json={"name": "b", "budget_bytes": 1}),
        admin.patch("/v1/buffers/b", json={"budget_bytes": 100}, headers={"If-Match": '"77"'}),
        admin.delete("/v1/buffers/b", headers={"If-Match": '"77"'}),
        admin.delete("/v1/buffers/nothing"),
        admin.delete("/v1/buffers/b/tasks/9"),
        admin.delete("/v1/buffers/b/exemplars", params={"class_id": 9}),
        admin.delete("/v1/tokens/nothing"),
        admin.post("/v1/buffers/b/forks", json={"name": "b"}),
    ]
    assert [answer.status_code for answer in answers] == [409, 409, 409, 404, 404, 404, 404, 409]
    assert entries(admin) == before


def test_the_audit_is_paged_and_filtered(guarded: ServiceThread, admin: httpx.Client) -> None:
    for number in range(7):
        create(guarded.state.database, f"b{number}")
    ids: list[int] = []
    cursor: dict[str, str] = {}
    while True:
        page = admin.get("/v1/audit", params={"limit": "3", **cursor}).json()
        ids += [entry["id"] for entry in page["entries"]]
        if page["next"] is None:
            break
        cursor = {"cursor": page["next"]}
    assert ids == sorted(set(ids), reverse=True)
    assert len(ids) == 7
    assert [entry["buffer"] for entry in entries(admin, buffer="b3")] == ["b3"]
    assert len(entries(admin, action="buffer.create", who="service")) == 7
    assert len(entries(admin, action="buffer")) == 7
    assert entries(admin, action="buf") == entries(admin, who="nobody") == entries(admin, buffer="none") == []
    for wrong in ({"cursor": "x"}, {"cursor": "-1"}, {"limit": "0"}, {"limit": "100000"}, {"action": "%"}):
        assert admin.get("/v1/audit", params=wrong).status_code == 422


def test_an_administrator_of_a_prefix_sees_what_was_done_to_its_buffers(
    guarded: ServiceThread, admin: httpx.Client
) -> None:
    for name in ("lab-1", "lab", "other"):
        create(guarded.state.database, name)
    with http(guarded, token(admin, "lab", "admin", "lab-")) as client:
        assert [entry["buffer"] for entry in entries(client)] == ["lab-1"]
        assert [entry["buffer"] for entry in entries(client, buffer="lab-1")] == ["lab-1"]
        assert client.get("/v1/audit", params={"buffer": "other"}).status_code == 403
    with http(guarded, token(admin, "writer", "write")) as client:
        assert client.get("/v1/audit").status_code == 403


def test_names_by_the_thousand_do_not_fill_the_audit(guarded: ServiceThread, admin: httpx.Client) -> None:
    create(guarded.state.database)
    names = {str(number): f"{number}-" + "n" * 190 for number in range(250)}
    assert admin.patch("/v1/buffers/b", json={"class_names": names}).status_code == 200
    (entry,) = entries(admin, action="buffer.change")
    assert len(entry["after"]["class_names"]) == audit.MAX_ITEMS + 1
    assert len(str(entry)) < 6000


def test_the_audit_is_kept_for_its_time(settings: Settings, database: Database, store: PackStore) -> None:
    create(database, "old")
    with database.session() as session:
        session.execute(update(AuditRow).values(at=time.time() - settings.audit_s - 1))
    create(database, "new")
    assert collect(database, store, settings).records == 1
    assert collect(database, store, settings).records == 0
    with database.reading() as session:
        assert session.scalars(select(AuditRow.buffer)).all() == ["new"]


def test_a_change_and_its_row_stand_or_fall_together(database: Database) -> None:
    def interrupted() -> None:
        with database.session() as session:
            audit.record(session, "buffer.create", buffer="b")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        interrupted()
    with database.reading() as session:
        assert session.scalar(select(func.count()).select_from(AuditRow)) == 0


def test_a_nul_half_a_character_or_a_token_in_what_was_changed_is_written_otherwise(database: Database) -> None:
    with database.session() as session:
        audit.record(
            session,
            "test",
            subject="a\0b",
            before={"x": [f"see {make_secret()}"]},
            after={"k\0": "\ud800", "n": [None, 1.5, True], "t": "x" * 999},
        )
    with database.reading() as session:
        row = session.scalars(select(AuditRow)).one()
    assert row.after is not None
    assert row.before == {"x": ["see engram_[hidden]"]}
    assert (row.subject, row.after["n"], len(row.after["t"])) == ("a\ufffdb", [None, 1.5, True], 200)
