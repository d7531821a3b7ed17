"""The query parameters that say which exemplars are meant, the same for pages, histograms and the console."""

from __future__ import annotations

import re
from typing import Annotated, NamedTuple

from fastapi import Depends, Query
from pydantic import Field

from engram.errors import InvalidRequest
from engram.fields import Schema
from engram.schemas import MAX_CLASS_ID, MAX_TASK

from .. import filters
from ..filters import MAX_CONDITIONS, Filters

TaskFilter = Annotated[int | None, Query(ge=0, le=MAX_TASK)]
ClassFilter = Annotated[int | None, Query(ge=0, le=MAX_CLASS_ID)]
BytesFilter = Annotated[int | None, Query(ge=0, lt=2**31, description="Of an exemplar, its fields included.")]

CURSOR = re.compile(r"([0-9]{1,10})\.([0-9]{1,10})\.([0-9]{1,10})")


class Asked(NamedTuple):
    """Filters as they were asked for: what they mean depends on the fields of the buffer."""

    task: int | None
    class_id: int | None
    min_bytes: int | None
    max_bytes: int | None
    where: list[str]

    def on(self, schema: Schema) -> Filters:
        """The filters, on exemplars with these fields.

        Raises:
            InvalidRequest: a field is filtered by that is not there, or cannot be.
        """
        return Filters(self.task, self.class_id, self.min_bytes, self.max_bytes, filters.parse(self.where, schema))


async def _asked(
    task: TaskFilter = None,
    class_id: ClassFilter = None,
    min_bytes: BytesFilter = None,
    max_bytes: BytesFilter = None,
    where: Annotated[
        list[Annotated[str, Field(max_length=filters.MAX_VALUE_BYTES)]] | None,
        Query(
            max_length=MAX_CONDITIONS,
            description="A condition on a field, NAME:OPERATION:VALUE, as in `score:ge:0.5` or `key:prefix:train/`; "
            "given several times, all must hold. Numbers have eq, ne, lt, le, gt, ge; texts eq, ne, prefix.",
        ),
    ] = None,
) -> Asked:
    return Asked(task, class_id, min_bytes, max_bytes, where or [])


AskedPart = Annotated[Asked, Depends(_asked)]


def place(cursor: str | None) -> tuple[int, int, int] | None:
    """The task, class id and rank that a cursor names.

    Raises:
        InvalidRequest: it is none.
    """
    if cursor is None:
        return None
    match = CURSOR.fullmatch(cursor)
    if match is None:
        raise InvalidRequest(f"cursor must be `next` of a page, got {cursor!r}")
    return int(match[1]), int(match[2]), int(match[3])
