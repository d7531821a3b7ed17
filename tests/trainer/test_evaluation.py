"""The scores of a run follow their formulas, done by hand, and every test image is counted."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from engram_trainer.datasets import Dataset
from engram_trainer.evaluation import accuracy, correct, metrics
from engram_trainer.examples import Examples, Images
from engram_trainer.stream import Stream, StreamConfig, build
from tests.trainer.runs import runtime_of


def test_the_formulas_on_a_matrix_of_three_tasks() -> None:
    matrix = [[0.9, 0.3], [0.6, 0.8, 0.2], [0.5, 0.9, 0.7]]
    found = metrics(matrix, test_counts=[100, 100, 200], at_random=[0.1, 0.1, 0.15])
    assert found.acc == pytest.approx((0.5 + 0.9 + 0.7) / 3)
    assert found.bwt == pytest.approx(((0.5 - 0.9) + (0.9 - 0.8)) / 2)
    assert found.fwt == pytest.approx(((0.3 - 0.1) + (0.2 - 0.15)) / 2)
    # Task 2 got better after it was learned: its best accuracy before the last task is that of the diagonal.
    assert found.forgetting == pytest.approx(((0.9 - 0.5) + (0.8 - 0.9)) / 2)
    assert found.incremental == pytest.approx((0.9, 0.7, (50 + 90 + 140) / 400))
    assert found.last == pytest.approx(0.7)
    assert found.average_incremental == pytest.approx((0.9 + 0.7 + 0.7) / 3)
    assert found.average_incremental_without_base == pytest.approx(0.7)


def test_one_task_has_nothing_to_transfer_or_to_forget() -> None:
    found = metrics([[0.75]], test_counts=[8])
    assert (found.acc, found.last, found.average_incremental) == (0.75, 0.75, 0.75)
    assert found.bwt is found.fwt is found.forgetting is found.average_incremental_without_base is None


@pytest.mark.parametrize(
    ("matrix", "at_random"),
    [
        ([[0.5, None], [0.5, 0.5]], [0.1, 0.1]),
        ([[0.5, 0.2], [0.5, 0.5]], [None, None]),
        ([[0.5, 0.2], [0.5, 0.5]], None),
        ([[0.5], [0.5, 0.5]], [0.1, 0.1]),
    ],
)
def test_forward_transfer_is_absent_unless_everything_it_needs_was_measured(matrix: Any, at_random: Any) -> None:
    assert metrics(matrix, test_counts=[1, 1], at_random=at_random).fwt is None


@pytest.mark.parametrize("matrix", [[], [[None]], [[0.5], [0.5]], [[0.5], [None, 0.5]]])
def test_a_matrix_with_holes_on_or_below_the_diagonal_is_refused(matrix: Any) -> None:
    with pytest.raises(ValueError, match=r"no task is finished|needed are"):
        metrics(matrix, test_counts=[1, 1])


def stream(scenario: Any, test: int = 5) -> Stream:
    """Classes 3, 1 | 2, 0; every image's pixels hold its class id."""
    class_ids = np.tile(np.arange(4), test)
    images = np.broadcast_to(class_ids[:, None, None, None], (len(class_ids), 2, 2, 1)).astype(np.uint8)
    examples = Examples.of_arrays(images, class_ids)
    dataset = Dataset("class ids", examples, examples)
    return build(dataset, StreamConfig(scenario=scenario, tasks=2, class_order=(3, 1, 2, 0)))


def oracle(tasks: Stream, *, columns: int = 4, but: int | None = None) -> Any:
    """Scores that are right for every image, except the last one of a call when `but` names a label to say instead."""

    def scores(images: Images) -> npt.NDArray[np.float32]:
        found = np.zeros((len(images), columns), np.float32)
        labels = tasks.labels(images[:, 0, 0, 0].astype(np.int64))
        for row, label in enumerate(labels):
            if label < columns:
                found[row, label] = 1.0
        if but is not None and len(images) > 1:  # one image alone is asked for its columns
            found[-1] = 0
            found[-1, but] = 2.0
        return found

    return scores


def test_the_last_test_image_counts() -> None:
    tasks = stream("class-incremental")
    assert correct(oracle(tasks), runtime_of(tasks), tasks.tasks[0], learned=0) == 10
    assert (
        correct(oracle(tasks, but=1), runtime_of(tasks), tasks.tasks[0], learned=0) == 9
    )  # the last is of class 3, label 0


def test_a_confident_column_of_a_class_not_yet_seen_does_not_compete() -> None:
    tasks = stream("class-incremental")
    assert accuracy(oracle(tasks, but=3), runtime_of(tasks), tasks.tasks[0], learned=0) == 1.0
    assert accuracy(oracle(tasks, but=3), runtime_of(tasks), tasks.tasks[0], learned=1) == 0.9


def test_in_the_class_incremental_scenario_the_next_task_cannot_be_scored() -> None:
    tasks = stream("class-incremental")
    assert accuracy(oracle(tasks), runtime_of(tasks), tasks.tasks[1], learned=0) is None
    assert accuracy(oracle(tasks), runtime_of(tasks), tasks.tasks[0], learned=-1) is None


def test_where_the_task_is_given_only_its_classes_compete() -> None:
    tasks = stream("task-incremental")
    assert accuracy(oracle(tasks, but=0), runtime_of(tasks), tasks.tasks[1], learned=1) == 1.0
    assert accuracy(oracle(tasks), runtime_of(tasks), tasks.tasks[1], learned=0) == 1.0
    assert accuracy(oracle(tasks), runtime_of(tasks), tasks.tasks[1], learned=-1) == 1.0


def test_a_learner_whose_columns_grow_is_not_asked_for_more_than_it_has() -> None:
    tasks = stream("task-incremental")
    assert accuracy(oracle(tasks, columns=2), runtime_of(tasks), tasks.tasks[1], learned=0) is None
    assert accuracy(oracle(tasks, columns=2), runtime_of(tasks), tasks.tasks[0], learned=0) == 1.0


def test_permuted_tasks_are_scored_over_all_classes_at_any_time() -> None:
    tasks = stream("permuted")
    assert accuracy(oracle(tasks), runtime_of(tasks), tasks.tasks[1], learned=-1) == 1.0


def test_large_images_are_scored_fewer_at_a_time() -> None:
    tasks = stream("class-incremental")
    images = np.broadcast_to(np.uint8(0), (300, 224, 224, 3))
    sizes = [len(rows) for rows, _ in runtime_of(tasks).read(Examples.of_arrays(images, np.zeros(300, np.int64)))]
    assert (sizes, sum(sizes)) == ([111, 111, 78], 300)
