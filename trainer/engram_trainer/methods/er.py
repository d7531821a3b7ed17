"""Experience replay: every batch is new images and as many exemplars, and one cross-entropy over both.

    L = mean over B_t and B_M of CE,   B_t the step's new images, B_M a uniform draw from the memory

Source: Riemer et al., MER (ICLR 2019), and Chaudhry et al., On Tiny Episodic Memories in Continual Learning (2019);
constants in brackets: Mammoth's `er` for Seq-CIFAR-10. Departure by default: the memory is filled once a task is
learned, not online (`fill`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch

from engram_trainer.memory import Memory
from engram_trainer.methods.codec import Coding
from engram_trainer.methods.filling import Filled, Filling
from engram_trainer.methods.linear import LinearLearner
from engram_trainer.online import Reservoir
from engram_trainer.runtime import Runtime
from engram_trainer.steps import LEARN, MEMORY, OnStep, Phase, Replay, Step
from engram_trainer.stream import Task

Compete = Literal["seen", "all"]


@dataclass(frozen=True)
class Config(Filled, Coding):
    """How a task is trained; in brackets the published settings where they differ."""

    epochs: int = 10
    """[50]"""
    batch_size: int = 32
    """New images of a step."""
    replay_batch: int = 32
    """Exemplars of a step."""
    lr: float = 0.1
    compete: Compete = "all"
    """Which labels an image is told apart from: all of the stream, or those seen so far. Labels that have not arrived
    learn to be wrong, so that logits which are stored early mean something for them, too. Digits, 5 tasks, validation
    images: DER ends at 86 % with all and at 55 % with those seen, ER at 82 and 83 %."""


class Er(LinearLearner):
    """SGD on new images and exemplars alike."""

    def __init__(self, runtime: Runtime, config: Config, *, network: str) -> None:
        super().__init__(runtime, network=network)
        self.config = config
        self.filling = Filling(runtime, config, partial(Reservoir, config.slots, seed=runtime.key(MEMORY)))

    @property
    def fills_memory(self) -> bool:
        """Whether the memory is filled online."""
        return self.filling.is_online

    def competing(self, task: Task) -> int:
        """How many labels an image is told apart from."""
        return len(self.stream.class_order) if self.config.compete == "all" else self.stream.seen(task.visit)

    def learn(self, task: Task, memory: Memory, progress: OnStep) -> None:
        """Train on a task's images and, beside them, on exemplars."""
        config, runtime = self.config, self.runtime
        competing = self.competing(task)
        optimizer = config.optimizer(self.model.parameters())
        self.filling.open(memory)
        examples, order = config.shown(task, memory, seed=self.seed)

        def loss(step: Step) -> torch.Tensor:
            return runtime.mean(self.losses(step.images, step.labels, competing))

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
            replay=[Replay(config.replay_batch)],
            schedule=config.schedule(optimizer),
            order=order,
            after_step=partial(self.filling.offer, task=task),
            also=[self.filling],
            writes_memory=self.fills_memory,
        )
        runtime.fit(phase, memory, progress)
        self.filling.flush()

    def state_dict(self) -> dict[str, Any]:
        """Weights, statistics, and what is known of the memory that is filled online."""
        return {**super().state_dict(), "filling": self.filling.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them back."""
        super().load_state_dict(state)
        self.filling.load_state_dict(state["filling"])
