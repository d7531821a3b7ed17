"""The grid search that selection stands in for: complete trainings of one method at every candidate quality.

A *cell* is a data set, a method, a number of tasks and a budget. One job trains a cell with one seed: the first task is
learned once, for no memory has been asked yet, and then the run goes on once for each quality, everything else alike.
Kept of a job: the accuracy matrix, exemplars, bytes and CPU seconds at each quality, the accuracy on test images coded
at that quality (`shift`), and the log volumes of every task, measured in the run at 50 (`gaps`).

Networks are small (`conv`), and so are the tasks: 250 training images and 300 test images of a class. All methods show
half of a task's images as JPEG gives them back. The learning rate of each method on each data set is the best of
`RATES` at quality 50 on held-out training images of tuning seeds, in runs that are kept as well. `squares32`,
`squares64` and `squares96` are squares of 20 wallpapers, most of them photographs, at these sizes: the class of a
square is its picture, and training and test squares lie in different fields of a checkerboard.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from statistics import fmean
from typing import Any

import gaps
import numpy as np
import shift
import torch
from kept import Job, Result, collect, load
from kept import add_arguments as add_kept_arguments
from PIL import Image

from engram.content import Policy
from engram.schemas import CANDIDATE_QUALITIES, IngestOptions
from engram_trainer import datasets, evaluation, methods, stream
from engram_trainer.configuration import RuntimeConfig
from engram_trainer.datasets import Dataset
from engram_trainer.examples import Examples
from engram_trainer.local_memory import StripMemory
from engram_trainer.memory import Learned
from engram_trainer.methods import Learner
from engram_trainer.runtime import Runtime

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
TABLE, TUNING = "grid", "grid-tuning"
SEEDS, TUNING_SEEDS = (10, 11, 12), (1000,)
SQUARES_SEEDS = SEEDS[:2]
RATES: dict[str, tuple[float, ...]] = {
    "lucir": (0.01, 0.03, 0.1, 0.3),
    "er": (0.03, 0.1, 0.3, 1.0),
    "icarl": (0.2, 0.5, 1.0, 2.0),
}
CODEC_RATIO = 0.5
"""Part of a task's images that is shown coded."""
MEASURED_AT = 50
"""The quality of the run whose features are kept as volumes."""
NETWORK = "conv"
SQUARES = {f"squares{side}": side for side in (32, 64, 96)}
PHOTOGRAPHS = 20
# Of a photograph, in pixels, and the fields that it is cut into: those of ImageNet's usual size.
_PHOTOGRAPH, _FIELDS = (2500, 1500), (5, 4)
_SMALLEST_SQUARE = 128
# Thumbnails of 10 x 10 that differ by less than this on average are of one picture.
_SAME_LEVELS = 6.0


@dataclass(frozen=True)
class Cell:
    """What a quality is looked for."""

    data: str
    method: str
    tasks: int
    budget_bytes: int
    """Of each class."""
    codec_ratio: float = CODEC_RATIO

    @property
    def name(self) -> str:
        """For people, and for the split."""
        off = "" if self.codec_ratio else " no augmentation"
        return f"{self.data} {self.method} {self.tasks} {self.budget_bytes}{off}"


@dataclass(frozen=True)
class Size:
    """How much each training learns from; the smallest memory is full with a fraction of it."""

    train_per_class: int = 250
    test_per_class: int = 300
    epochs: int = 8
    batch_size: int = 64
    """Of LUCIR and iCaRL, exemplars included; ER takes half of it from each side."""


@dataclass(frozen=True)
class Training:
    """What a job's result depends on."""

    cell: Cell
    lr: float
    qualities: tuple[int, ...] = CANDIDATE_QUALITIES
    size: Size = Size()
    validation_ratio: float = 0.0


@dataclass(frozen=True)
class Sources:
    """Where data sets are on this machine, and what it computes on; results tell the device and are not told by it."""

    cifar10: Path | None = None
    photos: Path | None = None
    device: str = "cpu"

    def has(self, data: str) -> bool:
        """Whether runs on it can be made here."""
        if data in SQUARES:
            return self.photos is not None
        return {"cifar10": self.cifar10 is not None, "fashion": FASHION_MNIST.is_dir()}.get(data, True)

    def read(self, data: str) -> Dataset:
        """The data set of this name."""
        if data in SQUARES:
            assert self.photos is not None, "asked where there are photographs"
            return squares(self.photos, SQUARES[data])
        return datasets.load({"fashion": str(FASHION_MNIST), "cifar10": str(self.cifar10)}.get(data, data))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The switches of a script that has grid searches made."""
    add_kept_arguments(parser)
    parser.add_argument("--cifar10", type=Path, help="folder with CIFAR-10's binary files")
    parser.add_argument("--photos", type=Path, help="folder of photographs, e.g. packages of wallpapers, unpacked")
    parser.add_argument("--device", default="cpu", help="to train on (default cpu)")


def jobs(cells: Sequence[Cell], rates: Mapping[tuple[str, str], float], seeds: Sequence[int] = SEEDS) -> list[Job]:
    """The trainings of cells with a tuned learning rate, seed by seed."""
    return [
        Job(TABLE, cell.name, seed, Training(cell, rates[cell.data, cell.method], size=size_of(cell.data)))
        for seed in seeds
        for cell in cells
        if (cell.data, cell.method) in rates and (cell.data not in SQUARES or seed in SQUARES_SEEDS)
    ]


def size_of(data: str) -> Size:
    """Of squares there are few, and they are expensive."""
    return Size(train_per_class=64, test_per_class=40, epochs=8, batch_size=32) if data in SQUARES else Size()


def tuning_jobs(cells: Sequence[Cell]) -> list[Job]:
    """Every learning rate of each data set and method, at the first of its cells."""
    first: dict[tuple[str, str], Cell] = {}
    for cell in cells:
        # What squares of 64 px like is taken for all of them: they are the same pictures.
        if cell.data not in ("squares32", "squares96"):
            first.setdefault((cell.data, cell.method), replace(cell, codec_ratio=CODEC_RATIO))
    return [
        Job(TUNING, f"{cell.data} {cell.method} {lr}", seed, Training(cell, lr, (50,), size_of(cell.data), 0.2))
        for seed in TUNING_SEEDS
        for cell in first.values()
        for lr in RATES[cell.method]
    ]


def tuned(results: Mapping[Job, Result]) -> dict[tuple[str, str], float]:
    """The learning rate with the highest accuracy of each data set and method of which all rates were tried.

    A run that diverged counts as 0.
    """
    found: dict[tuple[str, str], dict[float, list[float]]] = {}
    for job, result in results.items():
        cell = job.config.cell
        last = last_accuracy(result, 50)
        found.setdefault((cell.data, cell.method), {}).setdefault(job.config.lr, []).append(last or 0.0)
    best = {
        key: max(sorted(of_rate), key=lambda rate: fmean(of_rate[rate]))
        for key, of_rate in found.items()
        if len(of_rate) == len(RATES[key[1]])
    }
    same = {(data, method): rate for (like, method), rate in best.items() if like == "squares64" for data in SQUARES}
    return best | same


def last_accuracy(result: Result, quality: int) -> float | None:
    """Percent of all test images that are right after the last task; None where training diverged."""
    run = result["runs"][str(quality)]
    return None if run is None else 100 * fmean(run["matrix"][-1])


def tell(job: Job, result: Result) -> str:
    """Last accuracies, for the log."""
    return ", ".join(
        f"{quality}: " + ("diverged" if (last := last_accuracy(result, int(quality))) is None else f"{last:.1f}")
        for quality in result["runs"]
    )


def gather(cells: Sequence[Cell], args: argparse.Namespace, seeds: Sequence[int] = SEEDS) -> dict[Job, Result]:
    """All that is kept of these cells, and what can be made of the rest here: first the tuning, then the cells."""
    deadline = time.monotonic() + 60 * args.minutes
    sources = Sources(args.cifar10, args.photos, args.device)

    def made(wanted: Sequence[Job]) -> dict[Job, Result]:
        possible = [job for job in wanted if sources.has(job.config.cell.data)]
        left = max(0.0, (deadline - time.monotonic()) / 60)
        execute = partial(train, sources=sources)
        found = collect(possible, execute, folder=args.out, processes=args.jobs, minutes=left, tell=tell)
        return load(wanted, args.out) | found

    return made(jobs(cells, tuned(made(tuning_jobs(cells))), seeds))


def known(cells: Sequence[Cell], folder: Path, seeds: Sequence[int] = SEEDS) -> dict[Job, Result]:
    """All that is kept of these cells; nothing is run."""
    return load(jobs(cells, tuned(load(tuning_jobs(cells), folder)), seeds), folder)


def train(job: Job, *, sources: Sources) -> Result:
    """Train a cell at every quality of the job."""
    config: Training = job.config
    cell, seed = config.cell, job.seed
    tasks = stream.build(
        sources.read(cell.data),
        stream.StreamConfig(
            tasks=cell.tasks,
            seed=seed,
            train_per_class=config.size.train_per_class,
            test_per_class=config.size.test_per_class,
            validation_ratio=config.validation_ratio,
        ),
    )
    started = time.process_time()
    base: dict[str, Any] | None
    try:
        learner = build(config, tasks, seed, sources.device)
        learner.learn(tasks.tasks[0], memory_of(cell, 50), _silent)
        base = copy.deepcopy(learner.state_dict())
    except FloatingPointError:
        base = None
    result: Result = {
        "device": sources.device,
        "settings": settings(config),
        "base_cpu_seconds": round(time.process_time() - started, 2),
        "runs": {},
        "gaps": [],
    }
    for quality in config.qualities:
        result["runs"][str(quality)] = None
        measured: list[gaps.Gaps] = []
        if base is not None:
            try:
                result["runs"][str(quality)] = _go_on(config, quality, tasks, base, seed, sources.device, measured)
            except FloatingPointError:
                continue
        if quality == MEASURED_AT:
            result["gaps"] = measured
    return result


def _go_on(
    config: Training,
    quality: int,
    tasks: stream.Stream,
    base: Mapping[str, Any],
    seed: int,
    device: str,
    measured: list[gaps.Gaps],
) -> Result:
    """From the state after the first task to the end, with strips of one quality."""
    started, aside = time.process_time(), 0.0
    learner, memory = build(config, tasks, seed, device), memory_of(config.cell, quality)
    matrix: list[list[float]] = []
    for task in tasks.tasks:
        if task.index == 0:
            learner.load_state_dict(copy.deepcopy(base))
        else:
            learner.learn(task, memory, _silent)
        memory.add(Learned(task.index, task.train, embed=learner.embed, seed=seed))
        learner.balance(task, memory, _silent)
        before = time.process_time()
        scored = [
            evaluation.accuracy(learner.scores, learner.runtime, each, learned=task.visit)
            for each in tasks.tasks[: task.index + 1]
        ]
        matrix.append([round(each, 4) for each in scored if each is not None])
        if quality == MEASURED_AT and not config.validation_ratio:
            images = task.train.read()
            measured.append(gaps.measure(images, task.train.class_ids, config.cell.budget_bytes, learner.embed))
        aside += time.process_time() - before
    trained = time.process_time() - started - aside
    coded = shift.on_coded(learner, tasks.tasks, quality)
    return {
        "matrix": matrix,
        "on_coded": [round(each, 4) for each in coded],
        "exemplars": sum(sum(classes.values()) for classes in memory.counts().values()),
        "used_bytes": memory.used_bytes,
        "cpu_seconds": round(trained, 2),
    }


def memory_of(cell: Cell, quality: int) -> StripMemory:
    """An empty one."""
    return StripMemory(Policy(cell.budget_bytes, "class", quality=quality), IngestOptions())


def settings(config: Training) -> dict[str, Any]:
    """All settings of the method, those that are its defaults included."""
    size, method = config.size, config.cell.method
    options: dict[str, Any] = {"lr": config.lr, "epochs": size.epochs, "batch_size": size.batch_size}
    options |= {"padding": 2, "flip": True, "codec_ratio": config.cell.codec_ratio}
    if method == "er":
        half = size.batch_size // 2
        options |= {"batch_size": half, "replay_batch": half, "milestones": (0.5, 0.75)}
    return asdict(methods.config_class(method)(**options))


def build(config: Training, tasks: stream.Stream, seed: int, device: str) -> Learner:
    """A fresh learner."""
    runtime = Runtime(RuntimeConfig(device=device), tasks, seed=seed)
    return methods.build(config.cell.method, runtime, network=NETWORK, options=settings(config))


def _silent(done: int, total: int, *, loss: torch.Tensor) -> None:
    """No bar."""


@cache
def squares(folder: Path, side: int) -> Dataset:
    """Squares of photographs, scaled to one size: 8 of each training field of a photograph, 4 of each test field.

    They are at the same places whatever the size.
    """
    parts: tuple[list[Any], list[Any]] = [], []
    classes: tuple[list[int], list[int]] = [], []
    columns, rows = _FIELDS
    width, height = _PHOTOGRAPH[0] // columns, _PHOTOGRAPH[1] // rows
    for number, photograph in enumerate(photographs(folder)):
        generator = np.random.default_rng([7, number])
        for field in range(columns * rows):
            column, row = divmod(field, rows)
            which = (column + row) % 2
            for _ in range((8, 4)[which]):
                cut = int(generator.integers(_SMALLEST_SQUARE, min(width, height), endpoint=True))
                x = column * width + int(generator.integers(0, width - cut, endpoint=True))
                y = row * height + int(generator.integers(0, height - cut, endpoint=True))
                square = photograph.resize((side, side), Image.Resampling.LANCZOS, (x, y, x + cut, y + cut))
                parts[which].append(np.asarray(square))
                classes[which].append(number)
    train, test = (Examples.of_arrays(np.stack(parts[which]), np.array(classes[which])) for which in (0, 1))
    return Dataset(f"squares{side}", train, test)


def photographs(folder: Path) -> list[Image.Image]:
    """The 20 JPEG files with the most detail, which drawings and gradients are not; each picture once.

    Raises:
        ValueError: there are fewer.
    """
    found: list[tuple[float, Path, Any]] = []
    sizes: set[int] = set()
    for path in sorted(folder.rglob("*.jp*g")):
        size = path.stat().st_size
        with Image.open(path) as image:
            if size in sizes or max(image.size) < _PHOTOGRAPH[0] or min(image.size) < _PHOTOGRAPH[1]:
                continue
            image.draft("RGB", (_PHOTOGRAPH[0] // 5, _PHOTOGRAPH[1] // 5))
            small = np.asarray(image.convert("RGB").resize((500, 300), Image.Resampling.BOX), np.float64)
        sizes.add(size)
        detail = float(np.abs(np.diff(small, axis=0)).mean() + np.abs(np.diff(small, axis=1)).mean())
        found.append((-detail, path, small.reshape(10, 30, 10, 50, 3).mean(axis=(1, 3))))
    taken: list[tuple[Path, Any]] = []
    for _, path, thumbnail in sorted(found, key=lambda each: each[:2]):
        if all(np.abs(thumbnail - other).mean() > _SAME_LEVELS for _, other in taken):
            taken.append((path, thumbnail))
    if len(taken) < PHOTOGRAPHS:
        raise ValueError(f"{folder} has {len(taken)} photographs of {_PHOTOGRAPH} pixels and more, not {PHOTOGRAPHS}")
    return [_upright(path) for path, _ in taken[:PHOTOGRAPHS]]


def _upright(path: Path) -> Image.Image:
    """The centre of a photograph at the size that is cut into fields, its longer side across."""
    with Image.open(path) as opened:
        opened.draft("RGB", _PHOTOGRAPH)
        image = opened.convert("RGB")
    if image.height > image.width:
        image = image.transpose(Image.Transpose.ROTATE_90)
    scale = min(image.width / _PHOTOGRAPH[0], image.height / _PHOTOGRAPH[1])
    width, height = (int(side * scale) for side in _PHOTOGRAPH)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.resize(_PHOTOGRAPH, Image.Resampling.LANCZOS, (left, top, left + width, top + height))
