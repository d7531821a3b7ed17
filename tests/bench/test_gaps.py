"""What is kept of a task's volumes says what the decision on the same images said, and no less."""

from __future__ import annotations

import json
from typing import Any, get_args

import gaps
import numpy as np
import numpy.typing as npt
import pytest

from engram.content import Policy
from engram.schemas import Definition, IngestOptions
from engram.selection.images import ArrayImages
from engram_trainer.local_memory import NetworkEmbedder, StripMemory
from tests.contents import pictures

SHARE_BYTES = 6_000
CLASS_IDS = np.repeat([7, 3], 80)
IMAGES = pictures(0, 160)


def embed(images_NHWC: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Features that are no pixels: means of small squares, squared."""
    means = images_NHWC.reshape(len(images_NHWC), 4, 4, 4, 4, 3).mean(axis=(2, 4)).reshape(len(images_NHWC), -1)
    return np.asarray((means / 255) ** 2 - 0.2, np.float32)


@pytest.fixture(scope="module")
def kept() -> Any:
    return json.loads(json.dumps(gaps.measure(IMAGES, CLASS_IDS, SHARE_BYTES, embed)))


def test_every_form_of_r_is_that_of_the_decision_on_the_same_images(kept: Any) -> None:
    memory = StripMemory(Policy(SHARE_BYTES, "class", roomy_quality=None), IngestOptions())
    memory.put(0, ArrayImages(IMAGES, CLASS_IDS), NetworkEmbedder(embed, None), seed=0)
    decision = memory.decisions[0]
    for definition in get_args(Definition):
        by_extractor = gaps.form(kept, gaps.EXTRACTOR, definition)
        by_pixels = gaps.form(kept, gaps.PIXELS, definition)
        for candidate in decision.candidates:
            assert candidate.pixel_ratio is not None
            assert by_extractor[candidate.quality] == pytest.approx(candidate.ratio[definition], rel=1e-3)
            assert by_pixels[candidate.quality] == pytest.approx(candidate.pixel_ratio[definition], rel=1e-3)


def test_so_many_exemplars_fit_as_a_decision_counts(kept: Any) -> None:
    memory = StripMemory(Policy(SHARE_BYTES, "class", roomy_quality=None), IngestOptions())
    memory.put(0, ArrayImages(IMAGES, CLASS_IDS), NetworkEmbedder(embed, None), seed=0)
    counted = [candidate.exemplars for candidate in memory.decisions[0].candidates]
    assert [sum(each) for each in zip(*kept["exemplars"].values(), strict=True)] == counted
    assert counted == sorted(counted, reverse=True)


def test_it_is_small_and_stays_the_same() -> None:
    kept = gaps.measure(IMAGES, CLASS_IDS, SHARE_BYTES, embed)
    again = gaps.measure(IMAGES, CLASS_IDS, SHARE_BYTES, embed)
    assert len(json.dumps(kept)) < 3_000
    assert kept | {"cpu_seconds": 0} == again | {"cpu_seconds": 0}


def test_a_class_of_few_images_has_no_volumes_and_no_r() -> None:
    few = gaps.measure(IMAGES[:10], np.zeros(10, np.int64), SHARE_BYTES, embed)
    assert few["volumes"][gaps.EXTRACTOR]["coded"] == {}
    assert set(gaps.form(few, gaps.EXTRACTOR, "raw").values()) == {None}


def test_r_over_tasks_is_their_mean_and_leaves_out_those_that_say_nothing(kept: Any) -> None:
    few = gaps.measure(IMAGES[:10], np.zeros(10, np.int64), SHARE_BYTES, embed)
    other = gaps.measure(IMAGES[:80], CLASS_IDS[:80], SHARE_BYTES, embed)
    each = [gaps.form(one, gaps.PIXELS, "raw")[25] for one in (kept, other)]
    found = gaps.averaged([kept, few, other], gaps.PIXELS, "raw")
    assert found[25] == pytest.approx(np.mean(np.array(each, float)))
