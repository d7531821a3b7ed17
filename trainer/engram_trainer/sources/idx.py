"""Reads and writes IDX files, the format of MNIST and Fashion-MNIST.

    magic        uint32, big-endian: 0x0800 | number of dimensions, for arrays of bytes
    dimensions   one uint32, big-endian, each
    content      bytes, the last dimension fastest

A data set is four files, {train,t10k}-{images-idx3,labels-idx1}-ubyte, gzipped (.gz) or not.
"""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

from engram.errors import BadUpload, NotFound
from engram_trainer.examples import Examples, Images
from engram_trainer.sources.dataset import Dataset

IDX_STEMS = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
_IDX_UINT8 = 0x0800


def is_idx_folder(folder: Path) -> bool:
    """Whether there are IDX files."""
    return any(folder.glob("*-idx[13]-ubyte*"))


def read_idx_folder(folder: Path, *, name: str | None = None) -> Dataset:
    """The four files of this folder. Where its name, or this one, says fashion, classes have Fashion-MNIST's names.

    Raises:
        NotFound: one of the four is missing.
        BadUpload: one of the four is damaged.
    """
    name = name or folder.name
    arrays: list[Images] = []
    for stem in IDX_STEMS:
        paths = [folder / f"{stem}-ubyte.gz", folder / f"{stem}-ubyte"]
        path = next((path for path in paths if path.is_file()), None)
        if path is None:
            raise NotFound(f"{folder} has neither {paths[0].name} nor {paths[1].name}")
        arrays.append(read_idx(path))
    train, train_labels, test, test_labels = arrays
    for images, labels in ((train, train_labels), (test, test_labels)):
        if images.ndim != 3 or len(images) != len(labels):
            raise BadUpload(f"{folder} has images of the shape {images.shape} and {len(labels)} labels for them")
    return Dataset(
        name,
        Examples.of_arrays(train[..., None], train_labels.astype(np.int64)),
        Examples.of_arrays(test[..., None], test_labels.astype(np.int64)),
        FASHION_CLASSES if "fashion" in name.lower() else (),
    )


def read_idx(path: Path) -> Images:
    """The array of one IDX file of bytes, gzipped or not.

    Raises:
        BadUpload: the header or the size is wrong.
    """
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise BadUpload(f"{path} cannot be decompressed: {error}") from error
    magic = int.from_bytes(data[:4], "big")
    dimensions = magic & 0xFF
    if magic & ~0xFF != _IDX_UINT8 or not 1 <= dimensions <= 4 or len(data) < 4 + 4 * dimensions:
        raise BadUpload(f"{path} is not an IDX file of bytes: it starts with {data[:4].hex()}")
    shape = tuple(int(size) for size in np.frombuffer(data, ">u4", dimensions, 4))
    expected = 4 + 4 * dimensions + math.prod(shape)
    if len(data) != expected:
        raise BadUpload(f"{path} has {len(data)} bytes, its header announces {expected} for shape {shape}")
    return np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def write_idx(dataset: Dataset, folder: str | Path) -> None:
    """Write a grey data set as the four gzipped files, the same bytes every time."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for stem, array in (
        ("train-images-idx3", dataset.train.read()[..., 0]),
        ("train-labels-idx1", dataset.train.class_ids),
        ("t10k-images-idx3", dataset.test.read()[..., 0]),
        ("t10k-labels-idx1", dataset.test.class_ids),
    ):
        header = np.array([_IDX_UINT8 | array.ndim, *array.shape], ">u4").tobytes()
        data = gzip.compress(header + array.astype(np.uint8).tobytes(), compresslevel=6, mtime=0)
        (Path(folder) / f"{stem}-ubyte.gz").write_bytes(data)
