"""What the shift costs: a network replays coded images of old classes and is asked about clean ones.

`on_coded` is called at the end of a run: the accuracy on the same test images, coded as the run's exemplars are.
`partly_coded` is codec augmentation for methods that have none of their own: some of a task's images as JPEG gives them
back, so that the marks of coding do not come to mean "old class" (LUCIR has `codec_ratio`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from engram.schemas import CANDIDATE_QUALITIES
from engram_trainer import evaluation
from engram_trainer.examples import Examples, Subset
from engram_trainer.methods import Learner
from engram_trainer.methods.codec import Coded
from engram_trainer.stream import Task


def on_coded(learner: Learner, tasks: Sequence[Task], quality: int) -> list[float]:
    """The accuracy on each task's test images once coded at this quality, as strips would give them back.

    Call it after the last task is learned and balanced, with all tasks: `on_coded(learner, stream.tasks, quality)`, and
    keep it as `on_coded` beside the accuracy matrix, whose last row is the same on clean images; keep the quality as
    `coded_quality`. For strips and files that is the quality of the memory; for raw and lossless memories 50 shows what
    a network loses that never saw coded images. Ten thousand images of 32 x 32 take as long as scoring them once more,
    and a second of coding. Fractions, as in the matrix.
    """
    found = []
    for task in tasks:
        coded = Coded(task.test.images, np.full(len(task.test), quality))
        test = Examples(coded, task.test.class_ids)
        accuracy = evaluation.accuracy(
            learner.scores, learner.runtime, replace(task, test=test), learned=tasks[-1].visit
        )
        assert accuracy is not None, "every task was learned"
        found.append(accuracy)
    return found


def partly_coded(task: Task, *, ratio: float, seed: int, qualities: Sequence[int] = CANDIDATE_QUALITIES) -> Task:
    """The task with this part of its training images as JPEG gives them back, each at a quality of its own.

    Which ones and their qualities are drawn for the task. What a memory keeps is of the task as it was.
    """
    generator = np.random.default_rng([seed, task.index])
    count = len(task.train)
    rows = np.sort(generator.permutation(count)[: round(ratio * count)])
    drawn = generator.permutation(np.resize(np.array(qualities), len(rows)))
    images_NHWC = task.train.read().copy()
    images_NHWC[rows] = Coded(Subset(task.train.images, rows), drawn).read(np.arange(len(rows)))
    return replace(task, train=Examples.of_arrays(images_NHWC, task.train.class_ids))
