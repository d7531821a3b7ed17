"""Dark experience replay: exemplars come with the logits that the network gave them, which it shall keep giving.

    L = CE(B_t) + alpha mean_{(x', z') in M} |z' - h(x')|^2 / C + beta mean_{(x'', y'') in M} CE(y'', h(x''))

z' are the logits when the exemplar was stored, a field `logits` of C half-precision numbers that counts in the budget.
The two draws are independent. DER has beta = 0; DER++ (`derpp`) adds the last term.

z' is of the original image, not of the stored one: measured on digits in strips of quality 50 and 10, logits of the
decoded image end within 1.5 points, once above and once below (4 seeds, intervals of 3 points). Filled online, as
published, z' is what the step has just computed: of the image as it was varied, and coded where `codec_ratio` says so,
by the network of that moment in training mode. Filled once the task is learned, it is of the image as it is, by the
network that has learned the task. With random shifts, online logits of the image as it is end 6 points higher (digits,
all 4 seeds), for one more pass of the network at every step: not done.

Source: Buzzega et al., Dark Experience for General Continual Learning (NeurIPS 2020), section 3; constants in brackets:
Mammoth's, for Seq-CIFAR-10. Departure by default: the memory is filled once a task is learned, not online (`fill`).
Half precision: a logit of 10 is stored to 0.004.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import torch

from engram_trainer.examples import Examples
from engram_trainer.memory import Memory
from engram_trainer.methods import er
from engram_trainer.methods.losses import logit_distance
from engram_trainer.runtime import Runtime
from engram_trainer.steps import LEARN, Minibatch, OnStep, Phase, Replay, Step
from engram_trainer.stream import Task


@dataclass(frozen=True)
class Config(er.Config):
    """How a task is trained; in brackets the published settings where they differ."""

    lr: float = 0.03
    alpha: float = 1.0
    """Weight of the distance to the stored logits [0.3]."""
    beta: float = 0.0
    """Weight of the exemplars' cross-entropy."""


class Der(er.Er):
    """SGD on new images beside the logits of exemplars."""

    def __init__(self, runtime: Runtime, config: Config, *, network: str) -> None:
        super().__init__(runtime, config, network=network)
        self.config: Config = config
        self.fields = {"logits": f"float16 [{len(self.stream.class_order)}]"}

    def learn(self, task: Task, memory: Memory, progress: OnStep) -> None:
        """Train on a task's images and, beside them, on exemplars and their logits."""
        config, runtime = self.config, self.runtime
        competing = self.competing(task)
        optimizer = config.optimizer(self.model.parameters())
        self.filling.open(memory)
        examples, order = config.shown(task, memory, seed=self.seed)
        said_NC = torch.empty(0)  # what the network says about the new images of the step

        def loss(step: Step) -> torch.Tensor:
            nonlocal said_NC
            assert step.new is not None, "DER's phase has images"
            logits_NC = self.model(step.new.images_NCHW)
            said_NC = logits_NC.detach()
            total = runtime.mean(self.cross_entropies(logits_NC, step.new.labels_N, competing))
            if step.replay:
                total = total + config.alpha * runtime.mean(self._distances(step.replay[0]))
            if step.replay and config.beta:
                second = step.replay[1]
                losses_N = self.losses(second.images_NCHW, second.labels_N, competing)
                total = total + config.beta * runtime.mean(losses_N)
            return total

        def offer(step: Step) -> None:
            if self.fills_memory:
                self.filling.offer(step, task, {"logits": half(said_NC)})

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
            replay=[Replay(config.replay_batch, stream=stream) for stream in range(2 if config.beta else 1)],
            schedule=config.schedule(optimizer),
            order=order,
            after_step=offer,
            also=[self.filling],
            writes_memory=self.fills_memory,
        )
        runtime.fit(phase, memory, progress)
        self.filling.flush()

    def columns(self, examples: Examples) -> Mapping[str, npt.NDArray[Any]]:
        """The logits of images as they are, for a memory that is filled once the task is learned.

        Raises:
            FloatingPointError: training has diverged.
        """
        logits_NC = self.runtime.features(self.model, examples)
        return {"logits": half(logits_NC).cpu().numpy()}

    def _distances(self, replay: Minibatch) -> torch.Tensor:
        return logit_distance(self.model(replay.images_NCHW), replay.fields["logits"].float())


def half(logits_NC: torch.Tensor) -> torch.Tensor:
    """Logits as they are stored.

    Raises:
        FloatingPointError: one is not finite. A network that learns stored logits which are not can say nothing else.
    """
    stored_NC = logits_NC.to(torch.float16)
    if not bool(torch.isfinite(stored_NC).all()):
        raise FloatingPointError("a logit is not finite; the learning rate is probably too high")
    return stored_NC
