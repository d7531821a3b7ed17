"""The body of a draw decodes to exactly the exemplars that were asked for."""

from __future__ import annotations

import numpy as np
import pytest

from engram import batch, strip
from engram.errors import StripCorrupt


def stored(count: int, quality: int, side: int = 16) -> strip.Exemplars:
    rng = np.random.default_rng(quality)
    return strip.encode(
        rng.integers(0, 255, (count, side, side, 3), dtype=np.uint8), np.arange(count) // 4, quality=quality
    )


def test_exemplars_of_several_packs_come_back_with_their_labels() -> None:
    first, second = stored(20, 30), stored(12, 80)
    body = batch.assemble([(5, first, np.array([0, 7, 7, 19])), (6, second, np.array([3]))])
    got = batch.decode(body)
    assert got.tasks.tolist() == [5, 5, 5, 5, 6]
    assert got.rows.tolist() == [0, 7, 7, 19, 3]
    assert got.class_ids.tolist() == [0, 1, 1, 4, 0]
    assert np.array_equal(got.images[:4], first.decode()[[0, 7, 7, 19]])
    assert np.array_equal(got.images[4], second.decode()[3])


def test_images_whose_height_is_padded_lose_the_padding() -> None:
    exemplars = stored(5, 60, side=11)
    got = batch.decode(batch.assemble([(0, exemplars, np.arange(5))]))
    assert got.images.shape == (5, 11, 11, 3)
    assert np.array_equal(got.images, exemplars.decode())


def test_a_truncated_or_mixed_body_is_refused() -> None:
    body = batch.assemble([(0, stored(5, 60), np.arange(5))])
    for bad in (b"", body[:-1], body + b"\xff", body[:40]):
        with pytest.raises(StripCorrupt):
            batch.decode(bad)
    other = batch.assemble([(1, stored(5, 60, side=8), np.arange(5))])
    with pytest.raises(StripCorrupt, match="different sizes"):
        batch.decode(body + other)


def test_pixels_are_decoded_into_a_buffer_off_the_slow_alignment() -> None:
    for _ in range(20):
        assert strip.pixel_buffer(1000).ctypes.data % 32 == 16
