"""Replay: draws, exports and single exemplars of a generation, out of cached packs.

A generation never changes, so everything that is derived from it is computed once and kept: its manifest, the layout
that draws are planned on, the parsed packs. `peek` and `draw(may_load=False)` answer from these alone, so the route can
call them on the event loop instead of hiring a thread.

The database is asked again for a kept generation once a second: the buffer may have been deleted, or made anew under
the same name, or the generation collected. Exemplars whose bytes are damaged are left out and counted.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

import numpy as np

from engram import batch, tar
from engram.draw import Layout, Plan, Request, plan
from engram.errors import InvalidRequest, NotFound, Unavailable
from engram.fields import KEY, Cell
from engram.schemas import Exemplar, ExemplarPage, Manifest, PackEntry
from engram.strip import Exemplars, Loose

from . import buffers
from .database import Database
from .settings import Settings
from .storage import PackCache

RECHECK_S = 1.0
"""How long a generation is answered without asking the database whether it still is one."""

Write = Callable[[Sequence[batch.Part]], bytes]

MAX_VIEWS = 256
"""Generations kept: some kilobytes each, a few per buffer that is being replayed."""


@dataclass(eq=False)
class View:
    """One generation, ready to draw from."""

    manifest: Manifest
    created_at: float
    layout: Layout = field(init=False)
    digests: list[str] = field(init=False)
    checked_at: float = field(init=False)

    def __post_init__(self) -> None:
        self.layout = Layout(self.manifest.packs)
        self.digests = [entry.digest for entry in self.manifest.packs]
        self.checked_at = time.monotonic()

    @property
    def is_fresh(self) -> bool:
        """True while it need not be compared with the database."""
        return time.monotonic() - self.checked_at < RECHECK_S


@dataclass(frozen=True)
class Drawn:
    """The answer to a draw. `damaged` counts exemplars that were chosen and could not be read."""

    body: bytes
    generation: int
    exemplars: int
    damaged: int


class Replay:
    """Draws from the generations of all buffers. Safe to call from any thread."""

    def __init__(self, database: Database, cache: PackCache, settings: Settings) -> None:
        self.database = database
        self.cache = cache
        self.settings = settings
        self._views: OrderedDict[tuple[str, int], View] = OrderedDict()
        self._lock = threading.Lock()

    def peek(self, buffer: str, generation: int | None) -> View | None:
        """The generation if it is known and fresh; never waits for database or disk."""
        if generation is None:
            generation = self.database.glance("SELECT generation FROM buffers WHERE name = ?", buffer)
        if generation is None:
            return None
        view = self._views.get((buffer, generation))
        return view if view is not None and view.is_fresh else None

    def view(self, buffer: str, generation: int | None) -> View:
        """A generation, None being the current one.

        Raises:
            NotFound: there is no such buffer, or the generation is yet to come or was collected.
        """
        with self.database.reading() as session:
            row = buffers.find(session, buffer)
            wanted = row.generation if generation is None else generation
            known = self._views.get((buffer, wanted))
            if known is None or known.created_at != row.created_at or wanted < row.oldest_generation:
                known = View(buffers.manifest(session, buffer, wanted), row.created_at)
        known.checked_at = time.monotonic()
        with self._lock:
            self._views[buffer, wanted] = known
            self._views.move_to_end((buffer, wanted))
            while len(self._views) > MAX_VIEWS:
                self._views.popitem(last=False)
        return known

    def forget(self, buffer: str) -> None:
        """Nothing is kept of the buffer: it was deleted, and its name may soon mean another one."""
        with self._lock:
            for key in [key for key in self._views if key[0] == buffer]:
                del self._views[key]

    def draw(
        self,
        view: View,
        request: Request,
        write: Write = batch.assemble,
        *,
        may_load: bool = True,
    ) -> Drawn | None:
        """What the request asks for, as `write` makes it; None if packs must be loaded and `may_load` is false.

        Raises:
            InvalidRequest: more exemplars than one answer may hold.
            NotFound: a task is not in this generation.
            Conflict: there is nothing to draw from.
            Unavailable: every chosen exemplar is damaged, or the disk does not answer.
        """
        self._check_size(view.layout, request)
        chosen = plan(view.layout, request)
        touched = list(dict.fromkeys(chosen.packs.tolist()))
        loaded = self.cache.peek([view.digests[index] for index in touched])
        if loaded is None:
            if not may_load:
                return None
            entries = [view.manifest.packs[index] for index in touched]
            loaded = [self.cache.get(entry.digest, entry.exemplars) for entry in entries]
        wanted, places = len(chosen.rows), chosen.rows
        if any(found.rows is not None for found in loaded):
            places = np.concatenate(
                [found.places(chosen.rows[chosen.packs == index]) for index, found in zip(touched, loaded, strict=True)]
            )
            intact = places >= 0
            chosen, places = Plan(*(column[intact] for column in chosen)), places[intact]
            if not len(places):
                raise Unavailable(f"all {wanted} exemplars of this draw are damaged on disk; /healthz names the packs")
        packs = {i: found.exemplars for i, found in zip(touched, loaded, strict=True) if found.exemplars is not None}
        body = write(batch.collect(packs, chosen, places))
        return Drawn(body, view.manifest.generation, len(places), wanted - len(places))

    def export(self, view: View) -> Iterator[bytes]:
        """Every exemplar of the generation as a WebDataset tar of stand-alone JPEGs, one pack in memory at a time.

        Raises:
            Unavailable: the disk does not answer. (Raised at the first chunk if it is the first pack.)
        """
        return tar.write_encoded(_files(self._every_pack(view)))

    def page(
        self, view: View, *, task: int | None, class_id: int | None, limit: int, after: tuple[int, int, int] | None
    ) -> ExemplarPage:
        """Exemplars in order of task, class and rank, those after `after` (task, class id, rank).

        The cursor names a place in that order and not a row, so that paging goes on when a new generation comes.

        Raises:
            Unavailable: the disk does not answer.
        """
        found: list[Exemplar] = []
        for entry in view.manifest.packs:
            if (task is not None and entry.task != task) or (after is not None and entry.task < after[0]):
                continue
            rows = _rows_after(entry, class_id, after if after is not None and entry.task == after[0] else None)
            # One more than the page holds tells whether there is another page.
            found += self._describe(entry, rows, limit + 1 - len(found))
            if len(found) > limit:
                last = found[limit - 1]
                return ExemplarPage(exemplars=found[:limit], next=f"{last.task}.{last.class_id}.{last.rank}")
        return ExemplarPage(exemplars=found, next=None)

    def jpeg(self, entry: PackEntry, row: int) -> bytes:
        """One exemplar as a stand-alone JPEG.

        Raises:
            NotFound: the pack has no such row.
            Unavailable: the row is damaged, or the disk does not answer.
        """
        exemplars, place = self._find(entry, row)
        return exemplars.jpeg(place)

    def fields(self, entry: PackEntry, row: int) -> dict[str, Cell]:
        """What one exemplar has in each field.

        Raises:
            NotFound: the pack has no such row.
            Unavailable: the row is damaged, or the disk does not answer.
        """
        exemplars, place = self._find(entry, row)
        return {name: column[0] for name, column in exemplars.select([place]).fields().items()}

    def _find(self, entry: PackEntry, row: int) -> tuple[Exemplars, int]:
        """A pack's intact exemplars, and which of them is the row."""
        if not 0 <= row < entry.exemplars:
            raise NotFound(f"pack {entry.digest} has rows 0..{entry.exemplars - 1}, not {row}", row=row)
        loaded = self.cache.get(entry.digest, entry.exemplars)
        place = loaded.places(np.array([row], np.int64)).item()
        if loaded.exemplars is None or place < 0:
            raise Unavailable(f"row {row} of pack {entry.digest} is damaged on disk", digest=entry.digest, row=row)
        return loaded.exemplars, place

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

    def _every_pack(self, view: View) -> Iterator[Loose]:
        for entry in view.manifest.packs:
            exemplars = self.cache.get(entry.digest, entry.exemplars).exemplars
            if exemplars is not None:
                yield exemplars.loose()

    def _describe(self, entry: PackEntry, rows: Iterator[tuple[int, int, int]], limit: int) -> list[Exemplar]:
        wanted = list(islice(rows, limit))
        if not wanted:
            return []
        loaded = self.cache.get(entry.digest, entry.exemplars)
        places = loaded.places(np.array([row for row, _, _ in wanted], np.int64)).tolist()
        keys = {} if loaded.exemplars is None else _keys(loaded.exemplars, [place for place in places if place >= 0])
        return [
            Exemplar(
                pack=entry.digest,
                row=row,
                task=entry.task,
                class_id=class_id,
                rank=rank,
                bytes=0 if loaded.exemplars is None or place < 0 else loaded.exemplars.sizes.item(place),
                quality=entry.quality,
                key=keys.get(place),
            )
            for (row, class_id, rank), place in zip(wanted, places, strict=True)
        ]


def tar_of(parts: Sequence[batch.Part]) -> bytes:
    """The exemplars of a draw as a WebDataset tar of stand-alone JPEGs."""
    return b"".join(tar.write_encoded(_files(part.exemplars for part in parts)))


def _files(packs: Iterable[Loose]) -> Iterator[tuple[str, bytes, int, dict[str, Cell]]]:
    for exemplars in packs:
        columns = exemplars.fields()
        for index, (file, class_id) in enumerate(zip(exemplars.files(), exemplars.class_ids.tolist(), strict=True)):
            yield "jpg", file, class_id, {name: column[index] for name, column in columns.items()}


def _keys(exemplars: Exemplars, places: list[int]) -> dict[int, str]:
    """The keys of some exemplars, if their buffer keeps keys."""
    if not exemplars.schema.has_key:
        return {}
    keys = exemplars.select(places).fields(frozenset({KEY}))[KEY]
    return {place: str(key) for place, key in zip(places, keys, strict=True)}


def _rows_after(
    entry: PackEntry, class_id: int | None, after: tuple[int, int, int] | None
) -> Iterator[tuple[int, int, int]]:
    """(row, class id, rank) of a pack's exemplars in order, those after (task, class id, rank)."""
    start = 0
    for run_class, count in entry.runs:
        first = 0
        if after is not None and run_class <= after[1]:
            first = count if run_class < after[1] else min(after[2] + 1, count)
        if class_id is None or class_id == run_class:
            yield from ((start + rank, run_class, rank) for rank in range(first, count))
        start += count
