"""Services and workers are killed with SIGKILL at 50 random instants while a client uploads to them.

Two services run side by side. Of each five kills three hit the worker and one the service and its worker together, some
time after an ingest was being worked on; one hits the service at any time, mostly while it starts or receives. After
every kill the data folder is inspected as the dead left it, and at the end every promise is called in:

- every acknowledged upload was committed, once: the counts of images seen and of generations agree;
- at every generation the packs are on disk, verify, are of one quality, and together within the budget;
- nothing is left over once the collector has run.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import psutil
import pytest
from sqlalchemy import select

from engram import pack
from engram.client import Client
from engram.errors import EngramError
from engram.schemas import Ingest, IngestOptions
from engram_service.collect import collect
from engram_service.database import Database
from engram_service.ingest import ACTIVE
from engram_service.settings import Settings
from engram_service.storage import PackStore
from engram_service.tables import IngestRow, PackRow, TaskRow
from tests.contents import pictures
from tests.servers import ServiceProcess

BUDGET_BYTES = 6000
KILLS_PER_SERVICE = 25
PATIENCE_S = 60.0
Target = Literal["worker", "service", "both"]
TARGETS: tuple[Target, ...] = ("worker", "both", "worker", "service", "worker")


@dataclass
class Uploads:
    """A client that uploads until it is told to stop, and remembers what was acknowledged."""

    service: ServiceProcess
    seed: int
    ended: threading.Event = field(default_factory=threading.Event)
    acknowledged: list[Ingest] = field(default_factory=list)

    def run(self) -> None:
        number = 0
        while not self.ended.is_set():
            try:
                with Client(self.service.url, retries=0) as client:
                    client.create_buffer("b", budget_bytes=BUDGET_BYTES, exist_ok=True)
                    while not self.ended.is_set():
                        self.acknowledged.append(self.send(client, number))
                        number += 1
                        # Enough waits to keep the worker busy; what is left over has to be processed at the end.
                        while not self.ended.is_set() and self.waiting(client) > 2:
                            time.sleep(0.05)
            except EngramError:
                time.sleep(0.02)

    def send(self, client: Client, number: int) -> Ingest:
        """Upload `number` of its kind: the same images, classes and key however often it is repeated."""
        task = number % 7
        class_ids = 2 * task + np.arange(12) % 2
        images = pictures(1000 * self.seed + number, 12)
        options = IngestOptions(candidates=(25, 75), ranking="herding" if number % 2 else "ring")
        return client.upload("b", task, images, class_ids, options=options, idempotency_key=f"upload {number}")

    def waiting(self, client: Client) -> int:
        return sum(client.ingest(one).state in ACTIVE for one in self.acknowledged[-3:])


def kill(service: ServiceProcess, target: Target) -> None:
    """SIGKILL, also to what only the service could have told to stop."""
    workers = []
    with suppress(psutil.NoSuchProcess):
        workers = psutil.Process(service.process.pid).children()
    if target != "worker":
        service.process.kill()
    if target != "service":
        for worker in workers:
            with suppress(ProcessLookupError):
                os.kill(worker.pid, signal.SIGKILL)
    if target != "worker":
        service.process.wait(PATIENCE_S)


def wait_for_work(database: Database) -> None:
    """An ingest is being worked on, or has not been for longer than a worker takes to start."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        with database.reading() as session:
            if session.scalars(select(IngestRow.id).where(IngestRow.state.in_(ACTIVE[1:])).limit(1)).first():
                return
        time.sleep(0.01)


def check_budget(database: Database, store: PackStore) -> int:
    """At every generation so far: packs on disk, of one quality, within the budget; returns the last generation."""
    with database.reading() as session:
        rows = list(session.scalars(select(PackRow)))
    for digest, size in {(row.digest, row.bytes) for row in rows}:
        assert store.path(digest).stat().st_size == size
    last = max((row.since for row in rows), default=0)
    for generation in range(1, last + 1):
        live = [row for row in rows if row.since <= generation < (row.until or generation + 1)]
        assert 0 < sum(row.bytes for row in live) <= BUDGET_BYTES
        assert len({row.task for row in live}) == len(live)
        assert len({row.quality for row in live}) == 1
    return last


def torment(folder: Path, seed: int) -> tuple[int, int]:
    """Kill a service and its workers `KILLS_PER_SERVICE` times; returns how many uploads and attempts there were."""
    generator = random.Random(seed)
    service = ServiceProcess(folder, lease_s=0.5, worker_poll_s=0.02, max_attempts=50)
    database, store = Database(service.settings), PackStore(service.settings.packs_dir)
    uploads = Uploads(service, seed)
    uploading = threading.Thread(target=uploads.run)
    uploading.start()
    try:
        for number in range(KILLS_PER_SERVICE):
            target = TARGETS[number % len(TARGETS)]
            if target != "service":
                wait_for_work(database)
            # Several times what an ingest takes, so that any moment of one is hit, and some get through.
            time.sleep(generator.uniform(0, 0.8))
            kill(service, target)
            check_budget(database, store)
            if target != "worker":
                service.start()
    finally:
        uploads.ended.set()
        uploading.join()
    try:
        with Client(service.url) as client:
            ended = [client.wait(one, timeout_s=PATIENCE_S) for one in uploads.acknowledged]
    finally:
        service.stop()
    attempts = check_promises(database, store, service.settings, ended)
    database.close()
    return len(ended), attempts


def check_promises(database: Database, store: PackStore, settings: Settings, ended: list[Ingest]) -> int:
    """What the module docstring says; returns how many attempts were needed."""
    last = check_budget(database, store)
    assert {one.state for one in ended} == {"committed"}
    with database.reading() as session:
        rows = list(session.scalars(select(IngestRow)))
        tasks = list(session.scalars(select(TaskRow)))
        packs = list(session.scalars(select(PackRow)))
    # The last upload may have been received without the client having heard of it, and be waiting still.
    committed = [row for row in rows if row.state == "committed"]
    assert {one.id for one in ended} <= {row.id for row in committed}
    assert 0 <= len(rows) - len(ended) <= 1
    assert sorted(row.generation or 0 for row in committed) == list(range(1, last + 1))
    assert sum(sum(task.seen.values()) for task in tasks) == 12 * len(committed)
    for row in packs:
        assert pack.digest(store.get(row.digest)) == row.digest
        assert len(pack.parse(store.get(row.digest))) == row.exemplars
    collect(database, store, settings.model_copy(update={"grace_s": 0.0}))
    with database.reading() as session:
        live = set(session.scalars(select(PackRow.digest)))
    assert {digest for digest, _ in store.digests()} == live
    waiting = {f"{row.id}.tar" for row in rows if row.state in ACTIVE}
    assert {path.name for path in settings.spool_dir.iterdir()} == waiting
    return sum(row.attempts for row in rows)


@pytest.mark.slow
def test_killing_anything_at_any_time_loses_no_acknowledged_upload_and_never_exceeds_the_budget(
    tmp_path: Path,
) -> None:
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
    with ThreadPoolExecutor(len(folders)) as pool:
        results = list(pool.map(torment, folders, (1, 2)))
    # Uploads got through between the kills, and kills hit uploads: the test has tested something.
    assert sum(uploads for uploads, _ in results) >= 10
    assert all(attempts > uploads for uploads, attempts in results)
