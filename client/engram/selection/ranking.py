"""Rankings: in which order the images of one class deserve to be kept.

Every ranking is a permutation cut off at `count` and never depends on `count`: a share that shrinks drops the tail of
the order, and what is left is what a smaller share would have kept from the start.

A class is ranked again with every upload to it, over what is stored (in rank order) and what came, so that each
ranking keeps its promise for the whole stream and not for one upload:

    ring               newest first (GEM's last M/T)
    random, reservoir  one thing here: every subset of the stream with equal probability (`shuffle`)
    herding            the mean of each prefix is near the mean of *all images seen*, which is kept beside the exemplars
    greedy_dpp         each prefix spans, greedily, the largest volume of what is stored and what came

Herding toward the mean of what was kept plus what came would drift: every merge herds toward the choices of earlier
ones (300 uploads of 20: 4 to 17 times as far from the class mean as one joint herding, against some 2 times here).

`herding` and `greedy_dpp` look at features, one row per image, unit L2 norm. Both cost one pass over the features of
the class for every image chosen, which is quadratic when the count grows with the class. A class of more than `GROUP`
images is therefore cut into interleaved groups (every G-th image) that are ranked each on their own and dealt out in
turn: a group is a systematic sample of the class, so its mean and its spread are nearly those of the class. The cost
is then linear in the class, and `groups` lets a caller hold the features of one group at a time.

Letters: N images of the class, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from engram.schemas import Ranking

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int64]
DoubleArray = npt.NDArray[np.float64]

# 4,096 rows of 128 features are 2 MiB, which stay in a core's cache while they are passed over once per pick.
GROUP = 4096
# A squared residual below this is rounding in float32: the images left add no volume to those chosen.
_EXHAUSTED = 1e-5


def needs_features(method: Ranking) -> bool:
    """True if `rank` looks at the features; the other methods only need to know how many images there are."""
    return method in ("herding", "greedy_dpp")


def groups(n: int) -> list[IntArray]:
    """The images 0..n-1 of a class in interleaved groups of at most `GROUP`; one group for a class that is small."""
    count = max(1, -(-n // GROUP))
    return [np.arange(start, n, count, dtype=np.int64) for start in range(count)]


def deal(orders: Sequence[IntArray], count: int) -> IntArray:
    """The first `count` of the groups' orders, dealt out in turn: all firsts, then all seconds, ..."""
    ranks = np.concatenate([np.arange(len(order)) for order in orders])
    turns = np.argsort(ranks, kind="stable")
    return np.concatenate(orders)[turns][:count]


def rank(
    features_ND: FloatArray,
    count: int,
    *,
    method: Ranking,
    mean_D: DoubleArray | None = None,
    pulse: Callable[[], None] = lambda: None,
) -> IntArray:
    """The `count` images of one class that deserve most to be kept, best first.

    Args:
        features_ND: one row per image, unit L2 norm; N is at most `GROUP`, or this takes long.
        count: 0..N.
        method: `herding` or `greedy_dpp`.
        mean_D: what to herd toward; None is the mean of the rows.
        pulse: called before each image is picked; what it raises ends the ranking.

    Raises:
        ValueError: `count` is not in 0..N.
    """
    n = len(features_ND)
    if not 0 <= count <= n:
        raise ValueError(f"cannot rank {count} of {n} images; ask for 0 to {n}")
    if n == 0:
        return np.empty(0, np.int64)
    if method == "greedy_dpp":
        return _greedy_dpp(features_ND, count, pulse)
    return _herd(features_ND, features_ND.mean(axis=0, dtype=np.float64) if mean_D is None else mean_D, count, pulse)


def mean_seen(
    features_ND: FloatArray, is_new_N: npt.NDArray[np.bool_], known_D: FloatArray | None, seen: float
) -> tuple[DoubleArray, float]:
    """The mean feature of all images of a class once these have come, and how many images it stands for.

    Args:
        features_ND: of what is stored and what came.
        is_new_N: which of them came.
        known_D: the mean of the images seen before; None lets what is stored stand for them.
        seen: how many those were.
    """
    stored_ND, new_ND = (features_ND[chosen].astype(np.float64) for chosen in (~is_new_N, is_new_N))
    if known_D is None and len(stored_ND) == 0:
        return new_ND.mean(axis=0), len(new_ND)
    before_D = stored_ND.mean(axis=0) if known_D is None else known_D
    weight = seen + len(new_ND)
    return (seen * before_D + new_ND.sum(axis=0)) / weight, weight


def order(stored: int, new: int, *, seen: int, method: Ranking, rng: np.random.Generator) -> IntArray:
    """All images of a class in the order of a method that looks at no features.

    Args:
        stored: how many are stored: numbers 0..stored-1, in rank order.
        new: how many came: the numbers after those, in the order of arrival.
        seen: how many images the stored ones were chosen from.
        method: `ring`, `reservoir` or `random`.
        rng: what the last two draw from.
    """
    held, came = np.arange(stored, dtype=np.int64), np.arange(stored, stored + new, dtype=np.int64)
    if method == "ring":
        return np.concatenate([came[::-1], held])
    came = came[np.argsort(rng.bit_generator.random_raw(new), kind="stable")]
    return shuffle(held, came, seen=seen, rng=rng)


def shuffle(held: IntArray, came: IntArray, *, seen: int, rng: np.random.Generator) -> IntArray:
    """A uniform order of a stream, made of the first of a uniform order of `seen` images and one of all that came.

    In a uniform order of a whole stream every image has an independent exponential key. The smallest keys of a part of
    n images are the partial sums of V_i / (n - i), V_i exponential: so the keys that the stored images would have had
    can be drawn without knowing those that were dropped, and sorting by key merges both sides.

    Source: Renyi, On the theory of order statistics (1953), for the partial sums.
    """
    keys = [
        np.cumsum(_exponential(len(side), rng) / (n - np.arange(len(side))))
        for side, n in ((held, max(seen, len(held))), (came, len(came)))
    ]
    return np.concatenate([held, came])[np.argsort(np.concatenate(keys), kind="stable")]


def _exponential(count: int, rng: np.random.Generator) -> DoubleArray:
    # Raw bits, as numpy may change what its distributions make of them from one release to the next.
    words = np.asarray(rng.bit_generator.random_raw(count), np.uint64)
    return -np.log(((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53)


def _herd(features_ND: FloatArray, mean_D: DoubleArray, count: int, pulse: Callable[[], None]) -> IntArray:
    """Every prefix of the result has a mean near `mean_D`.

    Source: Rebuffi et al., iCaRL (CVPR 2017), Algorithm 4, in the running form of the LUCIR and MRDC code: argmax of
    <w, x>, then w += mean - x. Departures: rows already chosen are masked, so that there are no repeats and no rounds
    wasted on them (their code stops after 1,000 rounds, or 500 images, with fewer than asked for), and ties resolve to
    the lowest index.
    """
    target_D = mean_D.copy()
    closed_N = np.zeros(len(features_ND), np.float32)
    picks = np.empty(count, np.int64)
    for turn in range(count):
        pulse()
        scores_N = features_ND @ target_D.astype(np.float32)
        scores_N += closed_N
        picks[turn] = pick = int(scores_N.argmax())
        closed_N[pick] = -np.inf
        target_D += mean_D - features_ND[pick]
    return picks


def _greedy_dpp(features_ND: FloatArray, count: int, pulse: Callable[[], None]) -> IntArray:
    """Every prefix of the result spans, greedily, the largest volume: the greedy MAP of a k-DPP with kernel X X^T.

    A pick's gain is the squared distance of its row from the span of those already chosen. For a linear kernel the
    new column of the incremental Cholesky factor is X q, q being the pick's residual direction; keeping the q (at
    most D of them) instead of the factor's N x k entries gives the same gains in the memory of the features.

    No more than D rows are independent: when nothing left has a gain, a new round starts among the images that are
    left, so that any count can be asked for. The first pick of a round has all gains equal and is the lowest index.

    Source: Chen, Zhang, Zhou, Fast greedy MAP inference for determinantal point processes (NeurIPS 2018), Algorithm 1.
    """
    n, d = features_ND.shape
    directions_KD = np.empty((min(n, d), d), np.float32)
    picks = np.empty(count, np.int64)
    is_open_N = np.ones(n, bool)
    gains_N = np.ones(n)
    rank_in_round = 0
    for turn in range(count):
        pulse()
        pick = int(gains_N.argmax())
        if rank_in_round == len(directions_KD) or gains_N[pick] < _EXHAUSTED:
            gains_N = np.where(is_open_N, 1.0, -np.inf)
            pick, rank_in_round = int(gains_N.argmax()), 0
        picks[turn] = pick
        is_open_N[pick] = False
        direction_D = _residual(features_ND[pick], directions_KD[:rank_in_round])
        directions_KD[rank_in_round] = direction_D
        rank_in_round += 1
        gains_N -= (features_ND @ direction_D).astype(np.float64) ** 2
        gains_N[pick] = -np.inf
    return picks


def _residual(row_D: FloatArray, directions_KD: FloatArray) -> FloatArray:
    """The unit vector along what is left of a row outside the span of the directions (Gram-Schmidt, done twice)."""
    rest = row_D.astype(np.float64)
    basis = directions_KD.astype(np.float64)
    for _ in range(2):  # once loses orthogonality when little is left
        rest -= basis.T @ (basis @ rest)
    return (rest / max(float(np.linalg.norm(rest)), 1e-12)).astype(np.float32)
