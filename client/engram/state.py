"""What a local buffer keeps in its folder, and how a change becomes durable there.

    FOLDER/manifest.json        the generation, and beside it (`LocalState`) what the next change has to know
    FOLDER/manifest.copy.json   the same once more, for the day when the first is damaged
    FOLDER/packs/               its packs and their indexes (`engram.packs`)
    FOLDER/lock                 locked by whoever is changing the buffer

A change writes its packs, then manifest.json, each durably and by rename: that rename is the commit. After it what no
manifest names any more is removed. So a process that is killed leaves the generation before or the one after, complete.
A mirror's folder is the same without `local`, without the copy and without the lock.
"""

from __future__ import annotations

import fcntl
import os
from base64 import b64decode, b64encode
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pydantic

from engram import files, pack, shares
from engram.content import Content, Means, Policy, Task
from engram.errors import Conflict, NotFound, StripCorrupt
from engram.fields import Schema
from engram.packs import PackFolder
from engram.schemas import (
    Answer,
    BufferCreate,
    Decision,
    Manifest,
    PackEntry,
    Per,
    QualityState,
    ShareBy,
    Subsampling,
)

VERSION = 1
"""Of what manifest.json says beside the manifest. A later one is not changed by this library."""


class TaskState(Answer):
    """What is to be known of a task beside its pack.

    `class_bytes` are the bytes of each class in the pack, beside its runs; `means` are `Means.to_bytes`, in base 64.
    """

    seen: dict[int, int]
    class_bytes: list[int]
    decision: Decision | None = None
    means: str | None = None


class LocalState(Answer):
    """What a change has to know of the buffer beside its manifest. `quality` and `quality_is` are as in `Buffer`."""

    version: int
    budget_bytes: int
    per: Per
    share_by: ShareBy
    subsampling: Subsampling
    quality: int | None
    quality_is: QualityState
    next_class_id: int
    is_frozen: bool
    tasks: dict[int, TaskState]


class Saved(Answer):
    """manifest.json. Without `local` the folder is a mirror's."""

    manifest: Manifest
    local: LocalState | None = None

    @property
    def created_at(self) -> datetime:
        """When the buffer was made. Mirrors of services before 0.3 do not know."""
        return self.manifest.created_at or datetime.fromtimestamp(0, UTC)


def new(name: str, wanted: BufferCreate) -> Saved:
    """An empty buffer at generation 0.

    Raises:
        InvalidRequest: it declares fields that there cannot be.
    """
    return Saved(
        manifest=Manifest(
            buffer=name,
            generation=0,
            created_at=datetime.now(UTC),
            used_bytes=0,
            limit_bytes=shares.limit(wanted.budget_bytes, per=wanted.per, classes=0),
            image_shape=None,
            fields=Schema.declare(wanted.fields).declared,
            packs=[],
        ),
        local=LocalState(
            version=VERSION,
            budget_bytes=wanted.budget_bytes,
            per=wanted.per,
            share_by=wanted.share_by,
            subsampling=wanted.subsampling,
            quality=wanted.quality,
            quality_is="provisional" if wanted.quality is None else "fixed",
            next_class_id=0,
            is_frozen=False,
            tasks={},
        ),
    )


def make_folder(folder: Path) -> None:
    """The folder exists.

    Raises:
        Conflict: a file is in its place.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        file = next(path for path in (folder, *folder.parents) if path.exists())
        raise Conflict(
            f"{folder} cannot be a folder of exemplars: {file} is a file; give the path of a folder, or of none yet"
        ) from None


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Inside the block nobody else changes the folder.

    Raises:
        Conflict: somebody else is at it, or it is a file.
    """
    make_folder(folder)
    file = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(file, 20, 0).decode("ascii", "replace") or "another one"
            raise Conflict(
                f"process {holder} is changing the buffer in {folder} just now; one does at a time, try again when it "
                "is done, or give each process a fork of its own"
            ) from None
        try:
            os.ftruncate(file, 0)
            os.pwrite(file, str(os.getpid()).encode(), 0)
            yield
        finally:
            # Not by closing: a process that was forked meanwhile shares the lock.
            fcntl.flock(file, fcntl.LOCK_UN)
    finally:
        os.close(file)


def read(folder: Path) -> Saved | None:
    """What the folder holds; None if there is no buffer.

    Raises:
        StripCorrupt: manifest.json is damaged, or gone while its copy is there.
        Conflict: a later version wrote it.
    """
    try:
        saved = Saved.model_validate_json((folder / "manifest.json").read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        if not (folder / "manifest.copy.json").exists():
            return None
        raise _damaged(folder, "is not there") from None
    except pydantic.ValidationError as error:
        size = (folder / "manifest.json").stat().st_size
        raise _damaged(folder, f"has {size:,} bytes, which are no whole manifest") from error
    if saved.local is not None and saved.local.version > VERSION:
        raise Conflict(
            f"the buffer in {folder} was changed by a later version of Engram (its state is version "
            f"{saved.local.version}, this one knows {VERSION}); install that one"
        )
    return saved


def newest(folder: Path) -> Saved:
    """What the folder holds, in which there has been a buffer.

    Raises:
        NotFound: it is gone.
        StripCorrupt, Conflict: as `read`.
    """
    saved = read(folder)
    if saved is None:
        raise NotFound(f"the buffer in {folder} is gone")
    return saved


def _damaged(folder: Path, what: str) -> StripCorrupt:
    """The error for a manifest that cannot be read, with what is left and what to do."""
    there = {path.name for path in (folder / "packs").glob("*") if len(path.name) == 64}
    try:
        copy = Saved.model_validate_json((folder / "manifest.copy.json").read_bytes())
        held = sum(entry.digest in there for entry in copy.manifest.packs)
        left = (
            f"its copy manifest.copy.json is whole, at generation {copy.manifest.generation}, and {held} of its "
            f"{len(copy.manifest.packs)} packs are there. Put the copy in its place: "
            f"cp {folder}/manifest.copy.json {folder}/manifest.json"
        )
    except (FileNotFoundError, pydantic.ValidationError):
        left = (
            f"and so is its copy manifest.copy.json, but {len(there)} packs are in {folder}/packs. Restore one of the "
            "two from a backup, or add the packs' images to a new buffer: each holds the exemplars of one task "
            "(engram.pack.parse)"
        )
    return StripCorrupt(f"{folder}/manifest.json {what}; {left}")


def missing(packs: Path, manifest: Manifest) -> StripCorrupt:
    """The error for a generation of which a pack has no file."""
    gone = [entry for entry in manifest.packs if not (packs / entry.digest).exists()]
    tasks = ", ".join(str(entry.task) for entry in gone) or "unknown"
    return StripCorrupt(
        f"generation {manifest.generation} in {packs.parent} has {len(manifest.packs)} packs, and {len(gone)} of them "
        f"have no file (task {tasks}): restore them from a backup or a fork, or delete the task",
        digests=[entry.digest for entry in gone],
    )


def check_empty(folder: Path) -> None:
    """Returns if a new buffer in the folder overwrites nothing.

    Raises:
        Conflict: there is something.
    """
    for name in ("manifest.json", "manifest.copy.json"):
        if (folder / name).exists():
            raise Conflict(f"there is a buffer in {folder} already ({name}); choose another folder")
    held = sum(path.suffix != ".index" for path in (folder / "packs").glob("*"))
    if held:
        raise Conflict(
            f"{folder}/packs has {held} files and there is no manifest.json that says what they are; choose another "
            "folder, or remove them"
        )


def local_of(folder: Path, saved: Saved) -> LocalState:
    """What a change has to know.

    Raises:
        Conflict: the folder is a mirror's.
    """
    if saved.local is None:
        raise Conflict(
            f"{folder} mirrors buffer {saved.manifest.buffer!r} of a service: draw from it here, and change it there"
        )
    return saved.local


def content_of(folder: Path, saved: Saved) -> Content:
    """The buffer as `engram.memory` changes it; packs are read when a task's exemplars are asked for."""
    local, manifest = local_of(folder, saved), saved.manifest
    entries = {entry.task: entry for entry in manifest.packs}
    store = PackFolder(folder / "packs")
    return Content(
        Policy(
            local.budget_bytes,
            local.per,
            local.share_by,
            local.subsampling,
            quality=local.quality if local.quality_is == "fixed" else None,
        ),
        tasks={number: _task(store, task, entries.get(number)) for number, task in local.tasks.items()},
        quality=local.quality,
        is_provisional=local.quality_is == "provisional",
        shape=manifest.image_shape,
        schema=Schema.declare(manifest.fields),
        class_names=manifest.class_names,
        next_class_id=local.next_class_id,
    )


def _task(store: PackFolder, state: TaskState, entry: PackEntry | None) -> Task:
    return Task(
        seen=state.seen,
        kept={} if entry is None else dict(entry.runs),
        pack_bytes=0 if entry is None else entry.bytes,
        load=lambda: None if entry is None else store.load(entry.digest, entry.exemplars)[0],
        decision=state.decision,
        means=None if state.means is None else Means.from_bytes(b64decode(state.means)),
    )


def after_change(folder: Path, saved: Saved, before: Content, after: Content, generation: int) -> Saved:
    """What manifest.json says of this content; the packs of tasks that changed are durable."""
    entries = {entry.task: entry for entry in saved.manifest.packs}
    states = dict(local_of(folder, saved).tasks)
    for number in [number for number in states if number not in after.tasks]:
        del states[number]
        entries.pop(number, None)
    for number, task in after.tasks.items():
        if task is before.tasks.get(number):
            continue
        exemplars, sizes = task.load(), list[int]()
        entries.pop(number, None)
        if exemplars is not None and len(exemplars):
            entries[number] = PackFolder(folder / "packs").keep(number, exemplars)
            sizes = pack.class_bytes(exemplars)
        means = None if task.means is None else b64encode(task.means.to_bytes()).decode("ascii")
        states[number] = TaskState(seen=dict(task.seen), class_bytes=sizes, decision=task.decision, means=means)
    policy, held = after.policy, [entries[number] for number in sorted(entries)]
    classes = {class_id for task in after.tasks.values() for class_id in task.seen}
    quality: dict[str, Any] = {}
    if policy.quality is None:
        quality = {"quality": after.quality, "quality_is": "provisional" if after.is_provisional else "decided"}
    return saved.model_copy(
        update={
            "manifest": saved.manifest.model_copy(
                update={
                    "generation": generation,
                    "used_bytes": sum(entry.bytes for entry in held),
                    "limit_bytes": shares.limit(policy.budget_bytes, per=policy.per, classes=len(classes)),
                    "image_shape": after.shape,
                    "class_names": dict(after.class_names),
                    "packs": held,
                }
            ),
            "local": local_of(folder, saved).model_copy(
                update={
                    "budget_bytes": policy.budget_bytes,
                    "next_class_id": after.next_class_id,
                    "tasks": dict(sorted(states.items())),
                    **quality,
                }
            ),
        }
    )


def publish(folder: Path, saved: Saved, *, keep: Collection[str] = ()) -> None:
    """The generation is the folder's: this is the commit. Packs that are neither its own nor to be kept are gone."""
    data = saved.model_dump_json(indent=1).encode()
    files.write_durably(folder / "manifest.json", data)
    files.write_whole(folder / "manifest.copy.json", data)
    named = {entry.digest for entry in saved.manifest.packs} | {*keep}
    # An index lies beside its pack. Nobody else is writing here, so a temporary file is one that a killed process left.
    unnamed = [path for path in (folder / "packs").iterdir() if path.name.partition(".")[0] not in named]
    for path in [*unnamed, *folder.glob(".manifest.*.tmp")]:
        path.unlink(missing_ok=True)
