"""Hostile bytes: whatever arrives, it is refused by name or it is a strip, byte for byte, and little memory is taken.

Checksums stop accidents, not attackers, so most of these strips carry checksums that match what was changed.
"""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from zlib import crc32

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engram import batch, pack, strip
from engram.errors import StripCorrupt, TooLarge

LIMITS = strip.Limits(max_pixels=2**20)
# Offsets in a strip whose APP15 segment is its first: payload, header checksum in it.
PAYLOAD, CHECKSUM = 13, 21


def sample(count: int = 5, *, channels: int = 3, sampling: strip.Subsampling = "4:2:0") -> strip.Exemplars:
    rng = np.random.default_rng(count)
    coarse = rng.integers(0, 256, (count, 5, 7, channels), dtype=np.uint8)
    images = coarse.repeat(4, 1).repeat(4, 2)[:, :18, :27]
    return strip.encode(images, np.arange(count) // 2 * 300, quality=40, subsampling=sampling)


def samples() -> list[bytes]:
    """Strips of every kind: colour and grey, drawn and stored, one image and several."""
    return [
        sample().to_strips()[0],
        sample(3, sampling="4:4:4").to_strips(task=3, rows=[7, 1, 2])[0],
        sample(4, channels=1).to_strips(task=0)[0],
        sample(1).to_strips()[0],
    ]


def tables_start(data: bytes) -> int:
    return 4 + int.from_bytes(data[4:6], "big")


def header_end(data: bytes) -> int:
    """The offset after SOS, as far as the segments' lengths lead there."""
    at = 2
    for _ in range(12):
        marker, at = data[at : at + 2], at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if marker == b"\xff\xda":
            break
    return min(at, len(data))


def signed(data: bytes) -> bytes:
    """These bytes with a header checksum that matches."""
    blank = data[:CHECKSUM] + bytes(4) + data[CHECKSUM + 4 :]
    return data[:CHECKSUM] + struct.pack(">I", crc32(blank[: header_end(data)])) + data[CHECKSUM + 4 :]


def with_payload(data: bytes, payload: bytes) -> bytes:
    """The strip with another APP15 payload, signed."""
    app15 = b"\xff\xef" + struct.pack(">H", 9 + len(payload)) + strip.SIGNATURE + payload
    return signed(data[:2] + app15 + data[tables_start(data) :])


def payload_of(data: bytes) -> bytes:
    return data[PAYLOAD : tables_start(data)]


def judge(data: bytes) -> strip.Strip | None:
    """What `parse` makes of the bytes; what it accepts must be written again exactly as it was, and may be decoded."""
    try:
        read = strip.parse(data, limits=LIMITS)
    except (StripCorrupt, TooLarge):
        return None
    assert read.exemplars.to_strips(task=read.task, rows=read.rows) == [data[: read.end]]
    with suppress(StripCorrupt):
        assert read.exemplars.decode().shape == (len(read.exemplars), *read.exemplars.form.shape)
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


def test_every_flipped_bit_is_found_when_the_checksums_are_left_alone() -> None:
    for data in samples():
        for at in range(len(data)):
            for bit in range(0, 8, 3):
                assert judge(data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]) is None


def test_every_truncation_is_found_even_if_it_is_signed() -> None:
    for data in samples():
        for end in range(len(data)):
            assert judge(data[:end]) is None
            assert end < CHECKSUM + 4 or judge(signed(data[:end])) is None


def test_every_header_byte_may_be_anything() -> None:
    for data in samples():
        for at in range(header_end(data)):
            for value in {0x00, 0x01, 0x7F, 0xFF, data[at] ^ 0x01, data[at] ^ 0x80, data[at] ^ 0x10} - {data[at]}:
                judge(signed(data[:at] + bytes([value]) + data[at + 1 :]))


@settings(max_examples=400, deadline=None)
@given(data=st.data(), kind=st.integers(0, 3))
def test_bytes_cut_repeated_and_replaced_anywhere(data: st.DataObject, kind: int) -> None:
    mangled = samples()[kind]
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(mangled)))
        length = data.draw(st.integers(0, 40))
        piece = data.draw(st.one_of(st.binary(max_size=40), st.just(mangled[at : at + length])))
        skipped = data.draw(st.integers(0, 40))
        mangled = mangled[:at] + piece + mangled[at + skipped :]
    judge(mangled)
    if len(mangled) >= CHECKSUM + 4:
        judge(signed(mangled))


@settings(max_examples=200, deadline=None)
@given(data=st.data(), kind=st.integers(0, 3))
def test_image_data_of_any_content_decodes_or_is_refused(data: st.DataObject, kind: int) -> None:
    good = strip.parse(samples()[kind]).exemplars
    segments = good.segments()
    row = data.draw(st.integers(0, len(segments) - 1))
    content = data.draw(st.one_of(st.binary(max_size=300), st.just(bytes(segments[row])[:-3])))
    segments[row] = content.replace(b"\xff", b"\xff\x00")
    (mangled,) = strip.from_segments(good.form, segments, good.class_ids).to_strips()
    judge(mangled)


def replace_at(payload: bytes, at: int, new: bytes) -> bytes:
    return payload[:at] + new + payload[at + len(new) :]


@pytest.mark.parametrize("count", [0, 1, 4, 6, 8191, 65_535, 2**31, 2**32 - 1])
def test_a_count_that_is_not_the_number_of_segments_is_refused(count: int) -> None:
    data = samples()[0]
    payload = replace_at(payload_of(data), 4, struct.pack(">I", count))
    # Checksums for as many as are claimed, as far as one segment has room.
    payload += bytes(4 * min(max(count - 5, 0), 16_000))
    with little_memory():
        assert judge(with_payload(data, payload)) is None


@pytest.mark.parametrize(
    "runs",
    [
        b"\x00\x06",
        b"\x00\x04",
        b"\x00\x00\x00\x05",
        b"\x00\xff\xff\xff\xff\x0f",
        b"\x00\xff\xff\xff\xff\xff\xff\xff\xff\x7f",
        b"\xff" * 60,
        b"\x80\x80\x80\x80\x10\x05",
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
    assert payload[12:14] == b"\x00\x05"
    with little_memory():
        assert judge(with_payload(data, payload[:12] + runs + payload[14:])) is None


def claiming(height: int, width: int, segment: bytes, *, channels: int = 3) -> bytes:
    """A well-formed strip of one image of this size, with this for image data."""
    form = replace(sample(1, channels=channels).form, height=height, width=width)
    (data,) = strip.from_segments(form, [segment], np.zeros(1, np.int64)).to_strips()
    return data


@pytest.mark.parametrize("size", [(65_535, 65_535), (65_500, 65_500), (65_535, 1), (1, 65_535), (8192, 8192)])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_small_strip_that_declares_an_enormous_image_takes_no_memory(size: tuple[int, int], channels: int) -> None:
    data = claiming(*size, sample(1, channels=channels).segment(0), channels=channels)
    with little_memory():
        for limits in (LIMITS, strip.Limits()):
            with pytest.raises((StripCorrupt, TooLarge)):
                strip.parse(data, limits=limits)


@pytest.mark.parametrize("size", [(65_501, 1), (1, 65_535)])
def test_sides_that_the_decoder_cannot_read_are_refused_however_much_data_there_is(size: tuple[int, int]) -> None:
    with pytest.raises(StripCorrupt, match="declares"):
        strip.parse(claiming(*size, bytes(200_000)))


def test_an_image_beyond_the_limit_is_too_large() -> None:
    height = width = 2048
    data = strip.encode(np.zeros((1, height, width, 1), np.uint8), [0], quality=50).to_strips()[0]
    assert len(strip.parse(data).exemplars) == 1
    with pytest.raises(TooLarge, match="2048x2048"):
        strip.parse(data, limits=LIMITS)


@pytest.mark.parametrize("side", [8, 16, 500])
def test_segments_too_short_for_their_image_are_refused_before_pixels_are_made(side: int) -> None:
    flat = strip.encode(np.full((2, side, side, 3), 9, np.uint8), [0, 0], quality=1)
    assert judge(flat.to_strips()[0]) is not None
    units = flat.form.mcus
    short = strip.from_segments(flat.form, [flat.segment(0), bytes(units)], flat.class_ids)
    with little_memory(), pytest.raises(StripCorrupt, match="exemplar 1"):
        strip.parse(short.to_strips()[0])


def app15(payload: bytes) -> bytes:
    return b"\xff\xef" + struct.pack(">H", 9 + len(payload)) + strip.SIGNATURE + payload


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
    mangled = data[:2] + headers(payload_of(data)) + data[tables_start(data) :]
    with little_memory(2**20 + 3 * len(mangled)):
        assert judge(mangled) is None


def test_long_tables_are_not_remembered() -> None:
    data = samples()[0]
    at = tables_start(data)
    with little_memory(2**21):
        for index in range(200):
            filler = struct.pack(">I", index) * 16_000
            head = data[at : at + 2] + struct.pack(">H", 2 + len(filler)) + filler
            assert judge(signed(data[:at] + head + data[at:])) is None


@pytest.mark.parametrize("fill", [b"\xff", b"\xff\xd0", b"\xff\xd9", b"\xff\xd8\xff\xef", b"\x00"])
def test_a_flood_of_markers_is_refused(fill: bytes) -> None:
    data = samples()[0]
    end = header_end(data)
    assert judge(data[:end] + fill * 50_000) is None
    assert judge(data[:end] + fill * 50_000 + data[end:]) is None


@pytest.mark.parametrize("symbol", [12, 15, 16, 255])
def test_a_dc_symbol_that_baseline_jpeg_does_not_have_is_refused(symbol: int) -> None:
    data = samples()[0]
    first = data.index(b"\xff\xc4") + 4 + 17
    assert judge(signed(data[:first] + bytes([symbol]) + data[first + 1 :])) is None


def test_a_pack_is_refused_or_written_again_as_it_was() -> None:
    exemplars = sample(6)
    data = pack.to_bytes(exemplars)
    drawn = exemplars.to_strips(task=1, rows=range(6))[0]
    for mangled in [data + data, data + b"\0", data[:-1], b"", drawn, exemplars.select([4, 0]).to_strips()[0]]:
        with pytest.raises(StripCorrupt):
            pack.parse(mangled)
    rng = np.random.default_rng(0)
    for _ in range(500):
        at, value = int(rng.integers(len(data))), int(rng.integers(256))
        mangled = signed(data[:at] + bytes([value]) + data[at + 1 :])
        try:
            read = pack.parse(mangled, limits=LIMITS)
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
    assert pack.salvage(claiming(60_000, 60_000, b"\x12" * 99), 1)[0] is None


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_draw_of_mangled_strips_is_refused_or_decoded(data: st.DataObject) -> None:
    strips = [data.draw(st.sampled_from(samples())) for _ in range(data.draw(st.integers(0, 3)))]
    at = data.draw(st.integers(0, len(strips)))
    body = b"".join(strips[:at]) + data.draw(st.binary(max_size=8)) + b"".join(strips[at:])
    try:
        drawn = batch.decode(body, limits=LIMITS)
    except (StripCorrupt, TooLarge):
        return
    assert len(drawn.images) == len(drawn) == len(drawn.tasks) == len(drawn.rows) > 0
