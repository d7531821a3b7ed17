"""A data set: train and test images of one problem, wherever they lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from engram.errors import NotFound
from engram_trainer.examples import ClassIds, Examples, Rows, Shape

TEST_SPLITS = ("test", "validation", "valid", "val")
"""What the test images are called, the first that is there."""

_NAMED_CLASSES = 5
"""So many classes are named in an error; the others are counted."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """Train and test images of one problem.

    Raises:
        ValueError: a split's images are no RGB or grey images, or those of the splits differ in shape.
    """

    name: str
    train: Examples
    test: Examples
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.train.shape != self.test.shape:
            raise ValueError(f"{self.name}: train images are {self.train.shape}, test images are {self.test.shape}")
        if self.shape[2] not in (1, 3):
            raise ValueError(f"{self.name}: images have 1 or 3 channels, not {self.shape[2]}")

    @property
    def shape(self) -> Shape:
        """Height, width and channels of every image."""
        return self.train.shape

    @property
    def classes(self) -> tuple[int, ...]:
        """The class ids of the training images, ascending."""
        return self.train.classes

    def first(self, *, train: int | None = None, test: int | None = None) -> Dataset:
        """The first `train` and `test` images of each class, in the order of the source; None keeps all."""
        return replace(
            self,
            train=self.train.select(first_rows(self.train.class_ids, train)),
            test=self.test.select(first_rows(self.test.class_ids, test)),
        )

    def check_classes(self) -> None:
        """Returns if every class has both training and test images.

        Raises:
            NotFound: one has not.
        """
        train, test = {*self.train.classes}, {*self.test.classes}
        if not train | test:
            raise NotFound(f"{self.name} holds no images")
        for missing, split in ((train - test, "test"), (test - train, "training")):
            if missing:
                raise NotFound(f"{self.name} has no {split} images of {self._named(sorted(missing))}")

    def _named(self, class_ids: Sequence[int]) -> str:
        names = dict(enumerate(self.class_names))
        shown = ", ".join(repr(names[c]) if c in names else str(c) for c in class_ids[:_NAMED_CLASSES])
        more = len(class_ids) - _NAMED_CLASSES
        return ("the class " if len(class_ids) == 1 else "the classes ") + shown + (f" and {more} more" * (more > 0))


def first_rows(class_ids: ClassIds, count: int | None) -> Rows:
    """Rows of the first `count` images of each class, ascending; all rows when `count` is None."""
    if count is None:
        return np.arange(len(class_ids))
    rows = [np.flatnonzero(class_ids == class_id)[:count] for class_id in np.unique(class_ids)]
    return np.sort(np.concatenate(rows)) if rows else np.arange(0)
