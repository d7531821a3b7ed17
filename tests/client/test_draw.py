"""A draw is a pure function: balanced as its strategy says, disjoint over ranks, and the same everywhere."""

from __future__ import annotations

from collections import Counter
from hashlib import sha256
from time import process_time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engram import draw
from engram.errors import Conflict, InvalidRequest, NotFound
from engram.schemas import PackEntry, Strategy

# task -> {class id: exemplars}; class 3 lives in two tasks
STREAM = {0: {1: 40, 3: 7}, 2: {3: 25, 5: 1}, 4: {8: 100}}


def layout(stream: dict[int, dict[int, int]]) -> draw.Layout:
    return draw.Layout(
        [
            PackEntry(
                digest="0" * 64, task=task, bytes=1, exemplars=sum(held.values()), quality=50, runs=list(held.items())
            )
            for task, held in stream.items()
        ]
    )


def drawn(stream: dict[int, dict[int, int]], request: draw.Request) -> list[tuple[int, int, int]]:
    """(task, class id, row) of each exemplar drawn."""
    planned = draw.plan(layout(stream), request)
    labels = [np.repeat(list(held), list(held.values())) for held in stream.values()]
    tasks = list(stream)
    for pack, row, task, class_id in zip(*(column.tolist() for column in planned[:4]), strict=True):
        assert (task, class_id) == (tasks[pack], labels[pack][row])
    return list(zip(planned.tasks.tolist(), planned.class_ids.tolist(), planned.rows.tolist(), strict=True))


streams = st.dictionaries(
    st.integers(0, 9),
    st.dictionaries(st.integers(0, 5), st.integers(1, 30), min_size=1).map(lambda held: dict(sorted(held.items()))),
    min_size=1,
    max_size=6,
)


@settings(max_examples=80)
@given(
    stream=streams,
    size=st.integers(1, 60),
    seed=st.integers(0, 2**63 - 1),
    step=st.integers(0, 2**63 - 1),
    strategy=st.sampled_from(draw.STRATEGIES),
    world_size=st.integers(1, 4),
)
def test_ranks_share_one_global_batch_and_rows_repeat_only_when_the_group_is_used_up(
    stream: dict[int, dict[int, int]], size: int, seed: int, step: int, strategy: Strategy, world_size: int
) -> None:
    ranks = [
        drawn(stream, draw.Request(size, seed, step, strategy, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    union = Counter(row for rank in ranks for row in rank)
    total = sum(sum(held.values()) for held in stream.values())
    if strategy == "epoch":
        assert max(union.values(), default=0) <= 1
        return
    per_rank = size * len(stream) if strategy == "per_task" else size
    assert [len(rank) for rank in ranks] == [per_rank] * world_size
    if strategy == "uniform":
        assert max(union.values()) - (min(union.values()) if len(union) == total else 0) <= 1
    key = {"class_balanced": 1, "task_balanced": 0, "per_task": 0}.get(strategy)
    if key is not None:
        by_group = Counter(row[key] for rank in ranks for row in rank)
        groups = set(stream) if key == 0 else {c for held in stream.values() for c in held}
        counts = [by_group.get(group, 0) for group in groups]
        assert max(counts) - min(counts) <= 1


@settings(max_examples=20)
@given(stream=streams, size=st.integers(1, 40), seed=st.integers(0, 1000), world_size=st.integers(1, 3))
def test_an_epoch_walks_every_exemplar_exactly_once(
    stream: dict[int, dict[int, int]], size: int, seed: int, world_size: int
) -> None:
    steps = -(-sum(sum(held.values()) for held in stream.values()) // (size * world_size))
    for epoch in (0, 3):
        seen = Counter(
            row
            for step in range(steps)
            for rank in range(world_size)
            for row in drawn(
                stream, draw.Request(size, seed, epoch * steps + step, "epoch", rank=rank, world_size=world_size)
            )
        )
        assert set(seen.values()) == {1}
        assert len(seen) == sum(sum(held.values()) for held in stream.values())


def test_epochs_are_permuted_anew() -> None:
    # 173 exemplars make 9 steps of 20.
    first, second = (drawn(STREAM, draw.Request(20, 1, step, "epoch")) for step in (0, 9))
    assert first != second


def test_filters_choose_tasks_and_an_excluded_task_need_not_exist() -> None:
    only = drawn(STREAM, draw.Request(30, tasks=(0, 2)))
    assert {task for task, _, _ in only} == {0, 2}
    without = drawn(STREAM, draw.Request(30, strategy="per_task", exclude_tasks=(4, 99)))
    assert Counter(task for task, _, _ in without) == {0: 30, 2: 30}


def test_a_class_in_two_tasks_is_drawn_from_both() -> None:
    found = drawn(STREAM, draw.Request(120, strategy="class_balanced"))
    assert {task for task, class_id, _ in found if class_id == 3} == {0, 2}


def test_uniform_draws_are_uniform() -> None:
    counts = Counter(row for step in range(1500) for row in drawn({0: {0: 20}}, draw.Request(5, 9, step)))
    expected = 1500 * 5 / 20
    chi_square = sum((counts[0, 0, row] - expected) ** 2 / expected for row in range(20))
    assert chi_square < 43.8  # the 99.9 % point of 19 degrees of freedom


def test_epoch_positions_are_uniform() -> None:
    first = Counter(drawn({0: {0: 11}}, draw.Request(1, seed, 0, "epoch"))[0][2] for seed in range(1500))
    chi_square = sum((first[row] - 1500 / 11) ** 2 / (1500 / 11) for row in range(11))
    assert chi_square < 29.6  # the 99.9 % point of 10 degrees of freedom


def test_the_same_request_draws_the_same_rows_for_ever() -> None:
    """Pinned: a stored checkpoint must draw the same exemplars with every later version of this library."""
    assert drawn(STREAM, draw.Request(6, 7, 1041)) == PINNED["uniform"]
    assert drawn(STREAM, draw.Request(6, 7, 1041, "class_balanced")) == PINNED["class_balanced"]
    assert drawn(STREAM, draw.Request(3, 7, 1041, "epoch", rank=1, world_size=2)) == PINNED["epoch"]


def digest(stream: dict[int, dict[int, int]], requests: list[draw.Request]) -> str:
    return sha256(repr([drawn(stream, request) for request in requests]).encode()).hexdigest()


def test_many_small_groups_draw_the_same_rows_for_ever() -> None:
    """Pinned from version 0.1, which went from group to group: sizes beyond a group, and most of it, are shuffles."""
    stream = {task: {3 * task + c: 1 + (7 * task + c) % 5 for c in range(3)} for task in range(40)}
    requests = [
        draw.Request(size, 3, step, strategy, rank=1, world_size=2)
        for size in (1, 5, 90, 400)
        for step in (0, 77)
        for strategy in draw.STRATEGIES
    ]
    assert digest(stream, requests) == "26330a375cfcf7502730f8a5d6e44fa7c7f1971abfadba43208ceaee335c0c70"


@pytest.mark.parametrize(
    "bad",
    [
        {"size": 0},
        {"size": -3},
        {"size": 1, "seed": -1},
        {"size": 1, "step": 2**63},
        {"size": 1, "rank": 1},
        {"size": 1, "rank": -1, "world_size": 2},
        {"size": 1, "world_size": 0},
        {"size": 1, "strategy": "best"},
    ],
)
def test_a_request_out_of_range_is_refused(bad: dict[str, int]) -> None:
    with pytest.raises(InvalidRequest):
        draw.Request(**bad)  # type: ignore[arg-type]


def test_unknown_tasks_and_empty_memories_are_named() -> None:
    with pytest.raises(NotFound, match="task 7"):
        drawn(STREAM, draw.Request(5, tasks=(7,)))
    with pytest.raises(Conflict, match="no exemplars"):
        drawn(STREAM, draw.Request(5, exclude_tasks=(0, 2, 4)))
    with pytest.raises(Conflict, match="no exemplars"):
        drawn({}, draw.Request(5))


def test_one_exemplar_can_be_drawn_many_times_over() -> None:
    assert drawn({5: {2: 1}}, draw.Request(4)) == [(5, 2, 0)] * 4


PINNED: dict[str, list[tuple[int, int, int]]] = {
    "uniform": [(0, 1, 28), (2, 3, 16), (4, 8, 17), (4, 8, 23), (4, 8, 55), (4, 8, 66)],
    "class_balanced": [(0, 1, 20), (0, 3, 41), (2, 3, 18), (2, 5, 25), (4, 8, 53), (4, 8, 86)],
    "epoch": [(2, 3, 2), (2, 3, 3), (4, 8, 44)],
}


def test_the_largest_global_batch_costs_a_few_sorts_of_it_and_not_one_for_each_round_of_repeats() -> None:
    many = draw.Layout(
        [
            PackEntry(
                digest="0" * 64, task=0, bytes=1, exemplars=9000 * 300, quality=50, runs=[(c, 300) for c in range(9000)]
            )
        ]
    )
    count = 2**20
    numbers = np.random.default_rng(0).integers(0, 9000 * 300, count)
    unit_s = process_time()
    np.unique(numbers, return_index=True)
    unit_s = process_time() - unit_s
    for strategy in ("uniform", "class_balanced"):
        before = process_time()
        planned = draw.plan(many, draw.Request(8192, strategy=strategy, rank=3, world_size=128))
        assert process_time() - before < 4 * unit_s
        assert len(planned.rows) == 8192
