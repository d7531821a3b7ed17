"""This file is the route of packs: immutable bytes under their SHA-256, whole or by range."""

from __future__ import annotations

import base64
from typing import Annotated

from fastapi import APIRouter, Header, Path, Response
from fastapi.responses import FileResponse

from engram.schemas import STRIPS_MEDIA_TYPE

from .. import buffers
from .parts import CachePart, DatabasePart, etag, matches

router = APIRouter(prefix="/v1/packs", tags=["packs"])

FOREVER = "private, max-age=31536000, immutable"


@router.get(
    "/{sha256}",
    response_class=FileResponse,
    responses={
        200: {"content": {STRIPS_MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}}}},
        206: {"description": "The range that was asked for."},
        304: {"description": "The client holds the pack."},
        416: {"description": "The range lies outside the pack."},
    },
)
def read_pack(
    sha256: Annotated[str, Path(description="The pack's digest.")],
    database: DatabasePart,
    cache: CachePart,
    if_none_match: Annotated[str | None, Header()] = None,
) -> Response:
    """Read a pack. A damaged one comes as it is on disk, with `Engram-Damaged`, and must not be cached."""
    path = cache.store.path(sha256)
    with database.reading() as session:
        count = buffers.exemplars_of_pack(session, sha256)
    tag = etag(sha256)
    loaded = cache.get(sha256, count)
    if loaded.is_damaged:
        damaged = count - len(loaded.exemplars or ())
        cache.store.get(sha256)  # raises NotFound if there is no file at all
        headers = {"Cache-Control": "no-store", "Engram-Damaged": str(damaged)}
        return FileResponse(path, media_type=STRIPS_MEDIA_TYPE, headers=headers)
    if matches(if_none_match, tag):
        return Response(status_code=304, headers={"ETag": tag, "Cache-Control": FOREVER})
    digest = base64.b64encode(bytes.fromhex(sha256)).decode()
    headers = {"ETag": tag, "Cache-Control": FOREVER, "Repr-Digest": f"sha-256=:{digest}:"}
    return FileResponse(path, media_type=STRIPS_MEDIA_TYPE, headers=headers)
