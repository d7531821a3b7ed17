"""Replay memories in this process; `StripMemory` keeps strips as a service does, by the same `engram.memory`.

Batches are drawn by the same `engram.draw`. Within a class exemplars are kept in rank order, so a share that shrinks
drops the tail. Images are uint8 `[N, H, W, C]`. Features are float32 `[N, D]`.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from engram import memory, pack
from engram.batch import Batch, collect, empty, from_parts
from engram.content import Content, Means, Policy, Task
from engram.draw import Layout, Plan, Request, plan
from engram.errors import Conflict
from engram.memory import Upload
from engram.schemas import Decision, IngestOptions, PackEntry, Per, ShareBy, Strategy, Subsampling
from engram.selection.embedding import EXTRACTOR_BLOCK, BuiltinEmbedder, Embedder, unit_rows
from engram.selection.images import ArrayImages
from engram_trainer.examples import Images
from engram_trainer.memory import Embed, Learned, all_rows

Kind = Literal["raw", "files", "strips"]
LocalRanking = Literal["herding", "random"]
Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class LocalConfig:
    """How a memory in this process keeps exemplars."""

    kind: Kind = "raw"
    budget_bytes: int = 40_000
    per: Per = "buffer"
    """Whether `budget_bytes` is the total or what each class gets."""
    share_by: ShareBy = "class"
    ranking: LocalRanking = "herding"
    """`random` needs no features; so `herding` falls back to it when raw pixels or files have no extractor."""
    quality: int | None = 50
    """JPEG quality of files and strips; None lets selection choose that of strips."""
    subsampling: Subsampling = "4:2:0"


class LocalMemory(ABC):
    """Exemplars in this process, by task; within a task classes ascend, and ranks within a class."""

    kind: Kind
    entries: Sequence[PackEntry] = ()
    """What each task with exemplars holds, ascending, as a manifest lists it."""

    _layout: Layout

    @abstractmethod
    def add(self, learned: Learned) -> None:
        """Keep as many exemplars of the task as its shares hold; drop the tails of earlier ones.

        Raises:
            BudgetExceeded: not even one exemplar of the task fits.
        """

    @abstractmethod
    def batch(self, chosen: Plan) -> Batch:
        """The exemplars that a plan names."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """All exemplars as tensors, numbers and strings."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Become the memory whose `state_dict` this is.

        Raises:
            Conflict: it was a memory of another kind.
        """

    @property
    @abstractmethod
    def quality(self) -> int | None:
        """JPEG quality of all exemplars; None before the first and for raw pixels."""

    def draw(
        self, size: int, *, seed: int, step: int, strategy: Strategy = "uniform", exclude_tasks: tuple[int, ...] = ()
    ) -> Batch:
        """A replay minibatch, drawn as the service draws."""
        request = Request(size=size, seed=seed, step=step, strategy=strategy, exclude_tasks=exclude_tasks)
        return self.batch(plan(self._layout, request))

    def everything(self, *, exclude_tasks: tuple[int, ...] = ()) -> Batch:
        """All exemplars, by task, class and rank."""
        chosen = all_rows(self._layout, exclude_tasks)
        return empty() if chosen is None else self.batch(chosen)

    @property
    def is_lossy(self) -> bool:
        """Whether the kind is a JPEG one."""
        return self.kind != "raw"

    @property
    def used_bytes(self) -> int:
        """Bytes of all exemplars with all that belongs to them."""
        return sum(entry.bytes for entry in self.entries)

    def describe(self) -> dict[str, Any]:
        """What is kept, as JSON for the report."""
        return {
            "kind": self.kind,
            "quality": self.quality,
            "used_bytes": self.used_bytes,
            "exemplars": sum(entry.exemplars for entry in self.entries),
            "tasks": {str(entry.task): entry.exemplars for entry in self.entries},
        }

    def _hold(self, tasks: Iterable[tuple[int, int, Sequence[tuple[int, int]]]]) -> None:
        """The entries are those of these (task, bytes, runs) that hold anything."""
        self.entries = [
            PackEntry(
                digest=f"{task:064x}",
                task=task,
                bytes=size,
                exemplars=sum(count for _, count in runs),
                quality=self.quality or 0,
                runs=list(runs),
            )
            for task, size, runs in sorted(tasks)
            if runs
        ]
        self._layout = Layout(self.entries)

    def _check_kind(self, state: Mapping[str, Any]) -> None:
        if state["kind"] != self.kind:
            raise Conflict(f"the checkpoint holds a memory of kind {state['kind']!r}, this one is {self.kind!r}")


class NetworkEmbedder:
    """A learner's own feature extractor; its name is the digest of what it exports, or `network`."""

    block = EXTRACTOR_BLOCK

    def __init__(self, embed: Embed, extractor: bytes | None) -> None:
        self._embed = embed
        self.name = "network" if extractor is None else hashlib.sha256(extractor).hexdigest()

    def embed(self, images_NHWC: Images) -> npt.NDArray[np.float32]:
        """One row per image, unit L2 norm."""
        return unit_rows(np.array(self._embed(images_NHWC), np.float32))


class StripMemory(LocalMemory):
    """Packs, made as a service makes them."""

    kind = "strips"

    def __init__(self, policy: Policy, options: IngestOptions) -> None:
        self.options = options
        self._become(Content(policy))

    def add(self, learned: Learned) -> None:
        """As `LocalMemory.add`; a task that is there already stays as it is."""
        if learned.task in self.content.tasks:
            return
        images = ArrayImages(learned.images_NHWC, np.asarray(learned.class_ids, np.int64))
        embedder: Embedder = BuiltinEmbedder(images.shape)
        if learned.embed is not None:
            embedder = NetworkEmbedder(learned.embed, learned.extractor)
        self.put(learned.task, images, embedder, seed=learned.seed)

    def put(self, task: int, images: ArrayImages, embedder: Embedder, *, seed: int) -> None:
        """One more upload to a task.

        Raises:
            BudgetExceeded: not even one exemplar of the task fits.
        """
        options = self.options.model_copy(update={"seed": seed})
        self._become(memory.add(self.content, Upload(task, images, options), embedder))

    def _become(self, content: Content) -> None:
        self.content = content
        loaded = [task.load() for task in content.tasks.values()]
        self._packs = [exemplars for exemplars in loaded if exemplars is not None]
        self._hold((number, task.pack_bytes, list(task.kept.items())) for number, task in content.tasks.items())

    @property
    def decisions(self) -> dict[int, Decision]:
        """What each task's images said about quality."""
        return {number: task.decision for number, task in self.content.tasks.items() if task.decision is not None}

    @property
    def quality(self) -> int | None:
        """Of all exemplars."""
        return self.content.quality

    def batch(self, chosen: Plan) -> Batch:
        """The exemplars that a plan names."""
        return from_parts(collect(self._packs, chosen))

    def state_dict(self) -> dict[str, Any]:
        """All packs as tensors, and what is known about them."""
        content = self.content
        about = {"quality": content.quality, "is_provisional": content.is_provisional, "shape": content.shape}
        tasks = {number: _task_state(task) for number, task in content.tasks.items()}
        return {"kind": self.kind, "about": json.dumps(about), "tasks": tasks}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Become the memory whose `state_dict` this is."""
        self._check_kind(state)
        about = json.loads(state["about"])
        self._become(
            Content(
                self.content.policy,
                {int(number): _task_from(task) for number, task in state["tasks"].items()},
                about["quality"],
                about["is_provisional"],
                None if about["shape"] is None else tuple(about["shape"]),
            )
        )


def _task_state(task: Task) -> dict[str, Any]:
    exemplars, means = task.load(), task.means
    # A checkpoint says what the memory is, not how long that took.
    decision = None if task.decision is None else task.decision.model_dump_json(exclude={"seconds"})
    return {
        "seen": json.dumps(list(task.seen.items())),
        "decision": decision,
        "pack": as_tensor(b"" if exemplars is None else pack.to_bytes(exemplars)),
        "means": None if means is None else as_tensor(means.to_bytes()),
    }


def _task_from(state: Mapping[str, Any]) -> Task:
    data = state["pack"].numpy().tobytes()
    task = Task(
        seen=dict(json.loads(state["seen"])),
        kept={},
        pack_bytes=0,
        load=lambda: None,
        decision=None if state["decision"] is None else Decision.model_validate_json(state["decision"]),
        means=None if state["means"] is None else Means.from_bytes(state["means"].numpy().tobytes()),
    )
    return task.holding(pack.parse(data) if data else None)


def as_tensor(data: bytes) -> torch.Tensor:
    """Bytes for a checkpoint."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
