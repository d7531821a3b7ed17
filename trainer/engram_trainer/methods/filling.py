"""When a method's memory is filled: once a task is learned, or online, with what each step has just seen.

`task` leaves it to the loop, which hands the whole task to the memory; ranking and shares are the memory's. `online` is
how the papers of replay fill theirs: after every step its images are offered to a reservoir or a ring, with what the
network said about them at that moment, and what is accepted is sent in batches (see `online`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from engram_trainer.memory import Memory
from engram_trainer.methods.codec import originals
from engram_trainer.methods.training import Training
from engram_trainer.online import OnlineWriter, Policy
from engram_trainer.runtime import Runtime
from engram_trainer.steps import Step
from engram_trainer.stream import Task

Fill = Literal["task", "online"]


@dataclass(frozen=True)
class Filled(Training):
    """How a task is trained, and when the memory is filled."""

    fill: Fill = "task"
    """`task`: once a task is learned, by the memory's ranking. `online`: after every step."""
    slots: int | None = None
    """Exemplars that are kept if the memory is filled online, as papers count them; None takes what the memory's budget
    holds."""
    flush: int = 64
    """Accepted images that are sent together if the memory is filled online; the rest follows at the end of the task.
    Exemplars are drawn only once they are sent, so 1 is the papers' way and the slowest."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("slots", "flush"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")


class Filling:
    """What one learner offers to its memory while it learns; nothing where the loop fills the memory.

    Every process offers what all of them have seen, in the order of the batch, so that all decide alike.

    Args:
        runtime: brings the images of several processes together.
        config: when and how.
        policy: decides which of the images offered are kept, made for the slots of the configuration.
    """

    def __init__(self, runtime: Runtime, config: Filled, policy: Callable[[], Policy]) -> None:
        self.runtime, self.config = runtime, config
        self._policy = policy
        self._writer: OnlineWriter | None = None
        self._state: Mapping[str, Any] | None = None

    @property
    def is_online(self) -> bool:
        """Whether anything is offered at all."""
        return self.config.fill == "online"

    def open(self, memory: Memory) -> None:
        """What is offered from here on goes to this memory; its bookkeeping goes on."""
        if self.is_online and self._writer is None:
            self._writer = OnlineWriter(memory, self._policy(), flush=self.config.flush)
            if self._state is not None:
                self._writer.load_state_dict(self._state)

    def offer(self, step: Step, task: Task, fields: Mapping[str, torch.Tensor] | None = None) -> None:
        """The new images of a step, as they are stored, with the fields that belong to them."""
        if self._writer is None or step.new is None:
            return
        order = self._order(len(step.new))
        gather = self.runtime.gather
        own_rows, images_NHWC = originals(step.new, task)
        rows = gather(own_rows)[order]
        self._writer.offer(
            task.index,
            gather(images_NHWC)[order],
            gather(step.new.class_ids)[order],
            keys=[f"v{task.visit}-e{step.epoch}-r{row}" for row in rows],
            fields={name: gather(values.cpu().numpy())[order] for name, values in (fields or {}).items()},
        )

    def flush(self) -> None:
        """All that was accepted is in the memory."""
        if self._writer is not None:
            self._writer.flush()

    def state_dict(self) -> dict[str, Any]:
        """What was offered and kept so far."""
        return dict(self._state or {}) if self._writer is None else self._writer.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there."""
        self._state = state or None
        if self._writer is not None and state:
            self._writer.load_state_dict(state)

    def _order(self, count: int) -> npt.NDArray[np.int64]:
        """Places in the batch of the images that `gather` puts one process's after the other's."""
        runtime = self.runtime
        return np.argsort(runtime.gather(np.arange(count) * runtime.world_size + runtime.rank), kind="stable")
