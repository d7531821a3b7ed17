"""A forecast says exactly what the change then does, and changes nothing itself."""

from __future__ import annotations

import time
from pathlib import Path

import httpx
import numpy as np
import pytest

from engram.errors import Conflict, NotFound
from engram.oversight import Forecast
from engram.schemas import BufferCreate, ForkCreate, Manifest, Per, ShareBy
from engram_service import buffers, commit
from engram_service.database import Database
from engram_service.forecast import forecast
from engram_service.settings import Settings
from engram_service.storage import PackStore
from engram_service.tables import PackRow
from tests.contents import adding, create, fill, pictures
from tests.photos import photos

Kept = dict[tuple[int, int], tuple[int, int]]
"""Exemplars and bytes by (task, class id)."""


def make(database: Database, settings: Settings, per: Per, share_by: ShareBy, quality: int | None = 50) -> None:
    budget_bytes = {"buffer": 24_000, "class": 5000}[per]
    with database.session() as session:
        wanted = BufferCreate(name="b", budget_bytes=budget_bytes, per=per, share_by=share_by, quality=quality)
        buffers.create(session, wanted)
    fill(database, settings, 0, {0: 50, 1: 30})
    fill(database, settings, 1, {2: 7, 1: 40, 5: 60})
    fill(database, settings, 4, {9: 1})


def told(database: Database, store: PackStore, **change: int) -> Forecast:
    with database.reading() as session:
        return forecast(session, store, "b", **change)


def kept(database: Database) -> tuple[Kept, Manifest]:
    with database.reading() as session:
        held = [
            ((row.task, class_id), (count, size))
            for row in session.query(PackRow).filter(PackRow.buffer == "b", PackRow.until.is_(None))
            for (class_id, count), size in zip(row.runs, row.class_bytes, strict=True)
        ]
        return dict(held), buffers.manifest(session, "b")


def then(found: Forecast) -> Kept:
    return {(c.task, c.class_id): (c.exemplars_then, c.bytes_then) for c in found.classes if c.exemplars_then}


def now(found: Forecast) -> Kept:
    return {(c.task, c.class_id): (c.exemplars, c.bytes) for c in found.classes if c.exemplars}


ONE = [("buffer", "class")]
OTHERS = [("buffer", "task"), ("buffer", "none"), ("class", "class"), ("class", "task"), ("class", "none")]
POLICIES = [*ONE, *(pytest.param(*policy, marks=pytest.mark.slow) for policy in OTHERS)]


@pytest.mark.parametrize(("per", "share_by"), POLICIES)
def test_another_budget_leaves_what_was_forecast(
    database: Database, settings: Settings, store: PackStore, per: Per, share_by: ShareBy
) -> None:
    make(database, settings, per, share_by)
    for part in (0.9, 0.4, 0.37, 0.1, 0.02, 3.0):
        with database.reading() as session:
            budget_bytes = max(1, int(buffers.read(session, "b").budget_bytes * part))
        before, manifest = kept(database)
        found = told(database, store, budget_bytes=budget_bytes)
        assert now(found) == before
        assert (found.used_bytes, found.generation) == (manifest.used_bytes, manifest.generation)
        commit.reshare(database, store, "b", budget_bytes=budget_bytes)
        after, manifest = kept(database)
        assert then(found) == after, part
        assert (found.used_bytes_then, found.limit_bytes) == (manifest.used_bytes, manifest.limit_bytes)
        assert found.exemplars_then == sum(pack.exemplars for pack in manifest.packs)


@pytest.mark.parametrize(("per", "share_by"), POLICIES)
def test_new_classes_leave_what_was_forecast(
    database: Database, settings: Settings, store: PackStore, per: Per, share_by: ShareBy
) -> None:
    make(database, settings, per, share_by)
    found = told(database, store, new_classes=3)
    fill(database, settings, 5, {10: 90, 11: 90, 12: 90})
    after, manifest = kept(database)
    assert then(found) == {leaf: held for leaf, held in after.items() if leaf[0] < 5}
    assert found.limit_bytes == manifest.limit_bytes
    if share_by != "none" and per == "buffer":
        assert found.exemplars_then < found.exemplars


@pytest.mark.parametrize("share_by", ["class", pytest.param("task", marks=pytest.mark.slow)])
def test_the_first_exemplars_to_go_bring_the_quality_that_was_forecast(
    database: Database, settings: Settings, store: PackStore, share_by: ShareBy
) -> None:
    with database.session() as session:
        buffers.create(session, BufferCreate(name="b", budget_bytes=10**6, share_by=share_by))
    for task in range(2):
        change = adding(task, photos(140, seed=task), np.repeat([2 * task, 2 * task + 1], 70))
        commit.commit(database, store, "b", change)
    found = told(database, store, budget_bytes=30_000)
    assert found.quality == 90
    assert found.quality_then != 90
    commit.reshare(database, store, "b", budget_bytes=30_000)
    after, manifest = kept(database)
    assert then(found) == after
    assert {pack.quality for pack in manifest.packs} == {found.quality_then}


def test_a_forecast_that_would_encode_too_many_images_is_refused(
    database: Database, settings: Settings, store: PackStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    create(database, quality=None)
    fill(database, settings, 0, {0: 20})
    monkeypatch.setattr("engram_service.forecast.MAX_PIXELS", 20 * 1024 - 1)
    assert told(database, store, budget_bytes=900_000).exemplars_then == 20
    with pytest.raises(Conflict, match=r"20,480 pixels"):
        told(database, store, budget_bytes=2000)


def test_a_forecast_reads_no_pack_and_writes_nothing(database: Database, settings: Settings, store: PackStore) -> None:
    make(database, settings, "buffer", "class")
    files = {path: path.read_bytes() for path in settings.packs_dir.rglob("*") if path.is_file()}
    packs = [path for path in files if path.suffix != ".index"]
    expected = told(database, store, budget_bytes=9000)
    for path in packs:
        path.write_bytes(b"")
    assert told(database, store, budget_bytes=9000) == expected
    assert {*settings.packs_dir.rglob("*")} >= {*files}
    assert len([path for path in settings.packs_dir.rglob("*") if path.is_file()]) == len(files)
    with database.reading() as session:
        assert buffers.read(session, "b").generation == expected.generation


def test_a_forecast_does_without_indexes(database: Database, settings: Settings, store: PackStore) -> None:
    make(database, settings, "buffer", "class")
    expected = told(database, store, budget_bytes=9000)
    for path in [*settings.packs_dir.rglob("*.index")]:
        _spoil(path)
    assert told(database, store, budget_bytes=9000) == expected


def _spoil(index: Path) -> None:
    data = bytearray(index.read_bytes())
    data[-30] ^= 0xFF
    index.write_bytes(bytes(data))


def test_a_budget_and_new_classes_come_one_after_the_other(
    database: Database, settings: Settings, store: PackStore
) -> None:
    make(database, settings, "buffer", "class")
    found = told(database, store, budget_bytes=20_000, new_classes=2)
    commit.reshare(database, store, "b", budget_bytes=20_000)
    fill(database, settings, 5, {10: 90, 11: 90})
    after, _ = kept(database)
    assert then(found) == {leaf: held for leaf, held in after.items() if leaf[0] < 5}


def test_an_empty_buffer_has_nothing_to_lose(database: Database, settings: Settings, store: PackStore) -> None:
    create(database)
    found = told(database, store, budget_bytes=1, new_classes=10)
    assert (found.exemplars, found.exemplars_then, found.used_bytes_then, found.classes) == (0, 0, 0, [])


def test_a_frozen_buffer_takes_no_change_and_so_has_no_forecast(
    database: Database, settings: Settings, store: PackStore
) -> None:
    make(database, settings, "buffer", "class")
    commit.fork(database, store, "b", ForkCreate(name="frozen", frozen=True))
    with database.reading() as session, pytest.raises(Conflict, match="frozen"):
        forecast(session, store, "frozen", budget_bytes=1000)
    with database.reading() as session, pytest.raises(NotFound):
        forecast(session, store, "other", budget_bytes=1000)


@pytest.mark.slow
def test_a_thousand_classes_take_a_moment(database: Database, settings: Settings, store: PackStore) -> None:
    with database.session() as session:
        buffers.create(session, BufferCreate(name="b", budget_bytes=500_000, quality=50))
    for task in range(10):
        images = pictures(task, 2000, (8, 8, 1))
        commit.commit(database, store, "b", adding(task, images, np.arange(2000) // 20 + 100 * task))
    began = time.perf_counter()
    found = told(database, store, new_classes=1000)
    took_s = time.perf_counter() - began
    assert len(found.classes) == 1000
    assert found.exemplars_then < found.exemplars
    assert took_s < 5, took_s


@pytest.mark.parametrize(
    ("query", "what"),
    [
        ("budget_bytes=0", "budget_bytes"),
        ("budget_bytes=x", "budget_bytes"),
        ("new_classes=-1", "new_classes"),
        ("new_classes=10001", "new_classes"),
    ],
)
def test_a_malformed_question_is_refused(client: httpx.Client, query: str, what: str) -> None:
    client.post("/v1/buffers", json={"name": "b", "budget_bytes": 1000})
    answer = client.get(f"/v1/buffers/b/forecast?{query}")
    assert answer.status_code == 422
    assert what in answer.json()["detail"]


def test_the_route_answers_what_the_rule_does(client: httpx.Client) -> None:
    client.post("/v1/buffers", json={"name": "b", "budget_bytes": 1000, "per": "class"})
    answer = client.get("/v1/buffers/b/forecast?new_classes=7")
    assert Forecast.model_validate(answer.json()).limit_bytes == 7000
    assert client.get("/v1/buffers/other/forecast").status_code == 404
