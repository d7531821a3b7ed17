"""The one step loop under all methods: device, precision, processes, reading ahead, checkpoints between epochs.

A step of a `Phase` (see `steps`): new images are read by workers, exemplars drawn ahead by the memory's loader, both
travel as bytes to the device and are varied there; the method's loss; backward; over several processes the gradients'
mean; the method's correction, if it has one; the optimiser. A loss is only looked at a few times a second, so a GPU
computes while the next step's images are read.

Several processes equal one with the whole batch: each has its part of every batch, `mean` divides by the number of all
values, and what varies an image does not depend on which process has it. BatchNorm does depend on it: it normalises
by a process's own part on a CPU (on GPUs its statistics are shared); its running statistics are the first process's.

Lightning Fabric places, converts and communicates.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies.ddp import DDPStrategy
from torch import nn

from engram.batch import Batch
from engram_trainer.batches import batches
from engram_trainer.configuration import RuntimeConfig
from engram_trainer.examples import ClassIds, Examples, Images, Rows
from engram_trainer.memory import FollowingLoader, Memory
from engram_trainer.preparation import DRAWS, Augment, Preparation, pixels, uniforms
from engram_trainer.processes import Environment, Place
from engram_trainer.steps import Minibatch, OnStep, Phase, Replay, Step
from engram_trainer.stream import Stream

SCORE_BATCH = 512
SCORE_BYTES = 2**24
"""Of the images of a batch that is only looked at. 512 of 224x224 take 4 GB in the stem of a ResNet-18 alone."""

ORDER, DRAW, VARY = range(3)
"""Random streams of a phase: the order of its images, the draws of exemplars, the variation of both."""

_EXEMPLAR = np.uint64(1 << 63)
_LONGEST_WAIT = timedelta(hours=6)
"""Of one process for another: the first hands a whole task to the memory while the others wait."""


class Keeper(Protocol):
    """Where the state in the middle of a phase is kept."""

    def load(self, *, visit: int, purpose: int) -> dict[str, Any] | None:
        """What was saved last, if it was this phase."""

    def save(self, state: Callable[[], dict[str, Any]], *, visit: int, purpose: int) -> None:
        """Keep what `state` gives in place of what was saved before; it may not be asked."""


class Runtime:
    """Where and how the steps of one run are made.

    Args:
        config: device, precision, processes, workers.
        stream: the tasks.
        preparation: what is done to images before the network sees them.
        seed: of everything that is drawn.
        place: which of several processes this is.

    Raises:
        ValueError: the device cannot be used.
    """

    def __init__(
        self,
        config: RuntimeConfig,
        stream: Stream,
        *,
        seed: int,
        preparation: Preparation | None = None,
        place: Place | None = None,
    ) -> None:
        self.config, self.stream, self.seed = config, stream, seed
        self.place = place or Place()
        self.rank, self.world_size = self.place.rank, self.place.world_size
        self.fabric = _fabric(config, self.place)
        self.device = self.fabric.device
        self.preparation = (preparation or Preparation(stream.shape)).to(self.device)
        self.keeper: Keeper | None = None
        self.step_s = self.replay_wait_s = 0.0
        """Seconds of all steps so far, and how many of them were waits for exemplars."""

    @property
    def is_first(self) -> bool:
        """Whether this process writes reports, checkpoints and the memory of a service."""
        return self.rank == 0

    def fit(self, phase: Phase, memory: Memory, progress: OnStep) -> None:
        """Walk through a phase, from where a checkpoint left it if there is one.

        Raises:
            EngramError: images cannot be read, or the memory cannot be reached.
            ValueError: a batch is too small for the processes.
            FloatingPointError: the loss at the end of an epoch is not finite.
        """
        parameters = [p for group in phase.optimizer.param_groups for p in group["params"]]
        first = self._resume(phase, memory)
        for module in phase.modules:
            module.train(phase.is_training)
        walk = _Walk(self, phase, memory)
        try:
            loss = torch.zeros(())
            for epoch, steps in walk.epochs(first):
                for step in steps:
                    begin = time.perf_counter()
                    loss = self._step(phase, parameters, step)
                    if phase.after_step is not None:
                        phase.after_step(step)
                    self.step_s += time.perf_counter() - begin
                    progress(step.number + 1, walk.total, loss=loss)
                _check_finite(loss)
                if phase.schedule is not None:
                    phase.schedule.step()
                if phase.after_epoch is not None:
                    phase.after_epoch()
                self._share_statistics(phase.modules)
                if epoch + 1 < phase.epochs:
                    self._save(phase, memory, epoch + 1)
        finally:
            walk.close()

    def mean(self, values_N: torch.Tensor) -> torch.Tensor:
        """The mean over the values of all processes, as a loss: the mean of its gradients is the gradient of one
        process that has all values. 0 where there are none."""
        return self._divided(values_N.sum(), values_N.numel())

    def mean_where(self, values_N: torch.Tensor, is_meant_N: torch.Tensor) -> torch.Tensor:
        """`mean` over some of the values; 0 where none is meant."""
        zero = torch.zeros((), dtype=values_N.dtype, device=values_N.device)
        return self._divided(torch.where(is_meant_N, values_N, zero).sum(), is_meant_N.sum())

    def gradient(self, loss: torch.Tensor, parameters: Sequence[nn.Parameter]) -> torch.Tensor:
        """The gradient of a loss as one vector, the same in all processes; zeros where the loss does not depend."""
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        return self._averaged(flat(parameters, found))

    def autocast(self) -> AbstractContextManager[Any]:
        """Computations in the run's precision."""
        return self.fabric.autocast()

    def place_module(self, module: nn.Module) -> nn.Module:
        """The module on the device; with several GPUs its BatchNorm shares statistics."""
        if self.world_size > 1 and self.device.type == "cuda":
            module = nn.SyncBatchNorm.convert_sync_batchnorm(module)  # type: ignore[no-untyped-call]
        return module.to(self.device)

    @torch.no_grad()
    def predict(self, module: nn.Module, images_NHWC: Images) -> npt.NDArray[np.float32]:
        """What a module in evaluation mode makes of a batch of images as test images; its mode is restored."""
        was_training = module.training
        module.eval()
        with self.autocast():
            found = module(self.preparation(pixels(images_NHWC, self.device)))
        module.train(was_training)
        return np.asarray(found.float().cpu().numpy(), np.float32)

    def features(self, module: nn.Module, examples: Examples) -> torch.Tensor:
        """What a module makes of all these images, float32 `[N, D]` on the device, a batch at a time."""
        parts = [torch.from_numpy(self.predict(module, images)) for _, images in self.read(examples)]
        return torch.cat(parts).to(self.device)

    def read(self, examples: Examples, *, rows: Rows | None = None) -> Iterator[tuple[Rows, Images]]:
        """Images in order, a batch at a time, read ahead by workers where that helps."""
        rows = np.arange(len(examples)) if rows is None else rows
        size = max(1, min(SCORE_BATCH, SCORE_BYTES // int(np.prod(examples.shape))))
        order = [rows[start : start + size] for start in range(0, len(rows), size)]
        return batches(examples.images, order, workers=self.config.workers)

    def total(self, count: int) -> int:
        """The sum of a number over all processes."""
        if self.world_size == 1:
            return count
        return int(self._summed(torch.tensor(float(count), dtype=torch.float64)))

    def gather(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The rows of all processes, the first one's first; the parts may differ in length."""
        if self.world_size == 1:
            return array
        parts: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(parts, array)
        return np.concatenate(parts)

    def barrier(self) -> None:
        """All processes have come here."""
        if self.world_size > 1:
            self.fabric.barrier()

    def broadcast(self, value: Any) -> Any:
        """The first process's value."""
        return value if self.world_size == 1 else self.fabric.broadcast(value, src=0)

    def vary(self, images_NHWC: Images, augment: Augment, *, key: int, identities: npt.NDArray[Any]) -> torch.Tensor:
        """Training images on the device, varied."""
        images_NCHW = pixels(images_NHWC, self.device)
        return self.preparation.vary(images_NCHW, augment, uniforms(key, identities.astype(np.uint64), DRAWS))

    def key(self, *key: int) -> int:
        """A seed of 63 bits for one purpose."""
        return _key(self.seed, *key)

    def labels(self, class_ids: ClassIds) -> torch.Tensor:
        """Places of classes in the stream's order, int64 `[N]` on the device."""
        return torch.from_numpy(self.stream.labels(class_ids)).to(self.device, non_blocking=True)

    def _step(self, phase: Phase, parameters: Sequence[nn.Parameter], step: Step) -> torch.Tensor:
        phase.optimizer.zero_grad(set_to_none=True)
        with self.autocast():
            loss = phase.loss(step)
        self.fabric.backward(loss)
        if self.world_size > 1 or phase.correct is not None:
            trained = [parameter for parameter in parameters if parameter.grad is not None]
            gradient_P = self._averaged(flat(trained, [parameter.grad for parameter in trained]))
            if phase.correct is not None:
                gradient_P = phase.correct(gradient_P, step)
            assign(trained, gradient_P)
        phase.optimizer.step()
        return loss.detach()

    def _divided(self, total: torch.Tensor, count: torch.Tensor | int) -> torch.Tensor:
        if self.world_size == 1 and isinstance(count, int):
            return total / max(count, 1)
        counts = torch.as_tensor(count, dtype=torch.float64).to(total.device)
        if self.world_size > 1:
            counts = self._summed(counts)
        return total * self.world_size / counts.clamp(min=1).to(total.dtype)

    def _summed(self, value: torch.Tensor) -> torch.Tensor:
        summed: torch.Tensor = self.fabric.all_reduce(value.to(self.device), reduce_op="sum")  # type: ignore[assignment]
        return summed

    def _averaged(self, gradient_P: torch.Tensor) -> torch.Tensor:
        return gradient_P if self.world_size == 1 else self._summed(gradient_P) / self.world_size

    def _share_statistics(self, modules: Sequence[nn.Module]) -> None:
        """All processes have the first one's buffers, so that they evaluate and resume alike."""
        if self.world_size > 1:
            for module in modules:
                for buffer in module.buffers():
                    torch.distributed.broadcast(buffer, src=0)

    def _resume(self, phase: Phase, memory: Memory) -> int:
        """The epoch to go on with."""
        where = {"visit": phase.task.visit, "purpose": phase.purpose}
        state = None if self.keeper is None else self.keeper.load(**where)
        if state is None:
            return 0
        for part, saved in zip(_stateful(phase), state["parts"], strict=True):
            part.load_state_dict(saved)
        if phase.writes_memory:
            memory.load_state_dict(state["memory"])
        return int(state["epoch"])

    def _save(self, phase: Phase, memory: Memory, epoch: int) -> None:
        if self.keeper is None:
            return

        def state() -> dict[str, Any]:
            return {
                "epoch": epoch,
                "parts": [part.state_dict() for part in _stateful(phase)],
                "memory": memory.state_dict() if phase.writes_memory else None,
            }

        self.keeper.save(state, visit=phase.task.visit, purpose=phase.purpose)


class _Walk:
    """The steps of a phase, in order."""

    def __init__(self, runtime: Runtime, phase: Phase, memory: Memory) -> None:
        self.runtime, self.phase, self.memory = runtime, phase, memory
        self.total = 0
        self._loaders: list[FollowingLoader] | None = None
        self._images: Iterator[tuple[Rows, Images]] = iter(())
        self._base = phase.purpose, phase.task.visit
        self._vary_key = runtime.key(*self._base, VARY)
        for replay in phase.replay:
            if replay.size < runtime.world_size:
                raise ValueError(f"{replay.size} exemplars a step are too few for {runtime.world_size} processes")
            if replay.size % runtime.world_size:
                raise ValueError(f"{replay.size} exemplars a step do not split over {runtime.world_size} processes")

    def epochs(self, first: int) -> Iterator[tuple[int, Iterator[Step]]]:
        """The number of each epoch from `first` on, and its steps."""
        phase = self.phase
        epochs = range(first, phase.epochs)
        if phase.examples is not None:
            mine = (
                rows[self.runtime.rank :: self.runtime.world_size] for epoch in epochs for rows in self._order(epoch)
            )
            self._images = batches(phase.examples.images, mine, workers=self.runtime.config.workers)
        length = self._length()
        self.total = length * phase.epochs
        for epoch in epochs:
            yield epoch, self._steps(epoch, length)

    def _steps(self, epoch: int, length: int) -> Iterator[Step]:
        for number in range(epoch * length, (epoch + 1) * length):
            new = None if self.phase.examples is None else self._new(number, *next(self._images))
            yield Step(number, epoch, new, self._drawn(number))

    def _length(self) -> int:
        """Steps of an epoch."""
        if self.phase.examples is not None:
            return len(self._order(0))
        return -(-self._exemplars() // self.phase.replay[0].size)

    def _order(self, epoch: int) -> list[Rows]:
        """Rows of each batch of an epoch, over all processes. A last batch of one image, which has no statistics, or of
        fewer than one for each process is left out, if there are others."""
        phase, runtime = self.phase, self.runtime
        assert phase.examples is not None, "asked where there are images"
        generator = np.random.default_rng([runtime.seed, *self._base, ORDER, epoch])
        rows = generator.permutation(len(phase.examples)) if phase.order is None else phase.order(generator)
        order = [rows[start : start + phase.batch_size] for start in range(0, len(rows), phase.batch_size)]
        if len(order) > 1 and len(order[-1]) < max(2, runtime.world_size):
            order.pop()
        return order

    def close(self) -> None:
        """Nothing is read or drawn ahead any more."""
        if isinstance(self._images, Generator):
            self._images.close()
        for loader in self._loaders or ():
            loader.close()
        self._loaders = None

    def _new(self, number: int, rows: Rows, images_NHWC: Images) -> Minibatch:
        examples = self.phase.examples
        assert examples is not None, "there were rows of them"
        class_ids = examples.class_ids[rows]
        key = _key(self._vary_key, number)
        return Minibatch(
            images_NCHW=self.runtime.vary(images_NHWC, self.phase.augment, key=key, identities=rows),
            labels_N=self.runtime.labels(class_ids),
            class_ids=class_ids,
            tasks=np.full(len(rows), self.phase.task.index),
            rows=rows,
            plain_NHWC=images_NHWC,
        )

    def _drawn(self, number: int) -> tuple[Minibatch, ...]:
        begin = time.perf_counter()
        if self._loaders is None:
            self._loaders = [self._loader(replay, number) for replay in self.phase.replay]
        drawn = [next(loader) for loader in self._loaders]
        waited = time.perf_counter() - begin
        self.runtime.replay_wait_s += waited
        self.runtime.step_s += waited
        if not any(map(len, drawn)) and not self._exemplars():
            return ()
        return tuple(self._replayed(number, place, batch) for place, batch in enumerate(drawn))

    def _loader(self, replay: Replay, number: int) -> FollowingLoader:
        runtime = self.runtime
        return self.memory.loader(
            replay.size // runtime.world_size,
            seed=runtime.key(*self._base, DRAW, replay.stream),
            strategy=replay.strategy,
            exclude_tasks=replay.exclude_tasks,
            start_step=number,
            rank=runtime.rank,
            world_size=runtime.world_size,
        )

    def _exemplars(self) -> int:
        """How many there are to draw from."""
        excluded = {task for replay in self.phase.replay[:1] for task in replay.exclude_tasks}
        counts = self.memory.counts()
        return sum(sum(classes.values()) for task, classes in counts.items() if task not in excluded)

    def _replayed(self, number: int, place: int, batch: Batch) -> Minibatch:
        identities = _EXEMPLAR | (batch.tasks.astype(np.uint64) << np.uint64(40)) | batch.rows.astype(np.uint64)
        key = _key(self._vary_key, number, 1 + place)
        runtime = self.runtime
        images_NHWC = batch.images if len(batch) else np.empty((0, *runtime.stream.shape), np.uint8)
        return Minibatch(
            images_NCHW=runtime.vary(images_NHWC, self.phase.augment, key=key, identities=identities),
            labels_N=runtime.labels(batch.class_ids),
            class_ids=batch.class_ids,
            tasks=batch.tasks,
            rows=batch.rows,
            plain_NHWC=images_NHWC,
            fields={
                name: torch.from_numpy(np.ascontiguousarray(column)).to(runtime.device, non_blocking=True)
                for name, column in batch.fields.items()
                if isinstance(column, np.ndarray) and column.dtype.kind in "biuf"
            },
        )


def flat(parameters: Sequence[nn.Parameter], gradients: Sequence[torch.Tensor | None]) -> torch.Tensor:
    """Gradients of parameters as one vector; zeros where there is none."""
    return torch.cat(
        [
            torch.zeros_like(parameter).reshape(-1) if gradient is None else gradient.reshape(-1)
            for parameter, gradient in zip(parameters, gradients, strict=True)
        ]
    )


def assign(parameters: Sequence[nn.Parameter], gradient_P: torch.Tensor) -> None:
    """The inverse of `flat`, into each parameter's `grad`."""
    parts = torch.split(gradient_P, [parameter.numel() for parameter in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.grad = part.view_as(parameter)


def _check_finite(loss: torch.Tensor) -> None:
    if not bool(torch.isfinite(loss)):
        raise FloatingPointError("the loss is not finite; the learning rate is probably too high")


def _stateful(phase: Phase) -> list[Any]:
    schedule = [] if phase.schedule is None else [phase.schedule]
    return [*phase.modules, phase.optimizer, *schedule, *phase.also]


def _key(*key: int) -> int:
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)


def _fabric(config: RuntimeConfig, place: Place) -> Fabric:
    try:
        torch.zeros(1, device=config.device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {config.device!r} cannot be used: {str(error).splitlines()[0]}") from error
    device = torch.device(config.device)
    precision: Any = {"32": "32-true", "bf16": "bf16-mixed"}[config.precision]
    # Given even to one process, which would take a cluster's job for several otherwise.
    plugins: list[Any] = [Environment(place)]
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    if place.world_size == 1:
        devices: Any = 1 if device.index is None or device.type == "cpu" else [device.index]
        return Fabric(accelerator=device.type, devices=devices, precision=precision, plugins=plugins)
    if device.type == "cuda" and torch.cuda.device_count() < place.world_size:
        raise ValueError(f"{place.world_size} processes need as many GPUs; there are {torch.cuda.device_count()}")
    fabric = Fabric(
        accelerator=device.type,
        devices=place.world_size,
        strategy=DDPStrategy(timeout=_LONGEST_WAIT),
        precision=precision,
        plugins=plugins,
    )
    fabric.launch()
    return fabric
