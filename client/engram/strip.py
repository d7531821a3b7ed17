r"""The strip: n images of one form in one ordinary JPEG. This text is its specification, version 2.

At 32x32 a JPEG file is mostly header. A strip stacks n images vertically, each padded to whole MCUs, behind one header.
DC prediction restarts at every image, so the entropy-coded segment of an image stands alone between restart markers:
it is the scan of that image's own JPEG file, cut out. Quantisation and Huffman tables follow from the form
(`engram.form`), so segments of one form mix freely, whatever upload, task or buffer they come from: any selection, in
any order, with the markers renumbered and the header computed, is again a strip. Nothing is ever re-encoded.

Bytes, in this order and no other (numbers are big-endian, as everywhere in JPEG):

    SOI    FF D8
    APP15  FF EF length:2 "ENGRAM\0" payload       one or more; their payloads are concatenated
    DQT    FF DB length:2 quantisation             tables 0 (and 1 for colour), 8 bit, in one segment
    DRI    FF DD 0004     mcus:2                   MCUs of one image; left out when they exceed 65,535 (then n = 1)
    SOF0   FF C0 length:2 08 height:2 width:2 components
                                                   height = (n - 1) * padded height + image height;
                                                   Y is 2x2 for 4:2:0, else 1x1
    SOS    FF DA length:2 components 00 3F 00
    n segments of entropy-coded data, RST0..RST7 in turn between them
    EOI    FF D9
    n records of fields                            only if flags & 2; decoders stop at EOI

    payload: version:1 (2)  payload_crc:4  flags:1
             height:2  width:2  channels:1  sampling:1  quality:1      the form; sampling is 22 for 4:2:0, else 11 (hex)
             count:2
             scan_bytes:4  schema_bytes:2  schema  only if flags & 2: from the first segment through EOI; the text of
                                                   the fields' schema (`engram.fields`)
             runs, as LEB128 varints until their lengths sum to count: (class id, length), or if flags & 1
                                                   (task, class id, length)
             crc:4 * count                         CRC-32 of each segment, markers excluded, and then of its record
             row:4 * count                         only if flags & 1: each image's row in its pack
             record_bytes:4 * count                only if flags & 2 and a field is ragged; else all have one size

Flag 1 marks what a draw delivers, flag 2 exemplars with fields. `payload_crc` is the CRC-32 of the payload after it.
There is no DHT segment: decoders assume the tables of T.81 Annex K when none are given; `Loose.picture` writes them for
those that do not.

Why each check exists: a reader computes the only header that the form allows and compares, so that no foreign table
ever reaches a decoder; declared sizes are compared with limits before memory is taken (a 100-byte file can claim 65,535
x 65,535); the count is compared with the markers found (a decoder fed too few segments invents grey images); a CRC per
segment finds the flipped bit that a JPEG decoder would render without complaint; a segment has at least 2 bits for each
of its image's blocks (or a few bytes could claim gigabytes of pixels). Varints are minimal, neighbouring runs differ,
a schema has one text and only the last APP15 may be short, so that one content has one encoding: what is parsed is
written again unchanged.

Records are found by their lengths and never searched: EOI must be the first that follows RST n - 1 and the end of
`scan_bytes`, so that no marker, and no whole strip, in a field is taken for one of ours, and a million FF bytes cost
nothing. Each is at least as long as its schema needs and at most `MAX_RECORD_BYTES`, and all must be there, before
anything is read of one; what is in them is checked again when it is decoded. The CRC of an exemplar binds its record
to its image: records cannot be exchanged.

Segments hold 4:2:0 or 4:4:4 YCbCr or grey. A strip has no JFIF segment: components 1, 2, 3 without Adobe marker mean
YCbCr to every decoder. Chroma must be upsampled by replication (`fastupsample=True`): libjpeg's "fancy" filter looks
across image borders.

Shapes: images are uint8 [N, H, W, C], C = 1 or 3 (RGB).
"""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby, pairwise
from typing import NamedTuple
from zlib import crc32

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image

from engram.errors import InvalidRequest, StripCorrupt, TooLarge
from engram.fields import MAX_RECORD_BYTES, NO_FIELDS, Column, Schema
from engram.form import MAX_SIDE, MAX_STRIP_PIXELS, Form
from engram.schemas import MAX_CLASS_ID, Subsampling

Bytes = bytes | memoryview
UInt8Array = npt.NDArray[np.uint8]
IntArray = npt.NDArray[np.int64]
ChecksumArray = npt.NDArray[np.uint32]

VERSION = 2
SIGNATURE = b"ENGRAM\0"

# Setting up a JPEG encoder takes as long as encoding 32x32 pixels. Up to here one encoder for many images is faster.
STACKED_PIXELS = 64 * 64
# Of one stack: bounds what the encoder holds at once.
_CHUNK_PIXELS = 2**22

_APP15_ROOM = 65_533 - len(SIGNATURE)
# A strip of 8-row images holds 8,188 of them at most, and each takes at most 23 bytes of payload; a schema takes 4,096.
_MAX_APP15 = 3
_FIXED = struct.Struct(">BIBHHBBBH")
_FIELDS = struct.Struct(">IH")
_CRC_END = 5
_DRAWN = 1
_WITH_FIELDS = 2
_SAMPLING: dict[Subsampling, int] = {"4:2:0": 0x22, "4:4:4": 0x11}
# As often as a strip of the smallest images, padded to 8 rows, can need them.
_RST = [bytes([0xFF, 0xD0 + i]) for i in range(8)] * 1024
_RST_CODES = bytes(range(0xD0, 0xD8)) * 1024
_EOI = b"\xff\xd9"
# Of fewer rows of a pack numpy's calls cost more than they save.
_FEW_ROWS = 10
_VARINT_BYTES = 5


@dataclass(frozen=True, eq=False)
class Exemplars:
    """n entropy-coded images of one form: where each one's segment lies in `data`, its class id and its CRC-32.

    A view: `select` copies no image bytes. Rows count from 0. With fields, each also has a record in `data`.
    """

    form: Form
    data: Bytes = field(repr=False)
    starts: IntArray
    lengths: IntArray
    class_ids: IntArray
    checksums: ChecksumArray
    record_starts: IntArray | None = None
    record_lengths: IntArray | None = None

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def schema(self) -> Schema:
        """The fields that each of them has."""
        return self.form.schema

    def segment(self, row: int) -> bytes:
        """The entropy-coded bytes of one image, without markers."""
        start = int(self.starts[row])
        return bytes(self.data[start : start + int(self.lengths[row])])

    def segments(self) -> list[Bytes]:
        """The entropy-coded bytes of every image, in order."""
        data, starts = self.data, self.starts.tolist()
        return [data[s:e] for s, e in zip(starts, (self.starts + self.lengths).tolist(), strict=True)]

    def records(self) -> list[Bytes] | None:
        """The fields of every exemplar as they are stored, in order; None without fields."""
        if self.record_starts is None or self.record_lengths is None:
            return None
        data, ends = self.data, self.record_starts + self.record_lengths
        return [data[s:e] for s, e in zip(self.record_starts.tolist(), ends.tolist(), strict=True)]

    def fields(self, names: frozenset[str] | None = None) -> dict[str, Column]:
        """The columns of the fields by name, only some if `names` are given.

        Raises:
            StripCorrupt: a record is not what the schema says.
        """
        records = self.records()
        return {} if records is None else self.schema.decode(records, names)

    @property
    def sizes(self) -> IntArray:
        """Bytes that each exemplar adds to a strip: segment, marker, CRC; its record and what says how long."""
        return self.sizes_of(slice(None))

    def sizes_of(self, rows: IntArray | slice) -> IntArray:
        """As `sizes`, of these rows alone."""
        if self.record_lengths is None:
            return self.lengths[rows] + 6
        return self.lengths[rows] + self.record_lengths[rows] + (10 if self.schema.ragged else 6)

    def select(self, rows: npt.ArrayLike) -> Exemplars:
        """These rows, in this order, without copying or re-encoding anything.

        Raises:
            IndexError: a row is not in -n..n-1.
        """
        index = np.asarray(rows, dtype=np.int64)
        return Exemplars(
            self.form,
            self.data,
            self.starts[index],
            self.lengths[index],
            self.class_ids[index],
            self.checksums[index],
            None if self.record_starts is None else self.record_starts[index],
            None if self.record_lengths is None else self.record_lengths[index],
        )

    def loose(self) -> Loose:
        """All of them, their bytes copied out of `data`."""
        return Loose(self.form, self.segments(), self.class_ids, self.checksums, self.records())

    def to_strips(self) -> list[bytes]:
        """As `Loose.to_strips`."""
        return self.loose().to_strips()

    def decode(self, out: UInt8Array | None = None) -> UInt8Array:
        """As `Loose.decode`."""
        return self.loose().decode(out)

    def jpeg(self, row: int) -> bytes:
        """One exemplar as a stand-alone JPEG file.

        Raises:
            IndexError: no such row.
        """
        return self.form.picture_head(1) + self.segment(row) + _EOI


class Loose(NamedTuple):
    """n entropy-coded images of one form, each in bytes of its own, whatever they were copied out of.

    `records` are their fields, None without.
    """

    form: Form
    segments: list[Bytes]
    class_ids: IntArray
    checksums: ChecksumArray
    records: list[Bytes] | None = None

    def fields(self, names: frozenset[str] | None = None) -> dict[str, Column]:
        """The columns of the fields by name, only some if `names` are given.

        Raises:
            StripCorrupt: a record is not what the schema says.
        """
        return {} if self.records is None else self.form.schema.decode(self.records, names)

    def together(self) -> Exemplars:
        """The same exemplars in one piece of memory."""
        return _exemplars(self.form, self.segments, self.class_ids, self.checksums, self.records)

    def is_intact(self) -> bool:
        """Whether the bytes of each are those that its checksum is of."""
        return bool((_checksums(self.segments, self.records) == self.checksums).all())

    def to_strips(self, *, tasks: npt.ArrayLike | None = None, rows: npt.ArrayLike | None = None) -> list[bytes]:
        """Strips of at most `form.max_images`.

        Args:
            tasks: of each exemplar, for what a draw delivers.
            rows: of each exemplar in its pack, given exactly if `tasks` are.
        """
        n = len(self.segments)
        marks: list[IntArray] = [np.asarray(mark, dtype=np.int64) for mark in (tasks, rows) if mark is not None]
        if len(marks) == 1 or any(len(mark) != n for mark in marks):
            raise ValueError(f"{n} exemplars need as many tasks and row numbers, or neither")
        return [_assemble(part, [mark[rows] for mark in marks]) for rows, part in self._cut()]

    def decode(self, out: UInt8Array | None = None) -> UInt8Array:
        """Pixels, uint8 [N, H, W, C], by one decoder call per strip.

        Args:
            out: flat buffer of at least N * padded height * W * C bytes to decode into; one is made if None
                (`pixel_buffer` makes a well-aligned one). The result is a view of it: rows of padding are skipped by
                stride.
        """
        form, n = self.form, len(self.segments)
        flat = pixel_buffer(n * form.image_bytes) if out is None else out
        for rows, part in self._cut():
            picture = b"".join([b"\xff\xd8", form.head(len(part.segments)), *_scan(part.segments)])
            decode_strip(picture, form, flat[rows.start * form.image_bytes : rows.stop * form.image_bytes])
        return as_images(flat, form, n)

    def picture(self) -> bytes:
        """One JPEG that any viewer opens, the images stacked from top to bottom.

        Raises:
            InvalidRequest: no images, or more than one picture holds.
        """
        count, most = len(self.segments), self.form.max_images
        if not 1 <= count <= most:
            raise InvalidRequest(
                f"one picture holds 1 to {most} exemplars of {self.form.height}x{self.form.width}, not {count}: ask "
                "for another number, or for strips",
                max_images=most,
            )
        return b"".join([self.form.picture_head(count), *_scan(self.segments)])

    def files(self) -> Iterator[bytes]:
        """Each image as a stand-alone JPEG file."""
        head = self.form.picture_head(1)
        return (b"".join((head, segment, _EOI)) for segment in self.segments)

    def _cut(self) -> Iterator[tuple[slice, Loose]]:
        """Parts that fit one strip each, and which rows they are."""
        n, room = len(self.segments), self.form.max_images
        for at in range(0, n, room):
            rows = slice(at, min(at + room, n))
            records = None if self.records is None else self.records[rows]
            yield rows, Loose(self.form, self.segments[rows], self.class_ids[rows], self.checksums[rows], records)


class Strip(NamedTuple):
    """One parsed strip: its exemplars, the draw's marks if it has them, and the offset just after it."""

    exemplars: Exemplars
    tasks: IntArray | None
    rows: IntArray | None
    end: int


def encode(
    images: npt.NDArray[np.uint8],
    class_ids: npt.ArrayLike,
    *,
    quality: int,
    subsampling: Subsampling = "4:2:0",
    schema: Schema = NO_FIELDS,
    records: Sequence[Bytes] | None = None,
) -> Exemplars:
    """Encode same-size images, each as if it were a file of its own.

    Args:
        images: uint8 [N, H, W, 3] RGB, [N, H, W, 1] or [N, H, W] grey; N >= 1, H and W from 1 to 65,500.
        class_ids: N integers in 0..2**31-1.
        quality: JPEG quality 1..100.
        subsampling: of the chroma; grey images have none.
        schema: the fields of each image.
        records: those fields as `schema` stores them, given exactly if it has any.

    Small images that fill whole MCUs are handed to Pillow stacked, for the sake of speed; the others one by one to
    simplejpeg, which below quality 96 has the fast DCT only. Against the accurate one that costs at most 0.06 dB up to
    quality 75 and 0.05 to 0.13 dB at 90, at the same bytes within 0.3 % (CIFAR-10, photographs).

    Raises:
        ValueError: a shape, a type, a class id or the quality is out of range.
    """
    if images.ndim == 3:
        images = images[..., None]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
        raise ValueError(f"images must be uint8 [N, H, W, 1 or 3], got {images.dtype} {list(images.shape)}")
    n, height, width, channels = images.shape
    if n == 0:
        raise ValueError("images must hold at least one image")
    if not (1 <= height <= MAX_SIDE and 1 <= width <= MAX_SIDE):
        raise ValueError(f"images must measure 1..{MAX_SIDE} pixels a side, got {height}x{width}")
    if height * width > MAX_STRIP_PIXELS:
        raise ValueError(f"an image of {height}x{width} exceeds {MAX_STRIP_PIXELS} pixels")
    if not (isinstance(quality, (int, np.integer)) and 1 <= quality <= 100):
        raise ValueError(f"quality must be an integer in 1..100, got {quality!r}")
    if subsampling not in _SAMPLING:
        raise ValueError(f"subsampling must be 4:2:0 or 4:4:4, got {subsampling!r}")
    labels = _class_ids(class_ids, n)
    if (records is not None) != bool(schema) or (records is not None and len(records) != n):
        given = "none" if records is None else len(records)
        raise ValueError(f"{n} images with the fields {schema.text!r} need as many records, got {given}")
    form = Form(height, width, channels, subsampling if channels == 3 else "4:4:4", int(quality), schema)
    segments = _scans(images, form)
    return _exemplars(form, segments, labels, _checksums(segments, records), records)


def concat(parts: Sequence[Exemplars]) -> Exemplars:
    """All exemplars of `parts`, in order, without re-encoding; bytes not referred to are left behind.

    Raises:
        ValueError: no part, or two parts of different forms.
    """
    if not parts:
        raise ValueError("nothing to concatenate")
    form = parts[0].form
    if any(part.form != form for part in parts):
        raise ValueError(f"exemplars of different forms cannot share a strip: {sorted({str(p.form) for p in parts})}")
    return _exemplars(
        form,
        [segment for part in parts for segment in part.segments()],
        np.concatenate([part.class_ids for part in parts]),
        np.concatenate([part.checksums for part in parts]),
        [record for part in parts for record in part.records() or []] if form.schema else None,
    )


def gather(
    parts: Sequence[Exemplars] | Mapping[int, Exemplars],
    which: Sequence[int],
    rows: Sequence[int],
    class_ids: IntArray,
) -> Loose:
    """Exemplar i, of class `class_ids[i]`, is row `rows[i]` of `parts[which[i]]`; these parts share one form.

    The time grows with the exemplars and not with the parts.
    """
    segments: list[Bytes] = []
    checksums: list[int] = []
    form = parts[which[0]].form
    runs = [(index, len(list(run))) for index, run in groupby(which)]
    if len(rows) < _FEW_ROWS * len(runs):
        for index, row in zip(which, rows, strict=True):
            part = parts[index]
            start = part.starts.item(row)
            segments.append(part.data[start : start + part.lengths.item(row)])
            checksums.append(part.checksums.item(row))
        runs = []
    for index, count in runs:
        part, some = parts[index], np.array(rows[len(segments) : len(segments) + count])
        data, starts = part.data, part.starts[some]
        ends = starts + part.lengths[some]
        segments += [data[start:end] for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]
        checksums += part.checksums[some].tolist()
    records = _gather_records(parts, which, rows) if form.schema.text else None
    return Loose(form, segments, class_ids, np.array(checksums, np.uint32), records)


def _gather_records(
    parts: Sequence[Exemplars] | Mapping[int, Exemplars], which: Sequence[int], rows: Sequence[int]
) -> list[Bytes]:
    records: list[Bytes] = []
    for index, run in groupby(which):
        part, some = parts[index], np.array(rows[len(records) : len(records) + len(list(run))])
        assert part.record_starts is not None, "parts of one form have one schema"
        assert part.record_lengths is not None, "where there are records they have lengths"
        data, starts = part.data, part.record_starts[some]
        ends = starts + part.record_lengths[some]
        records += [data[start:end] for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]
    return records


def parse(data: Bytes, offset: int = 0, *, markers: Markers | None = None) -> Strip:
    """Read the strip that begins at `offset`, checking everything that the module docstring promises.

    Args:
        data: one or more strips, back to back.
        offset: where to begin.
        markers: the markers of `data`, found once, when many strips are read from it.

    Raises:
        StripCorrupt: a marker, a length, a count or a checksum does not match.
        TooLarge: an image is declared larger than 64 Mi pixels.
    """
    strip, valid = parse_leniently(data, offset, markers=markers)
    if not valid.all():
        row = int(np.flatnonzero(~valid)[0])
        raise StripCorrupt(f"exemplar {row} of the strip at byte {offset} does not match its checksum or size", row=row)
    return strip


def parse_leniently(data: Bytes, offset: int, *, markers: Markers | None) -> tuple[Strip, npt.NDArray[np.bool_]]:
    """As `parse`, but a mask says which exemplars match their checksum and are long enough for their image."""
    payload, at = _read_app15(data, offset)
    if payload[:1] == b"\x01":
        raise StripCorrupt(
            "this strip is of version 1, which this library does not read: export its buffer with Engram 0.1 and "
            "upload the export again"
        )
    if len(payload) < _FIXED.size:
        raise StripCorrupt(f"the strip at byte {offset} has a payload of {len(payload)} bytes, not {_FIXED.size}")
    version, checksum, flags, height, width, channels, sampling, quality, count = _FIXED.unpack_from(payload)
    if version != VERSION or flags & ~(_DRAWN | _WITH_FIELDS):
        raise StripCorrupt(f"strip version {version} with flags {flags:#x}: this library reads version {VERSION}")
    if crc32(payload[_CRC_END:]) != checksum:
        raise StripCorrupt(f"the payload of the strip at byte {offset} does not match its checksum")
    first, scan_bytes, text = _FIXED.size, None, b""
    if flags & _WITH_FIELDS:
        first, scan_bytes, text = _read_schema(payload)
    form = _form(height, width, channels, sampling, quality, text)
    if not 1 <= count <= form.max_images:
        raise StripCorrupt(f"the strip declares {count} images, one of {height}x{width} holds 1 to {form.max_images}")
    head = form.head(count)
    body = at + len(head)
    if data[at:body] != head:
        raise StripCorrupt(f"the JPEG header of the strip at byte {offset} is not that of {count} images of {form}")
    is_drawn = flags & _DRAWN
    runs_end = len(payload) - 4 * count * (1 + is_drawn + bool(text and form.schema.ragged))
    columns = _read_runs(payload[first : max(runs_end, first)], 3 if is_drawn else 2, count)
    words = np.frombuffer(payload, ">u4", offset=runs_end)
    checksums = words[:count].astype(np.uint32)
    tasks, rows = (columns[0], words[count : 2 * count].astype(np.int64)) if is_drawn else (None, None)
    if scan_bytes is None:
        starts, lengths, end = (markers or Markers(data, body)).segments(body, count)
        exemplars = Exemplars(form, data, starts, lengths, columns[-1], checksums)
    else:
        starts, lengths, scan_end = Markers(data, body, body + scan_bytes).segments(body, count)
        sizes = _record_sizes(form.schema, words[-count:], count)
        record_starts = scan_end + np.cumsum(sizes) - sizes
        end = int(record_starts[-1] + sizes[-1])
        if scan_end != body + scan_bytes or end > len(data):
            raise StripCorrupt(
                f"the strip at byte {offset} has an EOI at byte {scan_end - 2} and records up to byte {end}, declared "
                f"is an EOI at byte {body + scan_bytes - 2}, and {len(data)} bytes are there"
            )
        exemplars = Exemplars(form, data, starts, lengths, columns[-1], checksums, record_starts, sizes)
    actual = _checksums(exemplars.segments(), exemplars.records())
    return Strip(exemplars, tasks, rows, end), (actual == checksums) & (lengths >= form.min_segment_bytes)


def _read_schema(payload: bytes) -> tuple[int, int, bytes]:
    """Of a strip with fields: where its runs begin, how long its scan is, the text of its schema.

    Raises:
        StripCorrupt: it has none, or is cut off.
    """
    if len(payload) < _FIXED.size + _FIELDS.size:
        raise StripCorrupt(f"the payload of a strip with fields has {len(payload)} bytes")
    scan_bytes, text_bytes = _FIELDS.unpack_from(payload, _FIXED.size)
    start = _FIXED.size + _FIELDS.size
    text = payload[start : start + text_bytes]
    if not text or len(text) != text_bytes:
        raise StripCorrupt(f"a strip declares its fields in {text_bytes} bytes, {len(text)} are there")
    return start + text_bytes, scan_bytes, text


def _record_sizes(schema: Schema, declared: npt.NDArray[np.uint32], count: int) -> IntArray:
    """Bytes of each record.

    Raises:
        StripCorrupt: one is declared shorter than its schema needs or longer than any may be.
    """
    if not schema.ragged:
        return np.full(count, schema.min_bytes, np.int64)
    sizes = declared.astype(np.int64)
    if sizes.min() < schema.min_bytes or sizes.max() > MAX_RECORD_BYTES:
        raise StripCorrupt(
            f"records of {sizes.min()} to {sizes.max()} bytes are declared, those of the fields {schema.text} have "
            f"{schema.min_bytes} to {MAX_RECORD_BYTES}"
        )
    return sizes


def _checksums(segments: Sequence[Bytes], records: Sequence[Bytes] | None) -> ChecksumArray:
    """The CRC-32 of each exemplar."""
    sums = np.fromiter(map(crc32, segments), np.uint32, len(segments))
    return sums if records is None else np.fromiter(map(crc32, records, sums.tolist()), np.uint32, len(records))


class Markers:
    """Where the markers of entropy-coded data lie: every FF that is not followed by a stuffed 00.

    They are searched once, when they are first asked for, from `offset` to `end`.
    """

    # Scanning in blocks keeps the temporaries small beside a pack of 100 MB.
    _BLOCK = 1 << 22

    def __init__(self, data: Bytes, offset: int = 0, end: int | None = None) -> None:
        self._data, self._offset, self._end = data, offset, end
        self._is_searched = False

    def _search(self) -> None:
        self._is_searched = True
        octets = np.frombuffer(self._data, dtype=np.uint8)[: self._end]
        found = []
        for at in range(self._offset, len(octets) - 1, self._BLOCK):
            block = octets[at : at + self._BLOCK + 1]
            escape = np.flatnonzero(block[:-1] == 0xFF)
            found.append(escape[block[escape + 1] != 0] + at)
        self._at: IntArray = np.concatenate(found) if found else np.empty(0, np.int64)
        self._code: UInt8Array = octets[self._at + 1] if len(self._at) else np.empty(0, np.uint8)

    def segments(self, start: int, count: int) -> tuple[IntArray, IntArray, int]:
        """Starts and lengths of the `count` segments from byte `start`, and the offset after their EOI.

        Raises:
            StripCorrupt: the markers from `start` on are not RST0, RST1, ... and EOI after `count` segments.
        """
        if not self._is_searched:
            self._search()
        first = int(np.searchsorted(self._at, start))
        at, code = self._at[first : first + count], self._code[first : first + count]
        expected = _RST_CODES[: count - 1] + b"\xd9"
        if code.tobytes() != expected:
            wrong = len(at) if len(at) < count and code.tobytes() == expected[: len(at)] else None
            where = f"after {wrong} of {count} segments the data ends" if wrong is not None else "markers out of order"
            raise StripCorrupt(f"strip with {count} exemplars: {where}", count=count)
        starts = np.empty(count, np.int64)
        starts[0] = start
        starts[1:] = at[:-1] + 2
        return starts, at - starts, int(at[-1]) + 2


def decode_strip(data: Bytes, form: Form, out: UInt8Array) -> None:
    """Decode one whole strip, already checked by `parse`, into a flat buffer in one decoder call.

    Raises:
        StripCorrupt: the decoder refuses the data.
    """
    try:
        simplejpeg.decode_jpeg(data, "RGB" if form.channels == 3 else "GRAY", fastupsample=True, buffer=out)
    except ValueError as error:
        raise StripCorrupt(f"the JPEG decoder refuses a strip of {form.height}x{form.width} images: {error}") from error


def decode_jpeg(file: Bytes) -> UInt8Array:
    """The pixels of an exported or fetched JPEG file exactly as draws decode them, [H, W, C] of 1 or 3 channels.

    Other decoders smooth the colour of 4:2:0 files across pixels ("fancy upsampling"): their values differ by 1 on
    average and by up to 76 at edges. Their 4:4:4 and grey files have the same pixels everywhere.

    Raises:
        ValueError: not a JPEG file.
    """
    *_, colours, _ = simplejpeg.decode_jpeg_header(file)
    pixels: UInt8Array = simplejpeg.decode_jpeg(file, "GRAY" if colours == "Gray" else "RGB", fastupsample=True)
    return pixels


def pixel_buffer(size: int) -> UInt8Array:
    """A flat buffer that starts 16 bytes off a 32-byte boundary.

    libjpeg-turbo's AVX2 colour conversion stores past the cache when rows are 32-byte aligned, which measured 3.7
    times slower for a draw that is read at once; numpy's own allocation hits that alignment by luck.
    """
    raw = np.empty(size + 48, np.uint8)
    skip = (16 - raw.ctypes.data) % 32
    return raw[skip : skip + size]


def as_images(flat: UInt8Array, form: Form, count: int) -> UInt8Array:
    """A decoded flat buffer as uint8 [N, H, W, C], padding rows skipped by stride."""
    padded = flat[: count * form.image_bytes].reshape(count, form.padded_height, form.width, form.channels)
    return padded[:, : form.height]


def strip_overhead(form: Form, runs: Sequence[tuple[int, int]]) -> int:
    """Bytes of a stored strip beyond the sum of its exemplars' `sizes`; `runs` are its (class id, count) pairs."""
    return overhead(
        form,
        sum(length for _, length in runs),
        sum(_varint_size(class_id) + _varint_size(length) for class_id, length in runs),
    )


def overhead(form: Form, count: int, runs_bytes: int) -> int:
    """The same of a strip of so many exemplars, whose runs take so many bytes."""
    payload = _FIXED.size + runs_bytes
    if form.schema:
        payload += _FIELDS.size + len(form.schema.text)
    app15 = -(-(payload + 4 * count * (2 if form.schema.ragged else 1)) // _APP15_ROOM) * (4 + len(SIGNATURE))
    return 2 + app15 + payload + len(form.head(1))


def runs_of(class_ids: IntArray) -> list[tuple[int, int]]:
    """Run-length encoding of class ids, in order."""
    if len(class_ids) == 0:
        return []
    firsts = [0, *((class_ids[1:] != class_ids[:-1]).nonzero()[0] + 1).tolist()]
    lengths = [b - a for a, b in pairwise([*firsts, len(class_ids)])]
    return list(zip(class_ids[firsts].tolist(), lengths, strict=True))


def _scans(images: UInt8Array, form: Form) -> list[Bytes]:
    """The entropy-coded data of each image's own JPEG file."""
    if form.height < form.padded_height or form.height * form.width > STACKED_PIXELS:
        return [_scan_alone(image, form) for image in images]
    count = min(form.max_images, max(1, _CHUNK_PIXELS // (form.height * form.width)))
    return [scan for at in range(0, len(images), count) for scan in _scans_stacked(images[at : at + count], form)]


def _scan_alone(image: UInt8Array, form: Form) -> Bytes:
    colours = "RGB" if form.channels == 3 else "GRAY"
    subsampling = form.subsampling.replace(":", "")
    file: bytes = simplejpeg.encode_jpeg(np.ascontiguousarray(image), form.quality, colours, subsampling)
    return file[_checked_head(file, form, 1) : -len(_EOI)]


def _scans_stacked(images: UInt8Array, form: Form) -> list[Bytes]:
    column = np.ascontiguousarray(images).reshape(-1, form.width, form.channels)
    file = io.BytesIO()
    Image.fromarray(column if form.channels == 3 else column[..., 0]).save(
        file,
        "JPEG",
        quality=form.quality,
        subsampling=form.subsampling,
        restart_marker_blocks=form.mcus if len(images) > 1 else 0,
    )
    data = file.getvalue()
    start = _checked_head(data, form, len(images))
    starts, lengths, _ = Markers(data, start).segments(start, len(images))
    return [data[s:e] for s, e in zip(starts.tolist(), (starts + lengths).tolist(), strict=True)]


def _checked_head(file: bytes, form: Form, count: int) -> int:
    """Where the scan of a picture of `count` images begins: after the header that decoding counts on."""
    head = form.picture_head(count)
    if not file.startswith(head):
        raise RuntimeError(f"the JPEG encoder did not write the headers and tables of libjpeg for {form}")
    return len(head)


def _exemplars(
    form: Form,
    segments: list[Bytes],
    class_ids: IntArray,
    checksums: ChecksumArray,
    records: Sequence[Bytes] | None,
) -> Exemplars:
    lengths = np.fromiter(map(len, segments), np.int64, len(segments))
    starts = np.cumsum(lengths) - lengths
    if records is None:
        return Exemplars(form, b"".join(segments), starts, lengths, class_ids, checksums)
    sizes = np.fromiter(map(len, records), np.int64, len(records))
    begins = lengths.sum() + np.cumsum(sizes) - sizes
    data = b"".join([*segments, *records])
    return Exemplars(form, data, starts, lengths, class_ids, checksums, begins, sizes)


def _assemble(part: Loose, marks: Sequence[IntArray]) -> bytes:
    """A strip; `marks` are the tasks and rows of a draw, or nothing."""
    form, n = part.form, len(part.segments)
    numbers = (form.height, form.width, form.channels, _SAMPLING[form.subsampling], form.quality, n)
    labels = _write_runs([*marks[:1], part.class_ids]) + part.checksums.astype(">u4").tobytes()
    scan = _scan(part.segments)
    flags = _DRAWN if marks else 0
    before = after = b""
    if part.records is not None:
        flags |= _WITH_FIELDS
        before = _FIELDS.pack(sum(map(len, scan)), len(form.schema.text)) + form.schema.text.encode("ascii")
        if form.schema.ragged:
            after = np.fromiter(map(len, part.records), ">u4", n).tobytes()
        scan += part.records
    payload = _FIXED.pack(VERSION, 0, flags, *numbers) + before + labels
    payload += b"".join(rows.astype(">u4").tobytes() for rows in marks[1:]) + after
    payload = payload[:1] + crc32(payload[_CRC_END:]).to_bytes(4, "big") + payload[_CRC_END:]
    return b"".join([b"\xff\xd8", _app15(payload), form.head(n), *scan])


def _scan(segments: list[Bytes]) -> list[Bytes]:
    """Everything after SOS: the segments, markers between them, EOI."""
    parts: list[Bytes] = [b""] * (2 * len(segments))
    parts[0::2] = segments
    parts[1::2] = _RST[: len(segments)]
    parts[-1] = _EOI
    return parts


def _app15(payload: bytes) -> bytes:
    pieces = [payload[at : at + _APP15_ROOM] for at in range(0, len(payload), _APP15_ROOM)]
    return b"".join(
        b"\xff\xef" + struct.pack(">H", 2 + len(SIGNATURE) + len(piece)) + SIGNATURE + piece for piece in pieces
    )


def _read_app15(data: Bytes, offset: int) -> tuple[bytes, int]:
    """The payload of the APP15 segments, and the offset after them."""
    if data[offset : offset + 4] != b"\xff\xd8\xff\xef":
        found = bytes(data[offset : offset + 4]).hex(" ")
        raise StripCorrupt(f"no strip begins at byte {offset}: found {found or 'nothing'}")
    at = offset + 2
    pieces: list[bytes] = []
    # Only the last segment may be short: one payload has one encoding.
    while data[at : at + 2] == b"\xff\xef" and (not pieces or len(pieces[-1]) == _APP15_ROOM):
        first, end = at + 4 + len(SIGNATURE), at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if data[at + 4 : first] != SIGNATURE or end > len(data) or end <= first or len(pieces) == _MAX_APP15:
            raise StripCorrupt(f"the APP15 segment at byte {at} is not Engram's or is cut off")
        pieces.append(bytes(data[first:end]))
        at = end
    return b"".join(pieces), at


@lru_cache(maxsize=1024)
def _form(height: int, width: int, channels: int, sampling: int, quality: int, text: bytes) -> Form:
    """The form of these numbers and this text of a schema, checked; kept, so that its headers are computed once.

    Raises:
        StripCorrupt: there is no such form.
        TooLarge: an image has too many pixels.
    """
    found = [name for name, code in _SAMPLING.items() if code == sampling and (channels, name) != (1, "4:2:0")]
    sides_fit = 1 <= height <= MAX_SIDE and 1 <= width <= MAX_SIDE
    if not (found and sides_fit and channels in (1, 3) and 1 <= quality <= 100):
        raise StripCorrupt(
            f"the strip declares {height}x{width} images of {channels} components, sampling {sampling:#x}, "
            f"quality {quality}"
        )
    if height * width > MAX_STRIP_PIXELS:
        raise TooLarge(
            f"the strip declares images of {height}x{width}, at most {MAX_STRIP_PIXELS} pixels are accepted",
            max_pixels=MAX_STRIP_PIXELS,
        )
    try:
        schema = Schema.parse(text.decode("ascii")) if text else NO_FIELDS
    except (InvalidRequest, UnicodeDecodeError) as error:
        raise StripCorrupt(f"the strip declares fields that there cannot be: {error}") from error
    return Form(height, width, channels, found[0], quality, schema)


def _write_runs(columns: Sequence[IntArray]) -> bytes:
    """The runs of equal rows of these columns of labels, each with its length, as varints."""
    changes = columns[0][1:] != columns[0][:-1]
    for column in columns[1:]:
        changes |= column[1:] != column[:-1]
    firsts = np.concatenate([[0], changes.nonzero()[0] + 1])
    lengths = np.diff(firsts, append=len(columns[0]))
    values = np.stack([*(column[firsts] for column in columns), lengths], axis=1).ravel()
    if values.max() < 0x80:  # the usual case: a varint is its one byte
        return values.astype(np.uint8).tobytes()
    shifted = values[:, None] >> (7 * np.arange(_varint_size(int(values.max())) + 1))
    octets = (shifted[:, :-1] & 0x7F) | np.where(shifted[:, 1:] > 0, 0x80, 0)
    wanted = shifted[:, :-1] > 0
    wanted[:, 0] = True
    return octets[wanted].astype(np.uint8).tobytes()


def _read_runs(runs: bytes, width: int, count: int) -> list[IntArray]:
    """The labels of `count` images: one column for each number of a run but its length.

    Raises:
        StripCorrupt: the runs are cut off, do not sum to `count`, or are not what `_write_runs` makes of the labels.
    """
    values = np.frombuffer(runs, np.uint8).astype(np.int64) if runs.isascii() else _read_varints(runs)
    if len(values) == 0 or len(values) % width:
        raise StripCorrupt(f"the runs of class ids hold {len(values)} numbers, not {width} for each run")
    table = values.reshape(-1, width)
    lengths = table[:, -1]
    # Before they are summed: the sum of many large ones would overflow.
    if lengths.max() > count or lengths.min() < 1 or lengths.sum() != count:
        raise StripCorrupt(f"the runs of class ids do not sum to the {count} images of the strip")
    labels = table[:, :-1]
    if labels.max() > MAX_CLASS_ID or (labels[1:] == labels[:-1]).all(axis=1).any():
        raise StripCorrupt(f"the runs of class ids have neighbours alike, or an id above {MAX_CLASS_ID}")
    return [np.repeat(column, lengths) for column in labels.T]


def _read_varints(data: bytes) -> IntArray:
    octets = np.frombuffer(data, np.uint8).astype(np.int64)
    ends = np.flatnonzero(octets < 0x80)
    sizes = np.diff(ends, prepend=-1)
    # A last octet of 0 adds nothing: the same number has a shorter form.
    if octets[-1] >= 0x80 or sizes.max() > _VARINT_BYTES or (octets[ends[sizes > 1]] == 0).any():
        raise StripCorrupt("a class id or run length in the strip's header is cut off or longer than it needs to be")
    starts = ends + 1 - sizes
    places = np.arange(len(octets)) - np.repeat(starts, sizes)
    return np.add.reduceat((octets & 0x7F) << (7 * places), starts)


_VARINT_ENDS = 1 << np.arange(7, 63, 7, dtype=np.int64)


def varint_sizes(values: IntArray) -> IntArray:
    """Bytes of each value as a varint."""
    return 1 + np.searchsorted(_VARINT_ENDS, values, side="right")


def _varint_size(value: int) -> int:
    return max(1, -(-value.bit_length() // 7))


def _class_ids(class_ids: npt.ArrayLike, n: int) -> IntArray:
    given = np.asarray(class_ids)
    if given.shape != (n,) or given.dtype.kind not in "iu":
        raise ValueError(f"class_ids must be {n} integers, got {given.dtype} {list(given.shape)}")
    labels = given.astype(np.int64)
    if labels.min() < 0 or labels.max() > MAX_CLASS_ID:
        raise ValueError(f"class ids must lie in 0..{MAX_CLASS_ID}, got {labels.min()}..{labels.max()}")
    return labels
