"""This file tests generations: whatever happens to a buffer, its packs stay within its budget and its rankings intact.

Exemplars are told apart by their decoded pixels, which must never change, whatever is dropped, merged or re-coded.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck
from hypothesis import settings as run_settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, precondition, rule
from sqlalchemy import select

from engram import huffman, pack, shares, strip
from engram.errors import BudgetExceeded, Conflict, EngramError, NotFound
from engram.schemas import BufferCreate, IngestOptions, Per, Ranking, ShareBy
from engram_service import buffers, ingest
from engram_service.collect import collect
from engram_service.commit import Upload, commit, merge, read_content, reshare
from engram_service.database import Database
from engram_service.ingest import Claim, LeaseLost
from engram_service.settings import Settings
from engram_service.storage import PackStore
from engram_service.tables import BufferRow, PackRow, TaskRow
from tests.contents import pictures

SHAPE = (16, 16, 3)


@contextmanager
def opened(folder: Path) -> Iterator[tuple[Settings, Database, PackStore]]:
    config = Settings(data_dir=folder, grace_s=0)
    config.make_folders()
    database = Database(config)
    try:
        yield config, database, PackStore(config.packs_dir)
    finally:
        database.close()


@pytest.fixture
def place(migrated: Path, tmp_path: Path) -> Iterator[Place]:
    shutil.copytree(migrated, tmp_path, dirs_exist_ok=True)
    with opened(tmp_path) as parts:
        yield Place(*parts)


@dataclass
class Place:
    """A data folder, its database and its store."""

    settings: Settings
    database: Database
    store: PackStore
    number: int = 0

    def create(self, budget_bytes: int, per: Per = "buffer", share_by: ShareBy = "class") -> None:
        with self.database.session() as session:
            buffers.create(session, BufferCreate(name="b", budget_bytes=budget_bytes, per=per, share_by=share_by))

    def claim(self, task: int) -> Claim:
        """A queued and claimed ingest; its body is of no interest here."""
        spooled = ingest.Upload(self.settings.spool_dir)
        spooled.write(b"a tar")
        spooled.seal(None)
        ingest.enqueue(self.database, spooled, buffer="b", task=task, options=IngestOptions(), key=None)
        held = ingest.claim(self.database, self.settings, owner="test")
        assert held is not None
        return held

    def upload(
        self, task: int, counts: dict[int, int], *, quality: int = 50, ranking: Ranking = "herding", seen: int = 1
    ) -> tuple[strip.Exemplars, int]:
        """Commit new pictures of these classes, in rank order; a stream of `seen` times as many was ranked."""
        self.number += 1
        class_ids = np.repeat(sorted(counts), [counts[c] for c in sorted(counts)])
        exemplars = strip.encode(pictures(self.number, len(class_ids)), class_ids, quality=quality)
        held = self.claim(task)
        upload = Upload(
            task=task,
            exemplars=exemplars,
            seen={class_id: count * seen for class_id, count in counts.items()},
            quality=quality,
            ranking=ranking,
            decision=None,
            ingest=held,
        )
        try:
            return exemplars, commit(self.database, self.store, upload)
        except EngramError as error:
            ingest.fail(self.database, held, error)
            raise

    def stored(self) -> dict[int, strip.Exemplars]:
        """The exemplars of every task."""
        with self.database.reading() as session:
            rows = read_content(session, "b").packs
        return {task: pack.parse(self.store.get(row.digest)) for task, row in rows.items()}

    def generation(self) -> int:
        with self.database.reading() as session:
            return read_content(session, "b").buffer.generation


def looks(exemplars: strip.Exemplars) -> list[tuple[int, bytes]]:
    """(class id, pixels) of every exemplar."""
    return [(int(c), image.tobytes()) for c, image in zip(exemplars.class_ids, exemplars.decode(), strict=True)]


def check_budget(place: Place) -> None:
    """At every generation that still answers, the live packs lie on disk, as large as their rows say, in the limit."""
    with place.database.reading() as session:
        content = read_content(session, "b")
        rows = list(session.scalars(select(PackRow)))
        described = buffers.read(session, "b")
    live = [row for row in rows if row.until is None]
    for row in rows:
        data = place.store.path(row.digest).read_bytes()
        assert len(data) == row.bytes
        assert pack.digest(data) == row.digest
        parsed = pack.parse(data)
        assert [list(run) for run in strip.runs_of(parsed.class_ids)] == row.runs
        assert len(parsed) == row.exemplars
        assert (
            sum(row.class_bytes) + pack.size(parsed.form, strip.runs_of(parsed.class_ids), parsed.sizes[:0])
            == row.bytes
        )
    used_bytes = sum(row.bytes for row in live)
    assert described.used_bytes == used_bytes <= content.limit_bytes == described.limit_bytes
    assert len({row.task for row in live}) == len(live)
    granted = shares.leaves(
        content.buffer.budget_bytes,
        per=content.buffer.per,
        share_by=content.buffer.share_by,
        classes_by_task=content.classes(),
    )
    assert sum(granted.values()) == (content.limit_bytes if granted else 0)
    for row in live:
        assert row.bytes <= sum(share for (task, _), share in granted.items() if task == row.task)


@dataclass
class Ranked:
    """What the model knows of one uploaded class: its exemplars' pixels in rank order."""

    task: int
    class_id: int
    pixels: list[bytes] = field(repr=False)


class AnySequenceOfChanges(RuleBasedStateMachine):
    """Uploads, deletions and budget changes in any order."""

    template: Path
    scratch: Path

    tasks = Bundle("tasks")

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(dir=self.scratch))
        shutil.copytree(self.template, self.folder, dirs_exist_ok=True)
        self.context = opened(self.folder)
        self.place = Place(*self.context.__enter__())
        self.ranked: list[Ranked] = []
        self.qualities: dict[int, int] = {}

    def teardown(self) -> None:
        self.context.__exit__(None, None, None)
        shutil.rmtree(self.folder)

    @initialize(
        budget_bytes=st.integers(500, 8000),
        per=st.sampled_from(["buffer", "class"]),
        share_by=st.sampled_from(["class", "task"]),
    )
    def create(self, budget_bytes: int, per: Per, share_by: ShareBy) -> None:
        self.place.create(budget_bytes, per, share_by)

    @rule(
        target=tasks,
        task=st.integers(0, 3),
        counts=st.dictionaries(st.integers(0, 5), st.integers(1, 12), min_size=1, max_size=4),
        quality=st.sampled_from([10, 50, 90]),
        ranking=st.sampled_from(["herding", "ring", "reservoir"]),
        seen=st.integers(1, 5),
    )
    def upload(self, task: int, counts: dict[int, int], quality: int, ranking: Ranking, seen: int) -> int:
        quality = self.qualities.get(task, quality)
        before = self.place.generation(), {t: looks(e) for t, e in self.place.stored().items()}
        try:
            exemplars, generation = self.place.upload(task, counts, quality=quality, ranking=ranking, seen=seen)
        except BudgetExceeded as error:
            budget_bytes, needed_bytes = error.details["budget_bytes"], error.details["needed_bytes"]
            assert budget_bytes < needed_bytes
            assert before == (self.place.generation(), {t: looks(e) for t, e in self.place.stored().items()})
            return task
        assert generation == before[0] + 1
        self.qualities[task] = quality
        pixels = looks(exemplars)
        self.ranked += [Ranked(task, c, [p for owner, p in pixels if owner == c]) for c in counts]
        return task

    @rule(budget_bytes=st.integers(200, 8000))
    def change_budget(self, budget_bytes: int) -> None:
        reshare(self.place.database, self.place.store, "b", budget_bytes=budget_bytes)

    @rule(task=tasks)
    def delete_task(self, task: int) -> None:
        if task in self.qualities:
            reshare(self.place.database, self.place.store, "b", without_task=task)
            del self.qualities[task]
            self.ranked = [ranked for ranked in self.ranked if ranked.task != task]
        else:
            with pytest.raises(NotFound):
                reshare(self.place.database, self.place.store, "b", without_task=task)

    @precondition(lambda self: self.place.number)
    @rule()
    def collect_garbage(self) -> None:
        collect(self.place.database, self.place.store, self.place.settings)
        with self.place.database.reading() as session:
            named = {row.digest for row in read_content(session, "b").packs.values()}
        assert named == {digest for digest, _ in self.place.store.digests()}

    @invariant()
    def the_budget_is_kept(self) -> None:
        check_budget(self.place)

    @invariant()
    def a_prefix_of_every_ranking_is_kept(self) -> None:
        for task, exemplars in self.place.stored().items():
            kept = looks(exemplars)
            accounted = 0
            for ranked in (ranked for ranked in self.ranked if ranked.task == task):
                known = set(ranked.pixels)
                mine = [pixels for class_id, pixels in kept if class_id == ranked.class_id and pixels in known]
                assert mine == ranked.pixels[: len(mine)]
                accounted += len(mine)
            assert accounted == len(kept)


def test_any_sequence_of_changes_keeps_the_budget_and_a_prefix_of_every_ranking(migrated: Path, tmp_path: Path) -> None:
    AnySequenceOfChanges.template, AnySequenceOfChanges.scratch = migrated, tmp_path
    machine = AnySequenceOfChanges.TestCase
    machine.settings = run_settings(
        max_examples=25,
        stateful_step_count=10,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
    )
    machine().runTest()


def test_a_commit_sets_the_shape_and_counts_what_was_seen(place: Place) -> None:
    place.create(5000)
    place.upload(3, {7: 4, 2: 5}, seen=10)
    place.upload(3, {7: 4}, seen=10)
    with place.database.reading() as session:
        content = read_content(session, "b")
    assert content.image_shape == SHAPE
    assert content.tasks[3].seen == {"2": 50, "7": 80}
    assert content.buffer.generation == 2


def test_images_of_another_shape_are_refused_and_change_nothing(place: Place) -> None:
    place.create(5000)
    place.upload(0, {0: 3})
    held = place.claim(1)
    exemplars = strip.encode(pictures(1, 2, (16, 24, 3)), [0, 0], quality=50)
    upload = Upload(1, exemplars, {0: 2}, 50, "herding", None, held)
    with pytest.raises(Conflict, match=r"16x24x3 .* 16x16x3"):
        commit(place.database, place.store, upload)
    assert place.generation() == 1


def test_a_task_keeps_its_first_quality(place: Place) -> None:
    place.create(5000)
    place.upload(0, {0: 3}, quality=50)
    with pytest.raises(Conflict, match=r"stored at quality 50, this upload asks for 75"):
        place.upload(0, {0: 3}, quality=75)
    assert place.generation() == 1


def test_an_upload_that_cannot_keep_one_exemplar_is_refused_with_both_numbers(place: Place) -> None:
    place.create(300)
    with pytest.raises(BudgetExceeded) as caught:
        place.upload(0, {0: 3, 1: 3})
    needed_bytes = caught.value.details["needed_bytes"]
    assert caught.value.details["budget_bytes"] == 300 < needed_bytes
    assert str(needed_bytes) in caught.value.message
    assert (place.generation(), place.stored()) == (0, {})
    reshare(place.database, place.store, "b", budget_bytes=2 * needed_bytes)
    place.upload(0, {0: 3, 1: 3})


def test_a_cancelled_ingest_does_not_commit(place: Place) -> None:
    place.create(5000)
    held = place.claim(0)
    with place.database.session() as session:
        ingest.cancel(session, held.id)
    upload = Upload(0, strip.encode(pictures(1, 2), [0, 0], quality=50), {0: 2}, 50, "herding", None, held)
    with pytest.raises(LeaseLost):
        commit(place.database, place.store, upload)
    assert (place.generation(), place.stored()) == (0, {})


def test_an_ingest_commits_only_once(place: Place) -> None:
    place.create(5000)
    held = place.claim(0)
    upload = Upload(0, strip.encode(pictures(1, 2), [0, 0], quality=50), {0: 2}, 50, "herding", None, held)
    commit(place.database, place.store, upload)
    with pytest.raises(LeaseLost):
        commit(place.database, place.store, upload)
    assert place.generation() == 1
    with place.database.reading() as session:
        row = session.get(TaskRow, ("b", 0))
        assert row is not None
        assert row.seen == {"0": 2}


def test_a_change_expects_the_generation_it_was_decided_on(place: Place) -> None:
    place.create(5000)
    place.upload(0, {0: 3})
    with pytest.raises(Conflict, match=r"at generation 1, the request expects 0"):
        reshare(place.database, place.store, "b", budget_bytes=100, expected_generation=0)
    assert reshare(place.database, place.store, "b", budget_bytes=4000, expected_generation=1) == 2


def test_an_unchanged_pack_is_not_written_again(place: Place) -> None:
    place.create(50_000)
    place.upload(0, {0: 3})
    with place.database.reading() as session:
        before = read_content(session, "b").packs[0].id
    place.upload(1, {1: 3})
    with place.database.reading() as session:
        assert read_content(session, "b").packs[0].id == before


class ForgetfulStore(PackStore):
    """A store whose first pack is collected before it is named, as by a collector that came in between."""

    forgets = True

    def put(self, data: bytes) -> str:
        digest = super().put(data)
        if self.forgets:
            self.forgets = False
            self.delete(digest)
        return digest


def test_a_pack_that_was_collected_before_it_was_named_is_written_again(place: Place) -> None:
    place.create(5000)
    place.store = ForgetfulStore(place.settings.packs_dir)
    place.upload(0, {0: 3})
    check_budget(place)


class InterruptedStore(PackStore):
    """A store during whose first `put` another change of the buffer commits."""

    change: tuple[Database, PackStore] | None = None

    def put(self, data: bytes) -> str:
        change, self.change = self.change, None
        if change is not None:
            reshare(*change, "b", budget_bytes=1500)
        return super().put(data)


def test_a_commit_that_lost_a_race_is_computed_again(place: Place) -> None:
    place.create(5000)
    place.upload(0, {0: 12})
    store = InterruptedStore(place.settings.packs_dir)
    store.change = (place.database, place.store)
    place.store = store
    _, generation = place.upload(1, {1: 12})
    assert generation == 3
    check_budget(place)
    with place.database.reading() as session:
        assert read_content(session, "b").buffer.budget_bytes == 1500


def test_what_is_intact_of_a_damaged_pack_survives_a_smaller_budget(place: Place) -> None:
    place.create(50_000)
    exemplars, _ = place.upload(0, {0: 20})
    with place.database.reading() as session:
        row = read_content(session, "b").packs[0]
    path = place.store.path(row.digest)
    data = bytearray(path.read_bytes())
    stored = pack.parse(bytes(data))
    data[int(stored.starts[2]) + 3] ^= 0x10
    path.write_bytes(data)
    reshare(place.database, place.store, "b", budget_bytes=row.bytes - 1)
    kept = looks(place.stored()[0])
    intact = [look for rank, look in enumerate(looks(exemplars)) if rank != 2]
    assert len(kept) >= 18
    assert kept == intact[: len(kept)]
    assert len(pack.to_bytes(place.stored()[0])) < row.bytes


def test_a_pack_without_a_file_does_not_block_the_buffer(place: Place) -> None:
    place.create(3000)
    place.upload(0, {0: 40})
    with place.database.reading() as session:
        place.store.delete(read_content(session, "b").packs[0].digest)
    place.upload(1, {1: 40})
    assert list(place.stored()) == [1]


def coded(seed: int, class_ids: list[int]) -> strip.Exemplars:
    return strip.encode(pictures(seed, len(class_ids)), class_ids, quality=50)


def origin(merged: strip.Exemplars, uploaded: strip.Exemplars) -> list[bool]:
    """Whether each merged exemplar came with the upload."""
    new = set(looks(uploaded))
    return [look in new for look in looks(merged)]


def test_samples_of_equal_streams_interleave() -> None:
    stored, uploaded = coded(1, [4] * 40), coded(2, [4] * 40)
    merged = merge(stored, uploaded, seen=({4: 1000}, {4: 1000}), ranking="herding", key="k")
    came = origin(merged, uploaded)
    # Rank r of either side lies in [r, r + 1), so no prefix holds more than one more of one side than of the other.
    balance = np.cumsum(np.where(came, 1, -1))
    assert np.abs(balance).max() <= 1
    assert set(looks(merged)) == {*looks(stored), *looks(uploaded)}


def test_a_longer_stream_keeps_its_part_of_the_class() -> None:
    stored, uploaded = coded(1, [4] * 40), coded(2, [4] * 40)
    merged = merge(stored, uploaded, seen=({4: 4000}, {4: 1000}), ranking="reservoir", key="k")
    assert sum(origin(merged, uploaded)[:40]) in (7, 8, 9)


def test_a_ring_keeps_the_newest_first() -> None:
    stored, uploaded = coded(1, [0, 0, 5]), coded(2, [0, 5, 5])
    merged = merge(stored, uploaded, seen=({0: 2, 5: 1}, {0: 1, 5: 2}), ranking="ring", key="k")
    assert merged.class_ids.tolist() == [0, 0, 0, 5, 5, 5]
    assert origin(merged, uploaded) == [True, False, False, True, True, False]


def test_merging_is_a_function_of_its_key() -> None:
    stored, uploaded = coded(1, [4] * 20), coded(2, [4] * 20)
    orders = [
        looks(merge(stored, uploaded, seen=({4: 20}, {4: 20}), ranking="random", key=key)) for key in ("a", "a", "b")
    ]
    assert orders[0] == orders[1] != orders[2]


def test_the_same_uploads_to_two_buffers_give_the_same_packs(
    place: Place, settings: Settings, database: Database
) -> None:
    digests = []
    for one in (place, Place(settings, database, PackStore(settings.packs_dir))):
        one.create(2000)
        for _ in range(3):
            one.upload(0, {0: 30, 1: 30})
        with one.database.reading() as session:
            digests.append(read_content(session, "b").packs[0].digest)
    assert digests[0] == digests[1]


def test_merging_gives_both_sides_common_tables() -> None:
    stored, uploaded = coded(1, [0] * 5), coded(2, [0] * 5)
    assert stored.form != uploaded.form
    merged = merge(stored, uploaded, seen=({0: 5}, {0: 5}), ranking="herding", key="k")
    assert merged.form == huffman.retable([stored, uploaded])[0].form


def test_the_oldest_generation_follows_the_collector(place: Place) -> None:
    place.create(3000)
    for task in range(3):
        place.upload(task, {task: 12})
    with place.database.reading() as session:
        assert len(list(session.scalars(select(PackRow)))) > 3
        assert buffers.manifest(session, "b", 1).generation == 1
    collect(place.database, place.store, place.settings)
    with place.database.reading() as session:
        assert {row.until for row in session.scalars(select(PackRow))} == {None}
        row = session.get(BufferRow, "b")
        assert row is not None
        assert row.oldest_generation == row.generation == 3
        with pytest.raises(NotFound):
            buffers.manifest(session, "b", 2)


def test_young_leftovers_are_spared(place: Place) -> None:
    place.create(3000)
    place.upload(0, {0: 12})
    place.upload(1, {1: 12})
    unnamed = place.store.put(pack.to_bytes(coded(1, [0])))
    before = {digest for digest, _ in place.store.digests()}
    found = collect(place.database, place.store, place.settings.model_copy(update={"grace_s": 3600}))
    assert (found.rows, found.packs) == (0, 0)
    assert unnamed in before == {digest for digest, _ in place.store.digests()}
