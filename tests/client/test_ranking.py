"""Rankings: by hand, by their invariants, and that each keeps its promise over a stream of uploads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import permutations
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engram import pack
from engram.content import Content, Means, Policy
from engram.memory import reshare
from engram.schemas import Ranking
from engram.selection import ranking
from engram.selection.embedding import BuiltinEmbedder
from engram.selection.ranking import FloatArray, order, rank
from engram.strip import Exemplars
from engram_trainer import datasets
from tests.contents import put
from tests.photos import UInt8Array, mosaics, photos, shades, shades_of

IntArray = npt.NDArray[np.int64]
Scheme = Callable[[IntArray, IntArray, int, np.random.Generator], IntArray]

BY_FEATURES: tuple[Ranking, ...] = ("herding", "greedy_dpp")
BY_CHANCE: tuple[Ranking, ...] = ("random", "reservoir")


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=seed))


def unit_rows(n: int, d: int, seed: int = 0) -> FloatArray:
    rows = generator(seed).standard_normal((n, d)) + 0.3
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows.astype(np.float32)


def kept(content: Content) -> Exemplars:
    found = content.tasks[0].load()
    assert found is not None
    return found


# By features


@pytest.mark.parametrize("method", BY_FEATURES)
@settings(max_examples=25, deadline=None)
@given(n=st.integers(0, 60), d=st.integers(1, 12), copies=st.integers(1, 3), seed=st.integers(0, 2**32), data=st.data())
def test_a_ranking_has_no_repeats_and_every_shorter_one_is_its_prefix(
    method: Ranking, n: int, d: int, copies: int, seed: int, data: st.DataObject
) -> None:
    features = np.tile(unit_rows(n, d, seed), (copies, 1))
    whole = rank(features, len(features), method=method)
    assert sorted(whole.tolist()) == list(range(len(features)))
    count = data.draw(st.integers(0, len(features)))
    assert rank(features, count, method=method).tolist() == whole[:count].tolist()


def test_herding_by_hand_picks_the_mean_first_and_balances_afterwards() -> None:
    h = np.sqrt(0.5)
    features = np.array([[1, 0], [0, 1], [h, h]], np.float32)
    # mean = (0.569, 0.569): row 2 is nearest; then w = 2 mean - x2 = (0.431, 0.431), rows 0 and 1 tie.
    assert rank(features, 3, method="herding").tolist() == [2, 0, 1]
    # Toward the mean of other images, which were all like row 1, that one comes first.
    assert rank(features, 3, method="herding", mean_D=np.array([0.0, 1.0])).tolist() == [1, 2, 0]


@given(st.integers(0, 10_000), st.integers(1, 40), st.integers(1, 8))
@settings(max_examples=40, deadline=None)
def test_herding_takes_at_every_step_the_image_that_brings_the_mean_closest(seed: int, count: int, width: int) -> None:
    features = unit_rows(count, width, seed).astype(np.float64)
    mean = unit_rows(50, width, seed + 1).mean(axis=0, dtype=np.float64)
    chosen = rank(features.astype(np.float32), count, method="herding", mean_D=mean).tolist()
    for k in range(count):
        left = [row for row in range(count) if row not in chosen[:k]]
        distance = {row: np.linalg.norm(mean - features[[*chosen[:k], row]].mean(axis=0)) for row in left}
        assert distance[chosen[k]] <= min(distance.values()) + 1e-6


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
    assert rank(features, 20, method="greedy_dpp").tolist() == reference_greedy_dpp(features, 20)


@pytest.mark.parametrize("method", BY_FEATURES)
def test_a_ranking_can_be_ended_at_any_image(method: Ranking) -> None:
    turns: list[int] = []

    def end() -> None:
        turns.append(1)
        if len(turns) == 20:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        rank(unit_rows(60, 8), 40, method=method, pulse=end)
    assert len(turns) == 20


def test_greedy_dpp_starts_a_new_round_when_nothing_left_adds_volume() -> None:
    features = np.repeat(np.eye(3, dtype=np.float32), 2, axis=0)  # rows 0 and 1 are equal, 2 and 3, 4 and 5
    assert rank(features, 6, method="greedy_dpp").tolist() == [0, 2, 4, 1, 3, 5]


def test_greedy_dpp_spans_more_volume_than_herding() -> None:
    features = unit_rows(300, 40)

    def log_volume(method: Ranking) -> float:
        chosen = features[rank(features, 20, method=method)].astype(np.float64)
        return float(np.linalg.slogdet(chosen @ chosen.T)[1])

    assert log_volume("greedy_dpp") > log_volume("herding") > -np.inf


@pytest.mark.parametrize("method", BY_FEATURES)
def test_asking_for_more_images_than_there_are_is_an_error(method: Ranking) -> None:
    with pytest.raises(ValueError, match="cannot rank 4 of 3"):
        rank(unit_rows(3, 2), 4, method=method)


@given(n=st.integers(1, 500), group=st.integers(1, 60), count=st.integers(0, 600))
@settings(max_examples=40, deadline=None)
def test_groups_are_interleaved_small_and_dealt_out_in_turn(n: int, group: int, count: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranking, "GROUP", group)
        parts = ranking.groups(n)
    assert sorted(np.concatenate(parts).tolist()) == list(range(n))
    assert max(map(len, parts)) <= group
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert len(parts) == -(-n // group)
    dealt = ranking.deal(parts, count)
    # Each group in its own order, dealt in turn: what was interleaved is in order again.
    assert dealt.tolist() == list(range(n))[:count]


# By chance


def test_ring_by_hand_puts_the_newest_first() -> None:
    assert order(3, 4, seen=9, method="ring", rng=generator()).tolist() == [6, 5, 4, 3, 0, 1, 2]


@pytest.mark.parametrize("method", BY_CHANCE)
@given(stored=st.integers(0, 40), dropped=st.integers(0, 100), new=st.integers(1, 40), seed=st.integers(0, 2**32))
@settings(max_examples=30, deadline=None)
def test_an_order_by_chance_leaves_the_stored_ones_in_their_order(
    method: Ranking, stored: int, dropped: int, new: int, seed: int
) -> None:
    found, again = (order(stored, new, seen=stored + dropped, method=method, rng=generator(seed)) for _ in range(2))
    assert found.tolist() == again.tolist()
    assert sorted(found.tolist()) == list(range(stored + new))
    assert [number for number in found.tolist() if number < stored] == list(range(stored))


def test_orders_by_chance_are_pinned_as_they_decide_what_is_kept() -> None:
    assert order(0, 8, seen=0, method="random", rng=generator(1)).tolist() == [3, 5, 2, 7, 0, 6, 1, 4]
    assert order(4, 4, seen=20, method="random", rng=generator(1)).tolist() == [0, 1, 2, 7, 3, 6, 4, 5]


def uniform(held: IntArray, came: IntArray, seen: int, rng: np.random.Generator) -> IntArray:
    """The scheme that is tested: numbers of the stream in their new order."""
    found = order(len(held), len(came), seen=seen, method="random", rng=rng)
    return np.concatenate([held, came])[found]


def forgetful(held: IntArray, came: IntArray, seen: int, rng: np.random.Generator) -> IntArray:
    """What ranking anew over stored and new images would be: newer images are kept more often."""
    return rng.permutation(np.concatenate([held, came]))


def by_share(held: IntArray, came: IntArray, seen: int, rng: np.random.Generator) -> IntArray:
    """What Engram 0.1 did: both sides dealt out by their share of the stream."""
    came = rng.permutation(came)
    ranks = np.concatenate([np.arange(len(held)), np.arange(len(came))])
    sides = np.repeat([seen, len(came)], [len(held), len(came)])
    return np.concatenate([held, came])[np.argsort((ranks + rng.random(len(ranks))) / sides, kind="stable")]


def stream(scheme: Scheme, uploads: Sequence[int], keep: int, seed: int) -> IntArray:
    """What is kept of a stream, cut after each upload, in rank order."""
    rng = generator(seed)
    held, seen = np.empty(0, np.int64), 0
    for size in uploads:
        held = scheme(held, np.arange(seen, seen + size), seen, rng)[:keep]
        seen += size
    return held


def excess_of_keeping(kept_counts: npt.NDArray[np.float64], keep: int, runs: int) -> float:
    """How many standard deviations chi-square lies above its mean, if each image is kept with probability keep / N."""
    n = len(kept_counts)
    p = keep / n
    scaled = ((kept_counts - runs * p) ** 2 / (runs * p * (1 - p))).sum() * (n - 1) / n
    return float((scaled - (n - 1)) / np.sqrt(2 * (n - 1)))


UNEQUAL = (5, 25, 1, 14, 5)


@pytest.mark.slow
def test_each_image_of_a_stream_is_kept_equally_often_and_the_test_would_see_a_bias() -> None:
    keep, runs = 8, 3000

    def found(scheme: Scheme) -> float:
        counts = np.zeros(sum(UNEQUAL))
        for seed in range(runs):
            counts[stream(scheme, UNEQUAL, keep, seed)] += 1
        assert counts.sum() == keep * runs
        return excess_of_keeping(counts, keep, runs)

    assert abs(found(uniform)) < 5
    assert found(forgetful) > 100


@pytest.mark.slow
def test_every_order_of_every_subset_of_a_stream_is_equally_likely_and_the_test_would_see_a_bias() -> None:
    """Two of a stream of 1 + 3 + 2 images: 30 ordered pairs. The old scheme stratified: it spread them over uploads."""

    def excess(scheme: Scheme) -> float:
        counts = Counter(tuple(stream(scheme, (1, 3, 2), 2, seed).tolist()) for seed in range(3000))
        pairs = list(permutations(range(6), 2))
        assert sum(counts[pair] for pair in pairs) == 3000
        statistic = sum((counts[pair] - 100) ** 2 / 100 for pair in pairs)
        return float((statistic - 29) / np.sqrt(2 * 29))

    assert abs(excess(uniform)) < 5
    assert excess(forgetful) > 20
    assert excess(by_share) > 20


@pytest.mark.parametrize("method", ["reservoir", pytest.param("random", marks=pytest.mark.slow)])
def test_a_memory_keeps_each_image_of_a_stream_equally_often(method: Ranking) -> None:
    """Shades cost the same, so what fits depends on no image; they are told apart by their grey."""
    runs, counts, keep = 100, np.zeros(sum(UNEQUAL)), 0
    for seed in range(runs):
        content, first = Content(Policy(250, quality=100)), 0
        for size in UNEQUAL:
            content = put(content, shades(first, size), ranking=method, seed=seed)
            first += size
        chosen = shades_of(kept(content).decode())
        keep = len(chosen)
        counts[chosen] += 1
    assert counts.sum() == keep * runs
    assert 3 < keep < 25
    assert abs(excess_of_keeping(counts, keep, runs)) < 5


def test_a_memory_keeps_the_newest_by_ring_over_all_uploads() -> None:
    content, first = Content(Policy(350, quality=100)), 0
    for size in UNEQUAL:
        content = put(content, shades(first, size), ranking="ring")
        first += size
        chosen = shades_of(kept(content).decode())
        assert chosen == list(range(first))[::-1][: len(chosen)]
    assert len(chosen) < 45
    fewer = shades_of(kept(reshare(content, budget_bytes=280)).decode())
    assert fewer == chosen[: len(fewer)]
    assert 0 < len(fewer) < len(chosen)


# Herding over a stream


@pytest.fixture(scope="module")
def clothes() -> tuple[UInt8Array, IntArray]:
    """1,200 images of two classes, shuffled."""
    sample = datasets.load("sample")
    rows = generator().permutation(np.flatnonzero(np.isin(sample.train.class_ids, (0, 8))))[:1200]
    return sample.train.images.read(rows), sample.train.class_ids[rows]


def fed(images: UInt8Array, class_ids: IntArray, budget: int, **options: Any) -> Content:
    """Uploads of 20, one after the other."""
    content = Content(Policy(budget, quality=50))
    for at in range(0, len(images), 20):
        content = put(content, images[at : at + 20], class_ids[at : at + 20], **options)
    return content


def distance(content: Content, features_ND: FloatArray, class_ids: IntArray) -> float:
    """Of the mean of what is kept from the mean of all images, mean over the classes."""
    exemplars = kept(content)
    kept_KD = BuiltinEmbedder((28, 28, 1)).embed(exemplars.decode())
    return float(
        np.mean(
            [
                np.linalg.norm(
                    kept_KD[exemplars.class_ids == c].mean(axis=0) - features_ND[class_ids == c].mean(axis=0)
                )
                for c in np.unique(class_ids)
            ]
        )
    )


@pytest.mark.parametrize("group", [4096, pytest.param(32, marks=pytest.mark.slow)])
def test_after_60_uploads_of_20_images_herding_is_about_as_near_the_class_mean_as_in_one_upload(
    group: int, clothes: tuple[UInt8Array, IntArray], monkeypatch: pytest.MonkeyPatch
) -> None:
    images, class_ids = clothes
    features = BuiltinEmbedder((28, 28, 1)).embed(images)
    budget = 16_000
    joint = distance(put(Content(Policy(budget, quality=50)), images, class_ids), features, class_ids)
    monkeypatch.setattr(ranking, "GROUP", group)
    herded, drawn = fed(images, class_ids, budget), fed(images, class_ids, budget, ranking="random")
    assert sum(herded.tasks[0].kept.values()) > 60
    assert distance(herded, features, class_ids) < 3 * joint
    assert distance(drawn, features, class_ids) > 1.5 * distance(herded, features, class_ids)


@pytest.mark.parametrize("group", [4096, 16])
def test_the_stored_mean_is_that_of_all_images_ever_seen(group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranking, "GROUP", group)
    images, class_ids = photos(260), np.resize([4, 9, 4], 260)
    features = BuiltinEmbedder((16, 16, 3)).embed(images)
    content = Content(Policy(6_000, quality=50))
    for at, end in ((0, 100), (100, 101), (101, 200), (200, 260)):
        content = put(content, images[at:end], class_ids[at:end])
        found = content.tasks[0].means
        assert found is not None
        assert found.embedder == "builtin"
        for class_id, mean in found.of_class.items():
            expected = features[:end][class_ids[:end] == class_id].mean(axis=0)
            np.testing.assert_allclose(mean, expected, atol=1e-6)
    assert sum(content.tasks[0].kept.values()) < 100


class Extractor(BuiltinEmbedder):
    """Another embedding, as a trainer would bring it."""

    name = "e" * 64


def said_mean(content: Content) -> str | None:
    decision = content.tasks[0].decision
    assert decision is not None
    return decision.mean


def test_a_new_extractor_starts_the_mean_again_from_what_is_kept_and_the_record_says_so() -> None:
    other = Extractor((16, 16, 3), dimensions=20)
    content = put(Content(Policy(4_000, quality=50)), photos(90), 3)
    assert said_mean(content) == "seen"
    stored = kept(content).decode()
    assert 10 < len(stored) < 60
    came = photos(30, seed=1)
    content = put(content, came, 3, embedder=other)
    assert said_mean(content) == "kept"
    means = content.tasks[0].means
    assert means is not None
    assert means.embedder == other.name
    # What is kept stands for the 90 images it was chosen from.
    expected = (90 * other.embed(stored).mean(axis=0) + other.embed(came).sum(axis=0)) / 120
    np.testing.assert_allclose(means.of_class[3], expected, atol=1e-6)
    # From then on it runs again, but it never becomes the mean of all images seen.
    more = photos(40, seed=2)
    content = put(content, more, 3, embedder=other)
    assert said_mean(content) == "kept"
    means = content.tasks[0].means
    assert means is not None
    np.testing.assert_allclose(means.of_class[3], (120 * expected + other.embed(more).sum(axis=0)) / 160, atol=1e-6)


def test_a_new_class_under_a_new_extractor_starts_its_own_mean() -> None:
    other = Extractor((16, 16, 3), dimensions=20)
    content = put(Content(Policy(10_000, quality=50)), photos(20), 3)
    came = photos(10, seed=1)
    content = put(content, came, 5, embedder=other)
    assert said_mean(content) == "seen"
    means = content.tasks[0].means
    assert means is not None
    assert list(means.of_class) == [5]
    np.testing.assert_allclose(means.of_class[5], other.embed(came).mean(axis=0), atol=1e-6)


def test_a_class_of_which_nothing_is_left_does_not_pretend_to_know_all_it_saw() -> None:
    content = put(Content(Policy(2_000, quality=50)), photos(20), 3)
    content = reshare(reshare(content, budget_bytes=1), budget_bytes=2_000)
    assert content.tasks[0].kept == {}
    content = put(content, photos(10, seed=1), 3, embedder=Extractor((16, 16, 3)))
    assert said_mean(content) == "kept"


def test_a_ranking_that_knows_no_mean_keeps_none() -> None:
    content = put(Content(Policy(10_000, quality=50)), photos(20), 3)
    content = put(content, photos(20, seed=1), 3, ranking="ring")
    assert (content.tasks[0].means, said_mean(content)) == (None, None)
    assert said_mean(put(content, photos(20, seed=2), 3)) == "kept"


@given(
    classes=st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=8, unique=True),
    width=st.integers(1, 40),
    name=st.sampled_from(["builtin", "e" * 64, "net\nwork é"]),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_means_survive_being_bytes(classes: list[int], width: int, name: str, seed: int) -> None:
    means = Means(name, dict(zip(classes, unit_rows(len(classes), width, seed), strict=True)))
    again = Means.from_bytes(means.to_bytes())
    assert (again.embedder, list(again.of_class)) == (name, classes)
    for class_id in classes:
        np.testing.assert_array_equal(again.of_class[class_id], means.of_class[class_id])


# Greedy DPP over a stream


@pytest.mark.parametrize("group", [4096, 16])
def test_greedy_dpp_over_two_uploads_is_that_of_one_while_nothing_is_dropped(
    group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mosaics lose nothing, so what is stored of the first upload is what a single one would hold, in rank order."""
    monkeypatch.setattr(ranking, "GROUP", group)
    policy, first, second = Policy(10**5, quality=90), mosaics(40), mosaics(30, seed=1)
    content = put(Content(policy), first, 7, ranking="greedy_dpp")
    stored = kept(content).decode()
    assert sorted(image.tobytes() for image in stored) == sorted(image.tobytes() for image in first)
    union = put(content, second, 7, ranking="greedy_dpp")
    whole = put(Content(policy), np.concatenate([stored, second]), 7, ranking="greedy_dpp")
    assert pack.to_bytes(kept(union)) == pack.to_bytes(kept(whole))
    fewer = kept(reshare(union, budget_bytes=union.tasks[0].pack_bytes // 2))
    assert 10 < len(fewer) < 60
    assert fewer.segments() == kept(whole).segments()[: len(fewer)]


def test_greedy_dpp_takes_of_what_came_what_adds_volume_to_what_is_stored() -> None:
    policy, images = Policy(10**5, quality=90), mosaics(30, 48)
    content = put(Content(policy), images[:20], 7, ranking="greedy_dpp")
    # Every new image is there already but one, which is picked before any copy.
    content = put(content, np.concatenate([images[:19], images[25:26]]), 7, ranking="greedy_dpp")
    decoded = [image.tobytes() for image in kept(content).decode()]
    assert len(set(decoded[:21])) == 21
    assert images[25].tobytes() in decoded[:21]


# Groups through the memory


@pytest.mark.parametrize("method", BY_FEATURES)
def test_a_class_of_more_than_one_group_shrinks_to_what_a_smaller_share_would_have_kept(
    method: Ranking, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranking, "GROUP", 16)
    images = mosaics(120)
    large, small = (put(Content(Policy(budget, quality=50)), images, [0, 1], ranking=method) for budget in (2_000, 900))
    assert pack.to_bytes(kept(reshare(large, budget_bytes=900))) == pack.to_bytes(kept(small))
    assert 10 < len(kept(small)) < len(kept(large))
