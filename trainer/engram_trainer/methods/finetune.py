"""Train on one task after the other without any memory: the lower bound for every replay method."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from engram_trainer.augment import augment
from engram_trainer.datasets import ClassIds, Images
from engram_trainer.memory import Memory
from engram_trainer.methods import OnStep, pixels
from engram_trainer.methods.linear import LinearLearner, batches
from engram_trainer.stream import Stream, Task


@dataclass(frozen=True)
class Config:
    """How a task is trained."""

    epochs: int = 10
    batch_size: int = 32
    lr: float = 0.05
    """Divided by 10 at two thirds of the epochs."""
    momentum: float = 0.9
    weight_decay: float = 5e-4
    flip: bool = False
    """Mirror half of the images left to right."""
    padding: int = 0
    """Largest random shift of an image, in pixels."""


class Finetune(LinearLearner):
    """Cross-entropy on the task's images, over the classes seen so far."""

    def __init__(self, stream: Stream, config: Config, *, network: str, seed: int, device: str = "cpu") -> None:
        super().__init__(stream, network=network, seed=seed, device=device)
        self.config = config

    def learn(self, task: Task, memory: Memory, progress: OnStep) -> None:
        """Train on the task alone; the memory is not looked at."""
        self.fit(task.train_images, task.train_class_ids, task.index, progress)

    def fit(self, images_NHWC: Images, class_ids: ClassIds, task_index: int, progress: OnStep) -> None:
        """Train the network as it stands on these images."""
        config = self.config
        order = np.random.default_rng([self.seed, task_index])
        noise = torch.Generator().manual_seed(int(order.integers(2**62)))
        optimizer = torch.optim.SGD(
            self.model.parameters(), config.lr, momentum=config.momentum, weight_decay=config.weight_decay
        )
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [max(1, config.epochs * 2 // 3)])
        labels, seen = self.targets(class_ids), self.stream.seen(task_index)
        self.model.train()
        steps = -(-len(images_NHWC) // config.batch_size) * config.epochs
        done = 0
        for _ in range(config.epochs):
            for rows in batches(len(images_NHWC), config.batch_size, order):
                images = pixels(images_NHWC[rows], self.device)
                images = augment(images, padding=config.padding, flip=config.flip, generator=noise)
                loss = self.loss(images, labels[rows], seen)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                done += 1
                progress(done, steps, loss=float(loss.detach()))
            schedule.step()
