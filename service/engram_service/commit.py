"""Where generations are made: the only code that changes which packs a buffer has.

Every change (an upload, another budget, other names, a deleted task) goes the same way:

1. read the buffer at generation g as a content of `engram.memory`, whose packs are read when they are asked for;
2. let `engram.memory` make the new content, at whatever cost;
3. write the packs of the tasks that changed, durably;
4. in one transaction: compare the buffer's generation with g and set it to g + 1, end the replaced pack rows, add the
   new ones, update the tasks, mark the ingest committed. If the generation moved meanwhile, start again at 1.

On a full disk a change that frees room may go in several steps, a generation each: some tasks at a time, as far as the
new packs find room beside the old ones, which are removed before the next step.

A crash before 4 leaves files that no row names (see `collect`); after 4 everything is done. So at every generation
`used_bytes`, the sum of the sizes of the live packs, is at most the buffer's limit, and an ingest commits once.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from typing import Any

from sqlalchemy import delete, select, text, update
from sqlalchemy.orm import Session
from sqlalchemy.sql.elements import ColumnElement

from engram import memory, pack
from engram.content import Content, Means, Policy, Task
from engram.errors import NotFound, StorageFull, Unavailable
from engram.fields import Schema
from engram.memory import Where
from engram.schemas import Buffer, BufferChange, Decision, ForkCreate
from engram.strip import Exemplars

from . import audit, samples, tallies
from .acting import principal
from .buffers import (
    Expected,
    add_row,
    check_expected,
    check_free,
    check_thawed,
    class_names,
    describe,
    entry,
    find,
    image_shape,
    live_packs,
    tag,
)
from .database import Database
from .ingest import Claim, LeaseLost, holds
from .samples import Resample, SampleFolder
from .settings import SAMPLES
from .storage import PackStore
from .tables import BufferRow, IngestRow, PackRow, TaskRow

logger = logging.getLogger(__name__)

# Losing ten races in a row means ten other commits to the same buffer succeeded meanwhile.
MAX_RACES = 10

# What a pack takes on the disk beside its bytes: the rest of its last block, its index, a row.
FILE_BYTES = 2**14

# Key of the PostgreSQL advisory lock that commits and collectors take; SQLite has one writer anyway.
COMMIT_LOCK = 0x656E6772616D01


Emergency = Callable[[], AbstractContextManager[Callable[[], object]]]
"""See `room.Room.emergency`."""


@dataclass(frozen=True)
class Deed:
    """What the audit calls a change, and says of it beside what every change has: generation, budget, exemplars, bytes.

    See `audit.record`.
    """

    action: str
    subject: str = ""
    after: Mapping[str, Any] = field(default_factory=dict)


class _Raced(Exception):
    """Another commit made the generation that this one was computed for, or a file of this one was collected."""


def commit(
    database: Database,
    store: PackStore,
    buffer: str,
    change: Callable[[Content], Content],
    *,
    deed: Deed | None = None,
    ingest: Claim | None = None,
    expected: Expected | None = None,
    emergency: Emergency | None = None,
    resample: Resample | None = None,
) -> int:
    """The buffer's content is what `change` makes of it; returns the new generation.

    Args:
        change: called again if another commit came first; what it raises leaves everything as it was.
        deed: what the change is called; None is what an ingest does.
        ingest: ends as committed in the same transaction.
        expected: the state of the buffer that `change` is meant for.
        emergency: what to do if the disk is full and `change` frees room. The change may then take several generations.
        resample: what becomes of the originals that are kept for maps; without it they stay as they are.

    Raises:
        NotFound: no such buffer.
        Conflict: the buffer is frozen, or not as `expected`.
        LeaseLost: the ingest was cancelled, deleted or claimed by another worker; nothing changed.
        StorageFull: the disk is full; nothing changed, or in an emergency only some of the tasks.
        Unavailable: lost too many races; nothing changed.
    """
    if deed is None:
        deed = Deed("ingest.commit", ingest.id, {"task": ingest.task}) if ingest else Deed("buffer.change")
    try:
        return _commit(database, store, buffer, change, deed, ingest, expected, resample)
    except StorageFull:
        if emergency is None:
            raise
    with emergency() as collect:
        while True:
            collect()
            step = _Step(change, _free_bytes(store))
            generation = _commit(database, store, buffer, step, deed, None, expected, resample)
            if step.is_last:
                collect()
                return generation
            expected = frozenset({str(generation)})


def _commit(
    database: Database,
    store: PackStore,
    buffer: str,
    change: Callable[[Content], Content],
    deed: Deed,
    ingest: Claim | None,
    expected: Expected | None,
    resample: Resample | None,
) -> int:
    originals = SampleFolder(store.folder.parent / SAMPLES)
    for _ in range(MAX_RACES):
        with database.reading() as session:
            row = find(session, buffer)
            before = read_content(session, store, row)
            held = {} if resample is None else samples.OfBuffer(session, originals, buffer)
        check_thawed(row)
        check_expected(row, expected)
        after = change(before)
        packs = _put_changed(store, row.name, before, after)
        changed = {} if resample is None else resample(before, after, held)
        kept = {task: originals.put(sample) for task, sample in changed.items()}
        try:
            return _write(database, store, originals, row, before, after, packs, deed, ingest, kept)
        except _Raced:
            continue
    raise _overtaken(buffer)


class _Step:
    """As much of a change as the disk has room for: some of its tasks, or all that it does."""

    def __init__(self, change: Callable[[Content], Content], free_bytes: int) -> None:
        self.is_last = False
        self._change, self._free_bytes = change, free_bytes

    def __call__(self, before: Content) -> Content:
        after = self._change(before)
        changed = [number for number, task in after.tasks.items() if task is not before.tasks.get(number)]
        changed.sort(key=lambda number: after.tasks[number].pack_bytes)
        needed = accumulate(after.tasks[number].pack_bytes + FILE_BYTES for number in changed)
        # The other half is for rows, and for what others write meanwhile.
        fitting = [number for number, size in zip(changed, needed, strict=True) if size < self._free_bytes // 2]
        # All exemplars of a buffer have one quality, so a change of quality is one step.
        self.is_last = after.quality != before.quality or len(fitting) in (0, len(changed))
        if self.is_last:
            return after
        return replace(before, tasks={**before.tasks, **{number: after.tasks[number] for number in fitting}})


def change(
    database: Database,
    store: PackStore,
    buffer: str,
    wanted: BufferChange,
    *,
    expected: Expected | None = None,
    emergency: Emergency | None = None,
) -> int:
    """The buffer has this budget and its classes these names; returns the new generation.

    Raises:
        Forbidden: whoever asks may not change budgets.
        NotFound: no such buffer.
        Conflict: a name belongs to another class; or as `commit`.
        StorageFull, Unavailable: as `commit`.
    """

    if wanted.budget_bytes is not None:
        principal().need("admin", buffer)

    def make(content: Content) -> Content:
        if wanted.class_names:
            content = memory.rename(content, wanted.class_names)
        return content if wanted.budget_bytes is None else memory.reshare(content, budget_bytes=wanted.budget_bytes)

    names = {str(class_id): name for class_id, name in wanted.class_names.items()}
    deed = Deed("buffer.change", after={"class_names": names} if names else {})
    return commit(database, store, buffer, make, deed=deed, expected=expected, emergency=emergency)


def reshare(
    database: Database,
    store: PackStore,
    buffer: str,
    *,
    budget_bytes: int | None = None,
    without_task: int | None = None,
    expected: Expected | None = None,
    emergency: Emergency | None = None,
) -> int:
    """The buffer has this budget and no longer has this task; returns the new generation. See `memory.reshare`.

    Raises:
        Forbidden: whoever asks may not change budgets.
        NotFound: no such buffer or task.
        Conflict, StorageFull, Unavailable: as `commit`.
    """
    if budget_bytes is not None:
        principal().need("admin", buffer)
    make = partial(memory.reshare, budget_bytes=budget_bytes, without_task=without_task)
    deed = Deed("buffer.change") if without_task is None else Deed("task.delete", f"task {without_task}")
    return commit(database, store, buffer, make, deed=deed, expected=expected, emergency=emergency)


def fork(database: Database, store: PackStore, source: str, wanted: ForkCreate) -> Buffer:
    """The new buffer: the content of the source under a budget of its own, in the source's packs where nothing went.

    It counts generations on from the one that it was made of. Uploads to the source may go on meanwhile.

    Raises:
        Forbidden: whoever asks may not make a buffer of this name.
        NotFound: no such buffer.
        Conflict: the name is taken, or the source is not at `wanted.generation`.
        StorageFull, Unavailable: as `commit`.
    """
    principal().need("admin", wanted.name)
    for _ in range(MAX_RACES):
        with database.reading() as session:
            row = find(session, source)
            check_free(session, wanted.name)
            before = read_content(session, store, row)
        check_expected(row, None if wanted.generation is None else frozenset({str(wanted.generation)}))
        after = before if wanted.budget_bytes is None else memory.reshare(before, budget_bytes=wanted.budget_bytes)
        packs = _put_changed(store, wanted.name, before, after)
        try:
            return _write_fork(database, store, row, wanted, before, after, packs)
        except _Raced:
            continue
    raise _overtaken(source)


def _free_bytes(store: PackStore) -> int:
    disk = os.statvfs(store.folder)
    return disk.f_bavail * disk.f_frsize


def _overtaken(buffer: str) -> Unavailable:
    return Unavailable(
        f"{MAX_RACES} other changes of buffer {buffer!r} came first, one after the other; try again", retry_after_s=1
    )


def remove(
    database: Database,
    store: PackStore,
    buffer: str,
    where: Where,
    *,
    expected: Expected | None = None,
    emergency: Emergency | None = None,
) -> int:
    """The buffer has these exemplars no longer; returns the new generation. See `memory.remove`.

    Raises:
        NotFound: no such buffer, or nothing that `where` names.
        Conflict, StorageFull, Unavailable: as `commit`.
    """
    deed = Deed("exemplars.remove", str(where))
    asked: dict[str, Any] = {"deed": deed, "expected": expected, "emergency": emergency}
    resample = partial(samples.without, where=where)
    try:
        return commit(database, store, buffer, partial(memory.remove, where=where), resample=resample, **asked)
    except NotFound as error:
        # What found no room may still be among the originals.
        resample = partial(resample, otherwise=error)
        return commit(database, store, buffer, lambda content: content, resample=resample, **asked)


def relabel(
    database: Database,
    store: PackStore,
    buffer: str,
    where: Where,
    class_id: int,
    *,
    expected: Expected | None = None,
) -> int:
    """These exemplars of the buffer are of this class; returns the new generation. See `memory.relabel`.

    Raises:
        NotFound: no such buffer, or nothing that `where` names.
        Conflict, StorageFull, Unavailable: as `commit`.
    """
    change = partial(memory.relabel, where=where, class_id=class_id)
    resample = partial(samples.relabelled, where=where, class_id=class_id)
    deed = Deed("exemplars.relabel", str(where), {"class_id": class_id})
    return commit(database, store, buffer, change, deed=deed, expected=expected, resample=resample)


def place_of(session: Session, buffer: str, digest: str, row: int) -> tuple[Where, Expected]:
    """A row of a pack as the place that it has in its class, and the state of the buffer in which it has it.

    Raises:
        NotFound: the current generation of the buffer has no such pack, or the pack no such row.
    """
    found = find(session, buffer)
    for live in live_packs(session, buffer):
        if live.digest == digest and row < live.exemplars:
            rank = row
            for class_id, count in live.runs:
                if rank < count:
                    return Where(task=live.task, class_id=class_id, rank=rank), frozenset({tag(found)})
                rank -= count
    raise NotFound(
        f"generation {found.generation} of buffer {buffer!r} has no row {row} in a pack {digest!r}; list its exemplars",
        buffer=buffer,
        digest=digest,
        row=row,
    )


def exclusive(session: Session) -> None:
    """Until the transaction ends no other one names packs or removes their files."""
    if session.get_bind().dialect.name == "postgresql":
        session.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": COMMIT_LOCK})


def read_content(session: Session, store: PackStore, buffer: BufferRow) -> Content:
    """The buffer as it stands; packs are read from the store when a task's exemplars are asked for."""
    packs = {row.task: row for row in live_packs(session, buffer.name)}
    rows = session.scalars(select(TaskRow).where(TaskRow.buffer == buffer.name).order_by(TaskRow.task))
    return Content(
        Policy(
            buffer.budget_bytes,
            buffer.per,
            buffer.share_by,
            buffer.subsampling,
            quality=buffer.quality if buffer.quality_is == "fixed" else None,
        ),
        tasks={row.task: _task(store, row, packs.get(row.task)) for row in rows},
        quality=buffer.quality,
        is_provisional=buffer.quality_is == "provisional",
        shape=image_shape(buffer),
        schema=Schema.declare(buffer.fields),
        class_names=class_names(buffer),
        next_class_id=buffer.next_class_id,
    )


def _task(store: PackStore, row: TaskRow, live: PackRow | None) -> Task:
    return Task(
        seen={int(class_id): count for class_id, count in row.seen.items()},
        kept={} if live is None else dict(entry(live).runs),
        pack_bytes=0 if live is None else live.bytes,
        load=lambda: None if live is None else store.load(live.digest, live.exemplars)[0],
        decision=None if row.decision is None else Decision.model_validate(row.decision),
        means=None if row.means is None else Means.from_bytes(row.means),
    )


def _put_changed(store: PackStore, buffer: str, before: Content, after: Content) -> list[PackRow]:
    """The rows, without their generation, of the packs of every task that changed; the packs are durable."""
    changed = {number: task for number, task in after.tasks.items() if task is not before.tasks.get(number)}
    loaded = ((number, task.load()) for number, task in changed.items())
    return [_put(store, buffer, number, exemplars) for number, exemplars in loaded if exemplars is not None]


def _put(store: PackStore, buffer: str, task: int, exemplars: Exemplars) -> PackRow:
    """The row, without its generation, of a pack that is durable."""
    kept = store.keep(task, exemplars)
    return PackRow(
        buffer=buffer,
        **kept.model_dump(mode="json"),
        class_bytes=pack.class_bytes(exemplars),
        until=None,
        retired_at=None,
    )


def _write(
    database: Database,
    store: PackStore,
    originals: SampleFolder,
    buffer: BufferRow,
    before: Content,
    after: Content,
    packs: list[PackRow],
    deed: Deed,
    ingest: Claim | None,
    kept: Mapping[int, str | None],
) -> int:
    """Step 4 of the module docstring, all or nothing."""
    generation, now = buffer.generation + 1, time.time()
    values = {"generation": generation, **_columns(after)}
    touched = [n for n in {*before.tasks, *after.tasks} if after.tasks.get(n) is not before.tasks.get(n)]
    with database.session() as session:
        exclusive(session)
        if _changed(session, update(BufferRow).where(*_unmoved(buffer)).values(values)) != 1:
            raise _Raced
        if not all(store.exists(new.digest) for new in packs) or not all(map(originals.exists, kept.values())):
            raise _Raced
        replaced = (PackRow.buffer == buffer.name, PackRow.until.is_(None), PackRow.task.in_(touched))
        session.execute(update(PackRow).where(*replaced).values(until=generation, retired_at=now))
        for row in packs:
            row.since = generation
            session.add(row)
        gone = [number for number in touched if number not in after.tasks]
        session.execute(delete(TaskRow).where(TaskRow.buffer == buffer.name, TaskRow.task.in_(gone)))
        # What was deleted may be uploaded again.
        uploads = (IngestRow.buffer == buffer.name, IngestRow.task.in_(gone), IngestRow.state == "committed")
        session.execute(update(IngestRow).where(*uploads).values(idempotency_key=None))
        for number in touched:
            if number in after.tasks:
                session.merge(_task_row(buffer.name, number, after.tasks[number]))
        session.flush()
        for number, sample in kept.items():
            of_task = (TaskRow.buffer == buffer.name, TaskRow.task == number)
            session.execute(update(TaskRow).where(*of_task).values(sample=sample))
        if ingest is not None:
            _end(session, ingest, generation, now)
        audit.record(
            session,
            deed.action,
            buffer=buffer.name,
            subject=deed.subject,
            before=_figures(buffer.generation, before),
            after={**_figures(generation, after), **deed.after},
        )
    return generation


def _figures(generation: int, content: Content) -> dict[str, Any]:
    """What the audit says of a content."""
    return {
        "generation": generation,
        "budget_bytes": content.policy.budget_bytes,
        "exemplars": sum(sum(task.kept.values()) for task in content.tasks.values()),
        "used_bytes": sum(task.pack_bytes for task in content.tasks.values()),
    }


def _write_fork(
    database: Database,
    store: PackStore,
    source: BufferRow,
    wanted: ForkCreate,
    before: Content,
    after: Content,
    packs: list[PackRow],
) -> Buffer:
    """The rows of a new buffer with this content, all or nothing; what did not change is in the source's packs."""
    kept = [number for number, task in after.tasks.items() if task is before.tasks[number]]
    with database.session() as session:
        exclusive(session)
        # Locked, so that no commit to the source retires the packs that are about to be named once more.
        if session.scalars(select(BufferRow.name).where(*_unmoved(source)).with_for_update()).first() is None:
            raise _Raced
        if not all(store.exists(new.digest) for new in packs):
            raise _Raced
        check_free(session, wanted.name)
        copied = {column.name: getattr(source, column.name) for column in BufferRow.__table__.columns}
        own = {
            "name": wanted.name,
            "oldest_generation": source.generation,
            "is_frozen": wanted.frozen,
            "forked_from": source.name,
            "forked_generation": source.generation,
            "created_at": time.time(),
        }
        made = add_row(session, BufferRow(**(copied | _columns(after) | own)))
        shared = [row for row in live_packs(session, source.name) if row.task in kept]
        for row in [*packs, *(_copy(row, wanted.name) for row in shared)]:
            row.since = source.generation
            session.add(row)
        originals = dict(
            session.execute(select(TaskRow.task, TaskRow.sample).where(TaskRow.buffer == source.name)).all()
        )
        for number, task in after.tasks.items():
            made_task = _task_row(wanted.name, number, task)
            made_task.sample = originals[number]
            session.add(made_task)
        session.flush()
        audit.record(
            session,
            "buffer.fork",
            buffer=wanted.name,
            after={"forked_from": source.name, **_figures(source.generation, after), "frozen": wanted.frozen},
        )
        return describe(session, made)


def _unmoved(buffer: BufferRow) -> tuple[ColumnElement[bool], ...]:
    """The conditions under which the buffer is still as it was read."""
    return (
        BufferRow.name == buffer.name,
        BufferRow.generation == buffer.generation,
        BufferRow.created_at == buffer.created_at,
    )


def _columns(content: Content) -> dict[str, Any]:
    """What the row of a buffer with this content says."""
    values: dict[str, Any] = {
        "budget_bytes": content.policy.budget_bytes,
        "class_names": {str(class_id): name for class_id, name in content.class_names.items()},
        "next_class_id": content.next_class_id,
    }
    if content.policy.quality is None:
        values |= {"quality": content.quality, "quality_is": "provisional" if content.is_provisional else "decided"}
    if content.shape is not None:
        values["height"], values["width"], values["channels"] = content.shape
    return values


def _copy(row: PackRow, buffer: str) -> PackRow:
    """The row, without its generation, by which another buffer names the same pack."""
    own = {"id", "buffer", "since", "until", "retired_at"}
    columns = {column.name: getattr(row, column.name) for column in PackRow.__table__.columns if column.name not in own}
    return PackRow(buffer=buffer, **columns)


def _task_row(buffer: str, number: int, task: Task) -> TaskRow:
    return TaskRow(
        buffer=buffer,
        task=number,
        seen={str(class_id): count for class_id, count in task.seen.items()},
        decision=None if task.decision is None else task.decision.model_dump(mode="json"),
        means=None if task.means is None else task.means.to_bytes(),
    )


def _end(session: Session, ingest: Claim, generation: int, now: float) -> None:
    """The ingest is committed, if it is still the worker's to commit."""
    committed = update(IngestRow).where(holds(ingest)).values(state="committed", generation=generation)
    committed = committed.values(images_done=IngestRow.images_total, lease_owner=None)
    if _changed(session, committed.values(updated_at=now)) != 1:
        raise LeaseLost(ingest.id)
    tallies.ingest_ended(session, ingest.id)


def _changed(session: Session, statement: Any) -> int:
    return int(session.execute(statement).rowcount)  # type: ignore[attr-defined]
