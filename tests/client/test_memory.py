"""The memory by its promises: whatever happens to it, it keeps its budget, one form, its rankings and its counts."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from engram import pack, shares, strip
from engram.content import Content, Policy, shares_of
from engram.errors import BudgetExceeded, Cancelled, Conflict, InvalidRequest, NotFound
from engram.memory import Upload, add, reshare
from engram.schemas import IngestOptions, Per, Ranking, ShareBy
from engram.selection.embedding import BuiltinEmbedder, Shape
from engram.selection.images import ArrayImages
from engram.strip import Exemplars, runs_of
from tests.contents import put
from tests.photos import UInt8Array, mosaics, photos, shades, shades_of

IntArray = npt.NDArray[np.int64]


class Extractor(BuiltinEmbedder):
    """Another embedding, as a trainer would bring it."""

    name = "e" * 64
    block = 2

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape, dimensions=24)


def packs(content: Content) -> dict[int, Exemplars]:
    """The exemplars of every task that has some."""
    return {number: kept for number, task in content.tasks.items() if (kept := task.load()) is not None}


def digests(content: Content) -> dict[int, str]:
    return {number: pack.digest(pack.to_bytes(kept)) for number, kept in packs(content).items()}


def rankings(exemplars: Exemplars | None) -> dict[int, list[bytes]]:
    """The segments of each class in rank order."""
    found: dict[int, list[bytes]] = {}
    if exemplars is not None:
        for row, class_id in enumerate(exemplars.class_ids.tolist()):
            found.setdefault(class_id, []).append(exemplars.segment(row))
    return found


# By hand


def room_for(counts: Mapping[int, int]) -> int:
    """Bytes of the pack of so many shades of each class at quality 100."""
    class_ids = np.repeat(list(counts), list(counts.values()))
    return len(pack.to_bytes(strip.encode(np.concatenate([shades(0, 1)] * len(class_ids)), class_ids, quality=100)))


def test_four_classes_of_equal_images_share_a_budget_as_two_did_before() -> None:
    budget = 2 * room_for({0: 4, 1: 4})
    options: dict[str, Any] = {"ranking": "ring"}
    content = put(Content(Policy(budget, quality=100)), shades(0, 60), [0, 1] * 30, **options)
    before = content.tasks[0]
    assert before.kept[0] == before.kept[1] > 8
    assert before.pack_bytes == room_for(before.kept) <= budget < room_for({0: before.kept[0] + 1, 1: before.kept[0]})
    content = put(content, shades(0, 60), [2, 3] * 30, task=1, **options)
    assert [task.kept for task in content.tasks.values()] == [{0: 4, 1: 4}, {2: 4, 3: 4}]
    assert [task.seen for task in content.tasks.values()] == [{0: 30, 1: 30}, {2: 30, 3: 30}]
    assert sum(task.pack_bytes for task in content.tasks.values()) == budget
    # Ring: the last four of class 0 are the even shades from 58 down, and class 1 has the odd ones.
    assert [shades_of(kept.decode()) for kept in packs(content).values()] == [[58, 56, 54, 52, 59, 57, 55, 53]] * 2


def test_a_class_that_comes_again_is_ranked_over_what_is_stored_and_what_came() -> None:
    content = Content(Policy(room_for({7: 5}), quality=100))
    for first, count, expected in ((0, 3, [2, 1, 0]), (3, 4, [6, 5, 4, 3, 2]), (7, 2, [8, 7, 6, 5, 4])):
        content = put(content, shades(first, count), [7] * count, ranking="ring")
        assert shades_of(packs(content)[0].decode()) == expected
    assert content.tasks[0].seen == {7: 9}


def test_a_class_that_gets_no_upload_stays_as_it_is_beside_one_that_does() -> None:
    content = put(Content(Policy(10**5, quality=50)), photos(30), [0, 1] * 15)
    before = rankings(packs(content)[0])
    content = put(content, photos(15, seed=1), [1] * 15)
    assert rankings(packs(content)[0])[0] == before[0]
    assert content.tasks[0].kept == {0: 15, 1: 30}


def test_one_class_of_two_tasks_has_a_share_in_each() -> None:
    content = put(Content(Policy(2000, quality=50)), photos(60), [4] * 60)
    content = put(content, photos(60, seed=1), [4] * 60, task=9)
    assert {number: list(task.kept) for number, task in content.tasks.items()} == {0: [4], 9: [4]}
    assert shares_of(content.policy, content.classes()) == {0: {4: 1000}, 9: {4: 1000}}
    assert all(900 < task.pack_bytes <= 1000 for task in content.tasks.values())


def test_a_budget_per_class_grows_with_the_classes_and_cuts_nothing() -> None:
    first = put(Content(Policy(1000, per="class", quality=50)), photos(60), [0] * 60)
    second = put(first, photos(60, seed=1), [1] * 60, task=1)
    assert second.tasks[0] is first.tasks[0]
    assert second.tasks[1].pack_bytes > 900


# Any sequence of changes


@dataclass(frozen=True)
class Put:
    """An upload to a task."""

    task: int
    class_ids: tuple[int, ...]
    seed: int
    ranking: Ranking
    has_extractor: bool
    block: int | None

    def apply(self, content: Content, shape: Shape) -> Content:
        """The content with these images."""
        return put(
            content,
            photos(len(self.class_ids), shape, seed=self.seed),
            self.class_ids,
            task=self.task,
            embedder=Extractor(shape) if self.has_extractor else None,
            ranking=self.ranking,
            seed=self.seed,
            block=self.block,
            candidates=(10, 40, 90),
        )


@dataclass(frozen=True)
class Rebudget:
    """Another budget."""

    budget_bytes: int

    def apply(self, content: Content, shape: Shape) -> Content:
        """The content within it."""
        return reshare(content, budget_bytes=self.budget_bytes)


@dataclass(frozen=True)
class Squeeze:
    """A budget a little above or below what is used."""

    percent: int

    def apply(self, content: Content, shape: Shape) -> Content:
        """The content within it."""
        used_bytes = sum(task.pack_bytes for task in content.tasks.values())
        return reshare(content, budget_bytes=max(1, used_bytes * self.percent // 100))


@dataclass(frozen=True)
class Drop:
    """A task is deleted."""

    task: int

    def apply(self, content: Content, shape: Shape) -> Content:
        """The content without it."""
        return reshare(content, without_task=self.task)


Change = Put | Rebudget | Squeeze | Drop

tasks = st.sampled_from([0, 3, 1])
# Small ones refuse, middling ones are outgrown by some uploads, large ones hold everything.
budgets = st.sampled_from([1, 200, 400, 700, 1000, 1500, 2000, 3000, 4000, 20_000]).flatmap(
    lambda b: st.integers(b, 2 * b)
)
uploads = st.builds(
    Put,
    task=tasks,
    class_ids=st.tuples(st.sampled_from([(0,), (1,), (0, 1), (1, 5), (0, 1, 5, 2**31 - 1)]), st.integers(1, 40)).map(
        lambda found: (found[0] * found[1])[: found[1]]
    ),
    seed=st.integers(0, 99),
    ranking=st.sampled_from(get_args(Ranking)),
    has_extractor=st.booleans(),
    block=st.sampled_from([None, 2, 3, 4]),
)
squeezes = st.builds(Squeeze, st.integers(50, 110))
changes = st.lists(
    uploads | uploads | uploads | squeezes | squeezes | st.builds(Rebudget, budgets) | st.builds(Drop, tasks),
    min_size=2,
    max_size=8,
)
policies = st.builds(
    Policy,
    budget_bytes=budgets,
    per=st.sampled_from(get_args(Per)),
    share_by=st.sampled_from(get_args(ShareBy)),
    subsampling=st.sampled_from(["4:2:0", "4:4:4"]),
    quality=st.sampled_from([None, None, None, 35]),
    roomy_quality=st.sampled_from([90, 90, None]),
)
shapes = st.sampled_from([(1, 1, 3), (8, 8, 1), (9, 7, 3), (16, 16, 1)])


@given(policies, shapes, st.builds(lambda first, rest: [first, *rest], uploads, changes))
@settings(max_examples=15)
def test_any_sequence_of_changes_keeps_every_promise(policy: Policy, shape: Shape, sequence: list[Change]) -> None:
    contents = play(policy, shape, sequence)
    assert [digests(content) for content in contents] == [
        digests(content) for content in play(policy, shape, sequence)
    ], "the same sequence gives other packs"


def play(policy: Policy, shape: Shape, sequence: list[Change]) -> list[Content]:
    """The contents one after the other, each checked against the one before and against what was uploaded."""
    contents = [Content(policy)]
    seen: dict[int, Counter[int]] = {}
    for change in sequence:
        before = contents[-1]
        try:
            after = change.apply(before, shape)
        except BudgetExceeded as error:
            assert isinstance(change, Put)
            check_refusal(error, before, change, shape)
            continue
        except NotFound:
            assert isinstance(change, Drop)
            assert change.task not in before.tasks
            continue
        if isinstance(change, Put):
            seen.setdefault(change.task, Counter()).update(change.class_ids)
        elif isinstance(change, Drop):
            del seen[change.task]
        assert {number: Counter(task.seen) for number, task in after.tasks.items()} == seen
        check_content(after, shape)
        check_quality(before, after)
        check_change(before, after, change)
        contents.append(after)
    check_life(contents)
    return contents


def check_refusal(error: BudgetExceeded, before: Content, change: Put, shape: Shape) -> None:
    """Both numbers are named, and exactly the one that is needed would do."""
    budget, needed = error.details["budget_bytes"], error.details["needed_bytes"]
    assert budget < needed
    assert f"{budget:,} bytes" in error.message
    assert f"needs {needed:,} at quality {error.details['quality']}" in error.message
    if not before.tasks and len(set(change.class_ids)) == 1:
        fixed = Content(Policy(needed, subsampling=before.policy.subsampling, quality=error.details["quality"]))
        assert sum(change.apply(fixed, shape).tasks[change.task].kept.values()) == 1
        event("a budget of exactly what is needed")


def check_content(content: Content, shape: Shape) -> None:
    """Budget, sizes, forms and counts, as they must be at every content."""
    policy = content.policy
    share = shares_of(policy, content.classes())
    distinct = {class_id for classes in content.classes().values() for class_id in classes}
    total = shares.limit(policy.budget_bytes, per=policy.per, classes=len(distinct))
    assert sum(task.pack_bytes for task in content.tasks.values()) <= total
    forms = set()
    for number, task in content.tasks.items():
        kept = task.load()
        assert policy.share_by == "none" or task.pack_bytes <= sum(share[number].values())
        assert task.pack_bytes == (0 if kept is None else len(pack.to_bytes(kept)))
        assert dict(task.kept) == ({} if kept is None else dict(runs_of(kept.class_ids)))
        assert all(count <= task.seen[class_id] for class_id, count in task.kept.items())
        assert (task.decision is None) == (not task.seen)
        if kept is not None:
            forms.add(kept.form)
            assert len(kept.decode()) == sum(task.kept.values())
    assert len(forms) <= 1, "more than one form"
    for form in forms:
        assert (form.quality, form.shape) == (content.quality, shape)
        assert form.quality == policy.quality or policy.quality is None


def check_quality(before: Content, after: Content) -> None:
    """What is decided or fixed stays; what is open is still what everything was kept at."""
    if before.tasks and after.tasks and not before.is_provisional:
        assert (after.quality, after.is_provisional) == (before.quality, False)
    if not after.tasks:
        assert (after.quality, after.is_provisional) == (None, True)
    if after.is_roomy and after.tasks:
        assert after.quality == after.policy.roomy_quality
        assert after.keeps_everything


def check_change(before: Content, after: Content, change: Change) -> None:
    """Classes without an upload are prefixes, decoded and encoded once if the quality changed, and else untouched."""
    uploaded = change.task if isinstance(change, Put) else None
    for number, task in after.tasks.items():
        if number not in before.tasks:
            continue
        was = before.tasks[number].load()
        again = was is not None and was.form.quality != after.quality
        if was is not None and again and task.kept:
            event("encoded again")
            assert after.quality is not None
            was = strip.encode(
                was.decode(), was.class_ids, quality=after.quality, subsampling=before.policy.subsampling
            )
        now, then = rankings(task.load()), rankings(was)
        for class_id in now.keys() - (set(change.class_ids) if isinstance(change, Put) and number == uploaded else ()):
            assert now[class_id] == then[class_id][: len(now[class_id])]
        if after.policy.share_by == "none" and uploaded is not None and number != uploaded and not again:
            assert task.kept == before.tasks[number].kept, "an upload to one task has cut another"
        if number != uploaded and not again and task.kept == before.tasks[number].kept:
            assert task.load is before.tasks[number].load
            # Where a quality is chosen, what was not measured enough before has been measured now.
            assert task is before.tasks[number] or (before.is_roomy and not after.is_roomy)


def check_life(contents: list[Content]) -> None:
    """Between empty and empty a memory is encoded again at most twice, and only from what everything was kept at."""
    lives: list[list[int]] = [[]]
    for content in contents:
        if not content.tasks:
            lives.append([])
        elif content.quality is not None and lives[-1][-1:] != [content.quality]:
            lives[-1].append(content.quality)
    for life in lives:
        assert len(life) <= 3, f"qualities one after the other: {life}"
        if len(life) == 3:
            event("encoded again twice")
            assert life[0] == 90


@given(
    first=st.integers(1, 64),
    more=st.integers(1, 40),
    budget=st.integers(250, 900),
    ranking=st.sampled_from(["ring", "random"]),
)
@settings(max_examples=30, deadline=None)
def test_a_smaller_share_keeps_what_it_would_have_kept_from_the_start(
    first: int, more: int, budget: int, ranking: Ranking
) -> None:
    """Shrinking is a truncation: the order of a ranking depends on no budget."""
    large = put(Content(Policy(budget + 40 * more, quality=100)), shades(0, first), [3] * first, ranking=ranking)
    small = put(Content(Policy(budget, quality=100)), shades(0, first), [3] * first, ranking=ranking)
    assert digests(reshare(large, budget_bytes=budget)) == digests(small)


# Refusals


def test_what_does_not_fit_is_refused_and_the_content_is_what_it_was() -> None:
    content = put(Content(Policy(500, per="buffer", share_by="task", quality=90)), photos(20), [0] * 20)
    before = digests(content)
    with pytest.raises(BudgetExceeded, match=r"together, and the smallest .* raise the budget") as caught:
        put(content, photos(2, seed=1, noise=100), [1, 2], task=1)
    assert caught.value.details["budget_bytes"] == 250
    assert caught.value.details["needed_bytes"] > 250
    assert digests(content) == before
    assert list(content.tasks) == [0]


def test_the_share_of_a_class_of_which_nothing_is_left_is_not_counted_as_room() -> None:
    """Its images are gone, so nothing of its share can be spent; the refusal once named more bytes than were needed."""
    budget = room_for({1: 1}) - 5
    content = put(Content(Policy(10**4, per="class", quality=100)), shades(0, 1), [0])
    content = reshare(content, budget_bytes=budget)
    assert content.tasks[0].kept == {}
    with pytest.raises(BudgetExceeded) as caught:
        put(content, shades(0, 1), [1])
    assert caught.value.details == {"budget_bytes": budget, "needed_bytes": budget + 5, "quality": 100}


def test_an_upload_of_no_images_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="0 images"):
        put(Content(Policy(1000)), photos(0), [])


def test_images_of_another_shape_are_refused_even_when_all_tasks_are_gone() -> None:
    content = put(Content(Policy(10**5)), photos(3), [0, 1, 2])
    for stands in (content, reshare(content, without_task=0)):
        with pytest.raises(Conflict, match=r"8x8x1 .* holds 16x16x3") as caught:
            put(stands, photos(3, (8, 8, 1)), [0, 1, 2], task=1)
        assert caught.value.details == {"image_shape": [8, 8, 1], "buffer_shape": [16, 16, 3]}


def test_a_task_that_is_not_there_cannot_be_deleted() -> None:
    content = put(put(Content(Policy(10**5)), photos(2), [0, 1]), photos(2), [0, 1], task=4)
    with pytest.raises(NotFound, match=r"no task 3; there are \[0, 4\]"):
        reshare(content, without_task=3)


# Odd uploads


@pytest.mark.parametrize("ranking", get_args(Ranking))
@pytest.mark.parametrize(
    ("pictures", "class_ids"),
    [
        (photos(1), [7]),
        (photos(2), [7, 7]),
        (photos(3), [2, 1, 0]),
        (photos(9), [0] * 8 + [1]),
        (photos(40), [5] * 40),
        (photos(5, (2, 2, 1)), [0, 0, 0, 1, 1]),
        (photos(5, (1, 1, 3)), [0, 0, 0, 1, 1]),
        (photos(6, (65, 33, 3)), [0, 0, 0, 1, 1, 1]),
        (np.full((70, 8, 8, 1), 77, np.uint8), [0, 1] * 35),
        (np.zeros((70, 8, 8, 3), np.uint8), [2**31 - 1] * 70),
    ],
    ids=["one image", "two", "one each", "a class of one", "one class", "2x2", "1x1", "65x33", "constant", "black"],
)
def test_odd_uploads_are_kept_like_any_other(ranking: Ranking, pictures: UInt8Array, class_ids: list[int]) -> None:
    roomy = put(Content(Policy(10**6)), pictures, class_ids, ranking=ranking)
    assert (roomy.quality, dict(roomy.tasks[0].kept)) == (90, Counter(class_ids))
    # One byte less than everything takes at 90.
    tight = roomy.tasks[0].pack_bytes - 1
    content = put(Content(Policy(tight)), pictures, class_ids, ranking=ranking, candidates=(10,))
    assert content.tasks[0].pack_bytes <= tight
    decision = content.tasks[0].decision
    assert decision is not None
    assert decision.model_dump_json()
    again = put(content, pictures, class_ids, ranking=ranking)
    assert again.tasks[0].pack_bytes <= tight
    assert again.tasks[0].seen == {class_id: 2 * count for class_id, count in Counter(class_ids).items()}


def still_there(left: Exemplars | None) -> Exemplars | None:
    return left


def test_exemplars_that_were_lost_make_room_for_what_comes() -> None:
    """A service reads what is left of a damaged pack: fewer exemplars than were counted, or none."""
    content = put(Content(Policy(10**5)), photos(10), [0, 1] * 5)
    whole = packs(content)[0]
    for left in (whole.select([0, 1, 7]), None):
        damaged = {0: replace(content.tasks[0], load=partial(still_there, left))}
        after = put(Content(content.policy, damaged, 90, True, content.shape), photos(4, seed=1), [0] * 4)
        check_content(after, (16, 16, 3))
        assert after.tasks[0].seen == {0: 9, 1: 5}
        assert after.tasks[0].kept == ({0: 6, 1: 1} if left is not None else {0: 4})
        assert not after.is_roomy


# Changes without an upload


def test_a_larger_budget_leaves_every_task_untouched() -> None:
    content = put(put(Content(Policy(3000)), photos(40), [0, 1] * 20), photos(40, seed=1), [2, 3] * 20, task=1)
    after = reshare(content, budget_bytes=10**6)
    assert all(after.tasks[number] is task for number, task in content.tasks.items())
    assert after.quality == content.quality


def test_a_deleted_task_leaves_the_others_untouched_and_its_share_to_later_uploads() -> None:
    content = put(put(Content(Policy(3000, quality=50)), photos(80), [0] * 80), photos(80, seed=1), [1] * 80, task=1)
    after = reshare(content, without_task=0)
    assert after.tasks[1] is content.tasks[1]
    assert list(after.tasks) == [1]
    later = put(after, photos(80, seed=2), [1] * 80, task=1)
    assert later.tasks[1].pack_bytes > 2800 > 1500 >= after.tasks[1].pack_bytes


# Cost


class Counting(ArrayImages):
    """Images that remember how many were read, and how many at once."""

    read_in_all = 0
    most_at_once = 0

    def read(self, indices: IntArray) -> UInt8Array:
        self.count(len(indices))
        return super().read(indices)

    def count(self, images: int) -> None:
        type(self).read_in_all += images
        type(self).most_at_once = max(self.most_at_once, images)


def test_progress_counts_every_image_once_and_can_end_the_work() -> None:
    told: list[int] = []
    upload = Upload(0, ArrayImages(photos(140), np.arange(140) % 2), IngestOptions())
    add(Content(Policy(8000)), upload, BuiltinEmbedder((16, 16, 3)), advance=told.append)
    assert sum(told) == 140
    assert min(told) >= 0
    assert len(told) > 10

    def stop(count: int) -> None:
        raise Cancelled("the ingest was cancelled")

    with pytest.raises(Cancelled):
        add(Content(Policy(8000)), upload, BuiltinEmbedder((16, 16, 3)), advance=stop)


def test_of_a_class_of_many_images_few_are_read_to_keep_a_few() -> None:
    class Fresh(Counting):
        pass

    images = Fresh(photos(5000, (8, 8, 1)), np.zeros(5000, np.int64))
    options = IngestOptions(candidates=(50, 75), ranking="random")
    content = add(Content(Policy(3000)), Upload(0, images, options), BuiltinEmbedder((8, 8, 1)))
    assert Fresh.read_in_all < 10 * sum(content.tasks[0].kept.values())


def test_memory_does_not_grow_with_the_number_of_images() -> None:
    """The pictures themselves lie with the caller; what selection adds is chunks, one group's features, and strips."""

    def peak(n: int) -> int:
        class Fresh(Counting):
            pass

        pictures = np.broadcast_to(photos(1, (32, 32, 3)), (n, 32, 32, 3))
        upload = Upload(0, Fresh(pictures, np.zeros(n, np.int64)), IngestOptions(candidates=(25, 75)))
        tracemalloc.start()
        try:
            add(Content(Policy(40_000)), upload, BuiltinEmbedder((32, 32, 3)))
            assert Fresh.most_at_once * 3072 <= 2**23
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    small, large = peak(3000), peak(9000)
    assert large < 120 * 2**20
    assert large < small + 16 * 2**20


def test_mosaics_are_lossless_at_every_candidate() -> None:
    """What other tests build on."""
    images = mosaics(50)
    for quality in (10, 25, 50, 75, 90):
        np.testing.assert_array_equal(strip.encode(images, np.zeros(50, int), quality=quality).decode(), images)
    np.testing.assert_array_equal(strip.encode(shades(0, 64), np.zeros(64, int), quality=100).decode(), shades(0, 64))
