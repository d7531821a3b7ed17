"""What selection compares images by: any embedder, and the built-in one.

Every embedder turns uint8 images [N, H, W, C] into float32 rows [N, D] of unit L2 norm. The built-in one takes pixels
under a fixed random projection: it keeps the geometry of pixels, knows nothing of classes, and is the lesser choice
beside the features of the network that will replay the images. But it is the same for every task.

An image above 32 x 32 is seen as a thumbnail, which coding hardly changes, and by its detail, which is what coding
takes away: pixels of its cells of 8 x 8, less each cell's mean. Both weigh the same. By thumbnails alone R of
photographs of 224 px stays near 1 down to quality 25 and rises below; by both it falls with the quality.

Letters: N images, H height, W width, C channels, P values of a thumbnail or of the detail, D dimensions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
import numpy.typing as npt

UInt8Array = npt.NDArray[np.uint8]
FloatArray = npt.NDArray[np.float32]
Shape = tuple[int, int, int]

# A ratio of volumes grows exponentially with the block, so a block that suits one embedding is too blunt or too sharp
# for another. Measured on ten orders of Fashion-MNIST's classes with epsilon 0.5: features of LUCIR networks that were
# trained on images as stored choose 50 or 75 at 16 (75 or 90 at 32), which replay best; pixels choose 25 or 50 at 32
# (10 or 25 at 16).
BUILTIN_BLOCK = 32
EXTRACTOR_BLOCK = 16

_THUMBNAIL_SIDE = 32
# What the discrete cosine transform of JPEG works on. Of an image at most 8 x 8 cells are looked at, 4,096 pixels: four
# times a thumbnail, and no more of a large image than of a small one.
_CELL = 8
_CELLS_A_SIDE = 8
# In a product of two rows detail counts twice as much as the thumbnail: then 224 px photographs choose 50, as in the
# paper. At equal weights they choose 10 to 50, at three to one 50 or 75.
_DETAIL_WEIGHT = np.float32(2**0.5)
_CHUNK_VALUES = 2**21
# A flat image must not have its coding noise blown up to unit length: the constant added to every row weighs as much
# as this many grey levels of contrast.
_FLAT_LEVELS = 4.0
_PROJECTION_KEY = 0x656E6772616D  # "engram"
_LINES_IN_UINT16 = 257  # lines of 255 that 16 bits can sum


class Embedder(Protocol):
    """What selection needs of an embedding. `name` is "builtin" or the SHA-256 of the model."""

    @property
    def name(self) -> str:
        """What a decision records."""
        ...

    @property
    def block(self) -> int:
        """How many exemplars a block holds if the ingest does not say."""
        ...

    def embed(self, images_NHWC: UInt8Array) -> FloatArray:
        """One row per image, unit L2 norm."""
        ...


class BuiltinEmbedder:
    """Pixels under a fixed random projection: of the image, or of a thumbnail at most 32 x 32 and of the detail."""

    name = "builtin"
    block = BUILTIN_BLOCK

    def __init__(self, shape: Shape, dimensions: int = 128) -> None:
        height, width, channels = shape
        self._shape = shape
        self._thumbnail = (min(height, _THUMBNAIL_SIDE), min(width, _THUMBNAIL_SIDE))
        self._cells = _Cells(height, width) if max(height, width) > _THUMBNAIL_SIDE else None
        pixels = self._thumbnail[0] * self._thumbnail[1] * channels
        detail = 0 if self._cells is None else self._cells.pixels * channels
        signs = _random_signs((pixels + 1 + detail + 1) * dimensions).reshape(-1, dimensions)
        # Columns that sum to zero ignore the brightness of an image, which saves subtracting it.
        thumbnail, self._detail_PD = signs[:pixels], signs[pixels + 1 : -1]
        self._projection_PD = thumbnail - thumbnail.mean(axis=0)
        self._flat_D = signs[pixels] * np.float32(_FLAT_LEVELS * np.sqrt(pixels))
        self._even_D = signs[-1] * np.float32(_FLAT_LEVELS * np.sqrt(detail))

    def embed(self, images_NHWC: UInt8Array) -> FloatArray:
        """One row per image, unit L2 norm.

        Raises:
            ValueError: the images have another shape.
        """
        if images_NHWC.shape[1:] != self._shape:
            raise ValueError(f"images are {images_NHWC.shape[1:]}, this embedder is for {self._shape}")
        features_ND = np.empty((len(images_NHWC), len(self._flat_D)), np.float32)
        detail_ND = np.empty_like(features_ND[: len(images_NHWC) if self._cells else 0])
        for rows in slices(len(images_NHWC), self._shape, _CHUNK_VALUES):
            pixels_NP = shrink(images_NHWC[rows], *self._thumbnail).reshape(-1, len(self._projection_PD))
            np.matmul(pixels_NP, self._projection_PD, out=features_ND[rows])
            if self._cells is not None:
                np.matmul(self._cells.detail(images_NHWC[rows]), self._detail_PD, out=detail_ND[rows])
        features_ND += self._flat_D
        unit_rows(features_ND)
        if self._cells is None:
            return features_ND
        detail_ND += self._even_D
        features_ND += _DETAIL_WEIGHT * unit_rows(detail_ND)
        return unit_rows(features_ND)


class _Cells:
    """Cells of 8 x 8 pixels spread evenly over an image, on the raster of JPEG; smaller where the image is."""

    def __init__(self, height: int, width: int) -> None:
        self._height, self._width = min(height, _CELL), min(width, _CELL)
        self._rows, self._columns = (
            side * np.linspace(0, count - 1, min(count, _CELLS_A_SIDE)).round().astype(np.int64)
            for side, count in ((self._height, height // self._height), (self._width, width // self._width))
        )
        self.pixels = len(self._rows) * len(self._columns) * self._height * self._width

    def detail(self, images_NHWC: UInt8Array) -> FloatArray:
        """The pixels of the cells, each less the mean of its cell and channel, [N, P]."""
        rows = (self._rows[:, None] + np.arange(self._height))[:, :, None, None]
        columns = (self._columns[:, None] + np.arange(self._width))[None, None]
        values = images_NHWC[:, rows, columns].astype(np.float32)
        values -= values.mean(axis=(2, 4), keepdims=True)
        return values.reshape(len(values), -1)


Embed = Callable[[UInt8Array], npt.ArrayLike]
"""Features [N, D] of images [N, H, W, C]."""


class FunctionEmbedder:
    """Any function as an embedding: a network's feature extractor, usually. `name` says which."""

    block = EXTRACTOR_BLOCK

    def __init__(self, name: str, embed: Embed) -> None:
        self.name = name
        self._embed = embed

    def embed(self, images_NHWC: UInt8Array) -> FloatArray:
        """One row per image, unit L2 norm.

        Raises:
            ValueError: the function gave something else than a row of finite numbers for each image.
        """
        features_ND = np.array(self._embed(images_NHWC), np.float32)
        if features_ND.ndim != 2 or len(features_ND) != len(images_NHWC) or not features_ND.size:
            raise ValueError(f"{self.name} gave features {list(features_ND.shape)} for {len(images_NHWC)} images")
        if not np.isfinite(features_ND).all():
            raise ValueError(f"{self.name} gave features that are not finite")
        return unit_rows(features_ND)


def slices(n: int, shape: Shape, values: int, images: int = 2**16) -> Iterator[slice]:
    """Slices of 0..n of at most so many values and images each."""
    step = max(1, min(images, values // (shape[0] * shape[1] * shape[2])))
    for start in range(0, n, step):
        yield slice(start, min(n, start + step))


def unit_rows(features_ND: FloatArray) -> FloatArray:
    """The rows scaled to unit length, in place; a row of zeros becomes a diagonal, equal to every other such row."""
    with np.errstate(over="ignore"):
        norms_N = np.linalg.norm(features_ND.astype(np.float64), axis=1)
    features_ND[norms_N == 0] = 1
    norms_N[norms_N == 0] = np.sqrt(features_ND.shape[1])
    features_ND /= norms_N[:, None]
    return features_ND


def _random_signs(count: int) -> FloatArray:
    """+1 and -1 from raw Philox bits: numpy promises the bits for ever, not what it makes of them."""
    words = np.random.Philox(key=_PROJECTION_KEY).random_raw(-(-count // 64)).astype("<u8")
    bits = np.unpackbits(words.view(np.uint8), bitorder="little")[:count]
    return bits.astype(np.float32) * 2 - 1


def shrink(images_NHWC: UInt8Array, height: int, width: int) -> FloatArray:
    """Each output pixel is the mean of its cell of whole input pixels; equal sizes are only converted."""
    n, h, w, c = images_NHWC.shape
    if (h, w) == (height, width):
        return images_NHWC.astype(np.float32)
    # Lines first, summed as integers over whole lines: one pass over the bytes of the image.
    lines = _cell_sums(images_NHWC.reshape(n, h, w * c), height).reshape(n, height, w, c)
    thumbnails = _cell_sums(lines, width, axis=2).astype(np.float32)
    heights, widths = (np.diff(np.arange(k) * side // k, append=side) for k, side in ((height, h), (width, w)))
    thumbnails /= (heights[:, None] * widths[None, :])[None, :, :, None].astype(np.float32)
    return thumbnails


def _cell_sums(values: npt.NDArray[np.unsignedinteger], cells: int, axis: int = 1) -> npt.NDArray[np.unsignedinteger]:
    """Sums over `cells` stretches of whole entries along an axis."""
    side = values.shape[axis]
    if side % cells:
        return np.add.reduceat(values, np.arange(cells) * side // cells, axis=axis, dtype=np.uint32)
    # Equal stretches: adding them entry by entry takes a quarter of reduceat's time.
    shape = (*values.shape[:axis], cells, side // cells, *values.shape[axis + 1 :])
    stretches = np.moveaxis(values.reshape(shape), axis + 1, 0)
    is_narrow = values.dtype == np.uint8 and side // cells <= _LINES_IN_UINT16
    sums: npt.NDArray[np.unsignedinteger] = stretches[0].astype(np.uint16 if is_narrow else np.uint32)
    for stretch in stretches[1:]:
        sums += stretch
    return sums
