"""Folders of class folders: `train/CLASS/**` and `test/CLASS/**` (or validation, valid, val).

If every class folder is named by an integer, that integer is the class id, and classes come in the order of these
numbers; else ids are the places of the sorted names. Files come in the order of their paths. Hidden files, and files
that are no images by their suffix, are passed over.

In memory an image is its file's name and four bytes.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from engram.errors import BadUpload, NotFound
from engram.folder import classes
from engram_trainer.examples import ClassIds, Examples, Rows
from engram_trainer.sources.dataset import TEST_SPLITS, Dataset
from engram_trainer.sources.pictures import picture_sets

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".pgm")


def is_image_folder(folder: Path) -> bool:
    """Whether there are class folders in train/."""
    return (folder / "train").is_dir() and any(_subfolders(folder / "train"))


def read_image_folder(folder: Path, *, resize: int | None = None) -> Dataset:
    """The images below this folder's class folders.

    Raises:
        NotFound: a split is missing, or a class folder has no image.
        BadUpload: class folders are of several kinds; or as `pictures.picture_sets`.
    """
    test_split = next((split for split in TEST_SPLITS if (folder / split).is_dir()), None)
    if test_split is None or not is_image_folder(folder) or not any(_subfolders(folder / test_split)):
        raise NotFound(f"{folder} needs train/CLASS/ and test/CLASS/ folders of images")
    found = {path.name: label for path, label in classes(folder / "train").items()}
    ids = {name: place if isinstance(label, str) else label for place, (name, label) in enumerate(found.items())}
    unknown = sorted({path.name for path in _subfolders(folder / test_split)} - ids.keys())
    if unknown:
        raise NotFound(f"{folder / test_split} has the class folders {unknown}, which train/ has not")
    splits = [FolderFiles.of(folder / split, tuple(ids)) for split in ("train", test_split)]
    images = picture_sets(splits, resize=resize, source=str(folder))
    train, test = (
        Examples(each, files.class_ids(tuple(ids.values()))) for each, files in zip(images, splits, strict=True)
    )
    # Integers are their own names, and there may be gaps between them.
    is_named = any(isinstance(label, str) for label in found.values())
    return Dataset(folder.name, train, test, tuple(ids) if is_named else ())


@dataclass(frozen=True, eq=False)
class FolderFiles:
    """The image files of some folders, one after the other."""

    root: Path
    folders: tuple[str, ...]
    starts: Rows
    """The first row of each folder."""
    names: bytes
    """Of all files, relative to their folders, without anything between them."""
    ends: npt.NDArray[np.uint32]
    """Where the name of each file ends."""

    @classmethod
    def of(cls, root: Path, folders: tuple[str, ...]) -> FolderFiles:
        """Those of these folders of `root`; one that is not there has none.

        Raises:
            NotFound: a folder has no images.
        """
        names, lengths, starts = bytearray(), list[int](), list[int]()
        for folder in folders:
            starts.append(len(lengths))
            for name in map(os.fsencode, _image_files(root / folder)):
                names += name
                lengths.append(len(name))
        return cls(root, folders, np.array(starts, np.int64), bytes(names), np.cumsum(lengths, dtype=np.uint32))

    def class_ids(self, ids: tuple[int, ...]) -> ClassIds:
        """The class id of every file, given that of every folder."""
        return np.repeat(np.array(ids, np.int64), np.diff(self.starts, append=len(self)))

    def __len__(self) -> int:
        return len(self.ends)

    def path(self, row: int) -> str:
        """Of the file of one row."""
        folder = self.folders[int(np.searchsorted(self.starts, row, side="right")) - 1]
        start = int(self.ends[row - 1]) if row else 0
        return os.path.join(self.root, folder, os.fsdecode(self.names[start : int(self.ends[row])]))  # noqa: PTH118

    def read(self, rows: Rows) -> Iterator[tuple[str, bytes]]:
        """The path and the content of each of these files.

        Raises:
            BadUpload: one cannot be read.
        """
        for row in rows.tolist():
            path = self.path(row)
            try:
                with open(path, "rb", buffering=0) as file:  # noqa: PTH123
                    content = file.read()
            except OSError as error:
                raise BadUpload(f"{path} cannot be read: {error.strerror}") from error
            yield path, content


def _subfolders(folder: Path) -> Iterator[Path]:
    return (path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _image_files(folder: Path) -> list[str]:
    """The paths of a class folder's images, relative to it, sorted.

    Raises:
        NotFound: it has none.
    """
    found = list[str]()
    others = Counter[str]()
    for parent, _, names in os.walk(folder):
        below = "" if parent == str(folder) else os.path.relpath(parent, folder) + os.sep
        for name in names:
            if name.startswith("."):
                continue
            if name.lower().endswith(IMAGE_SUFFIXES):
                found.append(below + name)
            else:
                others[Path(name).suffix or name] += 1
    if not found and folder.is_dir():
        kinds = others.most_common(1)
        has = f"; it has {others.total()} files of other kinds, most of them {kinds[0][0]}" if kinds else ""
        raise NotFound(f"{folder} has no image ({', '.join(IMAGE_SUFFIXES)}){has}")
    return sorted(found)
