"""A source is found by what it is, and one that is not there or not complete is refused with a clear message."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from engram.errors import NotFound
from engram_trainer.datasets import Dataset, first_rows, load
from engram_trainer.examples import Examples
from tests.trainer.tiny import tiny, write_folder


@pytest.mark.parametrize("source", ["/no/such/folder", "./nowhere", "~/nowhere-at-all", "/no/such/folder#coarse"])
def test_a_path_that_is_not_there_is_not_looked_up_on_the_hub(source: str) -> None:
    with pytest.raises(NotFound, match=f"{source} is not there; give a folder"):
        load(source)


def test_a_folder_without_a_data_set_says_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="CLASS"):
        load(str(tmp_path))
    (tmp_path / "train").mkdir()
    with pytest.raises(NotFound, match="CLASS"):
        load(str(tmp_path))


def test_a_hash_may_be_part_of_a_path(tmp_path: Path) -> None:
    write_folder(tmp_path / "set#1", tiny())
    assert len(load(str(tmp_path / "set#1")).train) == 6
    with pytest.raises(NotFound, match="has one kind of labels, and none called 'fine'"):
        load(f"{tmp_path / 'set#1'}#fine")


@pytest.mark.parametrize("source", ["sample", "digits"])
def test_a_size_for_images_that_have_one_is_refused(source: str) -> None:
    with pytest.raises(ValueError, match=f"the images of {source} are used as they are, not resized to 32"):
        load(source, resize=32)


def test_every_class_needs_training_and_test_images() -> None:
    whole = tiny()
    cats = [examples.of_class(0) for examples in (whole.train, whole.test)]
    whole.check_classes()
    with pytest.raises(NotFound, match=r"^x has no test images of the class 1$"):
        Dataset("x", whole.train, cats[1]).check_classes()
    with pytest.raises(NotFound, match=r"^x has no training images of the class 'dog'$"):
        Dataset("x", cats[0], whole.test, ("cat", "dog")).check_classes()
    with pytest.raises(NotFound, match=r"^x holds no images$"):
        Dataset("x", cats[0].of_class(1), cats[1].of_class(1)).check_classes()
    many = Examples.of_arrays(np.zeros((9, 1, 1, 1), np.uint8), np.arange(9))
    with pytest.raises(NotFound, match=r"^x has no test images of the classes 1, 2, 3, 4, 5 and 3 more$"):
        Dataset("x", many, many.of_class(0)).check_classes()


def test_the_splits_have_one_shape_with_one_or_three_channels() -> None:
    grey, wide, odd = (
        Examples.of_arrays(np.zeros((1, 2, *size), np.uint8), np.zeros(1, np.int64))
        for size in ((2, 1), (3, 1), (2, 2))
    )
    with pytest.raises(ValueError, match=r"train images are \(2, 2, 1\), test images are \(2, 3, 1\)"):
        Dataset("x", grey, wide)
    with pytest.raises(ValueError, match="images have 1 or 3 channels, not 2"):
        Dataset("x", odd, odd)


def test_the_first_rows_of_each_class_keep_their_order() -> None:
    class_ids = np.array([5, 2, 5, 2, 5, 7])
    assert first_rows(class_ids, 1).tolist() == [0, 1, 5]
    assert first_rows(class_ids, 2).tolist() == [0, 1, 2, 3, 5]
    assert first_rows(class_ids, None).tolist() == [0, 1, 2, 3, 4, 5]


def test_the_first_images_are_a_data_set_of_their_own() -> None:
    part = tiny().first(train=2, test=1)
    assert (part.train.class_ids.tolist(), part.test.class_ids.tolist()) == ([0, 0, 1, 1], [0, 1])
    np.testing.assert_array_equal(part.train.read(), tiny().train.read()[[0, 1, 3, 4]])
