"""How the shares of classes are filled: with as many exemplars as really fit, once encoded.

What an exemplar costs does not depend on the others, so each class is encoded along its ranking until its share is
spent. Of a class of a million images that keeps twenty, some forty are encoded.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from engram import pack
from engram.selection.images import Pool
from engram.strip import Exemplars, concat

IntArray = npt.NDArray[np.int64]

_FIRST = 16
# Fields may be a thousand times larger than images, and what is encoded is held at once.
_FIRST_WITH_FIELDS = 2
_MARGIN = 1.05


def fill(pool: Pool, order: Mapping[int, IntArray], shares: Mapping[int, int], quality: int) -> Exemplars:
    """The longest prefixes of the rankings that fit the shares, in the order of a pack; empty if nothing fits.

    Args:
        pool: what the numbers of `order` stand for.
        order: numbers of every class, best first.
        shares: bytes of each class; a class without a share keeps nothing but what others leave.
        quality: to encode at; what the pool has at this quality is copied.
    """
    parts: list[Exemplars] = []
    ranks: list[IntArray] = []
    done, spent = dict.fromkeys(order, 0), dict.fromkeys(order, 0)
    first = _FIRST_WITH_FIELDS if pool.schema else _FIRST
    wanted = {class_id: min(first, len(numbers)) for class_id, numbers in order.items()}
    while any(wanted.values()):
        rank_N = np.concatenate([np.arange(done[c], done[c] + more) for c, more in wanted.items()])
        number_N = np.concatenate([order[c][done[c] : done[c] + more] for c, more in wanted.items()])
        parts.append(pool.encode(number_N, quality))
        ranks.append(rank_N)
        at = 0
        for class_id, more in wanted.items():
            spent[class_id] += int(parts[-1].sizes[at : at + more].sum())
            done[class_id] += more
            at += more
            # One more than fits, so that what other classes leave can buy it.
            left = shares.get(class_id, 0) - spent[class_id]
            next_ = 0 if left < 0 else int(left * _MARGIN * done[class_id] / spent[class_id]) + 2
            wanted[class_id] = min(next_, len(order[class_id]) - done[class_id])
    coded = concat(parts)
    return pack.fit(coded.select(np.lexsort((np.concatenate(ranks), coded.class_ids))), shares)


def smallest(pool: Pool, order: Mapping[int, IntArray], quality: int) -> int:
    """Bytes of the smallest pack of one exemplar that heads its class."""
    heads = pool.encode(np.array([numbers[0] for numbers in order.values()]), quality)
    return len(pack.to_bytes(heads.select([int(np.argmin(heads.sizes))])))
