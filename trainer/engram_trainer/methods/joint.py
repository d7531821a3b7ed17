"""Train from scratch on all data so far after every task: the upper bound, without any memory budget."""

from __future__ import annotations

import numpy as np

from engram_trainer.memory import Memory
from engram_trainer.methods import OnStep
from engram_trainer.methods.finetune import Config, Finetune
from engram_trainer.stream import Task

__all__ = ["Config", "Joint"]


class Joint(Finetune):
    """A fresh network for every task, trained on the images of all tasks up to it."""

    def learn(self, task: Task, memory: Memory, progress: OnStep) -> None:
        """Start again on everything; the memory is not looked at."""
        self.reset()
        seen = self.stream.tasks[: task.index + 1]
        images = np.concatenate([each.train_images for each in seen])
        class_ids = np.concatenate([each.train_class_ids for each in seen])
        self.fit(images, class_ids, task.index, progress)
