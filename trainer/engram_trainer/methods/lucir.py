"""LUCIR: learning a unified classifier incrementally via rebalancing.

The notation of the paper, and of the names here. f(x) are features without a last ReLU, w_c class embeddings, and a bar
is division by the L2 norm. C_o and C_n are the old and the new classes, f* is the network before this task, frozen.

    p_c(x)  = softmax_c( eta <w_c bar, f(x) bar> )                                        eta learned
    L_ce    = mean over the batch of -log p_y
    L_dis   = mean over the batch of 1 - <f*(x) bar, f(x) bar>                            less forget
    L_mr    = 1/(|B_o| K) sum_{x in B_o} sum_{k=1..K} max(0, m - <w_y bar, f bar> + <w_(k) bar, f bar>)
              B_o: old-class images of the batch; w_(k): the K new classes nearest to x   margin ranking
    lambda  = lambda_base sqrt(|C_o| / |C_n|)
    L       = L_ce + lambda L_dis + L_mr                                                  first task: L_ce only

A task is learned from its images and all exemplars together. Old embeddings stand still meanwhile; new ones start
imprinted. Once the memory holds the new classes too, `balance` tunes all embeddings on exemplars alone, so that no
class outweighs another. Exemplars are the memory's: rank them by herding.

Letters: N images, C classes, D dimensions, H, W height and width.

Source: Hou, Pan, Loy, Wang & Lin, Learning a Unified Classifier Incrementally via Rebalancing (CVPR 2019), and its code
hshustc/CVPR19_Incremental_Learning at e5a90ae, which wins where they differ:

- lambda grows with the ratio of old to new classes, sqrt(|C_o| / |C_n|), as the code computes; the paper's text can be
  read as the inverse.
- K is at most |C_n|; the code fails with fewer new classes than K.
- `replay_ratio` is the code's `rs_ratio`, 0 in its scripts: the part of each epoch's draws that are exemplars.
- `codec_ratio` is this project's: new images are clean and exemplars are not, so without it the marks of compression
  come to mean "old class", and clean test images of old classes are taken for new ones.
- L_dis has no gradient in the balanced fine-tune, whose network is frozen, so it is not computed there.
- learning-rate drops are fractions of the epochs, so that a short run keeps the schedule's shape.
- the scores are those of the cosine classifier ("CNN" in the paper's tables); nearest-mean scores are not offered.

Departures in the defaults, tuned for runs of minutes on held-out seeds and images of the training set: see `Config`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional

from engram import strip
from engram.schemas import CANDIDATE_QUALITIES
from engram_trainer import networks
from engram_trainer.augment import augment
from engram_trainer.datasets import ClassIds, Images
from engram_trainer.memory import Memory
from engram_trainer.methods import OnStep, in_batches, pixels
from engram_trainer.networks import CosineClassifier, cosines
from engram_trainer.stream import Stream, Task

# What a random stream is for, so that one choice never shifts another.
WEIGHTS, LEARN, BALANCE, CODEC = range(4)


@dataclass(frozen=True)
class Config:
    """LUCIR's settings; in brackets those of its CIFAR-100 script where they differ."""

    epochs: int = 8
    """Passes over a task's images [160]."""
    lr: float = 0.03
    """[0.1]"""
    milestones: tuple[float, ...] = (0.5, 0.75)
    """When the learning rate drops to a tenth, as fractions of `epochs`."""
    momentum: float = 0.9
    weight_decay: float = 5e-4
    batch_size: int = 128
    eta: float = 1.0
    """First value of the learned scale of the cosines."""
    less_forget_weight: float = 2.0
    """lambda_base in the paper [5]."""
    margin: float = 0.5
    """m in the paper."""
    margin_classes: int = 2
    """K in the paper."""
    margin_weight: float = 1.0
    replay_ratio: float = 0.4
    """Part of the draws of an epoch that are exemplars, drawn with replacement; 0 shuffles the union instead [0]."""
    codec_ratio: float = 0.5
    """Part of a task's own images that a batch shows as JPEG gives them back, where the memory's are JPEG [0]."""
    codec_qualities: tuple[int, ...] = CANDIDATE_QUALITIES
    """The qualities of these; each image draws one for the task."""
    balance_epochs: int = 10
    """Passes over all exemplars after each task but the first [none; 20 in the ImageNet script]; 0 skips it."""
    balance_lr: float = 0.001
    """[0.01 in the ImageNet script]"""
    balance_milestones: tuple[float, ...] = (0.5,)
    padding: int = 2
    """Largest random shift of a training image, in pixels [4 at 32x32]."""
    flip: bool = True
    """Whether training images are flipped horizontally at random."""


class Lucir:
    """A network and a cosine classifier that grows with the classes."""

    def __init__(self, stream: Stream, config: Config, *, network: str, seed: int, device: str = "cpu") -> None:
        if not stream.config.brings_classes:
            raise ValueError(f"LUCIR needs tasks that bring classes; {stream.config.scenario} tasks bring none")
        if not 0 <= config.replay_ratio < 1:
            raise ValueError(f"replay_ratio must be in 0..1 (exclusive), not {config.replay_ratio}")
        self.stream, self.config, self.seed = stream, config, seed
        self.device = torch.device(device)
        self.network = networks.build(network, stream.shape, seed=seed, signed=True).to(self.device)
        self.classifier = CosineClassifier(torch.empty(0, self.network.dimensions), eta=config.eta).to(self.device)

    def learn(self, task: Task, memory: Memory, progress: OnStep) -> None:
        """Train on a task's images and all exemplars of earlier tasks."""
        config = self.config
        old_count, new_count = len(self.classifier.embeddings_CD), len(task.classes)
        generator = self._generator(task, LEARN)
        replay = memory.everything(exclude_tasks=(task.index,))
        images = np.concatenate([task.train_images, replay.images]) if len(replay.images) else task.train_images
        class_ids = (
            np.concatenate([task.train_class_ids, replay.class_ids]) if len(replay.images) else task.train_class_ids
        )
        images_NCHW, labels_N = self._tensors(images, class_ids)
        coded_NCHW = self._coded(task, images_NCHW) if memory.is_lossy else images_NCHW

        old_network = copy.deepcopy(self.network).eval()
        old_CD = self.classifier.embeddings_CD.detach()
        new_CD = nn.Parameter(self._imprinted(task, old_CD) if old_count else self._random(new_count))
        less_forget_weight = adaptive_weight(config.less_forget_weight, old_count, new_count)
        optimizer = torch.optim.SGD(
            [*self.network.parameters(), self.classifier.eta, new_CD],
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
        )
        schedule = _schedule(optimizer, config.epochs, config.milestones)

        self.network.train()
        for epoch in range(config.epochs):
            for rows in self._epoch(len(task.train_images), len(replay.images), generator):
                is_coded = (torch.rand(len(rows), generator=generator) < config.codec_ratio).to(self.device)
                batch_NCHW = torch.where(is_coded[:, None, None, None], coded_NCHW[rows], images_NCHW[rows])
                batch_NCHW = augment(batch_NCHW, padding=config.padding, flip=config.flip, generator=generator)
                labels = labels_N[rows]
                features_ND = self.network(batch_NCHW)
                cosines_NC = cosines(features_ND, torch.cat([old_CD, new_CD]))  # old embeddings are constants
                loss = functional.cross_entropy(self.classifier.eta * cosines_NC, labels)
                if old_count:
                    with torch.no_grad():
                        old_features_ND = old_network(batch_NCHW)
                    loss = loss + less_forget_weight * less_forget_loss(features_ND, old_features_ND)
                    loss = loss + config.margin_weight * margin_ranking_loss(
                        cosines_NC, labels, old_count=old_count, margin=config.margin, nearest=config.margin_classes
                    )
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            schedule.step()
            progress(epoch + 1, config.epochs, loss=loss.item())
        self.classifier.embeddings_CD = nn.Parameter(torch.cat([old_CD, new_CD.detach()]))

    def balance(self, task: Task, memory: Memory, progress: OnStep) -> None:
        """Tune the class embeddings on the exemplars of all classes, new ones included; network and eta are frozen.

        Source: the code's `cbf_class_incremental_cosine_imagenet.py` with ft_flag 2; the first task is left as it is.
        """
        config = self.config
        old_count = len(self.classifier.embeddings_CD) - len(task.classes)
        exemplars = memory.everything()
        if old_count == 0 or len(exemplars.images) == 0 or config.balance_epochs == 0:
            return
        generator = self._generator(task, BALANCE)
        images_NCHW, labels_N = self._tensors(exemplars.images, exemplars.class_ids)
        embeddings_CD = self.classifier.embeddings_CD
        eta = self.classifier.eta.detach()
        optimizer = torch.optim.SGD(
            [embeddings_CD], lr=config.balance_lr, momentum=config.momentum, weight_decay=config.weight_decay
        )
        schedule = _schedule(optimizer, config.balance_epochs, config.balance_milestones)

        self.network.eval()
        for epoch in range(config.balance_epochs):
            for rows in torch.split(torch.randperm(len(labels_N), generator=generator), config.batch_size):
                batch_NCHW = augment(images_NCHW[rows], padding=config.padding, flip=config.flip, generator=generator)
                with torch.no_grad():
                    features_ND = self.network(batch_NCHW)
                cosines_NC = cosines(features_ND, embeddings_CD)
                loss = functional.cross_entropy(eta * cosines_NC, labels_N[rows])
                loss = loss + config.margin_weight * margin_ranking_loss(
                    cosines_NC, labels_N[rows], old_count=old_count, margin=config.margin, nearest=config.margin_classes
                )
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            schedule.step()
            progress(epoch + 1, config.balance_epochs, loss=loss.item())

    def scores(self, images_NHWC: Images) -> npt.NDArray[np.float32]:
        """eta times the cosine with every class embedding so far, `[N, C]`."""
        return in_batches(nn.Sequential(self.network, self.classifier), images_NHWC, self.device)

    def embed(self, images_NHWC: Images) -> npt.NDArray[np.float32]:
        """Features `[N, D]`, signed and not normalised."""
        return in_batches(self.network, images_NHWC, self.device)

    def extractor(self) -> nn.Module:
        """The network in evaluation mode."""
        return self.network.eval()

    def state_dict(self) -> dict[str, Any]:
        """Weights only: every random stream starts anew with each task."""
        return {"network": self.network.state_dict(), "classifier": self.classifier.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Become the learner that was saved, with as many classes as it had."""
        self.network.load_state_dict(state["network"])
        embeddings_CD = state["classifier"]["embeddings_CD"]
        self.classifier = CosineClassifier(torch.empty_like(embeddings_CD)).to(self.device)
        self.classifier.load_state_dict(state["classifier"])

    def _coded(self, task: Task, images_NCHW: torch.Tensor) -> torch.Tensor:
        """The images of `learn` with the task's own ones after a round trip through JPEG; exemplars as they are."""
        if self.config.codec_ratio == 0:
            return images_NCHW
        generator = np.random.default_rng([self.seed, CODEC, task.index])
        coded = round_trip(task.train_images, self.config.codec_qualities, generator)
        return torch.cat([pixels(coded, self.device), images_NCHW[len(coded) :]])

    def _imprinted(self, task: Task, old_CD: torch.Tensor) -> torch.Tensor:
        """Embeddings of the new classes, from the network as it is before it has seen them."""
        means = [self.embed(task.train_images[task.train_class_ids == class_id]) for class_id in task.classes]
        return imprint([torch.from_numpy(features_ND).to(self.device) for features_ND in means], old_CD)

    def _random(self, count: int) -> torch.Tensor:
        """Embeddings of the first classes: uniform within 1/sqrt(D), as the code's `CosineLinear`."""
        bound = 1 / math.sqrt(self.network.dimensions)
        generator = torch.Generator().manual_seed(_seed(self.seed, WEIGHTS))
        drawn_CD = torch.rand(count, self.network.dimensions, generator=generator)
        return ((2 * drawn_CD - 1) * bound).to(self.device)

    def _epoch(self, new_count: int, replay_count: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
        """Rows of each batch of one epoch: new images are rows 0..new_count-1, exemplars come after them."""
        ratio = self.config.replay_ratio
        weight = new_count * ratio / (max(replay_count, 1) * (1 - ratio))  # of an exemplar, a new image having 1
        if replay_count and weight > 1:
            weights = torch.cat([torch.ones(new_count), torch.full((replay_count,), weight)])
            order = torch.multinomial(weights, int(new_count / (1 - ratio)), replacement=True, generator=generator)
        else:
            order = torch.randperm(new_count + replay_count, generator=generator)
        batches = list(torch.split(order, self.config.batch_size))
        if len(batches) > 1 and len(batches[-1]) == 1:
            batches.pop()  # one image has no batch statistics
        yield from batches

    def _tensors(self, images_NHWC: Images, class_ids: ClassIds) -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.from_numpy(self.stream.labels(class_ids)).to(self.device)
        return pixels(images_NHWC, self.device), labels

    def _generator(self, task: Task, purpose: int) -> torch.Generator:
        """Depends on seed, purpose and task only, so that a resumed run equals an uninterrupted one."""
        return torch.Generator().manual_seed(_seed(self.seed, purpose, task.index))


def round_trip(images_NHWC: Images, qualities: tuple[int, ...], generator: np.random.Generator) -> Images:
    """Images after JPEG encoding and decoding as in an Engram pack, each at one of the qualities, equally often."""
    coded = np.empty_like(images_NHWC)
    order = generator.permutation(len(images_NHWC))
    for quality, rows in zip(qualities, np.array_split(order, len(qualities)), strict=True):
        if len(rows):
            coded[rows] = strip.encode(images_NHWC[rows], np.zeros(len(rows), np.int64), quality=quality).decode()
    return coded


def adaptive_weight(base: float, old_count: int, new_count: int) -> float:
    """lambda = lambda_base sqrt(|C_o| / |C_n|). Source: LUCIR, equation 7's text; direction as in the code."""
    return base * math.sqrt(old_count / new_count)


def less_forget_loss(features_ND: torch.Tensor, old_features_ND: torch.Tensor) -> torch.Tensor:
    """L_dis = mean of 1 - <f* bar, f bar>: 0 for features that are equal up to scale. Source: LUCIR, equation 6."""
    return (1 - functional.cosine_similarity(features_ND, old_features_ND, dim=1)).mean()


def margin_ranking_loss(
    cosines_NC: torch.Tensor, labels_N: torch.Tensor, *, old_count: int, margin: float, nearest: int
) -> torch.Tensor:
    """L_mr: an old-class image is nearer to its own class than to the nearest new ones, by a margin.

    Args:
        cosines_NC: cosines with all classes, old ones first, without eta.
        labels_N: the true labels.
        old_count: how many classes are old.
        margin: m in the paper.
        nearest: K in the paper, reduced to the number of new classes.

    Returns:
        The mean over old-class images and their K nearest new classes; 0 where the batch has no old-class image.

    Source: LUCIR, equation 8.
    """
    is_old = labels_N < old_count
    new_count = cosines_NC.shape[1] - old_count
    if not is_old.any():
        return cosines_NC.new_zeros(())
    true_N1 = cosines_NC[is_old].gather(1, labels_N[is_old, None])
    hard_NK = cosines_NC[is_old, old_count:].topk(min(nearest, new_count), dim=1).values
    return functional.relu(margin - true_N1 + hard_NK).mean()


def imprint(features_by_class: list[torch.Tensor], old_CD: torch.Tensor) -> torch.Tensor:
    """New embeddings: the direction of each class's mean unit feature, the mean length of the old embeddings.

    Source: LUCIR's code ("imprint weights"), after Qi et al., Low-Shot Learning with Imprinted Weights (CVPR 2018).
    """
    means_CD = torch.stack([functional.normalize(features_ND, dim=1).mean(dim=0) for features_ND in features_by_class])
    new_CD: torch.Tensor = functional.normalize(means_CD, dim=1) * old_CD.norm(dim=1).mean()
    return new_CD


def _schedule(
    optimizer: torch.optim.Optimizer, epochs: int, milestones: tuple[float, ...]
) -> torch.optim.lr_scheduler.MultiStepLR:
    return torch.optim.lr_scheduler.MultiStepLR(optimizer, [round(part * epochs) for part in milestones], gamma=0.1)


def _seed(*key: int) -> int:
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)
