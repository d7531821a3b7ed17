"""A PyTorch data set of replay minibatches, shared out among ranks and the workers of a `DataLoader`.

    dataset = ReplayDataset((client, "cifar"), 256, strategy="class_balanced", seed=7, steps=1000)
    for batch in DataLoader(dataset, batch_size=None, num_workers=2):
        images = batch.images.to(device, non_blocking=True)  # uint8 [N, H, W, C]
        loss = criterion(model(prepare(images)), batch.class_ids.to(device))

This is the one module of the library that imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any

import numpy as np
import numpy.typing as npt

from engram.batch import Batch
from engram.draw import Request
from engram.fields import Column
from engram.schemas import Strategy
from engram.sources import Pinned, Source, check, draw_ahead, pin

try:
    import torch
    from torch.utils.data import IterableDataset, get_worker_info
except ImportError as error:
    raise ImportError("engram.torch needs PyTorch: `pip install torch`, 2.4 or newer") from error

FieldTensors = torch.Tensor | list[torch.Tensor | str]
"""A field's values: [N, ...], or one for each exemplar."""


@dataclass(frozen=True, eq=False)
class TensorBatch:
    """One replay minibatch as tensors on the CPU, aligned by exemplar; `step` is the step it was drawn for.

    `images` is uint8 [N, H, W, C] (RGB or grey), or [N, C, H, W] where that was asked for. It shares memory with what
    was decoded and may have gaps between its rows. Class ids, tasks and rows are int64 [N]. `fields` has the buffer's
    fields by name: a tensor [N, ...], a list of N tensors where they are ragged, a list of N texts.
    """

    images: torch.Tensor
    class_ids: torch.Tensor
    tasks: torch.Tensor
    rows: torch.Tensor
    step: int
    fields: dict[str, FieldTensors] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.class_ids)

    def to(self, *args: Any, **kwargs: Any) -> TensorBatch:
        """The tensors where `Tensor.to` brings them with these arguments, a device usually."""
        return self._each(lambda tensor: tensor.to(*args, **kwargs))

    def pin_memory(self) -> TensorBatch:
        """The tensors in pinned memory; `DataLoader(pin_memory=True)` calls this."""
        return self._each(torch.Tensor.pin_memory)

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> TensorBatch:
        def each(column: FieldTensors) -> FieldTensors:
            if isinstance(column, torch.Tensor):
                return change(column)
            return [change(cell) if isinstance(cell, torch.Tensor) else cell for cell in column]

        return TensorBatch(
            change(self.images),
            change(self.class_ids),
            change(self.tasks),
            change(self.rows),
            self.step,
            {name: each(column) for name, column in self.fields.items()},
        )


class ReplayDataset(IterableDataset[TensorBatch]):
    """The replay minibatches of consecutive steps, in order; give `DataLoader` `batch_size=None`, as they are batches.

    Of W workers, worker w draws the steps `start_step + w`, `start_step + w + W`, ...; the loader takes from its
    workers in turn, so the batches come in the order of steps with any number of workers. Each rank draws its slice of
    every step. A run that stopped after step s goes on with `start_step=s + 1`, with any number of workers.

    The generation is fixed when the data set is made, so workers agree on it. Ranks should be told it
    (`generation=`) if the buffer may change while they start: slices of different generations may overlap.

    Args:
        source: a mirror or another buffer at hand, or a (client, buffer name) pair. Workers that are not forked get it
            pickled.
        size: exemplars per batch and rank (per task for `per_task`).
        strategy: see `engram.draw`.
        seed: of the draws.
        start_step: the first step, of every iteration over the data set.
        steps: how many batches; None for no end, or for `epoch` to the end of the epoch in which `start_step` lies. The
            last step of an epoch may be smaller than the others, and empty for some ranks.
        tasks: draw only from these.
        exclude_tasks: never draw from these; the current task, usually.
        rank: this process among `world_size`; None for both asks `torch.distributed` if it is initialised, else 0 of 1.
        world_size: how many processes share each step's global batch.
        generation: which to draw from; None is the newest of now.
        channels_first: images as [N, C, H, W]: another view, nothing is copied.
        prefetch: how many batches a worker asks the service for before it decodes the first.

    Raises:
        NotFound: no such buffer or task.
        Conflict: a mirror is at another generation than was asked for; an epoch of nothing.
        InvalidRequest: a number is out of range.
        ValueError: no source, a negative number of steps, a prefetch below 1, or one of rank and world size without
            the other.
    """

    def __init__(
        self,
        source: Source,
        size: int,
        *,
        strategy: Strategy = "uniform",
        seed: int = 0,
        start_step: int = 0,
        steps: int | None = None,
        tasks: Sequence[int] | None = None,
        exclude_tasks: Sequence[int] = (),
        rank: int | None = None,
        world_size: int | None = None,
        generation: int | None = None,
        channels_first: bool = False,
        prefetch: int = 2,
    ) -> None:
        super().__init__()
        check(source)
        if prefetch < 1:
            raise ValueError(f"prefetch must be at least 1, got {prefetch}")
        if steps is not None and steps < 0:
            raise ValueError(f"steps must not be negative, got {steps}")
        self._request = Request(size, seed, start_step, strategy, tasks, exclude_tasks, *_place(rank, world_size))
        self._source = source
        self._pinned: Pinned | None = pin(source, generation)
        self.generation = self._pinned.generation
        if steps is None and strategy == "epoch":
            steps = _steps_to_the_end(self._pinned, self._request)
        self.steps = steps
        self.channels_first = channels_first
        self._prefetch = prefetch

    def __iter__(self) -> Iterator[TensorBatch]:
        """The batches from `start_step` on, of this worker's steps."""
        if self._pinned is None:
            self._pinned = pin(self._source, self.generation)
        worker = get_worker_info()
        skipped, stride = (0, 1) if worker is None else (worker.id, worker.num_workers)
        first = self._request.step + skipped
        steps = count(first, stride) if self.steps is None else range(first, self._request.step + self.steps, stride)
        with closing(draw_ahead(partial(self._pinned.ask, self._request), steps, self._prefetch)) as batches:
            for step, batch in zip(count(first, stride), batches, strict=False):
                yield self._tensors(batch, step)

    def __getstate__(self) -> dict[str, Any]:
        # A buffer at hand is pickled as where it is, not with its packs; a worker pins it to the generation again.
        return self.__dict__ | {"_pinned": None}

    def _tensors(self, batch: Batch, step: int) -> TensorBatch:
        images = torch.from_numpy(batch.images)
        if self.channels_first:
            images = images.permute(0, 3, 1, 2)
        class_ids, tasks, rows = map(torch.from_numpy, (batch.class_ids, batch.tasks, batch.rows))
        fields = {name: _column(column) for name, column in batch.fields.items()}
        return TensorBatch(images, class_ids, tasks, rows, step, fields)


def _column(column: Column) -> FieldTensors:
    """A field's values as tensors; texts stay texts."""
    if isinstance(column, np.ndarray):
        return _tensor(column)
    return [cell if isinstance(cell, str) else _tensor(cell) for cell in column]


def _tensor(array: npt.NDArray[Any]) -> torch.Tensor:
    return torch.from_numpy(array if array.flags.writeable else array.copy())


def _place(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """This process's rank and the number of processes."""
    if rank is not None and world_size is not None:
        return rank, world_size
    if rank is not None or world_size is not None:
        raise ValueError(f"give rank and world_size both or neither, got {rank} and {world_size}")
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def _steps_to_the_end(pinned: Pinned, request: Request) -> int:
    """How many steps are left of the epoch that the request's step lies in."""
    total = int(pinned.layout().groups("all", request.tasks, request.exclude_tasks).sizes[0])
    steps = -(-total // (request.size * request.world_size))
    return steps - request.step % steps
