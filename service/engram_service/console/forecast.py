"""The dry run: what another budget or more classes would leave of a buffer; and the button that does it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from engram import etags
from engram.errors import EngramError, InvalidRequest
from engram.oversight import MAX_NEW_CLASSES, Forecast
from engram.schemas import MAX_BUDGET_BYTES, BufferChange

from .. import buffers, commit
from ..acting import principal
from ..database import Database
from ..forecast import forecast
from ..routes.parts import BufferPath, DatabasePart, RoomPart, StorePart
from ..storage import PackStore
from .forms import Text, amount, model, whole
from .page import redirect, render

router = APIRouter(prefix="/buffers/{buffer}")

Asked = Annotated[str, Query(max_length=100)]


@dataclass(frozen=True)
class Loss:
    """A class over all tasks, now and then."""

    class_id: int
    exemplars: int
    bytes: int
    exemplars_then: int
    bytes_then: int


@router.get("/forecast")
def forecast_page(
    request: Request,
    buffer: BufferPath,
    database: DatabasePart,
    store: StorePart,
    budget: Asked = "",
    new_classes: Asked = "",
) -> Response:
    """What would be left under the budget, and once so many classes more had come."""
    return _page(request, database, store, buffer, budget=budget, new_classes=new_classes)


@router.post("/budget")
def change_budget(
    request: Request,
    buffer: BufferPath,
    database: DatabasePart,
    store: StorePart,
    room: RoomPart,
    budget: Text = "",
    state: Text = "",
) -> Response:
    """The buffer has this budget, if it still is as it was when the forecast was made."""
    principal().need("admin", buffer)
    try:
        change = model(BufferChange, {"budget_bytes": amount("budget", budget)})
        expected = frozenset({state}) if state else None
        commit.change(database, store, buffer, change, expected=expected, emergency=room.emergency)
    except EngramError as error:
        return _page(request, database, store, buffer, budget=budget, new_classes="", problem=error)
    return redirect(request, "buffers", buffer)


def _page(
    request: Request,
    database: Database,
    store: PackStore,
    name: str,
    *,
    budget: str,
    new_classes: str,
    problem: EngramError | None = None,
) -> Response:
    found: Forecast | None = None
    budget_bytes: int | None = None
    with database.reading() as session:
        buffer = buffers.read(session, name)
        try:
            budget_bytes, more = _asked(budget, new_classes)
            found = forecast(session, store, name, budget_bytes=budget_bytes, new_classes=more)
        except EngramError as error:
            problem = problem or error
    return render(
        request,
        "forecast.html",
        buffer=buffer,
        forecast=found,
        losses=[] if found is None else losses(found),
        budget=budget,
        budget_bytes=budget_bytes,
        new_classes=new_classes,
        state=etags.of(buffer.generation, buffer.created_at),
        problem=problem,
    )


def _asked(budget: str, new_classes: str) -> tuple[int | None, int]:
    """The budget, None being the one of now, and the number of new classes that a form asks for.

    Raises:
        InvalidRequest: one of them is none, or out of range.
    """
    budget_bytes = amount("budget", budget) if budget.strip() else None
    more = whole("new classes", new_classes) if new_classes.strip() else 0
    if budget_bytes is not None and not 1 <= budget_bytes <= MAX_BUDGET_BYTES:
        raise InvalidRequest(f"budget: it lies in 1..{MAX_BUDGET_BYTES} bytes, {budget_bytes} does not")
    if more > MAX_NEW_CLASSES:
        raise InvalidRequest(f"new classes: at most {MAX_NEW_CLASSES}, {more} are more")
    return budget_bytes, more


def losses(found: Forecast) -> list[Loss]:
    """Every class, over the tasks that hold it."""
    sums: dict[int, list[int]] = {}
    for each in found.classes:
        held = sums.setdefault(each.class_id, [0, 0, 0, 0])
        for at, more in enumerate((each.exemplars, each.bytes, each.exemplars_then, each.bytes_then)):
            held[at] += more
    return [Loss(class_id, *sums[class_id]) for class_id in sorted(sums)]
