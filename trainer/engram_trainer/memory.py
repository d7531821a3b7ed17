"""The replay memory as a method sees it, and its implementations by an Engram service and by nothing at all.

`ServiceMemory` is a buffer of a service through `engram.Client`; `NoMemory` keeps nothing; those of `local_memory` live
in this process. Images are uint8 `[N, H, W, C]`, features float32 `[N, D]`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from engram.batch import Batch, collect, empty, from_parts
from engram.client import Client
from engram.draw import Layout, Plan, Request, plan
from engram.errors import Conflict
from engram.mirror import Mirror
from engram.schemas import Ingest, IngestOptions, Strategy
from engram_trainer.datasets import ClassIds, Images

Embed = Callable[[Images], npt.NDArray[np.float32]]


@dataclass(frozen=True, eq=False)
class Learned:
    """A task that was just learned, as a memory gets it."""

    task: int
    """Its number."""
    images_NHWC: Images
    """All its training images."""
    class_ids: ClassIds
    extractor: bytes | None = None
    """The learner's feature extractor as ONNX, for a memory in another process."""
    embed: Embed | None = None
    """The same extractor as a function, for a memory in this one."""
    seed: int = 0
    """Draws what the ranking leaves to chance."""


class Memory(Protocol):
    """What a method replays from. A task is added once; adding it again after a crash changes nothing."""

    def add(self, learned: Learned) -> None:
        """Keep exemplars of a task that was just learned."""

    def draw(
        self, size: int, *, seed: int, step: int, strategy: Strategy = "uniform", exclude_tasks: tuple[int, ...] = ()
    ) -> Batch:
        """A replay minibatch: a pure function of the memory's content and the arguments."""

    def everything(self, *, exclude_tasks: tuple[int, ...] = ()) -> Batch:
        """All exemplars, by task, class and rank; empty when there are none."""

    @property
    def is_lossy(self) -> bool:
        """Whether exemplars come back with the marks of JPEG; known before there are any."""

    @property
    def used_bytes(self) -> int:
        """Bytes of all exemplars with all that belongs to them."""

    def describe(self) -> dict[str, Any]:
        """What is kept, as JSON for the report."""

    def state_dict(self) -> dict[str, Any]:
        """What a later `load_state_dict` needs: tensors, numbers, strings and containers of them."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Become the memory whose `state_dict` this is."""


class NoMemory:
    """Keeps nothing: the floor that every replay is measured against."""

    used_bytes = 0
    is_lossy = False

    def add(self, learned: Learned) -> None:
        """Keep nothing."""

    def draw(
        self, size: int, *, seed: int, step: int, strategy: Strategy = "uniform", exclude_tasks: tuple[int, ...] = ()
    ) -> Batch:
        """Refuse, as any memory does that has nothing to draw from.

        Raises:
            Conflict: always.
        """
        raise Conflict(f"cannot draw {size} exemplars from a memory that keeps none")

    def everything(self, *, exclude_tasks: tuple[int, ...] = ()) -> Batch:
        """An empty batch."""
        return empty()

    def describe(self) -> dict[str, Any]:
        """What is kept, as JSON for the report."""
        return {"kind": "none", "used_bytes": 0, "exemplars": 0}

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to load."""


class ServiceMemory:
    """A buffer of an Engram service: it ranks, chooses the quality and encodes; replay comes from a local mirror.

    Args:
        client: the connection to the service.
        buffer: an existing buffer's name.
        options: how tasks are ranked and encoded; `seed` and `extractor` are filled in for each task.
        run: names this run, so that a task that is added again after a crash is the same ingest.
        folder: where the mirror keeps its packs.
        watch: called while the service works on a task.
    """

    def __init__(
        self,
        client: Client,
        buffer: str,
        *,
        options: IngestOptions,
        run: str,
        folder: str | Path,
        watch: Callable[[Ingest], None] | None = None,
    ) -> None:
        self.client, self.buffer, self.options, self.run, self.watch = client, buffer, options, run, watch
        self._mirror = Mirror(client, buffer, folder)

    def add(self, learned: Learned) -> None:
        """Upload the task and wait until its exemplars are committed.

        Raises:
            EngramError: the service refused the images, the extractor or the budget.
        """
        model = learned.extractor
        digest = None if model is None else self.client.register_extractor(model).sha256
        ingest = self.client.upload(
            self.buffer,
            learned.task,
            learned.images_NHWC,
            learned.class_ids,
            options=self.options.model_copy(update={"seed": learned.seed, "extractor": digest}),
            idempotency_key=f"{self.run}-task-{learned.task}",
        )
        self.client.wait(ingest, progress=self.watch)
        self._mirror.refresh()

    def draw(
        self, size: int, *, seed: int, step: int, strategy: Strategy = "uniform", exclude_tasks: tuple[int, ...] = ()
    ) -> Batch:
        """A replay minibatch from the mirror, equal to the service's."""
        return self._mirror.draw(size, seed=seed, step=step, strategy=strategy, exclude_tasks=exclude_tasks)

    def everything(self, *, exclude_tasks: tuple[int, ...] = ()) -> Batch:
        """All exemplars, by task, class and rank."""
        snapshot = self._mirror.snapshot()
        chosen = all_rows(snapshot.layout, exclude_tasks)
        return empty() if chosen is None else from_parts(collect(snapshot.packs, chosen))

    @property
    def is_lossy(self) -> bool:
        """Always: packs are JPEG."""
        return True

    @property
    def used_bytes(self) -> int:
        """Bytes of the packs."""
        return self._mirror.manifest.used_bytes

    def describe(self) -> dict[str, Any]:
        """What is kept and how the service decided, as JSON for the report."""
        manifest = self._mirror.manifest
        tasks = {entry.task: self.client.task(self.buffer, entry.task) for entry in manifest.packs}
        return {
            "kind": "service",
            "buffer": self.buffer,
            "generation": manifest.generation,
            "budget_bytes": manifest.limit_bytes,
            "used_bytes": manifest.used_bytes,
            "exemplars": sum(entry.exemplars for entry in manifest.packs),
            "tasks": {str(number): task.exemplars for number, task in tasks.items()},
            "quality": self.client.buffer(self.buffer).quality,
            "decisions": {
                str(number): task.decision.model_dump(mode="json") for number, task in tasks.items() if task.decision
            },
        }

    def state_dict(self) -> dict[str, Any]:
        """The service keeps the exemplars; a checkpoint only notes which."""
        return {"buffer": self.buffer, "generation": self._mirror.generation}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Check that the buffer is the checkpoint's and has not been set back.

        Raises:
            Conflict: it is another buffer, or its generation is older than the checkpoint's.
        """
        if state["buffer"] != self.buffer or self._mirror.generation < state["generation"]:
            raise Conflict(
                f"the checkpoint was made with buffer {state['buffer']!r} at generation {state['generation']}, this is "
                f"{self.buffer!r} at generation {self._mirror.generation}; start the run in a new folder"
            )


def all_rows(layout: Layout, exclude_tasks: tuple[int, ...]) -> Plan | None:
    """Every exemplar but those of some tasks, in order; None if there is none."""
    if not set(layout.tasks) - set(exclude_tasks):
        return None
    return plan(layout, Request(size=layout.count, strategy="epoch", exclude_tasks=exclude_tasks))


def by_task(batch: Batch) -> dict[int, Batch]:
    """A batch split by task, ascending, order kept within each."""
    return {
        int(task): replace(
            batch,
            images=batch.images[batch.tasks == task],
            class_ids=batch.class_ids[batch.tasks == task],
            tasks=batch.tasks[batch.tasks == task],
            rows=batch.rows[batch.tasks == task],
        )
        for task in np.unique(batch.tasks)
    }
