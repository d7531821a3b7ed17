"""Reads and writes the upload format: a tar stream of images with classes and fields, as WebDataset writes it.

    KEY.ppm         the image: .ppm .pgm .png .jpg .jpeg .webp, any case
    KEY.cls         its class: an integer as ASCII text, or a name as UTF-8 (all of a stream one or the other)
    KEY.NAME.npy    its field NAME, if the buffer declares one: an array as `numpy.save` writes it (no pickles),
    KEY.NAME.json   or a number, a text or nested lists of numbers,
    KEY.NAME.txt    or a text field's text as it is, another field's as JSON
    ...             the next group; the members of a group are neighbours, in any order
    two blocks of zeros

KEY is the name of image and class id up to the last dot, unique in the stream. It is a label and never a path; a text
field `key` that a group does not bring is filled with it. Directories and other files are passed over, also a KEY.json
or KEY.txt; links, devices and sparse files are refused. ustar, GNU and PAX headers are understood (`tar c`, Python's
tarfile, WebDataset, bsdtar write one of these). `tar c` packs a folder in the order of the disk: `tar c --sort=name`
keeps groups together.

Headers are parsed by `tarfile.TarInfo.frombuf`; the walk is ours. `tarfile.open(mode="r|")` would end silently at a
damaged header or a missing end, which is how a cut upload loses images, and reads a PAX header of any declared size
into memory. Memory is bounded by one group, plus some 77 bytes per key for the check that keys are unique.

Images are uint8 `[H, W, C]`, RGB or grey (C is 3 or 1).
"""

from __future__ import annotations

import io
import json
import re
import struct
import tarfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, BinaryIO, Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from engram import npy
from engram.errors import BadUpload, TooLarge
from engram.fields import KEY, MAX_FIELDS, NO_FIELDS, TEXT, Cell, Schema, array_key, length_of
from engram.labelled import labelled
from engram.names import MAX_CLASS_ID, class_name

BLOCK: Final = 512
END: Final = bytes(2 * BLOCK)
"""What closes a tar stream."""

IMAGE_EXTENSIONS: Final = ("ppm", "pgm", "png", "jpg", "jpeg", "webp")
FIELD_EXTENSIONS: Final = ("npy", "json", "txt")
MAX_MEMBER_BYTES: Final = 64 * 2**20
MAX_FIELD_BYTES: Final = 16 * 2**20
"""Of one member, and of all fields of an image together: a record as JSON takes some twenty times its bytes."""
MAX_SIDE: Final = 16_384

# A name longer than any file system's path limit is an attack on memory, not a name.
_MAX_EXTENDED_HEADER_BYTES: Final = 64 * 2**10
_MAX_CLASS_BYTES: Final = 1024
_CHUNK_BYTES: Final = 1 << 20

_CLASS_TEXT = re.compile(rb"\s*\+?([0-9]{1,18})\s*")
_PORTABLE_HEADER = re.compile(
    rb"P([56])(?:\s|#[^\n]*\n)+(\d{1,9})(?:\s|#[^\n]*\n)+(\d{1,9})(?:\s|#[^\n]*\n)+(\d{1,6})\s"
)
_FIELD_NAME = re.compile(r"[a-z][a-z0-9_]{0,31}")
_SPARSE: Final = "sparse"
_PAX_RECORD = re.compile(rb"(\d{1,9}) ")

UInt8Array = npt.NDArray[np.uint8]


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


def read(stream: BinaryIO, *, schema: Schema = NO_FIELDS, max_member_bytes: int = MAX_MEMBER_BYTES) -> Iterator[Member]:
    """Yield the images of a tar stream, in its order, and check the stream up to its end.

    Args:
        stream: read forward, once.
        schema: the fields that images may bring; what they are is not compared with it here.
        max_member_bytes: of an image.

    Raises:
        BadUpload: cut short, not a tar, a member without its pair, a key twice, a bad class id or name, ids and names
            in one stream, a link or device, a field that is not declared or cannot be read.
        TooLarge: a member above its limit.
    """
    first: Member | None = None
    for member in _members(stream, schema, max_member_bytes):
        first = first or member
        if type(member.class_id) is not type(first.class_id):
            raise _mixed(first, member)
        yield member


def _members(stream: BinaryIO, schema: Schema, max_member_bytes: int) -> Iterator[Member]:
    keys: set[int] = set()
    group = _Group(schema)
    for half in _halves(stream, schema, max_member_bytes):
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


def field_member(key: str, name: str, cell: Cell) -> bytes:
    """A field of one image as a member of a tar stream."""
    if isinstance(cell, str):
        return entry(f"{key}.{name}.txt", cell.encode())
    return entry(f"{key}.{name}.npy", npy.header(cell.dtype.str, cell.shape) + cell.tobytes())


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


def _halves(stream: BinaryIO, schema: Schema, max_member_bytes: int) -> Iterator[_Half]:
    source = _Source(stream)
    declared = schema.declared
    extended: dict[str, str] = {}
    while (info := source.header()) is not None:
        if info.type in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
            if info.size > _MAX_EXTENDED_HEADER_BYTES:
                raise BadUpload(
                    f"extended header of {info.size} bytes at byte {source.offset} of the tar, "
                    f"at most {_MAX_EXTENDED_HEADER_BYTES} are accepted"
                )
            content = source.content(info.size, "an extended header")
            if info.type == tarfile.XHDTYPE:
                extended |= _pax_records(content)
            elif info.type == tarfile.GNUTYPE_LONGNAME:
                extended["path"] = content.rstrip(b"\0").decode("utf-8", "replace")
            continue
        name = extended.get("path", info.name)
        size = _size(extended, info, name)
        is_regular = info.type in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE) and _SPARSE not in extended
        extended = {}
        if info.isdir():
            source.skip(size, name)
            continue
        if not is_regular:
            raise BadUpload(
                f"member {name!r} is a link, a device or another special file; only regular files are read", member=name
            )
        stem, _, extension = name.rpartition(".")
        extension = extension.lower()
        is_image = extension in IMAGE_EXTENSIONS
        column = None
        if not is_image and extension != "cls":
            key, _, column = stem.rpartition(".")
            if extension not in FIELD_EXTENSIONS or not key or not _FIELD_NAME.fullmatch(column):
                source.skip(size, name)
                continue
            stem = key
            if column not in declared:
                source.skip(size, name)
                yield _Half(stem, name, False, b"", source.offset, column, extension)
                continue
        limit = max_member_bytes if is_image else _MAX_CLASS_BYTES if column is None else MAX_FIELD_BYTES
        if size > limit:
            raise TooLarge(
                f"member {name!r} has {size} bytes, at most {limit} are accepted",
                member=name,
                member_bytes=size,
                limit_bytes=limit,
            )
        offset = source.offset
        yield _Half(stem, name, is_image, source.content(size, name), offset, column, extension)


def _size(extended: dict[str, str], info: tarfile.TarInfo, name: str) -> int:
    text = extended.get("size")
    if text is None:
        size = info.size
    elif text.isascii() and text.isdigit():
        size = int(text[:20])
    else:
        raise BadUpload(f"member {name!r} declares the size {text[:24]!r}", member=name)
    if size < 0:
        raise BadUpload(f"member {name!r} declares a size of {size} bytes", member=name)
    return size


def _pax_records(content: bytes) -> dict[str, str]:
    """The records `LENGTH KEY=VALUE\\n` of a PAX header that matter here; the others would pile up in memory."""
    records: dict[str, str] = {}
    position = 0
    while position < len(content) and content[position]:
        match = _PAX_RECORD.match(content, position)
        end = position + int(match[1]) if match else 0
        if match is None or not match.end() < end <= len(content) or content[end - 1] != 0x0A:
            raise BadUpload(f"damaged PAX header: bad record at its byte {position}")
        key, equals, value = content[match.end() : end - 1].partition(b"=")
        if not equals:
            raise BadUpload(f"damaged PAX header: no '=' in the record at its byte {position}")
        if key in (b"path", b"size"):
            records[key.decode()] = value.decode("utf-8", "replace")
        elif key.startswith(b"GNU.sparse."):
            records[_SPARSE] = ""
        position = end
    return records


class _Source:
    """A tar stream read forward, which knows where it is and which member it read last."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._last = ""
        self.offset = 0

    def header(self) -> tarfile.TarInfo | None:
        """The next header, None at the end of the archive."""
        block = self._exactly(BLOCK, "a header")
        if not block.strip(b"\0"):
            self._end()
            return None
        try:
            return tarfile.TarInfo.frombuf(block, "utf-8", "replace")
        except (tarfile.HeaderError, ValueError) as error:
            if self.offset == BLOCK:
                kind = "gzip-compressed: send it uncompressed" if block[:2] == b"\x1f\x8b" else "no tar stream"
                raise BadUpload(f"the body is {kind} (no tar header in its first {BLOCK} bytes)") from error
            raise BadUpload(
                f"damaged tar: no valid header at byte {self.offset - BLOCK}{self._after()}",
                offset=self.offset - BLOCK,
            ) from error

    def content(self, size: int, name: str) -> bytes:
        """The `size` bytes of the member whose header came last; its padding is passed over."""
        content = self._exactly(size, repr(name))
        self._exactly(-size % BLOCK, repr(name))
        self._last = name
        return content

    def skip(self, size: int, name: str) -> None:
        left = size + -size % BLOCK
        while left:
            left -= len(self._exactly(min(left, _CHUNK_BYTES), repr(name)))
        self._last = name

    def _end(self) -> None:
        """One block of zeros was read: there is a second, and after it nothing but zeros."""
        if self._exactly(BLOCK, "the end").strip(b"\0"):
            raise BadUpload(f"damaged tar: a single block of zeros at byte {self.offset - 2 * BLOCK}{self._after()}")
        while chunk := self._stream.read(_CHUNK_BYTES):
            if chunk.strip(b"\0"):
                raise BadUpload(
                    f"there are more bytes after the end of the tar at byte {self.offset}; "
                    "join archives with `tar --concatenate` or upload them one by one"
                )
            self.offset += len(chunk)

    def _after(self) -> str:
        return f", after member {self._last!r}" if self._last else ""

    def _exactly(self, size: int, what: str) -> bytes:
        if not size:
            return b""
        content = self._stream.read(size)
        if len(content) != size:
            content = self._rest(content, size, what)
        self.offset += size
        return content

    def _rest(self, content: bytes, size: int, what: str) -> bytes:
        """Pipes and sockets may answer with less than was asked for; only an empty answer is the end."""
        parts = [content]
        received = len(content)
        while received < size:
            part = self._stream.read(size - received) if parts[-1] else b""
            if not part:
                end = self.offset + received
                raise BadUpload(
                    f"the tar ends at byte {end}, inside {what}{self._after()}: {size - received} bytes are missing; "
                    "the upload was cut short, send it again",
                    offset=end,
                )
            parts.append(part)
            received += len(part)
        return b"".join(parts)


def write(
    images_NHWC: UInt8Array,
    class_ids: npt.ArrayLike,
    *,
    fields: Mapping[str, Any] | None = None,
    start: int = 0,
) -> Iterator[bytes]:
    """Yield a tar stream of arrays in chunks of about 1 MiB: PPM or PGM members, so that nothing is encoded.

    Keys are the images' numbers, counted from `start`. Class ids are integers; strings are names. Fields are arrays
    [N, ...], or lists of N arrays or texts.

    Raises:
        ValueError: as `engram.labelled.labelled`.
    """
    images_NHWC, class_ids_N, names = labelled(images_NHWC, class_ids)
    fixed, ragged = _checked_fields(fields or {}, len(images_NHWC))
    layout = _Layout(images_NHWC.shape[1:], class_ids_N, names, fixed)
    count = len(images_NHWC)
    step = max(1, _CHUNK_BYTES // layout.group_bytes)
    for first in range(0, count, step):
        rows = slice(first, min(count, first + step))
        groups = layout.groups(images_NHWC[rows], rows, start)
        yield groups if not ragged else _with_ragged(groups, layout.group_bytes, ragged, rows, start)
    yield END


def _checked_fields(fields: Mapping[str, Any], count: int) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
    """The columns whose members all have one size, and the others.

    Raises:
        ValueError: there are not as many values as images, or they are no numbers.
    """
    fixed: dict[str, npt.NDArray[Any]] = {}
    ragged: dict[str, Any] = {}
    for name, column in fields.items():
        if not _FIELD_NAME.fullmatch(name):
            raise ValueError(f"field {name!r}: a name must match {_FIELD_NAME.pattern}")
        length = length_of(column)
        if length != count:
            what = f"one {type(column).__name__}" if length is None else f"{length} values"
            raise ValueError(f"field {name!r} has {what} for {count} images")
        try:
            array = None if any(isinstance(cell, str) for cell in column[:1]) else np.asarray(column)
        except ValueError:
            array = None  # of several shapes
        if array is None or array.dtype.kind not in "biuf":
            ragged[name] = column
        else:
            fixed[name] = array
    return fixed, ragged


def _with_ragged(groups: bytes, group_bytes: int, ragged: Mapping[str, Any], rows: slice, start: int) -> bytes:
    parts: list[bytes] = []
    for number in range(rows.start, rows.stop):
        at = (number - rows.start) * group_bytes
        parts.append(groups[at : at + group_bytes])
        for name, column in ragged.items():
            cell = column[number]
            parts.append(field_member(array_key(start + number), name, _numeric(name, cell)))
    return b"".join(parts)


def _numeric(name: str, cell: Any) -> Cell:
    if isinstance(cell, str):
        return cell
    array = np.asarray(cell)
    if array.dtype.kind == "U" and array.ndim == 0:
        return str(array.item())
    if array.dtype.kind not in "biuf":
        raise ValueError(f"field {name!r} holds {array.dtype} {list(array.shape)}, neither numbers nor a text")
    return array


_KEY_DIGITS: Final = len(array_key(0))
# Where a ustar header keeps its checksum: six octal digits, a zero byte, a space.
_CHECKSUM: Final = slice(148, 154)


class _Layout:
    """The bytes of one group, made once; for each image only key, checksums, pixels and fields are filled in.

    `tarfile` needs 20 us per member for the same bytes, this about 1 us.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        class_ids_N: npt.NDArray[np.int64],
        names: tuple[str, ...] | None = None,
        fields: Mapping[str, npt.NDArray[Any]] = MappingProxyType({}),
    ) -> None:
        height, width, channels = shape
        extension, magic = ("pgm", "P5") if channels == 1 else ("ppm", "P6")
        header = f"{magic}\n{width} {height}\n255\n".encode()
        self._pixels = slice(BLOCK + len(header), BLOCK + len(header) + height * width * channels)
        blank = array_key(0)
        image = entry(f"{blank}.{extension}", header + bytes(height * width * channels))
        distinct, self._template_N = np.unique(class_ids_N, return_inverse=True)
        texts = [(str(c) if names is None else names[c]).encode() for c in distinct.tolist()]
        longest = max(map(len, texts), default=0)
        # All groups are of one size: where a name needs more than one block, spaces fill up the others.
        labels = [entry(f"{blank}.cls", text.ljust(longest) if longest > BLOCK else text) for text in texts]
        self._headers = [0, len(image)]
        at = len(image) + (len(labels[0]) if labels else 2 * BLOCK)
        rest = b""
        self._columns: list[tuple[slice, npt.NDArray[Any]]] = []
        for name, column in fields.items():
            first = column[:1].reshape(column.shape[1:]) if len(column) else np.empty(column.shape[1:], column.dtype)
            member = field_member(blank, name, first)
            start = at + BLOCK + len(npy.header(first.dtype.str, first.shape))
            self._headers.append(at)
            self._columns.append((slice(start, start + first.nbytes), column))
            at += len(member)
            rest += member
        self._templates = np.stack(
            [np.frombuffer(image + label + rest, np.uint8) for label in labels] or [np.zeros(at, np.uint8)]
        )
        self.group_bytes = self._templates.shape[1]

    def groups(self, images_NHWC: UInt8Array, rows: slice, start: int) -> bytes:
        count = len(images_NHWC)
        out = self._templates[self._template_N[rows]]
        out[:, self._pixels] = images_NHWC.reshape(count, -1)
        for place, column in self._columns:
            out[:, place] = np.ascontiguousarray(column[rows]).view(np.uint8).reshape(count, -1)
        keys = np.arange(start + rows.start, start + rows.stop, dtype=np.int64)
        digits = _decimal_digits(keys)
        grown = digits.sum(axis=1, dtype=np.int64)
        digits += ord("0")
        for header in self._headers:
            out[:, header : header + _KEY_DIGITS] = digits
            field = out[:, header + _CHECKSUM.start : header + _CHECKSUM.stop]
            field[:] = _octal_digits(_from_octal(field) + grown) + np.uint8(ord("0"))
        return out.tobytes()


def _decimal_digits(keys_N: npt.NDArray[np.int64]) -> UInt8Array:
    powers = 10 ** np.arange(_KEY_DIGITS - 1, -1, -1, dtype=np.int64)
    return (keys_N[:, None] // powers % 10).astype(np.uint8)


def _from_octal(digits: UInt8Array) -> npt.NDArray[np.int64]:
    return (digits.astype(np.int64) - ord("0")) @ (8 ** np.arange(5, -1, -1, dtype=np.int64))


def _octal_digits(values_N: npt.NDArray[np.int64]) -> UInt8Array:
    return (values_N[:, None] >> np.arange(15, -1, -3) & 7).astype(np.uint8)


def write_encoded(
    files: Iterable[tuple[str, bytes, int | str] | tuple[str, bytes, int | str, Mapping[str, Cell]]],
) -> Iterator[bytes]:
    """Yield a tar stream of already encoded images given as (extension, bytes, class id or name) and perhaps fields.

    Raises:
        ValueError: an extension that `read` would pass over.
    """
    parts: list[bytes] = []
    size = 0
    for number, (extension, content, class_id, *more) in enumerate(files):
        if extension.lower() not in IMAGE_EXTENSIONS:
            raise ValueError(f"extension {extension!r} is not one of {', '.join(IMAGE_EXTENSIONS)}")
        key = array_key(number)
        group = [entry(f"{key}.{extension}", content), entry(f"{key}.cls", str(class_id).encode())]
        group += [field_member(key, name, cell) for fields in more for name, cell in fields.items()]
        parts += group
        size += sum(map(len, group))
        if size >= _CHUNK_BYTES:
            yield b"".join(parts)
            parts, size = [], 0
    yield b"".join([*parts, END])


def entry(name: str, content: bytes) -> bytes:
    """One member of a tar stream: header, content and padding. A stream of them is closed with `END`."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    header = info.tobuf(tarfile.USTAR_FORMAT if len(name) <= 100 else tarfile.PAX_FORMAT)
    return header + content + bytes(-len(content) % BLOCK)


def decode_image(data: bytes, *, max_pixels: int, min_side: int, max_side: int = MAX_SIDE) -> UInt8Array:
    """The pixels of an encoded image, uint8 `[H, W, 3]` or `[H, W, 1]`; its declared size is checked before decoding.

    Black-and-white becomes grey, a palette becomes RGB, an alpha channel is dropped if it is opaque everywhere. An
    EXIF orientation is not applied (as in torchvision's and datasets' loaders).

    Raises:
        BadUpload: not a PPM, PGM, PNG, JPEG or WebP image, damaged, CMYK, 16 bit, animated, transparent, too small.
        TooLarge: more than `max_pixels`, or a side above `max_side`.
    """
    if data[:2] in (b"P5", b"P6"):
        return _decode_portable(data, max_pixels, min_side, max_side)
    if data[:8] == b"\x89PNG\r\n\x1a\n" and data[24:25] == b"\x10":
        # Pillow would cut 16-bit RGB down to 8 bits without a word.
        raise BadUpload("a PNG image with 16 bits per channel; images need 8 bits per channel")
    try:
        # Pillow warns of oddities that the checks here decide on (a broken animation, a large picture).
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(data), formats=_PILLOW_FORMATS) as image:
            _check_size(image.width, image.height, max_pixels, min_side, max_side)
            frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
            if frames > 1:
                raise BadUpload(f"an animated image with {frames} frames; send each as an image of its own")
            return _eight_bit(image)
    except Image.DecompressionBombError as error:
        raise TooLarge(f"{error}") from error
    except _PILLOW_ERRORS as error:
        raise BadUpload(f"not a readable PNG, JPEG, WebP, PPM or PGM image: {error}") from error


_PILLOW_FORMATS: Final = ("PNG", "JPEG", "WEBP")
# What Pillow's plugins raise for damaged files, found by cutting and flipping bytes.
_PILLOW_ERRORS: Final = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    MemoryError,
)


def _check_size(width: int, height: int, max_pixels: int, min_side: int, max_side: int) -> None:
    if width * height > max_pixels or max(width, height) > max_side:
        raise TooLarge(
            f"an image of {width} x {height} pixels; at most {max_pixels} pixels and {max_side} a side are accepted",
            width=width,
            height=height,
            max_pixels=max_pixels,
            max_side=max_side,
        )
    if min(width, height) < min_side:
        raise BadUpload(
            f"an image of {width} x {height} pixels; each side needs at least {min_side}", width=width, height=height
        )


def _decode_portable(data: bytes, max_pixels: int, min_side: int, max_side: int) -> UInt8Array:
    match = _PORTABLE_HEADER.match(data)
    if match is None:
        raise BadUpload("a PPM or PGM image with a damaged header")
    kind, width, height, maximum = (int(group) for group in match.groups())
    if maximum != 255:
        raise BadUpload(f"a PPM or PGM image with a maximum of {maximum}; images need 8 bits per channel (255)")
    _check_size(width, height, max_pixels, min_side, max_side)
    channels = 3 if kind == 6 else 1
    expected, found = height * width * channels, len(data) - match.end()
    if found != expected:
        raise BadUpload(f"a PPM or PGM image of {width} x {height} needs {expected} bytes of pixels, it has {found}")
    return np.frombuffer(data, np.uint8, expected, match.end()).reshape(height, width, channels)


def _eight_bit(image: Image.Image) -> UInt8Array:
    opened: Image.Image = image
    if image.mode == "P" or image.has_transparency_data:
        opened = image.convert("RGBA")
        if int(np.asarray(opened)[..., 3].min()) != 255:
            raise BadUpload("an image with transparent pixels; put it on a background first")
        opened = opened.convert("L" if image.mode == "LA" else "RGB")
    elif image.mode == "1":
        opened = image.convert("L")
    elif image.mode not in ("L", "RGB"):
        raise BadUpload(f"an image of mode {image.mode} (CMYK, 16 bit, ...); images must be 8-bit RGB or grey")
    pixels: np.ndarray[Any, np.dtype[np.uint8]] = np.asarray(opened)
    return pixels if pixels.ndim == 3 else pixels[..., None]
