"""This file is the lossless change of Huffman tables: the same DCT coefficients coded anew, with tables fitted to them.

Exemplars from two uploads, or from two chunks of one, carry different tables and so cannot share a strip. `retable`
reads the symbols of every entropy-coded segment, counts them, makes the tables that are optimal for all of them
together (as libjpeg does, so the result equals, byte for byte, what one joint encoding would have given) and
writes every symbol again. Coefficients are never touched: the pixels stay the same.

A segment is one image: `form.mcus` minimum coded units of 1 block (grey), 3 (4:4:4) or 6 (4:2:0: four of Y, Cb, Cr). A
block is one DC symbol (the size of a difference, 0..11), then AC symbols (run of zeros << 4 | size 1..10, ZRL F0,
EOB 00) until 63 coefficients are accounted for. Each symbol is followed by `size` raw bits; both together, at most 27
bits, are a *token* here. DC differences start from 0 in every segment, so its tokens depend on no other segment.
A segment ends with ones up to a byte, and a zero is stuffed after every byte FF.

There is no loop over segments in Python: all segments of a chunk step from token to token in lockstep, and a token is
found by looking up the next 16 bits. Segments are untrusted: one that does not match its checksum, holds an unassigned
code, too many coefficients or not exactly its bytes is refused by row, and none is read beyond the end of the data.

Letters: L lanes (the segments in lockstep), S steps, B blocks of an image.
"""

from __future__ import annotations

import heapq
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import NamedTuple
from zlib import crc32

import numpy as np
import numpy.typing as npt

from engram.errors import StripCorrupt
from engram.strip import Exemplars, Form

UInt8Array = npt.NDArray[np.uint8]
UInt32Array = npt.NDArray[np.uint32]
UInt64Array = npt.NDArray[np.uint64]
IntArray = npt.NDArray[np.int64]

# More lanes are no faster: the state of 4,096 just fits a second-level cache.
_MAX_LANES = 4096
# Tokens take some 7 times the bytes that they are read from.
_CHUNK_BYTES = 4 * 2**20
# Up to this much entropy-coded data the tokens of the first pass are kept for the second, else they are read twice.
_KEEP_BYTES = 8 * 2**20
# The lookup of one set of tables takes 1 MiB; chunks of many small parts are cut at this many.
_MAX_SETS = 4
# Steps in one block of tokens: its work arrays should stay in the cache, and yet outweigh the cost of the calls.
_STEPS = 64

_WINDOW = 1 << 16
# A lookup entry is: bits of the token | coefficients it accounts for << 8 | symbol index << 16.
_ADVANCE_SHIFT, _INDEX_SHIFT = 8, 16
# What an end of block accounts for is more than any run can reach (63 + 16), and an unassigned code lies in between.
_UNASSIGNED, _END_OF_BLOCK = 90, 160
# A symbol index is table << 8 | symbol; the tables are DC 0, AC 0, DC 1, AC 1, as in the DHT payload.
_SYMBOLS = 1024
_TABLES = (0x00, 0x10, 0x01, 0x11)
# A difference of two DC coefficients of 8-bit samples takes at most 11 bits; decoders refuse tables beyond 15.
_MAX_DC_SYMBOL = 11
# No DC symbol FF exists, so its index stands for "no token": what lanes read that have finished.
_NO_TOKEN = 0xFF
# Which table reads the DC symbol of each block of a unit; the table after it reads the AC symbols.
_DC_TABLES = {(1, "4:4:4"): (0,), (3, "4:4:4"): (0, 2, 2), (3, "4:2:0"): (0, 0, 0, 0, 2, 2)}
# How many raw bits follow a symbol is its low nibble, of DC and AC symbols alike.
_RAW_MASKS = (1 << (np.arange(_SYMBOLS, dtype=np.uint32) & 15)) - 1
# A lane notices that it has left its segment when its block is full: 64 tokens of 27 bits later, at most.
_SLACK_BYTES = 64 * 27 // 8 + 16
_HIGH_HALF = 1 if sys.byteorder == "little" else 0


class Table(NamedTuple):
    """One Huffman table as JPEG writes it: how many codes of 1..16 bits there are, and their symbols in order."""

    counts: tuple[int, ...]
    symbols: bytes

    @property
    def lengths(self) -> list[int]:
        """Bits of each symbol's code, in order."""
        return [bits for bits, count in enumerate(self.counts, start=1) for _ in range(count)]


def retable(parts: Sequence[Exemplars]) -> list[Exemplars]:
    """The same coefficients, all parts under one set of Huffman tables that is optimal for their union.

    Parts may differ in their Huffman tables and in nothing else of their form. Each result has its own contiguous
    `data`. Memory beyond parts and results is bounded, whatever their number of exemplars.

    Raises:
        ValueError: no part, or parts of different shape, subsampling or quantisation.
        StripCorrupt: a segment is not what its form says; message and `details` name its part and row.
    """
    if not parts:
        raise ValueError("no exemplars to bring under common tables")
    plain = replace(parts[0].form, huffman=b"")
    for part in parts:
        if replace(part.form, huffman=b"") != plain:
            raise ValueError(f"only Huffman tables may differ, got {part.form} and {parts[0].form}")
    chunks = _chunks(parts)
    if not chunks:
        return [replace(part, form=parts[0].form) for part in parts]
    is_small = sum(int(part.lengths.sum()) for part in parts) <= _KEEP_BYTES
    kept: list[_Tokens] = []
    counts = np.zeros(_SYMBOLS, np.int64)
    for chunk in chunks:
        tokens = _read(parts, chunk)
        counts += tokens.histogram()
        if is_small:
            kept.append(tokens)
    tables = [optimal_table(counts[256 * i : 256 * (i + 1)].tolist()) for i in range(_table_count(plain))]
    again = kept if is_small else (_read(parts, chunk) for chunk in chunks)
    return _rejoin(parts, chunks, replace(plain, huffman=_payload(tables)), (_write(each, tables) for each in again))


def optimal_table(counts: Sequence[int]) -> Table:
    """The Huffman table that codes symbols 0, 1, ... (at most 256) of these counts in the fewest bits.

    No code is longer than 16 bits and none consists of ones only. Of equal counts the larger symbol is merged first,
    as libjpeg does, so that the table equals the one that libjpeg's `optimize` writes.

    Source: ITU-T T.81 (1992), section K.2, figures K.1 to K.4.
    """
    # Symbol 256 does not exist: counted once, it gets a longest code, the one of ones only, and is then removed.
    heap = [(count, -symbol) for symbol, count in enumerate([*counts, *([0] * (256 - len(counts))), 1]) if count]
    merged = {-negative: [-negative] for _, negative in heap}
    length_of = dict.fromkeys(merged, 0)
    heapq.heapify(heap)
    while len(heap) > 1:
        count, first = heapq.heappop(heap)
        more, second = heapq.heappop(heap)
        merged[-first] += merged.pop(-second)
        for symbol in merged[-first]:
            length_of[symbol] += 1
        heapq.heappush(heap, (count + more, first))
    # libjpeg stops at 32 bits; counts of a hundred thousand images go beyond. 257 symbols make 256 bits at most.
    codes = [0] * 258
    for length in length_of.values():
        codes[length] += 1
    for length in range(257, 16, -1):
        while codes[length]:
            # Two codes of this length: one takes their common prefix, the other shares the place of a shorter code.
            shorter = max(bits for bits in range(1, length - 1) if codes[bits])
            codes[length] -= 2
            codes[length - 1] += 1
            codes[shorter] -= 1
            codes[shorter + 1] += 2
    codes[max(length for length in range(17) if codes[length])] -= 1
    del length_of[256]
    return Table(
        tuple(codes[1:17]),
        bytes(symbol for _, symbol in sorted((length, symbol) for symbol, length in length_of.items())),
    )


def parse_tables(huffman: bytes, count: int) -> list[Table]:
    """The tables of a DHT payload: DC 0, AC 0 and, when `count` is 4, DC 1, AC 1.

    Raises:
        StripCorrupt: a table is missing, cut off, out of order, or has codes or symbols that do not exist.
    """
    tables, at = [], 0
    for expected in _TABLES[:count]:
        counts = tuple(huffman[at + 1 : at + 17])
        symbols = huffman[at + 17 : at + 17 + sum(counts)]
        if len(counts) != 16 or huffman[at] != expected or len(symbols) != sum(counts):
            raise StripCorrupt(f"Huffman table {expected:#04x} is missing or cut off")
        # Kraft's sum must leave the all-ones code free.
        if sum(n << (16 - bits) for bits, n in enumerate(counts, start=1)) >= _WINDOW or len(symbols) > 256:
            raise StripCorrupt(f"Huffman table {expected:#04x} assigns more codes than exist")
        if expected < 0x10 and max(symbols, default=0) > _MAX_DC_SYMBOL:
            raise StripCorrupt(
                f"Huffman table {expected:#04x} has symbol {max(symbols)}, {_MAX_DC_SYMBOL} is the largest"
            )
        tables.append(Table(counts, symbols))
        at += 17 + len(symbols)
    if at != len(huffman):
        raise StripCorrupt(f"the Huffman tables take {at} bytes of {len(huffman)}")
    return tables


def _payload(tables: Sequence[Table]) -> bytes:
    named = zip(_TABLES, tables, strict=False)
    return b"".join(bytes([name, *table.counts]) + table.symbols for name, table in named)


def _table_count(form: Form) -> int:
    return 4 if form.channels == 3 else 2


@dataclass(frozen=True)
class _Piece:
    """Rows first..last-1 of one part."""

    part: int
    first: int
    last: int

    @property
    def rows(self) -> int:
        """How many they are."""
        return self.last - self.first


def _chunks(parts: Sequence[Exemplars]) -> list[list[_Piece]]:
    """All rows in order, cut so that each chunk is bounded in lanes, bytes and sets of tables."""
    chunks: list[list[_Piece]] = []
    lanes_left = bytes_left = 0
    sets: set[bytes] = set()
    for number, part in enumerate(parts):
        ends = np.cumsum(part.lengths)
        first = 0
        while first < len(part):
            before = int(ends[first - 1]) if first else 0
            last = min(first + lanes_left, int(np.searchsorted(ends, before + bytes_left, "right")))
            if last <= first or len(sets | {part.form.huffman}) > _MAX_SETS:
                chunks.append([])
                lanes_left, bytes_left, sets = _MAX_LANES, max(_CHUNK_BYTES, int(part.lengths[first])), set()
                continue
            chunks[-1].append(_Piece(number, first, last))
            sets.add(part.form.huffman)
            lanes_left -= last - first
            bytes_left -= int(ends[last - 1]) - before
            first = last
    return chunks


class _Block(NamedTuple):
    """Tokens of S consecutive steps, each symbol index << 16 | raw bits."""

    lanes_L: IntArray
    tokens_SL: UInt32Array


@dataclass(frozen=True)
class _Tokens:
    """All tokens of a chunk, step by step."""

    lanes: int
    blocks: list[_Block]

    def histogram(self) -> IntArray:
        """How often each symbol index occurs."""
        counts = np.zeros(_SYMBOLS, np.int64)
        for block in self.blocks:
            counts += np.bincount((block.tokens_SL >> _INDEX_SHIFT).ravel(), minlength=_SYMBOLS)
        counts[_NO_TOKEN] = 0
        return counts


@lru_cache(maxsize=8)
def _lookup(huffman: bytes, count: int) -> UInt32Array:
    """The entry of each 16-bit window in each table, [count * 65,536]."""
    entries = np.full((count, _WINDOW), _UNASSIGNED << _ADVANCE_SHIFT, np.uint32)
    for number, table in enumerate(parse_tables(huffman, count)):
        at = 0
        for symbol, bits in zip(table.symbols, table.lengths, strict=True):
            end = at + (_WINDOW >> bits)
            run, size = symbol >> 4, symbol & 15
            if number % 2 == 0:
                exists, advance = True, 1
            else:
                exists, advance = symbol in (0x00, 0xF0) or 1 <= size <= 10, run + 1 if symbol else _END_OF_BLOCK
            if exists:
                index = number << 8 | symbol
                entries[number, at:end] = bits + size | advance << _ADVANCE_SHIFT | index << _INDEX_SHIFT
            at = end
    return entries.reshape(-1)


def _read(parts: Sequence[Exemplars], chunk: Sequence[_Piece]) -> _Tokens:
    """The tokens of a chunk's segments.

    Raises:
        StripCorrupt: a segment does not hold exactly `form.mcus` units.
    """
    form = parts[chunk[0].part].form
    count = _table_count(form)
    sets = list(dict.fromkeys(parts[piece.part].form.huffman for piece in chunk))
    no_token = np.full(_WINDOW, _NO_TOKEN << _INDEX_SHIFT, np.uint32)
    lookup = np.concatenate([*(_lookup(huffman, count) for huffman in sets), no_token])
    set_L = np.repeat(
        np.array([sets.index(parts[piece.part].form.huffman) * count * _WINDOW for piece in chunk]),
        [piece.rows for piece in chunk],
    )
    dc_tables = np.array(_DC_TABLES[form.channels, form.subsampling]) * _WINDOW
    blocks = form.mcus * len(dc_tables)
    words, starts_L, ends_L = _unstuff(parts, chunk)
    lanes = _Lanes(
        lane_L=np.arange(len(set_L)),
        position_L=8 * starts_L,
        end_L=8 * ends_L,
        set_L=set_L,
        table_L=set_L.copy(),
        coefficient_L=np.zeros(len(set_L), np.int64),
        block_L=np.zeros(len(set_L), np.int64),
    )
    table_of_B = np.resize(dc_tables, blocks + 1)
    read = []
    while len(lanes.lane_L):
        block, corrupt = _advance(lanes, words, lookup, table_of_B)
        if len(corrupt):
            units = f"not {form.mcus} units of image data"
            raise _corrupt(parts, chunk, int(lanes.lane_L[corrupt[0]]), units)
        read.append(block)
        lanes = lanes.compress(lanes.block_L < blocks)
    return _Tokens(len(set_L), read)


@dataclass(frozen=True)
class _Lanes:
    """Where each segment in work stands. The arrays are changed in place."""

    lane_L: IntArray
    """Its number in the chunk."""
    position_L: IntArray
    """The next bit to read."""
    end_L: IntArray
    """The bit after its last."""
    set_L: IntArray
    """Where its set of tables begins in the lookup."""
    table_L: IntArray
    """Where the table of its next token begins in the lookup."""
    coefficient_L: IntArray
    """Coefficients read of the block in work, 0..63."""
    block_L: IntArray
    """Blocks finished."""

    def compress(self, wanted_L: npt.NDArray[np.bool_]) -> _Lanes:
        """Only these lanes."""
        return _Lanes(*(getattr(self, each.name)[wanted_L] for each in fields(self)))


def _advance(lanes: _Lanes, words: UInt64Array, lookup: UInt32Array, table_of_B: IntArray) -> tuple[_Block, IntArray]:
    """Step all lanes until an eighth of them has finished, 64 times at most: the tokens, and lanes proved corrupt.

    Written for speed: each call works on all lanes, into arrays that stay in the cache.
    """
    position_L, table_L, coefficient_L = lanes.position_L, lanes.table_L, lanes.coefficient_L
    count, blocks = len(position_L), len(table_of_B) - 1
    steps = max(_STEPS, _WINDOW // count)
    entries_SL, bits_SL = np.empty((2, steps, count), np.uint32)
    index_L, field_L = np.empty((2, count), np.int64)
    word_L = np.empty(count, np.uint64)
    at_dc = np.flatnonzero(coefficient_L == 0)
    finished = step = 0
    while step < steps and finished <= count >> 3:
        # A word is the 64 bits from a multiple of 32 on, so at least 33 of them follow any position; a token has 27.
        np.right_shift(position_L, 5, out=index_L)
        np.take(words, index_L, out=word_L, mode="clip")
        np.bitwise_and(position_L, 31, out=index_L)
        np.left_shift(word_L, index_L.view(np.uint64), out=word_L)
        bits_SL[step] = word_L.view(np.uint32)[_HIGH_HALF::2]
        np.right_shift(word_L, 48, out=word_L)
        np.add(word_L.view(np.int64), table_L, out=index_L)
        np.take(lookup, index_L, out=entries_SL[step], mode="clip")
        field_L[:] = entries_SL[step]
        step += 1
        np.bitwise_and(field_L, 31, out=index_L)
        position_L += index_L
        np.right_shift(field_L, _ADVANCE_SHIFT, out=field_L)
        np.bitwise_and(field_L, 255, out=field_L)
        coefficient_L += field_L
        table_L[at_dc] += _WINDOW
        at_dc = np.flatnonzero(coefficient_L > 63)
        if not len(at_dc):
            continue
        reached, left = coefficient_L[at_dc], lanes.end_L[at_dc] - position_L[at_dc]
        block = lanes.block_L[at_dc] + 1
        is_last = block == blocks
        wrong = ((reached > 64) & (reached < _END_OF_BLOCK)) | (left < 0) | (is_last & (left > 7))
        if wrong.any():
            return _Block(lanes.lane_L, entries_SL[:0]), at_dc[wrong]
        lanes.block_L[at_dc] = block
        table_L[at_dc] = lanes.set_L[at_dc] + table_of_B[block]
        coefficient_L[at_dc] = 0
        if is_last.any():
            table_L[at_dc[is_last]] = len(lookup) - _WINDOW
            finished += int(np.count_nonzero(is_last))
            at_dc = at_dc[~is_last]
    entries_SL = entries_SL[:step]
    # The raw bits end where the token does.
    tokens_SL = (bits_SL[:step] >> (32 - (entries_SL & 31))) & _RAW_MASKS[entries_SL >> _INDEX_SHIFT]
    tokens_SL |= entries_SL & ~np.uint32(0xFFFF)
    return _Block(lanes.lane_L, tokens_SL), at_dc[:0]


def _unstuff(parts: Sequence[Exemplars], chunk: Sequence[_Piece]) -> tuple[UInt64Array, IntArray, IntArray]:
    """A chunk's segments without stuffing, as overlapping words, and the bytes at which each one starts and ends.

    Raises:
        StripCorrupt: a segment does not match its checksum or holds a marker.
    """
    pieces = [parts[piece.part].select(np.arange(piece.first, piece.last)) for piece in chunk]
    segments = [segment for piece in pieces for segment in piece.segments()]
    checksums_L = np.concatenate([piece.checksums for piece in pieces])
    wrong = np.flatnonzero(np.fromiter(map(crc32, segments), np.uint32, len(segments)) != checksums_L)
    if len(wrong):
        raise _corrupt(parts, chunk, int(wrong[0]), "not those of its checksum")
    stuffed = np.frombuffer(b"".join(segments), np.uint8)
    ends_L = np.cumsum([len(segment) for segment in segments])
    zeros = np.flatnonzero(stuffed == 0xFF) + 1
    # After FF a zero of the same segment must follow.
    stray = zeros[np.isin(zeros, ends_L) | (stuffed[np.minimum(zeros, len(stuffed) - 1)] != 0)]
    if len(stray):
        lane = int(np.searchsorted(ends_L, stray[0] - 1, "right"))
        raise _corrupt(parts, chunk, lane, "interrupted by a marker")
    ends_L -= np.searchsorted(zeros, ends_L)
    size = len(stuffed) - len(zeros)
    plain = np.zeros(-(-(size + _SLACK_BYTES) // 4) * 4, np.uint8)
    plain[:size] = np.delete(stuffed, zeros)
    halves = plain.view(">u4").astype(np.uint64)
    words: UInt64Array = halves[:-1] << np.uint64(32) | halves[1:]
    return words, np.concatenate([[0], ends_L[:-1]]), ends_L


def _corrupt(parts: Sequence[Exemplars], chunk: Sequence[_Piece], lane: int, are: str) -> StripCorrupt:
    """The error that names the part and row of a lane."""
    for piece in chunk:
        if lane < piece.rows:
            break
        lane -= piece.rows
    row = piece.first + lane
    where = f"exemplar {row}" + (f" of part {piece.part}" if len(parts) > 1 else "")
    size = int(parts[piece.part].lengths[row])
    return StripCorrupt(f"the {size} entropy-coded bytes of {where} are {are}", row=row, part=piece.part)


def _coder(tables: Sequence[Table]) -> tuple[IntArray, UInt64Array]:
    """For each symbol index: the bits of its tokens, and its code with room for the raw bits."""
    bits, codes = np.zeros(_SYMBOLS, np.int64), np.zeros(_SYMBOLS, np.uint64)
    for number, table in enumerate(tables):
        code = previous = 0
        for symbol, length in zip(table.symbols, table.lengths, strict=True):
            code <<= length - previous
            index, size = number << 8 | symbol, symbol & 15
            bits[index], codes[index] = length + size, code << size
            code, previous = code + 1, length
    return bits, codes


def _write(chunk: _Tokens, tables: Sequence[Table]) -> tuple[bytes, IntArray]:
    """All segments of a chunk under these tables, stuffed, back to back, and their lengths."""
    token_bits, codes = _coder(tables)
    bits_L = np.zeros(chunk.lanes, np.int64)
    for lanes_L, tokens_SL in chunk.blocks:
        bits_L[lanes_L] += token_bits[tokens_SL >> _INDEX_SHIFT].sum(axis=0)
    size_L = -(-bits_L // 8)
    # Each lane begins at a 32-bit word of its own. A token lies within the 64 bits from the word in which it begins,
    # and no bit is set twice, so adding is joining.
    word_L = np.concatenate([[0], np.cumsum(-(-bits_L // 32))])
    sums = np.zeros(int(word_L[-1]) + 1, np.uint64)
    at_L = 32 * word_L[:-1]
    for lanes_L, tokens_SL in chunk.blocks:
        index_SL = tokens_SL >> _INDEX_SHIFT
        length_SL = token_bits[index_SL]
        end_SL = np.cumsum(length_SL, axis=0) + at_L[lanes_L]
        at_L[lanes_L] = end_SL[-1]
        _add_bits(sums, end_SL, length_SL, codes[index_SL] | (tokens_SL & 0xFFFF))
    pad_L = 8 * size_L - bits_L
    _add_bits(sums, at_L + pad_L, pad_L, ((1 << pad_L) - 1).astype(np.uint64))
    words = (sums >> np.uint64(32)).astype(np.uint32)
    words[1:] |= sums[:-1].astype(np.uint32)
    return _stuff(words.astype(">u4").view(np.uint8), 4 * word_L[:-1], size_L)


def _add_bits(sums: UInt64Array, end: IntArray, length: IntArray, value: UInt64Array) -> None:
    """Add each value, `length` bits that end at bit `end`, to the 64 bits from the 32-bit word in which it begins."""
    begin = end - length
    shift = (64 - (begin & 31) - length).astype(np.uint64)
    np.add.at(sums, (begin >> 5).ravel(), (value << shift).ravel())


def _stuff(data: UInt8Array, starts_L: IntArray, lengths_L: IntArray) -> tuple[bytes, IntArray]:
    """These stretches of `data` back to back with a zero after every FF, and their lengths."""
    bounds = np.concatenate([[0], np.cumsum(lengths_L)])
    plain = data[np.repeat(starts_L - bounds[:-1], lengths_L) + np.arange(bounds[-1])]
    escapes = np.flatnonzero(plain == 0xFF)
    stuffed: IntArray = np.diff(bounds + np.searchsorted(escapes, bounds))
    return np.insert(plain, escapes + 1, 0).tobytes(), stuffed


def _rejoin(
    parts: Sequence[Exemplars],
    chunks: Sequence[Sequence[_Piece]],
    form: Form,
    written: Iterable[tuple[bytes, IntArray]],
) -> list[Exemplars]:
    """One result for each part, put together from the segments of all chunks."""
    data: list[list[memoryview]] = [[] for _ in parts]
    lengths: list[list[IntArray]] = [[np.zeros(0, np.int64)] for _ in parts]
    for chunk, (segments, lengths_L) in zip(chunks, written, strict=True):
        lane = at = 0
        for piece in chunk:
            of_piece = lengths_L[lane : lane + piece.rows]
            size = int(of_piece.sum())
            data[piece.part].append(memoryview(segments)[at : at + size])
            lengths[piece.part].append(of_piece)
            lane, at = lane + piece.rows, at + size
    return [
        _exemplars(form, b"".join(segments), np.concatenate(of_part), part.class_ids)
        for part, segments, of_part in zip(parts, data, lengths, strict=True)
    ]


def _exemplars(form: Form, data: bytes, lengths: IntArray, class_ids: IntArray) -> Exemplars:
    ends = np.cumsum(lengths)
    starts, view = ends - lengths, memoryview(data)
    checksums = (crc32(view[start:end]) for start, end in zip(starts.tolist(), ends.tolist(), strict=True))
    return Exemplars(form, data, starts, lengths, class_ids, np.fromiter(checksums, np.uint32, len(lengths)))
