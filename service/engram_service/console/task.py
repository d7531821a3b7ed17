"""The page of a task: what it holds, and why at this quality: R and N of every candidate, and other choices."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse

from engram.oversight import WhatIf, WhatIfAsk
from engram.schemas import Decision, Task

from .. import buffers, decisions
from ..routes.parts import BufferPath, DatabasePart, TaskPath
from .asked import validated
from .page import render

router = APIRouter()


@router.get("/buffers/{buffer}/tasks/{task}")
def show_task(request: Request, buffer: BufferPath, task: TaskPath, database: DatabasePart) -> HTMLResponse:
    """The task; the query may ask for another epsilon, definition, rule or budget."""
    given = {name: request.query_params.get(name, "") for name in WhatIfAsk.model_fields}
    ask = validated(WhatIfAsk, {name: text for name, text in given.items() if text})
    with database.reading() as session:
        whole = buffers.read(session, buffer)
        found = buffers.task(session, buffer, task)
        again = None if found.decision is None else decisions.what_if(session, buffer, task, ask)
    return render(
        request,
        "task.html",
        buffer=whole,
        task=found,
        again=again,
        is_asked=any(given.values()),
        ratios=None if again is None or found.decision is None else _ratios(found.decision, again),
        numbers=None if again is None else _numbers(again),
        rows=[] if again is None or found.decision is None else _rows(found.decision, again),
        troubles=_troubles(found),
    )


def _rows(decision: Decision, again: WhatIf) -> list[dict[str, Any]]:
    """What each candidate was and would be, for the table."""
    return [
        {"then": then, "was": was, "extractor": None if was.pixel_ratio is None else was.ratio[again.definition]}
        for was, then in zip(decision.candidates, again.candidates, strict=True)
    ]


def _ratios(decision: Decision, again: WhatIf) -> dict[str, Any]:
    """R over candidate quality, and the band in which a candidate passes."""
    series: list[dict[str, Any]] = [
        {"label": "R over all tasks", "values": [each.pooled_ratio for each in again.candidates]},
        {"label": "R of this task", "values": [each.ratio for each in again.candidates], "dashed": True},
    ]
    if any(each.pixel_ratio is not None for each in decision.candidates):
        under = [each.ratio.get(again.definition) for each in decision.candidates]
        series.append({"label": "R under the extractor", "values": under, "dashed": True})
    low, high = 1 - again.epsilon, 1 + again.epsilon
    drawn = [value for each in series for value in each["values"] if isinstance(value, float)]
    return {
        "x": {"label": "quality", "values": [each.quality for each in again.candidates], "exact": True},
        "y": {"label": "R", "min": min([0, low, *drawn]), "max": max([1.1 * high, *(1.05 * value for value in drawn)])},
        "series": series,
        "bands": [{"from": max(low, 0), "to": high, "label": "within epsilon of 1"}],
        "marks": [] if again.quality is None else [{"x": again.quality, "label": f"chosen: {again.quality}"}],
    }


def _numbers(again: WhatIf) -> dict[str, Any]:
    """N over candidate quality."""
    return {
        "x": {"label": "quality", "values": [each.quality for each in again.candidates], "exact": True},
        "y": {"label": "exemplars", "min": 0},
        "series": [
            {"label": "fitted when uploaded", "values": [each.exemplars for each in again.candidates]},
            {
                "label": "would fit, about",
                "values": [each.exemplars_then for each in again.candidates],
                "dashed": True,
            },
        ],
    }


def _troubles(task: Task) -> dict[int, list[str]]:
    """What is the matter with classes, by id."""
    found: dict[int, list[str]] = {each.class_id: [] for each in task.classes}
    for each in task.classes:
        if not each.exemplars:
            found[each.class_id].append("nothing is kept: its share holds not one exemplar")
    if task.decision is not None and task.decision.candidates:
        for each in task.classes:
            if each.class_id not in task.decision.blocks:
                found[each.class_id].append("too few images to compare, so it had no say in the choice")
            at = [str(c.quality) for c in task.decision.candidates if each.class_id in c.singular_classes]
            if at:
                found[each.class_id].append(
                    f"some of its images are nearly the same: volumes singular at {', '.join(at)}"
                )
    return {class_id: said for class_id, said in found.items() if said}
