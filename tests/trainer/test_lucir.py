"""LUCIR by its theorems, by cases done by hand, and by a short run that must beat chance."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engram import strip
from engram_trainer import datasets, evaluation, stream
from engram_trainer.datasets import Dataset
from engram_trainer.local_memory import Kind, LocalConfig, LocalMemory
from engram_trainer.memory import Learned, Memory, NoMemory
from engram_trainer.methods import lucir
from engram_trainer.methods.lucir import Config, Lucir, adaptive_weight, imprint, less_forget_loss, margin_ranking_loss
from engram_trainer.plain_memory import local_memory
from engram_trainer.stream import Stream, StreamConfig


def ignore(done: int, total: int, *, loss: float) -> None:
    assert 0 < done <= total
    assert math.isfinite(loss)


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return datasets.load("digits")


def stream_of(digits: Dataset, **options: Any) -> Stream:
    return stream.build(digits, StreamConfig(**{"tasks": 5, "seed": 0, "train_per_class": 60, **options}))


def quick(**options: Any) -> Config:
    return Config(**{"epochs": 3, "batch_size": 32, "balance_epochs": 2, "padding": 1, "flip": False, **options})


def learner_of(tasks: Stream, seed: int = 0, **options: Any) -> Lucir:
    return Lucir(tasks, quick(**options), network="conv", seed=seed)


def run(learner: Lucir, memory: Memory, tasks: Stream, count: int) -> None:
    for task in tasks.tasks[:count]:
        learner.learn(task, memory, ignore)
        memory.add(Learned(task.index, task.train_images, task.train_class_ids, embed=learner.embed, seed=learner.seed))
        learner.balance(task, memory, ignore)


def raw_memory() -> LocalMemory:
    return local_memory(LocalConfig(kind="raw", budget_bytes=20 * 66, per="class"))


@given(scale=st.floats(0.01, 100), seed=st.integers(0, 2**31))
def test_the_less_forget_loss_is_zero_for_features_equal_up_to_scale(scale: float, seed: int) -> None:
    features_ND = torch.randn(6, 16, generator=torch.Generator().manual_seed(seed))
    assert less_forget_loss(scale * features_ND, features_ND).item() == pytest.approx(0, abs=1e-6)
    assert less_forget_loss(-scale * features_ND, features_ND).item() == pytest.approx(2, abs=1e-6)


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
    loss = margin_ranking_loss(cosines_NC, labels, old_count=2, margin=0.5, nearest=2)
    assert loss.item() == pytest.approx((0.1 + 0 + 0.9 + 0.7) / 4)


def test_the_margin_loss_takes_at_most_as_many_new_classes_as_there_are() -> None:
    cosines_NC = torch.tensor([[0.3, 0.6]])
    loss = margin_ranking_loss(cosines_NC, torch.tensor([0]), old_count=1, margin=0.5, nearest=2)
    assert loss.item() == pytest.approx(0.8)


def test_the_margin_loss_of_a_batch_without_old_images_is_zero() -> None:
    loss = margin_ranking_loss(torch.rand(4, 3), torch.full((4,), 2), old_count=2, margin=0.5, nearest=2)
    assert loss.item() == 0


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
        learner.learn(tasks.tasks[1], NoMemory(), ignore)
    assert not same(plain, heavy)


def test_old_embeddings_stand_still_while_a_task_is_learned_and_move_in_the_balance(digits: Dataset) -> None:
    tasks, memory = stream_of(digits), raw_memory()
    learner = learner_of(tasks)
    run(learner, memory, tasks, 1)
    old_CD = learner.classifier.embeddings_CD.detach().clone()
    learner.learn(tasks.tasks[1], memory, ignore)
    assert torch.equal(learner.classifier.embeddings_CD[:2], old_CD)
    assert learner.classifier.embeddings_CD.shape == (4, 128)
    task = tasks.tasks[1]
    memory.add(Learned(1, task.train_images, task.train_class_ids, embed=learner.embed))
    network, eta = copy.deepcopy(learner.network.state_dict()), learner.classifier.eta.item()
    learner.balance(task, memory, ignore)
    assert not torch.equal(learner.classifier.embeddings_CD[:2], old_CD)
    assert learner.classifier.eta.item() == eta
    assert all(torch.equal(value, network[name]) for name, value in learner.network.state_dict().items())


def test_tasks_of_a_single_class_can_be_learned(digits: Dataset) -> None:
    tasks = stream_of(digits, base_classes=8, tasks=3)
    learner = learner_of(tasks)
    run(learner, raw_memory(), tasks, 3)
    assert learner.scores(tasks.tasks[2].test_images).shape[1] == 10


def test_a_seed_decides_a_run_to_the_last_bit(digits: Dataset) -> None:
    tasks = stream_of(digits)
    one, again, other = learner_of(tasks), learner_of(tasks), learner_of(tasks, seed=1)
    for learner in (one, again, other):
        run(learner, raw_memory(), tasks, 2)
    assert same(one, again)
    assert not same(one, other)


def test_a_resumed_run_equals_an_uninterrupted_one(digits: Dataset) -> None:
    tasks, memory = stream_of(digits), raw_memory()
    learner = learner_of(tasks)
    run(learner, memory, tasks, 2)
    resumed = learner_of(tasks)
    resumed.load_state_dict(copy.deepcopy(learner.state_dict()))
    assert np.array_equal(resumed.scores(tasks.tasks[0].test_images), learner.scores(tasks.tasks[0].test_images))
    for each in (learner, resumed):
        each.learn(tasks.tasks[2], memory, ignore)
    assert same(learner, resumed)


def test_a_replay_ratio_sets_the_part_of_draws_that_are_exemplars(digits: Dataset) -> None:
    learner = learner_of(stream_of(digits), replay_ratio=0.4)
    order = torch.cat(list(learner._epoch(3000, 30, torch.Generator().manual_seed(0))))
    assert len(order) == 5000
    assert (order >= 3000).float().mean().item() == pytest.approx(0.4, abs=0.03)
    shuffled = torch.cat(
        list(learner_of(stream_of(digits), replay_ratio=0.0)._epoch(300, 30, torch.Generator().manual_seed(0)))
    )
    assert sorted(shuffled.tolist()) == list(range(330))


def test_a_batch_never_has_a_single_image(digits: Dataset) -> None:
    learner = learner_of(stream_of(digits))
    sizes = [len(rows) for rows in learner._epoch(65, 0, torch.Generator().manual_seed(0))]
    assert sizes == [32, 32]


def test_scenarios_without_new_classes_are_refused(digits: Dataset) -> None:
    with pytest.raises(ValueError, match="permuted tasks bring none"):
        Lucir(stream_of(digits, scenario="permuted"), Config(), network="conv", seed=0)


def test_a_round_trip_shows_every_image_as_an_engram_pack_at_one_of_the_qualities_does(digits: Dataset) -> None:
    images = digits.train_images[:30]
    coded = lucir.round_trip(images, (10, 90), np.random.default_rng(0))
    ids = np.zeros(30, np.int64)
    low, high = (strip.encode(images, ids, quality=quality).decode() for quality in (10, 90))
    is_low = (coded == low).all(axis=(1, 2, 3))
    is_high = (coded == high).all(axis=(1, 2, 3))
    assert (is_low | is_high).all()
    assert is_low.sum() >= 15
    assert is_high.sum() >= 15


def test_own_images_are_shown_as_jpeg_only_where_exemplars_are_jpeg(digits: Dataset) -> None:
    tasks = stream_of(digits)

    def first_task(kind: Kind, codec_ratio: float) -> Lucir:
        learner = learner_of(tasks, codec_ratio=codec_ratio, epochs=1)
        learner.learn(tasks.tasks[0], local_memory(LocalConfig(kind=kind)), ignore)
        return learner

    assert same(first_task("raw", 0.5), first_task("raw", 0.0))
    assert not same(first_task("strips", 0.5), first_task("strips", 0.0))


def test_replay_beats_chance_and_no_replay(digits: Dataset) -> None:
    tasks = stream_of(digits, train_per_class=100)
    config = quick(epochs=10, balance_epochs=10, replay_ratio=0.5)
    with_replay, without = (Lucir(tasks, config, network="mlp", seed=0) for _ in range(2))
    run(with_replay, raw_memory(), tasks, 5)
    run(without, NoMemory(), tasks, 5)

    def last(learner: Lucir) -> float:
        return float(np.mean([evaluation.accuracy(learner.scores, tasks, task, learned=4) for task in tasks.tasks]))

    assert last(with_replay) > 0.6
    assert last(with_replay) > last(without) + 0.2


def same(one: Lucir, other: Lucir) -> bool:
    pairs = zip(_tensors(one), _tensors(other), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def _tensors(learner: Lucir) -> list[torch.Tensor]:
    return [*learner.network.state_dict().values(), *learner.classifier.state_dict().values()]
