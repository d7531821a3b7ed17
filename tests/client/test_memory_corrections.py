"""Exemplars keep their fields through everything a memory does, and can be removed and relabelled."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engram import pack, shares
from engram.content import Content, Policy, shares_of
from engram.errors import BadUpload, BudgetExceeded, Conflict, InvalidRequest, NotFound
from engram.fields import NO_COLUMNS, NO_FIELDS, Schema
from engram.memory import Upload, Where, add, relabel, remove, reshare
from engram.schemas import IngestOptions
from engram.selection.embedding import BuiltinEmbedder
from engram.selection.images import ArrayImages
from engram.strip import Exemplars, runs_of
from tests.photos import UInt8Array, photos, shades, shades_of

SCHEMA = Schema.declare({"key": "utf8", "logits": "float16 [4]", "tags": "uint8 [any]"})


def put(
    content: Content, images: UInt8Array, class_ids: list[int], *, task: int = 0, first: int = 0, **options: Any
) -> Content:
    """The content with these images; what each has in its fields follows from its number, counted from `first`."""
    numbers = range(first, first + len(images))
    columns = NO_COLUMNS
    if content.schema:
        given = {
            "key": [f"k{number}" for number in numbers],
            "logits": np.outer(list(numbers), [1, 2, 3, 4]) / 8,
            "tags": [[number % 256] * (number % 4) for number in numbers],
        }
        columns = content.schema.columns(given, len(images))
    arrays = ArrayImages(images, np.asarray(class_ids, np.int64), columns)
    return add(content, Upload(task, arrays, IngestOptions(**options)), BuiltinEmbedder(arrays.shape))


def packs(content: Content) -> dict[int, Exemplars]:
    return {number: kept for number, task in content.tasks.items() if (kept := task.load()) is not None}


def keys(content: Content, task: int = 0) -> dict[int, list[str]]:
    """The keys of each class of a task in rank order."""
    kept = packs(content).get(task)
    found: dict[int, list[str]] = {}
    if kept is not None:
        for class_id, key in zip(kept.class_ids.tolist(), kept.fields()["key"], strict=True):
            found.setdefault(class_id, []).append(str(key))
    return found


def check(content: Content) -> None:
    """Budget, sizes, order and fields, as they must be at every content."""
    distinct = len({class_id for classes in content.classes().values() for class_id in classes})
    limit = shares.limit(content.policy.budget_bytes, per=content.policy.per, classes=distinct)
    assert sum(task.pack_bytes for task in content.tasks.values()) <= limit
    for task in content.tasks.values():
        kept = task.load()
        assert task.seen
        assert min(task.seen.values()) > 0
        assert all(count <= task.seen[class_id] for class_id, count in task.kept.items())
        assert task.means is None or task.means.of_class.keys() <= task.seen.keys()
        if kept is None:
            assert task.pack_bytes == 0
            continue
        data = pack.to_bytes(kept)
        assert task.pack_bytes == len(data)
        assert dict(task.kept) == dict(runs_of(kept.class_ids))
        read = pack.parse(data)
        assert np.array_equal(read.decode(), kept.decode())
        assert read.schema == content.schema
        if content.schema:
            columns = read.fields()
            numbers = [int(str(key)[1:]) for key in columns["key"]]
            assert np.array_equal(columns["logits"], (np.outer(numbers, [1, 2, 3, 4]) / 8).astype(np.float16))
            assert [np.asarray(tags).tolist() for tags in columns["tags"]] == [[n % 256] * (n % 4) for n in numbers]


# Fields


def test_fields_come_along_when_a_memory_is_encoded_again_and_cut() -> None:
    content = put(Content(Policy(10**6), schema=SCHEMA), photos(80), [0, 1] * 40)
    assert content.quality == 90
    check(content)
    before = keys(content)
    cut = reshare(content, budget_bytes=content.tasks[0].pack_bytes // 3)
    check(cut)
    assert cut.quality != 90
    assert 0 < sum(cut.tasks[0].kept.values()) < 80
    assert all(some == before[class_id][: len(some)] for class_id, some in keys(cut).items())
    grown = put(cut, photos(30, seed=1), [1, 2] * 15, first=80)
    check(grown)
    assert {int(key[1:]) >= 80 for key in keys(grown)[2]} == {True}


def test_fields_count_in_the_budget() -> None:
    wide = Schema.declare({"logits": "float32 [100]"})
    images, class_ids = shades(0, 40), np.zeros(40, np.int64)
    kept = []
    for schema in (NO_FIELDS, wide):
        columns = schema.columns({"logits": np.zeros((40, 100))} if schema else {}, 40)
        upload = Upload(0, ArrayImages(images, class_ids, columns), IngestOptions(ranking="ring"))
        content = add(Content(Policy(3000, quality=100), schema=schema), upload, BuiltinEmbedder((8, 8, 1)))
        assert content.tasks[0].pack_bytes <= 3000
        kept.append(content.tasks[0].kept[0])
    assert kept == [40, 6]


def test_fields_do_not_change_which_images_are_kept_where_they_cost_nothing_to_speak_of() -> None:
    thin = Schema.declare({"flag": "bool"})
    kept = []
    for schema in (NO_FIELDS, thin):
        columns = schema.columns({"flag": np.ones(120, np.bool_)} if schema else {}, 120)
        upload = Upload(0, ArrayImages(photos(120), np.arange(120) % 2, columns), IngestOptions())
        content = add(Content(Policy(9000), schema=schema), upload, BuiltinEmbedder((16, 16, 3)))
        assert content.tasks[0].decision is not None
        kept.append((packs(content)[0], content.quality, content.tasks[0].decision.candidates[0].ratio))
    (plain, *decided), (flagged, *again) = kept
    assert decided == again
    assert 0 < len(plain) - len(flagged) < 4
    for class_id in (0, 1):
        segments = [
            [each.segment(row) for row in np.flatnonzero(each.class_ids == class_id).tolist()]
            for each in (plain, flagged)
        ]
        assert segments[0][: len(segments[1])] == segments[1]


class Weighty(ArrayImages):
    """Images whose records were counted when they were read."""

    read_bytes = 0

    def records(self, indices: npt.NDArray[np.int64]) -> list[bytes]:
        records = super().records(indices)
        type(self).read_bytes += sum(map(len, records))
        return records


def test_of_large_fields_little_more_is_read_than_is_kept() -> None:
    schema = Schema.declare({"blob": "uint8 [any]"})
    columns = schema.columns({"blob": [np.zeros(100_000, np.uint8)] * 200}, 200)
    upload = Upload(0, Weighty(photos(200), np.arange(200) % 4, columns), IngestOptions(ranking="ring"))
    content = add(Content(Policy(2_000_000, quality=50), schema=schema), upload, BuiltinEmbedder((16, 16, 3)))
    assert sum(content.tasks[0].kept.values()) == 19
    assert Weighty.read_bytes < 1.8 * content.tasks[0].pack_bytes


def test_an_upload_with_other_fields_than_the_memorys_is_refused() -> None:
    plain = Upload(0, ArrayImages(photos(3), np.zeros(3, np.int64)), IngestOptions())
    with pytest.raises(BadUpload, match="bring the fields none, the buffer declares key utf8; logits"):
        add(Content(Policy(10**5), schema=SCHEMA), plain, BuiltinEmbedder((16, 16, 3)))


# Removing


def test_an_exemplar_is_removed_by_its_key_and_by_its_rank() -> None:
    content = put(Content(Policy(10**5, quality=50), schema=SCHEMA), photos(6), [0, 1] * 3, ranking="ring")
    before = keys(content)
    by_key = remove(content, Where(keys=(before[0][1],)))
    assert keys(by_key) == {0: [before[0][0], before[0][2]], 1: before[1]}
    assert by_key.tasks[0].seen == {0: 2, 1: 3}
    by_rank = remove(content, Where(task=0, class_id=1, rank=2))
    assert keys(by_rank) == {0: before[0], 1: before[1][:2]}
    for after in (by_key, by_rank):
        check(after)


def test_a_class_is_removed_with_its_share_and_everything_seen_of_it() -> None:
    content = Content(Policy(4000, quality=50))
    content = put(put(content, photos(60), [0, 1] * 30), photos(60, seed=1), [1, 2] * 30, task=1)
    after = remove(content, Where(class_id=1))
    check(after)
    assert {number: set(task.seen) for number, task in after.tasks.items()} == {0: {0}, 1: {2}}
    assert sum(share for of in shares_of(after.policy, after.classes()).values() for share in of.values()) == 4000
    here = remove(content, Where(class_id=1, task=1))
    assert {number: set(task.seen) for number, task in here.tasks.items()} == {0: {0, 1}, 1: {2}}
    assert here.tasks[0] is content.tasks[0]
    more = put(after, photos(60, seed=2), [0] * 60)
    assert more.tasks[0].kept[0] > content.tasks[0].kept[0]


def test_a_task_and_a_memory_of_which_everything_was_removed_are_as_new() -> None:
    content = put(put(Content(Policy(10**5)), photos(4), [0] * 4), photos(4), [1] * 4, task=1)
    one = remove(content, Where(class_id=0))
    assert list(one.tasks) == [1]
    none = remove(one, Where(class_id=1))
    assert not none.tasks
    assert (none.quality, none.is_provisional) == (None, True)
    check(put(none, photos(4), [0] * 4))


def test_many_keys_go_at_once_and_those_that_nothing_has_are_passed_over() -> None:
    content = put(Content(Policy(10**6), schema=SCHEMA), photos(6), [0, 1] * 3)
    content = put(content, photos(4, seed=1), [2] * 4, task=1, first=6)
    after = remove(content, Where(keys=("k1", "k8", "gone", "k0")))
    check(after)
    assert {key for of in keys(after).values() for key in of} == {"k2", "k3", "k4", "k5"}
    assert {*keys(after, 1)[2]} == {"k6", "k7", "k9"}


def test_what_was_removed_leaves_a_roomy_memory_roomy() -> None:
    content = put(Content(Policy(10**6), schema=SCHEMA), photos(10), [0, 1] * 5)
    assert content.is_roomy
    after = remove(content, Where(keys=("k3",)))
    assert after.is_roomy
    assert after.tasks[0].kept == {0: 5, 1: 4}


def test_an_exemplar_whose_class_loses_its_last_image_takes_the_class_along() -> None:
    content = put(Content(Policy(10**6), schema=SCHEMA), photos(3), [0, 0, 7])
    after = remove(content, Where(keys=("k2",)))
    assert after.classes() == {0: [0]}
    check(after)


# Relabelling


def test_relabelled_exemplars_come_behind_those_of_their_new_class() -> None:
    content = put(Content(Policy(10**5, quality=50), schema=SCHEMA), photos(6), [3, 5] * 3, ranking="ring")
    before = keys(content)
    one = relabel(content, Where(keys=(before[3][0],)), 5)
    assert keys(one) == {3: before[3][1:], 5: [*before[5], before[3][0]]}
    assert one.tasks[0].seen == {3: 2, 5: 4}
    new = relabel(content, Where(task=0, class_id=5, rank=1), 9)
    assert keys(new) == {3: before[3], 5: [before[5][0], before[5][2]], 9: [before[5][1]]}
    whole = relabel(content, Where(class_id=5), 3)
    assert keys(whole) == {3: [*before[3], *before[5]]}
    assert whole.tasks[0].seen == {3: 6}
    for after in (one, new, whole):
        check(after)


def test_relabelling_leaves_pixels_as_they_are() -> None:
    content = put(Content(Policy(10**5, quality=100)), shades(0, 6), [0, 1] * 3, ranking="ring")
    kept = packs(relabel(content, Where(class_id=0), 4))[0]
    assert kept.class_ids.tolist() == [1, 1, 1, 4, 4, 4]
    was = packs(content)[0]
    assert shades_of(kept.decode()) == [*shades_of(was.decode())[3:], *shades_of(was.decode())[:3]]


def test_a_new_class_takes_its_share_from_the_others() -> None:
    content = put(Content(Policy(3000, quality=50)), photos(80), [0, 1] * 40)
    assert content.tasks[0].pack_bytes > 2800
    after = relabel(content, Where(task=0, class_id=0, rank=0), 2)
    check(after)
    assert after.tasks[0].kept[2] == 1


def test_relabelling_to_the_class_that_it_is_changes_nothing() -> None:
    content = put(Content(Policy(10**5)), photos(4), [0, 1] * 2)
    assert relabel(content, Where(class_id=1), 1).tasks[0] is content.tasks[0]


# What cannot be


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ({"class_id": 9}, "no exemplar of class id 9"),
        ({"class_id": 0, "task": 4}, "no exemplar of task 4, class id 0"),
        ({"keys": ("nobody",)}, "no exemplar of key 'nobody'"),
        ({"keys": ("no", "body"), "task": 0}, "no exemplar of task 0, any of 2 keys"),
        ({"task": 0, "class_id": 0, "rank": 3}, "no exemplar of task 0, class id 0, rank 3"),
        ({"class_id": 1, "keys": ("k0",)}, "no exemplar of class id 1, key 'k0'"),
    ],
)
def test_what_is_not_there_is_named(where: dict[str, Any], message: str) -> None:
    content = put(Content(Policy(10**5), schema=SCHEMA), photos(6), [0, 1] * 3)
    with pytest.raises(NotFound, match=message):
        remove(content, Where(**where))
    with pytest.raises(NotFound, match=message):
        relabel(content, Where(**where), 5)


def test_a_rank_names_nothing_where_exemplars_were_lost_before_it() -> None:
    content = put(Content(Policy(10**5), schema=SCHEMA), photos(6), [0, 1] * 3)
    left = packs(content)[0].select([1, 2, 4])
    damaged = Content(content.policy, {0: replace(content.tasks[0], load=lambda: left)}, 90, schema=SCHEMA)
    with pytest.raises(Conflict, match="holds 3 intact exemplars of 6"):
        remove(damaged, Where(task=0, class_id=0, rank=0))
    key = str(left.fields()["key"][0])
    assert keys(remove(damaged, Where(keys=(key,)))).keys() == {0, 1}


def test_exemplars_must_be_named_by_what_the_memory_knows() -> None:
    content = put(Content(Policy(10**5)), photos(6), [0, 1] * 3)
    with pytest.raises(InvalidRequest, match="the buffer declares no fields"):
        remove(content, Where(keys=("k1",)))
    with pytest.raises(InvalidRequest, match=r"2147483647, -1 does not"):
        relabel(content, Where(class_id=0), -1)
    for nothing in ({"task": 3}, {"class_id": 3, "keys": ()}):
        with pytest.raises(InvalidRequest, match="class id or key"):
            Where(**nothing)
    with pytest.raises(InvalidRequest, match="rank"):
        Where(class_id=3, rank=0)


# Any sequence of changes

CLASSES = st.sampled_from([0, 1, 5])
WHERES = st.one_of(
    st.builds(Where, task=st.sampled_from([None, 0, 1]), class_id=CLASSES),
    st.builds(Where, keys=st.lists(st.integers(0, 60).map("k{}".format), min_size=1, max_size=3).map(tuple)),
    st.builds(Where, task=st.sampled_from([0, 1]), class_id=CLASSES, rank=st.integers(0, 8)),
)
CHANGES = st.one_of(
    st.tuples(st.just("put"), st.sampled_from([0, 1]), st.lists(CLASSES, min_size=1, max_size=20)),
    st.tuples(st.just("remove"), WHERES, st.none()),
    st.tuples(st.just("relabel"), WHERES, CLASSES),
    st.tuples(st.just("budget"), st.integers(400, 9000), st.none()),
)


@given(
    policy=st.builds(
        Policy,
        budget_bytes=st.integers(400, 9000),
        per=st.sampled_from(["buffer", "class"]),
        share_by=st.sampled_from(["class", "task", "none"]),
        quality=st.sampled_from([None, None, 40]),
    ),
    sequence=st.lists(CHANGES, min_size=2, max_size=9),
    has_fields=st.booleans(),
)
@settings(max_examples=20)
def test_any_sequence_of_corrections_keeps_budget_order_and_fields(
    policy: Policy, sequence: list[tuple[str, Any, Any]], has_fields: bool
) -> None:
    content = Content(policy, schema=SCHEMA if has_fields else NO_FIELDS)
    came = 0
    for kind, what, more in [("put", 0, [0, 1, 0, 5, 1]), *sequence]:
        before = content
        try:
            if kind == "put":
                content = put(content, photos(len(more), (9, 7, 3), seed=came), more, task=what, first=came)
                came += len(more)
            elif kind == "remove":
                content = remove(content, what)
            elif kind == "relabel":
                content = relabel(content, what, more)
            else:
                content = reshare(content, budget_bytes=what)
        except (BudgetExceeded, NotFound):
            continue
        except InvalidRequest:
            assert not has_fields
            assert what.keys is not None
            continue
        check(content)
        if kind == "remove" and what.keys is not None:
            left = {key for task in content.tasks for of in keys(content, task).values() for key in of}
            assert not left & {*what.keys}
        if kind == "relabel" and not what.is_whole:
            seen = [
                sum((Counter(task.seen) for task in each.tasks.values()), Counter[int]()) for each in (before, content)
            ]
            assert seen[0].total() == seen[1].total()
