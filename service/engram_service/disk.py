"""What the service takes on its disk: sums of rows, and of the few files that are not packs.

Packs are counted from their rows, each once however many buffers share it: walking the files of a large store would
take as long as reading it. Their indexes (some 3 % of them) and the last blocks of files are left out.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from sqlalchemy import case, func, select, text
from sqlalchemy.orm import Session

from engram.oversight import Disk

from .settings import Settings
from .tables import PackRow

_DATABASE_FILES = ("engram.sqlite", "engram.sqlite-wal", "engram.sqlite-shm")


def usage(session: Session, settings: Settings) -> Disk:
    """What everything takes now, in bytes."""
    is_live = func.max(case((PackRow.until.is_(None), 1), else_=0)).label("is_live")
    each = select(PackRow.digest, func.max(PackRow.bytes).label("bytes"), is_live).group_by(PackRow.digest).subquery()
    sums = select(each.c.is_live, func.sum(each.c.bytes)).group_by(each.c.is_live)
    packs = {is_live: int(size) for is_live, size in session.execute(sums)}
    disk = os.statvfs(settings.data_dir)
    return Disk(
        live_bytes=packs.get(1, 0),
        retired_bytes=packs.get(0, 0),
        spool_bytes=_folder_bytes(settings.spool_dir),
        sample_bytes=_folder_bytes(settings.samples_dir),
        extractor_bytes=_folder_bytes(settings.extractors_dir),
        database_bytes=_database_bytes(session, settings),
        free_bytes=disk.f_bavail * disk.f_frsize,
        total_bytes=disk.f_blocks * disk.f_frsize,
    )


def _folder_bytes(folder: Path) -> int:
    total = 0
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):  # an upload that was committed meanwhile
                total += entry.stat(follow_symlinks=False).st_size
    return total


def _database_bytes(session: Session, settings: Settings) -> int:
    if session.get_bind().dialect.name == "postgresql":
        return int(session.scalar(text("SELECT pg_database_size(current_database())")) or 0)
    total = 0
    for name in _DATABASE_FILES:
        with suppress(FileNotFoundError):
            total += (settings.data_dir / name).stat().st_size
    return total
