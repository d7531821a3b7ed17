"""What minibatches are drawn from: a service's buffer, a mirror or a buffer of this process, at one generation.

A source that is pinned to a generation draws the same batch for the same request for ever, whatever is committed
meanwhile, and whichever process asks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, replace
from itertools import islice
from reprlib import repr as shortened
from typing import Protocol

from engram.batch import Batch
from engram.client import Client
from engram.draw import Layout, Request
from engram.errors import Conflict
from engram.schemas import Manifest


class Snapshot(Protocol):
    """One generation of a buffer, in this process."""

    @property
    def manifest(self) -> Manifest:
        """Its packs."""

    @property
    def layout(self) -> Layout:
        """Where its exemplars are."""

    def draw(self, request: Request) -> Batch:
        """The minibatch of this request."""


class Held(Protocol):
    """A buffer whose packs are at hand: a mirror, or a buffer of this process."""

    def snapshot(self) -> Snapshot:
        """Its generation of now."""


Source = Held | tuple[Client, str]
"""A mirror or another buffer at hand, or a client and the name of a buffer."""


def check(source: Source) -> None:
    """Returns if this is a source.

    Raises:
        ValueError: it is something else.
    """
    if isinstance(source, tuple):
        is_source = len(source) == 2 and isinstance(source[0], Client) and isinstance(source[1], str)
    else:
        is_source = hasattr(source, "snapshot")
    if not is_source:
        name = source if isinstance(source, str) else "cifar"
        raise ValueError(
            f"batches are drawn from a Mirror, a LocalBuffer, or a client and the name of a buffer as in "
            f"(client, {name!r}), not from the {type(source).__name__} {shortened(source)}"
        )


class Pending(Protocol):
    """A batch that was asked for: it comes with `finish`, unless `abandon` is called."""

    def finish(self) -> Batch:
        """The batch."""

    def abandon(self) -> None:
        """Nobody wants it any more."""


class Pinned(Protocol):
    """A source at one generation."""

    @property
    def generation(self) -> int:
        """Which."""

    def ask(self, request: Request, step: int) -> Pending:
        """Ask for this request's batch of another step."""

    def layout(self) -> Layout:
        """Where the generation's exemplars are."""


def pin(source: Source, generation: int | None) -> Pinned:
    """The source at this generation; None is the one that it is at.

    Raises:
        NotFound: the service has no such buffer.
        Conflict: a buffer at hand is at another generation.
    """
    if isinstance(source, tuple):
        client, buffer = source
        return _Remote(client, buffer, client.buffer(buffer).generation if generation is None else generation)
    snapshot = source.snapshot()
    if generation is not None and snapshot.manifest.generation != generation:
        raise Conflict(
            f"batches of generation {generation} are wanted, this copy of the buffer is at "
            f"{snapshot.manifest.generation}: go on before it is refreshed, or draw from the service"
        )
    return _AtHand(snapshot)


def draw_ahead(ask: Callable[[int], Pending], steps: Iterable[int], count: int) -> Generator[Batch, None, None]:
    """The batches of these steps. `count` of them are asked for before the first is decoded: the service makes them."""
    left = iter(steps)
    pending: deque[Pending] = deque()
    try:
        while True:
            pending.extend(ask(step) for step in islice(left, count - len(pending)))
            if not pending:
                return
            yield pending.popleft().finish()
    finally:
        for unwanted in pending:
            unwanted.abandon()


@dataclass(frozen=True)
class _Remote:
    client: Client
    buffer: str
    generation: int

    def ask(self, request: Request, step: int) -> Pending:
        return self.client.ask(
            self.buffer,
            request.size,
            seed=request.seed,
            step=step,
            strategy=request.strategy,
            tasks=request.tasks,
            exclude_tasks=request.exclude_tasks,
            rank=request.rank,
            world_size=request.world_size,
            generation=self.generation,
        )

    def layout(self) -> Layout:
        return Layout(self.client.manifest(self.buffer, generation=self.generation).packs)


@dataclass(frozen=True)
class _AtHand:
    snapshot: Snapshot

    @property
    def generation(self) -> int:
        return self.snapshot.manifest.generation

    def ask(self, request: Request, step: int) -> Pending:
        return _Undrawn(self.snapshot, replace(request, step=step))

    def layout(self) -> Layout:
        return self.snapshot.layout


@dataclass(frozen=True)
class _Undrawn:
    snapshot: Snapshot
    request: Request

    def finish(self) -> Batch:
        return self.snapshot.draw(self.request)

    def abandon(self) -> None:
        pass
