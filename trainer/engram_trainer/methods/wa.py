"""WA: distillation that keeps discrimination among old classes, and weights aligned to be fair to them.

C_o old and C_n new labels, T = 2, on new images and exemplars alike:

    L = (1 - r) L_ce + r L_kd,   r = C_o / (C_o + C_n)                                      (maintaining discrimination)
    w_c <- w_c * mean_{old} |w| / mean_{new} |w|   for the new labels c, after training         (maintaining fairness)

Training on many new and few old images makes the weight vectors of new labels longer, and so their logits larger,
whatever the image is. Aligning needs neither a validation set nor a parameter, the least that corrects this bias.

Source: Zhao et al., Maintaining Discrimination and Fairness in Class Incremental Learning (CVPR 2020), sections 3, 4.
Departures: new weights are only shortened by default (`lengthen`): after a short training they are the shorter ones,
and a classifier that is fair already is made unfair (digits, 5 tasks, validation images: 59 % against 91 %). Weights
are not clipped to be positive. Distillation is KL, which has the gradient of the published cross-entropy. Exemplars are
drawn, so many for every batch, in shuffled passes, not shuffled among the new images.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn

from engram_trainer.memory import Memory
from engram_trainer.methods.linear import LinearLearner
from engram_trainer.methods.losses import distillation
from engram_trainer.methods.training import Training, union
from engram_trainer.runtime import Runtime
from engram_trainer.steps import LEARN, OnStep, Phase, Step
from engram_trainer.stream import Task


@dataclass(frozen=True)
class Config(Training):
    """WA's settings; in brackets the published ones where they differ."""

    epochs: int = 10
    batch_size: int = 32
    """Images of a step, new ones and exemplars together."""
    lr: float = 0.05
    milestones: tuple[float, ...] = (2 / 3,)
    momentum: float = 0.9
    weight_decay: float = 5e-4
    temperature: float = 2.0
    """T in the paper."""
    align: bool = True
    """Whether weights are aligned; without it, it is replay with distillation."""
    lengthen: bool = False
    """Whether new weights that are shorter than the old ones are aligned, too [True]."""
    replay_ratio: float = 0.0
    """Least part of every batch that is exemplars. They have at least the part that they are of all images, so 0 walks
    through the union, as published."""


class Wa(LinearLearner):
    """Replay with distillation, whose classifier is made fair after every task."""

    def __init__(self, runtime: Runtime, config: Config, *, network: str) -> None:
        super().__init__(runtime, network=network)
        self.stream.config.require_new_classes("WA")
        self.config = config

    def learn(self, task: Task, memory: Memory, progress: OnStep) -> None:
        """Train on a task's images and exemplars of earlier tasks, then align the new weights."""
        config, runtime = self.config, self.runtime
        seen, old_count = self.stream.seen(task.visit), self.stream.seen(task.visit - 1)
        old_model = copy.deepcopy(self.model).eval().requires_grad_(False)
        kept_part = old_count / seen
        optimizer = config.optimizer(self.model.parameters())

        def loss(step: Step) -> torch.Tensor:
            images_NCHW = step.images
            logits_NC = self.model(images_NCHW)
            total = (1 - kept_part) * runtime.mean(self.cross_entropies(logits_NC, step.labels, seen))
            if old_count:
                with torch.no_grad():
                    old_NO = old_model(images_NCHW)[:, :old_count]
                losses_N = distillation(logits_NC[:, :old_count], old_NO, temperature=config.temperature)
                total = total + kept_part * runtime.mean(losses_N)
            return total

        batch_size, replay = union(config.batch_size, config.replay_ratio, task, memory, world_size=runtime.world_size)
        phase = Phase(
            task=task,
            purpose=LEARN,
            modules=[self.model],
            optimizer=optimizer,
            loss=loss,
            epochs=config.epochs,
            batch_size=batch_size,
            augment=config.augment,
            examples=task.train,
            replay=replay,
            schedule=config.schedule(optimizer),
        )
        runtime.fit(phase, memory, progress)
        if config.align and old_count:
            align(self.head, old_count=old_count, seen=seen, lengthen=config.lengthen)


@torch.no_grad()
def align(head: nn.Linear, *, old_count: int, seen: int, lengthen: bool = True) -> float:
    """The weight vectors of new labels have the mean length of the old ones afterwards; each keeps its direction.

    Without `lengthen` they stay as they are where they are shorter already.

    Returns:
        The factor by which they were scaled, gamma in the paper: 1 changes nothing.

    Source: WA, section 4, "weight aligning".
    """
    norms_C = torch.linalg.vector_norm(head.weight[:seen], dim=1)
    gamma = float(norms_C[:old_count].mean() / norms_C[old_count:].mean())
    if gamma > 1 and not lengthen:
        return 1.0
    head.weight[old_count:seen] *= gamma
    return gamma
