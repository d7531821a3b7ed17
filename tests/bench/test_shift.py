"""The shift is that of the codec and nothing else: coded test images are exactly what a strip gives back."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest
import shift

from engram import strip
from engram_trainer import stream
from engram_trainer.configuration import RuntimeConfig
from engram_trainer.datasets import Dataset
from engram_trainer.examples import Examples
from engram_trainer.methods import Learner
from engram_trainer.runtime import Runtime
from tests.contents import pictures

CLASS_IDS = np.tile(np.arange(4), 10)


@pytest.fixture(scope="module")
def tasks() -> stream.Stream:
    train, test = (Examples.of_arrays(pictures(seed, 40), CLASS_IDS) for seed in (0, 1))
    return stream.build(Dataset("pictures", train, test), stream.StreamConfig(tasks=2, seed=0))


@dataclass
class Recognises:
    """Knows images by heart, and takes all others for label 0."""

    known: dict[bytes, int]
    runtime: Runtime

    def scores(self, images_NHWC: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        labels = [self.known.get(image.tobytes(), 0) for image in images_NHWC]
        return np.asarray(np.eye(4)[labels], np.float32)


def test_a_learner_that_knows_what_strips_give_back_is_right_about_all_of_it(tasks: stream.Stream) -> None:
    known: dict[bytes, int] = {}
    for task in tasks.tasks:
        given = strip.encode(task.test.read(), task.test.class_ids, quality=25).decode()
        labels = tasks.labels(task.test.class_ids).tolist()
        known |= {image.tobytes(): label for image, label in zip(given, labels, strict=True)}
    learner = cast(Learner, Recognises(known, Runtime(RuntimeConfig(), tasks, seed=0)))
    assert shift.on_coded(learner, tasks.tasks, 25) == [1.0, 1.0]
    assert shift.on_coded(learner, tasks.tasks, 50) == [0.5, 0.0]


def test_so_many_training_images_are_coded_and_the_rest_are_as_they_were(tasks: stream.Stream) -> None:
    task = tasks.tasks[0]
    before = task.train.read()
    coded = shift.partly_coded(task, ratio=0.5, seed=3, qualities=(10, 50))
    after = coded.train.read()
    changed = np.flatnonzero((before != after).any(axis=(1, 2, 3)))
    assert len(changed) == len(before) // 2
    given = [strip.encode(before, task.train.class_ids, quality=quality).decode() for quality in (10, 50)]
    assert all(any(np.array_equal(after[row], each[row]) for each in given) for row in changed)
    assert np.array_equal(coded.train.class_ids, task.train.class_ids)
    assert np.array_equal(task.train.read(), before)


def test_no_part_leaves_the_task_as_it_is_and_draws_are_repeated(tasks: stream.Stream) -> None:
    task: Any = tasks.tasks[1]
    assert np.array_equal(shift.partly_coded(task, ratio=0.0, seed=0).train.read(), task.train.read())
    one, same = (shift.partly_coded(task, ratio=0.5, seed=1).train.read() for _ in range(2))
    assert np.array_equal(one, same)
    assert not np.array_equal(shift.partly_coded(replace(task, index=7), ratio=0.5, seed=1).train.read(), one)
