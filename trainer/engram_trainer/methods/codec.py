"""Show a task's own images as JPEG gives them back, some of them, where the memory's exemplars are JPEG.

New images are clean and exemplars are not. Without this the marks of compression come to mean "old class", and clean
test images of old classes are taken for new ones. Where the memory is of raw pixels nothing changes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engram import strip
from engram.schemas import CANDIDATE_QUALITIES
from engram_trainer.examples import ArraySet, Examples, Images, ImageSet, Joined, Rows, Shape
from engram_trainer.memory import Memory
from engram_trainer.methods.training import Training
from engram_trainer.steps import CODEC, Minibatch
from engram_trainer.stream import Task

Order = Callable[[np.random.Generator], Rows]

AT_ONCE_BYTES = 2**28
"""A task whose images are at hand and take less is coded once: 16 images of 32x32 alone take 4 ms, which counts beside
a step on a GPU, 10,000 at once 0.2 s (measured)."""


@dataclass(frozen=True)
class Coding(Training):
    """How a task is trained, and how many of its images are shown coded."""

    codec_ratio: float = 0.0
    """Part of a task's own images that an epoch shows as JPEG gives them back, where the memory's are JPEG."""
    codec_qualities: tuple[int, ...] = CANDIDATE_QUALITIES
    """The qualities of these; each image draws one for the task."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.codec_ratio <= 1:
            raise ValueError(f"codec_ratio must be in 0..1, not {self.codec_ratio}")

    def shown(self, task: Task, memory: Memory, *, seed: int) -> tuple[Examples, Order | None]:
        """What a phase on this task walks through, and in which order: its images, or those and, behind them, all of
        them coded, of which every epoch takes each image once, in one of its two forms."""
        if not memory.is_lossy or not self.codec_ratio:
            return task.train, None
        clean, count = task.train.images, len(task.train)
        drawn = np.random.default_rng([seed, CODEC, task.index])
        coded: ImageSet = Coded(clean, drawn.permutation(np.resize(np.array(self.codec_qualities), count)))
        if clean.is_at_hand and count * int(np.prod(clean.shape)) <= AT_ONCE_BYTES:
            coded = ArraySet(coded.read(np.arange(count)))

        def order(generator: np.random.Generator) -> Rows:
            is_coded = generator.random(count) < self.codec_ratio
            rows: Rows = generator.permutation(count) + np.where(is_coded, count, 0)
            return rows

        return Examples(Joined([clean, coded]), np.tile(task.train.class_ids, 2)), order


def originals(new: Minibatch, task: Task) -> tuple[Rows, Images]:
    """Which of a task's own images these are, and all of them as they are, those that were shown coded, too."""
    rows = new.rows % len(task.train)
    is_coded = rows != new.rows
    if not is_coded.any():
        return rows, new.plain_NHWC
    images_NHWC = new.plain_NHWC.copy()
    images_NHWC[is_coded] = task.train.images.read(rows[is_coded])
    return rows, images_NHWC


@dataclass(frozen=True, eq=False)
class Coded:
    """Images after JPEG encoding and decoding as in an Engram pack, each at a quality of its own."""

    base: ImageSet
    quality_N: npt.NDArray[np.int64]

    is_at_hand = False

    @property
    def shape(self) -> Shape:
        """As of the images."""
        return self.base.shape

    def __len__(self) -> int:
        return len(self.base)

    def read(self, rows: Rows) -> Images:
        """These images in this order, coded."""
        images_NHWC = self.base.read(rows)
        coded = np.empty_like(images_NHWC)
        qualities = self.quality_N[rows]
        for quality in np.unique(qualities):
            here = np.flatnonzero(qualities == quality)
            encoded = strip.encode(images_NHWC[here], np.zeros(len(here), np.int64), quality=int(quality))
            coded[here] = encoded.decode()
        return coded
