"""Receive uploads into the spool folder and queue them for a worker in the database.

    spool/ID.part     being received; its receiver holds an exclusive flock on it
    spool/ID.tar      complete and durable; waits for a worker, removed once its ingest is committed

    received -> selecting -> encoding -> committed | failed | cancelled
        ^------------------------ retry ------------|----------'

The upload of an ingest that failed or was cancelled stays for a while, so that it can be tried again without being sent
again: as the same ingest, at the end of the queue, with its failures written down. `is_kept` in the row says that the
file is there; the collector withdraws it before it removes the file.

`202` is a promise, so it is sent after the file is synced, renamed, its folder synced and the row of table
`ingests` committed. That row is the queue entry: a worker claims it by writing its name into it (a lease), and every
later write of that worker asks whether the lease is still its own. While it works it counts `beat` up. Whoever sees a
lease whose `beat` has stood still for `lease_s` takes it over, and a pause between two attempts is over for whoever has
seen it for `pause_s`: each by its own stopwatch (`Watch`), because clocks differ between machines and are set. Ingests
of one buffer are worked on in order of arrival, one at a time.

The flock lasts from the first byte to the commit of the row and dies with its process, so whoever finds a file
unlocked and without a row knows that nobody will ever ask for it (see `collect`).
"""

from __future__ import annotations

import time
from base64 import b64encode
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from secrets import token_hex
from typing import Any, get_args

from anyio.to_thread import run_sync
from sqlalchemy import and_, exists, func, or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session, aliased
from sqlalchemy.sql.elements import ColumnElement

from engram.errors import BadUpload, Conflict, EngramError, NotFound, TooLarge
from engram.schemas import Ingest, IngestOptions, IngestPage, State

from . import audit, buffers, tallies
from .acting import ACTING, SERVICE, Acting, Principal, on_behalf, principal
from .database import Database
from .receiving import ReceivedFile, fill
from .settings import Settings
from .tables import BufferRow, ExtractorRow, IngestRow

ACTIVE: tuple[State, ...] = ("received", "selecting", "encoding")
FINAL: tuple[State, ...] = tuple(state for state in get_args(State) if state not in ACTIVE)

# How often a worker looks again at once where others were faster; after that it waits as if there were nothing.
CLAIM_TRIES = 10


FAILURES = 10
"""How many failures of an ingest are remembered, the last ones."""


class LeaseLost(Exception):
    """The ingest is no longer this worker's: it was cancelled, deleted with its buffer, or claimed by another."""


@dataclass(frozen=True)
class Lease:
    """The right of a worker to change the row of an ingest: its name stands in it."""

    id: str
    owner: str


@dataclass(frozen=True)
class Claim(Lease):
    """An ingest as its worker took it."""

    buffer: str
    task: int
    options: IngestOptions
    body_sha256: str
    attempts: int
    spool: Path
    acting: Acting = field(default_factory=Acting)


class Watch:
    """For how long rows have been as they are, by the stopwatch of whoever looks at them."""

    def __init__(self) -> None:
        self._first: dict[str, tuple[int, float]] = {}

    def unchanged_s(self, beats: Mapping[str, int]) -> dict[str, float]:
        """The seconds since each of these was first seen at this beat; others are forgotten."""
        now, known = time.monotonic(), self._first
        self._first = {
            name: known[name] if name in known and known[name][0] == beat else (beat, now)
            for name, beat in beats.items()
        }
        return {name: now - since for name, (_, since) in self._first.items()}


class SpoolFile(ReceivedFile):
    """One body on its way into the spool folder."""

    def __init__(self, folder: Path, make_room: Callable[[], bool] = lambda: False) -> None:
        self.id = f"{time.time_ns() // 1_000_000:012x}{token_hex(10)}"
        super().__init__(folder / f"{self.id}.part", make_room)

    def seal(self, content_digest: bytes | None) -> None:
        """The file has its final name and survives a power cut.

        Args:
            content_digest: what the sender says the SHA-256 of the body is.

        Raises:
            BadUpload: the body is empty or not what the sender announced.
            StorageFull: the disk is full.
        """
        if self.bytes == 0:
            raise BadUpload("the body is empty (0 bytes); send a tar of KEY.ppm|png|jpg|webp + KEY.cls pairs", images=0)
        found = bytes.fromhex(self.sha256)
        if content_digest is not None and content_digest != found:
            raise BadUpload(
                f"Content-Digest announces sha-256 {b64encode(content_digest).decode()}, the {self.bytes} bytes "
                f"received have {b64encode(found).decode()}; send them again"
            )
        self.sync()
        self.rename(spool_path(self.path.parent, self.id))


def spool_path(folder: Path, ingest_id: str) -> Path:
    """Where a complete upload waits."""
    return folder / f"{ingest_id}.tar"


async def receive(
    chunks: AsyncIterator[bytes],
    *,
    settings: Settings,
    content_digest: bytes | None = None,
    make_room: Callable[[], bool] = lambda: False,
) -> SpoolFile:
    """The body is on disk, durable, locked. Memory is bounded; a failure or a cut connection leaves nothing.

    Args:
        chunks: of the body.
        settings: where it goes, and how large it may be.
        content_digest: what the sender says the SHA-256 of the body is.
        make_room: called when the disk is full; true if it is worth another try.

    Raises:
        TooLarge: the body exceeds `max_body_bytes`.
        BadUpload: it is empty or does not match `content_digest`.
        StorageFull: the disk is full.
    """
    spooled = await run_sync(SpoolFile, settings.spool_dir, make_room)
    try:
        await fill(spooled, chunks, settings.max_body_bytes, partial(body_too_large, settings=settings))
        await run_sync(spooled.seal, content_digest)
    except BaseException:
        spooled.discard()
        raise
    return spooled


def body_too_large(size: int, settings: Settings) -> TooLarge:
    """The error for a body of at least `size` bytes."""
    return TooLarge(
        f"the body has {size} bytes or more, at most {settings.max_body_bytes} are accepted; split the upload",
        max_body_bytes=settings.max_body_bytes,
    )


def enqueue(
    database: Database, spooled: SpoolFile, *, buffer: str, task: int, options: IngestOptions, key: str | None
) -> tuple[Ingest, bool]:
    """The upload is queued, or removed because its idempotency key already names an ingest; True if it is new.

    Raises:
        NotFound: no such buffer.
        Conflict: the buffer is frozen, or the key was used for another body, task or options.
    """
    try:
        try:
            answer, is_new = _insert(database, spooled, buffer=buffer, task=task, options=options, key=key)
        except IntegrityError:
            # An identical upload won the race for the key, or the buffer was deleted: looking again tells which.
            answer, is_new = _insert(database, spooled, buffer=buffer, task=task, options=options, key=key)
    except (NotFound, Conflict):
        spooled.discard()
        raise
    except BaseException:
        # Whether the row was committed is unknown (the answer of the database was lost): the collector will see.
        spooled.release()
        raise
    if is_new:
        spooled.release()
    else:
        spooled.discard()
    return answer, is_new


def _insert(
    database: Database, spooled: SpoolFile, *, buffer: str, task: int, options: IngestOptions, key: str | None
) -> tuple[Ingest, bool]:
    wanted = IngestRow(
        id=spooled.id,
        buffer=buffer,
        task=task,
        idempotency_key=key,
        state="received",
        body_sha256=spooled.sha256,
        body_bytes=spooled.bytes,
        options=options.model_dump(mode="json"),
        images_total=0,
        images_done=0,
        attempts=0,
        **_from(ACTING.get()),
    )
    with database.session() as session:
        buffers.check_thawed(buffers.find(session, buffer))
        # Before any ingest of it, as whoever deletes the buffer does: else one would wait for the other for ever.
        session.execute(
            select(BufferRow.name).where(BufferRow.name == buffer).with_for_update(read=True, key_share=True)
        )
        earlier = None if key is None else _earlier(session, wanted)
        if earlier is not None and earlier.state not in ("failed", "cancelled"):
            return to_model(earlier), False
        if earlier is not None:
            # It kept nothing, so the same upload may be tried again, after the budget was raised for instance. What
            # is kept of it is not wanted any more: both together would be the same images twice.
            earlier.idempotency_key, earlier.is_kept = None, False
            session.flush()
        wanted.created_at = wanted.updated_at = _arrival(session, buffer)
        session.add(wanted)
        session.flush()
        after = {"task": task, "body_bytes": wanted.body_bytes, "body_sha256": wanted.body_sha256}
        audit.record(session, "ingest.receive", buffer=buffer, subject=wanted.id, after=after)
        return to_model(wanted), True


def _arrival(session: Session, buffer: str) -> float:
    """Now, or just after the last upload to the buffer.

    Order of arrival decides what is kept: a clock that was set back must not put an upload before an earlier one.
    """
    latest = session.scalar(select(func.max(IngestRow.created_at)).where(IngestRow.buffer == buffer))
    return max(time.time(), (latest or 0.0) + 1e-6)


def _from(acting: Acting) -> dict[str, Any]:
    """The columns that say who uploaded it."""
    return {"who": acting.principal.who, "token_id": acting.principal.token_id, "request_id": acting.request_id}


def acting_of(row: IngestRow) -> Acting:
    """Whoever uploaded it: what its worker does is done on their behalf."""
    if row.who is None:
        return Acting(SERVICE)
    return Acting(Principal(row.who, "write", token_id=row.token_id), row.request_id or "")


def _earlier(session: Session, wanted: IngestRow) -> IngestRow | None:
    """The ingest that has the key of the wanted one, if there is one.

    Raises:
        Conflict: there is, and it is another upload.
    """
    same_key = IngestRow.buffer == wanted.buffer, IngestRow.idempotency_key == wanted.idempotency_key
    # Locked: of whoever tries it again at this moment and this upload only one may queue its images.
    found = session.scalars(select(IngestRow).where(*same_key).with_for_update()).one_or_none()
    if found is None:
        return None
    if (found.task, found.body_sha256, found.options) != (wanted.task, wanted.body_sha256, wanted.options):
        raise Conflict(
            f"Idempotency-Key {wanted.idempotency_key!r} names ingest {found.id} with task {found.task} and body "
            f"{found.body_sha256[:12]}; this request has task {wanted.task}, body {wanted.body_sha256[:12]} or other "
            "options. Use a new key for a new upload",
            ingest=found.id,
        )
    return found


def read(session: Session, ingest_id: str) -> Ingest:
    """The ingest as it stands.

    Raises:
        NotFound: no such ingest.
    """
    return to_model(_row(session, ingest_id))


@dataclass(frozen=True)
class Activity:
    """How many ingests wait and how many are worked on; images committed of late, and ingests that failed."""

    waiting: int
    working: int
    images: int
    failed: int


def activity(session: Session, *, lately_s: float) -> Activity:
    """What has happened to the ingests of buffers that whoever asks may see."""
    since = time.time() - lately_s
    counted = select(IngestRow.state, func.count(), func.sum(IngestRow.images_total)).where(
        buffers.reached(IngestRow.buffer), or_(IngestRow.state.in_(ACTIVE), IngestRow.updated_at > since)
    )
    found = {state: (count, images or 0) for state, count, images in session.execute(counted.group_by(IngestRow.state))}
    return Activity(
        waiting=found.get("received", (0, 0))[0],
        working=sum(found.get(state, (0, 0))[0] for state in ("selecting", "encoding")),
        images=int(found.get("committed", (0, 0))[1]),
        failed=found.get("failed", (0, 0))[0],
    )


def page(
    session: Session, buffer: str | None, *, limit: int, before: str | None, state: State | None = None
) -> IngestPage:
    """Ingests of a buffer, or of all that whoever asks may see, the newest first, from the one older than this on.

    Raises:
        Forbidden: the buffer is not one of those.
        NotFound: no such buffer.
    """
    if buffer is not None:
        principal().need("read", buffer)
        buffers.find(session, buffer)
    wanted = select(IngestRow).where(buffers.reached(IngestRow.buffer)).order_by(IngestRow.id.desc()).limit(limit + 1)
    if buffer is not None:
        wanted = wanted.where(IngestRow.buffer == buffer)
    if state is not None:
        wanted = wanted.where(IngestRow.state == state)
    if before is not None:
        wanted = wanted.where(IngestRow.id < before)
    found = [to_model(row) for row in session.scalars(wanted)]
    return IngestPage(ingests=found[:limit], next=found[limit - 1].id if len(found) > limit else None)


def cancel(session: Session, ingest_id: str) -> Ingest:
    """The ingest will never commit; cancelling one that failed or was cancelled before changes nothing.

    Raises:
        NotFound: no such ingest.
        Conflict: it has committed.
    """
    changed = session.execute(
        update(IngestRow)
        .where(IngestRow.id == ingest_id, IngestRow.state.in_(ACTIVE), buffers.reached(IngestRow.buffer))
        .values(state="cancelled", lease_owner=None, is_kept=True, **_changed())
    )
    row = _row(session, ingest_id)
    if changed.rowcount:  # type: ignore[attr-defined]
        tallies.ingest_ended(session, ingest_id)
        audit.record(session, "ingest.cancel", buffer=row.buffer, subject=row.id, before={"task": row.task})
    if row.state == "committed":
        raise Conflict(
            f"ingest {ingest_id} has committed as generation {row.generation} of buffer {row.buffer!r} and cannot be "
            f"cancelled; delete task {row.task} to drop it",
            generation=row.generation,
        )
    return to_model(row)


def retry(session: Session, ingest_id: str) -> Ingest:
    """The ingest is queued again, behind all others of its buffer, as if its upload had just arrived.

    Raises:
        NotFound: no such ingest, or the extractor that it asks for is gone.
        Conflict: it has not ended or has committed, its upload is not kept any more, or the buffer is frozen.
    """
    row = _row(session, ingest_id, is_locked=True)
    if row.state not in ("failed", "cancelled"):
        raise Conflict(
            f"ingest {ingest_id} is {row.state}; only one that failed or was cancelled can be tried again",
            state=row.state,
        )
    buffers.check_thawed(buffers.find(session, row.buffer))
    if not row.is_kept:
        raise Conflict(
            f"the upload of ingest {ingest_id} is not kept any more, or was sent again (ENGRAM_FAILED_S, "
            "ENGRAM_FAILED_BYTES); upload its images again",
            ingest=ingest_id,
        )
    extractor = row.options.get("extractor")
    if extractor is not None and session.get(ExtractorRow, extractor) is None:
        raise NotFound(
            f"extractor {extractor}, which ingest {ingest_id} asks for, is gone; register it again, then try again",
            extractor=extractor,
        )
    was = {"state": row.state, "problem": row.problem, "attempts": row.attempts}
    if row.problem is not None:
        row.failures = [*row.failures, row.problem][-FAILURES:]
    row.state, row.is_kept, row.problem = "received", False, None
    row.images_done, row.attempts, row.pause_s, row.started_at = 0, 0, None, None
    row.beat += 1
    for name, value in _from(ACTING.get()).items():
        setattr(row, name, value)
    row.created_at = row.updated_at = _arrival(session, row.buffer)
    audit.record(session, "ingest.retry", buffer=row.buffer, subject=ingest_id, before=was, after={"state": row.state})
    session.flush()
    return to_model(row)


def kept(session: Session) -> list[IngestRow]:
    """The ingests that ended without a commit and whose uploads are kept, those that ended last first."""
    return list(
        session.scalars(
            select(IngestRow).where(IngestRow.is_kept).order_by(IngestRow.updated_at.desc(), IngestRow.id.desc())
        )
    )


def let_go(session: Session, ingest_ids: Iterable[str]) -> None:
    """The uploads of these ingests are not kept any more; of those that are being tried again, nothing changes."""
    ended = (IngestRow.id.in_(ingest_ids), IngestRow.is_kept, IngestRow.state.in_(FINAL))
    session.execute(update(IngestRow).where(*ended).values(is_kept=False))


def _row(session: Session, ingest_id: str, *, is_locked: bool = False) -> IngestRow:
    row = session.get(IngestRow, ingest_id, with_for_update=True if is_locked else None)
    if row is None or not principal().reaches(row.buffer):
        raise NotFound(f"no ingest {ingest_id!r}", ingest=ingest_id)
    return row


def to_model(row: IngestRow) -> Ingest:
    """The row as the API shows it."""
    return Ingest(
        id=row.id,
        buffer=row.buffer,
        task=row.task,
        state=row.state,
        images_total=row.images_total,
        images_done=row.images_done,
        attempts=row.attempts,
        body_bytes=row.body_bytes,
        body_sha256=row.body_sha256,
        options=IngestOptions.model_validate(row.options),
        problem=row.problem,
        failures=row.failures,
        can_retry=row.is_kept,
        who=row.who,
        generation=row.generation,
        created_at=datetime.fromtimestamp(row.created_at, UTC),
        updated_at=datetime.fromtimestamp(row.updated_at, UTC),
    )


def claim(database: Database, settings: Settings, *, owner: str, watch: Watch | None = None) -> Claim | None:
    """The oldest ingest that nobody works on, now leased to `owner`; None if there is none.

    An ingest that was started `max_attempts` times without an end fails here: it may be what kills the workers.

    Args:
        owner: the name of the worker.
        watch: what the worker has seen of other leases so far. Without one only free ingests are claimed.
    """
    watch = watch or Watch()
    if database.glance(_ANY, *ACTIVE) == (0,):
        return None
    for _ in range(CLAIM_TRIES):
        with database.reading() as session:
            found = _claimable(session, watch, settings.lease_s)
        if found is None:
            return None
        with database.session() as session:
            unmoved = _heads().where(IngestRow.id == found[0], IngestRow.beat == found[1])
            row = session.scalars(unmoved.with_for_update(skip_locked=True)).first()
            if row is None:
                continue
            row.updated_at = time.time()
            row.beat, row.pause_s = row.beat + 1, None
            if row.attempts >= settings.max_attempts:
                row.state, row.lease_owner, row.is_kept = "failed", None, True
                row.problem = EngramError(
                    f"the upload was started {row.attempts} times and its worker died each time (too little memory?); "
                    f"it is given up. The service's log tells more; a smaller upload may pass",
                    attempts=row.attempts,
                ).to_problem()
                session.flush()
                _record_failure(session, row)
                tallies.ingest_ended(session, row.id)
                continue
            row.attempts += 1
            row.started_at = row.started_at or row.updated_at
            row.images_done = 0
            row.state, row.lease_owner = "selecting", owner
            return Claim(
                id=row.id,
                owner=owner,
                buffer=row.buffer,
                task=row.task,
                options=IngestOptions.model_validate(row.options),
                body_sha256=row.body_sha256,
                attempts=row.attempts,
                spool=spool_path(settings.spool_dir, row.id),
                acting=acting_of(row),
            )
    return None


# What an idle worker asks several times a second.
_ANY = "SELECT EXISTS (SELECT 1 FROM ingests WHERE state IN (?, ?, ?))"


def _heads() -> Any:
    """The ingest of each buffer that comes next or is being worked on, the oldest first."""
    earlier = aliased(IngestRow)
    return (
        select(IngestRow)
        .where(
            IngestRow.state.in_(ACTIVE),
            ~exists().where(
                earlier.buffer == IngestRow.buffer,
                earlier.state.in_(ACTIVE),
                or_(
                    earlier.created_at < IngestRow.created_at,
                    and_(earlier.created_at == IngestRow.created_at, earlier.id < IngestRow.id),
                ),
            ),
        )
        .order_by(IngestRow.created_at, IngestRow.id)
    )


def _claimable(session: Session, watch: Watch, lease_s: float) -> tuple[str, int] | None:
    """The first ingest that may be claimed, and its beat."""
    columns = IngestRow.id, IngestRow.beat, IngestRow.lease_owner, IngestRow.pause_s
    heads = session.execute(_heads().with_only_columns(*columns)).all()
    waits_s = {name: lease_s if owner is not None else pause_s or 0.0 for name, _, owner, pause_s in heads}
    unchanged_s = watch.unchanged_s({name: beat for name, beat, _, _ in heads})
    return next(((name, beat) for name, beat, _, _ in heads if unchanged_s[name] >= waits_s[name]), None)


def heartbeat(database: Database, held: Lease, *, state: State, images_done: int, images_total: int) -> None:
    """Others see that the work goes on, and how far it is.

    Raises:
        LeaseLost: the ingest is no longer this worker's.
    """
    with database.session() as session:
        _change(session, held, state=state, images_done=images_done, images_total=images_total)


def fail(database: Database, held: Lease, error: EngramError) -> None:
    """The ingest has failed with this problem; the buffer is as it was.

    Raises:
        LeaseLost: the ingest is no longer this worker's.
    """
    problem = error.to_problem(instance=f"/v1/ingests/{held.id}")
    with database.session() as session:
        _change(session, held, state="failed", problem=problem, lease_owner=None, is_kept=True)
        _record_failure(session, session.get_one(IngestRow, held.id))


def _record_failure(session: Session, row: IngestRow) -> None:
    problem = row.problem or {}
    after = {"task": row.task, "problem": problem.get("type", "").rpartition("/")[2], "detail": problem.get("detail")}
    with on_behalf(acting_of(row)):
        audit.record(session, "ingest.fail", buffer=row.buffer, subject=row.id, after=after)


def release(database: Database, held: Claim, *, after_s: float, counts: bool = True) -> None:
    """Another attempt may start `after_s` from now; this one does not count if its worker was asked to stop.

    Raises:
        LeaseLost: the ingest is no longer this worker's.
    """
    attempts = held.attempts if counts else held.attempts - 1
    with database.session() as session:
        _change(session, held, **_FREE, attempts=attempts, pause_s=after_s if after_s > 0 else None)


def release_all(database: Database, owner: str, *, counts: bool = True) -> None:
    """What a worker that has died was at is free for the next one, at once; see `release` for `counts`."""
    attempts = IngestRow.attempts if counts else IngestRow.attempts - 1
    with database.session() as session:
        own = (IngestRow.lease_owner == owner, IngestRow.state.in_(ACTIVE))
        session.execute(update(IngestRow).where(*own).values(**_FREE, **_changed(), attempts=attempts))


def release_everything(session: Session) -> None:
    """All that is not final waits for a worker: those that were at it are not there any more."""
    session.execute(update(IngestRow).where(IngestRow.state.in_(ACTIVE)).values(**_FREE, **_changed(), pause_s=None))


def held_by(session: Session, leases: Iterable[Lease]) -> set[Lease]:
    """Those of these leases that are still held, or whose ingests their workers brought to an end."""
    by_id = {lease.id: lease for lease in leases}
    rows = session.execute(
        select(IngestRow.id, IngestRow.lease_owner, IngestRow.state).where(IngestRow.id.in_(by_id))
    ).all()
    return {
        by_id[name] for name, owner, state in rows if owner == by_id[name].owner or state in ("committed", "failed")
    }


def holds(held: Lease) -> ColumnElement[bool]:
    """The condition under which a row is still the worker's to change."""
    return and_(IngestRow.id == held.id, IngestRow.lease_owner == held.owner, IngestRow.state.in_(ACTIVE))


_FREE: dict[str, Any] = {"state": "received", "images_done": 0, "lease_owner": None}


def _changed() -> dict[str, Any]:
    """What every change of a row writes beside its own."""
    return {"beat": IngestRow.beat + 1, "updated_at": time.time()}


def _change(session: Session, held: Lease, **values: Any) -> None:
    changed = session.execute(update(IngestRow).where(holds(held)).values(**values, **_changed()))
    if changed.rowcount != 1:  # type: ignore[attr-defined]
        raise LeaseLost(held.id)
    if values.get("state") in FINAL:
        tallies.ingest_ended(session, held.id)
