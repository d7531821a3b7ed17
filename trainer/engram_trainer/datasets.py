"""Data sets of images with classes, from files, folders or the Hugging Face Hub.

`load(source)` understands:

    sample            a sample of Fashion-MNIST (700 train + 150 test images of each class)
    digits            scikit-learn's 8x8 digits
    FOLDER            with IDX files (MNIST, Fashion-MNIST, gzipped or not); with one of the archives of CIFAR-10 and
                      CIFAR-100, unpacked; with train/CLASS/*.png and test/CLASS/*.png; with WebDataset shards,
                      train-*.tar and test-*.tar; or with a saved Hugging Face data set (`save_to_disk`, or parquet
                      files)
    FILE              an archive of CIFAR-10 or CIFAR-100 (.tar.gz)
    NAME, hub:NAME    a data set of the Hugging Face Hub with an image and a label column, e.g. uoft-cs/cifar100

`SOURCE#LABELS` takes other labels than the first: `#coarse` of CIFAR-100's archives, `#COLUMN` of a Hugging Face set.

Images are uint8 `[N, H, W, C]` with C = 1 or 3, RGB; class ids are int64 `[N]`, the data set's own numbers. All images
of a data set have one shape; `resize` makes it so where the source has several. Folders of images, shards and Hugging
Face data sets are read and decoded image by image as they are needed, the others are arrays in memory.
"""

from __future__ import annotations

from pathlib import Path

from engram.errors import NotFound
from engram_trainer.sources.cifar import cifar_folder, read_cifar
from engram_trainer.sources.dataset import Dataset as Dataset
from engram_trainer.sources.dataset import first_rows as first_rows
from engram_trainer.sources.folders import is_image_folder, read_image_folder
from engram_trainer.sources.hub import is_hub_folder, read_hub
from engram_trainer.sources.idx import is_idx_folder, read_idx_folder
from engram_trainer.sources.samples import read_digits, read_sample
from engram_trainer.sources.shards import read_shards, shard_splits


def load(source: str = "sample", *, resize: int | None = None) -> Dataset:
    """Read a data set; the module's docstring lists what `source` may be.

    Args:
        source: which data set.
        resize: make every image `resize` x `resize` pixels: the shorter side is resized to that, the aspect ratio
            kept, and the centre taken. Only of folders of images, shards and Hugging Face data sets.

    Raises:
        NotFound: there is no such folder, split, column or labels, a class has no training or no test images, or the
            package that reads it is not installed.
        BadUpload: a file is not what it claims to be.
        Unavailable: the sample has to be fetched, and cannot.
        ValueError: the images of this source are not resized.
    """
    data = _load(source, resize)
    data.check_classes()
    return data


def _load(source: str, resize: int | None) -> Dataset:
    path, labels = _labels(source)
    if source in ("sample", "digits"):
        _refuse(source, resize, None)
        return read_sample() if source == "sample" else read_digits()
    if path.is_dir():
        return _read_folder(path, resize, labels)
    if path.is_file():
        _refuse(source, resize, None)
        return _read_cifar(path, labels)
    if source.startswith((".", "/", "~")):
        raise NotFound(
            f"{source} is not there; give a folder, a .tar.gz of CIFAR, 'sample', 'digits' or the name of a data set "
            "of the Hugging Face Hub"
        )
    name, _, column = source.removeprefix("hub:").partition("#")
    return read_hub(name, resize=resize, label=column or None)


def _read_folder(folder: Path, resize: int | None, labels: str | None) -> Dataset:
    if is_idx_folder(folder):
        _refuse(str(folder), resize, labels)
        return read_idx_folder(folder)
    if found := cifar_folder(folder):
        _refuse(str(folder), resize, None)
        return _read_cifar(found, labels)
    if shard_splits(folder):
        _refuse(str(folder), None, labels)
        return read_shards(folder, resize=resize)
    if is_image_folder(folder):
        _refuse(str(folder), None, labels)
        return read_image_folder(folder, resize=resize)
    if is_hub_folder(folder):
        return read_hub(str(folder), resize=resize, label=labels)
    raise NotFound(
        f"{folder} holds no data set that this program knows: expected *-idx3-ubyte[.gz] files, an archive of CIFAR, "
        "train/CLASS/ and test/CLASS/ folders of images, train-*.tar and test-*.tar, dataset_dict.json or *.parquet"
    )


def _read_cifar(path: Path, labels: str | None) -> Dataset:
    if labels not in (None, "fine", "coarse"):
        raise NotFound(f"CIFAR has fine and coarse labels, not {labels!r}")
    return read_cifar(path, labels="coarse" if labels == "coarse" else "fine")


def _labels(source: str) -> tuple[Path, str | None]:
    """The path and what is said after `#`, unless the `#` is part of the path."""
    path = Path(source).expanduser()
    if path.exists() or "#" not in source:
        return path, None
    start, _, labels = source.rpartition("#")
    return Path(start).expanduser(), labels


def _refuse(source: str, resize: int | None, labels: str | None) -> None:
    if resize is not None:
        raise ValueError(f"the images of {source} are used as they are, not resized to {resize}")
    if labels is not None:
        raise NotFound(f"{source} has one kind of labels, and none called {labels!r}")
