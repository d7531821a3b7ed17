"""This file is the choice of a task's quality: the most exemplars that still span the volume of their originals.

Each class is ranked once (`ranking`). Then every candidate quality is tried for real: as many of each class's ranking
as fit its share are encoded (`filling`), and the volume that images span once encoded, and decoded as replay decodes
them, is compared with that of their originals (`volume`); R is 1 where nothing was lost.

A candidate passes if |R - 1| < epsilon: blur lowers a volume, noise raises it. With an extractor it must pass under the
built-in embedding as well. Features learned for the first classes are blind to what tells later ones apart: after a
task of two classes they found nothing wrong with quality 10, whose exemplars then cost 6 to 14 points of accuracy
(Fashion-MNIST, LUCIR); pixels see that damage, and features see what matters now. The choice is the passing candidate
that keeps the most exemplars, and of those that keep equally many the highest quality: the paper's rule, `any`. By the
rule `all_higher` every candidate above it must pass too, because blur and noise can cancel at a low quality. If none
passes, the highest quality is taken. A candidate that leaves a class without any exemplar cannot win while another
leaves some to more classes.

The first task of a buffer decides for all of it (`adopt`). Tasks at unequal qualities can be told apart by their
artefacts, and a network learns to: 25, 75, 75, 75, 90 for five tasks ended at 74.9 %, below each of 25, 75 and 90 for
all of them (76.8, 81.0 and 78.7 %; Fashion-MNIST, LUCIR, 16,000 bytes per class, seed 1).

Source: Wang et al., Memory Replay with Data Compression for Continual Learning (ICLR 2022), section 4.2. `all_higher`,
the second embedding and the preference for the higher quality at equal counts are this project's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np
import numpy.typing as npt

from engram import pack
from engram.errors import InvalidRequest
from engram.schemas import Candidate, Decision, IngestOptions, Subsampling
from engram.strip import Exemplars, runs_of
from engram_service.selection import ranking
from engram_service.selection.embedding import BUILTIN_BLOCK, BuiltinEmbedder, Embedder
from engram_service.selection.filling import Filler
from engram_service.selection.images import Images, Progress, embed
from engram_service.selection.volume import DELTA, Comparison, ratios

__all__ = ["Images", "Selection", "Trial", "choose", "select"]

IntArray = npt.NDArray[np.int64]

_FEWEST_BYTES = 7  # of an exemplar: a marker, a checksum and one byte
_RANKING_PART = 0.5  # of the progress reported


@dataclass(frozen=True)
class Selection:
    """What an ingest keeps: exemplars in the order of a pack, and why at this quality."""

    exemplars: Exemplars
    decision: Decision


def select(
    images: Images,
    *,
    shares: Mapping[int, int],
    options: IngestOptions,
    subsampling: Subsampling,
    embedder: Embedder,
    quality: int | None = None,
    adopt: int | None = None,
    advance: Callable[[int], None] = lambda count: None,
) -> Selection:
    """The exemplars that the shares can hold, at the quality chosen among the candidates.

    Args:
        images: at least one.
        shares: bytes of each class; a class without a share keeps nothing.
        options: of the ingest; `options.quality` fixes the quality.
        subsampling: the buffer's.
        embedder: not called if neither the ranking nor the choice needs it.
        quality: what the task keeps from its first ingest; fixes the quality too.
        adopt: the quality of the buffer's other tasks. Candidates are measured and recorded as ever, and this one is
            kept: exemplars of unequal qualities teach a network to tell tasks by their artefacts.
        advance: called often, with how many images further the work is; the counts sum to N. What it raises ends the
            selection.

    Raises:
        BudgetExceeded: not one exemplar fits at any candidate; `details` has `budget_bytes` and `needed_bytes`.
        InvalidRequest: there are no images or no candidates.
    """
    start = perf_counter()
    fixed = quality if quality is not None else options.quality
    candidates = sorted({*options.candidates, *([adopt] if adopt else [])} if fixed is None else {fixed})
    if not candidates or not len(images.class_ids):
        raise InvalidRequest(f"{len(images.class_ids)} images and {len(candidates)} candidates: at least one of each")
    progress = Progress(len(images.class_ids), advance)
    order = _rank(images, shares, options, embedder, progress)
    filler = Filler(images, order, shares, subsampling, progress)
    comparisons: list[Comparison] = []
    if fixed is None:
        trials: list[Trial] = []
        for candidate in candidates:
            exemplars = filler.fill(candidate)
            if not trials:  # the cheapest candidate keeps the images that all are measured on
                comparisons = _comparisons(images, order, exemplars, options, subsampling, embedder, progress)
            trials.append(_trial(candidate, exemplars, options, comparisons))
            del exemplars  # or the next candidate's would be made beside them
            progress.reach(_RANKING_PART + (1 - _RANKING_PART) * len(trials) / (len(candidates) + 1))
        chosen, reason = choose(trials, options=options)
        if adopt is not None:
            reason = f"quality {adopt} is the buffer's, set by its first task; for this task alone, {reason}"
            chosen = next(trial.candidate for trial in trials if trial.candidate.quality == adopt)
        # Filling again costs a fraction of the comparison; keeping every candidate would cost its memory.
        exemplars = filler.fill(chosen.quality)
    else:
        exemplars = filler.fill(fixed)
        trials = [_trial(fixed, exemplars, options, comparisons)]
        chosen = trials[0].candidate
        reason = f"quality {fixed} was {'asked for' if quality is None else 'set by the first upload to this task'}"
    if not len(exemplars):
        # Of what was to be kept: a lower candidate may well fit where the buffer's quality does not.
        raise filler.shortage(candidates[0] if adopt is None else chosen.quality)
    progress.reach(1)
    decision = Decision(
        quality=chosen.quality,
        reason=reason,
        definition=options.definition,
        rule=options.rule,
        epsilon=options.epsilon,
        block=comparisons[0].block if comparisons else options.block or embedder.block,
        pixel_block=comparisons[1].block if len(comparisons) > 1 else None,
        delta=DELTA,
        ranking=options.ranking,
        embedder=embedder.name,
        images=len(images.class_ids),
        seconds=perf_counter() - start,
        candidates=[trial.candidate for trial in trials],
    )
    return Selection(exemplars, decision)


@dataclass(frozen=True)
class Trial:
    """A candidate as it was measured, and how many classes it leaves something."""

    candidate: Candidate
    classes: int


def choose(trials: Sequence[Trial], *, options: IngestOptions) -> tuple[Candidate, str]:
    """The candidate to keep and a sentence that says why; trials ascend in quality."""
    most = max(trial.classes for trial in trials)
    able = [trial.candidate for trial in trials if trial.classes == most]
    passing = []
    for candidate in reversed(able):
        if candidate.passes:
            passing.append(candidate)
        elif options.rule == "all_higher" and candidate.ratio[options.definition] is not None:
            break
    if not passing:
        return able[-1], _why_none(able, options)
    # `passing` descends in quality and max() keeps the first of equals, which is the highest quality.
    chosen = max(passing, key=lambda candidate: candidate.exemplars)
    reason = f"quality {chosen.quality} keeps {chosen.exemplars} exemplars with {_ratio(chosen, options)}"
    reason += f", within {options.epsilon:g} of 1"
    below = [candidate for candidate in able if candidate.quality < chosen.quality]
    if not below:
        return chosen, f"{reason}; it is the lowest candidate"
    if below[-1].exemplars <= chosen.exemplars:
        return chosen, f"{reason}; at {below[-1].quality} no more would fit or be left to keep"
    if below[-1].passes:
        return chosen, f"{reason}; at {below[-1].quality} {_ratio(below[-1], options)}"
    return chosen, f"{reason}; at {below[-1].quality} {_ratio(below[-1], options)} is not"


def _comparisons(
    images: Images,
    order: Mapping[int, IntArray],
    cheapest: Exemplars,
    options: IngestOptions,
    subsampling: Subsampling,
    embedder: Embedder,
    progress: Progress,
) -> list[Comparison]:
    """By the embedder and, if that is an extractor, by pixels; of the images that the cheapest candidate keeps."""
    judges: list[tuple[Embedder, int]] = [(embedder, options.block or embedder.block)]
    if embedder.name != BuiltinEmbedder.name:
        judges.append((BuiltinEmbedder(images.shape), BUILTIN_BLOCK))
    kept = dict(runs_of(cheapest.class_ids))
    return [
        Comparison(images, order, kept, block=block, subsampling=subsampling, embedder=judge, progress=progress)
        for judge, block in judges
    ]


def _trial(quality: int, exemplars: Exemplars, options: IngestOptions, comparisons: Sequence[Comparison]) -> Trial:
    """The record of a candidate; one that was not compared has no R."""
    runs = runs_of(exemplars.class_ids)
    measured = [(comparison.volumes(quality), comparison.block) for comparison in comparisons] or [({}, 1)]
    volumes = measured[0][0]
    found = [ratios(list(each.values()), block) for each, block in measured]
    candidate = Candidate(
        quality=quality,
        exemplars=len(exemplars),
        bytes=pack.size(exemplars.form, runs, exemplars.sizes) if runs else 0,
        ratio=found[0],
        pixel_ratio=found[1] if len(found) > 1 else None,
        passes=all(_is_near_one(ratio[options.definition], options) for ratio in found),
        gaps={class_id: each.gap for class_id, each in volumes.items()},
        singular_classes=[class_id for class_id, each in volumes.items() if each.is_singular],
    )
    return Trial(candidate, len(runs))


def _is_near_one(ratio: float | None, options: IngestOptions) -> bool:
    return ratio is not None and abs(ratio - 1) < options.epsilon


def _ratio(candidate: Candidate, options: IngestOptions) -> str:
    value = candidate.ratio[options.definition]
    pixels = None if candidate.pixel_ratio is None else candidate.pixel_ratio[options.definition]
    if value is None:
        return "R unknown"
    return f"R = {value:.3g}" if pixels is None else f"R = {value:.3g} ({pixels:.3g} of pixels)"


def _why_none(able: Sequence[Candidate], options: IngestOptions) -> str:
    highest = able[-1].quality
    if all(candidate.ratio[options.definition] is None for candidate in able):
        return f"no class keeps two exemplars to compare, so the highest quality, {highest}, is taken"
    found = ", ".join(f"{_ratio(candidate, options)} at {candidate.quality}" for candidate in able)
    return f"no candidate has R within {options.epsilon:g} of 1 ({found}), so the highest quality, {highest}, is taken"


def _rank(
    images: Images, shares: Mapping[int, int], options: IngestOptions, embedder: Embedder, progress: Progress
) -> dict[int, IntArray]:
    """Image indices of every class, best first, at least as many as could ever fit."""
    class_ids = np.asarray(images.class_ids, dtype=np.int64)
    most = max(1, sum(shares.values()) // _FEWEST_BYTES)
    by_class = np.argsort(class_ids, kind="stable")
    order: dict[int, IntArray] = {}
    done = 0
    for class_id, held in runs_of(class_ids[by_class]):
        rows = by_class[done : done + held]
        rng = np.random.Generator(np.random.Philox(key=np.array([options.seed, class_id], np.uint64)))
        if not ranking.needs_features(options.ranking):
            order[class_id] = rows[ranking.order(held, method=options.ranking, rng=rng)[:most]]
        else:
            parts = ranking.groups(held)
            picks = []
            for part in parts:
                features_ND = embed(images, rows[part], embedder, progress)
                count = min(len(part), -(-most // len(parts)))
                picks.append(part[ranking.rank(features_ND, count, method=options.ranking, rng=rng)])
                progress.reach(_RANKING_PART * (done + sum(map(len, parts[: len(picks)]))) / len(class_ids))
            order[class_id] = rows[ranking.deal(picks, most)]
        done += held
        progress.reach(_RANKING_PART * done / len(class_ids))
    return order
