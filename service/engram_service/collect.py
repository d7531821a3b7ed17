"""Removes what no row of the database names, and never what one will.

Six kinds of leftovers:

- packs of generations whose grace period is over, and of the oldest ones if retired packs take more than
  `retired_bytes`: the rows first, then the files that no row names any more;
- packs of commits that never happened (a crash, a lost race): files older than the grace period without a row;
- uploads whose ingest is committed, those of failed and cancelled ones when their time is over or their room is needed
  (`failed_s`, `failed_bytes`), and those that nobody finished (a crash between rename and commit);
- extractors that nothing names any more (`extractors.collect`);
- originals that no task has any more (`samples`), and those of commits that never happened;
- rows of the audit that were kept for long enough, and of logins that are over.

On a full disk removing rows needs room first: it is taken from the reserve (`storage.Reserve`).

A commit writes its packs before the rows that name them, so a file without a row may be about to get one. Two
things make removal safe. Files are removed inside a transaction that excludes commits (`commit.exclusive`), and a
commit checks, inside its own such transaction, that its files still exist before it names them; if one is gone it
writes it again. The age limit only spares it that second try. Uploads are told apart by the lock that their
receiver holds (see `ingest`).

A file that cannot be removed is passed over, so that one bad sector stops nothing, and told now and then.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from pathlib import Path

from sqlalchemy import delete, func, or_, select, update
from sqlalchemy.orm import Session

from engram.errors import EngramError, StorageFull

from . import audit, extractors, ingest, samples, sessions
from .commit import exclusive
from .database import Database
from .ingest import ACTIVE
from .receiving import abandoned
from .samples import SampleFolder
from .settings import Settings
from .storage import PackStore, Reserve
from .tables import BufferRow, IngestRow, PackRow

logger = logging.getLogger(__name__)

# Files removed in one transaction, which holds up commits for as long: a few milliseconds.
BATCH = 100

# How often the log names a file that cannot be removed.
TELL_EVERY_S = 3600.0

_IS_WANTED = or_(IngestRow.state.in_(ACTIVE), IngestRow.is_kept)

Stuck = dict[str, OSError]
"""Files that cannot be removed, and why."""


@dataclass(frozen=True)
class Collected:
    """How many of each kind were removed, and what could not be."""

    rows: int
    packs: int
    uploads: int
    extractors: int
    records: int
    samples: int = 0
    stuck: Stuck = field(default_factory=dict)

    @property
    def counts(self) -> tuple[int, int, int, int, int, int]:
        """What was removed of each kind."""
        return self.rows, self.packs, self.uploads, self.extractors, self.records, self.samples


class Collector:
    """Collects again and again; nothing that goes wrong there gets out."""

    def __init__(self, database: Database, store: PackStore, settings: Settings, pulse: Callable[[], None]) -> None:
        self._collect = partial(collect, database, store, settings, pulse=pulse)
        self._told: dict[str, float] = {}

    def run(self) -> None:
        """What can be collected is gone."""
        try:
            found = self._collect()
        except EngramError as error:
            logger.warning("leftovers cannot be collected now: %s", error)
        except Exception as error:
            logger.error("leftovers cannot be collected; this is a defect of Engram", exc_info=error)
        else:
            if any(found.counts):
                logger.info(
                    "collected %d old pack rows, %d packs, %d uploads, %d extractors, %d old records, %d samples",
                    *found.counts,
                )
            self._tell(found.stuck)

    def _tell(self, stuck: Stuck) -> None:
        now = time.monotonic()
        self._told = {path: at for path, at in self._told.items() if path in stuck and now - at < TELL_EVERY_S}
        news = [path for path in stuck if path not in self._told]
        if news:
            logger.warning(
                "%d leftovers cannot be removed and keep their room, among them %s: %s",
                len(stuck),
                news[0],
                stuck[news[0]].strerror,
            )
        self._told |= dict.fromkeys(news, now)


def collect(
    database: Database, store: PackStore, settings: Settings, *, pulse: Callable[[], None] = lambda: None
) -> Collected:
    """Leftovers older than the grace period are gone; safe to run at any time, in any number of processes.

    Args:
        database: that of the service.
        store: its packs.
        settings: `grace_s`, `retired_bytes` and where uploads are.
        pulse: called now and then; what it raises ends the collecting.

    Raises:
        StorageFull, Unavailable: the database does not answer.
    """
    reserve = Reserve(settings.reserve_path, settings.reserve_bytes)
    try:
        found = collect_rows(database, store, settings, pulse=pulse)
    except StorageFull:
        with reserve.given_up():
            found = collect_rows(database, store, settings, pulse=pulse)
    with _passing_over(store.folder, found.stuck):
        store.sweep(settings.grace_s, lambda path, error: found.stuck.update({str(path): error}))
    if any(found.counts):
        reserve.keep()
    return found


def collect_rows(
    database: Database, store: PackStore, settings: Settings, *, pulse: Callable[[], None] = lambda: None
) -> Collected:
    """As `collect`, but for the temporary files of writers that died.

    Raises:
        StorageFull: there is no room to remove rows.
        Unavailable: the database does not answer.
    """
    stuck: Stuck = {}
    retired = _retired_rows(database, settings)
    unwanted = dict.fromkeys(retired)
    with _passing_over(store.folder, stuck):
        for digest, age_s in store.digests():
            pulse()
            if age_s > settings.grace_s:
                unwanted[digest] = None
    packs = _unnamed_packs(database, store, list(unwanted), stuck, pulse)
    uploads = collect_uploads(database, settings, stuck=stuck, pulse=pulse)
    models = extractors.collect(database, settings, stuck=stuck, pulse=pulse)
    records = _records(database, settings, pulse)
    originals = _samples(database, SampleFolder(settings.samples_dir), settings.grace_s, stuck)
    return Collected(len(retired), packs, uploads, models, records, originals, stuck)


@contextmanager
def _passing_over(path: Path, stuck: Stuck) -> Iterator[None]:
    """What the disk refuses inside the block is noted and ends the block."""
    try:
        yield
    except OSError as error:
        stuck[str(path)] = error


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


def _unnamed_packs(
    database: Database, store: PackStore, digests: list[str], stuck: Stuck, pulse: Callable[[], None]
) -> int:
    """Those of these packs that no row names have no file any more; returns how many had."""
    removed = 0
    for some in (digests[at : at + BATCH] for at in range(0, len(digests), BATCH)):
        pulse()
        named_by = select(PackRow.digest).where(PackRow.digest.in_(some))
        with database.reading() as session:
            if set(some) <= set(session.scalars(named_by)):
                continue
        with database.session() as session:
            exclusive(session)
            for digest in set(some) - set(session.scalars(named_by)):
                with _passing_over(store.path(digest), stuck):
                    store.delete(digest)
                    removed += 1
    return removed


def collect_uploads(
    database: Database, settings: Settings, *, stuck: Stuck | None = None, pulse: Callable[[], None] = lambda: None
) -> int:
    """Uploads that nobody will ask for any more, and kept ones whose time is over, are gone; returns how many.

    Raises:
        StorageFull: there is no room to change rows.
        Unavailable: the database does not answer.
    """
    _let_go(database, settings)
    return _uploads(database, settings.spool_dir, {} if stuck is None else stuck, pulse)


def _let_go(database: Database, settings: Settings) -> None:
    """Of uploads that may be tried again only those are kept that are recent and find room."""
    disk = os.statvfs(settings.spool_dir)
    free_bytes = disk.f_bavail * disk.f_frsize - settings.reserve_bytes
    with database.reading() as session:
        rows = ingest.kept(session)
    totals = accumulate(row.body_bytes for row in rows)
    # What is kept takes as much as it leaves free, at most.
    room_bytes = min(settings.failed_bytes, max(0, free_bytes))
    oldest = time.time() - settings.failed_s
    unwanted = [
        row.id for row, total in zip(rows, totals, strict=True) if total > room_bytes or row.updated_at <= oldest
    ]
    if unwanted:
        with database.session() as session:
            ingest.let_go(session, unwanted)


def _samples(database: Database, folder: SampleFolder, grace_s: float, stuck: Stuck) -> int:
    """Originals that no task has, and no commit is about to give one, are gone; returns how many files had them."""
    paths = list(folder.old(grace_s))
    removed = 0
    for some in (paths[at : at + BATCH] for at in range(0, len(paths), BATCH)):
        with database.reading() as session:
            if samples.named(session, [path.name for path in some]) == {path.name for path in some}:
                continue
        with database.session() as session:
            exclusive(session)
            held = samples.named(session, [path.name for path in some])
            for path in some:
                if path.name not in held:
                    with _passing_over(path, stuck):
                        path.unlink(missing_ok=True)
                        removed += 1
    return removed


def _uploads(database: Database, folder: Path, stuck: Stuck, pulse: Callable[[], None]) -> int:
    """Uploads that nobody will ask for any more are gone; returns how many."""
    with database.reading() as session:
        wanted = set(session.scalars(select(IngestRow.id).where(_IS_WANTED)))
    removed = 0
    for path in folder.glob("*.*"):
        pulse()
        if path.suffix in {".part", ".tar"} and path.stem not in wanted:
            with _passing_over(path, stuck):
                removed += _remove_if_abandoned(database, path)
    return removed


def _records(database: Database, settings: Settings, pulse: Callable[[], None]) -> int:
    """Rows of the audit and of sessions whose time is over are gone; returns how many."""
    removed = 0
    while True:
        pulse()
        with database.reading() as session:
            if not (audit.has_expired(session, settings) or sessions.have_expired(session)):
                return removed
        with database.session() as session:
            removed += audit.collect(session, settings) + sessions.collect(session)


def _remove_if_abandoned(database: Database, path: Path) -> bool:
    with abandoned(path) as is_abandoned:
        if not is_abandoned:
            return False
        # Only now, with its receiver known to be done, does the absence of a row mean anything.
        with database.reading() as session:
            is_wanted = session.scalar(select(IngestRow.id).where(IngestRow.id == path.stem, _IS_WANTED))
        if is_wanted is not None:
            return False
        path.unlink(missing_ok=True)
        return True
