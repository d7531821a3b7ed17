"""Learning without Forgetting: train on new images, and let the old labels' outputs on them stay what they were.

With y_n the outputs for the new labels, y_o those for the old ones, hats for the network that is trained, T = 2:

    L = L_new(y_n, y^_n) + lambda T^2 KL(y_o^(1/T) || y^_o^(1/T)),   both on the task's own images

No exemplar is looked at: it is what distillation alone does, the baseline below every replay.

Source: Li & Hoiem, Learning without Forgetting (ECCV 2016), section 3. Departures: the old outputs are computed
on the varied image of each step, where the paper computes them once; there is no warm-up step that trains the new
outputs alone; the factor T^2 is Hinton et al.'s, so that lambda means the same for every T.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Literal

import torch

from engram_trainer.memory import Memory
from engram_trainer.methods.linear import LinearLearner
from engram_trainer.methods.losses import distillation
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
    distillation_weight: float = 1.0
    """lambda in the paper."""
    temperature: float = 2.0
    """T in the paper."""
    compete: Literal["new", "seen"] = "new"
    """Which labels the new images are told apart from: those of the task, as in the paper, or all seen so far. Where
    images come with their task, or tasks bring no labels, it makes no difference."""


class Lwf(LinearLearner):
    """Cross-entropy on the task's images beside the distillation of the network as it was before the task."""

    def __init__(self, runtime: Runtime, config: Config, *, network: str) -> None:
        super().__init__(runtime, network=network)
        self.config = config

    def learn(self, task: Task, memory: Memory, progress: OnStep) -> None:
        """Train on the task alone; the memory is not looked at."""
        config, runtime = self.config, self.runtime
        seen = self.stream.seen(task.visit)
        groups = self._old_labels(task)
        is_foreign_C = torch.zeros(seen, dtype=torch.bool, device=self.device)
        if config.compete == "new" and self.stream.config.brings_classes:
            is_foreign_C = self.task_of_label[:seen] != task.index
        old_model = copy.deepcopy(self.model).eval().requires_grad_(False)
        optimizer = config.optimizer(self.model.parameters())

        def loss(step: Step) -> torch.Tensor:
            images_NCHW = step.images
            logits_NC = self.model(images_NCHW)
            new_NC = logits_NC[:, :seen].masked_fill(is_foreign_C, -torch.inf)
            total = runtime.mean(self.cross_entropies(new_NC, step.labels, seen))
            if groups:
                with torch.no_grad():
                    old_NC = old_model(images_NCHW)
                weight = config.distillation_weight * config.temperature**2
                for labels in groups:
                    losses_N = distillation(logits_NC[:, labels], old_NC[:, labels], temperature=config.temperature)
                    total = total + weight * runtime.mean(losses_N)
            return total

        phase = Phase(
            task=task,
            purpose=LEARN,
            modules=[self.model],
            optimizer=optimizer,
            loss=loss,
            epochs=config.epochs,
            batch_size=config.batch_size,
            augment=config.augment,
            examples=task.train,
            schedule=config.schedule(optimizer),
        )
        runtime.fit(phase, memory, progress)

    def _old_labels(self, task: Task) -> list[torch.Tensor]:
        """Labels whose outputs shall stay: those of each earlier task where images come with it, else all old ones."""
        if not task.visit:
            return []
        labels = torch.arange(self.stream.seen(task.visit - 1), device=self.device)
        if not self.stream.task_is_given:
            return [labels]
        earlier = sorted({each.index for each in self.stream.visits[: task.visit]} - {task.index})
        return [labels[self.task_of_label[: len(labels)] == index] for index in earlier]
