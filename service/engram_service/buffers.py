"""The rules of buffers and tasks, and the SQL behind them: create, list, read, delete, manifest.

Every function takes the session of a transaction that its caller opened. What makes a new generation (a commit, another
budget, a deleted task) is in `commit`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Select, Text, cast, func, or_, select, true
from sqlalchemy import delete as delete_from
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import InstrumentedAttribute, Session

from engram import etags, shares
from engram.errors import Conflict, NotFound
from engram.fields import Schema
from engram.schemas import Buffer, BufferCreate, ClassSummary, Decision, Manifest, PackEntry, QualityState, Task

from . import audit
from .acting import principal
from .tables import BufferRow, PackRow, TaskRow

MANY = 500
"""Buffers in one answer beyond which all rows are read: a statement has room for so many names only."""

Expected = frozenset[str]
"""States of a buffer that a change is meant for: entity tags without quotes, or numbers of generations alone."""


def create(session: Session, wanted: BufferCreate) -> Buffer:
    """A new, empty buffer at generation 0.

    Raises:
        Forbidden: whoever asks may not make a buffer of this name.
        Conflict: there is one of that name.
        InvalidRequest: it declares fields that there cannot be.
    """
    principal().need("admin", wanted.name)
    fields = Schema.declare(wanted.fields).declared
    check_free(session, wanted.name)
    state: QualityState = "provisional" if wanted.quality is None else "fixed"
    row = BufferRow(
        **wanted.model_dump() | {"fields": fields},
        quality_is=state,
        generation=0,
        oldest_generation=0,
        created_at=time.time(),
    )
    add_row(session, row)
    audit.record(session, "buffer.create", buffer=row.name, after=wanted.model_dump(mode="json", exclude={"name"}))
    return describe(session, row)


def add_row(session: Session, row: BufferRow) -> BufferRow:
    """The row of a new buffer is there, for this transaction to commit.

    Raises:
        Conflict: another transaction has made one of that name meanwhile. (On SQLite they come one after the other.)
    """
    session.add(row)
    try:
        session.flush()
    except IntegrityError as error:
        raise _taken(row.name) from error
    return row


def check_free(session: Session, name: str) -> None:
    """Returns if no buffer has this name.

    Raises:
        Conflict: there is one of that name.
    """
    if session.get(BufferRow, name) is not None:
        raise _taken(name)


def _taken(name: str) -> Conflict:
    return Conflict(f"there is a buffer {name!r} already; delete it first or choose another name")


def check_thawed(row: BufferRow) -> None:
    """Returns if the buffer takes changes.

    Raises:
        Conflict: it is frozen.
    """
    if row.is_frozen:
        raise Conflict(
            f"buffer {row.name!r} is frozen at generation {row.generation}; fork it and change the fork, or delete it",
            buffer=row.name,
        )


def read_all(session: Session) -> list[Buffer]:
    """Every buffer that whoever asks may see, by name."""
    rows = session.scalars(select(BufferRow).where(reached(BufferRow.name)).order_by(BufferRow.name)).all()
    return _described(session, rows)


def reached(name: InstrumentedAttribute[Any]) -> ColumnElement[bool]:
    """The condition under which a row is of a buffer that whoever asks may see."""
    prefix = principal().prefix
    # Exact in every database, as LIKE is not: that of SQLite takes capitals for small letters.
    return func.substr(name, 1, len(prefix)) == prefix if prefix else true()


def read(session: Session, name: str) -> Buffer:
    """One buffer as it stands.

    Raises:
        NotFound: there is no such buffer.
    """
    return describe(session, find(session, name))


def delete(session: Session, name: str, *, expected: Expected | None = None) -> None:
    """The buffer is gone with everything in it; its packs leave the disk when the collector runs.

    Raises:
        Forbidden: whoever asks may not delete it.
        NotFound: there is no such buffer.
        Conflict: it is not as `expected`.
    """
    principal().need("admin", name)
    row = session.get(BufferRow, name, with_for_update=True)
    if row is None:
        raise _unknown(name)
    check_expected(row, expected)
    packs, tasks = live_packs(session, name), classes_by_task(session, name)
    # By its name and not as a row that was read: another transaction may be deleting it at this moment.
    gone = session.execute(delete_from(BufferRow).where(BufferRow.name == name).returning(BufferRow.name))
    if gone.first() is None:
        raise _unknown(name)
    before = {
        "generation": row.generation,
        "budget_bytes": row.budget_bytes,
        "exemplars": sum(pack.exemplars for pack in packs),
        "used_bytes": sum(pack.bytes for pack in packs),
        "tasks": len(tasks),
    }
    audit.record(session, "buffer.delete", buffer=name, before=before)


def created_at(row: BufferRow) -> datetime:
    """When the buffer was made, to the microsecond: it tells it from others of its name."""
    return datetime.fromtimestamp(row.created_at, UTC)


def tag(row: BufferRow) -> str:
    """The entity tag of the buffer as it stands, without quotes."""
    return etags.of(row.generation, created_at(row))


def check_expected(row: BufferRow, expected: Expected | None) -> None:
    """Returns if the buffer is in one of these states, None being any.

    Raises:
        Conflict: it is in another.
    """
    if expected is not None and expected.isdisjoint({str(row.generation), tag(row)}):
        wanted = " or ".join(sorted(expected))
        raise Conflict(
            f"buffer {row.name!r} is at generation {row.generation}, the request expects {wanted}; its ETag is now "
            f'"{tag(row)}": read it again and decide anew',
            generation=row.generation,
        )


def find(session: Session, name: str) -> BufferRow:
    """The row of a buffer.

    Raises:
        NotFound: there is no such buffer.
    """
    row = session.get(BufferRow, name)
    if row is None:
        raise _unknown(name)
    return row


def _unknown(name: str) -> NotFound:
    return NotFound(f"there is no buffer {name!r}; create it, or list those that there are", buffer=name)


def live_packs(session: Session, name: str, generation: int | None = None) -> Sequence[PackRow]:
    """The packs of a generation (None: the current one) in ascending order of task."""
    return session.scalars(_live(select(PackRow), name, generation)).all()


def manifest(session: Session, name: str, generation: int | None = None) -> Manifest:
    """The exact content of a generation, None being the current one. Limit and class names are as they are now.

    Raises:
        NotFound: there is no such buffer, or the generation is yet to come or collected already.
    """
    row = find(session, name)
    wanted = row.generation if generation is None else generation
    check_generation(row, wanted)
    packs = live_packs(session, name, wanted)
    return Manifest(
        buffer=name,
        generation=wanted,
        created_at=created_at(row),
        used_bytes=sum(pack.bytes for pack in packs),
        limit_bytes=_limit_bytes(row, classes_by_task(session, name)),
        image_shape=image_shape(row),
        fields=row.fields,
        class_names=class_names(row),
        packs=[entry(pack) for pack in packs],
    )


def check_generation(row: BufferRow, wanted: int) -> None:
    """Returns if this generation of the buffer can be answered.

    Raises:
        NotFound: it is yet to come or collected already.
    """
    if not row.oldest_generation <= wanted <= row.generation:
        state = "is yet to come" if wanted > row.generation else "has been collected"
        raise NotFound(
            f"generation {wanted} of buffer {row.name!r} {state}; the current one is {row.generation}",
            buffer=row.name,
            generation=wanted,
            current_generation=row.generation,
            oldest_generation=row.oldest_generation,
        )


class DrawnFrom(NamedTuple):
    """A pack as a draw needs to know it: cheap to read by the thousand."""

    digest: str
    task: int
    exemplars: int
    quality: int
    bytes: int
    runs: list[list[int]]
    class_bytes: Sequence[int] = ()


def packs_to_draw_from(session: Session, name: str, generation: int) -> list[DrawnFrom]:
    """The packs of a generation in the order of its manifest."""
    columns = (PackRow.digest, PackRow.task, PackRow.exemplars, PackRow.quality, PackRow.bytes)
    # Runs as text, to be read at once: a thousand packs take 4 ms and not 20.
    texts = cast(PackRow.runs, Text), cast(PackRow.class_bytes, Text)
    query: Select[Any] = select(*columns, *texts)  # type: ignore[assignment]  # its Any is one column
    rows = session.execute(_live(query, name, generation)).all()
    read = json.loads(f"[{','.join(f'[{runs},{sizes}]' for *_, runs, sizes in rows)}]")
    return [DrawnFrom(*row[:-2], *texts) for row, texts in zip(rows, read, strict=True)]


class GenerationHeld(NamedTuple):
    """A generation that can still be drawn from. `replaced_at` (seconds since the epoch) is None of the current one,
    and of one that another without a new pack came after."""

    generation: int
    exemplars: int
    bytes: int
    replaced_at: float | None


def generations(session: Session, name: str, *, limit: int = 20) -> list[GenerationHeld]:
    """The generations of a buffer that still answer, the newest first.

    Raises:
        NotFound: there is no such buffer.
    """
    row = find(session, name)
    oldest = max(row.oldest_generation, row.generation - limit + 1)
    columns = PackRow.since, PackRow.until, PackRow.exemplars, PackRow.bytes, PackRow.retired_at
    alive = or_(PackRow.until.is_(None), PackRow.until > oldest)
    packs = session.execute(select(*columns).where(PackRow.buffer == name, alive)).all()
    found = []
    for number in range(row.generation, oldest - 1, -1):
        held = [each for each in packs if each.since <= number and (each.until is None or each.until > number)]
        ended = [each.retired_at for each in held if each.until == number + 1 and each.retired_at is not None]
        found.append(
            GenerationHeld(
                number, sum(each.exemplars for each in held), sum(each.bytes for each in held), min(ended, default=None)
            )
        )
    return found


def named_packs(session: Session, digests: Sequence[str]) -> set[str]:
    """Those of these packs that some generation still names."""
    return set(session.scalars(select(PackRow.digest).where(PackRow.digest.in_(digests))))


def task(session: Session, name: str, number: int) -> Task:
    """One task as it is stored.

    Raises:
        NotFound: there is no such buffer or it has no such task.
    """
    row = find(session, name)
    found = session.get(TaskRow, (name, number))
    if found is None:
        known = session.scalars(select(TaskRow.task).where(TaskRow.buffer == name).order_by(TaskRow.task)).all()
        raise NotFound(f"buffer {name!r} has no task {number}; it has {_listed(known)}", buffer=name, task=number)
    granted = shares.leaves(
        row.budget_bytes, per=row.per, share_by=row.share_by, classes_by_task=classes_by_task(session, name)
    )
    own = [pack for pack in live_packs(session, name) if pack.task == number]
    return _task(row, found, own, granted)


def tasks(session: Session, name: str) -> list[Task]:
    """Every task of a buffer as it is stored, in order.

    Raises:
        NotFound: there is no such buffer.
    """
    row = find(session, name)
    found = session.scalars(select(TaskRow).where(TaskRow.buffer == name).order_by(TaskRow.task)).all()
    classes = {each.task: sorted(map(int, each.seen)) for each in found}
    granted = shares.leaves(row.budget_bytes, per=row.per, share_by=row.share_by, classes_by_task=classes)
    packs: dict[int, list[PackRow]] = {}
    for pack in live_packs(session, name):
        packs.setdefault(pack.task, []).append(pack)
    return [_task(row, each, packs.get(each.task, []), granted) for each in found]


def bytes_by_task(session: Session) -> dict[str, dict[int, int]]:
    """What the tasks of every buffer that whoever asks may see take of its budget."""
    wanted = select(PackRow.buffer, PackRow.task, PackRow.bytes).order_by(PackRow.buffer, PackRow.task)
    found: dict[str, dict[int, int]] = {}
    for buffer, task, size in session.execute(wanted.where(PackRow.until.is_(None), reached(PackRow.buffer))):
        of_buffer = found.setdefault(buffer, {})
        of_buffer[task] = of_buffer.get(task, 0) + size
    return found


def _task(row: BufferRow, found: TaskRow, own: Sequence[PackRow], granted: dict[shares.Leaf, int]) -> Task:
    stored = {c: (count, size) for pack in own for (c, count), size in zip(pack.runs, pack.class_bytes, strict=True)}
    names, number = class_names(row), found.task
    return Task(
        buffer=row.name,
        task=number,
        quality=row.quality,
        bytes=sum(pack.bytes for pack in own),
        exemplars=sum(pack.exemplars for pack in own),
        classes=[
            ClassSummary(
                class_id=class_id,
                name=names.get(class_id),
                seen=seen,
                exemplars=stored.get(class_id, (0, 0))[0],
                bytes=stored.get(class_id, (0, 0))[1],
                share_bytes=granted.get((number, class_id), 0),
            )
            for class_id, seen in sorted((int(key), value) for key, value in found.seen.items())
        ],
        decision=None if found.decision is None else Decision.model_validate(found.decision),
    )


def entry(pack: PackRow) -> PackEntry:
    """A pack as a manifest lists it."""
    return PackEntry(
        digest=pack.digest,
        task=pack.task,
        bytes=pack.bytes,
        exemplars=pack.exemplars,
        quality=pack.quality,
        runs=[(class_id, count) for class_id, count in pack.runs],
    )


def image_shape(row: BufferRow) -> tuple[int, int, int] | None:
    """(H, W, C) of every image of the buffer, None before its first commit."""
    if row.height is None or row.width is None or row.channels is None:
        return None
    return row.height, row.width, row.channels


def schema(session: Session, name: str) -> Schema:
    """The fields that every exemplar of the buffer has.

    Raises:
        NotFound: there is no such buffer.
    """
    return Schema.declare(find(session, name).fields)


def class_names(row: BufferRow) -> dict[int, str]:
    """The names of the buffer's classes, by id."""
    return {int(class_id): name for class_id, name in row.class_names.items()}


def classes_by_task(session: Session, name: str) -> dict[int, list[int]]:
    """The classes of each task that hold a share: all that were ever uploaded, also those of which nothing fits."""
    tasks = session.execute(select(TaskRow.task, TaskRow.seen).where(TaskRow.buffer == name).order_by(TaskRow.task))
    return {number: sorted(int(class_id) for class_id in seen) for number, seen in tasks}


def pack_of(session: Session, name: str, digest: str) -> PackEntry:
    """A pack of any generation of the buffer that still answers.

    Raises:
        NotFound: there is no such buffer or it has no such pack.
    """
    find(session, name)
    found = session.scalars(select(PackRow).where(PackRow.buffer == name, PackRow.digest == digest)).first()
    if found is None:
        raise NotFound(f"buffer {name!r} has no pack {digest!r}", buffer=name, digest=digest)
    return entry(found)


def exemplars_of_pack(session: Session, digest: str) -> int:
    """How many exemplars a pack of any buffer holds that whoever asks may see.

    Raises:
        NotFound: no generation of such a buffer that still answers has such a pack.
    """
    named = select(PackRow.exemplars).where(PackRow.digest == digest, reached(PackRow.buffer))
    found = session.scalar(named.limit(1))
    if found is None:
        raise NotFound(f"there is no pack {digest}", digest=digest)
    return found


def _live(query: Select[Any], name: str, generation: int | None) -> Select[Any]:
    query = query.where(PackRow.buffer == name).order_by(PackRow.task, PackRow.id)
    if generation is None:
        return query.where(PackRow.until.is_(None))
    alive = or_(PackRow.until.is_(None), PackRow.until > generation)
    return query.where(PackRow.since <= generation, alive)


def _limit_bytes(row: BufferRow, classes: dict[int, list[int]]) -> int:
    """The total that the packs' bytes obey."""
    distinct = {class_id for held in classes.values() for class_id in held}
    return shares.limit(row.budget_bytes, per=row.per, classes=len(distinct))


def describe(session: Session, row: BufferRow) -> Buffer:
    """A buffer as it stands."""
    return _described(session, [row])[0]


def _described(session: Session, rows: Sequence[BufferRow]) -> list[Buffer]:
    """These buffers as they stand, in two queries however many they are."""
    wanted = None if len(rows) > MANY else [row.name for row in rows]
    tasks = select(TaskRow.buffer, TaskRow.task, cast(TaskRow.seen, Text)).order_by(TaskRow.buffer, TaskRow.task)
    packs = select(PackRow.buffer, PackRow.bytes, PackRow.exemplars, cast(PackRow.runs, Text))
    packs = packs.where(PackRow.until.is_(None))
    if wanted is not None:
        tasks, packs = tasks.where(TaskRow.buffer.in_(wanted)), packs.where(PackRow.buffer.in_(wanted))
    # Texts are read at once, as in `packs_to_draw_from`.
    of_tasks, of_packs = session.execute(tasks).all(), session.execute(packs).all()
    seen: dict[str, dict[int, list[int]]] = {}
    for (buffer, task, _), found in zip(of_tasks, _read(row[-1] for row in of_tasks), strict=True):
        seen.setdefault(buffer, {})[task] = sorted(map(int, found))
    held: dict[str, list[tuple[int, int, list[list[int]]]]] = {}
    for (buffer, size, exemplars, _), runs in zip(of_packs, _read(row[-1] for row in of_packs), strict=True):
        held.setdefault(buffer, []).append((size, exemplars, runs))
    return [_model(row, seen.get(row.name, {}), held.get(row.name, [])) for row in rows]


def _read(texts: Iterable[str]) -> list[Any]:
    """These JSON texts as values."""
    found: list[Any] = json.loads(f"[{','.join(texts)}]")
    return found


def _model(row: BufferRow, classes: dict[int, list[int]], packs: list[tuple[int, int, list[list[int]]]]) -> Buffer:
    is_source_known = row.forked_from is not None and principal().reaches(row.forked_from)
    return Buffer(
        name=row.name,
        budget_bytes=row.budget_bytes,
        limit_bytes=_limit_bytes(row, classes),
        per=row.per,
        share_by=row.share_by,
        subsampling=row.subsampling,
        quality=row.quality,
        quality_is=row.quality_is,
        generation=row.generation,
        used_bytes=sum(size for size, _, _ in packs),
        exemplars=sum(exemplars for _, exemplars, _ in packs),
        tasks=list(classes),
        classes=sorted({class_id for _, _, runs in packs for class_id, count in runs if count}),
        image_shape=image_shape(row),
        fields=row.fields,
        class_names=class_names(row),
        is_frozen=row.is_frozen,
        forked_from=row.forked_from if is_source_known else None,
        forked_generation=row.forked_generation,
        created_at=created_at(row),
    )


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers)) if numbers else "none"
