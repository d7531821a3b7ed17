"""Re-tabling changes Huffman codes and nothing else, and the tables are the ones libjpeg would have fitted."""

from __future__ import annotations

import heapq
from dataclasses import replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engram import huffman, strip
from engram.errors import StripCorrupt

UInt8Array = npt.NDArray[np.uint8]

sizes = st.tuples(st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 3]))
samplings: st.SearchStrategy[strip.Subsampling] = st.sampled_from(["4:2:0", "4:4:4"])


def pictures(count: int, size: tuple[int, int, int], *, noise: float, seed: int) -> UInt8Array:
    """Smooth images with this much noise, each different."""
    rng = np.random.default_rng(seed)
    height, width, channels = size
    y, x = np.mgrid[:height, :width]
    slope = rng.uniform(-4, 4, (2, count, 1, 1, channels))
    planes = rng.uniform(0, 255, (count, 1, 1, channels)) + slope[0] * y[..., None] + slope[1] * x[..., None]
    return np.asarray((planes + rng.normal(0, noise, planes.shape)).clip(0, 255), np.uint8)


def encode(images: UInt8Array, *, quality: int = 50, sampling: strip.Subsampling = "4:2:0") -> strip.Exemplars:
    return strip.encode(images, np.arange(len(images)), quality=quality, subsampling=sampling)


def with_segment(exemplars: strip.Exemplars, row: int, segment: bytes) -> strip.Exemplars:
    """These exemplars with one segment replaced and a checksum that matches it."""
    segments = exemplars.segments()
    segments[row] = segment
    return strip.from_segments(exemplars.form, segments, exemplars.class_ids)


def codes_of(table: huffman.Table) -> dict[int, str]:
    code, previous, codes = 0, 0, {}
    for symbol, bits in zip(table.symbols, table.lengths, strict=True):
        code <<= bits - previous
        codes[symbol] = f"{code:0{bits}b}"
        code, previous = code + 1, bits
    return codes


def test_a_table_worked_out_by_hand() -> None:
    # Counts 4, 2, 1 and the reserved symbol's 1: the two ones merge to 2, with the 2 to 4, with the 4 to 8.
    table = huffman.optimal_table([4, 0, 2, 1])
    assert table.counts == (1, 1, 1) + (0,) * 13
    assert codes_of(table) == {0: "0", 2: "10", 3: "110"}


def test_a_single_symbol_gets_one_bit_and_leaves_the_all_ones_code_free() -> None:
    assert codes_of(huffman.optimal_table([0, 0, 9])) == {2: "0"}


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=256).filter(any))
def test_no_prefix_code_is_shorter(counts: list[int]) -> None:
    table = huffman.optimal_table(counts)
    assert sorted(table.symbols) == [symbol for symbol, count in enumerate(counts) if count]
    heap = [count for count in counts if count] + [1]
    heapq.heapify(heap)
    fewest = 0
    while len(heap) > 1:
        merged = heapq.heappop(heap) + heapq.heappop(heap)
        fewest += merged
        heapq.heappush(heap, merged)
    cost = sum(counts[symbol] * bits for symbol, bits in zip(table.symbols, table.lengths, strict=True))
    # The reserved symbol, counted once, is the only other one.
    assert max(table.lengths) <= fewest - cost <= 16


@pytest.mark.parametrize("symbols", [20, 60, 256])
def test_codes_stay_within_16_bits_however_skewed_the_counts(symbols: int) -> None:
    codes = codes_of(huffman.optimal_table([2**symbol for symbol in range(symbols)]))
    assert len(codes) == symbols
    assert max(map(len, codes.values())) == 16
    assert not any(set(code) == {"1"} for code in codes.values())
    assert sum(2.0 ** -len(code) for code in codes.values()) < 1
    assert [len(codes[symbol]) for symbol in range(symbols)] == sorted(map(len, codes.values()), reverse=True)


@settings(max_examples=80, deadline=None)
@given(
    counts=st.lists(st.integers(2, 6), min_size=1, max_size=4),
    size=sizes,
    sampling=samplings,
    quality=st.integers(1, 100),
    noise=st.sampled_from([0.0, 3.0, 60.0]),
    seed=st.integers(0, 99),
)
def test_parts_under_common_tables_equal_one_joint_encoding_byte_for_byte(
    counts: list[int],
    size: tuple[int, int, int],
    sampling: strip.Subsampling,
    quality: int,
    noise: float,
    seed: int,
) -> None:
    images = pictures(sum(counts), size, noise=noise, seed=seed)
    bounds = np.cumsum([0, *counts])
    parts = [encode(images[a:b], quality=quality, sampling=sampling) for a, b in pairwise(bounds)]
    joint = encode(images, quality=quality, sampling=sampling)
    together = strip.concat(huffman.retable(parts))
    assert together.form == joint.form
    assert together.segments() == joint.segments()
    assert together.checksums.tolist() == joint.checksums.tolist()
    assert np.array_equal(together.decode(), np.concatenate([part.decode() for part in parts]))


@settings(max_examples=30, deadline=None)
@given(data=st.data(), size=sizes, sampling=samplings, quality=st.integers(1, 100))
def test_any_selection_keeps_its_pixels_and_does_not_grow(
    data: st.DataObject, size: tuple[int, int, int], sampling: strip.Subsampling, quality: int
) -> None:
    exemplars = encode(pictures(8, size, noise=9, seed=1), quality=quality, sampling=sampling)
    rows = data.draw(st.lists(st.integers(0, 7), min_size=1, max_size=20))
    chosen = exemplars.select(rows)
    (fitted,) = huffman.retable([chosen])
    assert np.array_equal(fitted.decode(), exemplars.decode()[rows])
    assert fitted.class_ids.tolist() == rows
    # A segment is whole bytes, so that each may grow by its padding.
    assert fitted.lengths.sum() <= chosen.lengths.sum() + len(rows)
    (again,) = huffman.retable([fitted])
    assert again.form == fitted.form
    assert again.segments() == fitted.segments()


def test_large_images_and_single_pixels_survive() -> None:
    for size in [(224, 224, 3), (1, 1, 3), (1, 1, 1), (8, 3000, 1)]:
        parts = [encode(pictures(3, size, noise=10, seed=seed), quality=75) for seed in range(2)]
        for part, fitted in zip(parts, huffman.retable(parts), strict=True):
            assert np.array_equal(part.decode(), fitted.decode())


def test_chunks_do_not_show_in_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    noises = [0, 2, 5, 20, 40]
    parts = [encode(pictures(4 + i, (20, 20, 3), noise=noise, seed=i)) for i, noise in enumerate(noises)]
    parts.insert(2, parts[0].select([]))
    whole = huffman.retable(parts)
    monkeypatch.setattr(huffman, "_KEEP_BYTES", 0)
    for name, value in [("_CHUNK_BYTES", 300), ("_MAX_LANES", 3), ("_MAX_SETS", 1)]:
        monkeypatch.setattr(huffman, name, value)
        cut = huffman.retable(parts)
        assert [part.segments() for part in cut] == [part.segments() for part in whole]
        assert {part.form for part in cut} == {whole[0].form}


def test_parts_without_exemplars_share_the_form_too() -> None:
    one, other = (encode(pictures(2, (9, 9, 3), noise=noise, seed=0)) for noise in (1, 50))
    empty = huffman.retable([one.select([]), other.select([])])
    assert [len(part) for part in empty] == [0, 0]
    assert empty[0].form == empty[1].form


def test_forms_that_differ_in_more_than_their_huffman_tables_are_refused() -> None:
    image = pictures(1, (16, 16, 3), noise=1, seed=0)
    with pytest.raises(ValueError, match="only Huffman tables may differ"):
        huffman.retable([encode(image, quality=50), encode(image, quality=51)])
    with pytest.raises(ValueError, match="no exemplars"):
        huffman.retable([])


def test_a_damaged_segment_is_not_given_a_fresh_checksum() -> None:
    good = encode(pictures(5, (32, 32, 3), noise=9, seed=0))
    data = bytearray(good.data)
    data[int(good.starts[3]) + 5] ^= 1
    with pytest.raises(StripCorrupt, match="exemplar 3 of part 1 are not those of its checksum") as caught:
        huffman.retable([good, replace(good, data=bytes(data))])
    assert caught.value.details == {"row": 3, "part": 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda segment: segment[:-4], "not 4 units"),
        (lambda segment: segment + b"\x12", "not 4 units"),
        (lambda segment: b"", "not 4 units"),
        (lambda segment: b"\xff\x00" * 20, "not 4 units"),
        (lambda segment: segment[:3] + b"\xff\xd9" + segment[3:], "interrupted by a marker"),
        (lambda segment: segment + b"\xff", "interrupted by a marker"),
    ],
)
def test_a_segment_that_is_not_image_data_is_named(change: object, message: str) -> None:
    assert callable(change)
    good = encode(pictures(4, (32, 32, 3), noise=9, seed=0))
    for row in (0, 2, 3):
        bad = with_segment(good, row, change(good.segment(row)))
        with pytest.raises(StripCorrupt, match=f"of exemplar {row} are {message}") as caught:
            huffman.retable([bad])
        assert caught.value.details == {"row": row, "part": 0}


@settings(max_examples=300, deadline=None)
@given(data=st.data(), sampling=samplings, channels=st.sampled_from([1, 3]))
def test_mangled_segments_are_refused_or_keep_their_meaning(
    data: st.DataObject, sampling: strip.Subsampling, channels: int
) -> None:
    good = encode(pictures(3, (18, 11, channels), noise=20, seed=4), quality=60, sampling=sampling)
    row = data.draw(st.integers(0, 2))
    segment = bytearray(good.segment(row))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(segment) - 1))
        segment[at] ^= 1 << data.draw(st.integers(0, 7))
    if data.draw(st.booleans()):
        del segment[data.draw(st.integers(0, len(segment))) :]
    bad = with_segment(good, row, bytes(segment))
    try:
        (fitted,) = huffman.retable([bad])
    except StripCorrupt as error:
        refused = error.details["row"]
    else:
        refused = row
        assert np.array_equal(fitted.decode(), bad.decode())
    assert refused == row


def test_tables_that_miss_a_symbol_refuse_the_segments_that_use_it() -> None:
    good = encode(pictures(4, (32, 32, 1), noise=30, seed=0), quality=90)
    dc, ac = huffman.parse_tables(good.form.huffman, 2)
    poor = bytes([0x00, *dc.counts]) + dc.symbols + bytes([0x10, 0, 1, *[0] * 14]) + ac.symbols[:1]
    with pytest.raises(StripCorrupt, match="exemplar 0"):
        huffman.retable([replace(good, form=replace(good.form, huffman=poor))])


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (b"", "missing or cut off"),
        (b"\x00" + b"\x00" * 15, "missing or cut off"),
        (bytes([0x01, 1, *[0] * 15, 5]), "missing or cut off"),
        (bytes([0x00, 1, *[0] * 15]), "missing or cut off"),
        (bytes([0x00, 2, *[0] * 15, 5, 6]), "more codes than exist"),
        (bytes([0x00, *[0] * 15, 255]) + bytes(255), "0x10 is missing"),
        (bytes([0x00, 1, *[0] * 15, 5, 0x10, 1, *[0] * 15, 5, 9]), "take 36 bytes of 37"),
    ],
)
def test_malformed_tables_are_refused(payload: bytes, message: str) -> None:
    with pytest.raises(StripCorrupt, match=message):
        huffman.parse_tables(payload, 2)
