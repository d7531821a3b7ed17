"""Check the ONNX models that trainers upload and keep them under their SHA-256, for as long as they are of use.

    extractors/.ID.tmp      being received or checked; its receiver holds an exclusive flock on it
    extractors/SHA256       checked and durable; named by a row, or about to be

A model is stored only after a bounded child process has run it (`embedder.inspect`), so whatever an ingest names later
is known to work. Its file gets its name inside the transaction that names it in a row, and loses it inside one that
finds no row. Both exclude each other, so a row has its file, and a file that a crash left without a row goes.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from secrets import token_hex

from anyio import Semaphore, fail_after
from anyio.to_thread import run_sync
from sqlalchemy import Select, delete, select, text
from sqlalchemy.orm import Session

from engram.errors import BadUpload, Conflict, NotFound, RateLimited, TooLarge
from engram.files import disk_errors
from engram.schemas import Extractor

from . import audit
from .acting import principal
from .buffers import reached
from .database import Database
from .embedder import ExtractorInfo, ExtractorLimits, inspect
from .ingest import ACTIVE
from .receiving import ReceivedFile, abandoned, fill
from .settings import Settings
from .tables import ExtractorRow, IngestRow, TaskRow

CHECK_WAIT_S = 5.0
"""How long a registration waits for its turn; most models are checked within two seconds."""

# Key of the PostgreSQL advisory lock under which files get and lose their names; SQLite has one writer anyway.
_NAMES_LOCK = 0x656E6772616D02
_DIGEST = re.compile("[0-9a-f]{64}")


class Turns:
    """Lets few models be checked at a time: each check takes a core and the memory that an extractor may use."""

    def __init__(self, settings: Settings) -> None:
        self._most = settings.max_extractor_checks
        self._free = Semaphore(self._most)

    @asynccontextmanager
    async def taken(self) -> AsyncIterator[None]:
        """A turn is taken inside the block.

        Raises:
            RateLimited: none was free for a while.
        """
        try:
            with fail_after(CHECK_WAIT_S):
                await self._free.acquire()
        except TimeoutError:
            raise RateLimited(
                f"{self._most} extractors are being checked, as many as ENGRAM_MAX_EXTRACTOR_CHECKS allows; try again",
                max_extractor_checks=self._most,
                retry_after_s=2 * CHECK_WAIT_S,
            ) from None
        try:
            yield
        finally:
            self._free.release()


async def register(
    database: Database, settings: Settings, turns: Turns, sha256: str, chunks: AsyncIterator[bytes]
) -> tuple[Extractor, bool]:
    """The model is usable by ingests; True if it is new.

    Raises:
        TooLarge: the body exceeds `max_extractor_bytes`.
        BadUpload: the body's digest is not `sha256`.
        BadExtractor: the model cannot serve; the message says why.
        RateLimited: too many others are being checked.
        StorageFull: the disk is full; nothing is left behind.
    """
    temporary = settings.extractors_dir / f".{token_hex(8)}.tmp"
    file = await run_sync(ReceivedFile, temporary)
    try:
        await fill(file, chunks, settings.max_extractor_bytes, partial(_too_large, settings=settings))
        await run_sync(file.sync)
        if file.sha256 != sha256:
            raise BadUpload(f"the body's SHA-256 is {file.sha256}, the address says {sha256}", sha256=file.sha256)
        known = await run_sync(_known, database, settings, sha256)
        if known is not None:
            return known, False
        async with turns.taken():
            info = await run_sync(inspect, temporary, limits(settings))
        return await run_sync(_keep, database, settings, file, info)
    finally:
        # By this name only: under its final one it may be another registration's by now.
        temporary.unlink(missing_ok=True)
        file.release()


def _too_large(_: int, settings: Settings) -> TooLarge:
    return TooLarge(
        f"the extractor has more than {settings.max_extractor_bytes} bytes, the most that ENGRAM_MAX_EXTRACTOR_BYTES "
        "allows",
        max_extractor_bytes=settings.max_extractor_bytes,
    )


def read(session: Session, sha256: str) -> Extractor:
    """A registered model.

    Raises:
        NotFound: there is no such extractor.
    """
    row = session.get(ExtractorRow, sha256)
    if row is None:
        raise NotFound(f"there is no extractor {sha256}; PUT its ONNX bytes to /v1/extractors/{sha256}", sha256=sha256)
    return _describe(row)


def read_all(session: Session) -> list[Extractor]:
    """Every registered model, the oldest first."""
    rows = session.scalars(select(ExtractorRow).order_by(ExtractorRow.created_at, ExtractorRow.sha256))
    return [_describe(row) for row in rows]


def uses(session: Session) -> dict[str, list[tuple[str, int]]]:
    """The tasks (buffer, number) whose decision names each embedder, of buffers that whoever asks may see."""
    embedder = TaskRow.decision["embedder"].as_string()
    wanted = select(embedder, TaskRow.buffer, TaskRow.task).where(reached(TaskRow.buffer), embedder.is_not(None))
    found: dict[str, list[tuple[str, int]]] = {}
    for sha256, buffer, task in session.execute(wanted.order_by(TaskRow.buffer, TaskRow.task)):
        found.setdefault(sha256, []).append((buffer, task))
    return found


def remove(database: Database, settings: Settings, sha256: str) -> None:
    """The model is gone. Decisions that name it stay as they are.

    Raises:
        Forbidden: whoever asks does not administer everything: others may use it.
        NotFound: there is no such extractor.
        Conflict: an ingest that has not ended needs it.
    """
    principal().need_everything("admin")
    with database.session() as session:
        read(session, sha256)
        needed = session.scalars(_ingests_naming(sha256).limit(1)).one_or_none()
        if needed is not None:
            raise Conflict(f"ingest {needed} needs extractor {sha256}; wait for it or cancel it", ingest=needed)
        session.execute(delete(ExtractorRow).where(ExtractorRow.sha256 == sha256))
        audit.record(session, "extractor.delete", subject=sha256)
    with disk_errors(path(settings, sha256), 0):
        _unname(database, settings, sha256)


def collect(
    database: Database, settings: Settings, *, stuck: dict[str, OSError], pulse: Callable[[], None] = lambda: None
) -> int:
    """Models that nothing names, and files that a crash left behind, are gone; returns how many files.

    A model goes `extractor_grace_s` after it was last registered if no decision and no waiting ingest names it.

    Args:
        database: that of the service.
        settings: where models are, and the period of grace.
        stuck: gets the files that cannot be removed, and why.
        pulse: called for each file; what it raises ends the collecting.

    Raises:
        StorageFull, Unavailable: the database does not answer.
    """
    _forget_unused(database, settings)
    with database.reading() as session:
        named = set(session.scalars(select(ExtractorRow.sha256)))
    removed = 0
    for file in _files(settings, stuck):
        pulse()
        try:
            if _DIGEST.fullmatch(file.name):
                removed += file.name not in named and _unname(database, settings, file.name)
            elif file.suffix == ".tmp":
                with abandoned(file) as is_abandoned:
                    if is_abandoned:
                        file.unlink(missing_ok=True)
                        removed += 1
        except OSError as error:
            stuck[str(file)] = error
    return removed


def path(settings: Settings, sha256: str) -> Path:
    """Where the bytes of a registered model are."""
    return settings.extractors_dir / sha256


def limits(settings: Settings) -> ExtractorLimits:
    """What the settings allow the process that runs a model."""
    return ExtractorLimits(
        memory_bytes=settings.extractor_memory_bytes,
        batch_s=settings.extractor_batch_s,
        max_bytes=settings.max_extractor_bytes,
        niceness=settings.worker_niceness,
    )


def _known(database: Database, settings: Settings, sha256: str) -> Extractor | None:
    """The model if it is registered and its file is there; its period of grace begins again."""
    with database.reading() as session:
        row = session.get(ExtractorRow, sha256)
    try:
        os.utime(path(settings, sha256))
    except FileNotFoundError:
        return None
    return None if row is None else _describe(row)


def _keep(database: Database, settings: Settings, file: ReceivedFile, info: ExtractorInfo) -> tuple[Extractor, bool]:
    sha256 = file.sha256
    with database.session() as session:
        _alone(session)
        # Another upload of the same model may have been faster; a row without a file is made good by ours.
        known = session.get(ExtractorRow, sha256)
        file.rename(path(settings, sha256))
        if known is not None:
            return _describe(known), False
        row = ExtractorRow(
            sha256=sha256,
            bytes=file.bytes,
            input_shape=list(info.input_shape),
            dimensions=info.dimensions,
            created_at=time.time(),
        )
        session.add(row)
        session.flush()
        audit.record(session, "extractor.register", subject=sha256, after={"bytes": row.bytes})
        return _describe(row), True


def _alone(session: Session) -> None:
    """Until the transaction ends no other one names files or takes their names away."""
    if session.get_bind().dialect.name == "postgresql":
        session.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _NAMES_LOCK})


def _unname(database: Database, settings: Settings, sha256: str) -> bool:
    """The file is gone if no row names it; True if it was there."""
    with database.session() as session:
        _alone(session)
        if session.get(ExtractorRow, sha256) is not None:
            return False
        try:
            path(settings, sha256).unlink()
        except FileNotFoundError:
            return False
        return True


def _ingests_naming(sha256: str) -> Select[str]:
    return select(IngestRow.id).where(IngestRow.state.in_(ACTIVE), IngestRow.options["extractor"].as_string() == sha256)


def _forget_unused(database: Database, settings: Settings) -> None:
    """The rows of models that nothing has named for long are gone."""
    with database.reading() as session:
        if not _unused(session, settings):
            return
    with database.session() as session:
        _alone(session)
        for row in _unused(session, settings):
            session.delete(row)
            audit.record(session, "extractor.collect", subject=row.sha256, before={"bytes": row.bytes})


def _unused(session: Session, settings: Settings) -> list[ExtractorRow]:
    rows = session.scalars(select(ExtractorRow)).all()
    old = [row for row in rows if _age_s(settings, row) > settings.extractor_grace_s]
    return [row for row in old if not _is_named(session, row.sha256)]


def _is_named(session: Session, sha256: str) -> bool:
    decisions = select(TaskRow.task).where(TaskRow.decision["embedder"].as_string() == sha256)
    return any(session.scalars(named.limit(1)).first() is not None for named in (decisions, _ingests_naming(sha256)))


def _age_s(settings: Settings, row: ExtractorRow) -> float:
    """Since the model was last registered."""
    try:
        registered_at = path(settings, row.sha256).stat().st_mtime
    except FileNotFoundError:
        registered_at = row.created_at
    return time.time() - registered_at


def _files(settings: Settings, stuck: dict[str, OSError]) -> Iterable[Path]:
    try:
        return list(settings.extractors_dir.iterdir())
    except OSError as error:
        stuck[str(settings.extractors_dir)] = error
        return []


def _describe(row: ExtractorRow) -> Extractor:
    batch, channels, height, width = row.input_shape
    return Extractor(
        sha256=row.sha256,
        bytes=row.bytes,
        input_shape=(batch, channels, height, width),
        dimensions=row.dimensions,
        created_at=datetime.fromtimestamp(row.created_at, UTC),
    )
