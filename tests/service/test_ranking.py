"""This file tests the rankings: by hand, by their invariants, and that their cost stays linear in the class."""

from __future__ import annotations

from time import perf_counter

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engram.schemas import Ranking
from engram_service.selection import ranking
from engram_service.selection.ranking import FloatArray, rank

METHODS: tuple[Ranking, ...] = ("herding", "greedy_dpp", "reservoir", "ring", "random")


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=seed))


def unit_rows(n: int, d: int, seed: int = 0) -> FloatArray:
    rows = generator(seed).standard_normal((n, d)) + 0.3
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows.astype(np.float32)


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=25, deadline=None)
@given(n=st.integers(0, 60), d=st.integers(1, 12), copies=st.integers(1, 3), seed=st.integers(0, 2**32), data=st.data())
def test_a_ranking_has_no_repeats_and_every_shorter_one_is_its_prefix(
    method: Ranking, n: int, d: int, copies: int, seed: int, data: st.DataObject
) -> None:
    features = np.tile(unit_rows(n, d, seed), (copies, 1))
    whole = rank(features, len(features), method=method, rng=generator(seed))
    assert sorted(whole.tolist()) == list(range(len(features)))
    count = data.draw(st.integers(0, len(features)))
    assert rank(features, count, method=method, rng=generator(seed)).tolist() == whole[:count].tolist()


@pytest.mark.parametrize("method", METHODS)
def test_prefixes_hold_beyond_one_group_too(method: Ranking, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranking, "GROUP", 16)
    features = unit_rows(53, 6)
    whole = rank(features, 53, method=method, rng=generator())
    assert sorted(whole.tolist()) == list(range(53))
    for count in (0, 1, 3, 4, 5, 31, 52):
        assert rank(features, count, method=method, rng=generator()).tolist() == whole[:count].tolist()


def test_herding_by_hand_picks_the_mean_first_and_balances_afterwards() -> None:
    h = np.sqrt(0.5)
    features = np.array([[1, 0], [0, 1], [h, h]], np.float32)
    # mean = (0.569, 0.569): row 2 is nearest; then w = 2 mean - x2 = (0.431, 0.431), rows 0 and 1 tie.
    assert rank(features, 3, method="herding", rng=generator()).tolist() == [2, 0, 1]


def test_herding_keeps_the_mean_of_a_class_better_than_chance_at_every_prefix() -> None:
    features = unit_rows(500, 16)
    mean = features.mean(axis=0)
    herded = features[rank(features, 100, method="herding", rng=generator())]
    drawn = features[rank(features, 100, method="random", rng=generator())]
    for count in (5, 20, 100):
        assert np.linalg.norm(herded[:count].mean(axis=0) - mean) < 0.5 * np.linalg.norm(
            drawn[:count].mean(axis=0) - mean
        )


def reference_greedy_dpp(features: FloatArray, count: int) -> list[int]:
    """Algorithm 1 of Chen et al. as printed: the incremental Cholesky factor c and the gains d squared."""
    kernel = features.astype(np.float64) @ features.T.astype(np.float64)
    n = len(features)
    c: npt.NDArray[np.float64] = np.zeros((n, 0))
    gains = np.diag(kernel).round(6)
    chosen = [int(gains.argmax())]
    while len(chosen) < count:
        j = chosen[-1]
        e = (kernel[j] - c @ c[j]) / np.sqrt(gains[j])
        c = np.column_stack([c, e])
        gains = gains - e**2
        gains[chosen] = -np.inf
        chosen.append(int(gains.argmax()))
    return chosen


@pytest.mark.parametrize("seed", range(5))
def test_greedy_dpp_picks_what_the_printed_algorithm_picks(seed: int) -> None:
    features = unit_rows(80, 24, seed)
    picks = rank(features, 20, method="greedy_dpp", rng=generator()).tolist()
    assert picks == reference_greedy_dpp(features, 20)


def test_greedy_dpp_starts_a_new_round_when_nothing_left_adds_volume() -> None:
    features = np.repeat(np.eye(3, dtype=np.float32), 2, axis=0)  # rows 0 and 1 are equal, 2 and 3, 4 and 5
    assert rank(features, 6, method="greedy_dpp", rng=generator()).tolist() == [0, 2, 4, 1, 3, 5]


def test_greedy_dpp_spans_more_volume_than_herding() -> None:
    features = unit_rows(300, 40)

    def log_volume(method: Ranking) -> float:
        chosen = features[rank(features, 20, method=method, rng=generator())].astype(np.float64)
        return float(np.linalg.slogdet(chosen @ chosen.T)[1])

    assert log_volume("greedy_dpp") > log_volume("herding") > -np.inf


def test_ring_keeps_the_latest_first() -> None:
    assert rank(unit_rows(4, 2), 3, method="ring", rng=generator()).tolist() == [3, 2, 1]


def test_reservoir_keeps_every_image_equally_often_and_depends_on_the_seed_only() -> None:
    kept = np.zeros(10)
    for seed in range(2000):
        kept[rank(np.empty((10, 1), np.float32), 3, method="reservoir", rng=generator(seed))] += 1
    assert np.abs(kept / 2000 - 0.3).max() < 0.05
    again = [rank(np.empty((50, 1), np.float32), 9, method="reservoir", rng=generator(7)).tolist() for _ in range(2)]
    assert again[0] == again[1]


def test_random_orders_are_pinned_as_they_decide_what_is_kept() -> None:
    assert ranking.order(8, method="random", rng=generator(1)).tolist() == [3, 5, 2, 7, 0, 6, 1, 4]


@pytest.mark.parametrize("method", METHODS)
def test_asking_for_more_images_than_there_are_is_an_error(method: Ranking) -> None:
    with pytest.raises(ValueError, match="cannot rank 4 of 3"):
        rank(unit_rows(3, 2), 4, method=method, rng=generator())


@pytest.mark.parametrize("method", ["herding", "greedy_dpp"])
def test_order_refuses_methods_that_need_features(method: Ranking) -> None:
    with pytest.raises(ValueError, match="ranks by features"):
        ranking.order(3, method=method, rng=generator())


@pytest.mark.parametrize("method", ["herding", "greedy_dpp"])
def test_cost_is_linear_in_the_class_although_the_count_grows_with_it(method: Ranking) -> None:
    """100,000 images with a fifth of them kept: quadratic cost would be 600 times that of one group, linear is 24."""
    features = unit_rows(100_000, 128)

    def seconds(n: int) -> float:
        start = perf_counter()
        rank(features[:n], n // 5, method=method, rng=generator())
        return perf_counter() - start

    one_group = min(seconds(ranking.GROUP) for _ in range(3))
    assert seconds(100_000) < 120 * one_group
