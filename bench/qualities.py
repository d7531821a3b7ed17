"""What the shift costs: a network replays coded images of old classes and is asked about clean ones.

**Clean and coded test images.** After the last task the same test images are scored as they are and coded at the
quality of the memory (`shift`; where that is raw pixels, at 50). What is lost between them is the shift; what LUCIR
gains by showing half of a task's own images coded is what augmentation makes good.

**Where the best quality lies.** The best of five by training, and the qualities that are within a point of it, over
data sets, methods, numbers of tasks, budgets, and sizes of the same squares of pictures: 32, 64 and 96 pixels, with the
bytes of half a raw image of each class.

Runs are those of `grid`, the ones that `criterion.py` has kept among them. Differences are paired over seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

import criterion
import grid
import report
import trials
from grid import Cell
from intervals import Estimate, paired
from kept import Job, Result

from engram.schemas import CANDIDATE_QUALITIES

SHIFTED = tuple(Cell(data, "lucir", 5, criterion.SMALL[data]) for data in ("cifar10", "fashion"))
"""With codec augmentation; each stands beside the same without."""
SIZES = tuple(Cell(f"squares{side}", "lucir", 5, side * side * 3 // 2) for side in (32, 64, 96))
CELLS = (*(replace(cell, codec_ratio=ratio) for cell in SHIFTED for ratio in (grid.CODEC_RATIO, 0.0)), *SIZES)
POINT = 1.0

Runs = Mapping[int, Mapping[int, Result]]
"""The runs of a cell that did not diverge, by quality and seed."""


def main() -> None:
    args = report.parse_args(
        "what does the shift from coded to clean images cost, and which quality is best?", grid.add_arguments
    )
    if args.quick:
        results = criterion.quick()
    else:
        results = grid.gather(CELLS, args)
        results |= grid.known(criterion.CELLS, args.out)
    cells = by_cell(results)
    flat = shifts(cells)
    flat |= best_qualities(trials.trials_of(results))
    if not args.quick:
        full_shifts(trials.budget_results(args.out))
        flat |= best_qualities(trials.trials_of_budget(args.out), kind="budget.py's runs, full size")
    missing = [cell.name for cell in CELLS if cell not in cells] if not args.quick else []
    report.finish(args, flat | {"cells": len(cells), "cells_missing": ", ".join(missing) or None})


def by_cell(results: Mapping[Job, Result]) -> dict[Cell, Runs]:
    """The runs of each cell."""
    found: dict[Cell, dict[int, dict[int, Result]]] = {}
    for job, result in results.items():
        runs = found.setdefault(job.config.cell, {})
        for quality, run in result["runs"].items():
            if run is not None:
                runs.setdefault(int(quality), {})[job.seed] = run
    return dict(found)


def unaugmented(cell: Cell) -> Cell:
    """The same without codec augmentation."""
    return replace(cell, codec_ratio=0.0)


def clean(runs: Mapping[int, Result]) -> dict[int, float]:
    """Percent of the test images as they are, by seed."""
    return {seed: 100 * fmean(run["matrix"][-1]) for seed, run in runs.items()}


def coded(runs: Mapping[int, Result]) -> dict[int, float]:
    """Percent of the same images coded as the memory is, by seed."""
    return {seed: 100 * fmean(run["on_coded"]) for seed, run in runs.items()}


def shifts(cells: Mapping[Cell, Runs]) -> dict[str, Any]:
    """The table of clean and coded test images; what is gained on clean ones by augmentation."""
    flat: dict[str, Any] = {}
    rows: list[list[report.Cell]] = []
    for cell, by_quality in cells.items():
        without = cells.get(unaugmented(cell), {}) if cell.codec_ratio else {}
        for quality, runs in sorted(by_quality.items()):
            difference = paired(coded(runs), clean(runs))
            gain = paired(clean(runs), clean(without[quality])) if quality in without else None
            means = fmean(clean(runs).values()), fmean(coded(runs).values())
            exemplars = round(fmean(run["exemplars"] for run in runs.values()))
            rows.append([cell.name, len(runs), quality, exemplars, *means, _said(difference), _said(gain)])
            if cell in CELLS and difference is not None:
                off = "" if cell.codec_ratio else "_unaugmented"
                flat[f"shift_{cell.data}{off}_q{quality}"] = round(difference.mean, 2)
                if gain is not None:
                    flat[f"augmentation_gain_{cell.data}_q{quality}"] = round(gain.mean, 2)
                    flat[f"augmentation_gain_{cell.data}_q{quality}_low"] = _rounded(gain.low)
    report.print_table(
        "Last accuracy on clean test images and on the same coded as the memory is, percent",
        ("cell", "seeds", "quality", "exemplars", "clean", "coded", "coded less clean", "gained by augmentation"),
        rows,
    )
    return flat


def full_shifts(results: Sequence[Result]) -> None:
    """The same of the runs of `budget.py`, all kinds of memories."""
    arms: dict[tuple[str, int, bool, str, int], dict[int, Result]] = {}
    for result in results:
        config = result["config"]
        kind, quality = config["arm"]["kind"], config["arm"]["quality"]
        if "on_coded" in result and (quality is not None or kind not in ("strips", "files")):
            is_augmented = bool(dict(config["settings"])["codec_ratio"])
            key = (config["data"], config["budget_bytes"], is_augmented, kind, result["coded_quality"])
            arms.setdefault(key, {})[result["seed"]] = result
    rows: list[list[report.Cell]] = []
    for (data, budget, is_augmented, kind, quality), runs in sorted(arms.items()):
        means = fmean(clean(runs).values()), fmean(coded(runs).values())
        difference = paired(coded(runs), clean(runs))
        rows.append([data, budget, kind, quality, is_augmented, len(runs), *means, _said(difference)])
    columns = ("data", "bytes", "memory", "coded at", "augmentation", "seeds", "clean", "coded", "coded less clean")
    if rows:
        report.print_table("The same, budget.py's runs", columns, rows)


def _said(difference: Estimate | None) -> str | None:
    return None if difference is None else str(difference)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 2)


def best_qualities(found: trials.Trials, kind: str = "small runs") -> dict[str, Any]:
    """The best quality of each cell, and which are as good."""
    flat: dict[str, Any] = {}
    rows: list[list[report.Cell]] = []
    for name, each in sorted(found.items()):
        means = {quality: fmean(trial.last[quality] for trial in each) for quality in each[0].last}
        best = trials.best_quality(each)
        good = as_good(means)
        listed = (means.get(quality) for quality in CANDIDATE_QUALITIES)
        rows.append([name, len(each), *listed, best, " ".join(map(str, good))])
        flat[f"best_quality_{name.replace(' ', '_')}"] = best
    columns = ("cell", "seeds", *(f"at {quality}" for quality in CANDIDATE_QUALITIES), "best", "within a point")
    report.print_table(f"Where the best quality lies: last accuracy, percent; {kind}", columns, rows)
    return flat


def as_good(means: Mapping[int, float]) -> list[int]:
    """The qualities that are within a point of the best."""
    return sorted(quality for quality, mean in means.items() if mean >= max(means.values()) - POINT)


if __name__ == "__main__":
    main()
