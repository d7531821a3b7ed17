"""This file is what a draw delivers: the strips of its exemplars back to back, and the arrays they decode to.

The body of a draw holds, for each pack touched, one strip or more with the pack's task and the row of every exemplar
in it. Service and `Mirror` make it with the same function, so a mirrored draw equals the service's byte for byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engram.errors import StripCorrupt
from engram.strip import (
    Bytes,
    Checked,
    Exemplars,
    Limits,
    Markers,
    UInt8Array,
    as_images,
    check,
    decode_strip,
    pixel_buffer,
)

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Batch:
    """One replay minibatch; the arrays are aligned by exemplar.

    `images` is uint8 [N, H, W, C], C = 1 or 3 (RGB). It may be a strided view (rows of padding are skipped), which
    numpy and torch take as it is. `rows` are row numbers in the pack of the exemplar's task.
    """

    images: UInt8Array
    class_ids: IntArray
    tasks: IntArray
    rows: IntArray

    def __len__(self) -> int:
        return len(self.class_ids)


def empty() -> Batch:
    """What a rank gets whose slice of an epoch's last step is empty: no images, of no size."""
    none = np.empty(0, np.int64)
    return Batch(np.empty((0, 0, 0, 0), np.uint8), none, none, none)


def assemble(parts: Sequence[tuple[int, Exemplars, npt.ArrayLike]]) -> bytes:
    """The body of a draw: for each (task, exemplars of its pack, rows) the strips of those rows."""
    return b"".join(
        strip for task, exemplars, rows in parts for strip in exemplars.select(rows).to_strips(task=task, rows=rows)
    )


def from_parts(parts: Sequence[tuple[int, Exemplars, IntArray]]) -> Batch:
    """The arrays of a draw, straight from verified packs: what `decode(assemble(parts))` gives, without the strips.

    Raises:
        ValueError: no parts, or parts whose images differ in size or subsampling.
        StripCorrupt: the decoder refuses the data.
    """
    chosen = [exemplars.select(rows) for _, exemplars, rows in parts]
    form = chosen[0].form if chosen else None
    if form is None or any(e.form.shape != form.shape or e.form.padded_height != form.padded_height for e in chosen):
        raise ValueError("a batch needs exemplars, all of one size and subsampling")
    image_bytes = form.padded_height * form.width * form.channels
    flat = pixel_buffer(sum(map(len, chosen)) * image_bytes)
    done = 0
    for exemplars in chosen:
        exemplars.decode(flat[done * image_bytes : (done + len(exemplars)) * image_bytes])
        done += len(exemplars)
    return Batch(
        as_images(flat, form, done),
        np.concatenate([exemplars.class_ids for exemplars in chosen]),
        np.repeat(np.array([task for task, _, _ in parts], np.int64), [len(rows) for _, _, rows in parts]),
        np.concatenate([rows for _, _, rows in parts]),
    )


def decode(body: Bytes, *, limits: Limits | None = None) -> Batch:
    """The arrays of a draw's body, every byte checked, decoded into one buffer.

    Raises:
        StripCorrupt: something does not match, or the strips hold images of different sizes.
    """
    body = bytes(body)
    markers, limits = Markers(body), limits or Limits()
    strips: list[Checked] = []
    starts = [0]
    while starts[-1] < len(body):
        strips.append(check(body, starts[-1], markers, limits))
        starts.append(strips[-1].end)
    if not strips:
        raise StripCorrupt("the draw has no strip in it")
    form = strips[0].form
    for other in {strip.form for strip in strips}:
        if other.shape != form.shape:
            raise StripCorrupt("the strips of the draw hold images of different sizes")
        # 4:2:0 and 4:4:4 pad to different heights; a buffer has one subsampling, a batch of several would be a mix of
        # two buffers.
        if other.padded_height != form.padded_height:
            raise StripCorrupt("the strips of the draw differ in subsampling")
    counts = [strip.images for strip in strips]
    image_bytes = form.padded_height * form.width * form.channels
    flat = pixel_buffer(sum(counts) * image_bytes)
    done = 0
    view = memoryview(body)
    for at, strip in zip(starts, strips, strict=False):
        end = done + strip.images * image_bytes
        decode_strip(view[at : strip.end], form, flat[done:end])
        done = end
    rows = b"".join(np.arange(s.images).astype(">u4").tobytes() if s.rows is None else s.rows for s in strips)
    class_ids = [class_id for strip in strips for class_id in strip.class_ids]
    run_lengths = [length for strip in strips for length in strip.run_lengths]
    return Batch(
        as_images(flat, form, sum(counts)),
        np.repeat(np.array(class_ids, np.int64), run_lengths),
        np.repeat(np.array([-1 if strip.task is None else strip.task for strip in strips], np.int64), counts),
        np.frombuffer(rows, ">u4").astype(np.int64),
    )
