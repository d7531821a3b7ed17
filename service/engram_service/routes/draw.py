"""The route of draws: one replay minibatch, a pure function of the URL and the generation.

It is the hot path: a trainer asks for hundreds a second. So the query is parsed here, by hand, in a tenth of the time
that declared parameters take, and a small draw from memory is answered on the event loop: handing it to a thread would
cost more than the draw. What is not in memory is loaded by a thread; what is large waits for room first (`answers`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Coroutine
from typing import Any
from urllib.parse import parse_qsl

from anyio.to_thread import run_sync
from fastapi import APIRouter, Request, Response
from fastapi.routing import APIRoute

from engram import batch, draw
from engram.errors import InvalidRequest
from engram.schemas import MAX_TASK, STRIPS_MEDIA_TYPE, TAR_MEDIA_TYPE

from ..answers import LARGE_BYTES, Answers
from ..replay import Drawn, Picked, Replay, View, Write, tar_of
from .parts import JPEG_MEDIA_TYPE, asks_for_picture


class PlainRoute(APIRoute):
    """A route whose function is called with the request and the path's names, and nothing else.

    FastAPI describes it as any other, but finds no dependencies to solve and no answer to convert, which took a tenth
    of a draw's time.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """The function, called directly."""
        endpoint = self.endpoint

        async def handle(request: Request) -> Response:
            answer: Response = await endpoint(request, **request.path_params)
            return answer

        return handle


router = APIRouter(prefix="/v1/buffers/{buffer}/draw", tags=["replay"], route_class=PlainRoute)

_INTEGER = re.compile(r"-?[0-9]{1,19}")

MAX_ON_LOOP = 2048
"""Exemplars of a global batch that is drawn on the event loop; a larger one would keep other requests waiting."""

MAX_PARAMETERS = 16
"""More cannot be meant: there are nine."""


def _parameter(name: str, description: str, schema: dict[str, Any], *, required: bool = False) -> dict[str, Any]:
    parameter = {"name": name, "in": "query", "required": required, "description": description, "schema": schema}
    # A list is written with commas: tasks=1,2
    return parameter | {"style": "form", "explode": False} if schema.get("type") == "array" else parameter


def _whole(**bounds: int) -> dict[str, Any]:
    return {"type": "integer", **bounds}


_SEED = _whole(minimum=0, maximum=2**63 - 1, default=0)
_TASKS = {"type": "array", "items": _whole(minimum=0, maximum=MAX_TASK), "minItems": 1}

_GENERATION = _whole(minimum=0, maximum=2**31 - 1)
_STRATEGY = {"type": "string", "enum": list(draw.STRATEGIES), "default": "uniform"}

PARAMETERS = [
    _parameter("size", "Exemplars of this rank (of each task for `per_task`).", _whole(minimum=1), required=True),
    _parameter("seed", "Key of the random numbers.", _SEED),
    _parameter("step", "Number of the minibatch.", _SEED),
    _parameter("strategy", "What is drawn alike.", _STRATEGY),
    _parameter("tasks", "Only these tasks: numbers with commas.", _TASKS),
    _parameter("exclude_tasks", "Not these tasks: numbers with commas.", _TASKS),
    _parameter("rank", "Which slice of the global batch; below `world_size`.", _whole(minimum=0, default=0)),
    _parameter("world_size", "Ranks that share the global batch; a setting bounds it.", _whole(minimum=1, default=1)),
    _parameter("generation", "An exact generation; the current one when it is left out.", _GENERATION),
]
_NAMES = frozenset(parameter["name"] for parameter in PARAMETERS)
_BINARY = {"schema": {"type": "string", "format": "binary"}}


@router.get(
    "",
    response_class=Response,
    openapi_extra={"parameters": PARAMETERS},
    responses={
        200: {
            "content": {STRIPS_MEDIA_TYPE: _BINARY, JPEG_MEDIA_TYPE: _BINARY, TAR_MEDIA_TYPE: _BINARY},
            "headers": {
                "Engram-Generation": {"description": "The generation drawn from.", "schema": {"type": "integer"}},
                "Engram-Exemplars": {"description": "Exemplars in the body.", "schema": {"type": "integer"}},
                "Engram-Damaged": {"description": "Chosen but unreadable.", "schema": {"type": "integer"}},
            },
        },
    },
)
async def draw_exemplars(request: Request, buffer: str) -> Response:
    """Draw a minibatch: strips, with `Accept: image/jpeg` one picture, with `application/x-tar` a tar of JPEGs."""
    wanted, generation = parse(request.scope["query_string"])
    replay: Replay = request.app.state.replay
    media_type, write = _representation(dict(request.scope["headers"]).get(b"accept", b""))
    view = replay.peek(buffer, generation)
    drawn: Drawn | Picked | None = None
    if view is not None and write is not tar_of and _is_small(view, wanted):
        drawn = replay.draw(view, wanted, write, may_load=False)
    if drawn is None:
        drawn = await run_sync(_load_and_draw, replay, buffer, generation, wanted, write)
    if isinstance(drawn, Picked):
        answers: Answers = request.app.state.answers
        await answers.take(request.scope, drawn.bytes)
        if await request.is_disconnected():
            return Response()  # to nobody: whoever asked did not wait as long
        async with answers.making:
            drawn = await run_sync(replay.make, drawn)
    return _answer(drawn, media_type)


def parse(query: bytes) -> tuple[draw.Request, int | None]:
    """The request that a query string states, and the generation it names.

    Raises:
        InvalidRequest: a parameter is unknown, given twice, malformed or out of range.
    """
    try:
        pairs = parse_qsl(query.decode("ascii"), keep_blank_values=True, max_num_fields=MAX_PARAMETERS, errors="strict")
    except ValueError as error:
        raise InvalidRequest(f"the query of this draw cannot be read: {error}") from None
    given = dict(pairs)
    if len(given) != len(pairs):
        raise InvalidRequest("a parameter of this draw is given twice; lists are written with commas: tasks=1,2")
    if not given.keys() <= _NAMES:
        unknown = ", ".join(sorted(map(repr, given.keys() - _NAMES)))
        raise InvalidRequest(f"a draw has no parameter {unknown}; it has {', '.join(sorted(_NAMES))}")
    if "size" not in given:
        raise InvalidRequest("a draw needs `size`, the number of exemplars")
    generation = _integer("generation", given["generation"]) if "generation" in given else None
    wanted = draw.Request(
        size=_integer("size", given["size"]),
        seed=_integer("seed", given.get("seed", "0")),
        step=_integer("step", given.get("step", "0")),
        strategy=given.get("strategy", "uniform"),  # type: ignore[arg-type]  # checked by the class
        tasks=_tasks("tasks", given["tasks"]) if "tasks" in given else None,
        exclude_tasks=_tasks("exclude_tasks", given.get("exclude_tasks", "")),
        rank=_integer("rank", given.get("rank", "0")),
        world_size=_integer("world_size", given.get("world_size", "1")),
    )
    return wanted, generation


def _integer(name: str, text: str) -> int:
    if not _INTEGER.fullmatch(text):
        raise InvalidRequest(f"{name} must be an integer, got {text[:40]!r}")
    return int(text)


def _tasks(name: str, text: str) -> tuple[int, ...]:
    if not text:
        return ()
    tasks = tuple(_integer(name, part) for part in text.split(","))
    if min(tasks) < 0 or max(tasks) > MAX_TASK:
        raise InvalidRequest(f"{name} must hold numbers in 0..{MAX_TASK}, got {text[:40]!r}")
    return tasks


def _is_small(view: View, wanted: draw.Request) -> bool:
    """Whether the event loop may plan and make the draw, as far as is known of the buffer's exemplars."""
    count = wanted.size * (len(view.layout.tasks) if wanted.strategy == "per_task" else 1)
    return count * wanted.world_size <= MAX_ON_LOOP and count * view.largest <= LARGE_BYTES


def _representation(accepted: bytes) -> tuple[str, Write]:
    """The media type of the answer and what writes it."""
    accept = accepted.decode("latin-1")
    if TAR_MEDIA_TYPE in accept:
        return TAR_MEDIA_TYPE, tar_of
    if asks_for_picture(accept):
        return JPEG_MEDIA_TYPE, batch.picture
    return STRIPS_MEDIA_TYPE, batch.assemble


def _load_and_draw(
    replay: Replay, buffer: str, generation: int | None, wanted: draw.Request, write: Write
) -> Drawn | Picked:
    """The draw, or what is to be made of it once there is room for it."""
    picked = replay.pick(replay.peek(buffer, generation) or replay.view(buffer, generation), wanted, write)
    return picked if picked.bytes > LARGE_BYTES else replay.make(picked)


def _answer(drawn: Drawn, media_type: str) -> Response:
    headers = {"Engram-Generation": str(drawn.generation), "Engram-Exemplars": str(drawn.exemplars)}
    if drawn.damaged:
        headers["Engram-Damaged"] = str(drawn.damaged)
    return Response(drawn.body, media_type=media_type, headers=headers)
