"""Measure which memory of equal bytes forgets least: raw pixels, lossless archives, JPEG files, or Engram's strips.

CIFAR-10 and Fashion-MNIST in 5 tasks of 2 classes, class-incremental, 1,500 training images a class, all 10,000 test
images. What differs between the arms is the memory: see `arms`. Strips are made by `engram.memory`, as in a service,
with the learner's exported extractor in its own process; `service_path_identical` says that a real service, asked over
HTTP, kept the same exemplars.

**Alike for all arms.** Half of a task's own images are shown as JPEG gives them back, each at one of the candidate
qualities, whether the memory is JPEG or not: one rule for all, which needs no quality before the first task has been
learned. The learning rate is tuned for each kind of memory, budget and data set on one grid (`--tune`: see `tuning`).

**Tables** (`--table`). `primary` is the claim: LUCIR, two budgets per class, 5 seeds. The others have the smaller
budget and 3 seeds, or one:

    er            the same arms, learned by experience replay
    uncoded       the same arms without the codec, which costs raw pixels accuracy: the opponents' best case
    total         the same arms with a fixed budget in all, which later tasks share
    extremes      strips at 10 and 90 as well
    lossy         WebP and JPEG 2000 at three qualities each, of which the best on the test images is taken; one seed
    codec         strips at 50 where images are shown coded at 50 only
    floor         no memory
    ceiling       training from scratch on all images so far

Accuracies are means over the seeds of which every run is done, differences are paired by seed; intervals are 95 %, by
Student's t. Finished runs are kept (see `kept`): the same command goes on after an interruption.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean

import kept
import numpy as np
import report
import torch
import tuning
from arms import FILES, FIXED, JOINTLY, LOSSLESS, NONE, PRIMARY, RAW, SELECTED, STRIPS_50, Arm, memory_of
from intervals import Estimate, estimate, paired
from kept import Job, Result
from learning import CLASSES, Place, execute, ignore, job_of, learner_of, run_of, stream_of, tell
from settings import LEARNINGS, LUCIR, SELECTION, STREAM, items

from engram import Client
from engram.schemas import IngestOptions, Per
from engram_trainer.extractor import to_onnx
from engram_trainer.local_service import local_service
from engram_trainer.memory import Learned
from engram_trainer.service_memory import ServiceMemory

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts it."""

SEEDS = (10, 11, 12, 13, 14)
"""Nobody has looked at what comes of them while anything was chosen."""
BUDGETS = {"cifar10": (16_000, 61_480), "fashion": (4_000, 16_000)}
"""Bytes per class; on CIFAR-10 they hold 5 and 20 raw images."""
LOSSY = (
    *(Arm("webp", quality) for quality in (10, 30, 50)),
    *(Arm("jpeg2000", decibels) for decibels in (26, 28, 30)),
)
"""On CIFAR-10 these take about as many bytes as strips at 25, 50 and 75."""


@dataclass(frozen=True)
class Table:
    """A question: the same arms for some data sets, budgets and seeds."""

    learning: str
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...] = SEEDS[:3]
    budgets: int = 1
    """How many of them, the smaller first."""
    per: Per = "class"


TABLES = {
    "primary": Table("lucir", PRIMARY, SEEDS, budgets=2),
    "uncoded": Table("lucir-uncoded", PRIMARY),
    "er": Table("er", PRIMARY),
    "extremes": Table("lucir", (SELECTED, Arm("strips", 10), *FIXED, Arm("strips", 90))),
    "lossy": Table("lucir", (SELECTED, STRIPS_50, *LOSSY), SEEDS[:1]),
    "total": Table("lucir", PRIMARY, per="buffer"),
    "codec": Table("lucir-own-codec", (Arm("strips", 50),)),
    "floor": Table("lucir-without", (NONE,)),
    "ceiling": Table("joint", (JOINTLY,)),
}


def cells(table: Table, data: str) -> list[tuple[int, Per]]:
    """The budgets of a table."""
    budgets = BUDGETS[data][: table.budgets]
    return [(budget if table.per == "class" else CLASSES * budget, table.per) for budget in budgets]


def jobs_of(table: Table, data: str, seed: int, budget: int, per: Per, place: Place) -> list[Job]:
    """The runs of one cell of a table, in the order in which they are run."""
    learning = LEARNINGS[table.learning]
    tuned = tuning.rates_of(table.learning, data, budget if per == "class" else budget // CLASSES, place)
    return [
        job_of(
            # What is not of the headline's learning lies apart, so that nobody takes it for the same.
            "budget" if table.learning == "lucir" else f"budget-{table.learning}",
            run_of(learning, data, arm, budget, tuned[arm.tuned_as], per=per, device=place.device),
            seed,
            table.learning,
        )
        for arm in table.arms
    ]


def grid_of(table: Table) -> list[tuple[str, int]]:
    """The data sets and budgets per class that a table needs learning rates for."""
    return [(data, budget) for data, budgets in BUDGETS.items() for budget in budgets[: table.budgets]]


Scores = Mapping[Arm, Mapping[int, float]]
"""Of each arm by seed, in percent."""


def scores(results: Mapping[Job, Result], seeds: Sequence[int], key: str = "last") -> Scores:
    """Those of some seeds."""
    found: dict[Arm, dict[int, float]] = {}
    for job, result in results.items():
        if job.seed in seeds:
            found.setdefault(job.config.arm, {})[job.seed] = result[key]
    return found


def headline(last: Scores) -> dict[str, float | int | None]:
    """The claim in numbers; gains are of strips at the selected quality, in points, paired by seed."""
    if SELECTED not in last:
        return {}
    numbers: dict[str, float | int | None] = {"seeds": len(last[SELECTED])}
    for name, arm in (("raw", RAW), ("lossless", LOSSLESS), ("files", FILES)):
        if arm in last:
            numbers |= _points(f"gain_over_{name}", paired(last[SELECTED], last[arm]))
    fixed = [arm for arm in last if arm.kind == "strips" and arm.quality is not None]
    if fixed:
        best = max(fixed, key=lambda arm: fmean(last[arm].values()))
        numbers["best_fixed_quality"] = best.quality
        numbers |= _points("gap_to_best_fixed_quality", paired(last[best], last[SELECTED]))
    return numbers


def _points(name: str, difference: Estimate | None) -> dict[str, float | None]:
    if difference is None:
        return {}
    low, high = difference.low, difference.high
    return {
        f"{name}_points": round(difference.mean, 2),
        f"{name}_low": None if low is None else round(low, 2),
        f"{name}_high": None if high is None else round(high, 2),
    }


def print_cell(title: str, results: Mapping[Job, Result], seeds: Sequence[int]) -> None:
    """One table, over its complete seeds."""
    last, average = scores(results, seeds), scores(results, seeds, "average_incremental")
    rows: list[list[report.Cell]] = []
    for arm in last:
        own = [result for job, result in results.items() if job.config.arm == arm and job.seed in seeds]
        whole = [result for result in own if "diverged" not in result]
        gain = paired(last[SELECTED], last[arm]) if SELECTED in last and arm != SELECTED else None
        rows.append(
            [
                arm.name,
                str(estimate([*last[arm].values()])),
                str(estimate([*average[arm].values()])),
                None if gain is None else str(gain),
                fmean(each["exemplars"] / CLASSES for each in whole) if arm.has_memory and whole else None,
                fmean(each["used_bytes"] / CLASSES for each in whole) if arm.has_memory and whole else None,
                "; ".join(" ".join(map(str, each["qualities"])) for each in whole) if arm.selects else None,
                len(own) - len(whole),
            ]
        )
    columns = (
        "memory",
        "last",
        "average incremental",
        "strips, selected, are ahead by",
        "exemplars/class",
        "bytes/class",
        "quality after each task; seed",
        "diverged",
    )
    report.print_table(f"{title}; seeds {' '.join(map(str, seeds)) or '(none is complete)'}", columns, rows)


def print_tables(names: Sequence[str], place: Place) -> dict[str, report.Cell]:
    """All that is done of these tables, and their numbers by key."""
    flat: dict[str, report.Cell] = {}
    for name in names:
        table = TABLES[name]
        for data in place.data:
            prefix = data if name == "primary" else f"{name}_{data}"
            for number, (budget, per) in enumerate(cells(table, data)):
                results, seeds = done(table, data, budget, per, place)
                wanted = len(table.seeds) * len(table.arms)
                what = "bytes per class" if per == "class" else "bytes in all"
                title = f"{name}: {data}, {budget:,} {what}, {table.learning}"
                if len(results) < wanted:
                    title += f"; {len(results)} of {wanted} runs are done"
                print_cell(title, results, seeds)
                last = scores(results, seeds)
                numbers = headline(last) | (over_the_best(data, budget, place) if name == "uncoded" else {})
                flat |= {f"{prefix}_{key}_{budget}": value for key, value in numbers.items()}
                if number == 0:
                    flat |= {f"{prefix}_{key}": value for key, value in numbers.items()}
                for arm, by_seed in last.items():
                    slug = arm.name.replace(", ", "_")
                    flat[f"{prefix}_last_{slug}_{budget}"] = round(fmean(by_seed.values()), 2)
                flat[f"{prefix}_old_code_{budget}"] = len(kept.stale(results.values()))
    return flat


def done(table: Table, data: str, budget: int, per: Per, place: Place) -> tuple[dict[Job, Result], list[int]]:
    """The results of one cell of a table, and the seeds of which all are there; none before rates are tuned."""
    try:
        jobs = [job for seed in table.seeds for job in jobs_of(table, data, seed, budget, per, place)]
    except tuning.NotTuned:
        return {}, []
    results = kept.load(jobs, place.results)
    return results, kept.complete_seeds(jobs, results)


def over_the_best(data: str, budget: int, place: Place) -> dict[str, float | None]:
    """Gains over opponents with or without the codec, whichever suits each better, over the seeds that both have."""
    numbers: dict[str, float | None] = {}
    found = [done(TABLES[name], data, budget, "class", place) for name in ("primary", "uncoded")]
    seeds = sorted(set.intersection(*({*seeds} for _, seeds in found)))
    coded, uncoded = (scores(results, seeds) for results, _ in found)
    for name, arm in (("raw", RAW), ("lossless", LOSSLESS)):
        if seeds:
            best = max((coded[arm], uncoded[arm]), key=lambda by_seed: fmean(by_seed.values()))
            numbers |= _points(f"gain_over_{name}_best", paired(coded[SELECTED], best))
    return numbers


def service_path_is_identical(place: Place) -> bool:
    """Whether a real service, over HTTP, keeps the exemplars of the first task that `SelectedStrips` keeps."""
    data, seed = next(iter(place.data)), SEEDS[0]
    budget = BUDGETS[data][0]
    small = {**STREAM, "train_per_class": 100}
    run = run_of(LEARNINGS["lucir"], data, SELECTED, budget, 0.03, stream=small)
    tasks = stream_of(run, seed, place)
    learner, here = learner_of(run, seed, tasks), memory_of(SELECTED, budget, "class", SELECTION)
    task = tasks.tasks[0]
    learner.learn(task, here, ignore)
    extractor = to_onnx(learner.extractor(), tasks.shape)
    with (
        tempfile.TemporaryDirectory() as scratch,
        local_service(Path(scratch) / "service") as service,
        Client(service.url) as client,
    ):
        client.create_buffer("bench", budget_bytes=budget, per="class")
        options = IngestOptions(**SELECTION)
        there = ServiceMemory(client, "bench", options=options, run="bench", folder=Path(scratch) / "mirror")
        for memory in (here, there):
            memory.add(Learned(0, task.train, extractor, learner.embed, seed=seed))
        [ours], [theirs] = here.walk(10**6), there.walk(10**6)
        return here.used_bytes == there.used_bytes and all(
            np.array_equal(getattr(ours, name), getattr(theirs, name)) for name in ("images", "class_ids", "rows")
        )


def main() -> None:
    """Run what is missing, print the tables."""

    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--cifar10", type=Path, help="folder with CIFAR-10's binary files")
        parser.add_argument("--fashion", type=Path, default=FASHION_MNIST, help="folder with Fashion-MNIST's IDX files")
        parser.add_argument(
            "--table",
            nargs="+",
            choices=[*TABLES],
            default=["primary"],
            metavar="TABLE",
            help=f"of {', '.join(TABLES)}; default: primary",
        )
        parser.add_argument("--tune", action="store_true", help="the learning rates of these tables, not the tables")
        parser.add_argument("--print", action="store_true", help="tables of what is done; run nothing")
        parser.add_argument("--bases", type=Path, default=Path("runs/budget"), help="folder of learned first tasks")
        parser.add_argument("--device", default="cpu")
        kept.add_arguments(parser)

    args = report.parse_args("at equal bytes, which memory forgets least?", add)
    torch.set_num_threads(1)
    folders = {"cifar10": args.cifar10, "fashion": args.fashion if args.fashion.is_dir() else None}
    data = {name: str(folder) for name, folder in folders.items() if folder is not None or args.print}
    place = Place(data, args.out, args.bases, args.device)
    if args.quick:
        report.finish(args, quick(place, args.jobs))
        return
    if args.tune:
        needed = [(TABLES[name].learning, *cell) for name in args.table for cell in grid_of(TABLES[name])]
        tuning.tune(needed, place, processes=args.jobs, minutes=args.minutes)
        return
    if args.print:
        report.finish(args, print_tables(args.table, place))
        return
    try:
        collect(args.table, place, processes=args.jobs, minutes=args.minutes)
    except tuning.NotTuned as error:
        raise SystemExit(str(error)) from None
    flat = print_tables(args.table, place)
    flat["service_path_identical"] = service_path_is_identical(place)
    report.finish(args, flat)


def collect(names: Sequence[str], place: Place, *, processes: int, minutes: float) -> None:
    """Run what is missing of these tables: one after the other, each seed by seed."""
    jobs = [
        job
        for table in (TABLES[name] for name in names)
        for seed in table.seeds
        for data in place.data
        for budget, per in cells(table, data)
        for job in jobs_of(table, data, seed, budget, per, place)
    ]
    execution = partial(execute, place=place)
    kept.collect(jobs, execution, folder=place.results, processes=processes, minutes=minutes, tell=tell)


def quick(place: Place, processes: int) -> dict[str, report.Cell]:
    """A look at a small table in well under a minute: one seed, one budget, few images."""
    data = {"fashion": place.data.get("fashion", "sample")}
    learning = replace(LEARNINGS["lucir"], settings=items({**LUCIR, "batch_size": 32, "epochs": 3}))
    small = {**STREAM, "train_per_class": 60, "test_per_class": 50}
    budget = BUDGETS["fashion"][0]
    with tempfile.TemporaryDirectory() as scratch:
        place = replace(place, data=data, results=Path(scratch), bases=Path(scratch) / "bases")
        jobs = [
            job_of(
                "budget", run_of(learning, "fashion", arm, budget, 0.03, stream=small, device=place.device), 0, "lucir"
            )
            for arm in (SELECTED, RAW, LOSSLESS, STRIPS_50)
        ]
        results = kept.collect(
            jobs, partial(execute, place=place), folder=place.results, processes=processes, tell=tell
        )
        print_cell(f"quick: fashion, {budget:,} bytes per class", results, [0])
        flat: dict[str, report.Cell] = {f"fashion_{key}": each for key, each in headline(scores(results, [0])).items()}
        return {**flat, "service_path_identical": service_path_is_identical(place)}


if __name__ == "__main__":
    main()
