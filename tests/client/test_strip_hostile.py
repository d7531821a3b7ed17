"""Hostile bytes: whatever arrives, it is refused by name or it is a strip, byte for byte, and little memory is taken.

Checksums stop accidents, not attackers, so most of these strips carry checksums that match what was changed.
"""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cache
from typing import Any
from zlib import crc32

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engram import batch, pack, strip
from engram.errors import StripCorrupt, TooLarge
from engram.fields import Schema
from engram.form import Form
from engram.schemas import Subsampling

# Offsets in a strip whose APP15 segment is its first: payload, its checksum, what that covers.
PAYLOAD, CHECKSUM, COVERED = 13, 14, 18
# In a payload: the form, the count, the runs.
FORM, COUNT, RUNS = 6, 13, 15


def sample(count: int = 5, *, channels: int = 3, sampling: Subsampling = "4:2:0") -> strip.Exemplars:
    rng = np.random.default_rng(count)
    coarse = rng.integers(0, 256, (count, 5, 7, channels), dtype=np.uint8)
    images = coarse.repeat(4, 1).repeat(4, 2)[:, :18, :27]
    return strip.encode(images, np.arange(count) // 2 * 300, quality=40, subsampling=sampling)


FIXED = Schema.declare({"logits": "float16 [6]", "flag": "bool"})
RAGGED = Schema.declare({"boxes": "float32 [any, 2]", "key": "utf8", "weight": "float32"})


def with_fields(count: int, schema: Schema) -> strip.Exemplars:
    """Exemplars whose records are full of markers, and of whole strips."""
    plain = sample(count)
    mimic = plain.to_strips()[0][: 8 * 37]
    given: dict[str, Any] = {
        "logits": np.frombuffer(b"\xff\xd9\xff\xd0\xff\xd8" * 2 * count, "<f2").reshape(count, 6),
        "flag": np.arange(count) % 2 == 0,
        "boxes": [np.frombuffer(mimic[: 8 * (7 * row % 38)], "<f4").reshape(-1, 2) for row in range(count)],
        "key": [f"{row}\u00ff" * row for row in range(count)],
        "weight": np.arange(count),
    }
    columns = schema.columns({name: given[name] for name in schema.declared}, count)
    records = columns.records(np.arange(count))
    pixels = plain.decode()
    return strip.encode(pixels, plain.class_ids, quality=40, schema=schema, records=records)


@cache
def samples() -> tuple[bytes, ...]:
    """Strips of every kind: colour and grey, drawn and stored, one image and several, with and without fields."""
    drawn = sample(3, sampling="4:4:4").loose().to_strips(tasks=[3, 500, 500], rows=[7, 1, 2])
    grey = sample(4, channels=1).loose().to_strips(tasks=[0] * 4, rows=range(4))
    fields = with_fields(3, RAGGED).loose().to_strips(tasks=[3, 500, 500], rows=[7, 1, 2])
    plain = [sample().to_strips()[0], drawn[0], grey[0], sample(1).to_strips()[0]]
    return *plain, with_fields(4, FIXED).to_strips()[0], fields[0]


KINDS = st.integers(0, len(samples()) - 1)


def made_of(form: Form, segments: Sequence[bytes], records: Sequence[bytes] | None = None) -> bytes:
    """A well-formed strip of this form with these for image data and fields."""
    sums = [crc32(segment) for segment in segments]
    checksums = np.array(sums if records is None else list(map(crc32, records, sums)), np.uint32)
    own: list[strip.Bytes] | None = None if records is None else list(records)
    (data,) = strip.Loose(form, list(segments), np.zeros(len(segments), np.int64), checksums, own).to_strips()
    return data


def head_start(data: bytes) -> int:
    return 4 + int.from_bytes(data[4:6], "big")


def head_end(data: bytes) -> int:
    """The offset after SOS."""
    return data.index(b"\x00\x3f\x00", head_start(data)) + 3


def signed(data: bytes) -> bytes:
    """These bytes with a checksum that matches the payload."""
    return data[:CHECKSUM] + struct.pack(">I", crc32(data[COVERED : head_start(data)])) + data[COVERED:]


def with_payload(data: bytes, payload: bytes) -> bytes:
    """The strip with another APP15 payload, signed."""
    return signed(data[:2] + app15(payload) + data[head_start(data) :])


def payload_of(data: bytes) -> bytes:
    return data[PAYLOAD : head_start(data)]


def app15(payload: bytes) -> bytes:
    return b"\xff\xef" + struct.pack(">H", 9 + len(payload)) + strip.SIGNATURE + payload


def judge(data: bytes) -> strip.Strip | None:
    """What `parse` makes of the bytes; what it accepts must be written again exactly as it was, and may be decoded."""
    try:
        read = strip.parse(data)
    except (StripCorrupt, TooLarge):
        return None
    assert read.exemplars.loose().to_strips(tasks=read.tasks, rows=read.rows) == [data[: read.end]]
    with suppress(StripCorrupt):
        assert read.exemplars.decode().shape == (len(read.exemplars), *read.exemplars.form.shape)
    with suppress(StripCorrupt):
        assert {len(column) for column in read.exemplars.fields().values()} <= {len(read.exemplars)}
    return read


@contextmanager
def little_memory(limit: int = 2**20) -> Iterator[None]:
    """Fails if more than this is allocated at once within."""
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < limit


def test_signing_an_untouched_strip_changes_nothing() -> None:
    for data in samples():
        assert signed(data) == data
        assert with_payload(data, payload_of(data)) == data
        assert judge(data) is not None


@pytest.mark.parametrize("apart", [8, pytest.param(1, marks=pytest.mark.slow)])
def test_every_flipped_bit_is_found_when_the_checksums_are_left_alone(apart: int) -> None:
    for data in samples():
        for at in range(len(data)):
            for bit in range(at % apart, 8, apart):
                assert judge(data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]) is None


@pytest.mark.parametrize("apart", [3, pytest.param(1, marks=pytest.mark.slow)])
def test_every_truncation_is_found_even_if_it_is_signed(apart: int) -> None:
    for data in samples():
        for end in [*range(head_end(data)), *range(head_end(data), len(data), apart), len(data) - 1]:
            assert judge(data[:end]) is None
            assert end < COVERED or judge(signed(data[:end])) is None


def test_every_header_byte_may_be_anything() -> None:
    for data in samples():
        for at in range(head_end(data)):
            for value in {0x00, 0x01, 0x7F, 0xFF, data[at] ^ 0x01, data[at] ^ 0x80, data[at] ^ 0x10} - {data[at]}:
                judge(signed(data[:at] + bytes([value]) + data[at + 1 :]))


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """One to three accidents: bits flipped, bytes replaced, put in, taken out, repeated, moved, or the end cut off."""
    for _ in range(rng.integers(1, 4)):
        at, other = sorted(rng.integers(0, len(data) + 1, 2).tolist())
        length = int(rng.integers(1, 30))
        piece = data[at : at + length]
        match rng.integers(7):
            case 0:
                flipped = bytearray(data)
                for where in rng.integers(0, len(data), rng.integers(1, 9)):
                    flipped[where] ^= 1 << rng.integers(8)
                data = bytes(flipped)
            case 1:
                data = data[:at] + rng.bytes(len(piece)) + data[at + length :]
            case 2:
                data = data[:at] + rng.bytes(length) + data[at:]
            case 3:
                data = data[:at] + data[at + length :]
            case 4:
                data = data[:other] + piece + data[other:]
            case 5:
                data = data[:at] + data[at + length : other] + piece + data[max(other, at + length) :]
            case 6:
                data = data[: rng.integers(len(data) // 2, len(data))]
        if len(data) < COVERED:
            break
    return data


@pytest.mark.parametrize("count", [2_000, pytest.param(60_000, marks=pytest.mark.slow)])
def test_a_mutated_strip_is_refused_or_the_strip_that_it_was(count: int) -> None:
    rng = np.random.default_rng(count)
    kinds = samples()
    unchanged = 0
    for index in range(count):
        data = kinds[index % len(kinds)]
        mangled = mutated(data, rng)
        read = judge(mangled)
        if read is not None and read.end == len(mangled):
            assert mangled == data
            unchanged += 1
        # The same by an attacker, who can compute a checksum.
        if len(mangled) >= COVERED:
            judge(signed(mangled))
    assert unchanged < count // 20


@settings(max_examples=80)
@given(data=st.data(), kind=KINDS)
def test_bytes_cut_repeated_and_replaced_anywhere(data: st.DataObject, kind: int) -> None:
    mangled = samples()[kind]
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(mangled)))
        length = data.draw(st.integers(0, 40))
        piece = data.draw(st.one_of(st.binary(max_size=40), st.just(mangled[at : at + length])))
        skipped = data.draw(st.integers(0, 40))
        mangled = mangled[:at] + piece + mangled[at + skipped :]
    judge(mangled)
    if len(mangled) >= COVERED:
        judge(signed(mangled))


@settings(max_examples=80)
@given(data=st.data(), kind=KINDS)
def test_image_data_of_any_content_decodes_or_is_refused(data: st.DataObject, kind: int) -> None:
    good = strip.parse(samples()[kind]).exemplars
    segments = [bytes(segment) for segment in good.segments()]
    row = data.draw(st.integers(0, len(segments) - 1))
    content = data.draw(st.one_of(st.binary(max_size=300), st.just(segments[row][:-3])))
    segments[row] = content.replace(b"\xff", b"\xff\x00")
    records = good.records()
    judge(made_of(good.form, segments, None if records is None else [bytes(record) for record in records]))


@settings(max_examples=80)
@given(data=st.data(), schema=st.sampled_from([FIXED, RAGGED]))
def test_records_of_any_content_decode_or_are_refused(data: st.DataObject, schema: Schema) -> None:
    good = with_fields(3, schema)
    records = [bytes(record) for record in good.records() or ()]
    row = data.draw(st.integers(0, 2))
    if schema is RAGGED and data.draw(st.booleans()):
        records[row] = data.draw(st.binary(min_size=schema.min_bytes, max_size=100))
    else:
        changed = bytearray(records[row])
        for _ in range(data.draw(st.integers(1, 4))):
            changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
        records[row] = bytes(changed)
    read = strip.parse(made_of(good.form, [good.segment(each) for each in range(3)], records)).exemplars
    assert read.records() == records
    assert np.array_equal(read.decode(), good.decode())
    try:
        columns = read.fields()
    except StripCorrupt:
        assert schema.ragged
        return
    again = schema.columns(columns, 3).records(np.arange(3))
    # A bool has 255 ways to be true.
    assert again == records or schema is FIXED


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda sizes: [sizes[0] + 1, sizes[1] - 1, sizes[2]], "checksum"),
        (lambda sizes: [sizes[0], sizes[1], sizes[2] + 1], "are there"),
        (lambda sizes: [0, sizes[0] + sizes[1], sizes[2]], "records of 0"),
        (lambda sizes: [2**20 + 1, sizes[1], sizes[2]], "records of"),
        (lambda sizes: [2**32 - 1] * 3, "records of"),
    ],
)
def test_lengths_of_records_that_are_not_theirs_are_refused(
    change: Callable[[list[int]], list[int]], message: str
) -> None:
    good = with_fields(3, RAGGED)
    (data,) = good.to_strips()
    payload = payload_of(data)
    sizes = np.frombuffer(payload[-12:], ">u4").tolist()
    assert good.record_lengths is not None
    assert sizes == good.record_lengths.tolist()
    forged = payload[:-12] + np.array(change(sizes), ">u4").tobytes()
    with little_memory(), pytest.raises(StripCorrupt, match=message):
        strip.parse(with_payload(data, forged))


@pytest.mark.parametrize("scan_bytes", [0, 1, 2, 300, 2**32 - 1])
def test_a_scan_that_ends_elsewhere_than_declared_is_refused(scan_bytes: int) -> None:
    for schema in (FIXED, RAGGED):
        (data,) = with_fields(3, schema).to_strips()
        forged = replace_at(payload_of(data), RUNS, struct.pack(">I", scan_bytes))
        with pytest.raises(StripCorrupt):
            strip.parse(with_payload(data, forged))


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"logits",
        b"logits float16 [6];",
        b"logits float16 [06]",
        b"logits float16 [ 6]",
        b"flag bool; flag bool",
        b"logits float16 [6]; flag bool",
        b"logits float128 [6]",
        b"logits float16 [999999999]",
        b"logits float16 [any, any]",
        b"images float16 [6]",
        b"lo\xffits float16 [6]",
        b"; ".join(b"f%03d bool" % number for number in range(65)),
    ],
)
def test_fields_that_there_cannot_be_are_refused(text: bytes) -> None:
    (data,) = with_fields(3, FIXED).to_strips()
    payload = payload_of(data)
    own = FIXED.text.encode()
    assert payload[RUNS + 6 : RUNS + 6 + len(own)] == own
    forged = payload[: RUNS + 4] + struct.pack(">H", len(text)) + text + payload[RUNS + 6 + len(own) :]
    with little_memory(), pytest.raises(StripCorrupt, match="fields"):
        strip.parse(with_payload(data, forged))


def test_records_cannot_be_exchanged_between_exemplars() -> None:
    good = with_fields(4, FIXED)
    (data,) = good.to_strips()
    records = [bytes(record) for record in good.records() or ()]
    assert data.endswith(b"".join(records))
    swapped = data[: -len(b"".join(records))] + b"".join([records[1], records[0], *records[2:]])
    with pytest.raises(StripCorrupt, match="exemplar 0"):
        strip.parse(swapped)


def test_a_flood_of_markers_in_fields_is_neither_searched_nor_taken_for_a_strip() -> None:
    schema = Schema.declare({"blob": "uint8 [any]"})
    flood = np.frombuffer(b"\xff\xd9" * 400_000, np.uint8)
    mimic = np.frombuffer(pack.to_bytes(sample(6)) * 3, np.uint8)
    columns = schema.columns({"blob": [flood, mimic] * 3}, 6)
    plain = sample(6)
    stored = strip.encode(
        plain.decode(), plain.class_ids, quality=40, schema=schema, records=columns.records(np.arange(6))
    )
    data = pack.to_bytes(stored)
    # Each record is copied once for its checksum; the markers of 1.2 MB of FF D9 would take 10 MB.
    with little_memory(2**20 + len(data)):
        read = pack.parse(data)
    assert np.array_equal(read.decode(), stored.decode())
    rest, rows = pack.salvage(data, 6)
    assert rest is not None
    assert rows.tolist() == list(range(6))
    assert [bytes(record) for record in rest.records() or ()] == [bytes(record) for record in stored.records() or ()]


def test_the_largest_header_that_a_strip_can_need_fits() -> None:
    declared = {f"f{number:03d}{'x' * 28}": "float16 [1, 1, 1, 1, 1, 1, 1]" for number in range(63)}
    schema = Schema.declare({**declared, "z": "uint8 [any]"})
    assert len(schema.text) > 4000
    count, segment = 8188, bytes(1)
    form = Form(1, 1, 1, "4:4:4", 50, schema)
    assert form.max_images == count
    record = bytes(schema.min_bytes)
    sums = np.full(count, crc32(record, crc32(segment)), np.uint32)
    # Labels that take as many bytes as labels can.
    class_ids = 2**31 - 1 - np.arange(count)
    loose = strip.Loose(form, [segment] * count, class_ids, sums, [record] * count)
    (data,) = loose.to_strips(tasks=class_ids, rows=np.arange(count))
    read = strip.parse(data)
    assert read.end == len(data)
    assert np.array_equal(read.exemplars.class_ids, class_ids)


def replace_at(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


@pytest.mark.parametrize("count", [0, 1, 4, 6, 2046, 2047, 8188, 65_535])
def test_a_count_that_is_not_the_number_of_segments_is_refused(count: int) -> None:
    good = sample()
    data = good.to_strips()[0]
    # Runs, checksums and a header for as many as are claimed.
    runs = strip._write_runs([np.zeros(max(count, 1), np.int64)])
    payload = replace_at(payload_of(data)[:RUNS], COUNT, struct.pack(">H", count)) + runs + bytes(4 * count)
    body = good.form.head(max(1, min(count, good.form.max_images))) + data[head_end(data) :]
    with little_memory():
        assert judge(signed(data[:2] + app15(payload[:65_526]) + body)) is None


@pytest.mark.parametrize(
    "runs",
    [
        b"\x00\x06",
        b"\x00\x04",
        b"\x00\x00\x00\x05",
        b"\x00\xff\xff\xff\xff\x0f",
        b"\x00\xff\xff\xff\xff\xff\xff\xff\xff\x7f",
        b"\x00\xff\xff\xff\xff\x7f" * 9,
        b"\xff" * 60,
        b"\x80\x80\x80\x80\x10\x05",
        b"\x00\x05\x80",
        b"\x00",
        b"",
        # The same labels written differently: two names for one content.
        b"\x80\x00\x05",
        b"\x00\x85\x00",
        b"\x00\x02\x00\x03",
    ],
)
def test_runs_that_overflow_fall_short_or_are_written_oddly_are_refused(runs: bytes) -> None:
    (data,) = sample().select([0, 0, 0, 0, 0]).to_strips()
    payload = payload_of(data)
    assert payload[RUNS : RUNS + 2] == b"\x00\x05"
    with little_memory():
        assert judge(with_payload(data, payload[:RUNS] + runs + payload[RUNS + 2 :])) is None


def test_neighbouring_runs_of_a_draw_differ_in_task_or_class() -> None:
    loose = sample(4).select([0, 0, 0, 2]).loose()
    (data,) = loose.to_strips(tasks=[1, 1, 2, 2], rows=[0, 1, 2, 3])
    payload = payload_of(data)
    runs = b"\x01\x00\x02" + b"\x02\x00\x01" + b"\x02\xac\x02\x01"
    assert payload[RUNS : RUNS + len(runs)] == runs
    split = b"\x01\x00\x01" * 2 + runs[3:]
    assert judge(with_payload(data, payload.replace(runs, split))) is None


@pytest.mark.parametrize(
    ("at", "value"),
    [
        *((at, value) for at in (FORM, FORM + 2) for value in (b"\0\0", b"\xff\xdd", b"\xff\xff")),
        *((FORM + 4, bytes([channels])) for channels in (0, 2, 4, 255)),
        *((FORM + 5, bytes([sampling])) for sampling in (0, 0x12, 0x21, 0x44)),
        *((FORM + 6, bytes([quality])) for quality in (0, 101, 255)),
    ],
)
def test_numbers_that_make_no_form_are_refused(at: int, value: bytes) -> None:
    data = samples()[0]
    with little_memory(), pytest.raises(StripCorrupt, match="declares"):
        strip.parse(with_payload(data, replace_at(payload_of(data), at, value)))


@pytest.mark.parametrize("flags", [4, 6, 0x80, 0xFF])
def test_flags_of_a_later_version_are_refused(flags: int) -> None:
    for data in samples():
        with pytest.raises(StripCorrupt, match="flags"):
            strip.parse(with_payload(data, replace_at(payload_of(data), 5, bytes([flags]))))


DHT = bytes.fromhex("ffc4001f0000010501010101010100000000000000000102030405060708090a0b")
JFIF = bytes.fromhex("ffe000104a46494600010100000100010000")
ADOBE = bytes.fromhex("ffee000e41646f62650064000000000000")


@pytest.mark.parametrize(
    "change",
    [
        lambda head: DHT + head,
        lambda head: JFIF + head,
        lambda head: head.replace(b"\xff\xc0", ADOBE + b"\xff\xc0"),
        lambda head: head.replace(b"\xff\xc0", b"\xff\xc1"),
        lambda head: head.replace(b"\xff\xc0", b"\xff\xc2"),
        lambda head: head.replace(b"\xff\xdd\x00\x04", b"\xff\xdd\x00\x05\x00"),
        lambda head: head.replace(b"\x00\x3f\x00", b"\x00\x3e\x00"),
        lambda head: head[:30] + b"\x01" + head[31:],
        lambda head: head[140:] + head[:140],
        lambda head: b"",
    ],
)
def test_a_header_that_is_not_the_one_of_its_form_is_refused(change: Callable[[bytes], bytes]) -> None:
    data = samples()[0]
    start, end = head_start(data), head_end(data)
    assert change(data[start:end]) != data[start:end]
    with pytest.raises(StripCorrupt, match="header"):
        strip.parse(data[:start] + change(data[start:end]) + data[end:])


@pytest.mark.parametrize("size", [(65_535, 65_535), (65_500, 65_500), (65_535, 1), (1, 65_535), (8192, 8192)])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_small_strip_that_declares_an_enormous_image_takes_no_memory(size: tuple[int, int], channels: int) -> None:
    good = sample(1, channels=channels)
    data = made_of(replace(good.form, height=size[0], width=size[1]), [good.segment(0)])
    with little_memory(), pytest.raises((StripCorrupt, TooLarge)):
        strip.parse(data)


@pytest.mark.parametrize("size", [(65_501, 1), (1, 65_535)])
def test_sides_that_the_decoder_cannot_read_are_refused_however_much_data_there_is(size: tuple[int, int]) -> None:
    with pytest.raises(StripCorrupt, match="declares"):
        strip.parse(made_of(Form(*size, 1, "4:4:4", 50), [bytes(200_000)]))


@pytest.mark.parametrize("side", [8, 16, 500])
def test_segments_too_short_for_their_image_are_refused_before_pixels_are_made(side: int) -> None:
    flat = strip.encode(np.full((2, side, side, 3), 9, np.uint8), [0, 0], quality=1)
    assert judge(flat.to_strips()[0]) is not None
    short = made_of(flat.form, [flat.segment(0), bytes(flat.form.mcus)])
    with little_memory(), pytest.raises(StripCorrupt, match="exemplar 1"):
        strip.parse(short)


@pytest.mark.parametrize(
    "headers",
    [
        lambda payload: app15(b"") * 20_000 + app15(payload),
        lambda payload: app15(payload) + app15(b"") * 20_000,
        lambda payload: b"".join(app15(payload[at : at + 1]) for at in range(len(payload))),
        lambda payload: app15(payload[:-1]) + app15(payload[-1:]),
        lambda payload: app15(payload) + app15(bytes(65_526)) * 10,
        lambda payload: app15(payload + bytes(65_526 - len(payload))) * 20,
        lambda payload: b"\xff\xef\x00\x00" * 20_000,
        lambda payload: b"\xff\xef\xff\xff" + strip.SIGNATURE + payload,
        lambda payload: b"\xff\xef\x00\x02" + app15(payload),
    ],
)
def test_headers_cut_into_many_segments_are_refused(headers: Callable[[bytes], bytes]) -> None:
    data = samples()[0]
    mangled = data[:2] + headers(payload_of(data)) + data[head_start(data) :]
    with little_memory(2**20 + 3 * len(mangled)):
        assert judge(mangled) is None


@pytest.mark.parametrize("fill", [b"\xff", b"\xff\xd0", b"\xff\xd9", b"\xff\xd8\xff\xef", b"\x00"])
def test_a_flood_of_markers_is_refused(fill: bytes) -> None:
    data = samples()[0]
    end = head_end(data)
    assert judge(data[:end] + fill * 50_000) is None
    assert judge(data[:end] + fill * 50_000 + data[end:]) is None


def test_a_pack_is_refused_or_written_again_as_it_was() -> None:
    exemplars = sample(6)
    data = pack.to_bytes(exemplars)
    drawn = exemplars.loose().to_strips(tasks=[1] * 6, rows=range(6))[0]
    other = sample(6, sampling="4:4:4").to_strips()[0]
    unordered = exemplars.select([4, 0]).to_strips()[0]
    for mangled in [data + data, data + other, data + b"\0", data[:-1], b"", drawn, unordered]:
        with pytest.raises(StripCorrupt):
            pack.parse(mangled)
    rng = np.random.default_rng(0)
    for _ in range(500):
        mangled = signed(mutated(data, rng))
        try:
            read = pack.parse(mangled)
        except (StripCorrupt, TooLarge):
            continue
        assert pack.to_bytes(read) == mangled


def test_what_is_salvaged_of_a_damaged_pack_is_what_was_stored() -> None:
    tall = np.random.default_rng(3).integers(0, 9, (12, 20_000, 8, 1), dtype=np.uint8)
    stored = strip.encode(tall, np.arange(12) // 5, quality=20)
    data = pack.to_bytes(stored)
    rng = np.random.default_rng(1)
    for _ in range(100):
        damaged = bytearray(data)
        for at in rng.integers(0, len(data), rng.integers(1, 5)):
            damaged[at] ^= 1 << rng.integers(8)
        cut = bytes(damaged[: rng.integers(len(data) // 2, len(data) + 1)])
        rest, rows = pack.salvage(cut, 12)
        assert np.all(np.diff(rows) > 0)
        if rest is not None:
            assert rest.segments() == [stored.segment(row) for row in rows]
            assert rest.class_ids.tolist() == stored.class_ids[rows].tolist()


def test_a_pack_that_claims_to_be_huge_cannot_be_salvaged_either() -> None:
    assert pack.salvage(made_of(Form(60_000, 60_000, 3, "4:2:0", 40), [b"\x12" * 99]), 1)[0] is None


@settings(max_examples=60)
@given(data=st.data())
def test_a_draw_of_mangled_strips_is_refused_or_decoded(data: st.DataObject) -> None:
    strips = [data.draw(st.sampled_from(samples())) for _ in range(data.draw(st.integers(0, 3)))]
    at = data.draw(st.integers(0, len(strips)))
    body = b"".join(strips[:at]) + data.draw(st.binary(max_size=8)) + b"".join(strips[at:])
    try:
        drawn = batch.decode(body)
    except (StripCorrupt, TooLarge):
        return
    assert len(drawn.images) == len(drawn) == len(drawn.tasks) == len(drawn.rows) > 0
