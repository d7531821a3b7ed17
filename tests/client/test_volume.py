"""Volumes and R by their formulas: against plain numpy, by hand, and exactly 1 where nothing was lost."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from engram import strip
from engram.schemas import Definition
from engram.selection import volume
from engram.selection.embedding import BuiltinEmbedder
from engram.selection.images import NO_IMAGES, ArrayImages, Pool
from engram.selection.volume import Comparison, Volumes, log_volume, ratios
from tests.photos import UInt8Array, mosaics, photos

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]


# The volume


def test_the_log_volume_of_orthogonal_rows_is_nothing_and_of_equal_ones_is_that_of_delta() -> None:
    rows = np.stack([np.eye(4, dtype=np.float32), np.ones((4, 4), np.float32) / 2])
    volumes, dependent = log_volume(rows)
    assert volumes[0] == pytest.approx(2 * np.log1p(volume.DELTA))
    # One eigenvalue of 4 + delta and three of delta; the volume is the root of their product.
    assert volumes[1] == pytest.approx(0.5 * (np.log(4) + 3 * np.log(volume.DELTA)), rel=1e-4)
    assert dependent.tolist() == [False, True]


@given(st.integers(2, 20), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_the_log_volume_is_half_the_log_determinant_of_the_gram_matrix(k: int, seed: int) -> None:
    rows = np.random.default_rng(seed).standard_normal((1, k, 40)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=2, keepdims=True)
    assert log_volume(rows)[0][0] == pytest.approx(plain_log_volume(rows[0]))


def plain_log_volume(rows_KD: FloatArray) -> float:
    """The log of the square root of det(M M^T + delta I)."""
    rows = rows_KD.astype(np.float64)
    return float(0.5 * np.linalg.slogdet(rows @ rows.T + volume.DELTA * np.eye(len(rows)))[1])


# Blocks


@given(st.integers(0, 400), st.integers(2, 64), st.integers(1, 20))
@settings(max_examples=60, deadline=None)
def test_blocks_are_full_disjoint_spread_over_the_ranking_and_bounded_in_number(n: int, block: int, most: int) -> None:
    found = volume.blocks(n, block, most)
    assert found.shape == (min(n // block, most), block)
    if n < block:
        return
    assert len(np.unique(found)) == found.size
    assert found.min() >= 0
    assert found.max() < n
    assert (found[:, 0] < n // block).all()  # every block begins among the best ranks
    assert (found[:, -1] >= n - n // block - block).all()  # and ends among the last


def test_two_blocks_of_three_by_hand() -> None:
    assert volume.blocks(7, 3, 16).tolist() == [[0, 2, 4], [1, 3, 5]]
    assert volume.blocks(12, 3, 2).tolist() == [[0, 4, 8], [3, 7, 11]]


# R


def test_the_three_ratios_are_those_of_their_formulas() -> None:
    found = ratios([Volumes(-10.0, -12.0, False), Volumes(-20.0, -19.0, False)], block=4)
    assert found["raw"] == pytest.approx(np.exp(0.5))
    assert found["per_sample"] == pytest.approx(np.exp(0.5 / 4))
    assert found["log_ratio"] == pytest.approx(15 / 15.5)


def test_ratios_of_nothing_are_unknown_and_enormous_ones_stay_finite() -> None:
    assert ratios([], 8) == {"raw": None, "per_sample": None, "log_ratio": None}
    assert np.isfinite(list(ratios([Volumes(9000.0, -9000.0, True)], 8).values())).all()  # type: ignore[arg-type]
    assert ratios([Volumes(0.0, 0.0, False)], 8) == {"raw": 1.0, "per_sample": 1.0, "log_ratio": 1.0}


def pool_of(images: UInt8Array, class_ids: IntArray) -> Pool:
    return Pool(None, ArrayImages(images, class_ids), "4:2:0")


def plain_ratios(
    images: UInt8Array, order: dict[int, IntArray], depths: dict[int, int], *, block: int, quality: int
) -> dict[Definition, float]:
    """The module docstring's formulas, one image and one block at a time."""
    embedder = BuiltinEmbedder(pool_of(images, np.zeros(len(images), np.int64)).shape)

    def feature(number: int, quality: int | None) -> FloatArray:
        image = images[number : number + 1]
        seen = image if quality is None else strip.encode(image, [0], quality=quality).decode()
        return np.asarray(embedder.embed(seen)[0])

    gaps, originals = [], []
    for class_id, numbers in order.items():
        count = depths[class_id] // block
        blocks = [[int(numbers[first + count * place]) for place in range(block)] for first in range(count)]
        stored = np.mean([plain_log_volume(np.stack([feature(n, quality) for n in each])) for each in blocks])
        original = np.mean([plain_log_volume(np.stack([feature(n, None) for n in each])) for each in blocks])
        gaps.append(float(stored - original))
        originals.append(float(original))
    gap, base = float(np.mean(gaps)), float(np.mean(originals))
    return {"raw": np.exp(gap), "per_sample": np.exp(gap / block), "log_ratio": (base + gap) / base}


@pytest.mark.parametrize("quality", [10, 60, 95])
@pytest.mark.parametrize("shape", [(16, 16, 3), (11, 14, 1)])
def test_measured_ratios_are_the_formulas_of_the_docstring(quality: int, shape: tuple[int, int, int]) -> None:
    rng = np.random.default_rng(4)
    images, class_ids = photos(60, shape), rng.permutation(np.repeat([2, 9], [25, 35]))
    order = {class_id: rng.permutation(np.flatnonzero(class_ids == class_id)) for class_id in (2, 9)}
    embedder = BuiltinEmbedder(shape)
    # Of class 2 the cheapest candidate keeps 17, of class 9 five: at least two blocks of six are compared.
    comparison = Comparison(pool_of(images, class_ids), order, {2: 17, 9: 5}, block=6, embedder=embedder)
    found = ratios(list(comparison.volumes(quality).values()), comparison.block)
    assert found == pytest.approx(plain_ratios(images, order, {2: 17, 9: 12}, block=6, quality=quality), rel=1e-4)


@pytest.mark.parametrize("side", [64, *(pytest.param(side, marks=pytest.mark.slow) for side in (96, 224))])
def test_r_of_large_photographs_falls_with_the_quality(side: int) -> None:
    images = crops(128, side)
    pool = pool_of(images, np.zeros(len(images), np.int64))
    everything = {0: np.arange(len(images))}
    comparison = Comparison(pool, everything, {0: len(images)}, block=32, embedder=BuiltinEmbedder(pool.shape))
    of_quality = [ratios(list(comparison.volumes(quality).values()), 32)["raw"] or 0 for quality in (5, 25, 75)]
    assert of_quality == sorted(of_quality)
    assert of_quality[0] < 0.88 < of_quality[2] < 1.1


def crops(count: int, side: int) -> UInt8Array:
    """Squares of two photographs at random places, of random sizes, all scaled to one."""
    from sklearn.datasets import load_sample_images  # two seconds of a core

    rng = np.random.default_rng(3)
    photographs = [Image.fromarray(photograph) for photograph in load_sample_images().images]
    scaled = []
    for number in range(count):
        size = int(rng.integers(224, 427))
        x, y = rng.integers(0, [640 - size, 427 - size]).tolist()
        crop = photographs[number % 2].resize((side, side), Image.Resampling.LANCZOS, (x, y, x + size, y + size))
        scaled.append(np.asarray(crop))
    return np.stack(scaled)


@given(n=st.integers(4, 40), block=st.integers(2, 16), seed=st.integers(0, 99), quality=st.sampled_from([10, 50, 90]))
@settings(max_examples=20, deadline=None)
def test_a_lossless_copy_has_a_ratio_of_one(n: int, block: int, seed: int, quality: int) -> None:
    pool = pool_of(mosaics(n, seed=seed), np.zeros(n, np.int64))
    comparison = Comparison(pool, {0: np.arange(n)}, {0: n}, block=block, embedder=BuiltinEmbedder(pool.shape))
    found = list(comparison.volumes(quality).values())
    if n < block:
        assert found == []
        return
    assert found[0].gap == 0
    assert ratios(found, block) == {"raw": 1.0, "per_sample": 1.0, "log_ratio": 1.0}


def test_a_ratio_changes_with_what_coding_does_and_not_with_the_order_of_a_block() -> None:
    images, ids = photos(32), np.zeros(32, np.int64)
    embedder = BuiltinEmbedder((16, 16, 3))

    def gap(order: IntArray, quality: int) -> float:
        return (
            Comparison(pool_of(images, ids), {0: order}, {0: 32}, block=32, embedder=embedder).volumes(quality)[0].gap
        )

    forwards, backwards = np.arange(32), np.arange(32)[::-1]
    assert gap(forwards, 20) == pytest.approx(gap(backwards, 20))
    assert abs(gap(forwards, 10)) > 3 * abs(gap(forwards, 95))


def test_equal_images_are_reported_as_singular() -> None:
    images = np.concatenate([np.repeat(photos(1), 20, axis=0), photos(20)])
    class_ids = np.repeat([0, 1], 20)
    order = {0: np.arange(20), 1: np.arange(20, 40)}
    embedder = BuiltinEmbedder((16, 16, 3))
    found = Comparison(pool_of(images, class_ids), order, {}, block=8, embedder=embedder).volumes(50)
    assert [found[class_id].is_singular for class_id in (0, 1)] == [True, False]


def test_a_block_is_at_most_half_the_dimensions() -> None:
    embedder = BuiltinEmbedder((16, 16, 3), dimensions=10)
    pool = pool_of(photos(20), np.zeros(20, np.int64))
    comparison = Comparison(pool, {0: np.arange(20)}, {0: 20}, block=32, embedder=embedder)
    assert comparison.block == 5
    assert comparison.numbers[0].shape == (4, 5)


def test_the_cost_does_not_grow_with_the_images_of_a_class() -> None:
    pool = pool_of(photos(1, (8, 8, 1)).repeat(2000, axis=0), np.arange(2000) % 4)
    order = {class_id: np.arange(class_id, 2000, 4) for class_id in range(4)}
    kept = dict.fromkeys(range(4), 500)
    comparison = Comparison(pool, order, kept, block=4, embedder=BuiltinEmbedder(pool.shape))
    assert {len(numbers) for numbers in comparison.numbers.values()} == {16}


def test_what_is_stored_is_compared_as_it_is_replayed() -> None:
    """Of a pool's stored rows the pixels are those of their exemplars: at their own quality nothing more is lost."""
    images, ids = photos(16), np.zeros(16, np.int64)
    stored = strip.encode(images, ids, quality=90)
    pool = Pool(stored, NO_IMAGES, "4:2:0")
    embedder = BuiltinEmbedder((16, 16, 3))
    comparison = Comparison(pool, {0: np.arange(16)}, {0: 16}, block=8, embedder=embedder)
    assert comparison.volumes(90)[0].gap == 0
    assert comparison.volumes(20)[0].gap != 0
