"""The filling of shares: as many exemplars as really fit, along each ranking, and no byte more."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engram import pack, strip
from engram.selection.filling import fill, smallest
from engram.selection.images import NO_IMAGES, ArrayImages, Pool
from engram.strip import Exemplars, runs_of
from tests.photos import photos, shades, shades_of

IntArray = npt.NDArray[np.int64]


def pool_of(n: int, classes: int, *, seed: int = 0, stored: Exemplars | None = None) -> Pool:
    return Pool(stored, ArrayImages(photos(n, (8, 8, 3), seed=seed), np.arange(n) % classes), "4:2:0")


def orders(pool: Pool, seed: int = 0) -> dict[int, IntArray]:
    """Every class in a random order."""
    rng = np.random.default_rng(seed)
    classes = np.unique(pool.class_ids).tolist()
    return {class_id: rng.permutation(np.flatnonzero(pool.class_ids == class_id)) for class_id in classes}


def used_bytes(exemplars: Exemplars) -> int:
    return len(pack.to_bytes(exemplars)) if len(exemplars) else 0


def everything(pool: Pool, order: Mapping[int, IntArray], quality: int) -> Exemplars:
    """All images in the order of a pack, whatever they cost."""
    return pool.encode(np.concatenate([order[class_id] for class_id in sorted(order)]), quality)


def test_exemplars_of_nine_bytes_by_hand() -> None:
    pool = Pool(None, ArrayImages(shades(0, 60), np.arange(60) % 2), "4:2:0")
    order = {0: np.arange(0, 60, 2), 1: np.arange(1, 60, 2)[::-1]}
    head = used_bytes(everything(pool, {0: order[0][:5], 1: order[1][:5]}, 100)) - 10 * 9
    kept = fill(pool, order, {0: head // 2 + 45, 1: head - head // 2 + 45 + 8}, 100)
    assert shades_of(kept.decode()) == [0, 2, 4, 6, 8, 59, 57, 55, 53, 51]
    one_more = fill(pool, order, {0: head // 2 + 45, 1: head - head // 2 + 45 + 9}, 100)
    assert len(one_more) == 11


@given(
    n=st.integers(1, 60),
    classes=st.integers(1, 4),
    share=st.integers(0, 1500),
    seed=st.integers(0, 50),
    quality=st.sampled_from([10, 60, 90]),
)
@settings(max_examples=60, deadline=None)
def test_what_is_kept_is_what_would_be_kept_had_everything_been_encoded(
    n: int, classes: int, share: int, seed: int, quality: int
) -> None:
    pool = pool_of(n, classes, seed=seed)
    order = orders(pool, seed)
    shares = {class_id: share + 7 * class_id for class_id in order}
    kept = fill(pool, order, shares, quality)
    assert used_bytes(kept) <= sum(shares.values())
    whole = everything(pool, order, quality)
    expected = pack.fit(whole, shares)
    assert dict(runs_of(kept.class_ids)) == dict(runs_of(expected.class_ids))
    assert kept.segments() == expected.segments()


def test_the_shares_are_nearly_filled_and_one_classs_leftover_buys_another_an_exemplar() -> None:
    pool = pool_of(400, 2)
    kept = fill(pool, orders(pool), {0: 3000, 1: 3000}, 50)
    assert 6000 - int(kept.sizes.max()) < used_bytes(kept) <= 6000


def test_more_bytes_keep_the_same_exemplars_and_more() -> None:
    pool = pool_of(200, 1)
    small, large = (fill(pool, orders(pool), {0: share}, 50) for share in (1500, 3000))
    assert large.segments()[: len(small)] == small.segments()
    assert len(large) > len(small) > 10


def test_what_is_stored_at_the_quality_is_copied_and_at_another_encoded_again() -> None:
    stored = strip.encode(photos(10, (8, 8, 3), seed=5), np.zeros(10, int), quality=50)
    pool = pool_of(10, 1, stored=stored)
    order = {0: np.arange(20)[::-1]}
    kept = fill(pool, order, {0: 10**5}, 50)
    assert kept.segments()[10:] == stored.segments()[::-1]
    again = fill(pool, order, {0: 10**5}, 30)
    assert again.segments()[10:] == strip.encode(stored.decode(), stored.class_ids, quality=30).segments()[::-1]


def test_a_share_of_a_class_that_is_not_there_is_not_spent() -> None:
    pool = pool_of(100, 2)
    assert used_bytes(fill(pool, orders(pool), {0: 900, 1: 900, 8: 50_000}, 50)) <= 1800


@pytest.mark.parametrize("shares", [{}, {0: 0, 1: 0}, {0: 60, 1: 60}])
def test_shares_that_hold_nothing_keep_nothing(shares: dict[int, int]) -> None:
    pool = pool_of(10, 2)
    assert len(fill(pool, orders(pool), shares, 50)) == 0


def test_the_smallest_pack_of_one_exemplar_is_what_one_exemplar_needs() -> None:
    pool = pool_of(30, 3)
    order = orders(pool)
    needed = smallest(pool, order, 50)
    parts = [needed - 2 * (needed // 3), needed // 3, needed // 3]
    assert len(fill(pool, order, dict(enumerate(parts)), 50)) == 1
    assert len(fill(pool, order, dict(enumerate([parts[0] - 1, *parts[1:]])), 50)) == 0


def test_of_an_upload_of_nothing_what_is_stored_is_kept() -> None:
    stored = strip.encode(photos(6, (8, 8, 3)), np.repeat([0, 1], 3), quality=50)
    pool = Pool(stored, NO_IMAGES, "4:2:0")
    kept = fill(pool, {0: np.arange(3), 1: np.arange(3, 6)}, {0: 5000, 1: 5000}, 50)
    assert pack.to_bytes(kept) == pack.to_bytes(stored)
