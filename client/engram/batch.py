"""What a draw delivers: one strip of its exemplars, and the arrays it decodes to.

Exemplars are copied out of the packs that they lie in, in the order of packs and rows, and become one strip with the
task of each and its row in its pack (several strips if the packs differ in form, or where one JPEG cannot hold them).
Their fields, if they have any, come with them and are arrays of the batch too.
Service and `Mirror` make it with the same functions, so a mirrored draw equals the service's byte for byte.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from engram.draw import Plan
from engram.errors import InvalidRequest, StripCorrupt
from engram.fields import Column
from engram.form import Form
from engram.strip import (
    Bytes,
    Exemplars,
    Loose,
    Markers,
    UInt8Array,
    as_images,
    decode_strip,
    gather,
    parse,
    pixel_buffer,
)

IntArray = npt.NDArray[np.int64]
Labels = tuple[IntArray, IntArray, IntArray]


@dataclass(frozen=True, eq=False)
class Batch:
    """One replay minibatch; the arrays are aligned by exemplar.

    `images` is uint8 [N, H, W, C], C = 1 or 3 (RGB). It may be a strided view (rows of padding are skipped), which
    numpy and torch take as it is. `rows` are row numbers in the pack of the exemplar's task. `fields` has the columns
    that the buffer declares, by name: an array [N, ...], a list of N arrays for a ragged field, a list of N texts.
    """

    images: UInt8Array
    class_ids: IntArray
    tasks: IntArray
    rows: IntArray
    fields: dict[str, Column] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.class_ids)


class Part(NamedTuple):
    """Exemplars of one form that a draw delivers, the task of each and its row in its pack."""

    exemplars: Loose
    tasks: IntArray
    rows: IntArray


def empty() -> Batch:
    """What a rank gets whose slice of an epoch's last step is empty: no images, of no size, and no fields."""
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
    which, rows = plan.packs.tolist(), places.tolist()
    # The same object nearly always, and looking at it is ten times faster than comparing or hashing forms.
    objects = {id(form): form for form in (packs[index].form for index in dict.fromkeys(which))}
    forms = dict.fromkeys(objects.values())
    if len(forms) == 1:
        return [Part(gather(packs, which, rows, plan.class_ids), plan.tasks, plan.rows)]
    parts = []
    for form in forms:
        here = np.flatnonzero([packs[index].form == form for index in which])
        exemplars = gather(packs, plan.packs[here].tolist(), places[here].tolist(), plan.class_ids[here])
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
    if len(parts) != 1:
        raise InvalidRequest(f"one picture holds exemplars of one form, this draw has {len(parts)}: ask for strips")
    return parts[0].exemplars.picture()


def from_parts(parts: Sequence[Part]) -> Batch:
    """The arrays of a draw, straight from verified packs: what `decode(assemble(parts))` gives, without the strips.

    Raises:
        StripCorrupt: the decoder refuses the data, or images differ in size or subsampling.
    """
    flat = _buffer([(part.exemplars.form, len(part.rows)) for part in parts])
    form, done = parts[0].exemplars.form, 0
    for part in parts:
        part.exemplars.decode(flat[done:])
        done += len(part.rows) * form.image_bytes
    fields = _joined([part.exemplars.fields() for part in parts]) if form.schema.text else {}
    return _batch(flat, form, [(part.exemplars.class_ids, part.tasks, part.rows) for part in parts], fields)


def decode(body: Bytes) -> Batch:
    """The arrays of a draw's body, every byte checked, decoded into one buffer.

    Raises:
        StripCorrupt: something does not match, or the strips hold images of different sizes.
        TooLarge: an image is declared larger than 64 Mi pixels.
    """
    markers = Markers(body)
    exemplars: list[Exemplars] = []
    labels: list[Labels] = []
    ends = [0]
    while ends[-1] < len(body):
        strip = parse(body, ends[-1], markers=markers)
        if strip.tasks is None or strip.rows is None:
            raise StripCorrupt(f"the strip at byte {ends[-1]} is part of a pack, not of a draw")
        exemplars.append(strip.exemplars)
        labels.append((strip.exemplars.class_ids, strip.tasks, strip.rows))
        ends.append(strip.end)
    flat = _buffer([(part.form, len(part)) for part in exemplars])
    form, done = exemplars[0].form, 0
    for part, (at, end) in zip(exemplars, pairwise(ends), strict=True):
        after = done + len(part) * form.image_bytes
        decode_strip(memoryview(body)[at:end], part.form, flat[done:after])
        done = after
    return _batch(flat, form, labels, _joined([part.fields() for part in exemplars]) if form.schema.text else {})


def _buffer(parts: Sequence[tuple[Form, int]]) -> UInt8Array:
    """Room for the pixels of so many images of these forms, which must be alike."""
    if not parts:
        raise StripCorrupt("the draw has no strip in it")
    form = parts[0][0]
    for other, _ in parts:
        # 4:2:0 and 4:4:4 pad to different heights; a buffer has one subsampling, a batch of several would be a mix of
        # two buffers.
        if other.shape != form.shape or other.padded_height != form.padded_height:
            raise StripCorrupt(f"the strips of the draw hold images of different sizes: {form} and {other}")
        if other.schema is not form.schema and other.schema != form.schema:
            raise StripCorrupt(
                f"the strips of the draw have different fields: {form.schema.text!r} and {other.schema.text!r}"
            )
    return pixel_buffer(sum(count for _, count in parts) * form.image_bytes)


def _batch(flat: UInt8Array, form: Form, labels: Sequence[Labels], fields: dict[str, Column]) -> Batch:
    """The batch of these pixels and fields; `labels` are class ids, tasks and rows of each part."""
    class_ids, tasks, rows = labels[0] if len(labels) == 1 else map(np.concatenate, zip(*labels, strict=True))
    return Batch(as_images(flat, form, len(rows)), class_ids, tasks, rows, fields)


def _joined(parts: Sequence[dict[str, Column]]) -> dict[str, Column]:
    """The columns of several strips, one after the other."""
    if len(parts) == 1:
        return parts[0]
    joined: dict[str, Column] = {}
    for name, first in parts[0].items():
        columns: list[Any] = [part[name] for part in parts]
        joined[name] = np.concatenate(columns) if isinstance(first, np.ndarray) else list(chain.from_iterable(columns))
    return joined
