"""Run methods with memories, budgets and seeds side by side, and compare them in one report.

Every run is what `engram-train train` does, in a process and a folder of its own, several at a time. A run that is
finished is not run again, and one that was killed goes on from its checkpoint, so an interrupted comparison is started
again with the same command.

    OUT/METHOD-MEMORY-BUDGET-SEED/    the run (see `loop`), and beside it what it printed, as .log
    OUT/compare.md                    means with 95 % intervals, paired differences, bytes, seconds
    OUT/compare.json                  the same, and the measures of every run; accuracies are fractions
    OUT/compare.png                   accuracy after each task, a mean curve and its interval for each row

Intervals are those of Student's t over the seeds; none is given for one seed. A difference is taken seed by seed
against the first row, so what a seed does to both is not in it.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.special import stdtrit

from engram import files
from engram.errors import Conflict, EngramError
from engram_trainer import loop
from engram_trainer.configuration import MemoryKind, RunConfig, differences
from engram_trainer.report import curves, seconds_of

WITHOUT_MEMORY = ("finetune", "joint", "lwf")
"""These methods keep no exemplars, so they are run once for each seed, whatever the memories and budgets."""

MEASURES = {
    "average_incremental": "average incremental accuracy",
    "last": "accuracy at the end",
    "bwt": "BWT",
    "forgetting": "forgetting",
}
COMPARED = ("average_incremental", "last")
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Cell:
    """What one row of the table is about."""

    method: str
    memory: MemoryKind
    budget_bytes: int | None

    @property
    def name(self) -> str:
        """As in a table and, with the seed, as a folder's name."""
        if self.budget_bytes is None:
            return self.method
        return f"{self.method}-{self.memory}-{self.budget_bytes}"


@dataclass(frozen=True, eq=False)
class Run:
    """One run of a comparison."""

    cell: Cell
    seed: int
    config: RunConfig
    folder: Path

    @property
    def is_finished(self) -> bool:
        """Whether its report has all tasks, however often they return."""
        report = self.report
        return report is not None and len(report["matrix"]) == len(self.config.stream.visits or report["tasks"])

    @property
    def report(self) -> dict[str, Any] | None:
        """Its report so far."""
        path = self.folder / "report.json"
        return json.loads(path.read_text()) if path.is_file() else None

    def check(self) -> None:
        """Its folder is free, or holds this very run.

        Raises:
            Conflict: another run is there.
        """
        path = self.folder / "run.json"
        if not path.is_file():
            return
        changed = differences(json.loads(path.read_text())["config"], self.config.to_json())
        if changed:
            raise Conflict(
                f"{self.folder} holds a run with another configuration ({'; '.join(changed)}); choose another --out"
            )


@dataclass(frozen=True)
class Interval:
    """A mean and how far from it 95 % of such means lie at most; None for a single value."""

    mean: float
    half_width: float | None
    count: int


def cells(methods: Sequence[str], memories: Sequence[MemoryKind], budgets: Sequence[int]) -> list[Cell]:
    """The rows, in the order of what was asked for."""
    found: dict[Cell, None] = {}
    for method in methods:
        for memory in memories:
            for budget in budgets:
                is_bare = method in WITHOUT_MEMORY or memory == "none"
                found[Cell(method, "none", None) if is_bare else Cell(method, memory, budget)] = None
    return list(found)


def plan(
    rows: Sequence[Cell],
    seeds: Sequence[int],
    common: Sequence[str],
    folder: Path,
    *,
    configure: Callable[[Sequence[str]], RunConfig],
) -> list[Run]:
    """The runs of all rows, every row once before the next seed begins.

    Args:
        rows: see `cells`.
        seeds: one run of each row for each.
        common: arguments of `engram-train train` for all runs.
        folder: of the comparison.
        configure: what such arguments mean.

    Raises:
        Conflict: another run is in the folder of one.
        ValueError: a row or a seed is there twice, or `configure` refuses.
    """
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"a seed is given twice: {', '.join(map(str, seeds))}")
    runs = []
    for seed in seeds:
        for cell in rows:
            arguments = [*common, "--method", cell.method, "--memory", cell.memory, "--seed", str(seed)]
            if cell.budget_bytes is not None:
                arguments += ["--budget", str(cell.budget_bytes)]
            run = Run(cell, seed, configure(arguments), folder / f"{cell.name}-{seed}")
            run.check()
            runs.append(run)
    return runs


def execute(
    runs: Sequence[Run], *, jobs: int, threads: int | None = None, tell: Callable[[Run, str | None], None]
) -> dict[Run, str]:
    """All runs are finished, or have failed; `jobs` at a time.

    Args:
        runs: what to run; those that are finished are only told of.
        jobs: processes at a time.
        threads: of each on the CPU; None gives them equal parts of its cores.
        tell: called for each run at its end, with the sentence it failed with or None.

    Returns:
        The runs that failed, each with its sentence.
    """
    threads = threads or max(1, (os.cpu_count() or 1) // jobs)
    # What every run imports is imported once, by a server that has no threads when it forks.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([loop.__name__])
    processes: list[BaseProcess] = []

    def run_beside(run: Run) -> str | None:
        if run.is_finished:
            return None
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=_run, args=(run, threads, there))
        process.start()
        processes.append(process)
        there.close()
        process.join()
        if process.exitcode == 0:
            return None
        try:
            return str(here.recv())
        except EOFError:  # it was killed, or what it raised is in its log
            return f"it ended with status {process.exitcode}"

    failed: dict[Run, str] = {}
    with ThreadPoolExecutor(jobs) as pool:
        pending = {pool.submit(run_beside, run): run for run in runs}
        try:
            for future in as_completed(pending):
                run, sentence = pending[future], future.result()
                if sentence is not None:
                    failed[run] = sentence
                tell(run, sentence)
        except BaseException:
            for waiting in pending:
                waiting.cancel()
            for process in processes:
                process.terminate()
            raise
    return failed


def _run(run: Run, threads: int, told: Connection) -> None:
    """One run in this process, which says why it failed, and into its log all that is printed."""
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    log = os.open(run.folder.with_name(f"{run.folder.name}.log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(threads)
    try:
        loop.run(run.config, run.folder, resume=(run.folder / "run.json").is_file(), pictures=False)
    except (EngramError, ValueError, FloatingPointError, OSError) as error:
        told.send(str(error))
        sys.exit(str(error))


def summarize(runs: Sequence[Run]) -> dict[str, Any]:
    """What the finished runs say, row by row, as plain JSON values."""
    by_cell: dict[Cell, dict[int, dict[str, Any]]] = {}
    for run in runs:
        report = run.report
        if report is not None and run.is_finished:
            by_cell.setdefault(run.cell, {})[run.seed] = report
    first = next(iter(by_cell.values()), {})
    rows = []
    for cell, reports in by_cell.items():
        rows.append(
            {
                "row": cell.name,
                "cell": asdict(cell),
                "seeds": sorted(reports),
                "measures": {name: _interval_of(reports.values(), name) for name in MEASURES},
                "difference": {name: _difference(reports, first, name) for name in COMPARED},
                "curve": [asdict(_interval(values)) for values in _curves(reports.values())],
                "exemplars": _mean(report["memory"][-1]["exemplars"] for report in reports.values()),
                "used_bytes": _mean(report["memory"][-1]["used_bytes"] for report in reports.values()),
                "seconds": _mean(sum(map(seconds_of, report["seconds"])) for report in reports.values()),
                "runs": {str(seed): report["metrics"] for seed, report in sorted(reports.items())},
            }
        )
    return {"confidence": CONFIDENCE, "rows": rows}


def write(summary: Mapping[str, Any], folder: Path, *, title: str, failed: Mapping[str, str]) -> None:
    """Leave `compare.json`, `compare.md` and, when any run is finished, `compare.png`."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {"title": title, **summary, "failed": dict(failed)}
    files.write_durably(folder / "compare.json", (json.dumps(content, indent=1) + "\n").encode())
    files.write_durably(folder / "compare.md", markdown(content).encode())
    if summary["rows"]:
        curves(
            {row["row"]: [point["mean"] for point in row["curve"]] for row in summary["rows"]},
            folder / "compare.png",
            ylabel="accuracy on all classes seen so far",
            title=title,
            half_widths={row["row"]: [point["half_width"] or 0.0 for point in row["curve"]] for row in summary["rows"]},
        )


def markdown(content: Mapping[str, Any]) -> str:
    """The table, in percent and points."""
    lines = [f"# {content['title']}", ""]
    rows = content["rows"]
    if rows:
        lines += [
            f"Means over seeds ± half of the {content['confidence']:.0%} interval (Student's t); percent.",
            f"Differences in points, seed by seed, against {rows[0]['row']}.",
            "",
            "| | seeds | " + " | ".join(MEASURES.values()) + " | difference in average | difference at the end "
            "| exemplars | bytes | seconds |",
            "|" + "---|" * (len(MEASURES) + 7),
        ]
        for row in rows:
            values = [
                row["row"],
                str(len(row["seeds"])),
                *(percent(row["measures"][name]) for name in MEASURES),
                *("" if row is rows[0] else percent(row["difference"][name], sign=True) for name in COMPARED),
                f"{row['exemplars']:,.0f}",
                f"{row['used_bytes']:,.0f}",
                f"{row['seconds']:,.1f}",
            ]
            lines.append("| " + " | ".join(values) + " |")
        lines += ["", "![accuracy after each task](compare.png)"]
    if content["failed"]:
        lines += ["", "Failed:", "", *(f"- {name}: {sentence}" for name, sentence in content["failed"].items())]
    return "\n".join(lines) + "\n"


def percent(interval: Mapping[str, Any] | None, *, sign: bool = False) -> str:
    """`62.1 ± 0.8`, of fractions; `-` where nothing was measured."""
    if interval is None:
        return "-"
    mean = f"{100 * interval['mean']:{'+' if sign else ''}.1f}"
    half = interval["half_width"]
    return mean if half is None else f"{mean} ± {100 * half:.1f}"


def _interval(values: Sequence[float]) -> Interval:
    count = len(values)
    if count == 1:
        return Interval(float(values[0]), None, 1)
    quantile = float(stdtrit(count - 1, (1 + CONFIDENCE) / 2))  # of Student; scipy.stats takes a second to import
    return Interval(float(np.mean(values)), quantile * float(np.std(values, ddof=1)) / count**0.5, count)


def _interval_of(reports: Iterable[dict[str, Any]], name: str) -> dict[str, Any] | None:
    values = [report["metrics"][name] for report in reports]
    if not values or any(value is None for value in values):
        return None
    return asdict(_interval(values))


def _difference(
    reports: Mapping[int, dict[str, Any]], first: Mapping[int, dict[str, Any]], name: str
) -> dict[str, Any] | None:
    shared = sorted(reports.keys() & first.keys())
    values = [reports[seed]["metrics"][name] - first[seed]["metrics"][name] for seed in shared]
    return asdict(_interval(values)) if values else None


def _curves(reports: Collection[dict[str, Any]]) -> list[tuple[float, ...]]:
    """The values of all seeds after each task."""
    return list(zip(*(report["metrics"]["incremental"] for report in reports), strict=True))


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))
