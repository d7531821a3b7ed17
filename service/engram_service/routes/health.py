"""Routes for monitoring: whether the service is alive, and whether it can do its work."""

from __future__ import annotations

from fastapi import APIRouter

from engram.errors import Unavailable
from engram.schemas import Health

from .. import __version__, buffers, health
from .parts import CachePart, DatabasePart, LivenessPart, SettingsPart

router = APIRouter(tags=["health"])


@router.get("/healthz")
def healthz(database: DatabasePart, settings: SettingsPart, liveness: LivenessPart, cache: CachePart) -> Health:
    """Tell that the process answers, and what is wrong with its data; 200 in both cases, so that nobody restarts it."""
    problems = health.problems(database, settings, liveness)
    damaged = cache.damaged()
    if damaged and not problems:
        with database.reading() as session:
            named = buffers.named_packs(session, damaged)
        for digest in set(damaged) - named:
            cache.forget(digest)  # collected meanwhile
        damaged = sorted(named)
    return Health(
        status="degraded" if damaged or problems else "ok",
        version=__version__,
        damaged_packs=damaged,
        problems=problems,
    )


@router.get("/readyz")
def readyz(database: DatabasePart, settings: SettingsPart, liveness: LivenessPart) -> Health:
    """Tell whether the service can work: 503, with what is wrong with its disk, its database or its workers."""
    problems = health.problems(database, settings, liveness)
    if problems:
        raise Unavailable("; ".join(problems), problems=problems)
    return Health(status="ok", version=__version__, damaged_packs=[], problems=[])
