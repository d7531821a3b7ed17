"""Copies all that a service holds to a folder while it runs, and keeps the last few copies there.

    FOLDER/packs/ab/abcd...ef                  packs of all copies: they never change, so each is copied once
    FOLDER/extractors/SHA256                   likewise, and samples
    FOLDER/uploads/ID.tar                      uploads that were acknowledged and not yet committed
    FOLDER/2026-11-22T03-15-00.123Z/engram.sqlite  the rows, also of a service on PostgreSQL
    FOLDER/2026-11-22T03-15-00.123Z/backup.json    what this copy consists of (`Backup`)

A copy is complete when it has its `backup.json`, which is written last; `restore` takes no other, and the next backup
removes what one that died has left. Every byte is compared with its digest on the way.

Nothing is locked and no commit waits. The rows are copied first, at one instant, then what they name. A pack that was
collected before it was copied, or an upload that was committed, shows that the rows are out of date: then they are
copied again, and of the files only those that are new since. So however long the first round takes, the last one
takes as long as few files do, and what it copies belongs together.

Rows of older generations, of sessions and of workers stay behind, and so do uploads that are only kept to be tried
again. Tokens are in a copy as they are in the database, hashed; what `ENGRAM_*` variables say is not.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import re
import shutil
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from secrets import token_hex
from typing import Annotated, BinaryIO, Literal

from pydantic import Field
from sqlalchemy import Table, delete, func, insert, select, update

from engram.errors import Conflict, StripCorrupt, Unavailable
from engram.files import disk_errors, fsync_path, write_durably
from engram.schemas import Answer, Digest

from . import __version__, extractors, ingest
from .database import Database
from .settings import Settings
from .storage import PackStore
from .tables import Base, BufferRow, ExtractorRow, IngestRow, PackRow, SessionRow, TaskRow, WorkerRow

logger = logging.getLogger(__name__)

ROUNDS = 50
"""How often the rows are copied before it is given up: each time files went that had not been copied yet."""

MAX_OPEN = 200
"""Uploads that are held open during a copy, the ones that came first: a process may have 1,024 files open."""

_BLOCK_BYTES = 2**20
_ROWS = 1000
_LIST = "backup.json"
_NAME = re.compile(r"\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d\.\d{3}Z")
_LEFT_BEHIND = (SessionRow, WorkerRow)

Progress = Callable[[int, int], None]
"""Told how many files of how many are there."""


class Backup(Answer):
    """What one copy consists of: files by their digests, with their bytes. `damaged` were wrong where they came from,
    and are in no copy."""

    format: Literal[1] = 1
    version: str
    made_at: datetime
    database_sha256: str
    packs: dict[Digest, int]
    extractors: dict[Digest, int]
    samples: list[Digest]
    uploads: dict[Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")], tuple[Digest, int]]
    damaged: tuple[str, ...] = ()


@dataclass(frozen=True)
class File:
    """One file of a copy: its place below a folder of backups and in a data folder, and what it holds.

    Args:
        name: below a folder of backups.
        path: in a data folder.
        sha256: of its bytes.
        bytes: how many; None where no row says it.
    """

    name: str
    path: Path
    sha256: str
    bytes: int | None


class _Gone(Exception):
    """What the rows name was removed before it could be copied."""


@dataclass
class _Copying:
    """The files of one copy, as far as they have come."""

    folder: Path
    settings: Settings
    progress: Progress
    damaged: list[str] = field(default_factory=list)
    gone: set[str] = field(default_factory=set)
    written: set[Path] = field(default_factory=set)

    def run(self, wanted: Backup, opened: Mapping[str, BinaryIO]) -> None:
        """Every file is in the folder, durable, but for those that are damaged.

        One that is missing whenever the rows are looked at is damaged, too: nobody removed it after them.

        Raises:
            _Gone: one was removed meanwhile.
        """
        files = files_of(wanted, self.settings)
        for number, file in enumerate(files):
            self.progress(number, len(files))
            target = self.folder / file.name
            if _has(target, file.bytes):
                continue
            try:
                with ExitStack() as stack:
                    source = opened.get(file.name) or stack.enter_context(file.path.open("rb"))
                    copy(source, target, file)
            except FileNotFoundError:
                if file.name not in self.gone:
                    self.gone.add(file.name)
                    raise _Gone(file.name) from None
                logger.error("%s is missing: it is left out of the backup", file.name)
                self.damaged.append(file.name)
            except StripCorrupt as error:
                logger.error("%s: it is left out of the backup", error)
                self.damaged.append(file.name)
            else:
                self.written.add(target.parent)
        self.progress(len(files), len(files))
        for place in self.written:
            fsync_path(place)
            fsync_path(place.parent)


def back_up(
    database: Database,
    settings: Settings,
    folder: Path,
    *,
    keep: int = 7,
    progress: Progress = lambda done, of: None,
) -> tuple[str, Backup]:
    """There is a new copy of the service in the folder, complete and durable; returns its name and what it holds.

    Args:
        database: of the service, which may be running.
        settings: likewise.
        folder: is made if need be; not in the data folder.
        keep: so many copies stay, the newest; what only others needed is removed.
        progress: told how far it is.

    Raises:
        Conflict: another backup to the folder is under way, or the folder is the service's own.
        StorageFull, Unavailable: a disk or the database does not do its part; earlier copies are as they were.
    """
    _check_place(folder, settings)
    database.ping()
    with disk_errors(folder, 0):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with _alone(folder):
        _clear(folder)
        copying = _Copying(folder, settings, progress)
        for _ in range(ROUNDS):
            made = _attempt(database, copying)
            if made is not None:
                _prune(folder, keep)
                return made
    raise Unavailable(
        f"in each of {ROUNDS} rounds packs or uploads were removed before they could be copied; let ENGRAM_GRACE_S be "
        "longer, or try again when there are fewer uploads"
    )


def complete(folder: Path) -> list[str]:
    """The names of the copies in a folder that are complete, the oldest first."""
    return sorted(path.parent.name for path in folder.glob(f"*/{_LIST}") if _NAME.fullmatch(path.parent.name))


def read(folder: Path, name: str) -> Backup:
    """What a copy consists of.

    Raises:
        ValueError: it is no list that this version knows.
        OSError: the disk does not give it.
    """
    return Backup.model_validate_json((folder / name / _LIST).read_bytes())


def files_of(made: Backup, settings: Settings) -> list[File]:
    """Every file of a copy, and where a service with these settings has it."""
    store = PackStore(settings.packs_dir)
    packs = [File(f"packs/{sha[:2]}/{sha}", store.path(sha), sha, size) for sha, size in made.packs.items()]
    models = [
        File(f"extractors/{sha}", extractors.path(settings, sha), sha, size) for sha, size in made.extractors.items()
    ]
    uploads = [
        File(f"uploads/{name}.tar", ingest.spool_path(settings.spool_dir, name), sha, size)
        for name, (sha, size) in made.uploads.items()
    ]
    samples = [File(f"samples/{sha}", settings.samples_dir / sha, sha, None) for sha in made.samples]
    return packs + models + samples + uploads


def copy(source: BinaryIO, target: Path, file: File) -> None:
    """The bytes are in a file of that name, which appears whole; its folder is to be synced by the caller.

    Raises:
        StripCorrupt: they are others than their digest says, or the disk does not give them.
        StorageFull, Unavailable: the disk does not take them.
    """
    with disk_errors(target, file.bytes or 0):
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        temporary = target.parent / f".{target.name}.{token_hex(4)}.tmp"
        found = hashlib.sha256()
        try:
            with os.fdopen(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as out:
                for block in _blocks(source, file):
                    found.update(block)
                    out.write(block)
                out.flush()
                os.fsync(out.fileno())
            if found.hexdigest() != file.sha256:
                raise StripCorrupt(f"{file.name} should have SHA-256 {file.sha256} and has {found.hexdigest()}")
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)


def _blocks(source: BinaryIO, file: File) -> Iterator[bytes]:
    while True:
        try:
            block = source.read(_BLOCK_BYTES)
        except OSError as error:
            raise StripCorrupt(f"{file.name} cannot be read: {error.strerror}") from error
        if not block:
            return
        yield block


def _attempt(database: Database, copying: _Copying) -> tuple[str, Backup] | None:
    """A copy of the rows as they are now and of all that they name; None if some of that was gone already."""
    folder = copying.folder
    name = _new_name(folder)
    place = folder / name
    with disk_errors(place, 0):
        place.mkdir(mode=0o700)
    copying.damaged.clear()
    with ExitStack() as stack:
        # An upload is removed the moment that it is committed. What is open can be read to its end all the same; others
        # may be gone by then, which makes another round.
        opened = _open_uploads(copying.settings, {}, stack)
        wanted = _copy_rows(database, copying.settings, place)
        opened = _open_uploads(copying.settings, opened, stack)
        try:
            copying.run(wanted, opened)
        except _Gone as gone:
            logger.info("%s was removed before it could be copied; the rows are copied again", gone)
            shutil.rmtree(place)
            return None
    made = wanted.model_copy(update={"damaged": tuple(sorted(copying.damaged))})
    write_durably(place / _LIST, made.model_dump_json(indent=2).encode())
    fsync_path(folder)
    return name, made


def _new_name(folder: Path) -> str:
    """The time, or just after that of the newest copy: a clock that was set back must not make this one the oldest."""
    at = datetime.now(UTC)
    for newest in complete(folder)[-1:]:
        at = max(at, datetime.strptime(newest, "%Y-%m-%dT%H-%M-%S.%fZ").replace(tzinfo=UTC) + timedelta(milliseconds=1))
    return f"{at:%Y-%m-%dT%H-%M-%S}.{at.microsecond // 1000:03d}Z"


def _open_uploads(settings: Settings, opened: dict[str, BinaryIO], stack: ExitStack) -> dict[str, BinaryIO]:
    for path in sorted(settings.spool_dir.glob("*.tar")):
        if len(opened) == MAX_OPEN:
            break
        if f"uploads/{path.name}" not in opened:
            with suppress(FileNotFoundError):
                opened[f"uploads/{path.name}"] = stack.enter_context(path.open("rb"))
    return opened


def _copy_rows(database: Database, settings: Settings, place: Path) -> Backup:
    """The folder has an SQLite database with the rows as they are at one instant; returns what they name."""
    path = place / "engram.sqlite"
    with disk_errors(path, 0):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    if settings.is_embedded:
        database.copy_to(path)
    target = Database(settings.model_copy(update={"data_dir": place, "database_url": None}))
    try:
        if not settings.is_embedded:
            target.migrate()
            copy_rows(database, target)
        _leave_behind(target)
        wanted = _named(target)
    finally:
        target.close()
    with disk_errors(path, 0), closing(sqlite3.connect(path, isolation_level=None)) as connection:
        # The copy is one file, and what was deleted is not to be found in its free pages.
        connection.execute("PRAGMA journal_mode=DELETE")
        connection.execute("VACUUM")
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    fsync_path(path)
    return wanted.model_copy(update={"database_sha256": sha256})


def copy_rows(source: Database, target: Database) -> None:
    """The empty tables of `target` hold what those of `source` hold, at one instant.

    Raises:
        StorageFull, Unavailable: a database does not answer.
    """
    tables: list[Table] = Base.metadata.sorted_tables
    with source.reading() as reading, target.session() as writing:
        for table in tables:
            for rows in reading.execute(select(table)).mappings().partitions(_ROWS):
                writing.execute(insert(table), [dict(row) for row in rows])


def _leave_behind(target: Database) -> None:
    """The copy has what a service is to begin with: the newest generations, and ingests that nobody works on."""
    with target.session() as session:
        for left in _LEFT_BEHIND:
            session.execute(delete(left))
        ended = select(PackRow.buffer, func.max(PackRow.until)).where(PackRow.until.is_not(None))
        for buffer, until in session.execute(ended.group_by(PackRow.buffer)).all():
            named = update(BufferRow).where(BufferRow.name == buffer, BufferRow.oldest_generation < until)
            session.execute(named.values(oldest_generation=until))
        session.execute(delete(PackRow).where(PackRow.until.is_not(None)))
        session.execute(update(IngestRow).values(is_kept=False))
        ingest.release_everything(session)


def _named(copied: Database) -> Backup:
    """What the rows of a copy name."""
    with copied.reading() as session:
        packs = session.execute(select(PackRow.digest, PackRow.bytes).distinct()).all()
        models = session.execute(select(ExtractorRow.sha256, ExtractorRow.bytes)).all()
        samples = session.scalars(select(TaskRow.sample).where(TaskRow.sample.is_not(None)).distinct()).all()
        waiting = select(IngestRow.id, IngestRow.body_sha256, IngestRow.body_bytes)
        uploads = session.execute(waiting.where(IngestRow.state.in_(ingest.ACTIVE))).all()
    return Backup(
        version=__version__,
        made_at=datetime.now(UTC),
        database_sha256="",
        packs={row.digest: row.bytes for row in packs},
        extractors={row.sha256: row.bytes for row in models},
        samples=[sample for sample in samples if sample is not None],
        uploads={row.id: (row.body_sha256, row.body_bytes) for row in uploads},
    )


def _has(path: Path, size: int | None) -> bool:
    try:
        return path.stat().st_size == size or size is None
    except FileNotFoundError:
        return False


def _check_place(folder: Path, settings: Settings) -> None:
    place, data = folder.absolute().resolve(), settings.data_dir.absolute().resolve()
    if place == data or place.is_relative_to(data) or data.is_relative_to(place):
        raise Conflict(
            f"{folder} and the data folder {settings.data_dir} lie in one another; a backup belongs elsewhere, on "
            "another disk"
        )


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Inside the block this is the only backup to the folder.

    Raises:
        Conflict: there is another one.
    """
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Conflict(f"another backup to {folder} is under way") from None
        yield
    finally:
        os.close(lock)


def _clear(folder: Path) -> None:
    """What backups that died have left is gone."""
    for place in folder.iterdir():
        if _NAME.fullmatch(place.name) and not (place / _LIST).exists():
            shutil.rmtree(place)
    for path in _files(folder):
        if path.name.startswith("."):
            path.unlink()


def _prune(folder: Path, keep: int) -> None:
    """Only the newest copies are left, and the files that they need."""
    names = complete(folder)
    for name in names[:-keep]:
        # Without its list it is no copy any more, whatever happens then.
        (folder / name / _LIST).unlink()
        shutil.rmtree(folder / name)
    settings = Settings(data_dir=folder)
    needed = {file.name for name in names[-keep:] for file in files_of(read(folder, name), settings)}
    for path in _files(folder):
        if str(path.relative_to(folder)) not in needed:
            path.unlink()


def _files(folder: Path) -> Iterator[Path]:
    for pattern in ("packs/*/*", "extractors/*", "samples/*", "uploads/*"):
        yield from folder.glob(pattern)
