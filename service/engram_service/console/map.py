"""The page of a task's map: exemplars as points, originals as rings; pictures under the pointer."""

from __future__ import annotations

from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse

from engram.oversight import MapMethod, MapPoint, TaskMap

from .. import buffers, maps
from ..routes.parts import BufferPath, DatabasePart, ReplayPart, SettingsPart, TaskPath
from ..samples import SampleFolder
from .page import render

router = APIRouter()

NEAREST = 6
"""Exemplars of each class that are named: those nearest to its middle, and those farthest from it."""


@router.get("/buffers/{buffer}/tasks/{task}/map")
def show_map(
    request: Request,
    buffer: BufferPath,
    task: TaskPath,
    database: DatabasePart,
    replay: ReplayPart,
    settings: SettingsPart,
    method: MapMethod = "pca",
    class_id: int | None = None,
) -> HTMLResponse:
    """The map; `class_id` brings one class to the front."""
    found = maps.of_task(database, replay, SampleFolder(settings.samples_dir), buffer, task, method)
    with database.reading() as session:
        whole = buffers.read(session, buffer)
    classes = sorted({each.class_id for each in (*found.points, *found.originals)})
    return render(
        request,
        "map.html",
        buffer=whole,
        map=found,
        classes=[(number, each, whole.class_names.get(each)) for number, each in enumerate(classes)],
        groups=groups(found, classes, class_id),
        class_id=class_id,
        nearest={each: _extremes(found, each) for each in classes},
        per_class=settings.sample_originals,
    )


def groups(found: TaskMap, classes: list[int], front: int | None) -> list[dict[str, Any]]:
    """Points of one colour and pack, and originals of one colour, in the order in which they are drawn."""
    drawn: dict[tuple[bool, int, str], list[MapPoint]] = {}
    for each in (*found.originals, *found.points):
        drawn.setdefault((each.class_id == front, each.class_id, each.pack or ""), []).append(each)
    return [
        {
            "colour": classes.index(class_id) % 8,
            "is_dim": front is not None and not is_front,
            "pack": pack,
            "points": [
                (500 + 480 * each.x, 500 - 480 * each.y, each.original if not pack else each.row) for each in of
            ],
        }
        for (is_front, class_id, pack), of in sorted(drawn.items())
    ]


def _extremes(found: TaskMap, class_id: int) -> tuple[list[MapPoint], list[MapPoint]]:
    """The exemplars of a class nearest to the middle of it, and those farthest from there."""
    own = [each for each in found.points if each.class_id == class_id]
    if not own:
        return [], []
    places = np.array([(each.x, each.y) for each in own])
    order = np.argsort(np.linalg.norm(places - places.mean(axis=0), axis=1), kind="stable").tolist()
    near = order[:NEAREST]
    far = [place for place in reversed(order) if place not in near][:NEAREST]
    return [own[place] for place in near], [own[place] for place in far]
