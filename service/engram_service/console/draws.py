"""The page of draws: what was served of each buffer, to whom, of which tasks and classes."""

from __future__ import annotations

from typing import Annotated
from urllib.parse import urlencode

from fastapi import APIRouter, Query, Request, Response
from sqlalchemy.orm import Session

from .. import buffers, served
from ..acting import principal
from ..routes.parts import DatabasePart
from .page import render

router = APIRouter(prefix="/draws")

PAGE = 100
"""Classes on a page; also buffers, and those who drew most."""


@router.get("")
def list_draws(
    request: Request,
    database: DatabasePart,
    buffer: Annotated[str, Query(max_length=63)] = "",
    who: Annotated[str, Query(max_length=100, pattern=r"^[^\x00]*$")] = "",
    task: Annotated[str, Query(pattern="^[0-9]{0,9}$")] = "",
    cursor: Annotated[str, Query(pattern=r"^([0-9]{1,18}[.][0-9]{1,18})?$")] = "",
) -> Response:
    """Every buffer that draws have served, or one of them in detail."""
    given = {"buffer": buffer, "who": who, "task": task}
    filters = urlencode({key: value for key, value in given.items() if value})
    twin = f"/v1/draws?{filters}" if filters else "/v1/draws"
    if buffer:
        principal().need("read", buffer)
    with database.reading() as session:
        if not buffer:
            return render(request, "draws.html", buffers=served.by_buffer(session, limit=PAGE), twin=twin)
        row = buffers.find(session, buffer)
        names = buffers.class_names(row)
        held = _held(session, buffer, row.generation)
        everyone = served.by_who(session, buffer, limit=PAGE)
        tasks = served.by_task(session, buffer, who=who or None)
        after = tuple(map(int, cursor.split("."))) if cursor else None
        found = served.by_class(
            session,
            buffer,
            who=who or None,
            task=int(task) if task else None,
            limit=PAGE + 1,
            after=None if after is None else (after[0], after[1]),
        )
    shown = list(found.items())[:PAGE]
    return render(
        request,
        "draws_of_buffer.html",
        given=given,
        everyone=everyone,
        tasks=tasks,
        rows=[
            (number, class_id, names.get(class_id), held.get((number, class_id), 0), sums)
            for (number, class_id), sums in shown
        ],
        next=".".join(map(str, shown[-1][0])) if len(found) > PAGE else None,
        twin=twin,
    )


def _held(session: Session, buffer: str, generation: int) -> dict[tuple[int, int], int]:
    """Exemplars of each (task, class) that the buffer holds now."""
    packs = buffers.packs_to_draw_from(session, buffer, generation)
    return {(pack.task, class_id): count for pack in packs for class_id, count in pack.runs}
