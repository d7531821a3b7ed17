"""The routes of single exemplars: pages of them with filters, and one as a JPEG."""

from __future__ import annotations

import re
from typing import Annotated

from fastapi import APIRouter, Header, Path, Query, Response

from engram.errors import InvalidRequest
from engram.schemas import MAX_CLASS_ID, MAX_TASK, ExemplarPage

from .. import buffers
from .packs import FOREVER
from .parts import JPEG_MEDIA_TYPE, BufferPath, DatabasePart, Generation, ReplayPart, SettingsPart, etag, matches

router = APIRouter(prefix="/v1/buffers/{buffer}/exemplars", tags=["replay"])

_CURSOR = re.compile(r"([0-9]{1,10})\.([0-9]{1,10})\.([0-9]{1,10})")


@router.get("")
def list_exemplars(
    buffer: BufferPath,
    replay: ReplayPart,
    settings: SettingsPart,
    task: Annotated[int | None, Query(ge=0, le=MAX_TASK)] = None,
    class_id: Annotated[int | None, Query(ge=0, le=MAX_CLASS_ID)] = None,
    limit: Annotated[int, Query(ge=1, description="Exemplars on the page.")] = 100,
    cursor: Annotated[str | None, Query(description="`next` of the page before.")] = None,
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
    pack: Annotated[str, Path(description="The digest of a pack of this buffer.")],
    row: Annotated[int, Path(ge=0, lt=2**31, description="The exemplar's row in it.")],
    replay: ReplayPart,
    database: DatabasePart,
    if_none_match: Annotated[str | None, Header()] = None,
) -> Response:
    """Read one exemplar as a stand-alone JPEG."""
    with database.reading() as session:
        entry = buffers.pack_of(session, buffer, pack)
    headers = {"ETag": etag(f"{pack}-{row}"), "Cache-Control": FOREVER}
    if row < entry.exemplars and matches(if_none_match, headers["ETag"]):
        return Response(status_code=304, headers=headers)
    return Response(replay.jpeg(entry, row), media_type=JPEG_MEDIA_TYPE, headers=headers)


def _place(cursor: str | None) -> tuple[int, int, int] | None:
    if cursor is None:
        return None
    match = _CURSOR.fullmatch(cursor)
    if match is None:
        raise InvalidRequest(f"cursor must be `next` of a page, got {cursor!r}")
    return int(match[1]), int(match[2]), int(match[3])
