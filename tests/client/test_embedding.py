"""The embedding by pixels: unit rows that keep the angles between pictures, at any size of image and batch."""

from __future__ import annotations

import numpy as np
import pytest

from engram.selection.embedding import BuiltinEmbedder, shrink
from tests.photos import photos


@pytest.mark.parametrize("shape", [(32, 32, 3), (28, 28, 1), (1, 1, 1), (2, 3, 3), (97, 33, 3), (200, 20, 1)])
def test_rows_have_unit_length_at_any_size(shape: tuple[int, int, int]) -> None:
    features = BuiltinEmbedder(shape).embed(photos(5, shape))
    assert features.shape == (5, 128)
    assert features.dtype == np.float32
    assert np.allclose(np.linalg.norm(features, axis=1), 1, atol=1e-6)


def test_no_images_are_no_rows() -> None:
    assert BuiltinEmbedder((8, 8, 1)).embed(np.empty((0, 8, 8, 1), np.uint8)).shape == (0, 128)


def test_flat_images_are_equal_and_their_coding_noise_stays_small() -> None:
    flat = np.stack([np.full((16, 16, 1), level, np.uint8) for level in (0, 90, 255)])
    embedder = BuiltinEmbedder((16, 16, 1))
    features = embedder.embed(flat)
    assert np.allclose(features, features[0], atol=1e-4)
    noisy = flat[1:2] + np.random.default_rng(0).integers(0, 2, (1, 16, 16, 1), dtype=np.uint8)
    assert float(embedder.embed(noisy)[0] @ features[0]) > 0.98


def test_the_projection_keeps_the_angles_between_pictures() -> None:
    images = photos(60, (32, 32, 3), noise=0)
    centred = images.reshape(60, -1).astype(float)
    centred -= centred.mean(axis=1, keepdims=True)
    centred /= np.linalg.norm(centred, axis=1, keepdims=True)
    features = BuiltinEmbedder((32, 32, 3), dimensions=512).embed(images)
    assert np.abs(features @ features.T - centred @ centred.T).max() < 0.2


def test_brightness_does_not_matter_but_the_picture_does() -> None:
    images = photos(2, (32, 32, 3), noise=0) // 2
    embedder = BuiltinEmbedder((32, 32, 3))
    a, b = embedder.embed(images)
    assert np.allclose(embedder.embed(images + 90)[0], a, atol=1e-4)
    assert float(a @ b) < 0.7


@pytest.mark.parametrize("sides", [(128, 96), (97, 33), (32 * 257, 32), (32 * 258, 32)])
def test_a_thumbnail_is_the_means_of_its_cells(sides: tuple[int, int]) -> None:
    small = np.where(photos(3, (32, 32, 1)) < 128, 0, 255).astype(np.uint8)
    large = small
    for axis, side in enumerate(sides, start=1):
        large = large.repeat(np.diff(np.arange(33) * side // 32), axis=axis)
    assert np.allclose(shrink(large, 32, 32), small, atol=1e-5)


def test_large_images_with_one_thumbnail_differ_by_their_detail() -> None:
    plain = photos(4, (32, 32, 3), noise=0).repeat(7, axis=1).repeat(7, axis=2) // 2 + 60
    checks = np.where(np.indices((224, 224)).sum(axis=0) % 2, 40, -40)[..., None]
    checked = (plain + checks).astype(np.uint8)
    assert np.abs(shrink(checked, 32, 32) - shrink(plain, 32, 32)).max() < 1
    embedder = BuiltinEmbedder((224, 224, 3))
    assert (np.einsum("nd,nd->n", embedder.embed(plain), embedder.embed(checked)) < 0.7).all()


def test_images_up_to_32_by_32_have_no_detail_beside_their_pixels() -> None:
    row = BuiltinEmbedder((32, 32, 3)).embed(photos(1, (32, 32, 3)))[0]
    assert np.round(row[:4].astype(float), 4).tolist() == [0.0763, -0.0932, -0.0508, 0.1545]


def test_the_batch_does_not_change_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    images = photos(40, (32, 32, 3), noise=0)
    whole = BuiltinEmbedder((32, 32, 3)).embed(images)
    monkeypatch.setattr("engram.selection.embedding._CHUNK_VALUES", 7 * 32 * 32 * 3)
    assert np.allclose(BuiltinEmbedder((32, 32, 3)).embed(images), whole, atol=1e-6)


def test_the_projection_is_pinned_as_decisions_depend_on_it() -> None:
    row = BuiltinEmbedder((4, 4, 1)).embed(np.arange(16, dtype=np.uint8).reshape(1, 4, 4, 1) * 15)[0]
    assert np.round(row[:4].astype(float), 4).tolist() == [-0.0604, 0.0142, 0.1574, 0.1019]


def test_another_shape_is_an_error() -> None:
    with pytest.raises(ValueError, match="images are"):
        BuiltinEmbedder((8, 8, 3)).embed(photos(1, (8, 8, 1)))
