"""Tasks that return: each visit has images of its own, and the scores of a run follow their formulas, done by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engram_trainer import loop
from engram_trainer.configuration import MemoryConfig, RunConfig
from engram_trainer.datasets import Dataset
from engram_trainer.evaluation import metrics
from engram_trainer.examples import Examples
from engram_trainer.stream import SCENARIOS, Stream, StreamConfig, build


def numbered(classes: int = 6, train: int = 9) -> Dataset:
    """Images whose first pixel is their row number."""
    class_ids = np.tile(np.arange(classes), train)
    images = np.zeros((len(class_ids), 4, 4, 1), np.uint8)
    images[:, 0, 0, 0] = np.arange(len(class_ids))
    examples = Examples.of_arrays(images, class_ids)
    return Dataset("numbered", examples, examples.select(np.arange(2 * classes)))


def returning(visits: tuple[int, ...] | None, **options: Any) -> Stream:
    return build(numbered(), StreamConfig(**{"tasks": 3, "visits": visits, "seed": 1, **options}))


def rows_of(examples: Examples) -> list[int]:
    return sorted(examples.read().reshape(len(examples), -1).max(axis=1).tolist())


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_without_returning_tasks_the_visits_are_the_tasks(scenario: Any) -> None:
    stream = returning(None, scenario=scenario)
    assert stream.visits is stream.tasks
    assert [(task.index, task.visit) for task in stream.visits] == [(0, 0), (1, 1), (2, 2)]


@pytest.mark.parametrize("scenario", ["class-incremental", "task-incremental", "permuted"])
def test_the_images_of_a_task_are_dealt_out_to_its_visits(scenario: Any) -> None:
    stream = returning((0, 1, 0, 2, 0, 1), scenario=scenario)
    assert [task.index for task in stream.visits] == [0, 1, 0, 2, 0, 1]
    assert [task.visit for task in stream.visits] == [0, 1, 2, 3, 4, 5]
    for task in stream.tasks:
        visits = [visit for visit in stream.visits if visit.index == task.index]
        assert sorted(row for visit in visits for row in rows_of(visit.train)) == rows_of(task.train)
        assert all(visit.train.classes == tuple(sorted(task.classes)) for visit in visits)
        assert all(len(visit.test) == len(task.test) for visit in visits)
        assert {visit.classes for visit in visits} == {task.classes}
    assert rows_of(stream.visits[3].train) == rows_of(stream.tasks[2].train)


def test_labels_arrive_with_the_first_visit_of_their_task() -> None:
    stream = returning((0, 1, 0, 2, 1))
    assert [stream.seen(visit) for visit in range(5)] == [2, 4, 4, 6, 6]


def test_the_seed_decides_which_images_a_visit_has() -> None:
    first, again, other = (returning((0, 1, 2, 0), seed=seed) for seed in (5, 5, 6))
    assert rows_of(first.visits[0].train) == rows_of(again.visits[0].train)
    assert rows_of(first.visits[0].train) != rows_of(other.visits[0].train)


@pytest.mark.parametrize("visits", [(), (0, 1), (0, 2, 1), (1, 0, 2), (0, 1, 2, 3), (0, 0, 0), (-1, 0, 1, 2)])
def test_visits_must_meet_all_tasks_and_new_ones_in_order(visits: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="there are 3 tasks, numbered from 0"):
        returning(visits)


def test_a_task_with_fewer_images_than_visits_is_refused() -> None:
    with pytest.raises(ValueError, match="task 2 has too few training images to be visited 10 times"):
        returning((0, 1, *[2] * 10))


def test_the_formulas_where_the_first_two_tasks_return() -> None:
    matrix = [[0.9, 0.3], [0.6, 0.8, 0.2], [0.5, 0.4, 0.7], [0.95, 0.5, 0.6], [0.7, 0.75, 0.3]]
    found = metrics(matrix, test_counts=[100, 100, 200], at_random=[0.1, 0.1, 0.15], visits=(0, 1, 2, 0, 1))
    assert found.acc == pytest.approx((0.7 + 0.75 + 0.3) / 3)
    # Task 0 was last trained in visit 3, task 2 in visit 2; task 1 has just been.
    assert found.bwt == pytest.approx(((0.7 - 0.95) + (0.3 - 0.7)) / 2)
    assert found.fwt == pytest.approx(((0.3 - 0.1) + (0.2 - 0.15)) / 2)
    assert found.forgetting == pytest.approx(((0.95 - 0.7) + (0.7 - 0.3)) / 2)
    assert found.incremental == pytest.approx(
        (0.9, 0.7, (50 + 40 + 140) / 400, (95 + 50 + 120) / 400, (70 + 75 + 60) / 400)
    )
    assert found.average_incremental_without_base == pytest.approx(np.mean(found.incremental[1:]))


def test_forgetting_is_measured_from_the_best_a_task_has_ever_been() -> None:
    found = metrics([[0.9], [0.6, 0.8], [0.7, 0.5], [0.4, 0.7]], test_counts=[1, 1], visits=(0, 1, 0, 1))
    assert found.bwt == pytest.approx(0.4 - 0.7)
    assert found.forgetting == pytest.approx(0.9 - 0.4)


def test_a_run_that_is_under_way_is_scored_by_its_visits_so_far() -> None:
    visits, matrix = (0, 0, 1, 0), [[0.5], [0.6]]
    found = metrics(matrix, test_counts=[1, 1], visits=visits)
    assert (found.acc, found.bwt, found.forgetting, found.fwt) == (0.6, None, None, None)
    assert found.average_incremental_without_base == 0.6


def test_one_visit_of_each_task_gives_the_papers_numbers() -> None:
    matrix = [[0.9, 0.3], [0.6, 0.8, 0.2], [0.5, 0.9, 0.7]]
    options: Any = {"test_counts": [100, 100, 200], "at_random": [0.1, 0.1, 0.15]}
    assert metrics(matrix, **options, visits=(0, 1, 2)) == metrics(matrix, **options)


def test_a_row_without_a_task_that_was_met_is_refused() -> None:
    with pytest.raises(ValueError, match="after visit 2 there are 1 accuracies, needed are 2"):
        metrics([[0.5], [0.5, 0.5], [0.5]], test_counts=[1, 1], visits=(0, 1, 0))


def test_a_run_with_tasks_that_return_has_a_row_for_each_visit_and_resumes(tmp_path: Path) -> None:
    config = RunConfig(
        data="digits",
        stream=StreamConfig(scenario="permuted", tasks=2, visits=(0, 1, 0), train_per_class=8, test_per_class=5),
        method="gem",
        options={"fill": "online", "slots": 40},
        network="mlp",
        memory=MemoryConfig(kind="raw", budget_bytes=20_000, share_by="task"),
    )
    report = loop.run(config, tmp_path / "run", pictures=False)
    assert [len(row) for row in report.matrix] == [2, 2, 2]
    assert [sum(memory["tasks"].values()) for memory in report.memory] == [20, 40, 40]
    assert {memory["filled"] for memory in report.memory} == {"online"}
    found = report.metrics
    assert found is not None
    (first, _), (_, second), (last, end) = report.matrix
    assert found.bwt == pytest.approx((end or 0) - (second or 0))
    assert found.acc == pytest.approx(((last or 0) + (end or 0)) / 2)
    assert first is not None
    again = loop.run(config, tmp_path / "run", resume=True, pictures=False)
    assert again.matrix == report.matrix
