"""Train from scratch on all data so far after every task: the upper bound, without any memory budget."""

from __future__ import annotations

from engram_trainer.examples import join
from engram_trainer.memory import Memory
from engram_trainer.methods.finetune import Config, Finetune
from engram_trainer.steps import OnStep
from engram_trainer.stream import Task

__all__ = ["Config", "Joint"]


class Joint(Finetune):
    """A fresh network for every task, trained on the images of all tasks up to it."""

    def learn(self, task: Task, memory: Memory, progress: OnStep) -> None:
        """Start again on everything; the memory is not looked at."""
        self.reset()
        self.fit(task, join([each.train for each in self.stream.visits[: task.visit + 1]]), memory, progress)
