"""What people type into forms, as values; what they slipped in is said in one sentence."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from fastapi import Form
from pydantic import BaseModel, ValidationError

from engram import amounts
from engram.errors import InvalidRequest
from engram.schemas import first_fault

Text = Annotated[str, Form(max_length=10_000)]

_Model = TypeVar("_Model", bound=BaseModel)


def model(kind: type[_Model], given: dict[str, Any]) -> _Model:
    """The values as a model of the API.

    Raises:
        InvalidRequest: some value is not what it should be.
    """
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise InvalidRequest(first_fault(error)) from error


def amount(name: str, text: str) -> int:
    """Bytes as people write them: 500000, 1.5MB, 64KiB.

    Raises:
        InvalidRequest: it is no such amount.
    """
    try:
        return amounts.parse(text.strip().replace(",", ""))
    except ValueError as error:
        raise InvalidRequest(f"{name}: {error}") from error


def whole(name: str, text: str) -> int:
    """A number without a sign.

    Raises:
        InvalidRequest: it is none.
    """
    if not (text.strip().isascii() and text.strip().isdecimal() and len(text.strip()) < 20):
        raise InvalidRequest(f"{name}: {text!r} is not a whole number")
    return int(text.strip())


def confirmed(wanted: str, text: str) -> None:
    """Returns if somebody has typed what confirms that they mean it.

    Raises:
        InvalidRequest: they have not.
    """
    if text.strip() != wanted:
        raise InvalidRequest(f"to confirm, type {wanted}; {text.strip()!r} was typed, and nothing was done")
