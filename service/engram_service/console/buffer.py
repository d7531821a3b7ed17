"""The page of a buffer: its tasks and classes against their shares, names of classes, and what deletes it or a task."""

from __future__ import annotations

from dataclasses import dataclass, field

from anyio.to_thread import run_sync
from fastapi import APIRouter, Request, Response

from engram import etags
from engram.errors import EngramError, InvalidRequest
from engram.schemas import Buffer, BufferChange, Task

from .. import buffers, commit
from ..acting import principal
from ..database import Database
from ..room import Room
from ..routes.parts import BufferPath, DatabasePart, ReplayPart, RoomPart, StorePart, TaskPath
from ..storage import PackStore
from .forms import Text, confirmed, model
from .page import redirect, render

router = APIRouter(prefix="/buffers/{buffer}")


@dataclass
class ClassTotal:
    """A class over all tasks that hold it."""

    class_id: int
    name: str | None
    tasks: list[int] = field(default_factory=list)
    seen: int = 0
    exemplars: int = 0
    bytes: int = 0
    share_bytes: int = 0


@router.get("")
def buffer_page(request: Request, buffer: BufferPath, database: DatabasePart) -> Response:
    """What the buffer holds, task by task."""
    return _page(request, database, buffer)


@router.get("/classes")
def classes_page(request: Request, buffer: BufferPath, database: DatabasePart) -> Response:
    """What the buffer holds, class by class, and their names."""
    return _classes(request, database, buffer)


@router.post("/classes")
async def rename_classes(
    request: Request, buffer: BufferPath, database: DatabasePart, store: StorePart, room: RoomPart
) -> Response:
    """Classes have the names in the fields `name-ID`."""
    form = await request.form()
    given = {key.removeprefix("name-"): str(value).strip() for key, value in form.items() if key.startswith("name-")}
    return await run_sync(_rename, request, database, store, room, buffer, given)


def _rename(
    request: Request, database: Database, store: PackStore, room: Room, buffer: str, given: dict[str, str]
) -> Response:
    with database.reading() as session:
        found = buffers.read(session, buffer)
    known = {str(class_id): name for class_id, name in found.class_names.items()}
    wanted = {class_id: name for class_id, name in given.items() if name != known.get(class_id, "")}
    try:
        if any(not name for name in wanted.values()):
            raise InvalidRequest("a name can be replaced by another one, not taken away")
        if wanted:
            change = model(BufferChange, {"class_names": wanted})
            commit.change(database, store, buffer, change, emergency=room.emergency)
    except EngramError as error:
        return _classes(request, database, buffer, given=given, problem=error)
    return redirect(request, "buffers", buffer, "classes")


@router.post("/tasks/{task}/delete")
def delete_task(
    request: Request,
    buffer: BufferPath,
    task: TaskPath,
    database: DatabasePart,
    store: StorePart,
    room: RoomPart,
    confirm: Text = "",
    state: Text = "",
) -> Response:
    """The buffer no longer has this task."""
    try:
        confirmed(str(task), confirm)
        commit.reshare(
            database,
            store,
            buffer,
            without_task=task,
            expected=frozenset({state}) if state else None,
            emergency=room.emergency,
        )
    except EngramError as error:
        return _page(request, database, buffer, problem=error)
    return redirect(request, "buffers", buffer)


@router.post("/delete")
def delete_buffer(
    request: Request,
    buffer: BufferPath,
    database: DatabasePart,
    replay: ReplayPart,
    room: RoomPart,
    confirm: Text = "",
    state: Text = "",
) -> Response:
    """The buffer is gone with everything in it."""
    principal().need("admin", buffer)

    def delete() -> None:
        with database.session() as session:
            buffers.delete(session, buffer, expected=frozenset({state}) if state else None)

    try:
        confirmed(buffer, confirm)
        room.freeing(delete)
    except EngramError as error:
        return _page(request, database, buffer, problem=error)
    replay.forget(buffer)
    return redirect(request)


def _page(request: Request, database: Database, name: str, *, problem: EngramError | None = None) -> Response:
    with database.reading() as session:
        found = buffers.read(session, name)
        tasks = buffers.tasks(session, name)
        generations = buffers.generations(session, name)
    return render(
        request,
        "buffer.html",
        buffer=found,
        tasks=tasks,
        generations=generations,
        tasks_bytes={task.task: task.bytes for task in tasks},
        classes_bytes={f"class {each.class_id} {each.name or ''}": each.bytes for each in totals(found, tasks)},
        state=etags.of(found.generation, found.created_at),
        problem=problem,
    )


def _classes(
    request: Request,
    database: Database,
    name: str,
    *,
    given: dict[str, str] | None = None,
    problem: EngramError | None = None,
) -> Response:
    with database.reading() as session:
        found = buffers.read(session, name)
        tasks = buffers.tasks(session, name)
    return render(
        request,
        "classes.html",
        buffer=found,
        totals=totals(found, tasks),
        given=given or {},
        problem=problem,
    )


def totals(buffer: Buffer, tasks: list[Task]) -> list[ClassTotal]:
    """Every class that was ever seen or named, by id."""
    found = {class_id: ClassTotal(class_id, name) for class_id, name in buffer.class_names.items()}
    for task in tasks:
        for held in task.classes:
            total = found.setdefault(held.class_id, ClassTotal(held.class_id, held.name))
            total.tasks.append(task.task)
            total.seen += held.seen
            total.exemplars += held.exemplars
            total.bytes += held.bytes
            total.share_bytes += held.share_bytes
    return [found[class_id] for class_id in sorted(found)]
