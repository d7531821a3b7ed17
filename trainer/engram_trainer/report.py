"""Write the results of a run to its folder: `report.json`, `accuracy.png` and `matrix.png`.

report.json, fractions unless the name says otherwise:

    run, config, environment     the run's id; everything that defines it; versions, git commit, platform, threads
    tasks                        classes, names, numbers of images of every task, all its visits together
    matrix, at_random, metrics   R, b and the numbers derived from them (see `evaluation`)
    memory                       what the memory held after each task, whether it was filled online or once the task was
                                 learned, and the service's decisions
    paper                        of a recipe: the published numbers, where they were read, and ours
    seconds                      of each task by phase, and how long its steps waited for exemplars; the only member
                                 that differs between two equal runs
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engram import files
from engram_trainer import recipes
from engram_trainer.evaluation import Metrics, metrics
from engram_trainer.stream import Stream

PACKAGES = ("engram", "numpy", "pillow", "simplejpeg", "torch", "scipy", "onnx")


@dataclass
class Report:
    """The results of a run so far."""

    run: str
    config: dict[str, Any]
    environment: dict[str, Any]
    tasks: list[dict[str, Any]]
    at_random: list[float | None]
    matrix: list[list[float | None]] = field(default_factory=list)
    memory: list[dict[str, Any]] = field(default_factory=list)
    seconds: list[dict[str, float]] = field(default_factory=list)

    @property
    def metrics(self) -> Metrics | None:
        """The numbers of the tasks finished so far; None before the first."""
        if not self.matrix:
            return None
        return metrics(
            self.matrix,
            test_counts=[task["test_images"] for task in self.tasks],
            at_random=self.at_random,
            visits=self.config["stream"].get("visits"),
        )

    @property
    def paper(self) -> list[dict[str, Any]]:
        """The published numbers of a recipe beside ours; none where the run is of no recipe, or not finished."""
        recipe = recipes.RECIPES.get(self.config.get("recipe") or "")
        if recipe is None or len(self.matrix) < len(self.tasks) or self.metrics is None:
            return []
        return recipes.beside(recipe, asdict(self.metrics))

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain JSON values."""
        found = None if self.metrics is None else asdict(self.metrics)
        return {**asdict(self), "metrics": found, "paper": self.paper}

    def save(self, folder: Path) -> None:
        """Write `report.json`, whole or not at all."""
        files.write_durably(folder / "report.json", (json.dumps(self.to_json(), indent=1) + "\n").encode())


def seconds_of(phases: Mapping[str, float]) -> float:
    """How long a task took: the sum of its phases, which waiting for exemplars is a part of."""
    return sum(seconds for name, seconds in phases.items() if name != "replay_wait")


def describe_tasks(stream: Stream) -> list[dict[str, Any]]:
    """Classes and numbers of images of every task."""
    return [
        {
            "task": task.index,
            "classes": list(task.classes),
            "class_names": [stream.class_names[class_id] for class_id in task.classes] if stream.class_names else [],
            "train_images": len(task.train),
            "test_images": len(task.test),
        }
        for task in stream.tasks
    ]


def environment() -> dict[str, Any]:
    """Versions, git commit, platform and threads: what a number depends on beside its configuration."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "git_commit": git_commit(),
        "threads": torch.get_num_threads(),
    }


def git_commit() -> str | None:
    """The commit of this source tree, with `+` when files differ from it; None outside a git checkout."""
    here = Path(__file__).parent
    try:
        # --full-name and the pathspec make sure that this file is tracked: site-packages inside a checkout is not ours.
        subprocess.run(["git", "ls-files", "--error-unmatch", __file__], cwd=here, check=True, capture_output=True)
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, check=True, capture_output=True, text=True)
        changed = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=here, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+" if changed.stdout else "")


def plot(report: Report, folder: Path) -> None:
    """Draw `accuracy.png` (incremental accuracy after each task) and `matrix.png` (R)."""
    found = report.metrics
    if found is None:
        return
    title = f"{report.config['method']}, {report.config['memory']['kind']} memory"
    curves({title: list(found.incremental)}, folder / "accuracy.png", ylabel="accuracy on all classes seen so far")
    _matrix(report, title, folder / "matrix.png")


def curves(
    values: dict[str, list[float]],
    path: Path,
    *,
    ylabel: str,
    title: str = "",
    half_widths: Mapping[str, Sequence[float]] | None = None,
) -> None:
    """Draw one line per name over the tasks, labelled at its end; `half_widths` are those of a band around it."""
    figure, axes = _figure(6.4, 4.0)
    for name, ys in values.items():
        (line,) = axes.plot(range(1, len(ys) + 1), ys, marker="o", label=name)
        if half_widths is not None:
            lower, upper = (np.add(ys, sign * np.asarray(half_widths[name])) for sign in (-1, 1))
            axes.fill_between(range(1, len(ys) + 1), lower, upper, color=line.get_color(), alpha=0.15)
    lowest = 0.0
    for ys in sorted(values.values(), key=lambda ys: ys[-1]):
        # A label is 0.04 of the axis high; one that would cover the label below it moves up.
        height = max(ys[-1], lowest)
        lowest = height + 0.045
        axes.annotate(f"{ys[-1]:.1%}", (len(ys) + 0.1, height), va="center", fontsize=9)
    longest = max(len(ys) for ys in values.values())
    axes.set_xticks(range(1, longest + 1))
    axes.set_xlim(0.8, longest + 0.6)
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_xlabel("tasks learned")
    axes.set_ylabel(ylabel)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left")
    if title:
        axes.set_title(title)
    figure.savefig(path)


def _matrix(report: Report, title: str, path: Path) -> None:
    count = len(report.tasks)
    values = [[float("nan") if cell is None else cell for cell in row] for row in report.matrix]
    padded = [row + [float("nan")] * (count - len(row)) for row in values]
    figure, axes = _figure(1.8 + 0.55 * count, 1.4 + 0.5 * len(padded))
    axes.imshow(padded, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    for i, row in enumerate(padded):
        for j, value in enumerate(row):
            if value == value:
                axes.text(j, i, f"{100 * value:.0f}", ha="center", va="center", color="w" if value < 0.6 else "k")
    axes.set_xticks(range(count), [str(task + 1) for task in range(count)])
    axes.set_yticks(range(len(padded)), [str(task + 1) for task in range(len(padded))])
    axes.set_xlabel("accuracy (%) on task")
    axes.set_ylabel("after learning task")
    axes.set_title(title, fontsize=10)
    figure.savefig(path)


def _figure(width: float, height: float) -> tuple[Any, Any]:
    # Not pyplot: it keeps global state and looks for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()
