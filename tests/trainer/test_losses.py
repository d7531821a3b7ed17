"""Losses against the papers' equations, evaluated here by numpy in float64, and by what holds for every input."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engram.batch import Batch
from engram_trainer.datasets import Dataset
from engram_trainer.examples import Examples
from engram_trainer.methods.losses import binary_cross_entropy, distillation, logit_distance
from engram_trainer.methods.nearest_mean import NEVER, class_means, nearest_mean_scores
from engram_trainer.stream import Stream, StreamConfig, build

Array = npt.NDArray[np.float64]
seeds = st.integers(0, 2**31)


def tensors(seed: int, *shapes: tuple[int, ...], scale: float = 3.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]


def softened(logits: Array, temperature: float) -> Array:
    """f_k^(1/T) / sum_j f_j^(1/T), as the papers write it, of outputs f."""
    outputs = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return np.asarray(outputs ** (1 / temperature) / (outputs ** (1 / temperature)).sum(axis=1, keepdims=True))


@given(seeds)
def test_the_distance_of_logits_is_der_s_equation(seed: int) -> None:
    logits, stored = tensors(seed, (6, 10), (6, 10))
    expected = np.linalg.norm(stored.numpy() - logits.numpy(), axis=1) ** 2 / 10
    np.testing.assert_allclose(logit_distance(logits, stored).numpy(), expected, rtol=1e-12)


def test_equal_logits_have_no_distance_and_pull_nowhere() -> None:
    (logits,) = tensors(0, (4, 5))
    logits.requires_grad_()
    distance = logit_distance(logits, logits.detach().clone())
    distance.sum().backward()  # type: ignore[no-untyped-call]
    assert distance.tolist() == [0.0] * 4
    assert logits.grad is not None
    assert not logits.grad.any()


def test_a_distance_of_logits_done_by_hand() -> None:
    distance = logit_distance(torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[4.0, -2.0], [1.0, 0.0]]))
    assert distance.tolist() == [(9 + 16) / 2, 1 / 2]


@given(seeds, st.sampled_from([1.0, 2.0, 5.0]))
def test_the_distillation_is_the_papers_cross_entropy_less_the_entropy_of_the_old_outputs(
    seed: int, temperature: float
) -> None:
    new, old = tensors(seed, (6, 4), (6, 4))
    old_outputs, new_outputs = softened(old.numpy(), temperature), softened(new.numpy(), temperature)
    cross = -(old_outputs * np.log(new_outputs)).sum(axis=1)
    entropy = -(old_outputs * np.log(old_outputs)).sum(axis=1)
    found = distillation(new, old, temperature=temperature).numpy()
    np.testing.assert_allclose(found, cross - entropy, rtol=1e-9, atol=1e-12)


@given(seeds, st.sampled_from([1.0, 2.0, 5.0]))
def test_the_gradient_of_the_distillation_is_that_of_the_papers_cross_entropy(seed: int, temperature: float) -> None:
    new, old = tensors(seed, (5, 4), (5, 4))
    new.requires_grad_()
    distillation(new, old, temperature=temperature).sum().backward()  # type: ignore[no-untyped-call]
    # d/dz of -sum_k q_k log softmax_k(z / T) is (p - q) / T.
    expected = (softened(new.detach().numpy(), temperature) - softened(old.numpy(), temperature)) / temperature
    assert new.grad is not None
    np.testing.assert_allclose(new.grad.numpy(), expected, rtol=1e-9, atol=1e-12)


@given(seeds, st.floats(-50, 50))
def test_logits_that_are_equal_up_to_a_constant_have_nothing_to_distil(seed: int, constant: float) -> None:
    (logits,) = tensors(seed, (3, 5))
    assert float(distillation(logits + constant, logits, temperature=2.0).abs().max()) < 1e-12


def test_a_distillation_done_by_hand() -> None:
    old, new = torch.tensor([[math.log(9.0), 0.0]]), torch.zeros(1, 2)
    # T = 2: the old outputs 0.9 and 0.1 become 3/4 and 1/4, the new ones stay halves.
    expected = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert distillation(new, old, temperature=2.0).item() == pytest.approx(expected, rel=1e-6)


@given(seeds)
def test_the_binary_cross_entropy_is_icarl_s_equation(seed: int) -> None:
    logits, old_logits = tensors(seed, (6, 5), (6, 2))
    labels = np.random.default_rng(seed).integers(2, 5, 6)
    outputs = 1 / (1 + np.exp(-logits.numpy()))
    old = 1 / (1 + np.exp(-old_logits.numpy()))
    expected = np.zeros(6)
    for image, label in enumerate(labels):
        for y in (2, 3, 4):  # the new classes s..t: delta_{y = y_i}
            g = outputs[image, y]
            expected[image] -= np.log(g) if y == label else np.log(1 - g)
        for y in (0, 1):  # the old ones 1..s-1: q_i^y
            g, q = outputs[image, y], old[image, y]
            expected[image] -= q * np.log(g) + (1 - q) * np.log(1 - g)
    targets = torch.cat([torch.sigmoid(old_logits), torch.eye(5).double()[torch.from_numpy(labels)][:, 2:]], dim=1)
    np.testing.assert_allclose(binary_cross_entropy(logits, targets).numpy(), expected, rtol=1e-9)


def test_a_sigmoid_of_a_half_costs_one_bit_for_each_class() -> None:
    losses = binary_cross_entropy(torch.zeros(2, 3), torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 1.0]]))
    assert losses.tolist() == pytest.approx([3 * math.log(2)] * 2)


@pytest.fixture(scope="module")
def stream() -> Stream:
    """Classes 3, 1 | 2, 0 of tiny images."""
    examples = Examples.of_arrays(np.zeros((4, 2, 2, 1), np.uint8), np.arange(4))
    return build(Dataset("four", examples, examples), StreamConfig(tasks=2, class_order=(3, 1, 2, 0)))


def batch(class_ids: list[int], pixels: Any) -> Batch:
    images = np.asarray(pixels, np.uint8).reshape(len(class_ids), 1, -1, 1)
    ids = np.array(class_ids, np.int64)
    return Batch(images, ids, np.zeros_like(ids), np.arange(len(ids)))


def as_features(images_NHWC: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    return images_NHWC.reshape(len(images_NHWC), -1).astype(np.float32)


def test_means_are_icarl_s_equation_over_all_batches(stream: Stream) -> None:
    pixels = np.random.default_rng(1).integers(1, 255, (9, 4))
    class_ids = [3, 3, 1, 3, 1, 2, 2, 2, 2]
    found = class_means(stream, as_features, [batch(class_ids[:4], pixels[:4]), batch(class_ids[4:], pixels[4:])])
    for label, class_id in enumerate(stream.class_order):
        rows = pixels[np.array(class_ids) == class_id].astype(float)
        if len(rows) == 0:  # class 0
            assert not found[label].any()
            continue
        mean = np.mean([row / np.linalg.norm(row) for row in rows], axis=0)
        np.testing.assert_allclose(found[label].numpy(), mean / np.linalg.norm(mean), rtol=1e-6)


def test_the_nearest_mean_is_the_class_of_the_least_distance() -> None:
    features, means = tensors(3, (50, 6), (4, 6))
    means = means / means.norm(dim=1, keepdim=True)
    unit = features.numpy() / np.linalg.norm(features.numpy(), axis=1, keepdims=True)
    distances = ((unit[:, None] - means.numpy()[None]) ** 2).sum(axis=2)
    scores = nearest_mean_scores(features, means).numpy()
    np.testing.assert_array_equal(scores.argmax(axis=1), distances.argmin(axis=1))
    np.testing.assert_allclose(2 - 2 * scores, distances, rtol=1e-9)


@given(seeds, st.floats(1e-3, 1e3))
def test_the_lengths_of_features_do_not_matter(seed: int, scale: float) -> None:
    features, means = tensors(seed, (5, 6), (4, 6))
    torch.testing.assert_close(nearest_mean_scores(scale * features, means), nearest_mean_scores(features, means))


def test_a_class_without_exemplars_is_never_the_answer() -> None:
    means = torch.tensor([[0.0, 0.0], [-1.0, 0.0]])
    scores = nearest_mean_scores(torch.tensor([[1.0, 0.0]]), means)
    assert scores.tolist() == [[NEVER, -1.0]]


def test_an_empty_memory_has_no_means(stream: Stream) -> None:
    with pytest.raises(ValueError, match="this one is empty"):
        class_means(stream, as_features, [])
