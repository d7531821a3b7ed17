"""Hugging Face data sets: by name, or a folder of one, saved (`save_to_disk`) or of parquet files.

Rows stay in the memory mapped files of the `datasets` package and are decoded when they are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engram.errors import BadUpload, NotFound
from engram_trainer.examples import ClassIds, Examples, Rows
from engram_trainer.sources.dataset import TEST_SPLITS, Dataset
from engram_trainer.sources.pictures import picture_sets


def is_hub_folder(folder: Path) -> bool:
    """Whether this looks like a data set of that package.

    Folders of class folders have to be told apart before: looking for parquet files everywhere takes long there.
    """
    return (folder / "dataset_dict.json").is_file() or any(folder.rglob("*.parquet"))


def read_hub(name: str, *, resize: int | None = None, image: str | None = None, label: str | None = None) -> Dataset:
    """The train and test images of a Hugging Face data set.

    Args:
        name: name on the Hub, or a folder written by `save_to_disk`, or a folder of parquet files.
        resize: see `pictures`.
        image: name of the image column; None takes the first column of images.
        label: name of the label column; None prefers `fine_label` and `label`, then the first column of class labels.

    Raises:
        NotFound: package, data set, split or column missing.
        BadUpload: labels are no integers; or as `pictures.picture_sets`.
    """
    try:
        import datasets
    except ImportError as error:
        raise NotFound(
            f"'{name}' is no local source, and reading it from the Hugging Face Hub needs: pip install 'engram[hub]'"
        ) from error
    try:
        saved = (Path(name) / "dataset_dict.json").is_file()
        splits = datasets.load_from_disk(name) if saved else datasets.load_dataset(name)
    except Exception as error:  # the library raises a dozen unrelated classes for "not there"
        raise NotFound(f"the data set '{name}' could not be loaded: {error}") from error
    if "train" not in splits or not {*TEST_SPLITS} & {*splits}:
        raise NotFound(
            f"'{name}' has the splits {sorted(splits)}; needed are train and one of {', '.join(TEST_SPLITS)}"
        )
    features = splits["train"].features
    image = image or _column(features, datasets.Image, ("image", "img"), name)
    label = label or _column(features, datasets.ClassLabel, ("fine_label", "label", "labels"), name)
    missing = {image, label} - set(features)
    if missing:
        raise NotFound(f"'{name}' has no column {sorted(missing)}; its columns are {sorted(features)}")
    labels = {
        split: _labels(splits[split], label, f"{name}/{split}") for split in ("train", *TEST_SPLITS) if split in splits
    }
    # Competitions give test images without labels: every one is -1.
    test_split = next((split for split in TEST_SPLITS if split in labels and labels[split].max(initial=-1) >= 0), None)
    if test_split is None:
        raise NotFound(f"the test images of '{name}' have no labels")
    chosen = ("train", test_split)
    images = picture_sets(
        [HubFiles(splits[split].select_columns([image]).with_format("arrow"), f"{name}/{split}") for split in chosen],
        resize=resize,
        source=name,
    )
    train, test = (Examples(each, labels[split]) for each, split in zip(images, chosen, strict=True))
    return Dataset(Path(name).name, train, test, tuple(getattr(features[label], "names", None) or ()))


@dataclass(frozen=True, eq=False)
class HubFiles:
    """The encoded images of one split."""

    rows: Any
    """Of type `datasets.Dataset`: one column of images, in Arrow's format, which decodes nothing."""
    name: str

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, rows: Rows) -> Iterator[tuple[str, bytes]]:
        """The place and the content of each of these images.

        Raises:
            BadUpload: a row is empty, or names a file that cannot be read.
        """
        column = self.rows[rows.tolist()].column(0)
        for row, cell in zip(rows.tolist(), column, strict=True):
            name = f"image {row} of {self.name}"
            found = cell.as_py() or {}
            content, path = found.get("bytes"), found.get("path")
            if content is None:
                if path is None:
                    raise BadUpload(f"{name} is missing")
                try:
                    content = Path(path).read_bytes()
                except OSError as error:
                    raise BadUpload(f"{name} cannot be read: {path}: {error.strerror}") from error
            yield name, content


def _labels(rows: Any, label: str, name: str) -> ClassIds:
    column = np.asarray(rows.select_columns([label]).with_format("arrow")[:].column(0))
    if column.dtype.kind not in "iu":
        raise BadUpload(f"the column {label!r} of {name} holds {column.dtype}, where a class id for each row is needed")
    return column.astype(np.int64)


def _column(features: Any, kind: type, preferred: Sequence[str], name: str) -> str:
    found = [column for column, feature in features.items() if isinstance(feature, kind)]
    # A column of plain integers called `label` serves as well as a declared ClassLabel.
    found += [column for column in preferred if column in features and column not in found and kind.__name__ != "Image"]
    if not found:
        raise NotFound(f"'{name}' has no {kind.__name__} column; its columns are {sorted(features)}")
    return next((column for column in preferred if column in found), found[0])
