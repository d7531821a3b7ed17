"""The routes of exemplars: pages of them with filters, counts; one as a JPEG, its fields; removing and relabelling."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Path, Query, Response
from pydantic import Field

from engram.errors import InvalidRequest
from engram.fields import Cell
from engram.memory import Where
from engram.oversight import Histogram, Qualities
from engram.schemas import Buffer, ExemplarPage, PackEntry, Relabel

from .. import buffers, commit, listing, recoding
from ..database import Database
from ..replay import Replay
from .filtering import CURSOR, AskedPart, ClassFilter, TaskFilter, place
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
counts = APIRouter(prefix="/v1/buffers/{buffer}", tags=["replay"])

DigestPath = Annotated[str, Path(description="The digest of a pack of this buffer.")]
RowPath = Annotated[int, Path(ge=0, lt=2**31, description="The exemplar's row in it.")]
Key = Annotated[str, Field(max_length=4096)]
MAX_KEYS = 1000
KeyFilter = Annotated[
    list[Key] | None,
    Query(max_length=MAX_KEYS, description="A value of the field `key`; given several times, any of them."),
]


@router.get("")
def list_exemplars(
    buffer: BufferPath,
    replay: ReplayPart,
    settings: SettingsPart,
    asked: AskedPart,
    limit: Annotated[int, Query(ge=1, description="Exemplars on the page.")] = 100,
    cursor: Annotated[
        str | None,
        Query(description="`next` of the page before.", json_schema_extra={"pattern": f"^{CURSOR.pattern}$"}),
    ] = None,
    generation: Generation = None,
) -> ExemplarPage:
    """List exemplars in order of task, class and rank.

    One page looks at 65,536 exemplars at most where bytes or fields are filtered by: it may hold fewer than `limit`, or
    none, and `next` goes on from there.
    """
    if limit > settings.max_page:
        raise InvalidRequest(f"limit must lie in 1..{settings.max_page}, got {limit}", max_page=settings.max_page)
    view = replay.view(buffer, generation)
    return listing.page(replay, view, asked.on(view.schema), limit=limit, after=place(cursor))


@counts.get("/histogram")
def read_histogram(
    buffer: BufferPath,
    replay: ReplayPart,
    asked: AskedPart,
    of: Annotated[str, Query(max_length=64, description="`class`, `task`, `bytes` or `field:NAME`.")] = "class",
    generation: Generation = None,
) -> Histogram:
    """Count exemplars by class, task, bytes or the values of a field; of more than 131,072 a field of some only."""
    view = replay.view(buffer, generation)
    return listing.histogram(replay, view, asked.on(view.schema), of)


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
    quality: Annotated[
        int | None, Query(ge=1, le=100, description="Encode it again at this quality, at most that of what is stored.")
    ] = None,
    if_none_match: IfNoneMatch = "",
) -> Response:
    """Read one exemplar as a stand-alone JPEG, as it is stored or as it would be at a lower quality."""
    with database.reading() as session:
        entry = buffers.pack_of(session, buffer, pack)
    return picture_of(replay, entry, row, quality, if_none_match)


def picture_of(replay: Replay, entry: PackEntry, row: int, quality: int | None, if_none_match: str) -> Response:
    """The answer with an exemplar's picture.

    Raises:
        InvalidRequest: the quality is above that of what is stored.
        NotFound: the pack has no such row.
        Unavailable: the row is damaged, or the disk does not answer.
    """
    is_stored = quality in (None, entry.quality)
    tag = f"{entry.digest}-{row}" + ("" if is_stored else f"-{quality}")
    headers = {"ETag": etag(tag), "Cache-Control": FOREVER}
    if row < entry.exemplars and (is_stored or (quality or 0) < entry.quality) and matches(if_none_match, etag(tag)):
        return Response(status_code=304, headers=headers)
    content = replay.jpeg(entry, row) if quality is None else recoding.jpeg(replay, entry, row, quality)
    return Response(content, media_type=JPEG_MEDIA_TYPE, headers=headers)


@router.get("/{pack}/{row}/qualities")
def read_qualities(
    buffer: BufferPath, pack: DigestPath, row: RowPath, replay: ReplayPart, database: DatabasePart
) -> Qualities:
    """Read the bytes of one exemplar as it is stored, and encoded again at each lower candidate quality."""
    with database.reading() as session:
        entry = buffers.pack_of(session, buffer, pack)
    return recoding.qualities(replay, entry, row)


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
