"""Which criterion chooses the quality that training would have chosen?

A criterion compares the volume that a task's images span coded with what they span as they are: R, under an embedding,
in a form. The lowest quality whose R is within epsilon of 1 is taken, the highest if none is (`engram.selection`).
Which embedding (the learner's features, pixels, or both, each near 1), which form (raw, per sample, log ratio) and
which epsilon are open. Two things are asked of each:

**Is it near the best?** A cell (`grid`) is trained at every quality with several seeds. In every seed the criterion is
asked after the first task, as a buffer asks it, and its last accuracy stands beside that of the quality that a grid
search with the *other* seeds would have taken: this is what it is *behind*. Against the best of all seeds, found with
the noise of the very runs that are compared, everything looks worse, a constant quality, too: *at most*. How criteria
differ from each other is the same in both.

**Is it stable?** Each task's own choice, and R at every task: as the learner's features change, R under them may drift.

Criteria are chosen on one half of the cells and reported on the other. The halves are fixed by a hash of the cells'
names (`halves`). The rule is fixed, too: in the order of `FAMILIES`, simplest first, the first that with its best
epsilon is no more than a point behind on the first half; if there is none, the one that is least behind. Constant
qualities, which need no criterion, stand beside as a yardstick. Runs of LUCIR at full size that `budget.py` has kept
are cells, too (their names begin with `budget`): they are only reported.

`grid_cost_over_selection` is what five trainings take over what the selection takes (ranking, coding, embedding and
comparing at every quality, for every task) in the runs of `budget.py`; `..._small` is the same of the cells, whose
tasks are so small that selection, which looks at no more images than a large task would give it, weighs more.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from statistics import fmean
from typing import Any, Literal, get_args

import gaps
import grid
import kept
import numpy as np
import report
from gaps import EXTRACTOR, PIXELS, Gaps
from grid import Cell
from intervals import Estimate, estimate
from kept import Job, Result
from trials import (
    Trial,
    Trials,
    best_quality,
    budget_results,
    cost_ratios,
    full_cost_ratios,
    trials_of,
    trials_of_budget,
)

from engram.schemas import Definition
from engram.selection.quality import DEFAULT_QUALITY, is_near_one

Embedding = Literal["pixels", "extractor", "both"]
EMBEDDINGS: tuple[Embedding, ...] = (PIXELS, EXTRACTOR)
EPSILONS: dict[Definition, tuple[float, ...]] = {
    "raw": (0.1, 0.2, 0.3, 0.4, 0.5),
    "per_sample": (0.003, 0.005, 0.01, 0.02, 0.05),
    "log_ratio": (0.005, 0.01, 0.02, 0.05, 0.1),
}
POINT = 1.0
"""How far behind the best a criterion may fall."""

SMALL = {"cifar10": 8_000, "fashion": 2_000, "squares64": 6_144}
LARGE = {"cifar10": 24_000, "fashion": 6_000}
"""Bytes of each class. Even at quality 10 the smaller ones hold less than half of the images, the larger ones not all.
Of squares half a raw image."""

CELLS = (
    *(
        Cell(data, method, tasks, budgets[data])
        for data in ("cifar10", "fashion")
        for method, tasks, budgets in (
            ("lucir", 5, SMALL),
            ("er", 5, SMALL),
            ("icarl", 5, SMALL),
            ("lucir", 10, SMALL),
            ("er", 10, SMALL),
            ("icarl", 10, SMALL),
            ("er", 5, LARGE),
            ("icarl", 5, LARGE),
        )
    ),
    Cell("squares64", "lucir", 5, SMALL["squares64"]),
    Cell("squares64", "er", 5, SMALL["squares64"]),
    Cell("squares64", "icarl", 10, SMALL["squares64"]),
    Cell("squares64", "er", 10, SMALL["squares64"]),
)


@dataclass(frozen=True)
class Criterion:
    """How a quality is chosen; without an embedding it is always the same one."""

    embedding: Embedding | None
    definition: Definition = "raw"
    epsilon: float = 0.0
    constant: int = DEFAULT_QUALITY

    @property
    def family(self) -> str:
        """All but epsilon."""
        if self.embedding is None:
            return f"always {self.constant}"
        return f"{self.embedding}, {self.definition.replace('_', ' ')}"

    @property
    def name(self) -> str:
        """As tables call it."""
        return self.family if self.embedding is None else f"{self.family}, {self.epsilon:g}"

    def choice(self, tasks: Sequence[Gaps]) -> int:
        """The quality for these tasks, R averaged over them."""
        if self.embedding is None:
            return self.constant
        embeddings = EMBEDDINGS if self.embedding == "both" else (self.embedding,)
        found = [gaps.averaged(tasks, embedding, self.definition) for embedding in embeddings]
        qualities = sorted(found[0])
        if all(ratio is None for each in found for ratio in each.values()):
            return min(qualities, key=lambda quality: abs(quality - DEFAULT_QUALITY))
        passing = [q for q in qualities if all(is_near_one(each[q], self.epsilon) for each in found)]
        return min(passing, default=max(qualities))


TODAY = Criterion("pixels", "raw", 0.3)
"""What buffers are made with."""

FAMILIES = tuple(
    tuple(Criterion(embedding, definition, epsilon) for epsilon in EPSILONS[definition])
    for embedding, definition in product(get_args(Embedding), get_args(Definition))
)
"""Simplest first: pixels need no network, both need two comparisons; R as it is before what is made of it."""
CONSTANTS = tuple(Criterion(None, constant=quality) for quality in (10, 25, 50, 75, 90))


def behind(criterion: Criterion, trials: Sequence[Trial]) -> list[float]:
    """Points, one per seed of a cell, that the criterion is behind the best quality of the other seeds."""
    found = []
    for trial in trials:
        others = [other for other in trials if other is not trial]
        best = best_quality(others or [trial])
        found.append(trial.last[best] - trial.last[_asked(criterion, trial)])
    return found


def at_most_behind(criterion: Criterion, trials: Sequence[Trial]) -> list[float]:
    """Points, one per seed, that it is behind the best quality of all seeds, in hindsight."""
    best = best_quality(trials)
    return [trial.last[best] - trial.last[_asked(criterion, trial)] for trial in trials]


def _asked(criterion: Criterion, trial: Trial) -> int:
    """The quality that a buffer would have."""
    return criterion.choice(trial.tasks[:1])


def halves(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """The cells that criteria are chosen on, and those that they are reported on."""
    ordered = sorted(names, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    return ordered[::2], ordered[1::2]


def mean_behind(criterion: Criterion, trials: Trials) -> float:
    """Points, the mean over cells."""
    return fmean(fmean(behind(criterion, each)) for each in trials.values())


def fitted(family: Sequence[Criterion], trials: Trials) -> Criterion:
    """The one of least points behind; of equals the one with the largest epsilon, which keeps the most exemplars."""
    return min(reversed(family), key=lambda criterion: round(mean_behind(criterion, trials), 6))


def chosen(trials: Trials) -> Criterion:
    """The simplest that is at most a point behind."""
    best = [fitted(family, trials) for family in FAMILIES]
    good = [criterion for criterion in best if mean_behind(criterion, trials) <= POINT]
    return good[0] if good else min(best, key=lambda criterion: mean_behind(criterion, trials))


@dataclass(frozen=True)
class Verdict:
    """How a criterion does on some cells."""

    behind: Estimate
    """Points, with cells as what varies."""
    at_most: float
    """Points behind the best in hindsight, the mean over cells."""
    within: int
    """Cells in which it is at most a point behind."""
    worst: float


def verdict(criterion: Criterion, trials: Trials) -> Verdict | None:
    """None without cells."""
    found = [fmean(behind(criterion, each)) for each in trials.values()]
    if not found:
        return None
    at_most = fmean(fmean(at_most_behind(criterion, each)) for each in trials.values())
    return Verdict(estimate(found), at_most, sum(points <= POINT for points in found), max(found))


def own_choices(criterion: Criterion, trial: Trial) -> list[int]:
    """What each task asks for by itself."""
    return [criterion.choice([task]) for task in trial.tasks]


def changes(criterion: Criterion, trials: Trials) -> float:
    """The share of later tasks that ask for another quality than the first of their run."""
    found = [
        choice != choices[0]
        for each in trials.values()
        for choices in (own_choices(criterion, trial) for trial in each)
        for choice in choices[1:]
    ]
    return fmean(found) if found else 0.0


def drift(embedding: str, trials: Trials, quality: int) -> float:
    """By which factor raw R changes over the tasks of a run: the largest over the smallest, geometric mean of runs."""
    found = []
    for trial in (trial for each in trials.values() for trial in each):
        ratios = [ratio for task in trial.tasks if (ratio := gaps.form(task, embedding, "raw")[quality]) is not None]
        if len(ratios) > 1:
            found.append(np.log(max(ratios) / min(ratios)))
    return float(np.exp(np.mean(found))) if found else 1.0


# Tables


def main() -> None:
    args = report.parse_args("which criterion chooses the quality that training would have chosen?", grid.add_arguments)
    if args.quick:
        results, kept_by_budget, other, expected = quick(), list[Result](), dict[str, list[Trial]](), 1
    else:
        results = grid.gather(CELLS, args)
        print_rates(kept.load(grid.tuning_jobs(CELLS), args.out))
        kept_by_budget, other, expected = budget_results(args.out), trials_of_budget(args.out), len(CELLS)
    trials = trials_of(results)
    if not trials:
        report.finish(args, {"cells": 0, "cells_expected": expected})
        return
    picking, reporting = ({name: trials[name] for name in names if name in trials} for names in split(expected, trials))
    criterion = chosen(picking) if picking else TODAY
    print_cells(criterion, {**trials, **other})
    print_criteria(picking, reporting, other)
    print_tasks(criterion, {**trials, **other})
    flat = headline(criterion, trials, picking, reporting)
    small, full = cost_ratios(results.values()), full_cost_ratios(kept_by_budget)
    flat["grid_cost_over_selection_small"] = round(fmean(small), 1) if small else None
    flat["grid_cost_over_selection"] = round(fmean(full), 1) if full else None
    flat["cells_expected"], flat["seeds"] = expected, len({job.seed for job in results})
    if not args.quick:
        flat["cells_missing"] = ", ".join(cell.name for cell in CELLS if cell.name not in trials) or None
    report.finish(args, flat)


def split(expected: int, trials: Trials) -> tuple[list[str], list[str]]:
    """The halves; of all cells, whether or not they are done, so that they stay what they are."""
    return halves(trials) if expected != len(CELLS) else halves(cell.name for cell in CELLS)


def quick() -> dict[Job, Result]:
    """A look: the sample of Fashion-MNIST, one seed, few images."""
    cell, size = Cell("sample", "er", 5, 2_000), grid.Size(60, 20, epochs=1)
    job = Job(grid.TABLE, cell.name, 0, grid.Training(cell, 0.1, size=size))
    return {job: json.loads(json.dumps(grid.train(job, sources=grid.Sources())))}


def headline(criterion: Criterion, trials: Trials, picking: Trials, reporting: Trials) -> dict[str, Any]:
    """The numbers of the page."""
    flat: dict[str, Any] = {"criterion": criterion.name, "cells": len(trials), "cells_reported": len(reporting)}
    for key, each in (("", criterion), ("_today", TODAY), ("_constant", fitted(CONSTANTS, picking or trials))):
        flat[f"name{key or '_chosen'}"] = each.name
        for half, cells in (("", reporting), ("_all", trials)):
            found = verdict(each, cells)
            if found is not None:
                flat[f"behind{key}_points{half}"] = round(found.behind.mean, 2)
                flat[f"at_most_behind{key}_points{half}"] = round(found.at_most, 2)
                flat[f"behind{key}_high{half}"] = None if found.behind.high is None else round(found.behind.high, 2)
                flat[f"within_a_point{key}_share{half}"] = round(found.within / len(cells), 3)
                flat[f"worst{key}_points{half}"] = round(found.worst, 2)
    for embedding in EMBEDDINGS:
        same = replace(TODAY, embedding=embedding)
        flat[f"changes_{embedding}_share"] = round(changes(same, trials), 3)
        flat[f"drift_{embedding}_q10"] = round(drift(embedding, trials, 10), 2)
    return flat


def print_rates(tuning: Mapping[Job, Result]) -> None:
    """What tuning says; a training that diverged has no accuracy."""
    of_rates: dict[tuple[str, str], dict[float, float | None]] = {}
    for job, result in tuning.items():
        key = (job.config.cell.data, job.config.cell.method)
        of_rates.setdefault(key, {})[job.config.lr] = grid.last_accuracy(result, 50)
    found = grid.tuned(tuning)
    rows: list[list[report.Cell]] = []
    for key, rates in of_rates.items():
        if key in found:
            tried = [f"{rate:g}: {'-' if last is None else f'{last:.1f}'}" for rate, last in sorted(rates.items())]
            rows.append([*key, ", ".join(tried), found[key]])
    columns = ("data", "method", "rates", "taken")
    report.print_table(
        "Learning rates: last accuracy on held-out training images, percent, at quality 50", columns, rows
    )


def print_cells(criterion: Criterion, trials: Trials) -> None:
    """Every cell: what training found, what criteria chose."""
    qualities = sorted({quality for each in trials.values() for quality in each[0].last})
    picking, _ = halves(cell.name for cell in CELLS)
    rows = []
    for name, each in sorted(trials.items()):
        means = [_mean(each, quality) for quality in qualities]
        picks = {own: sorted(own.choice(trial.tasks[:1]) for trial in each) for own in (criterion, TODAY)}
        rows.append(
            [
                name,
                "choice" if name in picking else "report",
                len(each),
                *means,
                best_quality(each),
                *(" ".join(map(str, pick)) for pick in picks.values()),
                str(estimate(behind(criterion, each))),
            ]
        )
    columns = ("cell", "half", "seeds", *(f"at {q}" for q in qualities), "best")
    chosen_columns = dict.fromkeys((criterion.name, TODAY.name))
    report.print_table(
        "Last accuracy at each quality, percent, and what is chosen after the first task",
        (*columns, *chosen_columns, "behind"),
        rows,
    )


def _mean(trials: Sequence[Trial], quality: int) -> float | None:
    found = [trial.last[quality] for trial in trials if quality in trial.last]
    return fmean(found) if found else None


def print_criteria(picking: Trials, reporting: Trials, other: Trials) -> None:
    """Every family with its best epsilon of the first half, and constants, on both halves."""
    listed = [fitted(family, picking) for family in FAMILIES] if picking else [TODAY]
    rows: list[list[report.Cell]] = []
    for criterion in dict.fromkeys([*listed, TODAY, *CONSTANTS]):
        row: list[report.Cell] = [f"{criterion.name}{' (today)' if criterion == TODAY else ''}"]
        for cells in (picking, reporting, other):
            found = verdict(criterion, _able(criterion, cells))
            row += ["-"] * 4 if found is None else [str(found.behind), found.at_most, found.within, found.worst]
        row.append(changes(criterion, {**picking, **reporting}))
        rows.append(row)
    halves_ = (f"choice, {len(picking)} cells", f"report, {len(reporting)} cells", f"budget.py, {len(other)} cells")
    columns = [f"{half}: {what}" for half in halves_ for what in ("behind", "at most", "within a point", "worst")]
    report.print_table("Criteria: points behind the best quality", ("criterion", *columns, "tasks that differ"), rows)


def _able(criterion: Criterion, trials: Trials) -> Trials:
    """The cells in which the criterion's quality was trained."""
    return {
        name: each
        for name, each in trials.items()
        if criterion.embedding is not None or all(criterion.constant in trial.last for trial in each)
    }


def print_tasks(criterion: Criterion, trials: Trials) -> None:
    """R at every task of the first seed, its mean, and each task's own choice."""
    rows: list[list[report.Cell]] = []
    for name, each in sorted(trials.items()):
        trial = each[0]
        for embedding in EMBEDDINGS:
            same = replace(criterion if criterion.embedding else TODAY, embedding=embedding)
            row: list[report.Cell] = [name, embedding]
            for quality in (10, 25, 50, 75):
                if quality not in trial.last:
                    row.append("-")
                    continue
                ratios = [gaps.form(task, embedding, "raw")[quality] for task in trial.tasks]
                mean = gaps.averaged(trial.tasks, embedding, "raw")[quality]
                row.append(f"{' '.join(map(_short, ratios))}; {_short(mean)}")
            row += [" ".join(map(str, own_choices(same, trial))), same.choice(trial.tasks)]
            rows.append(row)
    columns = ("cell", "embedding", *(f"R({q}) by task; mean" for q in (10, 25, 50, 75)), "own choices", "of the mean")
    report.print_table("Raw R of every task, first seed", columns, rows)


def _short(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}" if ratio < 10 else f"{ratio:.3g}"


if __name__ == "__main__":
    main()
