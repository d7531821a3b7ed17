"""Services and workers are killed with SIGKILL at 50 random instants while clients use them; KILLS=200 for as many.

Two services run side by side. One client uploads to each, another one draws, mirrors, and registers extractors. Of
each five kills three hit the workers and one the service and its workers together, some time after an ingest was being
worked on; one hits the service at any time, mostly while it starts or receives. After every kill the data folder is
inspected as the dead left it, and at the end every promise is called in:

- every acknowledged upload was committed, once: the counts of images seen and of generations agree;
- at every generation the packs are on disk, verify, are of one quality, and together within the budget;
- every draw of a generation was what it had been before, and a mirror's is the service's;
- every extractor that was acknowledged is there;
- nothing is left over once the collector has run.

Migrations and registrations are killed at every statement and file operation by `tests.service.deaths`.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import httpx
import numpy as np
import psutil
import pytest
from sqlalchemy import select

from engram import pack
from engram.client import Client
from engram.errors import EngramError
from engram.mirror import Mirror
from engram.schemas import Ingest, IngestOptions
from engram_service.collect import collect
from engram_service.database import Database
from engram_service.ingest import ACTIVE
from engram_service.settings import Settings
from engram_service.storage import PackStore
from engram_service.tables import ExtractorRow, IngestRow, PackRow, TaskRow
from tests.contents import pictures
from tests.models import model
from tests.servers import ServiceProcess, environment

BUDGET_BYTES = 6000
KILLS = int(os.environ.get("KILLS", "50"))
SERVICES = 2
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


@dataclass
class Uses:
    """A client that draws, mirrors and registers extractors until it is told to stop, and compares what it gets."""

    service: ServiceProcess
    folder: Path
    ended: threading.Event = field(default_factory=threading.Event)
    draws: int = 0
    mirrored: int = 0
    extractors: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    _bodies: dict[str, bytes] = field(default_factory=dict)

    def run_draws(self) -> None:
        while not self.ended.is_set():
            try:
                with Client(self.service.url, retries=0) as client:
                    mirror = Mirror(client, "b", self.folder)
                    while not self.ended.is_set():
                        self.draw(client, mirror)
            except (EngramError, httpx.TransportError) as error:
                self.errors[f"{type(error).__name__}: {error}"[:80]] += 1
                time.sleep(0.02)

    def run_registrations(self) -> None:
        while not self.ended.is_set():
            try:
                with Client(self.service.url, retries=0) as client:
                    made = client.register_extractor(model(seed=len(self.extractors) % 20))
                    self.extractors.append(made.sha256)
            except EngramError:
                time.sleep(0.02)

    def draw(self, client: Client, mirror: Mirror) -> None:
        mirror.refresh()
        if mirror.generation == 0:
            return
        for seed in range(5):
            query = f"size=8&seed={seed}&generation={mirror.generation}"
            answer = httpx.get(f"{self.service.url}/v1/buffers/b/draw?{query}")
            if answer.status_code != 200:
                return
            self.draws += 1
            if self._bodies.setdefault(query, answer.content) != answer.content:
                self.wrong.append(f"{query} gave other bytes than before")
            drawn = client.draw("b", 8, seed=seed, generation=mirror.generation)
            copied = mirror.draw(8, seed=seed)
            if drawn.images.tobytes() != copied.images.tobytes():
                self.wrong.append(f"{query} gave another batch than the mirror")
            self.mirrored += 1


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


def wait_for_draws(uses: Uses) -> None:
    """Somebody draws from the service as it runs now, or there has been nothing to draw for a while."""
    before, deadline = uses.draws, time.monotonic() + 10
    while uses.draws == before and time.monotonic() < deadline:
        time.sleep(0.01)


def check_budget(database: Database, store: PackStore) -> int:
    """At every generation that is left: packs on disk, of one quality, within the budget; returns the last one."""
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
    """Kill a service and its workers some times; returns how many uploads and attempts there were."""
    generator = random.Random(seed)
    service = ServiceProcess(folder, lease_s=0.5, worker_poll_s=0.02, max_attempts=50)
    database, store = Database(service.settings), PackStore(service.settings.packs_dir)
    uploads, uses = Uploads(service, seed), Uses(service, folder / "mirror")
    runs = (uploads.run, uses.run_draws, uses.run_registrations)
    threads = [threading.Thread(target=run) for run in runs]
    for thread in threads:
        thread.start()
    try:
        for number in range(KILLS // SERVICES):
            target = TARGETS[number % len(TARGETS)]
            if target != "service":
                wait_for_draws(uses)
                wait_for_work(database)
            # Several times what an ingest takes, so that any moment of one is hit, and some get through.
            time.sleep(generator.uniform(0, 0.8))
            kill(service, target)
            check_budget(database, store)
            if target != "worker":
                service.start()
    finally:
        uploads.ended.set()
        uses.ended.set()
        for thread in threads:
            thread.join()
    try:
        with Client(service.url) as client:
            ended = [client.wait(one, timeout_s=PATIENCE_S) for one in uploads.acknowledged]
            Mirror(client, "b", folder / "mirror")
    finally:
        service.stop()
    assert uses.wrong == []
    assert uses.draws > 0, uses.errors
    assert uses.mirrored > 0, uses.errors
    for digest in uses.extractors:
        assert hashlib.sha256((service.settings.extractors_dir / digest).read_bytes()).hexdigest() == digest
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
    with database.reading() as session:
        named = set(session.scalars(select(ExtractorRow.sha256)))
    assert {path.name for path in settings.extractors_dir.iterdir()} == named
    assert {path.suffix for path in settings.packs_dir.glob("*/*")} <= {"", ".index"}
    # What a dead mirror left, the next one removes after an hour.
    packs_of_mirror = settings.data_dir.parent / "mirror" / "packs"
    assert {path.stem for path in packs_of_mirror.iterdir() if path.suffix != ".tmp"} <= {row.digest for row in packs}
    return sum(row.attempts for row in rows)


@pytest.mark.slow
@pytest.mark.timeout(60 + 20 * KILLS)
def test_killing_anything_at_any_time_loses_no_acknowledged_upload_and_never_exceeds_the_budget(
    tmp_path: Path,
) -> None:
    folders = [tmp_path / str(number) for number in range(SERVICES)]
    for folder in folders:
        folder.mkdir()
    with ThreadPoolExecutor(len(folders)) as pool:
        results = list(pool.map(torment, folders, range(1, SERVICES + 1)))
    # Uploads got through between the kills, and kills hit uploads: the test has tested something.
    assert sum(uploads for uploads, _ in results) >= 10
    assert sum(attempts for _, attempts in results) > sum(uploads for uploads, _ in results)


def deaths(name: str, folder: Path, points: str) -> dict[str, int]:
    """What was left by processes that died in the middle of this work, counted."""
    command = [sys.executable, "-m", "tests.service.deaths", name, str(folder), *points.split()]
    ended = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout.splitlines()[-1])
    assert sum(found["left"].values()) == found["deaths"] > 0
    left: dict[str, int] = found["left"]
    return left


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "left", "points"),
    [
        ("migrate", {"outdated"}, ""),
        ("register", {"registered", "not yet"}, ""),
        ("mirror", {"whole"}, ""),
        # Two backups take some hundred steps, and each is followed by others, and by restores.
        ("backup", {"0", "1", "2"}, "60"),
    ],
)
def test_whatever_is_killed_at_any_step_leaves_what_the_next_one_can_use(
    tmp_path: Path, name: str, left: set[str], points: str
) -> None:
    assert set(deaths(name, tmp_path, points)) == left
