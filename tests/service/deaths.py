"""Kills writers of a service's data folder at every statement and every file operation; run as a program.

    python -m tests.service.deaths migrate|register|mirror|backup FOLDER [POINTS]

A process dies by SIGKILL at its n-th step: an SQL statement, or an audited call (open, rename, remove, mkdir, link).
`POINTS` such n are tried, chosen at random; without it all are. After every death the folder is inspected, and the work
is done again, to the end. What a test has to know is printed as a line of JSON.
"""

from __future__ import annotations

import asyncio
import atexit
import hashlib
import json
import os
import random
import shutil
import signal
import sqlite3
import sys
import traceback
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import closing
from itertools import count
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, event, text

from engram.client import Client
from engram.mirror import Mirror
from engram_service import backup, buffers, extractors
from engram_service.app import open_database
from engram_service.collect import collect
from engram_service.database import Database
from engram_service.restore import restore
from engram_service.settings import Settings
from engram_service.storage import PackStore
from tests.contents import create, fill
from tests.models import model
from tests.servers import ServiceProcess
from tests.uploads import queue

CALLS = ("open", "os.rename", "os.remove", "os.mkdir", "os.link")
MODEL = model()
UPLOAD = b"an upload that waits"
URLS: list[str] = []
DIGEST = hashlib.sha256(MODEL).hexdigest()


def die_after(steps: int) -> None:
    """This process is killed at that step."""
    left = count(steps, -1)

    def step(*_: object) -> None:
        if next(left) == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(lambda name, _: step() if name in CALLS else None)
    # Every statement that SQLite runs, BEGIN and COMMIT among them.
    event.listen(Engine, "connect", lambda connection, _: connection.set_trace_callback(step))


def is_killed(work: Callable[[Settings], object], settings: Settings, steps: int) -> bool:
    """A child does the work unless it dies before."""
    child = os.fork()
    if child == 0:
        try:
            die_after(steps)
            work(settings)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the work failed"
    return os.WIFSIGNALED(status)


def migrate(settings: Settings) -> None:
    database = Database(settings)
    database.migrate()
    database.close()


def check_migration(settings: Settings) -> str:
    """What the dead left is a database of the old schema or of the new one, with everything that was in it."""
    database = Database(settings)
    state = database.schema_state()
    assert state in ("outdated", "current"), state
    migrate(settings)
    database.check()
    with database.reading() as session:
        assert session.execute(text("SELECT name, budget_bytes FROM buffers")).all() == [("b", 1000)]
        assert session.execute(text("SELECT buffer, task FROM tasks ORDER BY task")).all() == [("b", 0), ("b", 1)]
        assert session.execute(text("SELECT id, state FROM ingests")).all() == [("i", "received")]
    database.close()
    return state


def old_folder(settings: Settings) -> None:
    """A data folder of the first version."""
    settings.make_folders()
    database = Database(settings)
    database.migrate("0001")
    with database.session() as session:
        for statement in (
            "INSERT INTO buffers VALUES ('b', 1000, 'buffer', 'class', '4:2:0', 3, 3, 16, 16, 3, 1700000000.0)",
            "INSERT INTO tasks VALUES ('b', 0, 50, 'ring', '{\"7\": 12}', '{\"quality\": 50}')",
            "INSERT INTO tasks VALUES ('b', 1, 50, 'ring', '{\"8\": 12}', NULL)",
            "INSERT INTO ingests (id, buffer, task, state, body_sha256, body_bytes, options, images_total, images_done,"
            " attempts, created_at, updated_at) VALUES ('i', 'b', 0, 'received', 'ab', 5, '{}', 0, 0, 0, 1.0, 1.0)",
        ):
            session.connection().exec_driver_sql(statement)
    database.close()


def register(settings: Settings) -> None:
    async def body() -> AsyncIterator[bytes]:
        yield MODEL

    database = open_database(settings)
    asyncio.run(extractors.register(database, settings, extractors.Turns(settings), DIGEST, body()))
    database.close()


def check_registration(settings: Settings) -> str:
    """A row of an extractor has its file, whole; registering it again works; nothing is left over."""
    file = extractors.path(settings, DIGEST)
    with closing(sqlite3.connect(settings.data_dir / "engram.sqlite")) as connection:
        (rows,) = connection.execute("SELECT count(*) FROM extractors").fetchone()
    assert rows == 0 or file.read_bytes() == MODEL
    assert not file.exists() or file.read_bytes() == MODEL
    register(settings)
    assert file.read_bytes() == MODEL
    database = open_database(settings)
    collect(database, PackStore(settings.packs_dir), settings.model_copy(update={"grace_s": 0.0}))
    database.close()
    assert [path.name for path in settings.extractors_dir.iterdir()] == [DIGEST]
    return "registered" if rows else "not yet"


def served_folder(settings: Settings) -> None:
    """A data folder with some packs, which a service serves until this program ends."""
    empty_folder(settings)
    database = Database(settings)
    create(database)
    for task in range(3):
        fill(database, settings, task, {task: 5})
    database.close()
    service = ServiceProcess(settings.data_dir.parent, workers=0, data_dir=settings.data_dir)
    atexit.register(service.kill)
    URLS.append(service.url)


def mirror(settings: Settings) -> None:
    with Client(URLS[0]) as client:
        Mirror(client, "b", settings.data_dir / "mirror")


def check_mirror(settings: Settings) -> str:
    """The next mirror of the folder draws what the service draws, and what the dead one left is gone in time."""
    folder = settings.data_dir / "mirror"
    left = list((folder / "packs").glob(".*.tmp"))
    for path in left:
        os.utime(path, (1, 1))
    with Client(URLS[0]) as client:
        copy = Mirror(client, "b", folder)
        assert copy.draw(8).images.tobytes() == client.draw("b", 8).images.tobytes()
        digests = {pack.digest for pack in copy.manifest.packs}
    assert {path.stem for path in (folder / "packs").iterdir()} == digests, left
    return "whole"


def filled_folder(settings: Settings) -> None:
    """A data folder with two packs and a waiting upload."""
    empty_folder(settings)
    database = Database(settings)
    create(database)
    for task in range(2):
        fill(database, settings, task, {task: 5})
    queue(database, settings, UPLOAD, task=2)
    database.close()


def backups_of(settings: Settings) -> Path:
    return settings.data_dir.with_name(f"{settings.data_dir.name}-backups")


def back_up_twice(settings: Settings) -> None:
    for _ in range(2):
        database = Database(settings)
        backup.back_up(database, settings, backups_of(settings), keep=1)
        database.close()


def check_backups(settings: Settings) -> str:
    """What can be restored is whole, an earlier copy stays until there is another, and the next one tidies up."""
    folder = backups_of(settings)
    names = backup.complete(folder) if folder.exists() else []
    for name in names:
        check_copy(settings, folder, name)
    back_up_twice(settings)
    (name,) = backup.complete(folder)
    check_copy(settings, folder, name)
    parts = {file.name for file in backup.files_of(backup.read(folder, name), settings)}
    parts |= {f"{name}/engram.sqlite", f"{name}/backup.json"}
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == parts
    shutil.rmtree(folder)
    return f"{len(names)}"


def check_copy(settings: Settings, folder: Path, name: str) -> None:
    place = Settings(data_dir=settings.data_dir.with_name(f"{settings.data_dir.name}-restored"))
    restore(place, folder, name=name)
    database = Database(place)
    with database.reading() as session:
        digests = [pack.digest for pack in buffers.manifest(session, "b").packs]
        (waiting,) = session.execute(text("SELECT id FROM ingests WHERE state = 'received' AND task = 2")).scalars()
    database.close()
    assert len(digests) == 2
    for digest in digests:
        assert hashlib.sha256(PackStore(place.packs_dir).get(digest)).hexdigest() == digest
    assert (place.spool_dir / f"{waiting}.tar").read_bytes() == UPLOAD
    shutil.rmtree(place.data_dir)


def empty_folder(settings: Settings) -> None:
    """A data folder of this version."""
    open_database(settings).close()


WORK: dict[str, tuple[Callable[[Settings], None], Callable[[Settings], None], Callable[[Settings], str]]] = {
    "migrate": (old_folder, migrate, check_migration),
    "register": (empty_folder, register, check_registration),
    "mirror": (served_folder, mirror, check_mirror),
    "backup": (filled_folder, back_up_twice, check_backups),
}


def main(name: str, scratch: Path, points: int | None) -> dict[str, Any]:
    prepare, work, check = WORK[name]

    def fresh(place: Path) -> Settings:
        settings = Settings(data_dir=place)
        shutil.copytree(prepared.data_dir, place)
        return settings

    prepared = Settings(data_dir=scratch / "prepared")
    prepare(prepared)
    # What is imported and made once is not to be counted.
    check(warm := fresh(scratch / "warm"))
    shutil.rmtree(warm.data_dir)
    total = next(n for n in count(20, 20) if not is_killed(work, fresh(scratch / f"whole-{n}"), n))
    chosen = sorted(random.Random(0).sample(range(total), min(points, total))) if points else range(total)
    found: Counter[str] = Counter()
    for n in chosen:
        settings = fresh(scratch / f"at-{n}")
        if is_killed(work, settings, n):
            found[check(settings)] += 1
        shutil.rmtree(settings.data_dir)
    return {"deaths": found.total(), "left": dict(found)}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else None)))
