"""Measure what the trainer's step loop costs beside a plain PyTorch loop, how long steps wait for exemplars, and how
much memory a run over images takes that do not fit in it.

**Throughput.** One epoch over a folder of JPEG images of 224x224 pixels, of which a small network sees random windows
of 32x32: nearly all of the time is reading. The plain loop is what one writes with `torch.utils.data`: a data set that
opens a file with Pillow, a `DataLoader` with as many workers, the same windows, the same network and optimiser. Both in
turns (plain, ours, ours, plain); the ratio is of the sums.

**Replay.** ER with 32 new images and 32 exemplars a step, all of 224x224 pixels, of which the network sees 112x112,
from strips in this process: the part of all steps' time in which they waited for exemplars.

**Memory.** A whole run (two tasks, ER, herding by its own features) over 50,000 images of 224x224 in a process of its
own: the largest sum of what it and its workers hold (PSS), looked at every 0.2 s. As float32 they would be 30 GB.

The images are 200 drawn pictures, each linked many times, which are files and decoded like any other.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import fmean

import numpy as np
import psutil
import report
import simplejpeg
import torch
from PIL import Image
from torch.nn import functional
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from engram_trainer import datasets, loop, networks, stream
from engram_trainer.configuration import MemoryConfig, PrepareConfig, RunConfig, RuntimeConfig
from engram_trainer.local_memory import LocalConfig
from engram_trainer.memory import Learned, NoMemory
from engram_trainer.methods import er, finetune
from engram_trainer.plain_memory import local_memory
from engram_trainer.preparation import Preparation
from engram_trainer.runtime import Runtime
from engram_trainer.stream import Stream, StreamConfig

SIDE, CROP, REPLAY_CROP, BATCH, CLASSES, DRAWN = 224, 32, 112, 64, 10, 200


def main() -> None:
    def more(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--images", type=int, default=50_000, help="of the run whose memory is measured")
        parser.add_argument("--workers", type=int, default=2, help="processes that read")

    args = report.parse_args("what does the step loop cost, and how much memory?", more)
    torch.set_num_threads(1)
    whole, timed = (2_000, 1_000) if args.quick else (args.images, 6_000)
    with tempfile.TemporaryDirectory() as scratch:
        draw(Path(scratch) / "timed", timed)
        ratio = throughput(Path(scratch) / "timed", args.workers)
        share = waiting(Path(scratch) / "timed", args.workers)
        draw(Path(scratch) / "whole", whole)
        peak, seconds = peak_memory(Path(scratch), args.workers)
    report.print_table(
        "The step loop",
        ("throughput, ours / plain", "waiting for exemplars", "images of the run", "peak memory", "its seconds"),
        [(ratio, f"{share:.2%}", whole, f"{peak:,.0f} MB", seconds)],
    )
    key = "peak_rss_mb_50k_224" if whole == 50_000 else f"peak_rss_mb_{whole}_224"
    report.finish(args, {"replay_wait_share": share, "throughput_vs_plain_loop": ratio, key: peak})


def draw(folder: Path, count: int) -> None:
    """`count` training images of all classes, and a few test images."""
    generator = np.random.default_rng(0)
    store = folder / "store"
    store.mkdir(parents=True)
    for number in range(DRAWN):
        coarse = generator.integers(0, 256, (14, 14, 3), np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
        noisy = np.clip(smooth + generator.normal(0, 12, smooth.shape), 0, 255).astype(np.uint8)
        (store / f"{number}.jpg").write_bytes(simplejpeg.encode_jpeg(noisy, quality=85))
    for split, images in (("train", count), ("test", 10 * CLASSES)):
        for class_id in range(CLASSES):
            (folder / split / str(class_id)).mkdir(parents=True)
        for number in range(images):
            path = folder / split / str(number % CLASSES) / f"{number:06}.jpg"
            os.link(store / f"{(7 * number) % DRAWN}.jpg", path)


class Plain(TorchDataset[tuple[torch.Tensor, int]]):
    """The folder as anyone reads it."""

    def __init__(self, folder: Path) -> None:
        self.files = sorted((folder / "train").glob("*/*.jpg"))

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, int]:
        path = self.files[row]
        with Image.open(path) as image:
            return torch.from_numpy(np.array(image.convert("RGB"))), int(path.parent.name)


def plain_epoch(folder: Path, workers: int) -> float:
    """Seconds of an epoch of a plain loop."""
    model = torch.nn.Sequential(
        networks.build("conv", (CROP, CROP, 3), seed=0), networks.linear_head(128, CLASSES, seed=0)
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    loader = DataLoader(Plain(folder), batch_size=BATCH, shuffle=True, num_workers=workers, drop_last=True)
    model.train()
    begin = time.perf_counter()
    for images_NHWC, labels in loader:
        images = images_NHWC.permute(0, 3, 1, 2).float().div_(255)
        top_left = torch.randint(0, SIDE - CROP + 1, (len(images), 2)).tolist()
        windows = [
            image[:, t : t + CROP, left : left + CROP] for image, (t, left) in zip(images, top_left, strict=True)
        ]
        loss = functional.cross_entropy(model(torch.stack(windows)), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return time.perf_counter() - begin


def tasks_of(folder: Path, tasks: int = 1) -> Stream:
    """The folder as a stream."""
    return stream.build(datasets.load(str(folder)), StreamConfig(tasks=tasks))


def runtime_of(tasks: Stream, workers: int, crop: int = CROP) -> Runtime:
    """What our loop runs on."""
    return Runtime(RuntimeConfig(workers=workers), tasks, seed=0, preparation=Preparation(tasks.shape, crop=crop))


def our_epoch(folder: Path, workers: int) -> float:
    """Seconds of an epoch of the step loop."""
    tasks = tasks_of(folder)
    config = finetune.Config(epochs=1, batch_size=BATCH, lr=0.01)
    learner = finetune.Finetune(runtime_of(tasks, workers), config, network="conv")
    begin = time.perf_counter()
    learner.learn(tasks.tasks[0], NoMemory(), ignore)
    return time.perf_counter() - begin


def throughput(folder: Path, workers: int) -> float:
    """Images per second of our loop over those of the plain one."""
    seconds: dict[Callable[[Path, int], float], list[float]] = {plain_epoch: [], our_epoch: []}
    for epoch in (plain_epoch, our_epoch, our_epoch, plain_epoch):
        seconds[epoch].append(epoch(folder, workers))
    return fmean(seconds[plain_epoch]) / fmean(seconds[our_epoch])


def waiting(folder: Path, workers: int) -> float:
    """The part of the steps in which they wait for exemplars."""
    tasks = tasks_of(folder, 2)
    config = er.Config(epochs=1, batch_size=32, lr=0.01)
    learner = er.Er(runtime_of(tasks, workers, REPLAY_CROP), config, network="conv")
    memory = local_memory(LocalConfig(kind="strips", budget_bytes=2_000_000, ranking="random", quality=50))
    first, second = tasks.tasks
    memory.add(Learned(0, first.train.select(np.arange(min(500, len(first.train))))))
    learner.learn(second, memory, ignore)
    return learner.runtime.replay_wait_s / learner.runtime.step_s


def peak_memory(scratch: Path, workers: int) -> tuple[float, float]:
    """MB of a whole run's processes at their most, and its seconds."""
    process = multiprocessing.get_context("spawn").Process(target=whole_run, args=(scratch, workers))
    begin = time.perf_counter()
    process.start()
    assert process.pid is not None, "it was started"
    peak, watched = 0, psutil.Process(process.pid)
    while process.is_alive():
        peak = max(peak, proportional(watched))
        process.join(0.2)
    if process.exitcode:
        raise SystemExit(f"the run ended with {process.exitcode}")
    return peak / 1e6, time.perf_counter() - begin


def proportional(process: psutil.Process) -> int:
    """PSS of a process and all below it."""
    total = 0
    for each in (process, *process.children(recursive=True)):
        try:
            total += each.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return total


def whole_run(scratch: Path, workers: int) -> None:
    """Two tasks with replay, as `engram-train` runs them."""
    torch.set_num_threads(1)
    config = RunConfig(
        data=str(scratch / "whole"),
        prepare=PrepareConfig(crop=CROP),
        stream=StreamConfig(tasks=2),
        method="er",
        options={"epochs": 1, "batch_size": 64, "lr": 0.01},
        memory=MemoryConfig(kind="strips", budget_bytes=20_000_000, quality=50),
        runtime=RuntimeConfig(workers=workers),
    )
    loop.run(config, scratch / "run", pictures=False)


def ignore(done: int, total: int, *, loss: torch.Tensor) -> None:
    """Show no progress."""


if __name__ == "__main__":
    main()
