"""The exemplars of a generation as an operator looks through them: pages in order, and counts by class, bytes or field.

Exemplars are numbered through a generation in the order of task, class and rank, and a task or a class is a few runs of
these numbers (`engram.draw.Layout`). So a page costs what is on it, wherever it begins and however many there are. A
filter by bytes or fields looks at exemplars until the page is full or `SCAN_EXEMPLARS` have been looked at: a page may
then hold fewer than asked for, even none, and `next` goes on from there.

What was counted of a generation is kept with it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from engram.draw import Layout, Plan
from engram.errors import InvalidRequest
from engram.fields import TEXT
from engram.oversight import Bin, Histogram
from engram.packs import LoadedPack
from engram.schemas import Exemplar, ExemplarPage
from engram.strip import Exemplars

from .filters import Filters, IntArray, numbers, records, scalar
from .replay import Replay, View, keys_of

_T = TypeVar("_T")

SCAN_EXEMPLARS = 2**16
"""How many are looked at for one page; at 1 million the rarest is found in 16 pages."""

SCAN_BYTES = 2**26
"""The same in bytes of fields."""

COUNTED_FIELDS = 2**17
"""Of how many exemplars a field is counted; of more, evenly spread ones are."""

MAX_BINS = 500
"""Classes of a histogram; those that hold most are named."""

_TEXTS = 50
_NUMBERS = 32
_BINS_PER_OCTAVE = 4
# A page is mostly full after the first few hundred; then it pays to look at more at once.
_FIRST_PART = 256
_PART = 2**14
_REMEMBERED = 64

_CLASS, _TASK, _BYTES, _FIELD = "class", "task", "bytes", "field:"


class _Candidates:
    """The exemplars of a task, a class, or all, numbered through."""

    def __init__(self, layout: Layout, filters: Filters, first: int = 0) -> None:
        begins, counts = layout.stretches(filters.task, filters.class_id, first)
        self._ends = np.cumsum(counts)
        self._shift = begins - (self._ends - counts)
        self.count = int(self._ends[-1]) if len(counts) else 0

    def rows(self, places: IntArray) -> IntArray:
        """Their global rows."""
        return places + self._shift[np.searchsorted(self._ends, places, side="right")]


def page(
    replay: Replay, view: View, filters: Filters, *, limit: int, after: tuple[int, int, int] | None
) -> ExemplarPage:
    """Exemplars in order of task, class and rank, those after `after` (task, class id, rank).

    The cursor names a place in that order and not a row, so that paging goes on when a new generation comes.

    Raises:
        Unavailable: the disk does not answer.
    """
    layout = view.layout
    candidates = _Candidates(layout, filters, 0 if after is None else layout.after(*after))
    if not filters.examines:
        # One more than the page holds tells whether there is another page.
        rows = candidates.rows(np.arange(min(limit + 1, candidates.count)))
        return ExemplarPage(
            exemplars=_described(replay, view, rows[:limit]),
            next=_cursor(layout, rows[limit - 1]) if len(rows) > limit else None,
        )
    found: list[IntArray] = []
    count = scanned = scanned_bytes = 0
    part = _FIRST_PART
    while count <= limit and scanned < min(candidates.count, SCAN_EXEMPLARS) and scanned_bytes < SCAN_BYTES:
        rows = candidates.rows(np.arange(scanned, min(scanned + part, candidates.count, SCAN_EXEMPLARS)))
        passing, size = _passing(replay, view, rows, filters)
        found.append(passing)
        count += len(passing)
        scanned, scanned_bytes, part = scanned + len(rows), scanned_bytes + size, min(2 * part, _PART)
    passing = np.concatenate(found) if found else np.empty(0, np.int64)
    last = None
    if count > limit:
        last = passing[limit - 1]
    elif scanned < candidates.count:
        last = candidates.rows(np.array([scanned - 1]))[0]
    return ExemplarPage(
        exemplars=_described(replay, view, passing[:limit]), next=None if last is None else _cursor(layout, last)
    )


def histogram(replay: Replay, view: View, filters: Filters, of: str) -> Histogram:
    """How many of the exemplars there are of each class, of about so many bytes, with about such a value.

    Args:
        replay: reads the packs.
        view: the generation.
        filters: which exemplars are counted.
        of: "class", "task", "bytes", or "field:NAME".

    Raises:
        InvalidRequest: there is no such thing to count.
        Unavailable: the disk does not answer.
    """
    key = "histogram", of, filters
    known = view.remembered.get(key)
    if isinstance(known, Histogram):
        return known
    found = _counted(replay, view, filters, of)
    view.remember(key, found, _REMEMBERED)
    return found


def _counted(replay: Replay, view: View, filters: Filters, of: str) -> Histogram:
    candidates = _Candidates(view.layout, filters)
    if of in (_CLASS, _TASK):
        totals = Counter[int]()
        for rows in _parts(candidates, np.arange(candidates.count)) if filters.examines else ():
            passing, _ = _passing(replay, view, rows, filters)
            totals.update(_tally(getattr(view.layout.locate(passing), _COLUMNS[of])))
        if not filters.examines:
            totals = _run_totals(view.layout, filters, of)
        largest = sorted(totals.most_common(MAX_BINS))
        bins = [Bin(value=value, exemplars=count) for value, count in largest]
        return _histogram(of, bins, candidates.count, totals.total())
    if of == _BYTES:
        parts = _parts(candidates, np.arange(candidates.count))
        sizes = [size for rows in parts for size in _taken(replay, view, rows, filters, Exemplars.sizes_of)]
        values = np.concatenate(sizes).astype(np.int64) if sizes else np.empty(0, np.int64)
        return _histogram(of, _octaves(values), candidates.count, len(values))
    if not of.startswith(_FIELD):
        raise InvalidRequest(f"of is one of class, task, bytes and field:NAME, got {of[:40]!r}")
    return _of_field(replay, view, filters, of, candidates)


def _of_field(replay: Replay, view: View, filters: Filters, of: str, candidates: _Candidates) -> Histogram:
    schema = view.schema
    field = scalar(schema, of.removeprefix(_FIELD))
    step = max(1, -(-candidates.count // COUNTED_FIELDS))
    texts, values = Counter[bytes](), []

    def take(exemplars: Exemplars, places: IntArray) -> tuple[list[bytes], list[npt.NDArray[Any]]]:
        cells: list[bytes] = []
        columns: list[npt.NDArray[Any]] = []
        for _, data, starts, lengths in records(exemplars, places):
            at, sizes = schema.find(field.name, data, starts, lengths)
            at, sizes = at[at >= 0], sizes[at >= 0]
            if field.dtype == TEXT:
                cells += [data[s:e].tobytes() for s, e in zip(at.tolist(), (at + sizes).tolist(), strict=True)]
            else:
                columns.append(numbers(field, data, at))
        return cells, columns

    for rows in _parts(candidates, np.arange(0, candidates.count, step)):
        for cells, columns in _taken(replay, view, rows, filters, take):
            texts.update(cells)
            values += columns
    if field.dtype == TEXT:
        common = texts.most_common(_TEXTS)
        bins = [Bin(value=text.decode(errors="replace"), exemplars=count) for text, count in common]
        return _histogram(of, bins, candidates.count, texts.total())
    found = np.concatenate(values) if values else np.empty(0)
    return _histogram(of, _numbers(found), candidates.count, len(found))


_COLUMNS = {_CLASS: "class_ids", _TASK: "tasks"}


def _histogram(of: str, bins: list[Bin], exemplars: int, counted: int) -> Histogram:
    others = counted - sum(each.exemplars for each in bins)
    return Histogram(of=of, bins=bins, exemplars=exemplars, counted=counted, others=others)


def _run_totals(layout: Layout, filters: Filters, of: str) -> Counter[int]:
    begins, counts = layout.stretches(filters.task, filters.class_id)
    labels = getattr(layout.locate(begins), _COLUMNS[of])
    values, places = np.unique(labels, return_inverse=True)
    return Counter(dict(zip(values.tolist(), np.bincount(places, counts).astype(int).tolist(), strict=True)))


def _tally(values: IntArray) -> dict[int, int]:
    found, counts = np.unique(values, return_counts=True)
    return dict(zip(found.tolist(), counts.tolist(), strict=True))


def _octaves(sizes: IntArray) -> list[Bin]:
    """Four bins for each doubling, from the smallest to the largest; each holds from `low` to below `high`."""
    if not len(sizes):
        return []
    first, last = (np.log2(np.array([sizes.min(), sizes.max() + 1])) * _BINS_PER_OCTAVE).tolist()
    edges = np.unique(np.ceil(2 ** (np.arange(int(first), int(last) + 2) / _BINS_PER_OCTAVE)).astype(np.int64))
    return _between(sizes, edges)


def _numbers(values: npt.NDArray[Any]) -> list[Bin]:
    """A bin for each of a few values, or equal ones from smallest to largest; infinities and NaN are in none."""
    if values.dtype.kind == "f":
        values = values[np.isfinite(values)]
    few, counts = np.unique(values, return_counts=True)
    if values.dtype.kind == "b" or len(few) <= _NUMBERS:
        return [Bin(value=value, exemplars=n) for value, n in zip(few.tolist(), counts.tolist(), strict=True)]
    low, high = float(few[0]), float(few[-1])
    if values.dtype.kind in "iu":
        edges = np.unique(np.linspace(low, high + 1, _NUMBERS + 1).round())
    else:
        # Edges are values that the field can have, so that filters by them cut where the bins do. The largest value
        # lies in the last bin, not on its end.
        edges = np.linspace(low, high, _NUMBERS + 1).astype(values.dtype)
        edges[-1] = np.nextafter(edges[-1], np.array(np.finfo(values.dtype).max))
        edges = np.unique(edges).astype(np.float64)
    return _between(values.astype(np.float64), edges)


def _between(values: npt.NDArray[Any], edges: npt.NDArray[Any]) -> list[Bin]:
    counts = np.bincount(np.searchsorted(edges, values, side="right"), minlength=len(edges) + 1)[1 : len(edges)]
    limits = zip(edges[:-1].tolist(), edges[1:].tolist(), counts.tolist(), strict=True)
    return [Bin(low=low, high=high, exemplars=count) for low, high, count in limits]


def _parts(candidates: _Candidates, places: IntArray) -> Iterator[IntArray]:
    for at in range(0, len(places), _PART):
        yield candidates.rows(places[at : at + _PART])


def _passing(replay: Replay, view: View, rows: IntArray, filters: Filters) -> tuple[IntArray, int]:
    """Those of these global rows, ascending, that pass; and how many bytes of fields were read for it."""

    def look(exemplars: Exemplars, own: IntArray, places: IntArray) -> tuple[IntArray, int]:
        is_read = bool(filters.where) and exemplars.record_lengths is not None
        read = int(exemplars.record_lengths[places].sum(dtype=np.int64)) if is_read else 0  # type: ignore[index]
        return own[filters.mask(exemplars, places)], read

    found = list(_from_packs(replay, view, rows, look))
    passing = [own + view.layout.pack_starts[at] for at, (own, _) in found]
    return (np.concatenate(passing) if passing else np.empty(0, np.int64)), sum(read for _, (_, read) in found)


def _taken(
    replay: Replay, view: View, rows: IntArray, filters: Filters, take: Callable[[Exemplars, IntArray], _T]
) -> Iterator[_T]:
    """What `take` makes of those exemplars of each pack that pass."""
    if filters.examines:
        rows, _ = _passing(replay, view, rows, filters)
    for _, taken in _from_packs(replay, view, rows, lambda exemplars, _, places: take(exemplars, places)):
        yield taken


def _from_packs(
    replay: Replay, view: View, rows: IntArray, use: Callable[[Exemplars, IntArray, IntArray], _T]
) -> Iterator[tuple[int, _T]]:
    """What `use` makes of each pack's exemplars, its rows that are intact, and their places; with the pack's place."""
    for at, own in _cut(view.layout.locate(rows)):

        def look(loaded: list[LoadedPack], own: IntArray = own) -> _T | None:
            exemplars, places = loaded[0].exemplars, loaded[0].places(own)
            is_intact = places >= 0
            return None if exemplars is None else use(exemplars, own[is_intact], places[is_intact])

        found = replay.cache.read([(view.digests[at], view.counts[at])], look)
        if found is not None:
            yield at, found


def _cut(chosen: Plan) -> Iterator[tuple[int, IntArray]]:
    """The packs, by their places in the manifest, and the rows of each."""
    ends = [*(np.flatnonzero(np.diff(chosen.packs)) + 1).tolist(), len(chosen.rows)]
    first = 0
    for end in ends if len(chosen.rows) else ():
        yield int(chosen.packs[first]), chosen.rows[first:end]
        first = end


def _described(replay: Replay, view: View, rows: IntArray) -> list[Exemplar]:
    chosen, ranks = view.layout.locate(rows), view.layout.ranks(rows).tolist()
    class_ids, tasks = chosen.class_ids.tolist(), chosen.tasks.tolist()
    found: list[Exemplar] = []
    for at, own in _cut(chosen):
        digest, quality = view.digests[at], view.quality(at)

        def describe(loaded: list[LoadedPack], own: IntArray = own) -> tuple[list[int], list[str | None]]:
            exemplars, places = loaded[0].exemplars, loaded[0].places(own)
            if exemplars is None:
                return [0] * len(own), [None] * len(own)
            sizes = np.where(places < 0, 0, exemplars.sizes_of(np.maximum(places, 0)))
            keys = keys_of(exemplars, places[places >= 0].tolist())
            return sizes.tolist(), [keys.get(place) for place in places.tolist()]

        sizes, keys = replay.cache.read([(digest, view.counts[at])], describe)
        for row, size, key in zip(own.tolist(), sizes, keys, strict=True):
            n = len(found)
            found.append(
                Exemplar(
                    pack=digest,
                    row=row,
                    task=tasks[n],
                    class_id=class_ids[n],
                    rank=ranks[n],
                    bytes=size,
                    quality=quality,
                    key=key,
                )
            )
    return found


def _cursor(layout: Layout, row: np.int64) -> str:
    rows = np.array([row])
    place = layout.locate(rows)
    return f"{place.tasks[0]}.{place.class_ids[0]}.{layout.ranks(rows)[0]}"
