"""GEM, whose steps never raise the loss on any earlier task's exemplars, and A-GEM, which bounds their mean loss.

g is the gradient of the current minibatch, g_k the gradient of the mean loss on the exemplars of earlier task k, A the
matrix with *rows +g_k*. The step follows z, the vector nearest to g that turns no g_k uphill:

    min_z 1/2 |z - g|^2   subject to   A z >= 0                                                           (primal)
    min_v 1/2 v' K v + (A g)' v   subject to   v >= gamma,   K = A A',   then   z = g + A' v              (dual)

gamma = 0 is the exact projection. gamma > 0 ("memory strength") pushes into the feasible side, for satisfied
constraints too. With w = v - gamma the dual is a non-negative least squares problem in the Cholesky factor of K.

Names: p parameters, k earlier tasks, features and images as everywhere (`[N, H, W, C]` outside, `[N, C, H, W]` inside).

Source: Lopez-Paz & Ranzato, GEM (NIPS 2017), equations 8 to 11; Chaudhry et al., A-GEM (ICLR 2019), equation 11.
Departures: the published text has A = -(g_1, ..., g_k), which with z = g + A' v violates the constraints (a test shows
it). The ridge that keeps K invertible is relative to the rows, where the reference adds an absolute 1e-3 that disables
the constraints once gradients are small. gamma is 1/k by default, where the paper's fixed 0.5 makes the step grow with
the number of tasks. Replay passes leave BatchNorm's running statistics alone. Evaluation: see `evaluation`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import nnls
from torch import nn

from engram_trainer.memory import Memory
from engram_trainer.methods.filling import Filled, Filling
from engram_trainer.methods.linear import LinearLearner
from engram_trainer.online import Ring
from engram_trainer.runtime import Runtime
from engram_trainer.steps import LEARN, Minibatch, OnStep, Phase, Replay, Step
from engram_trainer.stream import Task

# Added to the diagonal of the Gram matrix of unit rows. Large enough that float32 rounding leaves it positive definite;
# small enough that no constraint is missed by more than sqrt(RIDGE) of |g|: at the optimum RIDGE |v|^2 <= |g|^2.
RIDGE = 1e-6
# A row this much shorter than the longest one says nothing about a direction that float32 could follow.
TINY_RATIO = 1e-12
# Nor does one whose square is no normal float32: products of such rows round to anything.
SHORTEST = 1e-18


@dataclass(frozen=True)
class Config(Filled):
    """How a task is trained. Defaults are the paper's for MNIST: one pass, minibatches of 10, SGD at 0.1.

    The paper's memory is a ring of the last 256 images of each task: `fill` online, and 256 `slots` for each task.
    """

    epochs: int = 1
    batch_size: int = 10
    lr: float = 0.1
    gamma: float | None = None
    """Least weight of every earlier task's gradient in a corrected step; None is 1/k for k earlier tasks."""
    average: bool = False
    """A-GEM: one constraint, on the mean gradient of a random batch of all exemplars. gamma is then not used.

    Class-incremental streams need that margin, or many small steps. Digits, 5 tasks, 3 seeds: two passes end at 84 to
    95 % with gamma 1/k, at 17 to 23 % with 0 or A-GEM; A-GEM in 20 passes at a learning rate of 0.01 at 53 to 62 %.
    """
    replay_batch: int | None = None
    """Exemplars drawn for each gradient and step. None: of each task as many as the largest has (GEM), or 256 of all
    tasks (A-GEM)."""


AGEM_BATCH = 256


class Gem(LinearLearner):
    """SGD whose every step is projected onto the cone that hurts no earlier task."""

    def __init__(self, runtime: Runtime, config: Config, *, network: str) -> None:
        super().__init__(runtime, network=network)
        self.config = config
        self.filling = Filling(runtime, config, partial(Ring, config.slots, tasks=len(self.stream.tasks)))
        self.corrected_steps = 0
        """Steps so far whose gradient broke a constraint."""

    @property
    def fills_memory(self) -> bool:
        """Whether the memory is filled online."""
        return self.filling.is_online

    def learn(self, task: Task, memory: Memory, progress: OnStep) -> None:
        """One pass (or more) over the task under the constraints of the exemplars of the others.

        There is one constraint for each distinct task but this one, however often tasks return.
        """
        config, seen = self.config, self.stream.seen(task.visit)
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        optimizer = config.optimizer(parameters)
        self.filling.open(memory)

        def loss(step: Step) -> torch.Tensor:
            assert step.new is not None, "GEM's phase has images"
            return self.runtime.mean(self.losses(step.new.images_NCHW, step.new.labels_N, seen))

        phase = Phase(
            task=task,
            purpose=LEARN,
            modules=[self.model],
            optimizer=optimizer,
            loss=loss,
            epochs=config.epochs,
            batch_size=config.batch_size,
            augment=config.augment,
            examples=task.train,
            replay=self._replay(task, memory),
            schedule=config.schedule(optimizer),
            correct=partial(self._corrected, parameters=parameters, seen=seen),
            after_step=partial(self.filling.offer, task=task),
            also=[_Counted(self), self.filling],
            writes_memory=self.fills_memory,
        )
        self.runtime.fit(phase, memory, progress)
        self.filling.flush()

    def state_dict(self) -> dict[str, Any]:
        """Weights, how many steps were corrected, and what is known of a memory that is filled online."""
        filling = self.filling.state_dict()
        return {**super().state_dict(), "corrected_steps": self.corrected_steps, "filling": filling}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them back."""
        super().load_state_dict(state)
        self.corrected_steps = state["corrected_steps"]
        self.filling.load_state_dict(state["filling"])

    def _replay(self, task: Task, memory: Memory) -> list[Replay]:
        counts = {number: sum(of.values()) for number, of in memory.counts().items() if number != task.index}
        if not any(counts.values()):
            return []
        default = AGEM_BATCH if self.config.average else max(counts.values())
        world_size = self.runtime.world_size
        size = self.config.replay_batch or -(-default // world_size) * world_size
        return [Replay(size, "uniform" if self.config.average else "per_task", exclude_tasks=(task.index,))]

    def _corrected(
        self, gradient_P: torch.Tensor, step: Step, *, parameters: list[nn.Parameter], seen: int
    ) -> torch.Tensor:
        if not step.replay:
            return gradient_P
        references_KP = self._references(step.replay[0], parameters, seen)
        if self.config.average:
            corrected = project_on_one(gradient_P, references_KP[0])
        else:
            gamma = 1 / len(references_KP) if self.config.gamma is None else self.config.gamma
            corrected = project(gradient_P, references_KP, gamma=gamma)
        self.corrected_steps += corrected is not gradient_P
        return corrected

    def _references(self, replay: Minibatch, parameters: list[nn.Parameter], seen: int) -> torch.Tensor:
        """One gradient per earlier task as rows, for A-GEM a single one: of the mean loss on its exemplars once the
        classes of the current task compete too, as they will in the test."""
        tasks = torch.from_numpy(replay.tasks)
        groups = [slice(None)] if self.config.average else [tasks == task for task in np.unique(replay.tasks)]
        gradients = []
        with frozen_statistics(self.model):
            for rows in groups:
                with self.runtime.autocast():
                    losses_N = self.losses(replay.images_NCHW[rows], replay.labels_N[rows], seen)
                gradients.append(self.runtime.gradient(self.runtime.mean(losses_N), parameters))
        return torch.stack(gradients)


@dataclass
class _Counted:
    """The corrected steps of a learner, for checkpoints within a phase."""

    learner: Gem

    def state_dict(self) -> dict[str, Any]:
        return {"corrected_steps": self.learner.corrected_steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.learner.corrected_steps = state["corrected_steps"]


def project(gradient_P: torch.Tensor, references_KP: torch.Tensor, *, gamma: float = 0.0) -> torch.Tensor:
    """The gradient corrected so that it turns no reference gradient uphill.

    The dual is solved for rows and a gradient of unit length (the cone stays the same), so the result does not depend
    on how small the gradients are. Rows of zeros, or nearly so, are dropped: they constrain nothing.

    Returns:
        `gradient_P` itself, the same object, when no constraint is broken; gamma has no effect then.

    Raises:
        FloatingPointError: a gradient is not finite, or the solution breaks a constraint by more than rounding and the
            ridge explain.
        ValueError: gamma is negative.
    """
    if gamma < 0:
        raise ValueError(f"gamma must be at least 0, not {gamma}")
    norms_K = torch.linalg.vector_norm(references_KP, dim=1)
    length = float(torch.linalg.vector_norm(gradient_P))
    if not (np.isfinite(length) and bool(torch.isfinite(norms_K).all())):
        raise FloatingPointError("a gradient is not finite; the learning rate is probably too high")
    kept = norms_K > max(TINY_RATIO * float(norms_K.max()), SHORTEST)
    if length == 0 or not bool(kept.any()):
        return gradient_P
    if not bool(kept.all()):
        norms_K, references_KP = norms_K[kept], references_KP[kept]
    # Lengths are divided out of the products, not of the rows: that would be one more copy of all of them.
    lengths_K = norms_K.double().cpu().numpy()
    dots_K = (references_KP @ gradient_P).double().cpu().numpy() / (lengths_K * length)
    if (dots_K >= 0).all():
        return gradient_P
    gram_KK = (references_KP @ references_KP.T).double().cpu().numpy() / np.outer(lengths_K, lengths_K)
    least_K = gamma * lengths_K / length
    weights_K = solve_dual(gram_KK, dots_K, least_K)
    slack = (dots_K + gram_KK @ weights_K).min()
    # The ridge may leave RIDGE * v of every constraint unmet; float32 rounding of K and A g comes on top.
    tolerance = RIDGE * weights_K.max() + 1e-5 * (1 + weights_K.sum())
    if slack < -tolerance:
        raise FloatingPointError(f"a constraint of GEM is broken by {-slack:.1e} of |g|, allowed is {tolerance:.1e}")
    weights = torch.from_numpy(weights_K * length / lengths_K).to(references_KP)
    corrected_P: torch.Tensor = gradient_P + weights @ references_KP
    return corrected_P


def solve_dual(
    gram_KK: npt.NDArray[np.float64], dots_K: npt.NDArray[np.float64], least_K: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """v >= least minimising 1/2 v' (K + ridge I) v + dots' v, for a Gram matrix of unit rows.

    With w = v - least, b = dots + (K + ridge I) least and L L' = K + ridge I it is min |L' w + L^-1 b| over w >= 0.
    """
    ridged = (gram_KK + gram_KK.T) / 2 + RIDGE * np.eye(len(gram_KK))
    lower = np.linalg.cholesky(ridged)
    linear = dots_K + ridged @ least_K
    solution, _ = nnls(lower.T, -np.linalg.solve(lower, linear))
    return np.asarray(solution + least_K, np.float64)


def project_on_one(gradient_P: torch.Tensor, reference_P: torch.Tensor) -> torch.Tensor:
    """A-GEM's closed form: `project` for a single reference and gamma = 0.

    Returns:
        `gradient_P` itself, the same object, when the constraint holds.

    Raises:
        FloatingPointError: a gradient is not finite.
    """
    dot, square = gradient_P @ reference_P, reference_P @ reference_P
    if not (bool(torch.isfinite(dot)) and bool(torch.isfinite(square))):
        raise FloatingPointError("a gradient is not finite; the learning rate is probably too high")
    if dot >= 0 or square == 0:
        return gradient_P
    return gradient_P - (dot / square) * reference_P


@contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """BatchNorm normalises by the batch, as in training, but its running statistics do not move."""
    layers = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    tracking = [layer.track_running_stats for layer in layers]
    for layer in layers:
        layer.track_running_stats = False
    try:
        yield
    finally:
        for layer, was in zip(layers, tracking, strict=True):
            layer.track_running_stats = was
