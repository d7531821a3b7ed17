"""The routes of buffers: create, list, read, change, fork, delete; the manifest of a generation."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Response

from engram import etags
from engram.oversight import MAX_NEW_CLASSES, Forecast
from engram.schemas import MAX_BUDGET_BYTES, Buffer, BufferChange, BufferCreate, BufferList, ForkCreate, Manifest

from .. import buffers, commit, forecast
from .parts import (
    BufferPath,
    DatabasePart,
    ExpectedState,
    Generation,
    IfNoneMatch,
    ReplayPart,
    RoomPart,
    StorePart,
    etag,
    matches,
)

router = APIRouter(prefix="/v1/buffers", tags=["buffers"])

BudgetBytesQuery = Annotated[
    int | None, Query(ge=1, le=MAX_BUDGET_BYTES, description="The budget then; that of now when it is left out.")
]
NewClassesQuery = Annotated[
    int, Query(ge=0, le=MAX_NEW_CLASSES, description="How many classes more have come then, in a task of their own.")
]


@router.post("", status_code=201)
def create_buffer(wanted: BufferCreate, response: Response, database: DatabasePart) -> Buffer:
    """Make an empty buffer."""
    with database.session() as session:
        made = buffers.create(session, wanted)
    response.headers["Location"] = f"/v1/buffers/{made.name}"
    response.headers["ETag"] = etag(etags.of(made.generation, made.created_at))
    return made


@router.get("")
def list_buffers(database: DatabasePart) -> BufferList:
    """List all buffers that the token reaches, by name."""
    with database.reading() as session:
        return BufferList(buffers=buffers.read_all(session))


@router.get("/{buffer}")
def read_buffer(buffer: BufferPath, response: Response, database: DatabasePart) -> Buffer:
    """Read a buffer as it stands; its ETag names the buffer and its generation."""
    with database.reading() as session:
        found = buffers.read(session, buffer)
    response.headers["ETag"] = etag(etags.of(found.generation, found.created_at))
    return found


@router.patch("/{buffer}")
def change_buffer(
    buffer: BufferPath,
    change: BufferChange,
    response: Response,
    database: DatabasePart,
    store: StorePart,
    room: RoomPart,
    expected: ExpectedState,
) -> Buffer:
    """Give a buffer another budget (with scope admin), its classes other names.

    A smaller budget drops the tails of every class."""
    commit.change(database, store, buffer, change, expected=expected, emergency=room.emergency)
    return read_buffer(buffer, response, database)


@router.post("/{buffer}/forks", status_code=201)
def fork_buffer(
    buffer: BufferPath, wanted: ForkCreate, response: Response, database: DatabasePart, store: StorePart
) -> Buffer:
    """Make a buffer that begins with the content of this one and shares its packs; a frozen one is a snapshot."""
    made = commit.fork(database, store, buffer, wanted)
    response.headers["Location"] = f"/v1/buffers/{made.name}"
    response.headers["ETag"] = etag(etags.of(made.generation, made.created_at))
    return made


@router.delete("/{buffer}", status_code=204)
def delete_buffer(
    buffer: BufferPath, database: DatabasePart, replay: ReplayPart, room: RoomPart, expected: ExpectedState
) -> None:
    """Delete a buffer and everything in it."""

    def delete() -> None:
        with database.session() as session:
            buffers.delete(session, buffer, expected=expected)

    room.freeing(delete)
    replay.forget(buffer)


@router.get("/{buffer}/manifest", responses={304: {"description": "The generation is the one in If-None-Match."}})
def read_manifest(
    buffer: BufferPath,
    response: Response,
    database: DatabasePart,
    generation: Generation = None,
    if_none_match: IfNoneMatch = "",
) -> Manifest:
    """List the packs of a generation; the ETag names the buffer and the generation."""
    with database.reading() as session:
        row = buffers.find(session, buffer)
        # An older generation tells the limit and the class names of now, so its tag names both generations.
        tag = etag(buffers.tag(row) if generation in (None, row.generation) else f"{buffers.tag(row)}-{generation}")
        # The current generation needs no look at its packs; an older one may have been collected.
        if generation is None and matches(if_none_match, tag):
            return Response(status_code=304, headers={"ETag": tag})  # type: ignore[return-value]
        found = buffers.manifest(session, buffer, generation)
    if matches(if_none_match, tag):
        return Response(status_code=304, headers={"ETag": tag})  # type: ignore[return-value]
    response.headers["ETag"] = tag
    response.headers["Cache-Control"] = "no-cache"
    return found


@router.get("/{buffer}/forecast")
def read_forecast(
    buffer: BufferPath,
    database: DatabasePart,
    store: StorePart,
    budget_bytes: BudgetBytesQuery = None,
    new_classes: NewClassesQuery = 0,
) -> Forecast:
    """Tell what another budget, or so many classes more, would leave of each class; nothing is changed."""
    with database.reading() as session:
        return forecast.forecast(session, store, buffer, budget_bytes=budget_bytes, new_classes=new_classes)
