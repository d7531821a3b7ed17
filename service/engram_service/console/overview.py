"""The first page: every buffer against its budget."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse

from .. import buffers
from ..routes.parts import DatabasePart
from .page import render

router = APIRouter()


@router.get("")
def overview(request: Request, database: DatabasePart) -> HTMLResponse:
    """Every buffer that the principal may see."""
    with database.reading() as session:
        found = buffers.read_all(session)
    return render(request, "overview.html", buffers=found)
