"""What only a GPU can show: GEM's Gram matrix stays there, LUCIR learns in bfloat16, exemplars are there in time."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from engram_trainer import datasets, stream
from engram_trainer.evaluation import accuracy
from engram_trainer.examples import Examples
from engram_trainer.local_memory import LocalConfig
from engram_trainer.memory import Learned
from engram_trainer.methods.gem import project
from engram_trainer.plain_memory import local_memory
from engram_trainer.stream import StreamConfig
from tests.trainer.runs import learner_of, quiet, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: run on a machine that has one"),
]


def test_gem_projects_on_the_device_and_moves_no_gradient_off_it() -> None:
    """20 references of 11 million parameters: 0.9 GB that stay, against a Gram matrix of 400 numbers that travels."""
    generator = torch.Generator("cuda").manual_seed(0)
    references = torch.randn(20, 11_000_000, generator=generator, device="cuda")
    gradient = -references.sum(dim=0) + torch.randn(11_000_000, generator=generator, device="cuda")
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        projected = project(gradient, references, gamma=0.0)
        torch.cuda.synchronize()
    assert projected.device.type == "cuda"
    slack = (references @ projected) / references.norm(dim=1) / gradient.norm()
    assert float(slack.min()) > -2e-3
    expected = project(gradient[:50_000].cpu().double(), references[:, :50_000].cpu().double())
    found = project(gradient[:50_000], references[:, :50_000])
    torch.testing.assert_close(found.cpu().double(), expected, rtol=1e-3, atol=1e-2)
    assert not [
        event.key for event in profile.key_averages() if "DtoH" in event.key and event.device_time_total > 20_000
    ]


def test_lucir_learns_in_bfloat16_on_resnet18_what_it_learns_in_float32() -> None:
    data = datasets.load("sample").first(train=200, test=50)
    tasks = stream.build(data, StreamConfig(tasks=2, base_classes=5))
    found = {}
    for precision in ("32", "bf16"):
        learner = learner_of(
            "lucir",
            tasks,
            network="resnet18-cifar",
            config={"device": "cuda", "precision": precision},
            epochs=8,
            balance_epochs=2,
        )
        run(learner, local_memory(LocalConfig(kind="strips", budget_bytes=40_000, ranking="random", quality=75)), tasks)
        assert all(parameter.dtype == torch.float32 for parameter in learner.network.parameters())
        scores = [accuracy(learner.scores, learner.runtime, task, learned=1) or 0.0 for task in tasks.tasks]
        found[precision] = float(np.mean(scores))
    assert found["32"] > 0.5
    assert abs(found["bf16"] - found["32"]) < 0.1


def test_exemplars_are_decoded_and_on_the_device_before_they_are_needed() -> None:
    """Replay of 224x224 exemplars beside a ResNet-18: steps wait for it for less than a fiftieth of their time."""
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (256, 224, 224, 3), np.uint8)
    examples = Examples.of_arrays(images, np.repeat(np.arange(4), 64))
    tasks = stream.build(datasets.Dataset("noise", examples, examples), StreamConfig(tasks=2, class_order=(0, 1, 2, 3)))
    memory = local_memory(LocalConfig(kind="strips", budget_bytes=10**8, ranking="random", quality=50))
    memory.add(Learned(0, tasks.tasks[0].train))
    learner = learner_of("er", tasks, network="resnet18", config={"device": "cuda", "precision": "bf16"}, epochs=40)
    learner.learn(tasks.tasks[1], memory, quiet)
    runtime = learner.runtime
    runtime.step_s = runtime.replay_wait_s = 0.0  # the first steps compile and warm up
    torch.cuda.synchronize()
    begin = time.perf_counter()
    learner.learn(tasks.tasks[1], memory, quiet)
    torch.cuda.synchronize()
    assert runtime.replay_wait_s < 0.02 * (time.perf_counter() - begin)
