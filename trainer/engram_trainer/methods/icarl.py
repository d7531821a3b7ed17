"""iCaRL: sigmoid outputs that learn new classes and keep the old network's answers, and the nearest mean of exemplars.

For image x_i with label y_i, g_y the sigmoid output for label y, q_i^y what the network said before the task, labels
1..s-1 old and s..t new (Algorithm 3):

    l = - sum_i [ sum_{y=s..t} d_{y = y_i} log g_y(x_i) + d_{y != y_i} log(1 - g_y(x_i))
                + sum_{y=1..s-1} q_i^y log g_y(x_i) + (1 - q_i^y) log(1 - g_y(x_i)) ]

over the new images and all exemplars alike. The outputs only train the features: an image belongs to the class whose
exemplars' mean is nearest (Algorithm 1, see `nearest_mean`). Exemplars are ranked by herding, which is the memory's.

Letters: N images, C competing labels, O old ones, D dimensions of a feature.

Source: Rebuffi et al., iCaRL (CVPR 2017); its code (CIFAR-100, TheanoLasagne) in brackets below. Departures:

- the loss is divided by the number of images and of the stream's labels, as in the code, whose learning rate of 2 is
  for that mean; its penalty of 1e-5 |w|^2 is a weight decay of 2e-5 here.
- q is computed on the varied image of each step, as in the code; the text computes it once for each image.
- labels that have not arrived are left out, as in the text; the code trains their outputs towards 0.
- exemplars are drawn, so many for every batch, in shuffled passes; the paper shuffles them among the new images.
- `codec_ratio` is this project's: see `codec`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from engram_trainer.examples import Images
from engram_trainer.memory import Memory
from engram_trainer.methods.codec import Coding
from engram_trainer.methods.linear import LinearLearner
from engram_trainer.methods.losses import binary_cross_entropy
from engram_trainer.methods.nearest_mean import class_means, nearest_mean_scores
from engram_trainer.methods.training import union
from engram_trainer.runtime import Runtime
from engram_trainer.steps import LEARN, OnStep, Phase, Step
from engram_trainer.stream import Task


@dataclass(frozen=True)
class Config(Coding):
    """iCaRL's settings; in brackets those of its CIFAR-100 code where they differ."""

    epochs: int = 10
    """[70]"""
    batch_size: int = 32
    """Images of a step, new ones and exemplars together [128]."""
    lr: float = 0.5
    """[2.0]"""
    milestones: tuple[float, ...] = (0.7, 0.9)
    """After epochs 49 and 63 of 70."""
    decay: float = 0.2
    momentum: float = 0.9
    weight_decay: float = 2e-5
    replay_ratio: float = 0.0
    """Least part of every batch that is exemplars. They have at least the part that they are of all images, so 0 walks
    through the union, as published."""


class Icarl(LinearLearner):
    """A network that is trained by binary cross-entropies and classifies by the nearest mean of exemplars."""

    def __init__(self, runtime: Runtime, config: Config, *, network: str) -> None:
        super().__init__(runtime, network=network)
        self.stream.config.require_new_classes("iCaRL")
        self.config = config
        self.means_CD = torch.zeros(len(self.stream.class_order), self.dimensions)
        """The unit mean of each label's exemplars; zeros for labels that have none."""

    def learn(self, task: Task, memory: Memory, progress: OnStep) -> None:
        """Train on a task's images and exemplars of earlier tasks."""
        config, runtime = self.config, self.runtime
        seen, old_count = self.stream.seen(task.visit), self.stream.seen(task.visit - 1)
        old_model = copy.deepcopy(self.model).eval().requires_grad_(False)
        optimizer = config.optimizer(self.model.parameters())
        examples, order = config.shown(task, memory, seed=self.seed)

        def loss(step: Step) -> torch.Tensor:
            images_NCHW = step.images
            with torch.no_grad():
                old_NO = torch.sigmoid(old_model(images_NCHW)[:, :old_count])
            targets_NC = icarl_targets(step.labels, old_NO, seen)
            losses_N = binary_cross_entropy(self.model(images_NCHW)[:, :seen], targets_NC)
            return runtime.mean(losses_N) / len(self.stream.class_order)

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
            examples=examples,
            replay=replay,
            schedule=config.schedule(optimizer),
            order=order,
        )
        runtime.fit(phase, memory, progress)

    def balance(self, task: Task, memory: Memory, progress: OnStep) -> None:
        """Take the means of all exemplars, the task's own included, under the network as it is now."""
        self.means_CD = class_means(self.stream, self.embed, memory.walk())

    def scores(self, images_NHWC: Images) -> npt.NDArray[np.float32]:
        """The cosine of each image's feature with the mean of each label's exemplars, `[N, C]`."""
        features_ND = torch.from_numpy(self.embed(images_NHWC))
        return nearest_mean_scores(features_ND, self.means_CD).numpy()

    def state_dict(self) -> dict[str, Any]:
        """Weights, statistics and means."""
        return {**super().state_dict(), "means_CD": self.means_CD}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them back."""
        super().load_state_dict(state)
        self.means_CD = state["means_CD"].cpu()


def icarl_targets(labels_N: torch.Tensor, old_NO: torch.Tensor, seen: int) -> torch.Tensor:
    """What the outputs shall be, `[N, C]`: the old network's for old labels, 1 or 0 for new ones.

    An exemplar's own label counts as an old one, so its target is what the old network said, too.
    """
    one_hot_NC = functional.one_hot(labels_N, seen).to(old_NO.dtype)
    return torch.cat([old_NO, one_hot_NC[:, old_NO.shape[1] :]], dim=1)
