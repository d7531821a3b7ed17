"""Tells whether workers are alive: each has a row with a counter, which its supervisor counts up while it shows life.

Readers compare counters with what they were, by their own stopwatch: clocks of machines differ and are set.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session

from .settings import Settings
from .tables import WorkerRow

FORGET_S = 86_400.0
"""How long the row of a worker stays whose supervisor was killed: for a person to see when it was last alive."""


@dataclass(frozen=True)
class Identity:
    """Which process a worker is. `name` is unique for ever and stands in the ingests that it holds."""

    name: str
    host: str
    pid: int


class Liveness:
    """Whether workers are alive, for one reader who looks now and then."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._beats: Mapping[str, int] = {}
        self._alive_at = time.monotonic()

    def problem(self, session: Session) -> str | None:
        """What is wrong with the workers, None if nothing is.

        Of a service that runs no workers nothing is known to be wrong. Workers have `worker_silent_s` to start.
        """
        beats = {row.name: row.beat for row in session.scalars(select(WorkerRow))}
        now = time.monotonic()
        if beats.items() - self._beats.items():
            self._alive_at = now
        self._beats = beats
        silent_s = now - self._alive_at
        if self._settings.workers == 0 or silent_s <= self._settings.worker_silent_s:
            return None
        return (
            f"no worker has been alive for {silent_s:.0f} s: uploads are taken and wait; the service's log says why "
            "workers end"
        )


def report(session: Session, workers: Iterable[Identity]) -> None:
    """These workers are alive."""
    now = time.time()
    for worker in workers:
        alive = update(WorkerRow).where(WorkerRow.name == worker.name).values(beat=WorkerRow.beat + 1, seen_at=now)
        if session.execute(alive).rowcount == 0:  # type: ignore[attr-defined]
            row = WorkerRow(name=worker.name, host=worker.host, pid=worker.pid, beat=1, started_at=now, seen_at=now)
            session.add(row)
    session.execute(delete(WorkerRow).where(WorkerRow.seen_at < now - FORGET_S))


def forget(session: Session, worker: Identity) -> None:
    """The worker has ended."""
    session.execute(delete(WorkerRow).where(WorkerRow.name == worker.name))
