"""This file tests the choice of quality: R by its theorems, the filling of shares, and every odd upload there is."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Sequence
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engram import pack
from engram.errors import BudgetExceeded, Cancelled, InvalidRequest
from engram.schemas import Candidate, Definition, IngestOptions, Ranking, Rule
from engram.strip import runs_of
from engram_service.selection import ranking, volume
from engram_service.selection.embedding import BuiltinEmbedder, Embedder
from engram_service.selection.filling import Filler
from engram_service.selection.quality import Selection, Trial, choose, select
from engram_service.selection.volume import Volumes, log_volume, ratios

UInt8Array = npt.NDArray[np.uint8]
FloatArray = npt.NDArray[np.float32]


class Upload:
    """Images in memory; remembers how many were read at once and in all."""

    def __init__(self, pictures: UInt8Array, class_ids: Sequence[int] | npt.NDArray[np.int64]) -> None:
        self.pictures = pictures
        self.class_ids = np.asarray(class_ids, dtype=np.int64)
        self.shape = (pictures.shape[1], pictures.shape[2], pictures.shape[3])
        self.most_at_once = 0

    def read(self, indices: npt.NDArray[np.int64]) -> UInt8Array:
        self.most_at_once = max(self.most_at_once, len(indices))
        return self.pictures[indices]


def photos(n: int, shape: tuple[int, int, int] = (16, 16, 3), *, seed: int = 0, noise: int = 12) -> UInt8Array:
    """Waves with some grain: like photographs, they lose detail at low qualities."""
    rng = np.random.default_rng(seed)
    h, w, c = shape
    y, x = np.mgrid[0:h, 0:w]
    fy, fx, phase = rng.uniform(0.1, 0.7, (3, n, 1, 1, c))
    waves = 110 * np.sin(fy * y[None, :, :, None] + fx * x[None, :, :, None] + 10 * phase) + 128
    grain = rng.integers(-noise, noise + 1, (n, h, w, c))
    return np.asarray(np.clip(waves + grain, 0, 255), np.uint8)


def upload(per_class: int = 60, classes: Sequence[int] = (3, 1), **how: Any) -> Upload:
    class_ids = [class_id for _ in range(per_class) for class_id in classes]
    return Upload(photos(len(class_ids), **how), class_ids)


def run(images: Upload, share: int | dict[int, int] = 4000, **how: Any) -> Selection:
    shares = share if isinstance(share, dict) else dict.fromkeys(np.unique(images.class_ids).tolist(), share)
    kept, adopt = how.pop("kept", None), how.pop("adopt", None)
    advance: Callable[[int], None] = how.pop("advance", lambda count: None)
    embedder: Embedder = how.pop("embedder", None) or BuiltinEmbedder(images.shape)
    options = IngestOptions(**how)
    return select(
        images,
        shares=shares,
        options=options,
        subsampling="4:2:0",
        embedder=embedder,
        quality=kept,
        adopt=adopt,
        advance=advance,
    )


def real_bytes(selection: Selection) -> int:
    return len(pack.to_bytes(selection.exemplars))


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
    gram = rows[0].astype(np.float64) @ rows[0].T.astype(np.float64) + volume.DELTA * np.eye(k)
    assert log_volume(rows)[0][0] == pytest.approx(0.5 * np.linalg.slogdet(gram)[1])


@given(st.integers(0, 400), st.integers(2, 64), st.integers(1, 20))
@settings(max_examples=60, deadline=None)
def test_blocks_are_full_disjoint_spread_over_the_ranking_and_bounded_in_number(n: int, block: int, most: int) -> None:
    found = volume.blocks(n, block, most)
    if n < 2:
        assert found.size == 0
        return
    assert found.shape == (min(n // block, most), block) if n >= block else (1, n)
    assert len(np.unique(found)) == found.size
    assert found.min() >= 0
    assert found.max() < n
    if n >= block:
        assert (found[:, 0] < n // block).all()  # every block begins among the best ranks
        assert (found[:, -1] >= n - n // block - block).all()  # and ends among the last


def test_the_three_ratios_are_those_of_their_formulas() -> None:
    found = ratios([Volumes(-10.0, -12.0, False), Volumes(-20.0, -19.0, False)], block=4)
    assert found["raw"] == pytest.approx(np.exp(0.5))
    assert found["per_sample"] == pytest.approx(np.exp(0.5 / 4))
    assert found["log_ratio"] == pytest.approx(15 / 15.5)


def test_ratios_of_nothing_are_unknown_and_enormous_ones_stay_finite() -> None:
    assert ratios([], 8) == {"raw": None, "per_sample": None, "log_ratio": None}
    assert np.isfinite(list(ratios([Volumes(9000.0, -9000.0, True)], 8).values())).all()  # type: ignore[arg-type]
    assert ratios([Volumes(0.0, 0.0, False)], 8) == {"raw": 1.0, "per_sample": 1.0, "log_ratio": 1.0}


# The choice


def trial(q: int, ratio: float | None, exemplars: int | None = None, *, classes: int = 2) -> Trial:
    passes = ratio is not None and abs(ratio - 1) < 0.5
    count = 1000 // q if exemplars is None else exemplars
    values: dict[Definition, float | None] = dict.fromkeys(get_args(Definition), ratio)
    candidate = Candidate(
        quality=q, exemplars=count, bytes=count, ratio=values, passes=passes, gaps={}, singular_classes=[]
    )
    return Trial(candidate, classes)


@pytest.mark.parametrize(
    ("rule", "measured", "chosen"),
    [
        ("all_higher", [9.0, 1.9, 1.4, 1.1], 50),
        ("any", [9.0, 1.9, 1.4, 1.1], 50),
        # Blur and noise cancel at 10: one measured task had just this.
        ("all_higher", [1.23, 1.9, 1.4, 1.1], 50),
        ("any", [1.23, 1.9, 1.4, 1.1], 10),
        # The test has two sides.
        ("all_higher", [0.1, 0.4, 0.6, 0.9], 50),
        ("all_higher", [1.0, 1.0, 1.0, 1.0], 10),
        # None passes: the highest.
        ("all_higher", [9.0, 8.0, 7.0, 6.0], 75),
        ("any", [9.0, 8.0, 7.0, 6.0], 75),
        ("all_higher", [1.0, 1.0, 1.0, 1.6], 75),
        # What cannot be measured neither wins nor stops a lower one.
        ("all_higher", [9.0, 1.2, 1.1, None], 25),
        ("all_higher", [None, None, None, None], 75),
    ],
)
def test_the_rule_picks_the_most_exemplars_that_keep_their_volume(
    rule: Rule, measured: list[float | None], chosen: int
) -> None:
    trials = [trial(q, ratio) for q, ratio in zip((10, 25, 50, 75), measured, strict=True)]
    found, reason = choose(trials, options=IngestOptions(rule=rule))
    assert found.quality == chosen
    assert str(chosen) in reason


def test_of_candidates_that_keep_equally_many_the_best_looking_one_wins() -> None:
    found, reason = choose([trial(10, 1.0, 7), trial(50, 1.0, 7), trial(90, 1.0, 6)], options=IngestOptions())
    assert found.quality == 50
    assert "no more would fit or be left" in reason


def test_a_candidate_that_leaves_a_class_with_nothing_cannot_win() -> None:
    found, _ = choose([trial(10, 9.0), trial(50, 9.0), trial(90, 1.0, classes=1)], options=IngestOptions())
    assert found.quality == 50


# The whole selection


def test_what_is_kept_fits_the_shares_in_real_bytes_and_nearly_fills_them() -> None:
    selection = run(upload(400))
    assert 0.95 * 8000 < real_bytes(selection) <= 8000
    assert [class_id for class_id, _ in runs_of(selection.exemplars.class_ids)] == [1, 3]
    chosen = {c.quality: c for c in selection.decision.candidates}[selection.decision.quality]
    assert chosen.exemplars == len(selection.exemplars)
    assert chosen.bytes == real_bytes(selection)


def test_every_candidate_is_recorded_with_every_definition_and_costs_at_most_the_shares() -> None:
    decision = run(upload(300)).decision
    assert [c.quality for c in decision.candidates] == [10, 25, 50, 75, 90]
    counts = [c.exemplars for c in decision.candidates]
    assert counts == sorted(counts, reverse=True)
    for candidate in decision.candidates:
        assert all(value is not None and value > 0 for value in candidate.ratio.values())
        assert candidate.bytes <= 8000
        assert set(candidate.gaps) == {1, 3}
    assert decision.embedder == "builtin"
    assert decision.block == 32  # the built-in embedding's own
    assert run(upload(300), block=8).decision.block == 8
    assert decision.images == 600
    assert decision.seconds > 0


def test_the_rows_of_a_class_are_its_ranking_and_decode_to_its_pictures() -> None:
    images = upload(50)
    selection = run(images, quality=95, ranking="ring", share=100_000)
    decoded = selection.exemplars.decode().astype(int)
    of_class_1 = images.pictures[images.class_ids == 1][::-1].astype(int)
    assert np.abs(decoded[:50] - of_class_1).mean() < np.abs(decoded[:50] - of_class_1[::-1]).mean() / 2


def test_more_bytes_keep_the_same_exemplars_and_more() -> None:
    images = upload(200, noise=0)
    small, large = (run(images, share=share, quality=50).exemplars.decode() for share in (2500, 5000))
    few = len(small) // 2
    assert np.abs(small[:few].astype(int) - large[:few].astype(int)).max() == 0


def test_a_quality_asked_for_or_kept_from_the_task_is_not_measured() -> None:
    class Unwanted(BuiltinEmbedder):
        def embed(self, images_NHWC: UInt8Array) -> FloatArray:
            raise AssertionError("nothing needs features here")

    images = upload(20)
    for how, words in (({"quality": 40}, "asked for"), ({"kept": 40}, "first upload")):
        selection = run(images, ranking="ring", embedder=Unwanted(images.shape), **how)
        assert selection.decision.quality == 40
        assert words in selection.decision.reason
        (only,) = selection.decision.candidates
        assert only.exemplars == len(selection.exemplars)
        assert only.ratio == {"raw": None, "per_sample": None, "log_ratio": None}


def test_when_everything_fits_at_the_highest_quality_nothing_is_gained_by_a_lower_one() -> None:
    images = upload(12)
    selection = run(images, share=10**6, epsilon=100)
    assert selection.decision.quality == 90
    assert len(selection.exemplars) == 24


@pytest.mark.parametrize("method", get_args(Ranking))
def test_two_runs_are_identical(method: Ranking) -> None:
    first, second = (run(upload(40), ranking=method, seed=5) for _ in range(2))
    assert pack.to_bytes(first.exemplars) == pack.to_bytes(second.exemplars)
    assert first.decision.candidates == second.decision.candidates


class Lossless(BuiltinEmbedder):
    """Sees only how bright each quadrant is, in coarse steps: JPEG changes nothing of it."""

    def embed(self, images_NHWC: UInt8Array) -> FloatArray:
        n, h, w, c = images_NHWC.shape
        means = images_NHWC.reshape(n, 2, h // 2, 2, w // 2, c).mean(axis=(2, 4, 5)).reshape(n, 4)
        rows = np.concatenate([np.round(means / 64) + 1, np.ones((n, 4))], axis=1).astype(np.float32)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        return rows


def test_exemplars_whose_features_did_not_change_have_a_ratio_of_one_at_every_quality() -> None:
    rng = np.random.default_rng(0)
    quadrants = rng.integers(0, 4, (120, 2, 2, 1)) * 64
    images = Upload(quadrants.repeat(8, axis=1).repeat(8, axis=2).astype(np.uint8), [0] * 120)
    decision = run(images, embedder=Lossless(images.shape), share=1000).decision
    assert decision.block == 4  # D / 2
    for candidate in decision.candidates:
        assert candidate.ratio == pytest.approx({"raw": 1.0, "per_sample": 1.0, "log_ratio": 1.0})
    assert decision.quality == 10


def test_low_qualities_lose_volume_and_high_ones_keep_it() -> None:
    decision = run(upload(300, shape=(16, 16, 1), noise=30), share=20_000).decision
    ratio = {c.quality: c.ratio["raw"] for c in decision.candidates}
    distance = {q: abs(np.log(value)) for q, value in ratio.items() if value is not None}
    assert distance[10] > 3 * distance[90]
    assert decision.quality > 10


# Odd uploads


@pytest.mark.parametrize("method", get_args(Ranking))
@pytest.mark.parametrize(
    ("pictures", "class_ids"),
    [
        (photos(1), [7]),
        (photos(2), [7, 7]),
        (photos(3), [2, 1, 0]),
        (photos(9), [0] * 8 + [1]),
        (photos(40), [5] * 40),
        (photos(5, (2, 2, 1)), [0, 0, 0, 1, 1]),
        (photos(5, (1, 1, 3)), [0, 0, 0, 1, 1]),
        (photos(6, (65, 33, 3)), [0, 0, 0, 1, 1, 1]),
        (np.full((50, 8, 8, 1), 77, np.uint8), [0, 1] * 25),
        (np.zeros((50, 8, 8, 3), np.uint8), [2**31 - 1] * 50),
    ],
    ids=["one image", "two", "one each", "a class of one", "one class", "2x2", "1x1", "65x33", "constant", "black"],
)
def test_odd_uploads_are_selected_like_any_other(method: Ranking, pictures: UInt8Array, class_ids: list[int]) -> None:
    selection = run(Upload(pictures, class_ids), share=20_000, ranking=method)
    assert real_bytes(selection) <= 20_000 * len(set(class_ids))
    assert set(selection.exemplars.class_ids.tolist()) == set(class_ids)
    assert selection.decision.model_dump_json()


def test_equal_images_are_reported_as_singular_and_not_dropped() -> None:
    pictures = np.concatenate([np.repeat(photos(1), 40, axis=0), photos(40)])
    decision = run(Upload(pictures, [0] * 40 + [1] * 40)).decision
    for candidate in decision.candidates:
        assert candidate.singular_classes == [0]
        assert set(candidate.gaps) == {0, 1}


def test_nothing_fits_is_an_error_with_both_numbers() -> None:
    images = upload(10)
    with pytest.raises(BudgetExceeded) as caught:
        run(images, share=60)
    assert caught.value.details["budget_bytes"] == 120
    needed = caught.value.details["needed_bytes"]
    assert str(needed) in caught.value.message
    first, second = needed // 2, needed - needed // 2
    with pytest.raises(BudgetExceeded):
        run(images, share={1: first, 3: second - 1}, candidates=(10,))
    assert real_bytes(run(images, share={1: first, 3: second}, candidates=(10,))) == needed


def test_shares_of_nothing_are_an_error() -> None:
    with pytest.raises(BudgetExceeded):
        run(upload(3), share={})


@given(share=st.integers(100, 3000), seed=st.integers(0, 50), method=st.sampled_from(get_args(Ranking)))
@settings(max_examples=25, deadline=None)
def test_no_share_is_ever_exceeded(share: int, seed: int, method: Ranking) -> None:
    images = upload(20, seed=seed, shape=(8, 8, 3), classes=(4, 0, 9))
    try:
        used_bytes = real_bytes(run(images, share=share, ranking=method, candidates=(10, 60)))
    except BudgetExceeded as error:
        used_bytes, share = 0, error.details["needed_bytes"]
        assert real_bytes(run(images, share=share, ranking=method, candidates=(10,))) <= 3 * share
    assert used_bytes <= 3 * share


def test_a_share_of_a_class_that_is_not_there_is_not_spent() -> None:
    images = upload(100)
    assert real_bytes(run(images, share={1: 1500, 3: 1500, 8: 50_000})) <= 3000


def test_no_candidates_and_no_images_are_errors() -> None:
    with pytest.raises(InvalidRequest, match="0 candidates"):
        run(upload(3), candidates=())
    with pytest.raises(InvalidRequest, match="0 images"):
        run(Upload(photos(0), []), share={})


# Cost


def test_progress_counts_every_image_once_and_can_end_the_work() -> None:
    told: list[int] = []
    run(upload(70), advance=told.append)
    assert sum(told) == 140
    assert min(told) >= 0
    assert len(told) > 10

    def stop(count: int) -> None:
        raise Cancelled("the ingest was cancelled")

    with pytest.raises(Cancelled):
        run(upload(70), advance=stop)


def test_a_class_of_many_images_is_not_encoded_to_keep_a_few(monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = 0
    real = Filler._encode

    def counting(self: Any, chosen: dict[int, npt.NDArray[np.int64]], *rest: Any) -> Any:
        nonlocal encoded
        encoded += sum(map(len, chosen.values()))
        return real(self, chosen, *rest)

    monkeypatch.setattr(Filler, "_encode", counting)
    selection = run(upload(5000, classes=(0,), shape=(8, 8, 1)), share=3000, candidates=(50, 75))
    assert encoded < 10 * len(selection.exemplars)


def test_classes_beyond_one_group_are_ranked_in_groups_and_keep_the_order_of_a_pack(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ranking, "GROUP", 64)
    selection = run(upload(500), share=30_000)
    assert (np.diff(selection.exemplars.class_ids) >= 0).all()
    assert real_bytes(selection) <= 60_000


def test_memory_does_not_grow_with_the_number_of_images() -> None:
    """The pictures themselves lie with the caller; what selection adds is chunks, one group's features, and strips."""

    def peak(n: int) -> int:
        images = Upload(np.broadcast_to(photos(1, (32, 32, 3)), (n, 32, 32, 3)), np.zeros(n, np.int64))
        tracemalloc.start()
        try:
            run(images, share=40_000, candidates=(25, 75))
            assert images.most_at_once * 3072 <= 2**23
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    small, large = peak(4000), peak(40_000)
    assert large < 120 * 2**20
    assert large < small + 16 * 2**20


def test_a_later_task_adopts_the_buffers_quality_and_says_what_it_would_have_chosen() -> None:
    images = upload(40)
    alone = run(images).decision
    other = next(candidate.quality for candidate in alone.candidates if candidate.quality != alone.quality)
    for adopt in (other, 33):
        adopted = run(images, adopt=adopt)
        decision = adopted.decision
        assert decision.quality == adopt
        assert decision.reason.startswith(f"quality {adopt} is the buffer's")
        assert {candidate.quality for candidate in decision.candidates} == {10, 25, 50, 75, 90, adopt}
        assert real_bytes(adopted) <= 8000
        assert np.array_equal(adopted.exemplars.decode(), run(images, quality=adopt).exemplars.decode())


def test_what_does_not_fit_at_the_buffers_quality_says_so_even_if_a_lower_one_would_fit() -> None:
    images = upload(4, classes=(0,))
    with pytest.raises(BudgetExceeded) as cheapest:
        run(images, share=1)
    room = cheapest.value.details["needed_bytes"]
    assert len(run(images, share=room).exemplars) == 1
    with pytest.raises(BudgetExceeded) as adopted:
        run(images, share=room, adopt=90)
    assert adopted.value.details["quality"] == 90
    assert adopted.value.details["needed_bytes"] > room


class Blind:
    """An extractor whose features no coding changes: every image of a class has the row that its rank gives it."""

    name = "f" * 64
    block = 4

    def embed(self, images_NHWC: UInt8Array) -> FloatArray:
        return np.eye(64, dtype=np.float32)[np.arange(len(images_NHWC)) % 64]


def test_features_that_are_blind_to_coding_do_not_choose_alone() -> None:
    images = upload(60)
    decision = run(images, embedder=Blind(), ranking="random").decision
    lowest = decision.candidates[0]
    assert lowest.ratio["raw"] == pytest.approx(1)
    assert lowest.pixel_ratio is not None
    assert not lowest.passes
    assert decision.quality > 10
    assert decision.pixel_block == 32
    assert "of pixels" in decision.reason
    assert run(images).decision.candidates[0].pixel_ratio is None
