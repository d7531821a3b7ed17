"""The page of the audit: who changed what, the newest first."""

from __future__ import annotations

from typing import Annotated, Any
from urllib.parse import urlencode

from fastapi import APIRouter, Query, Request, Response

from engram.oversight import AuditEntry

from .. import audit
from ..routes.parts import DatabasePart
from .page import render

router = APIRouter(prefix="/audit")

PAGE = 50

KINDS = ("buffer", "exemplars", "extractor", "ingest", "service", "session", "task", "token")
"""What actions begin with."""


@router.get("")
def list_audit(
    request: Request,
    database: DatabasePart,
    buffer: Annotated[str, Query(max_length=63)] = "",
    who: Annotated[str, Query(max_length=100)] = "",
    action: Annotated[str, Query(pattern="^([a-z]{1,30}([.][a-z]{1,30})?)?$")] = "",
    cursor: Annotated[str, Query(pattern="^[0-9]{0,18}$")] = "",
) -> Response:
    """A page of changes; what is left empty in the form filters nothing."""
    with database.reading() as session:
        found = audit.page(
            session,
            buffer=buffer or None,
            who=who or None,
            action=action or None,
            limit=PAGE,
            before=int(cursor) if cursor else None,
        )
    entries = [(entry, _changes(entry)) for entry in found.entries]
    given = {"buffer": buffer, "who": who, "action": action}
    filters = urlencode({key: value for key, value in given.items() if value})
    twin = f"/v1/audit?{filters}" if filters else "/v1/audit"
    return render(request, "audit.html", entries=entries, next=found.next, given=given, kinds=KINDS, twin=twin)


def _changes(entry: AuditEntry) -> list[tuple[str, Any, Any]]:
    """Name, before and after of whatever was there before or is there now, but for what stayed as it was."""
    before, after = entry.before or {}, entry.after or {}
    names = dict.fromkeys([*before, *after])
    return [(name, before.get(name), after.get(name)) for name in names if before.get(name) != after.get(name)]
