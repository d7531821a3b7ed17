r"""This file is the strip: n images of one size in one ordinary JPEG. This text is its specification.

At 32x32 a JPEG file is mostly header. A strip stacks n images vertically, each padded to the MCU height by repeating
its last row, under one set of quantisation and Huffman tables fitted to all of them. DC prediction restarts at every
image, so the entropy-coded segment of an image stands alone between restart markers: any selection of segments, in
any order, with the markers renumbered and the height patched, is again a valid strip. Nothing is ever re-encoded to
drop, reorder or draw.

Bytes, in this order and no other (numbers are big-endian, as everywhere in JPEG):

    SOI    FF D8
    APP15  FF EF length:2 "ENGRAM\0" payload       one or more; their payloads are concatenated
    DQT    FF DB length:2 quantisation             tables 0 (and 1 for colour), 8 bit, in one segment
    DHT    FF C4 length:2 huffman                  DC 0, AC 0 (and DC 1, AC 1 for colour), in one segment
    DRI    FF DD 0004     mcus:2                   MCUs of one image; left out when they exceed 65,535 (then n = 1)
    SOF0   FF C0 length:2 08 height:2 width:2 components
                                                   height = (n - 1) * padded height + image height;
                                                   Y is 2x2 for 4:2:0, else 1x1
    SOS    FF DA length:2 components 00 3F 00
    n segments of entropy-coded data, RST0..RST7 in turn between them
    EOI    FF D9

    payload: version:1 (1)  flags:1  image_height:2  count:4  header_crc:4
             task:4                                only if flags & 1
             (class id, run length) pairs as LEB128 varints until the run lengths sum to count
             segment_crc:4 * count                 CRC-32 of each segment, markers excluded
             row:4 * count                         only if flags & 2: each image's row in its pack

`header_crc` is the CRC-32 of every byte from SOI to the end of SOS with its own four bytes set to zero. All payload
parts are contiguous, so a corrupted table, label or checksum is found before anything is decoded. Why each check
exists: declared sizes are compared with limits before memory is taken (a 100-byte file can claim 65,535 x 65,535);
the count is compared with the markers found (a decoder fed too few segments invents grey images); a CRC per segment
finds the flipped bit that a JPEG decoder would render without complaint; a segment has at least 2 bits for each of its
image's blocks (or a few bytes could claim gigabytes of pixels). Varints are minimal, neighbouring runs differ in class
and only the last APP15 may be short, so that one content has one encoding: what is parsed is written again unchanged.

Segments hold 4:2:0 or 4:4:4 YCbCr or grey. A strip has no JFIF segment: components 1, 2, 3 without Adobe marker mean
YCbCr to every decoder. Chroma must be upsampled by replication (`fastupsample=True`): libjpeg's "fancy" filter looks
across image borders.

Shapes: images are uint8 [N, H, W, C], C = 1 or 3 (RGB).
"""

from __future__ import annotations

import io
import struct
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from itertools import pairwise
from operator import eq
from typing import Literal, NamedTuple
from zlib import crc32

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, ImageFile

from engram.errors import StripCorrupt, TooLarge

Subsampling = Literal["4:2:0", "4:4:4"]
Bytes = bytes | memoryview
UInt8Array = npt.NDArray[np.uint8]
IntArray = npt.NDArray[np.int64]
ChecksumArray = npt.NDArray[np.uint32]

VERSION = 1
SIGNATURE = b"ENGRAM\0"
# A JPEG may declare 65,535 rows, but libjpeg refuses more than 65,500.
MAX_SIDE = 65_500
MAX_CLASS_ID = 2**31 - 1
# A strip decodes in one call into one array, so its pixels are bounded: 64 Mi pixels are 192 MiB of RGB.
MAX_STRIP_PIXELS = 2**26
# What one Pillow call is given: libjpeg keeps every coefficient (2 bytes) until the tables are known.
CHUNK_PIXELS = 2**23

_APP15_ROOM = 65_533 - len(SIGNATURE)
# From the SOI: SOI, APP15's marker, length and signature, then version, flags, image height and count.
_CRC_AT = 2 + 4 + len(SIGNATURE) + 8
# A strip of 8-row images holds 8,188 of them at most, and each takes at most 14 bytes of header.
_MAX_APP15 = 2
_FIXED = struct.Struct(">BBHII")
# As often as a strip of the smallest images, padded to 8 rows, can need them.
_RST = [bytes([0xFF, 0xD0 + i]) for i in range(8)] * 1024
_RST_CODES = bytes(range(0xD0, 0xD8)) * 8192
_EOI = b"\xff\xd9"
_HAS_TASK, _HAS_ROWS = 1, 2
_maxblock_lock = threading.Lock()


@dataclass(frozen=True)
class Limits:
    """What `parse` accepts; anything beyond raises `TooLarge` before memory is taken."""

    max_pixels: int = MAX_STRIP_PIXELS
    """Pixels of one image."""


@dataclass(frozen=True)
class Form:
    """What all images of a strip share: shape, subsampling and tables.

    `quantisation` and `huffman` are the payloads of the DQT and DHT segments as the module docstring orders them.
    Two sets of exemplars can be mixed in one strip exactly when their forms are equal.
    """

    height: int
    width: int
    channels: int
    subsampling: Subsampling
    quantisation: bytes = field(repr=False)
    huffman: bytes = field(repr=False)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C) of one image."""
        return self.height, self.width, self.channels

    @cached_property
    def mcu_side(self) -> int:
        """Pixels along one side of a minimum coded unit: 16 for 4:2:0, else 8."""
        return _mcu_side(self.channels, self.subsampling)

    @cached_property
    def padded_height(self) -> int:
        """Rows that one image takes in a strip."""
        return -(-self.height // self.mcu_side) * self.mcu_side

    @cached_property
    def mcus(self) -> int:
        """Minimum coded units of one image, the restart interval."""
        return (self.padded_height // self.mcu_side) * -(-self.width // self.mcu_side)

    @cached_property
    def min_segment_bytes(self) -> int:
        """What no segment can be shorter than: a block takes two bits at least, a DC symbol and an end of block."""
        blocks = 1 if self.channels == 1 else 6 if self.subsampling == "4:2:0" else 3
        return -(-2 * blocks * self.mcus // 8)

    @cached_property
    def max_images(self) -> int:
        """How many images one strip can hold."""
        if self.mcus > 65_535:
            return 1
        by_rows = (MAX_SIDE - self.height) // self.padded_height + 1
        return max(1, min(by_rows, MAX_STRIP_PIXELS // (self.padded_height * self.width)))

    @cached_property
    def tables(self) -> bytes:
        """DQT, DHT and DRI segments."""
        out = b"\xff\xdb" + struct.pack(">H", 2 + len(self.quantisation)) + self.quantisation
        out += b"\xff\xc4" + struct.pack(">H", 2 + len(self.huffman)) + self.huffman
        return out + (b"\xff\xdd\x00\x04" + struct.pack(">H", self.mcus) if self.mcus <= 65_535 else b"")

    def frame(self, rows: int) -> bytes:
        """SOF0 and SOS segments for a picture of `rows` pixel rows."""
        y = 0x22 if self.subsampling == "4:2:0" else 0x11
        sampling = bytes([1, y, 0]) + (bytes([2, 0x11, 1, 3, 0x11, 1]) if self.channels == 3 else b"")
        coding = b"\x01\x00\x02\x11\x03\x11" if self.channels == 3 else b"\x01\x00"
        sof = struct.pack(">HBHHB", 8 + len(sampling), 8, rows, self.width, self.channels) + sampling
        sos = struct.pack(">HB", 6 + len(coding), self.channels) + coding + b"\x00\x3f\x00"
        return b"\xff\xc0" + sof + b"\xff\xda" + sos

    @cached_property
    def _around_rows(self) -> tuple[bytes, bytes]:
        frame = self.frame(0)
        return self.tables + frame[:5], frame[7:]

    def head(self, count: int) -> bytes:
        """Everything between APP15 and the segments of a strip of `count` images: tables and frame."""
        before, after = self._around_rows
        return before + ((count - 1) * self.padded_height + self.height).to_bytes(2, "big") + after


@dataclass(frozen=True, eq=False)
class Exemplars:
    """n entropy-coded images of one form: where each one's segment lies in `data`, its class id and its CRC-32.

    A view: `select` copies no image bytes. Rows count from 0.
    """

    form: Form
    data: Bytes = field(repr=False)
    starts: IntArray
    lengths: IntArray
    class_ids: IntArray
    checksums: ChecksumArray

    def __len__(self) -> int:
        return len(self.starts)

    def segment(self, row: int) -> bytes:
        """The entropy-coded bytes of one image, without markers."""
        start = int(self.starts[row])
        return bytes(self.data[start : start + int(self.lengths[row])])

    def segments(self) -> list[Bytes]:
        """The entropy-coded bytes of every image, in order."""
        data, starts = self.data, self.starts.tolist()
        return [data[s:e] for s, e in zip(starts, (self.starts + self.lengths).tolist(), strict=True)]

    @property
    def sizes(self) -> IntArray:
        """Bytes that each exemplar adds to a strip: its segment, one marker, one CRC."""
        return self.lengths + 6

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
        )

    def to_strips(self, *, task: int | None = None, rows: npt.ArrayLike | None = None) -> list[bytes]:
        """These exemplars as strips of at most `form.max_images`; `task` and `rows` mark what a draw delivers."""
        n, room = len(self), self.form.max_images
        marked = None if rows is None else np.asarray(rows, dtype=np.int64)
        if marked is not None and len(marked) != n:
            raise ValueError(f"{len(marked)} row numbers for {n} exemplars")
        if n <= room:
            return [_assemble(self, task, marked)] if n else []
        return [
            _assemble(self.select(slice_), task, None if marked is None else marked[slice_])
            for slice_ in (np.arange(at, min(at + room, n)) for at in range(0, n, room))
        ]

    def decode(self, out: UInt8Array | None = None) -> UInt8Array:
        """Pixels, uint8 [N, H, W, C], by one decoder call per strip.

        Args:
            out: flat buffer of at least N * padded height * W * C bytes to decode into; one is made if None
                (`pixel_buffer` makes a well-aligned one). The result is a view of it: rows of padding are skipped by
                stride.
        """
        form, n = self.form, len(self)
        image_bytes = form.padded_height * form.width * form.channels
        flat = pixel_buffer(n * image_bytes) if out is None else out
        for at in range(0, n, form.max_images):
            end = min(at + form.max_images, n)
            part = self if n <= form.max_images else self.select(np.arange(at, end))
            decode_strip(_picture(part), form, flat[at * image_bytes : end * image_bytes])
        return as_images(flat, form, n)

    def jpeg(self, row: int) -> bytes:
        """One exemplar as a stand-alone JPEG file that any viewer opens.

        Raises:
            IndexError: no such row.
        """
        form = self.form
        jfif = b"\xff\xe0\x00\x10JFIF\x00\x01\x01\x00\x00\x01\x00\x01\x00\x00"
        return b"\xff\xd8" + jfif + form.head(1) + self.segment(row) + _EOI


class Strip(NamedTuple):
    """One parsed strip: its exemplars, the draw's marks if it has them, and the offset just after it."""

    exemplars: Exemplars
    task: int | None
    rows: IntArray | None
    end: int


def encode(
    images: npt.NDArray[np.uint8], class_ids: npt.ArrayLike, *, quality: int, subsampling: Subsampling = "4:2:0"
) -> Exemplars:
    """Encode same-size images under one set of tables fitted to all of them.

    Args:
        images: uint8 [N, H, W, 3] RGB, [N, H, W, 1] or [N, H, W] grey; N >= 1, H and W from 1 to 65,500.
        class_ids: N integers in 0..2**31-1.
        quality: JPEG quality 1..100.
        subsampling: of the chroma; grey images have none.

    Memory is bounded: batches beyond 8 Mi pixels are encoded in chunks and brought under one set of Huffman tables.

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
    if not (isinstance(quality, (int, np.integer)) and 1 <= quality <= 100):
        raise ValueError(f"quality must be an integer in 1..100, got {quality!r}")
    if subsampling not in ("4:2:0", "4:4:4"):
        raise ValueError(f"subsampling must be 4:2:0 or 4:4:4, got {subsampling!r}")
    labels = _class_ids(class_ids, n)
    sampling: Subsampling = "4:4:4" if channels == 1 else subsampling
    side = _mcu_side(channels, sampling)
    if height * width > MAX_STRIP_PIXELS:
        raise ValueError(f"an image of {height}x{width} exceeds {MAX_STRIP_PIXELS} pixels")
    chunk = _chunk_images(height, width, side)
    parts = [
        _encode_chunk(images[at : at + chunk], labels[at : at + chunk], int(quality), sampling)
        for at in range(0, n, chunk)
    ]
    if len(parts) == 1:
        return parts[0]
    from engram.huffman import retable  # huffman builds on this module

    return concat(retable(parts))


def concat(parts: Sequence[Exemplars]) -> Exemplars:
    """All exemplars of `parts`, in order, without re-encoding; bytes not referred to are left behind.

    Raises:
        ValueError: no part, or two parts of different forms (`huffman.retable` gives parts common Huffman tables).
    """
    if not parts:
        raise ValueError("nothing to concatenate")
    form = parts[0].form
    if any(part.form != form for part in parts):
        raise ValueError("exemplars of different forms cannot share a strip: bring them under common tables first")
    lengths = np.concatenate([part.lengths for part in parts])
    return Exemplars(
        form,
        b"".join(segment for part in parts for segment in part.segments()),
        _starts(lengths),
        lengths,
        np.concatenate([part.class_ids for part in parts]),
        np.concatenate([part.checksums for part in parts]),
    )


def from_segments(form: Form, segments: Sequence[Bytes], class_ids: IntArray) -> Exemplars:
    """Exemplars of ready entropy-coded segments; checksums are computed here."""
    lengths = np.fromiter(map(len, segments), dtype=np.int64, count=len(segments))
    checksums = np.fromiter(map(crc32, segments), dtype=np.uint32, count=len(segments))
    return Exemplars(form, b"".join(segments), _starts(lengths), lengths, class_ids, checksums)


def parse(data: Bytes, offset: int = 0, *, limits: Limits | None = None, markers: Markers | None = None) -> Strip:
    """Read the strip that begins at `offset`, checking everything that the module docstring promises.

    Args:
        data: one or more strips, back to back.
        limits: what to accept.
        markers: the markers of `data`, found once, when many strips are read from it.

    Raises:
        StripCorrupt: a marker, a length, a count or a checksum does not match.
        TooLarge: an image is declared larger than `limits`.
    """
    strip, valid = parse_leniently(data, offset, limits=limits, markers=markers)
    if not valid.all():
        row = int(np.flatnonzero(~valid)[0])
        raise StripCorrupt(f"exemplar {row} of the strip at byte {offset} does not match its checksum or size", row=row)
    return strip


def parse_leniently(
    data: Bytes, offset: int = 0, *, limits: Limits | None = None, markers: Markers | None = None
) -> tuple[Strip, npt.NDArray[np.bool_]]:
    """As `parse`, but a mask says which segments match their checksum and are long enough for their image."""
    header = _parse_header(data, offset, limits or Limits())
    form, count = header.form, header.images
    starts, lengths, end = (markers or Markers(data, header.end)).segments(header.end, count)
    class_ids = np.repeat(np.array(list(header.class_ids), np.int64), list(header.run_lengths))
    checksums = np.frombuffer(header.checksums, ">u4").astype(np.uint32)
    rows = None if header.rows is None else np.frombuffer(header.rows, ">u4").astype(np.int64)
    segments = Exemplars(form, data, starts, lengths, class_ids, checksums)
    actual = np.fromiter(map(crc32, segments.segments()), dtype=np.uint32, count=count)
    return Strip(segments, header.task, rows, end), (actual == checksums) & (lengths >= form.min_segment_bytes)


class Checked(NamedTuple):
    """A strip that may be decoded: the offset after it, its runs of class ids, its rows as big-endian 32-bit words."""

    form: Form
    images: int
    task: int | None
    class_ids: Sequence[int]
    run_lengths: Sequence[int]
    rows: bytes | None
    end: int


def check(data: bytes, offset: int, markers: Markers, limits: Limits) -> Checked:
    """What `parse` checks, without the arrays that nobody needs who only decodes the strip: half the time of a draw's.

    Raises:
        StripCorrupt: as `parse`.
        TooLarge: as `parse`.
    """
    header = _parse_header(data, offset, limits)
    ends = markers.ends(header.end, header.images).tolist()
    starts = [header.end, *(end + 2 for end in ends[:-1])]
    segments = [data[start:end] for start, end in zip(starts, ends, strict=True)]
    expected = struct.unpack(f">{header.images}I", header.checksums)
    least = header.form.min_segment_bytes
    if tuple(map(crc32, segments)) != expected or min(map(len, segments)) < least:
        pairs = zip(segments, expected, strict=True)
        row = next(row for row, (part, crc) in enumerate(pairs) if crc32(part) != crc or len(part) < least)
        raise StripCorrupt(f"exemplar {row} of the strip at byte {offset} does not match its checksum or size", row=row)
    return Checked(
        header.form, header.images, header.task, header.class_ids, header.run_lengths, header.rows, ends[-1] + 2
    )


class Markers:
    """Where the markers of entropy-coded data lie: every FF that is not followed by a stuffed 00."""

    # Scanning in blocks keeps the temporaries small beside a pack of 100 MB.
    _BLOCK = 1 << 22

    def __init__(self, data: Bytes, offset: int = 0) -> None:
        octets = np.frombuffer(data, dtype=np.uint8)
        found = []
        for at in range(offset, len(octets) - 1, self._BLOCK):
            block = octets[at : at + self._BLOCK + 1]
            escape = np.flatnonzero(block[:-1] == 0xFF)
            found.append(escape[block[escape + 1] != 0] + at)
        self._at: IntArray = np.concatenate(found) if found else np.empty(0, np.int64)
        self._code: UInt8Array = octets[self._at + 1] if len(self._at) else np.empty(0, np.uint8)

    def ends(self, start: int, count: int) -> IntArray:
        """Where the `count` segments from byte `start` end; the next begins two bytes later.

        Raises:
            StripCorrupt: the markers from `start` on are not RST0, RST1, ... and EOI after `count` segments.
        """
        first = int(np.searchsorted(self._at, start))
        at, code = self._at[first : first + count], self._code[first : first + count]
        expected = _RST_CODES[: count - 1] + b"\xd9"
        if code.tobytes() != expected:
            wrong = len(at) if len(at) < count and code.tobytes() == expected[: len(at)] else None
            where = f"after {wrong} of {count} segments the data ends" if wrong is not None else "markers out of order"
            raise StripCorrupt(f"strip with {count} exemplars: {where}", count=count)
        return at

    def segments(self, start: int, count: int) -> tuple[IntArray, IntArray, int]:
        """Starts and lengths of the `count` segments from byte `start`, and the offset after their EOI.

        Raises:
            StripCorrupt: as `ends`.
        """
        at = self.ends(start, count)
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
    row = form.width * form.channels
    return flat[: count * form.padded_height * row].reshape(count, form.padded_height, form.width, form.channels)[
        :, : form.height
    ]


def strip_overhead(form: Form, runs: Sequence[tuple[int, int]]) -> int:
    """Bytes of a stored strip beyond the sum of its exemplars' `sizes`; `runs` are its (class id, count) pairs."""
    count = sum(length for _, length in runs)
    payload = _FIXED.size + sum(_varint_size(class_id) + _varint_size(length) for class_id, length in runs)
    app15 = -(-(payload + 4 * count) // _APP15_ROOM) * (4 + len(SIGNATURE))
    return 2 + app15 + payload + len(form.tables) + len(form.frame(1))


def runs_of(class_ids: IntArray) -> list[tuple[int, int]]:
    """Run-length encoding of class ids, in order."""
    if len(class_ids) == 0:
        return []
    firsts = [0, *((class_ids[1:] != class_ids[:-1]).nonzero()[0] + 1).tolist()]
    lengths = [b - a for a, b in pairwise([*firsts, len(class_ids)])]
    return list(zip(class_ids[firsts].tolist(), lengths, strict=True))


def _assemble(exemplars: Exemplars, task: int | None, rows: IntArray | None) -> bytes:
    form, n = exemplars.form, len(exemplars)
    labels = [number for run in runs_of(exemplars.class_ids) for number in run]
    payload = [
        _FIXED.pack(VERSION, (task is not None) * _HAS_TASK | (rows is not None) * _HAS_ROWS, form.height, n, 0),
        b"" if task is None else task.to_bytes(4, "big"),
        bytes(labels) if max(labels) < 0x80 else b"".join(map(_varint, labels)),
        exemplars.checksums.astype(">u4").tobytes(),
        b"" if rows is None else rows.astype(">u4").tobytes(),
    ]
    marks = b"\xff\xd8" + _app15(b"".join(payload))
    head = form.head(n)
    checksum = crc32(head, crc32(marks)).to_bytes(4, "big")
    return b"".join((marks[:_CRC_AT], checksum, marks[_CRC_AT + 4 :], head, *_scan(exemplars)))


def _picture(exemplars: Exemplars) -> bytes:
    """A strip without its APP15 segment: all that a decoder looks at."""
    return b"".join((b"\xff\xd8", exemplars.form.head(len(exemplars)), *_scan(exemplars)))


def _scan(exemplars: Exemplars) -> list[Bytes]:
    """Everything after SOS: the segments, markers between them, EOI."""
    n = len(exemplars)
    parts: list[Bytes] = [b""] * (2 * n)
    parts[0::2] = exemplars.segments()
    parts[1::2] = _RST[:n]
    parts[-1] = _EOI
    return parts


def _app15(payload: bytes) -> bytes:
    if len(payload) <= _APP15_ROOM:
        return b"\xff\xef" + struct.pack(">H", 2 + len(SIGNATURE) + len(payload)) + SIGNATURE + payload
    return b"".join(_app15(payload[at : at + _APP15_ROOM]) for at in range(0, len(payload), _APP15_ROOM))


class _Header(NamedTuple):
    form: Form
    images: int
    task: int | None
    class_ids: Sequence[int]
    run_lengths: Sequence[int]
    checksums: bytes
    rows: bytes | None
    end: int


def _parse_header(data: Bytes, offset: int, limits: Limits) -> _Header:
    """Everything before the entropy-coded data, checked."""
    payload, at = _read_app15(data, offset)
    if len(payload) < _FIXED.size:
        raise StripCorrupt(
            f"the strip at byte {offset} has a header of {len(payload)} bytes, at least {_FIXED.size} are needed"
        )
    version, flags, height, count, checksum = _FIXED.unpack_from(payload)
    if version != VERSION or flags & ~(_HAS_TASK | _HAS_ROWS):
        raise StripCorrupt(f"strip version {version} with flags {flags:#x}: this library reads version {VERSION}")
    frame, form_end = _tables_end(data, at)
    crc_at = offset + _CRC_AT
    actual = crc32(data[crc_at + 4 : form_end], crc32(b"\0\0\0\0", crc32(data[offset:crc_at])))
    if actual != checksum:
        raise StripCorrupt(f"the header of the strip at byte {offset} does not match its checksum")
    rows_px = int.from_bytes(data[frame + 5 : frame + 7], "big")
    form = _form(bytes(data[at : frame + 5]), bytes(data[frame + 7 : form_end]), height)
    if form.height * form.width > limits.max_pixels:
        raise TooLarge(
            f"the strip declares images of {form.height}x{form.width}, at most {limits.max_pixels} pixels are accepted",
            max_pixels=limits.max_pixels,
        )
    fits = 1 <= count <= form.max_images and max(form.height, form.width) <= MAX_SIDE
    if not fits or rows_px != (count - 1) * form.padded_height + height:
        raise StripCorrupt(f"the strip declares {count} images of {height} rows and a picture of {rows_px} rows")
    at = _FIXED.size
    task = None
    if flags & _HAS_TASK:
        task, at = int.from_bytes(payload[at : at + 4], "big"), at + 4
    labels_end = len(payload) - 4 * count * (2 if flags & _HAS_ROWS else 1)
    if labels_end < at:
        raise StripCorrupt(f"the strip's header holds {len(payload)} bytes, too few for {count} exemplars")
    class_ids, run_lengths = _read_runs(payload[at:labels_end], count)
    rows_at = labels_end + 4 * count
    rows = payload[rows_at:] if flags & _HAS_ROWS else None
    return _Header(form, count, task, class_ids, run_lengths, payload[labels_end:rows_at], rows, form_end)


def _read_app15(data: Bytes, offset: int) -> tuple[bytes, int]:
    if bytes(data[offset : offset + 4]) != b"\xff\xd8\xff\xef":
        raise StripCorrupt(
            f"no strip begins at byte {offset}: found {bytes(data[offset : offset + 4]).hex(' ') or 'nothing'}"
        )
    at = offset + 2
    pieces: list[bytes] = []
    while bytes(data[at : at + 2]) == b"\xff\xef":
        # Only the last segment may be short: one payload has one encoding, which the header checksum relies on.
        if pieces and (len(pieces[-1]) != _APP15_ROOM or len(pieces) == _MAX_APP15):
            break
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if bytes(data[at + 4 : at + 4 + len(SIGNATURE)]) != SIGNATURE or end > len(data):
            raise StripCorrupt(f"the APP15 segment at byte {at} is not Engram's or is cut off")
        pieces.append(bytes(data[at + 4 + len(SIGNATURE) : end]))
        at = end
    if not pieces[-1] or bytes(data[at : at + 2]) == b"\xff\xef":
        raise StripCorrupt(f"the APP15 segments from byte {offset + 2} are not filled in order")
    return b"".join(pieces), at


def _tables_end(data: Bytes, at: int) -> tuple[int, int]:
    """The offsets of SOF0 and after SOS, walking DQT, DHT, [DRI], SOF0, SOS by their lengths."""
    start = frame = at
    for _ in range(5):
        marker, length = data[at : at + 2], int.from_bytes(data[at + 2 : at + 4], "big")
        end = at + 2 + length
        if length < 2 or end > len(data):
            break
        if marker == b"\xff\xda":
            return frame, end
        frame, at = at, end
    raise StripCorrupt(f"the tables from byte {start} do not end with a start of scan")


@lru_cache(maxsize=1024)
def _form(before_rows: bytes, after_rows: bytes, height: int) -> Form:
    """The form whose tables and frame are exactly these bytes, around the two that say how many rows the picture has.

    Those of a pack are alike in every draw from it, so they are checked once.
    """
    head = before_rows + b"\0\0" + after_rows
    try:
        quantisation = head[4 : 2 + int.from_bytes(head[2:4], "big")]
        at = 4 + len(quantisation)
        huffman = head[at + 4 : at + 2 + int.from_bytes(head[at + 2 : at + 4], "big")]
        at += 4 + len(huffman)
        if head[at : at + 2] == b"\xff\xdd":
            at += 6
        width, channels = struct.unpack_from(">HB", head, at + 7)
        subsampling: Subsampling = "4:2:0" if head[at + 11] == 0x22 else "4:4:4"
    except (IndexError, struct.error) as error:
        raise StripCorrupt(f"the tables of the strip are cut off: {error}") from error
    if channels not in (1, 3) or (channels == 1 and subsampling == "4:2:0") or width < 1 or height < 1:
        raise StripCorrupt(f"the strip declares {height}x{width} images of {channels} components")
    _check_tables(quantisation, huffman, channels)
    form = Form(height, width, channels, subsampling, quantisation, huffman)
    if form.tables + form.frame(0) != head:
        raise StripCorrupt("the tables of the strip are not in the order of the format")
    return form


def _check_tables(quantisation: bytes, huffman: bytes, channels: int) -> None:
    tables = 2 if channels == 3 else 1
    if len(quantisation) != 65 * tables or any(quantisation[65 * i] != i for i in range(tables)):
        raise StripCorrupt(f"{len(quantisation)} bytes of quantisation tables, {tables} tables of 65 bytes are needed")
    from engram.huffman import parse_tables  # huffman builds on this module

    parse_tables(huffman, 2 * tables)


def _read_runs(labels: bytes, count: int) -> tuple[Sequence[int], Sequence[int]]:
    """Class ids and lengths of the runs of `count` images."""
    # Below 128 a varint is its one byte: the usual case, and nothing to loop over.
    values = labels if labels.isascii() else _read_varints(labels)
    class_ids, lengths = values[0::2], values[1::2]
    if len(class_ids) != len(lengths) or sum(lengths) != count or 0 in lengths:
        raise StripCorrupt(
            f"the runs of class ids have lengths that sum to {sum(lengths)}, the strip has {count} images"
        )
    if max(class_ids) > MAX_CLASS_ID or any(map(eq, class_ids, class_ids[1:])):
        raise StripCorrupt(f"the runs of class ids have neighbours alike, or an id above {MAX_CLASS_ID}")
    return class_ids, lengths


def _read_varints(labels: bytes) -> list[int]:
    values: list[int] = []
    at = 0
    while at < len(labels):
        value, at = _read_varint(labels, at)
        values.append(value)
    return values


def _read_varint(labels: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 35, 7):
        if at >= len(labels):
            break
        octet = labels[at]
        at += 1
        value |= (octet & 0x7F) << shift
        if octet < 0x80 and (octet or not shift):
            return value, at
    raise StripCorrupt("a class id or run length in the strip's header is cut off or longer than it needs to be")


@lru_cache(maxsize=4096)
def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _varint_size(value: int) -> int:
    return max(1, -(-value.bit_length() // 7))


def _mcu_side(channels: int, subsampling: Subsampling) -> int:
    return 16 if channels == 3 and subsampling == "4:2:0" else 8


def _starts(lengths: IntArray) -> IntArray:
    starts = np.zeros(len(lengths), np.int64)
    np.cumsum(lengths[:-1], out=starts[1:])
    return starts


def _class_ids(class_ids: npt.ArrayLike, n: int) -> IntArray:
    given = np.asarray(class_ids)
    if given.shape != (n,) or given.dtype.kind not in "iu":
        raise ValueError(f"class_ids must be {n} integers, got {given.dtype} {list(given.shape)}")
    labels = given.astype(np.int64)
    if labels.min() < 0 or labels.max() > MAX_CLASS_ID:
        raise ValueError(f"class ids must lie in 0..{MAX_CLASS_ID}, got {labels.min()}..{labels.max()}")
    return labels


def _encode_chunk(images: UInt8Array, labels: IntArray, quality: int, subsampling: Subsampling) -> Exemplars:
    """One Pillow call: all images of the chunk under one set of optimal tables."""
    n, height, width, channels = images.shape
    side = _mcu_side(channels, subsampling)
    canvas = _canvas(images, side)
    mcus = -(-height // side) * -(-width // side)
    data = _save(canvas, quality, subsampling, mcus if n > 1 else 0)
    quantisation, huffman, at = _read_tables(data)
    # A canvas may end in filler, which makes segments after the last image.
    on_canvas = 1 if n == 1 else -(-canvas.shape[0] // side) * -(-canvas.shape[1] // side) // mcus
    starts, lengths, _ = Markers(data, at).segments(at, on_canvas)
    starts, lengths = starts[:n], lengths[:n]
    form = Form(height, width, channels, subsampling, quantisation, huffman)
    unchecked = Exemplars(form, data, starts, lengths, labels, np.zeros(n, np.uint32))
    return replace(unchecked, checksums=np.fromiter(map(crc32, unchecked.segments()), np.uint32, n))


def _canvas(images: UInt8Array, side: int) -> UInt8Array:
    """The picture that Pillow encodes so that every image is one run of consecutive MCUs.

    Few images are stacked as in the strip. Many would exceed the 65,500 rows that libjpeg allows, so their MCUs are
    laid side by side instead, several images to an MCU row: blocks are coded one by one, so the entropy-coded
    data of an image is the same, and one call fits one set of tables to all of them.
    """
    n, height, width, channels = images.shape
    down, across = -(-height // side), -(-width // side)
    if n == 1 and down * side > MAX_SIDE:
        return images.reshape(height, width, channels)
    if n * down * side <= MAX_SIDE:
        return _pad(images, down * side, width).reshape(n * down * side, width, channels)
    mcus = down * across
    a_row = -(-n // -(-n // (MAX_SIDE // (mcus * side))))
    rows = -(-n // a_row)
    units = _pad(images, down * side, across * side).reshape(n, down, side, across, side, channels)
    canvas = np.zeros((rows * a_row, down, across, side, side, channels), np.uint8)
    canvas[:n] = units.transpose(0, 1, 3, 2, 4, 5)
    laid: UInt8Array = (
        canvas.reshape(rows, a_row * mcus, side, side, channels)
        .transpose(0, 2, 1, 3, 4)
        .reshape(rows * side, a_row * mcus * side, channels)
    )
    return laid


def _pad(images: UInt8Array, height: int, width: int) -> UInt8Array:
    """Images grown to this size by repeating their last row and column, as libjpeg itself does."""
    more = ((0, 0), (0, height - images.shape[1]), (0, width - images.shape[2]), (0, 0))
    if not any(after for _, after in more):
        return images
    padded: UInt8Array = np.pad(images, more, mode="edge")
    return padded


def _chunk_images(height: int, width: int, side: int) -> int:
    """How many images one Pillow call is given."""
    down, across = -(-height // side), -(-width // side)
    chunk = max(1, CHUNK_PIXELS // (down * across * side * side))
    if down * across * side > MAX_SIDE:  # too many MCUs for one row of a canvas: stack
        chunk = min(chunk, max(1, MAX_SIDE // (down * side)))
    return chunk


def _save(canvas: UInt8Array, quality: int, subsampling: Subsampling, restart_interval: int) -> bytes:
    picture = Image.fromarray(np.ascontiguousarray(canvas[..., 0] if canvas.shape[2] == 1 else canvas))
    options = {
        "quality": quality,
        "subsampling": 2 if subsampling == "4:2:0" else 0,
        "optimize": True,
        "restart_marker_blocks": restart_interval,
    }
    out = io.BytesIO()
    try:
        picture.save(out, "JPEG", **options)
    except OSError:
        # With optimize=True libjpeg cannot be suspended, so Pillow's output buffer must hold the whole file, and its
        # guess of
        # one or two bytes a pixel is too small for noise at high quality.
        out = io.BytesIO()
        with _maxblock_lock:
            before, ImageFile.MAXBLOCK = ImageFile.MAXBLOCK, canvas.size * 2 + 65_536
            try:
                picture.save(out, "JPEG", **options)
            finally:
                ImageFile.MAXBLOCK = before
    return out.getvalue()


def _read_tables(data: bytes) -> tuple[bytes, bytes, int]:
    """Quantisation and Huffman payloads of a file that Pillow wrote, and where its entropy-coded data begins."""
    quantisation = huffman = b""
    at = 2
    while True:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        payload, at = data[at + 4 : at + 2 + length], at + 2 + length
        if marker == 0xDB:
            quantisation += payload
        elif marker == 0xC4:
            huffman += payload
        elif marker == 0xDA:
            return quantisation, huffman, at
