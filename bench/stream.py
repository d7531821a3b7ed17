"""What becomes of a memory that is fed bit by bit, and which policy of quality does best by it?

**Herding.** Images of ten classes come in 300 uploads of 20 under a fixed total budget. How far is the mean of what is
kept from the mean of all images, class by class, in the built-in embedding? Against one upload of all of them (joint
herding), and a random choice; with the quality and the number of exemplars along the way.

**Policies of quality.** LUCIR learns five tasks of two classes with one total budget, which later tasks share. Three
streams: tasks come whole; tasks come in uploads of 20 images; tasks come whole and the budget is ample, so that all
images fit at quality 90. The policies: keep everything at 90 while it fits, then choose and encode once more (what
Engram does); choose at the first upload; and each fixed quality, 90 being what Engram 0.1 would have taken for small
uploads. A policy's gap is what it loses in last accuracy to the best, paired over seeds.

Data are CIFAR-10 (`--cifar10 DIR`), else Fashion-MNIST, else the sample that ships with the trainer. A finished run is
a JSON file in `--out`: the same command goes on after an interruption.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import budget
import kept
import learning
import numpy as np
import report
import torch
from intervals import half_width

from engram.content import ROOMY_QUALITY, Content, Policy
from engram.memory import Upload, add
from engram.schemas import IngestOptions
from engram.selection.embedding import BuiltinEmbedder
from engram.selection.images import ArrayImages
from engram_trainer import datasets, evaluation, stream
from engram_trainer.configuration import RuntimeConfig
from engram_trainer.datasets import Dataset
from engram_trainer.local_memory import NetworkEmbedder, StripMemory
from engram_trainer.memory import Learned
from engram_trainer.methods import lucir
from engram_trainer.runtime import Runtime

UPLOAD_IMAGES = 20
TOTAL_BYTES = 64_000
AMPLE_BYTES = 4_000_000
HERDING_BYTES = 60_000


@dataclass(frozen=True)
class Arm:
    """One policy of quality on one stream."""

    stream: str
    name: str
    quality: int | None = None
    roomy_quality: int | None = ROOMY_QUALITY

    @property
    def upload_images(self) -> int | None:
        """None sends tasks whole."""
        return UPLOAD_IMAGES if self.stream == "small" else None

    @property
    def total_bytes(self) -> int:
        """The budget."""
        return AMPLE_BYTES if self.stream == "ample" else TOTAL_BYTES


STREAMS = {"whole": "Tasks come whole", "small": "Uploads of 20 images", "ample": "Everything fits at 90"}
KEPT, AT_ONCE = "90, then chosen", "chosen at once"
ARMS = (
    *(Arm(stream, KEPT) for stream in STREAMS),
    # Where whole tasks do not fit at 90, nothing else would happen.
    *(Arm(stream, AT_ONCE, roomy_quality=None) for stream in ("small", "ample")),
    *(Arm(stream, f"fixed {quality}", quality) for stream in ("whole", "small") for quality in (25, 50, 90)),
)


class Bits(StripMemory):
    """Strips that take a task in uploads of a few images."""

    def __init__(self, arm: Arm) -> None:
        policy = Policy(arm.total_bytes, quality=arm.quality, roomy_quality=arm.roomy_quality)
        super().__init__(policy, IngestOptions())
        self.upload_images = arm.upload_images

    def add(self, learned: Learned) -> None:
        """Add one upload after another, in an order that the seed draws."""
        assert learned.embed is not None
        task, seed = learned.task, learned.seed
        images_NHWC, class_ids = learned.examples.read(), learned.examples.class_ids
        rows = np.random.default_rng([seed, task]).permutation(len(images_NHWC))
        size = self.upload_images or len(rows)
        embedder = NetworkEmbedder(learned.embed, f"{seed} {task}".encode())
        for at in range(0, len(rows), size):
            some = rows[at : at + size]
            self.put(task, ArrayImages(images_NHWC[some], class_ids[some]), embedder, seed=seed)


def main() -> None:
    def more(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--cifar10", type=Path, help="folder with CIFAR-10's binary files")
        parser.add_argument("--out", type=Path, default=Path("runs/stream"), help="folder of finished runs")
        parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
        parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each")

    args = report.parse_args("what becomes of a memory that is fed bit by bit?", more)
    torch.set_num_threads(1)
    data = load(args.cifar10)
    flat = herding(data, uploads=60 if args.quick else 300)
    if args.quick:
        config = stream.StreamConfig(tasks=5, train_per_class=100, test_per_class=100)
        arms = [arm for arm in ARMS if arm.stream == "small"]
        method, seeds = lucir.Config(epochs=3, batch_size=32), args.seeds[:1]
    else:
        config = stream.StreamConfig(tasks=5, train_per_class=600, test_per_class=300)
        arms, method, seeds = list(ARMS), lucir.Config(), args.seeds
    results = collect(args, arms, config, method, seeds)
    flat |= compare(results, seeds)
    flat["seeds"] = len(seeds)
    report.finish(args, flat)


def load(folder: Path | None) -> Dataset:
    """The photographs if there are any."""
    if folder is not None:
        return datasets.load(str(folder))
    return datasets.load(str(budget.FASHION_MNIST) if budget.FASHION_MNIST.is_dir() else "sample")


def herding(data: Dataset, uploads: int) -> dict[str, report.Cell]:
    """Distances of means after many small uploads, against one upload of everything."""
    rows = np.random.default_rng(0).permutation(len(data.train))[: uploads * UPLOAD_IMAGES]
    images, class_ids = data.train.images.read(rows), data.train.class_ids[rows]
    embedder = BuiltinEmbedder((images.shape[1], images.shape[2], images.shape[3]))
    features_ND = embedder.embed(images)

    def off(content: Content) -> float:
        exemplars = content.tasks[0].load()
        assert exemplars is not None
        kept_ND = embedder.embed(exemplars.decode())
        return fmean(
            float(np.linalg.norm(kept_ND[exemplars.class_ids == c].mean(0) - features_ND[class_ids == c].mean(0)))
            for c in np.unique(class_ids)
        )

    options, content = IngestOptions(), Content(Policy(HERDING_BYTES))
    line: list[tuple[report.Cell, ...]] = []
    for number in range(uploads):
        some = slice(number * UPLOAD_IMAGES, (number + 1) * UPLOAD_IMAGES)
        content = add(content, Upload(0, ArrayImages(images[some], class_ids[some]), options), embedder)
        if number in (0, 2, 4, 9, 19, 49, 99, 199, uploads - 1):
            state = "provisional" if content.is_provisional else "decided"
            count = sum(content.tasks[0].kept.values())
            line.append((number + 1, content.quality, state, count, content.tasks[0].pack_bytes))
    columns = ("uploads", "quality", "which is", "exemplars", "bytes")
    report.print_table(f"Uploads of {UPLOAD_IMAGES} images, {HERDING_BYTES:,} bytes in all, {data.name}", columns, line)
    whole, fixed = ArrayImages(images, class_ids), Content(Policy(HERDING_BYTES, quality=content.quality))
    joint = off(add(fixed, Upload(0, whole, options), embedder))
    random = off(add(fixed, Upload(0, whole, IngestOptions(ranking="random")), embedder))
    rows_ = [("joint herding", joint, 1.0), ("herding, upload by upload", off(content), off(content) / joint)]
    report.print_table(
        "Distance of the kept mean from the mean of all images, mean over classes",
        ("choice", "distance", "over joint herding"),
        [*rows_, ("random", random, random / joint)],
    )
    return {
        "herding_distance_ratio": off(content) / joint,
        "random_distance_ratio": random / joint,
        "stream_quality": content.quality,
        "stream_exemplars": sum(content.tasks[0].kept.values()),
    }


def collect(
    args: argparse.Namespace,
    arms: Sequence[Arm],
    config: stream.StreamConfig,
    method: lucir.Config,
    seeds: Sequence[int],
) -> list[dict[str, Any]]:
    """The results of all runs, from the folder where they are there already."""
    args.out.mkdir(parents=True, exist_ok=True)
    with kept.workers(args.jobs) as pool:
        return list(
            pool.map(
                execute,
                *zip(
                    *(
                        (arm, args.cifar10, replace(config, seed=seed), method, args.out)
                        for seed in seeds
                        for arm in arms
                    ),
                    strict=True,
                ),
            )
        )


def execute(
    arm: Arm, folder: Path | None, config: stream.StreamConfig, method: lucir.Config, out: Path
) -> dict[str, Any]:
    """One run of LUCIR."""
    torch.set_num_threads(1)
    data, key = load(folder), kept.digest(config, method, arm.total_bytes)
    name = f"{data.name}-{arm.name}-{arm.upload_images}-{config.seed}-{key}.json"
    path = out / name.replace(" ", "-").replace(",", "")
    if path.exists():
        found: dict[str, Any] = json.loads(path.read_text())
        return found
    tasks = stream.build(data, config)
    learner = lucir.Lucir(Runtime(RuntimeConfig(), tasks, seed=config.seed), method, network=learning.NETWORK)
    memory = Bits(arm)
    matrix: list[list[float]] = []
    qualities: list[int | None] = []
    for task in tasks.tasks:
        learner.learn(task, memory, learning.ignore)
        memory.add(Learned(task.index, task.train, embed=learner.embed, seed=config.seed))
        learner.balance(task, memory, learning.ignore)
        earlier = [
            evaluation.accuracy(learner.scores, learner.runtime, each, learned=task.index) for each in tasks.tasks
        ]
        matrix.append([accuracy for accuracy in earlier[: task.index + 1] if accuracy is not None])
        qualities.append(memory.quality)
    metrics = evaluation.metrics(matrix, test_counts=[len(task.test) for task in tasks.tasks])
    result = {
        "policy": arm.name,
        "stream": arm.stream,
        "seed": config.seed,
        "last": 100 * metrics.last,
        "average_incremental": 100 * metrics.average_incremental,
        "qualities": qualities,
        "exemplars": sum(sum(classes.values()) for classes in memory.counts().values()),
        "used_bytes": memory.used_bytes,
    }
    kept.write(path, lambda temporary: temporary.write_text(json.dumps(result)))
    return result


def compare(results: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> dict[str, report.Cell]:
    """Each stream's table; the gap of what Engram does to the best, and the worst of all streams."""
    flat: dict[str, report.Cell] = {}
    gaps = []
    for kind in STREAMS:
        last: dict[str, list[float]] = {}
        for result in results:
            if result["stream"] == kind:
                last.setdefault(result["policy"], []).append(result["last"])
        if not last:
            continue
        best = max(last, key=lambda name: fmean(last[name]))
        rows = []
        for name, scores in last.items():
            own = [each for each in results if each["policy"] == name and each["stream"] == kind]
            gap = [top - score for top, score in zip(last[best], scores, strict=True)]
            qualities = "; ".join(" ".join(map(str, each["qualities"])) for each in own)
            count = fmean(each["exemplars"] for each in own)
            rows.append((name, fmean(scores), fmean(gap), half_width(gap), count, qualities))
        columns = ("policy", "last accuracy", "behind the best", "± 95 %", "exemplars", "quality after each task; seed")
        report.print_table(f"{STREAMS[kind]}, LUCIR, {len(seeds)} seeds, percent", columns, rows)
        gaps.append(fmean(last[best]) - fmean(last[KEPT]))
        flat[f"policy_gap_points_{kind}"] = gaps[-1]
        flat |= {f"last_{kind}_{name.replace(',', '').replace(' ', '_')}": fmean(each) for name, each in last.items()}
    flat["policy_gap_points"] = max(gaps)
    return flat


if __name__ == "__main__":
    main()
