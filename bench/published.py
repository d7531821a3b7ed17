"""Measure what plain replay gains from strips in a published protocol: Seq-CIFAR-10, class-incremental, ER and DER++.

CIFAR-10 in its own order of classes, 5 tasks of 2 classes, 10,000 images each; 32 new images and 32 exemplars a step
(DER++: twice 32), shifted by up to 4 pixels and flipped alike; SGD without momentum or decay. A reservoir decides what
is kept, image by image, while a task is learned. Arms of one method differ in its memory alone:

    er_raw_200, er_raw_500, er_raw_5120, derpp_raw_500    so many images as pixels, as published
    er_614400, er_1536000, derpp_614400                   the bytes of the pixels of 200 or 500 images, in strips

Raw arms have class ids, logits and keys for nothing. Strips pay for everything from their bytes: class ids, checksums,
keys, DER++'s logits (20 bytes). Their quality is the one that selection chooses on the images of the first task, which
a buffer would keep, and their slots are what the budget holds by the mean size of those. Half of a task's own images
are shown as JPEG gives them back where exemplars are strips (`codec_ratio`). What a reservoir accepts is sent to the
memory once it is a hundredth of the slots, in all arms.

Two scales of one script:

    --device cuda    in full: ResNet-18, 50 epochs a task, the published learning rates, in bfloat16 unless --precision
                     says 32
    --device cpu     scaled down, all arms alike: 16 to 128 channels instead of 64 to 512, 2 epochs a task instead of
                     50; learning rates from a grid for each method, by the mean over its arms of 500 raw images and of
                     614,400 bytes of strips, on held-out training images, with a seed that the table does not use

A run has checkpoints between its epochs: stopped anywhere, by --minutes too, the same command goes on, and the seconds
in its result are those since then. Seeds draw initial weights, batches, variation and the reservoir; images and their
order of classes are the same for all.

Source: Buzzega et al., Dark Experience for General Continual Learning (NeurIPS 2020), table 2, and aimagelab/mammoth;
the trainer's recipes have the settings, and what differs: convolutions start by He's rule.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

import kept
import numpy as np
import report
import torch
from intervals import Estimate, estimate, paired
from kept import Job, Result, Unfinished

from engram.content import Policy
from engram.fields import KEY
from engram.schemas import Decision, IngestOptions
from engram_trainer import datasets, loop, recipes, stream
from engram_trainer.configuration import MemoryConfig, Precision, RunConfig, RuntimeConfig
from engram_trainer.local_memory import LocalConfig, StripMemory
from engram_trainer.memory import Learned
from engram_trainer.plain_memory import local_memory
from engram_trainer.report import Report
from engram_trainer.stream import Stream, StreamConfig

Method = Literal["er", "derpp"]
Device = Literal["cpu", "cuda"]

SEEDS = (10, 11, 12)
TUNING_SEEDS = (1000,)
RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
FIRST_RATES = (0.03, 0.1, 0.3)
"""Tried first. Where the best of those tried is the first or the last, the next one is tried, too."""
PUBLISHED_RATES: Mapping[Method, float] = {"er": 0.1, "derpp": 0.03}
FIELDS: Mapping[Method, Mapping[str, str]] = {"er": {}, "derpp": {"logits": "float16 [10]"}}
LIKE: Mapping[Method, str] = {"er": "er-cifar10-500", "derpp": "derpp-cifar10-500"}
"""The recipe of each method; the published weights of DER++'s terms depend on the memory, these are those for 500."""
CODEC_RATIO = 0.5
CHECKPOINT_S = 20.0


@dataclass(frozen=True)
class Arm:
    """A method and its memory: so many raw images, or so many bytes of strips."""

    name: str
    method: Method
    slots: int | None = None
    budget_bytes: int | None = None

    @property
    def published(self) -> float | None:
        """Last accuracy in the DER paper, in percent."""
        if self.slots is None:
            return None
        return self._numbers[0]

    @property
    def said(self) -> str | None:
        """The same, and Mammoth's own later runs where they are listed."""
        if self.slots is None:
            return None
        first, *later = self._numbers
        return f"{first:.1f}" + "".join(f" (Mammoth's own: {each:.1f})" for each in later)

    @property
    def _numbers(self) -> list[float]:
        return [100 * number.value for number in recipes.find(f"{self.method}-cifar10-{self.slots}").numbers]


ARMS = (
    Arm("er_614400", "er", budget_bytes=614_400),
    Arm("derpp_raw_500", "derpp", slots=500),
    Arm("er_raw_200", "er", slots=200),
    Arm("er_1536000", "er", budget_bytes=1_536_000),
    Arm("er_raw_5120", "er", slots=5120),
    Arm("derpp_614400", "derpp", budget_bytes=614_400),
    Arm("er_raw_500", "er", slots=500),
)
"""What is wanted most comes first."""
CLAIMS = (
    ("er_614400", "er_raw_200"),
    ("er_614400", "derpp_raw_500"),
    ("er_1536000", "er_raw_500"),
    ("er_1536000", "er_raw_5120"),
    ("derpp_614400", "derpp_raw_500"),
)
"""Which arm is compared with which."""
TUNED_ON: Mapping[Method, tuple[str, ...]] = {
    "er": ("er_raw_500", "er_614400"),
    "derpp": ("derpp_raw_500", "derpp_614400"),
}


@dataclass(frozen=True)
class Scale:
    """What all arms of a table have in common."""

    network: str
    epochs: int
    train_per_class: int | None = None
    test_per_class: int | None = None
    validation_ratio: float = 0.0
    device: Device = "cpu"
    precision: Precision = "32"


FULL = Scale("resnet18-cifar", 50, device="cuda", precision="bf16")
SCALED = Scale("resnet18-narrow", 2)
TUNING = replace(SCALED, train_per_class=1500, validation_ratio=0.1)
QUICK = Scale("conv", 1, train_per_class=100, test_per_class=50)


@dataclass(frozen=True)
class Setting:
    """All that a run depends on but its seed and the images."""

    arm: Arm
    scale: Scale
    lr: float
    codec_ratio: float = CODEC_RATIO


@dataclass(frozen=True)
class Strips:
    """What a memory of strips is told: the quality that selection chose, and how many exemplars there will be."""

    quality: int
    slots: int
    decisions: Mapping[int, Decision]
    """What every task's images say about quality; the first one's is the choice."""


def strips_of(arm: Arm, tasks: Stream, *, epochs: int, seed: int) -> Strips:
    """Quality and slots of an arm, both by the images of the first task."""
    assert arm.budget_bytes is not None, "asked of strips"
    chooser = StripMemory(Policy(arm.budget_bytes, roomy_quality=None), IngestOptions(ranking="random"))
    quality = None
    for task in tasks.tasks:
        chooser.add(Learned(task.index, task.train, seed=seed))
        quality = quality or chooser.quality
    assert quality is not None, "there were tasks"
    memory = local_memory(
        LocalConfig("strips", arm.budget_bytes, ranking="random", quality=quality, fields=fields_of(arm.method))
    )
    first = tasks.tasks[0].train
    columns: dict[str, Any] = {KEY: [f"v0-e{epochs - 1}-r{row}" for row in range(len(first))]}
    if FIELDS[arm.method]:
        columns["logits"] = np.zeros((len(first), len(tasks.class_order)), np.float16)
    return Strips(quality, memory.slots(first.read(), first.class_ids, columns), chooser.decisions)


def fields_of(method: Method) -> dict[str, str]:
    """What an exemplar of a memory that is filled online has beside its image."""
    return {**FIELDS[method], KEY: "utf8"}


def stream_of(scale: Scale, seed: int) -> StreamConfig:
    """The published tasks; a seed draws which images only where not all are taken."""
    return StreamConfig(
        tasks=5,
        class_order=tuple(range(10)),
        seed=seed,
        train_per_class=scale.train_per_class,
        test_per_class=scale.test_per_class,
        validation_ratio=scale.validation_ratio,
    )


def config_of(setting: Setting, data: str, strips: Strips | None, *, seed: int) -> RunConfig:
    """The trainer's configuration: the recipe's, with this memory at this scale."""
    arm, scale = setting.arm, setting.scale
    recipe = recipes.find(LIKE[arm.method]).config
    slots = arm.slots if strips is None else strips.slots
    assert slots is not None, "an arm is raw, or its strips are given"
    if strips is None:
        like = recipes.find(f"{arm.method}-cifar10-{slots}")
        memory = replace(like.config.memory, ranking="random")
    else:
        assert arm.budget_bytes is not None, "strips have bytes"
        memory = MemoryConfig("strips", arm.budget_bytes, quality=strips.quality, ranking="random")
    options = {"epochs": scale.epochs, "lr": setting.lr, "slots": slots, "flush": max(1, slots // 100)}
    return replace(
        recipe,
        recipe=None,
        data=data,
        stream=stream_of(scale, seed),
        options={**recipe.options, **options, "codec_ratio": setting.codec_ratio},
        network=scale.network,
        memory=memory,
        seed=seed,
        runtime=RuntimeConfig(device=scale.device, precision=scale.precision, checkpoint_s=CHECKPOINT_S),
    )


class Clock(loop.Silent):
    """Stops a run when its time is up."""

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline

    def phase(self, name: str, done: int, total: int, *, note: str = "") -> None:
        """Asked several times a second.

        Raises:
            Unfinished: the deadline has come.
        """
        if time.time() > self.deadline:
            raise Unfinished(f"stopped in {name}, {done} of {total}")


def execute(job: Job, *, data: str, runs: Path, deadline: float) -> Result:
    """One run, from its last checkpoint on if there is one.

    Args:
        job: its configuration is a `Setting`.
        data: the folder of CIFAR-10.
        runs: where runs that are not finished are.
        deadline: when to stop, by `time.time`.

    Raises:
        Unfinished: the deadline has come.
    """
    setting: Setting = job.config
    arm, strips = setting.arm, None
    if arm.budget_bytes is not None:
        tasks = stream.build(datasets.load(data), stream_of(setting.scale, job.seed))
        strips = strips_of(arm, tasks, epochs=setting.scale.epochs, seed=job.seed)
    config = config_of(setting, data, strips, seed=job.seed)
    folder = folder_of(job, runs)
    about = {
        "quality": None if strips is None else strips.quality,
        "slots": config.options["slots"],
        "decisions": None if strips is None else {task: said(each) for task, each in strips.decisions.items()},
    }
    try:
        done = loop.run(config, folder, resume=(folder / "run.json").is_file(), watch=Clock(deadline), pictures=False)
    except FloatingPointError as error:
        return {**about, "diverged": str(error)}
    return {**about, **result_of(done)}


def result_of(done: Report) -> Result:
    """What is kept of a run."""
    found = done.metrics
    assert found is not None, "the run is finished"
    held = done.memory[-1]
    return {
        "diverged": None,
        "last": 100 * found.last,
        "average_incremental": 100 * found.average_incremental,
        "incremental": [100 * accuracy for accuracy in found.incremental],
        "forgetting": None if found.forgetting is None else 100 * found.forgetting,
        "matrix": done.matrix,
        "exemplars": held["exemplars"],
        "used_bytes": held["used_bytes"],
        "memory": [[each["exemplars"], each["used_bytes"], each["tasks"]] for each in done.memory],
        "task_seconds": done.seconds,
    }


def said(decision: Decision) -> dict[str, Any]:
    """What a task's images say about quality."""
    return {
        "blocks": decision.blocks,
        "block": decision.block,
        "reason": decision.reason,
        "candidates": [
            {
                "quality": each.quality,
                "exemplars": each.exemplars,
                "bytes": each.bytes,
                "ratio": {name: None if ratio is None else round(ratio, 4) for name, ratio in each.ratio.items()},
            }
            for each in decision.candidates
        ],
    }


def folder_of(job: Job, runs: Path) -> Path:
    """Where a run is until it is finished."""
    path = job.path(runs)
    return path.with_suffix("")


@dataclass(frozen=True)
class Bench:
    """What the tables of one invocation are made with."""

    data: str
    out: Path
    runs: Path
    processes: int
    deadline: float

    def collect(self, jobs: Sequence[Job]) -> dict[Job, Result]:
        """The results of these jobs, as far as there is time; what is left of finished runs goes."""
        found = kept.collect(
            jobs,
            partial(execute, data=self.data, runs=self.runs, deadline=self.deadline),
            folder=self.out,
            processes=self.processes,
            minutes=max(0.0, (self.deadline - time.time()) / 60),
            tell=lambda job, result: result["diverged"] or f"{result['last']:.1f}",
        )
        for job in found:
            shutil.rmtree(folder_of(job, self.runs), ignore_errors=True)
        return found

    def tune(self, method: Method) -> dict[float, float | None]:
        """The last accuracy on held-out images with each rate that was tried, the mean over arms and seeds; None where
        a run is missing. A run that diverged counts 0."""
        rates = [*FIRST_RATES]
        while True:
            jobs = [tuning_job(arm, rate, seed) for seed in TUNING_SEEDS for rate in rates for arm in tuned_on(method)]
            scores = tuning_scores(jobs, self.collect(jobs))
            wider = wider_rates(scores)
            if wider == rates:
                return scores
            rates = wider


def tuned_on(method: Method) -> list[Arm]:
    """The arms whose mean decides about a method's learning rate."""
    return [arm for arm in ARMS if arm.name in TUNED_ON[method]]


def tuning_job(arm: Arm, rate: float, seed: int) -> Job:
    """A run of the grid."""
    return Job("published-tuning", f"{arm.name} {rate:g}", seed, Setting(arm, TUNING, rate))


def tuning_scores(jobs: Sequence[Job], results: Mapping[Job, Result]) -> dict[float, float | None]:
    """The mean result with each rate; None where it is not complete."""
    scores: dict[float, float | None] = {}
    for rate in sorted({job.config.lr for job in jobs}):
        found = [results.get(job) for job in jobs if job.config.lr == rate]
        done = [result for result in found if result is not None]
        scores[rate] = fmean(result.get("last", 0.0) for result in done) if len(done) == len(found) else None
    return scores


def wider_rates(scores: Mapping[float, float | None]) -> list[float]:
    """The rates to try: one more where the best of those that were tried is at an end, and there is another."""
    best, rates = best_rate(scores), sorted(scores)
    if best is None:
        return rates
    if best == rates[0] and best > RATES[0]:
        return [RATES[RATES.index(best) - 1], *rates]
    if best == rates[-1] and best < RATES[-1]:
        return [*rates, RATES[RATES.index(best) + 1]]
    return rates


def best_rate(scores: Mapping[float, float | None]) -> float | None:
    """The rate with the highest score, the lower of equals; None where a score is missing."""
    known = {rate: score for rate, score in sorted(scores.items()) if score is not None}
    return max(known, key=lambda rate: known[rate]) if len(known) == len(scores) else None


def table_jobs(table: str, arms: Iterable[Arm], scale: Scale, rates: Mapping[Method, float], seeds: int) -> list[Job]:
    """Seed by seed."""
    arms = list(arms)
    numbers = [*SEEDS, *range(max(SEEDS) + 1, max(SEEDS) + seeds)][:seeds]
    return [Job(table, arm.name, seed, Setting(arm, scale, rates[arm.method])) for seed in numbers for arm in arms]


def by_seed(results: Mapping[Job, Result], name: str, seeds: Iterable[int]) -> dict[int, float]:
    """The last accuracies of an arm, where it has not diverged."""
    seeds = set(seeds)
    return {
        job.seed: result["last"]
        for job, result in results.items()
        if job.name == name and job.seed in seeds and result["diverged"] is None
    }


def print_results(jobs: Sequence[Job], results: Mapping[Job, Result], title: str) -> dict[str, Any]:
    """The tables over the seeds whose runs are all done, and their numbers by key."""
    seeds = kept.complete_seeds(jobs, results)
    arms = list(dict.fromkeys(job.config.arm for job in jobs))
    flat: dict[str, Any] = {
        "seeds": len(seeds),
        "runs_missing": len(jobs) - len(results),
        "old_code": len(kept.stale(results.values())),
    }
    rows: list[list[report.Cell]] = []
    for arm in arms:
        found = [result for job, result in results.items() if job.name == arm.name and job.seed in seeds]
        last = by_seed(results, arm.name, seeds)
        mean = estimate([*last.values()]) if last and len(last) == len(found) else None
        flat[f"{arm.name}_last"] = None if mean is None else round(mean.mean, 2)
        flat[f"{arm.name}_half"] = None if mean is None else rounded(mean.half)
        rows.append([arm.name, *_described(arm, found), _text(mean, found), arm.said])
    missing = f"; {flat['runs_missing']} runs are missing" if flat["runs_missing"] else ""
    report.print_table(
        f"{title}, {len(seeds)} seeds{missing}",
        ["arm", "quality", "exemplars", "bytes", "average", "forgetting", "last", "published"],
        rows,
    )
    rows = []
    for these, others in CLAIMS:
        ours, theirs = flat.get(f"{these}_last"), flat.get(f"{others}_last")
        found_pair = paired(by_seed(results, these, seeds), by_seed(results, others, seeds))
        if ours is None or theirs is None or found_pair is None:
            continue
        reference = next(arm.published for arm in ARMS if arm.name == others)
        beyond = None if reference is None else round(ours - reference, 2)
        rows.append([f"{these} less {others}", str(found_pair), rounded(found_pair.low), beyond])
        flat |= {
            f"{these}_over_{others}_points": rounded(found_pair.mean),
            f"{these}_over_{others}_low": rounded(found_pair.low),
        }
    report.print_table(
        "Differences in points, paired by seed",
        ["difference", "mean", "lower end of 95 %", "less the other's published figure"],
        rows,
    )
    return flat


def _described(arm: Arm, found: Sequence[Result]) -> list[report.Cell]:
    """Quality, exemplars, bytes, average incremental accuracy and forgetting of an arm."""
    learned = [result for result in found if result["diverged"] is None]
    if not learned:
        return [None] * 5
    qualities = sorted({result["quality"] for result in learned if result["quality"] is not None})
    return [
        ", ".join(map(str, qualities)) or "raw",
        round(fmean(result["exemplars"] for result in learned)),
        round(fmean(result["used_bytes"] for result in learned)),
        fmean(result["average_incremental"] for result in learned),
        fmean(result["forgetting"] for result in learned),
    ]


def _text(mean: Estimate | None, found: Sequence[Result]) -> str | None:
    diverged = sum(result["diverged"] is not None for result in found)
    if diverged:
        return f"diverged in {diverged} of {len(found)}"
    return None if mean is None else str(mean)


def rounded(value: float | None) -> float | None:
    """To hundredths."""
    return None if value is None else round(value, 2)


def print_tuning(scores: Mapping[Method, Mapping[float, float | None]]) -> None:
    """The grid."""
    report.print_table(
        "Last accuracy on held-out training images by learning rate",
        ["method", *map(str, RATES), "best"],
        [[method, *(of.get(rate) for rate in RATES), best_rate(of)] for method, of in scores.items()],
    )


def scale_of(args: argparse.Namespace) -> Scale:
    """By the device."""
    device: Device = args.device
    if args.quick:
        return replace(QUICK, device=device)
    return SCALED if device == "cpu" else replace(FULL, precision=args.precision or FULL.precision)


def main() -> None:
    def add(parser: argparse.ArgumentParser) -> None:
        names = [arm.name for arm in ARMS]
        parser.add_argument("--cifar10", required=True, help="the folder cifar-10-batches-bin, or another form of it")
        parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: in full (default cpu)")
        parser.add_argument("--precision", choices=("32", "bf16"), help="on a GPU (default bf16)")
        parser.add_argument("--seeds", type=int, default=len(SEEDS), help="runs of each arm (default 3)")
        parser.add_argument("--arms", nargs="+", choices=names, default=names, metavar="ARM", help="only these")
        parser.add_argument("--tune", action="store_true", help="only find learning rates, on held-out images")
        parser.add_argument("--runs", type=Path, default=Path("runs/published"), help="where unfinished runs are")
        kept.add_arguments(parser)

    args = report.parse_args("in a published protocol, what does plain replay gain from strips?", add)
    torch.set_num_threads(1)
    scale = scale_of(args)
    with tempfile.TemporaryDirectory() as scratch:
        out, runs = (Path(scratch), Path(scratch) / "runs") if args.quick else (args.out, args.runs)
        bench = Bench(args.cifar10, out, runs, args.jobs, time.time() + 60 * args.minutes)
        flat: dict[str, Any] = {"epochs": scale.epochs, "device": scale.device, "network": scale.network, "seeds": 0}
        chosen = [arm for arm in ARMS if arm.name in args.arms and (not args.quick or arm in ARMS[:3])]
        rates: Mapping[Method, float | None] = PUBLISHED_RATES
        if args.tune or scale == SCALED:
            scores = {method: bench.tune(method) for method in dict.fromkeys(arm.method for arm in chosen)}
            print_tuning(scores)
            rates = {method: best_rate(found) for method, found in scores.items()}
        known: dict[Method, float] = {method: rate for method, rate in rates.items() if rate is not None}
        flat |= {f"lr_{method}": known.get(method) for method in PUBLISHED_RATES}
        if not args.tune and len(known) == len(rates):
            name = "quick" if args.quick else "scaled" if scale == SCALED else "full"
            jobs = table_jobs(f"published-{name}", chosen, scale, known, 1 if args.quick else args.seeds)
            title = f"Seq-CIFAR-10, {scale.network}, {scale.epochs} epochs a task, {name}"
            flat |= print_results(jobs, bench.collect(jobs), title)
    report.print_table("Scale", ["setting", "value"], [[key, str(value)] for key, value in asdict(scale).items()])
    report.finish(args, flat)


if __name__ == "__main__":
    main()
