"""A pack is strips back to back; its real size obeys the shares, and damage costs only what it touches."""

from __future__ import annotations

from hashlib import sha256

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engram import pack, strip
from engram.errors import StripCorrupt


def exemplars(counts: dict[int, int], quality: int = 50) -> strip.Exemplars:
    rng = np.random.default_rng(sum(counts.values()))
    ids = np.repeat(list(counts), list(counts.values()))
    noise = rng.integers(0, 255, (len(ids), 4, 4, 1), dtype=np.uint8).repeat(4, 1).repeat(4, 2)
    return strip.encode(noise, ids, quality=quality)


def test_a_pack_is_read_back_and_named_by_its_bytes() -> None:
    stored = exemplars({1: 3, 4: 2})
    data = pack.to_bytes(stored)
    assert pack.digest(data) == sha256(data).hexdigest()
    read = pack.parse(data)
    assert read.class_ids.tolist() == [1, 1, 1, 4, 4]
    assert np.array_equal(read.decode(), stored.decode())
    assert pack.to_bytes(read) == data


@settings(max_examples=60, deadline=None)
@given(
    counts=st.dictionaries(st.integers(0, 300), st.integers(1, 60), min_size=1, max_size=6),
    shares=st.lists(st.integers(0, 4000), min_size=6, max_size=6),
)
def test_what_fits_is_a_prefix_of_every_class_within_the_sum_of_the_shares(
    counts: dict[int, int], shares: list[int]
) -> None:
    counts = dict(sorted(counts.items()))
    stored = exemplars(counts)
    given_shares = dict(zip(counts, shares, strict=False))
    kept = pack.fit(stored, given_shares)
    data = pack.to_bytes(kept) if len(kept) else b""
    assert len(data) <= sum(given_shares.values())
    assert len(data) == (pack.size(kept.form, strip.runs_of(kept.class_ids), kept.sizes) if len(kept) else 0)
    for class_id in counts:
        whole = stored.checksums[stored.class_ids == class_id]
        part = kept.checksums[kept.class_ids == class_id]
        assert part.tolist() == whole[: len(part)].tolist()


def test_a_budget_of_one_byte_holds_nothing_and_one_byte_too_few_drops_one_exemplar() -> None:
    stored = exemplars({0: 20})
    whole = len(pack.to_bytes(stored))
    assert len(pack.fit(stored, {0: 1})) == 0
    assert len(pack.fit(stored, {0: whole})) == 20
    assert len(pack.fit(stored, {0: whole - 1})) == 19
    assert len(pack.fit(stored, {})) == 0


def test_a_smaller_share_keeps_a_prefix_of_what_a_larger_one_kept() -> None:
    stored = exemplars({0: 40, 1: 40})
    sizes = [len(pack.fit(stored, {0: share, 1: share})) for share in range(200, 6000, 100)]
    assert sizes == sorted(sizes)


def test_bytes_that_no_class_can_use_alone_buy_one_more_exemplar() -> None:
    stored = exemplars(dict.fromkeys(range(8), 30))
    kept = pack.fit(stored, dict.fromkeys(range(8), 700))
    left = 8 * 700 - len(pack.to_bytes(kept))
    assert left < int(stored.sizes.max()) + 8


def test_what_fits_is_weighed_as_it_is_written_when_strips_end_within_classes() -> None:
    ids = np.repeat(np.arange(0, 4000, 20), 2)
    tall = np.random.default_rng(0).integers(0, 255, (len(ids), 1000, 8, 1), dtype=np.uint8) // 64
    stored = strip.encode(tall, ids, quality=10)
    assert stored.form.max_images < 100
    for share in (0, 700, 1500, 3000):
        kept = pack.fit(stored, dict.fromkeys(ids.tolist(), share))
        data = pack.to_bytes(kept) if len(kept) else b""
        assert len(data) == pack.size(kept.form, strip.runs_of(kept.class_ids), kept.sizes) <= 200 * share
        if 0 < len(kept) < len(stored):
            assert 200 * share - len(data) < int(stored.sizes.max()) + 20
    assert pack.size(stored.form, strip.runs_of(stored.class_ids), stored.sizes) == len(pack.to_bytes(stored))


def test_rows_out_of_class_order_are_not_a_pack() -> None:
    with pytest.raises(ValueError, match="ascending"):
        pack.to_bytes(exemplars({1: 2, 4: 2}).select([3, 0]))
    with pytest.raises(ValueError, match="at least one"):
        pack.to_bytes(exemplars({1: 2}).select([]))


def test_a_flipped_bit_costs_one_exemplar_and_is_named() -> None:
    stored = exemplars({0: 30, 1: 30})
    data = bytearray(pack.to_bytes(stored))
    at = bytes(data).index(stored.segment(17)) + 2
    data[at] ^= 0x01
    with pytest.raises(StripCorrupt, match="exemplar 17"):
        pack.parse(bytes(data))
    rest, rows = pack.salvage(bytes(data), 60)
    assert rest is not None
    assert rows.tolist() == [row for row in range(60) if row != 17]
    assert np.array_equal(rest.decode(), stored.decode()[rows])


def test_a_broken_header_costs_its_strip_and_the_others_keep_their_rows() -> None:
    tall = np.random.default_rng(0).integers(0, 9, (20, 8000, 8, 1), dtype=np.uint8)
    stored = strip.encode(tall, np.zeros(20, int), quality=30)
    data = bytearray(pack.to_bytes(stored))
    assert stored.form.max_images == 8
    second = bytes(data).index(b"\xff\xd8\xff\xef", 4)
    data[second + 30] ^= 0xFF
    rest, rows = pack.salvage(bytes(data), 20)
    assert rest is not None
    assert rows.tolist() == [*range(8), *range(16, 20)]
    assert np.array_equal(rest.decode(), stored.decode()[rows])


def test_nothing_can_be_salvaged_from_noise() -> None:
    assert pack.salvage(b"\x00" * 500, 10)[0] is None
    assert pack.salvage(b"", 10)[0] is None
    with pytest.raises(StripCorrupt):
        pack.parse(b"")
    with pytest.raises(StripCorrupt):
        pack.parse(pack.to_bytes(exemplars({0: 4}))[:-1])
