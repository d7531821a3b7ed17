"""The route of the disk: what the service takes there, and what is free."""

from __future__ import annotations

from fastapi import APIRouter

from engram.oversight import Disk

from .. import disk
from .parts import DatabasePart, SettingsPart

router = APIRouter(tags=["operators"])


@router.get("/v1/disk")
def usage(database: DatabasePart, settings: SettingsPart) -> Disk:
    """Tell what packs, uploads, extractors and the database take, and what is free."""
    with database.reading() as session:
        return disk.usage(session, settings)
