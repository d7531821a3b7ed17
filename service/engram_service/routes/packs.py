"""The route of packs: immutable bytes under their SHA-256, whole or by range, or as a picture."""

from __future__ import annotations

import base64
import re
from typing import Annotated

import numpy as np
from anyio import from_thread
from fastapi import APIRouter, Header, HTTPException, Path, Request, Response
from fastapi.responses import FileResponse

from engram import packs
from engram.errors import InvalidRequest, Unavailable
from engram.packs import PackCache
from engram.schemas import STRIPS_MEDIA_TYPE
from engram.strip import Exemplars

from .. import buffers
from ..answers import LARGE_BYTES
from .parts import JPEG_MEDIA_TYPE, CachePart, DatabasePart, IfNoneMatch, asks_for_picture, etag, matches

router = APIRouter(prefix="/v1/packs", tags=["packs"])

_RANGE = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})")

FOREVER = "private, max-age=31536000, immutable"


@router.get(
    "/{sha256}",
    response_class=FileResponse,
    responses={
        200: {
            "content": {
                media_type: {"schema": {"type": "string", "format": "binary"}}
                for media_type in (STRIPS_MEDIA_TYPE, JPEG_MEDIA_TYPE)
            }
        },
        206: {"description": "The range that was asked for."},
        304: {"description": "The client holds the pack."},
        416: {"description": "The range lies outside the pack."},
    },
)
def read_pack(
    sha256: Annotated[str, Path(description="The pack's digest.")],
    request: Request,
    database: DatabasePart,
    cache: CachePart,
    accept: Annotated[str, Header()] = "",
    if_none_match: IfNoneMatch = "",
) -> Response:
    """Read a pack, or with `Accept: image/jpeg` a picture of it. `Engram-Damaged` counts what a damaged one lacks."""
    path = cache.store.path(sha256)
    with database.reading() as session:
        count = buffers.exemplars_of_pack(session, sha256)
    loaded = cache.whole(sha256, count)
    exemplars = loaded.exemplars
    as_picture = asks_for_picture(accept)
    tag = etag(f"{sha256}-picture" if as_picture else sha256)
    headers = {"Cache-Control": FOREVER, "ETag": tag, "Vary": "Accept"}
    if loaded.is_damaged:
        cache.store.get(sha256)  # raises NotFound if there is no file at all
        damaged = count - (0 if exemplars is None else len(exemplars))
        headers = {"Cache-Control": "no-store", "Engram-Damaged": str(damaged)}
    elif matches(if_none_match, tag):
        return Response(status_code=304, headers=headers)
    if as_picture:
        return _picture(request, sha256, exemplars, headers)
    if not loaded.is_damaged:
        headers["Repr-Digest"] = f"sha-256=:{base64.b64encode(bytes.fromhex(sha256)).decode()}:"
        _check_range(request, path.stat().st_size)
    return FileResponse(path, media_type=STRIPS_MEDIA_TYPE, headers=headers)


def picture_of_pack(request: Request, cache: PackCache, digest: str, count: int) -> Response:
    """The answer with a pack's first strip as a picture.

    Raises:
        Unavailable: nothing of it is intact, or there is no room for the answer now.
    """
    loaded = cache.whole(digest, count)
    headers = {"Cache-Control": "no-store" if loaded.is_damaged else FOREVER}
    exemplars = loaded.exemplars
    if exemplars is not None and len(exemplars) > exemplars.form.max_images:
        exemplars = exemplars.select(np.arange(exemplars.form.max_images))
    return _picture(request, digest, exemplars, headers)


def _picture(request: Request, digest: str, exemplars: Exemplars | None, headers: dict[str, str]) -> Response:
    if exemplars is None:
        raise Unavailable(f"no exemplar of pack {digest} is intact on disk", digest=digest)
    _take_room(request, int(exemplars.lengths.sum(dtype=np.int64)))
    picture = packs.pick(exemplars, np.arange(len(exemplars))).picture()
    return Response(picture, media_type=JPEG_MEDIA_TYPE, headers=headers)


def _take_room(request: Request, size: int) -> None:
    """A picture of so many bytes may be made.

    Raises:
        InvalidRequest: it is too large.
        Unavailable: there is no room for it now.
    """
    most: int = request.app.state.settings.max_answer_bytes
    if size > most:
        raise InvalidRequest(
            f"the picture of this pack has {size} bytes, and ENGRAM_MAX_ANSWER_BYTES allows {most} in one answer; "
            "without Accept: image/jpeg the pack itself is sent",
            max_answer_bytes=most,
            answer_bytes=size,
        )
    if size > LARGE_BYTES:
        from_thread.run_sync(request.app.state.answers.take_now, request.scope, size)


def _check_range(request: Request, size: int) -> None:
    """What the framework answers in plain text becomes a problem; a range that is none is ignored, as RFC 9110 asks."""
    match = _RANGE.fullmatch(request.headers.get("range", ""))
    first, last = (match[1], match[2]) if match else ("", "")
    if (first and int(first) >= size) or (not first and last == "0"):
        raise HTTPException(416, f"the pack has {size} bytes", {"Content-Range": f"bytes */{size}"})
    if not (first or last) or (first and last and int(first) > int(last)):
        request.scope["headers"] = [(name, value) for name, value in request.scope["headers"] if name != b"range"]
