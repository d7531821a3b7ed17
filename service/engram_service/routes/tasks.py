"""Routes of tasks: read what is stored of a task and what its decision might have been, delete it."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query

from engram.oversight import MapMethod, TaskMap, WhatIf, WhatIfAsk
from engram.schemas import MAX_BUDGET_BYTES, Definition, Rule, Task

from .. import buffers, commit, decisions, maps
from ..samples import SampleFolder
from .parts import BufferPath, DatabasePart, ExpectedState, ReplayPart, RoomPart, SettingsPart, StorePart, TaskPath

router = APIRouter(prefix="/v1/buffers/{buffer}/tasks", tags=["tasks"])


@router.get("/{task}")
def read_task(buffer: BufferPath, task: TaskPath, database: DatabasePart) -> Task:
    """Read a task: its classes, counts, bytes and the decision on its quality."""
    with database.reading() as session:
        return buffers.task(session, buffer, task)


@router.get("/{task}/decision")
def read_what_if(
    buffer: BufferPath,
    task: TaskPath,
    database: DatabasePart,
    definition: Definition | None = None,
    rule: Rule | None = None,
    epsilon: Annotated[float | None, Query(gt=0, le=100)] = None,
    budget_bytes: Annotated[int | None, Query(ge=1, le=MAX_BUDGET_BYTES)] = None,
) -> WhatIf:
    """Read what selection would choose under other settings, from what it measured; what is left out is as it was."""
    ask = WhatIfAsk(definition=definition, rule=rule, epsilon=epsilon, budget_bytes=budget_bytes)
    with database.reading() as session:
        return decisions.what_if(session, buffer, task, ask)


@router.get("/{task}/map")
def read_map(
    buffer: BufferPath,
    task: TaskPath,
    database: DatabasePart,
    replay: ReplayPart,
    settings: SettingsPart,
    method: MapMethod = "pca",
) -> TaskMap:
    """Read a two-dimensional layout of a task's exemplars, at most 2,000, and of the originals kept beside them."""
    return maps.of_task(database, replay, SampleFolder(settings.samples_dir), buffer, task, method)


@router.delete("/{task}", status_code=204)
def delete_task(
    buffer: BufferPath,
    task: TaskPath,
    database: DatabasePart,
    store: StorePart,
    room: RoomPart,
    expected: ExpectedState,
) -> None:
    """Delete a task in a new generation; the shares of other tasks grow, for uploads to come."""
    commit.reshare(
        database,
        store,
        buffer,
        without_task=task,
        expected=expected,
        emergency=room.emergency,
    )
