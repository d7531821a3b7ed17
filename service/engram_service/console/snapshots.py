"""Snapshots and forks of a buffer: which there are, make one, compare two."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response

from engram.errors import EngramError
from engram.schemas import ForkCreate

from .. import buffers, commit, comparison
from ..acting import principal
from ..database import Database
from ..routes.parts import BufferPath, DatabasePart, StorePart
from .forms import Text, amount, model, whole
from .page import redirect, render

router = APIRouter(prefix="/buffers/{buffer}")


@router.get("/snapshots")
def snapshots_page(request: Request, buffer: BufferPath, database: DatabasePart) -> Response:
    """What the buffer was forked from and what was forked from it."""
    return _page(request, database, buffer)


@router.post("/forks")
def make_fork(
    request: Request,
    buffer: BufferPath,
    database: DatabasePart,
    store: StorePart,
    name: Text = "",
    frozen: Text = "",
    budget: Text = "",
    generation: Text = "",
) -> Response:
    """A buffer that begins with the content of this one; frozen, a snapshot of it."""
    principal().need("admin", buffer)
    given = {"name": name, "frozen": frozen, "budget": budget}
    try:
        asked: dict[str, Any] = {"name": name.strip(), "frozen": bool(frozen)}
        asked["budget_bytes"] = amount("budget", budget) if budget.strip() else None
        asked["generation"] = whole("generation", generation) if generation.strip() else None
        made = commit.fork(database, store, buffer, model(ForkCreate, asked))
    except EngramError as error:
        return _page(request, database, buffer, given=given, problem=error)
    return redirect(request, "buffers", buffer, "snapshots", made=made.name)


@router.get("/compare")
def compare_page(
    request: Request,
    buffer: BufferPath,
    database: DatabasePart,
    other: Annotated[str, Query(alias="with", max_length=100)],
) -> Response:
    """The buffer beside another one."""
    with database.reading() as session:
        found = comparison.compare(session, buffer, other)
    return render(request, "compare.html", comparison=found, buffer=found.one)


def _page(
    request: Request,
    database: Database,
    name: str,
    *,
    given: dict[str, str] | None = None,
    problem: EngramError | None = None,
) -> Response:
    with database.reading() as session:
        found = buffers.read(session, name)
        every = buffers.read_all(session)
        shared = comparison.shared_bytes(session, name)
    family = comparison.family(every, name)
    related = {each.name for each in family}
    return render(
        request,
        "snapshots.html",
        buffer=found,
        family=family,
        shared=shared,
        others=[each.name for each in every if each.name not in related],
        may_fork=principal().may("admin"),
        given=given or {},
        problem=problem,
    )
