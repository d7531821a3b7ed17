"""Extractors at work: ONNX models brought by trainers, each run in a child process.

An extractor is a file from the network, so it never runs in the service's own process: `OnnxEmbedder` starts a child
(`extractor_child`, where the demands on a model and the protocol of the pipes are written) and asks it batch by batch.
The child is killed by this process when one answer takes too long, and by the kernel when this process dies.

Letters: N images, H height, W width, C channels, D dimensions.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import struct
import subprocess
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np

from engram.errors import BadExtractor
from engram.selection.embedding import EXTRACTOR_BLOCK, FloatArray, UInt8Array, slices, unit_rows

from . import children
from .extractor_child import BATCH, LENGTH, Orders, read_exactly

Answer = TypeVar("Answer")

_CHUNK_VALUES = 2**22
_CHUNK_IMAGES = 128
_MAX_ANSWER_BYTES = 2**16


@dataclass(frozen=True)
class ExtractorLimits:
    """What one extractor may use."""

    memory_bytes: int = 4 * 2**30
    """Address space of its process; Python and onnxruntime themselves take some 0.6 GiB of it."""

    batch_s: float = 120.0
    """How long it may take to load, and for one batch of at most 128 images."""

    threads: int = 1
    """How many threads onnxruntime computes with."""

    max_bytes: int = 512 * 2**20
    """Size of the file."""

    niceness: int = 10
    """How far its process stands back, at least."""


@dataclass(frozen=True)
class ExtractorInfo:
    """What a model that passed `inspect` is; None in the shape is a size that is free."""

    input_shape: tuple[int | None, int | None, int | None, int | None]
    dimensions: int


class OnnxEmbedder:
    """An ONNX model in a child process. Enter it to start the process; leaving ends it.

    Enter it on a thread that outlives the `with` block: the kernel ends the child with the thread that started it.
    """

    block = EXTRACTOR_BLOCK

    def __init__(self, path: Path, sha256: str, limits: ExtractorLimits | None = None) -> None:
        self.name = sha256
        self._child = _Child(path, sha256, limits or ExtractorLimits())

    def __enter__(self) -> OnnxEmbedder:
        """The model is loaded and has answered a dummy batch.

        Raises:
            BadExtractor: it cannot serve; the message says why.
        """
        self._child.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._child.stop()

    @property
    def info(self) -> ExtractorInfo:
        """Input shape and dimensions of the model that runs."""
        return self._child.info

    def embed(self, images_NHWC: UInt8Array) -> FloatArray:
        """One row per image, unit L2 norm.

        Raises:
            BadExtractor: the model failed on these images, or took more time or memory than it may.
        """
        features_ND = np.empty((len(images_NHWC), self.info.dimensions), np.float32)
        shape = images_NHWC.shape[1], images_NHWC.shape[2], images_NHWC.shape[3]
        for rows in slices(len(images_NHWC), shape, _CHUNK_VALUES, _CHUNK_IMAGES):
            features_ND[rows] = self._child.ask(images_NHWC[rows])
        return unit_rows(features_ND)


def inspect(path: Path, limits: ExtractorLimits | None = None) -> ExtractorInfo:
    """What the model takes and gives, found by running it on a dummy batch in a child process.

    Raises:
        BadExtractor: it cannot serve; the message says why.
    """
    child = _Child(path, None, limits or ExtractorLimits())
    try:
        child.start()
        return child.info
    finally:
        child.stop()


class _Child:
    """The parent's end of the pipes. One caller at a time."""

    def __init__(self, path: Path, sha256: str | None, limits: ExtractorLimits) -> None:
        self._path = path
        self._sha256 = sha256
        self._limits = limits
        self._process: subprocess.Popen[bytes] | None = None
        self._stderr: IO[bytes] | None = None
        self._is_late = False
        self._info: ExtractorInfo | None = None

    @property
    def info(self) -> ExtractorInfo:
        if self._info is None:
            raise ValueError("the extractor is not running; use it in a `with` block")
        return self._info

    def start(self) -> None:
        limits = self._limits
        orders = Orders(
            str(self._path.absolute()),
            self._sha256,
            limits.max_bytes,
            limits.memory_bytes,
            limits.threads,
            limits.niceness,
            os.getpid(),
        )
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed by stop()
        self._process = subprocess.Popen(
            children.command("engram_service.extractor_child", orders.to_json()),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            cwd="/",
            # Nothing else of the environment: tokens and database passwords are none of a model's business.
            env=children.search_path() | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
        )
        try:
            answer = self._within("loading and a dummy batch", self._answer)
        except BaseException:
            self.stop()
            raise
        n, c, h, w = answer["input_shape"]
        self._info = ExtractorInfo((n, c, h, w), int(answer["dimensions"]))

    def ask(self, images_NHWC: UInt8Array) -> FloatArray:
        def exchange() -> FloatArray:
            to_child, from_child = self._pipes()
            to_child.write(BATCH.pack(*images_NHWC.shape))
            to_child.write(np.ascontiguousarray(images_NHWC).data)
            to_child.flush()
            expected = [len(images_NHWC), self.info.dimensions]
            if self._answer()["shape"] != expected:
                raise EOFError
            return np.frombuffer(read_exactly(from_child, 4 * expected[0] * expected[1]), "<f4").reshape(expected)

        return self._within(f"a batch of {len(images_NHWC)} images", exchange)

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            for pipe in self._pipes():
                with contextlib.suppress(BrokenPipeError):  # the rest of a batch that nobody reads any more
                    pipe.close()
            self._process.wait()
            self._process = None
        if self._stderr is not None:
            self._stderr.close()
            self._stderr = None
        self._info = None

    def _pipes(self) -> tuple[IO[bytes], IO[bytes]]:
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            raise ValueError("the extractor is not running; use it in a `with` block")
        return process.stdin, process.stdout

    def _answer(self) -> dict[str, Any]:
        from_child = self._pipes()[1]
        (length,) = LENGTH.unpack(read_exactly(from_child, LENGTH.size))
        if length > _MAX_ANSWER_BYTES:
            raise EOFError
        answer: dict[str, Any] = json.loads(read_exactly(from_child, length))
        if "error" in answer:
            raise BadExtractor(f"the extractor cannot serve: {answer['error']}", **answer["details"])
        return answer

    def _within(self, what: str, exchange: Callable[[], Answer]) -> Answer:
        """What `exchange` returns, unless the child dies or takes longer than it may."""
        timer = threading.Timer(self._limits.batch_s, self._expire)
        timer.daemon = True
        timer.start()
        try:
            return exchange()
        except (EOFError, BrokenPipeError, json.JSONDecodeError, struct.error) as error:
            raise self._death(what) from error
        finally:
            timer.cancel()

    def _expire(self) -> None:
        self._is_late = True
        if self._process is not None:
            self._process.kill()

    def _death(self, what: str) -> BadExtractor:
        limits = self._limits
        if self._is_late:
            message = (
                f"the extractor took more than {limits.batch_s:g} s for {what} and was stopped; use a smaller model"
            )
            return BadExtractor(message, limit_s=limits.batch_s)
        status, words = None, ""
        if self._process is not None and self._stderr is not None:
            self._process.kill()
            status = self._process.wait()
            self._stderr.seek(0)
            words = self._stderr.read(4096).decode(errors="replace").strip()
        how = (
            f"was ended by {signal.Signals(-status).name}" if status is not None and status < 0 else f"exited {status}"
        )
        message = f"the extractor's process {how} during {what}; it may use {limits.memory_bytes:,} bytes of memory" + (
            f". Its last words: {words.splitlines()[-1][:300]}" if words else ""
        )
        return BadExtractor(message, memory_bytes=limits.memory_bytes)
