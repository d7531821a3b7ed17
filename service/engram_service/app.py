"""Build the FastAPI application: `create_app(settings)` makes everything, importing this module makes nothing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from anyio.to_thread import run_sync
from fastapi import FastAPI
from fastapi.routing import APIRoute

from engram.errors import StorageFull, Unavailable
from engram.packs import PackCache, raise_handles

from . import __version__, console, interface, pages, problems
from .answers import Answers
from .around import Around
from .bodies import Bodies
from .database import Database
from .extractors import Turns
from .gate import Gate, require_token_beyond_loopback
from .head import Head
from .liveness import Liveness
from .metrics import Metrics, Requests
from .replay import Replay
from .restore import WAITING
from .room import Room
from .routes import (
    audit,
    buffers,
    disk,
    draw,
    draws,
    exemplars,
    export,
    extractors,
    health,
    ingests,
    metrics,
    packs,
    tasks,
    tokens,
)
from .served import Served
from .sessions import Sessions
from .settings import Settings
from .storage import PackStore, Reserve
from .tokens import USED_S, Tokens

DESCRIPTION = """A compressed replay memory for continual learning.

Upload the images of a finished task; the service keeps as many as a byte budget allows, as JPEG at a quality that it
chooses, and serves replay minibatches. Errors are `application/problem+json` (RFC 9457)."""


def create_app(settings: Settings) -> FastAPI:
    """The whole service as an ASGI application, its database migrated if it is embedded and empty.

    Raises:
        Forbidden: the settings would let other machines in without a token.
        Unavailable: the database does not answer, or its schema is another version's.
    """
    require_token_beyond_loopback(settings)
    database = open_database(settings)
    store = PackStore(settings.packs_dir)
    raise_handles()
    cache = PackCache(store, settings.cache_bytes)
    served, requests = Served(database), Requests()
    replay = Replay(database, cache, settings, served.note)
    known = Tokens(database, settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        # In the thread pool, so that its first thread is there too.
        await run_sync(replay.warm)
        writing = asyncio.create_task(_write_down_uses(known))
        served.start()
        yield
        writing.cancel()
        await run_sync(served.stop)
        await run_sync(known.write_down)
        cache.close()
        database.close()

    app = FastAPI(
        title="Engram",
        version=__version__,
        description=DESCRIPTION,
        lifespan=lifespan,
        redirect_slashes=False,
        docs_url=None,
        redoc_url=None,
        generate_unique_id_function=_operation_id,
        responses={"default": {"model": problems.Problem, "description": "A problem."}},
    )
    app.state.settings, app.state.database = settings, database
    app.state.store, app.state.cache = store, cache
    app.state.replay, app.state.served = replay, served
    app.state.room = Room(database, store, settings)
    app.state.extractor_turns = Turns(settings)
    app.state.liveness = Liveness(settings)
    app.state.answers = Answers(settings.answer_memory_bytes)
    app.state.served = served
    app.state.tokens = known
    app.state.sessions = Sessions(database, known, settings)
    app.state.metrics = Metrics(requests, served, database, cache, settings)
    problems.install(app)
    app.add_middleware(Bodies, settings=settings, answers=app.state.answers)
    app.add_middleware(Gate, tokens=app.state.tokens, sessions=app.state.sessions)
    app.add_middleware(Head)
    app.add_middleware(Around, requests=requests, settings=settings)
    # Routes are tried in order: draws come by the hundred a second, everything else now and then.
    rest = (buffers, extractors, ingests, tasks, export, exemplars, draws, tokens, audit, disk, health, metrics)
    for resource in (draw, packs, *rest):
        app.include_router(resource.router)
    app.include_router(exemplars.counts)
    console.install(app)
    pages.install(app)
    interface.document(app, settings)
    return app


def open_database(settings: Settings) -> Database:
    """The database at the schema of this version; an empty embedded one is migrated on the way.

    Raises:
        Unavailable: it does not answer, is corrupt or its schema is another version's; or it is empty where there are
            packs, which would be collected; or the data folder cannot be written to.
        StorageFull: the disk is full, to the last byte of what is kept for this.
    """
    settings.make_folders()
    reserve = Reserve(settings.reserve_path, settings.reserve_bytes)
    try:
        database = _opened(settings)
    except StorageFull:
        with reserve.given_up():
            database = _opened(settings)
    reserve.keep()
    return database


def _opened(settings: Settings) -> Database:
    if (settings.data_dir / WAITING).exists():
        raise Unavailable(
            f"a restore to {settings.data_dir} is under way or was cut short; if it was cut short, empty the folder "
            "and restore again"
        )
    database = Database(settings)
    try:
        if settings.is_embedded and database.schema_state() == "empty":
            if any(PackStore(settings.packs_dir).digests()):
                raise Unavailable(
                    f"the database in {settings.data_dir} is gone or empty, and there are packs in "
                    f"{settings.packs_dir}; put back a backup of the data folder, or move the packs away to start anew"
                )
            database.migrate()
        database.check()
    except BaseException:
        database.close()
        raise
    return database


async def _write_down_uses(known: Tokens) -> None:
    while True:
        await asyncio.sleep(USED_S / 2)
        await run_sync(known.write_down)


def _operation_id(route: APIRoute) -> str:
    return route.name
