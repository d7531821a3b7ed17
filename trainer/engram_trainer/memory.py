"""The replay memory as a method sees it: what it keeps of a task, and the minibatches that are drawn from it.

`NoMemory` keeps nothing, `service_memory` is a buffer of an Engram service, those of `local_memory` live in this
process. Images are uint8 `[N, H, W, C]`, features float32 `[N, D]`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Literal, Protocol, Self, TypeVar

import numpy as np
import numpy.typing as npt

from engram.batch import Batch, empty
from engram.draw import Layout, Plan, Request, plan
from engram.errors import Conflict
from engram.fields import Column, Columns, Schema
from engram.loader import ReplayLoader
from engram.schemas import PackEntry, Strategy
from engram.sources import Source
from engram_trainer.examples import ClassIds, Examples, Images, Rows, Shape

Embed = Callable[[Images], npt.NDArray[np.float32]]
KeptBy = Literal["ring", "reservoir"]
"""What goes first where a share cannot hold all that was exchanged: the oldest, or any."""

_T = TypeVar("_T")


@dataclass(frozen=True, eq=False)
class Learned:
    """A task that was just learned, as a memory gets it."""

    task: int
    """Its number."""
    examples: Examples
    """All its training examples."""
    extractor: bytes | None = None
    """The learner's feature extractor as ONNX, for a memory in another process."""
    embed: Embed | None = None
    """The same extractor as a function, for a memory in this one."""
    seed: int = 0
    """Draws what the ranking leaves to chance."""
    fields: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)
    """What the examples have beside their images, by name, one row for each."""


class Memory(Protocol):
    """What a method replays from. A task is added once; adding it again after a crash changes nothing."""

    def add(self, learned: Learned) -> None:
        """Keep exemplars of a task that was just learned."""

    def exchange(
        self,
        task: int,
        images_NHWC: Images,
        class_ids: ClassIds,
        *,
        fields: Mapping[str, npt.NDArray[Any]],
        keys: Sequence[str],
        drop: Sequence[str],
        kept_by: KeptBy = "ring",
    ) -> None:
        """The exemplars with the keys `drop` are gone and these have come; draws from here on see it.

        Where its share cannot hold all of a class, `kept_by` says what goes; `keys` says what is there.
        """

    def loader(
        self,
        size: int,
        *,
        seed: int,
        strategy: Strategy = "uniform",
        exclude_tasks: tuple[int, ...] = (),
        start_step: int = 0,
        steps: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> FollowingLoader:
        """Replay minibatches in step order, drawn ahead; empty ones as long as there is nothing to draw from."""

    def draw(
        self,
        size: int,
        *,
        seed: int,
        step: int,
        strategy: Strategy = "uniform",
        exclude_tasks: tuple[int, ...] = (),
        rank: int = 0,
        world_size: int = 1,
    ) -> Batch:
        """A replay minibatch: a pure function of the memory's content and the arguments.

        Raises:
            Conflict: there is nothing to draw from.
        """

    def walk(self, size: int = 256, *, exclude_tasks: tuple[int, ...] = ()) -> Iterator[Batch]:
        """Every exemplar once, by task, class and rank, at most `size` at a time."""

    def counts(self) -> dict[int, dict[int, int]]:
        """How many exemplars there are by task and class."""

    def keys(self) -> set[str]:
        """The keys of all exemplars; none where they have no keys."""

    def slots(self, images_NHWC: Images, class_ids: ClassIds, fields: Mapping[str, npt.NDArray[Any]]) -> int:
        """How many exemplars like these the budget holds, by their mean size once encoded.

        Raises:
            ValueError: the budget is one of each class, or the quality is still to be chosen.
        """

    @property
    def is_lossy(self) -> bool:
        """Whether exemplars come back with the marks of JPEG; known before there are any."""

    @property
    def used_bytes(self) -> int:
        """Bytes of all exemplars with all that belongs to them."""

    def refresh(self) -> None:
        """What another process of the run has changed is seen from here on."""

    def describe(self) -> dict[str, Any]:
        """What is kept, as JSON for the report."""

    def state_dict(self) -> dict[str, Any]:
        """What a later `load_state_dict` needs: tensors, numbers, strings and containers of them."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Become the memory whose `state_dict` this is."""


class Drawn(ABC):
    """What the memories that hold exemplars have in common: replay is drawn from their newest generation."""

    @property
    @abstractmethod
    def generation(self) -> int:
        """Counts the changes."""

    @property
    @abstractmethod
    def entries(self) -> Sequence[PackEntry]:
        """What each task with exemplars holds, ascending."""

    @property
    @abstractmethod
    def source(self) -> Source:
        """What `ReplayLoader` draws from."""

    @abstractmethod
    def draw(
        self,
        size: int,
        *,
        seed: int,
        step: int,
        strategy: Strategy = "uniform",
        exclude_tasks: tuple[int, ...] = (),
        rank: int = 0,
        world_size: int = 1,
    ) -> Batch:
        """As `Memory.draw`."""

    def patiently(self, call: Callable[[], _T]) -> _T:
        """What `call` returns, however long its source is away where there is reason to wait."""
        return call()

    def loader(
        self,
        size: int,
        *,
        seed: int,
        strategy: Strategy = "uniform",
        exclude_tasks: tuple[int, ...] = (),
        start_step: int = 0,
        steps: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> FollowingLoader:
        """As `Memory.loader`."""
        request = Request(size, seed, start_step, strategy, None, exclude_tasks, rank, world_size)
        return FollowingLoader(self, request, None if steps is None else start_step + steps)

    def counts(self) -> dict[int, dict[int, int]]:
        """How many exemplars there are by task and class."""
        return {entry.task: dict(entry.runs) for entry in self.entries if entry.exemplars}

    @property
    def used_bytes(self) -> int:
        """Bytes of all exemplars with all that belongs to them."""
        return sum(entry.bytes for entry in self.entries)


class FollowingLoader:
    """An endless (or finite) iterator of replay minibatches that follows its memory.

    Batches are drawn ahead by `engram.ReplayLoader`. When the memory has changed, what was drawn ahead is dropped, and
    the next step is drawn from what is there now: so a batch depends on the memory and on the step, never on how far
    ahead the loader was.
    """

    def __init__(self, memory: Drawn | None, request: Request, end: int | None) -> None:
        self._memory, self._request, self._end = memory, request, end
        self._step = request.step
        self._loader: ReplayLoader | None = None
        self._generation = -1

    def __iter__(self) -> Iterator[Batch]:
        """The batches from here on; the threads stop when the loop is left."""
        try:
            while self._end is None or self._step < self._end:
                yield next(self)
        finally:
            self.close()

    def __next__(self) -> Batch:
        """The next step's batch, without exemplars if there is nothing to draw from.

        Raises:
            StopIteration: all steps were taken.
            EngramError: what the draw raised; the loader may be asked again for this step.
        """
        if self._end is not None and self._step >= self._end:
            self.close()
            raise StopIteration
        batch = empty() if self._memory is None else self._memory.patiently(self._next)
        self._step += 1
        return batch

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """No thread is left afterwards; asked again, the loader goes on with the next step."""
        if self._loader is not None:
            self._loader.close()
        self._loader = None

    def _next(self) -> Batch:
        assert self._memory is not None, "a loader of no memory has nothing to ask"
        if self._loader is None or self._generation != self._memory.generation:
            self.close()
            self._generation = self._memory.generation
            request = self._request
            if not self._memory.counts().keys() - set(request.exclude_tasks):
                return empty()
            self._loader = ReplayLoader(
                self._memory.source,
                request.size,
                strategy=request.strategy,
                seed=request.seed,
                start_step=self._step,
                steps=None if self._end is None else self._end - self._step,
                exclude_tasks=request.exclude_tasks,
                rank=request.rank,
                world_size=request.world_size,
            )
        return next(self._loader)


class NoMemory:
    """Keeps nothing: the floor that every replay is measured against."""

    used_bytes = 0
    is_lossy = False

    def add(self, learned: Learned) -> None:
        """Keep nothing."""

    def exchange(
        self,
        task: int,
        images_NHWC: Images,
        class_ids: ClassIds,
        *,
        fields: Mapping[str, npt.NDArray[Any]],
        keys: Sequence[str],
        drop: Sequence[str],
        kept_by: KeptBy = "ring",
    ) -> None:
        """Keep nothing."""

    def loader(
        self,
        size: int,
        *,
        seed: int,
        strategy: Strategy = "uniform",
        exclude_tasks: tuple[int, ...] = (),
        start_step: int = 0,
        steps: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> FollowingLoader:
        """Batches without exemplars."""
        request = Request(size, seed, start_step, strategy, None, exclude_tasks, rank, world_size)
        return FollowingLoader(None, request, None if steps is None else start_step + steps)

    def draw(
        self,
        size: int,
        *,
        seed: int,
        step: int,
        strategy: Strategy = "uniform",
        exclude_tasks: tuple[int, ...] = (),
        rank: int = 0,
        world_size: int = 1,
    ) -> Batch:
        """Refuse, as any memory does that has nothing to draw from.

        Raises:
            Conflict: always.
        """
        raise Conflict(f"cannot draw {size} exemplars from a memory that keeps none")

    def walk(self, size: int = 256, *, exclude_tasks: tuple[int, ...] = ()) -> Iterator[Batch]:
        """No batch."""
        return iter(())

    def counts(self) -> dict[int, dict[int, int]]:
        """None of any task."""
        return {}

    def keys(self) -> set[str]:
        """None."""
        return set()

    def slots(self, images_NHWC: Images, class_ids: ClassIds, fields: Mapping[str, npt.NDArray[Any]]) -> int:
        """None."""
        return 0

    def refresh(self) -> None:
        """Nothing to see."""

    def describe(self) -> dict[str, Any]:
        """What is kept, as JSON for the report."""
        return {"kind": "none", "used_bytes": 0, "exemplars": 0}

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to load."""


@dataclass(frozen=True, eq=False)
class ExampleImages:
    """Examples as `engram.memory` reads an upload, in chunks; `columns` are their fields."""

    examples: Examples
    columns: Columns

    @property
    def class_ids(self) -> ClassIds:
        """One for each image."""
        return np.asarray(self.examples.class_ids, np.int64)

    @property
    def shape(self) -> Shape:
        """Height, width and channels of every image."""
        return self.examples.shape

    def read(self, indices: Rows) -> Images:
        """These images in this order."""
        return self.examples.images.read(indices)

    @property
    def schema(self) -> Schema:
        """The fields that every image brings."""
        return self.columns.schema

    def records(self, indices: Rows) -> list[bytes]:
        """The fields of these images in this order."""
        return self.columns.records(indices)


def plans(layout: Layout, size: int, exclude_tasks: tuple[int, ...]) -> Iterator[Plan]:
    """Every exemplar but those of some tasks, in order, at most `size` at a time."""
    if not set(layout.tasks) - set(exclude_tasks):
        return
    whole = plan(layout, Request(size=layout.count, strategy="epoch", exclude_tasks=exclude_tasks))
    for start in range(0, len(whole.rows), size):
        yield Plan(*(column[start : start + size] for column in whole))


def by_task(batch: Batch) -> dict[int, Batch]:
    """A batch split by task, ascending, order kept within each."""
    found: dict[int, Batch] = {}
    for task in np.unique(batch.tasks):
        rows = np.flatnonzero(batch.tasks == task)
        found[int(task)] = replace(
            batch,
            images=batch.images[rows],
            class_ids=batch.class_ids[rows],
            tasks=batch.tasks[rows],
            rows=batch.rows[rows],
            fields={name: rows_of(column, rows) for name, column in batch.fields.items()},
        )
    return found


def rows_of(column: Column, rows: Rows) -> Column:
    """These rows of a field's column."""
    if isinstance(column, np.ndarray):
        return column[rows]
    picked: Any = [column[row] for row in rows]
    found: Column = picked
    return found
