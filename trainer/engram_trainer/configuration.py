"""The configuration of a run, written beside its results; resuming requires the same one.

`RunConfig` nests the stream (see `stream`), how images are prepared, the memory, the method's options (see `methods`)
and what the run computes on. Sizes are bytes.
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
ReplayVia = Literal["mirror", "draw"]
Normalise = Literal["none", "mnist", "cifar10", "cifar100", "imagenet"]
Precision = Literal["32", "bf16"]

MEAN_AND_STD: dict[Normalise, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "none": ((0.0,), (1.0,)),
    "mnist": ((0.1307,), (0.3081,)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2615)),
    "cifar100": ((0.5071, 0.4866, 0.4409), (0.2009, 0.1984, 0.2023)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
"""Mean and standard deviation of every channel of images in 0..1.

Source: mnist as in PyTorch's examples; cifar10 as in Mammoth's `seq_cifar10.py`; cifar100 and imagenet as in LUCIR's
code. cifar100's deviations are smaller than those of the pixels (0.2673, 0.2564, 0.2762): they are the code's.
"""

MAY_CHANGE = ("memory.url", "memory.replay", "memory.patience_s", "runtime.workers", "runtime.checkpoint_s")
"""What may differ when a run is resumed: a service may have another address, and the others change no result."""


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
    replay: ReplayVia = "mirror"
    """From a local mirror of the buffer's packs, or drawn by the service batch by batch."""
    patience_s: float = 600.0
    """How long a run waits for a service that does not answer any more."""

    def __post_init__(self) -> None:
        if self.kind not in MEMORY_KINDS:
            raise ValueError(f"memory kind {self.kind!r} is not one of {', '.join(MEMORY_KINDS)}")
        if self.replay not in get_args(ReplayVia):
            raise ValueError(f"replay {self.replay!r} is not one of {', '.join(get_args(ReplayVia))}")
        if not self.patience_s >= 0:
            raise ValueError(f"patience_s must be at least 0, got {self.patience_s}")
        if self.kind == "files" and self.quality is None:
            raise ValueError("memory kind 'files' needs a quality from 1 to 100; only that of strips can be chosen")
        if self.quality is not None and not 1 <= self.quality <= 100:
            raise ValueError(f"quality must lie in 1..100, got {self.quality}")
        if self.budget_bytes < 1:
            raise ValueError(f"the budget must be at least 1 byte, got {self.budget_bytes}")
        if self.kind in ("raw", "files") and self.ranking not in ("herding", "random"):
            raise ValueError(f"memory kind {self.kind!r} ranks by herding or random, not by {self.ranking!r}")


@dataclass(frozen=True)
class PrepareConfig:
    """What happens to an image between the data set or the memory and the network, in training and in tests."""

    crop: int | None = None
    """Height and width that the network sees: the centre of a stored image, or a random part of it where the method
    crops at random; None is the whole image."""
    normalise: Normalise = "none"
    """Whose mean and deviation are taken from the pixels."""

    def __post_init__(self) -> None:
        if self.crop is not None and self.crop < 1:
            raise ValueError(f"crop must be at least 1 pixel, got {self.crop}")
        if self.normalise not in MEAN_AND_STD:
            raise ValueError(f"normalise {self.normalise!r} is not one of {', '.join(MEAN_AND_STD)}")

    @property
    def mean(self) -> tuple[float, ...]:
        """Of each channel; one value holds for all."""
        return MEAN_AND_STD[self.normalise][0]

    @property
    def std(self) -> tuple[float, ...]:
        """Of each channel; one value holds for all."""
        return MEAN_AND_STD[self.normalise][1]


@dataclass(frozen=True)
class RuntimeConfig:
    """What a run computes on."""

    device: str = "cpu"
    precision: Precision = "32"
    """`bf16` computes the network's passes in bfloat16 and keeps the weights in float32."""
    processes: int = 1
    """Each computes its part of every batch; gradients are averaged."""
    workers: int = 0
    """Processes that read and decode images, of each training process; 0 reads in the training process itself."""
    checkpoint_s: float = 60.0
    """A phase that takes longer is checkpointed between two of its epochs, when so many seconds have gone by."""

    def __post_init__(self) -> None:
        if self.precision not in get_args(Precision):
            raise ValueError(f"precision {self.precision!r} is not one of {', '.join(get_args(Precision))}")
        if self.processes < 1:
            raise ValueError(f"a run needs at least 1 process, got {self.processes}")
        if self.workers < 0:
            raise ValueError(f"workers must be 0 or more, got {self.workers}")


@dataclass(frozen=True)
class RunConfig:
    """A run: data, stream, method, memory, seed, runtime."""

    recipe: str | None = None
    """The published experiment that this configuration is of: see `recipes`."""
    data: str = "sample"
    """See `datasets.load`."""
    resize: int | None = None
    """Size of the images as they are read, and as the memory stores them."""
    prepare: PrepareConfig = field(default_factory=PrepareConfig)
    stream: StreamConfig = field(default_factory=StreamConfig)
    method: str = "lucir"
    options: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the method's `Config`; the rest have its defaults."""
    network: str = "conv"
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    seed: int = 0
    """Draws initial weights, batches, augmentation and what a ranking leaves to chance; the stream has its own."""
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return plain


def differences(before: Mapping[str, Any], now: Mapping[str, Any], *, at: str = "") -> list[str]:
    """What differs between two configurations as JSON, `MAY_CHANGE` aside, as `stream.tasks: 5 before, 10 now`."""
    found = []
    for key in sorted({*before, *now}):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, at=f"{at}{key}.")
        elif old != new and f"{at}{key}" not in MAY_CHANGE:
            found.append(f"{at}{key}: {old} before, {new} now")
    return found
