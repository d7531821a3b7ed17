"""Fields: the named, typed columns that a buffer keeps beside its images, and the records they are stored as.

A buffer declares its fields once, as text by name:

    {"logits": "float16 [100]", "boxes": "float32 [any, 5]", "weight": "float32 finite", "key": "utf8"}

    type   = dtype [shape] ["finite"]
    dtype    bool, uint8, uint16, ..., int64, float16, float32, float64: one value, or an array of the shape;
             utf8: a text, which has no shape
    shape    "[3, 4]"; the first number may be `any`: the field is then ragged, as many rows as an exemplar has
    finite   refuses NaN and infinities

Given values are cast to the declared type where no meaning is lost: integers to integers that hold them, integers and
floats to floats of any precision that reaches as far. The rest is refused, and so is an exemplar without a field.

A schema is all fields of a buffer in the order of their names. The record of one exemplar, little-endian, unpadded:

    the fields of fixed size, by name          each in C order; a bool is one byte
    for each ragged field, by name             count:4, then as many rows (of a text: bytes of UTF-8)

So records of a schema without ragged fields have one size, and a batch of them is one array.

Letters: N exemplars.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import pairwise
from math import prod
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from engram.errors import BadUpload, InvalidRequest, StripCorrupt

Bytes = bytes | memoryview
Array = npt.NDArray[Any]
IntArray = npt.NDArray[np.int64]
UInt8Array = npt.NDArray[np.uint8]
Column = Array | list[Array] | list[str]
"""Of N exemplars: [N, ...] of a field of fixed size, N arrays of a ragged one, N texts."""
Cell = Array | str
"""What one exemplar has in one field."""

MAX_FIELDS: Final = 64
# A field is a few numbers beside an image: what is larger is data of another kind, and would be read with every draw.
MAX_RECORD_BYTES: Final = 2**20
# So that the header of a strip of the smallest images fits three APP15 segments: see `engram.strip`.
MAX_SCHEMA_BYTES: Final = 4096
_MAX_DIMENSIONS = 8

TEXT: Final = "utf8"
KEY: Final = "key"
"""The field that makes an exemplar findable; uploads as tar fill it with the member's KEY if it is a text."""

RESERVED: Final = frozenset(
    {"images", "class_ids", "tasks", "rows", "fields", "cls", "ppm", "pgm", "png", "jpg", "jpeg", "webp"}
)
"""Names that batches and tar members give another meaning."""

_DTYPES = {
    name: np.dtype(name).newbyteorder("<")
    for name in ("bool", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)))
} | {f"float{bits}": np.dtype(f"<f{bits // 8}") for bits in (16, 32, 64)}
FIELD_NAME = re.compile(r"[a-z][a-z0-9_]{0,31}")
_TYPE = re.compile(r"\s*([a-z0-9]+)\s*(?:\[([^\[\]]*)\])?\s*(finite)?\s*")
_DIMENSION = re.compile(r"[1-9][0-9]{0,8}")
_COUNT = struct.Struct("<I")


@dataclass(frozen=True)
class Field:
    """One column. `shape` is that of one exemplar's value, without the first number if that is ragged."""

    name: str
    dtype: str
    shape: tuple[int, ...] = ()
    is_ragged: bool = False
    is_finite: bool = False

    @cached_property
    def stored(self) -> np.dtype[Any]:
        """What numpy calls the dtype; a text is bytes."""
        return _DTYPES.get(self.dtype, np.dtype(np.uint8))

    @cached_property
    def row_bytes(self) -> int:
        """Bytes of the whole value, or of one row of a ragged one."""
        return self.stored.itemsize * prod(self.shape)

    @cached_property
    def type_text(self) -> str:
        """The type as it is declared, in its one spelling."""
        sizes = [*(["any"] if self.is_ragged and self.dtype != TEXT else []), *map(str, self.shape)]
        return " ".join([self.dtype, *([f"[{', '.join(sizes)}]"] if sizes else []), *["finite"] * self.is_finite])

    @classmethod
    def declare(cls, name: str, text: str) -> Field:
        """The field of this name and type.

        Raises:
            InvalidRequest: there can be no such field; the message says what is wrong.
        """
        if not FIELD_NAME.fullmatch(name) or name in RESERVED:
            rule = "is taken by what every exemplar has" if name in RESERVED else "must match [a-z][a-z0-9_]{0,31}"
            raise InvalidRequest(f"field {name[:40]!r}: its name {rule}", field=name[:40])
        match = _TYPE.fullmatch(text)
        if match is None or (match[1] not in _DTYPES and match[1] != TEXT):
            raise _undeclarable(name, text, f"a type is one of {', '.join([*_DTYPES, TEXT])}, then perhaps [shape]")
        dtype, sizes, finite = match[1], match[2], match[3]
        if dtype == TEXT:
            if sizes is not None or finite:
                raise _undeclarable(name, text, "utf8 is a text of any length, without shape")
            return cls(name, TEXT, is_ragged=True)
        if finite and not dtype.startswith("float"):
            raise _undeclarable(name, text, f"a {dtype} is always finite")
        parts = [] if sizes is None else [part.strip() for part in sizes.split(",")]
        is_ragged = parts[:1] == ["any"]
        numbers = parts[1:] if is_ragged else parts
        if len(parts) > _MAX_DIMENSIONS or not all(_DIMENSION.fullmatch(part) for part in numbers):
            raise _undeclarable(name, text, "a shape is like [100] or [3, 4]; only its first number may be `any`")
        made = cls(name, dtype, tuple(map(int, numbers)), is_ragged, finite is not None)
        if made.row_bytes > MAX_RECORD_BYTES:
            raise _undeclarable(name, text, f"that is {made.row_bytes} bytes, a record has {MAX_RECORD_BYTES} at most")
        return made


@dataclass(frozen=True)
class Schema:
    """The fields that every exemplar of a buffer has. Two are equal if their texts are; falsy without fields."""

    text: str
    fields: tuple[Field, ...] = field(compare=False, repr=False)

    def __bool__(self) -> bool:
        return bool(self.fields)

    @classmethod
    def declare(cls, declared: Mapping[str, str]) -> Schema:
        """The schema of these types by name.

        Raises:
            InvalidRequest: a name or a type is none, or there are too many.
        """
        if not declared:
            return NO_FIELDS
        if len(declared) > MAX_FIELDS:
            raise InvalidRequest(f"{len(declared)} fields, a buffer has {MAX_FIELDS} at most", max_fields=MAX_FIELDS)
        fields = tuple(Field.declare(name, declared[name]) for name in sorted(declared))
        schema = cls("; ".join(f"{each.name} {each.type_text}" for each in fields), fields)
        if schema.min_bytes > MAX_RECORD_BYTES or len(schema.text) > MAX_SCHEMA_BYTES:
            raise InvalidRequest(
                f"the fields need {schema.min_bytes} bytes for each exemplar and {len(schema.text)} to say what they "
                f"are; at most {MAX_RECORD_BYTES} and {MAX_SCHEMA_BYTES} are accepted",
                max_record_bytes=MAX_RECORD_BYTES,
            )
        return schema

    @staticmethod
    @lru_cache(maxsize=256)
    def parse(text: str) -> Schema:
        """The schema that has this text.

        Raises:
            InvalidRequest: there is none.
        """
        parts = [part.partition(" ") for part in text.split("; ")]
        schema = Schema.declare({name: type_text for name, _, type_text in parts})
        if schema.text != text:
            raise InvalidRequest(f"{text[:80]!r} is not how fields are written: {schema.text[:80]!r}")
        return schema

    @cached_property
    def declared(self) -> dict[str, str]:
        """Types by name, as in the definition of a buffer."""
        return {each.name: each.type_text for each in self.fields}

    @cached_property
    def fixed(self) -> tuple[Field, ...]:
        """Those whose values all have one size."""
        return tuple(each for each in self.fields if not each.is_ragged)

    @cached_property
    def ragged(self) -> tuple[Field, ...]:
        """The others."""
        return tuple(each for each in self.fields if each.is_ragged)

    @cached_property
    def min_bytes(self) -> int:
        """Bytes of the smallest record, and of every one if no field is ragged."""
        return self.packed.itemsize + _COUNT.size * len(self.ragged)

    @cached_property
    def packed(self) -> np.dtype[Any]:
        """The fixed part of a record as numpy reads it."""
        return np.dtype([(each.name, each.stored, each.shape) for each in self.fixed])

    def columns(self, given: Mapping[str, Any], count: int) -> Columns:
        """These columns of `count` exemplars, checked and cast: arrays, lists of arrays or numbers, lists of texts.

        A text field `key` that is not given takes the exemplars' numbers, as the keys of an uploaded array are.

        Raises:
            BadUpload: a field is unknown, missing, of another length, type or shape, or too large; the message names
                the field, the exemplar, and the two things that disagree.
        """
        if self.has_key and KEY not in given:
            given = {**given, KEY: [array_key(number) for number in range(count)]}
        self.check_names(given, "the upload")
        values: dict[str, Column] = {}
        for each in self.fields:
            value = given[each.name]
            length = length_of(value)
            if length != count:
                what = f"one {type(value).__name__}" if length is None else f"{length} values"
                raise BadUpload(f"field {each.name!r} has {what} for {count} exemplars", field=each.name)
            values[each.name] = self._column(each, value)
        columns = Columns(self, values, count)
        if self.ragged and len(self.fields) > 1:
            # One by one they are within bounds: `_cell` looked. Together they may not be.
            columns.check_sizes()
        return columns

    def record(self, given: Mapping[str, Any], where: str) -> bytes:
        """The record of one exemplar, `where` being what an error calls it.

        Raises:
            BadUpload: as `columns`.
        """
        self.check_names(given, where)
        cells = {each.name: _cell(each, given[each.name], where) for each in self.fields}
        parts = [_stored_cell(each, cells[each.name]) for each in (*self.fixed, *self.ragged)]
        size = sum(map(len, parts))
        if size > MAX_RECORD_BYTES:
            raise _too_large(where, size)
        return b"".join(parts)

    def check_names(self, given: Mapping[str, Any], where: str) -> None:
        """Returns if these are the names of the fields.

        Raises:
            BadUpload: one is missing or unknown.
        """
        if given.keys() == {each.name for each in self.fields}:
            return
        for name in given:
            if name not in self.declared:
                raise BadUpload(f"{where} has a field {name!r}, {self.summary}", field=name)
        missing = next(each.name for each in self.fields if each.name not in given)
        raise BadUpload(f"{where} has no field {missing!r}, {self.summary}", field=missing)

    @property
    def summary(self) -> str:
        """What errors say of the buffer."""
        return f"the buffer declares {self.text}" if self else "the buffer declares no fields"

    @cached_property
    def has_key(self) -> bool:
        """Whether there is a text field `key`."""
        return any(each.name == KEY and each.dtype == TEXT for each in self.fields)

    def decode(self, records: Sequence[Bytes], names: frozenset[str] | None = None) -> dict[str, Column]:
        """The columns of these records, arrays of their own; only some if `names` are given.

        Raises:
            StripCorrupt: a record is not one of this schema.
        """
        found: dict[str, Column] = {}
        size = self.packed.itemsize
        if self.fixed and (names is None or any(each.name in names for each in self.fixed)):
            joined = b"".join(records if not self.ragged else [record[:size] for record in records])
            if len(joined) != size * len(records):
                raise StripCorrupt(f"{len(records)} records of {size} bytes hold {len(joined)}")
            rows = np.frombuffer(joined, self.packed)
            for each in self.fixed:
                if names is None or each.name in names:
                    found[each.name] = _native(rows[each.name], each)
        if self.ragged:
            wanted = {each.name for each in self.ragged} if names is None else names
            for each, parts in zip(self.ragged, self._cut_ragged(records), strict=True):
                if each.name in wanted:
                    found[each.name] = _texts(each, parts) if each.dtype == TEXT else _arrays(each, parts)
        return {each.name: found[each.name] for each in self.fields if each.name in found}

    def find(self, name: str, data: UInt8Array, starts: IntArray, lengths: IntArray) -> tuple[IntArray, IntArray]:
        """Where the value of one field lies in `data` for each of the records there, and how many bytes it has.

        The place is -1 where a record ends before its value does.

        Args:
            name: of the field.
            data: bytes that hold the records, uint8.
            starts: of each record in them.
            lengths: of each record.
        """
        each = next(each for each in self.fields if each.name == name)
        at, ends = starts.astype(np.int64), starts.astype(np.int64) + lengths
        if not each.is_ragged:
            before = self.fixed[: self.fixed.index(each)]
            first, size = at + sum(other.row_bytes for other in before), each.row_bytes
            return np.where(first + size <= ends, first, -1), np.full(len(at), size, np.int64)
        at += self.packed.itemsize
        for ragged in self.ragged:
            first = at + _COUNT.size
            sizes = np.zeros(len(at), np.int64)
            is_there = first <= ends
            sizes[is_there] = cut(data, at[is_there], _COUNT.size).view("<u4")[:, 0].astype(np.int64) * ragged.row_bytes
            is_there &= first + sizes <= ends
            if ragged is each:
                return np.where(is_there, first, -1), np.where(is_there, sizes, 0)
            at = np.where(is_there, first + sizes, ends)
        raise AssertionError("a ragged field is one of the ragged ones")

    def _cut_ragged(self, records: Sequence[Bytes]) -> list[list[Bytes]]:
        """The bytes of every ragged field of every record, their counts checked.

        Raises:
            StripCorrupt: a record ends within a field, or goes on behind the last.
        """
        start, unpack, ahead = self.packed.itemsize, _COUNT.unpack_from, _COUNT.size
        parts: list[list[Bytes]] = [[] for _ in self.ragged]
        columns = [(each.row_bytes, part.append) for each, part in zip(self.ragged, parts, strict=True)]
        for number, record in enumerate(records):
            at, size = start, len(record)
            for row_bytes, append in columns:
                first = at + ahead
                at = first + unpack(record, at)[0] * row_bytes if first <= size else first
                append(record[first:at])
            if at != size:
                raise StripCorrupt(f"record {number} has {size} bytes, its fields end at {at}", row=number)
        return parts

    def _column(self, each: Field, value: Any) -> Column:
        if not each.is_ragged:
            try:
                array = np.asarray(value)
            except ValueError:
                array = None
            if array is not None and array.shape == (len(value), *each.shape) and _casts(each, array):
                return array.astype(each.stored, copy=False)
        # Slowly, one by one: to say which one is wrong, or because there is no other way.
        cells = [_cell(each, cell, f"exemplar {number}") for number, cell in enumerate(value)]
        if each.dtype == TEXT:
            return [str(cell) for cell in cells]
        arrays = [np.asarray(cell) for cell in cells]
        return arrays if each.is_ragged else np.array(arrays, each.stored).reshape(len(arrays), *each.shape)


NO_FIELDS: Final = Schema("", ())
"""What a buffer has that declares none."""


@dataclass(frozen=True, eq=False)
class Columns:
    """What N exemplars have in the fields of a schema, of the declared types already."""

    schema: Schema
    values: Mapping[str, Column] = field(repr=False)
    count: int

    def records(self, indices: IntArray) -> list[bytes]:
        """The records of these exemplars, in this order."""
        schema, wanted = self.schema, np.asarray(indices, np.int64)
        size = schema.packed.itemsize
        parts: list[list[bytes]] = []
        if schema.fixed:
            rows = np.empty(len(wanted), schema.packed)
            for each in schema.fixed:
                rows[each.name] = np.asarray(self.values[each.name])[wanted]
            whole = rows.tobytes()
            parts.append([whole[at : at + size] for at in range(0, len(whole), size)])
        for each in schema.ragged:
            cells = self.values[each.name]
            parts.append([_stored_cell(each, cells[number]) for number in wanted.tolist()])
        return parts[0] if len(parts) == 1 else [b"".join(record) for record in zip(*parts, strict=True)]

    def check_sizes(self) -> None:
        """Returns if no record is too large.

        Raises:
            BadUpload: one is.
        """
        sizes = np.full(self.count, self.schema.min_bytes, np.int64)
        for ragged in self.schema.ragged:
            cells = self.values[ragged.name]
            is_text = ragged.dtype == TEXT
            sizes += [len(str(cell).encode()) if is_text else np.asarray(cell).nbytes for cell in cells]
        if self.count and sizes.max() > MAX_RECORD_BYTES:
            number = int(sizes.argmax())
            raise _too_large(f"exemplar {number}", int(sizes[number]))


NO_COLUMNS: Final = Columns(NO_FIELDS, {}, 0)
"""What images have that came without fields."""


def cut(data: UInt8Array, starts: IntArray, size: int) -> UInt8Array:
    """As many stretches of `size` bytes of `data` as there are starts, [n, size]."""
    found: UInt8Array = data[starts[:, None] + np.arange(size)]
    return found


def array_key(number: int) -> str:
    """What an image of an array is called in a tar: its number."""
    return f"{number:010d}"


def all_keys(key: str | None, keys: Sequence[str] | None) -> tuple[str, ...] | None:
    """Those of both ways to name them; None where neither is given.

    Raises:
        ValueError: several keys are given as one text.
        InvalidRequest: there is not one key.
    """
    if isinstance(keys, str):
        raise ValueError(f"keys are several texts, as in keys=[{keys!r}]; one is given as key={keys!r}")
    if keys is not None and not len(keys):
        raise InvalidRequest("there are no keys: name at least one")
    given = (*(() if key is None else (key,)), *(keys or ()))
    return given or None


def length_of(column: Any) -> int | None:
    """How many values a column has, None if it is one value: a text has letters, but they are no values."""
    if isinstance(column, (str, bytes, Mapping)):
        return None
    try:
        return len(column)
    except TypeError:
        return None


def _cell(each: Field, value: Any, where: str) -> Cell:
    """The value of one exemplar in the declared type.

    Raises:
        BadUpload: it is none of it.
    """
    if each.dtype == TEXT:
        text = value.item() if isinstance(value, (np.ndarray, np.generic)) and value.shape == () else value
        if not isinstance(text, str):
            raise _mismatch(each, where, _described(value))
        try:
            size = len(text.encode())
        except UnicodeEncodeError:
            raise _mismatch(each, where, "a text that UTF-8 cannot say") from None
        _check_rows(each, size, where)
        return text
    if isinstance(value, (str, bytes)) or value is None:
        raise _mismatch(each, where, _described(value))
    try:
        array = np.asarray(value)
    except (ValueError, OverflowError):
        raise _mismatch(each, where, "no rectangular array of numbers") from None
    if each.is_ragged:
        if array.size == 0 and array.shape[:1] == (0,) and array.ndim in (1, 1 + len(each.shape)):
            array = np.empty((0, *each.shape), each.stored)
        if array.ndim != 1 + len(each.shape) or array.shape[1:] != each.shape:
            raise _mismatch(each, where, _described(array))
        _check_rows(each, len(array), where)
    elif array.shape != each.shape:
        raise _mismatch(each, where, _described(array))
    if not _casts(each, array):
        finite = np.isfinite(array) if array.dtype.kind == "f" else np.ones(array.shape, np.bool_)
        what = _described(array) if finite.all() or not each.is_finite else f"{array[~finite][0]} among its values"
        if what == _described(array) and array.dtype.kind in "iuf" and array.size:
            what += f" with values in {array.min()}..{array.max()}"
        raise _mismatch(each, where, what)
    return array.astype(each.stored, copy=False)


def _casts(each: Field, array: Array) -> bool:
    """Whether these values can be had in the declared type without losing what they mean."""
    kind, target = array.dtype.kind, each.stored
    if each.is_finite and kind == "f" and not np.isfinite(array).all():
        return False
    if array.dtype.newbyteorder("=") == target.newbyteorder("=") or array.size == 0:
        return array.size > 0 or kind in "biuf"
    if target.kind == "f" and kind in "iuf":
        most = np.finfo(target).max
        if kind == "f" and array.dtype.itemsize <= target.itemsize:
            return True
        # NaN compares as false.
        return not ((np.abs(array.astype(np.float64)) > most) & ~np.isinf(array)).any()
    if target.kind in "iu" and kind in "iu":
        bounds = np.iinfo(target)
        return bool(int(array.min()) >= bounds.min and int(array.max()) <= bounds.max)
    return False


def _stored_cell(each: Field, cell: Cell) -> bytes:
    """A value, of the declared type already, as records have it."""
    if isinstance(cell, str):
        content = cell.encode()
        return _COUNT.pack(len(content)) + content
    return _COUNT.pack(len(cell)) + cell.tobytes() if each.is_ragged else cell.tobytes()


def _texts(each: Field, parts: Sequence[Bytes]) -> list[str]:
    try:
        return [str(part, "utf-8") for part in parts]
    except UnicodeDecodeError as error:
        raise StripCorrupt(f"field {each.name!r} of a record is not UTF-8: {error}") from error


def _arrays(each: Field, parts: Sequence[Bytes]) -> list[Array]:
    """One array for each part, cut out of one copy of them all."""
    ends = np.cumsum([len(part) // each.row_bytes for part in parts]).tolist()
    rows = _native(np.frombuffer(b"".join(parts), each.stored).reshape(ends[-1] if ends else 0, *each.shape), each)
    return [rows[start:end] for start, end in pairwise([0, *ends])]


def _native(values: Array, each: Field) -> Array:
    """A copy of its own, aligned and in the byte order of this machine."""
    if each.dtype == "bool":
        # Any byte but 0 is true: a bool of numpy with another value would be neither.
        return np.asarray(values.view(np.uint8) != 0)
    return np.array(values, each.stored.newbyteorder("="))


def _check_rows(each: Field, count: int, where: str) -> None:
    if count * each.row_bytes + _COUNT.size > MAX_RECORD_BYTES:
        what = "bytes of text" if each.dtype == TEXT else "rows"
        raise BadUpload(
            f"field {each.name!r} of {where} has {count} {what}, {count * each.row_bytes} bytes; the record of an "
            f"exemplar has {MAX_RECORD_BYTES} at most",
            field=each.name,
            max_record_bytes=MAX_RECORD_BYTES,
        )


def _described(value: Any) -> str:
    if isinstance(value, (np.ndarray, np.generic)):
        return f"{value.dtype.name} {list(value.shape)}" if value.shape else value.dtype.name
    return f"of type {type(value).__name__}"


def _mismatch(each: Field, where: str, found: str) -> BadUpload:
    return BadUpload(
        f"field {each.name!r} of {where} is {found}, the buffer declares {each.type_text}", field=each.name
    )


def _too_large(where: str, size: int) -> BadUpload:
    return BadUpload(
        f"the fields of {where} have {size} bytes together, at most {MAX_RECORD_BYTES} are accepted",
        max_record_bytes=MAX_RECORD_BYTES,
    )


def _undeclarable(name: str, text: str, rule: str) -> InvalidRequest:
    return InvalidRequest(f"field {name!r} cannot be {text[:80]!r}: {rule}", field=name)
