"""The choice of a memory's quality: by hand, on what was really measured, and through the life of a memory."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import pytest

from engram import pack, strip
from engram.content import Content, Policy
from engram.memory import reshare
from engram.schemas import Candidate, Decision, Definition, IngestOptions, Rule
from engram.selection.embedding import BuiltinEmbedder, Embedder
from engram.selection.filling import fill
from engram.selection.images import ArrayImages, Pool
from engram.selection.quality import choose, is_enough, measure
from engram.strip import runs_of
from tests.contents import put
from tests.photos import UInt8Array, mosaics, photos

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float32]

QUALITIES = (10, 25, 50, 75)


def decision(
    ratios: Sequence[float | None],
    *,
    of_pixels: Sequence[float | None] | None = None,
    qualities: Sequence[int] = QUALITIES,
    classes: Sequence[int] = (2, 2, 2, 2),
    compared: int = 2,
    rule: Rule = "any",
    epsilon: float = 0.5,
) -> Decision:
    """What a task said: R of each candidate, of pixels too if an extractor was used; of `compared` classes."""

    def every(ratio: float | None) -> dict[Definition, float | None]:
        return dict.fromkeys(get_args(Definition), ratio)

    candidates = [
        Candidate(
            quality=quality,
            exemplars=1000 // quality,
            classes=held,
            bytes=1000,
            ratio=every(ratio),
            pixel_ratio=None if of_pixels is None else every(pixels),
            passes=pixels is not None and abs(pixels - 1) < epsilon,
            gaps={},
            singular_classes=[],
        )
        for quality, ratio, pixels, held in zip(qualities, ratios, of_pixels or ratios, classes, strict=True)
    ]
    return Decision(
        quality=90,
        reason="",
        definition="raw",
        rule=rule,
        epsilon=epsilon,
        block=32,
        blocks=dict.fromkeys(range(compared), 2),
        delta=1e-6,
        ranking="herding",
        embedder="builtin" if of_pixels is None else "e" * 64,
        images=100,
        seconds=0.0,
        candidates=candidates,
    )


# The choice, by hand


@pytest.mark.parametrize(
    ("rule", "measured", "chosen", "reason"),
    [
        ("any", [9.0, 1.9, 1.4, 1.1], 50, "quality 50 has R = 1.4, within 0.5 of 1; at 25 R = 1.9 is not"),
        ("all_higher", [9.0, 1.9, 1.4, 1.1], 50, "quality 50 has R = 1.4, within 0.5 of 1; at 25 R = 1.9 is not"),
        # Blur and noise cancel at 10: one measured task had just this.
        ("any", [1.23, 1.9, 1.4, 1.1], 10, "quality 10 has R = 1.23, within 0.5 of 1; it is the lowest candidate"),
        ("all_higher", [1.23, 1.9, 1.4, 1.1], 50, "quality 50 has R = 1.4, within 0.5 of 1; at 25 R = 1.9 is not"),
        # The test has two sides.
        ("any", [0.1, 0.4, 0.6, 0.9], 50, "quality 50 has R = 0.6, within 0.5 of 1; at 25 R = 0.4 is not"),
        ("all_higher", [1.0] * 4, 10, "quality 10 has R = 1, within 0.5 of 1; it is the lowest candidate"),
        # None passes: the highest.
        (
            "any",
            [9.0, 8.0, 7.0, 6.0],
            75,
            "no candidate has R within 0.5 of 1 (R = 9 at 10, R = 8 at 25, R = 7 at 50, R = 6 at 75), so the highest, "
            "75, is taken",
        ),
        (
            "all_higher",
            [1.0, 1.0, 1.0, 1.6],
            75,
            "no candidate has, with all above it, R within 0.5 of 1 (R = 1 at 10, R = 1 at 25, R = 1 at 50, "
            "R = 1.6 at 75), so the highest, 75, is taken",
        ),
        ("any", [None] * 4, 50, "no class has a block of images to compare yet, so 50 is taken for now"),
    ],
)
def test_the_lowest_quality_that_keeps_its_volume_is_chosen_and_the_reason_says_so(
    rule: Rule, measured: list[float | None], chosen: int, reason: str
) -> None:
    assert choose([decision(measured, rule=rule)]) == (chosen, reason)


def test_without_evidence_the_candidate_nearest_to_50_is_taken() -> None:
    assert choose([decision([None] * 3, qualities=(20, 65, 90), classes=(1, 1, 1))])[0] == 65


def test_a_candidate_that_leaves_a_class_with_nothing_cannot_win_and_is_named() -> None:
    found = choose([decision([9.0, 9.0, 1.0, 1.0], classes=(2, 2, 1, 1))])
    assert found == (
        25,
        "no candidate has R within 0.5 of 1 (R = 9 at 10, R = 9 at 25), so the highest, 25, is taken; at 50 and 75 a "
        "class would keep nothing",
    )


def test_how_many_fit_does_not_matter() -> None:
    few, many = (decision([9.0, 1.2, 1.1, 1.0]) for _ in range(2))
    few = few.model_copy(
        update={"candidates": [each.model_copy(update={"exemplars": 3, "bytes": 10}) for each in few.candidates]}
    )
    assert choose([few]) == choose([many])


def test_with_an_extractor_pixels_decide() -> None:
    found = choose([decision([1.0, 1.0, 1.9, 1.0], of_pixels=[0.1, 0.3, 0.7, 0.9])])
    assert found == (50, "quality 50 has R = 0.7, within 0.5 of 1; at 25 R = 0.3 is not")


def test_once_there_are_several_tasks_pixels_decide_by_their_mean_over_all_classes_compared() -> None:
    """Under the learner's features 10 looks perfect to both tasks; what pixels say is 1 class at 2.2 and 3 at 1.4."""
    first = decision([1.0] * 4, of_pixels=[9.0, 2.2, 1.3, 1.0], compared=1)
    later = decision([1.0] * 4, of_pixels=[9.0, 1.4, 1.1, 1.0], compared=3)
    # 25: (2.2 + 3 * 1.4) / 4 = 1.6; 50: (1.3 + 3 * 1.1) / 4 = 1.15.
    expected = "quality 50 has R = 1.15 over 2 tasks, within 0.5 of 1; at 25 R = 1.6 over 2 tasks is not"
    assert choose([first, later]) == choose([later, first]) == (50, expected)
    assert choose([later])[0] == 25


def test_a_task_with_nothing_to_compare_has_no_say() -> None:
    silent, speaking = decision([None] * 4, compared=0), decision([9.0, 1.6, 1.2, 1.0])
    quality, reason = choose([speaking, silent])
    assert quality == 50
    assert reason.startswith("quality 50 has R = 1.2 over 1 task, within")


def test_what_only_other_tasks_tried_is_unknown() -> None:
    earlier = decision([1.2, 1.0], qualities=(50, 75), classes=(2, 2))
    latest = decision([None, None], qualities=(25, 50), classes=(2, 2), compared=0)
    expected = "quality 50 has R = 1.2 over 1 task, within 0.5 of 1; at 25 R unknown"
    assert choose([earlier, latest]) == (50, expected)


def test_evidence_is_enough_when_every_class_had_two_blocks_in_whatever_tasks() -> None:
    some = decision([1.0] * 4).model_copy(update={"blocks": {0: 1, 1: 2}})
    assert not is_enough([some], [0, 1])
    assert is_enough([some, some], [0, 1])
    assert is_enough([some], [1])
    assert not is_enough([some, some], [0, 1, 2])


# What is measured


class Blind:
    """An extractor whose features no coding changes: every image has the row that its place in the batch gives it."""

    name = "f" * 64
    block = 4

    def embed(self, images_NHWC: UInt8Array) -> FloatArray:
        return np.eye(64, dtype=np.float32)[np.arange(len(images_NHWC)) % 64]


def measured(images: UInt8Array, *, share: int = 4000, embedder: Embedder | None = None, **options: Any) -> Any:
    """What a lone upload of two classes says, and the pool and orders that it was measured on."""
    pool = Pool(None, ArrayImages(images, np.arange(len(images)) % 2), "4:2:0")
    order = {0: np.arange(0, len(images), 2), 1: np.arange(1, len(images), 2)}
    by = embedder or BuiltinEmbedder(pool.shape)
    shares = {0: share, 1: share}
    return measure(pool, order, order, shares, options=IngestOptions(**options), embedder=by), pool, order, shares


def test_every_candidate_is_recorded_with_what_fits_and_with_every_definition_of_r() -> None:
    found, pool, order, shares = measured(photos(400), candidates=(75, 10, 25, 10))
    assert [candidate.quality for candidate in found.candidates] == [10, 25, 75]
    for candidate in found.candidates:
        kept = fill(pool, order, shares, candidate.quality)
        assert candidate.exemplars == len(kept)
        assert candidate.bytes == len(pack.to_bytes(kept)) <= 8000
        assert candidate.classes == len(runs_of(kept.class_ids)) == 2
        assert set(candidate.gaps) == {0, 1}
        gap = np.mean(list(candidate.gaps.values()))
        assert candidate.ratio["raw"] == pytest.approx(np.exp(gap))
        assert candidate.ratio["per_sample"] == pytest.approx(np.exp(gap / found.block))
        assert candidate.passes == (abs(candidate.ratio["raw"] - 1) < 0.3)
    counts = [candidate.exemplars for candidate in found.candidates]
    assert counts == sorted(counts, reverse=True)


def test_only_full_blocks_count_and_at_most_two_blocks_of_what_does_not_fit() -> None:
    assert measured(photos(2 * 31))[0].blocks == {}
    assert measured(photos(2 * 32))[0].blocks == {0: 1, 1: 1}
    assert measured(photos(2 * 200), share=500)[0].blocks == {0: 2, 1: 2}
    assert measured(photos(2 * 200), share=10**5)[0].blocks == {0: 6, 1: 6}
    alone = measured(photos(2 * 31 + 1))[0]
    assert alone.blocks == {0: 1}
    assert list(alone.candidates[0].gaps) == [0]


def test_the_block_suits_the_embedding_unless_it_is_given() -> None:
    for how, block, pixel_block in (
        ({}, 32, None),
        ({"block": 8}, 8, None),
        ({"embedder": Blind()}, 4, 32),
        ({"embedder": Blind(), "block": 6}, 6, 32),
    ):
        found = measured(photos(140), **how)[0]
        assert (found.block, found.pixel_block) == (block, pixel_block)


def test_features_that_are_blind_to_coding_do_not_let_a_candidate_pass_alone() -> None:
    found = measured(photos(140), embedder=Blind())[0]
    lowest = found.candidates[0]
    assert lowest.ratio == pytest.approx({"raw": 1.0, "per_sample": 1.0, "log_ratio": 1.0})
    assert lowest.pixel_ratio["raw"] > 2
    assert not lowest.passes
    assert found.blocks == {0: 2, 1: 2}


def test_candidates_are_measured_on_the_same_images_however_many_of_them_fit() -> None:
    """R of one candidate does not depend on which others there are, but on the cheapest one's depth."""
    alone, among = measured(photos(400), candidates=(10, 75))[0], measured(photos(400))[0]
    assert alone.candidates[-1] in among.candidates


def test_low_qualities_lose_volume_and_high_ones_keep_it() -> None:
    found = measured(photos(300))[0]
    distance = {candidate.quality: abs(np.log(candidate.ratio["raw"])) for candidate in found.candidates}
    assert distance[10] > 3 * distance[90]


# The life of a memory


def said(content: Content, task: int = 0) -> Decision:
    """The decision of a task."""
    found = content.tasks[task].decision
    assert found is not None
    return found


def forms(content: Content) -> set[int]:
    """The qualities of all packs."""
    return {kept.form.quality for task in content.tasks.values() if (kept := task.load()) is not None}


def counts(content: Content) -> int:
    return sum(sum(task.kept.values()) for task in content.tasks.values())


def test_while_everything_fits_it_is_kept_at_90_and_nothing_is_decided() -> None:
    content = Content(Policy(10**5))
    for task in range(3):
        content = put(content, photos(200, seed=task), [2 * task, 2 * task + 1], task=task)
        assert (content.quality, content.is_provisional, forms(content)) == (90, True, {90})
        assert content.is_roomy
        assert said(content, task).quality == 90
        assert said(content, task).reason.startswith("everything uploaded so far fits at this quality")
    assert counts(content) == 600
    assert choose([said(content)])[0] < 90


def test_what_would_have_to_go_brings_a_choice_on_r_and_all_packs_are_encoded_at_it() -> None:
    content = put(Content(Policy(30_000)), photos(140), [0, 1])
    roomy = content.tasks[0].load()
    assert roomy is not None
    assert content.is_roomy
    content = put(content, photos(400, seed=1), [2, 3], task=1)
    assert (content.quality, content.is_provisional, forms(content)) == (75, False, {75})
    (of_pixels,) = [candidate for candidate in said(content, 1).candidates if candidate.quality == 75]
    assert of_pixels.passes
    assert content.quality == choose([said(content), said(content, 1)])[0]
    # The first task's exemplars are what was kept at 90, encoded once more, and a prefix of it.
    kept = content.tasks[0].load()
    assert kept is not None
    again = strip.encode(roomy.decode(), roomy.class_ids, quality=75)
    for class_id in (0, 1):
        now, then = (each.select(np.flatnonzero(each.class_ids == class_id)).segments() for each in (kept, again))
        assert now == then[: len(now)]
    assert said(content).reason == f"encoded again with the whole buffer: {said(content, 1).reason}"
    assert said(content).quality == 75


def test_a_memory_is_encoded_again_at_most_twice() -> None:
    """90 while there is room, a provisional choice on little evidence, and the one that stays."""
    content, history = Content(Policy(3_500)), []
    for number, size in enumerate([20, 20, 20, 100, 100, 100, 300, 300]):
        content = put(content, photos(size, seed=number, noise=14 if number < 6 else 40), [number % 3], task=number % 3)
        history.append((content.quality, content.is_provisional))
        assert forms(content) == {content.quality}
    assert history == [(90, True), *[(50, True)] * 4, *[(75, False)] * 3]


def test_the_choice_does_not_depend_on_how_much_fits() -> None:
    images = photos(300)
    assert {put(Content(Policy(budget)), images, [0, 1]).quality for budget in (2_500, 6_000, 12_000, 20_000)} == {75}
    small, large = (said(put(Content(Policy(budget)), images, [0, 1])) for budget in (2_500, 3_500))
    assert [each.ratio for each in small.candidates] == [each.ratio for each in large.candidates]
    assert [each.exemplars for each in small.candidates] != [each.exemplars for each in large.candidates]


def test_without_a_full_block_50_is_taken_for_now_and_a_large_upload_settles_it() -> None:
    content = put(Content(Policy(2_000)), photos(30), [0])
    assert (content.quality, content.is_provisional, forms(content)) == (50, True, {50})
    assert said(content).reason == "no class has a block of images to compare yet, so 50 is taken for now"
    content = put(content, photos(20, seed=1), [0])
    assert (content.quality, content.is_provisional) == (50, True)
    assert said(content).reason.startswith("quality 50 is the buffer's, provisional; for this task alone, no class has")
    content = put(content, photos(100, seed=2), [0])
    assert (content.quality, content.is_provisional, forms(content)) == (75, False, {75})
    assert said(content).reason.startswith("quality 75 has R = ")


def test_what_came_in_uploads_too_small_to_say_anything_has_its_say_when_something_must_go() -> None:
    """Everything is still there at 90, which is as good as the originals: blocks are made of several uploads."""
    content = Content(Policy(30_000))
    for number in range(4):
        content = put(content, photos(20, seed=number), [0], task=1)
        content = put(content, photos(20, seed=9 + number), [1], task=2)
        assert said(content, 1).blocks == said(content, 2).blocks == {}
    assert content.is_roomy
    content = put(content, photos(140, seed=20), [2], task=0)
    assert said(content, 1).blocks == {0: 2}
    assert said(content, 2).blocks == {1: 2}
    assert (content.quality, content.is_provisional) == (75, False)
    assert "over 3 tasks" in said(content, 0).reason


def test_a_stream_of_small_uploads_ends_with_more_exemplars_than_fit_at_90() -> None:
    """The old rule kept the first upload's quality for ever: everything had fitted, so 90 won."""
    selected, at_90 = Content(Policy(6_000)), Content(Policy(6_000, quality=90))
    for number in range(12):
        selected, at_90 = (put(each, photos(20, seed=number), [0, 1]) for each in (selected, at_90))
    assert selected.quality is not None
    assert selected.quality < 90
    assert counts(selected) > 1.3 * counts(at_90)


def test_what_is_decided_never_changes_and_later_tasks_say_what_they_would_have_chosen() -> None:
    content = put(Content(Policy(6_000)), photos(300), [0, 1])
    assert (content.quality, content.is_provisional) == (75, False)
    content = put(content, photos(300, noise=40, seed=1), [2, 3], task=1, epsilon=0.5)
    assert (content.quality, content.is_provisional, forms(content)) == (75, False, {75})
    decided, alone = said(content, 1).reason.split("; for this task alone, ")
    assert decided == "quality 75 is the buffer's, decided earlier"
    quality, reason = choose([said(content, 1)])
    assert quality == 10
    assert alone == reason
    content = reshare(content, budget_bytes=10**6)
    content = put(content, photos(5, seed=2), [4], task=2)
    assert (content.quality, forms(content)) == (75, {75})


def test_a_fixed_quality_is_not_measured() -> None:
    class Unwanted(BuiltinEmbedder):
        def embed(self, images_NHWC: UInt8Array) -> FloatArray:
            raise AssertionError("nothing needs features here")

    content = Content(Policy(3_000, quality=40))
    for task in range(2):
        content = put(content, photos(100), [task], task=task, ranking="ring", embedder=Unwanted((16, 16, 3)))
        assert said(content, task).reason == "this quality was fixed with the buffer"
        assert (said(content, task).candidates, said(content, task).blocks) == ([], {})
    assert (content.quality, content.is_provisional, forms(content)) == (40, False, {40})
    assert not content.is_roomy


def test_the_numbers_of_the_tasks_do_not_matter() -> None:
    """The task with the lowest number once decided for all the others."""
    # The choice falls with the second upload, whose epsilon lets 50 pass.
    sequence = [
        (photos(40, noise=6), (0, 1), 0.3),
        (photos(140, seed=1), (2, 3), 3.0),
        (photos(300, seed=2), (4, 5), 0.3),
    ]
    found = []
    for numbers in ((0, 1, 2), (3, 0, 5), (9, 8, 7)):
        content = Content(Policy(9_000))
        for number, (images, classes, epsilon) in zip(numbers, sequence, strict=True):
            content = put(content, images, classes, task=number, epsilon=epsilon)
        kept = [content.tasks[number].load() for number in numbers]
        found.append((content.quality, [None if each is None else pack.to_bytes(each) for each in kept]))
    assert found[0] == found[1] == found[2]
    assert found[0][0] == 50


def test_a_smaller_budget_encodes_what_was_roomy_again_instead_of_dropping_it() -> None:
    content = put(Content(Policy(10**5)), photos(140), [0, 1])
    used = content.tasks[0].pack_bytes
    shrunk = reshare(content, budget_bytes=used - 1)
    assert (shrunk.quality, shrunk.is_provisional, counts(shrunk)) == (75, False, 140)
    assert shrunk.tasks[0].pack_bytes < used
    assert said(shrunk).reason.startswith("encoded again with the whole buffer: quality 75 has R = ")
    # Once decided, a smaller budget cuts.
    cut = reshare(shrunk, budget_bytes=shrunk.tasks[0].pack_bytes // 2)
    assert (cut.quality, counts(cut) < 140) == (75, True)


def test_a_memory_whose_tasks_are_all_deleted_starts_again() -> None:
    content = put(put(Content(Policy(6_000)), photos(300), [0, 1]), photos(10), [3], task=1)
    assert not content.is_provisional
    content = reshare(reshare(content, without_task=0), without_task=1)
    assert (content.quality, content.is_provisional, content.tasks) == (None, True, {})
    content = put(content, photos(10), [0])
    assert (content.quality, content.is_roomy) == (90, True)


def test_a_policy_without_a_roomy_quality_decides_at_the_first_upload() -> None:
    content = put(Content(Policy(10**6, roomy_quality=None)), photos(140), [0, 1])
    assert (content.quality, content.is_provisional, counts(content)) == (75, False, 140)


def test_by_the_rule_all_higher_every_candidate_above_must_pass() -> None:
    """Under strong grain blur and noise cancel at 10."""
    images = photos(300, noise=40)
    lowest, careful = (
        put(Content(Policy(8_000)), images, [0, 1], rule=rule, epsilon=0.5) for rule in ("any", "all_higher")
    )
    assert (lowest.quality, careful.quality) == (10, 90)
    assert [each.ratio for each in said(lowest).candidates] == [each.ratio for each in said(careful).candidates]
    assert said(careful).reason.startswith("no candidate has, with all above it, R within 0.5 of 1")


def test_a_lossless_copy_has_r_of_1_at_every_quality_so_the_lowest_is_chosen() -> None:
    content = put(Content(Policy(4_000)), mosaics(300), [0, 1])
    for candidate in said(content).candidates:
        assert candidate.ratio == {"raw": 1.0, "per_sample": 1.0, "log_ratio": 1.0}
    assert content.quality == 10
    assert said(content).reason == "quality 10 has R = 1, within 0.3 of 1; it is the lowest candidate"


def test_the_numbers_in_a_reason_are_those_of_the_candidates() -> None:
    numbers = re.compile(r"R = ([-+.e\d]+)")
    for noise, embedder in ((2, None), (14, None), (60, None), (14, Blind())):
        content = put(Content(Policy(8_000)), photos(300, noise=noise), [0, 1], embedder=embedder)
        found = {f"{(each.pixel_ratio or each.ratio)['raw']:.3g}" for each in said(content).candidates}
        mentioned = set(numbers.findall(said(content).reason))
        assert mentioned
        assert mentioned <= found
        (chosen,) = [each for each in said(content).candidates if each.quality == content.quality]
        assert chosen.passes == (f"quality {content.quality} has R = " in said(content).reason)


def test_a_task_keeps_what_was_measured_on_most_blocks_and_says_what_came_last() -> None:
    content = put(Content(Policy(4_000)), photos(200), [0, 1])
    much = said(content)
    content = put(content, photos(20, seed=1), [0, 1], ranking="random")
    assert said(content).candidates == much.candidates
    assert (said(content).blocks, said(content).images) == (much.blocks, 200)
    assert (said(content).ranking, said(content).mean) == ("random", None)
    content = put(content, photos(400, seed=2), [0, 1])
    assert said(content).candidates != much.candidates
    assert said(content).images == 400


def test_evidence_names_what_it_was_measured_by() -> None:
    """Too little came under an extractor; when something must go, what is stored is measured under the one at hand."""
    content = put(Content(Policy(12_000)), photos(20), [0], embedder=Blind(), block=3, epsilon=0.2)
    assert said(content).embedder == Blind.name
    content = put(content, photos(400, seed=1), [1], task=1)
    assert (said(content).embedder, said(content).block, said(content).epsilon) == ("builtin", 32, 0.2)
    assert all(candidate.pixel_ratio is None for candidate in said(content).candidates)


def test_what_is_measured_again_is_measured_in_blocks_of_the_size_asked_for() -> None:
    content = put(Content(Policy(12_000)), photos(12), [0], block=8)
    content = put(content, photos(400, seed=1), [1], task=1)
    assert (said(content).block, said(content).blocks) == (8, {0: 1})


def test_two_runs_measure_and_choose_the_same() -> None:
    first, second = (said(put(Content(Policy(6_000)), photos(200), [0, 1])) for _ in range(2))
    assert first.candidates == second.candidates
    assert first.reason == second.reason
