"""The route of exports: a whole generation as a WebDataset tar, streamed in constant memory."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from fastapi import APIRouter
from fastapi.responses import StreamingResponse

from engram.schemas import TAR_MEDIA_TYPE

from .parts import BufferPath, Generation, ReplayPart

router = APIRouter(prefix="/v1/buffers/{buffer}/export", tags=["replay"])


@router.get(
    "",
    response_class=StreamingResponse,
    responses={200: {"content": {TAR_MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}}}}},
)
def export(buffer: BufferPath, replay: ReplayPart, generation: Generation = None) -> StreamingResponse:
    """Export every exemplar as a stand-alone JPEG with its class id; a tar that can be uploaded again."""
    view = replay.view(buffer, generation)
    chunks = replay.export(view)
    # The first chunk before the status line: what is wrong from the start is a problem and not a cut stream.
    first: Iterator[bytes] = iter([next(chunks)])
    headers = {
        "Engram-Generation": str(view.generation),
        "Content-Disposition": f'attachment; filename="{buffer}-{view.generation}.tar"',
    }
    return StreamingResponse(chain(first, chunks), media_type=TAR_MEDIA_TYPE, headers=headers)
