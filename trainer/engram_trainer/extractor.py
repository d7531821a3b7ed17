"""Export a learner's feature extractor to ONNX, for the service to embed images with.

The model takes float32 `[N, C, H, W]` in 0..1, C as in the data and N free, and returns float32 `[N, D]`. Weights are
inside the bytes: the service refuses external data.
"""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterator

import torch
from torch import nn

OPSET = 18


def to_onnx(extractor: nn.Module, shape: tuple[int, int, int]) -> bytes:
    """The ONNX bytes of a feature extractor; the extractor itself, its mode and its device stay as they are.

    Args:
        extractor: float32 `[N, C, H, W]` to `[N, D]`.
        shape: height, width and channels of the images.
    """
    height, width, channels = shape
    # A copy: export runs in evaluation mode, on the CPU.
    model = copy.deepcopy(extractor).to("cpu", memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload]
    buffer = io.BytesIO()
    with _quiet():
        torch.onnx.export(
            model,
            (torch.zeros(2, channels, height, width),),
            buffer,  # type: ignore[arg-type]  # the older exporter writes to a file object too
            input_names=["images_NCHW"],
            output_names=["features_ND"],
            dynamic_axes={"images_NCHW": {0: "N"}, "features_ND": {0: "N"}},
            opset_version=OPSET,
            # The older exporter: 0.05 s against 3 s, and no dependency on onnxscript.
            dynamo=False,
        )
    return buffer.getvalue()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter, which announces its own deprecation."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
