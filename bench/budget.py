"""Measure which memory of equal bytes forgets least: raw pixels, lossless archives, JPEG files, or Engram's strips.

CIFAR-10 and Fashion-MNIST in 5 tasks of 2 classes, class-incremental, 1,500 training images a class, all 10,000 test
images. What differs between the arms is the memory:

    raw                   pixels, and a class id of 2 bytes each
    lossless              the smallest lossless archive of each class: see `lossless`
    files, selected       one JPEG file each, its tables optimised, at the quality that selection chooses
    strips, 10 .. 90      Engram's packs at one fixed quality
    strips, selected      Engram's packs at the quality that selection chooses for the buffer
    none, joint           nothing is kept; training from scratch on all images so far: floor and ceiling

Every byte of a memory counts: tables, markers, class ids and checksums. Strips are made by `engram.memory`, as in a
service, with the learner's exported extractor in its own process; `service_path_identical` says that a real service,
asked over HTTP, kept the same exemplars.

**Alike for all arms.** Half of a task's own images are shown as JPEG gives them back, each at one of the candidate
qualities, whether the memory is JPEG or not: one rule for all, which needs no quality before the first task has been
learned. (Table `uncoded` has the same without.) The learning rate is tuned for each kind of memory, budget and data
set on the same grid, with held-out training images in place of test images and seeds of its own (`--tune`); where the
best is at an end of the grid, the grid grows there for all arms. A run whose loss is not finite counts as chance.

**Tables** (`--table`). `primary` is the claim: LUCIR, two budgets per class, 5 seeds. The others have one budget and 3
seeds.

Accuracies are means over the seeds of which every run is done, differences are paired by seed; intervals are 95 %, by
Student's t. Finished runs are kept (see `kept`): the same command goes on after an interruption. If selection chose
one quality all along, the run is that of this fixed quality bit for bit, and is not repeated (`same_as`).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import gaps
import kept
import numpy as np
import report
import shift
import torch
from intervals import Estimate, estimate, paired
from kept import Job, Result
from lossless import LosslessMemory

from engram import Client
from engram.content import Policy
from engram.schemas import CANDIDATE_QUALITIES, Decision, IngestOptions, Per
from engram.selection.images import ArrayImages
from engram.selection.quality import choose
from engram_service.embedder import OnnxEmbedder
from engram_trainer import datasets, evaluation, methods, stream
from engram_trainer.configuration import RuntimeConfig
from engram_trainer.extractor import to_onnx
from engram_trainer.local_memory import LocalConfig, StripMemory
from engram_trainer.local_service import local_service
from engram_trainer.memory import Learned, Memory, NoMemory
from engram_trainer.methods import Learner
from engram_trainer.plain_memory import PlainMemory
from engram_trainer.runtime import Runtime
from engram_trainer.service_memory import ServiceMemory

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts it."""
NETWORK = "conv"

SEEDS = (10, 11, 12, 13, 14)
"""Nobody has looked at what comes of them while anything was chosen."""
TUNING_SEEDS = (1000, 1001)
BUDGETS = {"cifar10": (16_000, 61_480), "fashion": (4_000, 16_000)}
"""Bytes per class; on CIFAR-10 they hold 5 and 20 raw images."""
CLASSES = 10

# All settings stand here, so that results keep their meaning whatever becomes the trainer's default.
LUCIR: dict[str, Any] = {
    "epochs": 8,
    "batch_size": 128,
    "milestones": (0.5, 0.75),
    "decay": 0.1,
    "momentum": 0.9,
    "nesterov": False,
    "weight_decay": 5e-4,
    "flip": True,
    "padding": 2,
    "resized_crop": False,
    "eta": 1.0,
    "less_forget_weight": 2.0,
    "margin": 0.5,
    "margin_classes": 2,
    "margin_weight": 1.0,
    "replay_ratio": 0.4,
    "codec_ratio": 0.5,
    "codec_qualities": CANDIDATE_QUALITIES,
    "balance_epochs": 10,
    "balance_lr": 0.001,
    "balance_milestones": (0.5,),
    "classify": "cosine",
}
ER: dict[str, Any] = {
    "epochs": 8,
    "batch_size": 32,
    "replay_batch": 32,
    "milestones": (),
    "decay": 0.1,
    "momentum": 0.0,
    "nesterov": False,
    "weight_decay": 0.0,
    "flip": True,
    "padding": 2,
    "resized_crop": False,
    "codec_ratio": 0.5,
    "codec_qualities": CANDIDATE_QUALITIES,
    "fill": "task",
    "slots": None,
    "flush": 64,
    "compete": "all",
}
JOINT: dict[str, Any] = {
    "epochs": 10,
    "batch_size": 128,
    "milestones": (2 / 3,),
    "decay": 0.1,
    "momentum": 0.9,
    "nesterov": False,
    "weight_decay": 5e-4,
    "flip": True,
    "padding": 2,
    "resized_crop": False,
}
SELECTION: dict[str, Any] = {"definition": "raw", "rule": "any", "epsilon": 0.3}
UNSEEN_QUALITY = 50
"""At which test images are coded for arms whose memory has no quality."""
STREAM: dict[str, Any] = {"tasks": 5, "train_per_class": 1_500}
TUNING_STREAM: dict[str, Any] = {"tasks": 5, "train_per_class": 500, "validation_ratio": 0.1}


@dataclass(frozen=True)
class Arm:
    """One kind of memory; `quality` None is the one that selection chooses, or has no meaning."""

    kind: str
    quality: int | None = None

    @property
    def name(self) -> str:
        """As tables call it."""
        if self.selects:
            return f"{self.kind}, selected"
        return self.kind if self.quality is None else f"{self.kind}, {self.quality}"

    @property
    def has_memory(self) -> bool:
        """Whether the budget means anything to it."""
        return self.kind not in ("none", "joint")

    @property
    def selects(self) -> bool:
        """Whether its quality is selected for each task."""
        return self.kind in ("strips", "files") and self.quality is None


RAW, LOSSLESS, FILES, SELECTED = Arm("raw"), Arm("lossless"), Arm("files"), Arm("strips")
FIXED = tuple(Arm("strips", quality) for quality in (25, 50, 75))
# What is selected comes first: most often it is the run of a fixed quality as well.
PRIMARY = (SELECTED, RAW, LOSSLESS, FILES, *FIXED)
NONE, JOINTLY = Arm("none"), Arm("joint")
TUNED_ARMS = (RAW, LOSSLESS, Arm("files", 50), Arm("strips", 50))
"""What stands for every arm of its kind when learning rates are tuned."""

Items = tuple[tuple[str, Any], ...]
"""A mapping whose `repr` says all."""


@dataclass(frozen=True)
class Learning:
    """A method with all settings but the learning rate."""

    name: str
    method: str
    settings: Items
    tuned_arms: tuple[Arm, ...] = TUNED_ARMS


def items(settings: Mapping[str, Any]) -> Items:
    """Sorted, so that the order in which they are written means nothing."""
    return tuple(sorted(settings.items()))


LEARNINGS = {
    each.name: each
    for each in (
        Learning("lucir", "lucir", items(LUCIR)),
        Learning("lucir-uncoded", "lucir", items({**LUCIR, "codec_ratio": 0.0})),
        Learning("lucir-own-codec", "lucir", items({**LUCIR, "codec_qualities": (50,)}), (Arm("strips", 50),)),
        Learning("lucir-without", "lucir", items(LUCIR), (NONE,)),
        Learning("er", "er", items(ER)),
        Learning("joint", "joint", items(JOINT), (JOINTLY,)),
    )
}

RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
FIRST_RATES = (0.01, 0.03, 0.1)

Rates = Mapping[str, float]
"""The learning rate of each kind of memory."""
TUNED: dict[tuple[str, str, int], Rates] = {}
"""By learning, data set and budget: what `--tune` found; `tests/bench/test_budget.py` compares."""


@dataclass(frozen=True)
class Run:
    """All that a result depends on but its seed and the code."""

    data: str
    arm: Arm
    budget_bytes: int
    """0 where it has no meaning."""
    per: Per
    method: str
    settings: Items
    stream: Items
    selection: Items
    """Nothing where no quality is selected."""
    network: str = NETWORK
    device: str = "cpu"

    @property
    def limit_bytes(self) -> int:
        """What the memory of all classes may take."""
        return self.budget_bytes * CLASSES if self.per == "class" else self.budget_bytes


@dataclass(frozen=True)
class Table:
    """A question: the same arms for some data sets, budgets and seeds."""

    learning: str
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...] = SEEDS[:3]
    budgets: int = 1
    """How many of them, the smaller first."""
    per: Per = "class"


TABLES = {
    "primary": Table("lucir", PRIMARY, SEEDS, budgets=2),
    "uncoded": Table("lucir-uncoded", PRIMARY),
    "er": Table("er", PRIMARY),
    "extremes": Table("lucir", (SELECTED, Arm("strips", 10), *FIXED, Arm("strips", 90))),
    "total": Table("lucir", PRIMARY, per="buffer"),
    "codec": Table("lucir-own-codec", (Arm("strips", 50),)),
    "floor": Table("lucir-without", (NONE,)),
    "ceiling": Table("joint", (JOINTLY,)),
}


def cells(table: Table, data: str) -> list[tuple[int, Per]]:
    """The budgets of a table."""
    budgets = BUDGETS[data][: table.budgets]
    return [(budget if table.per == "class" else CLASSES * budget, table.per) for budget in budgets]


def job_of(table: str, run: Run, seed: int, learning: str, *more: str) -> Job:
    """A run with a seed, as it is kept."""
    arm = run.arm.name.replace(", ", "-")
    return Job(f"{table}/{run.data}", " ".join([learning, arm, str(run.budget_bytes), *more]), seed, run)


@dataclass(frozen=True)
class Place:
    """Where things are, which no result depends on."""

    data: Mapping[str, str]
    """Folders of the data sets that there are."""
    results: Path
    bases: Path
    """The states of learners after the first task, which arms that learn it alike share."""
    device: str = "cpu"


def jobs_of(table: Table, data: str, seed: int, budget: int, per: Per, place: Place) -> list[Job]:
    """The runs of one cell of a table, in the order in which they are run."""
    learning = LEARNINGS[table.learning]
    rates = rates_of(table.learning, data, budget if per == "class" else budget // CLASSES, place)
    return [
        job_of(
            "budget",
            run_of(learning, data, arm, budget, rates[arm.kind], per=per, device=place.device),
            seed,
            table.learning,
        )
        for arm in table.arms
    ]


def run_of(
    learning: Learning,
    data: str,
    arm: Arm,
    budget: int,
    lr: float,
    *,
    per: Per = "class",
    stream: Mapping[str, Any] = STREAM,
    device: str = "cpu",
) -> Run:
    """One run, spelt out."""
    return Run(
        data,
        arm,
        budget if arm.has_memory else 0,
        per,
        learning.method,
        (*learning.settings, ("lr", lr)),
        items(stream),
        items(SELECTION) if arm.selects else (),
        device=device,
    )


def rates_of(learning: str, data: str, budget: int, place: Place) -> Rates:
    """The tuned learning rates; those of this file, else what the kept results say.

    Raises:
        SystemExit: nobody has tuned them.
    """
    key = (learning, data, budget)
    found = TUNED.get(key) or chosen(*key, place)
    if found is None:
        raise SystemExit(f"the learning rates of {learning} on {data} at {budget:,} bytes are not tuned: run --tune")
    return found


# Tuning


def tuning_jobs(learning: str, data: str, budget: int, rate: float, seed: int, device: str) -> list[Job]:
    """One learning rate for every kind of memory."""
    return [
        job_of(
            "budget-tuning",
            run_of(LEARNINGS[learning], data, arm, budget, rate, stream=TUNING_STREAM, device=device),
            seed,
            learning,
            f"lr-{rate:g}",
        )
        for arm in LEARNINGS[learning].tuned_arms
    ]


def tuned(learning: str, data: str, budget: int, place: Place) -> dict[str, dict[float, list[float]]]:
    """Last accuracies of each kind of memory by learning rate, where all of a rate's runs are done."""
    found: dict[str, dict[float, list[float]]] = {arm.kind: {} for arm in LEARNINGS[learning].tuned_arms}
    for rate in RATES:
        jobs = [job for seed in TUNING_SEEDS for job in tuning_jobs(learning, data, budget, rate, seed, place.device)]
        results = kept.load(jobs, place.results)
        if len(results) == len(jobs):
            for job in jobs:
                found[job.config.arm.kind].setdefault(rate, []).append(results[job]["last"])
    return found


def chosen(learning: str, data: str, budget: int, place: Place) -> Rates | None:
    """The best learning rate of each kind; None as long as the grid has to grow."""
    found = tuned(learning, data, budget, place)
    if missing_rates(found):
        return None
    return {kind: best_rate(by_rate) for kind, by_rate in found.items()}


def missing_rates(found: Mapping[str, Mapping[float, Sequence[float]]]) -> list[float]:
    """Learning rates that are still to be tried: the first ones, then the next beyond an end where the best lies."""
    missing = [rate for rate in FIRST_RATES if any(rate not in by_rate for by_rate in found.values())]
    if missing:
        return missing
    tried = sorted(set.intersection(*(set(by_rate) for by_rate in found.values())))
    best = {best_rate(by_rate) for by_rate in found.values()}
    return [
        rate
        for rate in RATES
        if (tried[0] in best and rate == max((each for each in RATES if each < tried[0]), default=None))
        or (tried[-1] in best and rate == min((each for each in RATES if each > tried[-1]), default=None))
    ]


def best_rate(by_rate: Mapping[float, Sequence[float]]) -> float:
    """The one with the highest mean; of equals the lowest."""
    return max(sorted(by_rate), key=lambda rate: fmean(by_rate[rate]))


def tune(names: Sequence[str], place: Place, *, processes: int, minutes: float) -> None:
    """Run the grid for these tables, print what it says."""
    deadline = time.monotonic() + 60 * minutes
    needed = [(TABLES[name].learning, data, budget) for name in names for data, budget in grid_of(TABLES[name])]
    grids = [key for key in dict.fromkeys(needed) if key[1] in place.data]
    while time.monotonic() < deadline:
        todo = [
            job
            for seed in TUNING_SEEDS
            for key in grids
            for rate in missing_rates(tuned(*key, place))
            for job in tuning_jobs(*key, rate, seed, place.device)
        ]
        if not todo:
            break
        left = (deadline - time.monotonic()) / 60
        kept.collect(
            todo, partial(execute, place=place), folder=place.results, processes=processes, minutes=left, tell=tell
        )
    for key in grids:
        found = tuned(*key, place)
        rates = sorted({rate for by_rate in found.values() for rate in by_rate})
        rows = [[kind, *(fmean(of[rate]) if rate in of else None for rate in rates)] for kind, of in found.items()]
        name, data, budget = key
        report.print_table(
            f"Tuning {name}: {data}, {budget:,} bytes per class; last accuracy on held-out training images, "
            f"{len(TUNING_SEEDS)} seeds, by learning rate",
            ("memory", *(f"{rate:g}" for rate in rates)),
            rows,
        )
        report.print_table(f"Chosen: {key}", ("kind", "lr"), list((chosen(*key, place) or {}).items()))


def grid_of(table: Table) -> list[tuple[str, int]]:
    """The data sets and budgets per class that a table needs learning rates for."""
    return [(data, budget) for data, budgets in BUDGETS.items() for budget in budgets[: table.budgets]]


# One run


class SelectedStrips(StripMemory):
    """Strips as a service makes them, extractor process and all, in this process."""

    def add(self, learned: Learned) -> None:
        """Keep what a service would keep."""
        model = learned.extractor
        assert model is not None
        with tempfile.NamedTemporaryFile(suffix=".onnx") as file:
            file.write(model)
            file.flush()
            with OnnxEmbedder(Path(file.name), hashlib.sha256(model).hexdigest()) as embedder:
                images = ArrayImages(learned.examples.read(), learned.examples.class_ids)
                self.put(learned.task, images, embedder, seed=learned.seed)


class SelectedFiles(PlainMemory):
    """One JPEG file for each exemplar, at the quality that selection chooses for strips in the same bytes."""

    def __init__(self, config: LocalConfig, strips: SelectedStrips) -> None:
        super().__init__(config)
        self.strips = strips

    def add(self, learned: Learned) -> None:
        """Choose the quality, then keep as many files as fit."""
        self.strips.add(learned)
        self.config = replace(self.config, quality=self.strips.quality)
        super().add(learned)


# A learner shows images through the codec beside a memory that `is_lossy`: here it does so beside every memory, so that
# the arms differ in what is kept and in nothing else.


class Pixels(PlainMemory):
    """Raw pixels."""

    is_lossy = True


class Archives(LosslessMemory):
    """Lossless archives."""

    is_lossy = True


class Nothing(NoMemory):
    """No memory."""

    is_lossy = True


def memory_of(run: Run) -> Memory:
    """The memory of an arm, empty."""
    arm, budget, per = run.arm, run.budget_bytes, run.per
    config = LocalConfig(kind="raw", budget_bytes=budget, per=per, quality=arm.quality)
    if not arm.has_memory:
        return Nothing()
    if arm.kind == "raw":
        return Pixels(config)
    if arm.kind == "lossless":
        return Archives(config)
    strips = SelectedStrips(Policy(budget, per, quality=arm.quality), IngestOptions(**dict(run.selection)))
    if arm.kind == "strips":
        return strips
    files = replace(config, kind="files")
    return SelectedFiles(files, strips) if arm.selects else PlainMemory(files)


def stream_of(run: Run, seed: int, place: Place) -> stream.Stream:
    """The tasks of a seed: it draws their order and their training images."""
    return stream.build(datasets.load(place.data[run.data]), stream.StreamConfig(**dict(run.stream), seed=seed))


def learner_of(run: Run, seed: int, tasks: stream.Stream) -> Learner:
    """A fresh learner; its initial weights depend on the seed alone."""
    runtime = Runtime(RuntimeConfig(device=run.device), tasks, seed=seed)
    return methods.build(run.method, runtime, network=run.network, options=dict(run.settings))


def ignore(done: int, total: int, *, loss: torch.Tensor) -> None:
    """Show no progress."""


def execute(job: Job, place: Place) -> Result:
    """One complete run, or the result of the same run under another name."""
    twin = selected_twin(job, place.results)
    if twin is not None:
        return twin
    try:
        return learn(job.config, job.seed, place)
    except FloatingPointError as error:
        chance = 100 / CLASSES
        return {"diverged": str(error), "last": chance, "average_incremental": chance, "learning_seconds": None}


def selected_twin(job: Job, folder: Path) -> Result | None:
    """The result of selection, if it is done and chose this job's fixed quality at every task."""
    run = job.config
    if run.arm.kind != "strips" or run.arm.quality is None:
        return None
    selecting = replace(run, arm=SELECTED, selection=items(SELECTION))
    twin = job_of("budget", selecting, job.seed, job.name.split()[0])
    found = kept.load([twin], folder).get(twin) if twin.table == job.table else None
    if found is None or set(found.get("qualities", ())) != {run.arm.quality}:
        return None
    dropped = ("gaps", "decisions", "qualities_alone", "selection_seconds")
    return {"same_as": twin.name, **{key: value for key, value in found.items() if key not in dropped}}


def learn(run: Run, seed: int, place: Place) -> Result:
    """Learn all tasks, and score.

    Raises:
        FloatingPointError: the loss is not finite any more.
    """
    start = time.perf_counter()
    tasks = stream_of(run, seed, place)
    learner, memory = learner_of(run, seed, tasks), memory_of(run)
    matrix: list[list[float]] = []
    qualities: list[int | None] = []
    volumes = []
    for task in tasks.tasks:
        if task.index == 0 and run.method != "joint":
            learn_base(learner, run, seed, memory, place)
        else:
            learner.learn(task, memory, ignore)
        if run.arm.has_memory:
            model = to_onnx(learner.extractor(), tasks.shape)
            memory.add(Learned(task.index, task.train, model, learner.embed, seed=seed))
        learner.balance(task, memory, ignore)
        earlier = tasks.tasks[: task.index + 1]
        accuracies = [
            evaluation.accuracy(learner.scores, learner.runtime, each, learned=task.index) for each in earlier
        ]
        matrix.append([accuracy for accuracy in accuracies if accuracy is not None])
        qualities.append(getattr(memory, "quality", None))
        if run.arm == SELECTED:
            share = run.budget_bytes if run.per == "class" else run.budget_bytes // CLASSES
            volumes.append(gaps.measure(task.train.read(), task.train.class_ids, share, learner.embed))
    if memory.used_bytes > run.limit_bytes > 0:
        raise AssertionError(f"{run}: {memory.used_bytes} bytes used of {run.limit_bytes}")
    metrics = evaluation.metrics(matrix, test_counts=[len(task.test) for task in tasks.tasks])
    result: Result = {
        "last": round(100 * metrics.last, 4),
        "average_incremental": round(100 * metrics.average_incremental, 4),
        "incremental": [round(100 * accuracy, 4) for accuracy in metrics.incremental],
        "matrix": [[round(accuracy, 6) for accuracy in row] for row in matrix],
        "class_order": tasks.class_order,
        "used_bytes": memory.used_bytes,
        "exemplars": sum(sum(classes.values()) for classes in memory.counts().values()),
        "counts": {str(task): classes for task, classes in memory.counts().items()},
        "learning_seconds": round(time.perf_counter() - start, 1),
    }
    result["coded_quality"] = coded = getattr(memory, "quality", None) or UNSEEN_QUALITY
    result["on_coded"] = [round(each, 6) for each in shift.on_coded(learner, tasks.tasks, coded)]
    if run.arm.kind in ("strips", "files"):
        result["qualities"] = qualities
    if isinstance(memory, Archives):
        result["forms"] = {f"{task} {class_id}": form for (task, class_id), form in memory.forms.items()}
    if run.arm.selects:
        strips = memory.strips if isinstance(memory, SelectedFiles) else memory
        assert isinstance(strips, SelectedStrips)
        decisions = [decision for _, decision in sorted(strips.decisions.items())]
        result["qualities_alone"] = [choose([decision])[0] for decision in decisions]
        result["selection_seconds"] = round(sum(decision.seconds for decision in decisions), 2)
    if volumes:
        result |= {"decisions": [brief(decision) for decision in decisions], "gaps": volumes}
    return result


def learn_base(learner: Learner, run: Run, seed: int, memory: Memory, place: Place) -> None:
    """The learner has learned the first task, which has no exemplars yet: so it is the same for many arms."""
    key = (run.data, run.method, run.settings, run.stream, run.network, run.device, seed, kept.code_version())
    path = place.bases / f"{kept.digest(*key, report.versions())}.pt"
    if path.exists():
        learner.load_state_dict(torch.load(path, weights_only=True))
        return
    learner.learn(learner.runtime.stream.tasks[0], memory, ignore)
    kept.write(path, lambda temporary: torch.save(learner.state_dict(), temporary))


def brief(decision: Decision) -> dict[str, Any]:
    """What a task said about quality, in few bytes."""
    known: dict[str, Any] = json.loads(
        decision.model_dump_json(
            include={"quality": True, "reason": True, "candidates": {"__all__": {"quality", "exemplars", "bytes"}}}
        )
    )
    for told, candidate in zip(known["candidates"], decision.candidates, strict=True):
        told["ratio"], told["pixel_ratio"] = _rounded(candidate.ratio), _rounded(candidate.pixel_ratio or {})
    return known


def _rounded(ratios: Mapping[Any, float | None]) -> dict[str, float | None]:
    return {name: None if ratio is None else round(ratio, 4) for name, ratio in ratios.items()}


def tell(job: Job, result: Result) -> str:
    """A few words for the log."""
    if "diverged" in result:
        return "diverged"
    words = f"last {result['last']:.1f} exemplars {result['exemplars']} {result.get('qualities', '')}"
    return f"{words} = {result['same_as']}" if "same_as" in result else words


def service_path_is_identical(place: Place) -> bool:
    """Whether a real service, over HTTP, keeps the exemplars of the first task that `SelectedStrips` keeps."""
    data, seed = next(iter(place.data)), SEEDS[0]
    budget = BUDGETS[data][0]
    small = {**STREAM, "train_per_class": 200}
    run = run_of(LEARNINGS["lucir"], data, SELECTED, budget, 0.03, stream=small)
    tasks = stream_of(run, seed, place)
    learner, here = learner_of(run, seed, tasks), memory_of(run)
    task = tasks.tasks[0]
    learner.learn(task, here, ignore)
    extractor = to_onnx(learner.extractor(), tasks.shape)
    with (
        tempfile.TemporaryDirectory() as scratch,
        local_service(Path(scratch) / "service") as service,
        Client(service.url) as client,
    ):
        client.create_buffer("bench", budget_bytes=budget, per="class")
        options = IngestOptions(**SELECTION)
        there = ServiceMemory(client, "bench", options=options, run="bench", folder=Path(scratch) / "mirror")
        for memory in (here, there):
            memory.add(Learned(0, task.train, extractor, learner.embed, seed=seed))
        [ours], [theirs] = here.walk(10**6), there.walk(10**6)
        return here.used_bytes == there.used_bytes and all(
            np.array_equal(getattr(ours, name), getattr(theirs, name)) for name in ("images", "class_ids", "rows")
        )


# Tables

Scores = Mapping[Arm, Mapping[int, float]]
"""Of each arm by seed, in percent."""


def scores(results: Mapping[Job, Result], seeds: Sequence[int], key: str = "last") -> Scores:
    """Those of some seeds."""
    found: dict[Arm, dict[int, float]] = {}
    for job, result in results.items():
        if job.seed in seeds:
            found.setdefault(job.config.arm, {})[job.seed] = result[key]
    return found


def headline(last: Scores) -> dict[str, float | int | None]:
    """The claim in numbers; gains are of strips at the selected quality, in points, paired by seed."""
    if SELECTED not in last:
        return {}
    numbers: dict[str, float | int | None] = {"seeds": len(last[SELECTED])}
    for name, arm in (("raw", RAW), ("lossless", LOSSLESS), ("files", FILES)):
        if arm in last:
            numbers |= _points(f"gain_over_{name}", paired(last[SELECTED], last[arm]))
    fixed = [arm for arm in last if arm.kind == "strips" and arm.quality is not None]
    if fixed:
        best = max(fixed, key=lambda arm: fmean(last[arm].values()))
        numbers["best_fixed_quality"] = best.quality
        numbers |= _points("gap_to_best_fixed_quality", paired(last[best], last[SELECTED]))
    return numbers


def _points(name: str, difference: Estimate | None) -> dict[str, float | None]:
    if difference is None:
        return {}
    low, high = difference.low, difference.high
    return {
        f"{name}_points": round(difference.mean, 2),
        f"{name}_low": None if low is None else round(low, 2),
        f"{name}_high": None if high is None else round(high, 2),
    }


def print_cell(title: str, results: Mapping[Job, Result], seeds: Sequence[int]) -> None:
    """One table, over its complete seeds."""
    last, average = scores(results, seeds), scores(results, seeds, "average_incremental")
    rows: list[list[report.Cell]] = []
    for arm in last:
        own = [result for job, result in results.items() if job.config.arm == arm and job.seed in seeds]
        whole = [result for result in own if "diverged" not in result]
        gain = paired(last[SELECTED], last[arm]) if SELECTED in last and arm != SELECTED else None
        rows.append(
            [
                arm.name,
                str(estimate([*last[arm].values()])),
                str(estimate([*average[arm].values()])),
                None if gain is None else str(gain),
                fmean(each["exemplars"] / CLASSES for each in whole) if arm.has_memory and whole else None,
                fmean(each["used_bytes"] / CLASSES for each in whole) if arm.has_memory and whole else None,
                "; ".join(" ".join(map(str, each["qualities"])) for each in whole) if arm.selects else None,
                len(own) - len(whole),
            ]
        )
    columns = (
        "memory",
        "last",
        "average incremental",
        "strips, selected, are ahead by",
        "exemplars/class",
        "bytes/class",
        "quality after each task; seed",
        "diverged",
    )
    report.print_table(f"{title}; seeds {' '.join(map(str, seeds))}", columns, rows)


def print_tables(names: Sequence[str], place: Place) -> dict[str, report.Cell]:
    """All that is done of these tables, and their numbers by key."""
    flat: dict[str, report.Cell] = {}
    for name in names:
        table = TABLES[name]
        for data in place.data:
            for number, (budget, per) in enumerate(cells(table, data)):
                jobs = [job for seed in table.seeds for job in jobs_of(table, data, seed, budget, per, place)]
                results = kept.load(jobs, place.results)
                seeds = kept.complete_seeds(jobs, results)
                what = "bytes per class" if per == "class" else "bytes in all"
                title = f"{name}: {data}, {budget:,} {what}, {table.learning}"
                if len(seeds) < len(table.seeds):
                    title += f"; {len(results)} of {len(jobs)} runs are done"
                print_cell(title, results, seeds)
                numbers = headline(scores(results, seeds))
                prefix = data if name == "primary" else f"{name}_{data}"
                flat |= {f"{prefix}_{key}_{budget}": value for key, value in numbers.items()}
                if number == 0:
                    flat |= {f"{prefix}_{key}": value for key, value in numbers.items()}
                for arm, by_seed in scores(results, seeds).items():
                    slug = arm.name.replace(", ", "_")
                    flat[f"{prefix}_last_{slug}_{budget}"] = round(fmean(by_seed.values()), 2)
                flat[f"{prefix}_old_code_{budget}"] = len(kept.stale(results.values()))
    return flat


def main() -> None:
    """Run what is missing, print the tables."""

    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--cifar10", type=Path, help="folder with CIFAR-10's binary files")
        parser.add_argument("--fashion", type=Path, default=FASHION_MNIST, help="folder with Fashion-MNIST's IDX files")
        parser.add_argument("--table", nargs="+", choices=[*TABLES], default=["primary"], help="default: primary")
        parser.add_argument("--tune", action="store_true", help="the learning rates of these tables, not the tables")
        parser.add_argument("--print", action="store_true", help="what is done; run nothing")
        parser.add_argument("--bases", type=Path, default=Path("runs/budget"), help="folder of learned first tasks")
        parser.add_argument("--device", default="cpu")
        kept.add_arguments(parser)

    args = report.parse_args("at equal bytes, which memory forgets least?", add)
    torch.set_num_threads(1)
    folders = {"cifar10": args.cifar10, "fashion": args.fashion if args.fashion.is_dir() else None}
    data = {name: str(folder) for name, folder in folders.items() if folder is not None}
    place = Place(data, args.out, args.bases, args.device)
    if args.quick:
        report.finish(args, quick(place, args.jobs))
        return
    if args.tune:
        tune(args.table, place, processes=args.jobs, minutes=args.minutes)
        return
    if not args.print:
        collect(args.table, place, processes=args.jobs, minutes=args.minutes)
    flat = print_tables(args.table, place)
    flat["service_path_identical"] = service_path_is_identical(place)
    report.finish(args, flat)


def collect(names: Sequence[str], place: Place, *, processes: int, minutes: float) -> None:
    """Run what is missing of these tables: one after the other, each seed by seed."""
    jobs = [
        job
        for table in (TABLES[name] for name in names)
        for seed in table.seeds
        for data in place.data
        for budget, per in cells(table, data)
        for job in jobs_of(table, data, seed, budget, per, place)
    ]
    execution = partial(execute, place=place)
    kept.collect(jobs, execution, folder=place.results, processes=processes, minutes=minutes, tell=tell)


def quick(place: Place, processes: int) -> dict[str, report.Cell]:
    """A look at a small table in well under a minute: one seed, one budget, few images."""
    data = {"fashion": place.data.get("fashion", "sample")}
    learning = replace(LEARNINGS["lucir"], settings=items({**LUCIR, "batch_size": 32, "epochs": 3}))
    small = {**STREAM, "train_per_class": 60, "test_per_class": 50}
    budget = BUDGETS["fashion"][0]
    with tempfile.TemporaryDirectory() as scratch:
        place = replace(place, data=data, results=Path(scratch), bases=Path(scratch) / "bases")
        jobs = [
            job_of(
                "budget", run_of(learning, "fashion", arm, budget, 0.03, stream=small, device=place.device), 0, "lucir"
            )
            for arm in (SELECTED, RAW, LOSSLESS, Arm("strips", 25), Arm("strips", 50))
        ]
        results = kept.collect(
            jobs, partial(execute, place=place), folder=place.results, processes=processes, tell=tell
        )
        print_cell(f"quick: fashion, {budget:,} bytes per class", results, [0])
        flat: dict[str, report.Cell] = {f"fashion_{key}": each for key, each in headline(scores(results, [0])).items()}
        return {**flat, "service_path_identical": service_path_is_identical(place)}


if __name__ == "__main__":
    main()
