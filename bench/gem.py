"""Measure how much GEM forgets with a compressed memory, at which margin gamma, beside plain experience replay.

Four settings, each of one pass in minibatches of 10:

    class-incremental   Fashion-MNIST, 5 tasks of 2 classes, 1,000 training images a class, MLP of 2 x 100
    permuted, rotated   Fashion-MNIST, 20 tasks of 500 images of all classes, the same MLP: the paper's setup with half
                        of its images
    cifar10             CIFAR-10, 5 tasks of 2 classes, 200 training images a class, ResNet-18 of 20 filters; a test
                        image comes with its task, as in the paper

Methods: plain SGD; experience replay (ER), whose every step has 10 new images and 10 exemplars, or more exemplars;
A-GEM; GEM at four values of gamma, 1/k for k earlier tasks among them; and joint, one pass over the images of all tasks
together. ER and GEM have the same loss: all labels seen so far compete. Of each task 16, 64 or 256 random exemplars are
kept once it is learned, in strips at quality 50; at 256 there is a memory of raw pixels, too. A step of GEM replays
every exemplar of every earlier task and one of A-GEM 256 of all; with the ResNet 16 of each earlier task, and 32.

ACC and BWT are the paper's, with 1/(T-1). Over-fitting in the memory is the accuracy on the exemplars of all tasks but
the last, as the memory gives them back, less that on the test images of the same tasks. A run whose loss is not finite
any more has failed: it counts as chance, the table says how many did, and BWT and over-fitting are of the others.
Intervals are of 95 % by the t distribution over seeds; differences are paired. Tables are of the seeds that every line
has.

Learning rates are chosen alike for every method, setting and number of exemplars (see `rates`), on held-out training
images of streams that no table uses; raw pixels have those of strips. The choice is made from kept runs (see `kept`),
so tables need no other input, and a run without `--tune` first tunes what is not tuned yet.
"""

from __future__ import annotations

import argparse
import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import kept
from intervals import Estimate, estimate, paired
from kept import Job, Result
from onepass import Arm, Case, Experiment, Run, Runs, Setting
from rates import Choices, print_choices, tune
from report import Cell, finish, parse_args, print_table

from engram_trainer.methods.gem import Config as GemConfig

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
BATCH = 10
PAPERS_EXEMPLARS = 256
CIFAR10_PER_CLASS = 200

SEEDS = (10, 11, 12, 13, 14)
TUNING_SEED = 1000

GAMMAS: dict[str, float | None] = {"0": 0.0, "1/k": None, "0.5": 0.5, "1": 1.0}
DEFAULT_GEM = next(f"gem {name}" for name, gamma in GAMMAS.items() if gamma == GemConfig().gamma)
"""The line of GEM as the trainer has it unless it is told otherwise."""


def arms(*, er_more: int, gem_of_each: int | None, agem_of_all: int | None) -> tuple[Arm, ...]:
    """Every method.

    Args:
        er_more: exemplars in a step of the second line of experience replay.
        gem_of_each: exemplars of each earlier task in a step of GEM; None is all.
        agem_of_all: exemplars in a step of A-GEM; None is its 256.
    """
    gems = [_arm(f"gem {name}", "gem", gamma=gamma, replay_batch=gem_of_each) for name, gamma in GAMMAS.items()]
    plain = replace(_arm("plain", "finetune", momentum=0.0, weight_decay=0.0, milestones=()), memory="none")
    return (
        plain,
        _arm("er", "er", replay_batch=BATCH, compete="seen"),
        _arm(f"er {er_more}", "er", replay_batch=er_more, compete="seen"),
        _arm("agem", "gem", average=True, replay_batch=agem_of_all),
        *gems,
        *(replace(arm, memory="raw") for arm in gems if arm.name == "gem 1/k"),
        replace(plain, name="joint", method="joint"),
    )


def _arm(name: str, method: str, **options: Any) -> Arm:
    return Arm(name, method, tuple({"epochs": 1, "batch_size": BATCH, **options}.items()))


MLP_ARMS = arms(er_more=64, gem_of_each=None, agem_of_all=None)
CLASSES = Experiment(
    Setting("class-incremental", "fashion-mnist", "mlp", "class-incremental", tasks=5, train_per_class=1000),
    MLP_ARMS,
    exemplars=(64, 256, 16),
    raw_at=PAPERS_EXEMPLARS,
    tuning_seeds=(TUNING_SEED, TUNING_SEED + 1),
)
PERMUTED = Experiment(
    Setting("permuted", "fashion-mnist", "mlp", "permuted", tasks=20, train_per_task=500, test_per_class=200),
    MLP_ARMS,
    exemplars=(64, 256, 16),
    raw_at=PAPERS_EXEMPLARS,
    tuning_seeds=(TUNING_SEED,),
)
ROTATED = replace(
    PERMUTED, setting=replace(PERMUTED.setting, name="rotated", scenario="rotated"), exemplars=(PAPERS_EXEMPLARS,)
)
CIFAR10 = Experiment(
    Setting(
        "cifar10",
        "cifar10",
        "resnet18-reduced",
        "task-incremental",
        tasks=5,
        train_per_class=CIFAR10_PER_CLASS,
        test_per_class=100,
    ),
    arms(er_more=32, gem_of_each=16, agem_of_all=32),
    exemplars=(64, 256, 16),
    raw_at=None,
    tuning_seeds=(TUNING_SEED,),
)
EXPERIMENTS = (CLASSES, PERMUTED, ROTATED, CIFAR10)

Part = tuple[Experiment, int]
"""A table: an experiment at one number of exemplars."""
STAGES: tuple[tuple[Part, ...], ...] = (
    ((CLASSES, 64), (CLASSES, 256), (PERMUTED, 64), (PERMUTED, 256)),
    ((CLASSES, 16), (PERMUTED, 16)),
    ((CIFAR10, 64),),
    ((ROTATED, 256),),
    ((CIFAR10, 256), (CIFAR10, 16)),
)
"""The most important tables first; those of one stage are made together, seed by seed."""

COLUMNS = (
    "method",
    "learning rate",
    "ACC",
    "over ER",
    f"over {DEFAULT_GEM}",
    "BWT",
    "over-fitting",
    "failed",
    "corrected steps",
    "bytes per task",
    "seconds",
)

QUICK_RATE, QUICK_EXEMPLARS = 0.1, 64
QUICK_ARMS = tuple(arm for arm in MLP_ARMS if arm.name in ("plain", "er", "gem 0", DEFAULT_GEM))


def _quick(experiment: Experiment, setting: Setting) -> Part:
    """A look at a table, on the sample."""
    setting = replace(setting, data="sample", tasks=5, test_per_class=50)
    return replace(experiment, setting=setting, arms=QUICK_ARMS, exemplars=(QUICK_EXEMPLARS,)), QUICK_EXEMPLARS


QUICK_STAGES = (
    (
        _quick(CLASSES, replace(CLASSES.setting, train_per_class=250)),
        _quick(PERMUTED, PERMUTED.setting),
    ),
)


def sized(experiment: Experiment, cifar10_per_class: int) -> Experiment:
    """The experiment, with so many training images of each class if it is on CIFAR-10."""
    if experiment != CIFAR10:
        return experiment
    return replace(experiment, setting=replace(experiment.setting, train_per_class=cifar10_per_class))


def table_job(case: Case, seed: int, choices: Choices) -> Job | None:
    """A run of a table; None while its learning rate is not settled."""
    rate = choices.get(tuned_case(case))
    if rate is None:
        return None
    return Job(f"gem-{case.setting.name}", f"{case.arm.label} {case.exemplars}", seed, Run(case, rate))


def tuned_case(case: Case) -> Case:
    """The case whose learning rate it has: raw pixels have that of strips."""
    return replace(case, arm=replace(case.arm, memory="strips")) if case.arm.memory == "raw" else case


def part_jobs(part: Part, seeds: Sequence[int], choices: Choices) -> list[Job]:
    """All runs of a table that can be made, seed by seed."""
    experiment, exemplars = part
    found = [table_job(case, seed, choices) for seed in seeds for case in experiment.cases(exemplars)]
    return [job for job in found if job is not None]


def stage_jobs(stage: Sequence[Part], seeds: Sequence[int], choices: Choices) -> list[Job]:
    """All runs of the tables of a stage, seed by seed; what two tables share once."""
    return list(dict.fromkeys(job for seed in seeds for part in stage for job in part_jobs(part, [seed], choices)))


@dataclass(frozen=True)
class Line:
    """A line of a table: the results of the seeds that all lines have."""

    case: Case
    rate: float
    results: Mapping[int, Result]

    def percent(self, name: str) -> dict[int, float]:
        """A fraction by seed, times 100, where it was measured."""
        return {seed: 100 * found[name] for seed, found in self.results.items() if found[name] is not None}


def lines_of(part: Part, seeds: Sequence[int], choices: Choices, runs: Runs) -> tuple[list[Line], int]:
    """The lines of a table, and how many runs are missing from it."""
    experiment, exemplars = part
    jobs = part_jobs(part, seeds, choices)
    results = runs.load(jobs)
    complete = kept.complete_seeds(jobs, results)
    by_case: dict[Case, dict[int, Result]] = {
        case: {} for case in experiment.cases(exemplars) if tuned_case(case) in choices
    }
    for job, result in results.items():
        if job.seed in complete:
            by_case[job.config.case][job.seed] = result
    lines = [Line(case, choices[tuned_case(case)], found) for case, found in by_case.items() if found]
    return lines, len(seeds) * len(experiment.cases(exemplars)) - len(results)


def show(part: Part, seeds: Sequence[int], choices: Choices, runs: Runs) -> dict[str, Cell]:
    """Print a table, and return its numbers by key."""
    experiment, exemplars = part
    lines, missing = lines_of(part, seeds, choices, runs)
    complete = sorted(lines[0].results) if lines else []
    size = experiment.setting
    images = (
        f"{size.train_per_class} images a class" if size.train_per_class else f"{size.train_per_task} images a task"
    )
    title = f"{size.name}, {images}, {exemplars} exemplars a task, seeds {', '.join(map(str, complete)) or 'none'}"
    if missing:
        title += f"; {missing} runs of {len(seeds)} seeds are missing"
    codes = {result["code"] for line in lines for result in line.results.values()}
    if len(codes) > 1:
        title += f"; from {len(codes)} versions of the code"
    accs = {line.case.arm.label: line.percent("acc") for line in lines}
    setting = experiment.setting.name.replace("-", "_")
    flat: dict[str, Cell] = {f"seeds_{setting}_{exemplars}": len(complete)}
    rows: list[list[Cell]] = []
    for line in lines:
        label = line.case.arm.label
        over_er, over_gem = (paired(accs[label], accs.get(other, {})) for other in ("er", DEFAULT_GEM))
        means = {
            "acc": _mean(accs[label]),
            "gain_over_er": over_er if label != "er" else None,
            "gain_over_gem": over_gem if label != DEFAULT_GEM else None,
            "bwt": _mean(line.percent("bwt")),
            "over_fitting": _mean(line.percent("over_fitting")),
        }
        results = line.results.values()
        rows.append(
            [
                label,
                line.rate,
                *(None if mean is None else str(mean) for mean in means.values()),
                sum(result["failure"] is not None for result in results),
                fmean(result["corrected_ratio"] for result in results),
                round(fmean(result["bytes_per_task"] for result in results)),
                fmean(result["seconds"] for result in results),
            ]
        )
        for name, mean in means.items():
            if mean is not None:
                flat |= keys(f"{name}_{key_of(label)}_{setting}_{exemplars}", mean, is_gain=name.startswith("gain_"))
    print_table(title, COLUMNS, rows)
    return flat


def keys(key: str, mean: Estimate, *, is_gain: bool) -> dict[str, Cell]:
    """A gain is in points and has both ends of its interval; any other mean has half of it."""
    if is_gain:
        return {f"{key}_points": mean.mean, f"{key}_low": mean.low, f"{key}_high": mean.high}
    return {key: mean.mean, f"{key}_interval": mean.half}


def key_of(label: str) -> str:
    """A line's name in keys."""
    return re.sub(r"[^a-z0-9]+", "_", label)


def _mean(values: Mapping[int, float]) -> Estimate | None:
    return estimate(list(values.values())) if values else None


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    kept.add_arguments(parser)
    names = [experiment.setting.name for experiment in EXPERIMENTS]
    parser.add_argument("--settings", nargs="+", choices=names, default=names, metavar="SETTING", help="only these")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help=f"of {', '.join(map(str, SEEDS))}, so many")
    parser.add_argument("--tune", action="store_true", help="only choose the learning rates, on held-out images")
    parser.add_argument("--fashion", type=Path, default=DEBIAN, help="folder of Fashion-MNIST (default: Debian's)")
    parser.add_argument("--cifar10", type=Path, help="folder of CIFAR-10; without it no run on CIFAR-10 is made")
    parser.add_argument(
        "--cifar10-per-class",
        type=int,
        default=CIFAR10_PER_CLASS,
        metavar="N",
        help=f"training images of each class of CIFAR-10 (default {CIFAR10_PER_CLASS})",
    )
    parser.add_argument("--device", default="cpu", help="of the networks")


def main() -> None:
    args = parse_args("how much does GEM forget with a compressed memory, beside experience replay?", _add_arguments)
    seeds = SEEDS[:1] if args.quick else SEEDS[: args.seeds]
    stages = [
        [
            (sized(experiment, args.cifar10_per_class), count)
            for experiment, count in stage
            if experiment.setting.name in args.settings
        ]
        for stage in (QUICK_STAGES if args.quick else STAGES)
    ]
    sources = {"sample": "sample"}
    if args.fashion.is_dir():
        sources["fashion-mnist"] = str(args.fashion)
    if args.cifar10:
        sources["cifar10"] = str(args.cifar10)
    with tempfile.TemporaryDirectory() as temporary:
        runs = Runs(
            folder=Path(temporary) if args.quick else args.out,
            sources=sources,
            device=args.device,
            processes=args.jobs,
            deadline=time.monotonic() + 60 * args.minutes,
        )
        choices: Choices = {}
        for stage in stages:
            for experiment, exemplars in stage:
                choices |= (
                    dict.fromkeys(experiment.tuned, QUICK_RATE) if args.quick else tune(experiment, exemplars, runs)
                )
            if not args.tune:
                runs.make(stage_jobs(stage, seeds, choices))
        if not args.quick:
            for experiment in dict.fromkeys(experiment for stage in stages for experiment, _ in stage):
                print_choices(experiment, runs)
        if args.tune:
            return
        flat: dict[str, Cell] = {}
        for stage in stages:
            for part in stage:
                flat |= show(part, seeds, choices, runs)
    headline = summary(flat, QUICK_EXEMPLARS if args.quick else PAPERS_EXEMPLARS)
    finish(args, {**headline, **flat} if args.json else headline)


def summary(flat: Mapping[str, Cell], exemplars: int) -> dict[str, Cell]:
    """The keys of GEM at the trainer's default gamma and of experience replay, at one number of exemplars."""
    found: dict[str, Cell] = {}
    for setting in ("class_incremental", "permuted"):
        for name, line in (("gem", key_of(DEFAULT_GEM)), ("er", "er")):
            for end in ("", "_interval"):
                found[f"acc_{name}_{setting}{end}"] = flat.get(f"acc_{line}_{setting}_{exemplars}{end}")
        for end in ("points", "low"):
            gain = f"gain_over_er_{key_of(DEFAULT_GEM)}_{setting}_{exemplars}_{end}"
            found[f"gem_gain_over_er_{setting}_{end}"] = flat.get(gain)
    counts = [flat.get(f"seeds_{setting}_{exemplars}") for setting in ("class_incremental", "permuted")]
    return {**found, "exemplars": exemplars, "seeds": min(int(count or 0) for count in counts)}


if __name__ == "__main__":
    main()
