"""Content for tests: pictures that compress like photographs, and contents and buffers filled without a worker."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from engram import memory
from engram.content import Content
from engram.schemas import BufferCreate, IngestOptions, Ranking
from engram.selection.embedding import BuiltinEmbedder, Embedder
from engram.selection.images import ArrayImages
from engram_service import buffers, ingest
from engram_service.commit import commit, read_content
from engram_service.database import Database
from engram_service.settings import Settings
from engram_service.storage import PackStore
from tests.uploads import queue

UInt8Array = npt.NDArray[np.uint8]

Filling = Callable[[Database, Settings], Any]
"""What fills an empty data folder, for the fixtures `once` and `hold`."""


def pictures(seed: int, count: int, shape: tuple[int, int, int] = (16, 16, 3)) -> UInt8Array:
    """Smooth random images [N, H, W, C]: their coded sizes differ, and no two look alike."""
    height, width, channels = shape
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (count, 4, 4, channels))
    grown = coarse.repeat(-(-height // 4), axis=1).repeat(-(-width // 4), axis=2)[:, :height, :width]
    images: UInt8Array = np.clip(grown + generator.integers(-16, 16, grown.shape), 0, 255).astype(np.uint8)
    return images


def put(
    content: Content,
    images: UInt8Array,
    class_ids: npt.ArrayLike = 0,
    *,
    task: int = 0,
    embedder: Embedder | None = None,
    **options: Any,
) -> Content:
    """The content with one more upload; where there are fewer class ids than images they take turns."""
    arrays = ArrayImages(images, np.resize(np.asarray(class_ids, np.int64), len(images)))
    upload = memory.Upload(task, arrays, IngestOptions(**options))
    return memory.add(content, upload, embedder or BuiltinEmbedder(arrays.shape))


def create(database: Database, name: str = "b", *, budget_bytes: int = 10**6, quality: int | None = 50) -> None:
    """An empty buffer."""
    with database.session() as session:
        buffers.create(session, BufferCreate(name=name, budget_bytes=budget_bytes, quality=quality))


def claim(database: Database, settings: Settings, task: int, *, name: str = "b") -> ingest.Claim:
    """An ingest that a worker holds; its body is of no interest."""
    queue(database, settings, b"a tar", buffer=name, task=task)
    held = ingest.claim(database, settings, owner="test")
    assert held is not None
    return held


def adding(task: int, images: UInt8Array, class_ids: npt.ArrayLike, *, ranking: Ranking = "ring") -> partial[Content]:
    """The change of a content that a worker makes of these images."""
    sent = ArrayImages(images, np.asarray(class_ids, np.int64))
    upload = memory.Upload(task, sent, IngestOptions(ranking=ranking))
    return partial(memory.add, upload=upload, embedder=BuiltinEmbedder(sent.shape))


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
    """Commit `counts[c]` pictures of each class c to a task; returns the pixels of what it stores then, row by row."""
    store = PackStore(settings.packs_dir)
    class_ids = np.repeat(sorted(counts), [counts[class_id] for class_id in sorted(counts)])
    change = adding(task, pictures(task if seed is None else seed, len(class_ids), shape), class_ids)
    commit(database, store, name, change, ingest=claim(database, settings, task, name=name))
    with database.reading() as session:
        stored = read_content(session, store, buffers.find(session, name)).tasks[task].load()
    assert stored is not None
    return stored.decode()
