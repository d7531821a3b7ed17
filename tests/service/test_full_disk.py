"""On a disk without a free byte: what frees room works, its bytes are free at once, and nothing else breaks."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from engram import Client
from engram.errors import StorageFull, Unavailable
from engram.oversight import TokenCreate
from engram_service import storage, tokens
from engram_service.app import create_app
from engram_service.collect import collect
from engram_service.database import Database
from engram_service.room import Room
from engram_service.settings import Settings
from engram_service.storage import PackStore, Reserve
from tests.contents import Filling, create, fill, pictures
from tests.disks import fill_up, free_bytes, small_disk
from tests.models import model
from tests.servers import ServiceThread, http
from tests.uploads import queue, tar_of_arrays

DISK_BYTES = 8 * 2**20
RESERVE_BYTES = 2**20


def two_buffers(database: Database, settings: Settings) -> None:
    """One with three tasks and a small one, and a token."""
    for name in ("b", "c"):
        create(database, name, budget_bytes=3 * 10**5, quality=90)
    for task in range(3):
        fill(database, settings, task, {2 * task: 70, 2 * task + 1: 70})
    fill(database, settings, 0, {0: 20}, name="c")
    with database.session() as session:
        session.connection().exec_driver_sql("UPDATE ingests SET state = 'committed'")
    for path in settings.spool_dir.iterdir():
        path.unlink()
    with database.session() as session:
        tokens.create(session, TokenCreate(name="trainer"))


@pytest.fixture
def full(once: Callable[[Filling], tuple[Path, Any]], tmp_path: Path) -> Iterator[ServiceThread]:
    """A service with `two_buffers`, whose disk was filled to the last byte."""
    with small_disk(tmp_path / "disk", DISK_BYTES) as disk:
        shutil.copytree(once(two_buffers)[0], disk / "data")
        settings = Settings(data_dir=disk / "data", reserve_bytes=RESERVE_BYTES, workers=0)
        service = ServiceThread(settings)
        fill_up(disk / "others")
        assert free_bytes(disk) == 0
        yield service
        service.stop()


CHANGES: dict[str, tuple[str, Callable[[httpx.Client], httpx.Response]]] = {
    "delete a task": ("task.delete", lambda client: client.delete("/v1/buffers/b/tasks/1")),
    "delete a buffer": ("buffer.delete", lambda client: client.delete("/v1/buffers/b")),
    "shrink a budget": ("buffer.change", lambda client: client.patch("/v1/buffers/b", json={"budget_bytes": 60_000})),
    "remove a class": ("exemplars.remove", lambda client: client.delete("/v1/buffers/b/exemplars?class_id=2")),
}
"""What each is in the audit, and how it is done."""


@pytest.mark.parametrize(
    "name",
    [
        "delete a task",
        "shrink a budget",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("delete a buffer", "remove a class")),
    ],
)
def test_what_frees_room_works_on_a_full_disk_and_frees_it_at_once(full: ServiceThread, name: str) -> None:
    store: PackStore = full.state.store
    before = sum(store.path(digest).stat().st_size for digest, _ in store.digests())
    action, change = CHANGES[name]
    with http(full) as client:
        answer = change(client)
        assert answer.status_code in (200, 204), answer.text
        assert client.get("/v1/audit?limit=1").json()["entries"][0]["action"] == action
        left = {pack["digest"] for pack in client.get("/v1/buffers/c/manifest").json()["packs"]}
        if name != "delete a buffer":
            left |= {pack["digest"] for pack in client.get("/v1/buffers/b/manifest").json()["packs"]}
            assert client.get("/v1/buffers/b").json()["used_bytes"] <= 3 * 10**5
            assert client.get("/v1/buffers/b/draw?size=50").status_code == 200
    assert {digest for digest, _ in store.digests()} == left
    assert sum(store.path(digest).stat().st_size for digest in left) < before


def test_a_token_can_be_revoked_on_a_full_disk(full: ServiceThread) -> None:
    with http(full) as client:
        made = [token["id"] for token in client.get("/v1/tokens").json()["tokens"]]
        assert [client.delete(f"/v1/tokens/{token_id}").status_code for token_id in made] == [200]
        assert client.get("/v1/audit?limit=1").json()["entries"][0]["action"] == "token.revoke"


@pytest.mark.slow
def test_everything_can_be_deleted_step_by_step_until_there_is_room_for_uploads(full: ServiceThread) -> None:
    with http(full) as client:
        for task in range(3):
            assert client.delete(f"/v1/buffers/b/tasks/{task}").status_code == 204
        assert client.delete("/v1/buffers/c").status_code == 204
        assert client.get("/v1/buffers/b").json()["used_bytes"] == 0
        (full.settings.data_dir.parent / "others").unlink()
        body = tar_of_arrays(pictures(0, 20), [0] * 20)
        assert client.post("/v1/buffers/b/tasks/7/ingests", content=body).status_code == 202


def test_a_full_disk_makes_the_service_unready_until_there_is_room(full: ServiceThread) -> None:
    with http(full) as client:
        health, ready = client.get("/healthz"), client.get("/readyz")
        assert (health.status_code, health.json()["status"], ready.status_code) == (200, "degraded", 503)
        assert "0 bytes are free" in ready.json()["detail"]
        assert client.get("/v1/buffers/b/draw?size=5").status_code == 200
        body = tar_of_arrays(pictures(0, 20), [0] * 20)
        assert client.post("/v1/buffers/b/tasks/7/ingests", content=body).status_code == 507
        assert client.delete("/v1/buffers/b/tasks/0").status_code == 204
        (full.settings.data_dir.parent / "others").unlink()
        assert client.get("/readyz").status_code == 200
    assert full.settings.reserve_path.stat().st_size == RESERVE_BYTES


def test_an_upload_can_be_cancelled_on_a_full_disk(full: ServiceThread) -> None:
    with full.state.room.reserve.given_up():
        waiting = queue(full.state.database, full.settings, bytes(1000))
    fill_up(full.settings.data_dir.parent / "more")
    with http(full) as client:
        assert client.delete(f"/v1/ingests/{waiting.id}").json()["state"] == "cancelled"
    # Nothing is kept to be tried again where there is no room.
    collect(full.state.database, full.state.store, full.settings)
    assert list(full.settings.spool_dir.iterdir()) == []


def test_an_upload_takes_the_room_of_those_that_are_only_kept_to_be_tried_again(full: ServiceThread) -> None:
    others = full.settings.data_dir.parent / "others"
    others.unlink()
    database = full.state.database
    failed = [queue(database, full.settings, bytes(300_000), task=task) for task in (5, 6)]
    with http(full) as client:
        for one in failed:
            client.delete(f"/v1/ingests/{one.id}")
        fill_up(others)
        body = tar_of_arrays(pictures(0, 60), [0] * 60)
        assert free_bytes(full.settings.data_dir) < len(body) < 500_000
        sent = client.post("/v1/buffers/b/tasks/7/ingests", content=body)
        assert sent.status_code == 202, sent.text
        assert not client.get(f"/v1/ingests/{failed[0].id}").json()["can_retry"]
    assert [path.stem for path in full.settings.spool_dir.iterdir()] == [sent.json()["id"]]


def test_the_collector_works_on_a_full_disk(full: ServiceThread) -> None:
    database, store = full.state.database, full.state.store
    with full.state.room.reserve.given_up(), database.session() as session:
        session.connection().exec_driver_sql("UPDATE packs SET until = 3, retired_at = 0 WHERE task = 1")
    fill_up(full.settings.data_dir.parent / "more")
    assert collect(database, store, full.settings).packs == 1


@pytest.mark.slow
def test_a_change_larger_than_the_reserve_goes_task_by_task(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", DISK_BYTES) as disk:
        settings = Settings(data_dir=disk / "data", reserve_bytes=2**17, workers=0)
        service = ServiceThread(settings)
        create(service.state.database, budget_bytes=3 * 10**6, quality=95)
        for task in range(12):
            fill(service.state.database, settings, task, {task: 200})
        fill_up(disk / "others")
        with http(service) as client:
            before = client.get("/v1/buffers/b").json()
            assert before["used_bytes"] > 4 * 2**17
            wanted = before["used_bytes"] * 3 // 4
            answer = client.patch("/v1/buffers/b", json={"budget_bytes": wanted})
            assert answer.status_code == 200, answer.text
            after = answer.json()
            assert 0.9 * wanted < after["used_bytes"] <= after["budget_bytes"] == wanted
            assert after["generation"] > before["generation"] + 1
            assert client.get("/v1/buffers/b/draw?size=50").status_code == 200
        service.stop()


def test_a_service_starts_on_a_full_disk(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", DISK_BYTES) as disk:
        settings = Settings(data_dir=disk / "data", reserve_bytes=RESERVE_BYTES)
        create_app(settings).state.database.close()
        fill_up(disk / "others")
        service = ServiceThread(settings)
        with http(service) as client:
            assert client.get("/readyz").status_code == 503
            assert client.post("/v1/buffers", json={"name": "c", "budget_bytes": 1000}).status_code in (201, 507)
        service.stop()


def test_a_reserve_is_kept_as_far_as_there_is_room(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 2**20) as disk:
        reserve = Reserve(disk / "reserve", 2**19)
        assert reserve.keep()
        with reserve.given_up():
            assert free_bytes(disk) == 2**20
            # Others do not take it back meanwhile.
            assert not Reserve(disk / "reserve", 2**19).keep()
            (disk / "others").write_bytes(bytes(3 * 2**18))
        assert reserve.path.stat().st_size == 2**18
        fill_up(disk / "all")
        left = []
        real = os.posix_fallocate

        def allocate(file: int, first: int, size: int) -> None:
            left.append(free_bytes(disk))
            real(file, first, size)

        # What it has is not given up on the way to more: others would take it.
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(os, "posix_fallocate", allocate)
            assert not reserve.keep()
        assert set(left) == {0}
        assert reserve.path.stat().st_size == 2**18
        (disk / "all").unlink()
        (disk / "others").unlink()
        assert reserve.keep()
        assert reserve.path.stat().st_size == 2**19


def test_nobody_waits_for_the_reserve_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "WAIT_S", 0.1)
    reserve, other = (Reserve(tmp_path / "reserve", 2**16) for _ in range(2))
    with reserve.given_up():
        with pytest.raises(Unavailable, match="something else is freeing room"), other.given_up():
            pass
        assert not reserve.path.exists()
    with other.given_up():
        assert not reserve.path.exists()
    assert reserve.path.stat().st_size == 2**16


def test_work_that_finds_no_room_even_then_is_refused(settings: Settings, database: Database) -> None:
    calls = []

    def work() -> None:
        calls.append(settings.reserve_path.exists())
        raise StorageFull("there is no room")

    room = Room(database, PackStore(settings.packs_dir), settings)
    assert room.reserve.keep()
    with pytest.raises(StorageFull):
        room.freeing(work)
    assert calls == [True, False]
    assert settings.reserve_path.exists()


def test_an_extractor_can_be_deleted_on_a_full_disk(full: ServiceThread) -> None:
    others = full.settings.data_dir.parent / "others"
    others.unlink()
    with Client(full.url) as client:
        digest = client.register_extractor(model()).sha256
        fill_up(others)
        client.delete_extractor(digest)
        assert client.extractors() == []
    assert list(full.settings.extractors_dir.iterdir()) == []
