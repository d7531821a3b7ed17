"""Draws over HTTP: a question to the service, and the minibatch that it answers."""

from __future__ import annotations

from collections.abc import Sequence

from engram import batch, paths
from engram.batch import Batch
from engram.draw import Request
from engram.http import Http
from engram.schemas import Strategy


class PendingDraw:
    """A draw that was asked for. Exactly one of `finish` and `abandon` must be called."""

    def __init__(self, http: Http, path: str) -> None:
        self._http = http
        self._path = path
        self._started = http.start(path)

    def finish(self) -> Batch:
        """The minibatch; what goes wrong on the way is tried again, as in every read.

        Raises:
            EngramError: as `Client.draw`.
        """
        body = self._http.send("GET", self._path, started=self._started)
        return batch.decode(body) if body else batch.empty()

    def abandon(self) -> None:
        """Nobody wants it any more."""
        if self._started is not None:
            self._started.abandon()


class Draws:
    """The methods of `Client` that draw."""

    _http: Http

    def draw(
        self,
        buffer: str,
        size: int,
        *,
        seed: int = 0,
        step: int = 0,
        strategy: Strategy = "uniform",
        tasks: Sequence[int] | None = None,
        exclude_tasks: Sequence[int] = (),
        rank: int = 0,
        world_size: int = 1,
        generation: int | None = None,
    ) -> Batch:
        """A replay minibatch: a pure function of its arguments and the generation (None: the newest).

        It may be smaller than `size`, even empty, only at the last step of an `epoch`.

        Raises:
            NotFound: no such buffer, task or generation.
            Conflict: the buffer is empty, or has nothing but the excluded tasks.
            InvalidRequest: `size` is 0 or above the service's limit, `rank` is not in the world, or a number is none.
        """
        return self.ask(
            buffer,
            size,
            seed=seed,
            step=step,
            strategy=strategy,
            tasks=tasks,
            exclude_tasks=exclude_tasks,
            rank=rank,
            world_size=world_size,
            generation=generation,
        ).finish()

    def ask(
        self,
        buffer: str,
        size: int,
        *,
        seed: int = 0,
        step: int = 0,
        strategy: Strategy = "uniform",
        tasks: Sequence[int] | None = None,
        exclude_tasks: Sequence[int] = (),
        rank: int = 0,
        world_size: int = 1,
        generation: int | None = None,
    ) -> PendingDraw:
        """As `draw`, but only the question; `finish` of what is returned fetches and decodes the answer."""
        # Checked here as for draws without a service, so that every value is an integer or one of the strategies.
        wanted = Request(size, seed, step, strategy, tasks, exclude_tasks, rank, world_size)
        query = (
            f"size={wanted.size}&seed={wanted.seed}&step={wanted.step}&strategy={wanted.strategy}"
            f"&rank={wanted.rank}&world_size={wanted.world_size}"
        )
        if wanted.tasks is not None:
            query += f"&tasks={','.join(map(str, wanted.tasks))}"
        if wanted.exclude_tasks:
            query += f"&exclude_tasks={','.join(map(str, wanted.exclude_tasks))}"
        if generation is not None:
            query += f"&generation={generation:d}"
        return PendingDraw(self._http, f"{paths.of_buffer(buffer)}/draw?{query}")
