"""Keeps a few originals of each class of a task, so that a map can show what was uploaded beside what is stored.

A sample is drawn when an upload is committed: of each class the images with the smallest of some random numbers, so
that over several uploads it is uniform over all of them. It is no part of the budget. A row of its task names it:

    DATA/samples/DIGEST     a line of JSON, then the images as PNG files, back to back

A sample obeys what is removed: that of a task, a class or a buffer goes with it, and whoever removes or relabels
exemplars by key does so to the originals of that key, stored or not. Where single exemplars have no key, an original
cannot be told to be theirs, and those of their class in that task go.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from sqlalchemy import select
from sqlalchemy.orm import Session

from engram import files
from engram.content import Content, Task
from engram.errors import EngramError, NotFound, StripCorrupt
from engram.fields import KEY
from engram.memory import Where
from engram.selection.embedding import UInt8Array
from engram.selection.images import CHUNK_VALUES, Images

from .tables import TaskRow

logger = logging.getLogger(__name__)

IntArray = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]

MAX_SAMPLE_BYTES = 2**26
"""Of the pixels of one task's sample: of large images, or of very many classes, fewer are kept of each."""

_NAME = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, eq=False)
class Sample:
    """Originals of one task as PNG files. `draws` are the random numbers by which they were drawn; a key may be ""."""

    class_ids: IntArray
    draws: npt.NDArray[np.float64]
    keys: list[str]
    pictures: list[bytes]

    def __len__(self) -> int:
        return len(self.pictures)

    def select(self, rows: Iterable[int]) -> Sample | None:
        """These of them; None if there are none."""
        index = np.fromiter(rows, np.int64)
        if not len(index):
            return None
        some = index.tolist()
        return Sample(
            self.class_ids[index],
            self.draws[index],
            [self.keys[row] for row in some],
            [self.pictures[row] for row in some],
        )

    def pixels(self) -> UInt8Array:
        """The originals, uint8 [N, H, W, C]."""
        images = [np.asarray(Image.open(io.BytesIO(each), formats=("PNG",))) for each in self.pictures]
        return np.stack([each if each.ndim == 3 else each[..., None] for each in images])

    def to_bytes(self) -> bytes:
        """As the module docstring says."""
        head = {
            "class_ids": self.class_ids.tolist(),
            "draws": self.draws.tolist(),
            "keys": self.keys,
            "bytes": [len(each) for each in self.pictures],
        }
        return json.dumps(head).encode() + b"\n" + b"".join(self.pictures)

    @classmethod
    def from_bytes(cls, data: bytes) -> Sample:
        """The inverse of `to_bytes`."""
        line, _, rest = data.partition(b"\n")
        head = json.loads(line)
        ends = np.cumsum(head["bytes"]).tolist()
        pictures = [rest[end - size : end] for end, size in zip(ends, head["bytes"], strict=True)]
        return cls(np.array(head["class_ids"], np.int64), np.array(head["draws"]), head["keys"], pictures)


Resample = Callable[[Content, Content, Mapping[int, Sample]], Mapping[int, Sample | None]]
"""What a change of a content, from the first to the second, makes of the samples of its tasks: those that change."""


class SampleFolder:
    """Samples as files named by their SHA-256, in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def put(self, sample: Sample | None) -> str | None:
        """The digest of the sample, which is on disk; None if it is None, or the disk does not take it."""
        if sample is None:
            return None
        data = sample.to_bytes()
        digest = hashlib.sha256(data).hexdigest()
        try:
            files.write_durably(self.folder / digest, data)
        except EngramError as error:
            logger.warning("no originals are kept for a map: %s", error)
            return None
        return digest

    def exists(self, digest: str | None) -> bool:
        """Whether the sample of this digest is on disk; that of None is."""
        return digest is None or (self.folder / digest).exists()

    def get(self, digest: str) -> Sample | None:
        """The sample; None if it is gone or damaged: nothing depends on it."""
        try:
            data = (self.folder / digest).read_bytes()
            if hashlib.sha256(data).hexdigest() != digest:
                raise StripCorrupt(f"sample {digest} does not match its name")
        except (OSError, EngramError) as error:
            logger.warning("a sample of originals cannot be read: %s", error)
            return None
        return Sample.from_bytes(data)

    def picture(self, digest: str, number: int) -> bytes | None:
        """One original of a sample as a PNG file, without reading the others; None if it is not there."""
        try:
            with (self.folder / digest).open("rb") as file:
                sizes = json.loads(file.readline())["bytes"]
                if not 0 <= number < len(sizes):
                    return None
                file.seek(sum(sizes[:number]), os.SEEK_CUR)
                return file.read(sizes[number])
        except (OSError, ValueError) as error:
            logger.warning("a sample of originals cannot be read: %s", error)
            return None

    def old(self, older_than_s: float) -> Iterator[Path]:
        """Files of samples, or that were to become some, which were written so long ago."""
        now = time.time()
        for entry in os.scandir(self.folder) if self.folder.is_dir() else ():
            is_ours = _NAME.fullmatch(entry.name) or entry.name.endswith(".tmp")
            if is_ours and now - entry.stat().st_mtime > older_than_s:
                yield Path(entry.path)


def named(session: Session, digests: Sequence[str]) -> set[str]:
    """Those of these samples that a task has."""
    return {digest for digest in session.scalars(select(TaskRow.sample).where(TaskRow.sample.in_(digests))) if digest}


class OfBuffer(Mapping[int, Sample]):
    """The samples of a buffer's tasks, each read when it is asked for; one that cannot be read is as good as none."""

    def __init__(self, session: Session, folder: SampleFolder, buffer: str) -> None:
        rows = session.execute(select(TaskRow.task, TaskRow.sample).where(TaskRow.buffer == buffer))
        self._digests = {task: digest for task, digest in rows if digest is not None}
        self._folder = folder

    def __getitem__(self, task: int) -> Sample:
        found = self._folder.get(self._digests[task])
        if found is None:
            raise KeyError(task)
        return found

    def __iter__(self) -> Iterator[int]:
        return iter(self._digests)

    def __len__(self) -> int:
        return len(self._digests)


def of_task(session: Session, buffer: str, task: int) -> str | None:
    """The digest of the sample that a task has, None if it has none."""
    return session.scalar(select(TaskRow.sample).where(TaskRow.buffer == buffer, TaskRow.task == task))


def draw(images: Images, per_class: int, seed: str) -> Sample | None:
    """Some originals of each class of an upload, always the same of one seed; None if none are wanted.

    The class ids are those of the images: places of names where these were uploaded.
    """
    class_ids = np.asarray(images.class_ids)
    bits = np.random.Philox(key=int.from_bytes(hashlib.sha256(seed.encode()).digest()[:16]))
    draws = np.random.Generator(bits).random(len(class_ids))
    rows = np.sort(_first(class_ids, draws, _room(per_class, len(np.unique(class_ids)), images.shape)))
    if not len(rows):
        return None
    step = max(1, CHUNK_VALUES // int(np.prod(images.shape)))
    pictures = [_png(image) for at in range(0, len(rows), step) for image in images.read(rows[at : at + step])]
    keys = [""] * len(rows)
    if images.schema.has_key:
        keys = [str(key) for key in images.schema.decode(images.records(rows), frozenset({KEY}))[KEY]]
    return Sample(class_ids[rows], draws[rows], keys, pictures)


def joined(
    before: Content,
    after: Content,
    held: Mapping[int, Sample],
    *,
    task: int,
    drawn: Sample,
    names: Sequence[str] | None,
    per_class: int,
) -> dict[int, Sample | None]:
    """The task's sample with what was drawn of an upload."""
    class_ids = drawn.class_ids
    if names is not None:
        ids = {name: class_id for class_id, name in after.class_names.items()}
        class_ids = np.array([ids[name] for name in names], np.int64)[class_ids]
    both = replace(drawn, class_ids=class_ids)
    old = held.get(task)
    if old is not None:
        both = Sample(
            np.concatenate([old.class_ids, class_ids]),
            np.concatenate([old.draws, drawn.draws]),
            old.keys + drawn.keys,
            old.pictures + drawn.pictures,
        )
    assert after.shape is not None, "an upload sets the shape"
    room = _room(per_class, len(np.unique(both.class_ids)), after.shape)
    return {task: both.select(np.sort(_first(both.class_ids, both.draws, room)).tolist())}


def without(
    before: Content, after: Content, held: Mapping[int, Sample], *, where: Where, otherwise: NotFound | None = None
) -> dict[int, Sample | None]:
    """The samples without the originals that `where` names, or may name.

    Raises:
        NotFound: there is none and `otherwise` says so.
    """
    found: dict[int, Sample | None] = {}
    for task, sample, is_named, _ in _meant(before, held, where):
        found[task] = None if sample is None else sample.select(np.flatnonzero(~is_named))
    if not found and otherwise is not None:
        raise otherwise
    return found


def relabelled(
    before: Content, after: Content, held: Mapping[int, Sample], *, where: Where, class_id: int
) -> dict[int, Sample | None]:
    """The samples with the originals that `where` names in another class; without those that it only may name."""
    found: dict[int, Sample | None] = {}
    for task, sample, is_named, is_certain in _meant(before, held, where):
        if sample is None:
            found[task] = None
        elif is_certain:
            found[task] = replace(sample, class_ids=np.where(is_named, class_id, sample.class_ids))
        else:
            found[task] = sample.select(np.flatnonzero(~is_named))
    return found


def _meant(
    before: Content, held: Mapping[int, Sample], where: Where
) -> Iterator[tuple[int, Sample | None, Mask, bool]]:
    """Of each task with originals that are named: the sample, which these are, and whether that is certain.

    A sample that cannot be read is None: it may hold what is named, so it has to go as a whole.
    """
    for task in held:
        if where.task not in (None, task):
            continue
        sample = held.get(task)
        if sample is None:
            yield task, None, np.empty(0, np.bool_), False
            continue
        is_named = np.array([where.names(class_id) for class_id in sample.class_ids.tolist()], np.bool_)
        keys = where.keys
        if where.rank is not None and before.schema.has_key:
            keys = _key_at(before.tasks[task], where)
        if keys is not None:
            wanted = {*keys}
            is_named &= np.array([key in wanted for key in sample.keys], np.bool_)
        if is_named.any():
            yield task, sample, is_named, where.rank is None or keys is not None


def _key_at(task: Task, where: Where) -> tuple[str, ...]:
    """The key of the exemplar at a rank of a class."""
    exemplars = task.load()
    assert where.rank is not None, "it was asked for"
    rows = np.empty(0, np.int64) if exemplars is None else np.flatnonzero(exemplars.class_ids == where.class_id)
    if exemplars is None or where.rank >= len(rows):
        return ()
    return (str(exemplars.select(rows[where.rank : where.rank + 1]).fields(frozenset({KEY}))[KEY][0]),)


def _room(per_class: int, classes: int, shape: tuple[int, int, int]) -> int:
    return min(per_class, MAX_SAMPLE_BYTES // (max(1, classes) * int(np.prod(shape))))


def _first(class_ids: IntArray, draws: npt.NDArray[np.float64], count: int) -> IntArray:
    """The rows of each class with the `count` smallest draws."""
    order = np.lexsort((draws, class_ids))
    ordered = class_ids[order]
    begins = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))
    ranks = np.arange(len(order)) - np.repeat(begins, np.diff(np.append(begins, len(order))))
    return order[ranks < count]


def _png(image: UInt8Array) -> bytes:
    out = io.BytesIO()
    Image.fromarray(image if image.shape[2] == 3 else image[..., 0]).save(out, "PNG", compress_level=1)
    return out.getvalue()
