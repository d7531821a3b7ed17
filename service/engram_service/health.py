"""Says what keeps the service from working: its data folder, its database, its workers.

Each check returns sentences for an operator, none where all is well. Uploads, draws and changes need all three, so
`/readyz` refuses if there is a sentence; `/healthz` only repeats them.
"""

from __future__ import annotations

import os

from engram.errors import EngramError

from .database import Database
from .liveness import Liveness
from .settings import Settings
from .storage import Reserve


def problems(database: Database, settings: Settings, liveness: Liveness) -> list[str]:
    """What is wrong now, as sentences."""
    found = [*disk(settings), *metadata(database)]
    # Workers are known from the database.
    return found or workers(database, liveness)


def disk(settings: Settings) -> list[str]:
    """What is wrong with the data folder: missing, read-only or full. Its reserve is made again where it has to be."""
    missing = [str(folder) for folder in settings.folders if not folder.is_dir()]
    if missing:
        return [f"the data folder is not there, or not whole: {', '.join(missing)} is missing"]
    closed = [str(folder) for folder in settings.folders if not os.access(folder, os.R_OK | os.W_OK | os.X_OK)]
    if closed:
        return [f"the data folder cannot be written to: {', '.join(closed)} is read-only for this process"]
    try:
        is_whole = Reserve(settings.reserve_path, settings.reserve_bytes).keep()
    except EngramError as error:
        return [error.message]
    disk = os.statvfs(settings.data_dir)
    free_bytes = disk.f_bavail * disk.f_frsize
    if is_whole and free_bytes >= settings.reserve_bytes:
        return []
    return [
        f"the disk of {settings.data_dir} is full: {free_bytes} bytes are free, {settings.reserve_bytes} are needed "
        "(ENGRAM_RESERVE_BYTES). Delete tasks or buffers or lower budgets, which still works"
    ]


def metadata(database: Database) -> list[str]:
    """What is wrong with the database: it does not answer, is corrupt, gone, or of another version."""
    try:
        database.check()
    except EngramError as error:
        return [error.message]
    return []


def workers(database: Database, liveness: Liveness) -> list[str]:
    """What is wrong with the workers: none has been alive for too long."""
    try:
        with database.reading() as session:
            problem = liveness.problem(session)
    except EngramError as error:
        return [error.message]
    return [] if problem is None else [problem]
