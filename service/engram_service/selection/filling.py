"""This file is how the shares of an upload's classes are filled: with as many exemplars as really fit, once encoded.

How many fit is only known afterwards, since all of them share Huffman tables. So a few images spread over each
ranking are encoded to estimate it, a little more than that is encoded, and classes that turn out to have room are
extended. Of a class of a million images that keeps twenty, some forty are encoded.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from engram import huffman, pack
from engram.errors import BudgetExceeded
from engram.schemas import Subsampling
from engram.strip import Exemplars, concat, encode, runs_of
from engram_service.selection.images import Images, Progress, chunks

IntArray = npt.NDArray[np.int64]

_SAMPLE_OF_A_CLASS = 16
_SAMPLE_OF_ALL_CLASSES = 512
_ESTIMATE_MARGIN = 1.05


class Filler:
    """Encodes as many exemplars as the shares can hold, and few more than that."""

    def __init__(
        self,
        images: Images,
        order: Mapping[int, IntArray],
        shares: Mapping[int, int],
        subsampling: Subsampling,
        progress: Progress,
    ) -> None:
        self._images = images
        self._order = order
        self._shares = {class_id: shares.get(class_id, 0) for class_id in order}
        self._subsampling = subsampling
        self._progress = progress

    def fill(self, quality: int) -> Exemplars:
        """The longest prefixes of the rankings that fit, in the order of a pack; empty if nothing fits."""
        wanted = self._estimate(quality)
        done = dict.fromkeys(wanted, 0)
        parts: list[Exemplars] = []
        ranks: list[IntArray] = []
        while True:
            new = {class_id: np.arange(done[class_id], wanted[class_id]) for class_id in wanted}
            parts += self._encode(new, quality, ranks)
            if len(parts) > 1:
                # Rebound step by step, so that at most two copies of the encoded images exist.
                parts = huffman.retable(parts)
                parts = [concat(parts)]
            pool = parts[0].select(np.lexsort((np.concatenate(ranks), parts[0].class_ids)))
            kept = pack.fit(pool, self._shares)
            counts = dict(runs_of(kept.class_ids))
            short = [c for c in wanted if counts.get(c, 0) == wanted[c] < len(self._order[c])]
            if not short:
                return kept if len(kept) else self._last_resort(quality)
            done = dict(wanted)
            for class_id in short:
                used = int(kept.sizes[kept.class_ids == class_id].sum())
                more = (self._shares[class_id] - used) * _ESTIMATE_MARGIN / used * done[class_id]
                wanted[class_id] = min(len(self._order[class_id]), done[class_id] + max(4, int(more)))

    def shortage(self, quality: int) -> BudgetExceeded:
        """The error to raise when not one exemplar fits at `quality`: the lowest candidate, or the only one allowed."""
        total = sum(self._shares.values())
        alone = self._smallest(quality)
        needed = pack.size(alone.form, runs_of(alone.class_ids), alone.sizes)
        message = f"not one exemplar fits: the classes of this upload have {total:,} bytes together, and the smallest "
        message += f"exemplar needs {needed:,} at quality {quality}; raise the budget"
        return BudgetExceeded(message, budget_bytes=total, needed_bytes=needed, quality=quality)

    def _estimate(self, quality: int) -> dict[int, int]:
        """How many of each class to encode first, from the bytes of a few spread over its ranking."""
        few = min(_SAMPLE_OF_A_CLASS, max(2, _SAMPLE_OF_ALL_CLASSES // len(self._order)))
        spread = {c: np.unique(np.linspace(0, len(o) - 1, few).astype(np.int64)) for c, o in self._order.items()}
        parts = self._encode(spread, quality, [])
        class_ids = np.concatenate([part.class_ids for part in parts])
        sizes = np.concatenate([part.sizes for part in parts])
        wanted = {}
        for class_id, order in self._order.items():
            bytes_each = float(sizes[class_ids == class_id].mean())
            fitting = int(self._shares[class_id] * _ESTIMATE_MARGIN / bytes_each) + 2
            wanted[class_id] = min(len(order), fitting)
        return wanted

    def _encode(self, chosen: Mapping[int, IntArray], quality: int, ranks: list[IntArray]) -> list[Exemplars]:
        """The images of these ranks of each class, in chunks of all classes; their ranks are appended to `ranks`."""
        rank_N = np.concatenate(list(chosen.values()))
        class_N = np.repeat(list(chosen), [len(each) for each in chosen.values()])
        image_N = np.concatenate([self._order[class_id][each] for class_id, each in chosen.items()])
        parts = []
        for rows in chunks(np.argsort(rank_N, kind="stable"), self._images.shape):
            pixels = self._images.read(image_N[rows])
            parts.append(encode(pixels, class_N[rows], quality=quality, subsampling=self._subsampling))
            ranks.append(rank_N[rows])
            self._progress.pulse()
        return parts

    def _last_resort(self, quality: int) -> Exemplars:
        """What fits when tables made for several exemplars leave no room: one of each class, or one alone."""
        parts = self._encode(dict.fromkeys(self._order, np.arange(1)), quality, [])
        pool = parts[0] if len(parts) == 1 else concat(huffman.retable(parts))
        kept = pack.fit(pool.select(np.argsort(pool.class_ids, kind="stable")), self._shares)
        if len(kept):
            return kept
        alone = self._smallest(quality)
        return pack.fit(alone, {int(alone.class_ids[0]): sum(self._shares.values())})

    def _smallest(self, quality: int) -> Exemplars:
        """The best of the class whose best takes the fewest bytes, encoded alone; of those that have a share."""
        classes = [class_id for class_id, share in self._shares.items() if share] or list(self._order)
        parts = self._encode(dict.fromkeys(classes, np.arange(1)), quality, [])
        sizes = np.concatenate([part.sizes for part in parts])
        smallest = int(np.concatenate([part.class_ids for part in parts])[sizes.argmin()])
        (alone,) = self._encode({smallest: np.arange(1)}, quality, [])
        return alone
