"""Show a run on a terminal: a bar for the current phase, one line per finished task."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from engram_trainer.loop import Watch
from engram_trainer.report import Report, seconds_of
from engram_trainer.stream import Stream, Task

PHASES = {"learn": "learning", "remember": "storing", "balance": "balancing", "evaluate": "evaluating"}


class Bars:
    """A `loop.Watch` on a console; off a terminal only the lines are printed."""

    def __init__(self, console: Console, *, label: str = "") -> None:
        self._console, self._label = console, label
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._bar: TaskID | None = None
        self._phase = ""
        self._name = ""

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._progress.stop()

    def task(self, task: Task, stream: Stream) -> None:
        """A task begins."""
        self._name = f"{self._label}task {task.index + 1}/{len(stream.tasks)}"
        if stream.visits is not stream.tasks:
            self._name += f", visit {task.visit + 1}/{len(stream.visits)}"
        self._phase = ""

    def phase(self, name: str, done: int, total: int, *, note: str = "") -> None:
        """So much of a phase of the task is done."""
        if name != self._phase:
            if self._bar is not None:
                self._progress.remove_task(self._bar)
            self._bar = self._progress.add_task(f"{self._name} {PHASES.get(name, name)}", total=total, note=note)
            self._phase = name
        if self._bar is not None:
            self._progress.update(self._bar, completed=done, total=total, note=note)

    def finished(self, report: Report) -> None:
        """A task is evaluated."""
        if self._bar is not None:
            self._progress.remove_task(self._bar)
            self._bar = None
        metrics, memory = report.metrics, report.memory[-1]
        if metrics is None:
            return
        kept = ""
        if memory["exemplars"]:
            kept = f"; memory: {memory['exemplars']:,} exemplars in {memory['used_bytes']:,} bytes"
            if memory.get("quality"):
                kept += f", quality {memory['quality']}"
        seconds = seconds_of(report.seconds[-1])
        self._console.print(
            f"{self._name}: accuracy so far [bold]{metrics.last:.1%}[/bold] ({seconds:.1f} s){kept}",
            highlight=False,
            soft_wrap=True,
        )


class Watches:
    """Several `loop.Watch`es as one."""

    def __init__(self, watches: Sequence[Watch]) -> None:
        self._watches = watches

    def task(self, task: Task, stream: Stream) -> None:
        """A task begins."""
        for watch in self._watches:
            watch.task(task, stream)

    def phase(self, name: str, done: int, total: int, *, note: str = "") -> None:
        """So much of a phase of the task is done."""
        for watch in self._watches:
            watch.phase(name, done, total, note=note)

    def finished(self, report: Report) -> None:
        """A task is evaluated."""
        for watch in self._watches:
            watch.finished(report)
