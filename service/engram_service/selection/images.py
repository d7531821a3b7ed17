"""This file is what selection works on: the images of one upload, and how far the work on them has come.

Images are read in chunks of some 8 MiB and never held as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
import numpy.typing as npt

from engram_service.selection.embedding import Embedder

UInt8Array = npt.NDArray[np.uint8]
IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]

# 8 MiB as bytes, 32 MiB as the float32 of an embedder, 16 MiB of libjpeg's coefficients.
CHUNK_VALUES = 2**23


class Images(Protocol):
    """The images of one upload, wherever they lie."""

    @property
    def class_ids(self) -> IntArray:
        """One class id per image, int64 [N]."""
        ...

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C) of every image."""
        ...

    def read(self, indices: IntArray) -> UInt8Array:
        """These images in this order, [n, H, W, C]. Never asked for more than some 8 MiB at once."""
        ...


def chunks(rows: IntArray, shape: tuple[int, int, int]) -> Iterator[IntArray]:
    """The rows in parts whose images are read at once."""
    step = max(1, CHUNK_VALUES // (shape[0] * shape[1] * shape[2]))
    for at in range(0, len(rows), step):
        yield rows[at : at + step]


def embed(images: Images, rows: IntArray, embedder: Embedder, progress: Progress) -> FloatArray:
    """The features of these images, [n, D]."""
    parts = []
    for chunk in chunks(rows, images.shape):
        parts.append(embedder.embed(images.read(chunk)))
        progress.pulse()
    return np.concatenate(parts)


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
