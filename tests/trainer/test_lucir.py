"""LUCIR by its theorems, by cases done by hand, and by a short run that must beat chance."""

from __future__ import annotations

import copy
import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engram_trainer import datasets, evaluation, stream
from engram_trainer.datasets import Dataset
from engram_trainer.local_memory import Kind, LocalConfig, LocalMemory
from engram_trainer.memory import Learned, NoMemory
from engram_trainer.methods.lucir import (
    Lucir,
    adaptive_weight,
    imprint,
    less_forget_losses,
    margin_ranking_losses,
)
from engram_trainer.methods.training import replayed
from engram_trainer.networks import cosines
from engram_trainer.plain_memory import local_memory
from engram_trainer.stream import Stream, StreamConfig
from tests.trainer import runs
from tests.trainer.runs import quiet, run


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return datasets.load("digits")


def stream_of(digits: Dataset, **options: Any) -> Stream:
    return stream.build(digits, StreamConfig(**{"tasks": 5, "seed": 0, "train_per_class": 60, **options}))


def learner_of(tasks: Stream, seed: int = 0, network: str = "conv", **options: Any) -> Lucir:
    quick = {"epochs": 3, "batch_size": 32, "balance_epochs": 2, "padding": 1, "flip": False, **options}
    learner: Lucir = runs.learner_of("lucir", tasks, network=network, seed=seed, **quick)
    return learner


def raw_memory() -> LocalMemory:
    return local_memory(LocalConfig(kind="raw", budget_bytes=20 * 66, per="class"))


@given(scale=st.floats(0.01, 100), seed=st.integers(0, 2**31))
def test_the_less_forget_loss_is_zero_for_features_equal_up_to_scale(scale: float, seed: int) -> None:
    features_ND = torch.randn(6, 16, generator=torch.Generator().manual_seed(seed))
    assert less_forget_losses(scale * features_ND, features_ND).abs().max().item() < 1e-6
    assert less_forget_losses(-scale * features_ND, features_ND).min().item() == pytest.approx(2, abs=1e-6)


def test_lambda_is_its_base_times_the_root_of_old_over_new_classes() -> None:
    assert adaptive_weight(5.0, 50, 10) == pytest.approx(5 * math.sqrt(5))
    assert adaptive_weight(5.0, 2, 2) == 5.0
    assert adaptive_weight(5.0, 1, 4) == 2.5


def test_a_margin_loss_done_by_hand() -> None:
    # Two old classes, three new ones. The last image is new and does not count.
    cosines_NC = torch.tensor([[0.9, 0.1, 0.5, 0.2, -0.3], [0.0, 0.2, 0.4, -0.1, 0.6], [0.9, 0.9, 0.1, 0.9, 0.9]])
    labels = torch.tensor([0, 1, 2])
    # Image 0: nearest new 0.5 and 0.2 -> 0.5 - 0.9 + 0.5 = 0.1 and max(0, -0.2) = 0.
    # Image 1: nearest new 0.6 and 0.4 -> 0.5 - 0.2 + 0.6 = 0.9 and 0.7.
    losses_N = margin_ranking_losses(cosines_NC, labels, old_count=2, margin=0.5, nearest=2)
    assert losses_N[:2].tolist() == pytest.approx([(0.1 + 0) / 2, (0.9 + 0.7) / 2])


def test_the_margin_loss_takes_at_most_as_many_new_classes_as_there_are() -> None:
    losses_N = margin_ranking_losses(torch.tensor([[0.3, 0.6]]), torch.tensor([0]), old_count=1, margin=0.5, nearest=2)
    assert losses_N.item() == pytest.approx(0.8)


@given(seed=st.integers(0, 2**31), length=st.floats(0.1, 10))
def test_imprinted_embeddings_have_the_mean_length_of_the_old_and_the_direction_of_their_class(
    seed: int, length: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    old_CD = torch.randn(4, 8, generator=generator) * length
    features = [torch.randn(5, 8, generator=generator) for _ in range(3)]
    new_CD = imprint(features, old_CD)
    assert torch.allclose(new_CD.norm(dim=1), old_CD.norm(dim=1).mean().expand(3), rtol=1e-4)
    mean_D = torch.nn.functional.normalize(features[0], dim=1).mean(dim=0)
    assert torch.nn.functional.cosine_similarity(new_CD[0], mean_D, dim=0).item() == pytest.approx(1, abs=1e-4)


def test_the_first_task_is_learned_by_cross_entropy_alone(digits: Dataset) -> None:
    tasks = stream_of(digits)
    plain, heavy = learner_of(tasks), learner_of(tasks, less_forget_weight=1e6, margin_weight=1e6)
    for learner in (plain, heavy):
        run(learner, NoMemory(), tasks, 1)
    assert same(plain, heavy)
    for learner in (plain, heavy):
        learner.learn(tasks.tasks[1], NoMemory(), quiet)
    assert not same(plain, heavy)


def test_old_embeddings_stand_still_while_a_task_is_learned_and_move_in_the_balance(digits: Dataset) -> None:
    tasks, memory = stream_of(digits), raw_memory()
    learner = learner_of(tasks)
    run(learner, memory, tasks, 1)
    old_CD = learner.classifier.embeddings_CD.detach().clone()
    learner.learn(tasks.tasks[1], memory, quiet)
    assert torch.equal(learner.classifier.embeddings_CD[:2], old_CD)
    assert learner.classifier.embeddings_CD.shape == (4, 128)
    task = tasks.tasks[1]
    memory.add(Learned(1, task.train, embed=learner.embed))
    network, eta = copy.deepcopy(learner.network.state_dict()), learner.classifier.eta.item()
    learner.balance(task, memory, quiet)
    assert not torch.equal(learner.classifier.embeddings_CD[:2], old_CD)
    assert learner.classifier.eta.item() == eta
    assert all(torch.equal(value, network[name]) for name, value in learner.network.state_dict().items())


def test_tasks_of_a_single_class_can_be_learned(digits: Dataset) -> None:
    tasks = stream_of(digits, base_classes=8, tasks=3, train_per_class=20)
    learner = learner_of(tasks)
    run(learner, raw_memory(), tasks, 3)
    assert learner.scores(tasks.tasks[2].test.read()).shape[1] == 10


@pytest.mark.slow
def test_a_seed_decides_a_run_to_the_last_bit(digits: Dataset) -> None:
    tasks = stream_of(digits, train_per_class=20)
    one, again, other = learner_of(tasks), learner_of(tasks), learner_of(tasks, seed=1)
    for learner in (one, again, other):
        run(learner, raw_memory(), tasks, 2)
    assert same(one, again)
    assert not same(one, other)


def test_a_resumed_run_equals_an_uninterrupted_one(digits: Dataset) -> None:
    tasks, memory = stream_of(digits, train_per_class=20), raw_memory()
    learner = learner_of(tasks)
    run(learner, memory, tasks, 2)
    resumed = learner_of(tasks)
    resumed.load_state_dict(copy.deepcopy(learner.state_dict()))
    assert np.array_equal(resumed.scores(tasks.tasks[0].test.read()), learner.scores(tasks.tasks[0].test.read()))
    for each in (learner, resumed):
        each.learn(tasks.tasks[2], memory, quiet)
    assert same(learner, resumed)


def test_a_replay_ratio_is_the_least_part_of_a_batch_that_is_exemplars(digits: Dataset) -> None:
    memory = local_memory(LocalConfig(kind="raw", budget_bytes=100 * 66))
    count = partial(replayed, 100, memory=memory, exclude_task=1, world_size=1)
    assert count(0.4, 3000) == 0
    memory.add(Learned(0, stream_of(digits, tasks=1).tasks[0].train))
    assert count(0.4, 3000) == 40
    assert count(0.4, 30) == 77  # 100 of 130
    assert count(0.0, 300) == 25
    assert count(0.0, 30_000) == 1
    assert count(1 - 1e-9, 3000) == 99
    assert partial(count, world_size=2)(0.45, 3000) == 44
    assert partial(count, world_size=3)(1 - 1e-9, 3000) == 96  # 33 images for each process, one of them new
    with pytest.raises(ValueError, match="batch_size must be at least 4, not 3"):
        replayed(3, 0.4, 3000, memory, exclude_task=1, world_size=2)


def test_scenarios_without_new_classes_are_refused(digits: Dataset) -> None:
    with pytest.raises(ValueError, match="permuted tasks bring none"):
        learner_of(stream_of(digits, scenario="permuted"))


def test_own_images_are_shown_as_jpeg_only_where_exemplars_are_jpeg(digits: Dataset) -> None:
    tasks = stream_of(digits)

    def first_task(kind: Kind, codec_ratio: float) -> Lucir:
        learner = learner_of(tasks, codec_ratio=codec_ratio, epochs=1)
        learner.learn(tasks.tasks[0], local_memory(LocalConfig(kind=kind)), quiet)
        return learner

    assert same(first_task("raw", 0.5), first_task("raw", 0.0))
    assert not same(first_task("strips", 0.5), first_task("strips", 0.0))


@pytest.mark.slow
def test_replay_beats_chance_and_no_replay(digits: Dataset) -> None:
    tasks = stream_of(digits, train_per_class=100)
    with_replay, without = (
        learner_of(tasks, network="mlp", epochs=10, balance_epochs=10, replay_ratio=0.5) for _ in range(2)
    )
    run(with_replay, raw_memory(), tasks)
    run(without, NoMemory(), tasks)

    def last(learner: Lucir) -> float:
        found = [evaluation.accuracy(learner.scores, learner.runtime, task, learned=4) for task in tasks.tasks]
        return float(np.mean([each or 0.0 for each in found]))

    assert last(with_replay) > 0.6
    assert last(with_replay) > last(without) + 0.2


def same(one: Lucir, other: Lucir) -> bool:
    return runs.same(one.state_dict(), other.state_dict())


def test_in_bf16_a_small_change_of_the_features_is_not_lost_and_cosines_do_not_become_equal() -> None:
    generator = torch.Generator().manual_seed(0)
    features_ND = torch.randn(8, 64, generator=generator)
    changed_ND = features_ND + 0.02 * torch.randn(8, 64, generator=generator)
    with torch.autocast("cpu", torch.bfloat16):
        losses_N = less_forget_losses(features_ND.bfloat16(), changed_ND.bfloat16())
        cosines_NC = cosines(features_ND.bfloat16(), changed_ND)
    torch.testing.assert_close(losses_N, less_forget_losses(features_ND, changed_ND), rtol=0.1, atol=0)
    torch.testing.assert_close(cosines_NC, cosines(features_ND, changed_ND), rtol=0, atol=1e-3)
    assert cosines_NC.dtype is torch.float32
