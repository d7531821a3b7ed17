"""A feature extractor with one linear classifier, shared by the methods that have no head of their own.

The classifier has a column for every label of the stream from the start. In a loss all labels seen by now compete, for
an old image as for a new one; where an image comes with its task, only the labels of that task do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional

from engram_trainer import networks
from engram_trainer.examples import Examples, Images
from engram_trainer.memory import Memory
from engram_trainer.runtime import Runtime
from engram_trainer.steps import OnStep
from engram_trainer.stream import Task


class LinearLearner:
    """The network with its scores and features; a method adds `learn`."""

    fields: Mapping[str, str] = {}

    def __init__(self, runtime: Runtime, *, network: str) -> None:
        self.runtime, self.stream, self.seed, self.device = runtime, runtime.stream, runtime.seed, runtime.device
        self.network = network
        self.task_of_label = torch.tensor([task.index for task in self.stream.tasks for _ in task.classes]).to(
            self.device
        )
        """Which task brought each label; not read where tasks bring none."""
        self.reset()

    def reset(self) -> None:
        """A fresh network, the same one every time."""
        features = networks.build(self.network, self.runtime.preparation.shape, seed=self.seed)
        self.dimensions = features.dimensions
        self.features = self.runtime.place_module(features)
        self.head = networks.linear_head(self.dimensions, len(self.stream.class_order), seed=self.seed).to(self.device)
        self.model = nn.Sequential(self.features, self.head)

    @property
    def fills_memory(self) -> bool:
        """No: the loop does, once a task is learned."""
        return False

    def columns(self, examples: Examples) -> Mapping[str, npt.NDArray[Any]]:
        """None: exemplars are an image and its class."""
        return {}

    def balance(self, task: Task, memory: Memory, progress: OnStep) -> None:
        """Nothing: these methods do not come back to their memory."""

    def scores(self, images_NHWC: Images) -> npt.NDArray[np.float32]:
        """Logits, one column per label of the whole stream."""
        return self.runtime.predict(self.model, images_NHWC)

    def embed(self, images_NHWC: Images) -> npt.NDArray[np.float32]:
        """Features before the classifier."""
        return self.runtime.predict(self.features, images_NHWC)

    def extractor(self) -> nn.Module:
        """Preparation and the part of the network before the classifier."""
        return nn.Sequential(self.runtime.preparation, self.features).eval()

    def state_dict(self) -> dict[str, Any]:
        """Weights and statistics."""
        return {"model": self.model.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them back."""
        self.model.load_state_dict(state["model"])

    def losses(self, images_NCHW: torch.Tensor, labels_N: torch.Tensor, seen: int) -> torch.Tensor:
        """`cross_entropies` of what the network says to these images."""
        return self.cross_entropies(self.model(images_NCHW), labels_N, seen)

    def cross_entropies(self, logits_NC: torch.Tensor, labels_N: torch.Tensor, seen: int) -> torch.Tensor:
        """Cross-entropy of each image over the first `seen` labels, or over those of its own task where it is given."""
        logits_NC = logits_NC[:, :seen]
        if self.stream.task_is_given:
            is_foreign_NC = self.task_of_label[labels_N, None] != self.task_of_label[:seen]
            logits_NC = logits_NC.masked_fill(is_foreign_NC, -torch.inf)
        return functional.cross_entropy(logits_NC, labels_N, reduction="none")
