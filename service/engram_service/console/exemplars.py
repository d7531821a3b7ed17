"""The grid of a buffer's exemplars: filters in the address, counts that filter on a click, removing and relabelling."""

from __future__ import annotations

import re
from typing import Annotated, Any, NamedTuple

from fastapi import APIRouter, Form, Request, Response
from fastapi.responses import HTMLResponse

from engram.errors import InvalidRequest
from engram.fields import KEY
from engram.memory import Where
from engram.oversight import Bin, Histogram
from engram.schemas import MAX_CLASS_ID, MAX_TASK, Buffer

from .. import buffers, commit, listing
from ..filters import scalars
from ..replay import View
from ..routes.filtering import Asked, place
from ..routes.parts import BufferPath, DatabasePart, ReplayPart, RoomPart, SettingsPart, StorePart
from .asked import filters
from .page import readable_bytes, redirect, render

router = APIRouter()

PAGE = 120
"""Pictures on a page: a few screens, ten rows of twelve on a wide one."""

MAX_COUNTED_FIELDS = 4
"""Fields that are counted beside class and bytes."""

MAX_LISTED = 300
"""Tasks, or classes, that can be chosen from a list; the number of one of more is typed."""

_QUERY = ("task", "class_id", "min_bytes", "max_bytes", "where")

Number = Annotated[str, Form()]


class Bar(NamedTuple):
    """A bin of a histogram on the page: its name, how many, how high, and the filters that it stands for."""

    label: str
    exemplars: int
    height: float
    query: dict[str, Any]


@router.get("/buffers/{buffer}/exemplars")
def show_exemplars(
    request: Request, buffer: BufferPath, database: DatabasePart, replay: ReplayPart, settings: SettingsPart
) -> Response:
    """A page of the grid. A condition that the form adds becomes part of the address."""
    added = _added(request)
    if added is not None:
        kept = {name: request.query_params.getlist(name) for name in _QUERY}
        kept["where"] = [*kept["where"], added]
        return redirect(request, "buffers", buffer, "exemplars", **{n: [t for t in v if t] for n, v in kept.items()})
    asked = filters(request)
    view = replay.view(buffer, None)
    found = listing.page(
        replay, view, asked.on(view.schema), limit=PAGE, after=place(request.query_params.get("cursor"))
    )
    with database.reading() as session:
        whole = buffers.read(session, buffer)
    return render(
        request,
        "exemplars.html",
        buffer=whole,
        asked=asked,
        page=found,
        fields=scalars(view.schema),
        has_key=view.schema.has_key,
        total=_total(view, asked),
        conditions=[(text, [other for other in asked.where if other != text]) for text in asked.where],
        strip=_strip(view, asked),
        most_listed=MAX_LISTED,
        gone=gone_when(settings.grace_s),
    )


@router.get("/buffers/{buffer}/histograms")
def show_histograms(request: Request, buffer: BufferPath, database: DatabasePart, replay: ReplayPart) -> HTMLResponse:
    """How the exemplars that pass the filters are spread, part of the page of the grid."""
    asked = filters(request)
    view = replay.view(buffer, None)
    wanted = asked.on(view.schema)
    with database.reading() as session:
        whole = buffers.read(session, buffer)
    shown = []
    if asked.class_id is None:
        shown.append(("Class", listing.histogram(replay, view, wanted, "class")))
    shown.append(("Bytes", listing.histogram(replay, view, wanted, "bytes")))
    # Keys are all different.
    counted = [each for each in scalars(view.schema) if each.name != KEY][:MAX_COUNTED_FIELDS]
    shown += [(each.name, listing.histogram(replay, view, wanted, f"field:{each.name}")) for each in counted]
    return render(
        request,
        "histograms.html",
        buffer=whole,
        histograms=[(title, found, bars(found, whole, asked)) for title, found in shown if found.bins],
    )


@router.post("/buffers/{buffer}/exemplars/remove")
def remove(
    request: Request,
    buffer: BufferPath,
    database: DatabasePart,
    store: StorePart,
    room: RoomPart,
    task: Number = "",
    class_id: Number = "",
    key: Number = "",
    pack: Number = "",
    row: Number = "",
    confirm: Number = "",
) -> Response:
    """Exemplars are removed: one, those of a key, or, once that was typed, a class."""
    where, expected = _meant(database, buffer, task, class_id, key, pack, row)
    if where.is_whole and confirm.strip() != f"delete {where.class_id}":
        raise InvalidRequest(f"type `delete {where.class_id}` to confirm that all exemplars of the class go")
    commit.remove(database, store, buffer, where, expected=expected, emergency=room.emergency)
    return redirect(request, "buffers", buffer, "exemplars", **_afterwards(where))


@router.post("/buffers/{buffer}/exemplars/relabel")
def relabel(
    request: Request,
    buffer: BufferPath,
    database: DatabasePart,
    store: StorePart,
    to: Annotated[str, Form()],
    task: Number = "",
    class_id: Number = "",
    key: Number = "",
    pack: Number = "",
    row: Number = "",
) -> Response:
    """Exemplars are of another class, given by id or by name."""
    where, expected = _meant(database, buffer, task, class_id, key, pack, row)
    with database.reading() as session:
        named = {name: number for number, name in buffers.read(session, buffer).class_names.items()}
    wanted = named.get(to.strip(), to.strip())
    target = _integer("the new class", str(wanted), MAX_CLASS_ID)
    if target is None:
        raise InvalidRequest("say which class they belong to, by its id or its name")
    commit.relabel(database, store, buffer, where, target, expected=expected)
    return redirect(request, "buffers", buffer, "exemplars", task=where.task, class_id=target)


def gone_when(grace_s: float) -> str:
    """When what is deleted is really gone, as confirmations say it."""
    return (
        "It is gone from the buffer at once and from mirrors at their next sync. Older generations keep it for "
        f"{_duration(grace_s)}, so that draws that are on their way can end; snapshots and forks of the buffer keep it "
        "until it is removed there, and backups as long as you keep them. This is written to the audit and cannot be "
        "undone."
    )


def bars(found: Histogram, buffer: Buffer, asked: Asked) -> list[Bar]:
    """The bins, with the filters that a click on each adds to those asked for."""
    most = max((each.exemplars for each in found.bins), default=1) or 1
    return [
        Bar(_label(found.of, each, buffer), each.exemplars, 100 * each.exemplars / most, _query(found.of, each, asked))
        for each in found.bins
    ]


def _label(of: str, each: Bin, buffer: Buffer) -> str:
    if of == "class":
        name = buffer.class_names.get(int(each.value or 0))
        return f"{each.value} {name}" if name else f"{each.value}"
    if each.low is None or each.high is None:
        return {True: "true", False: "false"}[each.value] if isinstance(each.value, bool) else f"{each.value}"
    if of == "bytes":
        return f"{readable_bytes(each.low)} to {readable_bytes(each.high)}"
    return f"{each.low:.4g} to {each.high:.4g}"


def _query(of: str, each: Bin, asked: Asked) -> dict[str, Any]:
    """The whole query of the page behind a bar."""
    found: dict[str, Any] = {**asked._asdict(), "cursor": None}
    if of == "class":
        return found | {"class_id": each.value}
    if of == "bytes":
        return found | {"min_bytes": int(each.low or 0), "max_bytes": int(each.high or 0) - 1}
    name = of.partition(":")[2]
    if each.low is None or each.high is None:
        text = {True: "true", False: "false"}[each.value] if isinstance(each.value, bool) else f"{each.value}"
        new = [f"{name}:eq:{text}"]
    else:
        new = [f"{name}:ge:{each.low!r}", f"{name}:lt:{each.high!r}"]
    old = [text for text in asked.where if not text.startswith(f"{name}:")]
    return found | {"where": [*old, *new]}


def _added(request: Request) -> str | None:
    """The condition that the form of the page adds."""
    query = request.query_params
    name, operation = query.get("field", ""), query.get("operation", "")
    value = query.get("value", "")
    return f"{name}:{operation}:{value}" if name and operation else None


def _total(view: View, asked: Asked) -> int:
    """How many exemplars the tasks and classes asked for have."""
    return int(view.layout.stretches(asked.task, asked.class_id)[1].sum())


def _strip(view: View, asked: Asked) -> str | None:
    """The pack of the task asked for."""
    if asked.task is None:
        return None
    begins, _ = view.layout.stretches(asked.task, None)
    return view.digests[int(view.layout.locate(begins[:1]).packs[0])] if len(begins) else None


def _meant(
    database: Any, buffer: str, task: str, class_id: str, key: str, pack: str, row: str
) -> tuple[Where, buffers.Expected | None]:
    """What a form names: one exemplar by its pack and row, else all of a class or a key.

    Raises:
        InvalidRequest: nothing, or what cannot be.
    """
    if pack:
        number = _integer("row", row, 2**31 - 1)
        if number is None:
            raise InvalidRequest(f"say which row of pack {pack[:64]} is meant")
        with database.reading() as session:
            return commit.place_of(session, buffer, pack, number)
    where = Where(
        task=_integer("task", task, MAX_TASK),
        class_id=_integer("class id", class_id, MAX_CLASS_ID),
        keys=(key,) if key else None,
    )
    return where, None


def _integer(what: str, text: str, most: int) -> int | None:
    if not text:
        return None
    if re.fullmatch("[0-9]{1,10}", text) is None or int(text) > most:
        raise InvalidRequest(f"{what} is a number in 0..{most}, got {text[:40]!r}")
    return int(text)


def _afterwards(where: Where) -> dict[str, Any]:
    """The filters of the page that shows what is left."""
    return {"task": where.task, "class_id": None if where.is_whole else where.class_id}


def _duration(seconds: float) -> str:
    """600 s as "10 minutes"."""
    for unit, size in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= size and seconds % size == 0:
            count = int(seconds // size)
            return f"{count} {unit}{'s' if count != 1 else ''}"
    return f"{seconds:g} seconds"
