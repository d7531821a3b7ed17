"""Makes a data folder of a backup (`backup`), for a service that is started on it afterwards.

The rows come last, in one step: a restore that was cut short leaves a folder that no service starts on. Every byte is
compared with its digest. A copy that an older version made is brought to the schema of this one; one of a newer version
is refused.

Buffers get another time of creation, by less than a second. A service that goes on from a backup counts the same
generations again that were lost, with other content; mirrors tell the two apart by that time, which is in entity tags.
"""

from __future__ import annotations

import random
import shutil
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError
from sqlalchemy import BigInteger, Integer, func, select, text, update

from engram.errors import Conflict, NotFound, StripCorrupt, Unavailable
from engram.files import disk_errors, fsync_path
from engram.schemas import first_fault

from . import __version__, audit, backup
from .backup import Backup, Progress
from .database import Database
from .settings import Settings
from .tables import Base, BufferRow, TokenRow

WAITING = "restoring"
"""Where the rows are until all else is there; no service looks for them in it, nor starts beside it."""

_OF_THE_DISK = "lost+found"
"""A disk of its own may come with this folder."""


@dataclass(frozen=True)
class Restored:
    """What was restored. `left_out` are files that were damaged or missing in the backup, or when it was made; `tokens`
    counts those that are good, as they were then."""

    name: str
    made: Backup
    was_outdated: bool
    left_out: list[str]
    tokens: int


def restore(
    settings: Settings,
    folder: Path,
    *,
    name: str | None = None,
    leave_out_damaged: bool = False,
    progress: Progress = lambda done, of: None,
) -> Restored:
    """The data folder, which was empty, and the database hold what a copy holds.

    Args:
        settings: of the service to be.
        folder: of backups.
        name: of a copy in it; None is the newest that is complete.
        leave_out_damaged: go on without the files of the copy that are damaged or missing.
        progress: told how far it is.

    Raises:
        NotFound: there is no such copy, or it is not complete.
        Conflict: the data folder or the database is not empty, or the copy was made by a newer version.
        StripCorrupt: a file of the copy is missing or damaged.
        StorageFull, Unavailable: a disk or the database does not do its part. The data folder is empty again.
    """
    name, made = _chosen(folder, name)
    _check_empty(settings)
    settings.make_folders()
    waiting = settings.model_copy(update={"data_dir": settings.data_dir / WAITING, "database_url": None})
    try:
        was_outdated, tokens = _prepare_rows(folder / name, waiting, made)
        left_out = _copy_files(settings, folder, made, leave_out_damaged, progress)
        _put_rows(settings, waiting)
    except BaseException:
        for place in settings.data_dir.iterdir():
            if place.name != _OF_THE_DISK:
                shutil.rmtree(place) if place.is_dir() else place.unlink()
        raise
    return Restored(name, made, was_outdated, sorted({*left_out, *made.damaged}), tokens)


def _chosen(folder: Path, name: str | None) -> tuple[str, Backup]:
    names = backup.complete(folder)
    if not names:
        raise NotFound(f"there is no complete backup in {folder}")
    chosen = names[-1] if name is None else name
    if chosen not in names:
        raise NotFound(f"there is no complete backup {chosen!r} in {folder}, only {', '.join(names)}")
    try:
        return chosen, backup.read(folder, chosen)
    except ValidationError as error:
        raise Conflict(
            f"this version ({__version__}) does not know what backup {chosen} consists of ({first_fault(error)}); "
            "was it made by a newer one?"
        ) from error
    except OSError as error:
        raise Unavailable(f"the disk does not give backup {chosen}: {error}") from error


def _check_empty(settings: Settings) -> None:
    held = [path.name for path in settings.data_dir.glob("*")] if settings.data_dir.exists() else []
    held = sorted(name for name in held if name != _OF_THE_DISK)
    if held:
        raise Conflict(
            f"the data folder {settings.data_dir} is not empty ({', '.join(held[:3])}); stop the service that uses it, "
            "move it away, and restore to an empty one"
        )
    if not settings.is_embedded:
        database = Database(settings)
        try:
            state = database.schema_state()
        finally:
            database.close()
        if state != "empty":
            raise Conflict("the database has tables already; create an empty one and restore to that")


def _prepare_rows(place: Path, waiting: Settings, made: Backup) -> tuple[bool, int]:
    """The rows wait beside what they name, in the schema of this version.

    Returns whether they had an older one, and how many tokens are good.
    """
    path = waiting.data_dir / "engram.sqlite"
    source = place / "engram.sqlite"
    with disk_errors(path, 0):
        waiting.data_dir.mkdir(mode=0o700)
    try:
        with source.open("rb") as file:
            backup.copy(file, path, backup.File("engram.sqlite", source, made.database_sha256, source.stat().st_size))
    except FileNotFoundError:
        raise StripCorrupt(f"the backup has no {source}") from None
    database = Database(waiting)
    try:
        state = database.schema_state()
        if state not in ("current", "outdated"):
            raise Conflict(
                f"the backup was made by engram {made.version}, whose schema this version ({__version__}) does "
                "not know; restore it with that version or a newer one"
            )
        if state == "outdated":
            database.migrate()
        with database.session() as session:
            for row in session.scalars(select(BufferRow)).all():
                another = int(row.created_at) + random.SystemRandom().randrange(1, 10**6) / 10**6
                session.execute(update(BufferRow).where(BufferRow.name == row.name).values(created_at=another))
            audit.record(session, "service.restore", subject=place.name)
            good = select(func.count()).select_from(TokenRow).where(TokenRow.revoked_at.is_(None))
            tokens = session.scalar(good) or 0
    finally:
        database.close()
    return state == "outdated", tokens


def _copy_files(
    settings: Settings, folder: Path, made: Backup, leave_out_damaged: bool, progress: Progress
) -> list[str]:
    files = [file for file in backup.files_of(made, settings) if file.name not in made.damaged]
    left_out: list[str] = []
    for number, file in enumerate(files):
        progress(number, len(files))
        try:
            with (folder / file.name).open("rb") as source:
                backup.copy(source, file.path, file)
        except (FileNotFoundError, StripCorrupt) as error:
            what = f"{file.name} is missing" if isinstance(error, FileNotFoundError) else str(error)
            if not leave_out_damaged:
                raise StripCorrupt(
                    f"the backup is damaged: {what}. --leave-out-damaged restores the rest; an older copy may be whole"
                ) from error
            left_out.append(file.name)
    for place in {file.path.parent for file in files}:
        if place.exists():
            fsync_path(place)
    progress(len(files), len(files))
    return left_out


def _put_rows(settings: Settings, waiting: Settings) -> None:
    """The rows are where a service looks for them."""
    path = waiting.data_dir / "engram.sqlite"
    for place in settings.folders:
        fsync_path(place)
    if settings.is_embedded:
        with disk_errors(settings.data_dir, 0):
            path.replace(settings.data_dir / path.name)
            fsync_path(settings.data_dir)
    else:
        source, target = Database(waiting), Database(settings)
        try:
            target.migrate()
            backup.copy_rows(source, target)
            _count_on(target)
        finally:
            source.close()
            target.close()
    shutil.rmtree(waiting.data_dir)


def _count_on(database: Database) -> None:
    """What PostgreSQL numbers by itself it numbers on from what is there."""
    with database.session() as session:
        for table in Base.metadata.sorted_tables:
            (key, *others) = table.primary_key.columns
            if not others and isinstance(key.type, (Integer, BigInteger)):
                session.execute(
                    text(
                        f"SELECT setval(pg_get_serial_sequence('{table.name}', '{key.name}'), "
                        f"(SELECT COALESCE(MAX({key.name}), 1) FROM {table.name}))"
                    )
                )
