"""Write the numbers of evidence.md and draw its pictures from the kept results of the benchmarks: `make evidence`.

What stands between `<!-- table: NAME -->` and `<!-- end -->` is replaced; a picture carries a digest of what it was
drawn from. tests/test_evidence.py fails while either differs from what is in bench/results. Where results are missing
the page says which, and a picture without any says so, too.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

import arms
import criterion
import gaps
import grid
import kept
import qualities
import trials
from budget import BUDGETS, SEEDS
from intervals import Estimate, estimate, paired
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter

from engram.schemas import CANDIDATE_QUALITIES

FOLDER = Path(__file__).parent
PAGE = FOLDER / "evidence.md"
IMAGES = FOLDER / "images"

ARMS = {
    ("raw", None): "raw pixels",
    ("lossless", None): "lossless",
    ("files", None): "JPEG files, selected",
    ("strips", 10): "strips at 10",
    ("strips", 25): "strips at 25",
    ("strips", 50): "strips at 50",
    ("strips", 75): "strips at 75",
    ("strips", 90): "strips at 90",
    ("strips", None): "strips, selected",
}
PRIMARY = tuple((arm.kind, arm.quality) for arm in arms.PRIMARY)
SELECTED, RAW, LOSSLESS = ("strips", None), ("raw", None), ("lossless", None)
DATA = {"cifar10": "CIFAR-10", "fashion": "Fashion-MNIST"}

Arm = tuple[str, int | None]
Runs = Mapping[Arm, Mapping[int, Any]]
"""The results of each arm, by seed."""


def of_budget(data: str, budget: int) -> Runs:
    """What `budget.py` has kept of LUCIR with augmentation at one budget for each class."""
    found: dict[Arm, dict[int, Any]] = {}
    for result in _budget():
        config = result["config"]
        if config["data"] == data and config["budget_bytes"] == budget and dict(config["settings"])["codec_ratio"]:
            arm = (config["arm"]["kind"], config["arm"]["quality"])
            found.setdefault(arm, {})[result["seed"]] = result
    return found


@cache
def _budget() -> list[Any]:
    return trials.budget_results(kept.RESULTS)


def complete(runs: Runs) -> list[int]:
    """The seeds of which every primary arm is done."""
    return sorted(set.intersection(*({*runs.get(arm, ())} for arm in PRIMARY)))


def last(runs: Runs, arm: Arm, seeds: Sequence[int]) -> dict[int, float]:
    """Last accuracies, percent."""
    return {seed: runs[arm][seed]["last"] for seed in seeds if seed in runs.get(arm, {})}


@cache
def tried() -> dict[str, Sequence[trials.Trial]]:
    """Every cell of which there is a grid search: small ones, and those of full size."""
    cells = dict.fromkeys([*criterion.CELLS, *(cell for cell in qualities.CELLS if cell.codec_ratio)])
    small = trials.trials_of(grid.known(tuple(cells), kept.RESULTS))
    return {**small, **trials.trials_of_budget(kept.RESULTS)}


# Tables and sentences


def gains() -> str:
    """What strips at the selected quality gain in the same bytes."""
    lines = [
        "| data, bytes per class | seeds | strips, selected | over raw | over lossless | behind the best fixed |",
        "|---|---|---|---|---|---|",
    ]
    for data, budget in _cells():
        runs = of_budget(data, budget)
        seeds = complete(runs)
        name = f"{DATA[data]}, {budget:,}"
        if not seeds:
            lines.append(f"| {name} | none yet | - | - | - | - |")
            continue
        mine = last(runs, SELECTED, seeds)
        over = [paired(mine, last(runs, arm, seeds)) for arm in (RAW, LOSSLESS)]
        fixed = [last(runs, ("strips", quality), seeds) for quality in (25, 50, 75)]
        best = max(fixed, key=lambda each: fmean(each.values()))
        told = [_said(estimate([*mine.values()])), *map(_said, (*over, paired(best, mine)))]
        lines.append(f"| {name} | {len(seeds)} | {' | '.join(told)} |")
    return "\n".join(lines)


def missing() -> str:
    """Which seeds of the primary table are missing."""
    found = []
    for data, budget in _cells():
        lacking = sorted({*SEEDS} - {*complete(of_budget(data, budget))})
        if lacking:
            found.append(f"{DATA[data]} at {budget:,} bytes: seeds {', '.join(map(str, lacking))}")
    lacking_cells = [cell.name for cell in _wanted() if cell.name not in tried()]
    text = f"Missing of the primary table: {'; '.join(found)}." if found else "All seeds of the primary table are done."
    if lacking_cells:
        text += f" Missing of the grid searches: {', '.join(lacking_cells)}."
    return text


def worth() -> str:
    """Where compression is not worth it, by the kept results."""
    told = []
    for data, budget in _cells():
        runs = of_budget(data, budget)
        seeds = complete(runs)
        gain = paired(last(runs, SELECTED, seeds), last(runs, RAW, seeds)) if seeds else None
        if gain is not None:
            counts = [fmean(runs[arm][seed].get("exemplars", 0) for seed in seeds) for arm in (RAW, SELECTED)]
            verdict = "worth it" if gain.low is not None and gain.low > 0 else "not shown to be worth it"
            told.append(
                f"- {DATA[data]}, {budget:,} bytes per class: {round(counts[0]):,} raw images in all, or "
                f"{round(counts[1]):,} exemplars in strips; {_said(gain)} points gained: {verdict}."
            )
    return "\n".join(told) or "No complete seed yet."


def best() -> str:
    """The best quality of each cell, and which are as good."""
    if not tried():
        return "No grid search is done yet."
    lines = ["| cell | seeds | best quality | within a point of it | selected |", "|---|---|---|---|---|"]
    for name, each in sorted(tried().items()):
        means = {quality: fmean(trial.last[quality] for trial in each) for quality in each[0].last}
        good = " ".join(map(str, qualities.as_good(means)))
        chosen = " ".join(map(str, sorted({criterion.TODAY.choice(trial.tasks[:1]) for trial in each})))
        lines.append(f"| {name} | {len(each)} | {trials.best_quality(each)} | {good} | {chosen} |")
    return "\n".join(lines)


def best_said() -> str:
    """How often each quality is as good as the best."""
    if not tried():
        return "No grid search is done yet."
    good: dict[int, int] = dict.fromkeys(CANDIDATE_QUALITIES, 0)
    trained: dict[int, int] = dict.fromkeys(CANDIDATE_QUALITIES, 0)
    for each in tried().values():
        means = {quality: fmean(trial.last[quality] for trial in each) for quality in each[0].last}
        for quality in means:
            trained[quality] += 1
            good[quality] += quality in qualities.as_good(means)
    told = [
        f"{good[quality]} of {trained[quality]} at {quality}" for quality in CANDIDATE_QUALITIES if trained[quality]
    ]
    return f"Within a point of the best quality of a cell: {', '.join(told)}."


def shifts() -> str:
    """Clean and coded test images, with and without augmentation."""
    cells = qualities.by_cell(grid.known(qualities.CELLS, kept.RESULTS))
    lines = [
        "| cell | quality | seeds | clean | coded | coded less clean | gained by augmentation |",
        "|---|---|---|---|---|---|---|",
    ]
    for cell, by_quality in cells.items():
        if cell in qualities.SHIFTED:
            plain = cells.get(qualities.unaugmented(cell), {})
            for quality, runs in sorted(by_quality.items()):
                clean, coded = qualities.clean(runs), qualities.coded(runs)
                gain = paired(clean, qualities.clean(plain[quality])) if quality in plain else None
                told = [f"{fmean(clean.values()):.1f}", f"{fmean(coded.values()):.1f}", _said(paired(coded, clean))]
                lines.append(f"| {cell.name} | {quality} | {len(runs)} | {' | '.join(told)} | {_said(gain)} |")
    return "\n".join(lines) if len(lines) > 2 else "No run is done yet."


def choosing() -> str:
    """Which criterion was chosen on one half of the cells, and how it does on the other."""
    one, other = criterion.halves(cell.name for cell in criterion.CELLS)
    picking, reporting = ({name: tried()[name] for name in half if name in tried()} for half in (one, other))
    if not picking or not reporting:
        return "There are not enough grid searches yet to choose a criterion on some and to report it on others."
    found = criterion.chosen(picking)
    lines = [
        f"Chosen on {len(picking)} cells and reported on {len(reporting)} others: **{found.name}** (today's: "
        f"{criterion.TODAY.name}).",
        "",
        f"| criterion | points behind, {len(reporting)} cells | at most | cells within a point | worst | tasks that "
        "ask for another quality than the first |",
        "|---|---|---|---|---|---|",
    ]
    listed = [found, criterion.TODAY, *(criterion.fitted(family, picking) for family in criterion.FAMILIES)]
    for each in dict.fromkeys([*listed, *criterion.CONSTANTS]):
        verdict = criterion.verdict(each, reporting)
        assert verdict is not None, "there are cells"
        changed = criterion.changes(each, {**picking, **reporting})
        lines.append(
            f"| {each.name} | {verdict.behind} | {verdict.at_most:.1f} | {verdict.within} | {verdict.worst:.1f} | "
            f"{100 * changed:.0f} % |"
        )
    return "\n".join(lines)


def cost() -> str:
    """What a grid search costs over the selection."""
    found = trials.full_cost_ratios(_budget())
    if not found:
        return "No run of full size is done yet."
    return f"Five trainings take {fmean(found):.0f} times the selection's time ({len(found)} runs of full size)."


def _cells() -> list[tuple[str, int]]:
    return [(data, budget) for data, budgets in BUDGETS.items() for budget in budgets]


def _wanted() -> list[grid.Cell]:
    return list(dict.fromkeys([*criterion.CELLS, *(cell for cell in qualities.CELLS if cell.codec_ratio)]))


def _said(value: Estimate | None) -> str:
    return "-" if value is None else str(value)


TABLES: dict[str, Callable[[], str]] = {
    "gains": gains,
    "missing": missing,
    "worth": worth,
    "best": best,
    "best-said": best_said,
    "shifts": shifts,
    "choosing": choosing,
    "cost": cost,
}


def render(text: str) -> str:
    """The page with its numbers as the kept results have them now."""
    return re.sub(
        r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)",
        lambda match: f"{match[1]}{TABLES[match[2]]()}\n{match[3]}",
        text,
        flags=re.DOTALL,
    )


# Pictures


@dataclass(frozen=True)
class Picture:
    """What a picture shows, and how it is drawn."""

    data: Callable[[], Any]
    """JSON; nothing where there are no results."""
    draw: Callable[[Figure, Any], None]

    @property
    def digest(self) -> str:
        """Changes with what is shown."""
        return hashlib.sha256(json.dumps(self.data()).encode()).hexdigest()[:16]

    def save(self, path: Path) -> None:
        """Draw it."""
        figure = Figure(figsize=(7.2, 3.4), dpi=120, layout="constrained")
        FigureCanvasAgg(figure)
        data = self.data()
        if data:
            self.draw(figure, data)
        else:
            figure.text(0.5, 0.5, "no results are kept yet", ha="center", va="center")
        figure.savefig(path, metadata={"Software": None, "Description": self.digest})


def gain_data() -> Any:
    """Last accuracy of every arm: [title, [[arm, mean, half], ...]] of each data set and budget."""
    panels = []
    for data, budget in _cells():
        runs = of_budget(data, budget)
        if seeds := complete(runs):
            found = [
                (name, estimate([*last(runs, arm, seeds).values()])) for arm, name in ARMS.items() if arm in PRIMARY
            ]
            rows = [[name, round(each.mean, 2), round(each.half or 0, 2)] for name, each in found]
            panels.append([f"{DATA[data]}\n{budget:,} bytes", rows])
    return panels


def draw_gain(figure: Figure, panels: Any) -> None:
    """One panel for each data set and budget, arms from top to bottom."""
    all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (title, rows) in zip(all_axes, panels, strict=True):
        names, means, halves = zip(*reversed(rows), strict=True)
        axes.errorbar(means, range(len(names)), xerr=halves, fmt="o", capsize=3, markersize=4)
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.set_title(title, fontsize=8)
        axes.grid(alpha=0.3)
    figure.supxlabel("accuracy after the last task, %, with 95 % intervals", fontsize=8)


def exemplars_data() -> Any:
    """Exemplars of a class and last accuracy: [data, [[budget, [[arm, exemplars, accuracy], ...]], ...]]."""
    panels = []
    for data, budgets in BUDGETS.items():
        found = []
        for budget in budgets:
            runs = of_budget(data, budget)
            if seeds := complete(runs):
                rows = []
                for arm, name in ARMS.items():
                    mine = [run for seed, run in runs.get(arm, {}).items() if seed in seeds and "exemplars" in run]
                    if mine and arm != SELECTED:
                        count = fmean(run["exemplars"] for run in mine) / 10
                        rows.append([name, round(count, 1), round(fmean(run["last"] for run in mine), 2)])
                found.append([budget, rows])
        if found:
            panels.append([DATA[data], found])
    return panels


def draw_exemplars(figure: Figure, panels: Any) -> None:
    """Accuracy over the number of exemplars, one colour for each budget; strips are joined by a line."""
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, lines) in zip(all_axes, panels, strict=True):
        for place, (budget, rows) in enumerate(lines):
            strips = sorted([row for row in rows if row[0].startswith("strips")], key=lambda row: row[1])
            style = {"marker": "o", "markersize": 4, "color": f"C{place}"}
            axes.plot(*_columns(strips), label=f"{budget:,} bytes", **style)
            axes.plot(*_columns([row for row in rows if row not in strips]), linestyle="", **style)
            for name, count, accuracy in rows:
                short = name.removeprefix("strips at ").partition(" ")[0]
                axes.annotate(short, (count, accuracy), fontsize=6, xytext=(3, 3), textcoords="offset points")
        axes.set_xscale("log")
        axes.set_title(title, fontsize=8)
        axes.set_xlabel("exemplars of each class", fontsize=8)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    all_axes[0].set_ylabel("accuracy after the last task, %", fontsize=8)


def _columns(rows: Any) -> tuple[list[float], list[float]]:
    return [row[1] for row in rows], [row[2] for row in rows]


def quality_data() -> Any:
    """Accuracy less that of the best quality: [cell, [[quality, points], ...]]."""
    lines = []
    for name, each in sorted(tried().items()):
        means = {quality: fmean(trial.last[quality] for trial in each) for quality in each[0].last}
        lines.append([name, [[quality, round(mean - max(means.values()), 2)] for quality, mean in means.items()]])
    return lines


def draw_quality(figure: Figure, lines: Any) -> None:
    """One panel for each kind of images, one line for each cell."""
    kinds = {"CIFAR-10": "cifar10", "Fashion-MNIST": "fashion", "pictures, 32 to 96 px": "squares"}
    shown = {title: [line for line in lines if word in line[0]] for title, word in kinds.items()}
    shown = {title: found for title, found in shown.items() if found}
    all_axes = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for axes, (title, found) in zip(all_axes, shown.items(), strict=True):
        axes.axhspan(-1, 0, alpha=0.15, color="green")
        for name, points in found:
            style = "--" if name.startswith("budget") else "-"
            axes.plot(*zip(*points, strict=True), style, marker="o", markersize=3, label=name)
        axes.set_title(title, fontsize=8)
        axes.set_xticks(CANDIDATE_QUALITIES)
        axes.set_xlabel("JPEG quality", fontsize=8)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=5)
    all_axes[0].set_ylabel("points from the best quality", fontsize=8)


def ratio_data() -> Any:
    """R at every task: [embedding, [[quality, [[R by task] of each run]], ...]] of the cell that is shown."""
    name = next((name for name in _SHOWN if name in tried()), None)
    if name is None:
        return []
    return [
        [
            embedding,
            [
                [
                    quality,
                    [[gaps.form(task, embedding, "raw")[quality] for task in trial.tasks] for trial in tried()[name]],
                ]
                for quality in (25, 50, 75)
            ],
        ]
        for embedding in criterion.EMBEDDINGS
    ]


_SHOWN = ("budget cifar10 lucir 5 16000", "cifar10 lucir 5 8000")


def draw_ratio(figure: Figure, panels: Any) -> None:
    """One panel for each embedding, one colour for each quality, one line for each run."""
    all_axes = figure.subplots(1, len(panels), sharey=True)
    for axes, (embedding, lines) in zip(all_axes, panels, strict=True):
        axes.axhspan(0.7, 1.3, alpha=0.15, color="green")
        for (quality, runs), colour in zip(lines, ("tab:blue", "tab:orange", "tab:green"), strict=True):
            for place, ratios in enumerate(runs):
                label = None if place else f"quality {quality}"
                axes.plot(
                    range(len(ratios)), [float("nan") if r is None else r for r in ratios], color=colour, label=label
                )
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.yaxis.set_minor_formatter(FormatStrFormatter("%g"))
        axes.tick_params(labelsize=7, which="both")
        axes.set_title(f"R under {'pixels' if embedding == gaps.PIXELS else 'the learner’s features'}", fontsize=8)
        axes.set_xlabel("task", fontsize=8)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)


PICTURES = {
    "evidence-gain.png": Picture(gain_data, draw_gain),
    "evidence-exemplars.png": Picture(exemplars_data, draw_exemplars),
    "evidence-quality.png": Picture(quality_data, draw_quality),
    "evidence-ratio.png": Picture(ratio_data, draw_ratio),
}


def main() -> None:
    """The page and its pictures are as the kept results say now."""
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    for name, picture in PICTURES.items():
        picture.save(IMAGES / name)


if __name__ == "__main__":
    main()
