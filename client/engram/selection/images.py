"""The images that selection works on: those of one upload, read in chunks, and what is already stored of their task.

Images are uint8 [N, H, W, C] and never held as a whole: a chunk is some 8 MiB. Their fields, if the buffer declares
any, travel beside them as records (`engram.fields`) that selection does not look into.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from engram.fields import NO_COLUMNS, Columns, Schema
from engram.schemas import Subsampling
from engram.selection.embedding import Embedder, FloatArray, Shape, UInt8Array, slices
from engram.strip import Bytes, Exemplars, concat, encode

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

    @property
    def schema(self) -> Schema:
        """The fields that every image brings."""
        ...

    def records(self, indices: IntArray) -> Sequence[Bytes]:
        """The fields of these images in this order. Not asked for if there are none."""
        ...


@dataclass(frozen=True, eq=False)
class ArrayImages:
    """Images that are an array already, and their fields (`Schema.columns` makes them of arrays)."""

    images_NHWC: UInt8Array
    class_ids: IntArray
    columns: Columns = NO_COLUMNS

    @property
    def shape(self) -> Shape:
        """(H, W, C) of every image."""
        height, width, channels = self.images_NHWC.shape[1:]
        return height, width, channels

    def read(self, indices: IntArray) -> UInt8Array:
        """These images in this order."""
        return self.images_NHWC[indices]

    @property
    def schema(self) -> Schema:
        """The fields that every image brings."""
        return self.columns.schema

    def records(self, indices: IntArray) -> list[bytes]:
        """The fields of these images in this order."""
        return self.columns.records(indices)


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

    @property
    def schema(self) -> Schema:
        """The fields that every image brings."""
        return self.images.schema

    def records(self, indices: IntArray) -> Sequence[Bytes]:
        """The fields of these images in this order."""
        return self.images.records(indices)


class WorkDone:
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
        self, stored: Exemplars | None, images: Images, subsampling: Subsampling, done: WorkDone | None = None
    ) -> None:
        self._stored, self._images, self._subsampling = stored, images, subsampling
        self.shape = images.shape if stored is None else stored.form.shape
        self.schema = images.schema if stored is None else stored.schema
        self.done = done or WorkDone(0, lambda count: None)
        self.stored = 0 if stored is None else len(stored)
        """How many of the numbers are stored rows."""
        held = np.empty(0, np.int64) if stored is None else stored.class_ids
        self.class_ids: IntArray = np.concatenate([held, np.asarray(images.class_ids, np.int64)])

    def chunks(self, numbers: IntArray) -> Iterator[IntArray]:
        """The numbers in parts whose images are read at once."""
        for part in slices(len(numbers), self.shape, CHUNK_VALUES):
            yield numbers[part]
            self.done.pulse()

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
            return self._encoded(self.read(chunk), ids, self._records(chunk), quality)
        is_stored = chunk < self.stored
        copied = self._stored.select(chunk[is_stored])
        if is_stored.all():
            return copied
        new = chunk[~is_stored]
        coded = self._encoded(self._images.read(new - self.stored), ids[~is_stored], self._records(new), quality)
        place = np.empty(len(chunk), np.int64)
        place[np.concatenate([np.flatnonzero(is_stored), np.flatnonzero(~is_stored)])] = np.arange(len(chunk))
        return concat([copied, coded]).select(place)

    def _encoded(self, pixels: UInt8Array, ids: IntArray, records: Sequence[Bytes] | None, quality: int) -> Exemplars:
        subsampling, schema = self._subsampling, self.schema
        return encode(pixels, ids, quality=quality, subsampling=subsampling, schema=schema, records=records)

    def _records(self, chunk: IntArray) -> Sequence[Bytes] | None:
        """The fields of a chunk: of stored exemplars as they are stored."""
        if not self.schema:
            return None
        is_stored = chunk < self.stored
        came = iter(self._images.records(chunk[~is_stored] - self.stored) if not is_stored.all() else ())
        held = iter(() if self._stored is None else self._stored.select(chunk[is_stored]).records() or ())
        return [next(held if stored else came) for stored in is_stored.tolist()]
