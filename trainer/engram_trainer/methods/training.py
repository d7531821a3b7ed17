"""What every method that trains by SGD can be told, and the optimiser and schedule that come of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch

from engram_trainer.memory import Memory
from engram_trainer.preparation import Augment
from engram_trainer.steps import Replay
from engram_trainer.stream import Task


@dataclass(frozen=True)
class Training:
    """How a task is trained; every method has its own defaults."""

    epochs: int = 10
    """Passes over a task's images."""
    batch_size: int = 32
    """New images of a step, over all processes."""
    lr: float = 0.05
    milestones: tuple[float, ...] = ()
    """When the learning rate is multiplied by `decay`, as fractions of the epochs."""
    decay: float = 0.1
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    flip: bool = False
    """Mirror half of the images left to right."""
    padding: int = 0
    """Largest random shift of an image, in pixels."""
    resized_crop: bool = False
    """Random area and aspect ratio, as for ImageNet, in place of the shift."""

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            if get_origin(kind) is Literal and getattr(self, name) not in get_args(kind):
                raise ValueError(f"{name} {getattr(self, name)!r} is not one of {', '.join(get_args(kind))}")
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.padding < 0:
            raise ValueError(f"padding must be at least 0, not {self.padding}")

    @property
    def augment(self) -> Augment:
        """How training images are varied."""
        return Augment(self.padding, self.flip, self.resized_crop)

    def optimizer(self, parameters: Iterable[Any]) -> torch.optim.Optimizer:
        """SGD over these parameters."""
        return torch.optim.SGD(
            parameters, self.lr, momentum=self.momentum, nesterov=self.nesterov, weight_decay=self.weight_decay
        )

    def schedule(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        """The learning rate over the epochs."""
        return multistep(optimizer, self.epochs, self.milestones, self.decay)


def multistep(
    optimizer: torch.optim.Optimizer, epochs: int, milestones: tuple[float, ...], decay: float = 0.1
) -> torch.optim.lr_scheduler.LRScheduler:
    """The learning rate multiplied by `decay` at these fractions of the epochs, at the earliest after the first."""
    steps = [max(1, round(part * epochs)) for part in milestones]
    return torch.optim.lr_scheduler.MultiStepLR(optimizer, steps, gamma=decay)


def replayed(
    batch_size: int, replay_ratio: float, new_count: int, memory: Memory, *, exclude_task: int, world_size: int
) -> int:
    """How many of a batch are exemplars where it is drawn from new images and a memory together; 0 if that is empty.

    They have the part of the batch that they are of the union, and at least `replay_ratio`. A multiple of the
    processes, so several may draw a little less than one would; every batch has a new image for each process, too.

    Raises:
        ValueError: a batch has not two images for each process.
    """
    if batch_size < 2 * world_size:
        raise ValueError(
            f"batch_size must be at least {2 * world_size}, not {batch_size}: for each process "
            "a new image and an exemplar"
        )
    kept_count = sum(sum(of.values()) for task, of in memory.counts().items() if task != exclude_task)
    if not kept_count:
        return 0
    part = max(replay_ratio, kept_count / (new_count + kept_count))
    size = round(part * batch_size / world_size)
    return max(1, min(size, batch_size // world_size - 1)) * world_size


def union(
    batch_size: int, replay_ratio: float, task: Task, memory: Memory, *, world_size: int
) -> tuple[int, list[Replay]]:
    """How many of a batch are new images of a task, and what replays the rest from the tasks before: see `replayed`.

    Raises:
        ValueError: a batch has not two images for each process.
    """
    size = replayed(batch_size, replay_ratio, len(task.train), memory, exclude_task=task.index, world_size=world_size)
    return batch_size - size, [Replay(size, "epoch", exclude_tasks=(task.index,))] if size else []
