"""This file is what a draw delivers: one strip of its exemplars, and the arrays it decodes to.

Exemplars are copied out of the packs that they lie in, in the order of packs and rows, and become one strip with the
task of each and its row in its pack (several strips if the packs differ in form, or where one JPEG cannot hold them).
Service and `Mirror` make it with the same functions, so a mirrored draw equals the service's byte for byte.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from engram.draw import Plan
from engram.errors import InvalidRequest, StripCorrupt
from engram.form import Form
from engram.strip import Bytes, Exemplars, Markers, UInt8Array, as_images, decode_strip, gather, parse, pixel_buffer

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


class Part(NamedTuple):
    """Exemplars of one form that a draw delivers, the task of each and its row in its pack."""

    exemplars: Exemplars
    tasks: IntArray
    rows: IntArray


def empty() -> Batch:
    """What a rank gets whose slice of an epoch's last step is empty: no images, of no size."""
    none = np.empty(0, np.int64)
    return Batch(np.empty((0, 0, 0, 0), np.uint8), none, none, none)


def collect(
    packs: Sequence[Exemplars] | Mapping[int, Exemplars], plan: Plan, places: IntArray | None = None
) -> list[Part]:
    """What a plan names, copied out of its packs: one part for each form, in order of first appearance.

    Args:
        packs: by their place in the manifest, those that the plan touches.
        plan: which rows of them.
        places: where the rows are in `packs`, if that is not their number (rows of a damaged pack).
    """
    places = plan.rows if places is None else places
    touched = plan.packs[np.flatnonzero(np.diff(plan.packs, prepend=-1))].tolist()
    forms: dict[Form, set[int]] = {}
    for index in touched:
        forms.setdefault(packs[index].form, set()).add(index)
    if len(forms) == 1:
        return [Part(gather(packs, plan.packs.tolist(), places.tolist()), plan.tasks, plan.rows)]
    parts = []
    for members in forms.values():
        here = np.isin(plan.packs, list(members))
        exemplars = gather(packs, plan.packs[here].tolist(), places[here].tolist())
        parts.append(Part(exemplars, plan.tasks[here], plan.rows[here]))
    return parts


def assemble(parts: Sequence[Part]) -> bytes:
    """The body of a draw."""
    return b"".join(strip for part in parts for strip in part.exemplars.to_strips(tasks=part.tasks, rows=part.rows))


def picture(parts: Sequence[Part]) -> bytes:
    """The exemplars of a draw as one JPEG that any viewer opens, stacked from top to bottom.

    Raises:
        InvalidRequest: they do not fit one picture.
    """
    count = sum(len(part.exemplars) for part in parts)
    most = parts[0].exemplars.form.max_images if len(parts) == 1 else 0
    if not 1 <= count <= most:
        raise InvalidRequest(
            f"one picture holds 1 to {most} exemplars of one form, this draw has {count} of {len(parts)} forms: ask "
            "for another size, or for strips",
            max_images=most,
        )
    return parts[0].exemplars.picture()


def from_parts(parts: Sequence[Part]) -> Batch:
    """The arrays of a draw, straight from verified packs: what `decode(assemble(parts))` gives, without the strips.

    Raises:
        StripCorrupt: the decoder refuses the data, or images differ in size or subsampling.
    """
    flat, image_bytes = _buffer([part.exemplars for part in parts])
    done = 0
    for part in parts:
        end = done + len(part.exemplars)
        part.exemplars.decode(flat[done * image_bytes : end * image_bytes])
        done = end
    return _batch(flat, parts)


def decode(body: Bytes) -> Batch:
    """The arrays of a draw's body, every byte checked, decoded into one buffer.

    Raises:
        StripCorrupt: something does not match, or the strips hold images of different sizes.
        TooLarge: an image is declared larger than 64 Mi pixels.
    """
    markers = Markers(body)
    strips = []
    starts = [0]
    while starts[-1] < len(body):
        strip = parse(body, starts[-1], markers=markers)
        if strip.tasks is None or strip.rows is None:
            raise StripCorrupt(f"the strip at byte {starts[-1]} is part of a pack, not of a draw")
        strips.append(Part(strip.exemplars, strip.tasks, strip.rows))
        starts.append(strip.end)
    flat, image_bytes = _buffer([part.exemplars for part in strips])
    done = 0
    view = memoryview(body)
    for at, end, part in zip(starts, starts[1:], strips, strict=False):
        after = done + len(part.exemplars) * image_bytes
        decode_strip(view[at:end], part.exemplars.form, flat[done:after])
        done = after
    return _batch(flat, strips)


def _buffer(parts: Sequence[Exemplars]) -> tuple[UInt8Array, int]:
    """Room for the pixels of all parts, and how much an image takes of it."""
    if not parts:
        raise StripCorrupt("the draw has no strip in it")
    form = parts[0].form
    # 4:2:0 and 4:4:4 pad to different heights; a buffer has one subsampling, a batch of several would be a mix of two
    # buffers.
    for other in parts[1:]:
        if other.form.shape != form.shape or other.form.padded_height != form.padded_height:
            raise StripCorrupt(f"the strips of the draw hold images of different sizes: {form} and {other.form}")
    image_bytes = form.padded_height * form.width * form.channels
    return pixel_buffer(sum(map(len, parts)) * image_bytes), image_bytes


def _batch(flat: UInt8Array, parts: Sequence[Part]) -> Batch:
    if len(parts) == 1:
        (exemplars, tasks, rows), class_ids = parts[0], parts[0].exemplars.class_ids
        return Batch(as_images(flat, exemplars.form, len(rows)), class_ids, tasks, rows)
    class_ids, tasks, rows = (
        np.concatenate(columns)
        for columns in zip(*((part.exemplars.class_ids, part.tasks, part.rows) for part in parts), strict=True)
    )
    return Batch(as_images(flat, parts[0].exemplars.form, len(rows)), class_ids, tasks, rows)
