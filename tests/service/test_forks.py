"""Forks and snapshots share packs, and from then on each goes its own way."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import httpx
import numpy as np
import pytest
from sqlalchemy import select

from engram import memory
from engram.content import Content
from engram.errors import Conflict, NotFound
from engram.schemas import Buffer, BufferChange, ForkCreate, IngestOptions
from engram.selection.embedding import BuiltinEmbedder
from engram.selection.images import ArrayImages
from engram_service import buffers
from engram_service.collect import collect
from engram_service.commit import change, commit, fork, read_content, reshare
from engram_service.database import Database
from engram_service.settings import Settings
from engram_service.storage import PackStore
from engram_service.tables import PackRow
from tests.contents import adding, create, fill, pictures
from tests.servers import ServiceThread
from tests.uploads import tar_of_arrays


def digests(database: Database, name: str, generation: int | None = None) -> dict[int, str]:
    with database.reading() as session:
        return {entry.task: entry.digest for entry in buffers.manifest(session, name, generation).packs}


def content(database: Database, store: PackStore, name: str) -> Content:
    with database.reading() as session:
        return read_content(session, store, buffers.find(session, name))


def grow(database: Database, store: PackStore, name: str, task: int) -> None:
    commit(database, store, name, adding(task, pictures(task, 20), [task] * 20, ranking="herding"))


@pytest.fixture
def filled(database: Database, store: PackStore) -> Database:
    create(database, budget_bytes=6000, quality=None)
    for task in range(3):
        grow(database, store, "b", task)
    return database


def test_a_fork_is_the_same_memory_in_the_same_packs(filled: Database, store: PackStore) -> None:
    files = set(store.digests())
    made = fork(filled, store, "b", ForkCreate(name="c"))
    assert {digest for digest, _ in store.digests()} == {digest for digest, _ in files}
    assert digests(filled, "c") == digests(filled, "b")
    with filled.reading() as session:
        source = buffers.read(session, "b")
    own = {"name", "created_at", "forked_from", "forked_generation"}
    assert made.model_dump(exclude=own) == source.model_dump(exclude=own)
    assert (made.forked_from, made.forked_generation) == ("b", source.generation)
    one, other = content(filled, store, "b"), content(filled, store, "c")
    assert {n: (t.seen, t.kept, t.decision) for n, t in one.tasks.items()} == {
        n: (t.seen, t.kept, t.decision) for n, t in other.tasks.items()
    }
    assert [t.means and t.means.to_bytes() for t in one.tasks.values()] == [
        t.means and t.means.to_bytes() for t in other.tasks.values()
    ]


def test_a_fork_and_its_source_grow_alike_and_apart(filled: Database, store: PackStore) -> None:
    fork(filled, store, "b", ForkCreate(name="c"))
    grow(filled, store, "c", 3)
    assert 3 not in digests(filled, "b")
    grow(filled, store, "b", 3)
    assert digests(filled, "b") == digests(filled, "c")
    reshare(filled, store, "c", without_task=0)
    assert list(digests(filled, "b")) == [0, 1, 2, 3]


def test_a_fork_with_a_smaller_budget_is_within_it_from_the_start(filled: Database, store: PackStore) -> None:
    before = digests(filled, "b")
    made = fork(filled, store, "b", ForkCreate(name="c", budget_bytes=2500))
    assert made.used_bytes <= made.limit_bytes == 2500
    reshare(filled, store, "b", budget_bytes=2500)
    assert digests(filled, "b") == digests(filled, "c") != before


def test_packs_outlive_the_source_of_a_fork(filled: Database, store: PackStore, settings: Settings) -> None:
    expected = digests(filled, "b")
    fork(filled, store, "b", ForkCreate(name="c"))
    with filled.session() as session:
        buffers.delete(session, "b")
    collect(filled, store, settings.model_copy(update={"grace_s": -1}))
    assert {digest for digest, _ in store.digests()} == set(expected.values())
    assert digests(filled, "c") == expected
    with filled.session() as session:
        buffers.delete(session, "c")
    collect(filled, store, settings.model_copy(update={"grace_s": -1}))
    assert list(store.digests()) == []


def test_a_snapshot_takes_no_change_but_can_be_forked_and_deleted(filled: Database, store: PackStore) -> None:
    assert fork(filled, store, "b", ForkCreate(name="s", frozen=True)).is_frozen
    before = digests(filled, "s")
    wrong: list[Callable[[], object]] = [
        partial(grow, filled, store, "s", 7),
        partial(reshare, filled, store, "s", without_task=0),
        partial(change, filled, store, "s", BufferChange(budget_bytes=100)),
        partial(change, filled, store, "s", BufferChange(class_names={0: "cat"})),
    ]
    for attempt in wrong:
        with pytest.raises(Conflict, match="'s' is frozen at generation 3"):
            attempt()
    grow(filled, store, "b", 3)
    assert digests(filled, "s") == before
    assert not fork(filled, store, "s", ForkCreate(name="t")).is_frozen
    grow(filled, store, "t", 3)
    assert digests(filled, "t") == digests(filled, "b")
    with filled.session() as session:
        buffers.delete(session, "s")


def test_only_the_newest_generation_is_forked(filled: Database, store: PackStore) -> None:
    with pytest.raises(Conflict, match="at generation 3, the request expects 2"):
        fork(filled, store, "b", ForkCreate(name="c", generation=2))
    assert fork(filled, store, "b", ForkCreate(name="c", generation=3)).generation == 3
    with pytest.raises(NotFound), filled.reading() as session:
        buffers.manifest(session, "c", 2)
    with pytest.raises(Conflict, match="already"):
        fork(filled, store, "b", ForkCreate(name="c"))
    with pytest.raises(NotFound):
        fork(filled, store, "nothing", ForkCreate(name="d"))


def test_an_empty_buffer_can_be_forked(database: Database, store: PackStore) -> None:
    create(database)
    assert fork(database, store, "b", ForkCreate(name="c", budget_bytes=77)).budget_bytes == 77


def fork_while_uploads_go_on(database: Database, store: PackStore, budget_bytes: int | None) -> None:
    create(database, budget_bytes=4000)
    changes = 6

    def write() -> None:
        for task in range(changes):
            grow(database, store, "b", task)

    writer = threading.Thread(target=write)
    writer.start()
    made: list[Buffer] = []
    while writer.is_alive() or not made:
        name = f"f{len(made)}"
        made.append(fork(database, store, "b", ForkCreate(name=name, budget_bytes=budget_bytes)))
    writer.join()
    for found in made:
        named = digests(database, found.name)
        assert all(store.exists(digest) for digest in named.values())
        assert found.used_bytes <= found.limit_bytes
        assert found.tasks == list(range(found.generation))
        if budget_bytes is None:
            assert named == digests(database, "b", found.generation)


@pytest.mark.parametrize("budget_bytes", [None, pytest.param(3000, marks=pytest.mark.slow)])
def test_forks_made_while_uploads_go_on_are_complete_generations(
    database: Database, store: PackStore, budget_bytes: int | None
) -> None:
    fork_while_uploads_go_on(database, store, budget_bytes)


def lose_races_for_names(database: Database, store: PackStore, buffer: str) -> None:
    create(database, buffer)

    def named(task: int, name: str) -> partial[Content]:
        images = ArrayImages(pictures(task, 2), np.zeros(2, np.int64))
        upload = memory.Upload(task, images, IngestOptions(ranking="ring"), (name,))
        return partial(memory.add, upload=upload, embedder=BuiltinEmbedder(images.shape))

    rivals = ["cat", "dog"]

    def overtaken(before: Content) -> Content:
        if rivals:
            commit(database, store, buffer, named(len(rivals), rivals.pop()))
        return named(0, "cat")(before)

    commit(database, store, buffer, overtaken)
    assert content(database, store, buffer).class_names == {0: "dog", 1: "cat"}
    assert content(database, store, buffer).classes() == {0: [1], 1: [1], 2: [0]}


def test_a_name_is_looked_up_again_after_a_lost_race(database: Database, store: PackStore) -> None:
    lose_races_for_names(database, store, "b")


def test_forks_and_names_over_http(client: httpx.Client, served: ServiceThread) -> None:
    state = served.state
    create(state.database)
    fill(state.database, served.settings, 0, {0: 4, 5: 4})
    answer = client.patch("/v1/buffers/b", json={"class_names": {"0": "cat", "5": "dog"}})
    assert (answer.status_code, answer.headers["ETag"][:3]) == (200, '"2-')
    assert answer.json()["class_names"] == {"0": "cat", "5": "dog"}
    assert client.get("/v1/buffers/b/manifest").json()["class_names"] == {"0": "cat", "5": "dog"}
    assert [row["name"] for row in client.get("/v1/buffers/b/tasks/0").json()["classes"]] == ["cat", "dog"]
    taken = client.patch("/v1/buffers/b", json={"class_names": {"0": "dog"}, "budget_bytes": 7})
    assert (taken.status_code, taken.json()["class_ids"]) == (409, [5, 0])
    assert client.get("/v1/buffers/b").json()["budget_bytes"] == 10**6
    malformed: list[dict[str, object]] = [
        {},
        {"class_names": {}},
        {"class_names": {"0": "7"}},
        {"class_names": {"-1": "x"}},
    ]
    for wrong in malformed:
        assert client.patch("/v1/buffers/b", json=wrong).status_code == 422
    made = client.post("/v1/buffers/b/forks", json={"name": "s", "frozen": True})
    assert (made.status_code, made.headers["Location"]) == (201, "/v1/buffers/s")
    assert made.json()["class_names"] == {"0": "cat", "5": "dog"}
    same = "draw?size=8&seed=3"
    assert client.get(f"/v1/buffers/s/{same}").content == client.get(f"/v1/buffers/b/{same}").content
    body = tar_of_arrays(pictures(0, 2), [0, 1])
    refused = client.post("/v1/buffers/s/tasks/1/ingests", content=body)
    assert refused.status_code == 409
    assert "frozen" in refused.json()["detail"]
    assert client.delete("/v1/buffers/s/tasks/0").status_code == 409
    assert client.delete("/v1/buffers/s").status_code == 204
    with state.database.reading() as session:
        assert {row.buffer for row in session.scalars(select(PackRow))} == {"b"}


@pytest.mark.services
def test_forks_in_postgresql_are_complete_generations(postgres_url: str, tmp_path: Path) -> None:
    config = Settings(data_dir=tmp_path / "data", database_url=postgres_url)
    config.make_folders()
    database = Database(config)
    database.migrate()
    store = PackStore(config.packs_dir)
    try:
        fork_while_uploads_go_on(database, store, 3000)
        fork(database, store, "b", ForkCreate(name="c", frozen=True))
        lose_races_for_names(database, store, "n")
    finally:
        database.close()
