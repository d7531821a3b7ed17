"""The route of what draws have served: how much of which class, and to whom."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query

from engram.errors import InvalidRequest
from engram.oversight import ServedList
from engram.schemas import MAX_TASK

from .. import served
from .parts import DatabasePart, SettingsPart

router = APIRouter(prefix="/v1/draws", tags=["operators"])


@router.get("")
def list_draws(
    database: DatabasePart,
    settings: SettingsPart,
    buffer: Annotated[str | None, Query(description="Only those from this buffer.")] = None,
    who: Annotated[str | None, Query(max_length=100, pattern=r"^[^\x00]*$", description="Only those of them.")] = None,
    task: Annotated[int | None, Query(ge=0, le=MAX_TASK, description="Only those of this task.")] = None,
    limit: Annotated[int, Query(ge=1, description="Classes on the page.")] = 100,
    cursor: Annotated[str | None, Query(max_length=1000, description="`next` of the page before.")] = None,
) -> ServedList:
    """List what draws have served of each class, and to whom; mirrors and exports are not draws."""
    if limit > settings.max_page:
        raise InvalidRequest(f"limit must lie in 1..{settings.max_page}, got {limit}", max_page=settings.max_page)
    with database.reading() as session:
        return served.page(session, buffer=buffer, who=who, task=task, limit=limit, cursor=cursor)
