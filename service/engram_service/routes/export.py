"""The route of exports: a whole generation as a WebDataset tar, streamed in constant memory."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from anyio.to_thread import run_sync
from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse

from engram.schemas import TAR_MEDIA_TYPE

from ..answers import Answers
from ..replay import EXPORT_BYTES, Replay, View
from .parts import BufferPath, Generation, ReplayPart

_HELD_BYTES = 4 * EXPORT_BYTES
"""What an export has in memory: exemplars, their files, and the same in the chunk that is being sent."""

router = APIRouter(prefix="/v1/buffers/{buffer}/export", tags=["replay"])


@router.get(
    "",
    response_class=StreamingResponse,
    responses={200: {"content": {TAR_MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}}}}},
)
async def export(
    request: Request, buffer: BufferPath, replay: ReplayPart, generation: Generation = None
) -> StreamingResponse:
    """Export every exemplar as a stand-alone JPEG with its class id; a tar that can be uploaded again."""
    answers: Answers = request.app.state.answers
    await answers.take(request.scope, _HELD_BYTES)
    view, chunks = await run_sync(_begin, replay, buffer, generation)
    headers = {
        "Engram-Generation": str(view.generation),
        "Content-Disposition": f'attachment; filename="{buffer}-{view.generation}.tar"',
    }
    return StreamingResponse(chunks, media_type=TAR_MEDIA_TYPE, headers=headers)


def _begin(replay: Replay, buffer: str, generation: int | None) -> tuple[View, Iterator[bytes]]:
    view = replay.view(buffer, generation)
    chunks = replay.export(view)
    # The first chunk before the status line: what is wrong from the start is a problem and not a cut stream.
    first: Iterator[bytes] = iter([next(chunks)])
    return view, chain(first, chunks)
