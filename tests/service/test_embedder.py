"""Extractors: ONNX models good and bad in a real child process."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import psutil
import pytest
from onnx import TensorProto, helper
from onnxruntime.capi import onnxruntime_pybind11_state

from engram.errors import BadExtractor
from engram_service import extractor_child, extractors
from engram_service.embedder import ExtractorLimits, OnnxEmbedder, inspect
from engram_service.settings import Settings
from tests.models import endless_model
from tests.photos import photos
from tests.servers import PATIENCE_S

pytestmark = pytest.mark.slow

LIMITS = ExtractorLimits(memory_bytes=2 * 2**30, batch_s=60.0, max_bytes=2**20)
UInt8Array = npt.NDArray[np.uint8]


def constant(name: str, values: npt.ArrayLike, dtype: type = np.float32) -> onnx.TensorProto:
    tensor: onnx.TensorProto = onnx.numpy_helper.from_array(np.asarray(values, dtype), name)
    return tensor


def build(
    nodes: Sequence[onnx.NodeProto],
    *,
    shape: Sequence[int | str] = ("N", 3, "H", "W"),
    initializers: Sequence[onnx.TensorProto] = (),
    output: Sequence[int | str] = ("N", "D"),
    dtype: int = TensorProto.FLOAT,
    domains: Sequence[str] = (),
    functions: Sequence[onnx.FunctionProto] = (),
) -> onnx.ModelProto:
    graph = helper.make_graph(
        list(nodes),
        "features",
        [helper.make_tensor_value_info("x", dtype, shape)],
        [helper.make_tensor_value_info("y", dtype, output)],
        list(initializers),
    )
    opsets = [helper.make_opsetid("", 17), *(helper.make_opsetid(domain, 1) for domain in domains)]
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=opsets, functions=list(functions), ir_version=8)
    return model


def convolution(shape: Sequence[int | str] = ("N", 3, "H", "W"), d: int = 8) -> onnx.ModelProto:
    """A 3x3 convolution, ReLU and the mean over the picture: [N, D]."""
    channels = shape[1] if isinstance(shape[1], int) else 3
    weights = np.random.default_rng(0).standard_normal((d, channels, 3, 3))
    return build(
        [
            helper.make_node("Conv", ["x", "w"], ["a"], pads=[1, 1, 1, 1]),
            helper.make_node("Relu", ["a"], ["b"]),
            helper.make_node("ReduceMean", ["b"], ["y"], axes=[2, 3], keepdims=0),
        ],
        shape=shape,
        initializers=[constant("w", weights)],
    )


def saved(folder: Path, model: onnx.ModelProto | bytes) -> tuple[Path, str]:
    data = model if isinstance(model, bytes) else model.SerializeToString()
    path = folder / "model.onnx"
    path.write_bytes(data)
    return path, hashlib.sha256(data).hexdigest()


def expected_convolution(images: UInt8Array, d: int = 8) -> npt.NDArray[np.float64]:
    weights = np.random.default_rng(0).standard_normal((d, images.shape[3], 3, 3)).astype(np.float32)
    padded = np.pad(images.astype(np.float64) / 255, ((0, 0), (1, 1), (1, 1), (0, 0)))
    h, w = images.shape[1:3]
    out = np.zeros((len(images), h, w, d))
    for i in range(3):
        for j in range(3):
            out += np.einsum("nhwc,dc->nhwd", padded[:, i : i + h, j : j + w], weights[:, :, i, j])
    features = np.maximum(out, 0).mean(axis=(1, 2))
    return np.asarray(features / np.linalg.norm(features, axis=1, keepdims=True))


def test_a_model_embeds_as_its_formula_says_and_in_chunks(tmp_path: Path) -> None:
    path, digest = saved(tmp_path, convolution())
    images = photos(300, (12, 10, 3))
    with OnnxEmbedder(path, digest, LIMITS) as embedder:
        assert embedder.name == digest
        assert embedder.block == 16
        features = embedder.embed(images)
        again = embedder.embed(images[7:8])
        assert embedder.embed(images[:0]).shape == (0, 8)
    assert features.dtype == np.float32
    assert np.allclose(features, expected_convolution(images), atol=1e-5)
    assert np.allclose(again, features[7:8], atol=1e-6)


def test_inspect_tells_the_input_shape_and_the_dimensions(tmp_path: Path) -> None:
    info = inspect(saved(tmp_path, convolution(("N", 1, 28, 28), d=16))[0], LIMITS)
    assert info.input_shape == (None, 1, 28, 28)
    assert info.dimensions == 16


def test_grey_images_are_repeated_and_resized_to_what_the_model_takes(tmp_path: Path) -> None:
    path, digest = saved(tmp_path, convolution(("N", 3, 24, 20)))
    grey = photos(4, (12, 10, 1))
    resized = extractor_child.resize(grey.transpose(0, 3, 1, 2).astype(np.float32), 24, 20)
    with OnnxEmbedder(path, digest, LIMITS) as embedder:
        features = embedder.embed(grey)
    as_colour = resized.transpose(0, 2, 3, 1).repeat(3, axis=3)
    assert np.allclose(features, expected_convolution(as_colour.astype(np.float32)), atol=1e-5)


def test_resizing_keeps_a_flat_picture_flat_and_shrinking_uses_every_pixel() -> None:
    flat = np.full((1, 1, 9, 7), 3, np.float32)
    for height, width in ((4, 4), (9, 7), (20, 30), (1, 1)):
        assert np.allclose(extractor_child.resize(flat, height, width), 3)
    ramp = np.arange(4, dtype=np.float32).reshape(1, 1, 1, 4)
    assert np.allclose(extractor_child.resize(ramp, 1, 8)[0, 0, 0], [0, 0.25, 0.75, 1.25, 1.75, 2.25, 2.75, 3])
    spikes = np.eye(64, dtype=np.float32)[:, None, None, :]
    assert extractor_child.resize(spikes, 1, 8).sum(axis=3).min() > 0.5 * 8 / 64


def test_operators_that_the_model_defines_itself_are_allowed(tmp_path: Path) -> None:
    mean = helper.make_function(
        "mine",
        "Pool",
        ["a"],
        ["b"],
        [helper.make_node("ReduceMean", ["a"], ["b"], axes=[2, 3], keepdims=0)],
        [helper.make_opsetid("", 17)],
    )
    nodes = [
        helper.make_node("Pool", ["x"], ["p"], domain="mine"),
        helper.make_node("Concat", ["p", "p"], ["y"], axis=1),
    ]
    model = build(nodes, domains=["mine"], functions=[mean])
    assert inspect(saved(tmp_path, model)[0], LIMITS).dimensions == 6


def test_dropout_that_drops_nothing_is_allowed() -> None:
    for inputs in (["q"], ["q", "ratio"], ["q", "ratio", ""]):
        model = pooled(helper.make_node("Dropout", inputs, ["y"]), initializers=[constant("ratio", 0.5)])
        extractor_child.check_is_plain(model.SerializeToString())


def test_no_domain_of_the_operators_of_onnxruntime_is_open_to_models() -> None:
    schemas = onnxruntime_pybind11_state.get_all_operator_schema()
    domains = {schema.domain for schema in schemas}
    assert "com.microsoft" in domains
    for domain in domains | {schema.domain for schema in onnx.defs.get_all_schemas()}:
        model = pooled(functions=[own(domain, "Mine")])
        with pytest.raises(extractor_child.Refused, match="not its own"):
            extractor_child.check_is_plain(model.SerializeToString())


def test_no_standard_operator_with_a_seed_is_open_to_models() -> None:
    seeded = {schema.name for schema in onnx.defs.get_all_schemas() if "seed" in schema.attributes}
    assert len(seeded) > 5
    for name in seeded:
        model = pooled(helper.make_node(name, ["q", "q", "q"], ["y"]))
        with pytest.raises(extractor_child.Refused, match="which is random"):
            extractor_child.check_is_plain(model.SerializeToString())


def external(location: str) -> onnx.ModelProto:
    model = convolution()
    weights = model.graph.initializer[0]
    weights.ClearField("raw_data")
    weights.data_location = TensorProto.EXTERNAL
    entry = weights.external_data.add()
    entry.key, entry.value = "location", location
    return model


def hidden_external() -> onnx.ModelProto:
    """External data in a constant inside the branch of an If."""
    inner = external("/etc/passwd").graph.initializer[0]
    branch = helper.make_graph(
        [helper.make_node("Constant", [], ["c"], value=inner)],
        "branch",
        [],
        [helper.make_tensor_value_info("c", TensorProto.FLOAT, None)],
    )
    nodes = [helper.make_node("If", ["t"], ["y"], then_branch=branch, else_branch=branch)]
    return build(nodes, initializers=[constant("t", True, np.bool_)])


def gluttonous() -> onnx.ModelProto:
    """Expands two pictures to 16 GiB."""
    nodes = [
        helper.make_node("Expand", ["x", "size"], ["a"]),
        helper.make_node("ReduceMean", ["a"], ["y"], axes=[0, 3, 4], keepdims=0),
    ]
    # [2, 3, H, W] becomes [2^k, 2, 3, H, W]
    return build(nodes, shape=("N", 3, 64, 64), initializers=[constant("size", [2**17, 1, 1, 1, 1], np.int64)])


def pooled(*more: onnx.NodeProto, **options: Any) -> onnx.ModelProto:
    """The means [N, 3] as `p`, twice as `q` [N, 6], then more nodes that make `y`."""
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["p"], axes=[2, 3], keepdims=0),
        helper.make_node("Concat", ["p", "p"], ["q"], axis=1),
        *more,
    ]
    return build(nodes, **options)


def own(domain: str, name: str, *nodes: onnx.NodeProto) -> onnx.FunctionProto:
    """An operator that the model defines."""
    made = list(nodes) or [helper.make_node("Identity", ["a"], ["b"])]
    return helper.make_function(domain, name, ["a"], ["b"], made, [helper.make_opsetid("", 17)])


def contributed(name: str, function: onnx.FunctionProto) -> onnx.ModelProto:
    """An operator that onnxruntime has beyond the standard, in a model that defines another one of that domain."""
    node = helper.make_node(name, ["q"], ["y"], domain="com.microsoft")
    return pooled(node, domains=["com.microsoft"], functions=[function])


def random(name: str, **attributes: Any) -> onnx.ModelProto:
    return pooled(helper.make_node(name, ["q"], ["y"], **attributes))


def random_inside() -> onnx.ModelProto:
    """A random operator in the body of one that the model defines."""
    noise = own("mine", "Noise", helper.make_node("RandomNormalLike", ["a"], ["b"]))
    return pooled(helper.make_node("Noise", ["q"], ["y"], domain="mine"), domains=["mine"], functions=[noise])


def dropping() -> onnx.ModelProto:
    switches = [constant("ratio", 0.5), constant("training", True, np.bool_)]
    return pooled(helper.make_node("Dropout", ["q", "ratio", "training"], ["y"]), initializers=switches)


def varint(number: int) -> bytes:
    return bytes([number & 0x7F | 0x80]) + varint(number >> 7) if number > 0x7F else bytes([number])


def disguised(tail: bytes) -> bytes:
    """Gelu of onnxruntime; bytes behind its node pretend, to a careless reader, that it is the model's own."""
    domains = ["com.microsoft", "mine"]
    node = helper.make_node("Gelu", ["q"], ["y"], domain="com.microsoft")
    model = pooled(node, domains=domains, functions=[own("mine", "Gelu")])
    (graph_less := onnx.ModelProto()).CopyFrom(model)
    graph_less.ClearField("graph")
    nodes = [each.SerializeToString() for each in model.graph.node]
    nodes[-1] += tail
    model.graph.ClearField("node")
    graph = model.graph.SerializeToString() + b"".join(b"\x0a" + varint(len(each)) + each for each in nodes)
    return bytes(graph_less.SerializeToString() + b"\x3a" + varint(len(graph)) + graph)


BAD: dict[str, tuple[Callable[[], onnx.ModelProto | bytes], str]] = {
    "no bytes": (lambda: b"", "onnxruntime says"),
    "not a model": (lambda: b"GIF89a, or so it says" * 9, "168|189 bytes are not an ONNX model"),
    "a truncated model": (lambda: convolution().SerializeToString()[:-40], "are not an ONNX model|onnxruntime says"),
    "too many bytes": (lambda: b"\0" * (2**20 + 1), "1,048,577 bytes, the limit is 1,048,576"),
    "external data": (lambda: external("weights.bin"), "external data"),
    "an address as external data": (lambda: external("*/_ORT_MEM_ADDR_/*"), "external data"),
    "external data in a branch": (hidden_external, "external data"),
    "a custom operator": (
        lambda: build([helper.make_node("Exploit", ["x"], ["y"], domain="evil")], domains=["evil"]),
        "operator Exploit of domain 'evil'",
    ),
    "an unknown operator": (lambda: build([helper.make_node("NoSuchThing", ["x"], ["y"])]), "NoSuchThing"),
    "an input of rank 2": (
        lambda: build([helper.make_node("Identity", ["x"], ["y"])], shape=("N", 12)),
        "input has 2 dimensions",
    ),
    "five channels": (lambda: convolution(("N", 5, 32, 32)), "5 channels"),
    "a fixed batch": (lambda: convolution((1, 3, 32, 32)), "exactly 1 image"),
    "an enormous input": (lambda: convolution(("N", 3, 60_000, 60_000)), "1 to 16,777,216 values"),
    "double precision": (
        lambda: pooled(helper.make_node("Identity", ["q"], ["y"]), dtype=TensorProto.DOUBLE),
        r"input is tensor\(double\)",
    ),
    "an output of rank 4": (
        lambda: build([helper.make_node("Relu", ["x"], ["y"])], output=("N", 3, "H", "W")),
        r"it gives \[2, 3, 32, 32\]; it must give \[2, D\]",
    ),
    "an output without the batch": (
        lambda: pooled(helper.make_node("ReduceMean", ["q"], ["y"], axes=[0], keepdims=1)),
        r"it gives \[1, 6\]; it must give \[2, D\]",
    ),
    "three dimensions": (lambda: pooled(helper.make_node("Identity", ["p"], ["y"])), "3 dimensions; selection needs 4"),
    "NaN": (
        lambda: pooled(helper.make_node("Log", ["m"], ["y"]), initializers=[constant("m", -np.ones((2, 4)))]),
        "NaN or infinity for 2 of 2 images",
    ),
    "endless memory": (gluttonous, "out of memory|SIGKILL"),
}


NOT_PLAIN: dict[str, tuple[Callable[[], onnx.ModelProto | bytes], str]] = {
    "an operator of onnxruntime beside one of its own": (
        lambda: contributed("Gelu", own("com.microsoft", "Unused")),
        "defines operator Unused in domain 'com.microsoft'",
    ),
    "an operator of onnxruntime under its own name": (
        lambda: contributed("QuickGelu", own("com.microsoft", "QuickGelu")),
        "defines operator QuickGelu in domain 'com.microsoft'",
    ),
    "an operator of onnxruntime beside one of another domain": (
        lambda: contributed("Gelu", own("mine", "Gelu")),
        "operator Gelu of domain 'com.microsoft'",
    ),
    "a domain that is a number": (lambda: disguised(b"\x3dmine"), "operator Gelu of domain 'com.microsoft'"),
    "a field beyond 32 bits": (lambda: disguised(varint((1 << 35) + (7 << 3) + 2) + b"\x04mine"), "not an ONNX model"),
    "an operator of the standard redefined": (
        lambda: pooled(helper.make_node("Relu", ["q"], ["y"]), functions=[own("", "Relu")]),
        "defines operator Relu in domain ''",
    ),
    "random numbers": (lambda: random("RandomNormalLike", seed=1.0), "RandomNormalLike, which is random"),
    "random choices": (lambda: random("Bernoulli"), "Bernoulli, which is random"),
    "random numbers in an operator of its own": (random_inside, "RandomNormalLike, which is random"),
    "dropout that drops": (dropping, "Dropout with a training mode"),
}


@pytest.mark.parametrize("case", NOT_PLAIN)
def test_a_model_of_foreign_or_random_operators_is_refused_before_it_is_loaded(case: str) -> None:
    make, reason = NOT_PLAIN[case]
    model = make()
    with pytest.raises(extractor_child.Refused, match=reason):
        extractor_child.check_is_plain(model if isinstance(model, bytes) else model.SerializeToString())


@pytest.mark.slow
@pytest.mark.parametrize("case", BAD)
def test_a_model_that_cannot_serve_is_refused_with_its_reason(case: str, tmp_path: Path) -> None:
    make, reason = BAD[case]
    with pytest.raises(BadExtractor, match=reason):
        inspect(saved(tmp_path, make())[0], LIMITS)


def test_two_outputs_are_refused(tmp_path: Path) -> None:
    model = pooled(helper.make_node("Identity", ["q"], ["y"]))
    model.graph.output.append(helper.make_tensor_value_info("p", TensorProto.FLOAT, ["N", 3]))
    with pytest.raises(BadExtractor, match="1 inputs and 2 outputs"):
        inspect(saved(tmp_path, model)[0], LIMITS)


def test_a_model_that_runs_for_ever_is_stopped(tmp_path: Path) -> None:
    limits = ExtractorLimits(batch_s=2.0)
    with pytest.raises(BadExtractor, match="more than 2 s for loading and a dummy batch"):
        inspect(saved(tmp_path, endless_model())[0], limits)


def test_a_file_that_changed_since_it_was_registered_is_refused(tmp_path: Path) -> None:
    path, _ = saved(tmp_path, convolution())
    with pytest.raises(BadExtractor, match="not 0000"), OnnxEmbedder(path, "0" * 64, LIMITS):
        pass


def test_colour_images_do_not_suit_a_model_for_grey_ones(tmp_path: Path) -> None:
    path, digest = saved(tmp_path, convolution(("N", 1, 8, 8)))
    with OnnxEmbedder(path, digest, LIMITS) as embedder, pytest.raises(BadExtractor, match="takes 1 channel"):
        embedder.embed(photos(2, (8, 8, 3)))


def children() -> list[psutil.Process]:
    return [child for child in psutil.Process().children(recursive=True) if "extractor" in " ".join(child.cmdline())]


def test_the_child_ends_with_the_block_even_after_an_error(tmp_path: Path) -> None:
    path, digest = saved(tmp_path, convolution())
    embedder = OnnxEmbedder(path, digest, LIMITS)
    with pytest.raises(ZeroDivisionError), embedder:
        _ = 1 // (len(children()) - 1)
    assert children() == []
    with pytest.raises(ValueError, match="not running"):
        embedder.embed(photos(1))


def test_a_child_that_is_killed_is_reported(tmp_path: Path) -> None:
    path, digest = saved(tmp_path, convolution())
    with OnnxEmbedder(path, digest, LIMITS) as embedder:
        children()[0].kill()
        with pytest.raises(BadExtractor, match="ended by SIGKILL during a batch of 1 images"):
            embedder.embed(photos(1))


def test_the_child_dies_with_its_parent(tmp_path: Path) -> None:
    path, digest = saved(tmp_path, convolution())
    program = (
        "import sys, pathlib; from engram_service.embedder import OnnxEmbedder\n"
        "with OnnxEmbedder(pathlib.Path(sys.argv[1]), sys.argv[2]) as embedder:\n"
        "    print(embedder._child._process.pid, flush=True); sys.stdin.read()\n"
    )
    paths = {"PYTHONPATH": os.pathsep.join(str(Path(part).absolute()) for part in sys.path if part)}
    command = [sys.executable, "-c", program, str(path), digest]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | paths
    ) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        os.kill(parent.pid, signal.SIGKILL)
    assert psutil.wait_procs([child], timeout=PATIENCE_S)[1] == []


def test_the_child_stands_back_as_far_as_the_settings_say(tmp_path: Path) -> None:
    path, digest = saved(tmp_path, convolution())
    wanted = extractors.limits(Settings(data_dir=tmp_path, worker_niceness=os.nice(0) + 4))
    with OnnxEmbedder(path, digest, wanted):
        assert children()[0].nice() == os.nice(0) + 4


def test_the_child_sees_no_secrets_of_the_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGRAM_ADMIN_TOKEN", "engram_secret")
    path, digest = saved(tmp_path, convolution())
    with OnnxEmbedder(path, digest, LIMITS):
        assert "engram_secret" not in "".join(children()[0].environ().values())
