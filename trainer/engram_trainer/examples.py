"""Images with their classes, read by row when they are asked for.

An `ImageSet` is where images lie: an array, files, an archive, a column of a data set. It gives some rows as one uint8
array `[n, H, W, C]`, so nothing above it needs all images in memory. `Examples` adds the class of each row.

Image sets can be pickled, for the workers of a data loader.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

Images = npt.NDArray[np.uint8]
ClassIds = npt.NDArray[np.int64]
Rows = npt.NDArray[np.int64]
Shape = tuple[int, int, int]

CHUNK_BYTES = 2**23
"""Images are walked through in pieces of about this size."""


class ImageSet(Protocol):
    """N images of one shape, wherever they lie."""

    @property
    def shape(self) -> Shape:
        """Height, width and channels of every image."""

    @property
    def is_at_hand(self) -> bool:
        """Whether reading costs no decoding, so that workers would only be in the way."""

    def __len__(self) -> int: ...

    def read(self, rows: Rows) -> Images:
        """These images in this order, uint8 `[n, H, W, C]`.

        Raises:
            BadUpload: one cannot be read as an image.
        """


@dataclass(frozen=True, eq=False)
class ArraySet:
    """Images that are an array already, uint8 `[N, H, W, C]`."""

    images_NHWC: Images

    is_at_hand = True

    @property
    def shape(self) -> Shape:
        """Height, width and channels of every image."""
        height, width, channels = self.images_NHWC.shape[1:]
        return height, width, channels

    def __len__(self) -> int:
        return len(self.images_NHWC)

    def read(self, rows: Rows) -> Images:
        """These images in this order."""
        return self.images_NHWC[rows]


@dataclass(frozen=True, eq=False)
class Subset:
    """Some rows of an image set, in an order of their own."""

    base: ImageSet
    rows: Rows

    @property
    def shape(self) -> Shape:
        """As of the whole."""
        return self.base.shape

    @property
    def is_at_hand(self) -> bool:
        """As of the whole."""
        return self.base.is_at_hand

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, rows: Rows) -> Images:
        """These images in this order."""
        return self.base.read(self.rows[rows])


@dataclass(frozen=True, eq=False)
class Mapped:
    """An image set whose images are changed as they are read: `[n, H, W, C]` to `[n, H, W, C]` of the same shape."""

    base: ImageSet
    change: Callable[[Images], Images]

    @property
    def shape(self) -> Shape:
        """As before the change."""
        return self.base.shape

    @property
    def is_at_hand(self) -> bool:
        """As before the change."""
        return self.base.is_at_hand

    def __len__(self) -> int:
        return len(self.base)

    def read(self, rows: Rows) -> Images:
        """These images in this order, changed."""
        return self.change(self.base.read(rows))


@dataclass(frozen=True, eq=False)
class Joined:
    """Several image sets of one shape, one after the other.

    Raises:
        ValueError: their shapes differ.
    """

    parts: Sequence[ImageSet]

    def __post_init__(self) -> None:
        shapes = {part.shape for part in self.parts}
        if len(shapes) != 1:
            raise ValueError(f"image sets of the shapes {sorted(shapes)} cannot be joined")

    @property
    def shape(self) -> Shape:
        """Of every part."""
        return self.parts[0].shape

    @property
    def is_at_hand(self) -> bool:
        """Whether every part is."""
        return all(part.is_at_hand for part in self.parts)

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    def read(self, rows: Rows) -> Images:
        """These images in this order."""
        rows = np.asarray(rows, np.int64)
        images = np.empty((len(rows), *self.shape), np.uint8)
        ends = np.cumsum([len(part) for part in self.parts])
        which = np.searchsorted(ends, rows, side="right")
        for place, (part, end) in enumerate(zip(self.parts, ends, strict=True)):
            here = np.flatnonzero(which == place)
            if len(here):
                images[here] = part.read(rows[here] - (end - len(part)))
        return images


@dataclass(frozen=True, eq=False)
class Examples:
    """Images and the class id of each.

    Raises:
        ValueError: there are more of the one than of the other.
    """

    images: ImageSet
    class_ids: ClassIds

    def __post_init__(self) -> None:
        if len(self.images) != len(self.class_ids):
            raise ValueError(f"{len(self.images)} images but {len(self.class_ids)} class ids")

    @classmethod
    def of_arrays(cls, images_NHWC: Images, class_ids: ClassIds) -> Examples:
        """Those of two arrays."""
        return cls(ArraySet(images_NHWC), class_ids)

    @property
    def shape(self) -> Shape:
        """Height, width and channels of every image."""
        return self.images.shape

    @property
    def classes(self) -> tuple[int, ...]:
        """The distinct class ids, ascending."""
        return tuple(int(class_id) for class_id in np.unique(self.class_ids))

    def __len__(self) -> int:
        return len(self.class_ids)

    def select(self, rows: Rows) -> Examples:
        """These rows in this order."""
        return Examples(_subset(self.images, rows), self.class_ids[rows])

    def of_class(self, class_id: int) -> Examples:
        """Those of one class, in order."""
        return self.select(np.flatnonzero(self.class_ids == class_id))

    def mapped(self, change: Callable[[Images], Images]) -> Examples:
        """The same with every image changed when it is read."""
        return replace(self, images=Mapped(self.images, change))

    def read(self) -> Images:
        """All images as one array: only where they are known to be few."""
        return self.images.read(np.arange(len(self)))

    def chunks(self, size: int | None = None) -> Iterator[Images]:
        """All images in order, `size` at a time; None takes as many as fill some 8 MiB."""
        size = size or max(1, CHUNK_BYTES // int(np.prod(self.shape)))
        for start in range(0, len(self), size):
            yield self.images.read(np.arange(start, min(start + size, len(self))))


def join(parts: Sequence[Examples]) -> Examples:
    """Several examples, one after the other."""
    return Examples(Joined([part.images for part in parts]), np.concatenate([part.class_ids for part in parts]))


def _subset(images: ImageSet, rows: Rows) -> ImageSet:
    if isinstance(images, Subset):
        return Subset(images.base, images.rows[rows])
    return Subset(images, np.asarray(rows, np.int64))
