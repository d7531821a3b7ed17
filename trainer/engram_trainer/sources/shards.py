"""WebDataset shards: tar files of KEY.jpg (or .png, .webp, .ppm, .pgm) with KEY.cls or KEY.json.

A folder has `train/*.tar` and `test/*.tar` (or validation, valid, val), or tar files whose names have the split as a
word: `train-000.tar`, `imagenet1k-validation-07.tar`. KEY.cls is an integer or a name as text; KEY.json is one of
these, or an object with one as its `cls`, `label`, `class_id` or `fine_label`. Ids of names are their places in order.

The members' headers are read once, at the start; an image is then read at its place, so that any order costs the same.
In memory an image is 16 bytes. What is no image of an example is passed over, as is the second image of a key
(KEY.mask.png).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from engram import tar
from engram.errors import BadUpload, NotFound, TooLarge
from engram.names import MAX_CLASS_ID
from engram_trainer.examples import Examples, Rows
from engram_trainer.sources.dataset import TEST_SPLITS, Dataset
from engram_trainer.sources.pictures import picture_sets

_LABELS = ("cls", "label", "class_id", "fine_label")
_MAX_LABEL_BYTES = 2**20
_INTEGER = re.compile(r"[+-]?[0-9]{1,18}")
_AT_ONCE = 8
"""Shards whose headers are read at the same time: most of it is waiting for a disk."""


def shard_splits(folder: Path) -> dict[str, list[Path]]:
    """The tar files of every split, in order; {} if these are no shards."""
    found: dict[str, list[Path]] = {}
    for path in sorted(path for pattern in ("*.tar", "*/*.tar") for path in folder.glob(pattern)):
        words = re.split(r"[-_.]", path.stem.lower()) if path.parent == folder else [path.parent.name]
        split = next((split for split in ("train", *TEST_SPLITS) if split in words), None)
        if split is not None:
            found.setdefault(split, []).append(path)
    return found


def read_shards(folder: Path, *, resize: int | None = None) -> Dataset:
    """The images of this folder's shards.

    Raises:
        NotFound: a split is missing.
        BadUpload: a shard is damaged, or an image has no class; or as `pictures.picture_sets`.
    """
    splits = shard_splits(folder)
    test_split = next((split for split in TEST_SPLITS if split in splits), None)
    if "train" not in splits or test_split is None:
        raise NotFound(
            f"{folder} has shards of {', '.join(splits) or 'no split'}; needed are train-*.tar and test-*.tar or "
            "val-*.tar, or folders of these names"
        )
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        train, test = (list(pool.map(_index, splits[split])) for split in ("train", test_split))
    names = _names([*train, *test])
    places: dict[int | str, int] = {name: place for place, name in enumerate(names)}
    files = [ShardFiles.of(indexes) for indexes in (train, test)]
    images = picture_sets(files, resize=resize, source=str(folder))
    examples = [
        Examples(
            each, np.array([places[label] if names else label for index in indexes for label in index.labels], np.int64)
        )
        for each, indexes in zip(images, (train, test), strict=True)
    ]
    return Dataset(folder.name, examples[0], examples[1], names)


def _names(indexes: Sequence[_Index]) -> tuple[str, ...]:
    """The names of all classes in order; none if they are integers.

    Raises:
        BadUpload: some are names and some are integers.
    """
    said = {type(label): (index.path, label) for index in indexes for label in index.labels}
    if len(said) > 1:
        (one, first), (other, second) = said.values()
        raise BadUpload(
            f"{one} has the class {first!r} and {other} the class {second!r}; the classes of a data set are all "
            "integers or all names"
        )
    return tuple(sorted({name for index in indexes for name in index.labels if isinstance(name, str)}))


@dataclass(frozen=True, eq=False)
class ShardFiles:
    """The images of some shards, one after the other."""

    paths: tuple[str, ...]
    shards: npt.NDArray[np.uint32]
    offsets: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.uint32]

    @classmethod
    def of(cls, indexes: Sequence[_Index]) -> ShardFiles:
        """Those of these."""
        return cls(
            tuple(str(index.path) for index in indexes),
            np.repeat(np.arange(len(indexes), dtype=np.uint32), [len(index.labels) for index in indexes]),
            np.concatenate([index.offsets for index in indexes]),
            np.concatenate([index.sizes for index in indexes]),
        )

    def __len__(self) -> int:
        return len(self.sizes)

    def read(self, rows: Rows) -> Iterator[tuple[str, bytes]]:
        """The place and the content of each of these images.

        Raises:
            BadUpload: a shard cannot be read any more, or is shorter than it was.
        """
        for row in rows.tolist():
            path, offset, size = self.paths[self.shards[row]], int(self.offsets[row]), int(self.sizes[row])
            try:
                # Opened for each image: there may be more shards than a process may hold open.
                with open(path, "rb", buffering=0) as file:  # noqa: PTH123
                    file.seek(offset)
                    content = file.read(size)
            except OSError as error:
                raise BadUpload(f"{path} cannot be read: {error.strerror}") from error
            if len(content) != size:
                raise BadUpload(f"{path} was changed: it ends before the {size} bytes at byte {offset}")
            yield f"the image at byte {offset} of {path}", content


@dataclass(frozen=True, eq=False)
class _Index:
    """Where the images of one shard lie, and the class of each."""

    path: Path
    labels: list[int | str]
    offsets: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.uint32]


def _index(path: Path) -> _Index:
    """Read the headers of a shard.

    Raises:
        BadUpload: it is damaged, or an image has no class.
    """
    images: dict[str, tuple[int, int]] = {}
    labels: dict[str, int | str] = {}
    try:
        with path.open("rb") as file:
            for member in tar.places(file, wanted=_says_class, max_bytes=_MAX_LABEL_BYTES):
                key, _, extension = member.name.rpartition(".")
                extension = extension.lower()
                if extension in tar.IMAGE_EXTENSIONS:
                    if key in images:
                        raise BadUpload(f"the key {key!r} has two images")
                    images[key] = member.offset, member.size
                elif member.content is not None and not (extension == "json" and key in labels):
                    label = _label(member.name, member.content)
                    if label is not None:
                        labels[key] = label
    except (BadUpload, TooLarge) as error:
        raise BadUpload(f"{path}: {error.message}") from error
    except OSError as error:
        raise BadUpload(f"{path} cannot be read: {error.strerror}") from error
    found = [key for key in images if key in labels or _first_part(key) not in labels]
    missing = next((key for key in found if key not in labels), None)
    if missing is not None:
        raise BadUpload(f"{path}: the image {missing!r} has no class: there is no {missing}.cls, nor a .json with one")
    places = np.array([images[key] for key in found], np.int64).reshape(-1, 2)
    return _Index(path, [labels[key] for key in found], places[:, 0], places[:, 1].astype(np.uint32))


def _first_part(key: str) -> str:
    """What WebDataset takes as the key: all before the first dot of the file's name."""
    folder, slash, name = key.rpartition("/")
    return folder + slash + name.partition(".")[0]


def _says_class(name: str) -> bool:
    return name.lower().endswith((".cls", ".json"))


def _label(name: str, content: bytes) -> int | str | None:
    """The class that a member says; None if it is about something else.

    Raises:
        BadUpload: it should say one, and does not.
    """
    if name.lower().endswith(".json"):
        try:
            said: Any = json.loads(content)
        except ValueError as error:
            raise BadUpload(f"member {name!r} is not JSON: {error}") from error
        if isinstance(said, dict):
            said = next((said[key] for key in _LABELS if key in said), None)
        if not isinstance(said, int | str) or isinstance(said, bool):
            return None
        found: int | str = said
    else:
        text = content.decode("utf-8", "replace").strip()
        found = int(text) if _INTEGER.fullmatch(text) else text
    if not found and found != 0:
        raise BadUpload(f"member {name!r} is empty where a class was expected")
    if isinstance(found, int) and not 0 <= found <= MAX_CLASS_ID:
        raise BadUpload(f"member {name!r} says the class {found}; ids are 0 to {MAX_CLASS_ID}")
    return found
