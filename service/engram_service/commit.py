"""This file is where generations are made: the only code that changes which packs a buffer has.

Every change (a selected upload, another budget, a deleted task) goes the same way:

1. read the buffer at generation g: its tasks with their classes, its live packs; 2. compute the share of every
class of every task (`engram.shares.leaves`) as it will be afterwards; 3. write new packs, durably: the upload's,
merged with what its task already holds, and every pack of another task that exceeds its shares, cut back to a
prefix per class. No exemplar is decoded or encoded; 4. in one transaction: compare the buffer's generation with g
and set it to g + 1, end the replaced pack rows, add the new ones, update the task, mark the ingest committed. If
the generation moved meanwhile, start again at 1.

A crash before 4 leaves files that no row names (see `collect`); after 4 everything is done. So at every generation
`used_bytes`, the sum of the sizes of the live packs, is at most the buffer's limit, and an ingest commits once.

Merging keeps the ranking of both sides. The upload's exemplars and the task's are two samples, each in rank order,
of streams of `seen` images. An exemplar of rank r gets the key (r + u) / seen, u uniform in [0, 1), which is where
it would lie if the whole stream were ranked from 0 to 1; sorting by key merges the samples, and what no longer fits
is cut off the end. For `ring` the new exemplars come first, so that the oldest are dropped.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from sqlalchemy import delete, select, text, update
from sqlalchemy.orm import Session

from engram import huffman, pack, shares, strip
from engram.errors import BudgetExceeded, Conflict, NotFound, Unavailable
from engram.schemas import Decision, Ranking
from engram.strip import Exemplars

from .database import Database
from .ingest import Claim, LeaseLost, holds
from .storage import PackStore
from .tables import BufferRow, IngestRow, PackRow, TaskRow

logger = logging.getLogger(__name__)

IntArray = npt.NDArray[np.int64]

# Losing ten races in a row means ten other commits to the same buffer succeeded meanwhile.
MAX_RACES = 10

# Key of the PostgreSQL advisory lock that commits and collectors take; SQLite has one writer anyway.
COMMIT_LOCK = 0x656E6772616D01


class _Raced(Exception):
    """Another commit made the generation that this one was computed for, or a pack of this one was collected."""


@dataclass(frozen=True)
class Content:
    """A buffer at one generation."""

    buffer: BufferRow
    tasks: dict[int, TaskRow]
    packs: dict[int, PackRow]

    def classes(self) -> dict[int, list[int]]:
        """The classes each task has ever seen, stored or not: all of them hold shares."""
        return {task: sorted(map(int, row.seen)) for task, row in self.tasks.items()}

    @property
    def limit_bytes(self) -> int:
        """What the live packs together may take; the shares sum to it."""
        distinct = {class_id for held in self.classes().values() for class_id in held}
        return shares.limit(self.buffer.budget_bytes, per=self.buffer.per, classes=len(distinct))

    @property
    def image_shape(self) -> tuple[int, int, int] | None:
        """(H, W, C) of every image, None before the first commit."""
        buffer = self.buffer
        if buffer.height is None or buffer.width is None or buffer.channels is None:
            return None
        return buffer.height, buffer.width, buffer.channels


@dataclass(frozen=True)
class Upload:
    """What an ingest brings: exemplars, classes ascending, each in rank order, out of `seen` images of each class."""

    task: int
    exemplars: Exemplars
    seen: dict[int, int]
    quality: int
    ranking: Ranking
    decision: Decision | None
    ingest: Claim


@dataclass(frozen=True)
class _NewPack:
    digest: str
    bytes: int
    exemplars: int
    quality: int
    runs: list[list[int]]
    class_bytes: list[int]


def read_content(session: Session, buffer: str) -> Content:
    """The buffer as it stands.

    Raises:
        NotFound: no such buffer.
    """
    row = session.get(BufferRow, buffer)
    if row is None:
        raise NotFound(f"no buffer {buffer!r}", buffer=buffer)
    tasks = session.scalars(select(TaskRow).where(TaskRow.buffer == buffer).order_by(TaskRow.task))
    packs = session.scalars(select(PackRow).where(PackRow.buffer == buffer, PackRow.until.is_(None)))
    return Content(row, {task.task: task for task in tasks}, {found.task: found for found in packs})


def shares_with(content: Content, task: int, class_ids: list[int]) -> dict[int, int]:
    """The share of each of these classes in the task once they are stored."""
    classes = content.classes()
    classes[task] = sorted({*classes.get(task, ()), *class_ids})
    leaves = _leaves(content.buffer, content.buffer.budget_bytes, classes)
    return {class_id: leaves[task, class_id] for class_id in class_ids}


def check_fits(content: Content, task: int, shape: tuple[int, int, int], quality: int | None) -> None:
    """Returns if images of this shape and quality can join the buffer and the task.

    Raises:
        Conflict: the buffer holds images of another shape, or the task another quality.
    """
    name, stored = content.buffer.name, content.image_shape
    if stored is not None and stored != shape:
        raise Conflict(
            f"the images are {_shape(shape)} (height x width x channels), buffer {name!r} holds {_shape(stored)}; "
            "resize them or use another buffer",
            image_shape=list(shape),
            buffer_shape=list(stored),
        )
    row = content.tasks.get(task)
    if row is not None and quality is not None and quality != row.quality:
        raise Conflict(
            f"task {task} of buffer {name!r} is stored at quality {row.quality}, this upload asks for {quality}; "
            "leave the quality out to join the task, or delete the task first",
            quality=quality,
            task_quality=row.quality,
        )


def commit(database: Database, store: PackStore, upload: Upload) -> int:
    """The upload is part of the buffer; returns the new generation.

    Raises:
        BudgetExceeded: not one exemplar of the task would fit its share; nothing changed.
        Conflict: shape or quality differ from what is stored; nothing changed.
        LeaseLost: the ingest was cancelled, deleted or claimed by another worker; nothing changed.
        NotFound: the buffer is gone.
        StorageFull: the disk is full; nothing changed.
        Unavailable: lost too many races; nothing changed.
    """
    for _ in range(MAX_RACES):
        content = _read(database, upload.ingest.buffer)
        check_fits(content, upload.task, upload.exemplars.form.shape, upload.quality)
        classes = content.classes()
        classes[upload.task] = sorted({*classes.get(upload.task, ()), *upload.seen})
        leaves = _leaves(content.buffer, content.buffer.budget_bytes, classes)
        packs = _shrunk(store, content, leaves, without=upload.task)
        packs[upload.task] = _grown(store, content, leaves, upload)
        try:
            return _write(database, store, content, packs, upload=upload)
        except _Raced:
            continue
    raise _too_busy(upload.ingest.buffer)


def reshare(
    database: Database,
    store: PackStore,
    buffer: str,
    *,
    budget_bytes: int | None = None,
    without_task: int | None = None,
    expected_generation: int | None = None,
) -> int:
    """The buffer has this budget and no longer has this task; returns the new generation.

    A smaller budget cuts the tails of every class. A larger one is filled by later uploads: what was dropped is gone.

    Raises:
        NotFound: no such buffer or task.
        Conflict: the buffer is not at `expected_generation`.
        StorageFull: the disk is full; nothing changed.
        Unavailable: lost too many races; nothing changed.
    """
    for _ in range(MAX_RACES):
        content = _read(database, buffer)
        if expected_generation is not None and content.buffer.generation != expected_generation:
            raise Conflict(
                f"buffer {buffer!r} is at generation {content.buffer.generation}, the request expects "
                f"{expected_generation}; read it again and decide anew",
                generation=content.buffer.generation,
            )
        classes = content.classes()
        if without_task is not None and classes.pop(without_task, None) is None:
            raise NotFound(f"buffer {buffer!r} has no task {without_task}", buffer=buffer, task=without_task)
        budget = content.buffer.budget_bytes if budget_bytes is None else budget_bytes
        leaves = _leaves(content.buffer, budget, classes)
        packs = _shrunk(store, content, leaves, without=without_task)
        if without_task is not None:
            packs[without_task] = None
        try:
            return _write(database, store, content, packs, budget_bytes=budget, without_task=without_task)
        except _Raced:
            continue
    raise _too_busy(buffer)


def exclusive(session: Session) -> None:
    """Until the transaction ends no other one names packs or removes their files."""
    if session.get_bind().dialect.name == "postgresql":
        session.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": COMMIT_LOCK})


def _read(database: Database, buffer: str) -> Content:
    with database.reading() as session:
        return read_content(session, buffer)


def _leaves(buffer: BufferRow, budget_bytes: int, classes: dict[int, list[int]]) -> dict[tuple[int, int], int]:
    return shares.leaves(budget_bytes, per=buffer.per, share_by=buffer.share_by, classes_by_task=classes)


def _shrunk(
    store: PackStore, content: Content, leaves: dict[tuple[int, int], int], *, without: int | None
) -> dict[int, _NewPack | None]:
    """New packs of the tasks that exceed their shares; None for a task of which nothing is left.

    A pack within the sum of its task's shares stays as it is, unread, even if one of its classes lives off another's.
    """
    packs: dict[int, _NewPack | None] = {}
    for task, row in content.packs.items():
        share = _task_shares(leaves, task)
        if task == without or row.bytes <= sum(share.values()):
            continue
        stored = _load(store, row)
        fitted = None if stored is None else pack.fit(stored, share)
        packs[task] = None if fitted is None or len(fitted) == 0 else _put(store, fitted, row.quality)
    return packs


def _grown(store: PackStore, content: Content, leaves: dict[tuple[int, int], int], upload: Upload) -> _NewPack:
    """The pack of the upload's task: its exemplars merged with those already stored, cut to the task's shares."""
    row, task = content.packs.get(upload.task), content.tasks.get(upload.task)
    share = _task_shares(leaves, upload.task)
    stored = None if row is None else _load(store, row)
    merged = upload.exemplars
    if stored is not None and task is not None:
        seen = {int(class_id): count for class_id, count in task.seen.items()}
        # Of the content alone: a run that is repeated, or resumed, keeps the same exemplars.
        key = f"{upload.ingest.body_sha256} {upload.ingest.options.seed} {sum(seen.values())}"
        merged = merge(stored, upload.exemplars, seen=(seen, upload.seen), ranking=upload.ranking, key=key)
    fitted = pack.fit(merged, share)
    if len(fitted) == 0:
        raise _budget_exceeded(upload, merged, share, content.buffer)
    return _put(store, fitted, upload.quality)


def merge(
    stored: Exemplars,
    uploaded: Exemplars,
    *,
    seen: tuple[Mapping[int, int], Mapping[int, int]],
    ranking: Ranking,
    key: str,
) -> Exemplars:
    """Both sides' exemplars under common Huffman tables, classes ascending, each class in the order to keep them in.

    Args:
        stored: what the task holds, classes ascending, in rank order within a class; `uploaded` likewise.
        uploaded: what is to join it.
        seen: how many images each class of either side was chosen from.
        ranking: `ring` puts the uploaded exemplars first; every other one interleaves by key (module docstring).
        key: seeds the draws of u.
    """
    parts = [stored, uploaded] if stored.form == uploaded.form else huffman.retable([stored, uploaded])
    both = strip.concat(parts)
    ranks = np.concatenate([_ranks(part.class_ids) for part in parts])
    side = np.repeat(np.array([0, 1]), [len(stored), len(uploaded)])
    if ranking == "ring":
        order = np.lexsort((ranks, -side, both.class_ids))
    else:
        counts = np.array([seen[s][int(c)] for s, c in zip(side, both.class_ids, strict=True)], np.float64)
        seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:16], "little")
        uniforms = np.random.Generator(np.random.Philox(key=seed)).random(len(both))
        order = np.lexsort((ranks, side, (ranks + uniforms) / counts, both.class_ids))
    return both.select(order)


def _ranks(class_ids: IntArray) -> IntArray:
    """0, 1, 2, ... within every run of equal class ids."""
    lengths = np.array([count for _, count in strip.runs_of(class_ids)], np.int64)
    return np.arange(len(class_ids)) - np.repeat(np.cumsum(lengths) - lengths, lengths)


def _load(store: PackStore, row: PackRow) -> Exemplars | None:
    """The exemplars of a pack; of a damaged one those that are intact, None if none is."""
    try:
        data = store.get(row.digest)
    except NotFound:
        logger.error("pack %s has no file; its %d exemplars are dropped", row.digest, row.exemplars)
        return None
    if pack.digest(data) == row.digest:
        return pack.parse(data)
    exemplars, rows = pack.salvage(data, row.exemplars)
    logger.error("pack %s is damaged; %d of its %d exemplars are kept", row.digest, len(rows), row.exemplars)
    return exemplars if len(rows) else None


def _put(store: PackStore, exemplars: Exemplars, quality: int) -> _NewPack:
    data = pack.to_bytes(exemplars)
    runs = strip.runs_of(exemplars.class_ids)
    first = np.cumsum([0, *(count for _, count in runs[:-1])])
    return _NewPack(
        digest=store.put(data),
        bytes=len(data),
        exemplars=len(exemplars),
        quality=quality,
        runs=[[class_id, count] for class_id, count in runs],
        class_bytes=[int(size) for size in np.add.reduceat(exemplars.sizes, first)],
    )


def _write(
    database: Database,
    store: PackStore,
    content: Content,
    packs: dict[int, _NewPack | None],
    *,
    upload: Upload | None = None,
    budget_bytes: int | None = None,
    without_task: int | None = None,
) -> int:
    """Step 4 of the module docstring, all or nothing."""
    buffer, generation, now = content.buffer, content.buffer.generation + 1, time.time()
    values: dict[str, Any] = {"generation": generation}
    if budget_bytes is not None:
        values["budget_bytes"] = budget_bytes
    if upload is not None:
        values["height"], values["width"], values["channels"] = upload.exemplars.form.shape
    with database.session() as session:
        exclusive(session)
        unmoved = (BufferRow.name == buffer.name, BufferRow.generation == buffer.generation)
        if (
            _changed(
                session, update(BufferRow).where(*unmoved, BufferRow.created_at == buffer.created_at).values(values)
            )
            != 1
        ):
            raise _Raced
        if any(new is not None and not store.exists(new.digest) for new in packs.values()):
            raise _Raced
        replaced = (PackRow.buffer == buffer.name, PackRow.until.is_(None), PackRow.task.in_(packs))
        session.execute(update(PackRow).where(*replaced).values(until=generation, retired_at=now))
        session.add_all(_pack_row(buffer.name, task, new, generation) for task, new in packs.items() if new is not None)
        if without_task is not None:
            session.execute(delete(TaskRow).where(TaskRow.buffer == buffer.name, TaskRow.task == without_task))
        if upload is not None:
            session.merge(_task_row(content, upload))
            _end(session, upload, generation, now)
    return generation


def _end(session: Session, upload: Upload, generation: int, now: float) -> None:
    """The ingest is committed, if it is still the worker's to commit."""
    images = sum(upload.seen.values())
    committed = update(IngestRow).where(holds(upload.ingest))
    committed = committed.values(state="committed", generation=generation, images_done=images, images_total=images)
    if _changed(session, committed.values(lease_owner=None, lease_expires_at=None, updated_at=now)) != 1:
        raise LeaseLost(upload.ingest.id)


def _changed(session: Session, statement: Any) -> int:
    return int(session.execute(statement).rowcount)  # type: ignore[attr-defined]


def _pack_row(buffer: str, task: int, new: _NewPack, generation: int) -> PackRow:
    return PackRow(
        buffer=buffer,
        task=task,
        digest=new.digest,
        bytes=new.bytes,
        exemplars=new.exemplars,
        quality=new.quality,
        runs=new.runs,
        class_bytes=new.class_bytes,
        since=generation,
        until=None,
        retired_at=None,
    )


def _task_row(content: Content, upload: Upload) -> TaskRow:
    """The task afterwards. Its first ingest decides; later ones only add to what it has seen."""
    before = content.tasks.get(upload.task)
    seen = Counter({str(class_id): count for class_id, count in upload.seen.items()})
    decision = None if upload.decision is None else upload.decision.model_dump(mode="json")
    return TaskRow(
        buffer=upload.ingest.buffer,
        task=upload.task,
        quality=upload.quality,
        ranking=upload.ranking,
        seen=dict(seen if before is None else seen + Counter(before.seen)),
        decision=decision if before is None else before.decision,
    )


def _task_shares(leaves: dict[tuple[int, int], int], task: int) -> dict[int, int]:
    return {class_id: share for (owner, class_id), share in leaves.items() if owner == task}


def _budget_exceeded(upload: Upload, merged: Exemplars, share: dict[int, int], buffer: BufferRow) -> BudgetExceeded:
    heads = merged.select(np.flatnonzero(_ranks(merged.class_ids) == 0))
    smallest = heads.select([int(np.argmin(heads.sizes))])
    needed_bytes, share_bytes = len(pack.to_bytes(smallest)), sum(share[int(class_id)] for class_id in heads.class_ids)
    return BudgetExceeded(
        f"the uploaded classes of task {upload.task} get {share_bytes} bytes of buffer {buffer.name!r}, and the "
        f"smallest exemplar at the head of a class needs {needed_bytes} at quality {upload.quality}; raise "
        "the budget or lower the quality",
        budget_bytes=share_bytes,
        needed_bytes=needed_bytes,
    )


def _too_busy(buffer: str) -> Unavailable:
    return Unavailable(
        f"{MAX_RACES} other changes of buffer {buffer!r} came first, one after the other; try again", retry_after_s=1
    )


def _shape(shape: tuple[int, int, int]) -> str:
    return "x".join(map(str, shape))
