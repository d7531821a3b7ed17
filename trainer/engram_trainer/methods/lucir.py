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
- exemplars are drawn, so many for every batch, in shuffled passes; the code shuffles them among the new images.
  `replay_ratio` is its `rs_ratio`, 0 in its scripts: the least part of a batch that they are.
- `codec_ratio` is this project's: see `codec`.
- L_dis has no gradient in the balanced fine-tune, whose network is frozen, so it is not computed there.
- learning-rate drops are fractions of the epochs, so that a short run keeps the schedule's shape.
- `classify` chooses the scores: those of the cosine classifier ("CNN" in the paper's tables) or of the nearest mean.

Departures in the defaults, tuned for runs of minutes on held-out seeds and images of the training set: see `Config`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional

from engram_trainer import networks
from engram_trainer.examples import Examples, Images
from engram_trainer.memory import Memory
from engram_trainer.methods.codec import Coding
from engram_trainer.methods.nearest_mean import class_means, nearest_mean_scores
from engram_trainer.methods.training import multistep, union
from engram_trainer.networks import CosineClassifier, cosines
from engram_trainer.runtime import Runtime
from engram_trainer.steps import BALANCE, LEARN, WEIGHTS, OnStep, Phase, Replay, Step
from engram_trainer.stream import Task


@dataclass(frozen=True)
class Config(Coding):
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
    """Images of a step, new ones and exemplars together."""
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
    """Least part of every batch that is exemplars. They have at least the part that they are of all images, so 0 walks
    through the union [0]."""
    codec_ratio: float = 0.5
    """Part of a task's own images that an epoch shows as JPEG gives them back, where the memory's are JPEG [0]."""
    balance_epochs: int = 10
    """Passes over all exemplars after each task but the first [none; 20 in the ImageNet script]; 0 skips it."""
    balance_lr: float = 0.001
    """[0.01 in the ImageNet script]"""
    balance_milestones: tuple[float, ...] = (0.5,)
    classify: Literal["cosine", "nme"] = "cosine"
    """By the classifier, or by the nearest mean of exemplars (the paper reports both)."""
    padding: int = 2
    """Largest random shift of a training image, in pixels [4 at 32x32]."""
    flip: bool = True
    """Whether training images are flipped horizontally at random."""


class Lucir:
    """A network and a cosine classifier that grows with the classes."""

    fields: Mapping[str, str] = {}
    fills_memory = False

    def __init__(self, runtime: Runtime, config: Config, *, network: str) -> None:
        self.runtime, self.stream, self.config, self.seed = runtime, runtime.stream, config, runtime.seed
        self.device = runtime.device
        self.stream.config.require_new_classes("LUCIR")
        if config.classify not in ("cosine", "nme"):
            raise ValueError(f"classify {config.classify!r} is not one of cosine, nme")
        if not 0 <= config.replay_ratio < 1:
            raise ValueError(f"replay_ratio must be in 0..1 (exclusive), not {config.replay_ratio}")
        if config.batch_size < 2:
            raise ValueError("batch_size must be at least 2: one new image and one exemplar")
        built = networks.build(network, runtime.preparation.shape, seed=self.seed, signed=True)
        self.dimensions = built.dimensions
        self.network = runtime.place_module(built)
        self.classifier = CosineClassifier(torch.empty(0, self.dimensions), eta=config.eta).to(self.device)
        self.means_CD = torch.zeros(len(self.stream.class_order), self.dimensions)
        """The unit mean of each label's exemplars, if they classify."""

    def learn(self, task: Task, memory: Memory, progress: OnStep) -> None:
        """Train on a task's images and exemplars of earlier tasks."""
        config, runtime = self.config, self.runtime
        old_count, new_count = len(self.classifier.embeddings_CD), len(task.classes)
        old_network = copy.deepcopy(self.network).eval().requires_grad_(False)
        old_CD = self.classifier.embeddings_CD.detach()
        new_CD = nn.Parameter(self._imprinted(task, old_CD) if old_count else self._random(new_count))
        head = nn.ParameterDict({"new_CD": new_CD, "eta": self.classifier.eta})
        less_forget_weight = adaptive_weight(config.less_forget_weight, old_count, new_count)
        optimizer = config.optimizer([*self.network.parameters(), self.classifier.eta, new_CD])

        def loss(step: Step) -> torch.Tensor:
            images_NCHW, labels_N = step.images, step.labels
            features_ND = self.network(images_NCHW)
            cosines_NC = cosines(features_ND, torch.cat([old_CD, new_CD]))  # old embeddings are constants
            total = runtime.mean(functional.cross_entropy(self.classifier.eta * cosines_NC, labels_N, reduction="none"))
            if old_count:
                with torch.no_grad():
                    old_features_ND = old_network(images_NCHW)
                total = total + less_forget_weight * runtime.mean(less_forget_losses(features_ND, old_features_ND))
                total = total + config.margin_weight * self._margin_loss(cosines_NC, labels_N, old_count)
            return total

        batch_size, replay = union(config.batch_size, config.replay_ratio, task, memory, world_size=runtime.world_size)
        examples, order = config.shown(task, memory, seed=self.seed)
        phase = Phase(
            task=task,
            purpose=LEARN,
            modules=[self.network, head],
            optimizer=optimizer,
            loss=loss,
            epochs=config.epochs,
            batch_size=batch_size,
            augment=config.augment,
            examples=examples,
            replay=replay,
            schedule=config.schedule(optimizer),
            order=order,
        )
        runtime.fit(phase, memory, progress)
        self.classifier.embeddings_CD = nn.Parameter(torch.cat([old_CD, new_CD.detach()]))

    def columns(self, examples: Examples) -> Mapping[str, npt.NDArray[Any]]:
        """None: exemplars are an image and its class."""
        return {}

    def balance(self, task: Task, memory: Memory, progress: OnStep) -> None:
        """Tune the class embeddings on the exemplars of all classes, and take their means if these classify."""
        self._tune(task, memory, progress)
        if self.config.classify == "nme":
            self.means_CD = class_means(self.stream, self.embed, memory.walk())

    def _tune(self, task: Task, memory: Memory, progress: OnStep) -> None:
        """Network and eta are frozen, and the first task is left as it is.

        Source: the code's `cbf_class_incremental_cosine_imagenet.py` with ft_flag 2.
        """
        config, runtime = self.config, self.runtime
        old_count = len(self.classifier.embeddings_CD) - len(task.classes)
        if old_count == 0 or not any(map(len, memory.counts().values())) or config.balance_epochs == 0:
            return
        embeddings_CD, eta = self.classifier.embeddings_CD, self.classifier.eta.detach()
        optimizer = torch.optim.SGD(
            [embeddings_CD], lr=config.balance_lr, momentum=config.momentum, weight_decay=config.weight_decay
        )

        def loss(step: Step) -> torch.Tensor:
            with torch.no_grad():
                features_ND = self.network(step.images)
            cosines_NC = cosines(features_ND, embeddings_CD)
            losses_N = functional.cross_entropy(eta * cosines_NC, step.labels, reduction="none")
            margin_loss = self._margin_loss(cosines_NC, step.labels, old_count)
            return runtime.mean(losses_N) + config.margin_weight * margin_loss

        self.network.eval()
        phase = Phase(
            task=task,
            purpose=BALANCE,
            modules=[self.classifier],
            optimizer=optimizer,
            loss=loss,
            epochs=config.balance_epochs,
            batch_size=config.batch_size,
            augment=config.augment,
            replay=[Replay(config.batch_size, "epoch")],
            schedule=multistep(optimizer, config.balance_epochs, config.balance_milestones),
        )
        runtime.fit(phase, memory, progress)

    def scores(self, images_NHWC: Images) -> npt.NDArray[np.float32]:
        """eta times the cosine with every class embedding so far, or the cosine with exemplars' means, `[N, C]`."""
        if self.config.classify == "nme":
            return nearest_mean_scores(torch.from_numpy(self.embed(images_NHWC)), self.means_CD).numpy()
        return self.runtime.predict(nn.Sequential(self.network, self.classifier), images_NHWC)

    def embed(self, images_NHWC: Images) -> npt.NDArray[np.float32]:
        """Features `[N, D]`, signed and not normalised."""
        return self.runtime.predict(self.network, images_NHWC)

    def extractor(self) -> nn.Module:
        """Preparation and network in evaluation mode."""
        return nn.Sequential(self.runtime.preparation, self.network).eval()

    def state_dict(self) -> dict[str, Any]:
        """Weights and means: every random stream starts anew with each task."""
        return {
            "network": self.network.state_dict(),
            "classifier": self.classifier.state_dict(),
            "means_CD": self.means_CD,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Become the learner that was saved, with as many classes as it had."""
        self.network.load_state_dict(state["network"])
        self.means_CD = state["means_CD"].cpu()
        embeddings_CD = state["classifier"]["embeddings_CD"]
        self.classifier = CosineClassifier(torch.empty_like(embeddings_CD)).to(self.device)
        self.classifier.load_state_dict(state["classifier"])

    def _margin_loss(self, cosines_NC: torch.Tensor, labels_N: torch.Tensor, old_count: int) -> torch.Tensor:
        losses_N = margin_ranking_losses(
            cosines_NC, labels_N, old_count=old_count, margin=self.config.margin, nearest=self.config.margin_classes
        )
        return self.runtime.mean_where(losses_N, labels_N < old_count)

    def _imprinted(self, task: Task, old_CD: torch.Tensor) -> torch.Tensor:
        """Embeddings of the new classes, from the network as it is before it has seen them."""
        features_ND = self.runtime.features(self.network, task.train)
        of_class = [features_ND[torch.from_numpy(task.train.class_ids == class_id)] for class_id in task.classes]
        return imprint(of_class, old_CD)

    def _random(self, count: int) -> torch.Tensor:
        """Embeddings of the first classes: uniform within 1/sqrt(D), as the code's `CosineLinear`."""
        bound = 1 / math.sqrt(self.dimensions)
        generator = torch.Generator().manual_seed(self.runtime.key(WEIGHTS))
        drawn_CD = torch.rand(count, self.dimensions, generator=generator)
        return ((2 * drawn_CD - 1) * bound).to(self.device)


def adaptive_weight(base: float, old_count: int, new_count: int) -> float:
    """lambda = lambda_base sqrt(|C_o| / |C_n|). Source: LUCIR, equation 7's text; direction as in the code."""
    return base * math.sqrt(old_count / new_count)


def less_forget_losses(features_ND: torch.Tensor, old_features_ND: torch.Tensor) -> torch.Tensor:
    """L_dis of each image, `[N]`: 1 - <f* bar, f bar>, 0 for features that are equal up to scale.

    Source: LUCIR, equation 6.
    """
    dtype = torch.promote_types(features_ND.dtype, torch.float32)  # near 1 bfloat16 has steps of 1/256
    return 1 - functional.cosine_similarity(features_ND.to(dtype), old_features_ND.to(dtype), dim=1)


def margin_ranking_losses(
    cosines_NC: torch.Tensor, labels_N: torch.Tensor, *, old_count: int, margin: float, nearest: int
) -> torch.Tensor:
    """L_mr of each image, `[N]`: an old-class image is nearer to its own class than to new ones, by a margin.

    Args:
        cosines_NC: cosines with all classes, old ones first, without eta.
        labels_N: the true labels; what comes out for those of new classes means nothing.
        old_count: how many classes are old.
        margin: m in the paper.
        nearest: K in the paper, reduced to the number of new classes: the loss is the mean over them.

    Source: LUCIR, equation 8.
    """
    new_count = cosines_NC.shape[1] - old_count
    true_N1 = cosines_NC.gather(1, labels_N[:, None])
    hard_NK = cosines_NC[:, old_count:].topk(min(nearest, new_count), dim=1).values
    return functional.relu(margin - true_N1 + hard_NK).mean(dim=1)


def imprint(features_by_class: list[torch.Tensor], old_CD: torch.Tensor) -> torch.Tensor:
    """New embeddings: the direction of each class's mean unit feature, the mean length of the old embeddings.

    Source: LUCIR's code ("imprint weights"), after Qi et al., Low-Shot Learning with Imprinted Weights (CVPR 2018).
    """
    means_CD = torch.stack([functional.normalize(features_ND, dim=1).mean(dim=0) for features_ND in features_by_class])
    new_CD: torch.Tensor = functional.normalize(means_CD, dim=1) * old_CD.norm(dim=1).mean()
    return new_CD
