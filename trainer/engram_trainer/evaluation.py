"""Score a run: the accuracy matrix R and the metrics derived from it.

`R[i][j]` is the accuracy on the test images of task j once task i is learned; None where it was not measured. b[j] is
task j's accuracy at random initialisation. T tasks, counted from 1 in the formulas:

    ACC                              1/T     sum_{j=1..T}   R[T,j]
    BWT                              1/(T-1) sum_{j=1..T-1} (R[T,j] - R[j,j])
    FWT                              1/(T-1) sum_{j=2..T}   (R[j-1,j] - b[j])
    forgetting                       1/(T-1) sum_{j=1..T-1} (max_{j<=l<T} R[l,j] - R[T,j])
    A_i, incremental accuracy        over all test images of tasks 1..i, after task i
    average incremental accuracy     mean of A_1..A_T (with base), of A_2..A_T (without)

Where tasks return, R has a row for each of V visits and a column for each distinct task. With f(j) and l(j) the first
and the last visit of task j, and all tasks but the one of visit V in the sums of BWT and of forgetting:

    BWT              what has happened to a task since it was last trained:     R[V,j] - R[l(j),j]
    FWT              what was known of a task before it was first met:          R[f(j)-1,j] - b[j]
    forgetting       from the best that a task has ever been:                   max_{f(j)<=i<V} R[i,j] - R[V,j]
    A_i              over all test images of the tasks met by visit i

With one visit of each task these are the formulas above.

Source: Lopez-Paz & Ranzato, GEM (NIPS 2017), section 2 for ACC, BWT, FWT. Departure from its reference code: that
averages over T where the paper's formulas say T-1, so its BWT and FWT are (T-1)/T times these; and it scores N-1 of N
test images. The formulas for tasks that return are ours: the paper has none.
Forgetting: Chaudhry et al., A-GEM (ICLR 2019). Incremental accuracy: Rebuffi et al., iCaRL (CVPR 2017).
FWT is None in the class-incremental scenario: the classifier has no output yet for a class that it has not met.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engram_trainer.examples import Images
from engram_trainer.runtime import Runtime
from engram_trainer.stream import Task

Matrix = Sequence[Sequence[float | None]]


@dataclass(frozen=True)
class Metrics:
    """The numbers of one run, as fractions; None where a formula needs more tasks or more measurements."""

    acc: float
    bwt: float | None
    fwt: float | None
    forgetting: float | None
    last: float
    average_incremental: float
    average_incremental_without_base: float | None
    incremental: tuple[float, ...]


Scores = Callable[[Images], npt.NDArray[np.float32]]


def correct(scores: Scores, runtime: Runtime, task: Task, *, learned: int) -> int | None:
    """How many test images of a task are classified right once visit `learned` is the latest (-1: none is).

    Competing labels: those of the task where it is given, else all labels seen so far; every class in the permuted and
    rotated scenarios. Several processes share the images.

    Returns:
        None where the learner cannot answer yet: a class of the task is not among the competing labels, or has no
        column.
    """
    stream = runtime.stream
    task_labels = stream.labels(np.array(task.classes))
    if stream.task_is_given or not stream.config.brings_classes:
        labels = np.sort(task_labels)
    else:
        labels = np.arange(stream.seen(learned) if learned >= 0 else 0)
    if not np.isin(task_labels, labels).all():
        return None
    if scores(task.test.images.read(np.arange(1))).shape[1] <= labels.max():
        return None
    count = 0
    mine = np.arange(runtime.rank, len(task.test), runtime.world_size)
    for rows, images_NHWC in runtime.read(task.test, rows=mine):
        predicted = labels[np.argmax(scores(images_NHWC)[:, labels], axis=1)]
        count += int((predicted == stream.labels(task.test.class_ids[rows])).sum())
    return runtime.total(count)


def accuracy(scores: Scores, runtime: Runtime, task: Task, *, learned: int) -> float | None:
    """`correct` as a fraction of all the task's test images."""
    count = correct(scores, runtime, task, learned=learned)
    return None if count is None else count / len(task.test)


def metrics(
    matrix: Matrix,
    *,
    test_counts: Sequence[int],
    at_random: Sequence[float | None] | None = None,
    visits: Sequence[int] | None = None,
) -> Metrics:
    """The numbers of the module's docstring, for the visits that `matrix` has rows for.

    Args:
        matrix: R, one row per finished visit, with accuracies for at least the tasks met so far.
        test_counts: test images of each task.
        at_random: b, or None where it was not measured.
        visits: the task of each visit; None is each task once, in order.

    Raises:
        ValueError: R is empty, or the accuracy on a task that was met is missing.
    """
    if len(matrix) == 0:
        raise ValueError("no task is finished, so there is nothing to score")
    visits = list(visits or range(len(matrix)))[: len(matrix)]
    rows = [_measured(row, max(visits[: place + 1]) + 1, place) for place, row in enumerate(matrix)]
    last, count = rows[-1], len(rows[-1])
    first_visit = [visits.index(j) for j in range(count)]
    last_visit = {task: visit for visit, task in enumerate(visits)}
    others = [j for j in range(count) if j != visits[-1]]
    incremental = tuple(float(np.average(row, weights=test_counts[: len(row)])) for row in rows)
    before = [matrix[first_visit[j] - 1][j] for j in range(1, count) if _has(matrix[first_visit[j] - 1], j)]
    start = [b for b in (at_random or ())[1:count] if b is not None]
    forward = others and len(before) == len(start) == count - 1
    return Metrics(
        acc=float(np.mean(last)),
        bwt=float(np.mean([last[j] - rows[last_visit[j]][j] for j in others])) if others else None,
        fwt=float(np.mean(np.subtract(np.array(before, float), np.array(start, float)))) if forward else None,
        forgetting=(
            float(np.mean([max(row[j] for row in rows[first_visit[j] : -1]) - last[j] for j in others]))
            if others
            else None
        ),
        last=incremental[-1],
        average_incremental=float(np.mean(incremental)),
        average_incremental_without_base=float(np.mean(incremental[1:])) if len(rows) > 1 else None,
        incremental=incremental,
    )


def _has(row: Sequence[float | None], place: int) -> bool:
    return len(row) > place and row[place] is not None


def _measured(row: Sequence[float | None], count: int, visit: int) -> list[float]:
    values = [value for value in row[:count] if value is not None]
    if len(values) != count:
        raise ValueError(f"after visit {visit} there are {len(values)} accuracies, needed are {count}")
    return values
