"""The replay memory that is a buffer of an Engram service: it ranks, chooses the quality and encodes.

Replay comes from a mirror of the packs, or from the service batch by batch. Where the service is away the run waits
(`patient`): what it asks for is the same when it is asked for again.

Of several processes of a run the first one changes the buffer and refreshes the mirror; then the others refresh, in the
same folder, where they find the packs already.

A run that writes while it learns goes back to its last checkpoint when it is killed, so its buffer must go back too. A
buffer cannot be set back, but the state of a checkpoint can be kept: `state_dict` freezes a fork of the buffer, whose
packs it shares, and the last two such forks stay, one of which the newest checkpoint on the disk names.
`load_state_dict` makes the buffer anew from the fork of its checkpoint. Where a checkpoint between epochs is newer than
that of the last task's end, both are loaded, in this order, and the older fork may be gone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from engram import pack, tar
from engram.batch import Batch, collect, from_parts
from engram.client import Client
from engram.content import ROOMY_QUALITY, Policy
from engram.draw import Layout
from engram.errors import BudgetExceeded, Conflict, NotFound, Unavailable
from engram.fields import KEY, Schema
from engram.mirror import Mirror
from engram.schemas import Buffer, Ingest, IngestOptions, PackEntry, Strategy
from engram.sources import Source
from engram_trainer.configuration import ReplayVia
from engram_trainer.examples import ClassIds, Examples, Images, Rows, Shape
from engram_trainer.local_memory import exchange_seed, slots, strip_sizes
from engram_trainer.memory import Drawn, KeptBy, Learned, plans

UPLOAD_BYTES = 2**31
"""Of pixels in one upload, unless a class alone has more: services take 8 GiB, unless they are told otherwise."""
PATIENCE_S = 600.0
_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 15.0

_T = TypeVar("_T")


def patient(call: Callable[[], _T], *, patience_s: float = PATIENCE_S, tell: Callable[[Unavailable], None]) -> _T:
    """What `call` returns. As long as its service is away it is called again, with growing pauses.

    Args:
        call: may be called again after it has raised `Unavailable`.
        patience_s: for how long it is called again.
        tell: told once that there is a wait, and why.

    Raises:
        Unavailable: the service was away for longer than `patience_s`.
        EngramError: what else `call` raises.
    """
    deadline, pause_s = time.monotonic() + patience_s, _FIRST_PAUSE_S
    is_told = False
    while True:
        try:
            return call()
        except Unavailable as error:
            if time.monotonic() + pause_s > deadline:
                raise
            if not is_told:
                tell(error)
                is_told = True
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


class ServiceMemory(Drawn):
    """A buffer of an Engram service.

    Args:
        client: the connection to the service.
        buffer: an existing buffer's name.
        options: how tasks are ranked and encoded; `seed` and `extractor` are filled in for each task.
        run: names this run, so that a task that is added again after a crash is the same ingest.
        folder: where a mirror keeps its packs.
        via: whether batches are drawn from a mirror, or by the service.
        shape: of the images that the run has; None: any.
        fields: what its exemplars have beside their images, as the buffer must declare it; None: any.
        is_written_online: whether the run exchanges exemplars while it learns, so that checkpoints keep the buffer.
        upload_bytes: of pixels in one upload; a task that has more is uploaded some classes at a time.
        patience_s: how long to wait for a service that is away.
        tell: told when there is such a wait.
        watch: called while the service works on a task.

    Raises:
        NotFound: no such buffer.
        Conflict: the buffer has images of another shape, or other fields.
        Unavailable: the service does not answer.
    """

    def __init__(
        self,
        client: Client,
        buffer: str,
        *,
        options: IngestOptions,
        run: str,
        folder: str | Path,
        via: ReplayVia = "mirror",
        shape: Shape | None = None,
        fields: Mapping[str, str] | None = None,
        is_written_online: bool = False,
        upload_bytes: int = UPLOAD_BYTES,
        patience_s: float = PATIENCE_S,
        tell: Callable[[str], None] = lambda message: None,
        watch: Callable[[Ingest], None] | None = None,
    ) -> None:
        self.client, self.buffer, self.options, self.run, self.watch = client, buffer, options, run, watch
        self.is_written_online = is_written_online
        self._upload_bytes, self._patience_s, self._tell = upload_bytes, patience_s, tell
        self._about = client.buffer(buffer)
        _check_fits(self._about, shape, fields)
        self._mirror = Mirror(client, buffer, folder) if via == "mirror" else None
        self._manifest = client.manifest(buffer) if self._mirror is None else self._mirror.manifest
        self._layout = Layout(self._manifest.packs)
        self._fork: str | None = None
        """That of the last checkpoint."""
        self._is_lost = False
        """Whether the fork of the checkpoint that was loaded last is gone."""

    def patiently(self, call: Callable[[], _T]) -> _T:
        """What `call` returns, however long the service is away, within `patience_s`."""
        return patient(call, patience_s=self._patience_s, tell=self._tell_of)

    def _tell_of(self, error: Unavailable) -> None:
        self._tell(f"the service at {self.client.url} does not answer; waiting up to {self._patience_s:g} s ({error})")

    def add(self, learned: Learned) -> None:
        """Upload the task, whole classes at a time, and wait until its exemplars are committed.

        Raises:
            EngramError: the service refused the images, the extractor or the budget.
        """
        model, examples = learned.extractor, learned.examples
        digest = None
        if model is not None:
            digest = self.patiently(partial(self.client.register_extractor, model)).sha256
        options = self.options.model_copy(update={"seed": learned.seed, "extractor": digest})
        parts = whole_classes(examples, self._upload_bytes)
        for number, rows in enumerate(parts):
            key = f"{self.run}-task-{learned.task}" + (f"-{number}" if len(parts) > 1 else "")
            self._upload(learned.task, examples, rows, learned.fields, options, key)
        self.refresh()

    def exchange(
        self,
        task: int,
        images_NHWC: Images,
        class_ids: ClassIds,
        *,
        fields: Mapping[str, npt.NDArray[Any]],
        keys: Sequence[str],
        drop: Sequence[str],
        kept_by: KeptBy = "ring",
    ) -> None:
        """The exemplars with the keys `drop` are gone, and as many of these have come as there is room for.

        Those that go do so first: a run that is killed between the two has too few exemplars, never too many.

        Raises:
            BudgetExceeded: that is not one, and there is no other.
            EngramError: the service refused the images.
        """
        self._check_found()
        if drop:
            with suppress(NotFound):  # they are gone: an answer was lost, or the buffer did not keep them
                self.patiently(partial(self.client.remove, self.buffer, keys=list(drop)))
        if len(keys):
            seed = exchange_seed(keys)
            options = self.options.model_copy(update={"ranking": kept_by, "seed": seed, "extractor": None})
            examples = Examples.of_arrays(images_NHWC, np.asarray(class_ids, np.int64))
            given = {**fields, KEY: np.array(keys)}
            key = f"{self.run}-exchange-{self.generation}-{task}-{seed:08x}"
            try:
                self._upload(task, examples, np.arange(len(keys)), given, options, key)
            except BudgetExceeded:
                self.refresh()
                if not any(entry.exemplars for entry in self.entries):
                    raise
        self.refresh()

    def _upload(
        self,
        task: int,
        examples: Examples,
        rows: Rows,
        fields: Mapping[str, npt.NDArray[Any]],
        options: IngestOptions,
        key: str,
    ) -> None:
        """These examples of the task are committed; the same key again changes nothing."""
        send = partial(
            self.client.upload_tar,
            self.buffer,
            task,
            lambda: tar_of(examples, rows, fields),
            options=options,
            idempotency_key=key,
        )
        ingest = self.patiently(send)
        self.patiently(lambda: self.client.wait(ingest, progress=self.watch))

    def refresh(self) -> None:
        """What this or another process has changed is seen from here on."""
        if self._mirror is not None:
            self.patiently(self._mirror.refresh)
            newest = self._mirror.manifest
        else:
            newest = self.patiently(lambda: self.client.manifest_after(self.buffer, self._manifest)) or self._manifest
        if newest is not self._manifest:
            self._manifest, self._layout = newest, Layout(newest.packs)

    @property
    def generation(self) -> int:
        """Of the buffer, as it is seen here."""
        return self._manifest.generation

    @property
    def entries(self) -> Sequence[PackEntry]:
        """The packs."""
        return self._manifest.packs

    @property
    def source(self) -> Source:
        """The mirror, or the service."""
        self._check_found()
        return (self.client, self.buffer) if self._mirror is None else self._mirror

    def draw(
        self,
        size: int,
        *,
        seed: int,
        step: int,
        strategy: Strategy = "uniform",
        exclude_tasks: tuple[int, ...] = (),
        rank: int = 0,
        world_size: int = 1,
    ) -> Batch:
        """A replay minibatch; from the mirror it is equal to the service's."""
        given: dict[str, Any] = {
            "seed": seed,
            "step": step,
            "strategy": strategy,
            "exclude_tasks": exclude_tasks,
            "rank": rank,
            "world_size": world_size,
        }
        if self._mirror is not None:
            return self._mirror.draw(size, **given)
        return self.patiently(partial(self.client.draw, self.buffer, size, generation=self.generation, **given))

    def walk(self, size: int = 256, *, exclude_tasks: tuple[int, ...] = ()) -> Iterator[Batch]:
        """Every exemplar once, by task, class and rank; without a mirror one pack after the other is fetched."""
        if self._mirror is not None:
            snapshot = self._mirror.snapshot()
            yield from map(snapshot.read, plans(snapshot.layout, size, exclude_tasks))
            return
        for entry in self.entries:
            if entry.task not in exclude_tasks:
                exemplars = pack.parse(self.patiently(partial(self.client.pack, entry.digest)))
                for chosen in plans(Layout([entry]), size, ()):
                    yield from_parts(collect([exemplars], chosen))

    def keys(self) -> set[str]:
        """The keys of all exemplars; none where they have no keys."""
        if not Schema.declare(self._manifest.fields).has_key:
            return set()
        if self._mirror is None:
            return self.patiently(lambda: {str(found.key) for found in self.client.exemplars(self.buffer)})
        found = self._mirror.snapshot().packs
        return {str(key) for exemplars in found for key in exemplars.fields(frozenset({KEY}))[KEY]}

    def slots(self, images_NHWC: Images, class_ids: ClassIds, fields: Mapping[str, npt.NDArray[Any]]) -> int:
        """How many exemplars like these the budget holds, by their mean size."""
        about = self._about
        quality = about.quality if about.quality_is == "fixed" else None
        policy = Policy(about.budget_bytes, about.per, about.share_by, about.subsampling, quality)
        columns = Schema.declare(about.fields).columns(fields, len(images_NHWC))
        sizes = strip_sizes(
            images_NHWC, class_ids, columns, quality=quality or ROOMY_QUALITY, subsampling=about.subsampling
        )
        return slots(policy, sizes, is_chosen=True)

    @property
    def is_lossy(self) -> bool:
        """Always: packs are JPEG."""
        return True

    def describe(self) -> dict[str, Any]:
        """What is kept and how the service decided, as JSON for the report."""
        manifest = self._manifest
        tasks = {
            entry.task: self.patiently(partial(self.client.task, self.buffer, entry.task)) for entry in manifest.packs
        }
        return {
            "kind": "service",
            "buffer": self.buffer,
            "generation": manifest.generation,
            "budget_bytes": manifest.limit_bytes,
            "used_bytes": manifest.used_bytes,
            "exemplars": sum(entry.exemplars for entry in manifest.packs),
            "tasks": {str(number): task.exemplars for number, task in tasks.items()},
            "quality": self.patiently(partial(self.client.buffer, self.buffer)).quality,
            "decisions": {
                str(number): task.decision.model_dump(mode="json") for number, task in tasks.items() if task.decision
            },
        }

    def state_dict(self) -> dict[str, Any]:
        """Which buffer and generation; where it is written online, they can be had again."""
        state: dict[str, Any] = {"buffer": self.buffer, "generation": self.generation}
        if not self.is_written_online:
            return state
        before, now = self._fork, f"{self._fork_prefix}{self.generation}"
        if now != before:
            self.patiently(partial(self._freeze, now))
        self._forget(lambda name: name not in (before, now))
        self._fork = now
        return {**state, "fork": now}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The buffer is as it was, or is known to hold all that it held.

        Raises:
            Conflict: it is another buffer, or one that was set back.
        """
        fork = state.get("fork")
        forks = self._forks() if self.is_written_online else []
        if state["buffer"] != self.buffer or (self.generation < state["generation"] and fork not in forks):
            raise Conflict(
                f"the checkpoint was made with buffer {state['buffer']!r} at generation {state['generation']}, this is "
                f"{self.buffer!r} at generation {self.generation}; start the run in a new folder"
            )
        if not self.is_written_online:
            return
        self._fork, self._is_lost = fork, fork not in forks and self.generation != state["generation"]
        if fork in forks:
            # At the same generation, too: an upload may have been accepted that is not committed yet.
            self.patiently(partial(self._set_back, fork))
            self.refresh()

    def finish(self) -> None:
        """The run is over: what its checkpoints kept is not needed any more."""
        if self.is_written_online:
            self._forget(lambda name: True)

    @property
    def _fork_prefix(self) -> str:
        return f"{self.buffer}-at-"

    def _forks(self) -> list[str]:
        """The frozen forks that there are of this buffer."""
        found, prefix = self.patiently(self.client.buffers), self._fork_prefix
        frozen = [each.name for each in found if each.is_frozen and each.name.startswith(prefix)]
        return [name for name in frozen if name.removeprefix(prefix).isdigit()]

    def _freeze(self, name: str) -> None:
        """There is such a fork of the buffer as it is now; done once more it is the same."""
        # One of this name may be of a future that did not come: a run was killed before it wrote the checkpoint.
        with suppress(NotFound):
            self.client.delete_buffer(name)
        self.client.fork(self.buffer, name, generation=self.generation, frozen=True)

    def _set_back(self, fork: str) -> None:
        """The buffer is deleted and made again from the fork; done once more it is the same."""
        with suppress(NotFound):
            self.client.delete_buffer(self.buffer)
        self.client.fork(fork, self.buffer)

    def _forget(self, is_meant: Callable[[str], bool]) -> None:
        for name in filter(is_meant, self._forks()):
            with suppress(NotFound):
                self.patiently(partial(self.client.delete_buffer, name))

    def _check_found(self) -> None:
        """Returns if the buffer is what the checkpoint says.

        Raises:
            Conflict: it has moved on, and what the checkpoint kept is gone.
        """
        if self._is_lost:
            raise Conflict(
                f"buffer {self.buffer!r} has moved on since the checkpoint, and {self._fork!r}, which it was to be set "
                "back to, is gone; start the run in a new folder"
            )


def tar_of(examples: Examples, rows: Rows, fields: Mapping[str, npt.NDArray[Any]]) -> Iterator[bytes]:
    """The upload of these examples, read and sent in pieces."""
    step = max(1, tar.blocks.CHUNK_BYTES // int(np.prod(examples.shape)))
    parts = (rows[start : start + step] for start in range(0, len(rows), step))
    return tar.write_parts(
        (
            examples.images.read(part),
            examples.class_ids[part],
            {name: list(column[part]) if column.dtype.kind == "U" else column[part] for name, column in fields.items()},
        )
        for part in parts
    )


def whole_classes(examples: Examples, size_bytes: int) -> list[Rows]:
    """The rows in parts of whole classes, each of at most so many bytes of pixels unless one class has more."""
    image_bytes = int(np.prod(examples.shape))
    if len(examples) * image_bytes <= size_bytes:
        return [np.arange(len(examples))]
    parts: list[list[int]] = []
    counts: list[int] = []
    for class_id in examples.classes:
        count = int((examples.class_ids == class_id).sum())
        if not parts or (counts[-1] + count) * image_bytes > size_bytes:
            parts.append([])
            counts.append(0)
        parts[-1].append(class_id)
        counts[-1] += count
    return [np.flatnonzero(np.isin(examples.class_ids, part)) for part in parts]


def _check_fits(buffer: Buffer, shape: Shape | None, fields: Mapping[str, str] | None) -> None:
    """Returns if the buffer takes what the run has.

    Raises:
        Conflict: it does not.
    """
    if shape is not None and buffer.image_shape not in (None, shape):
        raise Conflict(
            f"buffer {buffer.name!r} holds images of {_text(buffer.image_shape)}, this run has {_text(shape)}; name "
            "another buffer"
        )
    if fields is not None and buffer.fields != (wanted := Schema.declare(fields).declared):
        raise Conflict(
            f"buffer {buffer.name!r} declares {buffer.fields or 'no fields'}, the method needs {wanted or 'none'}; "
            "name another buffer"
        )


def _text(shape: Shape | None) -> str:
    return "x".join(map(str, shape or ()))
