"""What a method says about a phase of its training, and what it is handed at each step.

A method describes a `Phase`: which images, how many exemplars beside them, the loss of a step, the optimiser. The
runtime (see `runtime`) walks through it, reads, draws, augments, steps, and may be killed and resumed between epochs.
Everything random in a phase comes from (seed, purpose, task, epoch or step), so it is the same after a resume.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from engram.schemas import Strategy
from engram_trainer.examples import ClassIds, Examples, Images, Rows
from engram_trainer.preparation import Augment
from engram_trainer.stream import Task

WEIGHTS, LEARN, BALANCE, CODEC, MEMORY = range(5)
"""What a random stream is for, so that one choice never shifts another."""


class OnStep(Protocol):
    """Called after each step: `done` of `total` steps are done; the loss may still be on its way from the device."""

    def __call__(self, done: int, total: int, *, loss: torch.Tensor) -> None:
        """Show the progress."""


class Stateful(Protocol):
    """What a checkpoint in the middle of a phase keeps."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers, strings and containers of them."""

    def load_state_dict(self, state: Mapping[str, Any]) -> Any:
        """Become that."""


@dataclass(frozen=True)
class Replay:
    """Exemplars that every step draws from the memory."""

    size: int
    """Of the whole batch, over all processes; of each task for `per_task`."""
    strategy: Strategy = "uniform"
    exclude_tasks: tuple[int, ...] = ()
    stream: int = 0
    """Tells independent draws of one phase apart."""


@dataclass(frozen=True, eq=False)
class Minibatch:
    """This process's part of a batch."""

    images_NCHW: torch.Tensor
    """As the network sees them, on the device: augmented, normalised."""
    labels_N: torch.Tensor
    """Places of classes in the stream's order, on the device."""
    class_ids: ClassIds
    tasks: Rows
    rows: Rows
    """Rows of the phase's examples, or of exemplars in the packs of their tasks."""
    plain_NHWC: Images
    """As they are stored."""
    fields: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """What exemplars have beside the image, on the device."""

    def __len__(self) -> int:
        return len(self.class_ids)


@dataclass(frozen=True, eq=False)
class Step:
    """What a loss is computed of."""

    number: int
    """From 0 within the phase."""
    epoch: int
    new: Minibatch | None
    """Images of the task; None in a phase that walks through exemplars only."""
    replay: tuple[Minibatch, ...]
    """Exemplars, one minibatch for each `Replay` of the phase; none at all while the memory is empty."""

    @property
    def parts(self) -> tuple[Minibatch, ...]:
        """New images, if any, and exemplars."""
        return self.replay if self.new is None else (self.new, *self.replay)

    @property
    def images(self) -> torch.Tensor:
        """All images of the step in one batch `[N, C, H, W]`, new ones first."""
        return torch.cat([part.images_NCHW for part in self.parts])

    @property
    def labels(self) -> torch.Tensor:
        """Their labels `[N]`."""
        return torch.cat([part.labels_N for part in self.parts])


@dataclass
class Phase:
    """Some epochs of steps on one task."""

    task: Task
    purpose: int
    """LEARN or BALANCE."""
    modules: Sequence[nn.Module]
    """What is trained: saved in checkpoints."""
    optimizer: torch.optim.Optimizer
    loss: Callable[[Step], torch.Tensor]
    """A scalar made of `Runtime.mean`, which makes several processes one batch."""
    epochs: int
    batch_size: int
    """New images of each step over all processes; of a phase without any, exemplars."""
    augment: Augment
    examples: Examples | None = None
    """None: the phase walks through the exemplars of its one `Replay`, and an epoch sees about each of them once."""
    replay: Sequence[Replay] = ()
    schedule: torch.optim.lr_scheduler.LRScheduler | None = None
    """Stepped after each epoch."""
    order: Callable[[np.random.Generator], Rows] | None = None
    """Rows of the examples that one epoch walks through; None: all of them, shuffled."""
    correct: Callable[[torch.Tensor, Step], torch.Tensor] | None = None
    """From the gradient of all trained parameters as one vector to the one that is stepped along."""
    after_step: Callable[[Step], None] | None = None
    after_epoch: Callable[[], None] | None = None
    also: Sequence[Stateful] = ()
    """What else changes while the phase lasts, for checkpoints."""
    writes_memory: bool = False
    """Whether `after_step` or `after_epoch` change the memory, which checkpoints then keep, too."""
    is_training: bool = True
    """Whether modules are in training mode: BatchNorm normalises by the batch and moves its statistics."""
