"""What coding does to the volume of a task's images, at every candidate quality: all that a criterion can be made of.

`measure` is called in a run once a task is learned, with the learner's features and with pixels, and what it returns is
kept with the run's result. It compares the same images in the same blocks as `engram.selection.quality` does and uses
its code, but it keeps log volumes, class by class, where a decision keeps ratios. `form` makes any criterion of them
afterwards (`criterion.py`): raw, per sample or log ratio, either embedding, any epsilon, over classes and over tasks.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from engram.schemas import CANDIDATE_QUALITIES, Definition
from engram.selection import ranking
from engram.selection.embedding import BuiltinEmbedder, Embedder
from engram.selection.filling import fill
from engram.selection.images import ArrayImages, Pool
from engram.selection.volume import Comparison, Volumes, ratios
from engram.strip import runs_of
from engram_trainer.local_memory import NetworkEmbedder
from engram_trainer.memory import Embed

Gaps = dict[str, Any]
"""What `measure` returns: JSON."""

EXTRACTOR: Literal["extractor"] = "extractor"
PIXELS: Literal["pixels"] = "pixels"
_FEWEST_BYTES = 7  # of an exemplar: a marker, a checksum and one byte
_DIGITS = 4


def measure(
    images_NHWC: npt.NDArray[np.uint8],
    class_ids: npt.NDArray[np.int64],
    share_bytes: int,
    embed: Embed | None,
    *,
    qualities: Sequence[int] = CANDIDATE_QUALITIES,
) -> Gaps:
    """How many exemplars fit and the log volumes of each class, coded and as they are, at every quality.

    Call it once a task is learned, with what the memory is given: `measure(images, class_ids, run.budget,
    learner.embed)`, and keep the answers of all tasks as a list in the order of the tasks, `gaps`. Of 3,000 images of
    32 x 32 it takes two seconds of one core and a kilobyte of JSON; a class of fewer than 16 images has no volumes.

        share_bytes                     as given
        qualities                       ascending: the order of the lists below
        exemplars[class]                how many of the class fit at each quality
        volumes[embedding].block        images whose volume is compared at once
        volumes[embedding].blocks       how many blocks of each class are
        volumes[embedding].original[class]   mean log volume of the blocks as uploaded
        volumes[embedding].coded[class]      the same at each quality
        volumes[embedding].singular     classes with a block whose rows were dependent
        cpu_seconds                     of all of it, ranking, coding and embedding included

    Classes are keyed by text, as JSON has them. `embedding` is `pixels`, and `extractor` where there is one.

    Args:
        images_NHWC: all training images of the task.
        class_ids: of each image.
        share_bytes: what each class may take of the memory, as the first tasks have it.
        embed: the learner's features, which also rank the images, by herding; without them pixels do.
        qualities: of JPEG.
    """
    start = time.process_time()
    pool = Pool(None, ArrayImages(images_NHWC, class_ids), "4:2:0")
    judges: dict[str, Embedder] = {PIXELS: BuiltinEmbedder(pool.shape)}
    if embed is not None:
        judges[EXTRACTOR] = NetworkEmbedder(embed, None)
    order = _herded(pool, judges.get(EXTRACTOR, judges[PIXELS]), share_bytes // _FEWEST_BYTES)
    qualities = sorted({*qualities})
    fit = {q: dict(runs_of(fill(pool, order, dict.fromkeys(order, share_bytes), q).class_ids)) for q in qualities}
    return {
        "share_bytes": share_bytes,
        "qualities": qualities,
        "exemplars": {str(class_id): [fit[q].get(class_id, 0) for q in qualities] for class_id in order},
        # The cheapest candidate says how many images of each class are compared.
        "volumes": {name: _volumes(pool, order, fit[qualities[0]], judge, qualities) for name, judge in judges.items()},
        "cpu_seconds": round(time.process_time() - start, 2),
    }


def _herded(pool: Pool, embedder: Embedder, most: int) -> dict[int, npt.NDArray[np.int64]]:
    order = {}
    for class_id in np.unique(pool.class_ids).tolist():
        numbers = np.flatnonzero(pool.class_ids == class_id)
        # No less than what is compared, however small the share: two blocks.
        count = min(len(numbers), max(most, 4 * embedder.block))
        order[class_id] = numbers[ranking.rank(pool.embed(numbers, embedder), count, method="herding")]
    return order


def _volumes(
    pool: Pool,
    order: Mapping[int, npt.NDArray[np.int64]],
    kept: Mapping[int, int],
    embedder: Embedder,
    qualities: Sequence[int],
) -> dict[str, Any]:
    comparison = Comparison(pool, order, kept, block=embedder.block, embedder=embedder)
    found = [comparison.volumes(quality) for quality in qualities]
    classes = list(comparison.numbers)
    return {
        "block": comparison.block,
        "blocks": {str(c): len(numbers) for c, numbers in comparison.numbers.items()},
        "original": {str(c): round(found[0][c].original, _DIGITS) for c in classes},
        "coded": {str(c): [round(each[c].stored, _DIGITS) for each in found] for c in classes},
        "singular": [c for c in classes if any(each[c].is_singular for each in found)],
    }


def form(gaps: Gaps, embedding: str, definition: Definition) -> dict[int, float | None]:
    """R at each quality, over the classes of one task: as a decision has it, but for the rounding of what was kept."""
    volumes = gaps["volumes"][embedding]
    found = {}
    for place, quality in enumerate(gaps["qualities"]):
        of_classes = [
            Volumes(coded[place], volumes["original"][c], is_singular=False) for c, coded in volumes["coded"].items()
        ]
        found[quality] = ratios(of_classes, volumes["block"])[definition]
    return found


def averaged(tasks: Sequence[Gaps], embedding: str, definition: Definition) -> dict[int, float | None]:
    """R at each quality, the mean over tasks of equal weight; None where no task had a block to compare."""
    of_tasks = [form(gaps, embedding, definition) for gaps in tasks]
    found = {}
    for quality in of_tasks[0]:
        known = [ratio for each in of_tasks if (ratio := each[quality]) is not None]
        found[quality] = fmean(known) if known else None
    return found
