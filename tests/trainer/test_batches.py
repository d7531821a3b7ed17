"""Batches come in the order asked for, with the same pixels, whoever reads them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from engram.errors import BadUpload, Unavailable
from engram_trainer.batches import batches
from engram_trainer.examples import ArraySet, Images, Rows

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")


@dataclass(frozen=True)
class Numbered:
    """Images of 2x3 whose every pixel is the number of the row. Row 90 is broken; some rows are slow, some deadly."""

    count: int = 100
    is_at_hand = False
    shape = (2, 3, 1)

    def __len__(self) -> int:
        return self.count

    def read(self, rows: Rows) -> Images:
        if 90 in rows:
            raise BadUpload("image 90 cannot be read", row=90)
        if 91 in rows:
            os.kill(os.getpid(), signal.SIGKILL)
        if rows[0] % 3 == 0:  # so that later batches are ready before earlier ones
            time.sleep(0.05)
        return np.broadcast_to(rows.astype(np.uint8)[:, None, None, None], (len(rows), *self.shape)).copy()


ORDER = [np.random.default_rng(5).permutation(90)[: 1 + place % 7] for place in range(12)]


def children() -> int:
    return sum(child.is_alive() for child in multiprocessing.active_children())


@pytest.mark.parametrize("workers", [0, 3])
def test_batches_come_in_order_whatever_the_number_of_workers(workers: int) -> None:
    found = list(batches(Numbered(), ORDER, workers=workers))
    assert [rows.tolist() for rows, _ in found] == [rows.tolist() for rows in ORDER]
    for rows, images in found:
        assert images.dtype == np.uint8
        assert images.shape == (len(rows), 2, 3, 1)
        assert (images == rows[:, None, None, None]).all()
    assert not children()


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_cannot_be_read_is_the_sentence_of_its_own_batch(workers: int) -> None:
    reading = batches(Numbered(), [np.array([1, 2]), np.array([3, 90]), np.array([4])], workers=workers)
    assert next(reading)[0].tolist() == [1, 2]
    with pytest.raises(BadUpload) as raised:
        next(reading)
    assert (str(raised.value), raised.value.details) == ("image 90 cannot be read", {"row": 90})
    assert not children()


@pytest.mark.slow  # torch looks every 5 s
def test_a_worker_that_is_killed_is_one_sentence() -> None:
    with pytest.raises(Unavailable, match="ended from outside; if memory ran short, give fewer workers"):
        list(batches(Numbered(), [np.array([91])], workers=1))


def test_reading_ahead_leaves_the_random_state_of_the_caller_alone() -> None:
    before = torch.random.get_rng_state()
    list(batches(Numbered(), ORDER[:2], workers=1))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_leaving_early_ends_the_workers_and_an_endless_order_is_read_as_far_as_needed() -> None:
    asked = 0

    def endless() -> Iterator[Rows]:
        nonlocal asked
        while True:
            asked += 1
            yield np.array([asked % 90])

    reading = batches(Numbered(), endless(), workers=2)
    assert next(reading)[0].tolist() == [1]
    assert asked <= 6
    assert children() == 2
    reading.close()  # type: ignore[attr-defined]
    assert not children()


def test_images_at_hand_are_read_without_workers() -> None:
    images = np.arange(10, dtype=np.uint8).reshape(10, 1, 1, 1)
    reading = batches(ArraySet(images), [np.array([3, 1])], workers=2)
    rows, found = next(reading)
    assert not children()
    assert (rows.tolist(), found.ravel().tolist()) == ([3, 1], [3, 1])
