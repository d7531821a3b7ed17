"""The shift is that of the codec and nothing else: coded test images are exactly what a strip gives back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

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
