"""Check the ONNX models that trainers upload and keep them under their SHA-256.

A model is stored only after a bounded child process has run it (`embedder.inspect`), so whatever an ingest
names later is known to work. Its file is durable before its row is committed, and the row before the response.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from secrets import token_hex

from anyio.to_thread import run_sync
from sqlalchemy.orm import Session

from engram.errors import BadUpload, NotFound, TooLarge
from engram.files import disk_errors, fsync_path
from engram.schemas import Extractor

from .database import Database
from .embedder import ExtractorLimits, inspect
from .settings import Settings
from .tables import ExtractorRow

BLOCK_BYTES = 2**20
"""How much of a body is collected before a thread is hired to write it."""


async def register(
    database: Database, settings: Settings, sha256: str, chunks: AsyncIterator[bytes]
) -> tuple[Extractor, bool]:
    """The model is usable by ingests; True if it is new.

    Raises:
        TooLarge: the body exceeds `max_extractor_bytes`.
        BadUpload: the body's digest is not `sha256`.
        BadExtractor: the model cannot serve; the message says why.
        StorageFull: the disk is full; nothing is left behind.
    """
    temporary = settings.extractors_dir / f".{token_hex(8)}.tmp"
    try:
        found = await _spool(chunks, temporary, settings.max_extractor_bytes)
        if found != sha256:
            raise BadUpload(f"the body's SHA-256 is {found}, the address says {sha256}", sha256=found)
        return await run_sync(_keep, database, settings, sha256, temporary)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


def read(session: Session, sha256: str) -> Extractor:
    """A registered model.

    Raises:
        NotFound: there is no such extractor.
    """
    row = session.get(ExtractorRow, sha256)
    if row is None:
        raise NotFound(f"there is no extractor {sha256}; PUT its ONNX bytes to /v1/extractors/{sha256}", sha256=sha256)
    return _describe(row)


def path(settings: Settings, sha256: str) -> Path:
    """Where the bytes of a registered model are."""
    return settings.extractors_dir / sha256


def limits(settings: Settings) -> ExtractorLimits:
    """What the settings allow the process that runs a model."""
    return ExtractorLimits(
        memory_bytes=settings.extractor_memory_bytes,
        batch_s=settings.extractor_batch_s,
        max_bytes=settings.max_extractor_bytes,
    )


async def _spool(chunks: AsyncIterator[bytes], temporary: Path, max_bytes: int) -> str:
    """The digest of the body, which is durable in `temporary`."""
    digest = hashlib.sha256()
    size = 0
    with disk_errors(temporary, max_bytes), temporary.open("xb", buffering=0) as file:

        def write(block: bytes) -> None:
            digest.update(block)
            rest = memoryview(block)
            while rest:
                rest = rest[os.write(file.fileno(), rest) :]

        waiting = bytearray()
        async for chunk in chunks:
            size += len(chunk)
            if size > max_bytes:
                raise TooLarge(
                    f"the extractor has more than {max_bytes} bytes, the most that ENGRAM_MAX_EXTRACTOR_BYTES allows",
                    max_extractor_bytes=max_bytes,
                )
            waiting += chunk
            if len(waiting) >= BLOCK_BYTES:
                await run_sync(write, bytes(waiting))
                waiting.clear()
        await run_sync(write, bytes(waiting))
        await run_sync(os.fsync, file.fileno())
    return digest.hexdigest()


def _keep(database: Database, settings: Settings, sha256: str, temporary: Path) -> tuple[Extractor, bool]:
    final = path(settings, sha256)
    with database.reading() as session:
        known = session.get(ExtractorRow, sha256)
        if known is not None and final.is_file():
            return _describe(known), False
    info = inspect(temporary, limits(settings))
    size = temporary.stat().st_size
    temporary.rename(final)
    fsync_path(final.parent)
    with database.session() as session:
        # Another upload of the same model may have been faster; a row without a file is made good by ours.
        known = session.get(ExtractorRow, sha256)
        if known is None:
            known = ExtractorRow(
                sha256=sha256,
                bytes=size,
                input_shape=list(info.input_shape),
                dimensions=info.dimensions,
                created_at=time.time(),
            )
            session.add(known)
            session.flush()
            return _describe(known), True
        return _describe(known), False


def _describe(row: ExtractorRow) -> Extractor:
    batch, channels, height, width = row.input_shape
    return Extractor(
        sha256=row.sha256,
        bytes=row.bytes,
        input_shape=(batch, channels, height, width),
        dimensions=row.dimensions,
        created_at=datetime.fromtimestamp(row.created_at, UTC),
    )
