"""Several processes learn what one with the whole batch learns."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engram.errors import Unavailable
from engram.fields import KEY
from engram_trainer import datasets, methods, stream
from engram_trainer.batches import batches
from engram_trainer.configuration import RuntimeConfig
from engram_trainer.examples import Images, Rows, Subset
from engram_trainer.local_memory import LocalConfig
from engram_trainer.plain_memory import local_memory
from engram_trainer.processes import Place, beside
from engram_trainer.runtime import Runtime
from engram_trainer.stream import StreamConfig
from tests.trainer.runs import run

pytestmark = pytest.mark.slow

OPTIONS: dict[str, dict[str, Any]] = {
    "lucir": {"epochs": 2, "batch_size": 16, "balance_epochs": 2, "padding": 1, "flip": True},
    "gem": {"batch_size": 10, "replay_batch": 8, "padding": 1},
    "finetune": {"epochs": 2, "flip": True, "batch_size": 9},
    "derpp online": {"epochs": 2, "batch_size": 16, "replay_batch": 8, "fill": "online", "slots": 30, "flush": 5},
    "icarl": {"epochs": 2, "padding": 1},
    "wa": {"epochs": 2, "flip": True},
}
SLOW = {"gem", "finetune", "derpp online", "icarl", "wa"}


def learn(place: Place, method: str, path: Path, tasks: int = 2) -> None:
    """The first process leaves what it has learned in a file."""
    torch.set_num_threads(1)
    data = datasets.load("digits").first(train=24, test=5)
    made = stream.build(data, StreamConfig(tasks=5, seed=0))
    runtime = Runtime(RuntimeConfig(processes=place.world_size), made, seed=3, place=place)
    learner = methods.build(method.split()[0], runtime, network="mlp", options=OPTIONS[method])
    fields = {**learner.fields, **({KEY: "utf8"} if learner.fills_memory else {})}
    config = LocalConfig(kind="strips", budget_bytes=40_000, ranking="random", quality=75, fields=fields)
    memory = local_memory(config)
    run(learner, memory, made, tasks)
    if runtime.is_first:
        torch.save(learner.state_dict(), path)


@pytest.mark.parametrize("method", [pytest.param(m, marks=pytest.mark.slow if m in SLOW else ()) for m in OPTIONS])
def test_two_processes_equal_one_with_the_whole_batch(method: str, tmp_path: Path) -> None:
    """Sums of float32 in another order differ in the last digits; nothing else may differ."""
    learn(Place(), method, tmp_path / "one")
    with beside(partial(learn, method=method, path=tmp_path / "none"), 2) as place:
        learn(place, method, tmp_path / "two")
    one, two = (torch.load(tmp_path / name, weights_only=True) for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name in ("model", "network", "classifier"):
        for key, value in one.get(name, {}).items():
            torch.testing.assert_close(two[name][key], value, rtol=1e-3, atol=2e-5)
    kept = [state.get("filling", {}).get("held") for state in (one, two)]
    assert kept[0] == kept[1], "an example is kept by what was offered before it, whichever process had it"


def _fails(place: Place) -> None:
    raise ValueError("this one has no data")


def test_what_another_process_raises_is_raised_by_the_first() -> None:
    with pytest.raises(ValueError, match="this one has no data"), beside(_fails, 2):
        raise RuntimeError("the connection was closed by the other process")


def _ends(place: Place) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_process_that_is_killed_is_one_sentence() -> None:
    with pytest.raises(Unavailable, match="ended from outside, by signal 9"), beside(_ends, 2):
        raise RuntimeError("the connection was closed by the other process")


@pytest.mark.slow
def test_a_process_that_does_not_come_is_not_waited_for() -> None:
    """A program read from standard input cannot be run once more by the other process."""
    program = (
        "from engram_trainer.processes import Place, beside\n"
        "with beside(Place, 2):\n"
        "    raise SystemExit('the body was reached')\n"
    )
    path = os.pathsep.join(sys.path)
    ended = subprocess.run(
        [sys.executable, "-"], input=program, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert "another process of the run could not be started" in ended.stderr


def _reads(place: Place) -> None:
    list(batches(Subset(Dark(), np.arange(4)), [np.array([0, 3])], workers=1))
    if place.rank:
        raise ValueError(f"process {place.rank} has read all")


@pytest.mark.slow
def test_each_process_reads_with_workers_of_its_own() -> None:
    with pytest.raises(ValueError, match="process 1 has read all"), beside(_reads, 2) as place:
        _reads(place)


class Dark:
    """Black images that take some decoding."""

    shape = (2, 2, 1)
    is_at_hand = False

    def __len__(self) -> int:
        return 4

    def read(self, rows: Rows) -> Images:
        return np.zeros((len(rows), *self.shape), np.uint8)
