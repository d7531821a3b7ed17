"""Which exemplars are looked at: by task, class, bytes and the values of fields.

    where=NAME:OPERATION:VALUE      given several times, all must hold

    a number                        eq ne lt le gt ge
    a bool                          eq ne                   true or false
    a text                          eq ne prefix            compared by its UTF-8; it may hold colons

Fields of several numbers have no order and are no filter. NaN passes `ne` alone.

Conditions are held against the records of many exemplars at once: the bytes of a field are found in all of them
(`engram.fields`) and compared as one array. Of packs that lie on disk the records alone are read; that they are what
was stored is checked with the exemplars that are shown, and in the background.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from engram.errors import InvalidRequest
from engram.fields import TEXT, Field, Schema, cut
from engram.strip import Exemplars

IntArray = npt.NDArray[np.int64]
UInt8Array = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]

MAX_CONDITIONS = 8
MAX_VALUE_BYTES = 4096

_NUMERIC: dict[str, Callable[[Any, Any], Any]] = {
    name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")
}

# Records that lie so near to each other are read at once, with what is between them; and so many at most.
_GAP_BYTES = 2**16
_READ_BYTES = 2**23


@dataclass(frozen=True)
class Condition:
    """What the value of a field must be; `value` is of the field's type, of a text its bytes."""

    field: Field
    operation: str
    value: int | float | bool | bytes

    @classmethod
    def parse(cls, text: str, schema: Schema) -> Condition:
        """The condition that this text says of exemplars with these fields.

        Raises:
            InvalidRequest: it says none.
        """
        name, *rest = text.split(":", 2)
        if len(rest) < 2:
            raise InvalidRequest(f"where={text[:80]!r} is not like NAME:OPERATION:VALUE, as in score:ge:0.5")
        found = scalar(schema, name)
        operation, value = rest
        allowed = ("eq", "ne", "prefix") if found.dtype == TEXT else tuple(_NUMERIC)[: 2 if _is_bool(found) else None]
        if operation not in allowed:
            raise InvalidRequest(f"field {name!r} is {found.type_text}: {operation[:20]!r} is none of {allowed}")
        return cls(found, operation, _value(found, value))

    def holds(self, data: UInt8Array, places: IntArray, sizes: IntArray) -> Mask:
        """For which of these values in `data` it holds; none of place -1."""
        is_there = places >= 0
        if isinstance(self.value, bytes):
            return is_there & self._of_texts(data, places, sizes, self.value)
        found = np.zeros(len(places), np.bool_)
        values = numbers(self.field, data, places[is_there])
        found[is_there] = _NUMERIC[self.operation](values, self.value)
        return found

    def _of_texts(self, data: UInt8Array, places: IntArray, sizes: IntArray, wanted: bytes) -> Mask:
        is_long = sizes >= len(wanted) if self.operation == "prefix" else sizes == len(wanted)
        is_equal = is_long & (places >= 0)
        heads = cut(data, places[is_equal], len(wanted))
        is_equal[is_equal] = (heads == np.frombuffer(wanted, np.uint8)).all(axis=1)
        return ~is_equal if self.operation == "ne" else is_equal


@dataclass(frozen=True)
class Filters:
    """All that an exemplar must be; None is no condition. `min_bytes` and `max_bytes` are as `Exemplar.bytes`."""

    task: int | None = None
    class_id: int | None = None
    min_bytes: int | None = None
    max_bytes: int | None = None
    where: tuple[Condition, ...] = ()

    @property
    def examines(self) -> bool:
        """Whether exemplars must be looked at one by one; tasks and classes are known by run."""
        return bool(self.where) or self.min_bytes is not None or self.max_bytes is not None

    def mask(self, exemplars: Exemplars, places: IntArray) -> Mask:
        """Which of these exemplars of a pack, ascending, have the bytes and the values.

        Raises:
            Damaged: the pack does not give its bytes.
        """
        found = np.ones(len(places), np.bool_)
        if self.min_bytes is not None or self.max_bytes is not None:
            sizes = exemplars.sizes_of(places)
            found &= sizes >= (self.min_bytes or 0)
            if self.max_bytes is not None:
                found &= sizes <= self.max_bytes
        for rows, data, starts, lengths in records(exemplars, places) if self.where else ():
            for each in self.where:
                found[rows] &= each.holds(data, *exemplars.schema.find(each.field.name, data, starts, lengths))
        return found


def parse(where: Sequence[str], schema: Schema) -> tuple[Condition, ...]:
    """The conditions that these texts say.

    Raises:
        InvalidRequest: one says none, or they are too many or too long.
    """
    if len(where) > MAX_CONDITIONS or any(len(text.encode()) > MAX_VALUE_BYTES for text in where):
        raise InvalidRequest(
            f"where is given {MAX_CONDITIONS} times at most, each with at most {MAX_VALUE_BYTES} bytes",
            max_conditions=MAX_CONDITIONS,
        )
    return tuple(Condition.parse(text, schema) for text in where)


def scalar(schema: Schema, name: str) -> Field:
    """The field of this name, if its values can be compared: one number, bool or text each.

    Raises:
        InvalidRequest: there is none, or it has several numbers.
    """
    found = next((each for each in schema.fields if each.name == name), None)
    if found is None:
        raise InvalidRequest(f"there is no field {name[:40]!r}: {schema.summary}", field=name[:40])
    if found.dtype != TEXT and (found.shape or found.is_ragged):
        raise InvalidRequest(
            f"field {name!r} is {found.type_text}: exemplars are told apart by single values only", field=name
        )
    return found


def scalars(schema: Schema) -> list[Field]:
    """The fields whose values can be compared."""
    return [each for each in schema.fields if each.dtype == TEXT or not (each.shape or each.is_ragged)]


def numbers(field: Field, data: UInt8Array, places: IntArray) -> npt.NDArray[Any]:
    """The numbers of a field at these places."""
    stored: npt.NDArray[Any] = cut(data, places, field.row_bytes)
    if _is_bool(field):
        stored = stored != 0
    values: npt.NDArray[Any] = stored.view(field.stored)[:, 0]
    return values


def records(exemplars: Exemplars, places: IntArray) -> Iterator[tuple[slice, UInt8Array, IntArray, IntArray]]:
    """The records of these exemplars of a pack, ascending, in parts that are read at once.

    Of each part: which of `places`, the bytes, where the records begin in them, and how long they are.

    Raises:
        Damaged: the pack does not give its bytes.
    """
    assert exemplars.record_starts is not None, "a buffer with fields has records"
    assert exemplars.record_lengths is not None, "where there are records they have lengths"
    starts = exemplars.record_starts[places].astype(np.int64)
    lengths = exemplars.record_lengths[places].astype(np.int64)
    ends = starts + lengths
    gaps = np.flatnonzero(starts[1:] - ends[:-1] > _GAP_BYTES) + 1
    first = 0
    for stop in [*gaps.tolist(), len(places)]:
        while first < stop:
            begin = int(starts[first])
            end = min(stop, max(first + 1, int(np.searchsorted(ends, begin + _READ_BYTES, side="right"))))
            data = np.frombuffer(exemplars.data[begin : int(ends[end - 1])], np.uint8)
            yield slice(first, end), data, starts[first:end] - begin, lengths[first:end]
            first = end


def _is_bool(field: Field) -> bool:
    return field.dtype == "bool"


def _value(field: Field, text: str) -> int | float | bool | bytes:
    if field.dtype == TEXT:
        return text.encode()
    if _is_bool(field):
        if text not in ("true", "false"):
            raise InvalidRequest(f"field {field.name!r} is bool: {text[:20]!r} is neither true nor false")
        return text == "true"
    for kind in (int, float):
        try:
            value = kind(text)
        except ValueError:
            continue
        most = float(np.finfo(field.stored).max) if field.stored.kind == "f" else 2.0**64
        if abs(value) <= most:
            return value
    raise InvalidRequest(f"field {field.name!r} is {field.type_text}: {text[:40]!r} is no number that it can have")
