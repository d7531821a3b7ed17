"""The choice of a buffer's quality: the lowest whose exemplars still span the volume of their originals.

Every candidate is tried for real: as many of each class's ranking as fit its share are encoded (`filling`), and the
volume that images span once encoded, and decoded as replay decodes them, is compared with that of their originals
(`volume`); R is 1 where nothing was lost.

A candidate passes if |R - 1| < epsilon: blur lowers a volume, noise raises it. R is of pixels (the built-in embedding),
averaged over all classes of all tasks that were compared. R under an extractor is recorded beside it and decides
nothing: under a learner's own features it drifts from task to task (CIFAR-10, LUCIR: R(10) = 0.75 at the first task,
3.7 to 13.7 at the fifth; Fashion-MNIST: 0.6 to 0.7 at quality 10, which costs 6 to 14 points, and 1.3 to 1.4 at 50,
which costs none), of pixels it is stable. The choice is the lowest candidate that passes: the paper's rule, `any`. By
the rule `all_higher` every candidate above it must pass too, because blur and noise can cancel at a low quality. If
none passes, the highest is taken. How much fits does not matter, because later tasks will share the budget; only a
candidate that leaves a class without any exemplar cannot win while another leaves some to more classes.

Source: Wang et al., Memory Replay with Data Compression for Continual Learning (ICLR 2022), section 4.2. `all_higher`
and the embedding are this project's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engram import pack
from engram.schemas import Candidate, Decision, Definition, IngestOptions, Rule
from engram.selection.embedding import BUILTIN_BLOCK, BuiltinEmbedder, Embedder
from engram.selection.filling import fill
from engram.selection.images import Pool
from engram.selection.volume import ENOUGH_BLOCKS, Comparison, ratios
from engram.strip import runs_of

IntArray = npt.NDArray[np.int64]

DEFAULT_QUALITY = 50
"""Where nothing can be compared the candidate nearest to this is taken: in the middle of where accuracy is flat."""


@dataclass(frozen=True)
class Measured:
    """What an upload says about every candidate, ascending. The rest is as in `Decision`."""

    candidates: list[Candidate]
    blocks: dict[int, int]
    block: int
    pixel_block: int | None


def measure(
    pool: Pool,
    order: Mapping[int, IntArray],
    originals: Mapping[int, IntArray],
    shares: Mapping[int, int],
    *,
    options: IngestOptions,
    embedder: Embedder,
) -> Measured:
    """N and R of every candidate.

    Args:
        pool: what the numbers stand for.
        order: the upload's images of every class, best first: how many fit is counted of these.
        originals: what may be compared, of every class, best first.
        shares: bytes of each class.
        options: of the ingest.
        embedder: an extractor, or the built-in one.
    """
    judges: list[tuple[Embedder, int]] = [(embedder, options.block or embedder.block)]
    if embedder.name != BuiltinEmbedder.name:
        judges.append((BuiltinEmbedder(pool.shape), BUILTIN_BLOCK))
    comparisons: list[Comparison] = []
    candidates: list[Candidate] = []
    for quality in sorted({*options.candidates}):
        kept = fill(pool, order, shares, quality)
        runs = runs_of(kept.class_ids)
        if not comparisons:  # the cheapest candidate says how many images of each class are compared
            comparisons = [
                Comparison(pool, originals, dict(runs), block=block, embedder=judge) for judge, block in judges
            ]
        volumes = [comparison.volumes(quality) for comparison in comparisons]
        found = [ratios(list(each.values()), by.block) for each, by in zip(volumes, comparisons, strict=True)]
        candidates.append(
            Candidate(
                quality=quality,
                exemplars=len(kept),
                classes=len(runs),
                bytes=pack.size(kept.form, runs, kept.sizes) if runs else 0,
                ratio=found[0],
                pixel_ratio=found[1] if len(found) > 1 else None,
                passes=is_near_one(found[-1][options.definition], options.epsilon),
                gaps={class_id: each.gap for class_id, each in volumes[-1].items()},
                singular_classes=[class_id for class_id, each in volumes[-1].items() if each.is_singular],
            )
        )
    return Measured(
        candidates,
        {class_id: len(numbers) for class_id, numbers in comparisons[-1].numbers.items()},
        comparisons[0].block,
        comparisons[1].block if len(comparisons) > 1 else None,
    )


def is_enough(decisions: Iterable[Decision], classes: Iterable[int]) -> bool:
    """Whether every class has had enough blocks compared for a choice that stays."""
    blocks = Counter[int]()
    for decision in decisions:
        blocks.update(decision.blocks)
    return all(blocks[class_id] >= ENOUGH_BLOCKS for class_id in classes)


def choose(decisions: Sequence[Decision]) -> tuple[int, str]:
    """The quality for a buffer with these decisions of its tasks, and a sentence that says why.

    Candidates, definition, rule and epsilon are those of the last one.
    """
    latest = decisions[-1]
    most = max(candidate.classes for candidate in latest.candidates)
    able = [candidate for candidate in latest.candidates if candidate.classes == most]
    found = pooled(decisions, latest.definition, [candidate.quality for candidate in able])
    if all(ratio is None for ratio in found.values()):
        quality = min(found, key=lambda candidate: abs(candidate - DEFAULT_QUALITY))
        return quality, f"no class has a block of images to compare yet, so {quality} is taken for now"
    said = {quality: _said(ratio, quality, decisions) for quality, ratio in found.items()}
    others = [str(candidate.quality) for candidate in latest.candidates if candidate.classes < most]
    aside = f"; at {' and '.join(others)} a class would keep nothing" if others else ""
    passing = _passing(found, latest.rule, latest.epsilon)
    if not passing:
        quality = max(found)
        listed = ", ".join(f"{text} at {each}" for each, text in said.items())
        which = "no candidate has" if latest.rule == "any" else "no candidate has, with all above it,"
        return quality, (
            f"{which} R within {latest.epsilon:g} of 1 ({listed}), so the highest, {quality}, is taken{aside}"
        )
    quality = min(passing)
    reason = f"quality {quality} has {said[quality]}, within {latest.epsilon:g} of 1"
    below = max((each for each in found if each < quality), default=None)
    if below is None:
        return quality, f"{reason}; it is the lowest candidate{aside}"
    return quality, f"{reason}; at {below} {said[below]}{'' if found[below] is None else ' is not'}{aside}"


def _passing(found: Mapping[int, float | None], rule: Rule, epsilon: float) -> list[int]:
    """The qualities that the rule lets pass."""
    passing = [quality for quality, ratio in found.items() if is_near_one(ratio, epsilon)]
    if rule == "any":
        return passing
    failing = max(found.keys() - {*passing}, default=0)
    return [quality for quality in passing if quality > failing]


def pooled(decisions: Sequence[Decision], definition: Definition, qualities: Sequence[int]) -> dict[int, float | None]:
    """R of pixels at each quality, the mean over the classes of all tasks that were compared; None where none was."""
    found: dict[int, float | None] = {}
    for quality in qualities:
        measured = _of_pixels(decisions, definition, quality)
        weight = sum(classes for _, classes in measured)
        found[quality] = sum(ratio * classes for ratio, classes in measured) / weight if weight else None
    return found


def _of_pixels(decisions: Sequence[Decision], definition: Definition, quality: int) -> list[tuple[float, int]]:
    """R of pixels at a quality, and of how many classes, for each task that had something to compare."""
    return [
        (ratio, len(decision.blocks))
        for decision in decisions
        for candidate in decision.candidates
        if candidate.quality == quality
        and (ratio := (candidate.pixel_ratio or candidate.ratio)[definition]) is not None
    ]


def _said(ratio: float | None, quality: int, decisions: Sequence[Decision]) -> str:
    if ratio is None:
        return "R unknown"
    if len(decisions) == 1:
        return f"R = {ratio:.3g}"
    tasks = len(_of_pixels(decisions, decisions[-1].definition, quality))
    return f"R = {ratio:.3g} over {tasks} task{'s' if tasks > 1 else ''}"


def is_near_one(ratio: float | None, epsilon: float) -> bool:
    """Whether a candidate with this R passes."""
    return ratio is not None and abs(ratio - 1) < epsilon
