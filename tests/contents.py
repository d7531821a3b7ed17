"""This file is content for tests: pictures that compress like photographs, and buffers filled without a worker."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from engram import strip
from engram.memory import Content, Task
from engram.schemas import BufferCreate
from engram_service import buffers
from engram_service.commit import commit
from engram_service.database import Database
from engram_service.settings import Settings
from engram_service.storage import PackStore

UInt8Array = npt.NDArray[np.uint8]


def pictures(seed: int, count: int, shape: tuple[int, int, int] = (16, 16, 3)) -> UInt8Array:
    """Smooth random images [N, H, W, C]: their coded sizes differ, and no two look alike."""
    height, width, channels = shape
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (count, 4, 4, channels))
    grown = coarse.repeat(-(-height // 4), axis=1).repeat(-(-width // 4), axis=2)[:, :height, :width]
    images: UInt8Array = np.clip(grown + generator.integers(-16, 16, grown.shape), 0, 255).astype(np.uint8)
    return images


def create(database: Database, name: str = "b", *, budget_bytes: int = 10**6) -> None:
    """An empty buffer."""
    with database.session() as session:
        buffers.create(session, BufferCreate(name=name, budget_bytes=budget_bytes))


def fill(
    database: Database,
    settings: Settings,
    task: int,
    counts: Mapping[int, int],
    *,
    name: str = "b",
    seed: int | None = None,
    shape: tuple[int, int, int] = (16, 16, 3),
) -> UInt8Array:
    """Commit `counts[c]` pictures of each class c to a task, as a worker would; returns the pixels they decode to."""
    class_ids = np.repeat(sorted(counts), [counts[class_id] for class_id in sorted(counts)])
    exemplars = strip.encode(pictures(task if seed is None else seed, len(class_ids), shape), class_ids, quality=50)

    def grow(content: Content) -> Content:
        held = Task(counts, {}, 0, lambda: None).holding(exemplars)
        return replace(content, tasks={**content.tasks, task: held}, quality=50, shape=shape)

    commit(database, PackStore(settings.packs_dir), name, grow)
    return exemplars.decode()
