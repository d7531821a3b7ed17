"""Processes that draw: what spawned ones import, so as little as possible."""

from __future__ import annotations

import hashlib
import multiprocessing
import traceback
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from engram.batch import Batch
from engram.loader import ReplayLoader
from engram.sources import Source

T = TypeVar("T")

HANGS_S = 120.0
"""A child that has said nothing for so long waits for something that its parent holds."""


def digest(batch: Batch) -> str:
    """Of every byte of a batch."""
    arrays = (batch.images, batch.class_ids, batch.tasks, batch.rows)
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()


def draw_each(source: Source, steps: Iterable[int], together: Any, to: Connection) -> None:
    """Sends the digests of these steps, drawn one by one; begins when all who wait at `together` do."""
    try:
        together.wait()
        if isinstance(source, tuple):
            client, buffer = source
            found = {step: digest(client.draw(buffer, 64, seed=3, step=step)) for step in steps}
        else:
            found = {step: digest(next(ReplayLoader(source, 64, seed=3, start_step=step))) for step in steps}
        to.send(found)
    except BaseException:
        to.send(traceback.format_exc())
        raise


def in_child(work: Callable[[], T]) -> T:
    """What this gives in a forked process."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)

    def run() -> None:
        try:
            there.send((work(), None))
        except BaseException:
            there.send((None, traceback.format_exc()))

    child = context.Process(target=run)
    child.start()
    if not here.poll(HANGS_S):
        child.kill()
        raise AssertionError("the child hangs")
    found, wrong = here.recv()
    child.join()
    assert wrong is None, wrong
    return found  # type: ignore[no-any-return]
