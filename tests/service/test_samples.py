"""Originals that are kept for maps: a few of each class, uniform over uploads, gone with what is removed."""

from __future__ import annotations

from collections import Counter
from typing import Any

import httpx
import numpy as np
import pytest

from engram import tar
from engram.fields import Schema
from engram.memory import Where
from engram.schemas import BufferCreate, IngestOptions
from engram.selection.images import ArrayImages
from engram_service import buffers, samples
from engram_service import collect as collecting
from engram_service.collect import collect
from engram_service.commit import remove
from engram_service.database import Database
from engram_service.samples import Sample, SampleFolder
from engram_service.settings import Settings
from engram_service.storage import PackStore
from tests.contents import UInt8Array, pictures
from tests.servers import ServiceThread
from tests.uploads import final, queue, work_through

pytestmark = pytest.mark.slow

FIELDS = {"key": "utf8"}


def make(database: Database, name: str = "b", *, fields: dict[str, str] | None = None, budget: int = 10**6) -> None:
    with database.session() as session:
        wanted = BufferCreate(name=name, budget_bytes=budget, quality=50, fields=FIELDS if fields is None else fields)
        buffers.create(session, wanted)


def upload(database: Database, settings: Settings, images: UInt8Array, class_ids: Any, **given: Any) -> None:
    keys = given.pop("keys", None)
    body = b"".join(tar.write(images, class_ids, fields=None if keys is None else {"key": keys}))
    queued = queue(database, settings, body, options=IngestOptions(ranking="ring"), **given)
    work_through(database, PackStore(settings.packs_dir), settings)
    assert final(database, queued).state == "committed"


def held(database: Database, settings: Settings, name: str = "b") -> dict[int, Sample]:
    with database.reading() as session:
        found = samples.OfBuffer(session, SampleFolder(settings.samples_dir), name)
        return {task: sample for task in found if (sample := found.get(task)) is not None}


def on_disk(settings: Settings) -> int:
    return len([*settings.samples_dir.iterdir()])


def test_a_few_originals_of_each_class_are_kept_exactly_as_they_came(database: Database, settings: Settings) -> None:
    images, class_ids = pictures(0, 50), np.arange(50) % 2 + 5
    make(database)
    upload(database, settings, images, class_ids)
    (sample,) = held(database, settings).values()
    assert Counter(sample.class_ids.tolist()) == {5: 16, 6: 16}
    for pixels, class_id, key in zip(sample.pixels(), sample.class_ids, sample.keys, strict=True):
        assert np.array_equal(pixels, images[int(key)])
        assert class_ids[int(key)] == class_id
    with database.reading() as session:
        assert buffers.read(session, "b").used_bytes < sum(map(len, sample.pictures)), "they are beside the budget"


def test_over_several_uploads_every_image_is_as_likely() -> None:
    schema, shape = Schema.declare({}), (8, 8, 1)
    chosen = Counter[bool]()
    for seed in range(200):
        known: dict[int, Sample] = {}
        for part, count in enumerate((30, 10)):
            images = ArrayImages(
                np.full((count, *shape), part, np.uint8), np.zeros(count, np.int64), schema.columns({}, count)
            )
            drawn = samples.draw(images, 4, f"{seed} {part}")
            assert drawn is not None
            before: Any = type("Content", (), {"shape": shape, "class_names": {}})
            known |= samples.joined(before, before, known, task=0, drawn=drawn, names=None, per_class=4)  # type: ignore[arg-type]
        assert len(known[0]) == 4
        chosen.update(bool(each) for each in known[0].pixels()[:, 0, 0, 0])
    assert 140 < chosen[True] < 260, "a quarter of 800 is of the smaller upload"


def test_names_become_the_ids_that_the_buffer_gives_them(database: Database, settings: Settings) -> None:
    make(database, fields={})
    for names in (["zebra", "ant"], ["zebra", "bee"]):
        upload(database, settings, pictures(1, 2), names)
    (sample,) = held(database, settings).values()
    with database.reading() as session:
        called = buffers.read(session, "b").class_names
    assert Counter(called[class_id] for class_id in sample.class_ids.tolist()) == {"zebra": 2, "ant": 1, "bee": 1}


@pytest.fixture
def filled(served: ServiceThread) -> ServiceThread:
    """Buffer "b" with two tasks of keyed images, of which only some found room."""
    make(served.state.database, budget=2400)
    for task in (0, 1):
        keys = [f"{task}/{number}" for number in range(12)]
        upload(served.state.database, served.settings, pictures(task, 12), np.arange(12) % 3, keys=keys, task=task)
    return served


def keys_of(served: ServiceThread) -> set[str]:
    return {key for sample in held(served.state.database, served.settings).values() for key in sample.keys}


def test_a_removed_key_is_gone_from_the_originals_whether_it_was_stored_or_not(
    client: httpx.Client, filled: ServiceThread
) -> None:
    stored = {each["key"] for each in client.get("/v1/buffers/b/exemplars").json()["exemplars"]}
    assert stored < keys_of(filled), "some originals were dropped from the buffer"
    dropped, kept = sorted(keys_of(filled) - stored)[0], sorted(stored)[0]
    for key in (dropped, kept):
        assert client.delete("/v1/buffers/b/exemplars", params={"key": key}).status_code == 200
        assert key not in keys_of(filled)
    assert client.delete("/v1/buffers/b/exemplars", params={"key": dropped}).status_code == 404
    assert client.delete("/v1/buffers/x/exemplars", params={"key": dropped}).status_code == 404


def test_a_removed_exemplar_takes_its_original_with_it(client: httpx.Client, filled: ServiceThread) -> None:
    first = client.get("/v1/buffers/b/exemplars").json()["exemplars"][0]
    before = keys_of(filled)
    client.delete(f"/v1/buffers/b/exemplars/{first['pack']}/{first['row']}").raise_for_status()
    assert keys_of(filled) == before - {first["key"]}


def test_without_keys_the_originals_of_its_class_go(client: httpx.Client, served: ServiceThread) -> None:
    make(served.state.database, fields={})
    upload(served.state.database, served.settings, pictures(0, 6), [0, 0, 0, 1, 1, 1])
    first = client.get("/v1/buffers/b/exemplars").json()["exemplars"][0]
    client.delete(f"/v1/buffers/b/exemplars/{first['pack']}/{first['row']}").raise_for_status()
    (sample,) = held(served.state.database, served.settings).values()
    assert sample.class_ids.tolist() == [1, 1, 1]


def test_a_removed_class_and_a_deleted_task_take_theirs(client: httpx.Client, filled: ServiceThread) -> None:
    client.delete("/v1/buffers/b/exemplars?task=0&class_id=2").raise_for_status()
    now = held(filled.state.database, filled.settings)
    assert ({*now[0].class_ids.tolist()}, {*now[1].class_ids.tolist()}) == ({0, 1}, {0, 1, 2})
    client.delete("/v1/buffers/b/tasks/1").raise_for_status()
    assert [*held(filled.state.database, filled.settings)] == [0]


def test_relabelled_exemplars_have_relabelled_originals(client: httpx.Client, filled: ServiceThread) -> None:
    client.patch("/v1/buffers/b/exemplars?task=0&class_id=2", json={"class_id": 9}).raise_for_status()
    client.patch("/v1/buffers/b/exemplars?key=1/0", json={"class_id": 8}).raise_for_status()
    now = held(filled.state.database, filled.settings)
    assert {*now[0].class_ids.tolist()} == {0, 1, 9}
    assert [key for key, class_id in zip(now[1].keys, now[1].class_ids, strict=True) if class_id == 8] == ["1/0"]


def test_a_fork_has_the_originals_too_and_keeps_them(client: httpx.Client, filled: ServiceThread) -> None:
    client.post("/v1/buffers/b/forks", json={"name": "f"}).raise_for_status()
    client.delete("/v1/buffers/b").raise_for_status()
    assert len(held(filled.state.database, filled.settings, "f")) == 2


def test_what_no_task_names_is_collected(client: httpx.Client, filled: ServiceThread) -> None:
    settings = filled.settings.model_copy(update={"grace_s": 0})
    collect(filled.state.database, filled.state.store, settings)
    assert on_disk(settings) == 2
    client.delete("/v1/buffers/b").raise_for_status()
    assert collect(filled.state.database, filled.state.store, settings).samples == 2
    assert on_disk(settings) == 0


def test_none_are_kept_if_none_are_wanted(database: Database, settings: Settings) -> None:
    make(database, fields={})
    upload(database, settings.model_copy(update={"sample_originals": 0}), pictures(0, 3), [0, 0, 0])
    assert held(database, settings) == {}
    assert on_disk(settings) == 0


def test_of_large_images_fewer_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples, "MAX_SAMPLE_BYTES", 5 * 16 * 16 * 3)
    images = ArrayImages(pictures(0, 20), np.arange(20) % 2)
    drawn = samples.draw(images, 16, "seed")
    assert drawn is not None
    assert len(drawn) == 4


def test_a_damaged_sample_is_as_good_as_none(database: Database, settings: Settings) -> None:
    make(database, fields={})
    upload(database, settings, pictures(0, 3), [0, 0, 0])
    (path,) = settings.samples_dir.iterdir()
    path.write_bytes(path.read_bytes()[:-1])
    assert held(database, settings) == {}
    upload(database, settings, pictures(1, 3), [0, 0, 0])
    assert len(held(database, settings)[0]) == 3


def test_a_sample_that_is_collected_before_it_is_named_is_written_again(
    database: Database, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(database)
    write, written = SampleFolder.put, []
    store = PackStore(settings.packs_dir)

    def put(self: SampleFolder, sample: Sample | None) -> str | None:
        written.append(write(self, sample))
        if len(written) == 1:
            # As on a full disk, where nothing has a period of grace, by a collector that is done with packs.
            monkeypatch.setattr(collecting, "_unnamed_packs", lambda *_: 0)
            collect(database, store, settings.model_copy(update={"grace_s": 0}))
        return written[-1]

    monkeypatch.setattr(SampleFolder, "put", put)
    upload(database, settings, pictures(0, 4), [0] * 4)
    assert len(written) == 2
    assert len(held(database, settings)[0]) == 4


def test_what_may_lie_in_a_damaged_sample_goes_with_it(database: Database, settings: Settings) -> None:
    make(database)
    for task in (0, 1):
        upload(database, settings, pictures(task, 4), [0] * 4, task=task, keys=[f"{task}-{n}" for n in range(4)])
    with database.reading() as session:
        digest = samples.of_task(session, "b", 0)
    assert digest is not None
    (settings.samples_dir / digest).write_bytes((settings.samples_dir / digest).read_bytes()[:-1])
    remove(database, PackStore(settings.packs_dir), "b", Where(keys=("0-1",)))
    with database.reading() as session:
        assert samples.of_task(session, "b", 0) is None
        assert samples.of_task(session, "b", 1) is not None


def test_one_original_is_read_without_the_others(database: Database, settings: Settings) -> None:
    make(database, fields={})
    upload(database, settings, pictures(0, 3), [0, 0, 0])
    folder = SampleFolder(settings.samples_dir)
    with database.reading() as session:
        digest = samples.of_task(session, "b", 0)
    assert digest is not None
    (sample,) = held(database, settings).values()
    assert [folder.picture(digest, number) for number in range(4)] == [*sample.pictures, None]
    assert folder.picture(digest, -1) is None
    assert folder.picture("0" * 64, 0) is None
