"""Replay: draws, exports and single exemplars of a generation, out of packs that are kept open or in memory.

A generation never changes, so everything that is derived from it is computed once and kept while it is in use: the
layout that draws are planned on, the indexes of its packs, their bytes as far as they fit. `peek` and
`draw(may_load=False)` answer from memory alone, so the route can call them on the event loop and needs no thread.

Every draw asks the database whether the generation still is one: the buffer may have been deleted, or made anew under
the same name, or the generation collected. Exemplars whose bytes are damaged are left out and counted.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from engram import batch, packs, strip, tar
from engram.draw import STRATEGIES, IntArray, Layout, Plan, Request, plan
from engram.errors import InvalidRequest, NotFound, Unavailable
from engram.fields import KEY, Cell, Schema
from engram.packs import LoadedPack, PackCache
from engram.schemas import PackEntry
from engram.strip import Exemplars, Loose

from . import buffers
from .answers import LARGE_BYTES
from .buffers import DrawnFrom
from .database import Database
from .settings import Settings
from .tables import BufferRow

MAX_VIEW_BYTES = 2**27
"""Of generations and the indexes of their packs; those not asked for longest are let go, the last one never."""

IDLE_S = 600.0
"""A generation that nobody draws from for so long is let go."""

IDLE_SUPERSEDED_S = 60.0
"""The same for one that has a successor."""

MAX_SUPERSEDED = 16
"""Generations of one buffer that are kept beside its newest: each may have all its packs in memory for itself."""

EXPORT_BYTES = 2**20
"""Of exemplars that an export holds at once; its answer takes a few times that."""

Write = Callable[[Sequence[batch.Part]], bytes]
FloatArray = npt.NDArray[np.float64]
Collect = Callable[[dict[int, strip.Exemplars], Plan, batch.IntArray], list[batch.Part]]

_PIECE_ROWS = 4096

_BUFFER = "SELECT generation, oldest_generation, created_at FROM buffers WHERE name = ?"

# A string of 64 characters and its place in three lists.
_PACK_BYTES = 137


class View:
    """One generation, ready to draw from."""

    def __init__(
        self,
        buffer: str,
        generation: int,
        created_at: float,
        held: Sequence[DrawnFrom | PackEntry],
        fields: Mapping[str, str] | None = None,
    ) -> None:
        self.buffer = buffer
        self.generation = generation
        self.created_at = created_at
        self.layout = Layout(held)
        self.digests = [pack.digest for pack in held]
        self.counts = [pack.exemplars for pack in held]
        self.largest = 0
        """Bytes of the largest exemplar that was met in its packs so far."""
        self._rest = [(pack.task, pack.quality, pack.bytes) for pack in held]
        self._class_bytes = [size for pack in held if isinstance(pack, DrawnFrom) for size in pack.class_bytes]
        self.schema = Schema.declare(fields or {})
        self.remembered: dict[tuple[object, ...], object] = {}
        """What was computed of the generation once: see `listing`, `maps`."""
        self.used_at = time.monotonic()

    def remember(self, key: tuple[object, ...], value: object, most: int) -> None:
        """It is found under the key from now on, with at most so many others whose keys begin alike."""
        alike = [other for other in list(self.remembered) if other[0] == key[0]]
        for other in alike[: max(0, len(alike) - most + 1)]:
            self.remembered.pop(other, None)
        self.remembered[key] = value

    @property
    def bytes(self) -> int:
        """Memory it takes, roughly."""
        return self.layout.bytes + _PACK_BYTES * len(self.digests)

    def run_bytes(self) -> FloatArray:
        """The mean bytes of an exemplar of each run of the layout; zeros where that is not known."""
        sizes = np.array(self._class_bytes, np.float64)
        counts = self.layout.run_counts
        return sizes / np.maximum(counts, 1) if len(sizes) == len(counts) else np.zeros(len(counts))

    def quality(self, place: int) -> int:
        """That of a pack's exemplars."""
        return self._rest[place][1]

    def entry(self, place: int) -> PackEntry:
        """A pack as the manifest lists it."""
        task, quality, size = self._rest[place]
        return PackEntry(
            digest=self.digests[place],
            task=task,
            bytes=size,
            exemplars=self.counts[place],
            quality=quality,
            runs=self.layout.runs(place),
        )


class Picked(NamedTuple):
    """A draw that is planned and not made yet. `bytes` are about those of the answer that `write` makes of it."""

    view: View
    chosen: Plan
    write: Write
    bytes: int


@dataclass(frozen=True)
class Drawn:
    """The answer to a draw. `damaged` counts exemplars that were chosen and could not be read."""

    body: bytes
    generation: int
    exemplars: int
    damaged: int


Note = Callable[[View, IntArray, int, int], None]
"""Called with the runs of the layout that an answer's exemplars are of, its bytes, and how many were damaged."""


class Replay:
    """Draws from the generations of all buffers. Safe to call from any thread; `note` learns of every draw."""

    def __init__(
        self,
        database: Database,
        cache: PackCache,
        settings: Settings,
        note: Note = lambda view, runs, size, damaged: None,
    ) -> None:
        self.note = note
        self.database = database
        self.cache = cache
        self.settings = settings
        # What need not be weighed exemplar by exemplar.
        self._small_bytes = min(LARGE_BYTES, settings.max_answer_bytes)
        self._views: dict[tuple[str, int], View] = {}
        self._lock = threading.Lock()

    def warm(self) -> None:
        """What the first draw would import, compile and connect is there: it would take longer than the draw."""
        with self.database.reading() as session:
            buffers.packs_to_draw_from(session, "", 0)
            session.get(BufferRow, "")
        self.peek("", None)
        some = strip.encode(np.zeros((2, 8, 8, 3), np.uint8), [0, 1], quality=50)
        layout = Layout([DrawnFrom("", 0, 2, 50, 0, [[0, 1], [1, 1]])])
        for strategy in STRATEGIES:
            batch.assemble(packs.collect([some], plan(layout, Request(1, strategy=strategy))))

    def peek(self, buffer: str, generation: int | None) -> View | None:
        """The generation if it is kept and still is one; never waits for database or disk."""
        row = self.database.glance(_BUFFER, buffer)
        if row is None:
            return None
        newest, oldest, created_at = row
        wanted = newest if generation is None else generation
        view = self._views.get((buffer, wanted))
        if view is None or view.created_at != created_at or not oldest <= wanted <= newest:
            return None
        view.used_at = time.monotonic()
        return view

    def view(self, buffer: str, generation: int | None) -> View:
        """A generation, None being the current one.

        Raises:
            NotFound: there is no such buffer, or the generation is yet to come or was collected.
        """
        with self.database.reading() as session:
            row = buffers.find(session, buffer)
            wanted = row.generation if generation is None else generation
            buffers.check_generation(row, wanted)
            known = self._views.get((buffer, wanted))
            if known is None or known.created_at != row.created_at:
                held = buffers.packs_to_draw_from(session, buffer, wanted)
                known = View(buffer, wanted, row.created_at, held, row.fields)
        known.used_at = time.monotonic()
        self._keep(known)
        self._let_go(buffer, row.oldest_generation)
        return known

    def forget(self, buffer: str) -> None:
        """Nothing is kept of the buffer: it was deleted, and its name may soon mean another one."""
        with self._lock:
            for key in [key for key in self._views if key[0] == buffer]:
                self._drop(key)

    def draw(
        self,
        view: View,
        request: Request,
        write: Write = batch.assemble,
        *,
        may_load: bool = True,
    ) -> Drawn | None:
        """What the request asks for, as `write` makes it.

        Without `may_load` it is None if not all of it is in memory, or it is large.

        Raises:
            InvalidRequest: more exemplars, or more bytes, than one answer may hold.
            NotFound: a task is not in this generation, or it was collected meanwhile.
            Conflict: there is nothing to draw from.
            Unavailable: every chosen exemplar is damaged, or the disk does not answer.
        """
        self._check_size(view.layout, request)
        chosen = plan(view.layout, request)
        touched = list(dict.fromkeys(chosen.packs.tolist()))
        loaded = self.cache.peek([view.digests[index] for index in touched])
        if loaded is None or len(chosen.rows) * max([found.largest for found in loaded], default=0) > self._small_bytes:
            return self.make(self._weigh(view, chosen, write)) if may_load else None
        return self._drawn(view, _draw(view, chosen, touched, loaded, batch.collect), write)

    def pick(self, view: View, request: Request, write: Write = batch.assemble) -> Picked:
        """What the request asks for, to be made by `make` when there is room for so much.

        Raises:
            InvalidRequest: more exemplars, or more bytes, than one answer may hold.
            NotFound, Conflict, Unavailable: as `draw`.
        """
        self._check_size(view.layout, request)
        return self._weigh(view, plan(view.layout, request), write)

    def make(self, picked: Picked) -> Drawn:
        """The answer.

        Raises:
            NotFound, Unavailable: as `draw`.
        """
        view, chosen, write, _ = picked
        touched = list(dict.fromkeys(chosen.packs.tolist()))
        loaded = self.cache.peek([view.digests[index] for index in touched])
        if loaded is not None:
            drawn = _draw(view, chosen, touched, loaded, batch.collect)
        else:
            wanted = [(view.digests[index], view.counts[index]) for index in touched]
            drawn = self.cache.read(wanted, lambda opened: _draw(view, chosen, touched, opened, packs.collect))
        return self._drawn(view, drawn, write)

    def _drawn(self, view: View, drawn: tuple[list[batch.Part], Plan, int], write: Write) -> Drawn:
        parts, intact, missing = drawn
        if missing:
            self._check_stands(view)
        if missing and not parts:
            raise Unavailable(f"all {missing} exemplars of this draw are damaged on disk; /healthz names the packs")
        body = write(parts)
        self.note(view, intact.runs, len(body), missing)
        return Drawn(body, view.generation, len(intact.rows), missing)

    def _weigh(self, view: View, chosen: Plan, write: Write) -> Picked:
        """The draw, weighed before a byte of it is read.

        Raises:
            InvalidRequest: the answer would be too large.
        """
        touched = list(dict.fromkeys(chosen.packs.tolist()))
        loaded = [self.cache.get(view.digests[index], view.counts[index]) for index in touched]
        count = len(chosen.rows)
        view.largest = max([view.largest, *(found.largest for found in loaded)])
        size = count * (view.largest + _EXTRA_BYTES[write])
        if size > self._small_bytes and count:
            ends = np.append(np.flatnonzero(np.diff(chosen.packs)) + 1, count)
            starts = np.append(0, ends[:-1])
            drawn = zip(loaded, starts.tolist(), ends.tolist(), strict=True)
            size = sum(_bytes_of(found, chosen.rows[start:end], _EXTRA_BYTES[write]) for found, start, end in drawn)
        most = self.settings.max_answer_bytes
        if size > most:
            fits = most * count // size
            raise InvalidRequest(
                f"this draw of {count} exemplars has about {size} bytes, and ENGRAM_MAX_ANSWER_BYTES allows {most} in "
                f"one answer: about {fits} of these exemplars fit; draw fewer at a time",
                max_answer_bytes=most,
                answer_bytes=size,
                fits=fits,
            )
        return Picked(view, chosen, write, size)

    def export(self, view: View) -> Iterator[bytes]:
        """Every exemplar of the generation as a WebDataset tar of stand-alone JPEGs, a piece in memory at a time.

        Raises:
            Unavailable: the disk does not answer. (Raised at the first chunk if it is the first pack.)
        """
        return tar.write_encoded(_files(self._every_piece(view)))

    def jpeg(self, entry: PackEntry, row: int) -> bytes:
        """One exemplar as a stand-alone JPEG.

        Raises:
            NotFound: the pack has no such row.
            Unavailable: the row is damaged, or the disk does not answer.
        """
        return next(self.one(entry, row).files())

    def fields(self, entry: PackEntry, row: int) -> dict[str, Cell]:
        """What one exemplar has in each field.

        Raises:
            NotFound: the pack has no such row.
            Unavailable: the row is damaged, or the disk does not answer.
        """
        return {name: column[0] for name, column in self.one(entry, row).fields().items()}

    def one(self, entry: PackEntry, row: int) -> Loose:
        """One exemplar."""
        if not 0 <= row < entry.exemplars:
            raise NotFound(f"pack {entry.digest} has rows 0..{entry.exemplars - 1}, not {row}", row=row)

        def one(loaded: list[LoadedPack]) -> Loose:
            place = loaded[0].places(np.array([row], np.int64))
            if loaded[0].exemplars is None or place.item() < 0:
                raise Unavailable(f"row {row} of pack {entry.digest} is damaged on disk", digest=entry.digest, row=row)
            return packs.pick(loaded[0].exemplars, place)

        return self.cache.read([(entry.digest, entry.exemplars)], one)

    def _keep(self, view: View) -> None:
        key = view.buffer, view.generation
        with self._lock:
            known = self._views.get(key)
            if known is not view:
                self.cache.hold(view.digests)
                if known is not None:
                    self.cache.release(known.digests)
                self._views[key] = view

    def _let_go(self, buffer: str, oldest_generation: int) -> None:
        """Generations that were collected, that nobody has asked for of late, or that are too many."""
        now = time.monotonic()
        with self._lock:
            newest = dict(sorted(self._views))
            for key, view in list(self._views.items()):
                idle_s = IDLE_S if newest[key[0]] == key[1] else IDLE_SUPERSEDED_S
                if now - view.used_at > idle_s or (key[0] == buffer and key[1] < oldest_generation):
                    self._drop(key)
            unused = sorted(self._views, key=lambda key: self._views[key].used_at)
            older = [key for key in unused if key[0] == buffer and key[1] != newest[buffer]]
            for key in older[: max(0, len(older) - MAX_SUPERSEDED)]:
                self._drop(key)
            room = MAX_VIEW_BYTES - sum(view.bytes for view in self._views.values())
            while len(self._views) > 1 and self.cache.index_bytes > room:
                room += self._drop(min(self._views, key=lambda key: self._views[key].used_at))

    def _drop(self, key: tuple[str, int]) -> int:
        """It is let go; returns the bytes it took."""
        view = self._views.pop(key)
        self.cache.release(view.digests)
        return view.bytes

    def _check_stands(self, view: View) -> None:
        """Returns if the generation still is one: of a collected one the packs may well be gone.

        Raises:
            NotFound: it was collected meanwhile, or its buffer deleted.
        """
        with self.database.reading() as session:
            buffers.check_generation(buffers.find(session, view.buffer), view.generation)

    def _check_size(self, layout: Layout, request: Request) -> None:
        groups = 1
        if request.strategy == "per_task":
            groups = len(layout.groups("task", request.tasks, request.exclude_tasks).sizes)
        answer, drawn = request.size * groups, request.size * request.world_size * groups
        for name, count in ("max_draw", answer), ("max_global_draw", drawn):
            most = getattr(self.settings, name)
            if count > most:
                what = "this draw" if name == "max_draw" else "the global batch of all ranks"
                raise InvalidRequest(
                    f"{what} has {count} exemplars, at most {most} are allowed; draw fewer at a time, or raise "
                    f"ENGRAM_{name.upper()}",
                    **{name: most},
                )

    def _every_piece(self, view: View) -> Iterator[Loose]:
        for digest, count in zip(view.digests, view.counts, strict=True):
            self.cache.hold([digest])
            try:
                first = 0
                while first < count:
                    found, first = self.cache.read([(digest, count)], partial(_piece, first=first, count=count))
                    if found is not None:
                        yield found
            finally:
                self.cache.release([digest])


def _draw(
    view: View, chosen: Plan, touched: list[int], loaded: list[LoadedPack], collect: Collect
) -> tuple[list[batch.Part], Plan, int]:
    """What is intact of the chosen exemplars, and how many are not; `touched` are the places of the packs `loaded`."""
    places, lost = chosen.rows, 0
    if any(found.rows is not None for found in loaded):
        places = np.concatenate(
            [found.places(chosen.rows[chosen.packs == at]) for at, found in zip(touched, loaded, strict=True)]
        )
        intact = places >= 0
        lost = len(places) - int(intact.sum())
        chosen, places = Plan(*(column[intact] for column in chosen)), places[intact]
    held = {at: found.exemplars for at, found in zip(touched, loaded, strict=True) if found.exemplars is not None}
    return (collect(held, chosen, places) if len(places) else []), chosen, lost


def _bytes_of(loaded: LoadedPack, rows: IntArray, extra_bytes: int) -> int:
    """What these rows of a pack, as far as they are intact, add to an answer."""
    places = loaded.places(rows)
    places, found = places[places >= 0], loaded.exemplars
    if found is None:
        return 0
    records = 0 if found.record_lengths is None else int(found.record_lengths[places].sum(dtype=np.int64))
    return int(found.lengths[places].sum(dtype=np.int64)) + records + extra_bytes * len(places)


def _piece(loaded: list[LoadedPack], *, first: int, count: int) -> tuple[Loose | None, int]:
    """The exemplars from this row on that make up about `EXPORT_BYTES`, and the row after them."""
    (pack,) = loaded
    rows = np.arange(first, min(first + _PIECE_ROWS, count))
    places = pack.places(rows)
    rows, places = rows[places >= 0], places[places >= 0]
    if pack.exemplars is None or not len(rows):
        return None, first + _PIECE_ROWS
    sizes = pack.exemplars.lengths[places].astype(np.int64)
    if pack.exemplars.record_lengths is not None:
        sizes += pack.exemplars.record_lengths[places]
    some = max(1, int(np.searchsorted(np.cumsum(sizes), EXPORT_BYTES, side="right")))
    after = first + _PIECE_ROWS if some >= len(rows) else int(rows[some])
    return packs.pick(pack.exemplars, places[:some]), after


def tar_of(parts: Sequence[batch.Part]) -> bytes:
    """The exemplars of a draw as a WebDataset tar of stand-alone JPEGs."""
    return b"".join(tar.write_encoded(_files(part.exemplars for part in parts)))


_EXTRA_BYTES: dict[Write, int] = {batch.assemble: 32, batch.picture: 8, tar_of: 4096}
"""What each form of a draw adds to an exemplar, at most or about: marks and checksums; a head, two headers, padding."""


def _files(packs: Iterable[Loose]) -> Iterator[tuple[str, bytes, int, dict[str, Cell]]]:
    for exemplars in packs:
        columns = exemplars.fields()
        for index, (file, class_id) in enumerate(zip(exemplars.files(), exemplars.class_ids.tolist(), strict=True)):
            yield "jpg", file, class_id, {name: column[index] for name, column in columns.items()}


def keys_of(exemplars: Exemplars, places: list[int]) -> dict[int, str]:
    """The keys of some exemplars, if their buffer keeps keys."""
    if not exemplars.schema.has_key:
        return {}
    keys = packs.pick(exemplars, np.array(places, np.int64)).fields(frozenset({KEY}))[KEY]
    return {place: str(key) for place, key in zip(places, keys, strict=True)}
