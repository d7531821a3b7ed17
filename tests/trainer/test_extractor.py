"""The exported ONNX model computes the same as PyTorch, for any number of images."""

from __future__ import annotations

import copy

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from engram_trainer import networks
from engram_trainer.extractor import to_onnx


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("mlp", (28, 28, 1)),
        ("conv", (28, 28, 1)),
        ("conv", (32, 32, 3)),
        pytest.param("mlp", (32, 32, 3), marks=pytest.mark.slow),
        pytest.param("resnet32", (28, 28, 1), marks=pytest.mark.slow),
        pytest.param("resnet32", (32, 32, 3), marks=pytest.mark.slow),
    ],
)
def test_onnxruntime_computes_the_same_features_for_any_number_of_images(
    name: str, shape: tuple[int, int, int]
) -> None:
    network = networks.build(name, shape, seed=0, signed=True)
    height, width, channels = shape
    network(torch.rand(16, channels, height, width))  # moves the batch statistics away from their start
    network.eval()
    session = onnxruntime.InferenceSession(to_onnx(network, shape))
    for count in (1, 5, 130):
        images = torch.rand(count, channels, height, width)
        (features_ND,) = session.run(None, {"images_NCHW": images.numpy()})
        assert features_ND.shape == (count, network.dimensions)
        np.testing.assert_allclose(features_ND, network(images).detach().numpy(), rtol=1e-3, atol=1e-4)


def test_the_model_says_its_shapes_and_holds_its_own_weights() -> None:
    model = onnx.load_from_string(to_onnx(networks.build("conv", (28, 28, 1), seed=0), (28, 28, 1)))
    dims = model.graph.input[0].type.tensor_type.shape.dim
    assert [dim.dim_param or dim.dim_value for dim in dims] == ["N", 1, 28, 28]
    assert [dim.dim_param or dim.dim_value for dim in model.graph.output[0].type.tensor_type.shape.dim] == ["N", 128]
    assert not [tensor for tensor in model.graph.initializer if tensor.external_data]


def test_export_leaves_the_network_as_it_was() -> None:
    network = networks.build("conv", (28, 28, 1), seed=0).train()
    before = copy.deepcopy(network.state_dict())
    to_onnx(network, (28, 28, 1))
    assert network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_the_same_network_gives_the_same_bytes() -> None:
    network = networks.build("conv", (28, 28, 1), seed=0)
    assert to_onnx(network, (28, 28, 1)) == to_onnx(network, (28, 28, 1))
