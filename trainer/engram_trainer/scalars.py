"""Write the course of a run to TensorBoard or Weights & Biases, where one of them is installed.

accuracy/so_far, accuracy/average_incremental       after each task, over the number of tasks learned
accuracy/task_1, ...                                the same, of each task's test images
memory/exemplars, memory/used_bytes                 the same
seconds/learn, ...                                  of each phase of each task
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Protocol

from engram.errors import NotFound
from engram_trainer.report import Report
from engram_trainer.stream import Stream, Task

Log = Literal["tensorboard", "wandb"]


class Writer(Protocol):
    """What takes one value of one curve."""

    def add(self, name: str, value: float, step: int) -> None:
        """A point of a curve."""

    def close(self) -> None:
        """Everything is written."""


class Scalars:
    """A `loop.Watch` that writes what a report gains with each task."""

    def __init__(self, writer: Writer) -> None:
        self._writer = writer

    def __enter__(self) -> Scalars:
        return self

    def __exit__(self, *error: object) -> None:
        self._writer.close()

    def task(self, task: Task, stream: Stream) -> None:
        """Nothing."""

    def phase(self, name: str, done: int, total: int, *, note: str = "") -> None:
        """Nothing."""

    def finished(self, report: Report) -> None:
        """The values of the last finished task."""
        step, metrics = len(report.matrix), report.metrics
        if metrics is None:
            return
        memory = report.memory[-1]
        values: dict[str, float | None] = {
            "accuracy/so_far": metrics.last,
            "accuracy/average_incremental": metrics.average_incremental,
            **{f"accuracy/task_{task + 1}": value for task, value in enumerate(report.matrix[-1][:step])},
            **{f"memory/{name}": memory.get(name) for name in ("exemplars", "used_bytes")},
            **{f"seconds/{name}": value for name, value in report.seconds[-1].items()},
        }
        for name, value in values.items():
            if value is not None:
                self._writer.add(name, value, step)


def open_log(log: Log, folder: Path) -> Scalars:
    """A writer for a run in a folder.

    Raises:
        NotFound: the package is not installed.
    """
    return Scalars(_TensorBoard(folder / "tensorboard") if log == "tensorboard" else _Wandb(folder))


class _TensorBoard:
    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise NotFound("--log tensorboard needs a package: pip install 'engram[log]'") from error
        self._open, self._folder = SummaryWriter, folder
        self._writer: Any = None

    def add(self, name: str, value: float, step: int) -> None:
        # Only now: a new run wants its folder empty.
        self._writer = self._writer or self._open(str(self._folder))
        self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class _Wandb:
    def __init__(self, folder: Path) -> None:
        try:
            import wandb
        except ImportError as error:
            raise NotFound("--log wandb needs a package: pip install 'engram[log]'") from error
        self._wandb, self._folder = wandb, folder
        self._run: Any = None

    def add(self, name: str, value: float, step: int) -> None:
        self._run = self._run or self._wandb.init(project="engram", name=self._folder.name, dir=str(self._folder))
        self._run.log({name: value}, step=step)

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()
