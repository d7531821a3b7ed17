"""The images that selection works on: those of one upload, read in chunks, and what is already stored of their task.

Images are uint8 [N, H, W, C] and never held as a whole: a chunk is some 8 MiB.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from engram.schemas import Subsampling
from engram.selection.embedding import Embedder, FloatArray, Shape, UInt8Array, slices
from engram.strip import Exemplars, concat, encode

IntArray = npt.NDArray[np.int64]

# 8 MiB as bytes, 32 MiB as the float32 of an embedder.
CHUNK_VALUES = 2**23


class Images(Protocol):
    """The images of one upload, wherever they lie."""

    @property
    def class_ids(self) -> IntArray:
        """One class id per image, int64 [N]."""
        ...

    @property
    def shape(self) -> Shape:
        """(H, W, C) of every image."""
        ...

    def read(self, indices: IntArray) -> UInt8Array:
        """These images in this order, [n, H, W, C]. Never asked for more than some 8 MiB at once."""
        ...


@dataclass(frozen=True, eq=False)
class ArrayImages:
    """Images that are an array already."""

    images_NHWC: UInt8Array
    class_ids: IntArray

    @property
    def shape(self) -> Shape:
        """(H, W, C) of every image."""
        height, width, channels = self.images_NHWC.shape[1:]
        return height, width, channels

    def read(self, indices: IntArray) -> UInt8Array:
        """These images in this order."""
        return self.images_NHWC[indices]


NO_IMAGES = ArrayImages(np.empty((0, 0, 0, 0), np.uint8), np.empty(0, np.int64))
"""An upload of nothing."""


@dataclass(frozen=True, eq=False)
class Relabelled:
    """The same images under other class ids."""

    images: Images
    class_ids: IntArray

    @property
    def shape(self) -> Shape:
        """(H, W, C) of every image."""
        return self.images.shape

    def read(self, indices: IntArray) -> UInt8Array:
        """These images in this order."""
        return self.images.read(indices)


class Progress:
    """Turns fractions of the work into counts of images that sum to `total`."""

    def __init__(self, total: int, advance: Callable[[int], None]) -> None:
        self._total = total
        self._advance = advance
        self._told = 0

    def reach(self, fraction: float) -> None:
        """So much of the work is done."""
        count = max(0, int(self._total * fraction) - self._told)
        self._told += count
        self._advance(count)

    def pulse(self) -> None:
        """Nothing to count, but time has passed: a lease wants renewing, or the ingest was cancelled."""
        self._advance(0)


class Pool:
    """What is stored of a task and what an upload brings, numbered through: first the stored rows, then the images."""

    def __init__(
        self, stored: Exemplars | None, images: Images, subsampling: Subsampling, progress: Progress | None = None
    ) -> None:
        self._stored, self._images, self._subsampling = stored, images, subsampling
        self.shape = images.shape if stored is None else stored.form.shape
        self.progress = progress or Progress(0, lambda count: None)
        self.stored = 0 if stored is None else len(stored)
        """How many of the numbers are stored rows."""
        held = np.empty(0, np.int64) if stored is None else stored.class_ids
        self.class_ids: IntArray = np.concatenate([held, np.asarray(images.class_ids, np.int64)])

    def chunks(self, numbers: IntArray) -> Iterator[IntArray]:
        """The numbers in parts whose images are read at once."""
        for part in slices(len(numbers), self.shape, CHUNK_VALUES):
            yield numbers[part]
            self.progress.pulse()

    def read(self, numbers: IntArray) -> UInt8Array:
        """The pixels of a chunk: of stored exemplars as they are replayed, of images as they were uploaded."""
        is_stored = numbers < self.stored
        if self._stored is None or not is_stored.any():
            return self._images.read(numbers - self.stored)
        pixels = np.empty((len(numbers), *self.shape), np.uint8)
        pixels[is_stored] = self._stored.select(numbers[is_stored]).decode()
        if not is_stored.all():
            pixels[~is_stored] = self._images.read(numbers[~is_stored] - self.stored)
        return pixels

    def embed(self, numbers: IntArray, embedder: Embedder, quality: int | None = None) -> FloatArray:
        """The features of these images as they are, or as replay would bring them back at a quality, [n, D]."""
        return np.concatenate(
            [
                embedder.embed(self.read(chunk) if quality is None else self._encode(chunk, quality).decode())
                for chunk in self.chunks(numbers)
            ]
        )

    def encode(self, numbers: IntArray, quality: int) -> Exemplars:
        """These images as exemplars; stored ones of this quality are copied as they are."""
        return concat([self._encode(chunk, quality) for chunk in self.chunks(numbers)])

    def _encode(self, chunk: IntArray, quality: int) -> Exemplars:
        ids = self.class_ids[chunk]
        if self._stored is None or self._stored.form.quality != quality:
            return encode(self.read(chunk), ids, quality=quality, subsampling=self._subsampling)
        is_stored = chunk < self.stored
        copied = self._stored.select(chunk[is_stored])
        if is_stored.all():
            return copied
        pixels = self._images.read(chunk[~is_stored] - self.stored)
        coded = encode(pixels, ids[~is_stored], quality=quality, subsampling=self._subsampling)
        place = np.empty(len(chunk), np.int64)
        place[np.concatenate([np.flatnonzero(is_stored), np.flatnonzero(~is_stored)])] = np.arange(len(chunk))
        return concat([copied, coded]).select(place)
