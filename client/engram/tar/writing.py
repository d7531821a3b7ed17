"""Writes the upload format: arrays, or files as they are, with classes and fields, as a tar stream.

Arrays become PPM or PGM members, so nothing is encoded. The bytes of a group are laid out once; for each image only
key, checksums, pixels and fields are filled in.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from engram import npy
from engram.fields import FIELD_NAME, Cell, array_key, length_of
from engram.images import IMAGE_EXTENSIONS
from engram.labelled import labelled

from .blocks import BLOCK, CHUNK_BYTES, END

UInt8Array = npt.NDArray[np.uint8]


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
    yield from write_parts([(images_NHWC, class_ids, fields or {})], start=start)


def write_parts(
    parts: Iterable[tuple[UInt8Array, npt.ArrayLike, Mapping[str, Any]]], *, start: int = 0
) -> Iterator[bytes]:
    """As `write`, of images, class ids and fields that come one part after the other, so that no more is held.

    Raises:
        ValueError: as `write`.
    """
    for images, class_ids, fields in parts:
        images_NHWC, class_ids_N, names = labelled(images, class_ids)
        fixed, ragged = _checked_fields(fields, len(images_NHWC))
        layout = _Layout(images_NHWC.shape[1:], class_ids_N, names, fixed)
        count = len(images_NHWC)
        step = max(1, CHUNK_BYTES // layout.group_bytes)
        for first in range(0, count, step):
            rows = slice(first, min(count, first + step))
            groups = layout.groups(images_NHWC[rows], rows, start)
            yield groups if not ragged else _with_ragged(groups, layout.group_bytes, ragged, rows, start)
        start += count
    yield END


def _checked_fields(fields: Mapping[str, Any], count: int) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
    """The columns whose members all have one size, and the others.

    Raises:
        ValueError: there are not as many values as images, or they are no numbers.
    """
    fixed: dict[str, npt.NDArray[Any]] = {}
    ragged: dict[str, Any] = {}
    for name, column in fields.items():
        if not FIELD_NAME.fullmatch(name):
            raise ValueError(f"field {name!r}: a name must match {FIELD_NAME.pattern}")
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
        if size >= CHUNK_BYTES:
            yield b"".join(parts)
            parts, size = [], 0
    yield b"".join([*parts, END])


def entry(name: str, content: bytes) -> bytes:
    """One member of a tar stream: header, content and padding. A stream of them is closed with `END`."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    header = info.tobuf(tarfile.USTAR_FORMAT if len(name) <= 100 else tarfile.PAX_FORMAT)
    return header + content + bytes(-len(content) % BLOCK)


def field_member(key: str, name: str, cell: Cell) -> bytes:
    """A field of one image as a member of a tar stream."""
    if isinstance(cell, str):
        return entry(f"{key}.{name}.txt", cell.encode())
    return entry(f"{key}.{name}.npy", npy.header(cell.dtype.str, cell.shape) + cell.tobytes())
