"""Routes of ingests: upload a task, read an ingest or wait for it, cancel it, try it again."""

from __future__ import annotations

import asyncio
import binascii
import re
import time
from base64 import b64decode
from typing import Annotated, Any

from fastapi import APIRouter, Header, Path, Query, Request, Response
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from engram.errors import BadUpload, InvalidRequest
from engram.schemas import MAX_TASK, Ingest, IngestOptions, IngestPage, State

from .. import buffers, extractors, ingest
from ..database import Database
from ..room import Room
from ..settings import Settings
from .parts import DatabasePart, SettingsPart

router = APIRouter(tags=["ingests"])

# A waiting request looks at the row this often: at first soon, for small uploads, then seldom, for the database's sake.
LOOK_FIRST_S = 0.02
LOOK_MOST_S = 0.5

_SHA_256 = re.compile(r"(?:^|,)\s*sha-256=:([A-Za-z0-9+/=]*):")

_OPTIONS = IngestOptions.model_json_schema()["properties"]
_PARAMETERS = {
    "parameters": [
        {
            "name": name,
            "in": "query",
            "required": False,
            "schema": schema,
            # candidates=10,25,50
            **({"style": "form", "explode": False} if name == "candidates" else {}),
        }
        for name, schema in _OPTIONS.items()
    ],
    "requestBody": {
        "required": True,
        "description": "A tar stream of KEY.ppm|pgm|png|jpg|jpeg|webp and KEY.cls pairs (WebDataset)",
        "content": {"application/x-tar": {"schema": {"type": "string", "format": "binary", "minLength": 1}}},
    },
}


@router.post(
    "/v1/buffers/{buffer}/tasks/{task}/ingests",
    status_code=202,
    response_model=Ingest,
    openapi_extra=_PARAMETERS,
    responses={200: {"model": Ingest, "description": "The Idempotency-Key named this upload already"}},
)
async def upload(
    request: Request,
    response: Response,
    buffer: str,
    task: Annotated[int, Path(ge=0, le=MAX_TASK)],
    idempotency_key: Annotated[str | None, Header(min_length=1, max_length=200)] = None,
    content_digest: Annotated[str | None, Header()] = None,
    content_length: Annotated[int | None, Header(include_in_schema=False)] = None,
) -> Ingest:
    """Queue a tar of images for one task. The answer comes when the upload is durable; follow its Location."""
    settings: Settings = request.app.state.settings
    database: Database = request.app.state.database
    options = _options(request)
    expected = _expected_digest(content_digest)
    await run_in_threadpool(_check_names, database, buffer, options)
    if content_length is not None and content_length > settings.max_body_bytes:
        raise ingest.body_too_large(content_length, settings)
    try:
        room: Room = request.app.state.room
        received = await ingest.receive(
            request.stream(), settings=settings, content_digest=expected, make_room=room.without_kept_uploads
        )
    except ClientDisconnect as error:
        raise BadUpload("the connection ended in the middle of the upload; nothing was kept") from error
    answer, is_new = await run_in_threadpool(
        ingest.enqueue, database, received, buffer=buffer, task=task, options=options, key=idempotency_key
    )
    response.headers["Location"] = f"/v1/ingests/{answer.id}"
    response.status_code = 202 if is_new else 200
    return answer


@router.get("/v1/ingests")
def list_ingests(
    database: DatabasePart,
    settings: SettingsPart,
    buffer: Annotated[str | None, Query(description="Only those of this buffer.")] = None,
    state: Annotated[State | None, Query(description="Only those in this state.")] = None,
    limit: Annotated[int, Query(ge=1, description="Ingests on the page.")] = 100,
    cursor: Annotated[str | None, Query(pattern="^[0-9a-f]{32}$", description="`next` of the page before.")] = None,
) -> IngestPage:
    """List ingests, the newest first."""
    if limit > settings.max_page:
        raise InvalidRequest(f"limit must lie in 1..{settings.max_page}, got {limit}", max_page=settings.max_page)
    with database.reading() as session:
        return ingest.page(session, buffer, limit=limit, before=cursor, state=state)


@router.get("/v1/ingests/{ingest_id}")
async def read(
    request: Request,
    ingest_id: str,
    wait: Annotated[float, Query(ge=0, description="seconds to wait for a final state")] = 0.0,
) -> Ingest:
    """The ingest, as soon as it is final or the wait is over (at most the service's `max_wait_s`)."""
    database: Database = request.app.state.database
    deadline = time.monotonic() + min(wait, request.app.state.settings.max_wait_s)
    pause_s = LOOK_FIRST_S
    while True:
        found = await run_in_threadpool(_read, database, ingest_id)
        left_s = deadline - time.monotonic()
        if found.state in ingest.FINAL or left_s <= 0 or await request.is_disconnected():
            return found
        await asyncio.sleep(min(pause_s, left_s))
        pause_s = min(1.5 * pause_s, LOOK_MOST_S)


@router.delete("/v1/ingests/{ingest_id}")
def cancel(request: Request, ingest_id: str) -> Ingest:
    """Cancel an ingest that has not committed yet."""
    database: Database = request.app.state.database
    room: Room = request.app.state.room

    def cancelled() -> Ingest:
        with database.session() as session:
            return ingest.cancel(session, ingest_id)

    return room.freeing(cancelled)


@router.post("/v1/ingests/{ingest_id}/retry", status_code=202)
def retry(database: DatabasePart, response: Response, ingest_id: str) -> Ingest:
    """Queue an ingest again that failed or was cancelled, from the upload that is kept of it (see `can_retry`)."""
    with database.session() as session:
        queued = ingest.retry(session, ingest_id)
    response.headers["Location"] = f"/v1/ingests/{ingest_id}"
    return queued


def _check_names(database: Database, buffer: str, options: IngestOptions) -> None:
    """What the request names exists: better to say so now than after hours of upload."""
    with database.reading() as session:
        buffers.check_thawed(buffers.find(session, buffer))
        if options.extractor is not None:
            extractors.read(session, options.extractor)


def _read(database: Database, ingest_id: str) -> Ingest:
    with database.reading() as session:
        return ingest.read(session, ingest_id)


def _options(request: Request) -> IngestOptions:
    given: dict[str, Any] = dict(request.query_params)
    if "quality" in given:
        raise InvalidRequest(
            "quality: it is the buffer's, so that all of its exemplars have one; give it when you make it"
        )
    if "candidates" in given:
        given["candidates"] = [text for text in given["candidates"].split(",") if text]
        if not given["candidates"]:
            raise InvalidRequest("candidates: at least one quality is needed, as in candidates=10,25,50")
    try:
        return IngestOptions.model_validate(given)
    except ValidationError as error:
        faults = [
            {"where": ".".join(map(str, fault["loc"])), "what": fault["msg"]}
            for fault in error.errors(include_context=False)
        ]
        raise InvalidRequest(
            "; ".join(f"{fault['where']}: {fault['what']}" for fault in faults), faults=faults
        ) from error


def _expected_digest(content_digest: str | None) -> bytes | None:
    """The SHA-256 of a Content-Digest header (RFC 9530); other algorithms are not checked."""
    match = _SHA_256.search(content_digest or "")
    if match is None:
        return None
    try:
        digest = b64decode(match[1], validate=True)
    except binascii.Error as error:
        raise InvalidRequest(f"Content-Digest: {match[1]!r} is not base64") from error
    if len(digest) != 32:
        raise InvalidRequest(f"Content-Digest: a SHA-256 has 32 bytes, {len(digest)} are given")
    return digest
