"""What all trainer tests share: one thread, so that sums are made in one order; the digits, which are read once."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import pytest
import torch

from engram_trainer.sources.samples import read_digits

torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def digits_are_read_once() -> Iterator[None]:
    """Reading them takes longer than most of the runs on them, and nothing changes them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engram_trainer.datasets.read_digits", cache(read_digits))
        yield
