"""What the forms of pages say, read as the API reads it; a field that was left empty says nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, TypeVar

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from engram.errors import InvalidRequest
from engram.schemas import MAX_CLASS_ID, MAX_TASK, first_fault

from ..filters import MAX_CONDITIONS, MAX_VALUE_BYTES
from ..routes.filtering import Asked

_Model = TypeVar("_Model", bound=BaseModel)


class _Filters(BaseModel):
    """As the query of the API has them."""

    model_config = ConfigDict(extra="ignore")

    task: Annotated[int, Field(ge=0, le=MAX_TASK)] | None = None
    class_id: Annotated[int, Field(ge=0, le=MAX_CLASS_ID)] | None = None
    min_bytes: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    max_bytes: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    where: Annotated[list[Annotated[str, Field(max_length=MAX_VALUE_BYTES)]], Field(max_length=MAX_CONDITIONS)] = []


def validated(model: type[_Model], given: Mapping[str, object]) -> _Model:
    """The model of what a form says.

    Raises:
        InvalidRequest: a value is none that it can have.
    """
    numbers = {name: _number(text) if isinstance(text, str) else text for name, text in given.items()}
    try:
        return model.model_validate(numbers)
    except ValidationError as error:
        raise InvalidRequest(first_fault(error)) from error


def filters(request: Request) -> Asked:
    """The filters in the query of a page.

    Raises:
        InvalidRequest: a value is none that it can have.
    """
    query = request.query_params
    given: dict[str, object] = {name: query[name] for name in _Filters.model_fields if query.get(name)}
    found = validated(_Filters, given | {"where": [text for text in query.getlist("where") if text]})
    return Asked(found.task, found.class_id, found.min_bytes, found.max_bytes, found.where)


def _number(text: str) -> object:
    """Models that take JSON want numbers as such."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
