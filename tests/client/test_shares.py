"""Shares are exact: they sum to the budget and equal parts differ by at most one byte."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engram.shares import leaves, limit, room, split

streams = st.dictionaries(st.integers(0, 30), st.lists(st.integers(0, 9), min_size=1, unique=True), min_size=1)


@given(total=st.integers(0, 10**12), count=st.integers(1, 500))
def test_a_split_sums_to_the_total_and_its_parts_differ_by_at_most_one(total: int, count: int) -> None:
    parts = split(total, count)
    assert sum(parts) == total
    assert len(parts) == count
    assert max(parts) - min(parts) <= 1


def test_two_thousand_bytes_over_sixty_classes_come_out_as_two_thousand() -> None:
    assert sum(split(2000, 60)) == 2000
    assert sorted(set(split(2000, 60))) == [33, 34]


@pytest.mark.parametrize(("total", "count"), [(10, 0), (10, -1), (-1, 3)])
def test_a_split_into_no_parts_is_refused(total: int, count: int) -> None:
    with pytest.raises(ValueError, match="cannot split"):
        split(total, count)


@given(stream=streams, budget=st.integers(1, 10**9), per=st.sampled_from(["buffer", "class"]))
def test_the_shares_of_all_leaves_sum_to_the_limit_however_they_are_divided(
    stream: dict[int, list[int]], budget: int, per: str
) -> None:
    classes = len({class_id for held in stream.values() for class_id in held})
    for share_by in ("class", "task"):
        shares = leaves(budget, per=per, share_by=share_by, classes_by_task=stream)  # type: ignore[arg-type]
        assert set(shares) == {(task, class_id) for task, held in stream.items() for class_id in held}
        assert sum(shares.values()) == limit(budget, per=per, classes=classes)  # type: ignore[arg-type]


def test_sharing_by_class_gives_a_class_in_two_tasks_no_more_than_a_class_in_one() -> None:
    shares = leaves(900, per="buffer", share_by="class", classes_by_task={0: [1, 2], 1: [2, 3]})
    assert shares[0, 1] == 300
    assert shares[0, 2] + shares[1, 2] == 300
    assert shares[1, 3] == 300


def test_sharing_by_task_gives_a_task_of_one_class_as_much_as_a_task_of_three() -> None:
    shares = leaves(600, per="buffer", share_by="task", classes_by_task={0: [1], 1: [2, 3, 4]})
    assert shares[0, 1] == 300
    assert [shares[1, c] for c in (2, 3, 4)] == [100, 100, 100]


def test_an_empty_buffer_has_no_shares() -> None:
    assert leaves(100, per="class", share_by="class", classes_by_task={}) == {}


def test_without_shares_what_is_stored_stays_and_what_comes_has_the_room_that_is_left() -> None:
    held = {0: {1: 100, 2: 50}, 1: {2: 30}}
    assert leaves(500, per="buffer", share_by="none", classes_by_task={0: [1, 2], 1: [2]}) == {}
    assert room(500, held) == held
    assert room(500, held, task=1, coming={2: 30, 3: 60}) == {0: {1: 100, 2: 50}, 1: {2: 175, 3: 175}}
    assert room(500, held, task=4, coming={8: 1, 9: 3}) == {**held, 4: {8: 80, 9: 240}}
    assert room(90, held) == {0: {1: 50, 2: 25}, 1: {2: 15}}
    assert room(100, held, task=4, coming={8: 1})[4] == {8: 0}
