"""A feature extractor with one linear classifier, shared by finetune, joint and gem.

The classifier has a column for every label of the stream from the start. In a loss all labels seen by now compete, for
an old image as for a new one; where an image comes with its task, only the labels of that task do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional

from engram_trainer import networks
from engram_trainer.datasets import ClassIds, Images
from engram_trainer.memory import Memory
from engram_trainer.methods import OnStep, in_batches
from engram_trainer.stream import Stream, Task


class LinearLearner:
    """The network with its scores and features; a method adds `learn`."""

    def __init__(self, stream: Stream, *, network: str, seed: int, device: str) -> None:
        self.stream, self.network, self.seed, self.device = stream, network, seed, torch.device(device)
        self.task_of_label = torch.tensor([task.index for task in stream.tasks for _ in task.classes]).to(self.device)
        """Which task brought each label; not read where tasks bring none."""
        self.reset()

    def reset(self) -> None:
        """A fresh network, the same one every time."""
        features = networks.build(self.network, self.stream.shape, seed=self.seed)
        head = networks.linear_head(features.dimensions, len(self.stream.class_order), seed=self.seed)
        self.model = nn.Sequential(features, head).to(self.device)

    def balance(self, task: Task, memory: Memory, progress: OnStep) -> None:
        """Nothing: these methods do not come back to their memory."""

    def scores(self, images_NHWC: Images) -> npt.NDArray[np.float32]:
        """Logits, one column per label of the whole stream."""
        return in_batches(self.model, images_NHWC, self.device)

    def embed(self, images_NHWC: Images) -> npt.NDArray[np.float32]:
        """Features before the classifier."""
        return in_batches(self.model[0], images_NHWC, self.device)

    def extractor(self) -> nn.Module:
        """The part of the network before the classifier."""
        features: nn.Module = self.model[0]
        return features.eval()

    def state_dict(self) -> dict[str, Any]:
        """Weights and statistics."""
        return {"model": self.model.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them back."""
        self.model.load_state_dict(state["model"])

    def loss(self, images_NCHW: torch.Tensor, labels_N: torch.Tensor, seen: int) -> torch.Tensor:
        """Mean cross-entropy over the first `seen` labels, or over those of each image's own task where it is given."""
        logits_NC = self.model(images_NCHW)[:, :seen]
        if self.stream.task_is_given:
            is_foreign_NC = self.task_of_label[labels_N, None] != self.task_of_label[:seen]
            logits_NC = logits_NC.masked_fill(is_foreign_NC, -torch.inf)
        return functional.cross_entropy(logits_NC, labels_N)

    def targets(self, class_ids: ClassIds) -> torch.Tensor:
        """Labels of class ids, on the device."""
        return torch.from_numpy(self.stream.labels(class_ids)).to(self.device)


def batches(count: int, size: int, generator: np.random.Generator) -> Iterator[npt.NDArray[np.int64]]:
    """One shuffled pass over `count` images; the last batch may be smaller."""
    order = generator.permutation(count)
    for start in range(0, count, size):
        yield order[start : start + size]
