"""Lossless archives: what they cost, what a share holds of them, and that nothing is lost."""

from __future__ import annotations

import lossless
import numpy as np
import pytest

from engram.errors import BudgetExceeded
from engram_trainer.examples import Examples, Images
from engram_trainer.local_memory import LocalConfig
from engram_trainer.memory import Learned
from tests.photos import photos


def task(number: int, *, count: int = 8, channels: int = 3) -> Learned:
    images = photographs(2 * count)[..., :channels]
    class_ids = np.repeat([2 * number, 2 * number + 1], count)
    return Learned(number, Examples.of_arrays(images, class_ids), seed=number)


def bytes_of(form: str, images: Images) -> int:
    return lossless.size(lossless.FORMS[form](images), len(images))


def photographs(count: int) -> Images:
    return photos(count, (32, 32, 3), noise=4)


@pytest.mark.parametrize("form", lossless.FORMS)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_form_gives_the_pixels_back_and_its_files_are_all_that_is_counted(form: str, channels: int) -> None:
    images = photographs(5)[..., :channels]
    files = lossless.FORMS[form](images)
    np.testing.assert_array_equal(lossless.read(files, (32, 32, channels)), images)
    assert lossless.size(files, 5) == sum(map(len, files)) + 1 + 2 * 5
    assert lossless.FORMS[form](images[:0]) == []
    assert lossless.size([], 0) == 0


def test_the_archive_of_a_class_is_smaller_than_the_sum_of_its_files() -> None:
    images = photographs(12)
    sizes = {form: bytes_of(form, images) for form in lossless.FORMS}
    assert sizes["sheet"] < sizes["webp"] < sizes["png"] < images.size


@pytest.mark.parametrize("share", [3_000, 9_000])
def test_a_share_holds_the_longest_prefix_and_not_one_image_more(share: int) -> None:
    images = photographs(12)
    count, form = lossless.fitting(images, share)
    assert bytes_of(form, images[:count]) <= share
    assert all(bytes_of(each, images[: count + 1]) > share for each in lossless.FORMS)


def test_all_images_of_a_class_may_fit_and_none_may() -> None:
    images = photographs(3)
    assert lossless.fitting(images, 10**6)[0] == 3
    assert lossless.fitting(images, 100)[0] == 0


def test_a_memory_holds_pixels_and_counts_archives() -> None:
    memory = lossless.LosslessMemory(LocalConfig(budget_bytes=9_000, per="class", ranking="random"))
    learned = task(0)
    memory.add(learned)
    [batch] = memory.walk(1_000)
    originals = learned.examples.read()
    assert all((originals == image).all(axis=(1, 2, 3)).any() for image in batch.images)
    sizes = [bytes_of(memory.forms[0, class_id], batch.images[batch.class_ids == class_id]) for class_id in (0, 1)]
    assert memory.used_bytes == sum(sizes)
    assert max(sizes) <= 9_000
    raw = 9_000 // (32 * 32 * 3 + 2)
    assert min(memory.counts()[0].values()) > 1.3 * raw


def test_a_later_task_leaves_a_prefix_of_every_earlier_class_within_the_total() -> None:
    memory = lossless.LosslessMemory(LocalConfig(budget_bytes=16_000, ranking="random"))
    memory.add(task(0))
    before = next(memory.walk(1_000))
    memory.add(task(1))
    after = next(memory.walk(1_000))
    assert memory.used_bytes <= 16_000
    for class_id in (0, 1):
        old, new = (batch.images[batch.class_ids == class_id] for batch in (before, after))
        assert 0 < len(new) < len(old)
        np.testing.assert_array_equal(new, old[: len(new)])


def test_a_share_below_one_image_is_refused() -> None:
    memory = lossless.LosslessMemory(LocalConfig(budget_bytes=200, per="class", ranking="random"))
    with pytest.raises(BudgetExceeded):
        memory.add(task(0))
