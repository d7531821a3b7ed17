"""CIFAR-10 in its official binary format (cifar-10-binary.tar.gz, unpacked): records of a label and three planes."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from engram_trainer.datasets import ClassIds, Dataset, Images

NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def load(folder: Path) -> Dataset:
    """50,000 training and 10,000 test images, uint8 [N, 32, 32, 3].

    Raises:
        OSError: a file is missing.
    """
    train = [_read(folder / f"data_batch_{number}.bin") for number in range(1, 6)]
    images, class_ids = (np.concatenate(parts) for parts in zip(*train, strict=True))
    return Dataset("cifar-10", images, class_ids, *_read(folder / "test_batch.bin"), NAMES)


def _read(path: Path) -> tuple[Images, ClassIds]:
    records = np.fromfile(path, np.uint8).reshape(-1, 1 + 3 * 32 * 32)
    images = records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), records[:, 0].astype(np.int64)
