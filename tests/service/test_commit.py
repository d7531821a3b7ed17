"""Generations: whatever happens to a buffer, its packs stay within its budget, of one quality, their rankings intact.

Exemplars are told apart by the uploaded image that they are nearest to.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
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

from engram import pack, strip
from engram.content import Content, shares_of
from engram.errors import BudgetExceeded, Conflict, EngramError, NotFound
from engram.schemas import Buffer, BufferCreate, Per, Ranking, ShareBy
from engram_service import buffers, ingest
from engram_service.collect import collect
from engram_service.commit import commit, read_content, reshare
from engram_service.database import Database
from engram_service.ingest import LeaseLost
from engram_service.settings import Settings
from engram_service.storage import PackStore
from engram_service.tables import BufferRow, PackRow
from tests.contents import UInt8Array, adding, claim, pictures
from tests.photos import mosaics, photos

SHAPE = (16, 16, 3)
Names = dict[int, dict[int, list[int]]]
"""Of every task, of every class: the numbers of the images kept, in rank order."""


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
    """A data folder, its database and its store, and the images that were ever uploaded."""

    settings: Settings
    database: Database
    store: PackStore
    images: UInt8Array = field(default_factory=lambda: np.empty((0, *SHAPE), np.uint8))

    def create(
        self, budget_bytes: int, per: Per = "buffer", share_by: ShareBy = "class", *, quality: int | None = 50
    ) -> None:
        wanted = BufferCreate(name="b", budget_bytes=budget_bytes, per=per, share_by=share_by, quality=quality)
        with self.database.session() as session:
            buffers.create(session, wanted)

    def upload(
        self, task: int, counts: dict[int, int], *, ranking: Ranking = "ring", store: PackStore | None = None
    ) -> dict[int, list[int]]:
        """Commit new pictures of these classes; returns the numbers that those of each class have from now on."""
        class_ids = np.repeat(sorted(counts), [counts[class_id] for class_id in sorted(counts)])
        first = len(self.images)
        images = pictures(first, len(class_ids))
        self.images = np.concatenate([self.images, images])
        held = claim(self.database, self.settings, task)
        try:
            commit(
                self.database,
                store or self.store,
                "b",
                adding(task, images, class_ids, ranking=ranking),
                ingest=held,
            )
        except EngramError as error:
            ingest.fail(self.database, held, error)
            raise
        return {class_id: (first + np.flatnonzero(class_ids == class_id)).tolist() for class_id in counts}

    def content(self) -> Content:
        with self.database.reading() as session:
            return read_content(session, self.store, buffers.find(session, "b"))

    def buffer(self) -> Buffer:
        with self.database.reading() as session:
            return buffers.read(session, "b")

    def stored(self) -> dict[int, strip.Exemplars]:
        """The exemplars of every task that has some."""
        loaded = {number: task.load() for number, task in self.content().tasks.items()}
        return {number: exemplars for number, exemplars in loaded.items() if exemplars is not None}

    def kept(self) -> Names:
        return {
            number: {
                class_id: self.named(exemplars.select(np.flatnonzero(exemplars.class_ids == class_id)))
                for class_id, _ in strip.runs_of(exemplars.class_ids)
            }
            for number, exemplars in self.stored().items()
        }

    def named(self, exemplars: strip.Exemplars) -> list[int]:
        """Which of the images these are."""
        flat = self.images.reshape(len(self.images), -1).astype(np.float32)
        decoded = exemplars.decode().reshape(len(exemplars), -1).astype(np.float32)
        distances = (flat**2).sum(axis=1)[None] - 2 * decoded @ flat.T
        return [int(number) for number in distances.argmin(axis=1)]

    def rows(self) -> list[PackRow]:
        """Every pack of every generation that still answers."""
        with self.database.reading() as session:
            return list(session.scalars(select(PackRow)))


def check_budget(place: Place) -> None:
    """At every generation that still answers: packs whole, as large as their rows say, of one quality, in the limit."""
    rows, content, described = place.rows(), place.content(), place.buffer()
    for row in rows:
        data = place.store.path(row.digest).read_bytes()
        assert len(data) == row.bytes
        assert pack.digest(data) == row.digest
        parsed = pack.parse(data)
        runs = strip.runs_of(parsed.class_ids)
        assert [list(run) for run in runs] == row.runs
        assert (len(parsed), parsed.form.quality) == (row.exemplars, row.quality)
        assert sum(row.class_bytes) + pack.size(parsed.form, runs, parsed.sizes[:0]) == row.bytes
    for generation in range(described.generation + 1):
        live = [row for row in rows if row.since <= generation and (row.until is None or row.until > generation)]
        assert len({row.task for row in live}) == len(live)
        assert len({row.quality for row in live}) <= 1
    live = [row for row in rows if row.until is None]
    assert {row.quality for row in live} <= {described.quality}
    assert described.used_bytes == sum(row.bytes for row in live) <= described.limit_bytes
    if content.policy.share_by == "none":
        return
    granted = shares_of(content.policy, content.classes())
    assert sum(sum(share.values()) for share in granted.values()) == (described.limit_bytes if granted else 0)
    for row in live:
        assert row.bytes <= sum(granted[row.task].values())


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

    def teardown(self) -> None:
        self.context.__exit__(None, None, None)
        shutil.rmtree(self.folder)

    @initialize(
        budget_bytes=st.integers(500, 8000),
        per=st.sampled_from(["buffer", "class"]),
        share_by=st.sampled_from(["class", "task", "none"]),
        quality=st.sampled_from([None, 10, 50, 90]),
    )
    def create(self, budget_bytes: int, per: Per, share_by: ShareBy, quality: int | None) -> None:
        self.place.create(budget_bytes, per, share_by, quality=quality)

    @rule(
        target=tasks,
        task=st.integers(0, 3),
        counts=st.dictionaries(st.integers(0, 5), st.integers(1, 12), min_size=1, max_size=4),
        ranking=st.sampled_from(["herding", "greedy_dpp", "ring", "reservoir"]),
    )
    def upload(self, task: int, counts: dict[int, int], ranking: Ranking) -> int:
        generation, before = self.place.buffer().generation, self.place.kept()
        try:
            came = self.place.upload(task, counts, ranking=ranking)
        except BudgetExceeded:
            assert (self.place.buffer().generation, self.place.kept()) == (generation, before)
            return task
        assert self.place.buffer().generation == generation + 1
        after = self.place.kept()
        for class_id, kept in after[task].items():
            held, new = before.get(task, {}).get(class_id, []), came.get(class_id, [])
            if ranking == "ring" or not new:
                assert kept == [*new[::-1], *held][: len(kept)]
            assert len(set(kept)) == len(kept)
            assert set(kept) <= {*held, *new}
        self.assert_prefixes({number: classes for number, classes in before.items() if number != task})
        return task

    @rule(budget_bytes=st.integers(200, 8000))
    def change_budget(self, budget_bytes: int) -> None:
        before = self.place.kept()
        reshare(self.place.database, self.place.store, "b", budget_bytes=budget_bytes)
        self.assert_prefixes(before)

    @rule(task=tasks)
    def delete_task(self, task: int) -> None:
        before = self.place.kept()
        if task in self.place.content().tasks:
            reshare(self.place.database, self.place.store, "b", without_task=task)
            assert task not in self.place.content().tasks
        else:
            with pytest.raises(NotFound):
                reshare(self.place.database, self.place.store, "b", without_task=task)
        self.assert_prefixes({number: classes for number, classes in before.items() if number != task})

    @precondition(lambda self: len(self.place.images) > 0)
    @rule()
    def collect_garbage(self) -> None:
        collect(self.place.database, self.place.store, self.place.settings)
        named = {row.digest for row in self.place.rows()}
        assert named == {digest for digest, _ in self.place.store.digests()}
        assert all(row.until is None for row in self.place.rows())

    @invariant()
    def the_budget_is_kept(self) -> None:
        check_budget(self.place)

    def assert_prefixes(self, before: Names) -> None:
        """Of what other changes than an upload to their task leave, nothing has moved and nothing was skipped."""
        after = self.place.kept()
        for number, classes in before.items():
            for class_id, held in classes.items():
                kept = after.get(number, {}).get(class_id, [])
                assert kept == held[: len(kept)]
            assert after.get(number, {}).keys() <= classes.keys()


@pytest.mark.parametrize("count", [3, pytest.param(100, marks=pytest.mark.slow)])
def test_any_sequence_of_changes_keeps_the_budget_and_a_prefix_of_every_ranking(
    migrated: Path, tmp_path: Path, count: int
) -> None:
    AnySequenceOfChanges.template, AnySequenceOfChanges.scratch = migrated, tmp_path
    machine = AnySequenceOfChanges.TestCase
    machine.settings = run_settings(
        max_examples=count,
        stateful_step_count=10,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
    )
    machine().runTest()


def test_a_commit_sets_the_shape_and_counts_what_was_seen(place: Place) -> None:
    place.create(5000)
    place.upload(3, {7: 4, 2: 5})
    place.upload(3, {7: 4})
    content = place.content()
    assert content.shape == SHAPE
    assert content.tasks[3].seen == {2: 5, 7: 8}
    assert place.buffer().generation == 2


def test_what_a_commit_wrote_is_what_the_next_one_reads(place: Place) -> None:
    place.create(5000, quality=None)
    for task in (4, 1):
        place.upload(task, {task: 70}, ranking="herding")
    change = adding(2, pictures(99, 30), [2] * 30, ranking="herding")
    expected = change(place.content())
    commit(place.database, place.store, "b", change)
    found = place.content()
    for read, made in ((found.tasks[number], expected.tasks[number]) for number in (1, 2, 4)):
        assert (read.seen, read.kept, read.pack_bytes) == (made.seen, made.kept, made.pack_bytes)
        assert read.decision is not None
        assert made.decision is not None
        assert read.decision.model_copy(update={"seconds": 0.0}) == made.decision.model_copy(update={"seconds": 0.0})
        assert read.means is not None
        assert made.means is not None
        assert read.means.to_bytes() == made.means.to_bytes()
        exemplars, wanted = read.load(), made.load()
        assert exemplars is not None
        assert wanted is not None
        assert pack.to_bytes(exemplars) == pack.to_bytes(wanted)
    assert (found.quality, found.is_provisional) == (expected.quality, expected.is_provisional)
    assert (found.shape, found.policy) == (expected.shape, expected.policy)


def test_images_of_another_shape_are_refused_and_change_nothing(place: Place) -> None:
    place.create(5000)
    place.upload(0, {0: 3})
    with pytest.raises(Conflict, match=r"16x24x3 .* 16x16x3"):
        commit(place.database, place.store, "b", adding(1, pictures(1, 2, (16, 24, 3)), [0, 0]))
    assert place.buffer().generation == 1


def test_an_upload_that_cannot_keep_one_exemplar_is_refused_with_both_numbers(place: Place) -> None:
    place.create(250)
    with pytest.raises(BudgetExceeded) as caught:
        place.upload(0, {0: 3, 1: 3})
    needed_bytes = caught.value.details["needed_bytes"]
    assert caught.value.details["budget_bytes"] == 250 < needed_bytes
    assert str(needed_bytes) in caught.value.message
    assert (place.buffer().generation, place.stored()) == (0, {})
    reshare(place.database, place.store, "b", budget_bytes=2 * needed_bytes)
    place.upload(0, {0: 3, 1: 3})


# One quality


def test_all_packs_are_encoded_once_more_in_one_generation(place: Place) -> None:
    place.create(45_000, quality=None)
    for task in range(3):
        place.upload(task, {task: 70}, ranking="herding")
        assert (place.buffer().quality, place.buffer().quality_is) == (90, "provisional")
    before = place.kept()
    place.upload(3, {3: 70}, ranking="herding")
    buffer = place.buffer()
    assert buffer.generation == 4
    assert buffer.quality != 90
    assert {row.task: row.quality for row in place.rows() if row.until is None} == dict.fromkeys(
        range(4), buffer.quality
    )
    assert [(row.task, row.quality, row.since) for row in place.rows() if row.until == 4] == [
        (task, 90, task + 1) for task in range(3)
    ]
    check_budget(place)
    after = place.kept()
    for task in range(3):
        assert after[task][task] == before[task][task][: len(after[task][task])]


@pytest.mark.parametrize("numbers", [(0, 1, 2), (3, 0, 5), (5, 3, 0)])
def test_what_was_decided_stays_whatever_the_numbers_of_later_tasks(numbers: tuple[int, ...], place: Place) -> None:
    place.create(9000, quality=None)
    commit(place.database, place.store, "b", adding(numbers[0], photos(70, (24, 24, 1), noise=100), [0] * 70))
    decided = place.buffer()
    assert (decided.quality_is, decided.quality != 10) == ("decided", True)
    for class_id, number in enumerate(numbers[1:], start=1):
        # Of these, every quality keeps each pixel: alone they would have 10.
        commit(place.database, place.store, "b", adding(number, mosaics(70, seed=number), [class_id] * 70))
        decision = place.content().tasks[number].decision
        assert decision is not None
        assert all(candidate.passes for candidate in decision.candidates)
        assert decision.quality == decided.quality
    assert (place.buffer().quality, place.buffer().quality_is) == (decided.quality, "decided")
    check_budget(place)


def test_a_fixed_quality_is_that_of_every_pack_whatever_the_number_of_its_task(place: Place) -> None:
    place.create(4000, quality=40)
    for task in (3, 0, 5):
        place.upload(task, {task: 30})
    assert (place.buffer().quality, place.buffer().quality_is) == (40, "fixed")
    assert {row.quality for row in place.rows()} == {40}
    for task in (3, 0, 5):
        reshare(place.database, place.store, "b", without_task=task)
    assert (place.buffer().quality, place.buffer().quality_is) == (40, "fixed")


def test_a_buffer_that_lost_its_last_task_is_open_to_any_quality_again(place: Place) -> None:
    place.create(3000, quality=None)
    place.upload(0, {0: 70}, ranking="herding")
    assert place.buffer().quality_is == "decided"
    reshare(place.database, place.store, "b", without_task=0)
    assert (place.buffer().quality, place.buffer().quality_is) == (None, "provisional")
    place.upload(1, {1: 3})
    assert (place.buffer().quality, place.buffer().quality_is) == (90, "provisional")


# Races, crashes and damage


def test_a_cancelled_ingest_does_not_commit(place: Place) -> None:
    place.create(5000)
    held = claim(place.database, place.settings, 0)
    with place.database.session() as session:
        ingest.cancel(session, held.id)
    with pytest.raises(LeaseLost):
        commit(place.database, place.store, "b", adding(0, pictures(1, 2), [0, 0]), ingest=held)
    assert (place.buffer().generation, place.stored()) == (0, {})


def test_an_ingest_commits_only_once(place: Place) -> None:
    place.create(5000)
    held = claim(place.database, place.settings, 0)
    change = adding(0, pictures(1, 2), [0, 0])
    commit(place.database, place.store, "b", change, ingest=held)
    with pytest.raises(LeaseLost):
        commit(place.database, place.store, "b", change, ingest=held)
    assert place.buffer().generation == 1
    assert place.content().tasks[0].seen == {0: 2}


def test_a_change_expects_the_generation_it_was_decided_on(place: Place) -> None:
    place.create(5000)
    place.upload(0, {0: 3})
    with pytest.raises(Conflict, match=r"at generation 1, the request expects 0"):
        reshare(place.database, place.store, "b", budget_bytes=100, expected=frozenset({"0"}))
    assert reshare(place.database, place.store, "b", budget_bytes=4000, expected=frozenset({"1"})) == 2


def test_an_unchanged_pack_is_not_written_again(place: Place) -> None:
    place.create(50_000)
    place.upload(0, {0: 3})
    before = [row.id for row in place.rows()]
    place.upload(1, {1: 3})
    assert [row.id for row in place.rows() if row.task == 0] == before


class EventfulStore(PackStore):
    """A store in which something happens once, just before or after a pack is written."""

    before: Callable[[], object] | None = None
    after: Callable[[str], object] | None = None

    def put(self, data: bytes) -> str:
        before, self.before = self.before, None
        if before is not None:
            before()
        digest = super().put(data)
        after, self.after = self.after, None
        if after is not None:
            after(digest)
        return digest


def test_a_pack_that_was_collected_before_it_was_named_is_written_again(place: Place) -> None:
    place.create(5000)
    store = EventfulStore(place.settings.packs_dir)
    store.after = store.delete
    place.upload(0, {0: 3}, store=store)
    assert place.buffer().exemplars == 3
    check_budget(place)


def test_a_change_that_lost_a_race_is_made_again_from_the_new_content(place: Place) -> None:
    place.create(5000)
    place.upload(0, {0: 12})
    store = EventfulStore(place.settings.packs_dir)
    store.before = lambda: reshare(place.database, place.store, "b", budget_bytes=1500)
    grow, budgets = adding(1, pictures(7, 12), [1] * 12), list[int]()

    def counted(content: Content) -> Content:
        budgets.append(content.policy.budget_bytes)
        return grow(content)

    assert commit(place.database, store, "b", counted) == 3
    assert budgets == [5000, 1500]
    assert place.buffer().budget_bytes == 1500
    check_budget(place)


def test_two_uploads_to_one_task_at_once_are_both_kept(place: Place) -> None:
    place.create(50_000)
    store = EventfulStore(place.settings.packs_dir)
    first, second = pictures(1, 5), pictures(2, 7)
    store.before = lambda: commit(place.database, place.store, "b", adding(0, second, [0] * 7))
    commit(place.database, store, "b", adding(0, first, [0] * 5))
    place.images = np.concatenate([first, second])
    assert place.content().tasks[0].seen == {0: 12}
    assert place.kept()[0][0] == [4, 3, 2, 1, 0, 11, 10, 9, 8, 7, 6, 5]


def test_an_ingest_that_is_cancelled_while_its_packs_are_written_changes_nothing(place: Place) -> None:
    place.create(5000)
    place.upload(0, {0: 40})
    before = place.buffer(), place.kept()
    held = claim(place.database, place.settings, 1)

    def cancel() -> None:
        with place.database.session() as session:
            ingest.cancel(session, held.id)

    store = EventfulStore(place.settings.packs_dir)
    store.before = cancel
    with pytest.raises(LeaseLost):
        commit(place.database, store, "b", adding(1, pictures(9, 40), [1] * 40), ingest=held)
    assert (place.buffer(), place.kept()) == before
    check_budget(place)


class Crash(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("written", [*(pytest.param(n, marks=pytest.mark.slow) for n in range(3)), 3])
def test_a_crash_before_the_transaction_leaves_the_old_generation(written: int, place: Place) -> None:
    place.create(45_000, quality=None)
    for task in range(3):
        place.upload(task, {task: 70})
    before, files = (place.buffer(), place.kept()), {digest for digest, _ in place.store.digests()}
    left = written

    class DyingStore(PackStore):
        def put(self, data: bytes) -> str:
            nonlocal left
            if left == 0:
                raise Crash
            left -= 1
            return super().put(data)

    dying, change = DyingStore(place.settings.packs_dir), adding(3, pictures(9, 70), [3] * 70)
    with pytest.raises(Crash):
        commit(place.database, dying, "b", change)
    assert (place.buffer(), place.kept()) == before
    assert len({digest for digest, _ in place.store.digests()} - files) == written
    collect(place.database, place.store, place.settings)
    assert {digest for digest, _ in place.store.digests()} == files
    assert commit(place.database, place.store, "b", change) == 4
    check_budget(place)


def damage(place: Place, task: int, row: int) -> int:
    """One exemplar of a task's pack is damaged on disk; returns the size of the pack."""
    (live,) = [found for found in place.rows() if found.task == task and found.until is None]
    path = place.store.path(live.digest)
    data = bytearray(path.read_bytes())
    at = int(pack.parse(bytes(data)).starts[row])
    # A flip that makes or breaks a marker would cost more than the exemplar.
    data[next(i for i in range(at + 1, len(data)) if 0xFF not in (data[i - 1], data[i], data[i] ^ 0x10))] ^= 0x10
    path.write_bytes(data)
    return live.bytes


def test_what_is_intact_of_a_damaged_pack_survives_a_smaller_budget(place: Place) -> None:
    place.create(50_000)
    place.upload(0, {0: 20})
    held = place.kept()[0][0]
    size = damage(place, 0, 2)
    reshare(place.database, place.store, "b", budget_bytes=size - 1)
    kept = place.kept()[0][0]
    assert len(kept) >= 18
    assert kept == [*held[:2], *held[3:]][: len(kept)]
    assert place.buffer().used_bytes < size


def test_what_is_intact_of_a_damaged_pack_survives_more_images(place: Place) -> None:
    place.create(50_000)
    place.upload(0, {0: 20})
    held = place.kept()[0][0]
    damage(place, 0, 2)
    came = place.upload(0, {0: 5})[0]
    assert place.kept()[0][0] == [*came[::-1], *held[:2], *held[3:]]
    assert place.content().tasks[0].seen == {0: 25}
    collect(place.database, place.store, place.settings)
    check_budget(place)


def test_a_pack_without_a_file_does_not_block_the_buffer(place: Place) -> None:
    place.create(3000)
    place.upload(0, {0: 40})
    place.store.delete(place.rows()[0].digest)
    place.upload(1, {1: 40})
    assert list(place.stored()) == [1]


def test_the_same_uploads_to_two_buffers_give_the_same_packs(
    place: Place, settings: Settings, database: Database
) -> None:
    digests = []
    for one in (place, Place(settings, database, PackStore(settings.packs_dir))):
        one.create(2000, quality=None)
        for ranking in ("herding", "reservoir", "greedy_dpp", "random"):
            one.upload(0, {0: 30, 1: 30}, ranking=ranking)
        digests.append([row.digest for row in one.rows()])
    assert digests[0] == digests[1]


# The collector


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


def test_a_pack_that_two_generations_share_outlives_the_first(place: Place) -> None:
    place.create(25_000, quality=None)
    shape = (24, 24, 1)
    commit(place.database, place.store, "b", adding(0, photos(10, shape, noise=30), [0] * 10))
    (first,) = place.rows()
    commit(place.database, place.store, "b", adding(1, photos(100, shape, seed=1, noise=30), [1] * 100))
    assert (place.buffer().quality, place.buffer().quality_is) == (90, "provisional")
    assert place.buffer().exemplars < 110
    collect(place.database, place.store, place.settings)
    assert first.digest in {digest for digest, _ in place.store.digests()}
    check_budget(place)


def test_young_leftovers_are_spared(place: Place) -> None:
    place.create(3000)
    place.upload(0, {0: 12})
    place.upload(1, {1: 12})
    unnamed = place.store.put(pack.to_bytes(strip.encode(pictures(1, 1), [0], quality=50)))
    before = {digest for digest, _ in place.store.digests()}
    found = collect(place.database, place.store, place.settings.model_copy(update={"grace_s": 3600}))
    assert (found.rows, found.packs) == (0, 0)
    assert unnamed in before == {digest for digest, _ in place.store.digests()}


def test_retired_packs_are_bounded_in_bytes_and_the_oldest_generations_go_first(place: Place) -> None:
    place.create(3000)
    for number in range(8):
        place.upload(number, {number: 12})
    settings = place.settings.model_copy(update={"grace_s": 3600, "retired_bytes": 6000})

    def retired_bytes() -> int:
        live = {row.digest for row in place.rows() if row.until is None}
        return sum(place.store.path(d).stat().st_size for d, _ in place.store.digests() if d not in live)

    assert retired_bytes() > settings.retired_bytes
    found = collect(place.database, place.store, settings)
    assert found.packs > 0
    assert retired_bytes() <= settings.retired_bytes
    with place.database.reading() as session:
        row = session.get(BufferRow, "b")
        assert row is not None
        assert 0 < row.oldest_generation < row.generation == 8
        for generation in range(row.oldest_generation, 9):
            for entry in buffers.manifest(session, "b", generation).packs:
                assert place.store.exists(entry.digest)
        with pytest.raises(NotFound):
            buffers.manifest(session, "b", row.oldest_generation - 1)
    assert collect(place.database, place.store, settings).rows == 0


def test_the_generation_before_the_current_one_stays_for_its_grace_however_large(place: Place) -> None:
    place.create(3000)
    for number in range(8):
        place.upload(number, {number: 12})
    assert len({row.until for row in place.rows()}) > 2
    collect(place.database, place.store, place.settings.model_copy(update={"grace_s": 3600, "retired_bytes": 0}))
    assert {row.until for row in place.rows()} == {None, 8}
    with place.database.reading() as session:
        assert all(place.store.exists(entry.digest) for entry in buffers.manifest(session, "b", 7).packs)


def test_every_pack_that_is_committed_has_an_index(place: Place) -> None:
    place.create(3000)
    place.upload(0, {0: 12, 1: 3})
    (row,) = place.rows()
    found = place.store.read_index(row.digest)
    assert found is not None
    assert found.is_sound
    assert len(found) == row.exemplars
