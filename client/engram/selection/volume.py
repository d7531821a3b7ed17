"""The volumes that features span, and R, which compares those of stored images with their originals'.

    logvol(M)  = sum log diag chol(M M^T + delta I)      M: unit rows, float64
    gap_c      = logvol(M_c stored) - logvol(M_c original)      one class, mean over its blocks

    raw        R = exp(mean_c gap_c)
    per_sample R = exp(mean_c gap_c / block)
    log_ratio  R = mean_c logvol(M_c stored) / mean_c logvol(M_c original)

A Gram determinant of more than D rows is zero, and cheap exemplars are many: volumes are therefore taken over blocks
of `block` exemplars (at most D / 2) with interleaved ranks, so that each block is a thinned copy of the class. Fewer
images than a block say nothing: what coding does to a volume grows with the block, faster than the block (CIFAR-10,
pixels, quality 10, scaled to blocks of 32: R = 0.98, 0.91, 0.86, 0.72, 0.53 from blocks of 2, 4, 8, 16, 32), so few
images would always ask for the lowest quality. At most `_BLOCKS` blocks of a class are evaluated, so the cost does not
grow with the number of images of a class. All candidates are measured on the same images.

Source: Wang et al., Memory Replay with Data Compression for Continual Learning (ICLR 2022), section 4.2. The code
released with it prints mean log volumes and no R: the three definitions and the blocks are this project's.

Letters: B blocks, K exemplars of a block, D dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
import numpy.typing as npt

from engram.schemas import Definition
from engram.selection.embedding import Embedder, FloatArray
from engram.selection.images import Pool

IntArray = npt.NDArray[np.int64]
DoubleArray = npt.NDArray[np.float64]

DELTA = 1e-6
"""Added to the diagonal of a Gram matrix, so that equal images have a volume too."""

# A squared pivot of this size is delta and rounding: the row lies in the span of the others.
_SINGULAR = 10 * DELTA
ENOUGH_BLOCKS = 2
"""How many blocks of a class settle what it says about quality."""

# The standard error of a class's mean gap is then a quarter of a block's own spread; more blocks only cost time.
_BLOCKS = 16
_BLOCKS_OF_ALL_CLASSES = 256
_LARGEST_EXPONENT = 700.0  # beyond it R would be infinite, which JSON cannot say


def log_volume(features_BKD: FloatArray) -> tuple[DoubleArray, npt.NDArray[np.bool_]]:
    """Of each block: the log of the volume that its rows span, and whether they are numerically dependent."""
    rows_BKD = features_BKD.astype(np.float64)
    gram_BKK = rows_BKD @ rows_BKD.transpose(0, 2, 1)
    gram_BKK += DELTA * np.eye(gram_BKK.shape[1])
    pivots_BK = np.diagonal(np.linalg.cholesky(gram_BKK), axis1=1, axis2=2)
    return np.log(pivots_BK).sum(axis=1), (pivots_BK**2).min(axis=1) < _SINGULAR


def blocks(n: int, block: int, most: int) -> IntArray:
    """Ranks of the exemplars in each block, [B, K], interleaved; no block if n is smaller than one."""
    count = n // block
    chosen = np.linspace(0, count - 1, min(count, most)).round().astype(np.int64)
    return chosen[:, None] + count * np.arange(block)[None, :]


@dataclass(frozen=True)
class Volumes:
    """Mean log volumes of a class's blocks: stored, and as they were uploaded."""

    stored: float
    original: float
    is_singular: bool

    @property
    def gap(self) -> float:
        """gap_c of the module docstring."""
        return self.stored - self.original


def ratios(volumes: Sequence[Volumes], block: int) -> dict[Definition, float | None]:
    """R under every definition; None where no class had a block."""
    if not volumes:
        return dict.fromkeys(get_args(Definition))
    gap = float(np.mean([each.gap for each in volumes]))
    original = float(np.mean([each.original for each in volumes]))
    return {
        "raw": math.exp(min(gap, _LARGEST_EXPONENT)),
        "per_sample": math.exp(min(gap / block, _LARGEST_EXPONENT)),
        "log_ratio": (original + gap) / original if original else 1.0 if gap == 0 else None,
    }


class Comparison:
    """Measures, at any quality, how far the volume of the same images is from that of their originals.

    The images are the first of each class's order, as many as the cheapest candidate keeps and at least two blocks:
    candidates that keep fewer are measured on the same ones, so that R differs between qualities by what coding does
    and not by which images it was done to.
    """

    def __init__(
        self,
        pool: Pool,
        order: Mapping[int, IntArray],
        kept: Mapping[int, int],
        *,
        block: int,
        embedder: Embedder,
    ) -> None:
        self._pool, self._embedder = pool, embedder
        first = next(iter(order.values()))[:1]
        self.block = min(block, pool.embed(first, embedder).shape[1] // 2)
        most = max(ENOUGH_BLOCKS, min(_BLOCKS, _BLOCKS_OF_ALL_CLASSES // len(order)))
        self.numbers: dict[int, IntArray] = {}
        """What is measured of each class that has a block, [B, K]."""
        for class_id, numbers in order.items():
            depth = min(len(numbers), max(kept.get(class_id, 0), ENOUGH_BLOCKS * self.block))
            if depth >= self.block:
                self.numbers[class_id] = numbers[blocks(depth, self.block, most)]
        self._originals = {c: log_volume(self._features(numbers, None)) for c, numbers in self.numbers.items()}

    def volumes(self, quality: int) -> dict[int, Volumes]:
        """Of each class that has a block."""
        found: dict[int, Volumes] = {}
        for class_id, numbers_BK in self.numbers.items():
            stored, singular = log_volume(self._features(numbers_BK, quality))
            original, as_well = self._originals[class_id]
            found[class_id] = Volumes(float(stored.mean()), float(original.mean()), bool((singular | as_well).any()))
        return found

    def _features(self, numbers_BK: IntArray, quality: int | None) -> FloatArray:
        """Features of the images as a draw would bring them back, or as they are, [B, K, D]."""
        rows_ND = self._pool.embed(numbers_BK.ravel(), self._embedder, quality)
        return rows_ND.reshape(*numbers_BK.shape, -1)
