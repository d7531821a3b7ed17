"""The memories that are compared at equal bytes, by name, and how each is made.

    raw                   pixels, and a class id of 2 bytes each
    lossless              the smallest lossless archive of each class: see `lossless`
    files, selected       one JPEG file each, its tables optimised, at the quality that selection chooses
    files, Q              the same at one fixed quality
    webp, jpeg2000        one lossy file each: see `lossy`
    strips, Q             Engram's packs at one fixed quality
    strips, selected      Engram's packs at the quality that selection chooses for the buffer
    none, joint           nothing is kept; training from scratch on all images so far: floor and ceiling

Every byte of a memory counts: tables, markers, class ids and checksums.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lossless import LosslessMemory
from lossy import CODECS, LossyMemory

from engram.content import Policy
from engram.schemas import IngestOptions, Per
from engram.selection.images import ArrayImages
from engram_service.embedder import OnnxEmbedder
from engram_trainer.local_memory import LocalConfig, StripMemory
from engram_trainer.memory import Learned, Memory, NoMemory
from engram_trainer.plain_memory import PlainMemory


@dataclass(frozen=True)
class Arm:
    """One kind of memory; `quality` None is the one that selection chooses, or has no meaning."""

    kind: str
    quality: int | None = None

    @property
    def name(self) -> str:
        """As tables call it."""
        if self.selects:
            return f"{self.kind}, selected"
        return self.kind if self.quality is None else f"{self.kind}, {self.quality}"

    @property
    def has_memory(self) -> bool:
        """Whether the budget means anything to it."""
        return self.kind not in ("none", "joint")

    @property
    def tuned_as(self) -> str:
        """The kind whose learning rate it has."""
        return "files" if self.kind in CODECS else self.kind

    @property
    def selects(self) -> bool:
        """Whether its quality is selected for each task."""
        return self.kind in ("strips", "files") and self.quality is None


RAW, LOSSLESS, FILES, SELECTED = Arm("raw"), Arm("lossless"), Arm("files"), Arm("strips")
FIXED = tuple(Arm("strips", quality) for quality in (25, 50, 75))
# What is selected comes first: most often it is the run of a fixed quality as well.
PRIMARY = (SELECTED, RAW, LOSSLESS, FILES, *FIXED)
NONE, JOINTLY = Arm("none"), Arm("joint")
FILES_50, STRIPS_50 = Arm("files", 50), Arm("strips", 50)


class SelectedStrips(StripMemory):
    """Strips as a service makes them, extractor process and all, in this process."""

    def add(self, learned: Learned) -> None:
        """Keep what a service would keep."""
        model = learned.extractor
        assert model is not None
        with tempfile.NamedTemporaryFile(suffix=".onnx") as file:
            file.write(model)
            file.flush()
            with OnnxEmbedder(Path(file.name), hashlib.sha256(model).hexdigest()) as embedder:
                images = ArrayImages(learned.examples.read(), learned.examples.class_ids)
                self.put(learned.task, images, embedder, seed=learned.seed)


class SelectedFiles(PlainMemory):
    """One JPEG file for each exemplar, at the quality that selection chooses for strips in the same bytes."""

    def __init__(self, config: LocalConfig, strips: SelectedStrips) -> None:
        super().__init__(config)
        self.strips = strips

    def add(self, learned: Learned) -> None:
        """Choose the quality, then keep as many files as fit."""
        self.strips.add(learned)
        self.config = replace(self.config, quality=self.strips.quality)
        super().add(learned)


# A learner shows images through the codec beside a memory that `is_lossy`: here it does so beside every memory, so that
# the arms differ in what is kept and in nothing else.


class Pixels(PlainMemory):
    """Raw pixels."""

    is_lossy = True


class Archives(LosslessMemory):
    """Lossless archives."""

    is_lossy = True


class Nothing(NoMemory):
    """No memory."""

    is_lossy = True


def memory_of(arm: Arm, budget: int, per: Per, selection: Mapping[str, Any]) -> Memory:
    """The memory of an arm, empty."""
    config = LocalConfig(kind="raw", budget_bytes=budget, per=per, quality=arm.quality)
    if not arm.has_memory:
        return Nothing()
    if arm.kind == "raw":
        return Pixels(config)
    if arm.kind == "lossless":
        return Archives(config)
    strips = SelectedStrips(Policy(budget, per, quality=arm.quality), IngestOptions(**selection))
    if arm.kind == "strips":
        return strips
    files = replace(config, kind="files")
    for codec in CODECS:
        if arm.kind == codec:
            return LossyMemory(files, codec)
    return SelectedFiles(files, strips) if arm.selects else PlainMemory(files)
