"""This file is a replay memory in this process: what the service is compared with, under the same byte budget.

Shares are split by the same `engram.shares` and batches drawn by the same `engram.draw` as in the service. What one
exemplar costs, its class id counted as 2 bytes:

    raw      height * width * channels + 2
    files    the bytes of one JPEG file of its own (optimised tables) + 2
    strips   nothing by itself: the bytes of its task's pack, tables, labels and checksums included

Within a class exemplars are kept in rank order, so a share that shrinks drops the tail. Images are uint8
`[N, H, W, C]`. Features are float32 `[N, D]`.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import numpy as np
import numpy.typing as npt
import simplejpeg
import torch
from PIL import Image

from engram import pack, shares, strip
from engram.batch import Batch
from engram.draw import Layout, Request, plan
from engram.errors import BudgetExceeded, Conflict
from engram.schemas import PackEntry, Per, ShareBy, Strategy, Subsampling
from engram_trainer.datasets import ClassIds, Images
from engram_trainer.memory import Embed, empty_batch

Kind = Literal["raw", "files", "strips"]
LocalRanking = Literal["herding", "random"]
Rows = npt.NDArray[np.int64]

CLASS_ID_BYTES = 2
# No exemplar costs less, so a share is never ranked deeper than share / floor: a JPEG file without its tables is larger
# than this, and so is one restart interval with its marker and checksum.
FLOOR_BYTES: dict[Kind, int] = {"raw": 1, "files": 64, "strips": 7}


def herd(features_ND: npt.NDArray[np.floating[Any]], count: int) -> list[int]:
    """Rank images of one class so that every prefix of the ranking has a mean near the class mean.

    The ranking does not depend on `count`: shrinking a share is a truncation, never a new selection.

    Args:
        features_ND: one row per image, unit L2 norm.
        count: how many indices to return, 0..N.

    Raises:
        ValueError: `count` is not in 0..N.

    Source: Rebuffi et al., iCaRL (CVPR 2017), Algorithm 4, whose greedy choice for unit rows is the largest inner
    product with (k + 1) * mean - sum of the k chosen. Chosen rows are masked, so ties resolve to the lowest index.
    """
    features = np.asarray(features_ND, np.float64)
    if not 0 <= count <= len(features):
        raise ValueError(f"cannot rank {count} of {len(features)} images")
    if count == 0:
        return []
    toward_mean = features @ features.mean(axis=0)
    gain = toward_mean.copy()
    chosen: list[int] = []
    for _ in range(count):
        best = int(np.argmax(gain))
        chosen.append(best)
        gain += toward_mean - features @ features[best]
        gain[best] = -np.inf
    return chosen


@dataclass(frozen=True)
class LocalConfig:
    """How a memory in this process keeps exemplars."""

    kind: Kind = "raw"
    budget_bytes: int = 40_000
    per: Per = "buffer"
    """Whether `budget_bytes` is the total or what each class gets."""
    share_by: ShareBy = "class"
    ranking: LocalRanking = "herding"
    """`random` needs no features; so `herding` falls back to it when there is no extractor."""
    quality: int = 50
    """JPEG quality of files and strips."""
    subsampling: Subsampling = "4:2:0"


class Kept(Protocol):
    """The exemplars of one task: classes ascending, within a class in rank order."""

    @property
    def class_ids(self) -> ClassIds:
        """Class id of each exemplar."""

    @property
    def used_bytes(self) -> int:
        """Bytes of all exemplars with all that belongs to them."""

    def fit(self, share_of: Mapping[int, int]) -> Kept:
        """The largest prefix of each class that its share holds."""

    def decode(self, rows: Rows) -> Images:
        """The pixels of some exemplars."""

    def state(self) -> dict[str, torch.Tensor]:
        """As tensors, for a checkpoint."""


def _prefixes(class_ids: ClassIds, sizes: Rows, share_of: Mapping[int, int]) -> Rows:
    """Rows of the largest prefix per class whose sizes sum to at most the class's share."""
    kept = []
    for class_id in np.unique(class_ids):
        rows = np.flatnonzero(class_ids == class_id)
        kept.append(rows[np.cumsum(sizes[rows]) <= share_of[int(class_id)]])
    return np.concatenate(kept) if kept else np.arange(0)


@dataclass(frozen=True, eq=False)
class KeptRaw:
    """Exemplars as their pixels."""

    images: Images
    class_ids: ClassIds

    @property
    def sizes(self) -> Rows:
        """Bytes of each exemplar."""
        each = int(np.prod(self.images.shape[1:])) + CLASS_ID_BYTES
        return np.full(len(self.class_ids), each, np.int64)

    @property
    def used_bytes(self) -> int:
        """Bytes of all exemplars."""
        return int(self.sizes.sum())

    def fit(self, share_of: Mapping[int, int]) -> KeptRaw:
        """The largest prefix of each class that its share holds."""
        rows = _prefixes(self.class_ids, self.sizes, share_of)
        return KeptRaw(self.images[rows], self.class_ids[rows])

    def decode(self, rows: Rows) -> Images:
        """The pixels of some exemplars."""
        return self.images[rows]

    def state(self) -> dict[str, torch.Tensor]:
        """As tensors."""
        return {"images": torch.from_numpy(self.images), "class_ids": torch.from_numpy(self.class_ids)}

    @classmethod
    def from_state(cls, state: Mapping[str, torch.Tensor]) -> KeptRaw:
        """The inverse of `state`."""
        return cls(state["images"].numpy(), state["class_ids"].numpy())


@dataclass(frozen=True, eq=False)
class KeptFiles:
    """Exemplars as one JPEG file each."""

    files: tuple[bytes, ...]
    class_ids: ClassIds
    shape: tuple[int, int, int]

    @classmethod
    def encode(cls, images_NHWC: Images, class_ids: ClassIds, *, quality: int, subsampling: Subsampling) -> KeptFiles:
        """One file per image, Huffman tables fitted to it."""
        files = tuple(_jpeg(image, quality, subsampling) for image in images_NHWC)
        height, width, channels = images_NHWC.shape[1:]
        return cls(files, class_ids, (height, width, channels))

    @property
    def sizes(self) -> Rows:
        """Bytes of each exemplar."""
        return np.array([len(file) + CLASS_ID_BYTES for file in self.files], np.int64)

    @property
    def used_bytes(self) -> int:
        """Bytes of all exemplars."""
        return int(self.sizes.sum())

    def fit(self, share_of: Mapping[int, int]) -> KeptFiles:
        """The largest prefix of each class that its share holds."""
        rows = _prefixes(self.class_ids, self.sizes, share_of)
        return KeptFiles(tuple(self.files[row] for row in rows), self.class_ids[rows], self.shape)

    def decode(self, rows: Rows) -> Images:
        """The pixels of some exemplars."""
        images = np.empty((len(rows), *self.shape), np.uint8)
        for place, row in enumerate(rows):
            images[place] = simplejpeg.decode_jpeg(self.files[row], "GRAY" if self.shape[2] == 1 else "RGB")
        return images

    def state(self) -> dict[str, torch.Tensor]:
        """As tensors: the files back to back, and their lengths."""
        return {
            "data": torch.frombuffer(bytearray(b"".join(self.files)), dtype=torch.uint8),
            "lengths": torch.tensor([len(file) for file in self.files]),
            "class_ids": torch.from_numpy(self.class_ids),
            "shape": torch.tensor(self.shape),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, torch.Tensor]) -> KeptFiles:
        """The inverse of `state`."""
        data, ends = state["data"].numpy().tobytes(), np.cumsum(state["lengths"].numpy())
        files = tuple(data[end - length : end] for end, length in zip(ends, state["lengths"].tolist(), strict=True))
        height, width, channels = state["shape"].tolist()
        return cls(files, state["class_ids"].numpy(), (height, width, channels))


def _jpeg(image: Images, quality: int, subsampling: Subsampling) -> bytes:
    out = io.BytesIO()
    if image.shape[2] == 1:
        Image.fromarray(image[..., 0]).save(out, "JPEG", quality=quality, optimize=True)
    else:
        Image.fromarray(image).save(out, "JPEG", quality=quality, optimize=True, subsampling=subsampling)
    return out.getvalue()


@dataclass(frozen=True, eq=False)
class KeptStrips:
    """Exemplars as one pack, in the service's own format."""

    exemplars: strip.Exemplars

    @property
    def class_ids(self) -> ClassIds:
        """Class id of each exemplar."""
        return self.exemplars.class_ids

    @property
    def used_bytes(self) -> int:
        """Bytes of the pack."""
        return len(pack.to_bytes(self.exemplars)) if len(self.exemplars) else 0

    def fit(self, share_of: Mapping[int, int]) -> KeptStrips:
        """The largest prefix of each class such that the pack is within the sum of the shares."""
        return KeptStrips(pack.fit(self.exemplars, dict(share_of)))

    def decode(self, rows: Rows) -> Images:
        """The pixels of some exemplars."""
        return self.exemplars.select(rows).decode()

    def state(self) -> dict[str, torch.Tensor]:
        """As a tensor: the pack's bytes."""
        return {"pack": torch.frombuffer(bytearray(pack.to_bytes(self.exemplars)), dtype=torch.uint8)}

    @classmethod
    def from_state(cls, state: Mapping[str, torch.Tensor]) -> KeptStrips:
        """The inverse of `state`."""
        return cls(pack.parse(state["pack"].numpy().tobytes()))


KEPT: dict[Kind, Any] = {"raw": KeptRaw, "files": KeptFiles, "strips": KeptStrips}


class LocalMemory:
    """Exemplars in this process, under the same byte budget as the service's."""

    def __init__(self, config: LocalConfig) -> None:
        if config.kind not in get_args(Kind):
            raise ValueError(f"memory kind {config.kind!r} is not one of {', '.join(get_args(Kind))}")
        self.config = config
        self._kept: dict[int, Kept] = {}
        self._layout: tuple[list[int], Layout] | None = None

    def add(
        self,
        task: int,
        images_NHWC: Images,
        class_ids: ClassIds,
        *,
        extractor: bytes | None,
        embed: Embed | None,
        seed: int,
    ) -> None:
        """Keep as many exemplars of the task as its shares hold; drop the tails of earlier ones.

        Raises:
            BudgetExceeded: not even one exemplar of the task fits.
        """
        if task in self._kept:
            return
        classes = {place: kept_classes(kept.class_ids) for place, kept in self._kept.items()}
        classes[task] = kept_classes(class_ids)
        leaves = shares.leaves(
            self.config.budget_bytes, per=self.config.per, share_by=self.config.share_by, classes_by_task=classes
        )
        share_of = _shares_of(leaves, task)
        ranked = self._rank(images_NHWC, class_ids, share_of, embed, seed)
        kept = self._encode(images_NHWC[ranked], class_ids[ranked]).fit(share_of)
        if len(kept.class_ids) == 0:
            raise BudgetExceeded(
                f"not one exemplar of task {task} fits: its {len(share_of)} classes have {sum(share_of.values())} "
                f"bytes of a budget of {self.config.budget_bytes}; give the memory more bytes"
            )
        self._kept = {place: old.fit(_shares_of(leaves, place)) for place, old in self._kept.items()} | {task: kept}
        self._layout = None

    def _rank(
        self, images_NHWC: Images, class_ids: ClassIds, share_of: Mapping[int, int], embed: Embed | None, seed: int
    ) -> Rows:
        """Rows by class ascending, then rank; no deeper than a share could reach."""
        generator = np.random.default_rng(seed)
        ranked = []
        for class_id in np.unique(class_ids):
            rows = np.flatnonzero(class_ids == class_id)
            depth = min(len(rows), share_of[int(class_id)] // self._floor(images_NHWC) + 1)
            if self.config.ranking == "herding" and embed is not None:
                features = embed(images_NHWC[rows])
                norms = np.linalg.norm(features, axis=1, keepdims=True)
                ranked.append(rows[herd(features / np.maximum(norms, 1e-12), depth)])
            else:
                ranked.append(generator.permutation(rows)[:depth])
        return np.concatenate(ranked)

    def _floor(self, images_NHWC: Images) -> int:
        return int(np.prod(images_NHWC.shape[1:])) if self.config.kind == "raw" else FLOOR_BYTES[self.config.kind]

    def _encode(self, images_NHWC: Images, class_ids: ClassIds) -> Kept:
        quality, subsampling = self.config.quality, self.config.subsampling
        if self.config.kind == "raw":
            return KeptRaw(images_NHWC, class_ids)
        if self.config.kind == "files":
            return KeptFiles.encode(images_NHWC, class_ids, quality=quality, subsampling=subsampling)
        return KeptStrips(strip.encode(images_NHWC, class_ids, quality=quality, subsampling=subsampling))

    def draw(
        self, size: int, *, seed: int, step: int, strategy: Strategy = "uniform", exclude_tasks: tuple[int, ...] = ()
    ) -> Batch:
        """A replay minibatch, drawn as the service draws."""
        tasks, layout = self._plan_of_tasks()
        request = Request(size=size, seed=seed, step=step, strategy=strategy, exclude_tasks=exclude_tasks)
        return self._batch([(tasks[index], rows) for index, rows in plan(layout, request)])

    def _plan_of_tasks(self) -> tuple[list[int], Layout]:
        if self._layout is None:
            tasks = sorted(task for task, kept in self._kept.items() if len(kept.class_ids))
            self._layout = tasks, Layout([self._entry(task) for task in tasks])
        return self._layout

    def _entry(self, task: int) -> PackEntry:
        kept = self._kept[task]
        classes, counts = np.unique(kept.class_ids, return_counts=True)
        runs = [(int(class_id), int(count)) for class_id, count in zip(classes, counts, strict=True)]
        return PackEntry(
            digest=f"{task:064x}",
            task=task,
            bytes=kept.used_bytes,
            exemplars=len(kept.class_ids),
            quality=self.config.quality,
            runs=runs,
        )

    def everything(self, *, exclude_tasks: tuple[int, ...] = ()) -> Batch:
        """All exemplars, by task, class and rank."""
        tasks = [task for task in sorted(self._kept) if task not in exclude_tasks]
        return self._batch([(task, np.arange(len(self._kept[task].class_ids))) for task in tasks])

    def _batch(self, chosen: Sequence[tuple[int, Rows]]) -> Batch:
        if not chosen:
            return empty_batch()
        return Batch(
            images=np.concatenate([self._kept[task].decode(rows) for task, rows in chosen]),
            class_ids=np.concatenate([self._kept[task].class_ids[rows] for task, rows in chosen]),
            tasks=np.concatenate([np.full(len(rows), task, np.int64) for task, rows in chosen]),
            rows=np.concatenate([rows for _, rows in chosen]),
        )

    @property
    def is_lossy(self) -> bool:
        """Whether the kind is a JPEG one."""
        return self.config.kind != "raw"

    @property
    def used_bytes(self) -> int:
        """Bytes of all exemplars, by the accounting of this file's first lines."""
        return sum(kept.used_bytes for kept in self._kept.values())

    def describe(self) -> dict[str, Any]:
        """What is kept, as JSON for the report."""
        return {
            "kind": self.config.kind,
            "quality": None if self.config.kind == "raw" else self.config.quality,
            "budget_bytes": self.config.budget_bytes,
            "per": self.config.per,
            "used_bytes": self.used_bytes,
            "exemplars": sum(len(kept.class_ids) for kept in self._kept.values()),
            "tasks": {str(task): len(kept.class_ids) for task, kept in sorted(self._kept.items())},
        }

    def state_dict(self) -> dict[str, Any]:
        """All exemplars as tensors."""
        return {"kind": self.config.kind, "tasks": {task: kept.state() for task, kept in self._kept.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Become the memory whose `state_dict` this is.

        Raises:
            Conflict: it was a memory of another kind.
        """
        if state["kind"] != self.config.kind:
            raise Conflict(f"the checkpoint holds a memory of kind {state['kind']!r}, this one is {self.config.kind!r}")
        self._kept = {int(task): KEPT[self.config.kind].from_state(kept) for task, kept in state["tasks"].items()}
        self._layout = None


def kept_classes(class_ids: ClassIds) -> list[int]:
    """Distinct class ids, ascending."""
    return [int(class_id) for class_id in np.unique(class_ids)]


def _shares_of(leaves: Mapping[tuple[int, int], int], task: int) -> dict[int, int]:
    return {class_id: share for (place, class_id), share in leaves.items() if place == task}
