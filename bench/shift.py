"""What the shift costs: a network replays coded images of old classes and is asked about clean ones.

`on_coded` is called at the end of a run: the accuracy on the same test images, coded as the run's exemplars are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from engram_trainer import evaluation
from engram_trainer.examples import Examples
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
