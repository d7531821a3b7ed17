"""Measure how fast the service takes uploads, and how its memory grows with their size.

For each size a fresh service process, with its worker, is started as a user starts it, and the client uploads 32x32
patches of scikit-learn's two photographs as arrays: ten classes, the built-in embedding, herding, quality selected
among the default candidates. Time runs from the first byte of the upload to the answer that it is committed.

Memory is the resident set of the service and all its child processes, summed, sampled every 20 ms from before the
upload until after the commit; what grows is the difference of the two peaks.
"""

from __future__ import annotations

import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import psutil
from report import finish, parse_args, print_table
from sklearn.datasets import load_sample_images

from engram.client import Client
from engram_trainer.local_service import local_service

UInt8Array = npt.NDArray[np.uint8]

SIDE = 32
CLASSES = 10
# Of each class: room for some 1,200 exemplars at quality 75, so that a large upload is ranked and mostly dropped.
BUDGET_BYTES = 200_000
SAMPLE_S = 0.02


@dataclass(frozen=True)
class Line:
    """One upload. `quality` and `exemplars` are what selection made of it."""

    images: int
    upload_s: float
    total_s: float
    before_mb: float
    peak_mb: float
    exemplars: int
    quality: int
    selection_s: float


def main() -> None:
    args = parse_args("how many images a second does the service take in, and how does its memory grow?")
    sizes = (1000, 20_000) if args.quick else (1000, 10_000, 100_000)
    patches = cut_patches(max(sizes))
    lines = [measure(patches[:size]) for size in sizes]
    print_table(
        f"Upload to commit, {SIDE}x{SIDE}, built-in embedding, quality selected",
        ("images", "upload s", "total s", "of it selection", "images/s", "idle MB", "peak MB", "kept", "quality"),
        [
            (
                line.images,
                line.upload_s,
                line.total_s,
                line.selection_s,
                line.images / line.total_s,
                line.before_mb,
                line.peak_mb,
                line.exemplars,
                line.quality,
            )
            for line in lines
        ],
    )
    first, last = lines[0], lines[-1]
    finish(
        args,
        {
            "images_per_s": last.images / last.total_s,
            "images_per_s_1000": first.images / first.total_s,
            "rss_growth_mb": last.peak_mb - first.peak_mb,
            "peak_rss_mb": last.peak_mb,
            "images": last.images,
        },
    )


def measure(images: UInt8Array) -> Line:
    class_ids = np.arange(len(images)) * CLASSES // len(images)
    with (
        tempfile.TemporaryDirectory(prefix="engram-bench-") as folder,
        local_service(folder, log_level="warning", workers=1) as service,
    ):
        process = psutil.Process(service.process.pid)
        with Client(service.url) as client, Memory(process) as memory:
            client.create_buffer("bench", budget_bytes=BUDGET_BYTES, per="class")
            wait_for_worker(process)
            before_mb = memory.now_mb()
            start = time.perf_counter()
            accepted = client.upload("bench", 0, images, class_ids)
            upload_s = time.perf_counter() - start
            client.wait(accepted)
            total_s = time.perf_counter() - start
            task = client.task("bench", 0)
        if task.decision is None:
            raise RuntimeError("a committed task has a decision")
        return Line(
            images=len(images),
            upload_s=upload_s,
            total_s=total_s,
            before_mb=before_mb,
            peak_mb=memory.peak_mb,
            exemplars=task.exemplars,
            quality=task.quality,
            selection_s=task.decision.seconds,
        )


def wait_for_worker(process: psutil.Process) -> None:
    """The worker has started and settled: its memory has stopped growing."""
    settled = 0
    while not process.children():
        time.sleep(SAMPLE_S)
    while settled < 10:
        before = Memory.of(process)
        time.sleep(5 * SAMPLE_S)
        settled = settled + 1 if Memory.of(process) <= before * 1.01 else 0


class Memory:
    """Samples the resident memory of a process and its children from a thread."""

    def __init__(self, process: psutil.Process) -> None:
        self.peak_mb = 0.0
        self._process = process
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def now_mb(self) -> float:
        """Resident memory at this moment."""
        return self.of(self._process)

    @staticmethod
    def of(process: psutil.Process) -> float:
        """Resident memory of a process and its children, in MB."""
        total = 0
        with suppress(psutil.NoSuchProcess):
            for one in [process, *process.children(recursive=True)]:
                with suppress(psutil.NoSuchProcess):
                    total += one.memory_info().rss
        return total / 1e6

    def _sample(self) -> None:
        while not self._ended.wait(SAMPLE_S):
            self.peak_mb = max(self.peak_mb, self.now_mb())


def cut_patches(count: int) -> UInt8Array:
    """Patches of the two photographs at random places."""
    photographs = np.stack(load_sample_images().images)
    generator = np.random.default_rng(0)
    _, height, width, _ = photographs.shape
    which = generator.integers(0, len(photographs), count)
    rows, columns = generator.integers(0, height - SIDE, count), generator.integers(0, width - SIDE, count)
    down, across = rows[:, None, None] + np.arange(SIDE)[:, None], columns[:, None, None] + np.arange(SIDE)
    patches: UInt8Array = photographs[which[:, None, None], down, across]
    return patches


if __name__ == "__main__":
    main()
