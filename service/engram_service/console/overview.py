"""The first page: every buffer against its budget, what is coming in and going out, health; and make a buffer."""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import Any

from fastapi import APIRouter, Request, Response

from engram.errors import EngramError, InvalidRequest
from engram.schemas import BufferCreate

from .. import buffers, disk, health, ingest
from ..acting import principal
from ..database import Database
from ..routes.parts import DatabasePart
from .forms import Text, amount, model, whole
from .page import redirect, render

router = APIRouter()

WINDOW_S = 300.0
"""What "lately" means."""


class Paces:
    """How much this process served lately, from what it had whenever somebody looked; by the prefix of theirs."""

    def __init__(self) -> None:
        self._seen: dict[str, deque[tuple[float, int, int]]] = {}
        self._lock = threading.Lock()

    def per_s(self, prefix: str, draws: int, exemplars: int) -> tuple[float, float] | None:
        """Draws and exemplars a second since the first look of the last minutes; None at the first look."""
        now = time.monotonic()
        with self._lock:
            seen = self._seen.setdefault(prefix, deque())
            seen.append((now, draws, exemplars))
            while len(seen) > 1 and seen[0][0] < now - WINDOW_S:
                seen.popleft()
            began, draws_then, exemplars_then = seen[0]
        if now - began < 1:
            return None
        # A deleted buffer takes what was drawn from it out of the sum.
        return max(0, draws - draws_then) / (now - began), max(0, exemplars - exemplars_then) / (now - began)


@router.get("")
def overview(request: Request, database: DatabasePart) -> Response:
    """Every buffer that the principal may see."""
    return _page(request, database)


@router.post("/buffers")
def create_buffer(
    request: Request,
    database: DatabasePart,
    name: Text = "",
    budget: Text = "",
    per: Text = "buffer",
    share_by: Text = "class",
    subsampling: Text = "4:2:0",
    quality: Text = "",
    fields: Text = "",
) -> Response:
    """A new, empty buffer; then its page."""
    principal().need("admin")
    given = {
        "name": name.strip(),
        "budget": budget,
        "per": per,
        "share_by": share_by,
        "subsampling": subsampling,
        "quality": quality,
        "fields": fields,
    }
    try:
        wanted = _wanted(given)
        with database.session() as session:
            made = buffers.create(session, wanted)
    except EngramError as error:
        return _page(request, database, given=given, problem=error)
    return redirect(request, "buffers", made.name)


def _wanted(given: dict[str, str]) -> BufferCreate:
    """The buffer that a form asks for.

    Raises:
        InvalidRequest: some field is not what it should be.
    """
    asked: dict[str, Any] = {key: given[key] for key in ("name", "per", "share_by", "subsampling")}
    asked["budget_bytes"] = amount("budget", given["budget"])
    asked["quality"] = whole("quality", given["quality"]) if given["quality"].strip() else None
    asked["fields"] = {}
    for line in given["fields"].splitlines():
        if line.strip():
            field, colon, kind = line.partition(":")
            if not colon:
                raise InvalidRequest(f"fields: a line is a name, a colon and a type, as in key: utf8; {line!r} is not")
            asked["fields"][field.strip()] = kind.strip()
    return model(BufferCreate, asked)


def _page(
    request: Request, database: Database, *, given: dict[str, str] | None = None, problem: EngramError | None = None
) -> Response:
    state = request.app.state
    with database.reading() as session:
        found = buffers.read_all(session)
        by_task = buffers.bytes_by_task(session)
        activity = ingest.activity(session, lately_s=WINDOW_S)
        may_see_disk = principal().may("admin") and not principal().prefix
        usage = disk.usage(session, state.settings) if may_see_disk else None
    totals = state.served.totals()
    drawn = [totals[buffer.name] for buffer in found if buffer.name in totals]
    draws, exemplars = sum(each.draws for each in drawn), sum(each.exemplars for each in drawn)
    return render(
        request,
        "overview.html",
        buffers=found,
        by_task=by_task,
        activity=activity,
        pace=state.paces.per_s(principal().prefix, draws, exemplars),
        problems=health.problems(database, state.settings, state.liveness),
        disk=usage,
        damaged=len(state.cache.damaged()),
        given=given or {},
        problem=problem,
    )
