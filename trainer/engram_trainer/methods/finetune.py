"""Train on one task after the other without any memory: the lower bound for every replay method."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engram_trainer.examples import Examples
from engram_trainer.memory import Memory
from engram_trainer.methods.linear import LinearLearner
from engram_trainer.methods.training import Training
from engram_trainer.runtime import Runtime
from engram_trainer.steps import LEARN, OnStep, Phase, Step
from engram_trainer.stream import Task


@dataclass(frozen=True)
class Config(Training):
    """How a task is trained."""

    epochs: int = 10
    lr: float = 0.05
    milestones: tuple[float, ...] = (2 / 3,)
    momentum: float = 0.9
    weight_decay: float = 5e-4


class Finetune(LinearLearner):
    """Cross-entropy on the task's images, over the classes seen so far."""

    def __init__(self, runtime: Runtime, config: Config, *, network: str) -> None:
        super().__init__(runtime, network=network)
        self.config = config

    def learn(self, task: Task, memory: Memory, progress: OnStep) -> None:
        """Train on the task alone; the memory is not looked at."""
        self.fit(task, task.train, memory, progress)

    def fit(self, task: Task, examples: Examples, memory: Memory, progress: OnStep) -> None:
        """Train the network as it stands on these images."""
        config, seen = self.config, self.stream.seen(task.visit)
        optimizer = config.optimizer(self.model.parameters())

        def loss(step: Step) -> torch.Tensor:
            return self.runtime.mean(self.losses(step.images, step.labels, seen))

        phase = Phase(
            task=task,
            purpose=LEARN,
            modules=[self.model],
            optimizer=optimizer,
            loss=loss,
            epochs=config.epochs,
            batch_size=config.batch_size,
            augment=config.augment,
            examples=examples,
            schedule=config.schedule(optimizer),
        )
        self.runtime.fit(phase, memory, progress)
