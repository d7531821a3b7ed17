"""The mirror: a local copy of a buffer's packs, so that replay needs no request per minibatch.

    FOLDER/manifest.json     the generation that is mirrored, and when its buffer was created
    FOLDER/packs/DIGEST      its packs, named by their SHA-256

`refresh` brings it to the newest generation: one conditional request when nothing changed, and only new packs are
fetched when something did. Draws are the service's pure function over the same packs: equal arguments at equal
generations give equal bytes. Packs are held in memory, verified against their names when they are loaded.

Files appear by rename, packs before the manifest that names them, so a process killed at any time leaves a mirror that
the next one can use. Several processes may share a folder.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import pydantic

from engram import batch, forks, pack
from engram.client import Client
from engram.draw import Layout, Request, plan
from engram.errors import NotFound, StripCorrupt
from engram.schemas import Manifest, Model, Strategy
from engram.strip import Exemplars

# A commit may replace packs between the manifest and their download; one after the other, some ten times is hopeless.
_ATTEMPTS = 10


class _Saved(Model):
    """manifest.json. A buffer made anew under an old name counts generations from the start, so its birth matters."""

    created_at: datetime
    manifest: Manifest


@dataclass(frozen=True, eq=False)
class Snapshot:
    """One generation, complete and immutable: what a draw needs."""

    manifest: Manifest
    layout: Layout
    packs: tuple[Exemplars, ...]

    def parts(self, request: Request) -> list[batch.Part]:
        """What a draw returns; nothing for a rank without a part of an epoch's last step.

        Raises:
            NotFound: a task named in `tasks` holds no exemplar.
            Conflict: nothing to draw from.
        """
        return batch.collect(self.packs, plan(self.layout, request))

    def draw(self, request: Request) -> batch.Batch:
        """The replay minibatch of this request.

        Raises:
            NotFound: a task named in `tasks` holds no exemplar.
            Conflict: nothing to draw from.
        """
        parts = self.parts(request)
        return batch.from_parts(parts) if parts else batch.empty()


class Mirror:
    """A local copy of a buffer, current when this returns.

    Args:
        client: where packs come from; it must stay open for `refresh`.
        buffer: the buffer's name.
        folder: made if it does not exist; nothing else should be kept there.

    Raises:
        NotFound: no such buffer.
        Unavailable: the service does not answer.
    """

    def __init__(self, client: Client, buffer: str, folder: str | Path) -> None:
        self.buffer = buffer
        self.folder = Path(folder)
        self._client = client
        self._packs = self.folder / "packs"
        self._packs.mkdir(parents=True, exist_ok=True)
        self._refreshing = threading.Lock()
        forks.register(self)
        self._created_at: datetime | None = None
        self._parsed: dict[str, Exemplars] = {}
        saved = self._read_saved()
        if saved is not None and self._use_local(saved.manifest):
            self._created_at = saved.created_at
        else:
            self._snapshot = Snapshot(_nothing(buffer), Layout([]), ())
        self.refresh()

    def __reduce__(self) -> tuple[type[Mirror], tuple[Client, str, Path]]:
        return type(self), (self._client, self.buffer, self.folder)

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
            created_at = self._client.buffer(self.buffer).created_at
            if created_at == self._created_at:
                manifest = self._client.manifest_after(self.buffer, self.generation)
            else:
                manifest = self._client.manifest(self.buffer)
            if manifest is None:
                return False
            self._adopt(self._fetch(manifest))
            self._created_at = created_at
            self._save(_Saved(created_at=created_at, manifest=self.manifest))
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
        chosen = None if tasks is None else tuple(tasks)
        request = Request(size, seed, step, strategy, chosen, tuple(exclude_tasks), rank, world_size)
        return self._snapshot.draw(request)

    def _fetch(self, manifest: Manifest) -> Manifest:
        """All packs of this manifest, or of a newer one that replaced it meanwhile, are in the folder and parsed."""
        for _ in range(_ATTEMPTS):
            try:
                for entry in manifest.packs:
                    if entry.digest not in self._parsed and not self._load(entry.digest):
                        self._parsed[entry.digest] = self._download(entry.digest)
                return manifest
            except NotFound as error:
                missing = error
                manifest = self._client.manifest(self.buffer)
        raise missing

    def _download(self, digest: str) -> Exemplars:
        content = self._client.pack(digest)
        exemplars = pack.parse(content)
        _write(self._packs / digest, content)
        return exemplars

    def _load(self, digest: str) -> bool:
        """Take a pack from the folder; false, which costs a download, if it is missing, damaged or of version 1."""
        try:
            content = (self._packs / digest).read_bytes()
            if pack.digest(content) != digest:
                return False
            self._parsed[digest] = pack.parse(content)
        except (FileNotFoundError, StripCorrupt):
            return False
        return True

    def _use_local(self, manifest: Manifest) -> bool:
        if not all(self._load(entry.digest) for entry in manifest.packs):
            return False
        self._adopt(manifest)
        return True

    def _adopt(self, manifest: Manifest) -> None:
        packs = tuple(self._parsed[entry.digest] for entry in manifest.packs)
        self._snapshot = Snapshot(manifest, Layout(manifest.packs), packs)
        self._parsed = {entry.digest: exemplars for entry, exemplars in zip(manifest.packs, packs, strict=True)}

    def _drop_unnamed(self) -> None:
        for path in self._packs.iterdir():
            if path.name not in self._parsed and not path.name.startswith("."):
                path.unlink(missing_ok=True)

    def _read_saved(self) -> _Saved | None:
        try:
            return _Saved.model_validate_json((self.folder / "manifest.json").read_bytes())
        except (FileNotFoundError, pydantic.ValidationError):
            return None

    def _save(self, saved: _Saved) -> None:
        _write(self.folder / "manifest.json", saved.model_dump_json(indent=1).encode())


def _nothing(buffer: str) -> Manifest:
    return Manifest(buffer=buffer, generation=-1, used_bytes=0, limit_bytes=0, image_shape=None, packs=[])


def _write(path: Path, content: bytes) -> None:
    """The file appears whole or not at all; it is verified when it is read, so nothing waits for the disk."""
    part = path.with_name(f".{path.name[:32]}.{uuid.uuid4().hex}.part")
    try:
        part.write_bytes(content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
