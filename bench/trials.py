"""What training found at every quality, and what could be asked beforehand, as kept results have it.

A trial is one cell of `grid` with one seed. Runs of LUCIR that `budget.py` has kept are trials, too, where a seed has
its runs at fixed qualities and the selecting one, whose log volumes are kept; their cells' names begin with `budget`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import grid
from gaps import Gaps
from kept import Job, Result

from engram.schemas import CANDIDATE_QUALITIES


@dataclass(frozen=True)
class Trial:
    """One cell with one seed: what training found at each quality, and what can be asked before it."""

    cell: str
    seed: int
    last: Mapping[int, float]
    """Accuracy in percent after the last task, by quality; 0 where training diverged."""
    tasks: Sequence[Gaps]


Trials = Mapping[str, Sequence[Trial]]
"""By cell."""


def best_quality(trials: Sequence[Trial]) -> int:
    """The one of highest mean accuracy; of equals the lowest."""
    return max(sorted(trials[0].last), key=lambda quality: fmean(trial.last[quality] for trial in trials))


def trials_of(results: Mapping[Job, Result]) -> dict[str, list[Trial]]:
    """Of every cell of which there is any seed, by name, seeds ascending."""
    found: dict[str, list[Trial]] = {}
    for job, result in sorted(results.items(), key=lambda item: item[0].seed):
        if result["gaps"]:
            last = {int(quality): grid.last_accuracy(result, int(quality)) or 0.0 for quality in result["runs"]}
            found.setdefault(job.config.cell.name, []).append(
                Trial(job.config.cell.name, job.seed, last, result["gaps"])
            )
    return {name: _common(trials) for name, trials in found.items()}


def trials_of_budget(folder: Path) -> dict[str, list[Trial]]:
    """Cells of full size: the runs of `budget.py` at fixed qualities, where their seed's selecting run is there, too.

    Candidates are the qualities of which all those seeds were trained.
    """
    runs: dict[tuple[str, int], dict[int | None, Result]] = {}
    for result in budget_results(folder):
        config = result["config"]
        if config["arm"]["kind"] == "strips" and dict(config["settings"])["codec_ratio"]:
            name = f"budget {config['data']} lucir 5 {config['budget_bytes']}"
            runs.setdefault((name, result["seed"]), {})[config["arm"]["quality"]] = result
    found: dict[str, list[Trial]] = {}
    for (name, seed), by_quality in sorted(runs.items()):
        last = {quality: result["last"] for quality, result in by_quality.items() if quality is not None}
        selecting = by_quality.get(None)
        if selecting is not None and selecting.get("gaps") and len(last) >= 3:
            found.setdefault(name, []).append(Trial(name, seed, last, selecting["gaps"]))
    return {name: _common(trials) for name, trials in found.items()}


def budget_results(folder: Path) -> list[Result]:
    """What `budget.py` has kept of LUCIR, with and without augmentation, with a budget for each class."""
    found = []
    for path in sorted(folder.glob("budget*/*/seed-*/*.json")):
        result: Result = json.loads(path.read_text())
        config = result["config"]
        is_table = not path.relative_to(folder).parts[0].startswith("budget-tuning")
        if is_table and config["method"] == "lucir" and config["per"] == "class":
            found.append(result)
    return found


def _common(trials: Sequence[Trial]) -> list[Trial]:
    """The same trials with the qualities that all of them have."""
    qualities = sorted(set.intersection(*(set(trial.last) for trial in trials)))
    return [
        replace(
            trial,
            last={quality: trial.last[quality] for quality in qualities},
            tasks=[_only(task, qualities) for task in trial.tasks],
        )
        for trial in trials
    ]


def _only(task: Gaps, qualities: Sequence[int]) -> Gaps:
    """The gaps at some qualities."""
    places = [task["qualities"].index(quality) for quality in qualities]

    def at(values: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        return {key: [each[place] for place in places] for key, each in values.items()}

    volumes = {name: each | {"coded": at(each["coded"])} for name, each in task["volumes"].items()}
    return task | {"qualities": list(qualities), "exemplars": at(task["exemplars"]), "volumes": volumes}


def cost_ratios(results: Iterable[Result]) -> list[float]:
    """CPU seconds of the trainings of each job over those of its selection."""
    found = []
    for result in results:
        runs = [run for run in result["runs"].values() if run is not None]
        selection = sum(task["cpu_seconds"] for task in result["gaps"])
        if selection and len(runs) == len(result["runs"]):
            trainings = result["base_cpu_seconds"] + sum(run["cpu_seconds"] for run in runs)
            found.append(trainings / selection)
    return found


def full_cost_ratios(results: Sequence[Result]) -> list[float]:
    """Of each selecting run of `budget.py` the seconds of a training for each candidate over those of its selection.

    A training is that very run less its selection, so that both were timed under the same load.
    """
    return [
        len(CANDIDATE_QUALITIES)
        * (result["learning_seconds"] - result["selection_seconds"])
        / result["selection_seconds"]
        for result in results
        if result["config"]["arm"] == {"kind": "strips", "quality": None} and result.get("selection_seconds")
    ]
