"""The memories that Engram is compared with in the same bytes: raw pixels, and one JPEG file per exemplar.

Shares are split by the same `engram.shares`. What one exemplar costs, its class id counted as 2 bytes:

    raw      height * width * channels + 2 + its fields
    files    the bytes of one JPEG file of its own (optimised tables) + 2 + its fields

Fields count as the bytes of their records in a pack: float16 [C] is 2 C. The key of an exemplar is not counted: it says
which slot is meant, as an index into an array would. (In packs it is stored, and counted.)

Images are uint8 `[N, H, W, C]`.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self, get_args

import numpy as np
import numpy.typing as npt
import simplejpeg
import torch
from PIL import Image

from engram import shares
from engram.batch import Batch
from engram.content import Policy, shares_of
from engram.draw import Plan
from engram.errors import BudgetExceeded
from engram.fields import KEY, Column, Schema
from engram.schemas import IngestOptions, Subsampling
from engram.selection import ranking
from engram.strip import runs_of
from engram_trainer.examples import ClassIds, Images, Rows
from engram_trainer.local_memory import (
    Kind,
    LocalConfig,
    LocalMemory,
    NetworkEmbedder,
    StripMemory,
    as_tensor,
    exchange_seed,
)
from engram_trainer.memory import KeptBy, Learned, rows_of

CLASS_ID_BYTES = 2
# No JPEG file is smaller without its tables, so a share is never ranked deeper than share / floor.
FLOOR_BYTES = 64
# So many images at most are read and encoded at once: about as many again may turn out not to fit.
ENCODED_AT_ONCE = 256


def local_memory(config: LocalConfig, options: IngestOptions | None = None) -> LocalMemory:
    """An empty memory; `options` say how strips choose their quality."""
    if config.kind not in get_args(Kind):
        raise ValueError(f"memory kind {config.kind!r} is not one of {', '.join(get_args(Kind))}")
    if config.kind != "strips":
        return PlainMemory(config)
    policy = Policy(config.budget_bytes, config.per, config.share_by, config.subsampling, config.quality)
    return StripMemory(policy, options or IngestOptions(ranking=config.ranking), config.fields)


class Coded(Protocol):
    """Images as they are kept."""

    @property
    def sizes(self) -> Rows:
        """Bytes of each."""

    def select(self, rows: Rows) -> Self:
        """These, in this order."""

    def joined(self, *others: Self) -> Self:
        """These, then the others."""

    def decode(self, rows: Rows) -> Images:
        """The pixels of some."""

    def state(self) -> dict[str, torch.Tensor]:
        """As tensors, for a checkpoint."""

    @classmethod
    def from_state(cls, state: Mapping[str, torch.Tensor]) -> Self:
        """The inverse of `state`."""


@dataclass(frozen=True, eq=False)
class RawPixels:
    """Images as their pixels."""

    images: Images

    @property
    def sizes(self) -> Rows:
        """Bytes of each."""
        return np.full(len(self.images), int(np.prod(self.images.shape[1:])), np.int64)

    def select(self, rows: Rows) -> RawPixels:
        """These, in this order."""
        return RawPixels(self.images[rows])

    def joined(self, *others: RawPixels) -> RawPixels:
        """These, then the others."""
        return RawPixels(np.concatenate([self.images, *(other.images for other in others)]))

    def decode(self, rows: Rows) -> Images:
        """The pixels of some."""
        return self.images[rows]

    def state(self) -> dict[str, torch.Tensor]:
        """As tensors."""
        return {"images": torch.from_numpy(self.images)}

    @classmethod
    def from_state(cls, state: Mapping[str, torch.Tensor]) -> RawPixels:
        """The inverse of `state`."""
        return cls(state["images"].numpy())


@dataclass(frozen=True, eq=False)
class JpegFiles:
    """Images as one JPEG file each."""

    files: tuple[bytes, ...]
    shape: tuple[int, int, int]

    @classmethod
    def encode(cls, images_NHWC: Images, *, quality: int, subsampling: Subsampling) -> JpegFiles:
        """One file per image, Huffman tables fitted to it."""
        height, width, channels = images_NHWC.shape[1:]
        return cls(tuple(_jpeg(image, quality, subsampling) for image in images_NHWC), (height, width, channels))

    @property
    def sizes(self) -> Rows:
        """Bytes of each."""
        return np.array([len(file) for file in self.files], np.int64)

    def select(self, rows: Rows) -> JpegFiles:
        """These, in this order."""
        return JpegFiles(tuple(self.files[row] for row in rows), self.shape)

    def joined(self, *others: JpegFiles) -> JpegFiles:
        """These, then the others."""
        return JpegFiles((*self.files, *(file for other in others for file in other.files)), self.shape)

    def decode(self, rows: Rows) -> Images:
        """The pixels of some."""
        images = np.empty((len(rows), *self.shape), np.uint8)
        for place, row in enumerate(rows):
            images[place] = simplejpeg.decode_jpeg(self.files[row], "GRAY" if self.shape[2] == 1 else "RGB")
        return images

    def state(self) -> dict[str, torch.Tensor]:
        """As tensors: the files back to back, and their lengths."""
        return {**_packed("data", self.files), "shape": torch.tensor(self.shape)}

    @classmethod
    def from_state(cls, state: Mapping[str, torch.Tensor]) -> JpegFiles:
        """The inverse of `state`."""
        height, width, channels = state["shape"].tolist()
        return cls(_unpacked("data", state), (height, width, channels))


def _jpeg(image: Images, quality: int, subsampling: Subsampling) -> bytes:
    out = io.BytesIO()
    if image.shape[2] == 1:
        Image.fromarray(image[..., 0]).save(out, "JPEG", quality=quality, optimize=True)
    else:
        Image.fromarray(image).save(out, "JPEG", quality=quality, optimize=True, subsampling=subsampling)
    return out.getvalue()


def _packed(name: str, texts: Sequence[bytes]) -> dict[str, torch.Tensor]:
    """Byte strings as tensors: back to back, and their lengths."""
    return {name: as_tensor(b"".join(texts)), f"{name}_lengths": torch.tensor([len(text) for text in texts])}


def _unpacked(name: str, state: Mapping[str, torch.Tensor]) -> tuple[bytes, ...]:
    data, lengths = state[name].numpy().tobytes(), state[f"{name}_lengths"]
    ends = np.cumsum(lengths.numpy().astype(np.int64))
    return tuple(data[end - length : end] for end, length in zip(ends, lengths.int().tolist(), strict=True))


CODED: dict[Kind, type[RawPixels] | type[JpegFiles]] = {"raw": RawPixels, "files": JpegFiles}


@dataclass(frozen=True, eq=False)
class Kept:
    """The exemplars of one task: classes ascending, within a class in rank order."""

    coded: Any
    """A `Coded`."""
    class_ids: ClassIds
    records: tuple[bytes, ...] = ()
    """Their fields as packs have them, without the key; nothing where there are none."""
    keys: tuple[str, ...] = ()

    @property
    def sizes(self) -> Rows:
        """Bytes of each exemplar with all that is counted."""
        extra = np.array([len(record) for record in self.records], np.int64) if self.records else 0
        sizes: Rows = self.coded.sizes + CLASS_ID_BYTES + extra
        return sizes

    @property
    def class_bytes(self) -> dict[int, int]:
        """Bytes of each class."""
        sizes = self.sizes
        return {c: int(sizes[self.class_ids == c].sum()) for c in kept_classes(self.class_ids)}

    def select(self, rows: Rows) -> Kept:
        """These exemplars, in this order."""
        return Kept(
            self.coded.select(rows),
            self.class_ids[rows],
            tuple(self.records[row] for row in rows) if self.records else (),
            tuple(self.keys[row] for row in rows) if self.keys else (),
        )

    def joined(self, *others: Kept) -> Kept:
        """These, then the others."""
        return Kept(
            self.coded.joined(*(other.coded for other in others)),
            np.concatenate([self.class_ids, *(other.class_ids for other in others)]),
            (*self.records, *(record for other in others for record in other.records)),
            (*self.keys, *(key for other in others for key in other.keys)),
        )

    def fit(self, share_of: Mapping[int, int]) -> Kept:
        """The largest prefix of each class that its share holds."""
        sizes = self.sizes
        kept = []
        for class_id in np.unique(self.class_ids):
            rows = np.flatnonzero(self.class_ids == class_id)
            kept.append(rows[np.cumsum(sizes[rows]) <= share_of[int(class_id)]])
        return self.select(np.concatenate(kept) if kept else np.arange(0))

    def without(self, keys: set[str]) -> Kept:
        """The exemplars that have none of these keys."""
        return self.select(np.flatnonzero([key not in keys for key in self.keys]))

    def fields(self, schema: Schema, rows: Rows) -> dict[str, Column]:
        """The columns of some exemplars by name, their keys included."""
        found: dict[str, Column] = schema.decode([self.records[row] for row in rows]) if schema else {}
        return {**found, KEY: [self.keys[row] for row in rows]} if self.keys else found

    def state(self) -> dict[str, torch.Tensor]:
        """As tensors, for a checkpoint."""
        own = {"class_ids": torch.from_numpy(self.class_ids), **_packed("records", self.records)}
        return {**self.coded.state(), **own, **_packed("keys", [key.encode() for key in self.keys])}

    @classmethod
    def from_state(cls, kind: Kind, state: Mapping[str, torch.Tensor]) -> Kept:
        """The inverse of `state`."""
        keys = tuple(key.decode() for key in _unpacked("keys", state))
        return cls(CODED[kind].from_state(state), state["class_ids"].numpy(), _unpacked("records", state), keys)


class PlainMemory(LocalMemory):
    """Pixels, or one JPEG file each."""

    def __init__(self, config: LocalConfig) -> None:
        self.config, self.kind = config, config.kind
        self.policy = Policy(config.budget_bytes, config.per, config.share_by, quality=config.quality)
        self.schema = Schema.declare(config.fields)
        self._counted = Schema.declare({name: kind for name, kind in self.schema.declared.items() if name != KEY})
        self._keep({})

    def add(self, learned: Learned) -> None:
        """As `LocalMemory.add`; a task that is there already stays as it is."""
        if learned.task in self._kept:
            return
        examples, task = learned.examples, learned.task
        columns = self.schema.columns(learned.fields, len(examples))
        share = self._shares(task, examples.class_ids)
        parts: list[Kept] = []
        for class_id, ranked in self._ranked(learned, share[task]):
            spent, done = 0, 0
            while done < len(ranked) and spent <= share[task][class_id]:
                rows = ranked[done : done + ENCODED_AT_ONCE]
                given = {name: rows_of(column, rows) for name, column in columns.values.items()}
                parts.append(self._encoded(examples.images.read(rows), examples.class_ids[rows], given))
                spent, done = spent + int(parts[-1].sizes.sum()), done + len(rows)
        self._adopt(task, parts[0].joined(*parts[1:]), share)

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
        gone = {*drop}
        left = {place: kept.without(gone) if gone & {*kept.keys} else kept for place, kept in self._kept.items()}
        self._keep({place: kept for place, kept in left.items() if len(kept.class_ids)})
        if not len(keys):
            return
        columns = self.schema.columns({**fields, KEY: list(keys)}, len(keys))
        kept = self._encoded(images_NHWC, class_ids, dict(columns.values))
        share = self._shares(task, class_ids)
        if task in self._kept:
            kept = self._kept[task].joined(kept)
        rng = np.random.Generator(np.random.Philox(key=exchange_seed(keys)))
        ranked = []
        for class_id in np.unique(kept.class_ids):
            rows = np.flatnonzero(kept.class_ids == class_id)
            new = int((class_ids == class_id).sum())
            stored = len(rows) - new
            ranked.append(rows[ranking.order(stored, new, seen=stored, method=kept_by, rng=rng)])
        try:
            self._adopt(task, kept.select(np.concatenate(ranked)), share)
        except BudgetExceeded:
            if not self._kept:
                raise

    def keys(self) -> set[str]:
        """The keys of all exemplars; none where they have no keys."""
        return {key for kept in self._kept.values() for key in kept.keys}

    def sizes(self, images_NHWC: Images, class_ids: ClassIds, fields: Mapping[str, npt.NDArray[Any]]) -> Rows:
        """The bytes of these images as exemplars."""
        return self._encoded(images_NHWC, class_ids, dict(self.schema.columns(fields, len(images_NHWC)).values)).sizes

    def _shares(self, task: int, class_ids: ClassIds) -> dict[int, dict[int, int]]:
        """The bytes of each class of each task, once these images have come to one."""
        classes = {place: kept_classes(kept.class_ids) for place, kept in self._kept.items()}
        classes[task] = sorted({*classes.get(task, ()), *kept_classes(class_ids)})
        if self.policy.share_by != "none":
            return shares_of(self.policy, classes)
        total = shares.limit(
            self.policy.budget_bytes,
            per=self.policy.per,
            classes=len({class_id for of in classes.values() for class_id in of}),
        )
        held = {place: kept.class_bytes for place, kept in self._kept.items()}
        here = self._kept.get(task)
        each_bytes = 1 if here is None else int(here.sizes.mean())
        coming = {c: each_bytes * int((class_ids == c).sum()) for c in kept_classes(class_ids)}
        return shares.room(total, held, task=task, coming=coming)

    def _ranked(self, learned: Learned, share: Mapping[int, int]) -> Iterator[tuple[int, Rows]]:
        """The rows of each class, ascending, by rank; no deeper than a share could reach."""
        generator, examples = np.random.default_rng(learned.seed), learned.examples
        floor = int(np.prod(examples.shape)) if self.kind == "raw" else FLOOR_BYTES
        for class_id in examples.classes:
            rows = np.flatnonzero(examples.class_ids == class_id)
            depth = min(len(rows), share[class_id] // floor + 1)
            if self.config.ranking == "herding" and learned.embed is not None:
                embedder = NetworkEmbedder(learned.embed, None)
                features_ND = np.concatenate([embedder.embed(chunk) for chunk in examples.select(rows).chunks()])
                yield class_id, rows[ranking.rank(features_ND, depth, method="herding")]
            else:
                yield class_id, generator.permutation(rows)[:depth]

    def _encoded(self, images_NHWC: Images, class_ids: ClassIds, fields: Mapping[str, Any]) -> Kept:
        """These images as exemplars; `fields` are columns of the declared types."""
        count = len(images_NHWC)
        coded: Any = RawPixels(np.array(images_NHWC))
        if self.kind == "files":
            assert self.config.quality is not None, "files have a quality"
            quality, subsampling = self.config.quality, self.config.subsampling
            coded = JpegFiles.encode(images_NHWC, quality=quality, subsampling=subsampling)
        records: tuple[bytes, ...] = ()
        if self._counted:
            given = {name: column for name, column in fields.items() if name != KEY}
            records = tuple(self._counted.columns(given, count).records(np.arange(count)))
        keys = tuple(map(str, fields[KEY])) if self.schema.has_key else ()
        return Kept(coded, np.asarray(class_ids, np.int64), records, keys)

    def _adopt(self, task: int, kept: Kept, share: Mapping[int, Mapping[int, int]]) -> None:
        """The task has as much of this as its shares hold, and the others what theirs do.

        Raises:
            BudgetExceeded: that is not one exemplar.
        """
        fitting = kept.fit(share[task])
        if len(fitting.class_ids) == 0:
            heads = np.unique(kept.class_ids, return_index=True)[1]
            raise BudgetExceeded(
                f"not one exemplar of task {task} fits: a class there has at most {max(share[task].values())} bytes of "
                f"a budget of {self.config.budget_bytes}, and the smallest exemplar at the head of one needs "
                f"{kept.sizes[heads].min()}; raise the budget"
            )
        self._keep(
            {place: old.fit(share[place]) for place, old in self._kept.items() if place != task} | {task: fitting}
        )

    @property
    def quality(self) -> int | None:
        """Of all files."""
        return None if self.kind == "raw" else self.config.quality

    def reader(self) -> Callable[[Plan], Batch]:
        """What gives the exemplars of now that a plan names."""
        kept, schema = self._kept, self._counted
        return lambda chosen: _batch(kept, schema, chosen)

    def state_dict(self) -> dict[str, Any]:
        """All exemplars as tensors."""
        return {"kind": self.kind, "tasks": {task: kept.state() for task, kept in self._kept.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Become the memory whose `state_dict` this is."""
        self._check_kind(state)
        self._keep({int(task): Kept.from_state(self.kind, kept) for task, kept in state["tasks"].items()})

    def _keep(self, kept: dict[int, Kept]) -> None:
        self._kept = dict(sorted(kept.items()))
        self._hold((task, int(each.sizes.sum()), runs_of(each.class_ids)) for task, each in kept.items())


def _batch(kept: Mapping[int, Kept], schema: Schema, chosen: Plan) -> Batch:
    """The exemplars that a plan names, by task ascending."""
    parts = [(kept[int(task)], chosen.rows[chosen.tasks == task]) for task in np.unique(chosen.tasks)]
    columns = [part.fields(schema, rows) for part, rows in parts]
    return Batch(
        images=np.concatenate([part.coded.decode(rows) for part, rows in parts]),
        class_ids=np.concatenate([part.class_ids[rows] for part, rows in parts]),
        tasks=chosen.tasks,
        rows=chosen.rows,
        fields={name: _joined([each[name] for each in columns]) for name in columns[0]},
    )


def _joined(columns: Sequence[Any]) -> Column:
    if isinstance(columns[0], np.ndarray):
        return np.concatenate(columns)
    return [cell for column in columns for cell in column]


def kept_classes(class_ids: ClassIds) -> list[int]:
    """Distinct class ids, ascending."""
    return [int(class_id) for class_id in np.unique(class_ids)]
