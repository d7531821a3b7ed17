"""Learners on small streams, for the tests of methods."""

from __future__ import annotations

import math
from typing import Any

import torch

from engram_trainer import methods
from engram_trainer.configuration import RuntimeConfig
from engram_trainer.memory import Learned, Memory
from engram_trainer.methods import Learner
from engram_trainer.runtime import Runtime
from engram_trainer.stream import Stream


def quiet(done: int, total: int, *, loss: torch.Tensor) -> None:
    """Progress that is only looked at for what must hold."""
    assert 0 < done <= total
    assert math.isfinite(float(loss))


def runtime_of(tasks: Stream, seed: int = 0, **config: Any) -> Runtime:
    """One process on the CPU."""
    return Runtime(RuntimeConfig(**config), tasks, seed=seed)


def learner_of(
    method: str,
    tasks: Stream,
    *,
    network: str = "mlp",
    seed: int = 0,
    config: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """A fresh learner of a method, by name; `config` is of its runtime."""
    return methods.build(method, runtime_of(tasks, seed, **(config or {})), network=network, options=options)


def run(
    learner: Learner, memory: Memory, tasks: Stream, count: int | None = None, *, first: int = 0, seed: int = 0
) -> None:
    """Visits `first` to `count` of a stream, learned and remembered."""
    for task in tasks.visits[first:count]:
        learner.learn(task, memory, quiet)
        if not learner.fills_memory:
            columns = learner.columns(task.train)
            memory.add(Learned(task.index, task.train, embed=learner.embed, seed=seed, fields=columns))
        learner.balance(task, memory, quiet)


def same(one: Any, other: Any) -> bool:
    """Whether two states are equal to the last bit."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)
