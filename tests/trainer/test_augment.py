"""Augmentation crops and flips batches, drawing all randomness from one generator."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from engram_trainer.augment import augment


def batch(count: int, channels: int = 3, height: int = 6, width: int = 5) -> torch.Tensor:
    return torch.arange(1.0, 1 + count * channels * height * width).reshape(count, channels, height, width)


def test_without_padding_and_flip_nothing_changes() -> None:
    images = batch(4)
    assert torch.equal(augment(images, padding=0, flip=False, generator=torch.Generator().manual_seed(0)), images)


def test_a_flip_reverses_the_width_and_keeps_the_channels() -> None:
    images = batch(200)
    flipped = augment(images, padding=0, flip=True, generator=torch.Generator().manual_seed(0))
    reversed_rows = [row for row in range(200) if torch.equal(flipped[row], images[row].flip(2))]
    kept_rows = [row for row in range(200) if torch.equal(flipped[row], images[row])]
    assert sorted(reversed_rows + kept_rows) == list(range(200))
    assert 60 < len(reversed_rows) < 140


@given(padding=st.integers(1, 3), seed=st.integers(0, 2**31))
def test_every_crop_is_a_shift_within_the_padding_filled_with_zeros(padding: int, seed: int) -> None:
    images = batch(3)
    cropped = augment(images, padding=padding, flip=False, generator=torch.Generator().manual_seed(seed))
    padded = torch.nn.functional.pad(images, (padding,) * 4)
    for row in range(3):
        shifts = [
            (top, left)
            for top in range(2 * padding + 1)
            for left in range(2 * padding + 1)
            if torch.equal(cropped[row], padded[row, :, top : top + 6, left : left + 5])
        ]
        assert len(shifts) == 1


def test_images_of_a_batch_are_shifted_independently() -> None:
    images = batch(1).expand(64, -1, -1, -1)
    cropped = augment(images, padding=2, flip=False, generator=torch.Generator().manual_seed(0))
    assert len({tuple(image.flatten().tolist()) for image in cropped}) > 10


def test_the_generator_decides_and_the_input_is_left_alone() -> None:
    images = batch(8)
    before = images.clone()
    one, same, other = (
        augment(images, padding=2, flip=True, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(images, before)
