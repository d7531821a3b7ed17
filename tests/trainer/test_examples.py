"""Images are read by row wherever they lie, and nothing reads more of them than was asked for."""

from __future__ import annotations

import pickle
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engram_trainer.examples import ArraySet, Examples, Images, ImageSet, Joined, Mapped, Rows, Shape, Subset, join


def numbered(count: int, start: int = 0) -> ArraySet:
    """Images whose one pixel is their number."""
    return ArraySet(np.arange(start, start + count, dtype=np.uint8).reshape(-1, 1, 1, 1))


def pixels(images: ImageSet, rows: list[int]) -> list[int]:
    return images.read(np.array(rows, np.int64)).ravel().tolist()


class Counted:
    """Says how many images were read at most at once."""

    is_at_hand = False

    def __init__(self, images: ImageSet) -> None:
        self.images = images
        self.most = 0

    @property
    def shape(self) -> Shape:
        return self.images.shape

    def __len__(self) -> int:
        return len(self.images)

    def read(self, rows: Rows) -> Images:
        self.most = max(self.most, len(rows))
        return self.images.read(rows)


@given(
    sizes=st.lists(st.integers(0, 6), min_size=1, max_size=5),
    wanted=st.lists(st.integers(0, 1000), max_size=12),
)
def test_joined_sets_are_one_array(sizes: list[int], wanted: list[int]) -> None:
    starts = np.cumsum([0, *sizes])
    joined = Joined([numbered(size, int(start)) for size, start in zip(sizes, starts, strict=False)])
    rows = [row % len(joined) for row in wanted] if len(joined) else []
    assert len(joined) == sum(sizes)
    assert pixels(joined, rows) == rows


def test_a_joined_set_is_at_hand_if_every_part_is() -> None:
    assert Joined([numbered(1), numbered(1)]).is_at_hand
    assert not Joined([numbered(1), Counted(numbered(1))]).is_at_hand
    with pytest.raises(ValueError, match=r"\[\(1, 1, 1\), \(2, 1, 1\)\] cannot be joined"):
        Joined([numbered(1), ArraySet(np.zeros((1, 2, 1, 1), np.uint8))])


def test_rows_of_rows_are_rows_of_the_whole() -> None:
    examples = Examples(numbered(10), np.arange(10) % 2)
    odd = examples.of_class(1)
    assert pixels(odd.images, [0, 1, 4]) == [1, 3, 9]
    last = odd.select(np.array([4, 0]))
    assert pixels(last.images, [0, 1]) == [9, 1]
    assert isinstance(last.images, Subset)
    assert last.images.base is examples.images
    assert odd.classes == (1,)


def test_a_change_is_made_when_images_are_read_and_survives_a_pickle() -> None:
    changed = Examples(numbered(4), np.zeros(4, np.int64)).mapped(partial(np.add, np.uint8(100)))
    assert isinstance(changed.images, Mapped)
    assert pixels(changed.select(np.array([3, 1])).images, [0, 1]) == [103, 101]
    assert pixels(pickle.loads(pickle.dumps(changed)).images, [2]) == [102]


@pytest.mark.parametrize("count", [0, 1, 5, 6, 7])
def test_chunks_are_all_images_in_order_a_few_at_a_time(count: int) -> None:
    images = Counted(numbered(count))
    examples = Examples(images, np.zeros(count, np.int64))
    found = [chunk.ravel().tolist() for chunk in examples.chunks(3)]
    assert [each for chunk in found for each in chunk] == list(range(count))
    assert images.most <= 3


def test_a_chunk_is_some_8_mib() -> None:
    examples = Examples.of_arrays(np.zeros((20, 1024, 1024, 1), np.uint8), np.zeros(20, np.int64))
    assert [len(chunk) for chunk in examples.chunks()] == [8, 8, 4]


def test_joined_examples_keep_their_classes() -> None:
    both = join([Examples(numbered(2), np.array([1, 0])), Examples(numbered(1, 7), np.array([4]))])
    assert (both.class_ids.tolist(), both.read().ravel().tolist()) == ([1, 0, 4], [0, 1, 7])
    assert both.classes == (0, 1, 4)


def test_images_and_class_ids_must_be_as_many() -> None:
    with pytest.raises(ValueError, match="6 images but 5 class ids"):
        Examples(numbered(6), np.zeros(5, np.int64))
