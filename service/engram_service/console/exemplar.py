"""The page of one exemplar, enlarged and beside itself at each lower quality; and the pictures that pages show."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import HTMLResponse

from engram.errors import NotFound
from engram.fields import Cell
from engram.schemas import PackEntry

from .. import buffers, recoding, samples
from ..routes.exemplars import DigestPath, RowPath, picture_of
from ..routes.packs import picture_of_pack
from ..routes.parts import BufferPath, CachePart, DatabasePart, IfNoneMatch, ReplayPart, SettingsPart, TaskPath
from ..samples import SampleFolder
from .exemplars import gone_when
from .page import render

router = APIRouter()

QualityQuery = Annotated[int | None, Query(ge=1, le=100)]

MAX_SHOWN = 24
"""Numbers of a field that are written out; the rest is for whoever reads the API."""


@router.get("/buffers/{buffer}/exemplars/{pack}/{row}")
def show_exemplar(
    request: Request,
    buffer: BufferPath,
    pack: DigestPath,
    row: RowPath,
    database: DatabasePart,
    replay: ReplayPart,
    settings: SettingsPart,
    corners: str = "",
) -> HTMLResponse:
    """One exemplar; `corners` reads boxes as two corners each instead of a corner and a size."""
    with database.reading() as session:
        whole = buffers.read(session, buffer)
        entry = buffers.pack_of(session, buffer, pack)
        is_live = any(live.digest == pack for live in buffers.live_packs(session, buffer))
    cells = replay.fields(entry, row)
    class_id, rank = place_in(entry, row)
    found = recoding.qualities(replay, entry, row)
    assert whole.image_shape is not None, "a buffer with exemplars has a shape"
    height, width, _ = whole.image_shape
    return render(
        request,
        "exemplar.html",
        buffer=whole,
        entry=entry,
        row=row,
        is_live=is_live,
        class_id=class_id,
        rank=rank,
        qualities=found,
        cells={name: described(cell) for name, cell in cells.items()},
        key=cells.get("key"),
        boxes=boxes(cells.get("boxes"), (height, width), as_corners=bool(corners)),
        corners=bool(corners),
        size=(height, width),
        gone=gone_when(settings.grace_s),
    )


@router.get("/buffers/{buffer}/exemplars/{pack}/{row}/picture")
def show_picture(
    buffer: BufferPath,
    pack: DigestPath,
    row: RowPath,
    database: DatabasePart,
    replay: ReplayPart,
    quality: QualityQuery = None,
    if_none_match: IfNoneMatch = "",
) -> Response:
    """One exemplar as a JPEG."""
    with database.reading() as session:
        entry = buffers.pack_of(session, buffer, pack)
    return picture_of(replay, entry, row, quality, if_none_match)


@router.get("/buffers/{buffer}/packs/{pack}/picture")
def show_strip(
    request: Request,
    buffer: BufferPath,
    pack: DigestPath,
    database: DatabasePart,
    cache: CachePart,
) -> Response:
    """A whole pack as the picture that it is: its first strip, of a large one."""
    with database.reading() as session:
        entry = buffers.pack_of(session, buffer, pack)
    return picture_of_pack(request, cache, entry.digest, entry.exemplars)


@router.get("/buffers/{buffer}/tasks/{task}/originals/{number}")
def show_original(
    buffer: BufferPath, task: TaskPath, number: int, database: DatabasePart, settings: SettingsPart
) -> Response:
    """One original of those that are kept of a task, as it was uploaded."""
    with database.reading() as session:
        buffers.find(session, buffer)
        digest = samples.of_task(session, buffer, task)
    picture = None if digest is None else SampleFolder(settings.samples_dir).picture(digest, number)
    if picture is None:
        raise NotFound(f"task {task} of buffer {buffer!r} keeps no original {number}", buffer=buffer, task=task)
    return Response(picture, media_type="image/png", headers={"Cache-Control": "private, max-age=60"})


def place_in(entry: PackEntry, row: int) -> tuple[int, int]:
    """Class id and rank of a row of a pack."""
    rank = row
    for class_id, count in entry.runs:
        if rank < count:
            return class_id, rank
        rank -= count
    raise NotFound(f"pack {entry.digest} has rows 0..{entry.exemplars - 1}, not {row}", row=row)


def described(cell: Cell) -> str:
    """A value as the page writes it."""
    if isinstance(cell, str):
        return cell
    values = np.asarray(cell)
    if not values.shape:
        return {"True": "true", "False": "false"}.get(
            str(values), f"{values.item():.7g}" if values.dtype.kind == "f" else f"{values}"
        )
    shown = ", ".join(f"{value:.4g}" for value in values.ravel()[:MAX_SHOWN].astype(float).tolist())
    more = ", …" if values.size > MAX_SHOWN else ""
    return f"{values.dtype} {list(values.shape)}: {shown}{more}"


def boxes(cell: Cell | None, size: tuple[int, int], *, as_corners: bool) -> list[dict[str, Any]]:
    """Rectangles to be drawn on the image, of a field of 4 or 5 numbers for each: x, y and a size or another corner.

    Where no number is above 1 they are parts of the image's sides. A fifth number is written beside its box.
    """
    if cell is None or isinstance(cell, str):
        return []
    values = np.asarray(cell, np.float64)
    if values.ndim != 2 or values.shape[1] not in (4, 5) or not np.isfinite(values).all() or not len(values):
        return []
    height, width = size
    corners = values[:, :4] * ([width, height, width, height] if np.abs(values[:, :4]).max() <= 1 else 1)
    if as_corners:
        corners = np.concatenate([corners[:, :2], corners[:, 2:] - corners[:, :2]], axis=1)
    return [
        {"x": x, "y": y, "width": max(w, 0), "height": max(h, 0), "label": f"{row[4]:.4g}" if len(row) > 4 else ""}
        for (x, y, w, h), row in zip(corners.round(2).tolist(), values.tolist(), strict=True)
    ]
