"""Routes of extractors: register an ONNX model under its SHA-256, read and list descriptions, delete."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Path, Request, Response

from engram.schemas import Extractor, ExtractorList

from .. import extractors
from .parts import DatabasePart, RoomPart, SettingsPart

router = APIRouter(prefix="/v1/extractors", tags=["extractors"])

Sha256 = Annotated[str, Path(pattern="^[0-9a-f]{64}$", description="SHA-256 of the model's bytes.")]


async def _turns(request: Request) -> extractors.Turns:
    found: extractors.Turns = request.app.state.extractor_turns
    return found


@router.put(
    "/{sha256}",
    status_code=201,
    responses={200: {"model": Extractor, "description": "The model was registered before."}},
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
        }
    },
)
async def register_extractor(
    sha256: Sha256,
    request: Request,
    response: Response,
    database: DatabasePart,
    settings: SettingsPart,
    turns: Annotated[extractors.Turns, Depends(_turns)],
) -> Extractor:
    """Register a model: float32 [N, 3, H, W] in 0..1 in, [N, D] out, no external data, no custom or random operators.

    It is deleted some time after it was last registered, unless a decision or a waiting ingest names it."""
    found, is_new = await extractors.register(database, settings, turns, sha256, request.stream())
    response.status_code = 201 if is_new else 200
    response.headers["Location"] = f"/v1/extractors/{sha256}"
    return found


@router.get("")
def list_extractors(database: DatabasePart) -> ExtractorList:
    """List the registered models, the oldest first."""
    with database.reading() as session:
        return ExtractorList(extractors=extractors.read_all(session))


@router.get("/{sha256}")
def read_extractor(sha256: Sha256, database: DatabasePart) -> Extractor:
    """Read what is known of a registered model."""
    with database.reading() as session:
        return extractors.read(session, sha256)


@router.delete("/{sha256}", status_code=204)
def delete_extractor(sha256: Sha256, database: DatabasePart, settings: SettingsPart, room: RoomPart) -> None:
    """Delete a model that no waiting ingest needs; decisions that name it stay as they are."""
    room.freeing(lambda: extractors.remove(database, settings, sha256))
