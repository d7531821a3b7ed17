"""Routes of tasks: read what is stored of a task, delete it."""

from __future__ import annotations

from fastapi import APIRouter

from engram.schemas import Task

from .. import buffers, commit
from .parts import BufferPath, DatabasePart, ExpectedState, RoomPart, StorePart, TaskPath

router = APIRouter(prefix="/v1/buffers/{buffer}/tasks", tags=["tasks"])


@router.get("/{task}")
def read_task(buffer: BufferPath, task: TaskPath, database: DatabasePart) -> Task:
    """Read a task: its classes, counts, bytes and the decision on its quality."""
    with database.reading() as session:
        return buffers.task(session, buffer, task)


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
