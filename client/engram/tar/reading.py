"""Reads the images of an upload from a tar stream, with their classes and fields.

Members are gathered into groups of one key; a group is closed by the first member that cannot be its own. Memory is
bounded by one group, plus some 77 bytes per key for the check that keys are unique.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO, Final

from engram import npy
from engram.errors import BadUpload, TooLarge
from engram.fields import FIELD_NAME, KEY, MAX_FIELDS, NO_FIELDS, TEXT, Schema
from engram.images import IMAGE_EXTENSIONS
from engram.names import MAX_CLASS_ID, class_name

from .blocks import Archive

FIELD_EXTENSIONS: Final = ("npy", "json", "txt")
MAX_MEMBER_BYTES: Final = 64 * 2**20
MAX_FIELD_BYTES: Final = 16 * 2**20
"""Of one member, and of all fields of an image together: a record as JSON takes some twenty times its bytes."""

_MAX_CLASS_BYTES: Final = 1024
_CLASS_TEXT = re.compile(rb"\s*\+?([0-9]{1,18})\s*")


@dataclass(frozen=True, slots=True)
class Member:
    """One image with its class: an id, or a name that stands for one.

    `image` is `size` bytes at `offset` in the stream, still encoded. `fields` has what came with it, of whatever type
    that was sent in.
    """

    key: str
    class_id: int | str
    image: bytes
    name: str
    offset: int
    size: int
    fields: dict[str, Any] = field(default_factory=dict)


def read(
    stream: BinaryIO,
    *,
    schema: Schema = NO_FIELDS,
    max_member_bytes: int = MAX_MEMBER_BYTES,
    check: Callable[[], None] = lambda: None,
) -> Iterator[Member]:
    """Yield the images of a tar stream, in its order, and check the stream up to its end.

    Args:
        stream: read forward, once.
        schema: the fields that images may bring; what they are is not compared with it here.
        max_member_bytes: of an image.
        check: called every few milliseconds, also while nothing is found; what it raises ends the reading.

    Raises:
        BadUpload: cut short, not a tar, a member without its pair, a key twice, a bad class id or name, ids and names
            in one stream, a link or device, a field that is not declared or cannot be read.
        TooLarge: a member above its limit.
    """
    first: Member | None = None
    for member in _members(stream, schema, max_member_bytes, check):
        first = first or member
        if type(member.class_id) is not type(first.class_id):
            raise _mixed(first, member)
        yield member


def _members(stream: BinaryIO, schema: Schema, max_member_bytes: int, check: Callable[[], None]) -> Iterator[Member]:
    keys: set[int] = set()
    group = _Group(schema)
    for half in _halves(stream, schema, max_member_bytes, check):
        if not group.belongs(half):
            yield group.close(half)
            group = _Group(schema)
        if group.key is None and half.field is None:
            # Hashes, not names: what an uploader writes must not set how much memory a key takes.
            hashed = hash(half.key)
            if hashed in keys:
                raise BadUpload(f"key {half.key!r} appears twice; every image needs a key of its own", member=half.name)
            keys.add(hashed)
        group.take(half)
    if group.key is not None:
        yield group.close(None)


@dataclass(frozen=True, slots=True)
class _Half:
    """A member of a group: an image, a class id, or what may be a field of the image KEY or a file beside it.

    The content of what is no declared field is not read.
    """

    key: str
    name: str
    is_image: bool
    content: bytes
    offset: int
    field: str | None = None
    extension: str = ""

    @property
    def stem(self) -> str:
        """KEY.NAME: it is a file beside the image of that key if there is one."""
        return f"{self.key}.{self.field}"


class _Group:
    """The members of one image as far as they have come."""

    def __init__(self, schema: Schema) -> None:
        self.key: str | None = None
        self._early: list[_Half] = []  # fields whose image is yet to come
        self._schema = schema
        self._image: _Half | None = None
        self._label: _Half | None = None
        self._fields: dict[str, Any] = {}
        self._field_bytes = 0

    def belongs(self, half: _Half) -> bool:
        """Whether the member can be one of this group, so that the next one has not begun."""
        if self.key is None:
            return True
        if half.field is not None:
            return self.key in (half.key, half.stem) or self._image is None or self._label is None
        return half.key == self.key and (self._image if half.is_image else self._label) is None

    def take(self, half: _Half) -> None:
        """The member is one of this group, or passed over."""
        if half.field is None:
            self.key = half.key
            if half.is_image:
                self._image = half
            else:
                self._label = half
            early, self._early = self._early, []
            for each in early:
                self.take(each)
        elif self.key is None:
            # Of another image than the last ones: those were no fields of any.
            self._early = [each for each in self._early if each.key == half.key]
            # One that is not declared is enough to say so.
            if half.field in self._schema.declared or not self._early:
                self._early.append(half)
                self._bound(self._early)
        elif half.key == self.key:
            self._add(half.field, half)

    def close(self, following: _Half | None) -> Member:
        """The image, now that all has come.

        Raises:
            BadUpload: it has no class id, or there is none.
        """
        image, label = self._image, self._label
        if image is None or label is None:
            raise _unpaired(image or label, following)
        if self._schema.has_key and KEY not in self._fields:
            self._fields[KEY] = image.key
        return Member(
            key=image.key,
            class_id=_class(label),
            image=image.content,
            name=image.name,
            offset=image.offset,
            size=len(image.content),
            fields=self._fields,
        )

    def _add(self, name: str, half: _Half) -> None:
        declared = next((each for each in self._schema.fields if each.name == name), None)
        if declared is None:
            raise BadUpload(f"member {half.name!r} would be a field {name!r}, {self._schema.summary}", field=name)
        if name in self._fields:
            raise BadUpload(f"member {half.name!r} brings the field {name!r} a second time", field=name)
        self._fields[name] = _read_field(half, is_text=declared.dtype == TEXT)
        self._field_bytes += len(half.content)
        if self._field_bytes > MAX_FIELD_BYTES:
            raise _fields_too_large(half, self._field_bytes)

    def _bound(self, fields: Sequence[_Half]) -> None:
        size = sum(len(each.content) for each in fields)
        if size > MAX_FIELD_BYTES or len(fields) > 2 * MAX_FIELDS:
            raise _fields_too_large(fields[-1], size)


def _fields_too_large(half: _Half, size: int) -> TooLarge:
    return TooLarge(
        f"the fields of {half.key!r} have {size} bytes up to member {half.name!r}; at most {MAX_FIELD_BYTES} in "
        f"{MAX_FIELDS} fields are accepted",
        member=half.name,
        limit_bytes=MAX_FIELD_BYTES,
    )


def _read_field(half: _Half, *, is_text: bool) -> Any:
    """What a member says: an array, a text, a number, lists.

    Raises:
        BadUpload: it cannot be read.
    """
    try:
        if half.extension == "npy":
            return npy.read(half.content)
        text = half.content.decode()
        return text if is_text and half.extension == "txt" else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadUpload(f"member {half.name!r} is not {half.extension.upper()}: {error}", member=half.name) from error
    except BadUpload as error:
        raise BadUpload(f"member {half.name!r} is {error.message}", member=half.name) from error


def _unpaired(half: _Half | None, following: _Half | None) -> BadUpload:
    assert half is not None, "a group has a key from its image or its class id"
    missing = f"{half.key}.cls" if half.is_image else f"an image {half.key}.({'|'.join(IMAGE_EXTENSIONS)})"
    after = "the stream ends" if following is None else f"{following.name!r} follows"
    return BadUpload(
        f"member {half.name!r} has no pair: expected {missing} beside it, but {after}; "
        "the members of an image must be neighbours (`tar c --sort=name`)",
        member=half.name,
    )


def _class(label: _Half) -> int | str:
    """The class id that a member holds, or the name."""
    match = _CLASS_TEXT.fullmatch(label.content)
    if match is None:
        try:
            return class_name(label.content.decode("utf-8"))
        except ValueError as error:
            raise BadUpload(
                f"member {label.name!r} holds {label.content[:24]!r} where a class id, an integer "
                f"from 0 to {MAX_CLASS_ID}, or the name of a class was expected ({error})",
                member=label.name,
            ) from error
    class_id = int(match[1])
    if class_id > MAX_CLASS_ID:
        raise BadUpload(
            f"class id {class_id} of member {label.name!r} is above {MAX_CLASS_ID}",
            member=label.name,
            class_id=class_id,
        )
    return class_id


def _mixed(first: Member, then: Member) -> BadUpload:
    labels = f"{first.key}.cls", f"{then.key}.cls"
    return BadUpload(
        f"member {labels[0]!r} holds {first.class_id!r} and member {labels[1]!r} holds {then.class_id!r}: "
        "the classes of an upload are all integers or all names",
        member=labels[1],
        first_member=labels[0],
    )


def _halves(stream: BinaryIO, schema: Schema, max_member_bytes: int, check: Callable[[], None]) -> Iterator[_Half]:
    archive = Archive(stream, check)
    declared = schema.declared
    while (header := archive.member()) is not None:
        name, size = header.name, header.size
        if header.is_directory:
            archive.skip(size, name)
            continue
        stem, _, extension = name.rpartition(".")
        extension = extension.lower()
        is_image = extension in IMAGE_EXTENSIONS
        column = None
        if not is_image and extension != "cls":
            key, _, column = stem.rpartition(".")
            if extension not in FIELD_EXTENSIONS or not key or not FIELD_NAME.fullmatch(column):
                archive.skip(size, name)
                continue
            stem = key
            if column not in declared:
                archive.skip(size, name)
                yield _Half(stem, name, False, b"", archive.offset, column, extension)
                continue
        limit = max_member_bytes if is_image else _MAX_CLASS_BYTES if column is None else MAX_FIELD_BYTES
        if size > limit:
            raise TooLarge(
                f"member {name!r} has {size} bytes, at most {limit} are accepted",
                member=name,
                member_bytes=size,
                limit_bytes=limit,
            )
        offset = archive.offset
        yield _Half(stem, name, is_image, archive.content(size, name), offset, column, extension)
