"""The page of ingests: what was uploaded and what became of it, live while it goes on; try again, cancel."""

from __future__ import annotations

from typing import Annotated, get_args

from fastapi import APIRouter, Query, Request, Response

from engram.errors import EngramError
from engram.schemas import State

from .. import ingest
from ..acting import principal
from ..database import Database
from ..routes.parts import DatabasePart, RoomPart
from .page import redirect, render

router = APIRouter(prefix="/ingests")

ROWS = 50
STATES: tuple[str, ...] = get_args(State)

BufferQuery = Annotated[str, Query(max_length=100)]
StateQuery = Annotated[State | str, Query(max_length=20)]
Cursor = Annotated[str | None, Query(pattern="^[0-9a-f]{32}$")]


@router.get("")
def ingests_page(
    request: Request, database: DatabasePart, buffer: BufferQuery = "", state: StateQuery = "", cursor: Cursor = None
) -> Response:
    """Ingests of a buffer or of all, in a state or in any, the newest first."""
    return _page(request, database, buffer=buffer, state=state, cursor=cursor)


@router.get("/{ingest_id}")
def ingest_page(request: Request, ingest_id: str, database: DatabasePart) -> Response:
    """One ingest with all that is known of it."""
    return _one(request, database, ingest_id)


@router.post("/{ingest_id}/cancel")
def cancel(request: Request, ingest_id: str, database: DatabasePart, room: RoomPart) -> Response:
    """The ingest will never commit."""
    principal().need("write")

    def cancelled() -> None:
        with database.session() as session:
            ingest.cancel(session, ingest_id)

    try:
        room.freeing(cancelled)
    except EngramError as error:
        return _one(request, database, ingest_id, problem=error)
    return redirect(request, "ingests", ingest_id)


@router.post("/{ingest_id}/retry")
def retry(request: Request, ingest_id: str, database: DatabasePart) -> Response:
    """The ingest is queued again."""
    principal().need("write")
    try:
        with database.session() as session:
            ingest.retry(session, ingest_id)
    except EngramError as error:
        return _one(request, database, ingest_id, problem=error)
    return redirect(request, "ingests", ingest_id)


def _page(request: Request, database: Database, *, buffer: str, state: str, cursor: str | None) -> Response:
    known = state if state in STATES else None
    with database.reading() as session:
        found = ingest.page(session, buffer or None, limit=ROWS, before=cursor, state=known)  # type: ignore[arg-type]
    return render(
        request,
        "ingests.html",
        ingests=found.ingests,
        next=found.next,
        buffer=buffer,
        state=known or "",
        states=[("", "any"), *((each, each) for each in STATES)],
        is_live=any(each.state in ingest.ACTIVE for each in found.ingests),
        active=ingest.ACTIVE,
    )


def _one(request: Request, database: Database, ingest_id: str, *, problem: EngramError | None = None) -> Response:
    with database.reading() as session:
        found = ingest.read(session, ingest_id)
    return render(
        request,
        "ingest.html",
        ingest=found,
        is_live=found.state in ingest.ACTIVE,
        problem=problem,
    )
