"""What routes take from the application, and the headers that all of them read the same way."""

from __future__ import annotations

import re
from typing import Annotated

from fastapi import Depends, Header, Path, Query, Request

from engram.errors import InvalidRequest
from engram.packs import PackCache
from engram.schemas import MAX_TASK

from ..buffers import Expected
from ..database import Database
from ..liveness import Liveness
from ..replay import Replay
from ..room import Room
from ..settings import Settings
from ..storage import PackStore


# Coroutines, so that FastAPI calls them where they are instead of hiring a thread for each.
async def _database(request: Request) -> Database:
    found: Database = request.app.state.database
    return found


async def _store(request: Request) -> PackStore:
    found: PackStore = request.app.state.store
    return found


async def _cache(request: Request) -> PackCache:
    found: PackCache = request.app.state.cache
    return found


async def _replay(request: Request) -> Replay:
    found: Replay = request.app.state.replay
    return found


async def _liveness(request: Request) -> Liveness:
    found: Liveness = request.app.state.liveness
    return found


async def _room(request: Request) -> Room:
    found: Room = request.app.state.room
    return found


async def _settings(request: Request) -> Settings:
    found: Settings = request.app.state.settings
    return found


_STATE = '"[0-9]{1,10}(-[0-9a-f]{1,16})?"'
_STATES = re.compile(rf"\*|{_STATE}( ?, ?{_STATE})*")


async def _expected_state(
    if_match: Annotated[
        str,
        Header(
            description="The ETag of the buffer that the request is meant for, or the number of its generation in "
            'quotes ("7").',
            json_schema_extra={"pattern": f"^({_STATES.pattern})$"},
        ),
    ] = "*",
) -> Expected | None:
    text = if_match.strip()
    if not _STATES.fullmatch(text):
        raise InvalidRequest(
            f'If-Match must be an ETag of the buffer or its generation in quotes, "7", got {if_match!r}'
        )
    return None if text == "*" else frozenset(part.strip(' "') for part in text.split(","))


DatabasePart = Annotated[Database, Depends(_database)]
StorePart = Annotated[PackStore, Depends(_store)]
CachePart = Annotated[PackCache, Depends(_cache)]
ReplayPart = Annotated[Replay, Depends(_replay)]
LivenessPart = Annotated[Liveness, Depends(_liveness)]
RoomPart = Annotated[Room, Depends(_room)]
SettingsPart = Annotated[Settings, Depends(_settings)]
ExpectedState = Annotated[Expected | None, Depends(_expected_state)]
IfNoneMatch = Annotated[str, Header(description="ETags of what the client holds.")]

BufferPath = Annotated[str, Path(description="The buffer's name.")]
TaskPath = Annotated[int, Path(ge=0, le=MAX_TASK, description="The task's number.")]
Generation = Annotated[
    int | None, Query(ge=0, lt=2**31, description="An exact generation; the current one when it is left out.")
]


JPEG_MEDIA_TYPE = "image/jpeg"


def asks_for_picture(accept: str) -> bool:
    """True if an Accept header asks for a picture, as a browser's `<img>` does."""
    return JPEG_MEDIA_TYPE in accept or "image/*" in accept


def etag(value: object) -> str:
    """The value as a strong entity tag."""
    return f'"{value}"'


def matches(if_none_match: str, tag: str) -> bool:
    """True if the client already holds the representation of this tag (RFC 9110, weak comparison)."""
    held = [part.strip().removeprefix("W/") for part in if_none_match.split(",")]
    return tag in held or held == ["*"]
