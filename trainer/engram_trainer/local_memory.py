"""Replay memories in this process; `StripMemory` keeps strips as a service does, by the same `engram.memory`.

Batches are drawn by the same `engram.draw`. Within a class exemplars are kept in rank order, so a share that shrinks
drops the tail. Images are uint8 `[N, H, W, C]`. Features are float32 `[N, D]`.
"""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from engram import memory, pack
from engram.batch import Batch, collect, empty, from_parts
from engram.content import Content, Means, Policy, Task
from engram.draw import Layout, Plan, Request, plan
from engram.errors import Conflict, NotFound
from engram.fields import KEY, Columns, Schema
from engram.memory import Upload, Where
from engram.schemas import Decision, IngestOptions, Manifest, PackEntry, Per, ShareBy, Strategy, Subsampling
from engram.selection.embedding import EXTRACTOR_BLOCK, BuiltinEmbedder, Embedder, unit_rows
from engram.selection.images import ArrayImages
from engram.selection.images import Images as Upcoming
from engram.strip import encode
from engram_trainer.examples import ClassIds, Images, Rows
from engram_trainer.memory import Drawn, Embed, ExampleImages, KeptBy, Learned, plans

Kind = Literal["raw", "files", "strips"]
LocalRanking = Literal["herding", "random"]


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
    fields: Mapping[str, str] = field(default_factory=dict)
    """What exemplars have beside their images, as buffers declare it; `{"key": "utf8"}` for exchanges."""


@dataclass(frozen=True, eq=False)
class LocalSnapshot:
    """One generation of a memory in this process, which stays as it is when the memory goes on."""

    manifest: Manifest
    layout: Layout
    read: Callable[[Plan], Batch]
    """The exemplars that a plan names, at least one."""

    def draw(self, request: Request) -> Batch:
        """The minibatch of this request; empty for a rank without a part of an epoch's last step.

        Raises:
            Conflict: there is nothing to draw from.
        """
        chosen = plan(self.layout, request)
        return self.read(chosen) if len(chosen.rows) else empty()


class LocalMemory(Drawn):
    """Exemplars in this process, by task; within a task classes ascend, and ranks within a class."""

    kind: Kind
    schema: Schema
    policy: Policy

    _entries: Sequence[PackEntry] = ()
    _generation: int = -1
    _snapshot: LocalSnapshot

    @abstractmethod
    def add(self, learned: Learned) -> None:
        """Keep as many exemplars of the task as its shares hold; drop the tails of earlier ones.

        Raises:
            BudgetExceeded: not even one exemplar of the task fits.
            BadUpload: the examples bring other fields than the memory keeps.
        """

    @abstractmethod
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
        """The exemplars with the keys `drop` are gone, and as many of these have come as their shares hold.

        Raises:
            BudgetExceeded: not even one exemplar of the task fits.
            BadUpload: the exemplars bring other fields than the memory keeps.
        """

    @abstractmethod
    def reader(self) -> Callable[[Plan], Batch]:
        """What gives the exemplars of now that a plan names."""

    @abstractmethod
    def keys(self) -> set[str]:
        """The keys of all exemplars; none where they have no keys."""

    @abstractmethod
    def sizes(self, images_NHWC: Images, class_ids: ClassIds, fields: Mapping[str, npt.NDArray[Any]]) -> Rows:
        """The bytes of these images as exemplars."""

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

    @property
    def generation(self) -> int:
        """How many changes there have been in this process."""
        return self._generation

    @property
    def entries(self) -> Sequence[PackEntry]:
        """What each task with exemplars holds, ascending, as a manifest lists it."""
        return self._entries

    @property
    def source(self) -> LocalMemory:
        """Itself: `snapshot` is all that a loader asks for."""
        return self

    def snapshot(self) -> LocalSnapshot:
        """This generation, to draw from."""
        return self._snapshot

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
        """A replay minibatch, drawn as the service draws."""
        return self._snapshot.draw(Request(size, seed, step, strategy, None, exclude_tasks, rank, world_size))

    def walk(self, size: int = 256, *, exclude_tasks: tuple[int, ...] = ()) -> Iterator[Batch]:
        """Every exemplar of now once, by task, class and rank."""
        snapshot = self._snapshot
        return map(snapshot.read, plans(snapshot.layout, size, exclude_tasks))

    def slots(self, images_NHWC: Images, class_ids: ClassIds, fields: Mapping[str, npt.NDArray[Any]]) -> int:
        """How many exemplars like these the budget holds, by their mean size."""
        return slots(self.policy, self.sizes(images_NHWC, class_ids, fields), is_chosen=self.kind == "strips")

    def refresh(self) -> None:
        """Nothing: another process has a memory of its own."""

    @property
    def is_lossy(self) -> bool:
        """Whether the kind is a JPEG one."""
        return self.kind != "raw"

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
        """The memory is in a new generation, in which these (task, bytes, runs) are what holds anything."""
        self._entries = [
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
        self._generation += 1
        manifest = Manifest(
            buffer=self.kind,
            generation=self._generation,
            used_bytes=self.used_bytes,
            limit_bytes=self.policy.budget_bytes,
            image_shape=None,
            packs=list(self._entries),
        )
        self._snapshot = LocalSnapshot(manifest, Layout(self._entries), self.reader())

    def _check_kind(self, state: Mapping[str, Any]) -> None:
        if state["kind"] != self.kind:
            raise Conflict(f"the checkpoint holds a memory of kind {state['kind']!r}, this one is {self.kind!r}")


def slots(policy: Policy, sizes: Rows, *, is_chosen: bool) -> int:
    """How many exemplars of such sizes a budget holds, at least one.

    Raises:
        ValueError: the budget is one of each class, or the quality is still to be chosen.
    """
    if policy.per == "class":
        raise ValueError("a budget of each class holds no fixed number of exemplars; give slots, or a budget in all")
    if is_chosen and policy.quality is None:
        raise ValueError("how many exemplars fit depends on the quality; give a quality, or slots")
    return max(1, int(policy.budget_bytes // sizes.mean()))


def strip_sizes(
    images_NHWC: Images, class_ids: ClassIds, columns: Columns, *, quality: int, subsampling: Subsampling
) -> Rows:
    """The bytes of these images as exemplars; the head that a strip of some hundred has once is not counted."""
    records = columns.records(np.arange(len(images_NHWC))) if columns.schema else None
    encoded = encode(
        images_NHWC, class_ids, quality=quality, subsampling=subsampling, schema=columns.schema, records=records
    )
    return encoded.sizes


def exchange_seed(keys: Sequence[str]) -> int:
    """What an exchange leaves to chance is drawn from: told by what comes, so that a repetition is the same."""
    return int.from_bytes(hashlib.sha256("\n".join(keys).encode()).digest()[:4], "big")


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

    def __init__(self, policy: Policy, options: IngestOptions, fields: Mapping[str, str] | None = None) -> None:
        self.policy, self.options, self.schema = policy, options, Schema.declare(fields or {})
        self._become(Content(policy, schema=self.schema))

    def add(self, learned: Learned) -> None:
        """As `LocalMemory.add`; a task that is there already stays as it is."""
        if learned.task in self.content.tasks:
            return
        examples = learned.examples
        images = ExampleImages(examples, self.schema.columns(learned.fields, len(examples)))
        embedder: Embedder = BuiltinEmbedder(images.shape)
        if learned.embed is not None:
            embedder = NetworkEmbedder(learned.embed, learned.extractor)
        self.put(learned.task, images, embedder, seed=learned.seed)

    def put(self, task: int, images: Upcoming, embedder: Embedder, *, seed: int) -> None:
        """One more upload to a task.

        Raises:
            BudgetExceeded: not even one exemplar of the task fits.
        """
        options = self.options.model_copy(update={"seed": seed})
        self._become(memory.add(self.content, Upload(task, images, options), embedder))

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
        """As `LocalMemory.exchange`."""
        content = self.content
        if drop:
            with suppress(NotFound):
                content = memory.remove(content, Where(keys=tuple(drop)))
        if len(keys):
            columns = self.schema.columns({**fields, KEY: list(keys)}, len(keys))
            images = ArrayImages(images_NHWC, np.asarray(class_ids, np.int64), columns)
            options = self.options.model_copy(update={"ranking": kept_by, "seed": exchange_seed(keys)})
            content = memory.add(content, Upload(task, images, options), BuiltinEmbedder(images.shape))
        self._become(content)

    def keys(self) -> set[str]:
        """The keys of all exemplars."""
        if not self.schema.has_key:
            return set()
        return {str(key) for exemplars in self._packs for key in exemplars.fields(frozenset({KEY}))[KEY]}

    def sizes(self, images_NHWC: Images, class_ids: ClassIds, fields: Mapping[str, npt.NDArray[Any]]) -> Rows:
        """The bytes of these images as exemplars."""
        columns = self.schema.columns(fields, len(images_NHWC))
        quality = self.policy.quality or self.quality or 0
        return strip_sizes(images_NHWC, class_ids, columns, quality=quality, subsampling=self.policy.subsampling)

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

    def reader(self) -> Callable[[Plan], Batch]:
        """What gives the exemplars of now that a plan names."""
        packs = self._packs
        return lambda chosen: from_parts(collect(packs, chosen))

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
                self.schema,
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
