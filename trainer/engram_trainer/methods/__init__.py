"""The `Learner` protocol that every method implements for the loop, and `build`, which makes a method by name.

A method is one file that reads like its paper. It sees tasks (`stream.Task`) and a memory (`memory.Memory`), never a
URL, a session or a file, and describes its training as phases (`steps.Phase`) that the runtime walks through. Inside,
images are float32 `[N, C, H, W]`, prepared for the network; outside, uint8 `[N, H, W, C]`.
The columns of `scores` are labels: places of classes in `Stream.class_order`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from torch import nn

from engram_trainer.examples import Examples, Images
from engram_trainer.memory import Memory
from engram_trainer.runtime import Runtime
from engram_trainer.steps import OnStep
from engram_trainer.stream import Task

METHODS = {
    "finetune": "engram_trainer.methods.finetune:Finetune",
    "joint": "engram_trainer.methods.joint:Joint",
    "gem": "engram_trainer.methods.gem:Gem",
    "er": "engram_trainer.methods.er:Er",
    "der": "engram_trainer.methods.der:Der",
    "derpp": "engram_trainer.methods.derpp:DerPlusPlus",
    "agem": "engram_trainer.methods.agem:Agem",
    "icarl": "engram_trainer.methods.icarl:Icarl",
    "lwf": "engram_trainer.methods.lwf:Lwf",
    "wa": "engram_trainer.methods.wa:Wa",
    "lucir": "engram_trainer.methods.lucir:Lucir",
}
"""Where each method's class is; the module also has its `Config`."""


class Learner(Protocol):
    """One method with its network. `learn`, then the loop feeds the memory, then `balance`; task by task."""

    runtime: Runtime
    fields: Mapping[str, str]
    """What its exemplars have beside the image, as a buffer declares it."""

    @property
    def fills_memory(self) -> bool:
        """Whether it fills the memory while it learns, so that the loop does not."""

    def learn(self, task: Task, memory: Memory, progress: OnStep) -> None:
        """Train on a task; `memory` holds exemplars of earlier tasks only."""

    def columns(self, examples: Examples) -> Mapping[str, npt.NDArray[Any]]:
        """The fields of a task's examples, one row for each, once the task is learned."""

    def balance(self, task: Task, memory: Memory, progress: OnStep) -> None:
        """What a method does once the memory holds the task as well, e.g. a class-balanced fine-tune."""

    def scores(self, images_NHWC: Images) -> npt.NDArray[np.float32]:
        """One row per image, one column per label; at least the labels seen so far."""

    def embed(self, images_NHWC: Images) -> npt.NDArray[np.float32]:
        """Features `[N, D]` of images, as `extractor` computes them."""

    def extractor(self) -> nn.Module:
        """The feature extractor in evaluation mode: float32 `[N, C, H, W]` in 0..1, as stored, to `[N, D]`."""

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


def build(method: str, runtime: Runtime, *, network: str, options: Mapping[str, Any] | None = None) -> Learner:
    """A fresh learner.

    Args:
        method: a key of `METHODS`.
        runtime: what makes its steps; a learner takes its stream, its seed and its device.
        network: a name that `networks.build` knows.
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
        runtime, config(**(options or {})), network=network
    )
    return learner


def _location(method: str) -> tuple[str, str]:
    if method not in METHODS:
        raise ValueError(f"method {method!r} is not one of {', '.join(METHODS)}")
    module, name = METHODS[method].split(":")
    return module, name
