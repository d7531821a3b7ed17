"""The index of a pack: where each exemplar's segment lies, so that a draw reads these bytes and no others.

It is derived from the pack and lies beside it. Whoever finds none, or one that does not hold, makes it anew from the
pack; so it need not survive a power cut, and it is no part of the budget. Twelve bytes for each exemplar, twenty with
fields.

Bytes, in this order (numbers are little-endian):

    magic:8 = "ENGRIDX1"
    head_crc:4  columns_crc:4               CRC-32 of the head, and of everything after it
    digest:32  pack_bytes:8                 the head: the pack that it belongs to,
    height:2  width:2  channels:1  sampling:1  quality:1  wide:1  count:4  runs:4  schema_bytes:4
    class_id:4 * runs  length:4 * runs      runs of class ids, as in a manifest
    start:4 * count                         (8 * count if `wide`, for packs of 4 GiB and more)
    length:4 * count  crc:4 * count
    record_start:4 * count  record_length:4 * count   only with fields (8 and 4 if `wide`)
    schema:schema_bytes                     the text of the fields' schema, none without fields

`sampling` is 1 for 4:2:0, else 0. A draw that reads segments from disk compares each with its checksum, so it finds out
about a wrong column; `is_sound` is for whoever does not.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import lru_cache
from typing import cast
from zlib import crc32

import numpy as np
import numpy.typing as npt

from engram.errors import InvalidRequest, StripCorrupt
from engram.fields import NO_FIELDS, Schema
from engram.form import Form
from engram.strip import Bytes, ChecksumArray, Exemplars, IntArray, runs_of

_MAGIC = b"ENGRIDX1"
_START = struct.Struct("<8sII")
_HEAD = struct.Struct("<32sQHHBBBBIII")


class Indexed(Exemplars):
    """Exemplars of a pack whose class ids are made when they are asked for, which a draw never does.

    `starts` and `lengths` are views of the index, in its types.
    """

    def __init__(self, index: Index, data: Bytes) -> None:
        columns = {"starts": index.starts, "lengths": index.lengths, "checksums": index.checksums}
        columns |= {"record_starts": index.record_starts, "record_lengths": index.record_lengths}
        for name, value in {"form": index.form, "data": data, "index": index, **columns}.items():
            object.__setattr__(self, name, value)

    index: Index

    @property
    def class_ids(self) -> IntArray:
        """One for each exemplar, made each time."""
        class_ids, lengths = self.index.runs
        return np.repeat(class_ids.astype(np.int64), lengths)

    def select(self, rows: npt.ArrayLike) -> Exemplars:
        """As that of `Exemplars`, in a time that does not grow with the pack."""
        wanted = np.asarray(rows, np.int64)
        starts, lengths, checksums = self.starts[wanted], self.lengths[wanted], self.checksums[wanted]
        class_ids, counts = self.index.runs
        places = np.searchsorted(np.cumsum(counts), wanted % max(1, len(self)), side="right")
        return Exemplars(
            self.form,
            self.data,
            starts,
            lengths,
            class_ids[places].astype(np.int64),
            checksums,
            None if self.record_starts is None else self.record_starts[wanted],
            None if self.record_lengths is None else self.record_lengths[wanted],
        )


@dataclass(frozen=True, eq=False)
class Index:
    """What an index says; the arrays are views of its bytes. `runs` are class ids and how many exemplars of each."""

    digest: str
    pack_bytes: int
    form: Form
    runs: tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint32]]
    starts: IntArray
    lengths: IntArray
    checksums: ChecksumArray
    record_starts: IntArray | None
    record_lengths: IntArray | None
    columns: memoryview
    columns_crc: int

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def is_sound(self) -> bool:
        """True if every column is as it was written."""
        return crc32(self.columns) == self.columns_crc

    def over(self, data: Bytes) -> Exemplars:
        """The exemplars of the pack that has these bytes, or of something that gives them slice by slice."""
        return Indexed(self, data)


def to_bytes(exemplars: Exemplars, digest: str) -> bytes:
    """The index of the pack of this digest, which was parsed as `exemplars`."""
    form, pack_bytes, count = exemplars.form, len(exemplars.data), len(exemplars)
    runs = np.array(runs_of(exemplars.class_ids), "<u4").reshape(-1, 2).T
    is_wide = pack_bytes >= 2**32
    shape = (form.height, form.width, form.channels, form.subsampling == "4:2:0", form.quality)
    schema, place = form.schema.text.encode(), "<u8" if is_wide else "<u4"
    head = _HEAD.pack(bytes.fromhex(digest), pack_bytes, *shape, is_wide, count, runs.shape[1], len(schema))
    parts = [
        runs,
        exemplars.starts.astype(place),
        exemplars.lengths.astype("<u4"),
        exemplars.checksums.astype("<u4"),
    ]
    if exemplars.record_starts is not None and exemplars.record_lengths is not None:
        parts += exemplars.record_starts.astype(place), exemplars.record_lengths.astype("<u4")
    columns = b"".join([*(part.tobytes() for part in parts), schema])
    return _START.pack(_MAGIC, crc32(head), crc32(columns)) + head + columns


def of(exemplars: Exemplars, digest: str) -> Index:
    """The index of the pack of this digest, which was parsed as `exemplars`."""
    found = parse(to_bytes(exemplars, digest), digest)
    assert found is not None, "what is written is read"
    return found


def parse(data: bytes, digest: str) -> Index | None:
    """What these bytes say of the pack of this digest; None if they are no index of it. See also `Index.is_sound`."""
    if len(data) < _START.size + _HEAD.size:
        return None
    magic, head_crc, columns_crc = _START.unpack_from(data)
    found, pack_bytes, height, width, channels, sampling, quality, wide, count, runs, schema_bytes = _HEAD.unpack_from(
        data, _START.size
    )
    at = _START.size + _HEAD.size
    columns = memoryview(data)[at:]
    if magic != _MAGIC or crc32(data[_START.size : at]) != head_crc or found.hex() != digest:
        return None
    place_bytes, pairs = 8 if wide else 4, 2 if schema_bytes else 1
    if len(columns) != 8 * runs + (pairs * (place_bytes + 4) + 4) * count + schema_bytes:
        return None

    def column(kind: str, length: int) -> npt.NDArray[np.uint32]:
        nonlocal at
        values = np.frombuffer(data, kind, length, at)
        at += values.nbytes
        return values

    def places() -> IntArray:
        return cast(IntArray, column("<u8" if wide else "<u4", count))

    class_ids, counts = column("<u4", runs), column("<u4", runs)
    starts, lengths, checksums = places(), cast(IntArray, column("<u4", count)), column("<u4", count)
    record_starts = places() if schema_bytes else None
    record_lengths = cast(IntArray, column("<u4", count)) if schema_bytes else None
    try:
        form = _form(height, width, channels, sampling, quality, bytes(columns[len(columns) - schema_bytes :]))
    except (StripCorrupt, InvalidRequest, UnicodeDecodeError):
        return None
    return Index(
        digest,
        pack_bytes,
        form,
        (class_ids, counts),
        starts,
        lengths,
        checksums,
        record_starts,
        record_lengths,
        columns,
        columns_crc,
    )


@lru_cache(maxsize=1024)
def _form(height: int, width: int, channels: int, sampling: int, quality: int, schema: bytes) -> Form:
    """Kept, so that the headers of a form are computed once."""
    fields = Schema.parse(schema.decode("ascii")) if schema else NO_FIELDS
    return Form(height, width, channels, "4:2:0" if sampling else "4:4:4", quality, fields)
