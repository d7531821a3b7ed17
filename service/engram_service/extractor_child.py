"""Run one uploaded ONNX model in a restricted process, apart from the service.

`python -m engram_service.extractor_child ORDERS` limits its own memory, lets the kernel kill it when its parent
dies, can write no file beyond a few words to standard error, checks the model, and answers batches until its input
ends. What a model must be:

    one input    float32 [N, C, H, W], N free, C 1 or 3 (or free), values 0..1
    one output   float32 [N, D], D from 4 to 4,096, finite

Grey images are repeated to three channels where the model wants three, and images are resized (bilinear, over the
whole area of a pixel when shrinking) where its H and W are fixed at another size.

A model is plain data. Operators outside the ONNX standard and tensors in other files are refused before onnxruntime
sees the bytes: some of its releases resolve such files against the working directory, and some take a certain file
name to mean an address in memory. Operators that the model itself defines, in a domain of its own, are allowed, being
made of standard ones. Random operators are refused: the same images must always lead to the same decision.

The protobuf message is read by hand. `onnx.checker` passes over operators of domains that it does not know, so it could
not say what this asks, and would bring the service a dependency that parses the whole model a second time.

Standard input and output, little-endian. The child speaks first, once it has run a dummy batch:

    child -> parent   length:4  JSON:length          {"input_shape": [N, C, H, W], "dimensions": D}; free is null
    parent -> child   N:4 H:4 W:4 C:4  N*H*W*C bytes
    child -> parent   length:4  JSON:length          {"shape": [N, D]}
                      N*D float32

Any answer may be {"error": "...", "details": {}} instead, and is then the last.

Letters: N images, H height, W width, C channels, D dimensions; F values of a line are resized to B.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
import resource
import signal
import struct
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

UInt8Array = npt.NDArray[np.uint8]
FloatArray = npt.NDArray[np.float32]

LENGTH = struct.Struct("<I")
BATCH = struct.Struct("<4I")

# Volumes are compared over blocks of at most D / 2 exemplars, and fewer than two span nothing.
MIN_DIMENSIONS = 4
MAX_DIMENSIONS = 4096
MAX_INPUT_VALUES = 2**24

_STANDARD_DOMAINS = frozenset({"", "ai.onnx.ml"})
# Where onnxruntime has operators of its own, which it may prefer to a model's, and which are no standard.
_TAKEN_DOMAINS = ("ai.onnx", "com.microsoft", "com.ms.", "org.pytorch.aten")
_RANDOM_OPERATORS = frozenset(
    {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
)
_BATCH_VALUES = 2**20
_STDERR_BYTES = 2**16
_OPEN_FILES = 64
_PR_SET_PDEATHSIG = 1
_FREE_SIDES = (32, 224)
_MAX_DEPTH = 100


class Refused(Exception):
    """The model cannot serve; the parent raises it as `BadExtractor`.

    Not that class itself: importing `engram` for it would take longer than all else that the child does before it
    reads the model.
    """

    def __init__(self, message: str, **details: Any) -> None:
        super().__init__(message)
        self.message, self.details = message, details


@dataclass(frozen=True)
class Orders:
    """What the parent tells the child on its command line."""

    path: str
    sha256: str | None
    max_bytes: int
    memory_bytes: int
    threads: int
    niceness: int
    parent: int

    def to_json(self) -> str:
        """One argument of a command line."""
        return json.dumps(asdict(self))


def main(argument: str) -> int:
    """Serve until standard input ends; 0 if it did so between two batches, 1 after an error was sent."""
    orders = Orders(**json.loads(argument))
    _confine(orders)
    # What a library prints to standard output must not land between two answers.
    to_parent = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    from_parent = sys.stdin.buffer
    try:
        model = Model(_load(orders), orders.threads)
        _send(to_parent, {"input_shape": model.input_shape, "dimensions": model.dimensions})
        while head := from_parent.read(BATCH.size):
            n, h, w, c = BATCH.unpack(head)
            images_NHWC = np.frombuffer(read_exactly(from_parent, n * h * w * c), np.uint8).reshape(n, h, w, c)
            features_ND = model.run(images_NHWC)
            _send(to_parent, {"shape": features_ND.shape}, features_ND.astype("<f4").tobytes())
    except Refused as refusal:
        _send(to_parent, {"error": refusal.message, "details": refusal.details})
        return 1
    except Exception as error:  # the outermost frame: whatever onnxruntime raises is the model's doing
        _send(to_parent, {"error": _explain(error, orders), "details": {"memory_bytes": orders.memory_bytes}})
        return 1
    return 0


def read_exactly(stream: IO[bytes], count: int) -> bytes:
    """`count` bytes of a pipe.

    Raises:
        EOFError: the other end closed it before.
    """
    data = stream.read(count)
    if len(data) != count:
        raise EOFError
    return data


def _confine(orders: Orders) -> None:
    """The process is limited and bound to its parent's life; nothing of the model has been read yet."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != orders.parent:  # it died before the line above
        sys.exit(1)
    # Draws come first on a machine whose cores are all busy. A worker's own niceness is there already.
    os.nice(max(0, orders.niceness - os.nice(0)))
    resource.setrlimit(resource.RLIMIT_AS, (orders.memory_bytes, orders.memory_bytes))
    resource.setrlimit(resource.RLIMIT_FSIZE, (_STDERR_BYTES, _STDERR_BYTES))
    resource.setrlimit(resource.RLIMIT_NOFILE, (_OPEN_FILES, _OPEN_FILES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _load(orders: Orders) -> bytes:
    size = Path(orders.path).stat().st_size
    if size > orders.max_bytes:
        raise Refused(
            f"it has {size:,} bytes, the limit is {orders.max_bytes:,}", bytes=size, max_bytes=orders.max_bytes
        )
    data = Path(orders.path).read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    if orders.sha256 is not None and digest != orders.sha256:
        raise Refused(f"its file has SHA-256 {digest}, not {orders.sha256}; upload it again", sha256=digest)
    return data


def _send(to_parent: IO[bytes], answer: dict[str, Any], payload: bytes = b"") -> None:
    text = json.dumps(answer).encode()
    to_parent.write(LENGTH.pack(len(text)) + text + payload)
    to_parent.flush()


def _explain(error: Exception, orders: Orders) -> str:
    words = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip() or type(error).__name__
    if isinstance(error, MemoryError) or re.search(r"bad_alloc|allocat", words, re.IGNORECASE):
        return f"it ran out of memory, of which it may use {orders.memory_bytes:,} bytes ({words[:300]})"
    return f"onnxruntime says: {words[:600]}"


class Model:
    """A checked ONNX model. `input_shape` is (N, C, H, W), None for what is free; `dimensions` is D."""

    def __init__(self, data: bytes, threads: int) -> None:
        check_is_plain(data)
        # Imported here: only this process needs it, and it takes longer to import than everything else together.
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4
        # The arena doubles what it holds whenever it is short, and would meet the memory limit at half of it.
        options.enable_cpu_mem_arena = False
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # Without it, bytes that merely look like onnxruntime's own format are taken for it, past the check above.
        options.add_session_config_entry("session.load_model_format", "ONNX")
        self._session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        self._input, self.input_shape = self._checked_input()
        self.dimensions = self._try_out()

    def run(self, images_NHWC: UInt8Array) -> FloatArray:
        """The output for any number of images, [N, D].

        Raises:
            Refused: the images do not suit the model, or its output is not what it must be.
        """
        _, channels, height, width = self.input_shape
        n, h, w, c = images_NHWC.shape
        if channels is not None and channels != c and (c, channels) != (1, 3):
            raise Refused(
                f"it takes {channels} channel(s), the images have {c}; export one that takes {c}",
                channels=channels,
                images=c,
            )
        c, h_in, w_in = channels or c, height or h, width or w
        step = max(1, _BATCH_VALUES // (c * h_in * w_in))
        parts = []
        for start in range(0, n, step):
            pixels_NCHW = images_NHWC[start : start + step].transpose(0, 3, 1, 2).astype(np.float32)
            pixels_NCHW /= 255
            resized = resize(pixels_NCHW, h_in, w_in)
            parts.append(self._features(np.ascontiguousarray(np.broadcast_to(resized, (len(resized), c, h_in, w_in)))))
        return np.concatenate(parts)

    def _features(self, pixels_NCHW: FloatArray) -> FloatArray:
        (features_ND,) = self._session.run(None, {self._input: pixels_NCHW})
        n = len(pixels_NCHW)
        if not isinstance(features_ND, np.ndarray) or features_ND.ndim != 2 or len(features_ND) != n:
            got = list(np.shape(features_ND))
            raise Refused(f"for input {list(pixels_NCHW.shape)} it gives {got}; it must give [{n}, D]")
        bad = n - int(np.isfinite(features_ND).all(axis=1).sum())
        if bad:
            raise Refused(f"its output has NaN or infinity for {bad} of {n} images", images=n, bad=bad)
        return features_ND

    def _checked_input(self) -> tuple[str, tuple[int | None, int | None, int | None, int | None]]:
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        if len(inputs) != 1 or len(outputs) != 1:
            counts = f"{len(inputs)} inputs and {len(outputs)} outputs"
            raise Refused(f"it has {counts}; it must have one input [N, C, H, W] and one output [N, D]")
        for what, value in (("input", inputs[0]), ("output", outputs[0])):
            if value.type != "tensor(float)":
                raise Refused(f"its {what} is {value.type}; it must be tensor(float), which is float32")
        shape = [side if isinstance(side, int) else None for side in inputs[0].shape]
        if len(shape) != 4:
            raise Refused(f"its input has {len(shape)} dimensions, {inputs[0].shape}; it must have 4, [N, C, H, W]")
        n, c, h, w = shape
        if n is not None:
            raise Refused(f"its input takes exactly {n} image(s); export it with a dynamic first axis")
        if c not in (None, 1, 3):
            raise Refused(f"its input has {c} channels, {inputs[0].shape}; it must have 1 or 3, as [N, C, H, W]")
        if any(side is not None and side < 1 for side in (h, w)) or (c or 3) * (h or 1) * (w or 1) > MAX_INPUT_VALUES:
            raise Refused(f"its input is {inputs[0].shape}; one image must have 1 to {MAX_INPUT_VALUES:,} values")
        return inputs[0].name, (n, c, h, w)

    def _try_out(self) -> int:
        """D, found by running two images of noise: some exporters fix the batch at one without declaring it."""
        _, c, h, w = self.input_shape
        sides = _FREE_SIDES if h is None or w is None else (0,)
        noise = np.random.Generator(np.random.Philox(key=0))
        for side in sides:
            try:
                pixels = noise.random((2, c or 3, h or side, w or side), dtype=np.float32)
                dimensions = int(self._features(pixels).shape[1])
                break
            except Refused:
                raise
            except Exception:  # too small for its pooling, it may be; the last size's error is the one to report
                if side == sides[-1]:
                    raise
        if not MIN_DIMENSIONS <= dimensions <= MAX_DIMENSIONS:
            raise Refused(
                f"it embeds in {dimensions} dimensions; selection needs {MIN_DIMENSIONS} to {MAX_DIMENSIONS:,}",
                dimensions=dimensions,
            )
        return dimensions


def resize(pixels_NCHW: FloatArray, height: int, width: int) -> FloatArray:
    """Bilinear; when shrinking, the filter widens so that every input pixel counts."""
    _, _, h, w = pixels_NCHW.shape
    if w != width:
        pixels_NCHW = pixels_NCHW @ _weights(w, width).T
    if h != height:
        pixels_NCHW = _weights(h, height) @ pixels_NCHW
    return pixels_NCHW


def _weights(f: int, b: int) -> FloatArray:
    """The [B, F] matrix that resamples F values to B; rows sum to one."""
    scale = f / b
    centres_B = (np.arange(b) + 0.5) * scale - 0.5
    distances_BF = np.abs(np.arange(f)[None, :] - centres_B[:, None]) / max(scale, 1.0)
    weights_BF: npt.NDArray[np.float64] = np.maximum(0.0, 1.0 - distances_BF)
    weights_BF /= weights_BF.sum(axis=1, keepdims=True)
    return weights_BF.astype(np.float32)


# Which fields of which message hold messages worth looking into (onnx.proto3).
_PARTS: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {},
}
_NODE_INPUT, _NODE_OPERATOR, _NODE_DOMAIN = 1, 4, 7
_FUNCTION_NAME, _FUNCTION_DOMAIN = 1, 10
_TENSOR_EXTERNAL, _TENSOR_LOCATION = 13, 14

Operator = tuple[str, str]
"""Domain and name; the standard domain is empty."""


@dataclass
class _Found:
    """What a model says of itself."""

    used: set[Operator] = field(default_factory=set)
    own: set[Operator] = field(default_factory=set)
    has_random_dropout: bool = False


def check_is_plain(data: bytes) -> None:
    """The bytes are a protobuf message of standard, reproducible operators, whose tensors are all inside it.

    Raises:
        Refused: they are not.
    """
    found = _Found()
    try:
        _walk(memoryview(data), "model", found, 0)
    except (IndexError, UnicodeDecodeError) as error:
        raise Refused(f"its {len(data):,} bytes are not an ONNX model") from error
    for domain, name in sorted(found.own):
        if domain in _STANDARD_DOMAINS or domain.startswith(_TAKEN_DOMAINS):
            raise Refused(f"it defines operator {name} in domain {domain!r}, which is not its own; use another domain")
    for domain, name in sorted(found.used - found.own):
        if domain not in _STANDARD_DOMAINS:
            raise Refused(f"it uses operator {name} of domain {domain!r}; only standard ONNX operators run here")
        if name in _RANDOM_OPERATORS:
            raise Refused(f"it uses operator {name}, which is random; an image must always have the same features")
    if found.has_random_dropout:
        raise Refused("it uses operator Dropout with a training mode, which is random; export it in evaluation mode")


def _walk(data: memoryview, kind: str, found: _Found, depth: int) -> None:
    if depth > _MAX_DEPTH:
        raise Refused(f"it nests deeper than {_MAX_DEPTH} levels")
    texts = {"node": (_NODE_OPERATOR, _NODE_DOMAIN), "function": (_FUNCTION_NAME, _FUNCTION_DOMAIN)}.get(kind, ())
    said: dict[int, str] = {}
    inputs: list[int] = []
    for number, value in _fields(data):
        if isinstance(value, memoryview) and number in _PARTS[kind]:
            _walk(value, _PARTS[kind][number], found, depth + 1)
        elif kind == "tensor" and (number == _TENSOR_EXTERNAL or (number == _TENSOR_LOCATION and value != 0)):
            raise Refused("it keeps tensors in other files (external data); save it as one file")
        elif isinstance(value, memoryview) and number in texts:
            said[number] = bytes(value).decode()
        elif isinstance(value, memoryview) and kind == "node" and number == _NODE_INPUT:
            inputs.append(len(value))
    if texts:
        name, domain = (said.get(number, "") for number in texts)
        operator = "" if domain == "ai.onnx" else domain, name
        (found.used if kind == "node" else found.own).add(operator)
        # Ratio and training mode came together; an input without a name is none.
        found.has_random_dropout |= kind == "node" and operator == ("", "Dropout") and any(inputs[2:3])


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """The fields of one protobuf message; IndexError where the bytes are not one.

    Numbers of fixed size are passed over: no field that matters here is one, and what a parser takes for an unknown
    field must not be taken for a text.
    """
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        # Some parsers cut a longer key down to 32 bits, and read another field than this one.
        if not 0 < key >> 3 < 2**29 or wire not in (0, 1, 2, 5):
            raise IndexError
        if wire == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        size, at = _varint(data, at) if wire == 2 else ({1: 8, 5: 4}[wire], at)
        if at + size > len(data):
            raise IndexError
        if wire == 2:
            yield number, data[at : at + size]
        at += size


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise IndexError


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
