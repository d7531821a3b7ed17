"""Uploads for tests: encoded images, tars made member by member, and queues that are emptied on the spot."""

from __future__ import annotations

import io
import tarfile
import threading
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
from PIL import Image

from engram import tar
from engram.schemas import Ingest, IngestOptions
from engram_service import ingest, work
from engram_service.database import Database
from engram_service.settings import Settings
from engram_service.storage import PackStore

UInt8Array = npt.NDArray[np.uint8]
Member = tuple[str, bytes]


def encoded(image: UInt8Array, format: str = "PNG") -> bytes:
    """One image as a file."""
    out = io.BytesIO()
    Image.fromarray(image if image.shape[2] == 3 else image[..., 0]).save(out, format)
    return out.getvalue()


def pairs(files: Iterable[tuple[str, bytes, int | str]]) -> list[Member]:
    """(extension, file, class id) as members of a WebDataset tar."""
    members: list[Member] = []
    for number, (extension, content, class_id) in enumerate(files):
        members += [(f"{number:04d}.{extension}", content), (f"{number:04d}.cls", str(class_id).encode())]
    return members


def tar_of(members: Iterable[Member]) -> bytes:
    """A tar of these members, as Python's tarfile writes it."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


def tar_of_arrays(images: UInt8Array, class_ids: npt.ArrayLike) -> bytes:
    """What the client sends."""
    return b"".join(tar.write(images, class_ids))


def queue(
    database: Database,
    settings: Settings,
    body: bytes,
    *,
    buffer: str = "b",
    task: int = 0,
    options: IngestOptions | None = None,
    key: str | None = None,
) -> Ingest:
    """The body is queued as if it had been received."""
    spooled = ingest.SpoolFile(settings.spool_dir)
    spooled.write(body)
    spooled.seal(None)
    answer, _ = ingest.enqueue(database, spooled, buffer=buffer, task=task, options=options or IngestOptions(), key=key)
    return answer


def work_through(database: Database, store: PackStore, settings: Settings, owner: str = "test") -> None:
    """Every claimable ingest has been attempted until none is left."""
    while (held := ingest.claim(database, settings, owner=owner)) is not None:
        work.attempt(database, store, settings, held, threading.Event())


def final(database: Database, queued: Ingest) -> Ingest:
    """The ingest as it stands now."""
    with database.reading() as session:
        return ingest.read(session, queued.id)
