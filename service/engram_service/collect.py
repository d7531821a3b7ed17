"""Removes what no row of the database names, and never what one will.

Three kinds of leftovers:

- packs of generations whose grace period is over, and of the oldest ones if retired packs take more than
  `retired_bytes`: the rows first, then the files that no row names any more;
- packs of commits that never happened (a crash, a lost race): files older than the grace period without a row;
- uploads whose ingest is final, or that nobody finished (a crash between rename and commit).

On a full disk removing rows needs room first: it is taken from the reserve (`storage.Reserve`).

A commit writes its packs before the rows that name them, so a file without a row may be about to get one. Two
things make removal safe. Files are removed inside a transaction that excludes commits (`commit.exclusive`), and a
commit checks, inside its own such transaction, that its files still exist before it names them; if one is gone it
writes it again. The age limit only spares it that second try. Uploads are told apart by the lock that their
receiver holds (see `ingest`).
"""

from __future__ import annotations

import fcntl
import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import delete, func, select, update
from sqlalchemy.orm import Session

from engram.errors import StorageFull

from .commit import exclusive
from .database import Database
from .ingest import ACTIVE
from .settings import Settings
from .storage import PackStore, Reserve
from .tables import BufferRow, IngestRow, PackRow

logger = logging.getLogger(__name__)

# Files removed in one transaction, which holds up commits for as long: a few milliseconds.
BATCH = 100


@dataclass(frozen=True)
class Collected:
    """How many of each kind were removed."""

    rows: int
    packs: int
    uploads: int


def collect(database: Database, store: PackStore, settings: Settings) -> Collected:
    """Leftovers older than the grace period are gone; safe to run at any time, in any number of processes."""
    reserve = Reserve(settings.reserve_path, settings.reserve_bytes)
    try:
        found = collect_rows(database, store, settings)
    except StorageFull:
        with reserve.given_up():
            found = collect_rows(database, store, settings)
    store.sweep(settings.grace_s)
    if found != Collected(0, 0, 0):
        reserve.keep()
    return found


def collect_rows(database: Database, store: PackStore, settings: Settings) -> Collected:
    """As `collect`, but for the temporary files of writers that died.

    Raises:
        StorageFull: there is no room to remove rows.
    """
    retired = _retired_rows(database, settings)
    old = [digest for digest, age_s in store.digests() if age_s > settings.grace_s]
    found = Collected(
        rows=len(retired),
        packs=_unnamed_packs(database, store, list(dict.fromkeys([*retired, *old]))),
        uploads=_uploads(database, settings.spool_dir),
    )
    if found != Collected(0, 0, 0):
        logger.info("collected %d old pack rows, %d packs, %d uploads", found.rows, found.packs, found.uploads)
    return found


def _retired_rows(database: Database, settings: Settings) -> list[str]:
    """Rows of generations whose time is over are gone; returns the digests that they named."""
    with database.reading() as session:
        oldest = _oldest_generations(session, settings)
    if not oldest:
        return []
    with database.session() as session:
        digests: list[str] = []
        for buffer, until in oldest.items():
            session.execute(
                update(BufferRow)
                .where(BufferRow.name == buffer, BufferRow.oldest_generation < until)
                .values(oldest_generation=until)
            )
            ended = (PackRow.buffer == buffer, PackRow.until <= until)
            digests += session.scalars(delete(PackRow).where(*ended).returning(PackRow.digest))
    return digests


def _oldest_generations(session: Session, settings: Settings) -> dict[str, int]:
    """The first generation of each buffer that stays, of those that have to let some go."""
    expired = PackRow.retired_at < time.time() - settings.grace_s
    newest = select(PackRow.buffer, func.max(PackRow.until)).where(expired).group_by(PackRow.buffer)
    oldest = {buffer: until for buffer, until in session.execute(newest) if until is not None}
    live = select(PackRow.digest).where(PackRow.until.is_(None))
    retired = select(PackRow.buffer, PackRow.until, PackRow.digest, PackRow.bytes).where(
        PackRow.until.is_not(None), PackRow.digest.not_in(live)
    )
    last: dict[str, int] = {}
    seen: set[str] = set()
    used = 0
    # From the newest on: what is left when they have taken what is allowed has to go.
    newest_first = retired.order_by(PackRow.retired_at.desc(), PackRow.id.desc())
    for buffer, until, digest, size in session.execute(newest_first):
        assert until is not None, "these rows have ended"
        used += 0 if digest in seen else size
        seen.add(digest)
        is_last = until == last.setdefault(buffer, until)
        if used > settings.retired_bytes and not is_last and until > oldest.get(buffer, -1):
            oldest[buffer] = until
    return oldest


def _unnamed_packs(database: Database, store: PackStore, digests: list[str]) -> int:
    """Those of these packs that no row names have no file any more; returns how many had."""
    removed = 0
    for some in (digests[at : at + BATCH] for at in range(0, len(digests), BATCH)):
        named_by = select(PackRow.digest).where(PackRow.digest.in_(some))
        with database.reading() as session:
            if set(some) <= set(session.scalars(named_by)):
                continue
        with database.session() as session:
            exclusive(session)
            for digest in set(some) - set(session.scalars(named_by)):
                store.delete(digest)
                removed += 1
    return removed


def _uploads(database: Database, folder: Path) -> int:
    with database.reading() as session:
        active = set(session.scalars(select(IngestRow.id).where(IngestRow.state.in_(ACTIVE))))
    waiting = [path for path in folder.glob("*.*") if path.suffix in {".part", ".tar"} and path.stem not in active]
    return sum(_remove_if_abandoned(database, path) for path in waiting)


def _remove_if_abandoned(database: Database, path: Path) -> bool:
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Only now, with its receiver known to be done, does the absence of a row mean anything.
        with database.reading() as session:
            state = session.scalars(select(IngestRow.state).where(IngestRow.id == path.stem)).one_or_none()
        if state in ACTIVE:
            return False
        path.unlink(missing_ok=True)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(file)
