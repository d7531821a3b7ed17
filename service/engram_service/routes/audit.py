"""The route of the audit: who changed what."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query

from engram.errors import InvalidRequest
from engram.oversight import AuditPage

from .. import audit
from .parts import DatabasePart, SettingsPart

router = APIRouter(prefix="/v1/audit", tags=["audit"])


@router.get("")
def list_audit(
    database: DatabasePart,
    settings: SettingsPart,
    buffer: Annotated[str | None, Query(max_length=63, description="Only what was done to this buffer.")] = None,
    who: Annotated[str | None, Query(max_length=100, description="Only what they did.")] = None,
    action: Annotated[
        str | None,
        Query(pattern="^[a-z]{1,30}([.][a-z]{1,30})?$", description="Only this action, or all of its kind: `token`."),
    ] = None,
    limit: Annotated[int, Query(ge=1, description="Entries on the page.")] = 100,
    cursor: Annotated[str | None, Query(pattern="^[0-9]{1,18}$", description="`next` of the page before.")] = None,
) -> AuditPage:
    """List changes, the newest first; with a token that has a prefix only those of its buffers."""
    if limit > settings.max_page:
        raise InvalidRequest(f"limit must lie in 1..{settings.max_page}, got {limit}", max_page=settings.max_page)
    with database.reading() as session:
        return audit.page(
            session,
            buffer=buffer,
            who=who,
            action=action,
            limit=limit,
            before=None if cursor is None else int(cursor),
        )
