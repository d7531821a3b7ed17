"""Learn a stream in one pass, task by task, and keep what tables about forgetting need.

A case is a setting (data, stream, network), an arm (method and kind of memory) and a number of exemplars, which are
chosen at random from each task once it is learned. The result of a run has accuracies as fractions:

    acc, bwt, fwt, forgetting   see `engram_trainer.evaluation`; None where they are not measured
    matrix, at_random           R, a row after each task, and b
    on_memory                   accuracy on the exemplars of each task after the last, as the memory gives them back
    over_fitting                its mean over all tasks but the last, less that on the test images of the same tasks
    failure                     the task at which the loss was not finite any more, and why; `acc` is chance then
    corrected_ratio             part of the steps in which GEM's constraints were broken

A run for tuning is scored once, at the end, on training images that were held out.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import kept
import numpy as np
import torch
from kept import Job, Result

from engram_trainer import datasets, evaluation, methods, stream
from engram_trainer.configuration import RuntimeConfig
from engram_trainer.evaluation import Matrix
from engram_trainer.examples import Examples
from engram_trainer.local_memory import LocalConfig
from engram_trainer.memory import Learned, Memory, NoMemory, by_task
from engram_trainer.methods import Learner
from engram_trainer.plain_memory import local_memory
from engram_trainer.runtime import Runtime
from engram_trainer.stream import Scenario, Stream, StreamConfig, Task

QUALITY = 50
# No budget binds here: the number of exemplars is given, and the result says what they cost.
AMPLE_BYTES = 2**30
HELD_OUT_RATIO, HELD_OUT_PER_CLASS = 0.1, 100


@dataclass(frozen=True)
class Arm:
    """A method with a memory; `options` are fields of the method's configuration."""

    name: str
    method: str
    options: tuple[tuple[str, Any], ...]
    memory: Literal["none", "strips", "raw"] = "strips"

    @property
    def label(self) -> str:
        """As it stands in tables."""
        return f"{self.name}, raw" if self.memory == "raw" else self.name


@dataclass(frozen=True)
class Setting:
    """A stream and the network that learns it."""

    name: str
    data: str
    """Which data set; where it lies is no part of a result."""
    network: str
    scenario: Scenario
    tasks: int
    train_per_class: int | None = None
    train_per_task: int | None = None
    test_per_class: int | None = None

    def stream(self, source: str, seed: int, *, is_tuning: bool) -> Stream:
        """The tasks of a seed; for tuning their test images are held-out training images."""
        config = StreamConfig(
            scenario=self.scenario,
            tasks=self.tasks,
            seed=seed,
            train_per_class=self.train_per_class,
            train_per_task=self.train_per_task,
            test_per_class=HELD_OUT_PER_CLASS if is_tuning else self.test_per_class,
            validation_ratio=HELD_OUT_RATIO if is_tuning else 0.0,
        )
        return stream.build(datasets.load(source), config)


@dataclass(frozen=True)
class Case:
    """What is run with several seeds; `exemplars` are of each task, 0 where nothing is kept."""

    setting: Setting
    arm: Arm
    exemplars: int


@dataclass(frozen=True)
class Run:
    """One pass over a stream."""

    case: Case
    learning_rate: float
    is_tuning: bool = False


@dataclass(frozen=True)
class Experiment:
    """A setting with all that is compared in it."""

    setting: Setting
    arms: tuple[Arm, ...]
    exemplars: tuple[int, ...]
    """Of each task. Learning rates are looked for at the first number, and at the others from there on."""
    tuning_seeds: tuple[int, ...]
    raw_at: int | None
    """The number of exemplars at which there is a memory of raw pixels, too."""

    def cases(self, exemplars: int) -> list[Case]:
        """The lines of the table at this number of exemplars, methods without a memory included."""
        return [
            Case(self.setting, arm, 0 if arm.memory == "none" else exemplars)
            for arm in self.arms
            if arm.memory != "raw" or exemplars == self.raw_at
        ]

    @property
    def tuned(self) -> list[Case]:
        """What has learning rates of its own, in the order in which these are looked for."""
        cases = [case for exemplars in self.exemplars for case in self.cases(exemplars)]
        return list(dict.fromkeys(case for case in cases if case.arm.memory != "raw"))


@dataclass(frozen=True)
class Runs:
    """Kept runs, and how more are made."""

    folder: Path
    sources: Mapping[str, str]
    """Where each data set lies; runs of others are left out."""
    device: str
    processes: int
    deadline: float
    """Of `time.monotonic`; no run is started after it."""

    def load(self, jobs: Sequence[Job]) -> dict[Job, Result]:
        """The results that there are."""
        return kept.load(jobs, self.folder)

    def make(self, jobs: Sequence[Job]) -> bool:
        """Run those that are not kept yet; returns whether all of them are now."""
        possible = [job for job in jobs if job.config.case.setting.data in self.sources]
        results = kept.collect(
            possible,
            partial(execute, sources=self.sources, device=self.device),
            folder=self.folder,
            processes=self.processes,
            minutes=max(0.0, self.deadline - time.monotonic()) / 60,
            tell=lambda job, result: f"ACC {100 * result['acc']:.1f}{' FAILED' if result['failure'] else ''}",
        )
        return len(results) == len(jobs)


def execute(job: Job, *, sources: Mapping[str, str], device: str = "cpu") -> Result:
    """Learn the stream of a job, whose configuration is a `Run`.

    Args:
        job: what to run.
        sources: where each data set lies, as `datasets.load` takes it.
        device: of the network.
    """
    run: Run = job.config
    case = run.case
    tasks = case.setting.stream(sources[case.setting.data], job.seed, is_tuning=run.is_tuning)
    runtime = Runtime(RuntimeConfig(device=device), tasks, seed=job.seed)
    options = {**dict(case.arm.options), "lr": run.learning_rate}
    learner = methods.build(case.arm.method, runtime, network=case.setting.network, options=options)
    memory = memory_of(case.arm)
    at_random = [] if run.is_tuning else _accuracies(learner, tasks.tasks, learned=-1)
    matrix: list[list[float | None]] = []
    result: Result = {"device": device, "failure": None, "bwt": None, "fwt": None, "forgetting": None}
    try:
        # A joint learner begins afresh with every task, so its last one is all of it.
        for task in tasks.tasks[-1:] if case.arm.method == "joint" else tasks.tasks:
            learner.learn(task, memory, _silent)
            if case.exemplars:
                memory.add(Learned(task.index, chosen_images(task, case.exemplars, seed=job.seed), seed=job.seed))
            if task is tasks.tasks[-1] or not run.is_tuning:
                matrix.append(_accuracies(learner, tasks.tasks[: task.index + 2], learned=task.index))
        result |= _scores(tasks, matrix, at_random)
    except FloatingPointError as error:
        result |= {"failure": {"task": task.index, "why": str(error)}, "acc": _chance(tasks)}
    if run.is_tuning:
        return dict(_rounded(result))
    on_memory = [] if result["failure"] else accuracies_on_memory(learner, memory, tasks)
    steps = sum(-(-len(task.train) // options["batch_size"]) for task in tasks.tasks)
    result |= {
        "matrix": matrix,
        "at_random": at_random,
        "on_memory": on_memory,
        "over_fitting": over_fitting(on_memory, _present(matrix[-1])) if on_memory else None,
        "corrected_ratio": getattr(learner, "corrected_steps", 0) / steps,
        "bytes_per_task": round(memory.used_bytes / len(tasks.tasks)),
    }
    return dict(_rounded(result))


def memory_of(arm: Arm) -> Memory:
    """A memory in this process that keeps whatever it is given."""
    if arm.memory == "none":
        return NoMemory()
    return local_memory(
        LocalConfig(kind=arm.memory, budget_bytes=AMPLE_BYTES, share_by="task", ranking="random", quality=QUALITY)
    )


def chosen_images(task: Task, count: int, *, seed: int) -> Examples:
    """Random training images of a task, the first `count` of an order that does not depend on `count`."""
    rows = np.random.default_rng([seed, task.index]).permutation(len(task.train))[:count]
    return task.train.select(np.sort(rows))


def _accuracies(learner: Learner, tasks: Sequence[Task], *, learned: int) -> list[float | None]:
    return [evaluation.accuracy(learner.scores, learner.runtime, task, learned=learned) for task in tasks]


def accuracies_on_memory(learner: Learner, memory: Memory, tasks: Stream) -> list[float]:
    """The accuracy on the exemplars of each task; none where nothing is kept."""
    count = sum(sum(classes.values()) for classes in memory.counts().values())
    if not count:
        return []
    (everything,) = memory.walk(count)
    remembered = [
        replace(tasks.tasks[index], test=Examples.of_arrays(batch.images, batch.class_ids))
        for index, batch in by_task(everything).items()
    ]
    return _present(_accuracies(learner, remembered, learned=len(tasks.tasks) - 1))


def over_fitting(on_memory: Sequence[float], on_test: Sequence[float]) -> float:
    """Of the tasks that were replayed: all but the last."""
    return fmean(on_memory[:-1]) - fmean(on_test[: len(on_memory) - 1])


def _scores(tasks: Stream, matrix: Matrix, at_random: Sequence[float | None]) -> dict[str, float | None]:
    """ACC and, where there is a row for every task, what else is made of the matrix."""
    if len(matrix) < len(tasks.tasks):
        return {"acc": fmean(_present(matrix[-1]))}
    found = evaluation.metrics(matrix, test_counts=[len(task.test) for task in tasks.tasks], at_random=at_random)
    return {name: getattr(found, name) for name in ("acc", "bwt", "fwt", "forgetting")}


def _present(values: Sequence[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _rounded(value: Any) -> Any:
    """Floats have four places, wherever they are."""
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return round(value, 4) if isinstance(value, float) else value


def _chance(tasks: Stream) -> float:
    """The accuracy of guessing among the labels that compete after the last task."""
    competing = tasks.tasks[-1].classes if tasks.task_is_given else tasks.class_order
    return 1 / len(competing)


def _silent(done: int, total: int, *, loss: torch.Tensor) -> None:
    """No bar."""
