"""Measure how much GEM forgets with a compressed memory, compared with plain training and with A-GEM.

The paper's setup, scaled down: 20 permuted or rotated Fashion-MNIST tasks of 1,000 images, one pass in minibatches of
10, an MLP of two hidden layers of 100, 256 random exemplars of each task. Every class is in every task and the task is
not given at test time; the first 200 test images of each class are scored. ACC, BWT and FWT by the paper's formulas,
with 1/(T-1); their b is measured at random weights. Memories: `strips` and `raw` in this process, `service` a real
service (1 seed); JPEG quality 50.

Learning rates come from `--tune`, which scores a grid on held-out training images of a stream that no other run uses.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, pstdev

import numpy as np
import torch
from report import Cell, finish, parse_args, print_table

from engram.client import Client
from engram.schemas import IngestOptions
from engram_trainer import datasets, methods, stream
from engram_trainer.configuration import RuntimeConfig
from engram_trainer.evaluation import Metrics, accuracy, metrics
from engram_trainer.local_memory import LocalConfig
from engram_trainer.local_service import local_service
from engram_trainer.memory import Learned, Memory, NoMemory
from engram_trainer.plain_memory import local_memory
from engram_trainer.runtime import Runtime
from engram_trainer.service_memory import ServiceMemory
from engram_trainer.stream import Scenario, Stream, StreamConfig

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
EXEMPLARS = 256
QUALITY = 50
# No budget binds here: the number of exemplars is the paper's, and the table says what they cost.
AMPLE_BYTES = 2**30
SCENARIOS: tuple[Scenario, ...] = ("permuted", "rotated")
GRID = (0.01, 0.03, 0.1)
TUNING_SEED = 1000

METHODS: dict[str, tuple[str, dict[str, object]]] = {
    "plain": ("finetune", {"epochs": 1, "batch_size": 10, "momentum": 0.0, "weight_decay": 0.0, "milestones": ()}),
    "agem": ("gem", {"average": True}),
    "gem_gamma_0": ("gem", {"gamma": 0.0}),
    "gem": ("gem", {}),
}
# The best of `--tune`: 20 tasks, held-out training images, seed 1000, exemplars in strips.
LEARNING_RATES = {
    ("permuted", "plain"): 0.03,
    ("permuted", "agem"): 0.03,
    ("permuted", "gem_gamma_0"): 0.03,
    ("permuted", "gem"): 0.1,
    ("rotated", "plain"): 0.03,
    ("rotated", "agem"): 0.1,
    ("rotated", "gem_gamma_0"): 0.01,
    ("rotated", "gem"): 0.1,
}


@dataclass(frozen=True)
class Outcome:
    """One run."""

    metrics: Metrics
    bytes_per_task: float
    corrected_ratio: float
    seconds: float


def learn(tasks: Stream, method: str, memory: Memory, *, learning_rate: float, seed: int) -> Outcome:
    """One pass over all tasks."""
    name, options = METHODS[method]
    runtime = Runtime(RuntimeConfig(), tasks, seed=seed)
    learner = methods.build(name, runtime, network="mlp", options={**options, "lr": learning_rate})
    started = time.perf_counter()
    at_random = [accuracy(learner.scores, runtime, task, learned=-1) for task in tasks.tasks]
    matrix = []
    for task in tasks.tasks:
        learner.learn(task, memory, _silent)
        rows = np.sort(np.random.default_rng([seed, task.index]).permutation(len(task.train))[:EXEMPLARS])
        memory.add(Learned(task.index, task.train.select(rows), seed=seed))
        matrix.append(
            [accuracy(learner.scores, runtime, each, learned=task.index) for each in tasks.tasks[: task.index + 2]]
        )
    steps = sum(-(-len(task.train) // 10) for task in tasks.tasks)
    return Outcome(
        metrics(matrix, test_counts=[len(task.test) for task in tasks.tasks], at_random=at_random),
        memory.used_bytes / len(tasks.tasks),
        getattr(learner, "corrected_steps", 0) / steps,
        time.perf_counter() - started,
    )


def _silent(done: int, total: int, *, loss: torch.Tensor) -> None:
    """No bar."""


def local(kind: str) -> Memory:
    """A memory in this process that keeps whatever it is given."""
    if kind == "none":
        return NoMemory()
    return local_memory(
        LocalConfig(
            kind="raw" if kind == "raw" else "strips",
            budget_bytes=AMPLE_BYTES,
            share_by="task",
            ranking="random",
            quality=QUALITY,
        )
    )


def through_service(url: str, folder: Path, name: str) -> ServiceMemory:
    """The same exemplars in a service, ranked at random and encoded at the same quality."""
    client = Client(url)
    client.create_buffer(name, budget_bytes=AMPLE_BYTES, share_by="task", quality=QUALITY)
    options = IngestOptions(ranking="random")
    return ServiceMemory(client, name, options=options, run=name, folder=folder / name)


def tune(data: datasets.Dataset, config: StreamConfig) -> None:
    """Print ACC on held-out training images for every learning rate."""
    rows: list[list[Cell]] = []
    for scenario in SCENARIOS:
        held_out = StreamConfig(
            scenario=scenario,
            tasks=config.tasks,
            seed=TUNING_SEED,
            train_per_task=config.train_per_task,
            test_per_class=100,
            validation_ratio=0.1,
        )
        tasks = stream.build(data, held_out)
        for method in METHODS:
            found = [
                learn(tasks, method, local("strips"), learning_rate=rate, seed=TUNING_SEED).metrics.acc for rate in GRID
            ]
            rows.append([scenario, method, *found, GRID[int(np.argmax(found))]])
    print_table("ACC on held-out training images", ["scenario", "method", *map(str, GRID), "best"], rows)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seeds", type=int, default=2, help="runs of each kind (default 2; --quick makes 1)")
    parser.add_argument("--scenario", choices=SCENARIOS, help="only this one; else both")
    parser.add_argument("--tune", action="store_true", help="only print the grid of learning rates, on held-out images")
    parser.add_argument("--data", default=str(DEBIAN) if DEBIAN.is_dir() else "sample", help="see engram-train --data")


def main() -> None:
    args = parse_args("how much does GEM forget with a compressed memory?", _add_arguments)
    torch.set_num_threads(1)
    data = datasets.load("sample" if args.quick else args.data)
    seeds = 1 if args.quick else args.seeds
    scenarios = (args.scenario,) if args.scenario else SCENARIOS
    size = (
        StreamConfig(tasks=6, train_per_task=500, test_per_class=50)
        if args.quick
        else StreamConfig(tasks=20, train_per_task=1000, test_per_class=200)
    )
    if args.tune:
        tune(data, size)
        return
    flat: dict[str, Cell] = {"tasks": size.tasks, "train_per_task": size.train_per_task, "seeds": seeds}
    with tempfile.TemporaryDirectory() as folder, local_service(Path(folder) / "service") as service:
        for scenario in scenarios:
            rows = [
                _row(kind, data, scenario, size, seeds=seeds, url=service.url, folder=Path(folder), flat=flat)
                for kind in ("plain none", "agem strips", "gem_gamma_0 strips", "gem strips", "gem raw", "gem service")
            ]
            print_table(
                f"{scenario}, {size.tasks} tasks, {seeds} seeds",
                ["method", "memory", "ACC", "+-", "BWT", "FWT", "corrected steps", "bytes per task", "seconds"],
                rows,
            )
    headline: dict[str, Cell] = {}
    for scenario in scenarios:
        acc, raw, plain, agem = (
            float(flat[f"{scenario}_{kind}_acc"] or 0)
            for kind in ("gem_strips", "gem_raw", "plain_none", "agem_strips")
        )
        headline[f"{scenario}_gem_gain_over_plain_points"] = 100 * (acc - plain)
        headline[f"{scenario}_gem_gain_over_agem_points"] = 100 * (acc - agem)
        headline[f"{scenario}_gem_loss_to_raw_memory_points"] = 100 * (raw - acc)
        headline[f"{scenario}_memory_bytes_raw_to_strips"] = float(
            flat[f"{scenario}_gem_raw_bytes_per_task"] or 0
        ) / float(flat[f"{scenario}_gem_strips_bytes_per_task"] or 1)
    flat |= headline
    finish(args, flat if args.json else headline)


def _row(
    kind: str,
    data: datasets.Dataset,
    scenario: Scenario,
    size: StreamConfig,
    *,
    seeds: int,
    url: str,
    folder: Path,
    flat: dict[str, Cell],
) -> list[Cell]:
    """One line of the table, averaged over seeds; its numbers go into `flat`, too."""
    method, where = kind.split()
    outcomes = []
    for seed in range(1 if where == "service" else seeds):
        config = StreamConfig(
            scenario=scenario,
            tasks=size.tasks,
            seed=seed,
            train_per_task=size.train_per_task,
            test_per_class=size.test_per_class,
        )
        memory = through_service(url, folder, f"gem-{scenario}-{seed}") if where == "service" else local(where)
        rate = LEARNING_RATES[scenario, method]
        outcomes.append(learn(stream.build(data, config), method, memory, learning_rate=rate, seed=seed))
    accs = [outcome.metrics.acc for outcome in outcomes]
    numbers: dict[str, Cell] = {
        "acc": fmean(accs),
        "acc_std": pstdev(accs),
        "bwt": fmean(outcome.metrics.bwt or 0.0 for outcome in outcomes),
        "fwt": fmean(outcome.metrics.fwt or 0.0 for outcome in outcomes),
        "corrected_ratio": fmean(outcome.corrected_ratio for outcome in outcomes),
        "bytes_per_task": fmean(outcome.bytes_per_task for outcome in outcomes),
        "seconds": fmean(outcome.seconds for outcome in outcomes),
    }
    flat.update({f"{scenario}_{method}_{where}_{name}": value for name, value in numbers.items()})
    print(f"{scenario} {kind}: ACC {numbers['acc']:.3f}", file=sys.stderr, flush=True)
    return [method, where, *numbers.values()]


if __name__ == "__main__":
    main()
