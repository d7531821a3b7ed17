"""The pack: the exemplars of one task as one immutable object, strips back to back, named by its SHA-256.

    pack = strip * k      all of one form, so of the same fields; every strip but the last holds form.max_images

Rows count from 0 through the whole pack. Classes ascend; within a class rows are in rank order, so every prefix of a
class is a valid memory and a share that shrinks only drops tails.
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256

import numpy as np
import numpy.typing as npt

from engram.errors import StripCorrupt, TooLarge
from engram.form import Form
from engram.shares import split
from engram.strip import (
    SIGNATURE,
    Bytes,
    Exemplars,
    IntArray,
    Markers,
    Strip,
    overhead,
    parse_leniently,
    runs_of,
    varint_sizes,
)

_NONE: IntArray = np.empty(0, np.int64)
_STRIP_START = b"\xff\xd8\xff\xef"


def to_bytes(exemplars: Exemplars) -> bytes:
    """The pack of these exemplars; they must be in row order already (classes ascending, ranks ascending).

    Raises:
        ValueError: no exemplars, or class ids that descend.
    """
    if len(exemplars) == 0:
        raise ValueError("a pack holds at least one exemplar")
    if np.any(np.diff(exemplars.class_ids) < 0):
        raise ValueError("the rows of a pack must be in ascending order of class id")
    return b"".join(exemplars.to_strips())


def digest(data: Bytes) -> str:
    """The name of a pack: its SHA-256 in hexadecimal."""
    return sha256(data).hexdigest()


def parse(data: Bytes) -> Exemplars:
    """All exemplars of a pack, every strip and every checksum verified.

    Raises:
        StripCorrupt: something in it does not match.
        TooLarge: an image is declared larger than 64 Mi pixels.
    """
    exemplars, valid = _parse(data)
    if not valid.all():
        row = int(np.flatnonzero(~valid)[0])
        raise StripCorrupt(f"exemplar {row} of the pack does not match its checksum", row=row)
    return exemplars


def salvage(data: Bytes, count: int) -> tuple[Exemplars | None, IntArray]:
    """What can still be read of a damaged pack that held `count` exemplars: (exemplars, their row numbers).

    A flipped bit in a segment costs that exemplar; one in a header or a marker costs its strip. Strips after a lost
    one are placed by their number, which is known as long as every strip still begins with its signature.
    """
    found = _lenient_strips(data)
    parts: list[Exemplars] = []
    rows: list[IntArray] = []
    form: Form | None = None
    for ordinal, read in enumerate(found):
        if read is None:
            continue
        strip, valid = read
        form = form or strip.exemplars.form
        room = form.max_images
        if strip.exemplars.form != form or len(found) != -(-count // room):
            continue
        if len(strip.exemplars) != min(room, count - ordinal * room):
            continue
        kept = np.flatnonzero(valid)
        parts.append(strip.exemplars.select(kept))
        rows.append(kept + ordinal * room)
    if not parts or form is None:
        return None, np.empty(0, np.int64)
    return _join(form, data, parts), np.concatenate(rows)


def _lenient_strips(data: Bytes) -> list[tuple[Strip, npt.NDArray[np.bool_]] | None]:
    """Every strip that begins in `data`, None for those that cannot be read."""
    found: list[tuple[Strip, npt.NDArray[np.bool_]] | None] = []
    markers, end = Markers(data), 0
    for start in _strip_starts(data):
        # A strip within a field of another one is none of ours.
        if start < end:
            continue
        try:
            found.append(parse_leniently(data, start, markers=markers))
            end = found[-1][0].end if found[-1] is not None else end
        except (StripCorrupt, TooLarge):
            found.append(None)
    return found


def size(form: Form, runs: list[tuple[int, int]], segment_sizes: IntArray) -> int:
    """Bytes of the pack with these (class id, count) runs and these exemplar `sizes`, without making it."""
    class_ids, counts = (np.array(column, np.int64) for column in zip(*runs, strict=True)) if runs else (_NONE, _NONE)
    return int(segment_sizes.sum()) + _overhead(form, class_ids, counts)


def class_bytes(exemplars: Exemplars) -> list[int]:
    """Bytes of each class's exemplars, beside the runs; headers, which classes have in common, are not in it."""
    counts = [count for _, count in runs_of(exemplars.class_ids)]
    sizes: list[int] = np.add.reduceat(exemplars.sizes, np.cumsum([0, *counts[:-1]])).tolist()
    return sizes


def prefix(exemplars: Exemplars, counts: Mapping[int, int]) -> Exemplars:
    """The first `counts[c]` rows of every class c; classes not named keep none.

    Raises:
        ValueError: a count exceeds what the class holds.
    """
    rows, at = [], 0
    for class_id, held in runs_of(exemplars.class_ids):
        count = counts.get(class_id, 0)
        if not 0 <= count <= held:
            raise ValueError(f"class {class_id} holds {held} exemplars, {count} were asked for")
        rows.append(np.arange(at, at + count))
        at += held
    return exemplars.select(np.concatenate(rows) if rows else np.empty(0, np.int64))


def fit(exemplars: Exemplars, shares: Mapping[int, int]) -> Exemplars:
    """The longest prefix of every class such that the pack's real bytes are at most the sum of the classes' shares.

    Tables and headers, which the classes have in common, are charged to them equally. What is left over when every
    class has taken what its own share holds buys at most one more exemplar each, the smallest class first. The result
    may be empty; a class without a share keeps nothing.
    """
    runs = runs_of(exemplars.class_ids)
    if not runs:
        return exemplars
    # Arrays over classes: what is kept is weighed once for every class, of which there may be thousands.
    class_ids, held = (np.array(column, np.int64) for column in zip(*runs, strict=True))
    ends = np.cumsum(held)
    spent = np.concatenate([[0], np.cumsum(exemplars.sizes)])
    costs = [spent[a : b + 1] - spent[a] for a, b in zip((ends - held).tolist(), ends.tolist(), strict=True)]
    given = [shares.get(class_id, 0) for class_id, _ in runs]
    total = sum(given)

    def real(counts: IntArray) -> int:
        sizes = int((spent[ends - held + counts] - spent[ends - held]).sum())
        return sizes + _overhead(exemplars.form, class_ids, counts)

    counts = held
    # With every exemplar counted the overhead is an upper bound; the second round spends what the first overcharged.
    for _ in range(2):
        charges = split(_overhead(exemplars.form, class_ids, counts), len(runs))
        trial = np.array(
            [
                max(0, int(np.searchsorted(cost, share - charge, side="right")) - 1)
                for cost, share, charge in zip(costs, given, charges, strict=True)
            ],
            np.int64,
        )
        if real(trial) > total or not trial.any():
            break
        counts = trial
    counts = np.zeros_like(held) if real(counts) > total else counts.copy()
    for place in sorted((p for p, share in enumerate(given) if share), key=lambda p: (counts[p], p)):
        if counts[place] < held[place]:
            counts[place] += 1
            if real(counts) > total:
                counts[place] -= 1
    return prefix(exemplars, dict(zip(class_ids.tolist(), counts.tolist(), strict=True)))


def _overhead(form: Form, class_ids: IntArray, counts: IntArray) -> int:
    """Bytes of the pack of so many exemplars of each class beyond the sum of their sizes."""
    ends = np.cumsum(counts)
    whole = int(ends[-1]) if len(ends) else 0
    if not whole:
        return 0
    room = form.max_images
    # A run ends with its class or with its strip.
    run_ends = np.union1d(ends[counts > 0], np.arange(room, whole, room))
    run_sizes = varint_sizes(class_ids[np.searchsorted(ends, run_ends)]) + varint_sizes(np.diff(run_ends, prepend=0))
    in_strips = np.add.reduceat(run_sizes, np.searchsorted(run_ends, np.arange(0, whole, room), side="right"))
    return sum(overhead(form, min(room, whole - room * number), size) for number, size in enumerate(in_strips.tolist()))


def _parse(data: Bytes) -> tuple[Exemplars, npt.NDArray[np.bool_]]:
    markers = Markers(data)
    parts: list[Exemplars] = []
    valid = []
    at = 0
    while at < len(data):
        strip, ok = parse_leniently(data, at, markers=markers)
        if parts and (strip.exemplars.form != parts[0].form or len(parts[-1]) != parts[0].form.max_images):
            raise StripCorrupt(f"the strip at byte {at} does not continue the pack")
        if strip.tasks is not None:
            raise StripCorrupt(f"the strip at byte {at} was delivered by a draw, it is not part of a pack")
        parts.append(strip.exemplars)
        valid.append(ok)
        at = strip.end
    if not parts:
        raise StripCorrupt("a pack of 0 bytes")
    exemplars = _join(parts[0].form, data, parts)
    if np.any(np.diff(exemplars.class_ids) < 0):
        raise StripCorrupt("the classes of the pack are not in ascending order")
    return exemplars, np.concatenate(valid)


def _join(form: Form, data: Bytes, parts: list[Exemplars]) -> Exemplars:
    """Parts that are views of the same bytes as one view."""
    return Exemplars(
        form,
        data,
        np.concatenate([part.starts for part in parts]),
        np.concatenate([part.lengths for part in parts]),
        np.concatenate([part.class_ids for part in parts]),
        np.concatenate([part.checksums for part in parts]),
        np.concatenate([part.record_starts for part in parts if part.record_starts is not None])
        if form.schema
        else None,
        np.concatenate([part.record_lengths for part in parts if part.record_lengths is not None])
        if form.schema
        else None,
    )


def _strip_starts(data: Bytes) -> list[int]:
    whole = bytes(data)
    found, at = [], whole.find(_STRIP_START)
    while at >= 0:
        if whole[at + 6 : at + 6 + len(SIGNATURE)] == SIGNATURE:
            found.append(at)
        at = whole.find(_STRIP_START, at + 4)
    return found
