"""A memory in this process, on a folder, without a service: the same packs and the same draws.

    memory = LocalBuffer("memory", budget_bytes=1_000_000)
    memory.add(0, images_NHWC, class_ids_N)
    batch = memory.draw(256, seed=7, step=0)

The folder is a mirror's (`engram.mirror`; `engram.state` says what is in it), and what changes a buffer here is what
changes it in a service (`engram.memory`): equal uploads with equal options give packs with equal digests. One process
changes the folder at a time, and a second one is refused at once; any number may read it.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy.typing as npt
import pydantic

from engram import files, forks, memory, state
from engram.batch import Batch
from engram.content import Content, shares_of
from engram.draw import Layout, Request
from engram.errors import Conflict, InvalidRequest, NotFound, StripCorrupt, Unavailable
from engram.fields import Schema, all_keys
from engram.labelled import Images, labelled, task_number
from engram.memory import Where
from engram.mirror import Snapshot, at_once
from engram.packs import LoadedPack, PackCache, PackFolder
from engram.schemas import (
    MAX_TASK,
    Buffer,
    BufferCreate,
    ClassSummary,
    Decision,
    IngestOptions,
    Manifest,
    PackEntry,
    Per,
    ShareBy,
    Strategy,
    Subsampling,
    Task,
    first_fault,
)
from engram.selection.embedding import BuiltinEmbedder, Embed, Embedder, FunctionEmbedder
from engram.selection.images import ArrayImages
from engram.state import Saved
from engram.strip import Exemplars

# Another process may commit between the manifest and its packs; one after the other, some ten times is hopeless.
_ATTEMPTS = 10


class LocalBuffer:
    """The buffer in a folder, made if there is none.

    Args:
        folder: nothing else should be kept there.
        budget_bytes: of the whole buffer, or of each class. Needed for a new one, as the others are not.
        per: which of the two ("buffer" if it is not given).
        share_by: what gets equal shares: classes or tasks ("class").
        subsampling: of the colour planes ("4:2:0").
        quality: JPEG quality of all exemplars, for good; without it selection finds one.
        fields: the columns that every exemplar has beside its image, by name, as `{"logits": "float16 [100]"}`.
        cache_bytes: of packs in memory; None: 1 GiB, or a quarter of the memory of this process if that is less.

    Raises:
        NotFound: there is no buffer in the folder, and no budget to make one.
        Conflict: the buffer there has other settings than those given, another process is just making one, or the
            folder is a file.
        InvalidRequest: a setting is out of range.
        StripCorrupt: manifest.json is damaged; the message says what is left and what to do.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        budget_bytes: int | None = None,
        per: Per | None = None,
        share_by: ShareBy | None = None,
        subsampling: Subsampling | None = None,
        quality: int | None = None,
        fields: Mapping[str, str] | None = None,
        cache_bytes: int | None = None,
    ) -> None:
        self.folder = Path(folder)
        self._store = PackFolder(self.folder / "packs")
        self._cache = PackCache(self._store, cache_bytes, eager=True)
        self._snapshot: Snapshot | None = None
        self._given_away: Counter[str] = Counter()
        self._unused: deque[tuple[list[str], bool]] = deque()
        self._lock = threading.Lock()
        forks.register(self)
        given: dict[str, Any] = {
            "budget_bytes": budget_bytes,
            "per": per,
            "share_by": share_by,
            "subsampling": subsampling,
            "quality": quality,
            "fields": None if fields is None else Schema.declare(fields).declared,
        }
        given = {name: value for name, value in given.items() if value is not None}
        saved = state.read(self.folder)
        if saved is None:
            saved = self._create(given)
        elif given:
            _check_settings(self.folder, saved, given)
        self._saved = saved

    def __reduce__(self) -> tuple[Callable[[Path], LocalBuffer], tuple[Path]]:
        """Another process opens the folder and reads the newest generation."""
        return partial(type(self), cache_bytes=self._cache.max_bytes), (self.folder,)

    def after_fork(self) -> None:
        """In a forked process: no thread of the parent's holds the lock here."""
        self._lock = threading.Lock()

    # What is there

    @property
    def generation(self) -> int:
        """How many changes there have been."""
        return self.manifest.generation

    @property
    def manifest(self) -> Manifest:
        """The packs of this generation."""
        return self._saved.manifest

    @property
    def class_names(self) -> dict[int, str]:
        """The names of classes, by their ids."""
        return self.manifest.class_names

    @property
    def is_frozen(self) -> bool:
        """Whether this is a snapshot, which takes no change."""
        return state.local_of(self.folder, self._saved).is_frozen

    @property
    def tasks(self) -> list[int]:
        """The tasks that have a share, ascending."""
        return list(state.local_of(self.folder, self._saved).tasks)

    @property
    def decisions(self) -> dict[int, Decision]:
        """What each task's images said about quality."""
        tasks = state.local_of(self.folder, self._saved).tasks
        return {number: task.decision for number, task in tasks.items() if task.decision is not None}

    def describe(self) -> Buffer:
        """The buffer as it stands."""
        saved, manifest = self._saved, self._saved.manifest
        local = state.local_of(self.folder, saved)
        return Buffer(
            name=manifest.buffer,
            budget_bytes=local.budget_bytes,
            limit_bytes=manifest.limit_bytes,
            per=local.per,
            share_by=local.share_by,
            subsampling=local.subsampling,
            quality=local.quality,
            quality_is=local.quality_is,
            generation=manifest.generation,
            used_bytes=manifest.used_bytes,
            exemplars=sum(entry.exemplars for entry in manifest.packs),
            tasks=list(local.tasks),
            classes=sorted({class_id for entry in manifest.packs for class_id, count in entry.runs if count}),
            image_shape=manifest.image_shape,
            fields=manifest.fields,
            class_names=manifest.class_names,
            is_frozen=local.is_frozen,
            created_at=saved.created_at,
        )

    def task(self, task: int) -> Task:
        """A task as it is stored: classes, counts, bytes and the decision on its quality.

        Raises:
            ValueError: the task is no integer.
            NotFound: there is no such task.
        """
        task, saved = task_number(task), self._saved
        local = state.local_of(self.folder, saved)
        if task not in local.tasks:
            raise NotFound(f"there is no task {task} in {self.folder}; there are {list(local.tasks)}", task=task)
        content, held = state.content_of(self.folder, saved), local.tasks[task]
        granted = shares_of(content.policy, content.classes())[task]
        packs = [entry for entry in saved.manifest.packs if entry.task == task]
        runs = [run for entry in packs for run in entry.runs]
        stored = {c: (count, size) for (c, count), size in zip(runs, held.class_bytes, strict=True)}
        return Task(
            buffer=saved.manifest.buffer,
            task=task,
            quality=local.quality or 0,
            bytes=sum(entry.bytes for entry in packs),
            exemplars=sum(entry.exemplars for entry in packs),
            classes=[
                ClassSummary(
                    class_id=class_id,
                    name=saved.manifest.class_names.get(class_id),
                    seen=seen,
                    exemplars=stored.get(class_id, (0, 0))[0],
                    bytes=stored.get(class_id, (0, 0))[1],
                    share_bytes=granted.get(class_id, 0),
                )
                for class_id, seen in sorted(held.seen.items())
            ],
            decision=held.decision,
        )

    # Changes

    def add(
        self,
        task: int,
        images_NHWC: Images,
        class_ids_N: npt.ArrayLike | None = None,
        *,
        fields: Mapping[str, Any] | None = None,
        options: IngestOptions | None = None,
        embed: Embed | None = None,
        embed_name: str | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Task:
        """Keep as many images of a task as its shares hold; they are on disk when this returns the task.

        Args:
            task: the task's number.
            images_NHWC: uint8 RGB or grey; `[N, H, W]` is grey. Or, alone, what gives images and classes, as in
                `Client.upload`.
            class_ids_N: N integers, which are class ids, or N strings, which are names: those that the buffer knows
                stand for the ids that they have there, new ones get new ids.
            fields: the columns that the buffer declares, by name: arrays `[N, ...]`, lists of N arrays where they are
                ragged, lists of N texts.
            options: how images are ranked and measured, as for an upload to a service.
            embed: makes features float32 `[n, D]` of images uint8 `[n, H, W, C]`; None: the built-in embedding.
            embed_name: which function that is. Means of images are continued only under the name they were made under.
            progress: called often, with how many images further the work is; what it raises ends it.

        Raises:
            ValueError: arrays of another type or shape, or of no images; a function without a name, or bad features.
            BadUpload: fields that are not what the buffer declares.
            BudgetExceeded: not one exemplar of the task fits.
            Conflict: the buffer is frozen, has images of another shape, or is just being changed by another process.
            InvalidRequest: the task is out of range, or the options name an extractor of a service.
            StorageFull: the disk is full; nothing changed.
        """
        task = task_number(task)
        arrays_NHWC, ids_N, names = labelled(images_NHWC, class_ids_N)
        if not len(arrays_NHWC):
            raise ValueError("there are no images to add")
        if not 0 <= task <= MAX_TASK:
            raise InvalidRequest(f"a task's number lies in 0..{MAX_TASK}, got {task}")
        options = options or IngestOptions()
        if options.extractor is not None:
            raise InvalidRequest("extractor: models are registered with a service; give `embed` to a local buffer")
        columns = Schema.declare(self.manifest.fields).columns(fields or {}, len(arrays_NHWC))
        images = ArrayImages(arrays_NHWC, ids_N, columns)
        embedder: Embedder = BuiltinEmbedder(images.shape)
        if embed is not None:
            if not embed_name:
                raise ValueError("give `embed` an `embed_name`: means of images are only continued under the same one")
            embedder = FunctionEmbedder(embed_name, embed)
        upload = memory.Upload(task, images, options, names)
        advance = progress or (lambda count: None)
        self._change(partial(memory.add, upload=upload, embedder=embedder, advance=advance))
        return self.task(task)

    def remove(
        self,
        *,
        task: int | None = None,
        class_id: int | None = None,
        key: str | None = None,
        keys: Sequence[str] | None = None,
        exemplar: tuple[str, int] | None = None,
        generation: int | None = None,
    ) -> None:
        """Some exemplars are gone, in a new generation, as if they had never come.

        Args:
            task: only of this task; `delete_task` deletes a whole one.
            class_id: of this class.
            key: with this value of the field `key`.
            keys: with one of these values; those that no exemplar has are passed over, unless none has any.
            exemplar: one exemplar, as (pack, row) of this generation, and nothing else.
            generation: the generation this change was decided on; None changes any.

        Raises:
            NotFound: there is nothing that is named so.
            InvalidRequest: neither a class, a key nor an exemplar is named.
            Conflict: the buffer is frozen, at another generation, or is just being changed by another process.
        """
        where, generation = self._named(task, class_id, all_keys(key, keys), exemplar, generation)
        self._change(partial(memory.remove, where=where), generation)

    def relabel(
        self,
        to_class_id: int,
        *,
        task: int | None = None,
        class_id: int | None = None,
        key: str | None = None,
        exemplar: tuple[str, int] | None = None,
        generation: int | None = None,
    ) -> None:
        """Some exemplars, named as in `remove`, are in another class of their tasks.

        Raises:
            NotFound, InvalidRequest, Conflict: as `remove`.
        """
        where, generation = self._named(task, class_id, all_keys(key, None), exemplar, generation)
        self._change(partial(memory.relabel, where=where, class_id=to_class_id), generation)

    def delete_task(self, task: int, *, generation: int | None = None) -> None:
        """The task's exemplars are gone, in a new generation; what its classes were named stays known.

        Args:
            task: the task's number.
            generation: the generation this change was decided on; None changes any.

        Raises:
            ValueError: the task is no integer.
            NotFound: there is no such task.
            Conflict: the buffer is frozen, at another generation, or is just being changed by another process.
        """
        self._change(partial(memory.reshare, without_task=task_number(task)), generation)

    def change_budget(self, budget_bytes: int, *, generation: int | None = None) -> None:
        """The buffer has another budget; a smaller one drops the tails of every class.

        Args:
            budget_bytes: the new budget.
            generation: the generation this change was decided on; None changes any.

        Raises:
            InvalidRequest: the budget is out of range.
            Conflict: the buffer is frozen, at another generation, or is just being changed by another process.
        """
        _validated({"budget_bytes": budget_bytes})
        self._change(partial(memory.reshare, budget_bytes=budget_bytes), generation)

    def rename_classes(self, class_names: Mapping[int, str]) -> None:
        """These classes have these names, by their ids; the others keep theirs.

        Raises:
            InvalidRequest: a name is empty, a number, not printable, or has more than 200 characters.
            Conflict: a name belongs to another class; or as `delete_task`.
        """
        self._change(partial(memory.rename, given=class_names))

    def fork(
        self,
        folder: str | Path,
        *,
        generation: int | None = None,
        budget_bytes: int | None = None,
        frozen: bool = False,
    ) -> LocalBuffer:
        """A buffer in another folder that begins with the content of this one; later each goes its own way.

        Packs are hard links where the file system allows it, copies elsewhere. Other processes may go on changing this
        buffer meanwhile.

        Args:
            folder: empty, or made.
            generation: the generation that this buffer must be at; None takes the newest.
            budget_bytes: of the fork; None takes that of this buffer.
            frozen: whether the fork is a snapshot, which takes no change but can be forked again.

        Raises:
            Conflict: the folder holds something already, or this buffer is at another generation.
            InvalidRequest: the budget is out of range.
            StorageFull: the disk is full.
        """
        target = Path(folder)
        if budget_bytes is not None:
            _validated({"budget_bytes": budget_bytes})
        with state.writing(target):
            state.check_empty(target)
            try:
                saved = self._shared(target, generation)
                local = state.local_of(self.folder, saved)
                renamed = {"buffer": target.resolve().name, "created_at": datetime.now(UTC)}
                begun = {
                    "manifest": saved.manifest.model_copy(update=renamed),
                    "local": local.model_copy(update={"is_frozen": frozen}),
                }
                saved = saved.model_copy(update=begun)
                before = state.content_of(target, saved)
                after = before if budget_bytes is None else memory.reshare(before, budget_bytes=budget_bytes)
                state.publish(target, state.after_change(target, saved, before, after, saved.manifest.generation))
            except BaseException:
                if not (target / "manifest.json").exists():
                    _unshare(PackFolder(target / "packs"))
                raise
        return LocalBuffer(target)

    # Replay

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
    ) -> Batch:
        """A replay minibatch, equal to `Client.draw` with the same arguments from equal packs.

        Raises:
            NotFound: a task named in `tasks` holds no exemplar.
            Conflict: the buffer is empty, or has nothing but the excluded tasks.
            InvalidRequest: a number is out of range.
            StripCorrupt: a pack is damaged or gone.
        """
        request = Request(size, seed, step, strategy, tasks, exclude_tasks, rank, world_size)
        while True:
            try:
                return self._current().draw(request)
            except Unavailable:
                # Packs that did not fit in memory may be gone with a generation that another process replaced.
                if not self.refresh():
                    raise

    def snapshot(self) -> Snapshot:
        """This generation, which stays as it is when the buffer goes on.

        Changes made through this object leave its packs where they are. Those that do not fit in memory may be removed
        by a change that another process makes; a fork is safe from that.

        Raises:
            StripCorrupt: a pack is damaged or gone.
        """
        given = replace(self._current())
        self._hold(given, is_given_away=True)
        return given

    def _current(self) -> Snapshot:
        for _ in range(_ATTEMPTS):
            saved, known = self._saved, self._snapshot
            if known is not None and known.manifest is saved.manifest:
                return known
            try:
                self._snapshot = self._open(saved.manifest)
            except FileNotFoundError:
                # Another process has made a new generation and removed what it does not need: that one is read.
                if not self.refresh():
                    break
        raise state.missing(self._store.folder, self.manifest)

    def _open(self, manifest: Manifest) -> Snapshot:
        """The generation, its packs open and held.

        Raises:
            FileNotFoundError: a pack is gone.
            StripCorrupt: a pack is damaged.
        """
        self._let_go()
        digests = [entry.digest for entry in manifest.packs]
        self._cache.hold(digests)
        try:
            opened = at_once(self._intact, manifest.packs)
            exemplars = [found.exemplars for found in opened if found.exemplars is not None]
            in_memory = all(found.in_memory for found in opened)
            snapshot = Snapshot(manifest, Layout(manifest.packs), exemplars, self._repair, in_memory)
            self._hold(snapshot)
        finally:
            self._cache.release(digests)
        return snapshot

    def _hold(self, snapshot: Snapshot, *, is_given_away: bool = False) -> None:
        """Its packs stay open as long as it lives, and where they are if it was given away."""
        digests = [entry.digest for entry in snapshot.manifest.packs]
        self._cache.hold(digests)
        if is_given_away:
            with self._lock:
                self._given_away.update(digests)
        # Only noted: it may die inside a lock of the cache's.
        weakref.finalize(snapshot, self._unused.append, (digests, is_given_away)).atexit = False

    def _let_go(self) -> None:
        """Packs of snapshots that live no longer are not held any more."""
        while self._unused:
            digests, is_given_away = self._unused.popleft()
            self._cache.release(digests)
            if is_given_away:
                with self._lock:
                    self._given_away.subtract(digests)

    def _intact(self, entry: PackEntry) -> LoadedPack:
        """A pack that is what its name says, as far as that is known without reading it.

        Raises:
            FileNotFoundError: it is gone.
            StripCorrupt: it is damaged.
        """
        known = self._cache.peek([entry.digest])
        return self._checked(entry, known[0] if known else self._cache.get(entry.digest, entry.exemplars))

    def _repair(self, entry: PackEntry) -> Exemplars:
        """The pack, read whole, after a draw has met something else than its index promises.

        Raises:
            Unavailable: it is gone, with its generation.
            StripCorrupt: it is damaged.
        """
        try:
            found = self._checked(entry, self._cache.reload(entry.digest, entry.exemplars))
        except FileNotFoundError:
            raise Unavailable(
                f"{self._store.path(entry.digest)}, the pack of task {entry.task}, is gone with its generation, which "
                "another process has replaced: refresh, or fork what must stay"
            ) from None
        assert found.exemplars is not None, "an intact pack holds some"
        return found.exemplars

    def _checked(self, entry: PackEntry, found: LoadedPack) -> LoadedPack:
        path = self._store.path(entry.digest)
        if not found.is_damaged:
            return found
        if not path.exists():
            raise FileNotFoundError(path)
        intact = 0 if found.rows is None else len(found.rows)
        raise StripCorrupt(
            f"{path}, the pack of task {entry.task}, does not match its name: {intact} of its {entry.exemplars} "
            "exemplars are intact. Restore it from a backup or a fork; a change of the task keeps what is intact",
            digest=entry.digest,
            task=entry.task,
        )

    def refresh(self) -> bool:
        """What other processes have changed is seen from here on; true if there is another generation than before.

        Raises:
            StripCorrupt: manifest.json is damaged.
        """
        newest = state.newest(self.folder)
        is_new = (newest.created_at, newest.manifest.generation) != (self._saved.created_at, self.generation)
        if is_new:
            self._saved = newest
        return is_new

    # Files

    def _create(self, given: dict[str, Any]) -> Saved:
        if "budget_bytes" not in given:
            raise NotFound(f"there is no buffer in {self.folder}; give budget_bytes to make one")
        wanted = _validated(given)
        with state.writing(self.folder):
            found = state.read(self.folder)
            if found is not None:
                _check_settings(self.folder, found, given)
                return found
            state.check_empty(self.folder)
            self._store.folder.mkdir(exist_ok=True)
            saved = state.new(self.folder.resolve().name, wanted)
            state.publish(self.folder, saved)
            return saved

    def _named(
        self,
        task: int | None,
        class_id: int | None,
        keys: tuple[str, ...] | None,
        exemplar: tuple[str, int] | None,
        generation: int | None,
    ) -> tuple[Where, int | None]:
        """Which exemplars are meant, and the generation in which that is so."""
        if exemplar is None:
            return Where(task=task, class_id=class_id, keys=keys), generation
        if (task, class_id, keys) != (None, None, None):
            raise InvalidRequest("one exemplar is named by its pack and row, not by task, class or key as well")
        digest, row = exemplar
        manifest = self.manifest
        for entry in manifest.packs:
            rank = row
            for held, count in entry.runs if entry.digest == digest and row >= 0 else ():
                if rank < count:
                    where = Where(task=entry.task, class_id=held, rank=rank)
                    return where, manifest.generation if generation is None else generation
                rank -= count
        raise NotFound(
            f"generation {manifest.generation} of {self.folder} has no row {row} in a pack {digest!r}",
            digest=digest,
            row=row,
        )

    def _shared(self, target: Path, generation: int | None) -> Saved:
        """What this folder holds now, its packs shared with the other folder.

        Raises:
            Conflict: it is at another generation than this, or others changed it again and again.
            StripCorrupt: a pack is gone.
        """
        for _ in range(_ATTEMPTS):
            saved = state.newest(self.folder)
            _check_generation(saved, generation)
            try:
                _share(self._store, PackFolder(target / "packs"), saved.manifest)
                return saved
            except FileNotFoundError:
                # Another process has made a new generation meanwhile, or somebody took the pack away.
                if state.newest(self.folder).manifest.generation == saved.manifest.generation:
                    raise state.missing(self._store.folder, saved.manifest) from None
        raise Conflict(f"{_ATTEMPTS} changes of {self.folder} came first, one after the other; try again")

    def _change(self, change: Callable[[Content], Content], generation: int | None = None) -> None:
        """The buffer's content is what `change` makes of it, in a new generation.

        Raises:
            Conflict: the buffer is frozen, at another generation, a mirror, or just being changed elsewhere.
            StorageFull: the disk is full; nothing changed.
        """
        with state.writing(self.folder):
            saved = state.newest(self.folder)
            if state.local_of(self.folder, saved).is_frozen:
                raise Conflict(
                    f"the buffer in {self.folder} is frozen at generation {saved.manifest.generation}; "
                    "fork it and change the fork"
                )
            _check_generation(saved, generation)
            before = state.content_of(self.folder, saved)
            after = change(before)
            saved = state.after_change(self.folder, saved, before, after, saved.manifest.generation + 1)
            self._let_go()
            with self._lock:
                keep = {*+self._given_away}
            state.publish(self.folder, saved, keep=keep)
        self._saved = saved


def _check_settings(folder: Path, saved: Saved, given: Mapping[str, Any]) -> None:
    """Returns if the buffer has these settings.

    Raises:
        Conflict: it has others, or is a mirror.
    """
    local = state.local_of(folder, saved)
    actual: dict[str, Any] = {
        "budget_bytes": local.budget_bytes,
        "per": local.per,
        "share_by": local.share_by,
        "subsampling": local.subsampling,
        "quality": local.quality if local.quality_is == "fixed" else None,
        "fields": saved.manifest.fields,
    }
    other = [f"{name} {actual[name]} (asked: {value})" for name, value in given.items() if actual[name] != value]
    if other:
        raise Conflict(
            f"the buffer in {folder} has other settings: {', '.join(other)}; open it without settings, and give it "
            "another budget with change_budget"
        )


def _check_generation(saved: Saved, generation: int | None) -> None:
    """Returns if the buffer is at this generation, None being any.

    Raises:
        Conflict: it is at another.
    """
    if generation not in (None, saved.manifest.generation):
        raise Conflict(
            f"the buffer is at generation {saved.manifest.generation}, {generation} is expected; look again and decide "
            "anew",
            generation=saved.manifest.generation,
        )


def _validated(settings: Mapping[str, Any]) -> BufferCreate:
    """The settings with defaults for what is not given.

    Raises:
        InvalidRequest: one is out of range.
    """
    try:
        return BufferCreate.model_validate({"name": "local", **settings})
    except pydantic.ValidationError as error:
        raise InvalidRequest(first_fault(error)) from error


def _share(source: PackFolder, target: PackFolder, manifest: Manifest) -> None:
    """The manifest's packs are in the other folder too, durably, and nothing else is.

    Raises:
        FileNotFoundError: a pack is gone.
    """
    _unshare(target)
    target.folder.mkdir(exist_ok=True)
    for digest in {entry.digest for entry in manifest.packs}:
        _link(source.path(digest), target.path(digest))
        with suppress(FileNotFoundError):  # whoever reads the pack makes its index
            _link(source.index_path(digest), target.index_path(digest))
    files.fsync_path(target.folder)
    files.fsync_path(target.folder.parent)


def _link(source: Path, target: Path) -> None:
    try:
        target.hardlink_to(source)
    except FileNotFoundError:
        raise
    except OSError:
        # Another file system, or one without links.
        files.write_durably(target, source.read_bytes())


def _unshare(store: PackFolder) -> None:
    for path in store.folder.glob("*"):
        path.unlink(missing_ok=True)
