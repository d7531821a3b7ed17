"""On PostgreSQL writers run side by side: two requests for one name are a conflict, never a defect."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import pytest
from pydantic import SecretStr
from sqlalchemy import text

from engram.errors import Conflict, NotFound
from engram.schemas import BufferCreate, ForkCreate
from engram_service import buffers
from engram_service.collect import collect
from engram_service.commit import fork
from engram_service.database import Database
from engram_service.settings import Settings
from engram_service.storage import PackStore
from engram_service.tokens import RECHECK_S
from tests.contents import create, fill
from tests.servers import ServiceThread, eventually, http

pytestmark = pytest.mark.services

T = TypeVar("T")


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
