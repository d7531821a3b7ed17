"""Run a learner through a stream of tasks, with checkpoints from which a killed run resumes.

    RUN/run.json         the run's id and configuration, written first, and the error that it failed with
    RUN/checkpoint.pt    tensors and plain values only (loads with `weights_only=True`), replaced by rename
    RUN/report.json      results so far, and two pictures (see `report`)
    RUN/mirror/          the local copy of the service's packs

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
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from engram import files
from engram.client import Client
from engram.errors import Conflict, EngramError, NotFound
from engram.schemas import Ingest, IngestOptions
from engram_trainer import datasets, extractor, methods, stream
from engram_trainer.configuration import MemoryConfig, RunConfig, differences
from engram_trainer.evaluation import accuracy
from engram_trainer.local_memory import LocalConfig
from engram_trainer.memory import Learned, Memory, NoMemory, ServiceMemory
from engram_trainer.methods import Learner
from engram_trainer.plain_memory import local_memory
from engram_trainer.report import Report, describe_tasks, environment, plot
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
    folder, watch = Path(folder), watch or Silent()
    _check_device(config.runtime.device)
    tasks = stream.build(datasets.load(config.data, resize=config.resize), config.stream)
    learner = methods.build(
        config.method,
        stream=tasks,
        network=config.network,
        seed=config.seed,
        device=config.runtime.device,
        options=config.options,
    )
    identity = _identify(config, folder, resume=resume)
    try:
        with _open_memory(config.memory, run=identity, folder=folder, is_new=not resume, watch=watch) as memory:
            running = _Run(config, folder, identity, tasks, learner, memory)
            running.restore()
            for task in tasks.tasks[len(running.report.matrix) :]:
                watch.task(task, tasks)
                running.learn(task, watch)
                running.remember(task, watch)
                running.evaluate(task, watch)
                watch.finished(running.report)
    except Exception as error:
        with suppress(OSError):  # what failed may be the disk
            _note(config, folder, identity, failed=str(error))
        raise
    if pictures:
        plot(running.report, folder)
    return running.report


class _Run:
    """A run between two checkpoints."""

    def __init__(
        self, config: RunConfig, folder: Path, identity: str, tasks: Stream, learner: Learner, memory: Memory
    ) -> None:
        self.config, self.folder, self.stream, self.learner, self.memory = config, folder, tasks, learner, memory
        self.report = Report(identity, config.to_json(), environment(), describe_tasks(tasks), [])
        self.is_learned = False
        """Whether the task after the finished ones is learned, but perhaps not yet remembered."""
        self.onnx: bytes | None = None
        self.seconds: dict[str, float] = {}

    def restore(self) -> None:
        """Go back to the last checkpoint, or measure the accuracies at random when there is none."""
        path = self.folder / "checkpoint.pt"
        if not path.is_file():
            self.report.at_random = [
                accuracy(self.learner.scores, self.stream, task, learned=-1) for task in self.stream.tasks
            ]
            return
        state = torch.load(path, map_location=self.config.runtime.device, weights_only=True)
        self.learner.load_state_dict(state["learner"])
        self.memory.load_state_dict(state["memory"])
        self.is_learned, self.onnx = state["is_learned"], state["onnx"]
        results = json.loads(state["results"])
        self.seconds = results.pop("partial_seconds")
        for name, value in results.items():
            setattr(self.report, name, value)

    def checkpoint(self) -> None:
        """Everything so far is on the disk afterwards."""
        results = {name: asdict(self.report)[name] for name in ("at_random", "matrix", "memory", "seconds")}
        state = {
            "learner": self.learner.state_dict(),
            "memory": self.memory.state_dict(),
            "is_learned": self.is_learned,
            "onnx": self.onnx,
            "results": json.dumps({**results, "partial_seconds": self.seconds}),
        }
        buffer = io.BytesIO()
        torch.save(state, buffer)
        files.write_durably(self.folder / "checkpoint.pt", buffer.getvalue())

    def learn(self, task: Task, watch: Watch) -> None:
        """The task is learned and its extractor exported."""
        if self.is_learned:
            return
        with self._timed("learn"):
            self.learner.learn(task, self.memory, _steps(watch, "learn"))
        if self.config.memory.kind == "service":
            with self._timed("export"):
                self.onnx = extractor.to_onnx(self.learner.extractor(), self.stream.shape)
        self.is_learned = True
        self.checkpoint()

    def remember(self, task: Task, watch: Watch) -> None:
        """The memory holds exemplars of the task, and the learner is balanced on all exemplars."""
        with self._timed("remember"):
            seed = int(np.random.default_rng([self.config.seed, task.index]).integers(2**31))
            self.memory.add(
                Learned(
                    task.index, task.train_images, task.train_class_ids, self.onnx, embed=self.learner.embed, seed=seed
                )
            )
        with self._timed("balance"):
            self.learner.balance(task, self.memory, _steps(watch, "balance"))

    def evaluate(self, task: Task, watch: Watch) -> None:
        """R has the task's row: all tasks so far and, for FWT, the next."""
        row: list[float | None] = []
        with self._timed("evaluate"):
            for each in self.stream.tasks[: task.index + 2]:
                row.append(accuracy(self.learner.scores, self.stream, each, learned=task.index))
                watch.phase("evaluate", each.index + 1, min(task.index + 2, len(self.stream.tasks)))
        self.report.matrix.append(row)
        self.report.memory.append(self.memory.describe())
        self.report.seconds.append(self.seconds)
        self.is_learned, self.onnx, self.seconds = False, None, {}
        self.checkpoint()
        self.report.save(self.folder)

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = round(time.perf_counter() - start, 3)


def _steps(watch: Watch, name: str) -> methods.OnStep:
    def step(done: int, total: int, *, loss: float) -> None:
        watch.phase(name, done, total, note=f"loss {loss:.3f}")

    return step


def _check_device(name: str) -> None:
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from error


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
    (folder / "checkpoint.pt").unlink(missing_ok=True)
    identity = uuid.uuid4().hex[:12]
    _note(config, folder, identity)
    return identity


def _note(config: RunConfig, folder: Path, identity: str, **more: str) -> None:
    """run.json says which run this is."""
    content = {"run": identity, "config": config.to_json(), **more}
    files.write_durably(folder / "run.json", (json.dumps(content, indent=1) + "\n").encode())


def _has_checkpoint(folder: Path) -> bool:
    return (folder / "checkpoint.pt").is_file()


@contextmanager
def _open_memory(config: MemoryConfig, *, run: str, folder: Path, is_new: bool, watch: Watch) -> Iterator[Memory]:
    """The memory that a configuration names; a service's buffer is created if need be."""
    if config.kind == "none":
        yield NoMemory()
        return
    options = IngestOptions(
        ranking=config.ranking,
        definition=config.definition,
        rule=config.rule,
        epsilon=config.epsilon,
        block=config.block,
    )
    if config.kind != "service":
        yield local_memory(
            LocalConfig(
                kind=config.kind,
                budget_bytes=config.budget_bytes,
                per=config.per,
                share_by=config.share_by,
                ranking="random" if config.ranking == "random" else "herding",
                quality=config.quality,
                subsampling=config.subsampling,
            ),
            options,
        )
        return
    name = config.buffer or f"run-{run}"
    with Client(config.url) as client:
        is_made = _create_buffer(client, name, config, is_new=is_new)
        try:
            yield ServiceMemory(
                client, name, options=options, run=run, folder=folder / "mirror", watch=_ingest_watch(watch)
            )
        except Exception:
            with suppress(EngramError):  # the service may be what failed
                if is_made and not client.buffer(name).tasks:
                    client.delete_buffer(name)
            raise


def _create_buffer(client: Client, name: str, config: MemoryConfig, *, is_new: bool) -> bool:
    """The buffer exists; a new run finds nothing in it. True if it was made now.

    Raises:
        Conflict: a new run was given the buffer of another one.
    """
    create = partial(
        client.create_buffer,
        name,
        budget_bytes=config.budget_bytes,
        per=config.per,
        share_by=config.share_by,
        subsampling=config.subsampling,
        quality=config.quality,
    )
    try:
        create()
        return True
    except Conflict:
        buffer = create(exist_ok=True)
    if is_new and buffer.tasks:
        raise Conflict(f"buffer {name!r} already holds {len(buffer.tasks)} tasks; name a new buffer for a new run")
    return False


def _ingest_watch(watch: Watch) -> Callable[[Ingest], None]:
    def see(ingest: Ingest) -> None:
        watch.phase("remember", ingest.images_done, ingest.images_total, note=ingest.state)

    return see
