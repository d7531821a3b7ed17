"""Count what draws serve: exemplars and bytes of each class of each task, by whom.

A draw only hands over which runs of its layout it took (`note`); every few thousand exemplars these are added up in
bulk, which comes to a few microseconds a draw. A thread writes the sums into table `served` every few seconds, adding
to what stands there, so that any number of services may do so; at the end of the service the rest follows. A crash
loses the last seconds. What cannot be written is kept, within bounds, and written later: no draw ever fails of it.

The bytes of an exemplar are the mean of its class in its pack. What mirrors fetch and exports send are packs and
files, not draws, and is not counted here.
"""

from __future__ import annotations

import base64
import json
import logging
import threading
import time
from binascii import Error as NotBase64
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from sqlalchemy import ColumnElement, case, func, select, tuple_
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from engram.draw import IntArray
from engram.errors import EngramError, InvalidRequest
from engram.oversight import Served as ServedModel
from engram.oversight import ServedList

from . import buffers
from .acting import principal
from .database import Database
from .replay import View
from .tables import BufferRow, ServedRow

logger = logging.getLogger(__name__)

FOLD_EXEMPLARS = 2**14
"""Added up at once: more would hold up other draws for a millisecond, fewer would cost more each."""

FOLD_DRAWS = 512
"""The same for draws of few exemplars."""

FLUSH_S = 5.0
FLUSH_SHARE = 0.02
"""The share of the time that writing may take, where there is much to write."""

FLUSH_ROWS = 500
"""Of one transaction, which holds up other writers for some milliseconds."""

MAX_ROWS = 2**17
"""Kept while they cannot be written, some 40 MB; what comes beyond is not counted."""

MAX_SUM_BYTES = 2**25
"""Of sums by run that wait to be told apart by class."""

TELL_EVERY_S = 60.0


class Key(NamedTuple):
    """What is counted apart. `created_at` tells a buffer from another that had its name."""

    buffer: str
    created_at: float
    who: str
    task: int
    class_id: int


@dataclass
class Amount:
    """How much was drawn of it, and when last."""

    exemplars: int = 0
    bytes: float = 0.0
    last_at: float = 0.0


@dataclass
class Totals:
    """What was drawn from one buffer since this process began. `bytes` are those of the answers."""

    draws: int = 0
    exemplars: int = 0
    bytes: int = 0
    damaged: int = 0


class Served:
    """What the draws of one process have served. Safe to call from any thread."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._lock = threading.Lock()
        self._noted: list[tuple[View, str, IntArray, int, int]] = []
        self._noted_exemplars = 0
        self._sums: dict[tuple[View, str], IntArray] = {}
        self._sum_bytes = 0
        self._unwritten: dict[Key, Amount] = {}
        self._totals: dict[str, Totals] = {}
        self._flush_lock = threading.Lock()
        self._told_at = float("-inf")
        self._is_stopping = threading.Event()
        self._thread = threading.Thread(target=self._keep_flushing, name="served", daemon=True)

    def note(self, view: View, runs: IntArray, answer_bytes: int, damaged: int) -> None:
        """The current principal was served exemplars of these runs of the view's layout."""
        noted = view, principal().who, runs, answer_bytes, damaged
        with self._lock:
            self._noted.append(noted)
            self._noted_exemplars += len(runs)
            if self._noted_exemplars >= FOLD_EXEMPLARS or len(self._noted) >= FOLD_DRAWS:
                self._fold()

    def totals(self) -> dict[str, Totals]:
        """What was drawn from each buffer since this process began."""
        with self._lock:
            self._fold()
            return {name: Totals(**vars(totals)) for name, totals in self._totals.items()}

    def forget_others(self, known: set[str]) -> None:
        """Totals of other buffers than these are dropped: those were deleted."""
        with self._lock:
            for name in self._totals.keys() - known:
                del self._totals[name]

    def start(self) -> None:
        """What is noted from now on is written down every few seconds."""
        self._thread.start()

    def stop(self) -> None:
        """Everything that was noted is written down, if the database takes it."""
        self._is_stopping.set()
        if self._thread.is_alive():
            self._thread.join()
        self.flush()

    def flush(self) -> None:
        """Everything that was noted is written down, or is kept for the next time; nothing is raised."""
        with self._flush_lock:
            with self._lock:
                self._fold()
                self._tell_apart()
                rows, self._unwritten = sorted(self._unwritten.items()), {}
            for at in range(0, len(rows), FLUSH_ROWS):
                try:
                    write(self._database, rows[at : at + FLUSH_ROWS])
                except Exception as error:
                    with self._lock:
                        for key, amount in rows[at:]:
                            self._add(key, amount)
                    self._tell(error)
                    return

    def _keep_flushing(self) -> None:
        pause_s = FLUSH_S
        while not self._is_stopping.wait(pause_s):
            began = time.monotonic()
            self.flush()
            pause_s = max(FLUSH_S, (time.monotonic() - began) / FLUSH_SHARE)

    def _fold(self) -> None:
        """What was noted is in the sums and in the totals."""
        together: dict[tuple[View, str], list[IntArray]] = {}
        for view, who, runs, answer_bytes, damaged in self._noted:
            totals = self._totals.get(view.buffer)
            if totals is None:
                totals = self._totals[view.buffer] = Totals()
            totals.draws += 1
            totals.exemplars += len(runs)
            totals.bytes += answer_bytes
            totals.damaged += damaged
            together.setdefault((view, who), []).append(runs)
        self._noted, self._noted_exemplars = [], 0
        for key, several in together.items():
            counts = np.bincount(np.concatenate(several), minlength=len(key[0].layout.run_counts))
            known = self._sums.get(key)
            if known is None:
                self._sums[key] = counts
                self._sum_bytes += counts.nbytes
            else:
                known += counts
        if self._sum_bytes > MAX_SUM_BYTES:
            self._tell_apart()

    def _tell_apart(self) -> None:
        """The sums are told apart by class, to be written."""
        sums, self._sums, self._sum_bytes = self._sums, {}, 0
        now = time.time()
        for (view, who), counts in sums.items():
            drawn = np.flatnonzero(counts)
            columns: list[npt.NDArray[np.int64] | npt.NDArray[np.float64]] = [
                view.layout.run_tasks[drawn],
                view.layout.run_classes[drawn],
                counts[drawn],
                counts[drawn] * view.run_bytes()[drawn],
            ]
            for task, class_id, exemplars, size in zip(*(column.tolist() for column in columns), strict=True):
                key = Key(view.buffer, view.created_at, who, task, class_id)
                self._add(key, Amount(exemplars, size, now))

    def _add(self, key: Key, amount: Amount) -> None:
        known = self._unwritten.get(key)
        if known is None:
            if len(self._unwritten) < MAX_ROWS:
                self._unwritten[key] = amount
            return
        known.exemplars += amount.exemplars
        known.bytes += amount.bytes
        known.last_at = max(known.last_at, amount.last_at)

    def _tell(self, error: Exception) -> None:
        now = time.monotonic()
        if now - self._told_at < TELL_EVERY_S:
            return
        self._told_at = now
        if isinstance(error, EngramError):
            logger.warning("what draws have served cannot be written down now: %s", error)
        else:
            logger.error("what draws have served cannot be written down; a defect of Engram", exc_info=error)


def write(database: Database, rows: Sequence[tuple[Key, Amount]]) -> None:
    """What was drawn is added to what stands in the table; that of buffers that are gone is left out.

    Raises:
        StorageFull, Unavailable: the database does not take it.
    """
    with database.session() as session:
        # Locked first and in one order, as whoever deletes a buffer does: else one would wait for the other for ever.
        names = sorted({key.buffer for key, _ in rows})
        known = select(BufferRow.name, BufferRow.created_at).where(BufferRow.name.in_(names)).order_by(BufferRow.name)
        found = session.execute(known.with_for_update(read=True, key_share=True)).all()
        made_at = dict(found)
        values = [
            {
                "buffer": key.buffer,
                "who": key.who,
                "task": key.task,
                "class_id": key.class_id,
                "exemplars": amount.exemplars,
                "bytes": round(amount.bytes),
                "last_at": amount.last_at,
            }
            for key, amount in rows
            if made_at.get(key.buffer) == key.created_at
        ]
        if not values:
            return
        insert = (sqlite.insert if database.is_sqlite else postgresql.insert)(ServedRow)
        new = insert.excluded
        insert = insert.on_conflict_do_update(
            index_elements=[ServedRow.buffer, ServedRow.who, ServedRow.task, ServedRow.class_id],
            set_={
                "exemplars": ServedRow.exemplars + new.exemplars,
                "bytes": ServedRow.bytes + new.bytes,
                "last_at": case((new.last_at > ServedRow.last_at, new.last_at), else_=ServedRow.last_at),
            },
        )
        session.connection().execute(insert, values)


def page(
    session: Session,
    *,
    buffer: str | None = None,
    who: str | None = None,
    task: int | None = None,
    limit: int,
    cursor: str | None = None,
) -> ServedList:
    """What draws have served of buffers that whoever asks may see, in order of buffer, principal, task and class.

    Args:
        session: of a transaction.
        buffer, who, task: only what was served of this buffer or task, or to this principal.
        limit: rows on the page.
        cursor: `next` of the page before.

    Raises:
        Forbidden: the buffer is none that whoever asks may see.
        NotFound: there is no such buffer.
        InvalidRequest: the cursor is none of ours.
    """
    if buffer is not None:
        principal().need("read", buffer)
        buffers.find(session, buffer)
    order = ServedRow.buffer, ServedRow.who, ServedRow.task, ServedRow.class_id
    wanted = select(ServedRow).where(buffers.reached(ServedRow.buffer)).order_by(*order).limit(limit + 1)
    for column, value in (ServedRow.buffer, buffer), (ServedRow.who, who), (ServedRow.task, task):
        if value is not None:
            wanted = wanted.where(column == value)
    if cursor is not None:
        wanted = wanted.where(tuple_(*order) > tuple_(*_after(cursor)))
    rows = session.scalars(wanted).all()
    return ServedList(
        served=[_model(row) for row in rows[:limit]],
        next=_cursor(rows[limit - 1]) if len(rows) > limit else None,
    )


class Sum(NamedTuple):
    """What was served of several classes, or to several principals, together. Of nothing `last_at` is None."""

    exemplars: int
    bytes: int
    last_at: float | None


_SUMS = func.sum(ServedRow.exemplars), func.sum(ServedRow.bytes), func.max(ServedRow.last_at)


def by_buffer(session: Session, *, limit: int) -> dict[str, Sum]:
    """What was served of each buffer that whoever asks may see, the first ones by name."""
    column = ServedRow.buffer
    wanted = select(column, *_SUMS).where(buffers.reached(column)).group_by(column).order_by(column).limit(limit)
    return {name: _sum(sums) for name, *sums in session.execute(wanted)}


def by_who(session: Session, buffer: str, *, limit: int) -> dict[str, Sum]:
    """What was served of a buffer to those who drew most."""
    wanted = select(ServedRow.who, *_SUMS).where(ServedRow.buffer == buffer).group_by(ServedRow.who)
    wanted = wanted.order_by(_SUMS[0].desc(), ServedRow.who).limit(limit)
    return {who: _sum(sums) for who, *sums in session.execute(wanted)}


def by_task(session: Session, buffer: str, *, who: str | None = None) -> dict[int, Sum]:
    """What was served of each task of a buffer, to all together or to one."""
    wanted = select(ServedRow.task, *_SUMS).where(*_of(buffer, who)).group_by(ServedRow.task).order_by(ServedRow.task)
    return {task: _sum(sums) for task, *sums in session.execute(wanted)}


def by_class(
    session: Session,
    buffer: str,
    *,
    who: str | None = None,
    task: int | None = None,
    limit: int,
    after: tuple[int, int] | None = None,
) -> dict[tuple[int, int], Sum]:
    """What was served of each (task, class) of a buffer, in their order, those after one of them; as `by_task`."""
    order = ServedRow.task, ServedRow.class_id
    wanted = select(*order, *_SUMS).where(*_of(buffer, who)).group_by(*order).order_by(*order).limit(limit)
    if task is not None:
        wanted = wanted.where(ServedRow.task == task)
    if after is not None:
        wanted = wanted.where(tuple_(*order) > tuple_(*after))
    return {(number, class_id): _sum(sums) for number, class_id, *sums in session.execute(wanted)}


def _of(buffer: str, who: str | None) -> list[ColumnElement[bool]]:
    conditions = [ServedRow.buffer == buffer]
    return conditions if who is None else [*conditions, ServedRow.who == who]


def _sum(sums: Sequence[Any]) -> Sum:
    # PostgreSQL sums 64-bit integers as decimals.
    exemplars, size, last_at = sums
    return Sum(int(exemplars), int(size), last_at)


def _model(row: ServedRow) -> ServedModel:
    return ServedModel(
        buffer=row.buffer,
        task=row.task,
        class_id=row.class_id,
        who=row.who,
        exemplars=row.exemplars,
        bytes=row.bytes,
        last_at=datetime.fromtimestamp(row.last_at, UTC),
    )


def _cursor(row: ServedRow) -> str:
    """The place of a row, as text for an address."""
    place = json.dumps([row.buffer, row.who, row.task, row.class_id]).encode()
    return base64.urlsafe_b64encode(place).decode().rstrip("=")


def _after(cursor: str) -> tuple[str, str, int, int]:
    try:
        place = json.loads(base64.urlsafe_b64decode(cursor.encode("ascii") + b"=" * (-len(cursor) % 4)))
        buffer, who, task, class_id = place
    except (ValueError, TypeError, NotBase64) as error:
        raise InvalidRequest("the cursor is not the `next` of a page of draws") from error
    is_ours = isinstance(buffer, str) and isinstance(who, str) and {type(task), type(class_id)} == {int}
    if not is_ours or "\0" in buffer + who or not all(0 <= number < 2**63 for number in (task, class_id)):
        raise InvalidRequest("the cursor is not the `next` of a page of draws")
    return buffer, who, task, class_id
