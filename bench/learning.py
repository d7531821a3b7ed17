"""One run: a method learns the tasks of a stream one after the other with one memory, and is scored after each.

A run says all that its result depends on but the seed and the code, spelt out, so that results keep their meaning
whatever becomes the trainer's default.

Half of a task's own images are shown as JPEG gives them back, each at one of the candidate qualities, whether the
memory is JPEG or not. The first task is learned before there is any memory, so it is learned once for all runs that
learn it alike. If selection chose one quality all along, its run is that of this fixed quality bit for bit, and is not
repeated (`same_as`).
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gaps
import kept
import report
import shift
import torch
from arms import (
    SELECTED,
    Archives,
    Arm,
    SelectedFiles,
    SelectedStrips,
    memory_of,
)
from kept import Job, Result
from settings import SELECTION, STREAM, UNSEEN_QUALITY, Items, Learning, items

from engram.schemas import Decision, Per
from engram.selection.quality import choose
from engram_trainer import datasets, evaluation, methods, stream
from engram_trainer.configuration import RuntimeConfig
from engram_trainer.extractor import to_onnx
from engram_trainer.memory import Learned, Memory
from engram_trainer.methods import Learner
from engram_trainer.runtime import Runtime

NETWORK = "conv"
CLASSES = 10


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
class Place:
    """Where things are, which no result depends on."""

    data: Mapping[str, str]
    """Folders of the data sets that there are."""
    results: Path
    bases: Path
    """The states of learners after the first task, which arms that learn it alike share."""
    device: str = "cpu"


def job_of(table: str, run: Run, seed: int, learning: str, *more: str) -> Job:
    """A run with a seed, as it is kept."""
    arm = run.arm.name.replace(", ", "-")
    return Job(f"{table}/{run.data}", " ".join([learning, arm, str(run.budget_bytes), *more]), seed, run)


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
    twin = job_of(job.table.split("/")[0], selecting, job.seed, job.name.split()[0])
    found = kept.load([twin], folder).get(twin)
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
    learner, memory = learner_of(run, seed, tasks), memory_of(run.arm, run.budget_bytes, run.per, dict(run.selection))
    matrix: list[list[float]] = []
    qualities: list[int | None] = []
    volumes = []
    for task in tasks.tasks:
        if task.index == 0 and run.method != "joint":
            learn_base(learner, run, seed, memory, place)
        else:
            learner.learn(task, memory, ignore)
        if run.arm.has_memory:
            needs_model = run.arm.kind == "strips" or run.arm.selects
            model = to_onnx(learner.extractor(), tasks.shape) if needs_model else None
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
