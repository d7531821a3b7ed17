"""Images are cropped, flipped, scaled and normalised as asked, by numbers that depend on the image and the step."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engram_trainer.preparation import DRAWS, Augment, FloatArray, Preparation, pixels, uniforms


def images_of(count: int, height: int, width: int) -> torch.Tensor:
    """Every pixel of an image has a value of its own, and none is black."""
    values = torch.arange(1, 1 + height * width, dtype=torch.float32).view(1, 1, height, width)
    return (values / (height * width)).expand(count, 3, height, width).contiguous()


def drawn(count: int, key: int = 0) -> FloatArray:
    return uniforms(key, np.arange(count, dtype=np.uint64), DRAWS)


def test_bytes_become_numbers_in_0_to_1_with_channels_first() -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 3), np.uint8)
    found = pixels(images)
    assert found.shape == (2, 3, 3, 4)
    np.testing.assert_array_equal(found.numpy(), (images.astype(np.float32) / 255).transpose(0, 3, 1, 2))


def test_test_images_are_the_centre_normalised_by_channel() -> None:
    images = images_of(2, 6, 8)
    prepared = Preparation((6, 8, 3), crop=4, mean=(0.1, 0.2, 0.3), std=(0.5, 1.0, 2.0))
    assert prepared.shape == (4, 4, 3)
    expected = (images[:, :, 1:5, 2:6] - torch.tensor([0.1, 0.2, 0.3]).view(1, 3, 1, 1)) / torch.tensor(
        [0.5, 1.0, 2.0]
    ).view(1, 3, 1, 1)
    assert torch.equal(prepared(images), expected)
    assert torch.equal(Preparation((6, 8, 3))(images), images)


@pytest.mark.parametrize("padding", [0, 2])
def test_a_window_is_cut_out_of_the_image_and_black_pixels_around_it(padding: int) -> None:
    images = images_of(64, 7, 6)
    found = Preparation((7, 6, 3), crop=5).vary(images, Augment(padding=padding), drawn(64))
    padded = torch.nn.functional.pad(images, (padding,) * 4)[0]
    places = {
        (top, left): padded[:, top : top + 5, left : left + 5]
        for top in range(7 + 2 * padding - 4)
        for left in range(6 + 2 * padding - 4)
    }
    hit = {place for image in found for place, window in places.items() if torch.equal(image, window)}
    assert all(any(torch.equal(image, window) for window in places.values()) for image in found)
    assert len(hit) > len(places) / 2


def test_half_of_the_images_are_flipped_left_to_right() -> None:
    images = images_of(400, 4, 5)
    found = Preparation((4, 5, 3)).vary(images, Augment(flip=True), drawn(400))
    is_flipped = [torch.equal(image, images[0].flip(2)) for image in found]
    assert all(
        torch.equal(image, images[0].flip(2) if flipped else images[0])
        for image, flipped in zip(found, is_flipped, strict=True)
    )
    assert 160 < sum(is_flipped) < 240


def test_a_resized_crop_is_a_part_of_the_image_scaled_to_the_size_of_the_network() -> None:
    """The images are ramps, so a window's corners say where it is and how large."""
    height, width = 40, 50
    ramp = torch.stack(
        [
            (torch.arange(width) + 0.5).expand(height, width),
            (torch.arange(height) + 0.5).view(-1, 1).expand(height, width),
            torch.ones(height, width),
        ]
    )
    found = Preparation((height, width, 3), crop=16).vary(
        ramp.expand(300, 3, height, width), Augment(resized_crop=True), drawn(300)
    )
    assert found.shape == (300, 3, 16, 16)
    torch.testing.assert_close(found[:, 2], torch.ones(300, 16, 16))
    # A pixel of the result covers 1/16 of the window; its first and last centres are 15/16 of it apart. The border's
    # half pixel, which cannot be interpolated, is allowed for.
    across = (found[:, 0, 8, 14] - found[:, 0, 8, 1]) * 16 / 13
    down = (found[:, 1, 14, 8] - found[:, 1, 1, 8]) * 16 / 13
    area = (across * down) / (height * width)
    assert 0.075 < float(area.min()) < 0.2
    assert 0.8 < float(area.max()) < 1.02
    ratio = across / down
    assert float(ratio.min()) > 0.74
    assert float(ratio.max()) < 1.35
    assert float(found[:, 0].min()) >= 0.4
    assert float(found[:, 0].max()) <= width


def test_a_resized_crop_of_a_much_larger_image_does_not_make_coarse_patterns_of_fine_ones() -> None:
    """Stripes of one pixel: seen from afar they are grey."""
    stripes = (torch.arange(256) % 2).float().expand(8, 3, 256, 256)
    uniform = np.full((8, DRAWS), 0.5)
    uniform[:, 3] = 1.0  # the whole image
    found = Preparation((256, 256, 3), crop=32).vary(stripes, Augment(resized_crop=True), uniform)
    assert float((found - 0.5).abs().max()) < 0.1


@given(key=st.integers(0, 2**63), seed=st.integers(0, 2**31))
def test_what_is_drawn_depends_on_the_image_and_not_on_its_place(key: int, seed: int) -> None:
    identities = np.random.default_rng(seed).integers(0, 2**64, 20, np.uint64)
    whole = uniforms(key, identities, 3)
    assert np.array_equal(uniforms(key, identities[::-1], 3), whole[::-1])
    assert np.array_equal(uniforms(key, identities[7:9], 3), whole[7:9])
    assert ((whole >= 0) & (whole < 1)).all()


def test_what_is_drawn_is_uniform_and_independent_between_keys_images_and_numbers() -> None:
    rows = np.arange(20_000, dtype=np.uint64)
    one, other = uniforms(1, rows, 3), uniforms(2, rows, 3)
    columns = np.column_stack([one, other, np.roll(one[:, 0], 1)])
    counts = [np.histogram(column, bins=20, range=(0, 1))[0] for column in columns.T]
    assert max(np.abs(count - 1000).max() for count in counts) < 5 * np.sqrt(1000)
    correlation = np.corrcoef(columns.T) - np.eye(7)
    assert np.abs(correlation).max() < 5 / np.sqrt(len(rows))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop": 9}, "images of 8x8 pixels have no crop of 9x9"),
        ({"mean": (0.5, 0.5), "std": (1.0, 1.0)}, "for 2 channels, images have 3"),
    ],
)
def test_what_does_not_fit_the_images_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Preparation((8, 8, 3), **options)
