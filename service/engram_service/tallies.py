"""Count, in the database, what happens in any process: how ingests end, why they fail, how long they take.

A tally grows in the transaction that makes it true. So it misses nothing when a worker is killed, counts the work of
workers on other machines, and goes on counting from where it was after a restart and after a buffer is deleted.

    ingests         by the state that they ended in
    problems        of failed ingests, by the last part of the problem's `type`
    waiting_s       from the upload to the first attempt: "sum", and how often it was at most each of `BOUNDS_S`
    working_s       likewise, from the first attempt to the end
"""

from __future__ import annotations

import time
from bisect import bisect_left
from typing import Any

from sqlalchemy import select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from engram.errors import ERRORS, EngramError

from .tables import IngestRow, TallyRow

BOUNDS_S = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 60.0, 300.0, 900.0, 3600.0)
"""Upper bounds of the buckets of times, but for the last one, which has none and is called "inf"."""

SUM = "sum"
INFINITE = "inf"


def ingest_ended(session: Session, ingest_id: str) -> None:
    """The ingest, whose row says since this transaction that it has ended, is counted."""
    columns = IngestRow.state, IngestRow.problem, IngestRow.created_at, IngestRow.started_at
    state, problem, created_at, started_at = session.execute(select(*columns).where(IngestRow.id == ingest_id)).one()
    now = time.time()
    grown = {("ingests", state): 1.0}
    if state == "failed":
        grown["problems", _slug(problem)] = 1.0
    if started_at is not None:
        # Clocks of machines differ, and a time that ran backwards would make a sum shrink.
        for name, seconds in ("waiting_s", started_at - created_at), ("working_s", now - started_at):
            grown[name, SUM] = max(0.0, seconds)
            grown[name, bucket(seconds)] = 1.0
    add(session, grown)


def bucket(seconds: float) -> str:
    """The label of the bucket that a time belongs to."""
    place = bisect_left(BOUNDS_S, seconds)
    return f"{BOUNDS_S[place]:g}" if place < len(BOUNDS_S) else INFINITE


def add(session: Session, grown: dict[tuple[str, str], float]) -> None:
    """Each tally (name, label) has grown by so much. Make it the last thing that a transaction does."""
    rows = [{"name": name, "label": label, "value": value} for (name, label), value in sorted(grown.items())]
    # In one order for all, so that no two transactions wait for each other.
    for row in rows:
        insert = (sqlite if session.get_bind().dialect.name == "sqlite" else postgresql).insert(TallyRow).values(row)
        session.execute(
            insert.on_conflict_do_update(
                index_elements=[TallyRow.name, TallyRow.label],
                set_={"value": TallyRow.value + insert.excluded.value},
            )
        )


def read(session: Session) -> dict[str, dict[str, float]]:
    """Every tally by name and label."""
    found: dict[str, dict[str, float]] = {}
    for row in session.scalars(select(TallyRow)):
        found.setdefault(row.name, {})[row.label] = row.value
    return found


def _slug(problem: dict[str, Any] | None) -> str:
    """The kind of a problem, one of those of `engram.errors`: labels are not to be chosen by anybody else."""
    slug = str((problem or {}).get("type", "")).rpartition("/")[2]
    return slug if slug in ERRORS else EngramError.slug
