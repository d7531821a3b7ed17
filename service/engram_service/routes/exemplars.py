"""The routes of single exemplars: pages of them with filters, one as a JPEG, its fields, removing and relabelling."""

from __future__ import annotations

import re
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Path, Query, Response
from pydantic import Field

from engram.errors import InvalidRequest
from engram.fields import Cell
from engram.memory import Where
from engram.schemas import MAX_CLASS_ID, MAX_TASK, Buffer, ExemplarPage, Relabel

from .. import buffers, commit
from ..database import Database
from .packs import FOREVER
from .parts import (
    JPEG_MEDIA_TYPE,
    BufferPath,
    DatabasePart,
    ExpectedState,
    Generation,
    IfNoneMatch,
    ReplayPart,
    RoomPart,
    SettingsPart,
    StorePart,
    etag,
    matches,
)

router = APIRouter(prefix="/v1/buffers/{buffer}/exemplars", tags=["replay"])

DigestPath = Annotated[str, Path(description="The digest of a pack of this buffer.")]
RowPath = Annotated[int, Path(ge=0, lt=2**31, description="The exemplar's row in it.")]
TaskFilter = Annotated[int | None, Query(ge=0, le=MAX_TASK)]
ClassFilter = Annotated[int | None, Query(ge=0, le=MAX_CLASS_ID)]
Key = Annotated[str, Field(max_length=4096)]
MAX_KEYS = 1000
KeyFilter = Annotated[
    list[Key] | None,
    Query(max_length=MAX_KEYS, description="A value of the field `key`; given several times, any of them."),
]

_CURSOR = re.compile(r"([0-9]{1,10})\.([0-9]{1,10})\.([0-9]{1,10})")


@router.get("")
def list_exemplars(
    buffer: BufferPath,
    replay: ReplayPart,
    settings: SettingsPart,
    task: TaskFilter = None,
    class_id: ClassFilter = None,
    limit: Annotated[int, Query(ge=1, description="Exemplars on the page.")] = 100,
    cursor: Annotated[
        str | None,
        Query(description="`next` of the page before.", json_schema_extra={"pattern": f"^{_CURSOR.pattern}$"}),
    ] = None,
    generation: Generation = None,
) -> ExemplarPage:
    """List exemplars in order of task, class and rank."""
    if limit > settings.max_page:
        raise InvalidRequest(f"limit must lie in 1..{settings.max_page}, got {limit}", max_page=settings.max_page)
    view = replay.view(buffer, generation)
    return replay.page(view, task=task, class_id=class_id, limit=limit, after=_place(cursor))


@router.get(
    "/{pack}/{row}",
    response_class=Response,
    responses={
        200: {"content": {JPEG_MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}}}},
        304: {"description": "The client holds the picture."},
    },
)
def read_exemplar(
    buffer: BufferPath,
    pack: DigestPath,
    row: RowPath,
    replay: ReplayPart,
    database: DatabasePart,
    if_none_match: IfNoneMatch = "",
) -> Response:
    """Read one exemplar as a stand-alone JPEG."""
    with database.reading() as session:
        entry = buffers.pack_of(session, buffer, pack)
    headers = {"ETag": etag(f"{pack}-{row}"), "Cache-Control": FOREVER}
    if row < entry.exemplars and matches(if_none_match, headers["ETag"]):
        return Response(status_code=304, headers=headers)
    return Response(replay.jpeg(entry, row), media_type=JPEG_MEDIA_TYPE, headers=headers)


@router.get("/{pack}/{row}/fields")
def read_fields(
    buffer: BufferPath, pack: DigestPath, row: RowPath, replay: ReplayPart, database: DatabasePart
) -> dict[str, Any]:
    """Read the fields of one exemplar: numbers, lists of them, texts; null stands for NaN and infinities."""
    with database.reading() as session:
        entry = buffers.pack_of(session, buffer, pack)
    return {name: _plain(cell) for name, cell in replay.fields(entry, row).items()}


@router.delete("")
def remove_exemplars(
    buffer: BufferPath,
    database: DatabasePart,
    store: StorePart,
    room: RoomPart,
    expected: ExpectedState,
    task: TaskFilter = None,
    class_id: ClassFilter = None,
    key: KeyFilter = None,
) -> Buffer:
    """Remove all exemplars of a class or with one of some keys, in a new generation, as if they had never come."""
    where = Where(task=task, class_id=class_id, keys=None if key is None else tuple(key))
    commit.remove(database, store, buffer, where, expected=expected, emergency=room.emergency)
    return _as_it_stands(database, buffer)


@router.patch("")
def relabel_exemplars(
    buffer: BufferPath,
    change: Relabel,
    database: DatabasePart,
    store: StorePart,
    expected: ExpectedState,
    task: TaskFilter = None,
    class_id: ClassFilter = None,
    key: KeyFilter = None,
) -> Buffer:
    """Move all exemplars of a class or with one of some keys to another class of their tasks, in a new generation."""
    where = Where(task=task, class_id=class_id, keys=None if key is None else tuple(key))
    commit.relabel(database, store, buffer, where, change.class_id, expected=expected)
    return _as_it_stands(database, buffer)


@router.delete("/{pack}/{row}")
def remove_exemplar(
    buffer: BufferPath,
    pack: DigestPath,
    row: RowPath,
    database: DatabasePart,
    store: StorePart,
    room: RoomPart,
    expected: ExpectedState,
) -> Buffer:
    """Remove one exemplar of the current generation, in a new one."""
    where, state = _place_now(database, buffer, pack, row, expected)
    commit.remove(database, store, buffer, where, expected=state, emergency=room.emergency)
    return _as_it_stands(database, buffer)


@router.patch("/{pack}/{row}")
def relabel_exemplar(
    buffer: BufferPath,
    pack: DigestPath,
    row: RowPath,
    change: Relabel,
    database: DatabasePart,
    store: StorePart,
    expected: ExpectedState,
) -> Buffer:
    """Move one exemplar of the current generation to another class of its task, in a new generation."""
    where, state = _place_now(database, buffer, pack, row, expected)
    commit.relabel(database, store, buffer, where, change.class_id, expected=state)
    return _as_it_stands(database, buffer)


def _place_now(
    database: Database, buffer: str, pack: str, row: int, expected: buffers.Expected | None
) -> tuple[Where, buffers.Expected]:
    """The exemplar's place in its class, and the state of the buffer that a change of it is meant for."""
    with database.reading() as session:
        where, state = commit.place_of(session, buffer, pack, row)
        buffers.check_expected(buffers.find(session, buffer), expected)
    # Of several states that are expected, the place is known in this one.
    return where, state


def _as_it_stands(database: Database, buffer: str) -> Buffer:
    with database.reading() as session:
        return buffers.read(session, buffer)


def _plain(cell: Cell) -> Any:
    """A value as JSON has it."""
    if isinstance(cell, str):
        return cell
    values = np.asarray(cell)
    if values.dtype.kind != "f":
        return values.tolist()
    plain = np.asarray(values.astype(object))
    plain[~np.isfinite(values)] = None
    return plain.tolist()


def _place(cursor: str | None) -> tuple[int, int, int] | None:
    if cursor is None:
        return None
    match = _CURSOR.fullmatch(cursor)
    if match is None:
        raise InvalidRequest(f"cursor must be `next` of a page, got {cursor!r}")
    return int(match[1]), int(match[2]), int(match[3])
