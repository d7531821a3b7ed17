"""Measure what quality selection costs compared with training and a grid search, and whether it agrees with the grid.

**Cost.** The whole selection (ranking, encoding at five candidates, embedding, choosing, encoding the winner) of one
task of two classes, with shares of 16,000 bytes per class, by images per class and ranking; with the built-in
embedding and with the network's own features through the extractor process. Beside it one epoch of training of a small
convolutional network on the same images, in the same run. A grid search is one complete training per candidate.

**Agreement.** Pairs of tasks of two classes. A network learns the first; selection chooses a quality with its
features. Then, for each candidate, a copy of the network learns the second task while it replays the first one's
strips at that candidate, in the same bytes; its accuracy on both tasks' test images is what a grid search would have
seen. The choice agrees if its accuracy is at most a point, or two standard errors of the difference over seeds where
that is more, below that of the best candidate. Plain replay, one head for all four classes; as with LUCIR, half of a
task's own images are shown as JPEG gives them back. Fashion-MNIST from Debian's package dataset-fashion-mnist, else
the sample that ships with the trainer.
"""

from __future__ import annotations

import copy
import hashlib
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median, stdev
from typing import get_args

import numpy as np
import numpy.typing as npt
import torch
from report import Cell, finish, parse_args, print_table
from strip import cut_patches
from torch import nn

from engram.content import Content, Policy
from engram.memory import Upload, add
from engram.schemas import CANDIDATE_QUALITIES, Decision, IngestOptions, Ranking
from engram.selection.embedding import BuiltinEmbedder, Embedder
from engram.selection.images import ArrayImages
from engram.strip import Exemplars
from engram_service.embedder import OnnxEmbedder
from engram_trainer import datasets, networks
from engram_trainer.datasets import Dataset
from engram_trainer.examples import ArraySet
from engram_trainer.extractor import to_onnx
from engram_trainer.methods.codec import Coded

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
SHARE_BYTES = 16_000
IMAGES_PER_CLASS = (250, 1_000, 4_000, 16_000)
BATCH_SIZE = 64
GRID_EPOCHS = 8
"""Passes over a task that a grid search's trainings take."""

UInt8Array = npt.NDArray[np.uint8]
IntArray = npt.NDArray[np.int64]


def main() -> None:
    args = parse_args("what does quality selection cost, and does it agree with a grid search?")
    torch.set_num_threads(1)
    data = datasets.load(str(FASHION_MNIST) if FASHION_MNIST.is_dir() else "sample")
    flat = cost(data, IMAGES_PER_CLASS[:3] if args.quick else IMAGES_PER_CLASS, repeats=1 if args.quick else 3)
    if args.quick:
        flat |= agreement(data, pairs=2, seeds=2, per_class=300, epochs=4, shares=(4_000,))
    else:
        flat |= agreement(data, pairs=5, seeds=5, per_class=1_500, epochs=GRID_EPOCHS, shares=(4_000, 16_000))
    flat["cpu_seconds_300_images_224"] = photographs_cpu_seconds(repeats=3)
    finish(args, flat)


def cost(data: Dataset, sizes: Sequence[int], repeats: int) -> dict[str, Cell]:
    """Seconds of selection by images and ranking, and against training."""
    rows: list[tuple[Cell, ...]] = []
    seconds: dict[tuple[str, str, int], float] = {}
    epochs: dict[int, float] = {}
    for size in sizes:
        upload = two_classes(data, size)
        network = networks.build("conv", upload.shape, seed=0)
        epochs[size] = median(epoch_seconds(network, upload) for _ in range(repeats))
        with running(network, upload.shape) as extractor:
            arms: list[tuple[str, Ranking, Embedder]] = [
                ("built-in", ranking, BuiltinEmbedder(upload.shape)) for ranking in get_args(Ranking)
            ]
            arms.append(("extractor", "herding", extractor))
            for name, ranking, embedder in arms:
                took = [keep(upload, embedder, SHARE_BYTES, ranking)[1].seconds for _ in range(repeats)]
                seconds[name, ranking, size] = median(took)
        rows.append((size, *(seconds[name, ranking, size] for name, ranking, _ in arms), epochs[size]))
    columns = ("images per class", *(f"{name}, {ranking}" for name, ranking, _ in arms), "one epoch")
    print_table("Seconds of one selection, two classes, and of one epoch of training on the same images", columns, rows)
    shares = [
        (
            size,
            seconds["built-in", "herding", size] / epochs[size],
            seconds["extractor", "herding", size] / epochs[size],
        )
        for size in sizes
    ]
    grid = len(CANDIDATE_QUALITIES) * GRID_EPOCHS
    print_table(
        f"Selection as a share of one epoch, and of a grid search of {len(CANDIDATE_QUALITIES)} trainings of "
        f"{GRID_EPOCHS} epochs",
        ("images per class", "built-in / epoch", "extractor / epoch", "built-in / grid", "extractor / grid"),
        [(size, builtin, extractor, builtin / grid, extractor / grid) for size, builtin, extractor in shares],
    )
    largest = sizes[-1]
    return {
        "seconds_per_1000_images": 1000 * seconds["built-in", "herding", largest] / (2 * largest),
        "share_of_one_epoch": seconds["extractor", "herding", largest] / epochs[largest],
        "share_of_grid_search": seconds["extractor", "herding", largest] / epochs[largest] / grid,
    }


def photographs_cpu_seconds(repeats: int) -> float:
    """CPU seconds of a selection of 300 patches of photographs, 224x224, three classes, a million bytes each."""
    upload = ArrayImages(cut_patches(300, 224), np.repeat(np.arange(3), 100))
    took = []
    for _ in range(repeats):
        start = time.process_time()
        keep(upload, BuiltinEmbedder(upload.shape), 10**6)
        took.append(time.process_time() - start)
    return median(took)


def two_classes(data: Dataset, size: int) -> ArrayImages:
    """`size` images of the even classes as class 0, of the odd ones as class 1; shifted copies if there are fewer."""
    parts = []
    for parity in (0, 1):
        pool = data.train.images.read(np.flatnonzero(data.train.class_ids % 2 == parity))
        copies = -(-size // len(pool))
        parts.append(np.concatenate([np.roll(pool, shift, axis=2) for shift in range(copies)])[:size])
    return ArrayImages(np.concatenate(parts), np.repeat(np.arange(2), size))


def keep(
    upload: ArrayImages, embedder: Embedder, share: int, ranking: Ranking = "herding", quality: int | None = None
) -> tuple[Exemplars, Decision]:
    """What a buffer would keep of this upload, and why."""
    policy = Policy(share, "class", quality=quality)
    task = add(Content(policy), Upload(0, upload, IngestOptions(ranking=ranking)), embedder).tasks[0]
    exemplars, decision = task.load(), task.decision
    assert exemplars is not None
    assert decision is not None
    return exemplars, decision


@contextmanager
def running(network: nn.Module, shape: tuple[int, int, int]) -> Iterator[OnnxEmbedder]:
    """The network's features, as the trainer exports them and the service runs them."""
    model = to_onnx(network, shape)
    with tempfile.NamedTemporaryFile(suffix=".onnx") as file:
        file.write(model)
        file.flush()
        with OnnxEmbedder(Path(file.name), hashlib.sha256(model).hexdigest()) as embedder:
            yield embedder


def agreement(
    data: Dataset, *, pairs: int, seeds: int, per_class: int, epochs: int, shares: Sequence[int]
) -> dict[str, Cell]:
    """How often, and by how much, the selected quality falls behind the best of a grid search."""
    small = data.first(train=per_class)
    rows: list[tuple[Cell, ...]] = []
    agrees: list[bool] = []
    gaps: list[float] = []
    for pair in range(pairs):
        classes = np.random.default_rng(pair).permutation(np.array(data.classes))[:4]
        tasks = [of_classes(small, classes[:2]), of_classes(small, classes[2:])]
        tests = of_classes(replace(data, train=data.test), classes)
        for share in shares:
            scores: dict[int, list[float]] = {quality: [] for quality in CANDIDATE_QUALITIES}
            picks: list[int] = []
            for seed in range(seeds):
                first = Learner(tasks[0].shape, classes, seed)
                first.learn(tasks[0], None, epochs)
                with running(first.network, tasks[0].shape) as extractor:
                    picks.append(keep(tasks[0], extractor, share)[1].quality)
                    for quality in CANDIDATE_QUALITIES:
                        kept, _ = keep(tasks[0], extractor, share, quality=quality)
                        second = copy.deepcopy(first)
                        second.learn(tasks[1], ArrayImages(kept.decode(), kept.class_ids), epochs)
                        scores[quality].append(second.accuracy(tests))
            gap, noise = behind(scores, picks)
            agrees.append(gap <= max(1.0, noise))
            gaps.append(gap)
            rows.append((pair, share, *(fmean(each) for each in scores.values()), str(picks), gap, noise, agrees[-1]))
    columns = ("pair", "bytes per class", *(f"at {quality}" for quality in CANDIDATE_QUALITIES))
    print_table(
        f"Accuracy on both tasks after the second, {seeds} seeds, by the quality of the first one's strips",
        (*columns, "selected", "behind the best, points", "2 standard errors", "agrees"),
        rows,
    )
    return {"agrees_with_grid": fmean(agrees), "behind_grid_points": fmean(gaps)}


def behind(scores: dict[int, list[float]], picks: Sequence[int]) -> tuple[float, float]:
    """Points by which the selected qualities fall behind the best single one, and two standard errors of that."""
    best = max(scores.values(), key=fmean)
    differences = [best[seed] - scores[pick][seed] for seed, pick in enumerate(picks)]
    return fmean(differences), 2 * stdev(differences) / len(differences) ** 0.5


def of_classes(data: Dataset, classes: IntArray) -> ArrayImages:
    """The training images of these classes."""
    chosen = data.train.select(np.flatnonzero(np.isin(data.train.class_ids, classes)))
    return ArrayImages(chosen.read(), chosen.class_ids)


class Learner:
    """A small convolutional network with one linear head, trained by plain replay."""

    def __init__(self, shape: tuple[int, int, int], classes: IntArray, seed: int) -> None:
        self.classes = classes
        self.network = networks.build("conv", shape, seed=seed)
        self.head = networks.linear_head(self.network.dimensions, len(classes), seed=seed)
        self.seed = seed
        self.generator = torch.Generator().manual_seed(seed)

    def learn(self, task: ArrayImages, memory: ArrayImages | None, epochs: int) -> None:
        """Half of every batch is replayed once there is something to replay."""
        images, labels = self.tensors(task)
        drawn = np.random.default_rng(self.seed).permutation(np.resize(CANDIDATE_QUALITIES, len(task.images_NHWC)))
        coded = Coded(ArraySet(task.images_NHWC), drawn).read(np.arange(len(drawn)))
        both = torch.stack([images, self.tensors(ArrayImages(coded, task.class_ids))[0]])
        part = BATCH_SIZE if memory is None else BATCH_SIZE // 2
        steps = epochs * len(images) // part
        parameters = [*self.network.parameters(), *self.head.parameters()]
        optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=5e-4)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        if memory is not None:
            replayed, their_labels = self.tensors(memory)
        self.network.train()
        for _ in range(steps):
            rows = torch.randint(len(labels), (part,), generator=self.generator)
            is_coded = torch.randint(2, (part,), generator=self.generator)
            batch, targets = both[is_coded, rows], labels[rows]
            if memory is not None:
                rows = torch.randint(len(memory.images_NHWC), (BATCH_SIZE - part,), generator=self.generator)
                batch, targets = torch.cat([batch, replayed[rows]]), torch.cat([targets, their_labels[rows]])
            loss = nn.functional.cross_entropy(self.head(self.network(batch.float() / 255)), targets)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
        self.network.eval()

    def tensors(self, upload: ArrayImages) -> tuple[torch.Tensor, torch.Tensor]:
        """Images [N, C, H, W] and the places of their classes."""
        images = torch.from_numpy(np.ascontiguousarray(upload.images_NHWC.transpose(0, 3, 1, 2)))
        return images, torch.from_numpy((upload.class_ids[:, None] == self.classes[None, :]).argmax(axis=1))

    @torch.no_grad()
    def accuracy(self, tests: ArrayImages) -> float:
        """Percent of the test images that are classified rightly."""
        images, labels = self.tensors(tests)
        parts = torch.split(images, 512)
        scores = torch.cat([self.head(self.network(part.float() / 255)) for part in parts])
        return 100 * (scores.argmax(dim=1) == labels).float().mean().item()


def epoch_seconds(network: nn.Module, upload: ArrayImages) -> float:
    """One pass of SGD over the images, in batches of 64."""
    learner = Learner(upload.shape, np.arange(2), seed=0)
    learner.network = copy.deepcopy(network)  # type: ignore[assignment]
    start = time.perf_counter()
    learner.learn(upload, None, epochs=1)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
