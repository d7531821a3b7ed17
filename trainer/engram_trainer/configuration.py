"""The configuration of a run, written beside its results; resuming requires the same one.

`RunConfig` nests the stream (see `stream`), the memory and the method's options (see `methods`). Sizes are bytes.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from engram.schemas import Definition, Per, Ranking, Rule, ShareBy, Subsampling
from engram_trainer.stream import StreamConfig

MemoryKind = Literal["service", "raw", "files", "strips", "none"]
MEMORY_KINDS: tuple[MemoryKind, ...] = get_args(MemoryKind)


@dataclass(frozen=True)
class MemoryConfig:
    """Where exemplars are kept, and how."""

    kind: MemoryKind = "service"
    """`service` is an Engram service; the others live in the trainer (see `local_memory`), `none` keeps nothing."""
    budget_bytes: int = 40_000
    per: Per = "buffer"
    """Whether `budget_bytes` is the total or what each class gets."""
    share_by: ShareBy = "class"
    """What is given equal shares: classes (LUCIR) or tasks (GEM)."""
    quality: int | None = None
    """JPEG quality; None lets selection choose. Files need a number; raw pixels have none."""
    subsampling: Subsampling = "4:2:0"
    ranking: Ranking = "herding"
    """Which images are kept; raw pixels and files know `herding` and `random`."""
    definition: Definition = "raw"
    rule: Rule = "any"
    epsilon: float = 0.3
    block: int | None = None
    """Exemplars whose volume is compared at once; None takes what suits the embedding."""
    url: str | None = None
    """The service; None reads ENGRAM_URL, else http://127.0.0.1:8077. The token is read from ENGRAM_TOKEN."""
    buffer: str | None = None
    """The buffer's name; None makes one of the run's own."""

    def __post_init__(self) -> None:
        if self.kind not in MEMORY_KINDS:
            raise ValueError(f"memory kind {self.kind!r} is not one of {', '.join(MEMORY_KINDS)}")
        if self.kind == "files" and self.quality is None:
            raise ValueError("memory kind 'files' needs a quality from 1 to 100; only that of strips can be chosen")
        if self.quality is not None and not 1 <= self.quality <= 100:
            raise ValueError(f"quality must lie in 1..100, got {self.quality}")
        if self.budget_bytes < 1:
            raise ValueError(f"the budget must be at least 1 byte, got {self.budget_bytes}")
        if self.kind in ("raw", "files") and self.ranking not in ("herding", "random"):
            raise ValueError(f"memory kind {self.kind!r} ranks by herding or random, not by {self.ranking!r}")


@dataclass(frozen=True)
class RunConfig:
    """A run: data, stream, method, memory, seed, device."""

    data: str = "sample"
    """See `datasets.load`."""
    resize: int | None = None
    stream: StreamConfig = field(default_factory=StreamConfig)
    method: str = "lucir"
    options: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the method's `Config`; the rest have its defaults."""
    network: str = "conv"
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    seed: int = 0
    """Draws initial weights, batches, augmentation and what a ranking leaves to chance; the stream has its own."""
    device: str = "cpu"

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return plain


def differences(before: Mapping[str, Any], now: Mapping[str, Any], *, at: str = "") -> list[str]:
    """What differs between two configurations as JSON, as `stream.tasks: 5 before, 10 now`."""
    found = []
    for key in sorted({*before, *now}):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, at=f"{at}{key}.")
        elif old != new:
            found.append(f"{at}{key}: {old} before, {new} now")
    return found
