"""Compare the trainer's methods on class-incremental streams, with memories of equal bytes, between floor and ceiling.

Five tasks of two classes, one MLP of two hidden layers of 100 with ten outputs, 10 passes over each task (GEM: 3). The
floor is plain training without memory, the ceiling is training from scratch on all data so far; LwF has no memory
either. All others have the bytes of 20 raw images of each class; what comes with an exemplar, DER's logits, say, is
paid from them. Memories are filled once a task is learned, ranked by herding, or online, by reservoir or ring, with
updates after every 32 accepted images. Images are not varied. Data: scikit-learn's digits, and 200 training images of
each class of the Fashion-MNIST sample.

Learning rates come from `--tune`, which scores a grid on held-out training images of a stream that no other run uses.
Intervals are of 95 % by the t distribution over seeds, which draw the order of classes, too.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

import numpy as np
import torch
from intervals import half_width
from report import Cell, finish, parse_args, print_table

from engram.fields import KEY
from engram_trainer import datasets, methods, stream
from engram_trainer.configuration import RuntimeConfig
from engram_trainer.datasets import Dataset
from engram_trainer.evaluation import Metrics, accuracy, metrics
from engram_trainer.local_memory import LocalConfig
from engram_trainer.memory import Learned, Memory, NoMemory
from engram_trainer.methods import Learner
from engram_trainer.plain_memory import local_memory
from engram_trainer.runtime import Runtime
from engram_trainer.stream import StreamConfig

Kind = Literal["raw", "strips"]

TASKS = 5
TRAIN_PER_CLASS, QUICK_TRAIN_PER_CLASS = 200, 60
PER_CLASS = 20
CLASS_ID_BYTES = 2
QUALITY = 50
GRID = (0.01, 0.03, 0.1, 0.3)
TUNING_SEEDS = (1000, 1001)

ONLINE = {"fill": "online", "flush": 32}
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "finetune (floor)": ("finetune", {}),
    "LwF": ("lwf", {}),
    "A-GEM": ("agem", {"epochs": 10}),
    "GEM": ("gem", {"epochs": 3}),
    "GEM, online": ("gem", {"epochs": 3, **ONLINE}),
    "ER": ("er", {}),
    "ER, online": ("er", ONLINE),
    "DER": ("der", {}),
    "DER++": ("derpp", {}),
    "DER++, online": ("derpp", ONLINE),
    "iCaRL": ("icarl", {}),
    "WA": ("wa", {}),
    "LUCIR": ("lucir", {"epochs": 10, "batch_size": 32, "padding": 0, "flip": False}),
    "LUCIR, NME": ("lucir", {"epochs": 10, "batch_size": 32, "padding": 0, "flip": False, "classify": "nme"}),
    "joint (ceiling)": ("joint", {}),
}
WITHOUT_MEMORY = {"finetune", "lwf", "joint"}
# The best of `--tune`, exemplars raw.
LEARNING_RATES: dict[str, dict[str, float]] = {
    "digits": {
        "finetune (floor)": 0.03,
        "LwF": 0.01,
        "A-GEM": 0.01,
        "GEM": 0.3,
        "GEM, online": 0.3,
        "ER": 0.3,
        "ER, online": 0.3,
        "DER": 0.1,
        "DER++": 0.1,
        "DER++, online": 0.1,
        "iCaRL": 0.3,
        "WA": 0.1,
        "LUCIR": 0.03,
        "LUCIR, NME": 0.03,
        "joint (ceiling)": 0.03,
    },
    "sample": {
        "finetune (floor)": 0.03,
        "LwF": 0.03,
        "A-GEM": 0.01,
        "GEM": 0.1,
        "GEM, online": 0.1,
        "ER": 0.1,
        "ER, online": 0.1,
        "DER": 0.03,
        "DER++": 0.1,
        "DER++, online": 0.1,
        "iCaRL": 0.1,
        "WA": 0.1,
        "LUCIR": 0.03,
        "LUCIR, NME": 0.03,
        "joint (ceiling)": 0.03,
    },
}


@dataclass(frozen=True)
class Outcome:
    """One run."""

    metrics: Metrics
    exemplars: int
    used_bytes: int
    seconds: float


def learn(data: Dataset, config: StreamConfig, row: str, kind: Kind, *, lr: float, seed: int) -> Outcome:
    """All tasks, one after the other."""
    tasks = stream.build(data, config)
    runtime = Runtime(RuntimeConfig(), tasks, seed=seed)
    method, options = ROWS[row]
    learner = methods.build(method, runtime, network="mlp", options={**options, "lr": lr})
    memory = memory_of(learner, method, kind, budget_bytes=PER_CLASS * 10 * image_bytes(data))
    started = time.perf_counter()
    matrix = []
    for task in tasks.visits:
        learner.learn(task, memory, _silent)
        if not learner.fills_memory:
            columns = learner.columns(task.train)
            memory.add(Learned(task.index, task.train, embed=learner.embed, seed=seed, fields=columns))
        learner.balance(task, memory, _silent)
        met = tasks.tasks[: task.index + 1]
        matrix.append([accuracy(learner.scores, runtime, each, learned=task.visit) for each in met])
    return Outcome(
        metrics(matrix, test_counts=[len(task.test) for task in tasks.tasks]),
        sum(sum(classes.values()) for classes in memory.counts().values()),
        memory.used_bytes,
        time.perf_counter() - started,
    )


def _silent(done: int, total: int, *, loss: torch.Tensor) -> None:
    """No bar."""


def image_bytes(data: Dataset) -> int:
    """Of a raw exemplar."""
    return int(np.prod(data.shape)) + CLASS_ID_BYTES


def memory_of(learner: Learner, method: str, kind: Kind, *, budget_bytes: int) -> Memory:
    """A memory in this process."""
    if method in WITHOUT_MEMORY:
        return NoMemory()
    fields = {**learner.fields, **({KEY: "utf8"} if learner.fills_memory else {})}
    quality = None if kind == "raw" else QUALITY
    return local_memory(LocalConfig(kind=kind, budget_bytes=budget_bytes, quality=quality, fields=fields))


def tune(data: dict[str, Dataset], rows: list[str], kind: Kind) -> None:
    """Print the last accuracy on held-out training images for every learning rate."""
    table: list[list[Cell]] = []
    for name, dataset in data.items():
        for row in rows:
            found = [fmean(_held_out(dataset, row, kind, rate, seed) for seed in TUNING_SEEDS) for rate in GRID]
            table.append([name, row, *found, GRID[int(np.argmax(found))]])
            print(*table[-1], file=sys.stderr, flush=True)
    print_table("Last accuracy on held-out training images", ["data", "method", *map(str, GRID), "best"], table)


def _held_out(data: Dataset, row: str, kind: Kind, lr: float, seed: int) -> float:
    config = StreamConfig(
        tasks=TASKS, seed=seed, train_per_class=TRAIN_PER_CLASS, validation_ratio=0.2, test_per_class=50
    )
    try:
        return learn(data, config, row, kind, lr=lr, seed=seed).metrics.last
    except FloatingPointError:
        return 0.0


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", type=int, default=3, help="runs of each kind (default 3; --quick makes 1)")
    parser.add_argument("--memory", choices=("raw", "strips"), default="raw", help="what all methods replay from")
    parser.add_argument("--data", choices=("digits", "sample"), help="only this one; else both (--quick: digits)")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="ROW", help="only these")
    parser.add_argument("--tune", action="store_true", help="only print the grid of learning rates, on held-out images")


def main() -> None:
    args = parse_args("which method learns class by class best, with memories of equal bytes?", _add_arguments)
    torch.set_num_threads(1)
    names = [args.data] if args.data else ["digits"] if args.quick else ["digits", "sample"]
    data = {name: datasets.load(name) for name in names}
    if args.tune:
        tune(data, args.rows, args.memory)
        return
    seeds = 1 if args.quick else args.seeds
    flat: dict[str, Cell] = {"seeds": seeds, "memory": args.memory}
    for name, dataset in data.items():
        most = QUICK_TRAIN_PER_CLASS if args.quick else TRAIN_PER_CLASS
        configs = [StreamConfig(tasks=TASKS, seed=seed, train_per_class=most) for seed in range(seeds)]
        rows = [_row(row, name, dataset, args.memory, configs, flat) for row in args.rows]
        print_table(
            f"{name}, {TASKS} tasks, {seeds} seeds, {args.memory}, {PER_CLASS * 10 * image_bytes(dataset):,} bytes",
            ["method", "last", "+-", "average", "+-", "forgetting", "exemplars", "bytes", "seconds"],
            rows,
        )
    finish(args, flat)


def _row(
    row: str, name: str, data: Dataset, kind: Kind, configs: list[StreamConfig], flat: dict[str, Cell]
) -> list[Cell]:
    """One line of the table, averaged over seeds; its accuracies go into `flat`, too."""
    lr = LEARNING_RATES[name][row]
    outcomes = [learn(data, config, row, kind, lr=lr, seed=config.seed) for config in configs]
    last = [100 * outcome.metrics.last for outcome in outcomes]
    average = [100 * outcome.metrics.average_incremental for outcome in outcomes]
    key = f"{name}_{row.split(' (')[0].lower().replace('++', 'pp').replace(', ', '_').replace('-', '')}"
    flat |= {f"{key}_last": fmean(last), f"{key}_interval": half_width(last)}
    print(f"{name} {row}: {fmean(last):.1f}", file=sys.stderr, flush=True)
    return [
        row,
        fmean(last),
        half_width(last),
        fmean(average),
        half_width(average),
        fmean(100 * (outcome.metrics.forgetting or 0.0) for outcome in outcomes),
        round(fmean(outcome.exemplars for outcome in outcomes)),
        round(fmean(outcome.used_bytes for outcome in outcomes)),
        fmean(outcome.seconds for outcome in outcomes),
    ]


if __name__ == "__main__":
    main()
