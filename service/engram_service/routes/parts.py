"""What routes take from the application, and the headers that all of them read the same way."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Header, Path, Query, Request

from engram.errors import InvalidRequest
from engram.packs import PackCache
from engram.schemas import MAX_TASK

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


async def _expected_generation(
    if_match: Annotated[
        str | None, Header(description='The generation, quoted as in an ETag ("7"), that must be the current one.')
    ] = None,
) -> int | None:
    if if_match is None or if_match.strip() == "*":
        return None
    text = if_match.strip().removeprefix('"').removesuffix('"')
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise InvalidRequest(f'If-Match must be a generation in quotes, such as "7", got {if_match!r}')
    return int(text)


DatabasePart = Annotated[Database, Depends(_database)]
StorePart = Annotated[PackStore, Depends(_store)]
CachePart = Annotated[PackCache, Depends(_cache)]
ReplayPart = Annotated[Replay, Depends(_replay)]
LivenessPart = Annotated[Liveness, Depends(_liveness)]
RoomPart = Annotated[Room, Depends(_room)]
SettingsPart = Annotated[Settings, Depends(_settings)]
ExpectedGeneration = Annotated[int | None, Depends(_expected_generation)]

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


def matches(if_none_match: str | None, tag: str) -> bool:
    """True if the client already holds the representation of this tag (RFC 9110, weak comparison)."""
    if if_none_match is None:
        return False
    held = [part.strip().removeprefix("W/") for part in if_none_match.split(",")]
    return tag in held or held == ["*"]
