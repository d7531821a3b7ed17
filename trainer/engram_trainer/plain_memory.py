"""The memories that Engram is compared with in the same bytes: raw pixels, and one JPEG file per exemplar.

Shares are split by the same `engram.shares`. What one exemplar costs, its class id counted as 2 bytes:

    raw      height * width * channels + 2
    files    the bytes of one JPEG file of its own (optimised tables) + 2

Images are uint8 `[N, H, W, C]`.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, get_args

import numpy as np
import simplejpeg
import torch
from PIL import Image

from engram.batch import Batch
from engram.content import Policy, shares_of
from engram.draw import Plan
from engram.errors import BudgetExceeded
from engram.schemas import IngestOptions, Subsampling
from engram.selection import ranking
from engram.strip import runs_of
from engram_trainer.datasets import ClassIds, Images
from engram_trainer.local_memory import Kind, LocalConfig, LocalMemory, NetworkEmbedder, Rows, StripMemory, as_tensor
from engram_trainer.memory import Learned

CLASS_ID_BYTES = 2
# No JPEG file is smaller without its tables, so a share is never ranked deeper than share / floor.
FLOOR_BYTES = 64


def local_memory(config: LocalConfig, options: IngestOptions | None = None) -> LocalMemory:
    """An empty memory; `options` say how strips choose their quality."""
    if config.kind not in get_args(Kind):
        raise ValueError(f"memory kind {config.kind!r} is not one of {', '.join(get_args(Kind))}")
    if config.kind != "strips":
        return PlainMemory(config)
    policy = Policy(config.budget_bytes, config.per, config.share_by, config.subsampling, config.quality)
    return StripMemory(policy, options or IngestOptions(ranking=config.ranking))


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
            "data": as_tensor(b"".join(self.files)),
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


KEPT: dict[Kind, Any] = {"raw": KeptRaw, "files": KeptFiles}


class PlainMemory(LocalMemory):
    """Pixels, or one JPEG file each."""

    def __init__(self, config: LocalConfig) -> None:
        self.config, self.kind = config, config.kind
        self._keep({})

    def add(self, learned: Learned) -> None:
        """As `LocalMemory.add`; a task that is there already stays as it is."""
        if learned.task in self._kept:
            return
        config, task, class_ids = self.config, learned.task, learned.class_ids
        classes = {place: kept_classes(kept.class_ids) for place, kept in self._kept.items()}
        classes[task] = kept_classes(class_ids)
        share = shares_of(Policy(config.budget_bytes, config.per, config.share_by), classes)
        ranked = self._rank(learned, share[task])
        kept = self._encode(learned.images_NHWC[ranked], class_ids[ranked]).fit(share[task])
        if len(kept.class_ids) == 0:
            raise BudgetExceeded(
                f"not one exemplar of task {task} fits: its {len(share[task])} classes have "
                f"{sum(share[task].values())} bytes of a budget of {config.budget_bytes}; give the memory more bytes"
            )
        self._keep({place: old.fit(share[place]) for place, old in self._kept.items()} | {task: kept})

    def _rank(self, learned: Learned, share: Mapping[int, int]) -> Rows:
        """Rows by class ascending, then rank; no deeper than a share could reach."""
        generator = np.random.default_rng(learned.seed)
        floor = int(np.prod(learned.images_NHWC.shape[1:])) if self.kind == "raw" else FLOOR_BYTES
        ranked = []
        for class_id in np.unique(learned.class_ids):
            rows = np.flatnonzero(learned.class_ids == class_id)
            depth = min(len(rows), share[int(class_id)] // floor + 1)
            if self.config.ranking == "herding" and learned.embed is not None:
                features_ND = NetworkEmbedder(learned.embed, None).embed(learned.images_NHWC[rows])
                ranked.append(rows[ranking.rank(features_ND, depth, method="herding")])
            else:
                ranked.append(generator.permutation(rows)[:depth])
        return np.concatenate(ranked)

    def _encode(self, images_NHWC: Images, class_ids: ClassIds) -> Kept:
        if self.kind == "raw":
            return KeptRaw(images_NHWC, class_ids)
        assert self.config.quality is not None, "files have a quality"
        return KeptFiles.encode(
            images_NHWC, class_ids, quality=self.config.quality, subsampling=self.config.subsampling
        )

    @property
    def quality(self) -> int | None:
        """Of all files."""
        return None if self.kind == "raw" else self.config.quality

    def batch(self, chosen: Plan) -> Batch:
        """The exemplars that a plan names."""
        parts = [(self._kept[int(task)], chosen.rows[chosen.tasks == task]) for task in np.unique(chosen.tasks)]
        return Batch(
            images=np.concatenate([kept.decode(rows) for kept, rows in parts]),
            class_ids=np.concatenate([kept.class_ids[rows] for kept, rows in parts]),
            tasks=chosen.tasks,
            rows=chosen.rows,
        )

    def state_dict(self) -> dict[str, Any]:
        """All exemplars as tensors."""
        return {"kind": self.kind, "tasks": {task: kept.state() for task, kept in self._kept.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Become the memory whose `state_dict` this is."""
        self._check_kind(state)
        self._keep({int(task): KEPT[self.kind].from_state(kept) for task, kept in state["tasks"].items()})

    def _keep(self, kept: dict[int, Kept]) -> None:
        self._kept = kept
        self._hold((task, each.used_bytes, runs_of(each.class_ids)) for task, each in kept.items())


def kept_classes(class_ids: ClassIds) -> list[int]:
    """Distinct class ids, ascending."""
    return [int(class_id) for class_id in np.unique(class_ids)]
