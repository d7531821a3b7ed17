"""Several processes that train together: this one is the first, the others are started beside it.

Each learns the same stream with its part of every batch. What one of them raises ends all, and the first raises it.
"""

from __future__ import annotations

import multiprocessing
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

import torch
from lightning_fabric.plugins.environments.cluster_environment import ClusterEnvironment

from engram.errors import EngramError, Unavailable

_JOIN_S = 60.0
_NOTICED_S = 1.0
"""A process that is killed has ended at most this long after its connections."""


@dataclass(frozen=True)
class Place:
    """Which of several processes this is, and where the first one listens."""

    rank: int = 0
    world_size: int = 1
    port: int = 0


class Environment(ClusterEnvironment):
    """A `Place` as Lightning Fabric asks for it."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self._place = place

    @property
    def creates_processes_externally(self) -> bool:
        """Always: `beside` starts them."""
        return True

    @property
    def main_address(self) -> str:
        """This machine."""
        return "127.0.0.1"

    @property
    def main_port(self) -> int:
        """Where the first process listens."""
        return self._place.port

    @staticmethod
    def detect() -> bool:
        """Never found by itself, always given."""
        return False

    def world_size(self) -> int:
        """How many processes there are."""
        return self._place.world_size

    def set_world_size(self, size: int) -> None:
        """It is known already."""

    def global_rank(self) -> int:
        """Which one this is."""
        return self._place.rank

    def set_global_rank(self, rank: int) -> None:
        """It is known already."""

    def local_rank(self) -> int:
        """The same: there is one machine."""
        return self._place.rank

    def node_rank(self) -> int:
        """There is one machine."""
        return 0


@contextmanager
def beside(work: Callable[[Place], object], count: int) -> Iterator[Place]:
    """The others of `count` processes do this work while the body of the `with` block does that of the first.

    Args:
        work: can be pickled; called in each of the other processes with its place.
        count: of all processes.

    Raises:
        Exception: what the body raised, or, where that only says that another process is gone, what that one raised.
        Unavailable: another process could not be started, or was ended from outside.
    """
    context = multiprocessing.get_context("spawn")
    threads = max(1, torch.get_num_threads() // count)
    port = _free_port()
    others: list[tuple[BaseProcess, Connection]] = []
    try:
        for rank in range(1, count):
            here, there = context.Pipe(duplex=False)
            arguments = (work, Place(rank, count, port), threads, there)
            # Not daemonic: those may not have children, and each reads its images with workers of its own.
            process: BaseProcess = context.Process(target=_work, args=arguments, name=f"engram-train-{rank}")
            process.start()
            there.close()
            others.append((process, here))
        _await_start(others)
        yield Place(0, count, port)
        for process, here in others:
            process.join(_JOIN_S)
            if (found := _received(here)) is not None:
                raise found
    except (EngramError, ValueError):
        raise
    except Exception as error:
        raised = [found for _, here in others if (found := _received(here)) is not None]
        if raised:
            raise raised[0] from error
        for process, _ in others:
            process.join(_NOTICED_S)
            if process.exitcode is not None and process.exitcode < 0:
                raise Unavailable(
                    f"a process of the run was ended from outside, by signal {-process.exitcode}; if memory ran short, "
                    "give fewer processes"
                ) from error
        raise
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        for process, here in others:
            if process.is_alive():
                process.terminate()
            process.join()
            here.close()


def _work(work: Callable[[Place], object], place: Place, threads: int, told: Connection) -> None:
    told.send(None)
    torch.set_num_threads(threads)
    try:
        work(place)
    except KeyboardInterrupt:
        pass
    except Exception as error:  # the outermost frame of this process: the first one gets it
        told.send(error if isinstance(error, EngramError | ValueError | OSError) else RuntimeError(str(error)))
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _await_start(others: list[tuple[BaseProcess, Connection]]) -> None:
    """All others work now. The first one would wait half an hour for one that never comes.

    Raises:
        Unavailable: one has ended.
    """
    for process, here in others:
        wait([here, process.sentinel])
        try:
            here.recv()
        except EOFError:
            raise Unavailable(
                "another process of the run could not be started: each runs the main module once more, so a script "
                "has to be a file and to start its run below `if __name__ == '__main__':`"
            ) from None


def _received(here: Connection) -> Exception | None:
    try:
        return here.recv() if here.poll(1.0) else None
    except (EOFError, OSError):
        return None


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port
