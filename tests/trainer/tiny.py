"""A data set of two classes, small enough to compare every pixel, and ways to write it."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

from engram_trainer.datasets import Dataset
from engram_trainer.examples import Examples, Images


def tiny(channels: int = 1) -> Dataset:
    """Two classes, 3 train and 2 test images each, of 5x4 pixels, the classes one after the other."""
    generator = np.random.default_rng(0)
    train, test = (generator.integers(0, 256, (count, 5, 4, channels), dtype=np.uint8) for count in (6, 4))
    return Dataset(
        "tiny",
        Examples.of_arrays(train, np.array([0, 0, 0, 1, 1, 1])),
        Examples.of_arrays(test, np.array([0, 0, 1, 1])),
        ("cat", "dog"),
    )


def picture(image: Images) -> Image.Image:
    """One image for Pillow."""
    return Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)


def encoded(image: Images, kind: str = "png") -> bytes:
    """The bytes of its file."""
    file = io.BytesIO()
    picture(image).save(file, kind)
    return file.getvalue()


def assert_same(found: Dataset, expected: Dataset) -> None:
    """All pixels and classes, in their order."""
    for one, other in ((found.train, expected.train), (found.test, expected.test)):
        np.testing.assert_array_equal(one.class_ids, other.class_ids)
        np.testing.assert_array_equal(one.read(), other.read())


def write_folder(folder: Path, dataset: Dataset, *, test: str = "test") -> None:
    """As train/CLASS/000.png and test/CLASS/000.png."""
    for split, examples in (("train", dataset.train), (test, dataset.test)):
        for number, (image, class_id) in enumerate(zip(examples.read(), examples.class_ids, strict=True)):
            path = folder / split / dataset.class_names[class_id] / f"{number:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(image))
