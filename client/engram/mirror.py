"""A local copy of a buffer's packs, so that replay needs no request per minibatch.

    FOLDER/manifest.json     the generation that is mirrored
    FOLDER/packs/            its packs and their indexes (`engram.packs`)

`refresh` brings it to the newest generation: one conditional request when nothing changed. When something did, packs
that only lost the tails of their classes are made from those that are here, and only new ones are fetched, several at a
time. Draws are the service's pure function over the same packs: equal arguments at equal generations give equal bytes.

Packs are verified against their names and kept in memory as far as they fit; of the others a draw reads what it needs,
and an exemplar that does not match its checksum has its pack fetched again.

Files appear by rename, packs before the manifest that names them, so a process killed at any time leaves a mirror that
the next one can use. Several processes may share a folder.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

import pydantic

from engram import batch, files, forks, pack, packs, state
from engram.client import Client
from engram.draw import Layout, Plan, Request, plan
from engram.errors import Conflict, NotFound, StripCorrupt
from engram.packs import Damaged, LoadedPack, PackCache, PackFolder
from engram.schemas import BUFFER_NAME, Answer, Manifest, PackEntry, Strategy
from engram.strip import Exemplars

# A commit may replace packs between the manifest and their download; one after the other, some ten times is hopeless.
_ATTEMPTS = 10

# Packs fetched or read at once: their digests are computed outside Python's lock, and a service answers several.
_THREADS = 4

# What a process that died left of a file; one that is being written is younger.
_ABANDONED_S = 3600.0


_T = TypeVar("_T")


class _Saved(Answer):
    """manifest.json. A folder with `local` is a buffer of its own (`engram.local`) and no mirror."""

    manifest: Manifest
    local: object = None


@dataclass(frozen=True, eq=False)
class Snapshot:
    """One generation, complete: what a draw needs. `repair` replaces a pack that turns out to be damaged on disk."""

    manifest: Manifest
    layout: Layout
    packs: list[Exemplars]
    repair: Callable[[PackEntry], Exemplars] = field(repr=False)
    is_in_memory: bool

    def parts(self, request: Request) -> list[batch.Part]:
        """What a draw returns; nothing for a rank without a part of an epoch's last step.

        Raises:
            NotFound: a task named in `tasks` holds no exemplar.
            Conflict: nothing to draw from.
            Unavailable: a pack is damaged or gone, and the service does not give it again.
        """
        return self._parts(plan(self.layout, request))

    def draw(self, request: Request) -> batch.Batch:
        """The replay minibatch of this request.

        Raises:
            NotFound: a task named in `tasks` holds no exemplar.
            Conflict: nothing to draw from.
            Unavailable: as `parts`.
        """
        return self.read(plan(self.layout, request))

    def read(self, chosen: Plan) -> batch.Batch:
        """The exemplars that a plan names.

        Raises:
            Unavailable: as `parts`.
        """
        parts = self._parts(chosen)
        return batch.from_parts(parts) if parts else batch.empty()

    def _parts(self, chosen: Plan) -> list[batch.Part]:
        if self.is_in_memory:
            return batch.collect(self.packs, chosen)
        for _ in range(_ATTEMPTS):
            try:
                return packs.collect(self.packs, chosen)
            except Damaged as error:
                damaged = error
                for at, entry in enumerate(self.manifest.packs):
                    if entry.digest == error.digest:
                        self.packs[at] = self.repair(entry)
        raise damaged


class Mirror:
    """A local copy of a buffer, current when this returns.

    Args:
        client: where packs come from; it must stay open for `refresh`.
        buffer: the buffer's name.
        folder: made if it does not exist; nothing else should be kept there.
        cache_bytes: of packs in memory; None: 1 GiB, or a quarter of the memory of this process if that is less.

    Raises:
        ValueError: no client, or a name that no buffer has.
        NotFound: no such buffer.
        Conflict: the folder holds a local buffer, or is a file.
        Unavailable: the service does not answer.
    """

    def __init__(self, client: Client, buffer: str, folder: str | Path, *, cache_bytes: int | None = None) -> None:
        _check_order(client, buffer, folder)
        self.buffer = buffer
        self.folder = Path(folder)
        self._client = client
        self._store = PackFolder(self.folder / "packs")
        state.make_folder(self._store.folder)
        self._cache = PackCache(self._store, cache_bytes, eager=True)
        self._refreshing = threading.Lock()
        forks.register(self)
        self._snapshot = self._snapshot_of(_nothing(buffer), [])
        saved = self._read_saved()
        if saved is not None:
            self._use_local(saved)
        self.refresh()

    def __reduce__(self) -> tuple[Callable[[Client, str, Path], Mirror], tuple[Client, str, Path]]:
        make = partial(type(self), cache_bytes=self._cache.max_bytes)
        return make, (self._client, self.buffer, self.folder)

    def after_fork(self) -> None:
        """In a forked process: no thread of the parent's is refreshing here."""
        self._refreshing = threading.Lock()

    @property
    def generation(self) -> int:
        """The generation that is mirrored."""
        return self._snapshot.manifest.generation

    @property
    def manifest(self) -> Manifest:
        """The packs that are mirrored."""
        return self._snapshot.manifest

    def snapshot(self) -> Snapshot:
        """The mirrored generation, which stays as it is when the mirror goes on."""
        return self._snapshot

    def refresh(self) -> bool:
        """The mirror holds the newest generation afterwards; true if that is another one than before.

        Raises:
            NotFound: the buffer is gone.
            Unavailable: the service does not answer; the mirror is as it was.
            StripCorrupt: a pack is damaged, on the way or on the service's disk; the mirror is as it was. Draws from
                the service go on and leave out what is damaged.
        """
        with self._refreshing:
            manifest = self._client.manifest_after(self.buffer, self.manifest)
            if manifest is None:
                return False
            self._adopt(self._fetch(manifest))
            self._save(_Saved(manifest=self.manifest))
            self._drop_unnamed()
            return True

    def draw(
        self,
        size: int,
        *,
        seed: int = 0,
        step: int = 0,
        strategy: Strategy = "uniform",
        tasks: Sequence[int] | None = None,
        exclude_tasks: Sequence[int] = (),
        rank: int = 0,
        world_size: int = 1,
    ) -> batch.Batch:
        """A replay minibatch, equal to `Client.draw` with the same arguments at this generation.

        Raises:
            NotFound: a task named in `tasks` holds no exemplar.
            Conflict: the buffer is empty, or has nothing but the excluded tasks.
            InvalidRequest: a number is out of range.
        """
        request = Request(size, seed, step, strategy, tasks, exclude_tasks, rank, world_size)
        return self._snapshot.draw(request)

    def _fetch(self, manifest: Manifest) -> Snapshot:
        """This generation, or a newer one that replaced it meanwhile, its packs in the folder, open and held."""
        for _ in range(_ATTEMPTS):
            digests = [entry.digest for entry in manifest.packs]
            self._cache.hold(digests)
            try:
                return self._snapshot_of(manifest, self._bring(manifest))
            except BaseException as error:
                self._cache.release(digests)
                if not isinstance(error, NotFound):
                    raise
                gone = error
            manifest = self._client.manifest(self.buffer)
        raise gone

    def _bring(self, manifest: Manifest) -> list[LoadedPack]:
        """The packs of a manifest: from memory, from the folder, from packs that are here, from the service."""
        entries = manifest.packs
        opened = dict(enumerate(at_once(self._local, entries)))
        for at, entry in enumerate(entries):
            opened[at] = opened[at] or self._derive(entry)
        missing = [at for at in opened if opened[at] is None]
        opened |= zip(missing, at_once(self._download, [entries[at] for at in missing]), strict=True)
        return [found for found in opened.values() if found is not None]

    def _local(self, entry: PackEntry) -> LoadedPack | None:
        """The pack if it is here and intact."""
        if not self._cache.peek([entry.digest]) and not self._store.exists(entry.digest):
            return None
        try:
            found = self._cache.get(entry.digest, entry.exemplars)
        except StripCorrupt:  # of version 1, for one
            return None
        return None if found.is_damaged else found

    def _derive(self, entry: PackEntry) -> LoadedPack | None:
        """The pack made from the one of the same task that is here, if it is a prefix of each of its classes."""
        runs = dict(entry.runs)
        for old in self.manifest.packs:
            held = dict(old.runs)
            if old.task != entry.task or any(count > held.get(class_id, 0) for class_id, count in runs.items()):
                continue
            exemplars = self._cache.get(old.digest, old.exemplars).exemplars
            if exemplars is None or old.quality != entry.quality:
                continue
            with suppress(Damaged, ValueError):  # it is damaged: another pack is fetched, or this one again
                content = pack.to_bytes(pack.prefix(exemplars, runs))
                if pack.digest(content) == entry.digest:
                    return self._cache.add(entry.digest, content)
        return None

    def _download(self, entry: PackEntry) -> LoadedPack:
        return self._cache.add(entry.digest, self._client.pack(entry.digest))

    def _repair(self, entry: PackEntry) -> Exemplars:
        found = self._cache.reload(entry.digest, entry.exemplars)
        if found.is_damaged:
            found = self._download(entry)
        assert found.exemplars is not None, "a pack that was added holds some"
        return found.exemplars

    def _use_local(self, saved: _Saved) -> None:
        """The mirror is what the folder holds, unless something there is missing or damaged: then it is fetched."""
        entries = saved.manifest.packs
        digests = [entry.digest for entry in entries]
        self._cache.hold(digests)
        opened = [found for found in at_once(self._local, entries) if found is not None]
        if len(opened) < len(entries):
            self._cache.release(digests)
            return
        self._snapshot = self._snapshot_of(saved.manifest, opened)

    def _adopt(self, snapshot: Snapshot) -> None:
        before, self._snapshot = self._snapshot, snapshot
        self._cache.release(entry.digest for entry in before.manifest.packs)

    def _snapshot_of(self, manifest: Manifest, opened: list[LoadedPack]) -> Snapshot:
        exemplars = [found.exemplars for found in opened if found.exemplars is not None]
        is_in_memory = all(found.in_memory for found in opened)
        return Snapshot(manifest, Layout(manifest.packs), exemplars, self._repair, is_in_memory)

    def _drop_unnamed(self) -> None:
        named = {entry.digest for entry in self.manifest.packs}
        for digest in [digest for digest, _ in self._store.digests() if digest not in named]:
            self._store.delete(digest)
        self._store.sweep(_ABANDONED_S)

    def _read_saved(self) -> _Saved | None:
        try:
            saved = _Saved.model_validate_json((self.folder / "manifest.json").read_bytes())
        except (FileNotFoundError, pydantic.ValidationError):
            if (self.folder / "manifest.copy.json").exists():
                raise self._is_local() from None
            return None
        if saved.local is not None:
            raise self._is_local()
        return saved

    def _is_local(self) -> Conflict:
        return Conflict(f"{self.folder} holds a local buffer, which a mirror would replace; choose another folder")

    def _save(self, saved: _Saved) -> None:
        content = saved.model_dump_json(indent=1, exclude_none=True).encode()
        files.write_whole(self.folder / "manifest.json", content)


def _check_order(client: object, buffer: object, folder: object) -> None:
    """Returns if the arguments are in their places.

    Raises:
        ValueError: they are not.
    """
    if isinstance(client, Client) and isinstance(buffer, str) and BUFFER_NAME.fullmatch(buffer):
        return
    given = ", ".join("client" if isinstance(each, Client) else repr(each) for each in (client, buffer, folder))
    raise ValueError(
        f"a mirror is Mirror(client, buffer, folder), as in Mirror(client, 'cifar', 'cifar-mirror'), not "
        f"Mirror({given}): a buffer's name has lower-case letters, digits, dots, dashes and underscores"
    )


def _nothing(buffer: str) -> Manifest:
    return Manifest(buffer=buffer, generation=-1, used_bytes=0, limit_bytes=0, image_shape=None, packs=[])


def at_once(work: Callable[[PackEntry], _T], entries: Sequence[PackEntry]) -> list[_T]:
    """What `work` gives for each entry, several at a time; after a failure no other one is begun."""
    if len(entries) < 2:
        return [work(entry) for entry in entries]
    with ThreadPoolExecutor(_THREADS) as pool:
        found = [pool.submit(work, entry) for entry in entries]
        try:
            return [future.result() for future in found]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
