"""The page of extractors: which are registered, which decisions rest on each; delete one."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from engram.errors import EngramError

from .. import extractors
from ..acting import principal
from ..database import Database
from ..routes.parts import DatabasePart, RoomPart, SettingsPart
from .page import redirect, render

router = APIRouter(prefix="/extractors")


@router.get("")
def extractors_page(request: Request, database: DatabasePart) -> Response:
    """Every registered extractor, the newest first."""
    return _page(request, database)


@router.post("/{sha256}/delete")
def delete(request: Request, sha256: str, database: DatabasePart, settings: SettingsPart, room: RoomPart) -> Response:
    """The model is gone; decisions that name it stay as they are."""
    principal().need_everything("admin")
    try:
        room.freeing(lambda: extractors.remove(database, settings, sha256))
    except EngramError as error:
        return _page(request, database, problem=error)
    return redirect(request, "extractors")


def _page(request: Request, database: Database, *, problem: EngramError | None = None) -> Response:
    with database.reading() as session:
        found = extractors.read_all(session)
        uses = extractors.uses(session)
    return render(
        request,
        "extractors.html",
        extractors=found[::-1],
        uses=uses,
        problem=problem,
    )
