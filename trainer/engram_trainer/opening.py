"""Open the memory that a run's configuration names, for one process or for several that share it.

Several processes change a service's buffer once, by the first of them, and see the change before any goes on. Memories
within the processes are changed in each alike; a ranking by features, which a GPU may compute differently, is made once
and its result handed to the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast

from engram.client import Client
from engram.errors import Conflict, EngramError
from engram.fields import KEY
from engram.schemas import Ingest, IngestOptions, ShareBy
from engram_trainer.configuration import MemoryConfig
from engram_trainer.local_memory import LocalConfig
from engram_trainer.memory import Learned, Memory, NoMemory
from engram_trainer.methods import Learner
from engram_trainer.plain_memory import local_memory
from engram_trainer.runtime import Runtime
from engram_trainer.service_memory import ServiceMemory


class Tell(Protocol):
    """Told how far a phase is."""

    def __call__(self, name: str, done: int, total: int, *, note: str = "") -> None:
        """So much of it is done."""


@contextmanager
def open_memory(
    config: MemoryConfig, learner: Learner, *, run: str, folder: Path, is_new: bool, tell: Tell
) -> Iterator[Memory]:
    """The memory that a configuration names; a service's buffer is created if need be.

    A run that fails before its buffer holds anything leaves none behind, if it made it.

    Args:
        config: which.
        learner: says what exemplars have beside their images, and whether it writes while it learns.
        run: names the run.
        folder: of the run.
        is_new: whether the run is not resumed.
        tell: told of the service's progress, and when it is away.

    Raises:
        Conflict: a new run was given a buffer that holds exemplars, or one that does not fit its images or method.
        Unavailable: the service does not answer.
    """
    if config.kind == "none":
        yield NoMemory()
        return
    fields = {**learner.fields, **({KEY: "utf8"} if learner.fills_memory else {})}
    # What is kept of a stream is decided by the method then, and shares would cut it off again.
    share_by: ShareBy = "none" if learner.fills_memory else config.share_by
    options = IngestOptions(
        ranking=config.ranking,
        definition=config.definition,
        rule=config.rule,
        epsilon=config.epsilon,
        block=config.block,
    )
    runtime = learner.runtime
    if config.kind != "service":
        local = LocalConfig(
            kind=config.kind,
            budget_bytes=config.budget_bytes,
            per=config.per,
            share_by=share_by,
            ranking="random" if config.ranking == "random" else "herding",
            quality=config.quality,
            subsampling=config.subsampling,
            fields=fields,
        )
        yield _shared(local_memory(local, options), runtime, is_remote=False)
        return
    name = config.buffer or f"run-{run}"
    with Client(config.url) as client:
        open_buffer = partial(
            ServiceMemory,
            client,
            name,
            options=options,
            run=run,
            folder=folder / "mirror",
            via=config.replay,
            shape=runtime.stream.shape,
            fields=fields,
            is_written_online=learner.fills_memory,
            patience_s=config.patience_s,
            tell=lambda message: tell("wait", 0, 1, note=message),
            watch=_ingest_watch(tell),
        )
        if not runtime.is_first:
            runtime.barrier()  # there is a buffer
            memory = open_buffer()
            runtime.barrier()
            yield _shared(memory, runtime, is_remote=True)
            return
        # What a run wrote before its first checkpoint it will write again, into a buffer that is known to be its own.
        starts_over, mark = not (folder / "checkpoint.pt").is_file(), folder / "buffer.txt"
        is_own = config.buffer is None or (not is_new and mark.is_file() and mark.read_text() == run)
        may_empty = starts_over and is_own and learner.fills_memory
        is_made = _create_buffer(client, name, config, fields, share_by, is_new=starts_over, may_empty=may_empty)
        mark.write_text(run)
        try:
            memory = open_buffer()
            runtime.barrier()
            runtime.barrier()  # all have opened it: from here on it may be deleted and made again
            yield _shared(memory, runtime, is_remote=True)
            memory.finish()
        except Exception:
            with suppress(EngramError):  # the service may be what failed
                if is_made and not client.buffer(name).tasks:
                    client.delete_buffer(name)
            raise


def _create_buffer(
    client: Client,
    name: str,
    config: MemoryConfig,
    fields: dict[str, str],
    share_by: ShareBy,
    *,
    is_new: bool,
    may_empty: bool,
) -> bool:
    """The buffer exists; a new run finds nothing in it. True if it was made now.

    Raises:
        Conflict: a new run was given the buffer of another one, or it has other fields.
    """
    create = partial(
        client.create_buffer,
        name,
        budget_bytes=config.budget_bytes,
        per=config.per,
        share_by=share_by,
        subsampling=config.subsampling,
        quality=config.quality,
        fields=fields or None,
    )
    try:
        create()
        return True
    except Conflict:
        buffer = create(exist_ok=True)
    if may_empty and buffer.generation:
        client.delete_buffer(name)
        create()
        return True
    if is_new and buffer.tasks:
        raise Conflict(f"buffer {name!r} already holds {len(buffer.tasks)} tasks; name a new buffer for a new run")
    return False


def _ingest_watch(tell: Tell) -> Callable[[Ingest], None]:
    def see(ingest: Ingest) -> None:
        tell("remember", ingest.images_done, ingest.images_total, note=ingest.state)

    return see


def _shared(memory: Memory, runtime: Runtime, *, is_remote: bool) -> Memory:
    if runtime.world_size == 1:
        return memory
    return cast(Memory, _Shared(memory, runtime, is_remote))


@dataclass(frozen=True)
class _Shared:
    """The memory of several processes: all call each method that changes it."""

    _memory: Memory
    _runtime: Runtime
    _is_remote: bool

    def add(self, learned: Learned) -> None:
        """Keep exemplars of a task."""
        if self._runtime.is_first:
            self._memory.add(learned)
        if self._is_remote:
            self._seen_by_all()
            return
        state = self._runtime.broadcast(self._memory.state_dict() if self._runtime.is_first else None)
        if not self._runtime.is_first:
            self._memory.load_state_dict(state)

    def exchange(self, *args: Any, **given: Any) -> None:
        """Some come and some go: all processes say the same."""
        if self._runtime.is_first or not self._is_remote:
            self._memory.exchange(*args, **given)
        if self._is_remote:
            self._seen_by_all()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Become the memory whose `state_dict` this is."""
        if self._runtime.is_first or not self._is_remote:
            self._memory.load_state_dict(state)
        if self._is_remote:
            self._seen_by_all()

    def _seen_by_all(self) -> None:
        self._runtime.barrier()
        if not self._runtime.is_first:
            self._memory.refresh()
        self._runtime.barrier()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._memory, name)
