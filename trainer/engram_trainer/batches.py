"""Reads the images of batches ahead, in processes of their own where reading means decoding.

Each batch is read by one worker and comes through shared memory (`/dev/shm`: two batches for each worker). The order of
batches, and of rows within them, is the one asked for, whatever the number of workers; the caller's random state is
left alone.

Workers are forked from a server process that has done nothing but import packages. A fork of the trainer itself would
copy the locks of threads that it has not (those of a replay loader, of CUDA, of a pool); starting each worker from
nothing would import them again in each, for every phase.
"""

from __future__ import annotations

import multiprocessing
import pickle
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.context import BaseContext
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from engram.errors import EngramError, Unavailable
from engram_trainer.examples import Images, ImageSet, Rows

_AHEAD = 2
"""Batches that each worker has ready or in the making."""

_PACKAGES = ["torch.utils.data", "httpx", "pydantic", "PIL.Image", "engram_trainer.batches", "engram_trainer.datasets"]
"""What takes the time to import. Our own are only found where they are installed: in Python 3.11 the server has not the
trainer's `sys.path`."""


def batches(images: ImageSet, order: Iterable[Rows], *, workers: int = 0) -> Iterator[tuple[Rows, Images]]:
    """The rows of each batch and their images, uint8 `[n, H, W, C]`, in the order given.

    Args:
        images: what rows are rows of.
        order: the rows of each batch, asked for as they are needed, a few batches ahead. Workers live until its end:
            give the batches of all epochs.
        workers: processes that read. With 0, and wherever images are at hand, the caller's own reads each batch when
            it is taken.

    Raises:
        BadUpload: an image cannot be read; raised with the batch that it is of, after all before it.
        Unavailable: a worker was ended from outside.
    """
    if images.is_at_hand or not workers:
        for rows in order:
            rows = np.asarray(rows, np.int64)
            yield rows, images.read(rows)
        return
    loader = DataLoader(
        _Reader(images),
        sampler=order,
        batch_size=None,
        collate_fn=_as_read,
        num_workers=workers,
        prefetch_factor=_AHEAD,
        multiprocessing_context=_context(),
        generator=torch.Generator(),  # else it takes a number from the one that all of torch shares
    )
    try:
        for rows, batch in _Started(loader):
            if isinstance(batch, EngramError):
                raise batch
            yield rows, batch.numpy()
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise Unavailable(
            "a process that reads images was ended from outside; if memory ran short, give fewer workers"
        ) from error


@dataclass(frozen=True, eq=False)
class _Reader(TorchDataset[tuple[Rows, torch.Tensor | EngramError]]):
    """A data set whose items are batches, each asked for by its rows.

    Errors are returned: one that is raised comes back with a traceback in its message.
    """

    images: ImageSet

    def __getitem__(self, rows: Rows) -> tuple[Rows, torch.Tensor | EngramError]:
        rows = np.asarray(rows, np.int64)
        try:
            return rows, torch.from_numpy(self.images.read(rows))
        except EngramError as error:
            return rows, error


def _as_read(batch: Any) -> Any:
    return batch


@dataclass(frozen=True)
class _Started:
    """A data loader whose iterator belongs to the loop alone: its workers end with it."""

    loader: DataLoader[Any]

    def __iter__(self) -> Iterator[Any]:
        assert isinstance(self.loader.dataset, _Reader)
        with _without_main(self.loader.dataset.images):
            return iter(self.loader)


@contextmanager
def _without_main(images: ImageSet) -> Iterator[None]:
    """Workers that start meanwhile do not run the main module once more, unless it has the class of these images.

    Each would, before anything else: with the imports of a usual script that takes seconds, at every phase.
    """
    if b"__main__" in pickle.dumps(images):
        yield
        return
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _context() -> BaseContext:
    if "forkserver" not in multiprocessing.get_all_start_methods():  # Windows
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PACKAGES)
    return context
