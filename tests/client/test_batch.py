"""The body of a draw decodes to exactly the exemplars that were asked for."""

from __future__ import annotations

import numpy as np
import pytest

from engram import batch, strip
from engram.draw import Plan
from engram.errors import InvalidRequest, StripCorrupt
from engram.schemas import Subsampling


def stored(
    count: int, quality: int, side: int = 16, *, seed: int = 0, sampling: Subsampling = "4:2:0"
) -> strip.Exemplars:
    rng = np.random.default_rng([quality, seed])
    images = rng.integers(0, 255, (count, side, side, 3), dtype=np.uint8)
    return strip.encode(images, np.arange(count) // 4, quality=quality, subsampling=sampling)


def chosen(packs: list[strip.Exemplars], which: list[int], rows: list[int]) -> list[batch.Part]:
    """These rows of packs, pack i being task 5 + i."""
    class_ids = np.array([packs[pack].class_ids[row] for pack, row in zip(which, rows, strict=True)])
    return batch.collect(packs, Plan(np.array(which), np.array(rows), np.array(which) + 5, class_ids))


def test_exemplars_of_several_packs_come_back_in_one_strip_with_their_labels() -> None:
    first, second = stored(20, 30), stored(12, 30, seed=1)
    parts = chosen([first, second], [0, 0, 0, 0, 1], [0, 7, 7, 19, 3])
    body = batch.assemble(parts)
    assert body.count(b"\xff\xd8\xff\xef") == 1
    got = batch.decode(body)
    assert got.tasks.tolist() == [5, 5, 5, 5, 6]
    assert got.rows.tolist() == [0, 7, 7, 19, 3]
    assert got.class_ids.tolist() == [0, 1, 1, 4, 0]
    assert np.array_equal(got.images[:4], first.decode()[[0, 7, 7, 19]])
    assert np.array_equal(got.images[4], second.decode()[3])
    for straight in (batch.from_parts(parts), batch.decode(memoryview(body))):
        for name in ("images", "class_ids", "tasks", "rows"):
            assert np.array_equal(getattr(straight, name), getattr(got, name))


def test_packs_of_several_forms_make_a_strip_each_and_one_batch() -> None:
    packs = [stored(20, 30), stored(12, 80), stored(9, 30, seed=1)]
    parts = chosen(packs, [0, 1, 2, 2], [4, 3, 0, 8])
    body = batch.assemble(parts)
    assert body.count(b"\xff\xd8\xff\xef") == 2
    for got in (batch.decode(body), batch.from_parts(parts)):
        assert got.tasks.tolist() == [5, 7, 7, 6]
        assert got.rows.tolist() == [4, 0, 8, 3]
        expected = [packs[task - 5].decode()[row] for task, row in zip(got.tasks, got.rows, strict=True)]
        assert np.array_equal(got.images, np.stack(expected))
    with pytest.raises(InvalidRequest, match="one form"):
        batch.picture(parts)


def test_more_exemplars_than_one_strip_holds_make_several_strips_and_one_batch() -> None:
    tall = strip.encode(np.zeros((3, 20_000, 8, 1), np.uint8), [0, 1, 2], quality=30)
    rows = [0, 1, 2, 2, 1]
    parts = chosen([tall], [0] * 5, rows)
    body = batch.assemble(parts)
    assert body.count(b"\xff\xd8\xff\xef") == 2
    for got in (batch.decode(body), batch.from_parts(parts)):
        assert got.class_ids.tolist() == got.rows.tolist() == rows
        assert got.images.shape == (5, 20_000, 8, 1)
    with pytest.raises(InvalidRequest, match="1 to 3 exemplars of 20000x8, not 5") as caught:
        batch.picture(parts)
    assert caught.value.details == {"max_images": 3}


def test_images_whose_height_is_padded_lose_the_padding() -> None:
    exemplars = stored(5, 60, side=11)
    got = batch.decode(batch.assemble(chosen([exemplars], [0] * 5, list(range(5)))))
    assert got.images.shape == (5, 11, 11, 3)
    assert np.array_equal(got.images, exemplars.decode())


def test_rows_of_a_damaged_pack_keep_their_numbers() -> None:
    exemplars = stored(5, 60)
    plan = Plan(np.zeros(2, np.int64), np.array([2, 4]), np.zeros(2, np.int64), np.array([0, 1]))
    (part,) = batch.collect([exemplars.select([0, 2, 4])], plan, np.array([1, 2]))
    assert part.rows.tolist() == [2, 4]
    assert np.array_equal(batch.from_parts([part]).images, exemplars.decode()[[2, 4]])


def test_nothing_makes_an_empty_body() -> None:
    assert chosen([stored(1, 50)], [], []) == []
    assert batch.assemble([]) == b""
    with pytest.raises(InvalidRequest):
        batch.picture([])


def test_a_truncated_or_mixed_body_is_refused() -> None:
    body = batch.assemble(chosen([stored(5, 60)], [0] * 5, list(range(5))))
    for bad in (b"", body[:-1], body + b"\xff", body[:40]):
        with pytest.raises(StripCorrupt):
            batch.decode(bad)
    others: list[tuple[int, Subsampling]] = [(8, "4:2:0"), (24, "4:4:4")]
    for side, sampling in others:
        other = stored(5, 60, side=side, sampling=sampling)
        mixed = body if side != 24 else batch.assemble(chosen([stored(5, 60, side=24)], [0], [0]))
        with pytest.raises(StripCorrupt, match="different sizes"):
            batch.decode(mixed + batch.assemble(chosen([other], [0], [1])))
    with pytest.raises(StripCorrupt, match="part of a pack"):
        batch.decode(stored(5, 60).to_strips()[0])


def test_pixels_are_decoded_into_a_buffer_off_the_slow_alignment() -> None:
    for _ in range(20):
        assert strip.pixel_buffer(1000).ctypes.data % 32 == 16
