"""This file is a feature extractor under one linear classifier: what finetune, joint and gem have in common.

The classifier has a column for every label of the stream from the start; a loss looks only at the columns that compete.
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
from engram_trainer.methods import Progress, in_batches
from engram_trainer.stream import Stream, Task


class LinearLearner:
    """Holds the network and answers for it; a method adds `learn`."""

    def __init__(self, stream: Stream, *, network: str, seed: int, device: str) -> None:
        self.stream, self.network, self.seed, self.device = stream, network, seed, torch.device(device)
        self.reset()

    def reset(self) -> None:
        """A fresh network, the same one every time."""
        features = networks.build(self.network, self.stream.shape, seed=self.seed)
        head = networks.linear_head(features.dimensions, len(self.stream.class_order), seed=self.seed)
        self.model = nn.Sequential(features, head).to(self.device)

    def balance(self, task: Task, memory: Memory, progress: Progress) -> None:
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

    def competing(self, task_index: int) -> slice | torch.Tensor:
        """Columns that compete for an image of a task: the task's own where tasks are given, else all seen so far."""
        if self.stream.task_is_given:
            task = self.stream.tasks[task_index]
            return torch.from_numpy(np.sort(self.stream.labels(np.array(task.classes)))).to(self.device)
        return slice(0, self.stream.seen(task_index))

    def loss(self, images_NCHW: torch.Tensor, labels: torch.Tensor, columns: slice | torch.Tensor) -> torch.Tensor:
        """Mean cross-entropy over the competing columns."""
        logits = self.model(images_NCHW)[:, columns]
        if isinstance(columns, torch.Tensor):
            labels = torch.searchsorted(columns, labels)
        return functional.cross_entropy(logits, labels)

    def targets(self, class_ids: ClassIds) -> torch.Tensor:
        """Labels of class ids, on the device."""
        return torch.from_numpy(self.stream.labels(class_ids)).to(self.device)


def batches(count: int, size: int, generator: np.random.Generator) -> Iterator[npt.NDArray[np.int64]]:
    """One shuffled pass over `count` images; the last batch may be smaller."""
    order = generator.permutation(count)
    for start in range(0, count, size):
        yield order[start : start + size]
