"""The `Learner` protocol that every method implements for the loop, and `build`, which makes a method by name.

A method is one file that reads like its paper. It sees tasks (`stream.Task`) and a memory (`memory.Memory`), never a
URL, a session or a file. Inside, images are float32 `[N, C, H, W]` in 0..1; outside, uint8 `[N, H, W, C]`.
The columns of `scores` are labels: places of classes in `Stream.class_order`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from engram_trainer.examples import Images
from engram_trainer.memory import Memory
from engram_trainer.stream import Stream, Task

METHODS = {
    "finetune": "engram_trainer.methods.finetune:Finetune",
    "joint": "engram_trainer.methods.joint:Joint",
    "gem": "engram_trainer.methods.gem:Gem",
    "lucir": "engram_trainer.methods.lucir:Lucir",
}
"""Where each method's class is; the module also has its `Config`."""

SCORE_BATCH = 512


class OnStep(Protocol):
    """Called by `learn` and `balance` after each step: `done` of `total` steps are done, with the latest loss."""

    def __call__(self, done: int, total: int, *, loss: float) -> None:
        """Show the progress."""


class Learner(Protocol):
    """One method with its network. `learn`, then the loop feeds the memory, then `balance`; task by task."""

    def learn(self, task: Task, memory: Memory, progress: OnStep) -> None:
        """Train on a task; `memory` holds exemplars of earlier tasks only."""

    def balance(self, task: Task, memory: Memory, progress: OnStep) -> None:
        """What a method does once the memory holds the task as well, e.g. a class-balanced fine-tune."""

    def scores(self, images_NHWC: Images) -> npt.NDArray[np.float32]:
        """One row per image, one column per label; at least the labels seen so far."""

    def embed(self, images_NHWC: Images) -> npt.NDArray[np.float32]:
        """Features `[N, D]` of images, as `extractor` computes them."""

    def extractor(self) -> nn.Module:
        """The feature extractor in evaluation mode: float32 `[N, C, H, W]` in 0..1 to `[N, D]`."""

    def state_dict(self) -> dict[str, Any]:
        """Everything a later `load_state_dict` needs to go on: tensors, numbers, strings and containers of them."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Become the learner whose `state_dict` this is."""


def config_class(method: str) -> Any:
    """The frozen dataclass that configures a method.

    Raises:
        ValueError: there is no such method.
    """
    return importlib.import_module(_location(method)[0]).Config


def build(
    method: str,
    *,
    stream: Stream,
    network: str,
    seed: int,
    device: str = "cpu",
    options: Mapping[str, Any] | None = None,
) -> Learner:
    """A fresh learner for a stream.

    Args:
        method: a key of `METHODS`.
        stream: the tasks to come; a learner takes its shape, its order of classes and its scenario.
        network: a name that `networks.build` knows.
        seed: draws initial weights, batches and augmentation.
        device: a torch device.
        options: fields of the method's `Config`.

    Raises:
        ValueError: no such method, or an option it does not have.
    """
    module, name = _location(method)
    config = config_class(method)
    known = {field.name for field in fields(config)}
    unknown = sorted(set(options or {}) - known)
    if unknown:
        raise ValueError(f"method {method} has no option {', '.join(unknown)}; it has {', '.join(sorted(known))}")
    learner: Learner = getattr(importlib.import_module(module), name)(
        stream, config(**(options or {})), network=network, seed=seed, device=device
    )
    return learner


def _location(method: str) -> tuple[str, str]:
    if method not in METHODS:
        raise ValueError(f"method {method!r} is not one of {', '.join(METHODS)}")
    module, name = METHODS[method].split(":")
    return module, name


def pixels(images_NHWC: Images, device: torch.device | str = "cpu") -> torch.Tensor:
    """uint8 `[N, H, W, C]` as float32 `[N, C, H, W]` in 0..1."""
    images = torch.from_numpy(np.ascontiguousarray(images_NHWC)).to(device)
    return images.permute(0, 3, 1, 2).to(torch.float32).div_(255).contiguous()


@torch.no_grad()
def in_batches(module: nn.Module, images_NHWC: Images, device: torch.device | str) -> npt.NDArray[np.float32]:
    """Apply a module in evaluation mode to images, a batch at a time, the last one included; its mode is restored."""
    was_training = module.training
    module.eval()
    parts = [
        module(pixels(images_NHWC[start : start + SCORE_BATCH], device)).cpu().numpy()
        for start in range(0, max(len(images_NHWC), 1), SCORE_BATCH)
    ]
    module.train(was_training)
    return np.concatenate(parts).astype(np.float32)
