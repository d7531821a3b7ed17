"""Streams put every image into the right task, and all their randomness comes from the seed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engram_trainer.datasets import Dataset, load
from engram_trainer.examples import Examples
from engram_trainer.stream import SCENARIOS, Stream, StreamConfig, build, permute, rotate


def numbered(classes: int = 10, train: int = 6, test: int = 3) -> Dataset:
    """Images whose pixels hold their row number, so that each can be recognised."""

    def split(count: int) -> Examples:
        class_ids = np.tile(np.arange(classes) * 11, count)
        images = np.zeros((len(class_ids), 4, 4, 1), np.uint8)
        images[:, 0, 0, 0] = np.arange(len(class_ids))
        return Examples.of_arrays(images, class_ids.astype(np.int64))

    return Dataset("numbered", split(train), split(test))


def everything(stream: Stream) -> list[list[int]]:
    return [[*task.train.read().reshape(-1).tolist(), *task.train.class_ids.tolist()] for task in stream.tasks]


@given(
    st.sampled_from([(10, None), (5, None), (2, None), (1, None), (6, 5), (3, 6), (11 - 4, 4)]), st.integers(0, 1000)
)
@settings(deadline=None)
def test_every_image_is_in_the_task_of_its_class_exactly_once(shape: tuple[int, int | None], seed: int) -> None:
    tasks, base = shape
    dataset = numbered()
    stream = build(dataset, StreamConfig(tasks=tasks, base_classes=base, seed=seed))
    assert len(stream.tasks) == tasks
    assert [class_id for task in stream.tasks for class_id in task.classes] == list(stream.class_order)
    assert sorted(stream.class_order) == list(dataset.classes)
    rows = np.concatenate([task.train.read()[:, 0, 0, 0] for task in stream.tasks])
    assert sorted(rows.tolist()) == list(range(60))
    for task in stream.tasks:
        assert set(task.train.class_ids.tolist()) == set(task.test.class_ids.tolist()) == set(task.classes)
    if base:
        assert len(stream.tasks[0].classes) == base
    assert len({len(task.classes) for task in stream.tasks[1:]}) <= 1


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_one_seed_makes_one_stream_and_another_seed_another(scenario: Any) -> None:
    dataset = load("digits").first(train=12, test=3)
    first, again, other = (
        build(dataset, StreamConfig(scenario=scenario, tasks=2, seed=seed, train_per_class=8)) for seed in (3, 3, 4)
    )
    assert everything(first) == everything(again)
    assert first.class_order == again.class_order
    assert everything(first) != everything(other)


def test_labels_are_places_in_the_order_of_arrival() -> None:
    stream = build(numbered(4), StreamConfig(tasks=2, class_order=(33, 0, 22, 11)))
    assert stream.labels(np.array([11, 33, 22])).tolist() == [3, 0, 2]
    assert (stream.seen(0), stream.seen(1)) == (2, 4)
    with pytest.raises(KeyError):
        stream.labels(np.array([5]))


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_limits_hold_for_each_class_and_each_task(scenario: Any) -> None:
    dataset = load("digits")
    config = StreamConfig(scenario=scenario, tasks=5, train_per_class=9, test_per_class=4)
    for task in build(dataset, config).tasks:
        assert set(np.unique(task.train.class_ids, return_counts=True)[1]) == {9}
        assert set(np.unique(task.test.class_ids, return_counts=True)[1]) == {4}
    config = StreamConfig(scenario=scenario, tasks=5, train_per_task=13)
    assert [len(task.train.read()) for task in build(dataset, config).tasks] == [13] * 5


def test_the_validation_split_takes_training_images_and_leaves_the_test_images_alone() -> None:
    dataset = numbered(4, train=10)
    whole = build(dataset, StreamConfig(tasks=1, seed=5))
    tuned = build(dataset, StreamConfig(tasks=1, seed=5, validation_ratio=0.2))
    task = tuned.tasks[0]
    assert np.unique(task.test.class_ids, return_counts=True)[1].tolist() == [2] * 4
    rows = [*task.train.read()[:, 0, 0, 0].tolist(), *task.test.read()[:, 0, 0, 0].tolist()]
    assert sorted(rows) == sorted(whole.tasks[0].train.read()[:, 0, 0, 0].tolist())


@pytest.mark.parametrize("name", ["train_per_class", "train_per_task", "test_per_class"])
def test_a_limit_below_one_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, not 0"):
        build(numbered(), StreamConfig(**{name: 0}))  # type: ignore[arg-type]


def test_a_permutation_moves_whole_pixels_and_is_the_same_for_every_image_of_a_task() -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 3, 4, 3), dtype=np.uint8)
    places = np.random.default_rng(1).permutation(12)
    moved = permute(images, places)
    for number, place in enumerate(places):
        np.testing.assert_array_equal(moved.reshape(5, 12, 3)[:, number], images.reshape(5, 12, 3)[:, place])
    np.testing.assert_array_equal(permute(moved, np.argsort(places)), images)


def test_permuted_tasks_have_permutations_of_their_own_for_train_and_test_alike() -> None:
    stream = build(numbered(2), StreamConfig(scenario="permuted", tasks=4))
    places = [set(map(tuple, np.argwhere(task.train.read()[-1, ..., 0]))) for task in stream.tasks]
    assert len({tuple(place) for place in places}) > 1
    for task, place in zip(stream.tasks, places, strict=True):
        assert set(map(tuple, np.argwhere(task.test.read()[-1, ..., 0]))) == place
        assert task.classes == (0, 11)


def test_a_quarter_turn_is_anticlockwise_and_exact() -> None:
    image = np.arange(25, dtype=np.uint8).reshape(1, 5, 5, 1)
    np.testing.assert_array_equal(rotate(image, 90.0)[0, ..., 0], np.rot90(image[0, ..., 0]))
    np.testing.assert_array_equal(rotate(image, 0.0), image)
    coloured = np.repeat(image, 3, axis=3)
    np.testing.assert_array_equal(rotate(coloured, 90.0)[..., 1], rotate(image, 90.0)[..., 0])


def test_the_angles_lie_in_equal_bins_of_half_a_turn() -> None:
    # A bright bar to the right of the centre shows the angle.
    images = np.zeros((1, 41, 41, 1), np.uint8)
    images[0, 20, 30:40] = 255
    bar = Examples.of_arrays(images, np.zeros(1, np.int64))
    dataset = Dataset("bar", bar, bar)
    for seed in range(3):
        stream = build(dataset, StreamConfig(scenario="rotated", tasks=6, seed=seed))
        for task in stream.tasks:
            rows, columns = np.nonzero(task.test.read()[0, ..., 0] > 60)
            angle = np.degrees(np.arctan2(20 - rows.mean(), columns.mean() - 20)) % 360
            assert 30 * task.index - 2 <= angle <= 30 * (task.index + 1) + 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": 3}, "10 classes do not split evenly into 3 tasks"),
        ({"tasks": 0}, "at least 1 task, not 0"),
        ({"tasks": 3, "base_classes": 5}, "5 base classes leave 5 classes"),
        ({"tasks": 2, "base_classes": 11}, "11 base classes leave -1"),
        ({"tasks": 2, "base_classes": 0}, "0 base classes"),
        ({"tasks": 1, "base_classes": 4}, "4 base classes leave 6"),
        ({"scenario": "permuted", "base_classes": 4}, "no meaning"),
        ({"scenario": "shuffled"}, "'shuffled' is not one of"),
        ({"class_order": (1, 2)}, "not an order of the classes"),
        ({"validation_ratio": 1.0}, "must be in 0..1"),
    ],
)
def test_a_configuration_that_does_not_fit_says_why(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(numbered(), StreamConfig(**options))
