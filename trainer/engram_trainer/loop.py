"""Run a learner through a stream of tasks, with checkpoints from which a killed run resumes.

    RUN/run.json         the run's id and configuration, written first, and the error that it failed with
    RUN/checkpoint.pt    tensors and plain values only (loads with `weights_only=True`), replaced by rename
    RUN/partial.pt       the same between two epochs of a phase, some time after the last one
    RUN/report.json      results so far, and two pictures (see `report`)
    RUN/mirror/          the local copy of the service's packs
    RUN/buffer.txt       that the buffer which the configuration names is this run's own

For each task: learn, export the extractor, *checkpoint*, hand the images to the memory, balance, evaluate,
*checkpoint*, report. A run killed before the first checkpoint of a task learns that task again, when the memory does
not hold it yet; killed after it, the memory is given the same bytes under the same key, which it takes once. So a
resumed run equals an uninterrupted one, bit for bit on a CPU.

A run that fails in its first task, because the budget is too small for one exemplar, say, leaves no empty buffer
behind, and its folder takes a run with another configuration.
"""

from __future__ import annotations

import io
import json
import pickle
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from engram import files
from engram.errors import Conflict, NotFound
from engram_trainer import datasets, extractor, methods, stream
from engram_trainer.configuration import RunConfig, differences
from engram_trainer.evaluation import accuracy
from engram_trainer.memory import Learned, Memory
from engram_trainer.methods import Learner
from engram_trainer.opening import open_memory
from engram_trainer.preparation import Preparation
from engram_trainer.processes import Place, beside
from engram_trainer.report import Report, describe_tasks, environment, plot
from engram_trainer.runtime import Runtime
from engram_trainer.steps import OnStep
from engram_trainer.stream import Stream, Task


class Watch(Protocol):
    """Told what a run is doing, for a progress bar."""

    def task(self, task: Task, stream: Stream) -> None:
        """A task begins."""

    def phase(self, name: str, done: int, total: int, *, note: str = "") -> None:
        """So much of a phase of the task is done."""

    def finished(self, report: Report) -> None:
        """A task is evaluated; the report has its row."""


class Silent:
    """A `Watch` that shows nothing."""

    def task(self, task: Task, stream: Stream) -> None:
        """Nothing."""

    def phase(self, name: str, done: int, total: int, *, note: str = "") -> None:
        """Nothing."""

    def finished(self, report: Report) -> None:
        """Nothing."""


def run(
    config: RunConfig,
    folder: str | Path,
    *,
    resume: bool = False,
    watch: Watch | None = None,
    pictures: bool = True,
) -> Report:
    """Learn all tasks of a stream and leave checkpoint, report and pictures in a folder.

    Args:
        config: everything that defines the run.
        folder: a new or empty folder, or one of a run that failed in its first task; with `resume` that of a run with
            the same configuration.
        resume: go on after the last checkpoint.
        watch: told of the progress.
        pictures: whether to draw the results; that takes about as long as a minimal run.

    Raises:
        NotFound: there is no run to resume in the folder.
        Conflict: the folder holds a run and `resume` is false, or the run there has another configuration.
        EngramError: the data, the service or the memory's budget.
        ValueError: the configuration contradicts itself or the data.
    """
    folder, count = Path(folder), config.runtime.processes
    if count == 1:
        report = _run(Place(), config, folder, None, resume=resume, watch=watch or Silent())
    else:
        identity = _identify(config, folder, resume=resume)
        with beside(partial(_run, config=config, folder=folder, identity=identity, resume=resume), count) as place:
            report = _run(place, config, folder, identity, resume=resume, watch=watch or Silent())
    if pictures:
        plot(report, folder)
    return report


def _run(
    place: Place, config: RunConfig, folder: Path, identity: str | None, *, resume: bool, watch: Watch | None = None
) -> Report:
    """What each process does; the first one alone writes."""
    watch = watch or Silent()
    tasks = stream.build(datasets.load(config.data, resize=config.resize), config.stream)
    prepare = config.prepare
    preparation = Preparation(tasks.shape, crop=prepare.crop, mean=prepare.mean, std=prepare.std)
    runtime = Runtime(config.runtime, tasks, seed=config.seed, preparation=preparation, place=place)
    learner = methods.build(config.method, runtime, network=config.network, options=config.options)
    identity = identity or _identify(config, folder, resume=resume)
    try:
        with open_memory(
            config.memory, learner, run=identity, folder=folder, is_new=not resume, tell=watch.phase
        ) as memory:
            running = _Run(config, folder, identity, runtime, learner, memory)
            running.restore()
            for task in tasks.visits[len(running.report.matrix) :]:
                watch.task(task, tasks)
                running.learn(task, watch)
                running.remember(task, watch)
                running.evaluate(task, watch)
                watch.finished(running.report)
    except Exception as error:
        if runtime.is_first:
            with suppress(OSError):  # what failed may be the disk
                _note(config, folder, identity, failed=str(error))
        raise
    return running.report


class _Run:
    """A run between two checkpoints."""

    def __init__(
        self, config: RunConfig, folder: Path, identity: str, runtime: Runtime, learner: Learner, memory: Memory
    ) -> None:
        self.config, self.folder, self.runtime, self.learner, self.memory = config, folder, runtime, learner, memory
        self.stream = runtime.stream
        self.report = Report(identity, config.to_json(), environment(), describe_tasks(self.stream), [])
        self.is_learned = False
        """Whether the task after the finished ones is learned, but perhaps not yet remembered."""
        self.onnx: bytes | None = None
        self.seconds: dict[str, float] = {}
        runtime.keeper = _Partial(folder / "partial.pt", identity, runtime)

    def restore(self) -> None:
        """Go back to the last checkpoint, or measure the accuracies at random when there is none."""
        path = self.folder / "checkpoint.pt"
        if not path.is_file():
            self.report.at_random = [
                accuracy(self.learner.scores, self.runtime, task, learned=-1) for task in self.stream.tasks
            ]
            return
        state = _read(path)
        if state is None:
            raise Conflict(f"{path} is damaged, so the run cannot go on; start it in a new folder")
        self.learner.load_state_dict(state["learner"])
        self.memory.load_state_dict(state["memory"])
        self.is_learned, self.onnx = state["is_learned"], state["onnx"]
        results = json.loads(state["results"])
        self.seconds = results.pop("partial_seconds")
        for name, value in results.items():
            setattr(self.report, name, value)
        if self.report.matrix and self.runtime.is_first:  # the run may have been killed before it wrote this
            self.report.save(self.folder)

    def checkpoint(self) -> None:
        """Everything so far is on the disk afterwards."""
        if not self.runtime.is_first:
            return
        results = {name: asdict(self.report)[name] for name in ("at_random", "matrix", "memory", "seconds")}
        state = {
            "learner": self.learner.state_dict(),
            "memory": self.memory.state_dict(),
            "is_learned": self.is_learned,
            "onnx": self.onnx,
            "results": json.dumps({**results, "partial_seconds": self.seconds}),
        }
        _write(self.folder / "checkpoint.pt", state)
        (self.folder / "partial.pt").unlink(missing_ok=True)

    def learn(self, task: Task, watch: Watch) -> None:
        """The task is learned and its extractor exported."""
        if self.is_learned:
            return
        with self._timed("learn"), self._waiting():
            self.learner.learn(task, self.memory, _steps(watch, "learn"))
        if self.config.memory.kind == "service" and self.runtime.is_first:
            with self._timed("export"):
                self.onnx = extractor.to_onnx(self.learner.extractor(), self.stream.shape)
        self.is_learned = True
        self.checkpoint()

    def remember(self, task: Task, watch: Watch) -> None:
        """The memory holds exemplars of the task, and the learner is balanced on all exemplars."""
        with self._timed("remember"):
            is_first_visit = all(each.index != task.index for each in self.stream.visits[: task.visit])
            if is_first_visit and not self.learner.fills_memory:
                self._hand_over(task)
        with self._timed("balance"), self._waiting():
            self.learner.balance(task, self.memory, _steps(watch, "balance"))

    def _hand_over(self, task: Task) -> None:
        learner = self.learner
        seed = int(np.random.default_rng([self.config.seed, task.visit]).integers(2**31))
        columns = learner.columns(task.train)
        self.memory.add(Learned(task.index, task.train, self.onnx, learner.embed, seed, columns))

    def evaluate(self, task: Task, watch: Watch) -> None:
        """R has the task's row: all tasks so far and, for FWT, the next."""
        row: list[float | None] = []
        met = 1 + max(each.index for each in self.stream.visits[: task.visit + 1])
        with self._timed("evaluate"):
            for each in self.stream.tasks[: met + 1]:
                row.append(accuracy(self.learner.scores, self.runtime, each, learned=task.visit))
                watch.phase("evaluate", each.index + 1, min(met + 1, len(self.stream.tasks)))
        self.report.matrix.append(row)
        filled = "online" if self.learner.fills_memory else "task"
        self.report.memory.append({**self.memory.describe(), "filled": filled} if self.runtime.is_first else {})
        self.report.seconds.append(self.seconds)
        self.is_learned, self.onnx, self.seconds = False, None, {}
        self.checkpoint()
        if self.runtime.is_first:
            self.report.save(self.folder)

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 3)

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        """The part of `seconds` in which steps waited for exemplars."""
        before = self.runtime.replay_wait_s
        yield
        waited = self.seconds.get("replay_wait", 0.0) + self.runtime.replay_wait_s - before
        self.seconds["replay_wait"] = round(waited, 4)


class _Partial:
    """The state between two epochs, in a file of its own, replaced by rename.

    Without it a run goes on at the last task's end, so it is only written when that would lose some time.
    """

    def __init__(self, path: Path, identity: str, runtime: Runtime) -> None:
        self._path, self._identity, self._runtime = path, identity, runtime
        self._saved_at = time.monotonic()

    def load(self, *, visit: int, purpose: int) -> dict[str, Any] | None:
        """What was saved last, if it was this phase of this run."""
        if not self._path.is_file():
            return None
        found = _read(self._path)
        if found is None:
            return None
        is_this = (found["run"], found["visit"], found["purpose"]) == (self._identity, visit, purpose)
        return found["state"] if is_this else None

    def save(self, state: Callable[[], dict[str, Any]], *, visit: int, purpose: int) -> None:
        """Keep it, unless the last one was saved a moment ago."""
        if self._runtime.is_first and time.monotonic() - self._saved_at >= self._runtime.config.checkpoint_s:
            _write(self._path, {"run": self._identity, "visit": visit, "purpose": purpose, "state": state()})
            self._saved_at = time.monotonic()


def _read(path: Path) -> dict[str, Any] | None:
    """The state in a file; None if it is damaged. Its tensors are on the CPU: memories are, and modules copy theirs."""
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError):
        return None
    return state


def _write(path: Path, state: dict[str, Any]) -> None:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    files.write_durably(path, buffer.getvalue())


def _steps(watch: Watch, name: str) -> OnStep:
    shown_at = 0.0

    def step(done: int, total: int, *, loss: torch.Tensor) -> None:
        nonlocal shown_at
        now = time.monotonic()
        if done == total or now - shown_at >= SHOW_EVERY_S:  # the loss is waited for, so not at every step
            watch.phase(name, done, total, note=f"loss {float(loss):.3f}")
            shown_at = now

    return step


SHOW_EVERY_S = 0.2


def _identify(config: RunConfig, folder: Path, *, resume: bool) -> str:
    """The id of the run in a folder: a new one, or that of the run to go on with.

    A run without a checkpoint has nothing to lose, so it may be started again, and with another configuration. So may
    one that failed in its first task, with another configuration: what it learned is good for nothing else.

    Raises:
        NotFound: there is none to go on with.
        Conflict: there is one that must not be overwritten, or other files are there.
    """
    path, now = folder / "run.json", config.to_json()
    if resume and not path.is_file():
        raise NotFound(f"there is no run to resume in {folder} (no run.json); leave out --resume to start one there")
    if path.is_file():
        found = json.loads(path.read_text())
        changed = differences(found["config"], now)
        if not changed and (resume or not _has_checkpoint(folder)):
            _note(config, folder, found["run"])
            if not resume:
                (folder / "partial.pt").unlink(missing_ok=True)
            return str(found["run"])
        has_failed = "failed" in found and not (folder / "report.json").is_file()
        if _has_checkpoint(folder) and (resume or not changed or not has_failed):
            anew = "; without --resume it is started anew" if has_failed else ""
            raise Conflict(
                f"the run in {folder} cannot go on with another configuration: {'; '.join(changed)}{anew}"
                if resume
                else f"{folder} already holds run {found['run']}; resume it, or choose another folder"
            )
    elif folder.is_dir() and any(folder.iterdir()):
        raise Conflict(f"{folder} holds other files; choose a new folder for the run")
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("checkpoint.pt", "partial.pt"):
        (folder / name).unlink(missing_ok=True)
    identity = uuid.uuid4().hex[:12]
    _note(config, folder, identity)
    return identity


def _note(config: RunConfig, folder: Path, identity: str, **more: str) -> None:
    """run.json says which run this is."""
    content = {"run": identity, "config": config.to_json(), **more}
    files.write_durably(folder / "run.json", (json.dumps(content, indent=1) + "\n").encode())


def _has_checkpoint(folder: Path) -> bool:
    return (folder / "checkpoint.pt").is_file()
