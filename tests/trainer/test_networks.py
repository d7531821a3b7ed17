"""The networks have the right shapes, initialisation by seed, signed features and a cosine classifier."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from engram_trainer import networks
from engram_trainer.networks import CosineClassifier, cosines

WITH_LARGE_ONES = [
    pytest.param(name, marks=pytest.mark.slow if name in ("resnet18", "resnet18-cifar") else ())
    for name in networks.NETWORKS
]


@pytest.mark.parametrize("name", WITH_LARGE_ONES)
@pytest.mark.parametrize("shape", [(28, 28, 1), pytest.param((32, 32, 3), marks=pytest.mark.slow), (33, 47, 3)])
def test_a_network_turns_images_of_any_shape_into_features_of_its_dimensions(
    name: str, shape: tuple[int, int, int]
) -> None:
    network = networks.build(name, shape, seed=0).eval()
    height, width, channels = shape
    features_ND = network(torch.rand(2, channels, height, width))
    assert features_ND.shape == (2, network.dimensions)
    assert torch.isfinite(features_ND).all()


def test_the_smallest_images_pass_through_the_small_conv_net() -> None:
    assert networks.build("conv", (8, 8, 1), seed=0).eval()(torch.rand(3, 1, 8, 8)).shape == (3, 128)
    assert networks.build("conv", (2, 2, 3), seed=0).eval()(torch.rand(3, 3, 2, 2)).shape == (3, 128)


@pytest.mark.parametrize("name", WITH_LARGE_ONES)
def test_signed_features_can_be_negative_and_others_cannot(name: str) -> None:
    images = torch.rand(4, 3, 32, 32)
    assert (networks.build(name, (32, 32, 3), seed=0, signed=True).eval()(images) < 0).any()
    assert (networks.build(name, (32, 32, 3), seed=0).eval()(images) >= 0).all()


def test_the_seed_decides_the_weights_and_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, same, other = (networks.build("conv", (28, 28, 1), seed=seed) for seed in (1, 1, 2))
    head, same_head = (networks.linear_head(128, 10, seed=1) for _ in range(2))
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert torch.equal(head.weight, same_head.weight)


def test_resnets_have_the_layers_that_their_names_count() -> None:
    def weighted(name: str) -> int:
        network = networks.build(name, (32, 32, 3), seed=0)
        convolutions = [m for m in network.modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size != (1, 1)]
        return len(convolutions) + 1  # and the classifier

    assert (weighted("resnet18"), weighted("resnet18-cifar"), weighted("resnet32")) == (18, 18, 32)


@pytest.mark.parametrize(
    ("name", "shape", "classes", "parameters"),
    [
        ("mlp", (28, 28, 1), 10, 89_610),
        ("mlp-256", (28, 28, 1), 10, 269_322),
        ("resnet18-reduced", (32, 32, 3), 100, 1_109_240),
        ("resnet18-cifar", (32, 32, 3), 10, 11_173_962),
    ],
)
def test_a_network_has_as_many_parameters_as_the_papers(
    name: str, shape: networks.Shape, classes: int, parameters: int
) -> None:
    network = networks.build(name, shape, seed=0)
    head = networks.linear_head(network.dimensions, classes, seed=0)
    assert sum(parameter.numel() for part in (network, head) for parameter in part.parameters()) == parameters


def test_an_unknown_network_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="'vgg' is not one of mlp, mlp-256, conv"):
        networks.build("vgg", (28, 28, 1), seed=0)


def test_a_cosine_done_by_hand() -> None:
    features_ND = torch.tensor([[3.0, 4.0], [-1.0, 0.0]])
    embeddings_CD = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    assert torch.allclose(cosines(features_ND, embeddings_CD), torch.tensor([[0.6, 0.8], [-1.0, 0.0]]))
    assert torch.allclose(
        CosineClassifier(embeddings_CD, eta=10.0)(features_ND), torch.tensor([[6.0, 8.0], [-10.0, 0.0]])
    )


@given(scale=st.floats(0.01, 100), seed=st.integers(0, 2**31))
def test_cosine_scores_do_not_depend_on_the_lengths_of_features_and_embeddings(scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    features_ND, embeddings_CD = torch.randn(5, 8, generator=generator), torch.randn(3, 8, generator=generator)
    assert torch.allclose(
        cosines(features_ND, embeddings_CD), cosines(scale * features_ND, embeddings_CD / scale), atol=1e-5
    )


def test_eta_is_learned() -> None:
    classifier = CosineClassifier(torch.eye(3))
    before = copy.deepcopy(classifier.eta.detach())
    torch.nn.functional.cross_entropy(classifier(torch.eye(3)), torch.arange(3)).backward()  # type: ignore[no-untyped-call]
    torch.optim.SGD(classifier.parameters(), lr=1.0).step()
    assert classifier.eta > before
